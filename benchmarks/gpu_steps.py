"""How fast is a whole training step on a device, and what memory does it take? Ours beside the usual stacks.

=================== ===================================================================================================
ours                the client's own path: NF4 backbone from its files, prefix cache on disk, step loop, split weights
ours, no cache      the same with the prefix run in every step, its layers decoded where they fit
qlora               transformers + peft r=16 on all linear layers over bitsandbytes NF4
qlora + liger       the same with Liger's norm, rotation, gate and fused head loss
same blocks         transformers over bitsandbytes NF4 with our expanded blocks as further layers, which train in fp32
                    under autocast (what exact weights are there)
same blocks + liger the same with Liger
=================== ===================================================================================================

All see the same random weights, token ids and labels, take the same number of optimizer steps with AdamW and clipping
to norm 1, without dropout and without recomputation. What trains beside bitsandbytes is fp32 under bf16 autocast, as
transformers' trainer does it. Three passes over the samples count the prefix pass and the new cache of ours. Nothing is
loaded from a hub and no 16-bit checkpoint is written: weights are drawn layer by layer on the device. Systems are
measured in turn; those that fit into memory beside each other stay, and are measured again.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gpu_timing import Budget, DeviceLostError, Peaks, Timer, describe_error, spread, usable
from random_models import RandomModel, random_tensor
from rivals import CLIP_NORM, LEARNING_RATE, Assigned, Data, Done, Ours, Series, false_hash, layout_of
from torch import Tensor

from fedblocks.edge_client.backbone import Backbone, bitsandbytes_quantiser
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.memory import PeakMemory
from fedblocks.kernels.ops import Nf4Weight, quantize_nf4
from fedblocks.profiles.cost import (
    Accelerator,
    Workload,
    forward_block_flops,
    frozen_block_flops,
    head_flops,
    peak_memory,
    step_flops,
)
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.protocol.expansion import ExpansionPlan

PASSES: Final = 3
STEPS_PER_PASS: Final = 2
LORA_RANK, LORA_ALPHA = 16, 32
LABELS: Final = (1.0, 0.4)
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
KEEP_FREE: Final = 0.5
"""A system stays on the device while this share of its memory is free."""
DECODED_SHARE: Final = 0.4
"""The prefix of ``ours, no cache`` stays decoded where it takes at most this share of the free memory."""
ASSIGNMENTS: Final = {
    "top1": Assigned(placement="top", num_blocks=1),
    "top2": Assigned(placement="top", num_blocks=2),
    "thirds2": Assigned(placement="thirds", num_blocks=2),
}
OURS: Final = ("ours", "ours, no cache")
ADAPTERS: Final = ("qlora", "qlora + liger")
SAME_BLOCKS: Final = ("same blocks", "same blocks + liger")
GRAPHS: Final = "not built"
"""CUDA graphs of a step (runtime.md 8)."""


class RandomWeights:
    """Stands for a checkpoint: every tensor is drawn from a seed that its name gives, on the device.

    What is asked for by name is kept on the CPU, as a file's pages would be; layers are drawn anew each time.
    """

    def __init__(self, model: RandomModel, device: torch.device) -> None:
        self.config: dict[str, Any] = model.config()
        self.shape: ModelShape = model.shape
        self._device = device
        self._kept: dict[str, Tensor] = {}

    def drawn(self, name: str) -> Tensor:
        """A tensor by its name in a checkpoint, bf16, on the device."""
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "little")
        return random_tensor(name, self._size(name), torch.Generator(device=self._device).manual_seed(seed))

    def tensor(self, name: str) -> Tensor:
        """The same on the CPU."""
        if name not in self._kept:
            self._kept[name] = self.drawn(name).cpu()
        return self._kept[name]

    def rows(self, name: str, indices: np.ndarray, dtype: torch.dtype) -> Tensor:
        """Rows of a matrix: (n, cols)."""
        return self.tensor(name).index_select(0, torch.from_numpy(indices)).to(dtype)

    def layer_name(self, layer: int, suffix: str) -> str:
        """As a checkpoint names it."""
        return f"model.layers.{layer}.{suffix}"

    def layer_tensors(self, layer: int) -> dict[str, Tensor]:
        """Suffix -> tensor, bf16, on the device."""
        return {spec.name: self.drawn(self.layer_name(layer, spec.name)) for spec in self.shape.block_tensors()}

    def quantise(self, weight: Tensor) -> Nf4Weight:
        """Our own quantiser, on the device."""
        return quantize_nf4(weight.to(self._device)).to(torch.device("cpu"))

    def _size(self, name: str) -> tuple[int, ...]:
        if name in (EMBEDDING, HEAD):
            return (self.shape.vocab_size, self.shape.hidden_size)
        if name == FINAL_NORM:
            return (self.shape.hidden_size,)
        return next(spec.shape for spec in self.shape.block_tensors() if name.endswith("." + spec.name))


class OursOnDevice(Ours):
    """The client's own path on a device; ``held`` says what became of the prefix without a cache."""

    def __init__(
        self, weights: RandomWeights, work: Path, *, device: torch.device, data: Data, assigned: Assigned, cached: bool
    ) -> None:
        self._weights, self._device = weights, device
        super().__init__(Path(), work, data=data, dtype="bf16", assigned=assigned, cached=True)
        self.layout, self.trained = layout_of(self.model.plan), self._trained
        self.mode = self._mode
        self.held = "cache"
        if not cached:
            self._cached = False
            self.held = self._hold_all()

    def _open(self, folder: Path, work: Path) -> tuple[Checkpoint, Backbone]:  # noqa: ARG002
        name = false_hash(self._weights)  # type: ignore[arg-type]
        backbone = Backbone.open(
            self._weights,
            work / "backbone",
            base_hash=name,
            quantiser=("fedblocks reference", self._weights.quantise),
            device=self._device,
        )
        return self._weights, backbone  # type: ignore[return-value]

    def _hold_all(self) -> str:
        shape, model = self.model.shape, self.model
        needed = 2 * shape.num_layers * sum(spec.size for spec in shape.block_tensors())
        layers = range(shape.num_layers)
        if needed <= DECODED_SHARE * _free_bytes(self._device):
            model.backbone.hold(decoded=layers, dtype=model.dtype)
            return "decoded"
        model.backbone.hold(packed=layers, dtype=model.dtype)
        return "packed, decoded at each use"

    def take(self, data: Data) -> None:
        """Other samples from now on."""
        self.data = data
        self._mode = self.mode = replace(self._mode, micro_batch_size=data.batch_size)

    def reset(self) -> None:
        """A series begins at the published state by itself."""

    def predicted_bytes(self, label_share: float) -> int:
        """Of the memory model, for what was measured."""
        accelerator: Accelerator = "cuda" if self._device.type == "cuda" else "cpu"
        work = workload(self.data, label_share)
        shape = self.model.shape
        return peak_memory(shape, self.layout, self.trained, work, self.mode, accelerator=accelerator).peak


class Peer:
    """transformers over bitsandbytes, built on the device from the same random weights.

    Args:
        plan: whose expanded blocks train as further layers; None: low-rank pairs over every linear layer.
        liger: with Liger's kernels.
    """

    def __init__(
        self, weights: RandomWeights, *, device: torch.device, data: Data, plan: ExpansionPlan | None, liger: bool
    ) -> None:
        import_peers()
        self.data = data
        self.held = "nf4"
        self._device = device
        self.model: Any = _transformers_model(weights, device, plan)
        self._patches = _LigerPatches(self.model) if liger else None
        if plan is None:
            from peft import LoraConfig, get_peft_model

            pairs = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, pairs)
        self.model.train()
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._start = [p.detach().cpu() for p in self._trained]
        if device.type == "cpu":
            self._start = [p.clone() for p in self._start]

    def reset(self) -> None:
        """Back to the weights of the start, so that every series has the same losses to show."""
        with torch.no_grad():
            for parameter, value in zip(self._trained, self._start, strict=True):
                parameter.copy_(value)

    def take(self, data: Data) -> None:
        """Other samples from now on."""
        self.data = data

    def fill(self) -> None:
        """There is nothing to prepare."""

    def series(self, wanted: Series, batches: Iterator[int], done: Done) -> None:
        """Steps with a new optimizer."""
        with self._patches or contextlib.nullcontext():
            optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE, fused=True)
            for _, index in zip(range(wanted.steps), batches, strict=False):
                loss = self._loss(index, wanted.label_share)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self._trained, CLIP_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                done(loss.item())

    def _loss(self, index: int, label_share: float) -> Tensor:
        samples = self.data.batch(index, label_share)
        ids = torch.from_numpy(np.stack([s.ids for s in samples]).astype(np.int64)).to(self._device)
        targets = torch.from_numpy(np.stack([s.label_mask for s in samples])).to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16):
            return self.model(input_ids=ids, labels=ids.masked_fill(~targets, -100)).loss

    def close(self) -> None:
        """Nothing was written."""


def import_peers() -> None:
    """Imports what the peers need.

    Raises:
        ImportError: a package is missing.
    """
    bitsandbytes_quantiser()  # imports the library without its look at a hub
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from transformers.utils import logging

    logging.set_verbosity_error()


def _transformers_model(weights: RandomWeights, device: torch.device, plan: ExpansionPlan | None) -> Any:
    """The model with NF4 layers, drawn layer by layer; expanded blocks in fp32 with gradients."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {k: v for k, v in weights.config.items() if k not in ("architectures", "torch_dtype", "model_type")}
    entries = [("base", i) for i in range(weights.shape.num_layers)]
    if plan is not None:
        entries = [(entry.kind, entry.index) for entry in plan.stack()]
    config = CONFIG_MAPPING[weights.config["model_type"]](**{**fields, "num_hidden_layers": len(entries)})
    config.use_cache = False
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(config=config).to(device)
    for layer, (kind, index) in zip(inner.layers, entries, strict=True):
        if kind == "base":
            _fill_frozen(layer, weights.layer_tensors(index), device)
        else:
            assert plan is not None
            _fill_trained(layer, weights, plan.block(index).source_layer)
    inner.embed_tokens.weight = _frozen(weights.drawn(EMBEDDING))
    inner.norm.weight = _frozen(weights.drawn(FINAL_NORM))
    tied = weights.shape.tied_embeddings
    model.lm_head.weight = inner.embed_tokens.weight if tied else _frozen(weights.drawn(HEAD))
    model.is_loaded_in_4bit = True  # peft chooses its layers by it
    return model


def _frozen(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _fill_frozen(layer: Any, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for suffix, tensor in tensors.items():
        path, leaf = suffix.rsplit(".", 1)
        if leaf != "weight" or tensor.dim() != 2:
            setattr(layer.get_submodule(path), leaf, _frozen(tensor))
            continue
        made = Linear4bit(
            tensor.shape[1],
            tensor.shape[0],
            bias=f"{path}.bias" in tensors,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        made.weight = Params4bit(tensor, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
        if hasattr(made, "support_avx512bf16_for_cpu"):
            made.support_avx512bf16_for_cpu = False  # it repacks weights, after which every gradient is wrong
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent) if parent else layer, name, made)
    for suffix, tensor in tensors.items():  # after the layers that they belong to
        path, leaf = suffix.rsplit(".", 1)
        if leaf == "bias":
            layer.get_submodule(path).bias = _frozen(tensor)


def _fill_trained(layer: Any, weights: RandomWeights, source: int) -> None:
    for spec in weights.shape.block_tensors():
        value = weights.drawn(weights.layer_name(source, spec.name)).float()
        path, leaf = spec.name.rsplit(".", 1)
        setattr(layer.get_submodule(path), leaf, torch.nn.Parameter(value.zero_() if spec.is_out else value))


class _LigerPatches:
    """Liger's functions in a model; what it changes in transformers' module holds only while it is entered."""

    def __init__(self, model: Any) -> None:
        import sys

        from liger_kernel import transformers as liger

        self._module = sys.modules[type(model).__module__]
        apply = getattr(liger, f"apply_liger_kernel_to_{model.config.model_type}")
        before = dict(vars(self._module))
        apply(model=model)
        self._changed = {
            name: (before.get(name), value) for name, value in vars(self._module).items() if before.get(name) != value
        }
        self._set(0)

    def _set(self, which: int) -> None:
        for name, values in self._changed.items():
            setattr(self._module, name, values[which])

    def __enter__(self) -> None:
        self._set(1)

    def __exit__(self, *_: object) -> None:
        self._set(0)


# What is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One system to be measured on one model."""

    system: str
    assignment: str
    """Empty for adapters."""
    labels: tuple[float, ...]

    @property
    def name(self) -> str:
        """``ours top1``."""
        return f"{self.system} {self.assignment}".strip()


def plans(assignments: Sequence[str]) -> list[Plan]:
    """All systems, the most telling first."""
    first, *rest = assignments
    found = [*_of(first), *(Plan(system=name, assignment="", labels=LABELS) for name in ADAPTERS)]
    for assignment in rest:
        found += _of(assignment)
    return found


def _of(assignment: str) -> list[Plan]:
    return [
        Plan(system="ours", assignment=assignment, labels=LABELS),
        Plan(system="ours, no cache", assignment=assignment, labels=(1.0,)),
        *(Plan(system=name, assignment=assignment, labels=LABELS) for name in SAME_BLOCKS),
    ]


@dataclass(slots=True, kw_only=True)
class Opened:
    """A system on the device, and the bytes that it holds there between turns."""

    system: OursOnDevice | Peer
    own_bytes: int
    warm: bool = False


@dataclass(slots=True, kw_only=True)
class Turns:
    """What one system did in one condition."""

    fill_s: list[float] = field(default_factory=list)
    begin_s: list[float] = field(default_factory=list)
    steps_s: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    predicted_bytes: int | None = None
    held: str = ""


def open_system(
    plan: Plan, model: RandomModel, weights: RandomWeights, *, device: torch.device, work: Path, data: Data
) -> OursOnDevice | Peer:
    """Puts a system on the device.

    Raises:
        ImportError: a peer's package is missing.
    """
    if plan.system in OURS:
        assigned, cached = ASSIGNMENTS[plan.assignment], plan.system == "ours"
        return OursOnDevice(weights, work, device=device, data=data, assigned=assigned, cached=cached)
    assigned_plan = None
    if plan.assignment:
        assigned_plan = ASSIGNMENTS[plan.assignment].plan(model.config(), false_hash(weights))  # type: ignore[arg-type]
    return Peer(weights, device=device, data=data, plan=assigned_plan, liger=plan.system.endswith("liger"))


def take_turn(opened: Opened, wanted: Series, timer: Timer, turns: Turns) -> None:
    """One series: the prefix pass, then the steps, with the peak of memory of all of it."""
    system, device = opened.system, timer.device
    before = _allocated(device)
    host = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        host.start()
    try:
        turns.fill_s.append(timer.wall(system.fill))
        steps: list[float] = []
        losses: list[float] = []
        began = time.perf_counter()

        def batches() -> Iterator[int]:
            nonlocal began
            turns.begin_s.append(time.perf_counter() - began)
            for index in range(wanted.steps):
                began = time.perf_counter()
                yield index % system.data.num_batches

        def done(loss: float) -> None:
            timer.synchronize()
            steps.append(time.perf_counter() - began)
            losses.append(loss)

        system.series(wanted, batches(), done)
    finally:
        if device.type != "cuda":
            host.stop()
    turns.steps_s.append(steps)
    turns.losses = turns.losses or losses
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before + opened.own_bytes
        opened.own_bytes += _allocated(device) - before
    else:
        peak = host.peak_bytes + opened.own_bytes
    turns.peak_bytes = max(turns.peak_bytes, peak)


def row_of(turns: Turns, flops: float, tokens: int, peaks: Peaks) -> dict[str, Any]:
    """The figures of one system in one condition."""
    steady = [seconds for steps in turns.steps_s for seconds in steps[len(steps) // PASSES :]]
    step = spread(steady)
    whole = [
        fill + begin + sum(steps) for fill, begin, steps in zip(turns.fill_s, turns.begin_s, turns.steps_s, strict=True)
    ]
    all_tokens = tokens * len(turns.steps_s[0])
    found: dict[str, Any] = {
        "status": "ok",
        "step": step,
        "fill_s": turns.fill_s,
        "begin_s": turns.begin_s,
        "series_s": whole,
        "tokens_per_s_step": tokens / step["median_s"],
        "tokens_per_s_passes": all_tokens / statistics.median(whole),
        "flops_per_step": flops,
        "share_of_roofline": flops / step["median_s"] / peaks.gemm_flops_per_s,
        "peak_bytes": turns.peak_bytes,
        "losses": turns.losses,
        "prefix_held": turns.held,
    }
    if turns.predicted_bytes is not None:
        found["predicted_peak_bytes"] = turns.predicted_bytes
        found["predicted_error"] = turns.predicted_bytes / max(1, turns.peak_bytes) - 1
    return found


def workload(data: Data, label_share: float) -> Workload:
    """One step of the benchmark, for the cost formulas."""
    return Workload(
        batch_size=data.batch_size,
        micro_batch_size=data.batch_size,
        mean_tokens=data.tokens,
        max_tokens=data.tokens,
        label_share=label_share,
        steps=PASSES * data.num_batches,
        dtype_bytes=2,
    )


def flops_of(plan: Plan, model: RandomModel, data: Data, label_share: float) -> float:
    """Of one steady step (runtime.md 1.1); the peers compute the head for every token."""
    shape, tokens = model.shape, data.batch_size * data.tokens
    if not plan.assignment:
        pairs = LORA_RANK * sum(sum(spec.shape) for spec in shape.block_tensors() if len(spec.shape) == 2)
        layer = frozen_block_flops(shape, data.tokens) + 6.0 * pairs
        return tokens * (shape.num_layers * layer + head_flops(shape, 1.0))
    assigned = ASSIGNMENTS[plan.assignment]
    expansion = assigned.plan(model.config(), "0" * 64)
    layout = layout_of(expansion)
    share = label_share if plan.system in OURS else 1.0
    step = step_flops(shape, layout, assigned.trained(expansion), workload(data, share))
    if plan.system == "ours":
        return step
    return step + tokens * layout.base_cut * forward_block_flops(shape, data.tokens)


def measure_model(
    name: str,
    model: RandomModel,
    timer: Timer,
    peaks: Peaks,
    budget: Budget,
    *,
    work: Path,
    sizes: Sequence[Data],
    assignments: Sequence[str],
    say: Callable[[str], None] = print,
    lost: Collection[str] = (),
) -> list[dict[str, Any]]:
    """All systems on one model, in turn; each size is tokens a step.

    A system that raises has rows with its error; those for which no time is left say so.

    Args:
        lost: names of systems that left the device unusable before; they are not tried again.

    Raises:
        DeviceLostError: one did so now.
    """
    device = timer.device
    weights = RandomWeights(model, device)
    todo = plans(assignments)
    found: dict[tuple[str, int, float], Turns] = {}
    failed: dict[tuple[str, int, float], dict[str, Any]] = {}
    kept: dict[str, Opened] = {}

    def conditions(plan: Plan) -> Iterator[tuple[Data, float, tuple[str, int, float]]]:
        for data in sizes:
            for share in plan.labels:
                yield data, share, (plan.name, data.batch_size * data.tokens, share)

    def fail(plan: Plan, status: str, reason: str) -> None:
        for _, _, key in conditions(plan):
            if key not in found:
                failed.setdefault(key, {"status": status, "reason": reason})

    def check(plan: Plan) -> None:
        if not usable(device):
            raise DeviceLostError((name, plan.name), [])

    for plan in todo:
        if plan.name in lost:
            fail(plan, "error", "left the device unusable")
    for again in (False, True):
        for plan in todo:
            if plan.name in lost:
                continue
            if budget.spent and not again:
                fail(plan, "skipped", "the time budget of this model is spent")
                continue
            if again and (plan.name not in kept or budget.spent):
                continue
            opened = kept.get(plan.name)
            try:
                if opened is None:
                    before = _allocated(device)
                    system = open_system(plan, model, weights, device=device, work=work, data=sizes[0])
                    opened = Opened(system=system, own_bytes=_allocated(device) - before)
            except ImportError as error:
                fail(plan, "missing", describe_error(error))
                continue
            except Exception as error:  # noqa: BLE001 - a peer may raise anything
                fail(plan, "error", describe_error(error))
                say(f"  {name:<8} {plan.name}: {describe_error(error)[:150]}")
                check(plan)
                _clean(device)
                continue
            _measure_system(plan, opened, conditions(plan), timer, budget, found, failed)
            check(plan)
            if not again:
                for _, _, key in conditions(plan):
                    if key in found:
                        row = row_of(found[key], flops_of(plan, model, _data(sizes, key), key[2]), key[1], peaks)
                        say("  " + step_line(name, plan, key, row))
            _clean(device)
            if _share_free(device) > KEEP_FREE:
                kept[plan.name] = opened
            else:
                opened.system.close()
                kept.pop(plan.name, None)
            del opened
            _clean(device)
    for opened in kept.values():
        opened.system.close()
    kept.clear()
    _clean(device)
    rows: list[dict[str, Any]] = []
    for plan in todo:
        for data, share, key in conditions(plan):
            common = {
                "shape": name,
                "system": plan.system,
                "assignment": plan.assignment,
                "labels": share,
                "tokens_per_step": key[1],
                "tokens_per_sequence": data.tokens,
                "steps_per_pass": data.num_batches,
                "passes": PASSES,
                "graphs": GRAPHS,
            }
            if key in found and key not in failed:
                rows.append({**common, **row_of(found[key], flops_of(plan, model, data, share), key[1], peaks)})
            else:
                rows.append({**common, **failed[key]})
    _compare(rows)
    return rows


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Into each row of ours: how many times the others' tokens/s over the passes, and what share of their memory."""
    done = {_key(row): row for row in rows if row["status"] == "ok"}
    for row in done.values():
        if row["system"] != "ours":
            continue
        for other in (*ADAPTERS, *SAME_BLOCKS, "ours, no cache"):
            theirs = done.get((other, "" if other in ADAPTERS else row["assignment"], *_key(row)[2:]))
            if theirs is not None:
                row.setdefault("against", {})[other] = {
                    "speedup_step": row["tokens_per_s_step"] / theirs["tokens_per_s_step"],
                    "speedup_passes": row["tokens_per_s_passes"] / theirs["tokens_per_s_passes"],
                    "peak_ratio": row["peak_bytes"] / max(1, theirs["peak_bytes"]),
                    "largest_loss_difference": max(
                        abs(a - b) for a, b in zip(row["losses"], theirs["losses"], strict=False)
                    ),
                }


def _key(row: Mapping[str, Any]) -> tuple[str, str, int, float]:
    return row["system"], row["assignment"], row["tokens_per_step"], row["labels"]


def _measure_system(
    plan: Plan,
    opened: Opened,
    conditions: Iterator[tuple[Data, float, tuple[str, int, float]]],
    timer: Timer,
    budget: Budget,
    found: dict[tuple[str, int, float], Turns],
    failed: dict[tuple[str, int, float], dict[str, Any]],
) -> None:
    """Its turn in every condition; one warm-up step before its first."""
    system = opened.system
    for data, share, key in conditions:
        if key in failed:
            continue
        if budget.spent:
            if key not in found:
                failed[key] = {"status": "skipped", "reason": "the time budget of this model is spent"}
            continue
        wanted = Series(steps=PASSES * data.num_batches, label_share=share)
        turns = found.get(key) or Turns()
        try:
            system.take(data)
            if not opened.warm:
                take_turn(opened, replace(wanted, steps=1), timer, Turns())
                opened.warm = True
            system.reset()
            take_turn(opened, wanted, timer, turns)
            turns.held = system.held
            if isinstance(system, OursOnDevice) and plan.system == "ours":
                turns.predicted_bytes = system.predicted_bytes(share)
            found[key] = turns
        except Exception as error:  # noqa: BLE001 - out of memory, or whatever a peer raises
            failed[key] = {"status": "error", "reason": describe_error(error)}
            if not usable(timer.device):
                return
            _clean(timer.device)


def _data(sizes: Sequence[Data], key: tuple[str, int, float]) -> Data:
    return next(data for data in sizes if data.batch_size * data.tokens == key[1])


def step_line(name: str, plan: Plan, key: tuple[str, int, float], row: Mapping[str, Any]) -> str:
    """One condition for people."""
    predicted = row.get("predicted_error")
    return (
        f"{name:<8} {plan.name:<28} {key[1]:>5} tokens, {key[2]:>4.0%} labels: "
        f"{row['tokens_per_s_step']:>9.0f} tokens/s a step, {row['tokens_per_s_passes']:>9.0f} over {PASSES} passes, "
        f"{row['share_of_roofline']:>4.0%} of the roofline, {row['peak_bytes'] / 2**30:.2f} GiB"
        + (f" (predicted {predicted:+.1%})" if predicted is not None else "")
    )


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _free_bytes(device: torch.device) -> int:
    from fedblocks.edge_client.memory import free_bytes

    return free_bytes(device)


def _share_free(device: torch.device) -> float:
    if device.type != "cuda":
        return 1.0
    return _free_bytes(device) / torch.cuda.get_device_properties(device).total_memory


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
