"""The rules of the experiments: points, rates, what stands for a point or a budget, intervals; and the files."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import experiments as x  # noqa: E402


def measured(round: int, downstream: float, general: float, *, strength: float = 1.0, kl: float = 0.01) -> dict:
    return {
        "round": round,
        "strength": strength,
        "downstream": downstream,
        "general": general,
        "kl": kl,
        "kl_se": 0.001,
    }


def row(rate: float, *validation: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"learning_rate": rate, "validation": list(validation), **more}


def flat(rate: float, score: float, general: float = 0.9) -> dict[str, Any]:
    return row(rate, *(measured(t, score, general) for t in (1, 2, 3)))


POINTS = x.Points(first=0.8, gain_75=0.6, gain_50=0.4)


def test_points_follow_from_the_best_of_the_references_runs_and_its_gain():
    points = x.matched_points([flat(1e-3, 0.6), flat(3e-3, 0.9)], base_score=0.1)
    assert points.first == pytest.approx(0.895)
    assert points.gain_75 == pytest.approx(0.7)
    assert points.gain_50 == pytest.approx(0.5)


def test_of_all_rounds_and_strengths_at_a_score_the_one_that_keeps_most_stands_for_it():
    found = row(
        1e-3,
        measured(1, 0.7, 0.99),
        measured(2, 0.81, 0.90),
        measured(3, 0.95, 0.85),
        measured(3, 0.80, 0.93, strength=0.75),
        measured(3, 0.80, 0.93, strength=0.7, kl=0.02),
    )
    assert x.at_score(found, 0.8) == found["validation"][3]
    assert x.at_score(found, 0.96) is None
    assert x.first_at_score(found, 0.8) == 2
    assert x.first_at_score(found, 0.96) is None


@pytest.mark.parametrize(("max_kl", "strength"), [(0.1, 1.0), (0.0117, 1.0), (0.0116, 0.5), (0.0001, 0.0)])
def test_a_budget_counts_the_margin_and_strength_0_always_holds_it(max_kl, strength):
    found = row(
        1e-3,
        measured(1, 1.0, 0.5, strength=0.9, kl=0.0),
        measured(2, 0.9, 0.9, kl=0.01),
        measured(2, 0.7, 0.95, strength=0.5, kl=0.004),
        measured(2, 0.7, 0.95, strength=0.4, kl=0.009) | {"kl_se": 0.1},
        measured(2, 0.1, 1.0, strength=0.0, kl=0.0),
    )
    assert x.BUDGET_ERRORS == 1.64
    assert x.within_budget(found, max_kl)["strength"] == strength


def test_the_best_rate_keeps_most_at_the_point_and_learns_most_where_none_reaches_it():
    low, gentle, fast = flat(3e-4, 0.5), flat(1e-3, 0.82, 0.97), flat(1e-2, 0.99, 0.6)
    assert x.best_rate([low, gentle, fast], POINTS) == 1e-3
    assert x.best_rate([low, gentle, fast], None) == 1e-2
    assert x.best_rate([low, flat(1e-3, 0.7, 0.9)], POINTS) == 1e-3
    assert x.best_rate([flat(3e-3, 0.7), flat(1e-3, 0.7)], None) == 1e-3  # equal: the lower one


@pytest.mark.parametrize(
    ("best", "fifth"), [(1e-2, 0.0316), (3e-4, 9.49e-5), (1e-3, 1.73e-3), (3e-3, 1.73e-3)], ids=str
)
def test_the_fifth_rate_is_beyond_an_edge_or_beside_the_better_neighbour(best, fifth):
    merits = {3e-4: 0.1, 1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.2}
    assert x.fifth_rate((3e-4, 1e-3, 3e-3, 1e-2), best, merits.__getitem__) == pytest.approx(fifth)


def study(tmp_path: Path, lines: str = "") -> x.Study:
    path = tmp_path / "e.toml"
    text = (x.FOLDER / "1_quality_association.toml").read_text(encoding="utf-8")
    path.write_text(text.split("[[line]]")[0] + (lines or ONE_LINE + OURS), encoding="utf-8")
    return x.Study(experiment=x.load(path), book=x.RowBook(tmp_path / "rows.jsonl"), base_hash="ab", base_score=0.1)


ONE_LINE = '[[line]]\nname = "fedit"\nmethod = "lora"\nrank = 16\nrates = [1e-3, 3e-3]\n'
OURS = '[[line]]\nname = "fedbe"\nmethod = "blocks"\nblocks = 3\nanchor = true\nrates = [1e-3, 1e-2]\n'


def finish(one: x.Study, score: float, general: float = 0.9) -> tuple[str, float, int]:
    """Puts a row where the next one is missing."""
    found = one.missing()
    assert found is not None
    line, rate, seed = found
    settings = one.experiment.settings(line, rate, seed)
    made = flat(rate, score, general) | {
        "id": x.run_id(one.experiment, settings, "ab"),
        "line": line.name,
        "seed": seed,
    }
    one.book.add(made if seed == one.experiment.pilot_seed else made | {"test": {}})
    return line.name, rate, seed


def test_runs_are_asked_for_line_by_line_and_a_new_process_goes_on_where_one_stopped(tmp_path):
    one = study(tmp_path)
    order = [finish(one, 0.9 if i != 1 else 0.95) for i in range(4)]
    assert order == [("fedit", 1e-3, 0), ("fedit", 3e-3, 0), ("fedit", 9.49e-3, 0), ("fedit", 3e-3, 1)]
    assert one.points() is not None
    again = study(tmp_path)  # reads the rows
    order = [finish(again, 0.9) for _ in range(2)]
    assert order == [("fedit", 3e-3, 2), ("fedit", 3e-3, 3)]
    assert [finish(again, score) for score in (0.5, 0.97, 0.96)] == [
        ("fedbe", 1e-3, 0),
        ("fedbe", 1e-2, 0),
        ("fedbe", 3.16e-2, 0),
    ]
    assert [finish(again, 0.9)[2] for _ in range(3)] == [1, 2, 3]
    assert again.missing() is None


def test_a_line_with_the_rate_of_another_has_no_pilot_runs_and_runs_at_that_rate(tmp_path):
    follower = (
        '[[line]]\nname = "budget"\nmethod = "blocks"\nblocks = 3\nanchor = true\nmax_kl = 0.1\nrates_of = "fedbe"\n'
    )
    one = study(tmp_path, ONE_LINE + OURS + follower)
    order = [finish(one, 0.9) for _ in range(15)]
    assert order[9:12] == [("fedbe", order[9][1], seed) for seed in (1, 2, 3)]
    assert order[12:] == [("budget", order[9][1], seed) for seed in (1, 2, 3)]
    assert one.missing() is None


def test_one_changed_setting_is_another_run(tmp_path):
    experiment = study(tmp_path).experiment
    line = experiment.lines[1]
    names = {
        x.run_id(changed, changed.settings(line, rate, seed), base)
        for changed in (experiment, replace(experiment, rounds=3), replace(experiment, alpha=0.1))
        for rate in (1e-3, 3e-3)
        for seed in (1, 2)
        for base in ("ab", "cd")
    }
    assert len(names) == 24


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (ONE_LINE + "rnk = 3\n", "line 'fedit': unknown key 'rnk'"),
        (ONE_LINE + 'rates_of = "fedit"\n', "either rates or the name of a line"),
        (ONE_LINE + '[[line]]\nname = "b"\nrates_of = "c"\n', "'b' needs either rates or"),
        (OURS, "reference is 'fedit'"),
        (ONE_LINE + ONE_LINE, "two lines have one name"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_is_wrong(tmp_path, lines, text):
    with pytest.raises(ValueError, match=text):
        study(tmp_path, lines)


@pytest.mark.parametrize("path", sorted(x.FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_the_files_offer_the_anchor_to_every_kind_and_the_same_number_of_rates(path):
    experiment = x.load(path)
    swept = [line for line in experiment.lines if line.rates]
    assert {len(line.rates) for line in swept} == {4}
    anchored = {line.settings["method"] for line in swept if line.settings.get("anchor")}
    assert anchored == {line.settings["method"] for line in swept}
    for line in swept:  # {0.3, 1, 3, 10} times what is customary
        assert np.allclose(np.asarray(line.rates) / line.rates[1], [0.3, 1, 3, 10], rtol=0.12)
    assert {line.settings["method"] for line in experiment.lines if line.rates_of} <= {"blocks"}


def figures_of(right: dict[str, list[int]]) -> dict[str, Any]:
    shares = {name: sum(bits) / len(bits) for name, bits in right.items()}
    skills = [share for name, share in shares.items() if name != "downstream"]
    return {
        "downstream": shares["downstream"],
        "general": sum(skills) / len(skills),
        "kl": 0.01,
        "round": 3,
        "strength": 1.0,
        "right": {name: x._packed(bits) for name, bits in right.items()},
    }


def test_the_interval_is_paired_and_covers_the_difference_between_seeds():
    rng = np.random.default_rng(3)
    items = {"downstream": 50, "copy": 300, "sort": 300}
    base = {name: rng.integers(0, 2, size).tolist() for name, size in items.items()}
    same = x.interval([{"test": {"first": figures_of(base)}}] * 3, "first", figures_of(base), items, draws=200)
    assert same is not None
    assert same["retention_interval_95"] == [1.0, 1.0]  # item by item the same

    def worse(share: float) -> dict[str, Any]:
        lost = {
            name: [b if name == "downstream" or rng.random() > share else 0 for b in bits]
            for name, bits in base.items()
        }
        return {"test": {"first": figures_of(lost)}}

    def width(rows: list[dict[str, Any]]) -> float:
        found = x.interval(rows, "first", figures_of(base), items, draws=2000)
        assert found is not None
        low, high = found["retention_interval_95"]
        assert low < found["retention"] < high < 1.0
        return high - low

    assert width([worse(0.05), worse(0.1), worse(0.15)]) > 1.5 * width([worse(0.1)] * 3)
    assert x.interval([{"test": {}}], "first", figures_of(base), items) is None


def test_packed_bits_come_back():
    bits = np.random.default_rng(1).integers(0, 2, 77)
    assert np.array_equal(x.unpacked(x._packed(bits.tolist()), 77), bits)
