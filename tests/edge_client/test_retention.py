"""Tests of edge_client/retention.py: hand-made numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedblocks.edge_client.retention import Interval, Rights, mean_interval, perplexity_ratio, retention


def answers(right, of):
    return np.arange(of) < right


def rights(task, base, *tuned, of=100, chance=0.5):
    return Rights(task=task, chance=chance, base=answers(base, of), tuned=np.array([answers(t, of) for t in tuned]))


def test_ret_is_the_ratio_of_sums_above_chance_over_the_tasks_where_the_base_is_above_chance():
    suite = [rights("a", 80, 74), rights("b", 90, 88, chance=0.25), rights("chance", 51, 20)]
    found = retention(suite, draws=200)
    assert found.tasks == ("a", "b")
    assert found.retention is not None
    assert found.retention.value == pytest.approx(((0.74 - 0.5) + (0.88 - 0.25)) / ((0.80 - 0.5) + (0.90 - 0.25)))


def test_raw_retention_is_the_mean_of_ratios_over_all_tasks_and_forgotten_is_the_rest():
    found = retention([rights("a", 80, 74), rights("chance", 50, 25)], draws=200)
    assert found.raw_retention is not None
    assert found.forget_percent is not None
    assert found.raw_retention.value == pytest.approx((74 / 80 + 25 / 50) / 2)
    assert found.forget_percent.value == pytest.approx(100 * (1 - found.raw_retention.value))
    assert found.forget_percent.low == pytest.approx(100 * (1 - found.raw_retention.high))


@pytest.mark.parametrize(("right", "counts"), [(63, False), (64, False), (65, True)])
def test_a_task_counts_if_the_base_is_more_than_three_standard_errors_above_chance(right, counts):
    # 0.5 + 3·sqrt(p(1-p)/100): 0.145 above at p = 0.63, 0.144 at 0.64, 0.143 at 0.65
    assert rights("a", right, right).counts is counts


def test_a_suite_at_chance_has_no_retention_and_one_without_a_right_answer_no_ratio():
    assert retention([rights("a", 50, 50)], draws=100).retention is None
    nothing = retention([rights("a", 0, 10)], draws=100)
    assert (nothing.retention, nothing.tasks, nothing.raw_retention, nothing.forget_percent) == (None, (), None, None)
    assert retention([], draws=100).raw_retention is None


def test_a_base_that_is_hardly_ever_right_leaves_the_ratio_without_an_upper_end():
    found = retention([rights("a", 1, 3)], draws=2000).raw_retention  # 37 % of the draws hold none of its right answers
    assert found is not None
    assert (found.value, found.high) == (pytest.approx(3.0), math.inf)


def test_the_same_answers_are_kept_for_certain():
    found = retention([rights("a", 80, 80), rights("b", 70, 70)], draws=500)
    assert found.retention == Interval(value=1.0, low=1.0, high=1.0)
    assert found.raw_retention == Interval(value=1.0, low=1.0, high=1.0)


def test_the_interval_is_paired_so_that_agreement_narrows_it():
    base = answers(80, 100)
    same_but_four = base.copy()
    same_but_four[:4] = False
    elsewhere = np.roll(same_but_four, 50)
    alike, unlike = (
        retention([Rights(task="a", chance=0.0, base=base, tuned=tuned[None])], draws=4000).retention
        for tuned in (same_but_four, elsewhere)
    )
    assert alike is not None
    assert unlike is not None
    assert alike.value == unlike.value == pytest.approx(0.95)
    assert alike.high - alike.low < 0.11 < 0.2 < unlike.high - unlike.low
    assert alike.high <= 1.0


def test_the_interval_covers_what_drawing_items_one_by_one_covers():
    rng = np.random.default_rng(1)
    base, tuned = rng.random(300) < 0.8, rng.random((2, 300)) < 0.7
    found = retention([Rights(task="a", chance=0.25, base=base, tuned=tuned)], draws=20_000).retention
    assert found is not None
    items = rng.integers(0, 300, (20_000, 300))
    seeds = rng.integers(0, 2, (20_000, 2))
    accuracy = np.stack([t[items].mean(axis=1) for t in tuned], axis=1)  # (draws, 2)
    drawn = (np.take_along_axis(accuracy, seeds, axis=1).mean(axis=1) - 0.25) / (base[items].mean(axis=1) - 0.25)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=0.01)


def test_seeds_that_differ_widen_the_interval():
    alike, apart = (
        retention([rights("a", 900, *tuned, of=1000)], draws=4000).retention
        for tuned in ((800, 800, 800), (700, 800, 900))
    )
    assert alike is not None
    assert apart is not None
    assert alike.value == pytest.approx(apart.value)
    assert apart.high - apart.low > 2 * (alike.high - alike.low)


def test_the_number_of_runs_is_the_same_in_each_task():
    with pytest.raises(ValueError, match=r"tasks with \[1, 2\] runs"):
        retention([rights("a", 80, 80), rights("b", 80, 80, 80)])


def test_a_mean_over_tokens_weighs_each_text_by_its_tokens():
    found = mean_interval(np.array([[1.0, 6.0], [3.0, 10.0]]), np.array([10.0, 30.0]), draws=2000)
    assert found.value == pytest.approx((1 + 6 + 3 + 10) / 2 / 40)
    assert found.low == pytest.approx(0.1)  # both draws the first text, both seeds the first run
    assert found.high == pytest.approx(1 / 3)
    assert mean_interval(np.array([[2.0, 2.0]]), np.array([4.0, 4.0])) == Interval(value=0.5, low=0.5, high=0.5)


def test_a_perplexity_ratio_is_base_over_ours_and_paired():
    base, tokens = np.array([20.0, 90.0, 40.0]), np.array([10.0, 30.0, 20.0])
    found = perplexity_ratio(base, np.array([base + 0.1 * tokens]), tokens, draws=500)
    assert found.value == pytest.approx(math.exp(-0.1))
    assert (found.low, found.high) == pytest.approx((math.exp(-0.1), math.exp(-0.1)))
    two = perplexity_ratio(base, np.array([base, base + 0.2 * tokens]), tokens, draws=500)
    assert two.value == pytest.approx(math.exp(-0.1))
    assert (two.low, two.high) == pytest.approx((math.exp(-0.2), 1.0))
