"""Rounds in which clients train different widths: the books, the bits and the refusals (methods.md 3, 7, 8)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedblocks.aggregator import run_rules
from fedblocks.aggregator.replay import replay, state_at
from fedblocks.profiles.model_shape import WIDTHS
from fedblocks.protocol.tensors import cut

THREE_ROUNDS = ("run.max_rounds=3", "server.keep_updates=true")
NAMES = ("ann", "bob", "cid", "dan")
MIXED = {"ann": (1.0, 0.125, 0.5), "bob": (0.5, 1.0, 0.25), "cid": (0.125,) * 3, "dan": (0.25, 0.25, 1.0)}
"""Widths of each site in rounds 1, 2 and 3."""


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, tuple[float, ...]]], None]:
    """Whatever the planner chooses, a site gets the width that the test wants."""
    planned = run_rules.assignment

    def set_widths(widths: dict[str, tuple[float, ...]]) -> None:
        def assignment(client: Any, choice: Any, run: Any, state: Any, start: Any, **kwargs: Any) -> Any:
            of = widths[client.name]
            task = planned(client, choice, run, state, start, **kwargs)
            return replace(task, width=of[(start.round - 1) % len(of)])

        monkeypatch.setattr(run_rules, "assignment", assignment)

    return set_widths


def final(world: Any) -> dict[str, Any]:
    return json.loads((world.path / "state" / "final.json").read_text())


def metrics(world: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world.path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def mixed_sha256(make_world: Callable[..., Any], by_hand: Any) -> str:
    """Final state of the four sites with ``MIXED`` when nothing goes wrong."""
    by_hand(MIXED)
    world = make_world(*NAMES, folder="undisturbed", overrides=THREE_ROUNDS)
    world.join()
    world.finish()
    return final(world)["state_sha256"]


def test_a_run_of_mixed_widths_ends_in_a_state_that_a_replay_and_the_steps_confirm(
    make_world: Callable[..., Any], by_hand: Any
) -> None:
    by_hand(MIXED)
    world = make_world(*NAMES, overrides=THREE_ROUNDS)
    world.join()
    world.finish()
    for name, widths in MIXED.items():
        assert tuple(task.width for task in world.sites[name].tasks[:3]) == widths
    assert [m["num_accepted"] for m in metrics(world)] == [4, 4, 4]
    replayed = replay(world.path)
    assert all(r.equal for r in replayed)
    assert replayed[-1].state_sha256 == final(world)["state_sha256"] == state_at(world.folder, 3).sha256
    assert all(site.held_version == 3 for site in world.sites.values())


def test_the_order_of_arrival_of_mixed_widths_does_not_change_a_bit(
    make_world: Callable[..., Any], by_hand: Any, mixed_sha256: str
) -> None:
    by_hand(MIXED)
    for number, order in enumerate((NAMES[::-1], ("cid", "ann", "dan", "bob"))):
        world = make_world(*NAMES, folder=f"run-{number}", overrides=THREE_ROUNDS)
        world.join(*order)
        for _ in range(3):
            world.round(*order)
        world.finish()
        assert final(world)["state_sha256"] == mixed_sha256


@pytest.mark.parametrize("arrived", range(5))
def test_killed_between_any_two_arrivals_of_mixed_widths_the_run_ends_in_the_same_bits(
    make_world: Callable[..., Any], by_hand: Any, mixed_sha256: str, arrived: int
) -> None:
    by_hand(MIXED)
    world = make_world(*NAMES, overrides=THREE_ROUNDS)
    world.join()
    world.round()
    for name in NAMES[:arrived]:
        world.sites[name].work()
        world.step()
    world.kill()
    world.start()
    world.join()
    world.finish()
    assert world.ledger.num_updates() == 12
    assert final(world)["state_sha256"] == mixed_sha256
    assert all(r.equal for r in replay(world.path))


def test_a_late_slim_update_counts_in_the_next_round(make_world: Callable[..., Any], by_hand: Any) -> None:
    by_hand({"ann": (1.0,), "bob": (0.5,), "cid": (0.25,), "dan": (0.125, 1.0)})
    world = make_world(*NAMES, overrides=("run.max_rounds=9", "server.keep_updates=true"))
    world.join()
    world.round("ann", "bob", "cid")
    for name in ("ann", "bob", "cid"):
        world.sites[name].heartbeat()
    dan = world.sites["dan"]
    late = dan.tasks[-1]
    dan.heartbeat(late.attempt_id, "training")
    world.step(60.0)
    world.receive()
    dan.work()
    world.round("ann", "bob", "cid")
    assert dan.acked == [late.attempt_id]
    assert metrics(world)[1]["num_stale"] == 1
    assert all(r.equal for r in replay(world.path))


def test_an_update_of_another_width_is_refused_and_the_round_folds_as_if_it_were_absent(
    make_world: Callable[..., Any], by_hand: Any
) -> None:
    by_hand({"ann": (1.0,), "bob": (0.5,), "eve": (0.25,)})
    absent = make_world("ann", "bob", "eve", folder="absent", overrides=THREE_ROUNDS)
    absent.join()
    absent.sites["eve"].fail("internal")
    absent.round("ann", "bob")
    world = make_world("ann", "bob", "eve", overrides=THREE_ROUNDS)
    world.join()
    eve = world.sites["eve"]
    delta, payload = eve.train(replace(eve.tasks[-1], width=0.5))
    world.endpoint.announce(eve.key, delta, payload)
    world.round("ann", "bob")
    assert [(r.code, r.text) for r in eve.refused] == [("not_assigned", "width is 0.5, expected 0.25 as assigned")]
    assert metrics(world)[0]["state_sha256"] == metrics(absent)[0]["state_sha256"]


@pytest.mark.parametrize("width", WIDTHS)
def test_where_nobody_trains_more_than_a_width_nothing_beyond_it_ever_changes(
    make_world: Callable[..., Any], by_hand: Any, width: float
) -> None:
    by_hand({"ann": (width,), "bob": (0.125,)})
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    world.join()
    world.finish()
    state = state_at(world.folder, 3).published
    for tensors, spec in itertools.product(state.values(), world.plan.shape.block_tensors(width)):
        values = np.array(tensors[spec.name])
        assert cut(values, spec.shape).any()
        cut(values, spec.shape)[...] = 0
        assert not values.any()


def test_what_the_steps_still_owe_waits_while_nobody_trains_it(make_world: Callable[..., Any], by_hand: Any) -> None:
    """Round 1 trains all and publishes a quarter of the rows, round 2 trains an eighth, the last version is whole."""
    by_hand({"ann": (1.0, 0.125, 0.125), "bob": (1.0, 0.125, 0.125)})
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    world.join()
    world.finish()
    first, second, last = (state_at(world.folder, version).published for version in (1, 2, 3))
    differs = {"beyond": 0, "within": 0, "at the end": 0}
    for block, spec in itertools.product(first, world.plan.shape.block_tensors(0.125)):
        beyond = np.ones(first[block][spec.name].shape, dtype=bool)
        cut(beyond, spec.shape)[...] = False
        one, two, three = (state[block][spec.name] for state in (first, second, last))
        differs["beyond"] += np.count_nonzero(one[beyond] != two[beyond])
        differs["within"] += np.count_nonzero(one[~beyond] != two[~beyond])
        differs["at the end"] += np.count_nonzero(two[beyond] != three[beyond])
    assert differs["beyond"] == 0
    assert differs["within"] > 0
    assert differs["at the end"] > 0
    assert all(r.equal for r in replay(world.path))
