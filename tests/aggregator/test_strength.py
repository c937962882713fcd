"""How strong the blocks may be in the exported model (methods.md 9)."""

from __future__ import annotations

import math

import pytest

from fedblocks.aggregator.strength import StrengthChoice, choose_strength
from fedblocks.protocol.messages import Measurement

TOKENS = 100


def measured(
    *,
    kl: float = 0.0,
    spread: float = 0.0,
    accuracy: float = 0.5,
    nll: float = 2.0,
    general: float | None = 0.9,
    strength: float = 1.0,
    items: int = 1000,
) -> list[Measurement]:
    """Sums of two clients with eight anchor sequences of 100 tokens each, half of them ``spread`` above the mean."""
    found: list[Measurement] = []
    for _ in range(2):
        sums = [TOKENS * (kl + (spread if i % 2 else -spread)) for i in range(8)]
        found.append(
            Measurement(
                measure="anchor",
                version=3,
                num_items=8,
                num_tokens=8 * TOKENS,
                kl_sum=math.fsum(sums),
                kl_square_sum=math.fsum(s * s for s in sums),
                strength=strength,
            )
        )
        correct = {"validation": accuracy, "general": general}
        for measure in ("validation", "general"):
            share = correct[measure]
            if share is not None:
                found.append(
                    Measurement(
                        measure=measure,
                        version=3,
                        num_items=items,
                        num_correct=round(share * items),
                        nll_sum=nll * items,
                        num_tokens=items,
                        strength=strength,
                    )
                )
    return found


def choose(
    max_kl: float = 0.1, min_retention: float = 0.0, general: float | None = 0.9, **by_tenth: dict[str, float]
) -> StrengthChoice:
    """A choice among strengths 0 (the base) and those given as ``s5={...}`` (0.5)."""
    every = measured(strength=0.0, accuracy=0.2, general=general)
    for name, values in by_tenth.items():
        every += measured(**{"general": general, **values}, strength=int(name[1:]) / 10)
    found = choose_strength(every, max_kl=max_kl, min_retention=min_retention)
    assert found is not None
    return found


def test_the_best_score_within_the_budget_is_taken() -> None:
    choice = choose(s5={"kl": 0.05, "accuracy": 0.6}, s10={"kl": 0.2, "accuracy": 0.9})
    assert choice.strength == 0.5
    assert choice.chosen.kl == pytest.approx(0.05)
    assert "is above the budget of 0.1" in choice.points[-1].refused
    assert choose(max_kl=0.3, s5={"kl": 0.05, "accuracy": 0.6}, s10={"kl": 0.2, "accuracy": 0.9}).strength == 1.0


def test_the_standard_error_of_the_kl_counts_against_a_strength() -> None:
    """16 sequences, half at +-0.04: the error of the mean is 0.04·sqrt(16/15)/4, and 0.09 + 1.64 of it is over 0.1."""
    point = choose(s10={"kl": 0.09, "spread": 0.04, "accuracy": 0.9}).points[-1]
    assert point.kl_error == pytest.approx(0.04 * math.sqrt(16 / 15) / 4)
    assert point.refused
    assert not choose(s10={"kl": 0.08, "spread": 0.04, "accuracy": 0.9}).points[-1].refused


def test_strength_0_is_the_base_and_always_within_the_budget() -> None:
    choice = choose(s10={"kl": 5.0, "accuracy": 1.0})
    assert (choice.strength, choice.chosen.kl, choice.chosen.retention, choice.chosen.refused) == (0.0, 0.0, 1.0, "")


def test_of_equal_scores_the_smallest_strength_is_taken() -> None:
    """The standard error of 0.9 over 2000 rows is 0.0067; a fifth of it is 0.0013."""
    near = choose(s5={"accuracy": 0.899}, s10={"accuracy": 0.9})
    assert near.strength == 0.5
    apart = choose(s5={"accuracy": 0.898}, s10={"accuracy": 0.9})
    assert apart.strength == 1.0


def test_where_as_many_rows_are_right_the_likelier_answers_win() -> None:
    weak, strong = {"accuracy": 0.9, "nll": 1.2}, {"accuracy": 0.9, "nll": 0.7}
    assert choose(s5=weak, s10=strong).strength == 1.0
    assert choose(s5={**weak, "nll": 0.7}, s10=strong).strength == 0.5
    # Neither may a likelier answer make up for rows that are wrong.
    assert choose(s5={"accuracy": 0.95, "nll": 1.2}, s10=strong).strength == 0.5


def test_the_floor_of_retention_is_kept_with_its_error() -> None:
    strong = {"accuracy": 0.9, "general": 0.8}
    weak = {"accuracy": 0.7, "general": 0.895}
    assert choose(min_retention=0.0, s5=weak, s10=strong).strength == 1.0
    choice = choose(min_retention=0.95, s5=weak, s10=strong)
    assert choice.strength == 0.5
    assert "is below the floor of 0.95" in choice.points[-1].refused
    # 0.98 is kept by the estimate (0.994), not with its error (0.0076).
    assert choose(min_retention=0.985, s5=weak, s10=strong).strength == 0.0


def test_a_limit_that_nobody_could_measure_lets_nothing_but_the_base_pass() -> None:
    choice = choose(min_retention=0.5, general=None, s10={"accuracy": 0.9})
    assert (choice.strength, choice.points[-1].refused) == (0.0, "nobody measured the general validation file")
    without = [m for m in measured(strength=1.0, accuracy=0.9) if m.measure != "anchor"]
    found = choose_strength([*measured(strength=0.0), *without], max_kl=0.1, min_retention=0.0)
    assert found is not None
    assert (found.strength, found.points[-1].refused) == (0.0, "nobody measured its KL to the base")


def test_without_a_budget_only_the_score_decides() -> None:
    assert choose(max_kl=math.inf, s5={"accuracy": 0.6}, s10={"kl": 99.0, "accuracy": 0.9}).strength == 1.0


def test_where_one_strength_was_measured_there_is_nothing_to_choose() -> None:
    assert choose_strength(measured(strength=1.0), max_kl=0.1, min_retention=0.0) is None
