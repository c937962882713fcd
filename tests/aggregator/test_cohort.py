"""Who takes part in a round."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from fedblocks.aggregator.cohort import OVERDUE_ROUNDS, choose_cohort, cohort_size
from fedblocks.protocol.messages import ClientKey


def keys(count: int) -> list[ClientKey]:
    return [ClientKey(f"k{i:03d}") for i in range(count)]


@pytest.mark.parametrize(
    ("num_clients", "fraction", "size"),
    [(1, 0.0, 1), (16, 0.0, 16), (17, 0.0, 8), (20, 0.0, 8), (21, 0.0, 9), (20, 0.4, 8), (5, 0.01, 1), (7, 1.0, 7)],
)
def test_the_size_of_a_cohort(num_clients: int, fraction: float, size: int) -> None:
    assert cohort_size(num_clients, fraction) == size
    assert len(choose_cohort(dict.fromkeys(keys(num_clients), 0), fraction=fraction, round=1, seed=1)) == size


def test_the_choice_depends_on_seed_and_round_and_not_on_the_order_of_the_clients() -> None:
    of = dict.fromkeys(keys(40), 0)
    first = choose_cohort(of, fraction=0.25, round=3, seed=1)
    assert first == choose_cohort(dict(reversed(of.items())), fraction=0.25, round=3, seed=1)
    assert first != choose_cohort(of, fraction=0.25, round=4, seed=1)
    assert first != choose_cohort(of, fraction=0.25, round=3, seed=2)


def test_everybody_has_a_turn_at_least_every_few_rounds() -> None:
    last, turns = dict.fromkeys(keys(20), 0), Counter[ClientKey]()
    longest = 0
    for number in range(1, 201):
        for key in choose_cohort(last, fraction=0.2, round=number, seed=5):
            longest = max(longest, number - last[key])
            last[key] = number
            turns[key] += 1
    assert longest <= OVERDUE_ROUNDS + math.ceil(20 / 4)
    assert min(turns.values()) >= 0.7 * 200 * 0.2
