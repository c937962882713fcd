"""The traffic benchmark: what it counts is what the codec's formula says, and a little for headers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import traffic

from fedblocks.profiles.cost import upload_bytes

TINY = replace(
    traffic.SHAPE,
    num_layers=4,
    hidden_size=128,
    intermediate_size=512,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=512,
)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(traffic, "ROUNDS", 3)
    monkeypatch.setattr(traffic, "CLIENTS", 5)


def test_blocks_cost_what_the_formula_says_and_three_of_them_three_times_as_much(short):
    lines = [replace(line, units=replace(line.units, shape=TINY)) for line in traffic.LINES[:3]]
    rows = [traffic.measure(line) for line in lines]
    for count, row in enumerate(rows, start=1):
        payload = upload_bytes(TINY, count, "int8", 0.25)
        assert payload < row["up_bytes_per_update"] < 1.1 * payload + 4000
        assert row["tasks"] == 6
        assert row["bytes_run"] == pytest.approx(
            row["tasks"] * (row["up_bytes_per_update"] + row["down_bytes_per_task"])
        )
    assert rows[2]["up_bytes_per_update"] / rows[0]["up_bytes_per_update"] == pytest.approx(3, rel=0.05)
    found = traffic.summary(rows)
    assert found["ratio_full_fp32_m1_run"] == pytest.approx(traffic.FULL_BYTES / rows[0]["bytes_per_task"])


def test_pairs_in_fp32_cost_four_bytes_a_value(short):
    (line,) = (line for line in traffic.LINES if line.name == "FedIT r=16, fp32")
    row = traffic.measure(replace(line, units=replace(line.units, shape=TINY), trained=(0, 1, 2, 3)))
    values = sum(16 * (spec.shape[0] + spec.shape[1]) for spec in TINY.block_tensors() if len(spec.shape) == 2) * 4
    assert 4 * values < row["up_bytes_per_update"] < 4 * values + 10_000
