"""kill -9 of a client while it trains, and of the aggregator in mid-round: the run goes on, all is counted once."""

from __future__ import annotations

import signal

import pytest

from fedblocks.aggregator.replay import replay
from fedblocks.aggregator.status import run_status

#: About two seconds of training a round, so that a kill meets it.
LONG_ROUNDS = (
    "run.max_rounds=3",
    "training.steps=150",
    "training.anchor_batch_size=1",
    "expansion.blocks=1",
    "server.keep_updates=true",
    "allocation.rejoin_grace_s=60",
)


def in_training(c, name: str) -> bool:
    """True once the aggregator has an open assignment of this client in a round after the first."""
    if run_status(c.run)["phase"] != "running" or len(c.metrics()) < 1:
        return False
    client = next(x for x in run_status(c.run)["clients"] if x["name"] == name)
    return client["outcome"] == "open"


def finish_and_check(c) -> None:
    assert c.wait("aggregator", 180) == 0, c.text("aggregator")
    for name in ("site-1", "site-2"):
        assert c.wait(name, 60) == 0, c.text(name)
    rounds = c.metrics()
    assert [r["num_accepted"] for r in rounds] == [2, 2, 2], c.text("aggregator")
    replayed = replay(c.run)
    assert [v.num_updates for v in replayed] == [2, 2, 2]
    assert all(v.equal for v in replayed)


@pytest.fixture
def running(consortium):
    c = consortium(*LONG_ROUNDS)
    c.serve()
    for name in ("site-1", "site-2"):
        c.join(name)
    c.until(lambda: in_training(c, "site-1"), "site-1 trains in the second round")
    return c


def test_a_client_killed_in_mid_training_and_started_again_is_counted_once(running):
    c = running
    c.processes["site-1"].kill()
    c.processes["site-1"].wait()

    c.join("site-1")

    finish_and_check(c)


def test_an_aggregator_killed_in_mid_round_goes_on_with_the_same_round(running):
    c = running
    before = {x["name"]: x["attempt_id"] for x in run_status(c.run)["clients"]}
    c.processes["aggregator"].kill()
    c.processes["aggregator"].wait()

    c.serve()
    c.until(lambda: run_status(c.run)["phase"] == "running", "the aggregator serves again")

    after = {x["name"]: x["attempt_id"] for x in run_status(c.run)["clients"]}
    assert after == before
    finish_and_check(c)


@pytest.mark.slow
def test_a_frozen_client_does_not_hold_the_run_and_takes_part_again_when_it_thaws(consortium):
    c = consortium(
        *LONG_ROUNDS,
        "run.max_rounds=6",
        "training.steps=60",
        "allocation.min_cohort=1",
        "allocation.deadline_s=12",
        "allocation.rejoin_grace_s=2",
    )
    c.serve()
    for name in ("site-1", "site-2"):
        c.join(name)
    c.until(lambda: in_training(c, "site-1"), "site-1 trains in the second round")
    c.processes["site-1"].send_signal(signal.SIGSTOP)
    frozen_at = len(c.metrics())
    c.until(lambda: len(c.metrics()) >= frozen_at + 2, "the run goes on without site-1", timeout_s=90)
    alone = c.metrics()[frozen_at:]
    c.processes["site-1"].send_signal(signal.SIGCONT)
    before = len(c.metrics())
    c.until(lambda: any(r["num_accepted"] == 2 for r in c.metrics()[before:]), "site-1 is counted again", timeout_s=90)

    assert all(r["num_accepted"] == 1 for r in alone)
    assert all(r["round_s"] < 12 + 2 + 1 for r in alone)
    assert c.wait("aggregator", 180) == 0, c.text("aggregator")
    assert all(v.equal for v in replay(c.run))
