"""The materials and the yardsticks of the encoder's federation; the published behaviour; results that merge."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import encoder_federation
import fedhft_document
import fedhft_minilm
from encoder_federation import CLIENTS, Settings, accumulate_as_published, partition

LABELS = np.repeat(np.arange(20), 60)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 10.0])
def test_a_partition_gives_every_row_once_and_each_client_enough(alpha):
    clients = partition(LABELS, LABELS, alpha=alpha, seed=3)
    rows = np.concatenate([np.concatenate([c.train, c.validation]) for c in clients])
    assert sorted(rows.tolist()) == list(range(len(LABELS)))
    assert sorted(np.concatenate([c.test for c in clients]).tolist()) == list(range(len(LABELS)))
    assert min(len(c.train) + len(c.validation) for c in clients) >= 8
    devices = [c.device for c in clients]
    assert {name: devices.count(name) for name in encoder_federation.SHARES} == encoder_federation.CLASS_SIZES
    again = partition(LABELS, LABELS, alpha=alpha, seed=3)
    assert encoder_federation.partition_hash(clients) == encoder_federation.partition_hash(again)


def test_a_smaller_alpha_is_more_unequal_and_test_parts_follow_train_parts():
    def most(alpha):
        clients = partition(LABELS, LABELS, alpha=alpha, seed=1)
        for client in clients:
            train, test = (np.bincount(LABELS[rows], minlength=20) for rows in (client.train, client.test))
            assert np.corrcoef(train, test)[0, 1] > 0.8 or train.max() < 10
        return np.mean([np.bincount(LABELS[c.train]).max() / len(c.train) for c in clients])

    assert most(0.1) > 2 * most(10.0)


def test_a_second_population_names_the_classes_differently():
    clients = partition(LABELS, LABELS, alpha=10.0, seed=1, populations=2)
    assert [c.population for c in clients[:4]] == [0, 1, 0, 1]
    names = clients[1].name_of(np.arange(20))
    assert sorted(names.tolist()) == list(range(20))
    assert (names != np.arange(20)).sum() > 10
    assert (clients[0].name_of(np.arange(20)) == np.arange(20)).all()


@pytest.mark.parametrize(("clusters", "first", "later"), [(2, 2, 2), (3, 4, 3)])
def test_the_published_clusters_are_one_object_that_grows_by_each_of_them(clusters, first, later):
    """2^(K-1) times the mean in the first round, K times from then on (methods.md 10.3)."""
    gradients = [{}] * clusters
    updates = [{"q": np.full((2, 3), 1.0)}, {"q": np.full((2, 3), 2.0)}]
    accumulate_as_published(gradients, updates)
    np.testing.assert_allclose(gradients[0]["q"], first * 1.5)
    accumulate_as_published(gradients, updates)
    np.testing.assert_allclose(gradients[0]["q"], (first + later) * 1.5)
    assert all(one is gradients[0] for one in gradients)


def test_the_published_mean_counts_only_clients_that_kept_the_row():
    gradients = [{}] * 2
    half = np.full((2, 3), 4.0)
    half[1] = np.nan
    accumulate_as_published(gradients, [{"q": half}, {"q": np.full((2, 3), 2.0)}])
    np.testing.assert_allclose(gradients[0]["q"], [[6.0] * 3, [4.0] * 3])


def test_adjusted_rand_is_one_for_the_planted_groups_and_zero_for_one_cluster():
    planted = np.array([0, 1, 0, 1, 0, 1])
    assert encoder_federation.adjusted_rand(1 - planted, planted) == 1.0
    assert encoder_federation.adjusted_rand(np.zeros(6, dtype=int), planted) == 0.0
    assert encoder_federation.adjusted_rand(np.array([0, 0, 0, 1, 1, 1]), planted) < 0.2


def row(line, seed, right, **changes):
    settings = Settings(line=line, data="banking77", alpha=0.5, learning_rate=1e-3, seed=seed)
    counts = {f"{part}_{kind}_right": right for part in ("test", "validation") for kind in ("personal", "population")}
    kept = dict.fromkeys(("sts_before", "sts_population", "sts_personal", "drift_population", "drift_personal"), 0.5)
    costs = dict.fromkeys(
        ("up_bytes_per_client_round", "down_bytes_per_client_round", "train_cpu_s", "server_cpu_s"), 1
    )
    rows = {f"{part}_rows": [10] * CLIENTS for part in ("test", "validation")}
    return {
        "id": fedhft_minilm.run_id(settings),
        **asdict(settings),
        **counts,
        **rows,
        **kept,
        **costs,
        "trained_bytes": dict.fromkeys(encoder_federation.SHARES, 4),
        **changes,
    }


def test_accuracies_are_over_rows_over_clients_and_of_the_worst_tenth():
    found = fedhft_minilm.figures(row("fedit", 1, [2, 4] + [9] * 18), "test", "personal")
    assert found == pytest.approx({"pooled": 168 / 200, "mean": 0.84, "worst": 0.3})


def test_the_rate_with_the_most_right_answers_on_the_pilot_seed_is_taken():
    rows = [
        row("fedit", 0, [5] * 20, learning_rate=1e-3),
        row("fedit", 0, [7] * 20, learning_rate=3e-3),
        row("fedit", 1, [9] * 20, learning_rate=1e-2),
    ]
    rates = fedhft_minilm.chosen_rates(rows)
    assert rates["fedit"] == 3e-3
    assert rates["fedhft"] == rates["fedhft-published"] == fedhft_minilm.CUSTOMARY["fedhft"]


def test_a_difference_is_paired_by_seed_and_says_how_sure_it_is():
    ours = [row("fedhft", s, [8] * 20) for s in (1, 2)]
    theirs = [row("fedit", s, [7] * 10 + [8] * 10) for s in (1, 2, 3)]
    found = fedhft_minilm.difference(ours, theirs)
    assert (found.seeds, found.points) == (2, pytest.approx(5.0))
    assert 0 < found.low < 5 < found.high < 10
    assert fedhft_minilm.difference(ours, []) is None


def test_the_summary_keeps_what_others_wrote_into_the_file(tmp_path, monkeypatch):
    file = tmp_path / "methods.json"
    file.write_text('{"other": {"rows": [1]}}')
    found = [row("fedhft", 1, [8] * 20), row("fedit", 1, [7] * 20), row("fedit", 0, [6] * 20)]
    found.append(row("fedit", 1, [1] * 20, learning_rate=7.0, id="not in the plan"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    monkeypatch.setattr(fedhft_minilm, "ROWS", tmp_path / "rows.jsonl")
    fedhft_minilm.write_summary(file)
    content = json.loads(file.read_text())
    assert content["other"] == {"rows": [1]}
    table = {entry["line"]: entry for entry in content["fedhft"]["table"]}
    assert table["fedit"]["fedhft_minus_this_points"]["points"] == pytest.approx(10.0)
    assert table["fedit"]["personal_mean_accuracy"] == pytest.approx(0.7)
    assert [r["seed"] for r in content["fedhft"]["rows"]] == [1, 1]


@pytest.mark.parametrize(("best", "extra"), [(3e-4, {1e-4}), (1e-3, set()), (1e-2, {3e-2})])
def test_a_best_rate_at_an_edge_gives_every_line_one_more_point(best, extra):
    rows = [row("fedit", 0, [9] * 20, learning_rate=best), row("fedit", 0, [2] * 20, learning_rate=2e-3)]
    swept = [*fedhft_minilm.sweep(rows)]
    assert len(swept) == (20 if extra else 16)
    assert extra <= {s.learning_rate for s in swept if s.line == "hetlora"}


def test_every_planned_run_has_a_name_of_its_own_and_the_sweep_is_on_the_pilot_seed():
    planned = [*fedhft_minilm.sweep([]), *fedhft_minilm.reported([])]
    assert len({fedhft_minilm.run_id(s) for s in planned}) == len(planned)
    assert {s.seed for s in fedhft_minilm.sweep([])} == {0}
    assert 0 not in {s.seed for s in fedhft_minilm.reported([])}
    assert fedhft_minilm.run_id(planned[0]) != fedhft_minilm.run_id(replace(planned[0], steps=9))


def test_without_the_model_the_benchmark_says_so_and_ends(capsys, monkeypatch):
    monkeypatch.setattr(fedhft_minilm, "PACKAGE", "no_such_package_of_ours")
    fedhft_minilm.run(1.0)
    assert "skipped: all-MiniLM-L6-v2" in capsys.readouterr().out


def test_the_page_says_of_each_line_what_was_measured():
    two = next(iter(fedhft_minilm.two_populations(1)))
    kept = {k: v for k, v in row("fedhft", 1, [8] * 20).items() if k not in asdict(two)}
    found = {**kept, **asdict(two), "id": fedhft_minilm.run_id(two), "clusters": 2, "prior_error": 0.1}
    found |= {"adjusted_rand": 1.0, "memberships": []}
    opening, place = fedhft_document.parts_of(fedhft_minilm.summary([found]))
    assert "runs are missing" in opening
    assert "| fedhft-k2 | 1 | 0.800 | 0.800 | 0.800 |" in place
    assert "2, adjusted Rand 1.00" in place


def test_the_results_page_is_written_from_the_results_file():
    file = fedhft_minilm.FILE
    content = json.loads(file.read_text()) if file.is_file() else {}
    page = (file.parents[2] / "docs" / "results.md").read_text()
    for part in fedhft_document.parts_of(content["fedhft"]) if "fedhft" in content else ():
        assert part in page
