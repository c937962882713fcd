"""How strong may the blocks be in the exported model? As strong as scores best within the forgetting budget.

The clients measure the final state at several strengths g, factors on the out-tensors of all blocks; at g = 0 the model
is the base. Source: methods.md 9 (strength g*).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from fedblocks.protocol.messages import BUDGET_ERRORS, Measurement

#: Scores this near to the best, in standard errors of the best, are equal: then the NLL per token decides, which tells
#: more where few rows are right or wrong; of equal ones the smallest strength is taken.
TIE_ERRORS: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthPoint:
    """What the clients found at one strength, all sums added up; None where nobody measured."""

    strength: float
    kl: float | None
    """Nats per token of KL to the base."""
    kl_error: float | None
    """Standard error of ``kl``, from how much the anchor sequences differ."""
    accuracy: float | None
    nll: float | None
    """Of the validation parts, nats per target token."""
    score_error: float
    """Standard error of the accuracy; 0 where there is none."""
    retention: float | None
    """Of the general validation file: accuracy over that at strength 0, or the ratio of perplexities."""
    retention_error: float
    refused: str
    """Why it may not be exported; empty if it may."""

    @property
    def score(self) -> float | None:
        """Accuracy, else minus the NLL per token."""
        if self.accuracy is not None:
            return self.accuracy
        return None if self.nll is None else -self.nll


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthChoice:
    """The strength to export with, and what it was chosen among."""

    strength: float
    points: tuple[StrengthPoint, ...]
    """Ascending."""

    @property
    def chosen(self) -> StrengthPoint:
        """The point of the chosen strength."""
        return next(point for point in self.points if point.strength == self.strength)


def choose_strength(measured: Iterable[Measurement], *, max_kl: float, min_retention: float) -> StrengthChoice | None:
    """The strength of the best score among those within the budget; None if nobody measured several strengths.

    Strength 0 is the base and always within it. Where nobody measured what a limit is about, nothing but 0 is within.

    Args:
        measured: of the final state.
        max_kl: nats per token; infinite: no budget.
        min_retention: least share of the base's general ability; 0: no floor.
    """
    by_strength: dict[float, list[Measurement]] = {}
    for m in measured:
        by_strength.setdefault(m.strength, []).append(m)
    if len(by_strength) < 2 or 0.0 not in by_strength:
        return None
    base = _pooled(by_strength[0.0], "general")
    points = tuple(
        _point(strength, by_strength[strength], base, max_kl=max_kl, min_retention=min_retention)
        for strength in sorted(by_strength)
    )
    allowed = [point for point in points if not point.refused]
    scored = [(point.score, point) for point in allowed if point.score is not None]
    if not scored:
        return StrengthChoice(strength=0.0, points=points)
    best_score, best = max(scored, key=lambda pair: pair[0])
    enough = best_score - TIE_ERRORS * best.score_error
    equal = [point for score, point in scored if score >= enough]
    chosen = min(equal, key=lambda point: (0.0 if point.nll is None else point.nll, point.strength))
    return StrengthChoice(strength=chosen.strength, points=points)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    num_items: int
    num_correct: int
    nll_sum: float
    num_tokens: int
    kl_sum: float
    kl_square_sum: float

    @property
    def accuracy(self) -> float | None:
        return self.num_correct / self.num_items if self.num_items else None

    @property
    def accuracy_error(self) -> float:
        share = self.accuracy
        return 0.0 if share is None else math.sqrt(share * (1 - share) / self.num_items)

    @property
    def nll(self) -> float | None:
        return self.nll_sum / self.num_tokens if self.num_tokens else None


def _pooled(measured: Sequence[Measurement], measure: str) -> _Sums:
    of = [m for m in measured if m.measure == measure]
    return _Sums(
        num_items=sum(m.num_items for m in of),
        num_correct=sum(m.num_correct for m in of),
        nll_sum=math.fsum(m.nll_sum for m in of),
        num_tokens=sum(m.num_tokens for m in of),
        kl_sum=math.fsum(m.kl_sum for m in of),
        kl_square_sum=math.fsum(m.kl_square_sum for m in of),
    )


def _point(
    strength: float, measured: Sequence[Measurement], base: _Sums, *, max_kl: float, min_retention: float
) -> StrengthPoint:
    anchor, validation, general = (_pooled(measured, measure) for measure in ("anchor", "validation", "general"))
    kl, kl_error = _kl(anchor)
    kept, kept_error = _retention(general, base)
    refused = ""
    if strength > 0:
        refused = _refused(kl, kl_error, max_kl) or _too_little(kept, kept_error, min_retention)
    return StrengthPoint(
        strength=strength,
        kl=0.0 if strength == 0 else kl,
        kl_error=0.0 if strength == 0 else kl_error,
        accuracy=validation.accuracy,
        nll=validation.nll,
        score_error=validation.accuracy_error,
        retention=1.0 if strength == 0 and kept is not None else kept,
        retention_error=0.0 if strength == 0 else kept_error,
        refused=refused,
    )


def _kl(sums: _Sums) -> tuple[float | None, float | None]:
    """Mean per token, and its standard error over the sequences (infinite for a single one)."""
    if not sums.num_tokens:
        return None, None
    mean = sums.kl_sum / sums.num_tokens
    n = sums.num_items
    if n < 2:
        return mean, math.inf
    spread = max(0.0, sums.kl_square_sum - sums.kl_sum**2 / n) / (n - 1)
    return mean, math.sqrt(n * spread) / sums.num_tokens


def _retention(sums: _Sums, base: _Sums) -> tuple[float | None, float]:
    """Share of the base's accuracy, and its standard error; the ratio of perplexities where the base is never right."""
    if base.num_correct and sums.accuracy is not None and base.accuracy:
        return sums.accuracy / base.accuracy, sums.accuracy_error / base.accuracy
    if sums.nll is not None and base.nll is not None:
        return math.exp(base.nll - sums.nll), 0.0
    return None, 0.0


def _refused(kl: float | None, error: float | None, max_kl: float) -> str:
    if math.isinf(max_kl):
        return ""
    if kl is None or error is None:
        return "nobody measured its KL to the base"
    if not kl + BUDGET_ERRORS * error <= max_kl:
        return f"KL {kl:.4f} + {BUDGET_ERRORS:g} x {error:.4f} is above the budget of {max_kl:g}"
    return ""


def _too_little(kept: float | None, error: float, least: float) -> str:
    if least <= 0:
        return ""
    if kept is None:
        return "nobody measured the general validation file"
    if not kept - BUDGET_ERRORS * error >= least:
        return f"retention {kept:.4f} - {BUDGET_ERRORS:g} x {error:.4f} is below the floor of {least:g}"
    return ""
