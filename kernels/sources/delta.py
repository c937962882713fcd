"""How does a GPU turn a block's change into int8 rows, with the bits of the encoder in ``protocol``? (methods.md 7.1)

Compiled without fused multiply-add, with IEEE division, and with sums in a stated order: lane ``j`` of 256 adds the
squares of columns ``j, j + 256, ...`` one after the other; then the upper half of the lanes is added to the lower half
until one is left.
"""

import triton
import triton.language as tl


@triton.jit
def _halved(lanes, HALF: tl.constexpr):
    """(2·HALF,) -> (HALF,): upper half plus lower half; a sum of two numbers has only one order."""
    return tl.sum(tl.reshape(lanes, (2, HALF)), axis=0)


@triton.jit
def delta_rows(
    end,  # (rows, num_cols) fp32
    start,  # (rows, num_cols) fp32
    residual,  # (rows, num_cols) fp32; anything if not HAS_RESIDUAL
    x,  # (rows, num_cols) fp32: end - start + residual within ±cap
    energy,  # (rows,) fp64
    peak,  # (rows,) fp32: largest magnitude of the finite values
    not_finite,  # (rows,) int32
    num_cols,
    cap,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 256)
    squares = tl.zeros((256,), dtype=tl.float64)
    largest = tl.zeros((256,), dtype=tl.float32)
    bad = tl.zeros((256,), dtype=tl.int32)
    for first in range(0, num_cols, 256):
        col = first + lane
        inside = col < num_cols
        place = row * num_cols + col
        value = tl.load(end + place, mask=inside, other=0.0) - tl.load(start + place, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            owed = tl.load(residual + place, mask=inside, other=0.0)
            value += tl.minimum(tl.maximum(owed, -cap), cap)
        tl.store(x + place, value, mask=inside)
        magnitude = tl.abs(value)
        finite = magnitude < float("inf")
        bad += tl.where(finite, 0, 1)
        largest = tl.maximum(largest, tl.where(finite, magnitude, 0.0))
        wide = tl.where(finite, value, 0.0).to(tl.float64)
        squares += wide * wide
    tl.store(peak + row, tl.max(largest, axis=0))
    tl.store(not_finite + row, tl.sum(bad, axis=0))
    squares = _halved(squares, 128)
    squares = _halved(squares, 64)
    squares = _halved(squares, 32)
    squares = _halved(squares, 16)
    squares = _halved(squares, 8)
    squares = _halved(squares, 4)
    squares = _halved(squares, 2)
    tl.store(energy + row, tl.sum(squares, axis=0))


@triton.jit
def delta_codes(
    x,  # (rows, num_cols) fp32; the rows of index become what the codes leave out
    index,  # (kept,) int64, rows that are sent
    scale,  # (kept,) fp32, at least 2^-126
    codes,  # (kept, num_cols) int8
    num_cols,
    BLOCK: tl.constexpr,
):
    kept = tl.program_id(0).to(tl.int64)
    row = tl.load(index + kept)
    s = tl.load(scale + kept)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < num_cols
    value = tl.load(x + row * num_cols + col, mask=inside, other=0.0)
    # Adding and taking away 1.5·2^23 rounds to the nearest whole number, ties to even, for magnitudes below 2^22.
    whole = (tl.div_rn(value, s) + 12582912.0) - 12582912.0
    whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
    tl.store(codes + kept * num_cols + col, whole.to(tl.int8), mask=inside)
    tl.store(x + row * num_cols + col, value - whole * s, mask=inside)
