"""How much of a general ability was kept? Ratios to the base, with intervals by paired hierarchical bootstrap.

Ret, RawRet and Forget% over multiple-choice tasks, the perplexity ratio over plain texts, and KL to the base. A draw
takes seeds (runs of the same experiment) with replacement, then items within each task; the base and every run are
judged on the same drawn items, and a ratio is drawn as a ratio. Source: methods.md 12.1, 12.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

DRAWS: Final = 10_000
MIN_STANDARD_ERRORS: Final = 3.0
"""A task says something about retention if the base is this far above chance."""
_DRAWS_AT_ONCE: Final = 500

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure with its 95 % percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rights:
    """Which items of a task were answered right."""

    task: str
    chance: float
    base: npt.NDArray[np.bool_]  # (n,)
    tuned: npt.NDArray[np.bool_]  # (seeds, n)

    @property
    def counts(self) -> bool:
        """Is the base above chance by more than three standard errors? Then the task is one of J*."""
        accuracy = float(self.base.mean())
        error = math.sqrt(accuracy * (1 - accuracy) / len(self.base))
        return accuracy - self.chance > MIN_STANDARD_ERRORS * error


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Ret over J*, RawRet and Forget% over J."""

    retention: Interval | None
    """None where J* is empty."""
    tasks: tuple[str, ...]
    """J*, chosen from the base alone."""
    raw_retention: Interval | None
    """None where the base answers nothing right."""
    forget_percent: Interval | None


def retention(tasks: Sequence[Rights], *, draws: int = DRAWS, seed: int = 0) -> Retention:
    """The ratios over a suite.

    A task of which the base answers nothing right has no ratio and is left out of RawRet.

    Raises:
        ValueError: tasks with different numbers of seeds.
    """
    if len({len(task.tuned) for task in tasks}) > 1:
        raise ValueError(f"tasks with {sorted({len(t.tuned) for t in tasks})} runs, expected the same runs in each")
    chosen = [task for task in tasks if task.counts]
    raw = [task for task in tasks if task.base.any()]
    rng = np.random.default_rng(seed)
    num_seeds = len(tasks[0].tuned) if tasks else 1
    seeds = _seed_weights(num_seeds, draws, rng)
    drawn = {task.task: _drawn_accuracies(task, seeds, rng) for task in tasks}

    def ret(of: Sequence[tuple[Floats, Floats, float]]) -> Floats:
        return np.asarray(sum(tuned - c for _, tuned, c in of) / sum(base - c for base, _, c in of))

    def raw_ret(of: Sequence[tuple[Floats, Floats]]) -> Floats:
        return np.asarray(np.mean([tuned / base for base, tuned in of], axis=0))

    kept = lost = whole = None
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw may hold no right answer of the base
        if chosen:
            point = [(task.base.mean(keepdims=True), task.tuned.mean(keepdims=True)[0], task.chance) for task in chosen]
            whole = _interval(ret(point), ret([(*drawn[task.task], task.chance) for task in chosen]))
        if raw:
            point_raw = [(task.base.mean(keepdims=True), task.tuned.mean(keepdims=True)[0]) for task in raw]
            kept = _interval(raw_ret(point_raw), raw_ret([drawn[task.task] for task in raw]))
            lost = Interval(value=100 * (1 - kept.value), low=100 * (1 - kept.high), high=100 * (1 - kept.low))
    return Retention(retention=whole, tasks=tuple(t.task for t in chosen), raw_retention=kept, forget_percent=lost)


def mean_interval(sums: Floats, weights: Floats, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """A mean over tokens, as KL: the seeds' sums over each text (seeds, n), the tokens of each (n,)."""
    rng = np.random.default_rng(seed)
    seeds = _seed_weights(len(sums), draws, rng)
    drawn = _drawn_sums(np.vstack([weights, sums]), draws, rng)
    value = sums.mean(axis=0).sum() / weights.sum()
    return _interval(np.array([value]), (drawn[:, 1:] * seeds).sum(axis=1) / drawn[:, 0])


def perplexity_ratio(
    base_nll: Floats, tuned_nll: Floats, weights: Floats, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Perplexity of the base over that of the tuned model; of several seeds, over their geometric mean.

    Args:
        base_nll: (n,) nats of each text.
        tuned_nll: (seeds, n).
        weights: (n,) tokens.
    """
    rng = np.random.default_rng(seed)
    seeds = _seed_weights(len(tuned_nll), draws, rng)
    drawn = _drawn_sums(np.vstack([weights, base_nll, tuned_nll]), draws, rng)
    value = (base_nll.sum() - tuned_nll.mean(axis=0).sum()) / weights.sum()
    tuned = (drawn[:, 2:] * seeds).sum(axis=1)
    return _interval(np.exp(np.array([value])), np.exp((drawn[:, 1] - tuned) / drawn[:, 0]))


def _seed_weights(num_seeds: int, draws: int, rng: np.random.Generator) -> Floats:
    """(draws, seeds): the share of each seed in a sample of as many, with replacement."""
    return rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws) / num_seeds


def _drawn_accuracies(task: Rights, seeds: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """(draws,) accuracies of the base and, over the drawn seeds, of the tuned model.

    Items that everybody judges alike are one kind; how many of each kind a draw holds is multinomial, which is the same
    distribution as drawing items, at the cost of a few numbers a draw.
    """
    kinds, counts = np.unique(np.vstack([task.base, task.tuned]).T, axis=0, return_counts=True)  # (kinds, 1 + seeds)
    shares = rng.multinomial(counts.sum(), counts / counts.sum(), size=len(seeds)) / counts.sum()
    accuracies = shares @ kinds.astype(np.float64)  # (draws, 1 + seeds)
    return accuracies[:, 0], (accuracies[:, 1:] * seeds).sum(axis=1)


def _drawn_sums(values: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """(draws, k): sums of values (k, n) over n texts that are drawn with replacement, the same for every row."""
    count = values.shape[1]
    return np.concatenate(
        [
            rng.multinomial(count, np.full(count, 1 / count), size=min(_DRAWS_AT_ONCE, draws - at)) @ values.T
            for at in range(0, draws, _DRAWS_AT_ONCE)
        ]
    )


def _interval(value: Floats, drawn: Floats) -> Interval:
    """The middle 95 % of the draws; 0/0, which has no value, is left out, and a ratio to nothing counts as infinite."""
    low, high = np.nanpercentile(drawn, (2.5, 97.5), method="nearest")
    return Interval(value=float(value[0]), low=float(low), high=float(high))
