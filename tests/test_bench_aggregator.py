"""The aggregator's benchmark on a few clients: everybody is served, and the figures are there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bare_wire
import bench_aggregator


def test_a_bare_round_moves_all_bytes_and_takes_some_time():
    taken = bare_wire.rounds(2, 100_000, 2, processes=1)
    assert len(taken) == 2
    assert all(seconds > 0 for seconds in taken)


def test_light_clients_are_served_to_the_end_of_their_run(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_aggregator, "DISK", tmp_path)
    found = bench_aggregator.clients(processes=1, count=3, rounds=2)["clients_1000"]
    assert (found["clients"], found["served"], found["refused"]) == (3, 3, 0)
    assert found["updates_by_round"] == [3, 3]
    assert found["aggregator_peak_bytes"] >= found["aggregator_idle_bytes"] > 0
    assert not list(tmp_path.iterdir())
