"""A run in which one site can only send slim blocks: planner, wire, client and fold, each its own process."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

from fedblocks.aggregator.ledger import open_read_only
from fedblocks.aggregator.replay import replay
from fedblocks.aggregator.run_folder import read_run_folder
from fedblocks.protocol.tensors import delta_layout

pytestmark = pytest.mark.slow


def test_a_site_with_a_thin_line_trains_slim_blocks_and_a_replay_confirms_the_state(consortium):
    c = consortium(
        "run.max_rounds=3", "training.steps=8", "expansion.blocks=1", "allocation.slim=true",
        "allocation.deadline_s=20.0", "server.keep_updates=true",
    )  # fmt: skip
    c.profile = dataclasses.replace(c.profile, uplink_bytes_per_s=300.0)
    c.enrol("site-2")  # once more, with the profile of a thin line
    c.serve()
    c.join("site-1")
    c.join("site-2")
    for name in ("aggregator", "site-1", "site-2"):
        assert c.wait(name) == 0, c.text(name)

    shape = read_run_folder(c.run).plan.shape
    widths = {}
    with contextlib.closing(open_read_only(c.run / "ledger.sqlite")) as ledger:
        for record in ledger.rounds():
            for stored in ledger.updates_of(record.round):
                delta = stored.delta
                widths.setdefault(stored.client_key, set()).add(delta.width)
                layout = delta_layout(
                    delta.tensors, shape=shape, blocks=(0,), format=delta.format, density=delta.density,
                    width=delta.width,
                )  # fmt: skip
                assert layout.total_bytes == delta.payload_bytes
                assert all(energy > 0 for energy in delta.train.gradient_energy)
    thin, thick = sorted(widths.values(), key=max)
    assert max(thin) < 1
    assert thick == {1.0}
    rounds = c.metrics()
    assert [r["num_accepted"] for r in rounds] == [2, 2, 2]
    replayed = replay(c.run)
    assert len(replayed) == 3
    assert all(r.equal for r in replayed)
