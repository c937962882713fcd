"""How does a GPU compute norm, rotation and gate? One pass over memory each, forward and backward (runtime.md 5.2)."""

import triton
import triton.language as tl


@triton.jit
def add_rms_norm(
    x,  # (rows, num_cols)
    residual,  # the same, or anything if not HAS_RESIDUAL
    weight,  # (num_cols,)
    y,  # (rows, num_cols)
    s,  # (rows, num_cols): x + residual; not written if not HAS_RESIDUAL
    rstd,  # (rows,) fp32
    num_cols,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < num_cols
    place = row * num_cols + col
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        stored = value.to(s.dtype.element_ty)  # rounded before it is squared, as the unfused model does
        tl.store(s + place, stored, mask=inside)
        value = stored.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / num_cols + eps)
    tl.store(rstd + row, inverse)
    normed = (value * inverse).to(y.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, (normed * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(
    dy,  # (num_rows, num_cols)
    ds,  # gradient that reaches s beside the norm; anything if not HAS_DS
    s,  # (num_rows, num_cols) what was normed
    weight,  # (num_cols,)
    rstd,  # (num_rows,) fp32
    dx,  # (num_rows, num_cols)
    dw_partial,  # (programs, num_cols) fp32; not written if not HAS_DW
    num_rows,
    num_cols,
    HAS_DS: tl.constexpr,
    HAS_DW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = rstd·(g - n·mean(g·n)) with g = dy·weight and n = s·rstd; the rows of a program share one sum of dw."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < num_cols
    w = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    index = program
    while index < num_rows:
        place = index * num_cols + col
        inverse = tl.load(rstd + index)
        normed = tl.load(s + place, mask=inside, other=0.0).to(tl.float32) * inverse
        upstream = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_DW:
            dw += upstream * normed
        g = upstream * w
        value = inverse * (g - normed * (tl.sum(g * normed, axis=0) / num_cols))
        if HAS_DS:
            value += tl.load(ds + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, value.to(dx.dtype.element_ty), mask=inside)
        index += tl.num_programs(0)
    if HAS_DW:
        tl.store(dw_partial + program * num_cols + col, dw, mask=inside)


@triton.jit
def rope_(
    x,  # (tokens, num_heads, 2·half): heads lie side by side, tokens token_stride apart
    cos,  # (positions, 2·half)
    sin,
    token_stride,
    num_heads,
    num_positions,  # token t has position t % num_positions
    half,
    INVERSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    col = tl.arange(0, BLOCK_HALF)
    table = (token % num_positions) * (2 * half) + col
    in_half = col < half
    cos_1 = tl.load(cos + table, mask=in_half, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos + table + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin + table, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + table + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    place = x + token * token_stride + head[:, None] * (2 * half) + col[None, :]
    inside = (head < num_heads)[:, None] & in_half[None, :]
    x_1 = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    x_2 = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:  # the transposed map, which for tables of equal halves is the rotation the other way
        y_1 = x_1 * cos_1 + x_2 * sin_2
        y_2 = x_2 * cos_2 - x_1 * sin_1
    else:
        y_1 = x_1 * cos_1 - x_2 * sin_1
        y_2 = x_2 * cos_2 + x_1 * sin_2
    tl.store(place, y_1.to(x.dtype.element_ty), mask=inside)
    tl.store(place + half, y_2.to(x.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(
    gate_up,  # (rows, 2·width): gate | up
    h,  # (rows, width)
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    gate = tl.load(gate_up + row * 2 * width + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row * width + col, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_(
    dh,  # (rows, width)
    gate_up,  # (rows, 2·width): read, and overwritten with its gradient
    h,  # (rows, width): silu(gate)·up again, for the weight gradient of the layer behind; not written if not HAS_H
    width,
    HAS_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    gate_place = gate_up + row * 2 * width + col
    gate = tl.load(gate_place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_place + width, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(dh + row * width + col, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if HAS_H:
        tl.store(h + row * width + col, (silu * up).to(h.dtype.element_ty), mask=inside)
    d_gate = upstream * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(gate_place, d_gate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(gate_place + width, (upstream * silu).to(gate_up.dtype.element_ty), mask=inside)
