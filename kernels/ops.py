"""Which tensor operations are there? This file is the only one of the room that others import.

Every operation is registered with torch.library under ``fedblocks::`` with a shape-and-dtype check that runs without
data, so that a wrong call is an error that names the value, on every backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedblocks.kernels.reference import nf4 as _nf4
from fedblocks.kernels.reference import split as _split
from fedblocks.kernels.reference.adamw import Moments, Moments8Bit, adamw_step_
from fedblocks.kernels.reference.head import LinearCrossEntropy, LinearKlTopK, top_k
from fedblocks.kernels.reference.nf4 import Nf4Weight, quantize_nf4
from fedblocks.kernels.reference.pointwise import RmsNorm, Rope, SwiGlu

__all__ = [
    "NUMERICS_CLASS",
    "Moments",
    "Moments8Bit",
    "Nf4Weight",
    "adamw_step_",
    "frozen_nf4_linear",
    "linear_cross_entropy",
    "linear_kl_topk",
    "merge_split",
    "nf4_dequant",
    "quantize_nf4",
    "rms_norm",
    "rope",
    "split_fp32",
    "swiglu",
    "top_k",
]

NUMERICS_CLASS = 1
"""Raised by hand when an operation's results move beyond its tolerance; part of every prefix-cache key."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# Defined through Library, not custom_op: the first call of such an op imports the compiler, 67 MiB and 1.5 s.
_LIBRARY = torch.library.Library("fedblocks", "FRAGMENT")
_NF4_ARGS = "Tensor packed, Tensor absmax, Tensor nested_code, Tensor nested_absmax, Tensor code, float offset"
_LIBRARY.define(f"nf4_dequant({_NF4_ARGS}, SymInt[] shape, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"nf4_dequant_into({_NF4_ARGS}, Tensor(a!) out) -> ()")


@torch.library.impl(_LIBRARY, "nf4_dequant", "CompositeExplicitAutograd")
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor,
    nested_absmax: Tensor,
    code: Tensor,
    offset: float,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    out = packed.new_empty(shape, dtype=dtype)
    _nf4.nf4_dequant(packed, absmax, nested_code, nested_absmax, code, offset, out)
    return out


@torch.library.register_fake("fedblocks::nf4_dequant", lib=_LIBRARY)
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor,
    nested_absmax: Tensor,
    code: Tensor,
    offset: float,  # noqa: ARG001
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    _check_nf4(packed, absmax, nested_code, nested_absmax, code, shape, dtype)
    return packed.new_empty(shape, dtype=dtype)


_LIBRARY.impl("nf4_dequant_into", _nf4.nf4_dequant, "CompositeExplicitAutograd")


@torch.library.register_fake("fedblocks::nf4_dequant_into", lib=_LIBRARY)
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor,
    nested_absmax: Tensor,
    code: Tensor,
    offset: float,  # noqa: ARG001
    out: Tensor,
) -> None:
    _check_nf4(packed, absmax, nested_code, nested_absmax, code, list(out.shape), out.dtype)


def _check_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor,
    nested_absmax: Tensor,
    code: Tensor,
    shape: list[int],
    dtype: torch.dtype,
) -> None:
    check = torch._check  # noqa: SLF001 - torch.library's documented way to check shapes under fake tensors
    check(len(shape) == 2, lambda: f"nf4_dequant: shape is {shape}, expected two sizes")
    n = shape[0] * shape[1]
    groups = (n + _nf4.BLOCKSIZE - 1) // _nf4.BLOCKSIZE
    nested = (groups + _nf4.NESTED_BLOCKSIZE - 1) // _nf4.NESTED_BLOCKSIZE
    for name, part, length in (
        ("packed", packed, (n + 1) // 2),
        ("absmax", absmax, groups),
        ("nested_code", nested_code, 256),
        ("nested_absmax", nested_absmax, nested),
        ("code", code, 16),
    ):
        check(
            part.dim() == 1 and part.shape[0] == length,
            lambda name=name, part=part, length=length: (
                f"nf4_dequant: {name} has shape {tuple(part.shape)}, expected ({length},) for a weight of {shape}"
            ),
        )
    check(dtype in _FLOATS, lambda: f"nf4_dequant: dtype is {dtype}, expected one of {_FLOATS}")


def nf4_dequant(weight: Nf4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decodes ``weight`` to ``dtype`` (N, K): fp32 arithmetic, one cast; bit-equal to bitsandbytes where that is right.

    With ``out`` (N, K), contiguous rows of a larger buffer for example, the result is written there and ``out``
    returned; nothing as large as the weight is allocated then.

    Raises:
        ValueError: ``dtype`` is not fp32, bf16 or fp16, or ``out`` has another shape or dtype or is not contiguous.
    """
    if dtype not in _FLOATS:
        raise ValueError(f"nf4_dequant: dtype is {dtype}, expected one of {', '.join(map(str, _FLOATS))}")
    parts = (
        weight.packed,
        weight.absmax,
        weight.nested_code,
        weight.nested_absmax,
        weight.code,
        weight.offset,
    )
    if out is None:
        return torch.ops.fedblocks.nf4_dequant(*parts, list(weight.shape), dtype)
    if tuple(out.shape) != weight.shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"nf4_dequant: out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}, expected {dtype} "
            f"{weight.shape}, contiguous"
        )
    torch.ops.fedblocks.nf4_dequant_into(*parts, out)
    return out


def frozen_nf4_linear(x: Tensor, parts: tuple[Nf4Weight, ...], bias: Tensor | None = None) -> Tensor:
    """``y = x Wᵀ + bias`` with W (N, K), the decoded ``parts`` below each other: the bits of a linear layer over W.

    W is decoded for the forward pass and again for the backward pass, and freed after each: between them nothing of it
    is held but the 4-bit parts. W gets no gradient.

    Args:
        x: (..., K) in fp32, bf16 or fp16; W is decoded to its dtype.
        parts: NF4 weights (N_i, K) with N = sum of N_i; the rows q | k | v of one matrix, for example.
        bias: (N,), in x's dtype.

    Raises:
        ValueError: no part, or one whose K is not that of x.
    """
    if not parts or any(part.shape[1] != x.shape[-1] for part in parts):
        raise ValueError(
            f"frozen_nf4_linear: the parts have shapes {[part.shape for part in parts]}, expected (N, {x.shape[-1]}) "
            f"each, for x of shape {tuple(x.shape)}"
        )
    return _FrozenNf4Linear.apply(x, bias, parts)


def _decoded(parts: tuple[Nf4Weight, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = [part.shape[0] for part in parts]
    weight = torch.empty(sum(rows), parts[0].shape[1], dtype=dtype, device=device)
    for part, place in zip(parts, weight.split(rows), strict=True):
        nf4_dequant(part, dtype, out=place)
    return weight


class _FrozenNf4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, parts: tuple[Nf4Weight, ...]) -> Tensor:
        ctx.parts, ctx.device = parts, x.device
        return torch.nn.functional.linear(x, _decoded(parts, x.dtype, x.device), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = dy @ _decoded(ctx.parts, dy.dtype, ctx.device) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None


def linear_cross_entropy(h: Tensor, weight: Tensor, target: Tensor, scale: float) -> Tensor:
    """``scale · sum of -log softmax(h Wᵀ)[target]``, nats; 0 with gradient 0 for no rows.

    Args:
        h: hidden rows after the final norm (N, H); only rows with a label.
        weight: the head (V, H); gets a gradient only if it requires one.
        target: (N,) int64.
        scale: usually 1 / number of target tokens of the accumulation window.
    """
    return LinearCrossEntropy.apply(h, weight, target, scale)


def linear_kl_topk(h: Tensor, weight: Tensor, ids: Tensor, logp: Tensor, log_tail: Tensor, scale: float) -> Tensor:
    """``scale · sum of KL_K(p || q)`` over rows, nats (methods.md 5.1); p is the record that :func:`top_k` made.

    Args:
        h: hidden rows after the final norm (N, H).
        weight: the head (V, H); gets a gradient only if it requires one.
        ids: (N, K) int64.
        logp: (N, K) fp32.
        log_tail: (N,) fp32, log of the mass outside the K.
        scale: usually lambda / number of anchor tokens.
    """
    return LinearKlTopK.apply(h, weight, ids, logp, log_tail, scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis: ``weight · (x / √(mean x² + eps))``, statistics in fp32."""
    return RmsNorm.apply(x, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-rotation convention: x (..., T, hd), cos and sin (T, hd)."""
    return Rope.apply(x, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate)·up`` of (..., gate | up): half as wide."""
    return SwiGlu.apply(gate_up)


def split_fp32(value: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The halves of fp32 numbers: bf16, rounded half away from zero, and the int16 remainder; exact (runtime.md 4.2).

    A magnitude of 3.396e38 or more has an infinite high half, as in every rounding to bf16; :func:`merge_split` still
    gives it back exactly.

    Args:
        value: fp32, any shape.
        out: contiguous tensors (bf16, int16) of that shape to write into; nothing of the size of ``value`` is allocated
            then.

    Raises:
        ValueError: another dtype or shape.
    """
    hi, lo = out or (
        torch.empty(value.shape, dtype=torch.bfloat16, device=value.device),
        torch.empty(value.shape, dtype=torch.int16, device=value.device),
    )
    _check_split("split_fp32", value, hi, lo)
    _split.split_fp32(value.detach().contiguous(), hi.detach(), lo)
    return hi, lo


def merge_split(hi: Tensor, lo: Tensor, out: Tensor | None = None) -> Tensor:
    """The fp32 numbers whose halves :func:`split_fp32` made.

    Args:
        hi: bf16, any shape.
        lo: int16, the same shape.
        out: a contiguous fp32 tensor of that shape to write into.

    Raises:
        ValueError: another dtype or shape.
    """
    out = torch.empty(hi.shape, dtype=torch.float32, device=hi.device) if out is None else out
    _check_split("merge_split", out, hi, lo)
    _split.merge_split(hi.detach().contiguous(), lo.contiguous(), out.detach())
    return out


def _check_split(name: str, value: Tensor, hi: Tensor, lo: Tensor) -> None:
    for part, dtype in ((value, torch.float32), (hi, torch.bfloat16), (lo, torch.int16)):
        if part.dtype != dtype or part.shape != value.shape:
            raise ValueError(
                f"{name}: got {value.dtype} {tuple(value.shape)}, {hi.dtype} {tuple(hi.shape)} and {lo.dtype} "
                f"{tuple(lo.shape)}, expected float32, bfloat16 and int16 of one shape"
            )
