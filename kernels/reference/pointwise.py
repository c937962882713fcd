"""What do the pointwise parts of a decoder block compute? Norm, rotation and gate, each with a short backward pass.

Written as autograd functions because each keeps only its input (and one number per row) and makes fewer passes over
memory than the chain of single operations would. Statistics are taken in fp32 (fp64 for fp64 input). Source: runtime.md
5.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class RmsNorm(torch.autograd.Function):
    """``y = weight · (x · rstd)``, rstd = 1/√(mean x² + eps); the last product in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        rstd = torch.rsqrt_(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, rstd)
        return weight * (wide * rstd).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        wide_dy = _wide(dy)
        normed = _wide(x) * rstd
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = (wide_dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = wide_dy * _wide(weight)
            # dx = rstd·(g - normed·mean(g·normed)), with the factor rstd drawn into the row's numbers
            inner = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(-x.shape[-1])
            dx = torch.addcmul(g, normed, inner).mul_(rstd).to(x.dtype)
        return dx, dw, None


class Rope(torch.autograd.Function):
    """Half-rotation: ``(x1·cos1 - x2·sin1, x2·cos2 + x1·sin2)``; the backward is the rotation the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = x * cos
        # Products and sums apart, each rounded once: the same bits as x·cos + rotate_half(x)·sin.
        y[..., :half].sub_(x[..., half:] * sin[..., :half])
        y[..., half:].add_(x[..., :half] * sin[..., half:])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = dy.shape[-1] // 2
        dx = dy * cos
        dx[..., :half].addcmul_(dy[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(dy[..., :half], sin[..., :half], value=-1)
        return dx, None, None


class SwiGlu(torch.autograd.Function):
    """``silu(gate)·up`` of the joined matrix (..., gate | up); keeps that alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), dh, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dh * up, gate, grad_input=d_gate)
        return d_gate_up
