"""A growing and an adaptive run over real sockets: real clients, real training, export of what became active."""

from __future__ import annotations

import json

import pytest

from fedblocks.aggregator import probing
from fedblocks.aggregator.status import run_status
from fedblocks.edge_client.export import load_final
from fedblocks.fleet_file import Fleet, Group
from fedblocks.simulation import Inputs, simulate


@pytest.fixture
def inputs(tmp_path, tiny_checkpoint):
    train, general = tmp_path / "train.jsonl", tmp_path / "general.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "xy"[i % 2] * 2}) + "\n" for i in range(60)))
    general.write_text("".join(json.dumps({"prompt": f"g{i}", "completion": "ab"}) + "\n" for i in range(8)))
    model = tiny_checkpoint(tmp_path, layers=4)
    return Inputs(model=model, train=train, general=general, anchor_sequences=16, anchor_tokens=24)


def fleet(**run):
    groups = (
        Group(device="jetson-orin-nano-8gb", count=1, name="nano", examples=20),
        Group(device="jetson-agx-orin-64gb", count=1, name="agx", examples=30),
    )
    fields = {"training.steps": 2, "training.batch_size": 2, "server.heartbeat_interval_s": 600.0, **run}
    return Fleet(groups=groups, run=fields, seed=5)


def test_a_run_that_learns_nothing_more_grows_and_exports_its_blocks(inputs, tmp_path):
    grows = {"expansion.blocks": 1, "expansion.max_blocks": 3, "training.learning_rate": 1e-7, "run.max_rounds": 10}
    found = simulate(fleet(**grows), inputs, tmp_path / "out")
    assert found.finished
    assert [row["active_blocks"] for row in found.rounds] == [[0]] * 8 + [[0, 1]] * 2
    assert [row["num_accepted"] for row in found.rounds] == [2] * 10
    after = found.rounds[8]
    assert set(after["coverage"]) == {"0", "1"}
    assert load_final(found.run)[0].block_ids == (0, 1)


def test_an_adaptive_run_trains_where_its_clients_found_it_best(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "PROBE_MIN_EXAMPLES", 10)
    said = []
    adaptive = {
        "expansion.placement": "adaptive", "expansion.blocks": 1, "training.learning_rate": 3e-3, "run.max_rounds": 2,
    }  # fmt: skip
    found = simulate(fleet(**adaptive), inputs, tmp_path / "out", say=said.append)
    assert found.finished
    probe = run_status(found.run)["probe"]
    assert probe["clients"] == ["agx-1", "nano-1"] or probe["clients"] == ["nano-1", "agx-1"]
    (choice,) = probe["choices"]
    assert {slot["after_layer"] for slot in choice["slots"]} == {0, 1, 2, 3}
    assert all(slot["num_clients"] == 2 for slot in choice["slots"])
    assert any(slot["gain"] > 0 for slot in choice["slots"])
    assert [row["round"] for row in found.rounds] == [2]
    assert found.rounds[0]["active_blocks"] == [choice["block"]]
    assert any("try 4 places for a block" in line for line in said)
