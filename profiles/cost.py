"""What do training steps, transfers and memory cost for a model of this shape on this device?

Pure arithmetic without torch: FLOPs, seconds and bytes as functions of the model's sizes, of the positions of the
expanded blocks in the stack and of the device's rates.
The formulas are those of docs/runtime.md 1.1 (FLOPs) and 4.1 (memory) and docs/methods.md 6.2 (time) and 7.1 (bytes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Final, Literal

from fedblocks.profiles.device import Accelerator, DeviceProfile
from fedblocks.profiles.model_shape import ModelShape

PayloadFormat = Literal["int8", "bf16", "fp32"]

#: Bytes per weight of a double-quantised NF4 matrix: codes, 8-bit scales, one fp32 per 256 scales (runtime.md 4.1).
NF4_BYTES_PER_WEIGHT: Final = 0.5 + 1 / 64 + 4 / (64 * 256)
#: Bytes moved per trained parameter by one AdamW step: w, g, m, v read, w, m, v written, all fp32 (runtime.md 5.2).
OPTIMIZER_BYTES_MOVED: Final = 28
#: Rows of logits that exist at once (methods.md 6.2).
LOGITS_CHUNK_ROWS: Final = 256
#: One token's teacher record: 32 log-probabilities and ids of four bytes each, and the tail (methods.md 5.2).
TEACHER_BYTES_PER_TOKEN: Final = 260


@dataclass(frozen=True, slots=True, kw_only=True)
class StackLayout:
    """Where the expanded blocks stand in the expanded stack, position 0 at the bottom.

    Raises:
        ValueError: no block, a position outside the stack, or two blocks at one position.
    """

    num_entries: int
    """L' = base layers + expanded blocks."""
    positions: Mapping[int, int]
    """Block id -> position in the stack."""

    def __post_init__(self) -> None:
        taken = sorted(self.positions.values())
        if not taken or taken[0] < 0 or taken[-1] >= self.num_entries or len(set(taken)) != len(taken):
            raise ValueError(
                f"stack layout: positions are {dict(self.positions)} in a stack of {self.num_entries}, expected at "
                "least one block, each at a place of its own inside the stack"
            )

    @property
    def base_cut(self) -> int:
        """Position of the lowest expanded block: what lies below is the same for the whole run and is cached."""
        return min(self.positions.values())

    @property
    def blocks(self) -> tuple[int, ...]:
        """Block ids from the bottom of the stack to the top."""
        return tuple(sorted(self.positions, key=lambda block: self.positions[block]))

    @property
    def top_block(self) -> int:
        """The highest block: the cheapest to train."""
        return self.blocks[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One client's work of a round, apart from the choice of blocks.

    Raises:
        ValueError: a count below its smallest useful value, or a share outside 0..1.
    """

    batch_size: int
    """Sequences per optimizer step."""
    micro_batch_size: int
    """Sequences per forward pass."""
    mean_tokens: float
    """Tokens per sequence, for time."""
    max_tokens: int
    """Tokens of the longest sequence, for memory: a batch is padded to it."""
    label_share: float
    """Share of the tokens that carry a label."""
    steps: int
    anchor_batch_size: int = 0
    """Anchor sequences per anchored step; 0 for training without an anchor."""
    anchor_tokens: int = 1
    """Tokens per anchor sequence."""
    anchor_every: int = 1
    dtype_bytes: int = 4
    """Bytes of one activation and of one decoded weight: 4 for fp32, 2 for bf16."""
    new_tokens: float = 0.0
    """Tokens of this round whose prefix is not cached yet."""
    new_anchor_tokens: float = 0.0
    """The same for anchor tokens; they also need the teacher's pass."""
    measure_tokens: float = 0.0
    """Tokens that run forward only, to measure the state before training."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "max_tokens", "steps", "anchor_tokens", "anchor_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"workload: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("anchor_batch_size", "new_tokens", "new_anchor_tokens", "measure_tokens"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"workload: {name} is {getattr(self, name)}, expected 0 or more")
        if not 0 < self.mean_tokens <= self.max_tokens:
            raise ValueError(
                f"workload: mean_tokens is {self.mean_tokens}, expected above 0 and at most max_tokens "
                f"({self.max_tokens})"
            )
        if not 0 <= self.label_share <= 1:
            raise ValueError(f"workload: label_share is {self.label_share}, expected a number in [0, 1]")
        if self.dtype_bytes not in (2, 4):
            raise ValueError(f"workload: dtype_bytes is {self.dtype_bytes}, expected 2 or 4")


@lru_cache(maxsize=64)
def _sizes(shape: ModelShape) -> tuple[int, int]:
    """P and p_blk: a plan of many clients asks for them thousands of times."""
    return shape.linear_parameters, shape.block_parameters


# FLOPs per token (runtime.md 1.1). ``context`` is the length of the sequence that the token stands in.


def attention_flops(shape: ModelShape, context: float) -> float:
    """a = 2·s·q: causal QKᵀ and PV of one token, half of the pairs masked."""
    return 2.0 * context * shape.q_size


def forward_block_flops(shape: ModelShape, context: float) -> float:
    """2P + a: a block that only runs forward."""
    return 2.0 * _sizes(shape)[0] + attention_flops(shape, context)


def trained_block_flops(shape: ModelShape, context: float) -> float:
    """6P + 3.5a: forward, input and weight gradients, attention backward with recomputation."""
    return 6.0 * _sizes(shape)[0] + 3.5 * attention_flops(shape, context)


def frozen_block_flops(shape: ModelShape, context: float) -> float:
    """4P + 3.5a: a frozen block above a trained one, which passes the gradient on."""
    return 4.0 * _sizes(shape)[0] + 3.5 * attention_flops(shape, context)


def head_flops(shape: ModelShape, label_share: float) -> float:
    """4VH·f: frozen head, forward and input gradient, on the rows that carry a label."""
    return 4.0 * shape.vocab_size * shape.hidden_size * label_share


def prefix_flops(shape: ModelShape, layout: StackLayout, context: float) -> float:
    """The blocks below the base cut, run once per sample and then cached."""
    return layout.base_cut * forward_block_flops(shape, context)


def suffix_flops(shape: ModelShape, layout: StackLayout, blocks: Iterable[int], context: float) -> float:
    """The stack from the base cut up, without the head: forward up to the lowest trained block, both ways above it.

    Raises:
        ValueError: no block, or one that the layout does not hold.
    """
    low, count = _low_and_count(layout, blocks)
    above = layout.num_entries - low
    return (
        (low - layout.base_cut) * forward_block_flops(shape, context)
        + count * trained_block_flops(shape, context)
        + (above - count) * frozen_block_flops(shape, context)
    )


def step_flops(shape: ModelShape, layout: StackLayout, blocks: Iterable[int], work: Workload) -> float:
    """FLOPs of one optimizer step with a warm prefix cache: the batch, and its share of the anchor batch."""
    blocks = tuple(blocks)
    task_tokens = work.batch_size * work.mean_tokens
    anchor_tokens = work.anchor_batch_size * work.anchor_tokens / work.anchor_every
    return task_tokens * (
        suffix_flops(shape, layout, blocks, work.mean_tokens) + head_flops(shape, work.label_share)
    ) + anchor_tokens * (suffix_flops(shape, layout, blocks, work.anchor_tokens) + head_flops(shape, 1.0))


# Seconds (methods.md 6.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeBreakdown:
    """Predicted seconds of one client's round, from receiving the assignment to the end of the upload."""

    download_s: float
    fill_s: float
    """First prefix (and teacher) pass over samples that are not cached yet."""
    measure_s: float
    step_s: float
    """One optimizer step."""
    train_s: float
    """All steps."""
    upload_s: float

    @property
    def total_s(self) -> float:
        """Everything; compared with the deadline."""
        return self.download_s + self.fill_s + self.measure_s + self.train_s + self.upload_s


def step_time(
    device: DeviceProfile, shape: ModelShape, layout: StackLayout, blocks: Iterable[int], work: Workload
) -> float:
    """Seconds of one optimizer step with a warm prefix cache.

    Arithmetic at the device's matrix rate, the optimizer's traffic at its memory rate, the cached hidden states at its
    disk rate, and the fixed overhead as often as the batches are cut into more forward passes than they need.
    """
    blocks = tuple(blocks)
    tokens = work.batch_size * work.mean_tokens + work.anchor_batch_size * work.anchor_tokens / work.anchor_every
    anchored = 1 / work.anchor_every if work.anchor_batch_size else 0.0
    passes = math.ceil(work.batch_size / work.micro_batch_size)
    passes += anchored * math.ceil(work.anchor_batch_size / work.micro_batch_size)
    return (
        device.step_overhead_s * passes / (1 + anchored)
        + step_flops(shape, layout, blocks, work) / device.gemm_flops_per_s
        + OPTIMIZER_BYTES_MOVED * len(set(blocks)) * _sizes(shape)[1] / device.memory_bytes_per_s
        + tokens * shape.hidden_size * work.dtype_bytes / device.disk_read_bytes_per_s
    )


def round_time(
    device: DeviceProfile,
    shape: ModelShape,
    layout: StackLayout,
    blocks: Iterable[int],
    work: Workload,
    *,
    upload_num_bytes: int,
    download_num_bytes: int,
    scale: float = 1.0,
) -> TimeBreakdown:
    """Seconds of a whole round; ``scale`` corrects the computed parts (not the transfers) by measured / predicted."""
    step_s = scale * step_time(device, shape, layout, blocks, work)
    return TimeBreakdown(
        download_s=download_num_bytes / device.downlink_bytes_per_s,
        fill_s=scale * fill_flops(shape, layout, work) / device.gemm_flops_per_s,
        measure_s=measure_time(device, shape, layout, work, scale=scale),
        step_s=step_s,
        train_s=work.steps * step_s,
        upload_s=upload_num_bytes / device.uplink_bytes_per_s,
    )


def fill_flops(shape: ModelShape, layout: StackLayout, work: Workload) -> float:
    """First pass over samples that are not cached: the prefix, and for anchor samples the base's remaining layers and
    its head as well (the teacher is the stack without the expanded blocks)."""
    base_above = layout.num_entries - layout.base_cut - len(layout.positions)
    teacher = base_above * forward_block_flops(shape, work.anchor_tokens) + 2.0 * shape.vocab_size * shape.hidden_size
    return work.new_tokens * prefix_flops(shape, layout, work.mean_tokens) + work.new_anchor_tokens * (
        prefix_flops(shape, layout, work.anchor_tokens) + teacher
    )


def measure_time(
    device: DeviceProfile, shape: ModelShape, layout: StackLayout, work: Workload, *, scale: float = 1.0
) -> float:
    """Seconds to run ``work.measure_tokens`` forward from the base cut through the head."""
    context = max(work.mean_tokens, work.anchor_tokens if work.anchor_batch_size else 0)
    per_token = (layout.num_entries - layout.base_cut) * forward_block_flops(shape, context)
    per_token += 2.0 * shape.vocab_size * shape.hidden_size
    return scale * work.measure_tokens * per_token / device.gemm_flops_per_s


# Bytes on the wire (methods.md 7)


@lru_cache(maxsize=1024)
def upload_bytes(
    shape: ModelShape, num_blocks: int, payload_format: PayloadFormat = "int8", density: float = 1.0
) -> int:
    """Largest payload of an upload of ``num_blocks`` whole blocks; all-zero rows make it smaller (methods.md 7.1).

    int8: per matrix ``kr·C + 4·kr`` and, below density 1, a bitmap of ``ceil(R/8)``; per vector ``C + 4``.
    bf16 and fp32 are dense: 2 and 4 bytes per value.

    Raises:
        ValueError: a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"upload: density is {density}, expected a number in (0, 1]")
    if payload_format != "int8":
        return num_blocks * _sizes(shape)[1] * (2 if payload_format == "bf16" else 4)
    total = 0
    for spec in shape.block_tensors():
        rows, columns = spec.rows_cols
        if len(spec.shape) == 1:
            total += columns + 4
            continue
        kept = math.ceil(density * rows)
        total += kept * (columns + 4) + (0 if density == 1 else math.ceil(rows / 8))
    return num_blocks * total


def download_bytes(
    shape: ModelShape,
    num_blocks: int,
    payload_format: PayloadFormat = "int8",
    density: float = 1.0,
    versions_behind: int = 1,
) -> int:
    """Largest payload of catching up: each version replayed, or an fp32 snapshot if that is smaller (methods.md 7.2).

    ``num_blocks`` counts all expanded blocks of the run; a client at version 0 of a run that has not started passes
    ``versions_behind`` 0.
    """
    replay = versions_behind * upload_bytes(shape, num_blocks, payload_format, density)
    return min(replay, upload_bytes(shape, num_blocks, "fp32"))


# Memory (runtime.md 4.1)

#: Share of the transient bytes that a caching or fragmenting allocator holds on top of them. CUDA: the 6 % of
#: runtime.md 4.1. CPU: glibc's heap under plain autograd; fitted, with the floor below, to 13 measured assignments of
#: the starter model (peaks of 9 to 56 MiB, largest error 1.2 MiB).
ALLOCATOR_SHARE: Final[Mapping[Accelerator, float]] = {"cpu": 0.22, "cuda": 0.06}
#: What the first training step leaves behind whatever its size: arenas, thread stacks, library buffers (CPU, same fit).
ALLOCATOR_FLOOR_BYTES: Final = 15 * 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBreakdown:
    """Predicted bytes above the imports, by what they hold; ``work`` and ``logits`` never exist at the same time."""

    runtime: int
    """R: context, workspaces, and what the process holds before a model is loaded."""
    packed: int
    """One NF4 layer on its way from the file to its decoded form."""
    decoded: int
    """The base layers above the cut, and one below it while it is read, decoded."""
    blocks: int
    """All expanded blocks: fp32 value, and the accumulated delta that it was made from."""
    head: int
    """Embedding and head (once if tied)."""
    trained: int
    """What training adds per trained parameter: gradient and two moments, and the compute copy where there is one."""
    activations: int
    """Saved for the backward pass, of the larger of a task and an anchor pass."""
    inputs: int
    """Cached hidden states and teacher records of one step."""
    work: int
    """Temporaries of one block's forward and backward."""
    logits: int
    """One chunk of logits and their gradient."""
    allocator: int
    """What the allocator holds beyond the live bytes."""

    @property
    def peak(self) -> int:
        """Sum of the terms, with the larger of ``work`` and ``logits``."""
        fixed = sum(getattr(self, f.name) for f in fields(self) if f.name not in ("work", "logits"))
        return fixed + max(self.work, self.logits)

    @property
    def largest(self) -> str:
        """Name of the largest term besides R."""
        return max((f.name for f in fields(self) if f.name != "runtime"), key=lambda name: int(getattr(self, name)))


def saved_bytes_trained(shape: ModelShape) -> int:
    """Bytes per token that autograd keeps for one trained block in 2-byte activations (runtime.md 4.3, hf trained)."""
    q, kv, h, i = shape.q_size, shape.kv_size, shape.hidden_size, shape.intermediate_size
    return 2 * (q + 2 * kv) + 2 * q + 8 * i + 16 * h + 4 * shape.head_dim + 4 * shape.num_heads + 8


def saved_bytes_frozen(shape: ModelShape) -> int:
    """The same for a frozen block above a trained one (hf frozen): its matrices keep no input."""
    return saved_bytes_trained(shape) - 2 * shape.intermediate_size - 8 * shape.hidden_size


def peak_memory(
    shape: ModelShape,
    layout: StackLayout,
    blocks: Iterable[int],
    work: Workload,
    *,
    runtime_bytes: int = 0,
    accelerator: Accelerator = "cpu",
) -> MemoryBreakdown:
    """Bytes above the imports while training ``blocks`` with exact fp32 weights and plain autograd.

    A trained parameter costs 16 bytes (weight, gradient, two moments, all fp32), 18 where the arithmetic reads a 2-byte
    copy (runtime.md 4.2): 4 of them are in ``blocks``, the rest in ``trained``.
    Task and anchor micro-batches run forward and backward one after the other, so only the larger one counts.
    """
    low, count = _low_and_count(layout, blocks)
    above = layout.num_entries - low
    saved = count * saved_bytes_trained(shape) + (above - count) * saved_bytes_frozen(shape)
    added_bytes = 12 if work.dtype_bytes == 4 else 14
    return _breakdown(
        shape,
        layout,
        work,
        runtime_bytes=runtime_bytes,
        accelerator=accelerator,
        trained=count * _sizes(shape)[1] * added_bytes,
        activations=_pass_tokens(work) * saved * work.dtype_bytes // 2,
    )


def measure_memory(
    shape: ModelShape,
    layout: StackLayout,
    work: Workload,
    *,
    runtime_bytes: int = 0,
    accelerator: Accelerator = "cpu",
) -> MemoryBreakdown:
    """Bytes above the imports while only measuring: no gradients, no optimizer, no saved activations."""
    return _breakdown(
        shape, layout, work, runtime_bytes=runtime_bytes, accelerator=accelerator, trained=0, activations=0
    )


def _breakdown(
    shape: ModelShape,
    layout: StackLayout,
    work: Workload,
    *,
    runtime_bytes: int,
    accelerator: Accelerator,
    trained: int,
    activations: int,
) -> MemoryBreakdown:
    linear, block = _sizes(shape)
    vectors = block - linear
    tokens = _pass_tokens(work)
    task_tokens, anchor_tokens = work.batch_size * work.max_tokens, work.anchor_batch_size * work.anchor_tokens
    temporaries = tokens * (8 * shape.hidden_size + 6 * shape.intermediate_size) * work.dtype_bytes // 2
    logits = 8 * min(LOGITS_CHUNK_ROWS, tokens) * shape.vocab_size + 4 * shape.hidden_size * tokens
    transient = activations + max(temporaries, logits)
    return MemoryBreakdown(
        runtime=runtime_bytes,
        packed=math.ceil(linear * NF4_BYTES_PER_WEIGHT + 4 * vectors),
        decoded=(layout.num_entries - layout.base_cut - len(layout.positions) + 1) * block * work.dtype_bytes,
        blocks=8 * len(layout.positions) * block,
        head=(1 if shape.tied_embeddings else 2) * shape.vocab_size * shape.hidden_size * work.dtype_bytes,
        trained=trained,
        activations=activations,
        inputs=(task_tokens + anchor_tokens) * shape.hidden_size * work.dtype_bytes
        + anchor_tokens * TEACHER_BYTES_PER_TOKEN,
        work=temporaries,
        logits=logits,
        allocator=ALLOCATOR_FLOOR_BYTES + math.ceil(ALLOCATOR_SHARE[accelerator] * transient),
    )


def _pass_tokens(work: Workload) -> int:
    """Tokens of the largest forward pass: task and anchor sequences run in passes of their own."""
    task = min(work.micro_batch_size, work.batch_size) * work.max_tokens
    return max(task, min(work.micro_batch_size, work.anchor_batch_size) * work.anchor_tokens)


def _low_and_count(layout: StackLayout, blocks: Iterable[int]) -> tuple[int, int]:
    chosen = set(blocks)
    unknown = chosen - set(layout.positions)
    if not chosen or unknown:
        raise ValueError(
            f"blocks are {sorted(chosen)}, expected at least one of {sorted(layout.positions)}"
            + (f"; unknown: {sorted(unknown)}" if unknown else "")
        )
    return min(layout.positions[block] for block in chosen), len(chosen)
