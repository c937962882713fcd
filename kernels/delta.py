"""How is a block's change encoded where the block lies? Rows' energies and peaks first, then codes of those sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fedblocks.kernels import launches
from fedblocks.kernels.dispatch import Operation
from fedblocks.kernels.reference import delta as reference

MIN_SCALE: Final = 2.0**-126
"""The smallest normal fp32; a row with a smaller scale carries nothing."""

delta_rows = Operation("delta_rows", launches.delta_rows, reference.delta_rows)
delta_codes = Operation("delta_codes", launches.delta_codes, reference.delta_codes)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRows:
    """The int8 rows of one tensor, and what they leave out."""

    index: Tensor  # (k,) int64, ascending
    scale: Tensor  # (k,) fp32
    codes: Tensor  # (k, C) int8
    residual: Tensor  # (R, C) fp32


def delta_encode(
    end: Tensor, start: Tensor, residual: Tensor | None, *, max_rows: int | None, cap: float
) -> EncodedRows:
    """The change ``end - start`` plus ``residual`` within ±cap, as the encoder of ``protocol`` writes it, to the bit.

    Args:
        end, start, residual: (R, C) fp32, contiguous; a vector is one row.
        max_rows: the rows of most energy that may be sent; None: all or none.

    Raises:
        ValueError: a value of the sum is not finite; nothing may be sent then.
    """
    x, energy, peak, not_finite = delta_rows(end, start, residual, cap)
    bad = int(not_finite.sum())
    if bad:
        raise ValueError(f"delta_encode: {bad} values of the change are not finite; nothing may be uploaded")
    scale = peak / 127
    carries = scale >= MIN_SCALE
    if max_rows is None:
        index = torch.arange(len(x), device=x.device)[: len(x) if bool(carries.any()) else 0]
    else:
        order = torch.sort(-energy, stable=True).indices[:max_rows]
        index = order[carries[order]].sort().values
    codes = x.new_zeros(len(index), x.shape[1], dtype=torch.int8)
    sent = carries[index]
    codes[sent] = delta_codes(x, index[sent], scale[index[sent]])
    return EncodedRows(index, torch.where(sent, scale[index], MIN_SCALE), codes, x)
