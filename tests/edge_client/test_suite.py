"""Tests of edge_client/suite.py: a folder of tasks, a model or a run beside its base."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedblocks.edge_client import suite as suite_module
from fedblocks.edge_client.data import DataError
from fedblocks.edge_client.init_run import init_run
from fedblocks.edge_client.retention import Interval, Retention
from fedblocks.edge_client.suite import SuiteOptions, describe_suite, evaluate_suite, read_suite
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.tensors import flatten

OPTIONS = SuiteOptions(kl_sequences=4, draws=200)


@pytest.fixture
def suite(tmp_path):
    folder = tmp_path / "suite"
    folder.mkdir()
    rows = {
        "choice": [{"query": f"q{i}", "choices": ["ab", "cde", "f"], "gold": i % 3} for i in range(9)],
        "pairs": [{"good": f"good {i}", "bad": f"bad {i}", "uid": "xy"[i % 2]} for i in range(8)],
        "texts": [{"text": f"some text {i}" * (1 + i)} for i in range(5)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "notes.txt").write_text("no task")
    return folder


def test_every_file_of_the_folder_is_a_task(suite, tmp_path):
    assert [task.name for task in read_suite(suite)] == ["choice", "pairs/x", "pairs/y", "texts"]
    with pytest.raises(DataError, match=r"holds no \*\.jsonl"):
        read_suite(tmp_path)


def test_the_base_keeps_everything_and_its_items_are_told(suite, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint(tmp_path)
    found = evaluate_suite([base], base=base, suite=suite, options=OPTIONS)
    assert [(row["task"], row["num_items"]) for row in found["tasks"]] == [
        ("choice", 9),
        ("pairs/x", 4),
        ("pairs/y", 4),
    ]
    assert [row["chance"] for row in found["tasks"]] == pytest.approx([1 / 3, 1 / 2, 1 / 2])
    assert all(row["acc"] == row["base_acc"] and row["acc_norm"] == row["base_acc_norm"] for row in found["tasks"])
    (texts,) = found["texts"]
    assert texts["perplexity_retention"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert texts["num_bytes"] == sum(len(f"some text {i}" * (1 + i)) for i in range(5))
    assert found["kl_nats_per_token"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["agreement"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["raw_retention"]["value"] == pytest.approx(1.0)
    assert len(found["items"]) == 17
    first = found["items"][0]
    assert first["loglikelihoods_by_run"] == [first["base_loglikelihoods"]]
    own = [int(np.argmax(row["base_loglikelihoods"])) == row["gold"] for row in found["items"][:9]]
    assert found["tasks"][0]["base_acc"] == pytest.approx(np.mean(own))


def test_several_seeds_are_pooled(suite, tiny_checkpoint, tmp_path):
    base, *seeds = (tiny_checkpoint(tmp_path, seed=seed) for seed in (0, 1, 2))
    found = evaluate_suite(seeds, base=base, suite=suite, options=OPTIONS)
    alone = [evaluate_suite([seed], base=base, suite=suite, options=OPTIONS) for seed in seeds]
    for i, row in enumerate(found["tasks"]):
        assert row["acc_by_run"] == [one["tasks"][i]["acc"] for one in alone]
        assert row["acc"] == pytest.approx(np.mean(row["acc_by_run"]))
    kls = [one["kl_nats_per_token"]["value"] for one in alone]
    assert found["kl_nats_per_token"]["value"] == pytest.approx(np.mean(kls))
    assert found["kl_nats_per_token"]["low"] < found["kl_nats_per_token"]["value"] < found["kl_nats_per_token"]["high"]
    ratios = [one["texts"][0]["perplexity_retention"]["value"] for one in alone]
    assert found["texts"][0]["perplexity_retention"]["value"] == pytest.approx(math.sqrt(ratios[0] * ratios[1]))


def test_a_run_is_measured_on_its_four_bit_stack_against_that_stack_at_strength_0(
    suite, tiny_checkpoint, random_state, tmp_path
):
    base, run = tiny_checkpoint(tmp_path), tmp_path / "run"
    init_run(model=base, out=run, general=None, overrides=("expansion.blocks=1",), anchor_sequences=2, anchor_tokens=17)
    plan = ExpansionPlan.from_json((run / "plan.json").read_text())
    rng = np.random.default_rng(0)
    state = {
        block: {
            spec.name: (0.1 * rng.standard_normal(spec.shape)).astype(np.float32) for spec in plan.shape.block_tensors()
        }
        for block in plan.block_ids
    }
    (run / "state").mkdir(exist_ok=True)
    save_file(flatten(state), run / "state" / "final.safetensors")
    moved = evaluate_suite([run], base=base, suite=suite, options=OPTIONS)
    assert (moved["stack"], moved["strengths"]) == ("4-bit", [1.0])
    assert moved["kl_nats_per_token"]["value"] > 0.001
    assert moved["texts"][0]["perplexity_retention"]["value"] != 1.0
    still = evaluate_suite([run], base=base, suite=suite, strength=0.0, options=OPTIONS)
    assert still["kl_nats_per_token"]["value"] == pytest.approx(0, abs=1e-9)
    assert [row["base_loglikelihoods"] for row in still["items"]] == [
        row["base_loglikelihoods"] for row in moved["items"]
    ]
    assert all(row["loglikelihoods_by_run"] == [row["base_loglikelihoods"]] for row in still["items"])
    with pytest.raises(DataError, match="2 targets, expected models only or runs only"):
        evaluate_suite([run, base], base=base, suite=suite, options=OPTIONS)


def test_the_table_says_what_counts(suite, tiny_checkpoint, tmp_path):
    (suite / "long.jsonl").write_text(
        json.dumps({"query": "q", "choices": ["a", "b" * 40], "gold": 0})
        + "\n"
        + json.dumps({"query": "q", "choices": ["a", "b"], "gold": 0})
    )
    base = tiny_checkpoint(tmp_path)
    options = SuiteOptions(kl_sequences=2, draws=100, limit=4, window=20, packed=True)
    found = evaluate_suite([tiny_checkpoint(tmp_path, seed=1)], base=base, suite=suite, options=options)
    assert [(row["num_items"], row["num_left_out"]) for row in found["tasks"]] == [(4, 0), (1, 1), (4, 0), (4, 0)]
    assert (found["window"], found["packed"], found["limit"]) == (20, True, 4)
    text = describe_suite(found)
    for told in (
        "choice",
        "acc_norm",
        "1 items left out: an answer alone has more than 20 tokens",
        "texts: perplexity",
    ):
        assert told in text
    assert "KL to the base, nats per token" in text


def test_a_bound_that_does_not_exist_is_null_and_the_json_stays_valid(suite, tiny_checkpoint, tmp_path, monkeypatch):
    base = tiny_checkpoint(tmp_path)
    infinite = Interval(value=1.0, low=-math.inf, high=math.inf)
    monkeypatch.setattr(suite_module, "retention", lambda *_args, **_named: Retention(
        retention=None, tasks=(), raw_retention=infinite, forget_percent=infinite))  # fmt: skip
    found = evaluate_suite([base], base=base, suite=suite, options=SuiteOptions(kl_sequences=2, draws=100, limit=2))
    assert found["raw_retention"] == {"value": 1.0, "low": None, "high": None}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "raw retention: 1.0000 (95 %: no bound to no bound)" in describe_suite(found)


@pytest.mark.parametrize("changes", [{"limit": 0}, {"window": 1}, {"kl_sequences": 0}, {"draws": 99}])
def test_options_out_of_range_are_named(changes):
    (name,) = changes
    with pytest.raises(DataError, match=f"suite: {name} is {changes[name]}, expected"):
        SuiteOptions(**changes)
