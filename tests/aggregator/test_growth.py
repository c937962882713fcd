"""When a run grows: the rule, who can train the new block, restarts, budgets, and what is told of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedblocks.aggregator import budgets, growth, run_rules
from fedblocks.aggregator.budgets import Spent
from fedblocks.aggregator.growth import GrowthState, MeanScore
from fedblocks.aggregator.run_folder import open_run_folder
from fedblocks.aggregator.status import describe, run_status
from fedblocks.protocol import run_config
from fedblocks.protocol.messages import Assignment, Evaluate
from fedblocks.protocol.run_config import ConfigError, RunSection
from tests.aggregator.conftest import tiny_plan

GROWS = ("expansion.blocks=2", "expansion.max_blocks=3", "run.max_rounds=14")


def after(*means: float | tuple[float, float]) -> GrowthState:
    """Accuracies, or (accuracy, nll)."""
    state = GrowthState()
    for mean in means:
        accuracy, nll = mean if isinstance(mean, tuple) else (mean, None)
        state = growth.with_score(state, MeanScore(accuracy=accuracy, nll=nll))
    return state


def test_a_run_stands_still_if_its_best_of_five_is_less_than_half_a_percent_better() -> None:
    assert not growth.stands_still(after(*[0.5] * 5))  # nothing came before those five
    assert growth.stands_still(after(*[0.5] * 6))
    assert growth.stands_still(after(0.5, 0.4, 0.4, 0.4, 0.4, 0.5024))
    assert not growth.stands_still(after(0.5, 0.4, 0.4, 0.4, 0.4, 0.5026))
    assert growth.stands_still(after(0.5, 0.4, 0.4, 0.4, 0.4, 0.4))  # falling is not improving
    # The best before the five counts, however long ago.
    assert growth.stands_still(after(0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6))


def test_where_nothing_is_ever_right_the_likelihood_is_asked() -> None:
    falling = [(0.0, 5.0 - 0.1 * i) for i in range(6)]
    assert not growth.stands_still(after(*falling))
    assert growth.stands_still(after(*[(0.0, 5.0 - 0.0005 * i) for i in range(6)]))
    assert not growth.stands_still(after((0.0, 5.0), *[(0.1, 5.0)] * 5))


@pytest.mark.parametrize(
    ("round", "last", "kl", "max_kl", "wants"),
    [
        (7, 0, 0.01, 0.03, False),
        (8, 0, 0.01, 0.03, True),
        (15, 8, 0.01, 0.03, False),
        (16, 8, 0.01, 0.03, True),
        (8, 0, 0.033, 0.03, True),
        (8, 0, 0.034, 0.03, False),
        (8, 0, None, 0.03, False),
        (8, 0, None, math.inf, True),
    ],
)
def test_growth_waits_for_eight_rounds_and_for_the_budget(
    round: int, last: int, kl: float | None, max_kl: float, wants: bool
) -> None:
    still = GrowthState(last_round=last, best_accuracy=0.5, window=(MeanScore(accuracy=0.5, nll=None),) * growth.WINDOW)
    assert growth.wants_block(still, round=round, kl=kl, max_kl=max_kl) is wants


def test_the_next_block_is_that_of_the_placement_up_to_the_most() -> None:
    plan = tiny_plan(3)
    assert growth.first_blocks(plan, 2) == (0, 1)
    assert growth.next_block(plan, (0, 1), 3) == 2
    assert growth.next_block(plan, (0, 1), 2) is None
    assert growth.next_block(plan, (0, 1, 2), 9) is None


def test_growing_keeps_the_old_ids_and_equals_the_plan_that_had_all_at_once() -> None:
    plan = tiny_plan(3)
    small = plan.reduced((0, 1))
    assert small == tiny_plan(2)
    assert plan.reduced((*small.block_ids, 2)) == plan
    with pytest.raises(ValueError, match=r"blocks \[7\].*\[0, 1, 2\]"):
        plan.reduced((7,))


def active(world: Any) -> list[list[int]]:
    lines = (world.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["active_blocks"] for line in lines]


def test_a_run_that_stands_still_grows_and_is_told_to_everybody(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=GROWS)
    world.join()
    assert world.sites["ann"].welcome.active_blocks == (0, 1)
    assert world.sites["ann"].tasks[-1].active_blocks == (0, 1)
    world.finish()
    # Means from round 3 on; in round 8 five of them are no better than the first.
    assert active(world) == [[0, 1]] * 8 + [[0, 1, 2]] * 6
    assert any("round 8: grew to 3 blocks: block 2 after layer 0" in line for line in world.lines)
    trained = {t.round: t for t in world.sites["ann"].tasks if isinstance(t, Assignment)}
    assert all(set(t.blocks) <= set(t.active_blocks) for t in trained.values())
    assert 2 in trained[9].blocks
    assert isinstance(world.sites["ann"].tasks[-1], Evaluate)
    assert world.sites["ann"].tasks[-1].active_blocks == (0, 1, 2)
    final = json.loads((world.path / "state" / "final.json").read_text())
    assert final["active_blocks"] == [0, 1, 2]
    assert "grew after round 8: block 2; active blocks are [0, 1, 2]" in describe(run_status(world.path))


def test_patience_counts_from_the_growth(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", overrides=("expansion.blocks=2", "expansion.max_blocks=3"))
    world.join()
    world.finish()
    final = json.loads((world.path / "state" / "final.json").read_text())
    # Grown after round 8, ten rounds without improvement since then; without growth it would end with round 13.
    assert (final["stop_reason"], final["rounds"]) == ("no_improvement", 18)


def test_a_run_without_room_to_grow_is_as_before(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", overrides=("expansion.blocks=2",))
    world.join()
    world.finish()
    final = json.loads((world.path / "state" / "final.json").read_text())
    assert (final["stop_reason"], final["rounds"], final["active_blocks"]) == ("no_improvement", 13, [0, 1])


def test_a_block_that_nobody_can_train_is_refused_with_the_reason_and_the_run_ends(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", overrides=("expansion.blocks=1", "expansion.max_blocks=2", "expansion.placement=top"))
    world.join()
    task = world.sites["ann"].tasks[-1]
    # From now on the device has memory for what it trains, and not for a block below another one.
    for _ in range(4):
        world.round()
    world.aggregator._books.save(
        _with_memory(world.aggregator._books.clients[world.sites["ann"].key], task.predicted_peak_bytes // 100)
    )
    state = world.aggregator._method
    assert state.growth.active == (0,)
    still = replace(
        state.growth, best_accuracy=0.5, window=(MeanScore(accuracy=0.5, nll=None),) * growth.WINDOW, last_round=0
    )
    growing = run_rules.Growing(run=world.aggregator._run, clients=list(world.aggregator._books.clients.values()))
    refused = run_rules.grow(replace(state, growth=still), growing, 0.01, round=8)
    assert refused.growth.active == (0,)
    assert "nobody can train block 1" in refused.growth.refused
    assert "ann" in refused.growth.refused
    assert "memory" in refused.growth.refused
    stuck = replace(refused, rounds_since_best=run_rules.PATIENCE_ROUNDS)
    settings = run_config.from_mapping({}, ())
    assert run_rules.stop_reason(stuck, settings, round=12, may_grow=True) == "no_improvement"
    waiting = replace(stuck, growth=replace(stuck.growth, refused=""))
    assert run_rules.stop_reason(waiting, settings, round=12, may_grow=True) is None


def _with_memory(client: Any, memory_bytes: int) -> Any:
    return replace(client, profile=replace(client.profile, memory_usable_bytes=memory_bytes))


@pytest.mark.parametrize("killed_after", [7, 8, 9])
def test_a_restart_goes_on_with_the_same_blocks_and_the_same_bits(
    make_world: Callable[..., Any], killed_after: int
) -> None:
    calm = make_world("ann", "bob", folder="calm", overrides=GROWS)
    calm.join()
    calm.finish()
    world = make_world("ann", "bob", overrides=GROWS)
    world.join()
    for _ in range(killed_after):
        world.round()
    before = world.sites["ann"].tasks[-1]
    world.kill()
    world.start()
    world.join()
    again = world.sites["ann"].tasks[-1]
    assert (again.attempt_id, again.active_blocks, again.blocks) == (
        before.attempt_id,
        before.active_blocks,
        before.blocks,
    )
    world.finish()
    assert world.aggregator.published_sha256 == calm.aggregator.published_sha256
    assert active(world) == active(calm)


def test_what_clients_have_cached_is_forgotten_when_the_cut_moves(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", overrides=GROWS)
    world.join()
    for _ in range(7):
        world.round()
    known = world.aggregator._books.clients[world.sites["ann"].key]
    assert known.trained_sequences > 0
    world.round()
    known = world.aggregator._books.clients[world.sites["ann"].key]
    assert (known.trained_sequences, known.anchored_sequences) == (0, 0)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("run.max_seconds=10", "max_seconds"),
        ("run.max_bytes=2000", "max_bytes"),
    ],
)
def test_a_run_ends_when_it_has_spent_its_budget(make_world: Callable[..., Any], override: str, reason: str) -> None:
    world = make_world("ann", overrides=(override,))
    world.join()
    while not world.aggregator.finished:
        world.now_s += 4.0
        world.round() if not isinstance(world.sites["ann"].tasks[-1], Evaluate) else world.finish()
    final = json.loads((world.path / "state" / "final.json").read_text())
    assert final["stop_reason"] == reason
    limit = float(override.partition("=")[2])
    spent = final["spent"]["seconds" if reason == "max_seconds" else "num_bytes"]
    lines = [json.loads(line) for line in (world.path / "metrics.jsonl").read_text().splitlines()]
    before = [line["spent"]["seconds" if reason == "max_seconds" else "num_bytes"] for line in lines[:-1]]
    assert spent >= limit
    assert all(value < limit for value in before)


def test_energy_is_time_times_the_power_that_the_catalog_says() -> None:
    class Report:
        prefix_s, train_s, measure_s, encode_s = 1.0, 2.0, 3.0, 4.0

    assert budgets.energy_j([("rtx-4070", Report()), ("rtx-4070", Report())]) == 200 * 20  # type: ignore[list-item]
    assert budgets.energy_j([("somebody's own box", Report())]) == 0  # type: ignore[list-item]
    assert budgets.power_w("somebody's own box") is None


def test_a_limit_of_0_is_no_limit() -> None:
    spent = Spent(seconds=1e9, num_bytes=10**15, joules=1e12)
    assert budgets.exhausted(spent, RunSection()) is None
    assert budgets.exhausted(spent, RunSection(max_joules=5.0)) == "max_joules"
    assert budgets.exhausted(Spent(joules=4.9), RunSection(max_joules=5.0)) is None


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("expansion.blocks=3", "expansion.max_blocks=2"), r"max_blocks is 2, expected 0 .* at least .* \(3\)"),
        (
            ("expansion.blocks=2", "expansion.max_blocks=3", "expansion.placement=interleaved"),
            "all its blocks at once",
        ),
        (("expansion.max_blocks=-1",), "0 or more"),
        (("run.max_seconds=-1",), "0 or more"),
    ],
)
def test_impossible_growth_and_budgets_are_refused(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run_config.from_mapping({}, overrides)


def test_more_blocks_than_the_run_was_made_for_are_refused_at_serve(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", overrides=("expansion.blocks=2",))
    with pytest.raises(ConfigError, match=r"max_blocks is 3, .* at most 2 blocks"):
        open_run_folder(Path(world.path), ("expansion.max_blocks=3",))
