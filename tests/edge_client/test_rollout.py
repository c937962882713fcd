"""Trying where a block should go, on the client."""

from __future__ import annotations

import math

import pytest
import torch

from fedblocks.edge_client import work
from fedblocks.protocol.messages import Probe, StateUpdate
from fedblocks.protocol.state import state_sha256
from tests.edge_client.test_growth import logits, make_bench, run, trained

__all__ = ["make_bench"]


def probe(bench, **fields):
    defaults = {
        "attempt_id": "p", "round": 1, "payload_bytes": 0, "payload_sha256": "", "active_blocks": (),
        "state": StateUpdate(
            encoding="none", from_version=0, to_version=0, state_sha256=state_sha256(bench.plan.shape, {})
        ),
        "candidates": bench.plan.block_ids, "strengths": (0.0, 0.5, 1.0), "num_examples": 64,
        "num_anchor_sequences": 4, "steps": 6, "batch_size": 4, "anchor_batch_size": 2, "anchor_weight": 1.0,
        "learning_rate": 3e-3, "warmup_steps": 2, "weight_decay": 0.01, "clip_norm": 1.0, "adam_beta1": 0.9,
        "adam_beta2": 0.99, "adam_eps": 1e-8, "seed": 3, "deadline_s": 60.0, "memory_budget_bytes": 0,
    }  # fmt: skip
    return Probe(**{**defaults, **fields})


def tried(bench, task):
    steps = []
    report = bench.probe(task, b"", status=lambda phase, done: steps.append((phase, done)))
    return {(row.block, row.strength): row for row in report.probed}, steps, report


def test_every_slot_is_tried_from_the_identity_and_nothing_is_kept(make_bench, make_assignment):
    bench = make_bench(active=(0, 1), placement="adaptive")
    first, _ = run(bench, make_assignment, active_blocks=(0, 1))
    ids = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(2))
    before = logits(bench, ids)
    rows, steps, _ = tried(bench, probe(bench))
    slots = bench.plan.block_ids
    assert set(rows) == {(block, g) for block in slots for g in (0.0, 0.5, 1.0)}
    at_zero = {rows[block, 0.0].nll_sum for block in slots}
    assert max(at_zero) == pytest.approx(min(at_zero), rel=1e-5)  # the base, whichever candidate has no strength
    assert all(abs(rows[block, 0.0].kl_sum) < 1e-3 for block in slots)
    assert all(rows[block, 1.0].nll_sum < rows[block, 0.0].nll_sum for block in slots)
    assert all(rows[block, 1.0].kl_sum > rows[block, 0.5].kl_sum > rows[block, 0.0].kl_sum for block in slots)
    assert rows[0, 1.0].num_anchor_tokens == 2 * 23  # so many of the sixteen sequences are held out
    assert ("training", 6 * len(slots)) in steps  # heartbeats say how far it is
    assert bench.active == (0, 1)
    assert torch.equal(logits(bench, ids), before)
    again, _ = run(bench, make_assignment, active_blocks=(0, 1))
    assert again.payload_sha256 == first.payload_sha256


def test_the_same_probe_gives_the_same_table(make_bench):
    bench = make_bench(active=(0, 1))
    assert tried(bench, probe(bench))[0] == tried(bench, probe(bench))[0]


def test_active_blocks_are_there_and_keep_their_strength(make_bench):
    bench = make_bench(active=(0, 1))
    bench.state = trained(bench, [0])
    bench.model.load_state(bench.state)
    update = StateUpdate(
        encoding="none", from_version=0, to_version=0, state_sha256=state_sha256(bench.plan.shape, bench.state)
    )
    rows, _, _ = tried(bench, probe(bench, state=update, active_blocks=(0,), candidates=(1, 2)))
    bench.use_blocks((0,))
    (measured,) = bench.measure(("validation",), seed=1)
    assert rows[1, 0.0].nll_sum == pytest.approx(measured.nll_sum, rel=1e-5)
    assert rows[2, 0.0].nll_sum == pytest.approx(measured.nll_sum, rel=1e-5)


def test_a_slot_that_does_not_fit_has_no_rows(make_bench, monkeypatch):
    bench = make_bench(active=(0, 1))
    chosen = work.choose_mode
    lowest = min(bench.plan.block_ids, key=bench.plan.position)

    def only_higher(profile, shape, layout, blocks, work, *, budget_bytes):
        return chosen(profile, shape, layout, blocks, work, budget_bytes=1 if lowest in blocks else budget_bytes)

    monkeypatch.setattr(work, "choose_mode", only_higher)
    rows, _, _ = tried(bench, probe(bench))
    assert {block for block, _ in rows} == set(bench.plan.block_ids) - {lowest}
    assert any(f"block {lowest} is not tried" in line for line in bench.said)


def test_rows_that_are_not_finite_are_left_out(make_bench):
    bench = make_bench(active=(0, 1))
    rows, _, report = tried(bench, probe(bench, learning_rate=1e30, clip_norm=1e30))
    assert report.failure is None
    assert all(math.isfinite(row.nll_sum) and math.isfinite(row.kl_sum) for row in rows.values())
    assert (0, 1.0) not in rows


def test_slots_that_the_plan_does_not_have_are_a_failure(make_bench):
    bench = make_bench(active=(0, 1))
    _, _, report = tried(bench, probe(bench, candidates=(9,)))
    assert report.failure == "internal"
    assert "9" in report.text
    assert report.probed == ()
