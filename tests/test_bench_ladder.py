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


def test_the_page_says_of_each_method_when_it_arrived_and_where_a_ratio_is_only_a_bound():
    from methods_document import tta_table

    arms = list(bench_ladder.COMPARISONS["tta"].arms)
    times = dict.fromkeys(arms, 7200.0) | {"fedbe": 3600.0, "flora": None}
    found = [
        {
            **run(1, times[arm], virtual_s=9000.0), "arm": arm, "rounds_to_target": 4, "score_mean_of_last_3": 0.98,
            "costs_of": "qwen2.5-0.5b", "deadline_s": 60.0, "retention": 1.0, "bytes_up": 1, "bytes_down": 10**9 - 1,
            "energy_wh": 1.0, "classes": [], "coverage": {}, "wall_s": 1.0, "id": arm,
        }
        for arm in arms
    ]  # fmt: skip
    page = tta_table("tta", {"command": "c", **bench_ladder.summary("tta", found)})
    assert "| fedbe | 0.003 | 1.00 | 4 | 0.980 | 1.0 | 1 |" in page
    assert "| fedit | 0.003 | 2.00 | 4 | 0.980 | 1.0 | **2.00** (2.00 to 2.00) |" in page
    assert "| flora | 0.003 | - | 4 | 0.980 | 1.0 | at least **2.50** (2.50 to 2.50) |" in page


def test_an_arm_that_was_left_out_is_named_and_the_others_stand():
    from methods_document import tta_table

    found = [
        {
            **run(1, seconds), "arm": arm, "rounds_to_target": 4, "score_mean_of_last_3": 1.0, "retention": 1.0,
            "costs_of": "qwen2.5-0.5b", "deadline_s": 60.0, "bytes_up": 1, "bytes_down": 1, "energy_wh": 1.0,
            "classes": [], "coverage": {}, "wall_s": 1.0, "id": arm,
        }
        for arm, seconds in (("fedbe", 100.0), ("fedit", 250.0), ("hetlora", 150.0))
    ]  # fmt: skip
    figures = bench_ladder.summary("tta", found)
    assert (figures["speedup_vs_fedit"], figures["speedup_vs_best_het_lora"]) == (2.5, 1.5)
    assert "Not run yet under these rules: flexlora, flora." in tta_table("tta", {"command": "c", **figures})


@pytest.mark.parametrize(
    ("runs", "best"),
    [
        ([(1e-3, None, 0.5), (3e-3, 200.0, 1.0), (1e-2, 100.0, 0.98)], 1e-2),
        ([(1e-3, None, 0.5), (3e-3, 200.0, 1.0), (1e-2, None, 1.0)], 3e-3),
        ([(1e-3, None, 0.5), (3e-3, None, 0.7), (1e-2, None, 0.6)], 3e-3),
    ],
)
def test_the_rate_is_that_of_the_first_at_the_target_or_of_the_one_that_learnt_most(runs, best):
    pilot = [{"learning_rate": r, "virtual_s_to_target": s, "score_mean_of_last_3": score} for r, s, score in runs]
    assert bench_ladder.best_rate(pilot) == best


def test_all_methods_have_the_same_rates_on_the_pilot_seed_and_no_deadline_that_is_fixed(tmp_path, monkeypatch):
    made = []

    class Book:
        def row(self, name, arm, fleet, *, workers):
            assert "allocation.deadline_s" not in fleet.run
            made.append((fleet.seed, fleet.run["run.max_rounds"]))
            return {"deadline_s": 60.0}

    rates = [
        [row["learning_rate"] for row in bench_ladder.swept(arm, Book(), workers=1)] for arm in bench_ladder.METHODS
    ]
    assert rates == [list(bench_ladder.RATES)] * len(bench_ladder.METHODS)
    assert set(made) == {(bench_ladder.PILOT_SEED, bench_ladder.PILOT_ROUNDS)}
    assert bench_ladder.PILOT_SEED not in bench_ladder.SEEDS
