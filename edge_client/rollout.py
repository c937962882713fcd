"""What would a further block bring here? Each candidate is trained for a few steps and measured; nothing is kept.

The client's half of the placement by probe (``aggregator/placement.py``; methods.md 4): the same steps, data order and
seed for every candidate, from the identity, with the active blocks present and frozen. A strength of the candidate is a
factor on its own out-tensors; the active blocks keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedblocks.edge_client.anchor import Teacher
from fedblocks.edge_client.evaluate import evaluate_examples, measure_anchor
from fedblocks.edge_client.expanded_model import ExpandedModel, State
from fedblocks.edge_client.prefix_cache import PrefixStates
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.train import Status, TrainingError, train
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol.messages import Assignment, Probe, ProbeRow
from fedblocks.protocol.tensors import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bench:
    """The model with the active blocks and one candidate, and what training it needs."""

    model: ExpandedModel
    prefix: PrefixStates
    """At the model's base cut."""
    teacher: Teacher
    mode: ExecutionMode


def rollout(
    task: Probe,
    *,
    bench_with: Callable[[int], Bench | None],
    state: State,
    data: Sequence[TokenisedSample],
    held_out: Sequence[TokenisedSample],
    now: Callable[[], float],
    status: Status,
) -> tuple[ProbeRow, ...]:
    """The table of a client: one row for each candidate and strength. Rows that are not finite are left out.

    Args:
        bench_with: the model with this candidate; None where this device cannot train it.
        state: the published one, without the candidates.
        data: to train on.
        held_out: to measure on; the first ``task.num_examples`` of it in an order given by the seed.
        now: monotonic seconds.
        status: see ``train.Status``; the steps count through all candidates.
    """
    rows: list[ProbeRow] = []
    chosen = [held_out[i] for i in _some(len(held_out), task.num_examples, task.seed)]
    for number, block in enumerate(task.candidates):
        bench = bench_with(block)
        if bench is None:
            continue
        model, anchors = bench.model, bench.teacher.anchors
        model.load_state(state)

        def of_all(phase: str, steps: int, before: int = number * task.steps) -> None:
            status(phase, before + steps)

        try:
            delta = _trained(task, block, bench, data, now, of_all)
        except TrainingError:  # no finite gradient: this candidate has no rows
            delta = None
        held = anchors.kl_val_indices or anchors.train_indices
        sequences = [held[i] for i in _some(len(held), task.num_anchor_sequences, task.seed + 1)]
        bench.prefix.fill(sample.ids for sample in chosen)
        for strength in task.strengths if delta is not None else ():
            assert delta is not None
            model.load_state({**state, block: _at_strength(model, delta, strength)})
            scores = evaluate_examples(model, chosen, bench.prefix)
            kl = measure_anchor(model, bench.teacher, sequences, bench.prefix)
            if math.isfinite(scores.nll_sum) and math.isfinite(kl.kl_sum):
                rows.append(
                    ProbeRow(
                        block=block,
                        strength=strength,
                        nll_sum=scores.nll_sum,
                        num_tokens=scores.num_tokens,
                        kl_sum=kl.kl_sum,
                        num_anchor_tokens=kl.num_tokens,
                    )
                )
        model.load_state(state)
        model.release()
    return tuple(rows)


def _trained(
    task: Probe,
    block: int,
    bench: Bench,
    data: Sequence[TokenisedSample],
    now: Callable[[], float],
    status: Status,
) -> dict[str, FloatArray]:
    """What the candidate has learnt."""
    bench.model.hold(residency=bench.mode.residency, frozen=bench.mode.frozen)
    result = train(
        model=bench.model,
        task=_assignment(task, block, bench.mode),
        mode=bench.mode,
        data=data,
        teacher=bench.teacher,
        prefix=bench.prefix,
        now=now,
        status=status,
    )
    learnt = result.deltas[block]
    return {name: np.array(learnt[name]) for name in learnt}


def _assignment(task: Probe, block: int, mode: ExecutionMode) -> Assignment:
    """The steps of one candidate as a task."""
    return Assignment(
        attempt_id=task.attempt_id,
        round=task.round,
        state=task.state,
        payload_bytes=0,
        payload_sha256=task.payload_sha256,
        blocks=(block,),
        steps=task.steps,
        batch_size=task.batch_size,
        anchor_batch_size=task.anchor_batch_size,
        anchor_every=1,
        anchor_weight=task.anchor_weight,
        learning_rate=task.learning_rate,
        warmup_steps=task.warmup_steps,
        weight_decay=task.weight_decay,
        clip_norm=task.clip_norm,
        adam_beta1=task.adam_beta1,
        adam_beta2=task.adam_beta2,
        adam_eps=task.adam_eps,
        optimizer_mode=mode.optimizer,
        micro_batch_size=mode.micro_batch_size,
        checkpoint_activations=mode.checkpoint,
        delta_format="fp32",
        delta_density=1.0,
        seed=task.seed,
        deadline_s=task.deadline_s,
        memory_budget_bytes=task.memory_budget_bytes,
        predicted_peak_bytes=0,
        predicted_seconds=0.0,
        measure=(),
    )


def _at_strength(model: ExpandedModel, delta: Mapping[str, FloatArray], strength: float) -> dict[str, FloatArray]:
    """The block's deltas with its out-tensors, which start at zero, multiplied."""
    outs = {spec.name for spec in model.shape.block_tensors() if spec.is_out}
    return {name: np.float32(strength) * values if name in outs else values for name, values in delta.items()}


def _some(count: int, wanted: int, seed: int) -> list[int]:
    """``wanted`` of ``count`` indices, ascending; the same for the same seed."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(count)
    return sorted(int(i) for i in order[:wanted])
