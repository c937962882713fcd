"""What does one federation cost and keep, for expanded blocks and for the two baselines? One loop, in process.

The step loop (``edge_client.train.run_steps``), the loss, the anchor, the data reader and the measurements are the
client's; for expanded blocks the delta encoding, the fold and the published state are the deployed ones as well
(``protocol/tensors.py``, ``aggregator/aggregation.py``, ``protocol/state.py``). There are no sockets, and no device is
slower than another: every client of a round's cohort trains everything.

========  ==========================================================================================================
full      every base tensor, embedding and norms included; fp32 both ways; theta += sum of w_k (theta_k - theta)
top       the highest base layers only, else as ``full``
lora      pairs on all seven projections, alpha = 2r; A and B averaged separately (methods.md 11, ``fedit``)
blocks    expanded blocks over the NF4 backbone; int8 row-masked deltas with error feedback, fold, int8 published steps
========  ==========================================================================================================

w_k = n_k / sum n. Source: methods.md 5, 7, 8.2, 11, 12.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedblocks.aggregator.aggregation import AcceptedUpdate, NormHistory, fold
from fedblocks.aggregator.cohort import choose_cohort
from fedblocks.aggregator.run_rules import WARMUP_KNOWN, WARMUP_NEW, draw, learning_rate, next_anchor_weight
from fedblocks.edge_client.anchor import AnchorSet, Teacher
from fedblocks.edge_client.backbone import Backbone, DenseBackbone
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash, initial_block
from fedblocks.edge_client.evaluate import measure_anchor
from fedblocks.edge_client.expanded_model import ExpandedModel, ParamGroup
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.train import (
    AnchorBatch,
    Hyper,
    TaskBatch,
    anchor_batch,
    data_order,
    run_steps,
    stack_losses,
    task_batch,
)
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.protocol.expansion import plan_expansion
from fedblocks.protocol.messages import AttemptId, ClientKey
from fedblocks.protocol.run_config import RunConfig, from_mapping
from fedblocks.protocol.state import publish, publish_dense
from fedblocks.protocol.tensors import State, encode_delta

Method = Literal["full", "top", "lora", "blocks"]

CPU: Final = torch.device("cpu")
LORA_RANK: Final = 8
KL_VAL_SEQUENCES: Final = 8
"""Held-out anchor sequences on which each client measures the global model's KL (methods.md 5.3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One line of a table."""

    method: Method
    learning_rate: float
    seed: int
    anchor: bool = False
    """KL anchor on base-sampled text; lambda is 1 for the baselines and the aggregator's for expanded blocks."""
    blocks: int = 0
    """Expanded blocks, placement ``thirds``; 0 for the baselines."""
    rounds: int = 12
    steps: int = 16
    batch_size: int = 8
    anchor_batch_size: int = 4
    max_kl: float = 0.03
    min_lambda: float = 0.0
    """Floor of the aggregator's lambda; 0: pure dual ascent, as measured before the floor became the default."""
    density: float = 0.25
    """Share of the rows of each matrix that a client's int8 update sends; 1: no row mask."""
    down_density: float = 0.25
    """The same for the published steps."""
    rank: int = LORA_RANK
    """Of low-rank pairs."""
    layers: int = 0
    """Base layers that ``top`` trains."""
    cohort_fraction: float = 1.0
    """Share of the clients in each round, chosen as the aggregator does."""

    def __post_init__(self) -> None:
        if (self.method == "top") != (self.layers > 0):
            raise ValueError(f"{self.layers} base layers with method {self.method!r}, expected some for 'top' only")
        if (self.method == "blocks") != (self.blocks > 0):
            raise ValueError(f"{self.blocks} blocks with method {self.method!r}, expected some for 'blocks' only")

    def run_config(self) -> RunConfig:
        """The same run as the aggregator's run.toml says it."""
        return from_mapping(
            {
                "run": {"max_rounds": self.rounds, "seed": self.seed},
                "training": {"learning_rate": self.learning_rate, "steps": self.steps, "batch_size": self.batch_size},
                "forgetting": {
                    "max_kl": self.max_kl if self.anchor else math.inf,
                    "min_lambda": self.min_lambda,
                },
                "delta": {"density": self.density, "down_density": self.down_density},
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Federation:
    """What is the same for every method: the base, the sites' samples, the anchor texts."""

    checkpoint: Checkpoint
    base_hash: str
    sites: tuple[tuple[TokenisedSample, ...], ...]
    anchors: AnchorSet
    cache: Path
    """Folder for the NF4 backbone."""
    device: torch.device = CPU
    """Where models train and are measured; states and updates are the CPU's."""

    @classmethod
    def of(
        cls,
        model: Path,
        sites: Sequence[Sequence[TokenisedSample]],
        anchors: AnchorSet,
        cache: Path,
        device: torch.device = CPU,
    ) -> Federation:
        """Opens the base."""
        return cls(
            checkpoint=Checkpoint.open(model),
            base_hash=base_hash(model),
            sites=tuple(map(tuple, sites)),
            anchors=anchors,
            cache=cache,
            device=device,
        )

    def dense_base(self) -> ExpandedModel:
        """The unquantised base in fp32."""
        return ExpandedModel(backbone=self.dense_backbone(), checkpoint=self.checkpoint)

    def dense_backbone(self) -> DenseBackbone:
        """The base's layers as they are."""
        return DenseBackbone(self.checkpoint, self.base_hash, self.device)

    def nf4_base(self) -> ExpandedModel:
        """The base as a client holds it."""
        return ExpandedModel(backbone=self.nf4_backbone(), checkpoint=self.checkpoint)

    def nf4_backbone(self) -> Backbone:
        """The 4-bit backbone, made where it is missing; all of it decoded in memory."""
        backbone = Backbone.open(self.checkpoint, self.cache, base_hash=self.base_hash, device=self.device)
        backbone.hold(decoded=range(self.checkpoint.shape.num_layers), dtype=torch.float32)
        return backbone


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundEnd:
    """The state after a round; ``learner`` is live and moves on with the next round."""

    round: int
    learner: Learner
    learning_rate: float
    anchor_weight: float
    task_loss: float
    """Mean over clients of the mean cross-entropy of their last quarter of steps, nats per target token."""
    controller_kl: float | None
    """KL_K before the round on the held-out anchor texts, median over clients; None without anchor."""
    upload_bytes: float
    """Payload per client, mean."""
    download_bytes: float
    """Payload of the new global state, per client."""
    train_s: float


class Learner(Protocol):
    """A trainable with its server side."""

    model: ExpandedModel
    """The model that trains; between rounds it may hold any client's weights."""
    from_position: int
    """Where its inputs enter the stack."""

    def inputs(self, samples: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """Padded token ids, or hidden states at ``from_position``."""
        ...

    def fill(self, samples: Sequence[npt.NDArray[np.int32]]) -> None:
        """Prepares the inputs of these samples."""
        ...

    def begin(self) -> list[ParamGroup]:
        """A client starts from the global state."""
        ...

    def end(self, client: int, num_examples: int, cap: float) -> None:
        """The client's update goes to the server; ``cap`` bounds the residual that joins it (3·lr·steps)."""
        ...

    def close(self, *, last: bool) -> tuple[float, float]:
        """Fold the round; bytes up and down per client."""
        ...

    def restore(self) -> None:
        """Puts the global state into ``model``."""
        ...

    def kept(self) -> object:
        """The global state after this round, which later rounds leave as it is."""
        ...

    def go_back(self, kept: object) -> None:
        """Measure this state from now on; for when the last round is over."""
        ...

    def evaluation_model(self, strength: float = 1.0) -> ExpandedModel:
        """The global state on the unquantised base, as it would be exported, at some strength."""
        ...

    def stack_model(self) -> ExpandedModel | None:
        """The global state on the client's 4-bit stack; None for the baselines, which have no other."""
        ...


class _Averaged:
    """FedAvg of leaf tensors in fp32, for the two baselines."""

    from_position = 0

    def __init__(self, federation: Federation, settings: Settings) -> None:
        self.model = federation.dense_base()
        match settings.method:
            case "full":
                self._groups = self.model.train_base()
            case "top":
                num_layers = self.model.num_positions
                self._groups = self.model.train_base(range(num_layers)[-settings.layers :], embeddings=False)
            case _:
                rank = settings.rank
                self._groups = self.model.train_lora(rank=rank, alpha=2 * rank, seed=settings.seed)
        self._leaves = [tensor for group in self._groups for tensor in group.tensors]
        # The point that strength 0 returns to: the base's own values, or pairs whose product is zero.
        self._start = [leaf.detach().clone() for leaf in self._leaves]
        whole = settings.method != "lora"
        self._scaled = [whole or name.endswith("lora_B") for g in self._groups for name in _leaf_names(g)]
        self._global = [leaf.detach().clone() for leaf in self._leaves]
        self._sums: list[Tensor] = []
        self._examples: list[int] = []

    def inputs(self, samples: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        return padded_ids(samples)

    def fill(self, samples: Sequence[npt.NDArray[np.int32]]) -> None:
        del samples

    @torch.no_grad()
    def begin(self) -> list[ParamGroup]:
        self.restore()
        return self._groups

    @torch.no_grad()
    def end(self, client: int, num_examples: int, cap: float) -> None:
        del client, cap
        if not self._examples:
            self._sums = [torch.zeros_like(t, dtype=torch.float64) for t in self._global]
        self._examples.append(num_examples)
        for total, leaf, start in zip(self._sums, self._leaves, self._global, strict=True):
            total += num_examples * (leaf.detach() - start).double()

    @torch.no_grad()
    def close(self, *, last: bool) -> tuple[float, float]:
        del last
        for value, total in zip(self._global, self._sums, strict=True):
            value += (total / sum(self._examples)).float()
        self._examples = []
        num_bytes = 4.0 * sum(t.numel() for t in self._global)
        return num_bytes, num_bytes

    @torch.no_grad()
    def restore(self) -> None:
        for leaf, value in zip(self._leaves, self._global, strict=True):
            leaf.copy_(value)

    def kept(self) -> object:
        return [value.clone() for value in self._global]

    def go_back(self, kept: object) -> None:
        assert isinstance(kept, list)
        self._global = kept

    @torch.no_grad()
    def evaluation_model(self, strength: float = 1.0) -> ExpandedModel:
        for leaf, value, start, scaled in zip(self._leaves, self._global, self._start, self._scaled, strict=True):
            leaf.copy_(start + strength * (value - start) if scaled and strength != 1.0 else value)
        return self.model

    def stack_model(self) -> None:
        return None


class _Blocks:
    """Expanded blocks over the NF4 backbone, through the deployed numbers."""

    def __init__(self, federation: Federation, settings: Settings) -> None:
        checkpoint = federation.checkpoint
        config = settings.run_config()
        self._format, self._density = config.delta.format, config.delta.density
        self._down_density = config.delta.down_density
        self._steps = settings.steps
        self.plan = plan_expansion(
            base_hash=federation.base_hash, config=checkpoint.config, placement="thirds", num_blocks=settings.blocks
        )
        self.model = ExpandedModel(backbone=federation.nf4_backbone(), checkpoint=checkpoint, plan=self.plan)
        self.from_position = self.model.base_cut
        self._dense = ExpandedModel(backbone=federation.dense_backbone(), checkpoint=checkpoint, plan=self.plan)
        self.prefix = PrefixStates(self.model, RecordStore(Path(), location="ram", max_bytes=1 << 34, warn=print))
        self._initial = {m: initial_block(checkpoint, self.plan, m) for m in self.plan.block_ids}
        self._export_dtype = checkpoint.dtype
        self._published: State = {}
        self._server_residual: State = {}
        self._residuals: dict[int, State] = {}
        self._history: NormHistory = {}
        self._updates: list[AcceptedUpdate] = []
        self._groups: list[ParamGroup] = []
        self._round = 0

    @property
    def shape(self) -> ModelShape:
        return self.model.shape

    def inputs(self, samples: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        return self.prefix.padded(samples)

    def fill(self, samples: Sequence[npt.NDArray[np.int32]]) -> None:
        self.prefix.fill(samples)

    def begin(self) -> list[ParamGroup]:
        self.restore()
        self._groups = self.model.train_blocks(self.plan.block_ids)
        return self._groups

    def end(self, client: int, num_examples: int, cap: float) -> None:
        encoded = encode_delta(
            self.shape,
            self.plan.block_ids,
            self.model.deltas(self._groups),
            self._residuals.get(client, {}),
            format=self._format,
            density=self._density,
            cap=cap,
        )
        self._residuals[client] = encoded.residuals
        payload = memoryview(b"".join(encoded.parts))
        self._updates.append(
            AcceptedUpdate(
                client=_key(client),
                attempt_id=AttemptId(f"round {self._round} client {client}"),
                num_examples=num_examples,
                steps=self._steps,
                staleness=0,
                format=self._format,
                density=self._density,
                tensors=encoded.headers,
                read_payload=lambda: payload,
            )
        )

    def close(self, *, last: bool) -> tuple[float, float]:
        folded = fold(self._updates, shape=self.shape, history=self._history)
        self._history = folded.history
        if last:
            new = publish_dense(self._published, folded.aggregate, self._server_residual, shape=self.shape)
        else:
            new = publish(
                self._published,
                folded.aggregate,
                self._server_residual,
                shape=self.shape,
                format=self._format,
                density=self._down_density,
            )
        self._published, self._server_residual = new.published, new.residual
        uploaded = statistics.fmean(len(update.read_payload()) for update in self._updates)
        self._updates = []
        self._round += 1
        return uploaded, float(len(new.step))

    def restore(self) -> None:
        self.model.load_state(self._published)

    def kept(self) -> object:
        return self._published

    def go_back(self, kept: object) -> None:
        assert isinstance(kept, dict)
        self._published = kept

    def evaluation_model(self, strength: float = 1.0) -> ExpandedModel:
        self._dense.set_strength(1.0)
        self._dense.load_state(self._as_exported(strength))
        return self._dense

    def stack_model(self) -> ExpandedModel:
        """The published state on the client's 4-bit stack."""
        self.restore()
        return self.model

    def _as_exported(self, strength: float) -> State:
        """Deltas such that initial value + delta is what the exported checkpoint stores (methods.md 2.5)."""
        out = {spec.name for spec in self.shape.block_tensors() if spec.is_out}
        state: State = {}
        for block, tensors in self._published.items():
            state[block] = {}
            for name, delta in tensors.items():
                start = self._initial[block][name]
                value = start + torch.from_numpy(delta)
                value = (strength * value if name in out else value).to(self._export_dtype).float()
                state[block][name] = (value - start).numpy()
        return state


def _leaf_names(group: ParamGroup) -> list[str]:
    """One name per leaf; only those of LoRA pairs matter, which have a leaf of their own each."""
    return list(group.named) if len(group.named) == len(group.tensors) else [group.name] * len(group.tensors)


def _key(client: int) -> ClientKey:
    return ClientKey(f"client {client:03d}")


def padded_ids(samples: Sequence[npt.NDArray[np.int32]]) -> Tensor:
    """(B, longest) int64, right-padded with 0."""
    batch = torch.zeros(len(samples), max(map(len, samples)), dtype=torch.int64)
    for row, ids in zip(batch, samples, strict=True):
        row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    return batch


@dataclass(slots=True, kw_only=True)
class _Anchoring:
    """The anchor of a run: what its learner compares with, and how strongly."""

    teacher: Teacher
    prefix: PrefixStates | None
    """Set for expanded blocks: the controller measures through it."""
    weight: float = 1.0
    armed: bool = False
    kl: float | None = field(default=None)

    def control(self, learner: Learner, settings: Settings, round: int, clients: Sequence[int]) -> None:
        """Dual ascent on lambda from the KL that the clients measure before they train (methods.md 5.3)."""
        if self.prefix is None:
            return
        learner.restore()
        held_out = list(self.teacher.anchors.kl_val_indices)
        each = {i: measure_anchor(learner.model, self.teacher, [i], self.prefix) for i in held_out}
        reports: list[float] = []
        for client in clients:
            order = np.random.Generator(np.random.Philox(draw("kl_val", settings.seed, round, client)))
            chosen = order.permutation(held_out)[:KL_VAL_SEQUENCES].tolist()
            reports.append(sum(each[i].kl_sum for i in chosen) / sum(each[i].num_tokens for i in chosen))
        self.kl = statistics.median(reports)
        forgetting = settings.run_config().forgetting
        self.weight, self.armed = next_anchor_weight(self.weight, self.armed, self.kl, forgetting)


def make_learner(federation: Federation, settings: Settings) -> Learner:
    """The trainable of this line at the base."""
    if settings.method == "blocks":
        return _Blocks(federation, settings)
    return _Averaged(federation, settings)


def federate(federation: Federation, settings: Settings, learner: Learner) -> Iterator[RoundEnd]:
    """Runs the rounds and yields after each; the caller measures what it wants through ``learner``."""
    config = settings.run_config()
    last_chosen = dict.fromkeys(map(_key, range(len(federation.sites))), 0)
    anchoring = _anchoring(federation, settings, learner)
    for site in federation.sites:
        learner.fill([sample.ids for sample in site])
    for t in range(settings.rounds):
        began = time.monotonic()
        rate = learning_rate(config, t)
        cohort = choose_cohort(last_chosen, fraction=settings.cohort_fraction, round=t + 1, seed=settings.seed)
        clients = [client for client in range(len(federation.sites)) if _key(client) in cohort]
        last_chosen.update(dict.fromkeys(cohort, t + 1))
        if anchoring is not None:
            anchoring.control(learner, settings, t, clients)
        losses: list[float] = []
        for client in clients:
            site = federation.sites[client]
            seed = draw(settings.seed, t, client)
            groups = learner.begin()
            result = run_steps(
                groups=groups,
                losses=stack_losses(learner.model, learner.from_position),
                task=_task_windows(learner, site, settings.batch_size, seed),
                anchor=_anchor_windows(learner, anchoring, settings.anchor_batch_size, seed + 1),
                hyper=Hyper(
                    steps=settings.steps,
                    learning_rate=rate,
                    warmup_steps=max(1, min(WARMUP_KNOWN if t else WARMUP_NEW, settings.steps // 2)),
                    weight_decay=config.training.weight_decay if settings.method == "blocks" else 0.0,
                    anchor_weight=anchoring.weight if anchoring is not None else 0.0,
                ),
                now=time.monotonic,
                status=lambda *_: None,
            )
            quarter = max(1, settings.steps // 4)
            losses.append(statistics.fmean(result.task_loss[-quarter:]))
            learner.end(client, len(site), 3 * rate * settings.steps)
        uploaded, downloaded = learner.close(last=t == settings.rounds - 1)
        yield RoundEnd(
            round=t + 1,
            learner=learner,
            learning_rate=rate,
            anchor_weight=anchoring.weight if anchoring is not None else 0.0,
            task_loss=statistics.fmean(losses),
            controller_kl=anchoring.kl if anchoring is not None else None,
            upload_bytes=uploaded,
            download_bytes=downloaded,
            train_s=time.monotonic() - began,
        )


def _anchoring(federation: Federation, settings: Settings, learner: Learner) -> _Anchoring | None:
    if not settings.anchor:
        return None
    if isinstance(learner, _Blocks):  # the client's teacher: its own 4-bit base
        anchoring = _Anchoring(teacher=_teacher(federation, learner.model, learner.prefix), prefix=learner.prefix)
        anchoring.weight = settings.run_config().forgetting.lambda_start
    else:
        base = federation.dense_base()
        anchoring = _Anchoring(teacher=_teacher(federation, base, PrefixStates(base, None)), prefix=None)
    return anchoring


def _teacher(federation: Federation, model: ExpandedModel, prefix: PrefixStates) -> Teacher:
    teacher = Teacher(anchors=federation.anchors, model=model, prefix=prefix, store=None)
    teacher.fill(range(len(federation.anchors.sequences)))
    return teacher


def _task_windows(
    learner: Learner, site: Sequence[TokenisedSample], batch_size: int, seed: int
) -> Iterator[list[TaskBatch]]:
    for window in data_order(len(site), batch_size, seed):
        chosen = [site[i] for i in window]
        yield [task_batch(chosen, learner.inputs([sample.ids for sample in chosen]))]


def _anchor_windows(
    learner: Learner, anchoring: _Anchoring | None, batch_size: int, seed: int
) -> Iterator[list[AnchorBatch]]:
    if anchoring is None:
        return
    teacher = anchoring.teacher
    train = list(teacher.anchors.train_indices)
    for window in data_order(len(train), batch_size, seed):
        chosen = [train[i] for i in window]
        inputs = learner.inputs([teacher.anchors.sequences[i] for i in chosen])
        yield [anchor_batch(teacher.records(chosen), inputs)]


def first_at_least(values: Sequence[float], target: float) -> int | None:
    """Number of the first round (from 1) whose value reaches the target; None if none does."""
    return next((i for i, value in zip(itertools.count(1), values, strict=False) if value >= target), None)
