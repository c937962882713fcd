"""How does a client carry out a training assignment? One step loop over whatever tensors were made to train.

Loss and optimizer are those of methods.md 5.1 and 5.4:

    L = CE + lambda·KL_K + mu/2·|theta - theta_start|²

                            CE = sum of -log p over the target tokens of the window / their number,
                            KL_K = mean over the anchor tokens of the window

A *window* is what one optimizer step sees; it is cut into micro-batches, each of which weighs by its tokens, so the cut
changes neither loss nor gradient. Order of data and anchors follows from the seed alone.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedblocks.edge_client.expanded_model import Chosen, ExpandedModel, ParamGroup
from fedblocks.edge_client.objective import Losses, Objective, objective_of
from fedblocks.edge_client.optimizer import AdamW
from fedblocks.edge_client.row_scores import Energies
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.kernels.ops import linear_cross_entropy, linear_kl_topk
from fedblocks.profiles.cost import SCORING_BATCHES, ExecutionMode
from fedblocks.profiles.units import block_units
from fedblocks.protocol.messages import Assignment

if TYPE_CHECKING:
    from fedblocks.edge_client.anchor import Teacher, TeacherRecord
    from fedblocks.edge_client.prefix_cache import PrefixStates
    from fedblocks.profiles.cost import OptimizerMode

MAX_SKIPS = 3
"""Steps in a row with a non-finite gradient after which training stops."""

ROUND_CACHE_MIN_USES = 1.5
"""Uses of each text in a round from which hidden states at the assignment's own cut are worth keeping."""

Status = Callable[[str, int], None]
"""Called with the phase and the steps done, between steps; may raise to stop the training."""


class TrainingError(RuntimeError):
    """The assignment cannot be carried out; nothing is uploaded."""


class NonFiniteError(TrainingError):
    """The gradient was NaN or infinite three steps in a row."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskBatch:
    """Padded samples and the rows that predict a target."""

    inputs: Tensor
    """Hidden states (B, T, H) at the cut, or token ids (B, T) where the stack is run from the bottom."""
    rows: Tensor  # (N,) int64: b·T + position, the position before the target
    targets: Tensor  # (N,) int64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnchorBatch:
    """Padded anchor sequences, the rows that count, and what the base says there."""

    inputs: Tensor  # as in TaskBatch
    rows: Tensor  # (N,) int64
    ids: Tensor  # (N, K) int64
    logp: Tensor  # (N, K) fp32
    log_tail: Tensor  # (N,) fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyper:
    """Numbers of the step rule; the defaults are those of methods.md 14."""

    steps: int
    learning_rate: float
    warmup_steps: int = 1
    weight_decay: float = 0.01
    """On the ``decayed`` tensors of each group only."""
    clip_norm: float = 1.0
    proximal_weight: float = 0.0
    """mu of FedProx."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    anchor_weight: float = 0.0
    anchor_every: int = 1

    @classmethod
    def of(cls, task: Assignment) -> Hyper:
        """The step rule of an assignment."""
        return cls(
            steps=task.steps,
            learning_rate=task.learning_rate,
            warmup_steps=task.warmup_steps,
            weight_decay=task.weight_decay,
            clip_norm=task.clip_norm,
            proximal_weight=task.proximal_weight,
            betas=(task.adam_beta1, task.adam_beta2),
            eps=task.adam_eps,
            anchor_weight=task.anchor_weight,
            anchor_every=task.anchor_every,
        )


@dataclass(slots=True, kw_only=True)
class StepsResult:
    """What the step loop saw."""

    task_loss: list[float] = field(default_factory=list)
    """Mean cross-entropy of each step, nats per target token."""
    anchor_kl: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean KL_K) of each step that saw anchors."""
    step_s: list[float] = field(default_factory=list)
    num_target_tokens: int = 0
    skipped: int = 0
    """Steps whose gradient was not finite: counted as steps, nothing applied."""
    gradient_energy: list[float] = field(default_factory=list)
    """Per group with ``decayed`` tensors: mean over the second half of the steps (methods.md 5.5); NaN-free, else 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainResult:
    """A finished assignment: the deltas and the figures of methods.md 5.5."""

    deltas: Mapping[int, Mapping[str, npt.NDArray[np.float32]]]
    """Block id -> tensor name -> trained value minus start value, computed when it is asked for."""
    ends: Callable[[int, str], tuple[Tensor, Tensor]]
    """(block id, tensor name) -> the two, on the device."""
    chosen: Chosen | None
    """The rows that trained, where the client chose them."""
    steps: int
    num_target_tokens: int
    loss_first: float
    loss_last: float
    anchor_kl: float
    prefix_s: float
    train_s: float
    step_s: float
    gradient_energy: tuple[float, ...]
    """In the order of the assignment's blocks."""


def stack_losses(model: ExpandedModel, from_position: int) -> Losses:
    """The loss parts of a model whose inputs enter at ``from_position``; only labelled rows reach the head."""

    def final_rows(inputs: Tensor, rows: Tensor) -> Tensor:
        return model.final_rows(model.forward(inputs, from_position, rows=rows))

    def task(batch: TaskBatch, scale: float) -> Tensor:
        return linear_cross_entropy(final_rows(batch.inputs, batch.rows), model.head, batch.targets, scale)

    def anchor(batch: AnchorBatch, scale: float) -> Tensor:
        rows = final_rows(batch.inputs, batch.rows)
        return linear_kl_topk(rows, model.head, batch.ids, batch.logp, batch.log_tail, scale)

    return Losses(task=task, anchor=anchor)


def run_steps(
    *,
    groups: Sequence[ParamGroup],
    losses: Losses,
    task: Iterable[Sequence[TaskBatch]],
    anchor: Iterable[Sequence[AnchorBatch]],
    hyper: Hyper,
    now: Callable[[], float],
    status: Status,
    optimizer_mode: OptimizerMode = "fp32",
) -> StepsResult:
    """Takes ``hyper.steps`` AdamW steps; the optimizer's state begins and ends here.

    Args:
        groups: leaf tensors that train.
        losses: the loss parts over those tensors.
        task: windows of micro-batches; a window without target tokens is skipped and is not a step.
        anchor: windows of anchor micro-batches; read only on steps that use them.
        hyper: the step rule.
        optimizer_mode: how the optimizer's state is stored.
        now: seconds, for the durations.
        status: called after every step with ``"training"`` and the number of steps done.

    Raises:
        NonFiniteError: :data:`MAX_SKIPS` steps in a row without a finite gradient.
        TrainingError: the windows ran out, or none of many has a target token.
    """
    optimizer = AdamW(groups, mode=optimizer_mode, betas=hyper.betas, eps=hyper.eps, weight_decay=hyper.weight_decay)
    energy = [0.0 for group in groups if group.decayed]
    second_half = hyper.steps - hyper.steps // 2
    windows, anchors = _with_targets(task), iter(anchor)
    result = StepsResult()
    skips = 0
    optimizer.begin(proximal_weight=hyper.proximal_weight)
    try:
        for step in range(hyper.steps):
            began = now()
            window = next(windows, None)
            if window is None:
                raise TrainingError(f"the data ended after {step} of {hyper.steps} steps")
            tokens = sum(len(batch.targets) for batch in window)
            result.task_loss.append(sum(_backward(losses.task(batch, 1 / tokens)) for batch in window))
            result.num_target_tokens += tokens
            if hyper.anchor_weight > 0 and step % hyper.anchor_every == 0:
                anchor_window = next(anchors)
                weight = hyper.anchor_weight * hyper.anchor_every
                scale = weight / sum(len(batch.rows) for batch in anchor_window)
                kl = sum(_backward(losses.anchor(batch, scale)) for batch in anchor_window)
                result.anchor_kl.append((step, kl / weight))
            optimizer.pull_to_start()
            in_second_half = step >= hyper.steps - second_half
            energies = optimizer.energies(groups) if in_second_half else []
            if math.isfinite(optimizer.clip_norm(hyper.clip_norm)):
                skips = 0
                optimizer.step(hyper.learning_rate * min(1.0, (step + 1) / hyper.warmup_steps))
                if in_second_half:
                    energy = [total + new for total, new in zip(energy, energies, strict=True)]
            else:
                skips += 1
                result.skipped += 1
                if skips == MAX_SKIPS:
                    raise NonFiniteError(
                        f"the gradient was not finite in {MAX_SKIPS} steps in a row (steps {step - MAX_SKIPS + 2} to "
                        f"{step + 1} of {hyper.steps}); a lower learning rate than {hyper.learning_rate:g} may help"
                    )
            optimizer.zero_grad()
            result.step_s.append(now() - began)
            status("training", step + 1)
    finally:
        optimizer.close()
    result.gradient_energy = [total / second_half for total in energy]
    return result


def _backward(loss: Tensor) -> float:
    loss.backward()
    return loss.item()


def _with_targets(windows: Iterable[Sequence[TaskBatch]]) -> Iterator[Sequence[TaskBatch]]:
    empty = 0
    for window in windows:
        if any(len(batch.targets) for batch in window):
            empty = 0
            yield window
        else:
            empty += 1
            if empty == 1000:
                raise TrainingError("1000 windows in a row have no target token; check the data's labels")


def data_order(num_samples: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices without end: a new permutation for each pass, from Philox(seed) alone.

    A batch may span two passes; it is never larger than the data.
    """
    if num_samples < 1:
        raise TrainingError("there is no sample to train on")
    generator = np.random.Generator(np.random.Philox(seed))
    endless = itertools.chain.from_iterable(generator.permutation(num_samples).tolist() for _ in itertools.count())
    while True:
        yield list(itertools.islice(endless, min(batch_size, num_samples)))


def cut_into(items: Sequence[int], size: int) -> list[Sequence[int]]:
    """Consecutive micro-batches of at most ``size``."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def task_batch(samples: Sequence[TokenisedSample], inputs: Tensor) -> TaskBatch:
    """Rows and targets of samples whose padded inputs (B, T, ...) are given."""
    length = inputs.shape[1]
    rows: list[npt.NDArray[np.int64]] = []
    targets: list[npt.NDArray[np.int32]] = []
    for i, sample in enumerate(samples):
        positions = np.flatnonzero(sample.label_mask)
        rows.append(positions - 1 + i * length)
        targets.append(sample.ids[positions])
    return TaskBatch(
        inputs=inputs,
        rows=torch.from_numpy(np.concatenate(rows)).to(inputs.device),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(inputs.device),
    )


def anchor_batch(records: Sequence[TeacherRecord], inputs: Tensor) -> AnchorBatch:
    """Rows and teacher of anchor sequences whose padded inputs are given: every position that predicts a token."""
    length = inputs.shape[1]
    rows = [torch.arange(len(record.log_tail)) + i * length for i, record in enumerate(records)]
    return AnchorBatch(
        inputs=inputs,
        rows=torch.cat(rows).to(inputs.device),
        ids=torch.cat([record.ids for record in records]).to(inputs.device),
        logp=torch.cat([record.logp for record in records]).to(inputs.device),
        log_tail=torch.cat([record.log_tail for record in records]).to(inputs.device),
    )


OBJECTIVE = Objective(
    losses=stack_losses,
    task_batch=task_batch,
    anchor_batch=lambda records, inputs, _lengths: anchor_batch(records, inputs),
)
"""Of decoders."""


def _states_at_own_cut(
    model: ExpandedModel, task: Assignment, prefix: PrefixStates, max_bytes: int, warn: Callable[[str], None]
) -> PrefixStates:
    """Hidden states at the lowest block that this assignment trains, in memory for this round; or ``prefix`` itself."""
    from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore

    assert model.plan is not None
    positions = model.plan.layout.positions
    low = min(positions[block] for block in task.blocks if block in positions)
    if model.takes_tokens or low == prefix.cut or max_bytes <= 0:
        return prefix
    store = RecordStore(Path(), location="ram", max_bytes=max_bytes, warn=warn)
    return PrefixStates(model, store, cut=low, source=prefix)


def train(
    *,
    model: ExpandedModel,
    task: Assignment,
    data: Sequence[TokenisedSample],
    teacher: Teacher | None,
    prefix: PrefixStates,
    mode: ExecutionMode | None = None,
    round_cache_bytes: int = 0,
    choose_rows: Callable[[Sequence[Energies]], Chosen] | None = None,
    now: Callable[[], float],
    status: Status,
) -> TrainResult:
    """Carries out an assignment on a model that holds the published state at strength 1.

    Afterwards the model holds the locally trained blocks; ``model.load_state`` brings the published ones back.

    Args:
        teacher: the base's records of the anchor set; may be None where ``task.anchor_weight`` is 0.
        prefix: hidden states at the base cut, cached or computed.
        mode: how to carry it out; default as the assignment says.
        round_cache_bytes: memory for hidden states at the assignment's own cut: where the lowest block that is trained
            lies above the lowest of the plan, the blocks between them run once for each sample instead of each step.
        choose_rows: says which rows of the pairs train, from the energies of the first batches; default: the
            assignment's width is of another kind.
        now: monotonic seconds.
        status: see :data:`Status`; phases are ``"prefix"`` and ``"training"``.

    Raises:
        NonFiniteError: see :func:`run_steps`.
        TrainingError: no data, or an anchor weight without anchors.
    """

    mode = mode or ExecutionMode(
        optimizer=task.optimizer_mode,
        micro_batch_size=task.micro_batch_size,
        checkpoint=task.checkpoint_activations,
    )
    hyper = Hyper.of(task)
    uses_anchor = hyper.anchor_weight > 0 and task.anchor_batch_size > 0
    if uses_anchor and teacher is None:
        raise TrainingError(f"the assignment has anchor weight {hyper.anchor_weight:g}, but there is no anchor set")
    if not uses_anchor:
        hyper = replace(hyper, anchor_weight=0.0)

    status("prefix", 0)
    began = now()
    order = data_order(len(data), task.batch_size, task.seed)
    windows = list(itertools.islice(order, task.steps))
    prefix.fill([data[i].ids for i in sorted(set(itertools.chain.from_iterable(windows)))])
    anchor_windows: list[list[int]] = []
    if uses_anchor:
        assert teacher is not None
        train_part = teacher.anchors.train_indices
        anchor_order = data_order(len(train_part), task.anchor_batch_size, task.seed + 1)
        num_windows = -(-task.steps // task.anchor_every)
        anchor_windows = [[train_part[i] for i in window] for window in itertools.islice(anchor_order, num_windows)]
        teacher.fill(sorted(set(itertools.chain.from_iterable(anchor_windows))))
    states = _states_at_own_cut(model, task, prefix, round_cache_bytes, warn=lambda _line: None)
    if states is not prefix:
        uses = sum(map(len, (*windows, *anchor_windows)))
        texts = [data[i].ids for i in sorted(set(itertools.chain.from_iterable(windows)))]
        if teacher is not None:
            texts += [teacher.anchors.sequences[i] for i in sorted(set(itertools.chain.from_iterable(anchor_windows)))]
        states = states if uses >= ROUND_CACHE_MIN_USES * len(texts) else prefix
        if states is not prefix:
            states.fill(texts)
    prefix_s = now() - began

    objective = objective_of(model)

    def task_windows() -> Iterator[list[TaskBatch]]:
        for window in itertools.chain(windows, order):
            yield [
                objective.task_batch([data[i] for i in part], states.padded([data[i].ids for i in part]))
                for part in cut_into(window, mode.micro_batch_size)
            ]

    def anchor_batches() -> Iterator[list[AnchorBatch]]:
        assert teacher is not None
        for window in anchor_windows:
            for_window: list[AnchorBatch] = []
            for part in cut_into(window, mode.micro_batch_size):
                texts = [teacher.anchors.sequences[i] for i in part]
                inputs = states.padded(texts)
                for_window.append(objective.anchor_batch(teacher.records(part), inputs, [len(ids) for ids in texts]))
            yield for_window

    began = now()
    model.recompute = mode.checkpoint
    losses = objective.losses(model, states.cut)
    chosen = None
    if choose_rows is not None:
        first = itertools.islice(_with_targets(task_windows()), min(SCORING_BATCHES, len(windows)))
        try:
            chosen = choose_rows(list(row_energies(model, block_units(task.blocks), losses, first)))
        except ValueError as error:
            raise NonFiniteError(str(error)) from error
    groups = model.train_units(task.blocks, mode.optimizer, task.width, chosen)
    result = run_steps(
        groups=groups,
        losses=losses,
        optimizer_mode=mode.optimizer,
        task=task_windows(),
        anchor=anchor_batches(),
        hyper=hyper,
        now=now,
        status=status,
    )
    quarter = max(1, task.steps // 4)
    last_kl = [kl for step, kl in result.anchor_kl if step >= task.steps - quarter] or [
        kl for _, kl in result.anchor_kl[-1:]
    ]
    return TrainResult(
        deltas=model.deltas(groups),
        ends=model.ends(groups),
        chosen=chosen,
        steps=task.steps,
        num_target_tokens=result.num_target_tokens,
        loss_first=statistics.fmean(result.task_loss[:quarter]),
        loss_last=statistics.fmean(result.task_loss[-quarter:]),
        anchor_kl=statistics.fmean(last_kl) if last_kl else 0.0,
        prefix_s=prefix_s,
        train_s=now() - began,
        step_s=statistics.median(result.step_s),
        gradient_energy=_energy_of_each(groups, result.gradient_energy),
    )


def row_energies(
    model: ExpandedModel, units: Sequence[int], losses: Losses, windows: Iterable[Sequence[TaskBatch]]
) -> Iterator[Energies]:
    """|dL/dB[i,:]|² of every row of the units' pairs, for each window (methods.md 10.2, step 2).

    Afterwards the model holds the pairs as :meth:`ExpandedModel.score_units` leaves them.
    """
    groups = model.score_units(units)
    for window in windows:
        tokens = sum(len(batch.targets) for batch in window)
        for batch in window:
            _backward(losses.task(batch, 1 / tokens))
        found: dict[int, dict[str, npt.NDArray[np.float32]]] = {}
        for unit, group in zip(units, groups, strict=True):
            found[unit] = {}
            for name, leaf in group.named.items():
                assert leaf.grad is not None
                found[unit][name] = leaf.grad.square().sum(dim=1).cpu().numpy()
                leaf.grad = None
        yield found


def _energy_of_each(groups: Sequence[ParamGroup], found: Iterable[float]) -> tuple[float, ...]:
    """One number for each group; 0 where it has no out-tensors to measure it on: base layers, an extra tensor set."""
    energies = iter(found)
    return tuple(next(energies) if group.decayed else 0.0 for group in groups)
