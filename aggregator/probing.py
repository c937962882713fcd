"""Who tries where an ``adaptive`` run should put its next block, and what follows from it? (methods.md 4)

At the start, and whenever the rule of ``growth.py`` asks for a block, one round is spent on it: up to three capable
clients try every free slot (``placement.py`` says how they are compared), the others rest. Where nobody can, the slot
that ``thirds`` would take next is taken at once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedblocks.aggregator.allocation import AllocationSettings, cannot_train, step_seconds
from fedblocks.aggregator.placement import (
    PROBE_ANCHORS,
    PROBE_CLIENTS,
    PROBE_EXAMPLES,
    PROBE_MIN_EXAMPLES,
    PROBE_STEPS,
    PROBE_STRENGTHS,
    PROBE_WARMUP,
    ProbeTable,
    SlotChoice,
    choose_slot,
)
from fedblocks.aggregator.registry import KnownClient
from fedblocks.aggregator.run_rules import (
    NO_PAYLOAD_SHA256,
    MethodState,
    Run,
    Start,
    allocation_client,
    attempt_id,
    draw,
    named_state,
)
from fedblocks.protocol.codec import to_plain
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import ClientKey, Probe, ProbeRow

#: A probe may take so many times as long as its steps are predicted to take, and at least so many seconds.
DEADLINE_FACTOR = 4.0
MIN_DEADLINE_S = 60.0


def blocks_to_place(run: Run, state: MethodState) -> int:
    """How many blocks the next round is to find a place for; 0 in all but ``adaptive`` runs."""
    if run.config.expansion.placement != "adaptive":
        return 0
    return state.growth.probing if state.growth.active else run.config.expansion.blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedProbe:
    """A round to be opened; no task where no client is capable."""

    tasks: Mapping[ClientKey, Probe]
    deadline_s: float


def plan_probe(present: Sequence[KnownClient], run: Run, state: MethodState, start: Start) -> PlannedProbe:
    """Who tries what: the capable clients with the most memory, all of them every free slot."""
    active, candidates = _slots(run, state)
    settings = _settings(run)
    lowest = min(candidates, key=run.plan.position)
    layout = run.plan.reduced((*active, lowest)).layout
    capable = [
        client
        for client in present
        if client.statistics.num_examples >= PROBE_MIN_EXAMPLES
        and not cannot_train(
            allocation_client(client, start.version),
            lowest,
            layout=layout,
            shape=run.plan.shape,
            settings=settings,
            deadline_s=math.inf,
        )
    ]
    chosen = sorted(capable, key=lambda c: (-c.profile.memory_usable_bytes, c.key))[:PROBE_CLIENTS]
    step_s = max((_step_seconds(client, lowest, active, run) for client in chosen), default=0.0)
    deadline_s = max(MIN_DEADLINE_S, DEADLINE_FACTOR * len(candidates) * PROBE_STEPS * step_s)
    tasks = {client.key: _probe(client, run, start, active, candidates, deadline_s) for client in chosen}
    return PlannedProbe(tasks=tasks, deadline_s=deadline_s)


def _probe(
    client: KnownClient, run: Run, start: Start, active: tuple[int, ...], candidates: tuple[int, ...], deadline_s: float
) -> Probe:
    training = run.config.training
    return Probe(
        attempt_id=attempt_id(run.run_id, start.round, client.key, 0),
        round=start.round,
        state=named_state(start),
        payload_bytes=0,
        payload_sha256=NO_PAYLOAD_SHA256,
        active_blocks=active,
        candidates=candidates,
        strengths=PROBE_STRENGTHS,
        num_examples=PROBE_EXAMPLES,
        num_anchor_sequences=PROBE_ANCHORS,
        steps=PROBE_STEPS,
        batch_size=training.batch_size,
        anchor_batch_size=training.anchor_batch_size if run.anchored else 0,
        anchor_weight=1.0 if run.anchored else 0.0,
        learning_rate=training.learning_rate,
        warmup_steps=PROBE_WARMUP,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        # The same for all clients and candidates: they are compared on the same order of the same texts.
        seed=draw(run.config.run.seed, start.round, "probe"),
        deadline_s=deadline_s,
        memory_budget_bytes=client.profile.memory_usable_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The state with the new blocks, and why they are where they are."""

    state: MethodState
    choices: tuple[SlotChoice, ...]
    """One for each block, in the order in which they were placed."""
    record: Mapping[str, Any]
    """For status and metrics: JSON values."""
    text: str
    """For the operator."""


def place(
    run: Run,
    state: MethodState,
    tables: Sequence[tuple[ClientKey, tuple[ProbeRow, ...]]],
    clients: Mapping[ClientKey, KnownClient],
    *,
    round: int,
) -> Placed:
    """The state after a probe, a function of the set of its tables; without any, the default slots are taken.

    At the start several blocks are placed by one table: an untrained block beside a candidate changes nothing.
    """
    active, candidates = _slots(run, state)
    known = [clients[key] for key, _ in sorted(tables)]
    found = [ProbeTable(num_examples=clients[key].statistics.num_examples, rows=rows) for key, rows in sorted(tables)]
    cost = {block: _relative_cost(known, block, active, run) for block in candidates}
    position = {block: run.plan.position(block) for block in candidates}
    at_start = not state.growth.active
    choices: list[SlotChoice] = []
    for _ in range(min(blocks_to_place(run, state), len(candidates))):
        left = [block for block in candidates if block not in active]
        choice = choose_slot(found, left, cost=cost, position=position, max_kl=run.config.forgetting.max_kl)
        choices.append(choice)
        active = tuple(sorted((*active, choice.block)))
    placed = replace(state.growth, active=active, probing=0, refused="", last_round=0 if at_start else round)
    names = [client.name for client in known]
    return Placed(
        state=replace(state, growth=placed, rounds_since_best=0),
        choices=tuple(choices),
        record=_record(run.plan, choices, names, round),
        text=_text(run.plan, choices, names),
    )


def _slots(run: Run, state: MethodState) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Active blocks (none before the first was placed), and those that may be added, the default first."""
    active = state.growth.active
    return active, tuple(block for block in run.plan.block_ids if block not in active)


def _settings(run: Run) -> AllocationSettings:
    """Of a client that tries a whole block."""
    return replace(run.allocation_settings(), steps=PROBE_STEPS, widths=(1.0,))


def _step_seconds(client: KnownClient, block: int, active: tuple[int, ...], run: Run) -> float:
    layout = run.plan.reduced((*active, block)).layout
    return step_seconds(
        allocation_client(client, client.held_version),
        block,
        layout=layout,
        shape=run.plan.shape,
        settings=_settings(run),
    )


def _relative_cost(clients: Sequence[KnownClient], block: int, active: tuple[int, ...], run: Run) -> float:
    """A step with this block over one with a block on top, minus 1, on the client of median speed."""
    if not clients:
        return 0.0
    top = next(b.block_id for b in reversed(run.plan.blocks) if b.after_layer == run.plan.shape.num_layers - 1)
    of_top = {client.key: _step_seconds(client, top, active, run) for client in clients}
    middle = statistics.median_high(of_top.values())
    reference = min((c for c in clients if of_top[c.key] == middle), key=lambda c: c.key)
    return _step_seconds(reference, block, active, run) / middle - 1


def _record(plan: ExpansionPlan, choices: Sequence[SlotChoice], names: Sequence[str], round: int) -> dict[str, Any]:
    return {
        "round": round,
        "clients": list(names),
        "choices": [
            {
                "block": choice.block,
                "default": choice.default,
                "slots": [
                    {"after_layer": plan.block(score.block).after_layer, **_plain(score)} for score in choice.scores
                ],
            }
            for choice in choices
        ],
    }


def _plain(value: object) -> dict[str, Any]:
    plain = to_plain(value)
    assert isinstance(plain, dict)
    return plain  # pyright: ignore[reportUnknownVariableType]


def _text(plan: ExpansionPlan, choices: Sequence[SlotChoice], names: Sequence[str]) -> str:
    def slot(block: int) -> str:
        return f"block {block} after layer {plan.block(block).after_layer}"

    if not names:
        placed = ", ".join(slot(choice.block) for choice in choices)
        return f"no client could try where to put it: placed by default: {placed}"
    parts: list[str] = []
    for choice in choices:
        scores = {score.block: score.score for score in choice.scores}
        part = f"{slot(choice.block)} (score {scores[choice.block]:.4f}"
        if choice.block != choice.default:
            part += f"; the default, {slot(choice.default)}, {scores[choice.default]:.4f}"
        parts.append(part + ")")
    return f"placed {', '.join(parts)}; tried by {', '.join(names)}"
