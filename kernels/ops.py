"""Which tensor operations are there? This file is the only one of the room that others import.

An operation is called here; who carries it out (a compiled pack, Triton, torch) is decided by ``dispatch.py``, and what
it must compute is stated in plain torch under ``reference/``. ``library.py`` registers the same with torch.library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedblocks.kernels import calibration
from fedblocks.kernels import library as _library
from fedblocks.kernels import nf4 as _nf4
from fedblocks.kernels.delta import EncodedRows, delta_encode
from fedblocks.kernels.dispatch import DISPATCHER, BackendError, Event, KernelSettings
from fedblocks.kernels.fused import attention_in, mlp
from fedblocks.kernels.head import LinearCrossEntropy, LinearKlTopK, top_k
from fedblocks.kernels.launcher import Launcher
from fedblocks.kernels.optimizer import adamw_step_, square_norm
from fedblocks.kernels.packs.pack_file import sizes as pack_sizes
from fedblocks.kernels.pointwise import RmsNorm, Rope, SwiGlu
from fedblocks.kernels.reference import split as _split
from fedblocks.kernels.reference.adamw import Moments, Moments8Bit
from fedblocks.kernels.reference.nf4 import Nf4Weight, quantize_nf4
from fedblocks.kernels.slim import Ranges, SlimLinear

__all__ = [
    "DISPATCHER",
    "NUMERICS_CLASS",
    "BackendError",
    "EncodedRows",
    "Event",
    "KernelSettings",
    "Moments",
    "Moments8Bit",
    "Nf4Weight",
    "Ranges",
    "adamw_step_",
    "attention_in",
    "calibration",
    "delta_encode",
    "frozen_nf4_linear",
    "linear_cross_entropy",
    "linear_kl_topk",
    "merge_split",
    "mlp",
    "nf4_dequant",
    "pack_sizes",
    "quantize_nf4",
    "rms_norm",
    "rope",
    "slim_linear",
    "split_fp32",
    "square_norm",
    "swiglu",
    "top_k",
]

NUMERICS_CLASS = 1
"""Raised by hand when an operation's results move beyond its tolerance; part of every prefix-cache key."""

_FLOATS = _library.FLOATS

DISPATCHER.add_rung("pack", Launcher())  # opens nothing before a tensor on a GPU asks


def nf4_dequant(weight: Nf4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decodes ``weight`` to ``dtype`` (N, K): fp32 arithmetic, one cast; bit-equal to bitsandbytes where that is right.

    With ``out`` (N, K), contiguous rows of a larger buffer for example, the result is written there and ``out``
    returned; nothing as large as the weight is allocated then.

    Raises:
        ValueError: ``dtype`` is not fp32, bf16 or fp16, or ``out`` has another shape or dtype or is not contiguous.
    """
    if dtype not in _FLOATS:
        raise ValueError(f"nf4_dequant: dtype is {dtype}, expected one of {', '.join(map(str, _FLOATS))}")
    if out is None:
        out = weight.packed.new_empty(weight.shape, dtype=dtype)
    elif tuple(out.shape) != weight.shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"nf4_dequant: out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}, expected {dtype} "
            f"{weight.shape}, contiguous"
        )
    _nf4.nf4_dequant(*weight.buffers, weight.offset, out)
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
    return _nf4.FrozenNf4Linear.apply(x, bias, parts)


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


def slim_linear(
    x: Tensor,
    whole: Tensor,
    leaf: Tensor,
    rows: Ranges | None,
    bias: Tensor | None = None,
    bias_leaf: Tensor | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias`` with W ``whole``, of which the slice ``leaf`` trains: no other gradient of W is ever made.

    ``whole`` must hold the values of ``leaf``, in x's dtype; who changes the leaf copies them.

    Args:
        x: (..., K).
        whole: (N, K).
        leaf: the rows ``rows`` of W below each other (n, K); or its first columns (N, k) where ``rows`` is None.
        rows: ranges of rows, ascending.
        bias: (N,), in x's dtype.
        bias_leaf: the entries ``rows`` of the bias, all of them where that is None; the only ones with a gradient.
    """
    return SlimLinear.apply(x, leaf, bias_leaf, whole, None if bias is None else bias.detach(), rows)


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
