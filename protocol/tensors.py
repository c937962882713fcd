"""How does a tensor's change become bytes, and back? int8 codes with one scale a row, bf16, or fp32 (methods.md 7.1).

The payload of a Delta is the concatenation of its tensors, blocks ascending, inside a block in the order of
``units.unit_tensors``; its length follows from the headers before anything is allocated.
A tensor is read as ``[R, C]``; a vector is one row. A slim block has fewer rows or columns: always the first ones of
the whole block's (:func:`cut`, :func:`pad`).

Layout of one tensor, all numbers little-endian, ``k`` = rows sent:

======  =========================================================================================================
int8    row bitmap, ``ceil(R/8)`` bytes, only for matrices at density < 1 (row ``r`` is bit ``r % 8`` of byte
        ``r // 8``, least significant first; unused bits are 0); ``k`` scales fp32; ``k·C`` codes in -127..127
bf16    ``2·R·C`` bytes, ``k = R``
fp32    ``4·R·C`` bytes, ``k = R``
======  =========================================================================================================

Of a tensor whose rows the client has chosen (``model_shape.ChosenRows``), the row mask comes first: one bit for each
row of the whole tensor, ``ceil(rows/8)`` bytes, as many bits set as rows were assigned. What follows is the tensor of
those rows.

Rows that carry nothing (all zero, or a scale that would be subnormal) are not sent.
Where a bitmap names the rows they are simply absent from it.
A vector has no bitmap: ``k`` is 1 or 0, and 0 takes no bytes.
A matrix at density 1 has none either: ``k`` is ``R`` or, if no row carries anything, 0; beside rows that do, an empty
row has the smallest scale 2^-126 and codes 0.
So a tensor is always ``bitmap + k·(C + 4)`` bytes long, and an all-zero change is valid and sends no row.

Only elementwise numpy operations are used, so that every IEEE machine decodes the same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fedblocks.profiles.model_shape import ChosenRows, TensorSpec
from fedblocks.profiles.units import Units, unit_tensors
from fedblocks.protocol import row_mask
from fedblocks.protocol.errors import LocalProtocolError, RemoteProtocolError
from fedblocks.protocol.messages import DeltaFormat, TensorHeader
from fedblocks.protocol.row_mask import RowMask

FloatArray = NDArray[np.float32]
State = dict[int, dict[str, FloatArray]]
"""Block id -> tensor name -> values in the tensor's own shape. A block or tensor that is missing is all zero."""


def flatten(state: Mapping[int, Mapping[str, FloatArray]]) -> dict[str, FloatArray]:
    """The state as one map ``<block>/<tensor>`` -> values: how it is named in files."""
    return {f"{b}/{name}": np.ascontiguousarray(v) for b, tensors in state.items() for name, v in tensors.items()}


def unflatten(tensors: Mapping[str, FloatArray]) -> State:
    """The inverse of :func:`flatten`."""
    state: State = {}
    for key, values in tensors.items():
        block, name = key.split("/", 1)
        state.setdefault(int(block), {})[name] = values
    return state


def cut(values: FloatArray, shape: Sequence[int]) -> FloatArray:
    """The part of a whole tensor that a slim block trains: a view of its first ``shape`` rows and columns."""
    return values[tuple(slice(size) for size in shape)]


def pad(values: FloatArray, shape: Sequence[int]) -> FloatArray:
    """The whole tensor of this shape whose :func:`cut` is ``values``, zero elsewhere; itself where it is whole."""
    if values.shape == tuple(shape):
        return values
    whole = np.zeros(shape, dtype=np.float32)
    cut(whole, values.shape)[...] = values
    return whole


#: Partial sums of a row's energy; fixed, since their order decides between rows of nearly equal energy.
ENERGY_LANES: Final = 256
#: The smallest normal fp32. A scale below it would lose bits, and bits that depend on how a machine treats subnormals.
MIN_SCALE: Final = np.float32(2.0**-126)
LARGEST_CODE: Final = 127
#: Elements handled at once where a wider temporary is needed: 64 Ki fp64 values stay in the cache of a small core.
CHUNK_ELEMENTS: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTensor:
    """One tensor's bytes, and what they left out."""

    rows_sent: int
    payload: bytes
    residual: FloatArray | None
    """``x - xhat`` in the tensor's own shape; None for the dense formats, which leave nothing to a later round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows that a payload holds of one tensor: row ``index[i]`` is ``float32(values[i]) · scales[i]``; of chosen
    rows the index is that in the whole tensor."""

    index: NDArray[np.int64]  # (k,) ascending
    scales: FloatArray  # (k,) ones for the dense formats
    values: NDArray[np.int8] | FloatArray  # (k, C) a view on the payload where the machine allows it

    @property
    def place(self) -> NDArray[np.int64] | slice:
        """What selects these rows of the whole tensor: a slice, which copies nothing, where none is left out."""
        whole = len(self.index) > 0 and int(self.index[-1]) - int(self.index[0]) + 1 == len(self.index)
        return slice(int(self.index[0]), int(self.index[-1]) + 1) if whole else self.index

    def chunks(self) -> Iterator[Rows]:
        """The same rows, at most ``CHUNK_ELEMENTS`` values (but at least one row) at a time."""
        step = max(1, CHUNK_ELEMENTS // max(1, self.values.shape[1]))
        for start in range(0, len(self.index), step):
            part = slice(start, start + step)
            yield Rows(index=self.index[part], scales=self.scales[part], values=self.values[part])

    def decoded(self) -> FloatArray:
        """xhat, ``(k, C)``: one fp32 multiplication per element."""
        return self.values.astype(np.float32) * self.scales[:, None]

    def largest_magnitude(self) -> float:
        """A bound of |xhat|: 127 times the largest scale for int8, the largest value itself for the dense formats."""
        if self.values.size == 0:
            return 0.0
        if self.values.dtype == np.int8:
            return LARGEST_CODE * float(self.scales.max())
        return float(max(self.values.max(), -self.values.min()))

    def sum_of_squares(self) -> float:
        """|xhat|^2 as sum of ``s_i^2 · sum(q^2)``: for int8 the inner sums are exact integers (methods.md 8.2)."""
        parts: list[float] = []
        for rows in self.chunks():
            wide = rows.values.astype(np.int64 if rows.values.dtype == np.int8 else np.float64)
            inner = np.square(wide).sum(axis=1).astype(np.float64)
            parts.append(math.fsum((np.square(rows.scales.astype(np.float64)) * inner).tolist()))
        return math.fsum(parts)


def rows_kept(spec: TensorSpec, density: float) -> int:
    """kr of methods.md 7.1: the largest number of rows that an int8 payload may hold of this tensor."""
    rows, _ = spec.rows_cols
    # The density may be a peer's claim that nothing has checked yet.
    return rows if len(spec.shape) == 1 else math.ceil(min(max(density, 0.0), 1.0) * rows)


def _has_bitmap(spec: TensorSpec, density: float) -> bool:
    return len(spec.shape) > 1 and density < 1


def payload_length(spec: TensorSpec, rows_sent: int, *, format: DeltaFormat, density: float) -> int:
    """Exact bytes of one tensor (methods.md 7.1).

    Raises:
        RemoteProtocolError: ``shape_mismatch`` if this tensor cannot have that many rows sent.
    """
    rows, cols = spec.rows_cols
    mask = row_mask_bytes(spec)
    if format != "int8":
        if rows_sent != rows:
            raise RemoteProtocolError(
                f"{spec.name}: {rows_sent} rows announced, expected all {rows} in format {format}",
                code="shape_mismatch",
            )
        return mask + (2 if format == "bf16" else 4) * rows * cols
    most = rows_kept(spec, density)
    if _has_bitmap(spec, density):
        if not 0 <= rows_sent <= most:
            raise RemoteProtocolError(
                f"{spec.name}: {rows_sent} rows announced, expected 0 to {most} of {rows} at density {density}",
                code="shape_mismatch",
            )
        return mask + rows_sent * (cols + 4) + (rows + 7) // 8
    if rows_sent not in (0, rows):
        raise RemoteProtocolError(
            f"{spec.name}: {rows_sent} rows announced, expected 0 or all {rows}", code="shape_mismatch"
        )
    return mask + rows_sent * (cols + 4)


def row_mask_bytes(spec: TensorSpec) -> int:
    """Bytes before a tensor that say which of its rows it has; 0 but for chosen rows."""
    return row_mask.packed_bytes(spec.num_rows) if isinstance(spec, ChosenRows) else 0


def read_row_mask(spec: ChosenRows, payload: memoryview) -> RowMask:
    """Which rows the client has chosen, (rows of the whole tensor,).

    Raises:
        RemoteProtocolError: ``length_mismatch``, not exactly as many as were assigned.
    """
    try:
        return row_mask.unpack(payload[: row_mask_bytes(spec)], spec.num_rows, spec.shape[0])
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{spec.name}: {error}", code=error.code) from error


def encode_tensor(
    delta: FloatArray,
    residual: FloatArray | None,
    *,
    format: DeltaFormat,
    density: float,
    cap: float = math.inf,
) -> EncodedTensor:
    """The bytes of ``delta`` plus what earlier rounds left out (error feedback, methods.md 7.1).

    Args:
        delta: fp32 in the tensor's own shape; one dimension means a vector.
        residual: what is still owed, in the same shape; None means nothing.
        cap: ``3·lr·tau``, element-wise bound on the residual that is added; infinite on the server side.

    Raises:
        LocalProtocolError: the sum is not finite, or too large for the format.
    """
    x = np.array(delta, dtype=np.float32, order="C")
    if residual is not None:
        if residual.shape != x.shape:
            raise LocalProtocolError(f"residual of shape {residual.shape} for a delta of shape {x.shape}")
        x += np.clip(residual, np.float32(-cap), np.float32(cap))
    if not math.isfinite(_largest(x)):
        raise LocalProtocolError("a change to be sent holds a value that is not finite; nothing may be uploaded")
    if format == "fp32":
        return EncodedTensor(rows_sent=_num_rows(x), payload=x.astype("<f4", copy=False).tobytes(), residual=None)
    if format == "bf16":
        half = x.astype(ml_dtypes.bfloat16)
        if not math.isfinite(_largest(half.astype(np.float32))):
            raise LocalProtocolError(f"a change of {_largest(x)} is too large for bf16")
        return EncodedTensor(rows_sent=_num_rows(x), payload=half.tobytes(), residual=None)
    return _encode_int8(x, density)


def _encode_int8(x: FloatArray, density: float) -> EncodedTensor:
    spec = TensorSpec(name="", shape=x.shape)
    num_rows, num_cols = spec.rows_cols
    matrix = x.reshape(num_rows, num_cols)
    # Negating the minimum instead of taking absolute values avoids a temporary of the tensor's size.
    peak = np.maximum(matrix.max(axis=1), -matrix.min(axis=1))  # (R,)
    scales = peak / np.float32(LARGEST_CODE)
    if _overflows(scales):
        raise LocalProtocolError(f"a change of {peak.max()} is too large for int8 with a fp32 scale")
    carries = scales >= MIN_SCALE
    if _has_bitmap(spec, density):
        # A stable sort on the negated energy puts the lower index first among equals.
        order = np.argsort(-_row_energy(matrix), kind="stable")[: rows_kept(spec, density)]
        index = np.sort(order[carries[order]])
    else:
        index = np.arange(num_rows if carries.any() else 0)
    sent = np.where(carries, scales, MIN_SCALE)[index]
    codes = np.empty((len(index), num_cols), dtype=np.int8)
    step = max(1, CHUNK_ELEMENTS // num_cols)
    for start in range(0, len(index), step):
        rows = index[start : start + step]
        quotient = np.rint(matrix[rows] / sent[start : start + step, None])
        quotient[~carries[rows]] = 0
        codes[start : start + step] = np.clip(quotient, -LARGEST_CODE, LARGEST_CODE)
        # x turns into the residual row by row; rows that are not sent stay as they are.
        matrix[rows] -= codes[start : start + step].astype(np.float32) * sent[start : start + step, None]
    rows = Rows(index=index, scales=sent, values=codes)
    return encoded_rows(spec, rows, residual=matrix.reshape(x.shape), density=density)


def max_rows_sent(spec: TensorSpec, density: float) -> int | None:
    """The most rows of this tensor that an int8 update may choose; None: it sends all of them, or none."""
    return rows_kept(spec, density) if _has_bitmap(spec, density) else None


def encoded_rows(spec: TensorSpec, rows: Rows, *, residual: FloatArray, density: float) -> EncodedTensor:
    """The bytes of int8 rows that somebody else has chosen and encoded by the rule of :func:`encode_tensor`.

    Args:
        rows: ascending; all or none where :func:`max_rows_sent` is None.
        residual: what they leave out, in the tensor's shape.
    """
    head = b""
    if _has_bitmap(spec, density):
        bitmap = np.zeros(spec.rows_cols[0], dtype=np.bool_)
        bitmap[rows.index] = True
        head = np.packbits(bitmap, bitorder="little").tobytes()
    payload = head + rows.scales.astype("<f4", copy=False).tobytes() + rows.values.tobytes()
    return EncodedTensor(rows_sent=len(rows.index), payload=payload, residual=residual)


def _row_energy(matrix: FloatArray) -> NDArray[np.float64]:
    """Sum of squares of each row (R,), in an order that every encoder shares: rows of equal energy tie everywhere.

    Lane ``j`` of 256 adds the squares of columns ``j, j + 256, ...`` one after the other; then the upper half of the
    lanes is added to the lower half until one is left.
    """
    num_rows, num_cols = matrix.shape
    energy = np.empty(num_rows, dtype=np.float64)
    step = max(1, CHUNK_ELEMENTS // num_cols)
    for start in range(0, num_rows, step):
        rows = matrix[start : start + step]
        lanes = np.zeros((len(rows), ENERGY_LANES), dtype=np.float64)
        for first in range(0, num_cols, ENERGY_LANES):
            tile = rows[:, first : first + ENERGY_LANES].astype(np.float64)
            lanes[:, : tile.shape[1]] += np.square(tile, out=tile)
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        energy[start : start + step] = lanes[:, 0]
    return energy


def _largest(values: FloatArray) -> float:
    """The largest magnitude; NaN if there is one."""
    largest = float(max(values.max(), -values.min()))  # a NaN in either is one in the result
    return largest if math.isfinite(largest) else math.nan


def _overflows(scales: FloatArray) -> bool:
    """True if the largest code times the largest scale is beyond fp32."""
    return LARGEST_CODE * float(scales.max()) > float(np.finfo(np.float32).max)


def _num_rows(x: FloatArray) -> int:
    return 1 if x.ndim == 1 else x.shape[0]


def read_rows(
    spec: TensorSpec,
    rows_sent: int,
    payload: memoryview,
    *,
    format: DeltaFormat,
    density: float,
) -> Rows:
    """The rows in one tensor's bytes, checked completely.

    Raises:
        RemoteProtocolError: ``shape_mismatch`` (impossible number of rows), ``length_mismatch`` (other length than the
            formula's; a bitmap that names other rows than announced; a row mask of another number of rows than
            assigned), ``malformed`` (code -128, scale below 2^-126) or ``non_finite``.
    """
    expected = payload_length(spec, rows_sent, format=format, density=density)
    if len(payload) != expected:
        raise RemoteProtocolError(
            f"{spec.name}: {len(payload)} bytes, expected {expected} for {rows_sent} rows", code="length_mismatch"
        )
    if isinstance(spec, ChosenRows):
        chosen = np.flatnonzero(read_row_mask(spec, payload))
        inner = TensorSpec(name=spec.name, shape=spec.shape, is_out=spec.is_out)
        rows = read_rows(inner, rows_sent, payload[row_mask_bytes(spec) :], format=format, density=density)
        return Rows(index=chosen[rows.index], scales=rows.scales, values=rows.values)
    num_rows, num_cols = spec.rows_cols
    if format != "int8":
        kind = np.dtype("<f4") if format == "fp32" else np.dtype(ml_dtypes.bfloat16)
        dense = np.frombuffer(payload, dtype=kind).astype(np.float32, copy=False).reshape(num_rows, num_cols)
        if not math.isfinite(_largest(dense)):
            raise RemoteProtocolError(f"{spec.name}: a value is not finite", code="non_finite")
        return Rows(index=np.arange(num_rows), scales=np.ones(num_rows, dtype=np.float32), values=dense)
    index = np.arange(rows_sent)
    offset = 0
    if _has_bitmap(spec, density):
        offset = (num_rows + 7) // 8
        bits = np.unpackbits(np.frombuffer(payload[:offset], dtype=np.uint8), bitorder="little")
        index = np.flatnonzero(bits)
        if len(index) != rows_sent or (rows_sent and index[-1] >= num_rows):
            raise RemoteProtocolError(
                f"{spec.name}: the bitmap names {len(index)} rows, {rows_sent} of {num_rows} were announced",
                code="length_mismatch",
            )
    return rows_of(index, payload[offset:], num_cols, spec.name)


def rows_of(index: NDArray[np.int64], data: memoryview, num_cols: int, name: str) -> Rows:
    """The int8 rows ``index`` from ``k`` scales and ``k·C`` codes, ``data`` having exactly their length.

    Raises:
        RemoteProtocolError: ``non_finite`` or ``malformed`` for a scale or a code that no encoder makes.
    """
    scales = np.frombuffer(data[: 4 * len(index)], dtype="<f4").astype(np.float32)
    codes = np.frombuffer(data[4 * len(index) :], dtype=np.int8).reshape(len(index), num_cols)
    if len(index):
        if not math.isfinite(_largest(scales)):
            raise RemoteProtocolError(f"{name}: a row scale is not finite", code="non_finite")
        if _overflows(scales):
            raise RemoteProtocolError(f"{name}: a row scale of {scales.max()} overflows fp32", code="non_finite")
        if scales.min() < MIN_SCALE:
            raise RemoteProtocolError(f"{name}: a row scale is {scales.min()}, expected at least {MIN_SCALE}")
        if codes.min() < -LARGEST_CODE:
            raise RemoteProtocolError(f"{name}: a code is -128, expected -127 to 127")
    return Rows(index=index, scales=scales, values=codes)


def decode_tensor(
    spec: TensorSpec,
    rows_sent: int,
    payload: memoryview,
    *,
    format: DeltaFormat,
    density: float,
) -> FloatArray:
    """The values in one tensor's bytes, fp32 ``(R, C)``; rows that were not sent are 0. Of chosen rows, those of the
    whole tensor.

    Raises:
        RemoteProtocolError: as :func:`read_rows`.
    """
    rows = read_rows(spec, rows_sent, payload, format=format, density=density)
    num_rows, num_cols = spec.rows_cols
    if isinstance(spec, ChosenRows):
        num_rows = spec.num_rows
    decoded = np.zeros((num_rows, num_cols), dtype=np.float32)
    decoded[rows.index] = rows.decoded()
    return decoded


def check_tensor(
    spec: TensorSpec,
    rows_sent: int,
    payload: memoryview,
    *,
    format: DeltaFormat,
    density: float,
    limit: float,
) -> None:
    """All checks of :func:`read_rows`, and that no value can exceed ``limit``; reads the scales, decodes nothing.

    Raises:
        RemoteProtocolError: as :func:`read_rows`, or ``over_norm``.
    """
    largest = read_rows(spec, rows_sent, payload, format=format, density=density).largest_magnitude()
    if largest > limit:
        raise RemoteProtocolError(
            f"{spec.name}: a change of up to {largest:.3g} in one value, at most {limit:.3g} can come from this "
            "assignment (8·lr·steps)",
            code="over_norm",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlot:
    """Where in a payload one tensor lies."""

    block: int
    spec: TensorSpec
    rows_sent: int
    offset: int
    num_bytes: int

    def of(self, payload: memoryview) -> memoryview:
        """This tensor's bytes."""
        return payload[self.offset : self.offset + self.num_bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaLayout:
    """All tensors of a payload in order."""

    slots: tuple[TensorSlot, ...]
    total_bytes: int


def delta_layout(
    headers: Sequence[TensorHeader],
    *,
    shape: Units,
    blocks: Sequence[int],
    format: DeltaFormat,
    density: float,
    width: float = 1.0,
) -> DeltaLayout:
    """Where each tensor lies, from the headers alone: exactly the tensors of ``blocks``, in their order.

    Args:
        width: share of each block that the payload holds, one of ``model_shape.WIDTHS``.

    Raises:
        RemoteProtocolError: ``malformed`` (out of order or twice), ``not_assigned`` (another block), ``incomplete`` (a
            tensor of ``blocks`` is missing) or ``shape_mismatch`` (no such tensor, or not that many rows).
    """
    specs = {block: {spec.name: spec for spec in unit_tensors(shape, block, width)} for block in blocks}
    expected = [(block, name) for block in sorted(specs) for name in specs[block]]
    number_of = {place: number for number, place in enumerate(expected)}
    numbers = [number_of[h.block, h.name] for h in headers if (h.block, h.name) in number_of]
    if any(later.block < earlier.block for earlier, later in itertools.pairwise(headers)) or any(
        later <= earlier for earlier, later in itertools.pairwise(numbers)
    ):
        raise RemoteProtocolError("tensors are listed twice or out of order, expected blocks ascending, then by place")
    for header in headers:
        if header.block not in blocks:
            raise RemoteProtocolError(
                f"block {header.block} is not assigned, expected blocks {list(blocks)}", code="not_assigned"
            )
    missing = set(range(len(expected))).difference(numbers)
    if missing:
        block, name = expected[min(missing)]
        raise RemoteProtocolError(f"block {block}: tensor {name} is missing", code="incomplete")
    slots: list[TensorSlot] = []
    offset = 0
    for header in headers:
        spec = specs[header.block].get(header.name)
        if spec is None:
            raise RemoteProtocolError(
                f"block {header.block}: there is no tensor {header.name[:60]!r}", code="shape_mismatch"
            )
        num_bytes = payload_length(spec, header.rows_sent, format=format, density=density)
        slots.append(
            TensorSlot(block=header.block, spec=spec, rows_sent=header.rows_sent, offset=offset, num_bytes=num_bytes)
        )
        offset += num_bytes
    return DeltaLayout(slots=tuple(slots), total_bytes=offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedDelta:
    """An update ready to be sent."""

    headers: tuple[TensorHeader, ...]
    parts: tuple[bytes, ...]
    """One per header; the payload is their concatenation."""
    residuals: State
    """e' of methods.md 7.3, of the shapes that were sent, to be staged until the upload is accepted; empty for the
    dense formats."""


def encode_delta(
    shape: Units,
    blocks: Sequence[int],
    deltas: Mapping[int, Mapping[str, FloatArray]],
    residuals: Mapping[int, Mapping[str, FloatArray]],
    *,
    format: DeltaFormat,
    density: float,
    cap: float = math.inf,
    width: float = 1.0,
    encode: Callable[[int, TensorSpec, FloatArray | None], EncodedTensor] | None = None,
    chosen: Mapping[int, Mapping[str, RowMask]] | None = None,
) -> EncodedDelta:
    """All tensors of ``blocks`` (ascending) encoded in payload order. A residual that is missing is zero.

    Args:
        deltas: of the slim blocks, in the shapes of ``unit_tensors(shape, block, width)``.
        residuals: of the whole blocks; what lies outside the slim ones is not looked at.
        cap: as in :func:`encode_tensor`.
        width: share of each block that was trained, one of ``model_shape.WIDTHS``.
        encode: (block, tensor, what is owed of it) -> its bytes, by the rule of :func:`encode_tensor`; instead of
            ``deltas``, for who holds the values elsewhere.
        chosen: which rows train, of each tensor that asks for it (``model_shape.ChosenRows``).

    Raises:
        LocalProtocolError: a delta has another shape than the model's, a value that cannot be sent, or other rows than
            are asked for.
    """
    headers: list[TensorHeader] = []
    parts: list[bytes] = []
    rest: State = {}
    for block in blocks:
        for spec in unit_tensors(shape, block, width):
            owed = residuals.get(block, {}).get(spec.name)
            owed = None if owed is None else cut(owed, spec.shape)
            if encode is not None:
                encoded = encode(block, spec, owed)
            else:
                delta = deltas[block][spec.name]
                if delta.shape != spec.shape:
                    found = f"block {block}: {spec.name} has shape {delta.shape}"
                    raise LocalProtocolError(f"{found}, expected {spec.shape}")
                encoded = encode_tensor(delta, owed, format=format, density=density, cap=cap)
            headers.append(TensorHeader(block=block, name=spec.name, rows_sent=encoded.rows_sent))
            parts.append(_mask_of(chosen or {}, block, spec) + encoded.payload)
            if encoded.residual is not None:
                rest.setdefault(block, {})[spec.name] = encoded.residual
    return EncodedDelta(headers=tuple(headers), parts=tuple(parts), residuals=rest)


def _mask_of(chosen: Mapping[int, Mapping[str, RowMask]], block: int, spec: TensorSpec) -> bytes:
    if not isinstance(spec, ChosenRows):
        return b""
    mask = chosen.get(block, {}).get(spec.name)
    found = None if mask is None else (len(mask), int(mask.sum()))
    if mask is None or found != (spec.num_rows, spec.shape[0]):
        raise LocalProtocolError(
            f"block {block}: {spec.name} has a row mask of (rows, chosen) {found}, expected "
            f"{(spec.num_rows, spec.shape[0])}"
        )
    return row_mask.pack(mask)
