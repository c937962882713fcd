"""How does a GPU decode NF4 weights, and multiply by them without storing what was decoded? (runtime.md 5.1, 5.3)

The bytes are read as bitsandbytes stores them. Products and sums of the decoding are rounded one by one (these kernels
are compiled without fused multiply-add), so the decoded weights have the bits of the reference.
"""

import triton
import triton.language as tl


@triton.jit
def nf4_dequant(
    packed,  # (ceil(n / 2),) uint8
    absmax,  # (ceil(n / 64),) uint8
    nested_code,  # (256,) fp32
    nested_absmax,  # (ceil(n / 16384),) fp32
    code,  # (16,) fp32
    out,  # (n,)
    offset,
    num_elements,
    BLOCK: tl.constexpr,  # bytes of a program
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    byte = first + tl.arange(0, BLOCK)
    inside = byte * 2 < num_elements
    value = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    group = byte // 32
    scale_code = tl.load(absmax + group, mask=inside, other=0).to(tl.int32)
    scale = tl.load(nested_code + scale_code) * tl.load(nested_absmax + group // 256, mask=inside, other=0.0) + offset
    high = tl.load(code + (value >> 4)) * scale
    low = tl.load(code + (value & 15)) * scale
    element = first * 2 + tl.arange(0, 2 * BLOCK)
    tl.store(out + element, tl.interleave(high, low).to(out.dtype.element_ty), mask=element < num_elements)


@triton.jit
def _decoded_tile(
    packed, absmax, nested_code, nested_absmax, code, offset, row, inside, k_tile, groups_per_row, dtype: tl.constexpr
):
    """Rows ``row`` (BN,) and columns 64·k_tile .. + 63 of the weight: (BN, 64). One scale serves a row of the tile."""
    group = row.to(tl.int64) * groups_per_row + k_tile
    scale_code = tl.load(absmax + group, mask=inside, other=0).to(tl.int32)
    scale = tl.load(nested_code + scale_code) * tl.load(nested_absmax + group // 256, mask=inside, other=0.0) + offset
    byte = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    value = tl.load(packed + byte, mask=inside[:, None], other=0x77).to(tl.int32)  # 0x77: two zeros
    high = tl.load(code + (value >> 4)) * scale[:, None]
    low = tl.load(code + (value & 15)) * scale[:, None]
    return tl.interleave(high, low).to(dtype)


@triton.jit
def _tile_of(num_rows, num_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column tile of this program: GROUP row tiles share their column tiles while these lie in cache."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    in_group = GROUP * tl.cdiv(num_cols, BLOCK_COLS)
    first = (program // in_group) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + (program % in_group) % height, (program % in_group) // height


@triton.jit
def nf4_linear(
    x,  # (M, K), T
    packed,
    absmax,
    nested_code,
    nested_absmax,
    code,
    y,  # (M, N) rows of y_stride, T
    offset,
    M,
    N,
    K,  # a multiple of 64
    y_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = x Wᵀ with W (N, K) decoded tile by tile; sums in fp32."""
    m_tile, n_tile = _tile_of(M, N, BLOCK_M, BLOCK_N, GROUP)
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_inside, n_inside = m < M, n < N
    groups_per_row = K // 64
    x_row = x + m.to(tl.int64)[:, None] * K + tl.arange(0, 64)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k_tile in range(groups_per_row):
        x_tile = tl.load(x_row + k_tile * 64, mask=m_inside[:, None], other=0.0)
        w_tile = _decoded_tile(
            packed, absmax, nested_code, nested_absmax, code, offset, n, n_inside, k_tile, groups_per_row,
            x.dtype.element_ty,
        )  # fmt: skip
        total = tl.dot(x_tile, tl.trans(w_tile), total, input_precision="ieee")
    y_row = y + m.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(y_row, total.to(y.dtype.element_ty), mask=m_inside[:, None] & n_inside[None, :])


@triton.jit
def nf4_linear_dgrad(
    dy,  # (M, N) rows of dy_stride, T
    packed,
    absmax,
    nested_code,
    nested_absmax,
    code,
    dx,  # (M, K), T or fp32
    offset,
    M,
    N,
    K,  # a multiple of 64
    dy_stride,
    ADD: tl.constexpr,  # dx holds the sum over the parts before this one
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx = dy W, 64 columns of dx a program; reads the same bytes as the forward pass."""
    m_tile, k_tile = _tile_of(M, K, BLOCK_M, 64, GROUP)
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_inside = m < M
    groups_per_row = K // 64
    dy_row = dy + m.to(tl.int64)[:, None] * dy_stride
    total = tl.zeros((BLOCK_M, 64), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        n_inside = n < N
        dy_tile = tl.load(dy_row + n[None, :], mask=m_inside[:, None] & n_inside[None, :], other=0.0)
        w_tile = _decoded_tile(
            packed, absmax, nested_code, nested_absmax, code, offset, n, n_inside, k_tile, groups_per_row,
            dy.dtype.element_ty,
        )  # fmt: skip
        total = tl.dot(dy_tile, w_tile, total, input_precision="ieee")
    column = k_tile * 64 + tl.arange(0, 64)
    place = dx + m.to(tl.int64)[:, None] * K + column[None, :]
    if ADD:
        total += tl.load(place, mask=m_inside[:, None], other=0.0).to(tl.float32)
    tl.store(place, total.to(dx.dtype.element_ty), mask=m_inside[:, None])
