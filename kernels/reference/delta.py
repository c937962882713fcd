"""What is left to send of a block's change, and what do its int8 rows hold? With the bits of ``protocol``'s encoder.

The rule is methods.md 7.1. The order of every sum is stated, so that all backends choose the same rows: lane ``j`` of
256 adds the squares (fp64) of columns ``j, j + 256, ...`` one after the other; then the upper half of the lanes is
added to the lower half until one is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 256


def delta_rows(
    end: Tensor, start: Tensor, residual: Tensor | None, cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x = end - start + clip(residual, ±cap), (R, C) fp32; of each row energy (fp64), peak (fp32), count (int32).

    Energy is the sum of squares and peak the largest magnitude of the finite values; the count is that of the others.
    """
    x = end - start
    if residual is not None:
        x += residual.clamp(-cap, cap)
    finite = torch.isfinite(x)
    clean = torch.where(finite, x, 0.0)
    rows, cols = x.shape
    lanes = x.new_zeros(rows, LANES, dtype=torch.float64)
    for first in range(0, cols, LANES):
        tile = clean[:, first : first + LANES].double().square()
        lanes[:, : tile.shape[1]] += tile
    half = LANES // 2
    while half:
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
        half //= 2
    return x, lanes[:, 0], clean.abs().amax(dim=1), (~finite).sum(dim=1, dtype=torch.int32)


def delta_codes(x: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """int8 codes (k, C) of the rows ``index`` (k,) of x (R, C), which become what the codes leave out.

    ``q = clip(round(x / scale), ±127)``, ties to even; residual ``x - q·scale``; ``scale`` (k,) fp32.
    """
    rows = x[index]
    whole = torch.round(rows / scale.unsqueeze(1)).clamp_(-127, 127)
    x[index] = rows - whole * scale.unsqueeze(1)
    return whole.to(torch.int8)
