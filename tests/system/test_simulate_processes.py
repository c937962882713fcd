"""A small fleet learns the same bits virtually and as real processes."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import pytest

from fedblocks.aggregator.auth import Registry
from fedblocks.aggregator.invitation import write_invitation
from fedblocks.edge_client.client import write_profile
from fedblocks.edge_client.identity import KEY_FILE
from fedblocks.fleet_file import Fleet, Group
from fedblocks.protocol.keys import write_key_pair
from fedblocks.simulation import Inputs, assumed_profile, key_of, make_run, simulate

#: A fleet in which nothing that is measured changes a plan: everybody can do all in time and memory.
FLEET = Fleet(
    groups=(
        Group(device="jetson-agx-orin-64gb", count=2, name="agx", examples=20),
        Group(device="rtx-4090", count=1, name="gpu", examples=30),
    ),
    run={
        "run.max_rounds": 3,
        "training.steps": 4,
        "expansion.blocks": 2,
        "allocation.deadline_s": 1000.0,
        "allocation.min_cohort": 3,
        "server.heartbeat_interval_s": 0.5,
    },
    seed=5,
)


@pytest.mark.slow
def test_a_small_fleet_learns_the_same_bits_virtually_and_as_real_processes(consortium, tmp_path):
    c = consortium(clients=1)
    rows = [{"prompt": f"p{i}", "completion": "xy"[i % 2] * 2} for i in range(60)]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = Inputs(
        model=c.model, train=train, general=tmp_path / "general.jsonl", anchor_sequences=16, anchor_tokens=24
    )
    virtual = simulate(FLEET, inputs, tmp_path / "virtual")

    shutil.rmtree(c.run)
    make_run(FLEET, inputs, tmp_path)
    c.listen_here()
    for group in FLEET.groups:
        for name in (f"{group.prefix}-{i + 1}" for i in range(group.count)):
            keys, home = key_of(FLEET.seed, name), c.home(name)
            write_invitation(c.run, name=name, out=tmp_path / f"{name}.toml")
            Registry(c.run).enrol(keys.public, name, now_unix_s=time.time())
            home.mkdir(mode=0o700)
            write_key_pair(home / KEY_FILE, keys)
            write_profile(home, replace(assumed_profile(group, 1.0), measured_unix_s=time.time()))
            shutil.copy(tmp_path / "virtual" / "sites" / name / "data.jsonl", tmp_path / f"{name}.jsonl")
    c.serve()
    c.join("agx-1", "--evaluate")
    c.join("agx-2")
    c.join("gpu-1")
    for name in ("aggregator", "agx-1", "agx-2", "gpu-1"):
        assert c.wait(name) == 0, c.text(name)

    real = c.metrics()
    assert [row["num_accepted"] for row in real] == [row["num_accepted"] for row in virtual.rounds] == [3, 3, 3]
    assert [row["state_sha256"] for row in real] == [row["state_sha256"] for row in virtual.rounds]
    assert [row["score"] for row in real] == [row["score"] for row in virtual.rounds]
    assert real[-1]["state_sha256"] == virtual.state_sha256
