"""Which tensor operations are there? This file is the only one of the room that others import.

Every operation is registered with torch.library under ``fedblocks::`` with a shape-and-dtype check that runs without
data, so that a wrong call is an error that names the value, on every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedblocks.kernels.reference import nf4 as _reference
from fedblocks.kernels.reference.head import LinearCrossEntropy, LinearKlTopK, top_k
from fedblocks.kernels.reference.nf4 import Nf4Weight, quantize_nf4
from fedblocks.kernels.reference.pointwise import RmsNorm, Rope, SwiGlu

__all__ = [
    "NUMERICS_CLASS",
    "Nf4Weight",
    "linear_cross_entropy",
    "linear_kl_topk",
    "nf4_dequant",
    "quantize_nf4",
    "rms_norm",
    "rope",
    "swiglu",
    "top_k",
]

NUMERICS_CLASS = 1
"""Raised by hand when an operation's results move beyond its tolerance; part of every prefix-cache key."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("fedblocks::nf4_dequant", mutates_args=())
def _nf4_dequant(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor,
    nested_absmax: Tensor,
    code: Tensor,
    offset: float,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return _reference.nf4_dequant(packed, absmax, nested_code, nested_absmax, code, offset, shape, dtype)


@_nf4_dequant.register_fake
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
    check = torch._check  # noqa: SLF001 - torch.library's documented way to check shapes under fake tensors
    check(len(shape) == 2, lambda: f"nf4_dequant: shape is {shape}, expected two sizes")
    n = shape[0] * shape[1]
    groups = (n + _reference.BLOCKSIZE - 1) // _reference.BLOCKSIZE
    nested = (groups + _reference.NESTED_BLOCKSIZE - 1) // _reference.NESTED_BLOCKSIZE
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
    return packed.new_empty(shape, dtype=dtype)


def nf4_dequant(weight: Nf4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decodes ``weight`` to ``dtype`` (N, K): fp32 arithmetic, one cast; bit-equal to bitsandbytes where that is right.

    With ``out`` (N, K), contiguous rows of a larger buffer for example, the result is written there and ``out``
    returned.

    Raises:
        ValueError: ``dtype`` is not fp32, bf16 or fp16, or ``out`` has another shape or dtype.
    """
    if dtype not in _FLOATS:
        raise ValueError(f"nf4_dequant: dtype is {dtype}, expected one of {', '.join(map(str, _FLOATS))}")
    if out is not None and (tuple(out.shape) != weight.shape or out.dtype != dtype):
        raise ValueError(f"nf4_dequant: out is {out.dtype} {tuple(out.shape)}, expected {dtype} {weight.shape}")
    decoded = _nf4_dequant(
        weight.packed,
        weight.absmax,
        weight.nested_code,
        weight.nested_absmax,
        weight.code,
        weight.offset,
        list(weight.shape),
        dtype,
    )
    return decoded if out is None else out.copy_(decoded)


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
