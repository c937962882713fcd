"""How does each compared system take the same training step? Ours and the usual stacks behind one small interface.

========== ============================================================================================================
ours       expanded blocks over the NF4 backbone, the prefix from the cache: the client's own step loop and cache
base_cut   the same with the cache at the plan's lowest block only, where the lowest block that trains lies higher
no_cache   the same assignment, the prefix computed in every step; its layers stay decoded, which is its fastest form
full       transformers, every parameter trained
lora       peft, rank 8 on all linear layers, the base unquantised
qlora      the same over bitsandbytes' NF4 with double quantisation
========== ============================================================================================================

What is equal: token ids, labels, lengths, compute dtype, threads, `sdpa` attention, fused AdamW, clipping to norm 1, no
dropout, no activation checkpointing (it would save the rivals memory and cost them speed). The rivals' loss is that of
transformers, or, to show what the split alone gives, ours (``label_only``): their final hidden states, of which only
labelled rows reach the head, in chunks, without a gradient for it where it is frozen.

The rivals are as their packages make them by default (peft keeps adapters in fp32 over a bf16 base), but for two
things. ``prepare_model_for_kbit_training`` is not called: it upcasts the embeddings to fp32 and recomputes activations.
bitsandbytes' CPU repacking is switched off: it would make every gradient wrong (runtime.md 9.2).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fedblocks.edge_client.backbone import Backbone, bitsandbytes_quantiser
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore, cut_key
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.train import Hyper, Losses, TaskBatch, run_steps, stack_losses, task_batch
from fedblocks.kernels.ops import linear_cross_entropy
from fedblocks.profiles.cost import ExecutionMode, OptimizerMode, StackLayout
from fedblocks.protocol.expansion import ExpansionPlan, Placement, plan_expansion

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZER: Final[dict[str, OptimizerMode]] = {"fp32": "fp32", "bf16": "split"}
"""Ours keeps exact fp32 weights in both."""
LEARNING_RATE: Final = 1e-4
CLIP_NORM: Final = 1.0
LORA_RANK: Final = 8
LORA_ALPHA: Final = 16

Kind = Literal["full", "lora", "qlora"]
RIVALS: Final[tuple[Kind, ...]] = ("full", "lora", "qlora")
Loss = Literal["stock", "label_only"]
Done = Callable[[float], None]
"""Called after each step with its loss, nats per target token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Random token ids, the same for every system: sequences of one length whose last tokens are the targets."""

    sequences: int
    tokens: int
    """Per sequence."""
    batch_size: int
    vocab: int
    seed: int = 0

    @property
    def num_batches(self) -> int:
        """Steps of one pass."""
        return self.sequences // self.batch_size

    def batch(self, index: int, label_share: float) -> list[TokenisedSample]:
        """The samples of one step; at share 1 every token but the first is a target."""
        targets = min(self.tokens - 1, round(label_share * self.tokens))
        mask = np.arange(self.tokens) >= self.tokens - targets
        rng = np.random.default_rng([self.seed, index])
        ids = rng.integers(3, self.vocab, (self.batch_size, self.tokens), dtype=np.int32)
        return [TokenisedSample(ids=row, label_mask=mask) for row in ids]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A number of steps on one kind of data."""

    steps: int
    label_share: float
    loss: Loss = "stock"
    """The rivals' loss; ours is always the client's."""


class System(Protocol):
    """One system with its model loaded."""

    data: Data

    def fill(self) -> None:
        """What is computed once before the first pass; from nothing at each call."""
        ...

    def series(self, wanted: Series, batches: Iterator[int], done: Done) -> None:
        """Optimizer steps with a new optimizer; batch indices are drawn from ``batches`` one at a time."""
        ...

    def close(self) -> None:
        """Removes what was written."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """Which expanded blocks there are and which of them train."""

    placement: Placement
    num_blocks: int
    highest: int = 0
    """Train this many from the top; 0: all."""

    def plan(self, config: dict[str, Any], base_hash: str) -> ExpansionPlan:
        """The expansion of a base with this config.json."""
        return plan_expansion(base_hash=base_hash, config=config, placement=self.placement, num_blocks=self.num_blocks)

    def trained(self, plan: ExpansionPlan) -> tuple[int, ...]:
        """Ids of the blocks that train, ascending."""
        by_height = sorted(plan.block_ids, key=plan.position, reverse=True)
        return tuple(sorted(by_height[: self.highest or None]))


def layout_of(plan: ExpansionPlan) -> StackLayout:
    """Where the blocks stand, for the cost formulas."""
    return StackLayout(num_entries=len(plan.stack()), positions={b: plan.position(b) for b in plan.block_ids})


def false_hash(checkpoint: Checkpoint) -> str:
    """Stands for the base's content hash, which would need a tokenizer: names the random model by its config."""
    return hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest()


def quantised(folder: Path, work: Path) -> Backbone:
    """The NF4 backbone of the checkpoint in ``folder``, kept under ``work``."""
    checkpoint = Checkpoint.open(folder)
    return Backbone.open(checkpoint, work / "backbone", base_hash=false_hash(checkpoint))


class Ours:
    """The client's own path: backbone, prefix cache, step loop.

    Args:
        folder: the checkpoint.
        work: for the backbone, which is kept, and the cache, which is not.
        mode: how the assignment is carried out; default exact weights, a whole batch at a time.
        cached: False computes the prefix in every step.
        round_cut: also keep, for one series and in memory, the states at the lowest block that trains.
    """

    def __init__(
        self,
        folder: Path,
        work: Path,
        *,
        data: Data,
        dtype: str,
        assigned: Assigned,
        mode: ExecutionMode | None = None,
        cached: bool = True,
        round_cut: bool = True,
    ) -> None:
        self.data = data
        self._mode = mode or ExecutionMode(optimizer=OPTIMIZER[dtype], micro_batch_size=data.batch_size)
        self._cached = cached
        self._round_cut = round_cut
        checkpoint, backbone = self._open(folder, work)
        self._hash = false_hash(checkpoint)
        plan = assigned.plan(checkpoint.config, self._hash)
        self._trained = assigned.trained(plan)
        self._low = min(map(plan.position, self._trained))
        self.model = ExpandedModel(backbone=backbone, checkpoint=checkpoint, plan=plan, dtype=DTYPES[dtype])
        self.model.recompute = self._mode.checkpoint
        self.model.hold(residency=self._mode.residency, frozen=self._mode.frozen)
        if not cached:
            self.model.backbone.hold(decoded=range(self.model.shape.num_layers), dtype=self.model.dtype)
        self._cache_folder = work / f"prefix-{os.getpid()}-{id(self)}"
        self._store: RecordStore | None = None
        self._states = PrefixStates(self.model, None)

    def _open(self, folder: Path, work: Path) -> tuple[Checkpoint, Backbone]:
        return Checkpoint.open(folder), quantised(folder, work)

    def fill(self) -> None:
        """The prefix pass over all samples into a new cache on disk; nothing where there is no cache."""
        if not self._cached:
            return
        self.close()
        key = cut_key(self.model, self._hash, cut=self.model.base_cut)
        self._store = RecordStore(self._cache_folder / key, warn=print)
        self._states = PrefixStates(self.model, self._store)
        samples = [s.ids for index in range(self.data.num_batches) for s in self.data.batch(index, 1.0)]
        self._states.fill(samples)
        if self._round_cut and self._low > self.model.base_cut:
            memory = RecordStore(self._cache_folder / "round", location="ram", warn=print)
            self._states = PrefixStates(self.model, memory, cut=self._low, source=self._states)
            self._states.fill(samples)

    def series(self, wanted: Series, batches: Iterator[int], done: Done) -> None:
        """As :class:`System`; begins at the published state."""
        self.model.load_state({})
        groups = self.model.train_blocks(self._trained, self._mode.optimizer)
        losses = stack_losses(self.model, self._states.cut)
        seen: list[float] = []

        def task(batch: TaskBatch, scale: float) -> Tensor:
            value = losses.task(batch, scale)
            seen.append(value.item())
            return value

        def windows() -> Iterator[list[TaskBatch]]:
            for index in itertools.islice(batches, wanted.steps):
                samples = self.data.batch(index, wanted.label_share)
                size = self._mode.micro_batch_size
                parts = [samples[start : start + size] for start in range(0, len(samples), size)]
                yield [task_batch(part, self._states.padded([s.ids for s in part])) for part in parts]

        def status(_phase: str, _steps: int) -> None:
            done(sum(seen))
            seen.clear()

        run_steps(
            groups=groups,
            optimizer_mode=self._mode.optimizer,
            losses=Losses(task=task, anchor=losses.anchor),
            task=windows(),
            anchor=(),
            hyper=Hyper(steps=wanted.steps, learning_rate=LEARNING_RATE, clip_norm=CLIP_NORM),
            now=time.monotonic,
            status=status,
        )
        self.model.load_state({})

    def close(self) -> None:
        """Removes the cache."""
        if self._store is not None:
            self._store.wipe()
            self._store = None
        if self._cache_folder.is_dir():
            self._cache_folder.rmdir()


class Rival:
    """transformers, peft and bitsandbytes.

    Args:
        folder: the checkpoint.
        lean: adapters in the compute dtype.
        mapped: leave weights that the library maps from their file as they are; False reads them into memory.
    """

    def __init__(
        self, folder: Path, *, kind: Kind, data: Data, dtype: str, lean: bool = False, mapped: bool = True
    ) -> None:
        import_rivals()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        self.data = data
        compute = DTYPES[dtype]
        arguments: dict[str, Any] = {"dtype": compute, "attn_implementation": "sdpa"}
        if kind == "qlora":
            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
            )
            arguments["device_map"] = {"": "cpu"}
        self.model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
        self.model.config.use_cache = False  # of keys and values; training has no use for it
        for parameter in () if mapped else self.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
        for module in self.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        self._stack, self._head = self.model.model, self.model.lm_head  # adapters are put into these in place
        if kind != "full":
            adapters = LoraConfig(
                r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            self.model = get_peft_model(self.model, adapters, autocast_adapter_dtype=not lean)
        self.model.train()
        self._trained = [p for p in self.model.parameters() if p.requires_grad]

    @property
    def trained_parameters(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self._trained)

    def fill(self) -> None:
        """There is nothing to prepare."""

    def series(self, wanted: Series, batches: Iterator[int], done: Done) -> None:
        """As :class:`System`; weights go on from the series before."""
        optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE, fused=True)
        for index in itertools.islice(batches, wanted.steps):
            samples = self.data.batch(index, wanted.label_share)
            value = self._stock_loss(samples) if wanted.loss == "stock" else self._label_only_loss(samples)
            value.backward()
            torch.nn.utils.clip_grad_norm_(self._trained, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done(value.item())

    def _stock_loss(self, samples: list[TokenisedSample]) -> Tensor:
        ids = torch.from_numpy(np.stack([s.ids for s in samples]).astype(np.int64))
        targets = torch.from_numpy(np.stack([s.label_mask for s in samples]))
        return self.model(input_ids=ids, labels=ids.masked_fill(~targets, -100)).loss

    def _label_only_loss(self, samples: list[TokenisedSample]) -> Tensor:
        ids = torch.from_numpy(np.stack([s.ids for s in samples]).astype(np.int64))
        batch = task_batch(samples, ids)
        h = self._stack(input_ids=ids).last_hidden_state
        rows = h.flatten(0, 1).index_select(0, batch.rows)
        return linear_cross_entropy(rows, self._head.weight, batch.targets, 1 / len(batch.targets))

    def close(self) -> None:
        """Nothing was written."""


def import_rivals() -> None:
    """Imports what the rivals import, so that a measurement of memory can begin after it."""
    warnings.simplefilter("ignore")
    bitsandbytes_quantiser()  # imports the library without its look at a hub
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM  # noqa: F401
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
