"""How do a client's measured steps correct what its profile predicts? By a factor for each part of a step.

A step of parts ``x_i`` seconds (``cost.StepParts``) is predicted to take ``p = sum of f_i·x_i``. In the logarithms of
the factors, a measured step says ``log(measured / p) = sum of z_i·(error of log f_i)`` with the shares
``z_i = f_i·x_i / p``, which sum to 1. Recursive least squares on these (Kalman, 1960) weigh a relative error alike in
short and long steps, and no factor can become negative:

* The prior is that a device is as much slower in every part as in any other: the first step sets one scale for all,
  and leaves open, by :data:`PRIOR_DEVIATION`, how the factors differ. They come apart only as steps of other shares are
  measured; a client that always does the same keeps one scale, which follows what is measured.
* What was learnt is forgotten in two ways: the common scale wanders (so that the newest of many equal steps weighs 0.3,
  methods.md 6.1), and what no step has shown for long becomes as open as it was at first.
* A step that is off by more than half, and by more than the filter expects, is held back: once is no evidence. The
  second in a row that is off in the same direction sets the whole device to the new speed at once (methods.md 6.7).

Everything is a pure function of plain numbers: the same steps in the same order give the same bits.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from fedblocks.profiles.cost import StepParts, TimeFactors
from fedblocks.profiles.device import DeviceProfile

PARTS: Final = len(StepParts._fields)
#: Relative deviation of a single report from what five factors can say of a step: of equal steps on a busy machine, and
#: what the parts do not describe.
NOISE: Final = 0.15
#: Standard deviation of the factors' logarithms around their common scale, before any difference was seen.
PRIOR_DEVIATION: Final = 0.5
#: By how much the common scale wanders from report to report: of many equal reports the newest then weighs 0.3.
SCALE_VARIANCE: Final = NOISE**2 * 0.3**2 / 0.7
#: Share of the way back to the prior that what is known of the factors' differences goes with each report.
FORGETTING: Final = 0.01
#: Measured over predicted, or the inverse, beyond which a report is held back (methods.md 6.7).
FAR_OFF: Final = 1.5
#: ... if it is also beyond so many of the standard deviations that the filter expects.
FAR_DEVIATIONS: Final = 2.0
#: No report changes a factor by more: what is beyond is no speed.
LARGEST_RATIO: Final = 1000.0
#: Weight of the newest value in the factors of the first pass and of measuring (methods.md 6.1).
EMA: Final = 0.3
#: Predictions whose errors are remembered.
ERRORS: Final = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a client's reports have shown of its profile; constant in size, plain numbers.

    Raises:
        ValueError: a wrong number of factors or covariances, or a factor that is not positive.
    """

    factors: tuple[float, ...]
    """Measured over predicted, in the order of :class:`~fedblocks.profiles.cost.StepParts`."""
    covariance: tuple[float, ...]
    """Of the factors' logarithms: upper triangle, row by row."""
    level: float
    """Of the newest step: what these factors predict over what the profile predicts."""
    prefix: float | None = None
    """Measured over predicted of the first pass over samples; None: never seen."""
    measuring: float | None = None
    """The same of measuring."""
    errors: tuple[float, ...] = ()
    """|predicted / measured - 1| of the newest predictions, each made before its step was known."""
    reports: int = 0
    """Steps that were looked at."""
    held: float | None = None
    """Measured over predicted of a report that was held back, until the next one."""

    def __post_init__(self) -> None:
        triangle = PARTS * (PARTS + 1) // 2
        if len(self.factors) != PARTS or len(self.covariance) != triangle:
            raise ValueError(
                f"calibration: {len(self.factors)} factors and {len(self.covariance)} covariances, expected {PARTS} "
                f"and {triangle}"
            )
        positive = (*self.factors, self.level, *(f for f in (self.prefix, self.measuring) if f is not None))
        if not all(math.isfinite(f) and f > 0 for f in positive):
            raise ValueError(f"calibration: factors are {positive}, expected positive numbers")

    @classmethod
    def of_scale(cls, scale: float) -> Calibration:
        """One factor for all parts, from who knows which steps."""
        noise, open_ = NOISE**2, PRIOR_DEVIATION**2
        rows = [[noise + (open_ if i == j else 0.0) for j in range(PARTS)] for i in range(PARTS)]
        return cls(factors=(scale,) * PARTS, covariance=_triangle(rows), level=scale)

    @property
    def time_factors(self) -> TimeFactors:
        """For the cost model; what was never seen is taken to be as slow as the arithmetic."""
        return _time_factors(self, 1.0)

    @property
    def relative(self) -> TimeFactors:
        """The same over :attr:`scale`: all 1 as long as no part is known to differ from the others."""
        return _time_factors(self, self.scale)

    @property
    def scale(self) -> float:
        """The arithmetic's factor."""
        return self.factors[0]

    @property
    def error(self) -> float | None:
        """Median of the newest errors; None before the first prediction was held against a step."""
        return statistics.median(self.errors) if self.errors else None


class Observed(NamedTuple):
    """What a report changed."""

    calibration: Calibration
    predicted_s: float
    """One step, before the report was known."""
    change: float | None
    """Measured over predicted where the device was set to a new speed; None where it was not."""


def observe(known: Calibration | None, parts: StepParts, measured_s: float) -> Observed:
    """Takes in the seconds of a step.

    Args:
        known: None for a device whose first step this is.
        parts: what its profile predicts for the step.

    Raises:
        ValueError: no positive number of seconds was measured or predicted.
    """
    profiled_s = math.fsum(parts)
    if not (math.isfinite(measured_s) and measured_s > 0 and math.isfinite(profiled_s) and profiled_s > 0):
        raise ValueError(
            f"calibration: a step of {measured_s} s, predicted {profiled_s} s, expected positive numbers; leave such a "
            "report out"
        )
    if known is None:
        first = _first(parts, profiled_s, measured_s)
        return Observed(first, profiled_s, None)
    predicted_s = known.time_factors.step_s(parts)
    ratio = min(LARGEST_RATIO, max(1 / LARGEST_RATIO, measured_s / predicted_s))
    error, off = abs(1 / ratio - 1), math.log(ratio)
    shares = [factor * part / predicted_s for factor, part in zip(known.factors, parts, strict=True)]
    covariance = _older(known.covariance)
    spread = [_dot(row, shares) for row in covariance]
    expected = _dot(spread, shares) + NOISE**2
    known = replace(known, errors=(*known.errors, error)[-ERRORS:], reports=known.reports + 1)
    again = known.held is not None and (known.held > 1) == (ratio > 1)
    if abs(off) > max(math.log(FAR_OFF), 0.0 if again else FAR_DEVIATIONS * math.sqrt(expected)):
        return _far_off(known, covariance, ratio, predicted_s, profiled_s)
    # What is far off, though not unexpected, counts as noisier the farther it is.
    noise = NOISE**2 * max(1.0, abs(off) / math.log(FAR_OFF)) ** 2
    variance = expected - NOISE**2 + noise
    factors = tuple(f * math.exp(s / variance * off) for f, s in zip(known.factors, spread, strict=True))
    learnt = [
        [c - a * b / variance for c, b in zip(row, spread, strict=True)]
        for row, a in zip(covariance, spread, strict=True)
    ]
    level = _dot(factors, parts) / profiled_s
    after = replace(known, factors=factors, covariance=_triangle(learnt), level=level, held=None)
    return Observed(after, predicted_s, None)


def _first(parts: StepParts, profiled_s: float, measured_s: float) -> Calibration:
    """One scale for all; differences between the parts are open as far as this step does not tell them."""
    scale = min(LARGEST_RATIO**2, max(LARGEST_RATIO**-2, measured_s / profiled_s))
    shares = [part / profiled_s for part in parts]
    square = _dot(shares, shares)
    rows = [
        [NOISE**2 + PRIOR_DEVIATION**2 * ((i == j) - shares[i] - shares[j] + square) for j in range(PARTS)]
        for i in range(PARTS)
    ]
    return Calibration(
        factors=(scale,) * PARTS,
        covariance=_triangle(rows),
        level=scale,
        errors=(abs(1 / scale - 1),),
        reports=1,
    )


def _far_off(
    known: Calibration, covariance: list[list[float]], ratio: float, predicted_s: float, profiled_s: float
) -> Observed:
    """Held back if it is the first in this direction; the second scales the whole device to what both measured."""
    if known.held is None or (known.held > 1) != (ratio > 1):
        # Less is known than it seemed: should this task come again and again, its parts are learnt.
        _open(covariance, PRIOR_DEVIATION**2)
        return Observed(replace(known, covariance=_triangle(covariance), held=ratio), predicted_s, None)
    _open(covariance, -(1 - FORGETTING) * PRIOR_DEVIATION**2)  # it was the device, not the task
    change = math.sqrt(known.held * ratio)
    after = replace(
        known,
        factors=tuple(change * factor for factor in known.factors),
        covariance=_triangle(covariance),
        level=change * predicted_s / profiled_s,
        prefix=None if known.prefix is None else change * known.prefix,
        measuring=None if known.measuring is None else change * known.measuring,
        held=None,
    )
    return Observed(after, predicted_s, change)


def _open(covariance: list[list[float]], variance: float) -> None:
    for i in range(PARTS):
        covariance[i][i] += variance


def with_prefix(known: Calibration, profiled_s: float, measured_s: float) -> Calibration:
    """Takes in the seconds of a first pass over samples for which the profile predicts ``profiled_s``."""
    return replace(known, prefix=_running(known.prefix, profiled_s, measured_s))


def with_measuring(known: Calibration, profiled_s: float, measured_s: float) -> Calibration:
    """The same of measuring."""
    return replace(known, measuring=_running(known.measuring, profiled_s, measured_s))


def rebased(known: Calibration, old: DeviceProfile, new: DeviceProfile) -> Calibration | None:
    """The calibration of a device that has been probed again: what was measured of its steps stands.

    Factors change so that predictions do not; None where the device now computes in another way.
    """
    if (old.accelerator, old.compute_dtype, old.source) != (new.accelerator, new.compute_dtype, new.source):
        return None
    arithmetic = new.gemm_flops_per_s / old.gemm_flops_per_s
    memory = new.memory_bytes_per_s / old.memory_bytes_per_s
    overhead = old.step_overhead_s / new.step_overhead_s if old.step_overhead_s and new.step_overhead_s else 1.0
    changes = StepParts(arithmetic, arithmetic, memory, memory, overhead)
    return replace(
        known,
        factors=tuple(factor * change for factor, change in zip(known.factors, changes, strict=True)),
        prefix=None if known.prefix is None else arithmetic * known.prefix,
        measuring=None if known.measuring is None else arithmetic * known.measuring,
    )


def _time_factors(known: Calibration, over: float) -> TimeFactors:
    arithmetic, attention, activations, weights, overhead = (factor / over for factor in known.factors)
    return TimeFactors(
        arithmetic=arithmetic,
        attention=attention,
        activations=activations,
        weights=weights,
        overhead=overhead,
        prefix=arithmetic if known.prefix is None else known.prefix / over,
        measuring=arithmetic if known.measuring is None else known.measuring / over,
    )


def _running(old: float | None, profiled_s: float, measured_s: float) -> float | None:
    """Running mean of the ratio's logarithm; what is no ratio changes nothing."""
    if not (profiled_s > 0 and measured_s > 0 and math.isfinite(profiled_s) and math.isfinite(measured_s)):
        return old
    ratio = min(LARGEST_RATIO**2, max(LARGEST_RATIO**-2, measured_s / profiled_s))
    return ratio if old is None else math.exp((1 - EMA) * math.log(old) + EMA * math.log(ratio))


def _older(covariance: Sequence[float]) -> list[list[float]]:
    """A report later: the scale has wandered, and what was known of the differences is a little less certain."""
    rows = [[0.0] * PARTS for _ in range(PARTS)]
    values = iter(covariance)
    for i in range(PARTS):
        for j in range(i, PARTS):
            prior = FORGETTING * PRIOR_DEVIATION**2 if i == j else 0.0
            rows[i][j] = rows[j][i] = (1 - FORGETTING) * next(values) + prior + SCALE_VARIANCE
    return rows


def _triangle(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(rows[i][j] for i in range(PARTS) for j in range(i, PARTS))


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))
