"""What is the model's published state, and how does a follower get from one version of it to a later one?

The state is the accumulated change D of every unit (an expanded block, a low-rank pair, a base layer:
``profiles/units.py``), zero at version 0; here all of them are called blocks.
Version v+1 is version v plus one *step*: the row-masked int8 encoding of the round's aggregate and of what earlier
steps left out (methods.md 7.2). The aggregator applies its own step like everybody else, so all hold the same bits.

A step is ``<length of the header, 4 bytes little-endian> <header, msgpack> <tensors as in protocol/tensors.py>``.
The payload of a state update is, by ``StateUpdate.encoding``:

==========  =====================================================================================================
none        nothing: the follower is up to date
replay      the steps in order
difference  a header of the same kind that names the touched blocks, then of each of their tensors: three bit planes
            of ``ceil(R/8)`` bytes (the row's tag, lowest bit first: 0 untouched, 1-3 sent so many times, 4 whole); for
            the first, second, third sending: the scales of all rows with at least so many, then their codes; the fp32
            values of the whole rows. A row travels as codes or whole, whichever is shorter; the bits are the same
snapshot    a step in format fp32 that replaces the state instead of being added to it
==========  =====================================================================================================

Where pairs are merged into the weights (``units.MergedLinears``), a step is a *stack* instead: a header that names
units and rank, then of each linear A ``[R, in]`` and B ``[out, R]`` in fp32. It adds ``scaling · B A``, summed
component after component in fp64 without a matrix library, so that all hold the same bits. Of such steps there is no
difference.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_never

from fedblocks.profiles.model_shape import TensorSpec
from fedblocks.profiles.units import CLUSTER_STRIDE, EXTRA_UNIT, MergedLinears, TrainedUnits, Units, unit_tensors
from fedblocks.protocol import codec
from fedblocks.protocol.errors import LocalProtocolError, RemoteProtocolError
from fedblocks.protocol.messages import DeltaFormat, StateEncoding, StateUpdate, TensorHeader
from fedblocks.protocol.payloads import Bytes
from fedblocks.protocol.tensors import (
    CHUNK_ELEMENTS,
    DeltaLayout,
    FloatArray,
    Rows,
    State,
    cut,
    delta_layout,
    encode_tensor,
    pad,
    read_rows,
    rows_of,
)

ReadStep = Callable[[int], "bytes | memoryview"]
"""The encoded step from version ``v`` to ``v + 1``; the aggregator maps its file."""

LENGTH_BYTES: Final = 4
LORA_A, LORA_B = ".lora_A", ".lora_B"
#: Codes of t sendings cost t·(C + 4) bytes, a whole row 4·C: the fourth sending is never the shorter one.
MAX_SENDINGS: Final = 3
#: The tag of a row that travels as its fp32 values.
WHOLE: Final = MAX_SENDINGS + 1
TAG_BITS: Final = 3
#: Of all clients of a round together.
MAX_STACK_RANK: Final = 1 << 16


H = TypeVar("H", "StepHeader", "DifferenceHeader", "StackHeader")


def _check_ascending(blocks: Sequence[int]) -> None:
    if list(blocks) != sorted(set(blocks)) or any(b < 0 for b in blocks):
        raise ValueError(f"blocks are {blocks}, expected ascending ids without repeats")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHeader:
    """What a step holds; ``rows_sent`` has one entry per tensor of each block, in payload order."""

    format: DeltaFormat
    density: float
    blocks: tuple[int, ...]
    rows_sent: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_ascending(self.blocks)
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}, expected a number in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferenceHeader:
    """Which blocks a difference touches."""

    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_ascending(self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackHeader:
    """What a stack of pairs holds: the same rank for every linear of every unit. Other units follow as they change."""

    blocks: tuple[int, ...]
    rank: int
    scaling: float

    def __post_init__(self) -> None:
        _check_ascending(self.blocks)
        if not 1 <= self.rank <= MAX_STACK_RANK:
            raise ValueError(f"rank is {self.rank}, expected 1 to {MAX_STACK_RANK}")
        if not self.scaling > 0:
            raise ValueError(f"scaling is {self.scaling}, expected a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A new version: its step, and the aggregator's state after it."""

    step: Bytes
    published: State
    residual: State
    """What the step left out; it joins the next step of its block."""


def state_sha256(shape: Units, state: Mapping[int, Mapping[str, FloatArray]]) -> str:
    """SHA-256 over id and tensors of every block that is not all zero, blocks ascending.

    A block that is missing and one that is all zero hash alike.

    Raises:
        LocalProtocolError: a tensor has another shape or type than the model's.
    """
    digest = hashlib.sha256(b"fedblocks state 1")
    for block in sorted(state):
        tensors = [_tensor(state, block, spec) for spec in unit_tensors(shape, block)]
        if not any(t.any() for t in tensors):
            continue
        digest.update(block.to_bytes(4, "little"))
        for tensor in tensors:
            digest.update(np.ascontiguousarray(tensor, dtype="<f4").data)
    return digest.hexdigest()


def _tensor(state: Mapping[int, Mapping[str, FloatArray]], block: int, spec: TensorSpec) -> FloatArray:
    found = state.get(block, {}).get(spec.name)
    if found is None:
        return np.zeros(spec.shape, dtype=np.float32)
    if found.shape != spec.shape or found.dtype != np.float32:
        raise LocalProtocolError(
            f"block {block}: {spec.name} is {found.dtype} {found.shape}, expected float32 {spec.shape}"
        )
    return found


def publish(
    published: State,
    aggregate: State,
    residual: State,
    *,
    shape: Units,
    format: DeltaFormat,
    density: float,
    widths: Mapping[int, float] | None = None,
    release: bool = False,
) -> Publication:
    """The next version: published + decoded(encoded(aggregate + residual)) for every block of ``aggregate``.

    What nobody trained is not touched and its residual waits: blocks that are absent from ``aggregate``, and of the
    others what lies beyond their width in ``widths``.
    This is the server optimiser ``avg`` with lr_s = 1 (methods.md 8.3). No argument is changed, but see ``release``.

    Args:
        widths: block id -> the largest width that somebody trained; a missing block was trained whole. ``aggregate``
            must be zero beyond it.
        release: let go of each tensor of ``aggregate`` once it is encoded: together they are as large as the state.
    """
    blocks = sorted(aggregate)
    return _publish(
        published,
        aggregate,
        residual,
        blocks,
        shape=shape,
        format=format,
        density=density,
        widths=widths or {},
        release=release,
    )


def publish_dense(
    published: State, aggregate: State, residual: State, *, shape: Units, release: bool = False
) -> Publication:
    """The last version of a run: fp32 and complete, so that no residual waits at export."""
    blocks = sorted({*aggregate, *residual})
    return _publish(
        published,
        aggregate,
        residual,
        blocks,
        shape=shape,
        format="fp32",
        density=1.0,
        widths={},
        release=release,
    )


def _publish(
    published: State,
    aggregate: State,
    residual: State,
    blocks: list[int],
    *,
    shape: Units,
    format: DeltaFormat,
    density: float,
    widths: Mapping[int, float],
    release: bool,
) -> Publication:
    rest = {block: dict(tensors) for block, tensors in residual.items() if block not in blocks}
    rows_sent: list[int] = []
    step = bytearray()
    for block in blocks:
        trained = unit_tensors(shape, block, widths.get(block, 1.0))
        for spec, part in zip(unit_tensors(shape, block), trained, strict=True):
            owed = _tensor(residual, block, spec)
            waits: FloatArray | None = None
            if part.shape != spec.shape:
                waits = np.array(owed)
                cut(waits, part.shape)[...] = 0
                owed = pad(cut(owed, part.shape), spec.shape)
            encoded = encode_tensor(_tensor(aggregate, block, spec), owed, format=format, density=density)
            if release:
                aggregate.get(block, {}).pop(spec.name, None)
            rows_sent.append(encoded.rows_sent)
            step += encoded.payload
            left = encoded.residual
            if waits is not None and waits.any():
                left = waits if left is None else left + waits
            if left is not None:
                rest.setdefault(block, {})[spec.name] = left
    header = StepHeader(format=format, density=density, blocks=tuple(blocks), rows_sent=tuple(rows_sent))
    step[:0] = _frame(header)  # moves the bytes where they are: a second copy would be as large as the state
    whole = memoryview(step).toreadonly()
    return Publication(step=whole, published=apply_step(published, whole, shape=shape, blocks=blocks), residual=rest)


def apply_step(state: State, step: bytes | memoryview, *, shape: Units, blocks: Collection[int]) -> State:
    """A new state: ``state`` plus one step over some of ``blocks``; the argument keeps its values.

    Raises:
        RemoteProtocolError: the bytes are no step of this model.
    """
    after = _Changing(state)
    rest = (_add_stack if _merges(shape) else _add_step)(after, memoryview(step), shape, blocks)
    if rest:
        raise RemoteProtocolError(f"{len(rest)} bytes follow the step", code="length_mismatch")
    return after.state


def make_update(
    read_step: ReadStep, *, shape: Units, from_version: int, to_version: int, published: State, sha256: str
) -> tuple[StateUpdate, bytes]:
    """The shortest way from one published version to a later one, and its payload.

    Args:
        read_step: gives the steps ``from_version .. to_version - 1``.
        from_version: what the follower holds; a version outside ``0..to_version`` gets a snapshot.
        published: the state at ``to_version``.
        sha256: its :func:`state_sha256`.
    """

    def update(encoding: StateEncoding) -> StateUpdate:
        return StateUpdate(encoding=encoding, from_version=from_version, to_version=to_version, state_sha256=sha256)

    if from_version == to_version:
        return update("none"), b""
    header = _snapshot_header(published, shape)
    snapshot_bytes = len(_frame(header)) + _layout(header, shape, header.blocks).total_bytes
    if 0 <= from_version < to_version:
        steps = [memoryview(read_step(v)) for v in range(from_version, to_version)]
        replay_bytes = sum(len(step) for step in steps)
        difference = None if _merges(shape) else _Difference(steps, shape)
        if difference is not None and difference.num_bytes < min(replay_bytes, snapshot_bytes):
            return update("difference"), difference.encode(published)
        if replay_bytes <= snapshot_bytes:
            return update("replay"), b"".join(steps)
    return update("snapshot"), _snapshot(header, published, shape)


def apply_update(
    state: State,
    update: StateUpdate,
    payload: bytes | memoryview,
    *,
    shape: Units,
    blocks: Collection[int],
) -> State:
    """The state at ``update.to_version``, its hash verified; ``state`` (at ``from_version``) keeps its values.

    Args:
        blocks: ids of the plan's expanded blocks; no other may be touched.

    Raises:
        RemoteProtocolError: ``checksum_mismatch`` if the result is not what the aggregator holds, else the code of what
            is wrong with the bytes.
    """
    rest = memoryview(payload)
    after = _Changing({} if update.encoding == "snapshot" else state)
    match update.encoding:
        case "none":
            pass
        case "replay":
            for _ in range(update.from_version, update.to_version):
                rest = (_add_stack if _merges(shape) else _add_step)(after, rest, shape, blocks)
        case "difference":
            rest = _apply_difference(after, rest, shape, blocks)
        case "snapshot":
            rest = _add_step(after, rest, shape, blocks)
        case _:
            assert_never(update.encoding)
    if rest:
        raise RemoteProtocolError(f"{len(rest)} bytes follow the state update", code="length_mismatch")
    sha256 = state_sha256(shape, after.state)
    if sha256 != update.state_sha256:
        raise RemoteProtocolError(
            f"the state after the update to version {update.to_version} has hash {sha256}, the aggregator announced "
            f"{update.state_sha256}; drop the held state and ask for it from version 0",
            code="checksum_mismatch",
        )
    return after.state


class _Changing:
    """A state under change: a tensor is copied the first time that it is written."""

    def __init__(self, state: State) -> None:
        self.state: State = {block: dict(tensors) for block, tensors in state.items()}
        self._copied: set[tuple[int, str]] = set()

    def rows(self, block: int, spec: TensorSpec) -> FloatArray:
        """The tensor as a writable ``(R, C)``."""
        if (block, spec.name) not in self._copied:
            self._copied.add((block, spec.name))
            copy = np.array(_tensor(self.state, block, spec), dtype=np.float32, order="C")
            self.state.setdefault(block, {})[spec.name] = copy
        return self.state[block][spec.name].reshape(spec.rows_cols)


def published_units(of: Units) -> Units:
    """What the published state of updates over these units consists of."""
    return of.published() if isinstance(of, TrainedUnits) else of


def publish_stack(published: State, stack: State, *, shape: Units, scaling: float) -> Publication:
    """The next version of merged weights: published + scaling · B A of every linear of ``stack``.

    Args:
        stack: unit -> ``<linear>.lora_A`` ``[R, in]`` and ``.lora_B`` ``[out, R]``, one R for all; of an extra set its
            own tensors, which are added.
        shape: of the published state.
    """
    ranks = {t.shape[0] for tensors in stack.values() for name, t in tensors.items() if name.endswith(LORA_A)}
    if len(ranks) != 1:
        raise LocalProtocolError(f"a stack has ranks {sorted(ranks)}, expected one for all linears")
    header = StackHeader(blocks=tuple(sorted(stack)), rank=ranks.pop(), scaling=scaling)
    parts = [
        stack[unit][name].astype("<f4", copy=False).tobytes()
        for unit in header.blocks
        for name, _ in _stacked(unit, shape, header.rank)
    ]
    step = b"".join([_frame(header), *parts])
    return Publication(step=step, published=apply_step(published, step, shape=shape, blocks=header.blocks), residual={})


def _stacked(unit: int, shape: Units, rank: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what a stack holds of a unit, in order."""
    specs = unit_tensors(shape, unit)
    if unit % CLUSTER_STRIDE == EXTRA_UNIT:
        return [(spec.name, spec.shape) for spec in specs]
    found: list[tuple[str, tuple[int, ...]]] = []
    for spec in specs:
        linear = spec.name.removesuffix(".weight")
        found += [(linear + LORA_A, (rank, spec.shape[1])), (linear + LORA_B, (spec.shape[0], rank))]
    return found


def _add_stack(after: _Changing, data: memoryview, shape: Units, blocks: Collection[int]) -> memoryview:
    """Add the stack at the start of ``data``; returns what follows it."""
    header, rest = _read_frame(StackHeader, data)
    _check_blocks(header.blocks, blocks)
    for unit in header.blocks:
        values: dict[str, FloatArray] = {}
        for name, size in _stacked(unit, shape, header.rank):
            part, rest = _split(rest, 4 * math.prod(size))
            values[name] = np.frombuffer(part, dtype="<f4").astype(np.float32).reshape(size)
            if not np.isfinite(values[name]).all():
                raise RemoteProtocolError(f"unit {unit}: {name} holds a value that is not finite", code="non_finite")
        for spec in unit_tensors(shape, unit):
            matrix = after.rows(unit, spec)
            if spec.name in values:
                matrix += values[spec.name].reshape(spec.rows_cols)
                continue
            linear = spec.name.removesuffix(".weight")
            _add_product(matrix, values[linear + LORA_A], values[linear + LORA_B], header.scaling)
            if not np.isfinite(matrix).all():
                raise RemoteProtocolError(f"unit {unit}: {spec.name} overflows", code="non_finite")
    return rest


def _add_product(matrix: FloatArray, a: FloatArray, b: FloatArray, scaling: float) -> None:
    """``matrix += scaling · b a``: components one after the other in fp64, one rounding, one fp32 addition."""
    num_rows, num_cols = matrix.shape
    step = max(1, CHUNK_ELEMENTS // num_cols)
    wide = a.astype(np.float64)
    for start in range(0, num_rows, step):
        left = b[start : start + step].astype(np.float64) * scaling
        total = np.zeros((len(left), num_cols), dtype=np.float64)
        for component in range(len(a)):
            total += left[:, component, None] * wide[component]
        with np.errstate(over="ignore", invalid="ignore"):
            matrix[start : start + step] += total.astype(np.float32)


def _merges(shape: Units) -> bool:
    """Do the steps of this state consist of stacked pairs?"""
    return isinstance(shape, TrainedUnits) and isinstance(shape.trainable, MergedLinears)


def _frame(header: StepHeader | DifferenceHeader | StackHeader) -> bytes:
    body = codec.pack(codec.to_plain(header))
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def _read_frame(kind: type[H], data: memoryview) -> tuple[H, memoryview]:
    """The header at the start of ``data``, and what follows it."""
    body, rest = _split(data, LENGTH_BYTES)
    body, rest = _split(rest, int.from_bytes(body, "little"))
    return codec.from_plain(kind, codec.unpack(body, max_bytes=codec.MAX_BODY_BYTES), where="step"), rest


def _split(data: memoryview, num_bytes: int) -> tuple[memoryview, memoryview]:
    if len(data) < num_bytes:
        raise RemoteProtocolError(
            f"the state update ends early: {num_bytes} bytes expected, {len(data)} are left", code="length_mismatch"
        )
    return data[:num_bytes], data[num_bytes:]


def _layout(header: StepHeader, shape: Units, blocks: Collection[int]) -> DeltaLayout:
    _check_blocks(header.blocks, blocks)
    names = [(block, spec.name) for block in header.blocks for spec in unit_tensors(shape, block)]
    if len(names) != len(header.rows_sent):
        raise RemoteProtocolError(f"step: {len(header.rows_sent)} tensors, expected {len(names)}")
    return delta_layout(
        [
            TensorHeader(block=block, name=name, rows_sent=rows)
            for (block, name), rows in zip(names, header.rows_sent, strict=True)
        ],
        shape=shape,
        blocks=header.blocks,
        format=header.format,
        density=header.density,
    )


def _check_blocks(found: Collection[int], known: Collection[int]) -> None:
    for block in found:
        if block not in known:
            raise RemoteProtocolError(
                f"block {block} is not in the plan, expected some of {sorted(known)}", code="shape_mismatch"
            )


def _add_step(after: _Changing, data: memoryview, shape: Units, blocks: Collection[int]) -> memoryview:
    """Add the step at the start of ``data``; returns what follows it."""
    header, rest = _read_frame(StepHeader, data)
    layout = _layout(header, shape, blocks)
    payload, rest = _split(rest, layout.total_bytes)
    for slot in layout.slots:
        found = read_rows(slot.spec, slot.rows_sent, slot.of(payload), format=header.format, density=header.density)
        if len(found.index):
            matrix = after.rows(slot.block, slot.spec)
            for rows in found.chunks():
                matrix[rows.index] += rows.decoded()
    return rest


def _snapshot_header(published: State, shape: Units) -> StepHeader:
    blocks = tuple(b for b in sorted(published) if any(t.any() for t in published[b].values()))
    rows = tuple(spec.rows_cols[0] for block in blocks for spec in unit_tensors(shape, block))
    return StepHeader(format="fp32", density=1.0, blocks=blocks, rows_sent=rows)


def _snapshot(header: StepHeader, published: State, shape: Units) -> bytes:
    tensors = [_tensor(published, block, spec) for block in header.blocks for spec in unit_tensors(shape, block)]
    return b"".join([_frame(header), *(t.astype("<f4", copy=False).tobytes() for t in tensors)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sending:
    """One tensor's bytes in one step."""

    rows_sent: int
    payload: memoryview
    format: DeltaFormat
    density: float

    def read(self, spec: TensorSpec) -> Rows:
        return read_rows(spec, self.rows_sent, self.payload, format=self.format, density=self.density)


class _Difference:
    """Several steps as one: the union of the touched rows, each as its codes in version order or whole."""

    def __init__(self, steps: Sequence[memoryview], shape: Units) -> None:
        self._sendings: dict[tuple[int, TensorSpec], list[_Sending]] = {}
        for step in steps:
            header, payload = _read_frame(StepHeader, step)
            for slot in _layout(header, shape, header.blocks).slots:
                sending = _Sending(
                    rows_sent=slot.rows_sent, payload=slot.of(payload), format=header.format, density=header.density
                )
                self._sendings.setdefault((slot.block, slot.spec), []).append(sending)
        self._header = DifferenceHeader(blocks=tuple(sorted({block for block, _ in self._sendings})))
        self._tags = {
            (block, spec): _count_sendings(spec, self._sendings[block, spec])
            for block in self._header.blocks
            for spec in unit_tensors(shape, block)
        }
        self.num_bytes = len(_frame(self._header)) + sum(_tagged_bytes(tags, s) for (_, s), tags in self._tags.items())

    def encode(self, published: State) -> bytes:
        """The payload; ``published`` is the state after the last step."""
        parts = [_frame(self._header)]
        for (block, spec), tags in self._tags.items():
            parts += [np.packbits((tags >> bit) & 1, bitorder="little").tobytes() for bit in range(TAG_BITS)]
            targets = _rows_by_sending(tags)
            scales = [np.empty(len(rows), dtype=np.float32) for rows in targets]
            codes = [np.empty((len(rows), spec.rows_cols[1]), dtype=np.int8) for rows in targets]
            seen = np.zeros(len(tags), dtype=np.uint8)
            for sending in self._sendings[block, spec]:
                rows = sending.read(spec)
                for number in range(MAX_SENDINGS):
                    chosen = (tags[rows.index] < WHOLE) & (seen[rows.index] == number)
                    place = np.searchsorted(targets[number], rows.index[chosen])
                    scales[number][place] = rows.scales[chosen]
                    codes[number][place] = rows.values[chosen]
                seen[rows.index] += tags[rows.index] < WHOLE
            for s, c in zip(scales, codes, strict=True):
                parts += [s.astype("<f4", copy=False).tobytes(), c.tobytes()]
            whole = _tensor(published, block, spec).reshape(spec.rows_cols)[tags == WHOLE]
            parts.append(whole.astype("<f4", copy=False).tobytes())
        return b"".join(parts)


def _count_sendings(spec: TensorSpec, sendings: Sequence[_Sending]) -> NDArray[np.uint8]:
    """The tag of each row: how often it was sent, or ``WHOLE`` where its values are shorter than its codes."""
    num_rows, num_cols = spec.rows_cols
    tags = np.zeros(num_rows, dtype=np.uint8)
    for sending in sendings:
        index = sending.read(spec).index
        tags[index] = np.minimum(tags[index] + 1, WHOLE) if sending.format == "int8" else WHOLE
    for times in range(1, WHOLE):
        if times * (num_cols + 4) > 4 * num_cols:
            tags[tags == times] = WHOLE
    return tags


def _rows_by_sending(tags: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """For the first, second, third sending: the coded rows that have one."""
    return [np.flatnonzero((tags > number) & (tags < WHOLE)) for number in range(MAX_SENDINGS)]


def _tagged_bytes(tags: NDArray[np.uint8], spec: TensorSpec) -> int:
    num_rows, num_cols = spec.rows_cols
    coded = sum(len(rows) for rows in _rows_by_sending(tags))
    return TAG_BITS * ((num_rows + 7) // 8) + coded * (num_cols + 4) + int((tags == WHOLE).sum()) * 4 * num_cols


def _read_tags(data: memoryview, num_rows: int) -> NDArray[np.uint8]:
    planes = np.frombuffer(data, dtype=np.uint8).reshape(TAG_BITS, -1)
    bits = np.unpackbits(planes, axis=1, bitorder="little")  # (3, R rounded up)
    tags = bits[0] | bits[1] << 1 | bits[2] << 2
    if tags.max() > WHOLE or tags[num_rows:].any():
        raise RemoteProtocolError(f"a row tag is out of range, expected 0 to {WHOLE} for {num_rows} rows")
    return tags[:num_rows]


def _apply_difference(after: _Changing, data: memoryview, shape: Units, blocks: Collection[int]) -> memoryview:
    header, rest = _read_frame(DifferenceHeader, data)
    _check_blocks(header.blocks, blocks)
    for block in header.blocks:
        for spec in unit_tensors(shape, block):
            num_rows, num_cols = spec.rows_cols
            planes, rest = _split(rest, TAG_BITS * ((num_rows + 7) // 8))
            tags = _read_tags(planes, num_rows)
            if not tags.any():
                continue
            matrix = after.rows(block, spec)
            for index in _rows_by_sending(tags):
                part, rest = _split(rest, len(index) * (num_cols + 4))
                for rows in rows_of(index, part, num_cols, spec.name).chunks():
                    matrix[rows.index] += rows.decoded()
            whole = np.flatnonzero(tags == WHOLE)
            part, rest = _split(rest, len(whole) * 4 * num_cols)
            values = np.frombuffer(part, dtype="<f4").reshape(len(whole), num_cols)
            if not np.isfinite(values).all():
                raise RemoteProtocolError(f"{spec.name}: a value is not finite", code="non_finite")
            matrix[whole] = values
    return rest
