"""Where an adaptive run puts its blocks: the choice by tables, and the rounds in which they are made."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from fedblocks.aggregator.placement import MARGIN, ProbeTable, choose_slot
from fedblocks.aggregator.status import describe, run_status
from fedblocks.protocol import run_config
from fedblocks.protocol.expansion import ExpansionError, plan_expansion
from fedblocks.protocol.messages import Assignment, Evaluate, Probe, ProbeRow
from fedblocks.protocol.run_config import ConfigError
from tests.aggregator.conftest import BASE_HASH, tiny_plan

POSITION = {0: 2, 1: 4, 2: 1}
FREE = {0: 0.0, 1: 0.0, 2: 0.0}


def row(block: int, strength: float, ce: float, kl: float = 0.01) -> ProbeRow:
    return ProbeRow(
        block=block, strength=strength, nll_sum=10 * ce, num_tokens=10, kl_sum=100 * kl, num_anchor_tokens=100
    )


def table(gains: dict[int, float], *, num_examples: int = 100) -> ProbeTable:
    """Each block improves by its gain at full strength, by half of it at half."""
    rows = [row(b, g, 3.0 - g * gain) for b, gain in gains.items() for g in (0.0, 0.5, 1.0)]
    return ProbeTable(num_examples=num_examples, rows=tuple(rows))


def choose(*tables: ProbeTable, cost: dict[int, float] | None = None, max_kl: float = 0.03) -> Any:
    return choose_slot(tables, (0, 1, 2), cost=cost or FREE, position=POSITION, max_kl=max_kl)


def test_another_slot_than_the_default_wins_only_with_a_tenth_more() -> None:
    assert choose(table({0: 0.1, 1: 0.1099, 2: 0.0})).block == 0
    assert choose(table({0: 0.1, 1: 0.1101, 2: 0.0})).block == 1
    assert choose(table({0: 0.2, 1: 0.1, 2: 0.0})).block == 0
    assert MARGIN == 1.10


def test_of_equal_slots_the_higher_wins() -> None:
    assert choose(table({0: 0.1, 1: 0.2, 2: 0.2})).block == 1
    assert choose(table({0: 0.1, 2: 0.2})).block == 2


def test_gains_are_weighed_by_examples() -> None:
    found = choose(table({0: 0.1, 1: 0.4}, num_examples=100), table({0: 0.3, 1: 0.0}, num_examples=300))
    gains = {score.block: score.gain for score in found.scores}
    assert gains[0] == pytest.approx(0.25)
    assert gains[1] == pytest.approx(0.1)
    assert found.block == 0


def test_a_slot_that_doubles_the_step_loses_three_tenths_and_never_more() -> None:
    found = choose(table({0: 0.1, 1: 0.1, 2: 0.1}), cost={0: 0.0, 1: 1.0, 2: 9.0})
    assert [score.score for score in found.scores] == pytest.approx([0.1, 0.07, 0.07])


def test_only_strengths_within_the_budget_count() -> None:
    rows = [row(0, 0.0, 3.0), row(0, 0.5, 2.9, kl=0.02), row(0, 1.0, 2.5, kl=0.04)]
    rows += [row(1, 0.0, 3.0), row(1, 0.5, 2.9, kl=0.5), row(1, 1.0, 2.0, kl=0.9)]
    found = choose(ProbeTable(num_examples=10, rows=tuple(rows)))
    assert [score.gain for score in found.scores] == pytest.approx([0.1, 0.0, 0.0])
    free = choose(ProbeTable(num_examples=10, rows=tuple(rows)), max_kl=math.inf)
    assert free.block == 1


def test_a_block_that_makes_it_worse_gains_nothing() -> None:
    found = choose(table({0: -0.3, 1: -0.1}))
    assert [score.gain for score in found.scores] == [0.0, 0.0, 0.0]
    assert found.block == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_ignored(bad: float) -> None:
    good = table({0: 0.1, 1: 0.2})
    spoilt = ProbeTable(num_examples=10_000, rows=(row(1, 0.0, 3.0), row(1, 1.0, bad), row(0, 0.0, bad)))
    found = choose(good, spoilt)
    assert found.block == 1
    assert {s.block: s.num_clients for s in found.scores} == {0: 1, 1: 1, 2: 0}
    # Nothing left: the default.
    assert choose(spoilt).block == 0
    assert choose(ProbeTable(num_examples=1, rows=(row(2, 0.0, 3.0), row(2, 1.0, 0.0, kl=bad)))).block == 0
    assert choose().block == 0


def test_the_choice_is_a_function_of_the_set_of_tables() -> None:
    tables = [table({0: 0.1, 1: 0.2}, num_examples=n) for n in (3, 5, 7)]
    assert len({repr(choose(*order)) for order in itertools.permutations(tables)}) == 1


def test_candidates_are_the_thirds_and_the_quarters_each_once() -> None:
    plan = tiny_plan(1, "adaptive")  # three layers
    assert [b.after_layer for b in plan.blocks] == [1, 2, 0]
    with pytest.raises(ExpansionError, match=r"'adaptive' has 3 slots .* 4 blocks"):
        tiny_plan(4, "adaptive")


def test_an_encoder_and_a_private_run_have_no_adaptive_placement() -> None:
    bert = {
        "model_type": "bert",
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
    }
    with pytest.raises(ExpansionError, match=r"'adaptive' .* encoder"):
        plan_expansion(base_hash=BASE_HASH, config=bert, placement="adaptive", num_blocks=1)
    private = ("privacy.noise_multiplier=1.0", "privacy.clip_norm=1.0", "expansion.placement=adaptive")
    with pytest.raises(ConfigError, match="without noise"):
        run_config.from_mapping({}, private)


ADAPTIVE = ("expansion.placement=adaptive", "expansion.blocks=1", "expansion.max_blocks=2", "run.max_rounds=16")


def adaptive_world(make_world: Callable[..., Any], *names: str, folder: str = "run", **gains: float) -> Any:
    """Every site has data enough to try; block ``b2`` gains what ``b2=`` says."""
    world = make_world(*names, folder=folder, overrides=ADAPTIVE)
    for site in world.sites.values():
        site.num_examples = 300
        site.gains = {int(name[1:]): gain for name, gain in gains.items()}
    return world


def active(world: Any) -> list[list[int]]:
    lines = (world.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["active_blocks"] for line in lines]


def test_an_adaptive_run_tries_first_and_then_trains_what_was_best(make_world: Callable[..., Any]) -> None:
    world = adaptive_world(make_world, "ann", "bob", b0=0.2, b1=0.1, b2=0.5)
    world.join()
    task = world.sites["ann"].tasks[-1]
    assert isinstance(task, Probe)
    assert (task.active_blocks, task.candidates, task.steps, task.warmup_steps) == ((), (0, 1, 2), 16, 4)
    assert task.seed == world.sites["bob"].tasks[-1].seed
    world.round()
    first = world.sites["ann"].tasks[-1]
    assert isinstance(first, Assignment)
    assert (first.round, first.active_blocks, first.blocks) == (2, (2,), (2,))
    world.finish()
    # The score never moves: in round 9 a block is asked for, in round 10 tried beside the first; the default is taken.
    probes = [t for t in world.sites["ann"].tasks if isinstance(t, Probe)]
    assert [(t.round, t.active_blocks, t.candidates) for t in probes] == [(1, (), (0, 1, 2)), (10, (2,), (0, 1))]
    assert active(world)[0] == [2]
    assert active(world)[-1] == [0, 2]
    assert any("placed block 2 after layer 0" in line for line in world.lines)
    status = run_status(world.path)
    assert status["probe"]["clients"] == ["ann", "bob"]
    assert {slot["block"] for slot in status["probe"]["choices"][0]["slots"]} == {0, 1}
    assert "placed by probe: block 0" in describe(status)
    assert isinstance(world.sites["ann"].tasks[-1], Evaluate)


def test_where_nobody_can_try_the_default_is_taken_at_once(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", overrides=ADAPTIVE)  # a hundred examples only
    world.join()
    task = world.sites["ann"].tasks[-1]
    assert isinstance(task, Assignment)
    assert (task.round, task.active_blocks) == (1, (0,))
    assert any("no client could try" in line for line in world.lines)
    before = task
    world.kill()
    world.start()
    world.join()
    assert world.sites["ann"].tasks[-1].attempt_id == before.attempt_id
    world.round()
    assert world.sites["ann"].tasks[-1].active_blocks == (0,)


def test_a_probe_that_nobody_answers_ends_in_the_default(make_world: Callable[..., Any]) -> None:
    world = adaptive_world(make_world, "ann", b2=0.5)
    world.join()
    world.sites["ann"].fail("oom")
    world.step()
    world.receive()
    task = world.sites["ann"].tasks[-1]
    assert isinstance(task, Assignment)
    assert task.active_blocks == (0,)


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_a_kill_during_a_probe_changes_nothing(make_world: Callable[..., Any], answered: int) -> None:
    def to_training(world: Any) -> Any:
        world.round(*list(world.sites)[answered:])
        return world.sites["ann"].tasks[-1]

    world = adaptive_world(make_world, "ann", "bob", b1=0.5)
    world.join()
    for name in list(world.sites)[:answered]:
        world.sites[name].work()
    world.step()
    world.kill()
    world.start()
    world.join()
    task = world.sites["ann"].tasks[-1] if answered == 2 else to_training(world)
    assert isinstance(task, Assignment)
    assert (task.round, task.active_blocks) == (2, (1,))


def test_rows_that_were_not_asked_for_do_not_count(make_world: Callable[..., Any]) -> None:
    world = adaptive_world(make_world, "ann", b1=0.5)
    site = world.sites["ann"]
    honest = site.tried
    site.tried = lambda block, g: honest(7, g) if block == 1 else honest(block, g)
    world.join()
    world.round()
    assert site.tasks[-1].active_blocks == (0,)
