"""The in-process federation of the benchmarks, the rules of pilot and evidence, and the frozen file's hash."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.append(BENCHMARKS)

import evidence  # noqa: E402
import pilot  # noqa: E402
import starter_runs  # noqa: E402
import stories_gsm8k  # noqa: E402
from federation import CPU, Federation, Settings, federate, first_at_least, make_learner  # noqa: E402

from fedblocks.edge_client.anchor import sample_anchor  # noqa: E402
from fedblocks.edge_client.checkpoint import Checkpoint  # noqa: E402
from fedblocks.edge_client.samples import TokenisedSample  # noqa: E402

torch.set_num_threads(1)
FROZEN = starter_runs.frozen()
METHODS = [("full", 0), ("lora", 0), ("blocks", 2)]


def site(seed: int, rows: int) -> list[TokenisedSample]:
    rng = np.random.default_rng(seed)
    mask = np.array([False] * 5 + [True] * 2)
    return [TokenisedSample(ids=rng.integers(4, 100, 7).astype(np.int32), label_mask=mask) for _ in range(rows)]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_checkpoint) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), layers=3)


def federation(model: Path, cache: Path, rows: tuple[int, ...] = (8, 24), device: torch.device = CPU) -> Federation:
    anchors = sample_anchor(Checkpoint.open(model), 8, 16, 1)
    return Federation.of(model, [site(i, n) for i, n in enumerate(rows)], anchors, cache, device)


def settings(method: str, blocks: int, **changes) -> Settings:
    usual = {"learning_rate": 1e-2, "seed": 3, "rounds": 2, "steps": 4, "batch_size": 4, "anchor": True}
    return Settings(method=method, blocks=blocks, **(usual | changes))


def probe(learner, strength: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        expanded = learner.evaluation_model(strength)
        return expanded.rows_logits(expanded.forward(torch.arange(4, 20).unsqueeze(0))[0])


@pytest.mark.parametrize(("method", "blocks"), METHODS)
def test_a_federation_repeats_itself_and_learns_its_training_data(model, tmp_path, method, blocks):
    runs = []
    for _ in range(2):
        world = federation(model, tmp_path)
        learner = make_learner(world, settings(method, blocks, rounds=4, anchor=False))
        ends = list(federate(world, settings(method, blocks, rounds=4, anchor=False), learner))
        runs.append((probe(learner), [end.task_loss for end in ends]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert runs[0][1][-1] < runs[0][1][0]


@pytest.mark.parametrize(("method", "blocks"), METHODS)
def test_strength_zero_is_the_base_bit_for_bit_and_strength_one_is_not(model, tmp_path, method, blocks):
    world = federation(model, tmp_path)
    base = make_learner(world, settings("full", 0))
    learner = make_learner(world, settings(method, blocks))
    assert torch.equal(probe(learner), probe(base))
    list(federate(world, settings(method, blocks), learner))
    assert torch.equal(probe(learner, 0.0), probe(base))
    assert not torch.equal(probe(learner), probe(base))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_with_one_client_the_server_takes_its_weights(model, tmp_path, method):
    world = federation(model, tmp_path, rows=(8,))
    learner = make_learner(world, settings(method, 0, rounds=1))
    trained = learner.begin()
    for end in federate(world, settings(method, 0, rounds=1), learner):
        local = [t.detach().clone() for group in trained for t in group.tensors]
        end.learner.restore()
        for mine, shared in zip(local, (t for group in trained for t in group.tensors), strict=True):
            torch.testing.assert_close(shared.detach(), mine, rtol=0, atol=1e-6)


def test_an_anchored_federation_stays_nearer_to_the_base(model, tmp_path):
    world = federation(model, tmp_path)
    base = probe(make_learner(world, settings("full", 0))).log_softmax(-1)
    distance = {}
    for anchor in (False, True):
        learner = make_learner(world, settings("full", 0, rounds=3, anchor=anchor))
        list(federate(world, settings("full", 0, rounds=3, anchor=anchor), learner))
        distance[anchor] = (base.exp() * (base - probe(learner).log_softmax(-1))).sum(-1).mean().item()
    assert 0 < distance[True] < distance[False]


def test_int8_updates_of_blocks_are_at_most_a_tenth_of_their_fp32_size(model, tmp_path):
    world = federation(model, tmp_path)
    chosen = settings("blocks", 2, rounds=2)
    learner = make_learner(world, chosen)
    ends = list(federate(world, chosen, learner))
    fp32 = 4 * sum(t.numel() for group in learner.begin() for t in group.tensors)
    assert 0 < ends[0].upload_bytes < fp32 / 10
    assert 0 < ends[0].download_bytes < fp32 / 10 < ends[-1].download_bytes


def test_the_controller_measures_no_forgetting_before_the_first_round(model, tmp_path):
    world = federation(model, tmp_path)
    chosen = settings("blocks", 2)
    kls = [end.controller_kl for end in federate(world, chosen, make_learner(world, chosen))]
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls[1] > 1e-6


@pytest.mark.parametrize(("method", "blocks"), [("blocks", 0), ("full", 2)])
def test_settings_refuse_blocks_without_number_and_baselines_with_one(method, blocks):
    with pytest.raises(ValueError, match="blocks"):
        settings(method, blocks)


def test_the_first_round_at_the_target_counts_from_one():
    assert first_at_least([0.1, 0.9, 0.5, 0.95], 0.9) == 2
    assert first_at_least([0.1], 0.9) is None


def log(*values: float) -> list[dict[str, float]]:
    return [{"downstream": value, "general": 1.0} for value in values]


@pytest.mark.parametrize(("best", "target"), [(0.93, 0.90), (0.90, 0.90), (0.89, 0.80), (0.85, 0.80), (0.62, 0.55)])
def test_target_rule_is_that_of_the_frozen_file(best, target):
    assert pilot.target_of([{"rounds_log": log(0.2, best)}]) == pytest.approx(target)


def test_best_rate_is_the_one_with_the_fewest_rounds_and_among_equals_the_lower():
    def row(rate, reached):
        return {
            "task": "rule", "method": "full", "anchor": False, "blocks": 0, "max_kl": 0.03,
            "learning_rate": rate, "rounds_to_target": reached,
        }  # fmt: skip

    rows = [row(4e-3, 3), row(2e-3, 3), row(1e-3, 5), row(8e-3, None)]
    document = pytest.importorskip("results_document")
    assert document.best_row(rows, evidence.LINES[0], "rule")["learning_rate"] == 2e-3
    assert document.best_row(rows[-1:], evidence.LINES[0], "rule") is None


def test_a_matched_point_is_interpolated_where_the_curve_first_comes_down():
    curve = [
        {"gsm8k_nll": n, "stories_nll": s, "kl": k} for n, s, k in [(4.0, 1.5, 0.0), (3.0, 1.7, 0.2), (2.0, 2.5, 1.0)]
    ]
    assert stories_gsm8k.matched(curve, 2.5) == pytest.approx({"stories_nll": 2.1, "kl": 0.6})
    assert stories_gsm8k.matched(curve, 1.9) is None


def test_general_ability_above_chance_is_a_ratio_of_sums():
    base = {"copy": 1.0, "compare": 1.0}
    assert starter_runs.above_chance({"copy": 0.5, "compare": 0.75}, base, 300) == pytest.approx(0.75 / 1.5)


def test_every_planned_run_has_its_own_hash_and_the_middle_rates_come_first():
    planned = list(evidence.plan(FROZEN))
    hashes = [starter_runs.config_hash(chosen, task, "base", "partition") for task, chosen in planned]
    assert len(set(hashes)) == len(planned) == 2 * 4 * len(evidence.LINES)
    rates = [FROZEN["learning_rates"]["full"].index(s.learning_rate) for _, s in planned if s.method == "full"]
    assert rates[:4] == [1, 1, 1, 1]


def test_no_blocks_run_in_the_pilot_and_its_seed_is_not_reported():
    assert {line.method for line in pilot.lines(FROZEN)} == {"full", "lora"}
    assert not any(line.anchor for line in pilot.lines(FROZEN))
    assert FROZEN["pilot_seed"] not in FROZEN["reported_seeds"]


def test_frozen_file_is_unchanged_since_it_was_hashed():
    assert FROZEN["sha256"] == starter_runs.frozen_digest(FROZEN)


@pytest.mark.parametrize("name", ["pilot.json", "evidence.json"])
def test_results_belong_to_the_shipped_model_and_the_frozen_split(name):
    path = starter_runs.RESULTS / name
    if not path.exists():
        pytest.skip(f"{name} has not been made")
    from fedblocks.edge_client.checkpoint import base_hash
    from fedblocks.edge_client.starter import starter_folder

    shipped = base_hash(starter_folder())
    partitions = FROZEN["federation"]["settings"]["evidence"]["partition_sha256"]
    for row in starter_runs.results_rows(path):
        assert row["base_hash"] == shipped
        assert row["partition_hash"] == partitions[row["task"]]


def test_rows_survive_a_kill_in_mid_line_and_the_next_start_goes_on_behind_them(tmp_path):
    path = tmp_path / "made" / "rows.jsonl"
    book = starter_runs.RowBook(path)
    assert book.rows == []
    assert book.add({"id": "a"}) == {"id": "a"}
    book.add({"id": "b"})
    path.write_text(path.read_text() + '{"id": "c", "sco')
    again = starter_runs.RowBook(path)
    assert [row["id"] for row in again.rows] == ["a", "b"]
    again.add({"id": "c"})
    assert [row["id"] for row in starter_runs.RowBook(path).rows] == ["a", "b", "c"]


def test_benchmarks_that_share_a_results_file_leave_each_others_entries_alone(tmp_path):
    path = tmp_path / "results" / "methods.json"
    starter_runs.put_entries(path, {"ours": {"command": "make a", "score": 0.123456789}})
    starter_runs.put_entries(path, {"theirs": {"command": "make b"}})
    starter_runs.put_entries(path, {"ours": {"command": "make a", "score": 1 / 3}})
    assert json.loads(path.read_text()) == {
        "ours": {"command": "make a", "score": 0.333333},
        "theirs": {"command": "make b"},
    }


def test_a_part_of_a_page_is_replaced_and_the_rest_stays_as_it_is(tmp_path):
    from demos_document import replace_part

    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- begin: a -->\n\nold\n\n<!-- end: a -->\n\n## Next\n\ntext\n")
    for _ in range(2):  # a second time changes nothing
        replace_part(page, "a", ["new"])
        assert page.read_text() == "# Title\n\n<!-- begin: a -->\n\nnew\n\n<!-- end: a -->\n\n## Next\n\ntext\n"
    replace_part(page, "b", ["more"])
    assert page.read_text().endswith("text\n\n<!-- begin: b -->\n\nmore\n\n<!-- end: b -->\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(("method", "blocks"), METHODS)
def test_on_a_gpu_a_federation_learns_what_it_learns_on_the_cpu(model, tmp_path, method, blocks):
    given = settings(method, blocks, rounds=4)
    losses, logits = [], []
    for device in ("cpu", "cuda"):
        world = federation(model, tmp_path, device=torch.device(device))
        learner = make_learner(world, given)
        losses.append([end.task_loss for end in federate(world, given, learner)])
        logits.append(probe(learner).cpu())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    torch.testing.assert_close(logits[1], logits[0], rtol=0.05, atol=0.05)


def test_a_device_that_is_not_here_is_said_in_one_line():
    with pytest.raises(argparse.ArgumentTypeError, match=r"'nosuch' cannot be used here .* expected cpu or cuda"):
        starter_runs.device_named("nosuch")
    assert starter_runs.device_named("cpu").type == "cpu"
