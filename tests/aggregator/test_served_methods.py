"""Do the methods of other papers keep the aggregator's promises: kill and restart, replay, any order of arrival?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedblocks.aggregator.replay import replay, state_at
from fedblocks.aggregator.run_folder import open_run_folder
from fedblocks.protocol.run_config import ConfigError

METHODS = ("fedavg", "fedit", "hetlora", "flexlora", "flora", "topn", "llamapro", "fedhft")


def overrides_of(method: str, *more: str) -> tuple[str, ...]:
    rules = ("run.max_rounds=3", "server.keep_updates=true", "trainable.rank=4", "trainable.prior_rank=4")
    return (f"run.method={method}", *rules, *more)


def final_sha256(world: Any) -> str:
    return world.ledger.get_run("final")["state_sha256"]


def run(world: Any, *order: str, kill: bool = False) -> str:
    world.join()
    world.round(*order)
    if kill:
        world.kill()
        world.start()
        world.join()
    world.finish()
    return final_sha256(world)


@pytest.mark.parametrize("delta_format", ["fp32", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_kill_and_another_order_of_arrival_change_no_bit_and_a_replay_confirms_it(
    make_world: Callable[..., Any], method: str, delta_format: str
) -> None:
    overrides = overrides_of(method, f"delta.format={delta_format}")
    hashes: set[str] = set()
    for number, (order, kill) in enumerate(((("ann", "bob"), False), (("bob", "ann"), False), (("ann", "bob"), True))):
        world = make_world("ann", "bob", folder=f"run-{number}", overrides=overrides)
        hashes.add(run(world, *order, kill=kill))
        replayed = replay(world.path)
        assert len(replayed) == 3
        assert all(version.equal for version in replayed)
        assert state_at(world.folder, 3).sha256 == replayed[-1].state_sha256
        if method != "fedhft":  # whose result is the prior of what the clusters have learnt
            assert replayed[-1].state_sha256 == final_sha256(world)
        assert all(site.held_version == 3 for site in world.sites.values())
    assert len(hashes) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_client_that_was_away_catches_up(make_world: Callable[..., Any], method: str) -> None:
    world = make_world("ann", "bob", overrides=overrides_of(method), gather_s=0.0)
    world.join("ann")
    world.step(1.0)
    world.receive()
    world.round("ann")
    world.round("ann")
    world.join("bob")
    world.finish()
    assert world.sites["bob"].held_version == world.sites["ann"].held_version == 3


@pytest.mark.parametrize(
    ("made_for", "overrides", "says"),
    [
        ((), ("run.method=fedit",), "its plan trains 3 expanded blocks, placement thirds"),
        (
            overrides_of("fedit"),
            ("run.method=fedavg",),
            "its plan trains low-rank pairs of rank 4 over every projection",
        ),
        (overrides_of("fedit"), ("trainable.rank=2",), "make another run: fedblocks init --method fedit"),
        (overrides_of("flora"), ("run.method=fedit",), "rank 4 over every projection, merged in every round"),
    ],
)
def test_a_run_is_not_served_by_a_method_that_it_was_not_made_for(
    make_world: Callable[..., Any], made_for: tuple[str, ...], overrides: tuple[str, ...], says: str
) -> None:
    path = make_world(overrides=made_for).path
    open_run_folder(path, ("run.seed=9",))
    with pytest.raises(ConfigError, match=says):
        open_run_folder(path, overrides)
