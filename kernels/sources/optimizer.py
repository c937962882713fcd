"""How does a GPU take an AdamW step in place, whatever the weight and the moments are stored as? (runtime.md 4.2)

One program steps :data:`BLOCK` elements, whole groups of 256 that share a scale of 8-bit moments. The storage forms are
those of ``reference/adamw.py``, which explains them.
"""

import triton
import triton.language as tl

_M_FIRST: tl.constexpr = tl.constexpr(0x380 << 20)
_M_SMALLEST: tl.constexpr = tl.constexpr(2.0**-15)
_V_FIRST: tl.constexpr = tl.constexpr(0x300 << 20)
_V_SMALLEST: tl.constexpr = tl.constexpr(2.0**-31)
_TOP: tl.constexpr = tl.constexpr(1.8749)
_SMALLEST_SCALED: tl.constexpr = tl.constexpr(1e-37)


@triton.jit
def _codes_of(magnitude, dither):
    """The eight bits below the exponent's top of a positive fp32 number, rounded up or down as ``dither`` says."""
    return (magnitude.to(tl.int32, bitcast=True) + dither) >> 20


@triton.jit
def adamw_(
    weight,  # (n,) fp32, or bf16 halves as int16 if SPLIT
    low,  # (n,) int16 remainders; anything if not SPLIT
    gradient,  # (n,) fp32
    m,  # (n,) fp32, or uint8 codes if EIGHT_BIT
    v,
    m_scale,  # (ceil(n / 256),) fp32; anything if not EIGHT_BIT
    v_scale,
    dither_table,  # (2**18,) int32; anything if not EIGHT_BIT
    hyper,  # (8,) fp32: lr, 1 - β1^t, √(1 - β2^t), β1, β2, eps, weight decay, factor of the gradient
    n,
    dither_step,
    SPLIT: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GROUPS: tl.constexpr = BLOCK // 256
    first = tl.program_id(0).to(tl.int64) * BLOCK
    # Two-dimensional throughout: a row is one group of 256, so that its largest magnitude is a reduction over axis 1.
    at = first + tl.arange(0, GROUPS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = at < n
    lr, c1, root_c2 = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2)
    beta1, beta2, eps = tl.load(hyper + 3), tl.load(hyper + 4), tl.load(hyper + 5)
    decay, factor = tl.load(hyper + 6), tl.load(hyper + 7)
    if SPLIT:
        high = tl.load(weight + at, mask=inside, other=0).to(tl.int32)
        bits = (high << 16) + tl.load(low + at, mask=inside, other=0).to(tl.int32)
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = tl.load(weight + at, mask=inside, other=0.0)
    g = tl.load(gradient + at, mask=inside, other=0.0) * factor
    group = first // 256 + tl.arange(0, GROUPS)
    group_inside = group * 256 < n
    if EIGHT_BIT:
        m_code = tl.load(m + at, mask=inside, other=0x80).to(tl.int32)
        index = tl.where(m_code >= 128, m_code - 128, 127 - m_code)
        magnitude = ((index << 20) + _M_FIRST).to(tl.float32, bitcast=True) - _M_SMALLEST
        m_old = tl.where(m_code >= 128, magnitude, -magnitude)
        m_old = m_old * tl.load(m_scale + group, mask=group_inside, other=0.0)[:, None]
        v_code = tl.load(v + at, mask=inside, other=0).to(tl.int32)
        v_old = ((v_code << 20) + _V_FIRST).to(tl.float32, bitcast=True)
        v_old = tl.where(inside, v_old, 0.0) * tl.load(v_scale + group, mask=group_inside, other=0.0)[:, None]
    else:
        m_old = tl.load(m + at, mask=inside, other=0.0)
        v_old = tl.load(v + at, mask=inside, other=0.0)
    m_new = beta1 * m_old + (1.0 - beta1) * g
    v_new = beta2 * v_old + (1.0 - beta2) * g * g
    w = w * (1.0 - lr * decay) - (lr / c1) * m_new / (tl.sqrt_rn(v_new) / root_c2 + eps)
    if SPLIT:
        bits = w.to(tl.int32, bitcast=True)
        tl.store(weight + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
        tl.store(low + at, bits.to(tl.int16), mask=inside)  # keeps the low 16 bits
    else:
        tl.store(weight + at, w, mask=inside)
    if EIGHT_BIT:
        dither = tl.load(dither_table + (at & 0x3FFFF), mask=inside, other=0)
        dither = (dither + dither_step) & 0xFFFFF
        magnitude = tl.abs(m_new)
        scale = tl.maximum(tl.max(magnitude, axis=1), _SMALLEST_SCALED) * (1.0 / _TOP)
        tl.store(m_scale + group, scale, mask=group_inside)
        codes = _codes_of(magnitude * (1.0 / scale)[:, None] + _M_SMALLEST, dither)
        codes = codes ^ (m_new.to(tl.int32, bitcast=True) >> 31)  # all bits flip where m is negative
        tl.store(m + at, (codes & 0xFF).to(tl.uint8), mask=inside)
        scale = tl.maximum(tl.max(v_new, axis=1), _SMALLEST_SCALED) * (1.0 / _TOP)
        tl.store(v_scale + group, scale, mask=group_inside)
        codes = _codes_of(tl.maximum(v_new * (1.0 / scale)[:, None], _V_SMALLEST), dither)
        tl.store(v + at, (codes & 0xFF).to(tl.uint8), mask=inside)
    else:
        tl.store(m + at, m_new, mask=inside)
        tl.store(v + at, v_new, mask=inside)


@triton.jit
def square_norm(
    value,  # (n,)
    partial,  # (programs, 2) fp32: sum of squares of the finite values, number of others
    n,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(value + at, mask=at < n, other=0.0).to(tl.float32)
    finite = tl.abs(x) < float("inf")  # false for NaN too
    x = tl.where(finite, x, 0.0)
    tl.store(partial + tl.program_id(0) * 2, tl.sum(x * x, axis=0))
    tl.store(partial + tl.program_id(0) * 2 + 1, tl.sum(tl.where(finite, 0.0, 1.0), axis=0))
