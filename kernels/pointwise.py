"""How do norm, rotation and gate take part in autograd? Each keeps its input and one number a row, no more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedblocks.kernels import launches
from fedblocks.kernels.dispatch import DISPATCHER, Operation
from fedblocks.kernels.reference import pointwise as reference

add_rms_norm = Operation("add_rms_norm", launches.add_rms_norm, reference.add_rms_norm)
rms_norm_backward = Operation("rms_norm_backward", launches.rms_norm_backward, reference.rms_norm_backward)
rope_ = Operation("rope_", launches.rope_, reference.rope_)
swiglu = Operation("swiglu", launches.swiglu, reference.swiglu)
swiglu_backward_ = Operation("swiglu_backward_", launches.swiglu_backward_, reference.swiglu_backward_)


class RmsNorm(torch.autograd.Function):
    """y of :func:`reference.add_rms_norm` without a residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, _, rstd = add_rms_norm(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        return *rms_norm_backward(dy, None, x, weight, rstd, need_dx=need_dx, need_dw=need_dw), None


class Rope(torch.autograd.Function):
    """Rotates (..., T, hd) into a new tensor; the backward is the transposed map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(dy, *ctx.saved_tensors, inverse=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    """A rotated copy: in torch in one pass; by a kernel in the place of the copy, heads side by side.

    Two forms of call occur: x (B, heads, T, hd) with tables (T, hd), and x (N, heads, hd) with tables (N, 1, hd).
    """
    if not DISPATCHER.rungs("rope_", x):
        return reference.rope(x, cos, sin, inverse=inverse)
    by_position = cos.dim() == 2
    heads_last = (x.transpose(1, 2) if by_position else x).contiguous()  # (..., heads, hd)
    y = heads_last.clone() if heads_last.data_ptr() == x.data_ptr() else heads_last
    head_dim = x.shape[-1]
    rope_(y.view(-1, y.shape[-2], head_dim), cos.reshape(-1, head_dim), sin.reshape(-1, head_dim), inverse=inverse)
    return y.transpose(1, 2) if by_position else y


class SwiGlu(torch.autograd.Function):
    """``silu(gate)·up`` of (..., gate | up); keeps that alone; a kernel makes its gradient in its place."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu(gate_up.flatten(0, -2)).view(*gate_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if not DISPATCHER.rungs("swiglu_backward_", gate_up):
            return reference.swiglu_backward(dh, gate_up)
        swiglu_backward_(dh.flatten(0, -2).contiguous(), gate_up.flatten(0, -2), need_h=False)
        torch.autograd.graph.increment_version(gate_up)  # a kernel's writes are not counted: a second pass must fail
        return gate_up
