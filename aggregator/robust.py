"""What is a block's change if some of its updates may be hostile? Its coordinates' median, or a trimmed mean.

Value by value over those who trained it, whatever their weights: a client counts once, since a weight is what it says
of itself. What is combined is nova·clip·xhat of the fold (methods.md 8.2); coverage and damping stay as they are.

From five contributors on one hostile client, from eight on two, cannot move a value beyond what the others span (Yin et
al., 1803.01498). With fewer there is no such promise: the median of two is their mean, and of fewer than four nothing
is trimmed.
A row that an update does not send would count as zero, so these rules need updates that send all rows.

The members come in ascending client key and each value is sorted before it is added up, so no order of arrival can
change a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedblocks.aggregator.aggregation import Combine, Member, Segment, rectangles_of
from fedblocks.profiles.model_shape import TensorSpec
from fedblocks.profiles.units import Units, unit_width
from fedblocks.protocol.run_config import FoldKind
from fedblocks.protocol.tensors import FloatArray, Rows

#: Share of the values of a coordinate that a trimmed mean leaves out at each end: 1 of 4 to 7, 2 of 8 to 11.
TRIMMED_SHARE: Final = 0.25
#: fp64 values held at once, over all members: 32 MiB, but at least one row of each.
HELD_VALUES: Final = 1 << 22


def combine_of(kind: FoldKind) -> Combine | None:
    """The rule of this name; None for the weighted mean, which the fold has by itself."""
    return {"mean": None, "median": coordinate_median, "trimmed_mean": trimmed_mean}[kind]


def median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over the first axis, ``(n, ...)`` -> ``(...)``; of an even number the mean of the middle two."""
    ordered = np.sort(values, axis=0)
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def mean_without_extremes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first axis without its smallest and largest quarter, both rounded down."""
    ordered = np.sort(values, axis=0)
    left_out = int(len(ordered) * TRIMMED_SHARE)
    total = np.zeros(ordered.shape[1:], dtype=np.float64)
    for one in ordered[left_out : len(ordered) - left_out]:
        total += one
    return total / (len(ordered) - 2 * left_out)


def coordinate_median(
    members: Sequence[Member],
    factors: Sequence[float],
    block: int,
    spec: TensorSpec,
    shape: Units,
    segments: Sequence[Segment],
) -> FloatArray:
    """damp·median of one whole tensor (``aggregation.Combine``)."""
    return _combined(members, factors, block, spec, shape, segments, trimmed=False)


def trimmed_mean(
    members: Sequence[Member],
    factors: Sequence[float],
    block: int,
    spec: TensorSpec,
    shape: Units,
    segments: Sequence[Segment],
) -> FloatArray:
    """damp·(mean of the middle half) of one whole tensor (``aggregation.Combine``)."""
    return _combined(members, factors, block, spec, shape, segments, trimmed=True)


def _combined(
    members: Sequence[Member],
    factors: Sequence[float],
    block: int,
    spec: TensorSpec,
    shape: Units,
    segments: Sequence[Segment],
    *,
    trimmed: bool,
) -> FloatArray:
    """A few rows at a time: of each member only a view of its payload is held (for bf16, one tensor in fp32)."""
    found = np.zeros(spec.rows_cols, dtype=np.float64)
    sent = [member.rows(member.update.read_payload(), spec.name) for member in members]
    # The fold's factor holds the weight, which has no say here.
    scales = [factor / member.weight for member, factor in zip(members, factors, strict=True)]
    widths = [unit_width(shape, block, member.update.width) for member in members]
    reduce = mean_without_extremes if trimmed else median
    step = max(1, HELD_VALUES // (len(members) * found.shape[1]))
    for segment, rectangles in zip(segments, rectangles_of(segments, block, spec, shape), strict=True):
        having = [i for i, width in enumerate(widths) if width >= segment.width]
        for rows, cols in rectangles:
            for start in range(rows.start, rows.stop, step):
                part = slice(start, min(start + step, rows.stop)), cols
                values = np.stack([_values(sent[i], *part, scales[i]) for i in having])
                found[part] = reduce(values) * segment.damping
    return found.astype(np.float32).reshape(spec.shape)


def _values(sent: Rows, rows: slice, cols: slice, scale: float) -> NDArray[np.float64]:
    """scale·xhat of a rectangle of the whole tensor; rows that were not sent are 0."""
    values = np.zeros((rows.stop - rows.start, cols.stop - cols.start), dtype=np.float64)
    first, last = np.searchsorted(sent.index, (rows.start, rows.stop))
    coefficients = sent.scales[first:last].astype(np.float64) * scale
    values[sent.index[first:last] - rows.start] = sent.values[first:last, cols] * coefficients[:, None]
    return values
