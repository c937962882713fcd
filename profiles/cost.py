"""What do training steps, transfers and memory cost for a model of this shape on this device, and which mode is best?

Pure arithmetic without torch: FLOPs, seconds and bytes as functions of the model's sizes, of the positions of the
expanded blocks in the stack, of the device's rates and of the mode in which the work is done. Aggregator and client
choose the mode with the same function, :func:`choose_mode`.
The formulas are those of docs/runtime.md 1.1 (FLOPs) and 4 (memory, modes) and docs/methods.md 6.2 (time) and 7.1
(bytes).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Final, Literal, NamedTuple

from fedblocks.profiles.device import Accelerator, DeviceProfile
from fedblocks.profiles.model_shape import ChosenRows, ModelShape
from fedblocks.profiles.units import (
    EXPANDED_BLOCKS,
    BaseTensors,
    ExpandedBlocks,
    LowRankPairs,
    PersonalPairs,
    Trainable,
    TrainedUnits,
    Units,
    unit_parameters,
    unit_tensors,
)

PayloadFormat = Literal["int8", "bf16", "fp32"]
OptimizerMode = Literal["fp32", "split", "split_8bit"]
"""How a trained value, its gradient and its moments are stored (runtime.md 4.2); the weights are exact in all three."""
Residency = Literal["resident", "suffix"]
"""Are the layers below the cut (packed) and the embedding table held in memory, or read when they are needed?"""
FrozenForm = Literal["decoded", "nf4"]
"""Frozen base layers above the cut: decoded once and held, or held packed and decoded at each use."""
Phase = Literal["state", "prefix", "measuring", "training", "delta", "encoding"]
"""Of a task: taking the published state, the first pass over samples, measuring, the steps, trained minus start, and
the update's bytes."""

#: Bytes per weight of a double-quantised NF4 matrix: codes, 8-bit scales, one fp32 per 256 scales (runtime.md 4.1).
NF4_BYTES_PER_WEIGHT: Final = 0.5 + 1 / 64 + 4 / (64 * 256)
#: Bytes moved per trained parameter by one AdamW step, all fp32: w, g, m, v read, w, m, v written (runtime.md 5.2).
OPTIMIZER_BYTES_MOVED: Final = 28
#: What it takes on top, as if it were traffic, where weights are kept in two halves and where moments have 8 bits.
#: Measured on one CPU thread that copies 21 GB/s, on which plain fp32 takes what the 28 bytes promise.
HALVES_BYTES_MOVED: Final = 16
MOMENTS_8BIT_BYTES_MOVED: Final = 60
#: The same per weight that is decoded from NF4. CPU: measured like that (0.8 ns); CUDA: read, written, read again.
NF4_DECODE_BYTES_MOVED: Final[Mapping[Accelerator, float]] = {"cpu": 18, "cuda": 4.5}
#: What a CPU's step takes beyond what its probe promises. Attention runs at this share of the matrix rate; what a pass
#: over tokens writes is memory that the system has just given and takes back (``edge_client/memory.py``), and a product
#: of few rows waits for its weights: so many times what a copy of the same bytes takes. Measured on one CPU thread
#: (benchmarks/bench_cost_model.py); a client's own steps correct them (``calibration.py``). Not applied to rates that
#: nobody probed (a catalog's are estimates for whole steps), nor on a GPU, where it was not measured.
ATTENTION_RATE_SHARE: Final = 0.2
ACTIVATION_COPIES: Final = 10
WEIGHT_COPIES: Final = 5
#: Tokens that go through the prefix together: each of its layers is read and decoded once for them (runtime.md 2.2).
WAVE_TOKENS: Final[Mapping[Accelerator, int]] = {"cpu": 4096, "cuda": 16384}
#: Rows of the topmost block are computed apart up to this share of rows with a label (runtime.md 1, item 8).
ROWS_APART_SHARE: Final = 0.9
#: Differences of predicted time below this share do not justify an approximation: it is the accuracy that predictions
#: are held to (runtime.md 10). Below the second share they are none.
TIME_TOLERANCE: Final = 0.15
SAME_TIME: Final = 0.01
#: Batches whose gradient tells a client which rows of its pairs to train (``edge_client/row_scores.py``).
SCORING_BATCHES: Final = 2
#: Share of the memory above R that a prediction may fill; R itself is measured, not predicted (methods.md 6.1).
MEMORY_SAFETY: Final = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class StackLayout:
    """Where the expanded blocks, or what else trains, stand in the stack, position 0 at the bottom.

    Raises:
        ValueError: no block, a position outside the stack, or two blocks at one position.
    """

    num_entries: int
    """L' = base layers + expanded blocks."""
    positions: Mapping[int, int]
    """Block id -> position in the stack."""
    trainable: Trainable = EXPANDED_BLOCKS
    """What trains at these positions (``profiles/units.py``)."""
    beside: Mapping[int, int] = field(default_factory=dict[int, int])
    """Units that stand nowhere in the stack and always train (the tables, an extra set) -> their parameters."""

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
    def num_held(self) -> int:
        """Entries of the stack that are kept as expanded blocks are: in the compute dtype, beside the frozen layers."""
        return 0 if isinstance(self.trainable, LowRankPairs) else len(self.positions)

    @property
    def teacher_layers(self) -> int:
        """Base layers from the cut up, through which the teacher goes."""
        added = len(self.positions) if isinstance(self.trainable, ExpandedBlocks) else 0
        return self.num_entries - self.base_cut - added

    @property
    def trains_tables(self) -> bool:
        """Do embedding, final norm and head train?"""
        return isinstance(self.trainable, BaseTensors) and self.trainable.tables

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
    """Most sequences per forward pass."""
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
    fresh_share: float = 1.0
    """Share of the steps' samples that run through the frozen part below the lowest trained block; below 1 where the
    round keeps its own cache there (first use over uses)."""
    fresh_anchor_share: float = 1.0
    """The same of anchor sequences."""
    keeps_start: bool = False
    """The values that training started from are kept beside those that train (the proximal term)."""
    cache_bytes: int = 0
    """Hidden states that are kept in memory instead of files: the round's own cache, or all."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "max_tokens", "steps", "anchor_tokens", "anchor_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"workload: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("anchor_batch_size", "new_tokens", "new_anchor_tokens", "measure_tokens", "cache_bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"workload: {name} is {getattr(self, name)}, expected 0 or more")
        if not 0 < self.mean_tokens <= self.max_tokens:
            raise ValueError(
                f"workload: mean_tokens is {self.mean_tokens}, expected above 0 and at most max_tokens "
                f"({self.max_tokens})"
            )
        for name in ("label_share", "fresh_share", "fresh_anchor_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"workload: {name} is {getattr(self, name)}, expected a number in [0, 1]")
        if self.dtype_bytes not in (2, 4):
            raise ValueError(f"workload: dtype_bytes is {self.dtype_bytes}, expected 2 or 4")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionMode:
    """How an assignment is carried out; the weights are exact in every mode (runtime.md 4).

    Raises:
        ValueError: no sequence per forward pass.
    """

    optimizer: OptimizerMode = "fp32"
    residency: Residency = "suffix"
    frozen: FrozenForm = "decoded"
    micro_batch_size: int = 1
    """Sequences per forward pass."""
    checkpoint: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError(f"execution mode: micro_batch_size is {self.micro_batch_size}, expected at least 1")

    @property
    def approximate(self) -> bool:
        """True where the moments are rounded."""
        return self.optimizer == "split_8bit"

    def special(self) -> tuple[str, ...]:
        """What it does otherwise than usual, apart from smaller passes: ``recomputed activations``, ..."""
        each = (
            ("recomputed activations", self.checkpoint),
            ("frozen layers decoded at each use", self.frozen == "nf4"),
            ("8-bit moments", self.optimizer == "split_8bit"),
            ("the whole backbone in memory", self.residency == "resident"),
        )
        return tuple(text for text, used in each if used)

    def text(self) -> str:
        """E.g. ``2 sequences at a time, with recomputed activations and 8-bit moments``."""
        many = "s" if self.micro_batch_size > 1 else ""
        return f"{self.micro_batch_size} sequence{many} at a time{with_special(self)}"


def with_special(mode: ExecutionMode) -> str:
    """``, with recomputed activations and 8-bit moments``; nothing for a usual mode."""
    *parts, last = mode.special() or ("",)
    return f", with {', '.join(parts)} and {last}" if parts else f", with {last}" if last else ""


def usual_mode(work: Workload) -> ExecutionMode:
    """Nothing is rounded, recomputed or decoded twice: what is fastest where memory does not matter."""
    return ExecutionMode(
        optimizer="fp32" if work.dtype_bytes == 4 else "split",
        micro_batch_size=min(work.micro_batch_size, work.batch_size),
    )


@lru_cache(maxsize=64)
def _sizes(shape: ModelShape) -> tuple[int, int]:
    """P and p_blk: a plan of many clients asks for them thousands of times."""
    return shape.linear_parameters, shape.block_parameters


@lru_cache(maxsize=256)
def _slice_sizes(shape: ModelShape, width: float) -> tuple[int, int, int]:
    """What trains in a block of this width: parameters of its matrices, all its parameters, its largest matrix as the
    client holds it (q, k and v are one, and so are gate and up)."""
    tensors = shape.block_tensors(width)
    linear = sum(t.size for t in tensors if len(t.shape) == 2)
    heads, kv_heads, neurons = shape.slice_sizes(width)
    joined = (neurons if shape.encoder else 2 * neurons, (heads + 2 * kv_heads) * shape.head_dim)
    return linear, sum(t.size for t in tensors), shape.hidden_size * max(joined)


@lru_cache(maxsize=256)
def _pair_sizes(shape: ModelShape, pairs: LowRankPairs, width: float) -> tuple[int, int, int]:
    """The same of the low-rank pairs over one layer."""
    specs = unit_tensors(TrainedUnits(shape=shape, trainable=pairs), 0, width)
    total = sum(spec.size for spec in specs)
    return total, total, max(spec.size for spec in specs)


@lru_cache(maxsize=256)
def _prior_sizes(shape: ModelShape, pairs: PersonalPairs) -> tuple[int, int]:
    """Of one layer: parameters of the frozen prior, and of B with all its rows."""
    units = TrainedUnits(shape=shape, trainable=pairs)
    held = sum(spec.size for spec in unit_tensors(units.held(), 0))
    return held, sum(spec.size for spec in unit_tensors(units, 0) if spec.is_out)


def _scoring_steps(layout: StackLayout, of: _Set) -> int:
    """Passes before the first step, from which a client learns which rows to train (methods.md 10.2)."""
    return SCORING_BATCHES if isinstance(layout.trainable, PersonalPairs) and of.width < 1.0 else 0


def _trained_sizes(shape: ModelShape, layout: StackLayout, width: float) -> tuple[int, int, int]:
    """What trains at one position of the layout."""
    if isinstance(layout.trainable, LowRankPairs):
        return _pair_sizes(shape, layout.trainable, width)
    return _slice_sizes(shape, 1.0 if isinstance(layout.trainable, BaseTensors) else width)


class _Set(NamedTuple):
    """What the cost of a set of trained blocks depends on: all sets that agree in these cost the same."""

    low: int
    """Position of the lowest."""
    size: int
    top_trains: bool
    """Whether one stands at the top of the stack, where only rows with a label are computed."""
    width: float = 1.0
    """Share of each that trains."""


def _set_of(layout: StackLayout, blocks: Iterable[int], width: float = 1.0) -> _Set:
    chosen = set(blocks) - layout.beside.keys()
    positions = layout.positions
    if not chosen or not chosen <= positions.keys():
        unknown = sorted(chosen - positions.keys())
        raise ValueError(
            f"blocks are {sorted(chosen)}, expected at least one of {sorted(positions)}"
            + (f"; unknown: {unknown}" if unknown else "")
        )
    taken = [positions[block] for block in chosen]
    return _Set(min(taken), len(taken), max(taken) == layout.num_entries - 1, width)


# FLOPs per token (runtime.md 1.1). ``context`` is the length of the sequence that the token stands in. ``rows`` is the
# share of the tokens of which more than keys and values is computed: below 1 in the topmost block only.


def attention_flops(shape: ModelShape, context: float) -> float:
    """a = 2·s·q: causal QKᵀ and PV of one token, half of the pairs masked; twice that in an encoder."""
    return (4.0 if shape.encoder else 2.0) * context * shape.q_size


def _block_flops(shape: ModelShape, context: float, rows: float, products: float, attentions: float) -> float:
    """``products`` products with every matrix and ``attentions`` times a; the rows stand at the samples' ends."""
    keys_values = 2 * shape.hidden_size * shape.kv_size
    linear = keys_values + rows * (_sizes(shape)[0] - keys_values)
    return products * linear + attentions * attention_flops(shape, context) * (1 - (1 - rows) ** 2)


def forward_block_flops(shape: ModelShape, context: float, rows: float = 1.0) -> float:
    """2P + a: a block that only runs forward."""
    return _block_flops(shape, context, rows, 2.0, 1.0)


def trained_block_flops(shape: ModelShape, context: float, rows: float = 1.0, width: float = 1.0) -> float:
    """6P + 3.5a: forward, input and weight gradients, attention backward with recomputation.

    Of a slim block: 4P + 2P_w + 3.5a, since only the weight gradients of its slice are computed.
    """
    if width == 1.0:
        return _block_flops(shape, context, rows, 6.0, 3.5)
    _, kv_heads, _ = shape.slice_sizes(width)
    keys_values = 2 * shape.hidden_size * kv_heads * shape.head_dim
    weights = 2.0 * (keys_values + rows * (_slice_sizes(shape, width)[0] - keys_values))
    return _block_flops(shape, context, rows, 4.0, 3.5) + weights


def frozen_block_flops(shape: ModelShape, context: float, rows: float = 1.0) -> float:
    """4P + 3.5a: a frozen block above a trained one, which passes the gradient on."""
    return _block_flops(shape, context, rows, 4.0, 3.5)


def head_flops(shape: ModelShape, label_share: float) -> float:
    """4VH·f: frozen head, forward and input gradient, on the rows that carry a label."""
    return 4.0 * shape.head_rows * shape.hidden_size * label_share


def prefix_flops(shape: ModelShape, layout: StackLayout, context: float) -> float:
    """The blocks below the base cut, run once per sample and then cached."""
    return layout.base_cut * forward_block_flops(shape, context)


def suffix_flops(
    shape: ModelShape,
    layout: StackLayout,
    blocks: Iterable[int],
    context: float,
    label_share: float = 1.0,
    *,
    fresh_share: float = 1.0,
    checkpoint: bool = False,
) -> float:
    """The stack from the base cut up, without the head: forward up to the lowest trained block, both ways above it.

    Args:
        label_share: f; where that saves something, the topmost block computes the rows with a label alone.
        fresh_share: of the tokens that run through the frozen part below the lowest trained block; the others are
            found in the round's own cache.
        checkpoint: with the recomputation of every block that passes a gradient.

    Raises:
        ValueError: no block, or one that the layout does not hold.
    """
    of = _set_of(layout, blocks)
    token = _token_flops(shape, layout, context, label_share, of.width)
    below, above = of.low - layout.base_cut, layout.num_entries - of.low - 1
    return _suffix_flops(of, token, below=fresh_share * below, above=above, checkpoint=checkpoint)


class _TokenFlops(NamedTuple):
    """Of one token in one block, in sequences of one length; in the topmost block, of a token of which only some rows
    may be wanted."""

    forward: float
    frozen: float
    trained: float
    top_forward: float
    top_frozen: float
    top_trained: float
    pairs: int
    """Parameters of the pairs of one layer."""
    prior: float
    """FLOPs of a token in their frozen prior, in all layers: its products, and the gradient of its inputs."""


def _token_flops(
    shape: ModelShape, layout: StackLayout, context: float, label_share: float, width: float
) -> _TokenFlops:
    trainable = layout.trainable
    pairs = _trained_sizes(shape, layout, width)[0] if isinstance(trainable, LowRankPairs) else 0
    prior = 0.0
    if isinstance(trainable, PersonalPairs):
        prior = 4.0 * layout.num_entries * _prior_sizes(shape, trainable)[0]
    if isinstance(trainable, BaseTensors):
        width = 1.0
    whole = (
        forward_block_flops(shape, context),
        frozen_block_flops(shape, context),
        trained_block_flops(shape, context, width=width),
    )
    rows = _rows_of(layout, label_share)
    if rows == 1:
        return _TokenFlops(*whole, *whole, pairs, prior)
    return _TokenFlops(
        *whole,
        forward_block_flops(shape, context, rows),
        frozen_block_flops(shape, context, rows),
        trained_block_flops(shape, context, rows, width),
        pairs,
        prior,
    )


def _suffix_flops(of: _Set, token: _TokenFlops, *, below: float, above: int, checkpoint: bool) -> float:
    """Of a token.

    Args:
        below: blocks between the base cut and the lowest trained one, times the share that runs through them.
        above: blocks with a gradient, the topmost left out.
    """
    trained = of.size - of.top_trains
    total, top = 0.0, token.top_trained if of.top_trains else token.top_frozen
    if token.pairs:  # two products forward, two each for the gradients of inputs and pairs
        trained, total, top = 0, 6.0 * of.size * token.pairs, token.top_frozen
    total += token.prior
    total += below * token.forward
    total += trained * token.trained
    total += (above - trained) * token.frozen
    total += top
    if checkpoint:
        total += above * token.forward + token.top_forward
    return total


def _rows_apart(label_share: float) -> float:
    return label_share if label_share <= ROWS_APART_SHARE else 1.0


def _rows_of(layout: StackLayout, label_share: float) -> float:
    """Of a layer with low-rank pairs all rows are computed."""
    return 1.0 if isinstance(layout.trainable, LowRankPairs) else _rows_apart(label_share)


def step_flops(
    shape: ModelShape,
    layout: StackLayout,
    blocks: Iterable[int],
    work: Workload,
    *,
    checkpoint: bool = False,
) -> float:
    """FLOPs of one optimizer step with a warm prefix cache: the batch, and its share of the anchor batch."""
    of = _set_of(layout, blocks)
    below, above = of.low - layout.base_cut, layout.num_entries - of.low - 1
    return _step_flops(of, _token_kinds(shape, layout, work), below=below, above=above, checkpoint=checkpoint)


class _TokenKind(NamedTuple):
    """The tokens of a step that are alike: those of the batch, or those of its share of the anchor batch."""

    tokens: float
    """Of a step."""
    fresh: float
    """Share that runs below the lowest trained block."""
    rows: float
    """Share whose rows are wanted of the topmost block."""
    attention: float
    """FLOPs of a token's attention in one block (a)."""
    head: float
    """FLOPs of a token in the head, both ways."""
    blocks: _TokenFlops


def _token_kinds(shape: ModelShape, layout: StackLayout, work: Workload, width: float = 1.0) -> tuple[_TokenKind, ...]:
    kinds: list[tuple[float, float, float, float]] = [
        (work.batch_size * work.mean_tokens, work.mean_tokens, work.label_share, work.fresh_share)
    ]
    if work.anchor_batch_size:
        tokens = work.anchor_batch_size * work.anchor_tokens / work.anchor_every
        kinds.append((tokens, work.anchor_tokens, 1.0, work.fresh_anchor_share))
    return tuple(
        _TokenKind(
            tokens=tokens,
            fresh=fresh,
            rows=_rows_of(layout, share),
            attention=attention_flops(shape, context),
            head=(1.5 if layout.trains_tables else 1.0) * head_flops(shape, share),
            blocks=_token_flops(shape, layout, context, share, width),
        )
        for tokens, context, share, fresh in kinds
    )


def _step_flops(of: _Set, kinds: Iterable[_TokenKind], *, below: int, above: int, checkpoint: bool) -> float:
    return sum(
        kind.tokens
        * (_suffix_flops(of, kind.blocks, below=kind.fresh * below, above=above, checkpoint=checkpoint) + kind.head)
        for kind in kinds
    )


def fill_flops(shape: ModelShape, layout: StackLayout, work: Workload) -> float:
    """First pass over samples that are not cached: the prefix, and for anchor samples the base's remaining layers and
    its head as well (the teacher is the stack without the expanded blocks)."""
    teacher = (
        layout.teacher_layers * forward_block_flops(shape, work.anchor_tokens)
        + 2.0 * shape.head_rows * shape.hidden_size
    )
    return work.new_tokens * prefix_flops(shape, layout, work.mean_tokens) + work.new_anchor_tokens * (
        prefix_flops(shape, layout, work.anchor_tokens) + teacher
    )


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


class StepParts(NamedTuple):
    """Predicted seconds of one step by what they are spent on; their sum is the step."""

    arithmetic_s: float
    """Products with matrices, the head's included."""
    attention_s: float
    activations_s: float
    """What the tokens leave in memory on their way, and the cached states that are read."""
    weights_s: float
    """Weights that are read, gradients that are written, decoding, and the optimizer."""
    overhead_s: float
    """Of each pass, whatever its size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeFactors:
    """What a device's own steps have shown of the predictions from its profile: measured over predicted, by part."""

    arithmetic: float = 1.0
    attention: float = 1.0
    activations: float = 1.0
    weights: float = 1.0
    overhead: float = 1.0
    prefix: float = 1.0
    """Of the first pass over samples."""
    measuring: float = 1.0

    def step_s(self, parts: StepParts) -> float:
        """Seconds of a step with these parts."""
        return self.with_passes(self.of_tokens(*parts[:3]), parts.weights_s, parts.overhead_s)

    def of_tokens(self, arithmetic_s: float, attention_s: float, activations_s: float) -> float:
        """Seconds of the parts that take as long however a step is cut into passes."""
        return self.arithmetic * arithmetic_s + self.attention * attention_s + self.activations * activations_s

    def with_passes(self, tokens_s: float, weights_s: float, overhead_s: float) -> float:
        """The whole step, from these and from the parts that each pass adds to."""
        return tokens_s + self.weights * weights_s + self.overhead * overhead_s


AS_PROFILED: Final = TimeFactors()


class _SetParts(NamedTuple):
    """Of a set of blocks, with or without recomputation: what no other choice changes, and what each pass adds."""

    arithmetic_s: float
    attention_s: float
    activations_s: float
    weights_s: float
    """Of each pass."""
    decoding_s: float
    """Of each pass in which frozen layers are decoded: each going forward, those with a gradient going back, and once
    more between where they are computed again."""
    trained: int
    """Parameters that the optimizer steps."""


class _Time:
    """The time of one client's work; what several modes share is computed once."""

    def __init__(
        self,
        device: DeviceProfile,
        shape: ModelShape,
        layout: StackLayout,
        work: Workload,
        factors: TimeFactors = AS_PROFILED,
    ) -> None:
        self._device, self._shape, self._layout, self._work = device, shape, layout, work
        self._factors = factors
        linear, self._block = _sizes(shape)
        self._decode_layer_s = NF4_DECODE_BYTES_MOVED[device.accelerator] * linear / device.memory_bytes_per_s
        anchor_tokens = work.anchor_batch_size * work.anchor_tokens / work.anchor_every
        state_bytes = (work.batch_size * work.mean_tokens + anchor_tokens) * shape.hidden_size * work.dtype_bytes
        self._read_s = state_bytes / device.disk_read_bytes_per_s
        self._base_cut, self._entries = layout.base_cut, layout.num_entries
        self._held_at = tuple(sorted(layout.positions.values())) if layout.num_held else ()
        self._base_above_cut = layout.num_entries - layout.base_cut - layout.num_held
        self._beside = sum(layout.beside.values())
        #: Of a token in a block: residual and norm of both halves; gate, up, product; q, k, v; attention's output.
        self._token_elements = 4 * shape.hidden_size + 3 * (shape.intermediate_size + shape.q_size + shape.kv_size)
        # The overhead was measured on steps of one pass of each kind.
        kinds = 1 + (1 / work.anchor_every if work.anchor_batch_size else 0.0)
        self._pass_overhead_s = device.step_overhead_s / kinds
        self._passes_of: dict[int, float] = {}
        self._at_width: dict[float, tuple[int, tuple[_TokenKind, ...]]] = {}
        self._parts: dict[tuple[_Set, bool], tuple[_SetParts, float]] = {}
        self._fill: dict[Residency, float] = {}

    def step_s(self, of: _Set, mode: ExecutionMode) -> float:
        """Seconds of one step."""
        parts, tokens_s = self._parts.get((of, mode.checkpoint)) or self._add_parts(of, mode.checkpoint)
        passes = self._passes_of.get(mode.micro_batch_size) or self._add_passes(mode.micro_batch_size)
        weights_s = self._weights_s(parts, passes, mode)
        return self._factors.with_passes(tokens_s, weights_s, passes * self._pass_overhead_s)

    def step_parts(self, of: _Set, mode: ExecutionMode) -> StepParts:
        """The same by part, and as the profile alone predicts it."""
        parts, _ = self._add_parts(of, mode.checkpoint)
        passes = self._add_passes(mode.micro_batch_size)
        return StepParts(
            parts.arithmetic_s,
            parts.attention_s,
            parts.activations_s,
            self._weights_s(parts, passes, mode),
            passes * self._pass_overhead_s,
        )

    def _weights_s(self, parts: _SetParts, passes: float, mode: ExecutionMode) -> float:
        """Of all passes and of the optimizer."""
        moved = OPTIMIZER_BYTES_MOVED + (MOMENTS_8BIT_BYTES_MOVED if mode.optimizer == "split_8bit" else 0)
        if self._work.dtype_bytes == 2 and mode.optimizer != "fp32":
            moved += HALVES_BYTES_MOVED
        per_pass_s = parts.weights_s + (parts.decoding_s if mode.frozen == "nf4" else 0.0)
        return passes * per_pass_s + moved * parts.trained / self._device.memory_bytes_per_s

    def _add_passes(self, micro_batch_size: int) -> float:
        """Forward passes of one step, on average over the steps."""
        work = self._work
        passes = math.ceil(work.batch_size / micro_batch_size)
        found = passes + math.ceil(work.anchor_batch_size / micro_batch_size) / work.anchor_every
        self._passes_of[micro_batch_size] = found
        return found

    def _add_parts(self, of: _Set, checkpoint: bool) -> tuple[_SetParts, float]:
        """The parts, and the seconds of those that do not depend on the passes."""
        parts = self._parts_of(of, checkpoint)
        tokens_s = self._factors.of_tokens(parts.arithmetic_s, parts.attention_s, parts.activations_s)
        found = self._parts[of, checkpoint] = parts, tokens_s
        return found

    def _parts_of(self, of: _Set, checkpoint: bool) -> _SetParts:
        device, shape, work = self._device, self._shape, self._work
        below = of.low - self._base_cut
        above = self._entries - of.low - 1  # with a gradient, the topmost left out
        if of.width not in self._at_width:
            trained = _trained_sizes(shape, self._layout, of.width)[1]
            self._at_width[of.width] = trained, _token_kinds(shape, self._layout, work, of.width)
        trained, kinds = self._at_width[of.width]
        attention = 0.0
        for kind in kinds:
            backward = (4.5 if checkpoint else 3.5) * (above + 1 - (1 - kind.rows) ** 2)
            attention += kind.tokens * (kind.fresh * below + backward) * kind.attention
        flops = _step_flops(of, kinds, below=below, above=above, checkpoint=checkpoint)
        trained = of.size * trained + self._beside
        held = len(self._held_at) - bisect_left(self._held_at, of.low)
        frozen_above = above + 1 - held
        decoded = work.fresh_share * (self._base_above_cut - frozen_above) + (3 if checkpoint else 2) * frozen_above
        arithmetic_s, attention_s = (flops - attention) / device.gemm_flops_per_s, attention / device.gemm_flops_per_s
        decoding_s = decoded * self._decode_layer_s
        if device.accelerator != "cpu" or device.source != "measured":
            return _SetParts(arithmetic_s, attention_s, self._read_s, 0.0, decoding_s, trained)
        tokens_in_blocks = 0.0
        for kind in kinds:
            tokens_in_blocks += kind.tokens * (kind.fresh * below + (4 if checkpoint else 3) * (above + kind.rows))
        # Read going forward, going back, and once more between; gradients are read and written where passes add up.
        weights = (below + (3 if checkpoint else 2) * (above + 1)) * self._block
        weights += 2 * trained + 2 * shape.head_rows * shape.hidden_size
        copy_s = work.dtype_bytes / device.memory_bytes_per_s
        return _SetParts(
            arithmetic_s,
            attention_s / ATTENTION_RATE_SHARE,
            ACTIVATION_COPIES * copy_s * self._token_elements * tokens_in_blocks + self._read_s,
            WEIGHT_COPIES * copy_s * weights,
            decoding_s,
            trained,
        )

    def fill_s(self, residency: Residency) -> float:
        """Seconds of the first pass: its arithmetic, each prefix layer decoded once a wave, and what its reading takes
        longer than the computation behind which it is hidden (runtime.md 2.2)."""
        if residency not in self._fill:
            self._fill[residency] = self._factors.prefix * self._fill_s(residency)
        return self._fill[residency]

    def _fill_s(self, residency: Residency) -> float:
        device, shape, layout, work = self._device, self._shape, self._layout, self._work
        tokens = work.new_tokens + work.new_anchor_tokens
        layers = math.ceil(tokens / WAVE_TOKENS[device.accelerator]) * layout.base_cut
        decode_s = layers * self._decode_layer_s
        arithmetic_s = fill_flops(shape, layout, work) / device.gemm_flops_per_s
        if residency == "resident":
            return arithmetic_s + decode_s
        prefix_s = decode_s + tokens * prefix_flops(shape, layout, work.mean_tokens) / device.gemm_flops_per_s
        read_s = layers * _sizes(shape)[0] * NF4_BYTES_PER_WEIGHT / device.disk_read_bytes_per_s
        return arithmetic_s + decode_s + max(0.0, read_s - prefix_s)


def step_time(
    device: DeviceProfile,
    shape: ModelShape,
    layout: StackLayout,
    blocks: Iterable[int],
    work: Workload,
    mode: ExecutionMode | None = None,
    width: float = 1.0,
) -> float:
    """Seconds of one optimizer step with a warm prefix cache.

    Arithmetic at the device's matrix rate; the traffic of activations, weights, optimizer and decoding at its memory
    rate; the cached hidden states at its disk rate; and the fixed overhead as often as the batches are cut into more
    forward passes than they need.

    Args:
        mode: default :func:`usual_mode`.
    """
    return AS_PROFILED.step_s(step_parts(device, shape, layout, blocks, work, mode, width))


def step_parts(
    device: DeviceProfile,
    shape: ModelShape,
    layout: StackLayout,
    blocks: Iterable[int],
    work: Workload,
    mode: ExecutionMode | None = None,
    width: float = 1.0,
) -> StepParts:
    """:func:`step_time` by what the seconds are spent on."""
    return _Time(device, shape, layout, work).step_parts(_set_of(layout, blocks, width), mode or usual_mode(work))


def fill_time(
    device: DeviceProfile, shape: ModelShape, layout: StackLayout, work: Workload, residency: Residency = "suffix"
) -> float:
    """Seconds of the first pass over samples that are not cached yet."""
    return _Time(device, shape, layout, work).fill_s(residency)


def round_time(
    device: DeviceProfile,
    shape: ModelShape,
    layout: StackLayout,
    blocks: Iterable[int],
    work: Workload,
    mode: ExecutionMode | None = None,
    *,
    upload_num_bytes: int,
    download_num_bytes: int,
    scale: float = 1.0,
    width: float = 1.0,
) -> TimeBreakdown:
    """Seconds of a whole round; ``scale`` corrects the computed parts (not the transfers) by measured / predicted."""
    mode = mode or usual_mode(work)
    time = _Time(device, shape, layout, work)
    of = _set_of(layout, blocks, width)
    step_s = scale * time.step_s(of, mode)
    return TimeBreakdown(
        download_s=download_num_bytes / device.downlink_bytes_per_s,
        fill_s=scale * time.fill_s(mode.residency),
        measure_s=measure_time(device, shape, layout, work, scale=scale),
        step_s=step_s,
        train_s=(work.steps + _scoring_steps(layout, of)) * step_s,
        upload_s=upload_num_bytes / device.uplink_bytes_per_s,
    )


def measure_time(
    device: DeviceProfile, shape: ModelShape, layout: StackLayout, work: Workload, *, scale: float = 1.0
) -> float:
    """Seconds to run ``work.measure_tokens`` forward from the base cut through the head."""
    context = max(work.mean_tokens, work.anchor_tokens if work.anchor_batch_size else 0)
    per_token = (layout.num_entries - layout.base_cut) * forward_block_flops(shape, context)
    per_token += 2.0 * shape.head_rows * shape.hidden_size
    return scale * work.measure_tokens * per_token / device.gemm_flops_per_s


# Bytes on the wire (methods.md 7)


@lru_cache(maxsize=1024)
def upload_bytes(
    shape: ModelShape,
    num_blocks: int,
    payload_format: PayloadFormat = "int8",
    density: float = 1.0,
    width: float = 1.0,
) -> int:
    """Largest payload of an upload of ``num_blocks`` blocks of this width; all-zero rows make it smaller.

    Source: methods.md 7.1.

    int8: per matrix ``kr·C + 4·kr`` and, below density 1, a bitmap of ``ceil(R/8)``; per vector ``C + 4``.
    bf16 and fp32 are dense: 2 and 4 bytes per value.

    Raises:
        ValueError: a density outside (0, 1].
    """
    return num_blocks * unit_bytes(shape, 0, payload_format, density, width)


@lru_cache(maxsize=4096)
def unit_bytes(
    of: Units, unit: int, payload_format: PayloadFormat = "int8", density: float = 1.0, width: float = 1.0
) -> int:
    """The part of one unit in such a payload.

    Raises:
        ValueError: a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"upload: density is {density}, expected a number in (0, 1]")
    total = sum(math.ceil(spec.num_rows / 8) for spec in unit_tensors(of, unit, width) if isinstance(spec, ChosenRows))
    if payload_format != "int8":
        return total + unit_parameters(of, unit, width) * (2 if payload_format == "bf16" else 4)
    for spec in unit_tensors(of, unit, width):
        rows, columns = spec.rows_cols
        if len(spec.shape) == 1:
            total += columns + 4
            continue
        kept = math.ceil(density * rows)
        total += kept * (columns + 4) + (0 if density == 1 else math.ceil(rows / 8))
    return total


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


# Memory (runtime.md 4): what a client holds at each moment of a task

#: Tokens of one forward pass of the prefix (runtime.md 2.2): more fall out of a CPU's cache, fewer leave a GPU idle.
PREFIX_BATCH_TOKENS: Final[Mapping[Accelerator, int]] = {"cpu": 512, "cuda": 2048}
#: The buffer of logits, the least number of its rows, and how much of it is widened to fp32 at a time (runtime.md 3).
LOGITS_BYTES: Final = 64 << 20
LOGITS_MIN_ROWS: Final = 256
LOGITS_ROW_MULTIPLE: Final = 32
LOGITS_PIECE_BYTES: Final = 4 << 20
#: One anchor token's teacher record in memory: 32 ids of eight bytes, 32 log-probabilities, the tail.
TEACHER_RECORD_BYTES: Final = 388
#: Code tables and header of a packed matrix, whatever its size.
NF4_MATRIX_BYTES: Final = 4 * (16 + 256) + 512
#: Gradient, and moments, per trained value; the value itself takes four bytes in every mode (runtime.md 4.2).
GRADIENT_BYTES: Final = 4
MOMENT_BYTES: Final[Mapping[OptimizerMode, float]] = {"fp32": 8, "split": 8, "split_8bit": 2 + 2 * 4 / 256}
#: Elements that the optimizer has in fp32 at a time where weights or moments are stored otherwise, and its buffers.
OPTIMIZER_CHUNK: Final = 1 << 18
OPTIMIZER_CHUNK_BUFFERS: Final = 5
#: Beside the live bytes: a constant, and a share of the temporaries.
#: CUDA: the 6 % of runtime.md 4.1. CPU, measured (benchmarks/results/memory.json, and clients over many rounds): blocks
#: of 256 KiB or more go back to the system when they are freed (``edge_client/memory.py``); smaller ones leave holes in
#: the heap, in a very small model up to half of what is live there, which is why the share ends at a few MiB. The
#: constant is buffers of the libraries (2 MiB, never given back), 1 MiB held from one task to the next, and holes.
#: Where passes are repeated, a quarter of what is not kept stays as holes, up to the last of these.
#: The matrix library keeps its compiled bf16 kernels and their scratch memory.
ALLOCATOR_SHARE: Final[Mapping[Accelerator, float]] = {"cpu": 0.35, "cuda": 0.06}
ALLOCATOR_MOST_TEMPORARIES: Final[Mapping[Accelerator, float]] = {"cpu": 22 << 20, "cuda": math.inf}
ALLOCATOR_FLOOR_BYTES: Final = 51 << 17
RECOMPUTING_BYTES: Final[Mapping[Accelerator, int]] = {"cpu": 2 << 20, "cuda": 0}
CPU_BF16_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBreakdown:
    """Predicted bytes above the imports at the moment of a task that takes the most, by what they hold."""

    phase: Phase
    runtime: int
    """R: context, workspaces, and what the process holds before a model is loaded."""
    frozen: int
    """Base layers, decoded or packed: those that are held, and those on their way from the files."""
    blocks: int
    """Expanded blocks that do not train."""
    head: int
    """The head's matrix, and the embedding's where it is held and is another."""
    trained: int
    """Values that train, with gradients and moments, or with the change that they have made."""
    activations: int
    """Saved for the backward pass."""
    inputs: int
    """Cached hidden states and teacher records of one step, and what is kept in memory for the round."""
    work: int
    """Temporaries: of a block's passes, of the head, of the optimizer, of the encoder."""
    allocator: int
    """What the allocator and the libraries hold beyond the live bytes."""

    @property
    def peak(self) -> int:
        """Sum of the terms."""
        held = self.frozen + self.blocks + self.head + self.trained
        return self.runtime + held + self.activations + self.inputs + self.work + self.allocator

    @property
    def largest(self) -> str:
        """Name of the largest term besides R."""
        names = (f.name for f in fields(self) if f.name not in ("phase", "runtime"))
        return max(names, key=lambda name: int(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class SavedBytes:
    """What our block keeps for its backward pass (``edge_client/decoder_block.py``), to the byte.

    That is its input, q, k and v after the rotation, the attention's output and normaliser, the residual between the
    halves, gate and up, and one number per row of each norm; where the block trains, the inputs of its matrices too:
    both norms' outputs and silu(gate)·up. Keys and values that several query heads share are kept as often as the
    attention reads them.
    On a GPU (``fused``) a block keeps the same whether it trains or not: inputs of its matrices are made again. There
    attention reads shared keys as they are (``shared_keys``), save where only some rows are computed.
    """

    every: int
    """Per token, whether its row is wanted or not."""
    row: int
    """Per token on top of that, where all rows are computed."""
    wanted_row: int
    """Per wanted row instead of that, where only those are computed."""
    mask: int
    """The same per wanted row and token of its sample: the attention mask."""

    @classmethod
    def of(
        cls, shape: ModelShape, dtype_bytes: int, *, trained: bool, fused: bool = False, shared_keys: bool = False
    ) -> SavedBytes:
        """Of one block; activations take ``dtype_bytes`` each."""
        h, i, q, kv = shape.hidden_size, shape.intermediate_size, shape.q_size, shape.kv_size
        if shape.encoder:
            # q, k, v, attention's output, what norms and GELU read; where weights train also what they multiply.
            kept = q + 3 * h + 2 * kv + i + ((2 * h + i) if trained else 0)
            numbers = 4 * shape.num_heads + 2 * 2 * 4
            row = dtype_bytes * kept + numbers
            return cls(every=0, row=row, wanted_row=row, mask=dtype_bytes)
        repeated = 1 < shape.num_kv_heads < shape.num_heads  # a single head is repeated by a view
        if shape.qk_norm:  # the norms keep what was projected; what is rotated is q and k apart
            every, row, wanted = 2 * kv + (2 * q if repeated else kv), 2 * q, 2 * q
        else:  # q and k are rotated together and stay together; v stays where it was projected, unless it is repeated
            every, row, wanted = (2 * q, q + kv, q) if repeated else (3 * kv, 2 * q, q)
        half = h + q + 2 * i
        if trained:
            every, wanted = every + h, wanted + h
            half += 0 if fused else h + i
        if fused and not shape.qk_norm:  # one tensor of q, k and v, and nothing of the norm, however much was added
            row = q + 2 * kv + (2 * q if repeated and not shared_keys else 0) - every
        norms = (4 * shape.num_heads, 4 * shape.num_kv_heads) if shape.qk_norm else (0, 0)
        numbers = 4 * shape.num_heads + 4 + norms[0]
        return cls(
            every=dtype_bytes * (h + every) + 4 + norms[1],
            row=dtype_bytes * (row + half) + numbers,
            wanted_row=dtype_bytes * (wanted + half + 2 * shape.head_dim) + numbers + 8,
            mask=dtype_bytes,
        )

    def total(self, sequences: int, tokens: int, rows: float = 1.0) -> int:
        """Bytes of sequences of this many tokens, with the same share of rows wanted in each."""
        if rows == 1:
            return sequences * tokens * (self.every + self.row)
        wanted = math.ceil(rows * tokens)
        return sequences * (tokens * self.every + wanted * (self.wanted_row + self.mask * tokens))


class _Moment(NamedTuple):
    phase: Phase
    frozen: int
    blocks: int
    head: int
    trained: int
    activations: int
    inputs: int
    work: int

    @property
    def live(self) -> int:
        return self.frozen + self.blocks + self.head + self.trained + self.activations + self.inputs + self.work


class _Pass(NamedTuple):
    """Bytes of one kind of forward and backward pass, of the task's samples or of the anchor's, whatever trains.

    Of pairs of numbers the first is of a frozen block, the second of one that trains.
    """

    repeated: bool
    """Whether gradients are there already when it begins."""
    states: int
    """The hidden states of all tokens."""
    below: int
    """Temporaries of the frozen layers below the lowest trained block."""
    head: int
    """Temporaries of the head, with the logits."""
    saved: tuple[int, int]
    """What a block keeps for its backward pass."""
    saved_on_top: tuple[int, int]
    """The same of the topmost block, of which only some rows may be computed."""
    states_back: int
    """Hidden states and their gradient in a block's backward pass."""
    states_back_on_top: int
    work: tuple[int, int]
    """Other temporaries of that."""
    work_on_top: tuple[int, int]


class _Resting(NamedTuple):
    """Bytes that so many blocks take in a mode, wherever they stand and however large the passes are."""

    outside: int
    """Of the moment outside the passes that takes the most, allocator included."""
    frozen: int
    blocks: int
    head: int
    trained: int
    """Beside the passes: values and moments, and gradients where they have buffers that stay."""
    scored: int
    """What there is instead while rows are scored; 0 where none are."""


_Use = tuple[int, int, int]
"""Bytes of gradients, of what is saved for the backward pass, and of temporaries."""


def _most(uses: Iterable[_Use]) -> _Use:
    """The first of the largest."""
    most, found = 0, (0, 0, 0)
    for use in uses:
        total = use[0] + use[1] + use[2]
        if total > most:
            most, found = total, use
    return found


class _Memory:
    """The memory of one client's work; what does not depend on blocks and mode is computed once."""

    def __init__(self, shape: ModelShape, layout: StackLayout, work: Workload, accelerator: Accelerator) -> None:
        self._accelerator: Accelerator = accelerator
        self._work, e = work, work.dtype_bytes
        h, i, q, kv = shape.hidden_size, shape.intermediate_size, shape.q_size, shape.kv_size
        linear, self._block = _sizes(shape)
        self._shape = shape
        self._e, self._h, self._i = e, h, i
        self._layout = layout
        self._base_cut, self._entries, self._num_blocks = layout.base_cut, layout.num_entries, layout.num_held
        self._held_at = tuple(sorted(layout.positions.values())) if layout.num_held else ()
        self._base_above = layout.num_entries - layout.base_cut - layout.num_held
        self._pairs = isinstance(layout.trainable, LowRankPairs)
        self._merged = isinstance(layout.trainable, LowRankPairs) and layout.trainable.merged
        self._prior = self._all_rows = 0
        if isinstance(layout.trainable, PersonalPairs):
            prior, rows = _prior_sizes(shape, layout.trainable)
            self._prior, self._all_rows = prior * layout.num_entries * e, rows * layout.num_entries
        self._value_bytes = 8 if work.keeps_start else 4
        self._beside = sum(layout.beside.values())
        vectors = self._block - linear
        self._packed = math.ceil(linear * NF4_BYTES_PER_WEIGHT) + 4 * vectors + 7 * NF4_MATRIX_BYTES
        self._largest = max(2 * h * i, (q + 2 * kv) * h)
        """Elements of the largest matrix: gate and up are one."""
        self._largest_tensor = max(h * i, q * h)
        table = shape.vocab_size * h * e
        self._vocab = shape.head_rows
        self._head = 0 if shape.encoder else table
        self._embedding = 0 if shape.tied_embeddings and not shape.encoder else table
        # Read in the checkpoint's two bytes, then widened.
        self._head_reading = shape.head_rows * h * 2 if e == 4 else 0
        on_gpu = accelerator == "cuda"
        fused = on_gpu and not self._pairs
        self._saved = {
            trained: SavedBytes.of(shape, e, trained=trained, fused=fused, shared_keys=on_gpu)
            for trained in (False, True)
        }
        #: Per token of a forward pass without a tape: residual, norm, gate, up, their product; q, k, v; what attention
        #: gave.
        self._forward = e * (2 * h + 3 * i + 3 * q + 3 * kv)
        self._inputs = work.cache_bytes + (
            (work.batch_size * work.max_tokens + work.anchor_batch_size * work.anchor_tokens) * h * e
            + work.anchor_batch_size * work.anchor_tokens * TEACHER_RECORD_BYTES
        )
        longest = max(work.max_tokens, work.anchor_tokens if work.anchor_batch_size else 0)
        tokens = work.steps * (work.batch_size * work.mean_tokens + work.anchor_batch_size * work.anchor_tokens)
        wave = max(longest, min(WAVE_TOKENS[accelerator], math.ceil(tokens)))
        batch = max(longest, min(wave, PREFIX_BATCH_TOKENS[accelerator] // longest * longest))
        self._prefix_work = wave * h * e + batch * self._forward
        library = CPU_BF16_BYTES if accelerator == "cpu" and e == 2 else 0
        self._allocator_base = ALLOCATOR_FLOOR_BYTES + library
        self._allocator_share = ALLOCATOR_SHARE[accelerator]
        self._allocator_most = ALLOCATOR_MOST_TEMPORARIES[accelerator]
        self._recomputing_bytes = RECOMPUTING_BYTES[accelerator]
        self._before: dict[tuple[FrozenForm, Residency], tuple[int, _Moment]] = {}
        self._resting: dict[tuple[int, float, OptimizerMode, FrozenForm, Residency], _Resting] = {}
        self._passes: dict[tuple[_Set, int, bool, bool], tuple[_Use, _Use]] = {}
        self._kinds_of: dict[int, tuple[_Pass, ...]] = {}
        self._slices: dict[float, tuple[int, int, int]] = {}
        self._measuring_work = longest * self._forward + self._logits(max(longest, 256))

    def _logits(self, rows: int) -> int:
        """The buffer of logits for this many rows, and what is widened of it."""
        if self._vocab == 0:
            return 0
        most = min(max(LOGITS_BYTES // (self._vocab * self._e), LOGITS_MIN_ROWS), rows)
        if most == 0:
            return 0
        even = math.ceil(rows / math.ceil(rows / most))
        chunk = min(math.ceil(even / LOGITS_ROW_MULTIPLE) * LOGITS_ROW_MULTIPLE, most)
        piece = min(chunk, max(1, LOGITS_PIECE_BYTES // (4 * self._vocab)))
        return self._vocab * (chunk * self._e + (0 if self._e == 4 else 4 * piece))

    def _frozen(self, mode: ExecutionMode) -> int:
        layer = self._block * self._e if mode.frozen == "decoded" else self._packed
        if self._merged:  # changed and decoded, beside the packed bytes of the base
            layer += self._packed
        below = self._base_cut * self._packed if mode.residency == "resident" else 0
        return self._base_above * layer + below + self._prior

    def _tables(self, mode: ExecutionMode) -> int:
        return self._head + (self._embedding if mode.residency == "resident" else 0)

    def before_training(self, mode: ExecutionMode) -> _Moment:
        """Taking the state, the first pass over the samples, and measuring: all expanded blocks are frozen."""
        found = self._before.get((mode.frozen, mode.residency)) or self._add_before(mode)
        return found[1]

    def _most_before(self, mode: ExecutionMode) -> int:
        """What that moment takes, allocator included."""
        found = self._before.get((mode.frozen, mode.residency)) or self._add_before(mode)
        return found[0]

    def _add_before(self, mode: ExecutionMode) -> tuple[int, _Moment]:
        moment = max(self._before_training(mode), key=self.with_allocator)
        found = self._before[mode.frozen, mode.residency] = self.with_allocator(moment), moment
        return found

    def _before_training(self, mode: ExecutionMode) -> Iterator[_Moment]:
        frozen, head, block = self._frozen(mode), self._tables(mode), self._block
        blocks = self._num_blocks * block * self._e
        kept = self._work.cache_bytes
        yield _Moment("state", 0, 0, 0, 0, 0, kept, self._num_blocks * block * 5)
        if self._base_cut:
            streamed = block * self._e + (0 if mode.residency == "resident" else 2 * self._packed)
            yield _Moment("prefix", frozen + streamed, blocks, head, 0, 0, kept, self._prefix_work)
        if isinstance(self._layout.trainable, BaseTensors) and self._work.anchor_batch_size:  # the teacher: the base
            tables = self._beside * self._e if self._layout.trains_tables else 0
            yield _Moment("prefix", frozen + blocks, blocks, head + tables, 0, 0, kept, self._measuring_work)
        work = max(self._measuring_work + self._decoding(mode), self._head_reading)
        yield _Moment("measuring", frozen, blocks, head, 0, 0, kept, work)

    def after_training(self, of: _Set, mode: ExecutionMode) -> tuple[_Moment, _Moment]:
        """The change that the steps have made, one tensor after the other, and its encoding, beside nothing else."""
        return self._after_training(self._trained(of), self._frozen(mode), self._not_training(of), self._tables(mode))

    def _after_training(self, trained: int, frozen: int, blocks: int, head: int) -> tuple[_Moment, _Moment]:
        largest, kept = min(self._largest_tensor, trained), self._work.cache_bytes
        # Start and difference of one tensor, and its value where that is in two halves; the start is read in 2 bytes.
        work = largest * ((8 if self._e == 4 else 12) + 2)
        change = 8 * trained - 4 * largest
        return (
            _Moment("delta", frozen, blocks, head, change, 0, kept, work),
            # Value, change, what is still owed, codes at the usual density; what was owed of one tensor, and its clip.
            _Moment("encoding", 0, 0, 0, 12 * trained + trained // 4, 0, kept, 8 * largest),
        )

    def training(self, of: _Set, mode: ExecutionMode) -> tuple[_Moment, ...]:
        """The worst moment of a pass, the optimizer's step, and the passes that score rows."""
        at_rest = self._at_rest(of, mode)
        gradients, saved, work = self._worst_of_pass(of, mode)
        frozen, blocks, head = at_rest.frozen, at_rest.blocks, at_rest.head
        found = (
            _Moment("training", frozen, blocks, head, at_rest.trained + gradients, saved, self._inputs, work),
            self._step_moment(of, mode),
        )
        if not at_rest.scored:
            return found
        return (*found, _Moment("training", frozen, blocks, head, at_rest.scored, saved, self._inputs, work))

    def _at_rest(self, of: _Set, mode: ExecutionMode) -> _Resting:
        key = (of.size, of.width, mode.optimizer, mode.frozen, mode.residency)
        found = self._resting.get(key)
        if found is None:
            found = self._resting[key] = self._resting_of(of, mode)
        return found

    def _resting_of(self, of: _Set, mode: ExecutionMode) -> _Resting:
        trained = self._trained(of)
        frozen, blocks, head = self._frozen(mode), self._not_training(of), self._tables(mode)
        moments = math.ceil(trained * MOMENT_BYTES[mode.optimizer])
        step = self._optimizer_step(mode, trained, moments, frozen, blocks, head)
        outside = map(self.with_allocator, (step, *self._after_training(trained, frozen, blocks, head)))
        scored = 0
        if _scoring_steps(self._layout, of):
            # A and B of all rows, zero, and the gradient of the latter; no moments yet.
            scored = 4 * self._trained(of._replace(width=1.0)) + GRADIENT_BYTES * self._all_rows
        gradients = 0 if self._autograd_keeps(mode) else trained * GRADIENT_BYTES
        return _Resting(
            max(self._most_before(mode), *outside),
            frozen,
            blocks,
            head,
            self._value_bytes * trained + moments + gradients,
            scored,
        )

    def _step_moment(self, of: _Set, mode: ExecutionMode) -> _Moment:
        """The optimizer's step."""
        trained = self._trained(of)
        moments = math.ceil(trained * MOMENT_BYTES[mode.optimizer])
        frozen, blocks, head = self._frozen(mode), self._not_training(of), self._tables(mode)
        return self._optimizer_step(mode, trained, moments, frozen, blocks, head)

    def _optimizer_step(
        self, mode: ExecutionMode, trained: int, moments: int, frozen: int, blocks: int, head: int
    ) -> _Moment:
        chunked = self._e == 2 or mode.optimizer == "split_8bit"
        scratch = 4 * OPTIMIZER_CHUNK_BUFFERS * min(OPTIMIZER_CHUNK, self._largest) if chunked else 0
        every = trained * (self._value_bytes + GRADIENT_BYTES) + moments
        return _Moment("training", frozen, blocks, head, every, 0, self._inputs, scratch)

    def _slice(self, of: _Set) -> tuple[int, int, int]:
        """Parameters that train in one block, the most of them in one matrix, and those of the matrix whose gradient
        comes first."""
        found = self._slices.get(of.width)
        if found is None:
            _, trained, largest = _trained_sizes(self._shape, self._layout, of.width)
            first = largest if self._pairs else self._shape.slice_sizes(of.width)[2] * self._h
            found = self._slices[of.width] = trained, largest, first
        return found

    def _trained(self, of: _Set) -> int:
        """All parameters that train."""
        return of.size * self._slice(of)[0] + self._beside

    def _not_training(self, of: _Set) -> int:
        """Expanded blocks in the compute dtype: those of others, and the whole of those that train in part."""
        trained_whole = of.width == 1.0 or isinstance(self._layout.trainable, BaseTensors)
        whole = self._num_blocks - (of.size if trained_whole and not self._pairs else 0)
        return whole * self._block * self._e

    def _autograd_keeps(self, mode: ExecutionMode) -> bool:
        """Gradients are autograd's own tensors, new in each step; else they are collected in buffers that stay."""
        return self._e == 4 or mode.optimizer == "fp32"

    def _decoding(self, mode: ExecutionMode) -> int:
        return self._largest * self._e if mode.frozen == "nf4" and self._base_above else 0

    def _worst_of_pass(self, of: _Set, mode: ExecutionMode) -> _Use:
        """Gradients, saved bytes and temporaries when they are most; modes that differ elsewhere share it."""
        key = (of, mode.micro_batch_size, mode.checkpoint, mode.optimizer == "fp32")
        found = self._passes.get(key)
        if found is None:
            found = self._passes[key] = self._worst_of_passes(of, mode)
        without, (gradients, saved, work) = found
        if not work:
            return without
        work += self._decoding(mode)
        return without if sum(without) >= gradients + saved + work else (gradients, saved, work)

    def _worst_of_passes(self, of: _Set, mode: ExecutionMode) -> tuple[_Use, _Use]:
        """The worst moment at which no frozen layer can be decoded, and the worst of all others."""
        kinds = self._kinds_of.get(mode.micro_batch_size)
        if kinds is None:
            kinds = self._kinds_of[mode.micro_batch_size] = tuple(self._kinds(mode.micro_batch_size))
        gradients = self._trained(of) * GRADIENT_BYTES if self._autograd_keeps(mode) else 0
        without: list[_Use] = []
        decoding: list[_Use] = []
        held = len(self._held_at) - bisect_left(self._held_at, of.low)
        frozen_above = self._entries - of.low > held
        for kind in kinds:
            if of.low > self._base_cut:
                decoding.append((gradients if kind.repeated else 0, 0, kind.below))
            at_head, *behind = self._backward(of, mode, kind, gradients)
            without.append(at_head)
            (decoding if frozen_above else without).extend(behind)
        return _most(without), _most(decoding)

    def _kinds(self, micro_batch_size: int) -> Iterator[_Pass]:
        work = self._work
        size = min(micro_batch_size, work.batch_size)
        yield self._pass_of(size, work.max_tokens, work.label_share, repeated=size < work.batch_size)
        if work.anchor_batch_size:
            size = min(micro_batch_size, work.anchor_batch_size)
            yield self._pass_of(size, work.anchor_tokens, 1.0, repeated=True)

    def _pass_of(self, sequences: int, tokens: int, label_share: float, *, repeated: bool) -> _Pass:
        rows = _rows_of(self._layout, label_share)
        wanted = sequences * math.ceil(label_share * tokens)
        every = sequences * tokens
        count = wanted if rows < 1 else every
        state, neurons = self._h * self._e, self._i * self._e
        more = 4 if self._pairs else 0  # what the pairs add to gate and up, and the sum
        frozen, trained = self._saved[False], self._saved[True]
        return _Pass(
            repeated=repeated,
            states=every * state,
            below=every * self._forward,
            # Wanted rows, their norm and its gradient; the rows are gathered where the block computed all of them.
            head=(3 if rows < 1 else 4) * wanted * state + 4 * wanted + self._logits(wanted),
            saved=(frozen.total(sequences, tokens), trained.total(sequences, tokens)),
            saved_on_top=(frozen.total(sequences, tokens, rows), trained.total(sequences, tokens, rows)),
            states_back=2 * every * state,
            states_back_on_top=(every + count) * state,
            work=((4 + more) * every * neurons, (3 + more) * every * neurons),
            work_on_top=((4 + more) * count * neurons, (3 + more) * count * neurons),
        )

    def _backward(self, of: _Set, mode: ExecutionMode, kind: _Pass, every_gradient: int) -> list[_Use]:
        """What is used with the logits, then in the backward pass of block after block.

        Blocks are counted from the top, 0; the lowest is the last. Those that train beside it are taken to be the
        highest, where their gradients come earliest.

        Args:
            every_gradient: bytes of all gradients, where autograd keeps them from pass to pass.
        """
        trained_parameters, largest, first_matrix = self._slice(of)
        last = self._entries - of.low - 1
        top_trains = of.top_trains or last == 0
        middle = max(0, of.size - (2 if top_trains else 1))  # 1 ... middle train
        frozen, trained = kind.saved
        top = kind.saved_on_top[top_trains]
        cast = 0 if self._e == 4 or mode.optimizer != "fp32" else 2 * trained_parameters

        trained_below_top = middle + (last > 0)
        saved_below_top = trained_below_top * trained + (last - trained_below_top) * frozen

        def saved_from(index: int, trains: bool) -> int:
            """Of this block and of all below it, when its backward pass begins."""
            if index == 0:
                every, own, copied = saved_below_top + top, top, trained_below_top + top_trains
            else:
                done = index - 1  # below the topmost
                done_trained = min(done, middle)
                every = saved_below_top - done_trained * trained - (done - done_trained) * frozen
                own, copied = trained if trains else frozen, trained_below_top - done_trained
            if mode.checkpoint:  # the inputs of all of them, and what this one's second forward pass saves
                kept = (last - index + 1) * kind.states + own
                every = kept + min(self._recomputing_bytes, max(0, every - kept) // 4)  # with holes
            return every + cast * copied

        own_gradients = self._autograd_keeps(mode)
        growing = own_gradients and not kind.repeated
        before = every_gradient if kind.repeated else 0
        saved = saved_from(0, top_trains)
        found = [(before, (last + 1) * kind.states if mode.checkpoint else saved, kind.head)]
        # A gradient on its way to what it is added to, which torch widens where it is narrower.
        new_gradient = largest * (self._e + (GRADIENT_BYTES if kind.repeated and not own_gradients else 0))
        # Where gradients only grow, the worst block is at an end of a run of equal ones; else it is one of the highest.
        for index in sorted({0, 1, middle, middle + 1, last}) if growing else (0, 1):
            if index > last:
                break
            trains = (top_trains if index == 0 else index <= middle) or index == last
            if index == 0:
                work, states = kind.work_on_top[trains], kind.states_back_on_top
            else:
                work, states, saved = kind.work[trains], kind.states_back, saved_from(index, trains)
            gradients = every_gradient
            if growing:
                above = (top_trains and index > 0) + min(max(index - 1, 0), middle)
                first = first_matrix if trains else 0
                gradients = (above * trained_parameters + first + self._beside) * GRADIENT_BYTES
            elif trains:
                work = max(work, new_gradient)
            found.append((gradients, saved, states + work))
        return found

    def peak(self, of: _Set, mode: ExecutionMode) -> int:
        """Bytes of the moment that takes the most, allocator included."""
        at_rest = self._at_rest(of, mode)
        gradients, saved, work = self._worst_of_pass(of, mode)
        held = at_rest.frozen + at_rest.blocks + at_rest.head + max(at_rest.trained + gradients, at_rest.scored)
        return max(at_rest.outside, held + self._inputs + saved + work + self._allocator(saved + work))

    def fits(self, of: _Set, mode: ExecutionMode, budget_bytes: float) -> bool:
        """Is the peak within the budget? What is outside the passes is looked at first."""
        if budget_bytes == math.inf:
            return True
        return self.outside_passes(of, mode) <= budget_bytes and self.peak(of, mode) <= budget_bytes

    def outside_passes(self, of: _Set, mode: ExecutionMode) -> int:
        """The same without the passes themselves: it does not depend on their size, nor on recomputation."""
        return self._at_rest(of, mode).outside

    def _moments(self, of: _Set | None, mode: ExecutionMode) -> tuple[_Moment, ...]:
        if of is None:
            return (self.before_training(mode),)
        return (self.before_training(mode), *self.training(of, mode), *self.after_training(of, mode))

    def _allocator(self, temporaries: int) -> int:
        return self._allocator_base + math.ceil(self._allocator_share * min(temporaries, self._allocator_most))

    def with_allocator(self, moment: _Moment) -> int:
        """Live bytes of a moment and what the allocator adds."""
        return moment.live + self._allocator(moment.activations + moment.work)

    def breakdown(self, of: _Set | None, mode: ExecutionMode, runtime_bytes: int) -> MemoryBreakdown:
        """The moment that takes the most; without a set of blocks, of a client that only measures."""
        moment = max(self._moments(of, mode), key=self.with_allocator)
        allocator = self._allocator(moment.activations + moment.work)
        return MemoryBreakdown(runtime=runtime_bytes, allocator=allocator, **moment._asdict())


def peak_memory(
    shape: ModelShape,
    layout: StackLayout,
    blocks: Iterable[int],
    work: Workload,
    mode: ExecutionMode | None = None,
    *,
    runtime_bytes: int = 0,
    accelerator: Accelerator = "cpu",
    width: float = 1.0,
) -> MemoryBreakdown:
    """Bytes above the imports while a client carries out an assignment for ``blocks``, at the worst moment.

    Args:
        mode: default :func:`usual_mode`.
        runtime_bytes: R, only added.
        width: share of each block that trains.

    Raises:
        ValueError: no block, or one that the layout does not hold.
    """
    memory = _Memory(shape, layout, work, accelerator)
    return memory.breakdown(_set_of(layout, blocks, width), mode or usual_mode(work), runtime_bytes)


def measure_memory(
    shape: ModelShape,
    layout: StackLayout,
    work: Workload,
    *,
    runtime_bytes: int = 0,
    accelerator: Accelerator = "cpu",
) -> MemoryBreakdown:
    """The same of a client that only measures: no gradients, no optimizer, no saved activations."""
    return _Memory(shape, layout, work, accelerator).breakdown(None, usual_mode(work), runtime_bytes)


# The mode (runtime.md 4.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeChoice:
    """The mode that was chosen, and what it costs."""

    mode: ExecutionMode
    memory: MemoryBreakdown
    step_s: float
    """Predicted seconds of one step."""
    seconds: float
    """Of the first pass over new samples and of all steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoFit:
    """Not even the mode that takes the least memory fits."""

    blocks: tuple[int, ...]
    mode: ExecutionMode
    """That mode."""
    memory: MemoryBreakdown
    """What it takes."""
    budget_bytes: int
    fitting_blocks: tuple[int, ...]
    """The largest part of the blocks that fits, its lowest block given up first; empty if none does."""
    fitting_blocks_bytes: int
    fitting_tokens: int
    """How long the longest sequence may be for all the blocks to fit; 0 if no length helps."""

    @property
    def text(self) -> str:
        """What it would take, what there is, and what would fit."""
        needed, budget = _mib(self.memory.peak), _mib(self.budget_bytes)
        helps: list[str] = []
        if self.fitting_blocks:
            many = "s" if len(self.fitting_blocks) > 1 else ""
            names = ", ".join(map(str, self.fitting_blocks))
            helps.append(f"block{many} {names} alone would fit with {_mib(self.fitting_blocks_bytes)}")
        if self.fitting_tokens:
            helps.append(f"sequences of at most {self.fitting_tokens} tokens would fit")
        return (
            f"it takes at least {needed} ({self.mode.text()}), the budget is {budget}; "
            f"{' or '.join(helps) if helps else 'no smaller part of it would fit'}"
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


class ModeSearch:
    """All modes of one workload on one device; a planner asks about many sets of blocks.

    Tried are both residencies, both forms of frozen layers, exact and 8-bit moments, the batch and its halvings, and
    recomputation. Not tried is what another mode never loses to: fp32 master weights beside bf16 copies.

    Args:
        work: ``micro_batch_size`` is the largest pass that is tried.
        optimizers: those that may be used; ``split`` stands for ``fp32`` where the arithmetic is fp32.
        factors: what the device's own steps have shown (``calibration.py``).
    """

    def __init__(
        self,
        device: DeviceProfile,
        shape: ModelShape,
        layout: StackLayout,
        work: Workload,
        optimizers: Iterable[OptimizerMode] = ("fp32", "split", "split_8bit"),
        factors: TimeFactors = AS_PROFILED,
    ) -> None:
        self._layout, self._work = layout, work
        self._memory = _Memory(shape, layout, work, device.accelerator)
        self._time = _Time(device, shape, layout, work, factors)
        self._reading_s = self._time.fill_s("suffix") - self._time.fill_s("resident")
        self._modes, self._sparing = _modes(
            work.dtype_bytes == 4,
            min(work.micro_batch_size, work.batch_size),
            frozenset(optimizers),
            forms=_frozen_forms(layout),
            reads=self._reading_s > 0,
        )
        self._last_fitting = self._modes[0]
        self._least: dict[_Set, tuple[ExecutionMode, int]] = {}
        self._timed: dict[_Set, list[tuple[float, int, ExecutionMode]]] = {}

    def best(
        self,
        blocks: Iterable[int],
        *,
        width: float = 1.0,
        budget_bytes: float = math.inf,
        max_seconds: float = math.inf,
    ) -> ExecutionMode | None:
        """The best mode within both limits; None if no mode is.

        The fastest (first pass and all steps), unless it rounds the moments and an exact one is slower by no more than
        :data:`TIME_TOLERANCE`. Of modes that are equally fast, but for :data:`SAME_TIME`, the one with larger passes,
        then the one that does the least out of the ordinary.
        """
        of = _set_of(self._layout, blocks, width)
        # The first mode does nothing that costs time; it may read more than another in the first pass, not more.
        first_s = self._seconds(of, self._modes[0])
        fastest_s = first_s - self._reading_s
        if fastest_s > max_seconds:
            return None
        soon_enough = first_s <= min(max_seconds, (1 + SAME_TIME) * fastest_s)
        if soon_enough and self._memory.fits(of, self._modes[0], budget_bytes):
            return self._modes[0]
        too_much: dict[tuple[int, bool], list[_Demand]] = {}
        fastest = chosen = None  # (seconds, place among equals, mode)
        enough_s = max_seconds
        for found in self._by_time(of):
            seconds, place, mode = found
            if seconds > enough_s:
                break
            if fastest is not None and fastest[2].approximate < mode.approximate:
                continue
            if self._is_too_much(of, mode, budget_bytes, too_much):
                continue
            if fastest is None or mode.approximate < fastest[2].approximate:
                fastest = chosen = found
                share = TIME_TOLERANCE if mode.approximate else SAME_TIME
                enough_s = min(max_seconds, (1 + share) * seconds)
            elif chosen is not None and place < chosen[1] and seconds <= (1 + SAME_TIME) * fastest[0]:
                chosen = found
        return None if chosen is None else chosen[2]

    def fits(
        self,
        blocks: Iterable[int],
        *,
        width: float = 1.0,
        budget_bytes: float = math.inf,
        max_seconds: float = math.inf,
    ) -> bool:
        """Is any mode within both limits? :meth:`best` says which to take, for many times the work."""
        of = _set_of(self._layout, blocks, width)
        first = self._modes[0]
        first_s = self._seconds(of, first)
        if first_s - self._reading_s > max_seconds:
            return False
        # What a similar set was just found to fit in is looked at before everything else.
        last = self._last_fitting
        if last is not first and self._memory.fits(of, last, budget_bytes) and self._seconds(of, last) <= max_seconds:
            return True
        if first_s <= max_seconds and self._memory.fits(of, first, budget_bytes):
            self._last_fitting = first
            return True
        some_fit = False
        for mode in reversed(self._sparing.values()):
            if self._memory.fits(of, mode, budget_bytes):
                if self._seconds(of, mode) <= max_seconds:
                    self._last_fitting = mode
                    return True
                some_fit = True
            elif self._memory.outside_passes(of, mode) > budget_bytes:  # the same of all of them
                return False
        best = self.best(blocks, width=width, budget_bytes=budget_bytes, max_seconds=max_seconds) if some_fit else None
        return best is not None

    def _is_too_much(
        self,
        of: _Set,
        mode: ExecutionMode,
        budget_bytes: float,
        too_much: dict[tuple[int, bool], list[_Demand]],
    ) -> bool:
        """Is it beyond the budget? With equal passes, what asks for no less than one that is beyond it is so too."""
        passes = (mode.micro_batch_size, mode.checkpoint)
        known = too_much.get(passes)
        if known is None:
            some_fit = self._memory.fits(of, self._sparing[passes], budget_bytes)
            known = too_much[passes] = [] if some_fit else [(False, False, False)]
        demand = _demand(mode)
        if any(all(a >= b for a, b in zip(demand, other, strict=True)) for other in known):
            return True
        if self._memory.fits(of, mode, budget_bytes):
            return False
        known.append(demand)
        return True

    def least_memory(self, blocks: Iterable[int], width: float = 1.0) -> tuple[ExecutionMode, int]:
        """The mode that takes the least memory, and its bytes."""
        return self._least_of(_set_of(self._layout, blocks, width))

    def _least_of(self, of: _Set) -> tuple[ExecutionMode, int]:
        found = self._least.get(of)
        if found is None:
            peaks = ((mode, self._memory.peak(of, mode)) for mode in self._sparing.values())
            found = self._least[of] = min(peaks, key=lambda pair: pair[1])
        return found

    def least_bytes(self, blocks: Iterable[int], width: float = 1.0) -> int:
        """The bytes alone, which are found sooner."""
        of = _set_of(self._layout, blocks, width)
        least = math.inf
        for mode in reversed(self._sparing.values()):
            least = min(least, self._memory.peak(of, mode))
            if least == self._memory.outside_passes(of, mode):  # the same of all of them
                break
        return int(least)

    def least_bytes_in_time(self, blocks: Iterable[int], max_seconds: float, width: float = 1.0) -> int | None:
        """The least memory of all modes that are fast enough; None if none is."""
        of = _set_of(self._layout, blocks, width)
        least: int | None = None
        for seconds, _, mode in self._by_time(of):
            if seconds > max_seconds:
                break
            if least is None or self._memory.outside_passes(of, mode) < least:
                peak = self._memory.peak(of, mode)
                least = peak if least is None else min(least, peak)
        return least

    def fastest_s(self, blocks: Iterable[int], width: float = 1.0) -> float:
        """Seconds of the fastest mode, whatever memory it takes."""
        return self._seconds(_set_of(self._layout, blocks, width), self._modes[0]) - self._reading_s

    def cost(self, blocks: Iterable[int], mode: ExecutionMode, width: float = 1.0) -> ModeChoice:
        """What these blocks cost in this mode."""
        of = _set_of(self._layout, blocks, width)
        step_s = self._time.step_s(of, mode)
        return ModeChoice(
            mode=mode,
            memory=self._memory.breakdown(of, mode, 0),
            step_s=step_s,
            seconds=self._seconds(of, mode),
        )

    def _by_time(self, of: _Set) -> list[tuple[float, int, ExecutionMode]]:
        """(seconds, place among equals, mode), the best first."""
        found = self._timed.get(of)
        if found is None:
            steps = self._num_steps(of)
            fill_s = {mode.residency: self._time.fill_s(mode.residency) for mode in self._modes[:2]}
            found = self._timed[of] = sorted(
                (fill_s[mode.residency] + steps * self._time.step_s(of, mode), place, mode)
                for place, mode in enumerate(self._modes)
            )
        return found

    def _seconds(self, of: _Set, mode: ExecutionMode) -> float:
        """Of the first pass and all steps."""
        return self._time.fill_s(mode.residency) + self._num_steps(of) * self._time.step_s(of, mode)

    def _num_steps(self, of: _Set) -> int:
        return self._work.steps + _scoring_steps(self._layout, of)


_Demand = tuple[bool, bool, bool]
"""Exact moments, decoded layers, all layers resident: each takes no less memory than its contrary."""


def _demand(mode: ExecutionMode) -> _Demand:
    return not mode.approximate, mode.frozen == "decoded", mode.residency == "resident"


def _frozen_forms(layout: StackLayout) -> tuple[FrozenForm, ...]:
    """How frozen layers above the cut may be held; packed only where there are some, and packed already if merged."""
    merged = isinstance(layout.trainable, LowRankPairs) and layout.trainable.merged
    if merged or layout.num_entries - layout.base_cut == layout.num_held:
        return ("decoded",)
    return ("decoded", "nf4")


@lru_cache(maxsize=256)
def _modes(
    fp32: bool, largest_pass: int, optimizers: frozenset[OptimizerMode], *, forms: tuple[FrozenForm, ...], reads: bool
) -> tuple[tuple[ExecutionMode, ...], dict[tuple[int, bool], ExecutionMode]]:
    """Everything that is tried; of equally fast modes the first is taken: exact, large passes, little memory. And the
    most sparing of them (:func:`_most_sparing`).

    Args:
        fp32: the arithmetic is fp32.
        largest_pass: sequences.
        reads: the first pass waits for layers that are not in memory.
    """
    kinds: list[OptimizerMode] = []
    if "fp32" in optimizers or "split" in optimizers:
        kinds.append("fp32" if fp32 else "split")
    if "split_8bit" in optimizers:
        kinds.append("split_8bit")
    residencies: tuple[Residency, ...] = ("suffix", "resident") if reads else ("suffix",)
    found: list[ExecutionMode] = []
    for optimizer in kinds:
        size = largest_pass
        while size:
            found += [
                ExecutionMode(
                    optimizer=optimizer,
                    residency=residency,
                    frozen=form,
                    micro_batch_size=size,
                    checkpoint=checkpoint,
                )
                for checkpoint, form, residency in itertools.product((False, True), forms, residencies)
            ]
            size //= 2
    return tuple(found), _most_sparing(found)


def _most_sparing(modes: Sequence[ExecutionMode]) -> dict[tuple[int, bool], ExecutionMode]:
    """Sequences per pass and recomputation -> the mode that takes the least memory with them, whatever blocks train.

    In moments, frozen layers and residency the sparing choice never takes more than another (tested). A large pass
    may take less than a small one, since it adds up no gradients; a single block is not made smaller by recomputation.
    """
    last = modes[-1]
    wanted = (last.optimizer, "suffix", last.frozen)
    return {
        (mode.micro_batch_size, mode.checkpoint): mode
        for mode in modes
        if (mode.optimizer, mode.residency, mode.frozen) == wanted
    }


def choose_mode(
    device: DeviceProfile,
    shape: ModelShape,
    layout: StackLayout,
    blocks: Iterable[int],
    work: Workload,
    *,
    budget_bytes: float,
    optimizers: Collection[OptimizerMode] = ("fp32", "split", "split_8bit"),
    width: float = 1.0,
) -> ModeChoice | NoFit:
    """The fastest mode whose predicted peak, R left out, is within the budget (:meth:`ModeSearch.best`).

    Margins are the caller's: the whole budget may be filled.

    Raises:
        ValueError: no block, or one that the layout does not hold.
    """
    blocks = tuple(sorted(set(blocks), key=lambda block: layout.positions.get(block, -1)))
    search = ModeSearch(device, shape, layout, work, optimizers)
    mode = search.best(blocks, width=width, budget_bytes=budget_bytes)
    if mode is not None:
        return search.cost(blocks, mode, width)
    mode, _ = search.least_memory(blocks, width)
    parts = (blocks[dropped:] for dropped in range(1, len(blocks)))
    fitting = next((part for part in parts if search.least_memory(part, width)[1] <= budget_bytes), ())
    return NoFit(
        blocks=tuple(sorted(blocks)),
        mode=mode,
        memory=search.cost(blocks, mode, width).memory,
        budget_bytes=int(budget_bytes),
        fitting_blocks=tuple(sorted(fitting)),
        fitting_blocks_bytes=search.least_memory(fitting, width)[1] if fitting else 0,
        fitting_tokens=_fitting_tokens(shape, layout, blocks, work, mode, device.accelerator, budget_bytes, width),
    )


def _fitting_tokens(
    shape: ModelShape,
    layout: StackLayout,
    blocks: Iterable[int],
    work: Workload,
    mode: ExecutionMode,
    accelerator: Accelerator,
    budget_bytes: float,
    width: float,
) -> int:
    """The longest sequences with which the blocks fit in this mode; 0 if none do."""
    fits, too_long = 0, work.max_tokens
    while too_long - fits > 1:
        tokens = (fits + too_long) // 2
        shorter = replace(work, max_tokens=tokens, mean_tokens=min(work.mean_tokens, tokens))
        peak = peak_memory(shape, layout, blocks, shorter, mode, accelerator=accelerator, width=width).peak
        fits, too_long = (tokens, too_long) if peak <= budget_bytes else (fits, tokens)
    return fits
