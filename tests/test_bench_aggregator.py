"""The aggregator's benchmark on a few clients: everybody is served, and the figures are there."""

from __future__ import annotations

import socket
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


def test_rounds_beside_strangers_that_trickle_are_compared_with_rounds_without_them(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_aggregator, "DISK", tmp_path)
    monkeypatch.setattr(bench_aggregator, "ROUNDS", 1)
    found = bench_aggregator.slow_loris(processes=1, clients=2, turns=1, strangers=20, sizes=bench_aggregator.TINY)[
        "slow_loris"
    ]
    assert [len(found["all_s"][name]) for name in ("with", "without")] == [1, 1]
    [[a]], [[b]] = found["all_s"]["with"], found["all_s"]["without"]
    assert found["round_ratio"] == found["round_ratio_by_turn"][0] == a / b
    assert not list(tmp_path.iterdir())


def test_a_trickler_says_one_byte_a_second_and_comes_back_when_it_is_dropped():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(10)
        with bench_aggregator.tricklers(f"tcp://127.0.0.1:{listener.getsockname()[1]}", count=1):
            first, _ = listener.accept()
            first.settimeout(10)
            assert first.recv(100) == b"\xff"
            assert first.recv(100) == b"\x00"
            first.close()
            second, _ = listener.accept()
            second.settimeout(10)
            assert second.recv(100) == b"\xff"
            second.close()
