"""How does a block run around attention in two steps that keep little? What lies before it, and what lies behind it.

    attention_in:  norm → q|k|v → rotary             keeps its input and one number a row
    mlp:           norm → gate|up → silu·up → down   keeps its input, one number a row, gate and up

The norm's output and the product ``silu(gate)·up`` are made again in the backward pass; the gradients of gate and up
overwrite them. A frozen matrix (one without ``requires_grad``, or packed in NF4) gets no gradient and costs no product
for it. Source: runtime.md 5.2, block layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from fedblocks.kernels.nf4 import matmul, matmul_dgrad
from fedblocks.kernels.pointwise import add_rms_norm, rms_norm_backward, rope_, swiglu, swiglu_backward_
from fedblocks.kernels.reference.nf4 import Nf4Weight

Matrix = Tensor | tuple[Nf4Weight, ...]
"""(N, K): there, or parts to be decoded at each use."""


def _times(x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    return matmul(x, weight, bias) if isinstance(weight, tuple) else linear(x, weight, bias)


def _times_transposed(dy: Tensor, weight: Matrix) -> Tensor:
    return matmul_dgrad(dy, weight) if isinstance(weight, tuple) else dy @ weight


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return dy.T @ x


def _bias_gradient(dy: Tensor, bias: Tensor) -> Tensor:
    return dy.sum(0, dtype=torch.float32 if dy.dtype != torch.float64 else None).to(bias.dtype)


def _graded(weight: Matrix) -> Tensor | None:
    """The tensor that autograd is to see, None for a packed matrix."""
    return weight if isinstance(weight, Tensor) else None


class AttentionIn(torch.autograd.Function):
    """x (B, T, H) -> q (B, T, nh, hd), k and v (B, T, nkv, hd), rotated; views of one tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        packed: tuple[Nf4Weight, ...] | None,
        tables: tuple[Tensor, Tensor],
        heads: tuple[int, int],
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        size, length, hidden = x.shape
        matrix: Matrix = packed if weight is None else weight  # type: ignore[assignment]
        y, _, rstd = add_rms_norm(x.view(-1, hidden), None, norm, eps)
        joined = _times(y, matrix, bias)
        head_dim = tables[0].shape[-1]
        by_head = joined.view(size * length, -1, head_dim)
        num_heads, num_kv = heads
        rope_(by_head[:, : num_heads + num_kv], *tables, inverse=False)
        ctx.save_for_backward(x, norm, weight, bias, rstd, *tables)
        ctx.packed, ctx.heads, ctx.eps = packed, heads, eps
        q, k, v = by_head.view(size, length, -1, head_dim).split((num_heads, num_kv, num_kv), dim=2)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, weight, bias, rstd, cos, sin = ctx.saved_tensors
        need_x, need_norm, need_weight, need_bias = ctx.needs_input_grad[:4]
        rows = x.view(-1, x.shape[-1])
        num_heads, num_kv = ctx.heads
        d_by_head = torch.cat((dq, dk, dv), dim=2).flatten(0, 1)
        rope_(d_by_head[:, : num_heads + num_kv], cos, sin, inverse=True)
        d_joined = d_by_head.flatten(1)
        d_weight = d_bias = dx = d_norm = None
        if need_weight:
            d_weight = _weight_gradient(d_joined, add_rms_norm(rows, None, norm, ctx.eps)[0])
        if need_bias:
            d_bias = _bias_gradient(d_joined, bias)
        if need_x or need_norm:
            dy = _times_transposed(d_joined, ctx.packed if weight is None else weight)
            dx, d_norm = rms_norm_backward(dy, None, rows, norm, rstd, need_dx=need_x, need_dw=need_norm)
        return None if dx is None else dx.view_as(x), d_norm, d_weight, d_bias, None, None, None, None


class Mlp(torch.autograd.Function):
    """x (..., H) -> x + down(silu(gate)·up) of the normed x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        gate_up: Tensor | None,
        gate_up_bias: Tensor | None,
        down: Tensor | None,
        down_bias: Tensor | None,
        packed: tuple[tuple[Nf4Weight, ...] | None, tuple[Nf4Weight, ...] | None],
        eps: float,
    ) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        y, _, rstd = add_rms_norm(rows, None, norm, eps)
        joined = _times(y, packed[0] if gate_up is None else gate_up, gate_up_bias)  # type: ignore[arg-type]
        out = _times(swiglu(joined), packed[1] if down is None else down, down_bias)  # type: ignore[arg-type]
        out += rows
        ctx.save_for_backward(x, norm, gate_up, gate_up_bias, down, down_bias, rstd, joined)
        ctx.packed, ctx.eps = packed, eps
        return out.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, gate_up, gate_up_bias, down, down_bias, rstd, joined = ctx.saved_tensors
        need_x, need_norm, need_gate_up, need_gate_up_bias, need_down, need_down_bias = ctx.needs_input_grad[:6]
        rows = x.view(-1, x.shape[-1])
        d_rows = d_out.reshape(rows.shape)
        d_down = d_gate_up = d_gate_up_bias = dx = d_norm = None
        d_down_bias = _bias_gradient(d_rows, down_bias) if need_down_bias else None
        dh = _times_transposed(d_rows, ctx.packed[1] if down is None else down)
        h = swiglu_backward_(dh, joined, need_h=need_down)
        torch.autograd.graph.increment_version(joined)  # a kernel's writes are not counted: a second pass must fail
        if h is not None:
            d_down = _weight_gradient(d_rows, h)
            del h
        del dh
        if need_gate_up:
            d_gate_up = _weight_gradient(joined, add_rms_norm(rows, None, norm, ctx.eps)[0])
        if need_gate_up_bias:
            d_gate_up_bias = _bias_gradient(joined, gate_up_bias)
        if need_x or need_norm:
            dy = _times_transposed(joined, ctx.packed[0] if gate_up is None else gate_up)
            dx, d_norm = rms_norm_backward(dy, d_rows, rows, norm, rstd, need_dx=need_x, need_dw=need_norm)
        gradients = (d_norm, d_gate_up, d_gate_up_bias, d_down, d_down_bias)
        return None if dx is None else dx.view_as(x), *gradients, None, None


def attention_in(
    x: Tensor,
    norm: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    tables: tuple[Tensor, Tensor],
    heads: tuple[int, int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projection and rotation: q (B, T, nh, hd), k and v (B, T, nkv, hd).

    Args:
        x: (B, T, H).
        weight: rows q | k | v, (nh·hd + 2·nkv·hd, H).
        tables: cos and sin, (T, hd).
        heads: nh, nkv.
    """
    packed = weight if isinstance(weight, tuple) else None
    return AttentionIn.apply(x.contiguous(), norm, _graded(weight), bias, packed, tables, heads, eps)


def mlp(
    x: Tensor,
    norm: Tensor,
    gate_up: Matrix,
    gate_up_bias: Tensor | None,
    down: Matrix,
    down_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``x + down(silu(gate)·up)`` of the normed x (..., H); gate | up are the rows of (2·I, H), down is (H, I)."""
    packed = tuple(m if isinstance(m, tuple) else None for m in (gate_up, down))
    weights = (_graded(gate_up), gate_up_bias, _graded(down), down_bias)
    return Mlp.apply(x.contiguous(), norm, *weights, packed, eps)
