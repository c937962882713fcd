"""How does each operation become launches of device kernels? The same for the JIT and for packs; imports no Triton.

Each function has the signature of its operation plus ``run``, which carries out one :class:`Launch`. It allocates its
outputs and the workspace it names, nothing else, and never waits for the device. A call that the kernels do not cover
raises :class:`NotSupportedError` before the first launch; an operation of several launches, which only writes its own
result, may raise it between two of them.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fedblocks.kernels.catalog import (
    ADAMW_BLOCK,
    DELTA_BLOCK,
    GEMM_GROUP,
    GEMM_M,
    GEMM_N,
    NF4_BLOCK,
    NORM_BLOCK,
    ROPE_HALVES,
    ROPE_HEADS,
    SWIGLU_BLOCK,
    TOP_BLOCK,
    VOCAB_BLOCK,
    Launch,
    power_of_two,
    row_block,
    row_warps,
    variant,
)
from fedblocks.kernels.dispatch import NotSupportedError, Run
from fedblocks.kernels.reference.adamw import GOLDEN, Moments, Moments8Bit, dither_table
from fedblocks.kernels.reference.head import LOG_TAIL_FLOOR, TAIL_MIN
from fedblocks.kernels.reference.nf4 import Nf4Weight

DTYPE_NAMES: Final = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_NORM_PROGRAMS: Final = 256
"""Programs that share the rows of a norm's backward pass: one partial sum of the weight's gradient each."""


def _tiles(n: int, block: int) -> int:
    return -(-n // block)


def _form_of(x: Tensor, *same: Tensor | None) -> str:
    """Name of the dtype of ``x``, which ``same`` must share; all of them whole and in order."""
    name = DTYPE_NAMES.get(x.dtype)
    if name is None:
        raise NotSupportedError(f"there are no kernels for {x.dtype}")
    for other in (x, *same):
        if other is not None and other.dtype != x.dtype:
            raise NotSupportedError(f"the operands are {x.dtype} and {other.dtype}, expected one dtype")
        if other is not None and not other.is_contiguous():
            raise NotSupportedError(f"an operand of shape {tuple(other.shape)} has strides {other.stride()}")
    return name


def _rows_of(x: Tensor) -> str:
    """The same for a tensor whose rows are whole but may lie apart."""
    if x.stride(-1) != 1:
        raise NotSupportedError(f"an operand of shape {tuple(x.shape)} has strides {x.stride()}")
    name = DTYPE_NAMES.get(x.dtype)
    if name is None:
        raise NotSupportedError(f"there are no kernels for {x.dtype}")
    return name


# ---- NF4 ----


def nf4_dequant(
    run: Run,
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor,
    nested_absmax: Tensor,
    code: Tensor,
    offset: float,
    out: Tensor,
) -> None:
    """Decodes into ``out`` (N, K), contiguous."""
    n = out.numel()
    form = variant(_form_of(out), 4, BLOCK=NF4_BLOCK)
    args = (packed, absmax, nested_code, nested_absmax, code, out, offset, n)
    if n:
        run(Launch("nf4_dequant", form, (_tiles(n, 2 * NF4_BLOCK), 1, 1), args))


def nf4_linear(run: Run, x: Tensor, parts: tuple[Nf4Weight, ...]) -> Tensor:
    """``x Wᵀ`` (M, N) of x (M, K), W the decoded parts below each other; a launch for each part."""
    m, k = x.shape
    dtype = _dots(x, k)
    rows = [part.shape[0] for part in parts]
    y = x.new_empty(m, sum(rows))
    form = variant(dtype, 4, BLOCK_M=GEMM_M, BLOCK_N=GEMM_N, GROUP=GEMM_GROUP)
    for part, place in zip(parts, y.split(rows, dim=1), strict=True):
        if m:
            grid = (_tiles(m, GEMM_M) * _tiles(part.shape[0], GEMM_N), 1, 1)
            args = (x, *part.buffers, place, part.offset, m, part.shape[0], k, y.stride(0))
            run(Launch("nf4_linear", form, grid, args))
    return y


def nf4_linear_dgrad(run: Run, dy: Tensor, parts: tuple[Nf4Weight, ...]) -> Tensor:
    """``dy W`` (M, K) of dy (M, N); a launch for each part, sums in fp32."""
    m, k = len(dy), parts[0].shape[1]
    dtype = _dots(dy, k)
    dx = dy.new_empty(m, k, dtype=torch.float32)
    grid = (_tiles(m, GEMM_M) * (k // 64), 1, 1)
    for index, (part, place) in enumerate(zip(parts, dy.split([part.shape[0] for part in parts], dim=1), strict=True)):
        form = variant(dtype, 4, ADD=index > 0, BLOCK_M=GEMM_M, BLOCK_N=GEMM_N, GROUP=GEMM_GROUP)
        if m:
            args = (place, *part.buffers, dx, part.offset, m, part.shape[0], k, dy.stride(0))
            run(Launch("nf4_linear_dgrad", form, grid, args))
    return dx.to(dy.dtype)


def _dots(x: Tensor, k: int) -> str:
    if k % 64:
        raise NotSupportedError(f"rows of {k} columns, expected a multiple of 64: a group of scales would cross a row")
    return _form_of(x)


# ---- norm, rotation, gate ----


def add_rms_norm(
    run: Run, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, rstd) of s = x + residual, all contiguous; without a residual s is x itself."""
    dtype = _form_of(x, residual, weight)
    num_cols = x.shape[-1]
    rows = x.numel() // num_cols
    y = torch.empty_like(x)
    s = x if residual is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rows:
        block = row_block(num_cols)
        form = variant(dtype, row_warps(block), HAS_RESIDUAL=residual is not None, BLOCK=block)
        other = x if residual is None else residual
        run(Launch("add_rms_norm", form, (rows, 1, 1), (x, other, weight, y, s, rstd, num_cols, eps)))
    return y, s, rstd


def rms_norm_backward(
    run: Run,
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    need_dx: bool,  # noqa: ARG001 - the kernel makes dx in any case
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw) of :func:`add_rms_norm`; dx is the gradient of x and of the residual alike."""
    dtype = _form_of(s, dy, ds, weight)
    num_cols = s.shape[-1]
    rows = s.numel() // num_cols
    dx = torch.empty_like(s)
    programs = min(rows, _NORM_PROGRAMS) if need_dw else rows
    partial = rstd.new_empty((programs, num_cols) if need_dw else (1, 1))
    if rows:
        block = row_block(num_cols)
        form = variant(dtype, row_warps(block), HAS_DS=ds is not None, HAS_DW=need_dw, BLOCK=block)
        args = (dy, dy if ds is None else ds, s, weight, rstd, dx, partial, rows, num_cols)
        run(Launch("rms_norm_backward", form, (programs, 1, 1), args))
    return dx, partial.sum(0).to(weight.dtype) if need_dw else None


def rope_(run: Run, x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> None:
    """Rotates x (tokens, heads, hd) in place; heads lie side by side, tokens may lie further apart.

    Token t has row ``t % len(cos)`` of the tables (positions, hd).
    """
    tokens, heads, head_dim = x.shape
    dtype = _rows_of(x)
    if x.stride(1) != head_dim or _form_of(cos, sin) != dtype:
        raise NotSupportedError(f"strides {x.stride()} of {tuple(x.shape)}, tables {cos.dtype} for {x.dtype}")
    half = head_dim // 2
    if tokens and heads:
        block = next((size for size in ROPE_HALVES if size >= half), power_of_two(half))
        form = variant(dtype, 4, INVERSE=inverse, BLOCK_HEADS=ROPE_HEADS, BLOCK_HALF=block)
        args = (x, cos, sin, x.stride(0), heads, len(cos), half)
        run(Launch("rope_", form, (tokens, _tiles(heads, ROPE_HEADS), 1), args))


def swiglu(run: Run, gate_up: Tensor) -> Tensor:
    """``silu(gate)·up`` of gate_up (rows, 2·width), contiguous: (rows, width)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    form = variant(_form_of(gate_up), 4, BLOCK=SWIGLU_BLOCK)
    h = gate_up.new_empty(rows, width)
    if h.numel():
        run(Launch("swiglu", form, (rows, _tiles(width, SWIGLU_BLOCK), 1), (gate_up, h, width)))
    return h


def swiglu_backward_(run: Run, dh: Tensor, gate_up: Tensor, *, need_h: bool) -> Tensor | None:
    """Overwrites gate_up with its gradient; returns ``silu(gate)·up`` if ``need_h``."""
    rows, width = dh.shape
    form = variant(_form_of(dh, gate_up), 4, HAS_H=need_h, BLOCK=SWIGLU_BLOCK)
    h = torch.empty_like(dh) if need_h else None
    if dh.numel():
        args = (dh, gate_up, dh if h is None else h, width)
        run(Launch("swiglu_backward_", form, (rows, _tiles(width, SWIGLU_BLOCK), 1), args))
    return h


# ---- head ----


def cross_entropy_(run: Run, logits: Tensor, target: Tensor, *, gradient: bool) -> Tensor:
    """-log softmax(logits)[target] of each row (fp32); logits (R, V) become softmax - onehot if ``gradient``."""
    rows, vocab = logits.shape
    form = variant(_form_of(logits), 8, GRADIENT=gradient, BLOCK=VOCAB_BLOCK)
    loss = logits.new_empty(rows, dtype=torch.float32)
    if rows:
        run(Launch("cross_entropy_", form, (rows, 1, 1), (logits, target, loss, vocab)))
    return loss


def kl_topk_(run: Run, logits: Tensor, ids: Tensor, logp: Tensor, log_tail: Tensor, *, gradient: bool) -> Tensor:
    """KL_K of each row (fp32); logits (R, V) become its gradient if ``gradient``, else they are spoilt."""
    rows, vocab = logits.shape
    num_top = ids.shape[1]
    top_block = max(TOP_BLOCK, power_of_two(num_top))
    form = variant(_form_of(logits), 8, GRADIENT=gradient, BLOCK_TOP=top_block, BLOCK=VOCAB_BLOCK)
    kl = logits.new_empty(rows, dtype=torch.float32)
    if rows:
        args = (logits, ids, logp, log_tail, kl, vocab, num_top, TAIL_MIN, LOG_TAIL_FLOOR)
        run(Launch("kl_topk_", form, (rows, 1, 1), args))
    return kl


# ---- optimizer ----


def adamw_(
    run: Run,
    weight: Tensor,
    low: Tensor | None,
    gradient: Tensor,
    moments: Moments | Moments8Bit,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step of n elements in place."""
    n = len(weight)
    if n == 0:
        return
    if not all(t.is_contiguous() for t in (weight, gradient, moments.m, moments.v)) or gradient.dtype != torch.float32:
        raise NotSupportedError(f"weight or gradient ({gradient.dtype}) does not lie in order as fp32")
    numbers = (lr, 1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5, *betas, eps, weight_decay, 1.0)
    hyper = torch.tensor(numbers, dtype=torch.float32).to(weight.device, non_blocking=True)
    eight_bit, split = isinstance(moments, Moments8Bit), low is not None
    kernel = {(False, False): "adamw_", (True, False): "adamw_split_", (False, True): "adamw_8bit_"}
    form = variant("fp32", 4, SPLIT=split, EIGHT_BIT=eight_bit, BLOCK=ADAMW_BLOCK)
    scales = (moments.m_scale, moments.v_scale) if isinstance(moments, Moments8Bit) else (hyper, hyper)
    args = (
        weight.view(torch.int16) if split else weight,
        hyper.view(torch.int16) if low is None else low,
        gradient,
        moments.m,
        moments.v,
        *scales,
        dither_table(weight.device) if eight_bit else hyper.view(torch.int32),
        hyper,
        n,
        step * GOLDEN % (1 << 20),
    )
    name = kernel.get((split, eight_bit), "adamw_split_8bit_")
    run(Launch(name, form, (_tiles(n, ADAMW_BLOCK), 1, 1), args))


def square_norm(run: Run, value: Tensor) -> Tensor:
    """(2,) fp32: the sum of squares of the finite values (n,), and the number of the others."""
    programs = _tiles(value.numel(), NORM_BLOCK)
    partial = value.new_zeros(max(programs, 1), 2)
    if programs:
        form = variant("fp32", 4, BLOCK=NORM_BLOCK)
        run(Launch("square_norm", form, (programs, 1, 1), (value, partial, value.numel())))
    return partial.sum(0)


# ---- delta ----


def delta_rows(
    run: Run, end: Tensor, start: Tensor, residual: Tensor | None, cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x = end - start + clip(residual, ±cap); of each row energy (fp64), peak (fp32) and how many are not finite."""
    rows, num_cols = end.shape
    x = torch.empty_like(end)
    energy = end.new_empty(rows, dtype=torch.float64)
    peak = end.new_empty(rows)
    not_finite = end.new_empty(rows, dtype=torch.int32)
    if rows:
        form = variant("fp32", 4, HAS_RESIDUAL=residual is not None)
        args = (end, start, end if residual is None else residual, x, energy, peak, not_finite, num_cols, cap)
        run(Launch("delta_rows", form, (rows, 1, 1), args))
    return x, energy, peak, not_finite


def delta_codes(run: Run, x: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """int8 codes (kept, C) of the rows ``index`` of x, which become what the codes leave out."""
    kept, num_cols = len(index), x.shape[1]
    codes = x.new_empty(kept, num_cols, dtype=torch.int8)
    if codes.numel():
        form = variant("fp32", 4, BLOCK=DELTA_BLOCK)
        run(Launch("delta_codes", form, (kept, _tiles(num_cols, DELTA_BLOCK), 1), (x, index, scale, codes, num_cols)))
    return codes
