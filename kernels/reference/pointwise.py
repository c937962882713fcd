"""What do the pointwise parts of a decoder block compute? Norm, rotation and gate, forward and backward.

Plain torch in few passes over memory, any float dtype; statistics in fp32 (fp64 for fp64 input). This is the
specification of the device kernels, and what runs where there is none. Source: runtime.md 5.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``y = weight · (s · rstd)`` of s = x + residual, rstd = 1/√(mean s² + eps), the last product in x's dtype.

    Returns y and s as x, and rstd (...) in fp32 (fp64). Without a residual s is x itself.
    """
    s = x if residual is None else x + residual
    wide = _wide(s)
    rstd = torch.rsqrt_(wide.square().mean(-1, keepdim=True).add_(eps))
    return weight * (wide * rstd).to(s.dtype), s, rstd.squeeze(-1)


def rms_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw) of :func:`add_rms_norm`; ``ds`` is the gradient that reaches s beside the norm.

    dx is the gradient of x and of the residual alike.
    """
    rstd = rstd.unsqueeze(-1)
    wide_dy = _wide(dy)
    normed = _wide(s) * rstd
    dx = dw = None
    if need_dw:
        dw = (wide_dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
    if need_dx:
        g = wide_dy * _wide(weight)
        # dx = rstd·(g - normed·mean(g·normed)), with the factor rstd drawn into the row's numbers
        inner = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(-s.shape[-1])
        dx = torch.addcmul(g, normed, inner).mul_(rstd)
        dx = dx.to(s.dtype) if ds is None else dx.add_(ds).to(s.dtype)
    return dx, dw


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    """Half-rotation of x (..., T, hd): ``(x1·cos1 - x2·sin1, x2·cos2 + x1·sin2)``.

    ``inverse`` is the transposed map, which is the backward pass and, for tables of equal halves, the rotation back.
    """
    half = x.shape[-1] // 2
    y = x * cos
    if inverse:
        y[..., :half].addcmul_(x[..., half:], sin[..., half:])
        y[..., half:].addcmul_(x[..., :half], sin[..., :half], value=-1)
    else:
        # Products and sums apart, each rounded once: the same bits as x·cos + rotate_half(x)·sin.
        y[..., :half].sub_(x[..., half:] * sin[..., :half])
        y[..., half:].add_(x[..., :half] * sin[..., half:])
    return y


def rope_(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> None:
    """The same in place, of x (tokens, heads, hd), where token t has row ``t % P`` of the tables (P, hd)."""
    if x.numel():
        repeats = -(-len(x) // len(cos))
        tables = (table.repeat(repeats, 1)[: len(x)].unsqueeze(1) for table in (cos, sin))
        x.copy_(rope(x, *tables, inverse=inverse))


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate)·up`` of the joined matrix (..., gate | up)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(dh: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of the joined matrix."""
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.silu(gate), dh, out=d_up)
    torch.ops.aten.silu_backward.grad_input(dh * up, gate, grad_input=d_gate)
    return d_gate_up


def swiglu_backward_(dh: Tensor, gate_up: Tensor, *, need_h: bool) -> Tensor | None:
    """Overwrites ``gate_up`` with its gradient; returns :func:`swiglu` of what it was if ``need_h``."""
    h = swiglu(gate_up) if need_h else None
    gate_up.copy_(swiglu_backward(dh, gate_up))
    return h
