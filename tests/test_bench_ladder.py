"""Arms are fleets that can run; the target is a mean of three; a ratio to what was not reached is a bound."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench_ladder

from fedblocks.protocol import run_config


@pytest.mark.parametrize(
    ("name", "arm"), [(name, arm) for name, found in bench_ladder.COMPARISONS.items() for arm in found.arms]
)
def test_every_arm_is_a_fleet_and_a_run_of_its_own(name, arm):
    comparison = bench_ladder.COMPARISONS[name]
    fleet = bench_ladder.fleet_of(comparison, comparison.arms[arm], 3)
    config = run_config.from_mapping({}, [f"{key}={value}" for key, value in _texts(fleet.run).items()])
    assert (fleet.seed, config.run.seed, config.allocation.cohort_fraction) == (3, 3, 0.4)
    assert len(fleet.client_names()) == 20
    ids = {bench_ladder.run_id(bench_ladder.fleet_of(comparison, one, 3)) for one in comparison.arms.values()}
    assert len(ids) == len(comparison.arms)


def _texts(run):
    return {key: str(value).lower() if isinstance(value, bool) else value for key, value in run.items()}


def rows(*scores):
    return [{"round": i + 1, "virtual_s": 10.0 * (i + 1), "score": score} for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        ((0.9, 0.9, 0.9), (3, 30.0)),
        ((0.0, 0.9, 0.9, 0.9), (4, 40.0)),
        ((1.0, None, 1.0, 0.7), (4, 40.0)),
        ((1.0, 1.0), None),
        ((1.0, 0.8, 0.8), None),
    ],
)
def test_the_target_is_reached_by_a_mean_of_three_scores(scores, found):
    assert bench_ladder.time_to_target(rows(*scores), 0.9) == found


def run(seed, seconds, virtual_s=500.0):
    reached = seconds is not None
    return {
        "arm": "a",
        "seed": seed,
        "reached": reached,
        "virtual_s_to_target": seconds,
        "virtual_s": seconds if reached else virtual_s,
    }


def test_a_speedup_is_the_mean_of_the_seeds_ratios_with_a_bound_where_the_other_does_not_arrive():
    found = bench_ladder.speedup([run(1, 100.0), run(2, 100.0)], [run(1, 200.0), run(2, None)])
    assert (found["mean"], found["low"], found["high"]) == (3.5, 2.0, 5.0)
    assert found["lower_bounds_at_seeds"] == [2]
    assert 2.0 <= found["interval_95"][0] <= found["interval_95"][1] <= 5.0
    lost = bench_ladder.speedup([run(1, None)], [run(1, 200.0)])
    assert lost["mean"] is None
    assert "seed 1" in lost["why"]


def test_a_run_is_not_made_twice(tmp_path, monkeypatch):
    made = []

    def measured(fleet, *, workers):
        made.append(fleet.seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_ladder, "measured", measured)
    comparison = bench_ladder.COMPARISONS["ladder"]
    fleet = bench_ladder.fleet_of(comparison, comparison.arms["fitted"], 1)
    line = f'{{"id": "{bench_ladder.run_id(fleet)}", "deadline_s": 6.0}}\n'
    (tmp_path / "runs.jsonl").write_text(line)
    book = bench_ladder.Book(tmp_path / "runs.jsonl")
    assert book.row("ladder", "fitted", fleet, workers=1)["deadline_s"] == 6.0
    assert made == []
    with pytest.raises(KeyboardInterrupt):
        book.row("ladder", "uniform", bench_ladder.fleet_of(comparison, comparison.arms["uniform"], 1), workers=1)
    assert made == [1]
