"""How is fp32 kept as the bf16 number that arithmetic reads and 16 more bits? Exactly, for every bit pattern.

    hi = (bits + 0x8000) >> 16,   lo = bits - (hi << 16),   bits = (hi << 16) + lo

``hi``, read as bf16, is the fp32 number rounded to the nearest (ties away from zero); ``lo`` in -32768..32767 is what
the rounding took. Rounding ties to even would not do: one of the two ties would leave 32768. The sum gives the fp32
bits back whatever they are, denormals, both zeros and infinities included. At the edge of the range the rounding
overflows as every rounding to bf16 does: for a magnitude of 0x7f7f8000 (3.396e38) or more ``hi`` is infinite, and
still the sum is the exact value. A NaN of which all upper mantissa bits are set comes back too, but its ``hi`` reads as
a zero; arithmetic makes no such NaN.

Source: runtime.md 4.2.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

CHUNK: Final = 1 << 18
"""Numbers converted at a time; bounds what is held beside the result to 1 MiB."""


def split_fp32(value: Tensor, hi: Tensor, lo: Tensor, scratch: Tensor | None = None) -> None:
    """Writes the halves of ``value`` (fp32) into ``hi`` (bf16) and ``lo`` (int16); all contiguous, of one size.

    ``scratch`` (int32) spares the allocation of one; any size.
    """
    bits, high, low = value.view(-1).view(torch.int32), hi.view(-1).view(torch.int16), lo.view(-1)
    if scratch is None:
        scratch = torch.empty(min(CHUNK, len(bits)), dtype=torch.int32, device=value.device)
    for start in range(0, len(bits), len(scratch) or 1):
        chunk = slice(start, start + len(scratch))
        piece = bits[chunk]
        low[chunk].copy_(piece)  # keeps the low 16 bits, and hi << 16 has none of them
        high[chunk].copy_(torch.add(piece, 0x8000, out=scratch[: len(piece)]).bitwise_right_shift_(16))


def merge_split(hi: Tensor, lo: Tensor, out: Tensor) -> None:
    """Writes the fp32 numbers whose halves are ``hi`` and ``lo`` into ``out``; all contiguous, of one size."""
    bits, high, low = out.view(-1).view(torch.int32), hi.view(-1).view(torch.int16), lo.view(-1)
    for start in range(0, len(bits), CHUNK):
        chunk = slice(start, start + CHUNK)
        bits[chunk].copy_(high[chunk]).bitwise_left_shift_(16).add_(low[chunk])
