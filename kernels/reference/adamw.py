"""How is one AdamW step taken in place, whatever the weight and the moments are stored as? Chunk by chunk, in fp32.

    m ← β1·m + (1 - β1)·g,   v ← β2·v + (1 - β2)·g²,   w ← w·(1 - lr·wd) - lr·(m / c1) / (√(v / c2) + eps)

with ``c = 1 - β^step`` (methods.md 5.4). The arithmetic is that of torch's fused kernel, to the bit; what is stored in
another form is brought to fp32 in chunks of :data:`CHUNK` elements, stepped, and stored again.

**Weights**: fp32, or the exact halves of ``split.py``. No step loses anything either way.

**Moments in 8 bits**: one byte each and one fp32 scale for 256 elements, which maps the largest of them to the largest
code. A byte is a small floating-point number, since the magnitudes within one row of a gradient span orders:

    m: sign, 4 bits of exponent, 3 of mantissa, less the smallest such number: linear near zero, and zero is exact
    v: 5 bits of exponent, 3 of mantissa; √v spans 1 : 63,000, and no code is zero

* Because the smallest ``v`` of a block that is not all zero reads as a positive number, a small ``v`` can only slow an
  element down, never divide its ``m`` by ``eps`` alone. A block of zeros has codes that read as exactly zero.
* The rounding must be unbiased. v moves by 1 % a step where codes lie 6 to 12 % apart: rounded to the nearest, an
  element whose share of its block shrinks or grows would keep its old v (measured: √v up to five times its true value).
  So it is rounded up or down at random, in proportion. The random numbers are a fixed table whose every entry advances
  by the golden ratio each step (a low-discrepancy sequence: the roundings of one element even out over a few steps),
  the same for m and v, so that the two errors of their ratio pull the same way. No generator runs, and equal calls give
  equal bits.
* torch's float8 types serve worse: a CPU reads them at 3 ns an element, six times the whole step, and they round to
  the nearest. These codes are made by shifting fp32 bits.

Source: 8-bit block-wise states: Dettmers et al., arXiv 2110.02861; stochastic rounding: Gupta et al., arXiv 1502.02551.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from fedblocks.kernels.reference.split import merge_split, split_fp32

CHUNK: Final = 1 << 18
"""Elements in work at a time, a multiple of :data:`BLOCK`; bounds what is held beside the state to 6 MiB."""
BLOCK: Final = 256
"""Moments that share a scale."""

_SHIFT: Final = 20
"""Mantissa bits of fp32 that a code drops: 23 - 3."""
_M_FIRST, _M_SMALLEST = 0x380 << _SHIFT, 2.0**-15
"""The smallest number of m's format, as bits and as a value; its largest is 1.875."""
_V_FIRST, _V_SMALLEST = 0x300 << _SHIFT, 2.0**-31
"""The smallest number of v's format; its largest is 1.875 too."""
_TOP: Final = 1.8749
"""What the largest magnitude of a block is scaled to: a little below the largest number, so that nothing overflows."""
_M_ZERO: Final = 0x80
"""m's code of zero."""
_SMALLEST_SCALED: Final = 1e-37
"""Blocks whose largest magnitude is below this are scaled as if it were this; its reciprocal is still finite."""
GOLDEN: Final = 648055
"""2²⁰ · 0.618, odd."""
_DITHERS: Final = 1 << 18
"""Entries of the table of random numbers, which the chunks share; at least :data:`CHUNK`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """m and v of one tensor of n elements in fp32."""

    m: Tensor  # (n,) fp32
    v: Tensor  # (n,) fp32

    @classmethod
    def zeros(cls, n: int, device: torch.device) -> Moments:
        """Those before the first step."""
        return cls(m=torch.zeros(n, device=device), v=torch.zeros(n, device=device))

    @property
    def num_bytes(self) -> int:
        """8 an element."""
        return self.m.nbytes + self.v.nbytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments8Bit:
    """m and v of one tensor of n elements in 8 bits: codes, and scales of blocks of :data:`BLOCK`."""

    m: Tensor  # (n,) uint8
    v: Tensor  # (n,) uint8
    m_scale: Tensor  # (ceil(n / 256),) fp32
    v_scale: Tensor  # (ceil(n / 256),) fp32

    @classmethod
    def zeros(cls, n: int, device: torch.device) -> Moments8Bit:
        """Those before the first step."""
        blocks = -(-n // BLOCK)
        return cls(
            m=torch.full((n,), _M_ZERO, dtype=torch.uint8, device=device),
            v=torch.zeros(n, dtype=torch.uint8, device=device),
            m_scale=torch.zeros(blocks, device=device),
            v_scale=torch.zeros(blocks, device=device),
        )

    @property
    def num_bytes(self) -> int:
        """2 an element and 8 a block."""
        return self.m.nbytes + self.v.nbytes + self.m_scale.nbytes + self.v_scale.nbytes

    def decoded(self) -> Moments:
        """The fp32 numbers that the codes stand for."""
        n, size = len(self.m), len(self.m_scale) * BLOCK
        whole = Moments.zeros(size, self.m.device)
        _decode_m(self.m, self.m_scale, torch.empty(n, dtype=torch.int32, device=self.m.device), whole.m)
        _decode_v(self.v, self.v_scale, whole.v)
        return Moments(m=whole.m[:n], v=whole.v[:n])


def adamw_(
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
    """Takes step number ``step`` (1 is the first) in place, of one tensor of n elements.

    Args:
        weight: (n,) fp32; or bf16, the high halves.
        low: (n,) int16, the low halves of a bf16 ``weight``, else None.
        gradient: (n,) fp32; left as it is.
        moments: those of the step before.
        lr: of this step.
    """
    n = len(weight)
    hyper = _Hyper(step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, device=weight.device)
    if low is None and isinstance(moments, Moments):
        hyper.apply(weight, gradient, moments.m, moments.v)
        return
    work = _Work(min(CHUNK, n), weight.device, step, eight_bit=isinstance(moments, Moments8Bit))
    for start in range(0, n, CHUNK):
        chunk = slice(start, min(start + CHUNK, n))
        w = weight[chunk] if low is None else work.merged(weight[chunk], low[chunk])
        if isinstance(moments, Moments):
            hyper.apply(w, gradient[chunk], moments.m[chunk], moments.v[chunk])
        else:
            m, v = work.decoded(moments, chunk)
            hyper.apply(w, gradient[chunk], m[: len(w)], v[: len(w)])
        if low is not None:
            split_fp32(w, weight[chunk], low[chunk], work.bits)
        if isinstance(moments, Moments8Bit):
            work.encode(moments, chunk)


class _Hyper:
    """The numbers of one step, and the kernel under torch.optim.AdamW(fused=True), which applies them."""

    def __init__(
        self,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        device: torch.device,
    ) -> None:
        self._step = torch.tensor(float(step), device=device)
        self._numbers = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}

    def apply(self, w: Tensor, gradient: Tensor, m: Tensor, v: Tensor) -> None:
        torch._fused_adamw_(
            [w.detach()],
            [gradient],
            [m],
            [v],
            [],
            [self._step],
            **self._numbers,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )


class _Work:
    """The buffers of one chunk, each used again for the next."""

    def __init__(self, size: int, device: torch.device, step: int, *, eight_bit: bool) -> None:
        size = _whole(size)
        self.bits = torch.empty(size, dtype=torch.int32, device=device)
        self._fp32 = torch.empty(size, device=device)
        """The weight; once that is stored, the magnitudes of m."""
        if eight_bit:
            self._m, self._v = torch.empty(size, device=device), torch.empty(size, device=device)
            self._dither = dither(size, step, device)

    def merged(self, hi: Tensor, lo: Tensor) -> Tensor:
        """The weights of a chunk in fp32."""
        merge_split(hi, lo, self._fp32[: len(hi)])
        return self._fp32[: len(hi)]

    def decoded(self, moments: Moments8Bit, chunk: slice) -> tuple[Tensor, Tensor]:
        """m and v of a chunk in fp32, filled up with zeros to whole blocks."""
        size = _whole(chunk.stop - chunk.start)
        m, v, bits = self._m[:size], self._v[:size], self.bits[:size]
        blocks = _blocks(chunk)
        _decode_m(moments.m[chunk], moments.m_scale[blocks], bits, m)
        _decode_v(moments.v[chunk], moments.v_scale[blocks], v)
        return m, v

    def encode(self, moments: Moments8Bit, chunk: slice) -> None:
        """Stores what :meth:`decoded` gave, and what has become of it."""
        n = chunk.stop - chunk.start
        size = _whole(n)
        m, v, magnitude, bits, add = (t[:size] for t in (self._m, self._v, self._fp32, self.bits, self._dither))
        blocks = _blocks(chunk)

        torch.abs(m, out=magnitude)
        magnitude.view(-1, BLOCK).mul_(_set_scales(magnitude, moments.m_scale[blocks]))
        magnitude.add_(_M_SMALLEST)
        torch.add(magnitude.view(torch.int32), add, out=bits).bitwise_right_shift_(_SHIFT)
        bits.bitwise_xor_(m.view(torch.int32).bitwise_right_shift_(31))  # all bits flip where m is negative
        moments.m[chunk].copy_(bits[:n])  # keeps the low 8 bits: the constant bits above them fall away

        v.view(-1, BLOCK).mul_(_set_scales(v, moments.v_scale[blocks]))
        v.clamp_(min=_V_SMALLEST)
        torch.add(v.view(torch.int32), add, out=bits).bitwise_right_shift_(_SHIFT)
        moments.v[chunk].copy_(bits[:n])


def _whole(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _blocks(chunk: slice) -> slice:
    return slice(chunk.start // BLOCK, -(-chunk.stop // BLOCK))


def _set_scales(magnitude: Tensor, scale: Tensor) -> Tensor:
    """Sets ``scale`` (blocks,) so that the largest magnitude of each block reads as :data:`_TOP`; its inverse."""
    torch.amax(magnitude.view(-1, BLOCK), dim=1, out=scale)
    scale.clamp_(min=_SMALLEST_SCALED).mul_(1 / _TOP)
    return scale.reciprocal().unsqueeze(1)


def _decode_m(codes: Tensor, scale: Tensor, bits: Tensor, out: Tensor) -> None:
    """``out`` (blocks · 256,) from codes (n,); zeros past the last. Codes of 128 and above are positive."""
    n = len(codes)
    bits[:n].copy_(codes)
    torch.index_select(_m_table(codes.device), 0, bits[:n], out=out[:n])
    out[n:].zero_()
    out.view(-1, BLOCK).mul_(scale.unsqueeze(1))


def _decode_v(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """``out`` (blocks · 256,) from codes (n,); zeros past the last."""
    n = len(codes)
    out[:n].view(torch.int32).copy_(codes).bitwise_left_shift_(_SHIFT).add_(_V_FIRST)
    out[n:].zero_()
    out.view(-1, BLOCK).mul_(scale.unsqueeze(1))


@lru_cache(maxsize=8)
def _m_table(device: torch.device) -> Tensor:
    """What each of m's 256 codes stands for: those below 128, with all bits flipped, are the negatives."""
    codes = torch.arange(128, dtype=torch.int32)
    positive = (codes * (1 << _SHIFT) + _M_FIRST).view(torch.float32) - _M_SMALLEST
    return torch.cat((-positive.flip(0), positive)).to(device)


def dither(size: int, step: int, device: torch.device) -> Tensor:
    """What the roundings of one step add to the bits that they drop: (size,) int32, even over 0..2²⁰ - 1."""
    return (dither_table(device)[:size] + step * GOLDEN % (1 << _SHIFT)).bitwise_and_((1 << _SHIFT) - 1)


@lru_cache(maxsize=8)
def dither_table(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1 << _SHIFT, (_DITHERS,), generator=generator, dtype=torch.int32).to(device)
