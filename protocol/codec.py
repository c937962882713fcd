"""How does a message become bytes, and what may bytes from a peer become?

``encode`` makes the two small frames of a message (header, body) and ``decode`` reads them under explicit limits: plain
maps, arrays, strings, numbers, bytes, booleans and nil only; no extension types, no duplicate keys, bounded depth,
finite numbers, and exactly the fields of the dataclass named by the header.
Whatever else arrives raises :class:`RemoteProtocolError` and nothing else.

The bytes are walked through once before msgpack sees them: msgpack reserves memory for what an array announces, so that
1.5 kB of nested empty promises would cost 16 MB and 20 ms.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin

import msgpack

from fedblocks.protocol.errors import LocalProtocolError, RefusalCode, RemoteProtocolError
from fedblocks.protocol.messages import KIND_OF, KINDS, PROTOCOL_VERSION, Message

#: A body is small: tensors travel outside it. The largest legitimate one is a Delta that lists every tensor of every
#: trained block (about 60 bytes each), well under 64 KiB for a hundred blocks.
MAX_BODY_BYTES: Final = 256 * 1024
MAX_HEADER_BYTES: Final = 256
MAX_DEPTH: Final = 8
MAX_ITEMS: Final = 4096
#: Values in one body, keys included: a Delta has 7 per tensor, so this is enough for 190 blocks of 12 tensors.
MAX_VALUES: Final = 16 * 1024
MAX_TEXT_BYTES: Final = 16 * 1024

T = TypeVar("T")
Frame = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first frame of everything on the wire: which body follows, and which payload transfer it speaks of."""

    kind: str
    transfer: int | None = None
    """On a message that announces a payload: the sender's id of the transfer. On a refusal: the transfer it refuses."""


def encode(message: Message, *, transfer: int | None = None) -> tuple[bytes, bytes]:
    """The header and body frames of ``message``.

    Raises:
        LocalProtocolError: the message would not pass its own decoder.
    """
    kind = KIND_OF.get(type(message))
    if kind is None:
        raise LocalProtocolError(f"{type(message).__name__} is no message of this protocol")
    body = pack(to_plain(message))
    try:
        decode_body(kind, body)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"{kind}: {error}") from error
    return encode_header(Header(kind=kind, transfer=transfer)), body


def encode_header(header: Header) -> bytes:
    """The header frame; ``transfer`` stands in it only where there is one."""
    plain: dict[str, object] = {"protocol": PROTOCOL_VERSION, "kind": header.kind}
    if header.transfer is not None:
        plain["transfer"] = header.transfer
    return pack(plain)


def decode(header: Frame, body: Frame) -> Message:
    """The message in these two frames.

    Raises:
        RemoteProtocolError: for anything that is not exactly one message of this protocol version.
    """
    return decode_body(decode_header(header).kind, body)


def decode_header(frame: Frame) -> Header:
    """The header in this frame; the kind in it is not yet known to be one of this protocol.

    Raises:
        RemoteProtocolError: ``version_skew`` for another protocol version, else ``malformed`` or ``too_large``.
    """
    value = unpack(frame, max_bytes=MAX_HEADER_BYTES)
    head = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    if set(head) | {"transfer"} != {"protocol", "kind", "transfer"}:
        raise RemoteProtocolError(
            "header: expected the fields protocol and kind, and transfer where a payload is meant"
        )
    if head["protocol"] != PROTOCOL_VERSION or type(head["protocol"]) is not int:
        raise RemoteProtocolError(
            f"the peer speaks protocol version {head['protocol']!r}, this side speaks {PROTOCOL_VERSION}; "
            "install the same fedblocks release on both sides",
            code="version_skew",
        )
    kind = head["kind"]
    if not isinstance(kind, str):
        raise RemoteProtocolError(f"header: kind is {type(kind).__name__}, expected text")
    if "transfer" not in head:
        return Header(kind=kind)
    transfer = head["transfer"]
    if not isinstance(transfer, int) or isinstance(transfer, bool) or transfer < 0:
        raise RemoteProtocolError("header: transfer is not a number of 0 or more")
    return Header(kind=kind, transfer=transfer)


def decode_body(kind: str, body: Frame) -> Message:
    """The message of this kind in this frame.

    Raises:
        RemoteProtocolError: the kind is unknown, or the body is not exactly one message of it.
    """
    cls = KINDS.get(kind)
    if cls is None:
        raise RemoteProtocolError(f"unknown message kind {kind[:40]!r}")
    return cast("Message", from_plain(cast("type[Any]", cls), unpack(body, max_bytes=MAX_BODY_BYTES), where=kind))


def pack(value: object) -> bytes:
    """msgpack bytes of plain values."""
    try:
        return cast("bytes", msgpack.packb(value, use_bin_type=True, strict_types=True))
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"cannot pack {type(value).__name__}: {error}") from error


def unpack(data: Frame, *, max_bytes: int) -> object:
    """Plain values from untrusted bytes, within the limits of this module; numbers are checked by ``from_plain``."""
    if len(data) > max_bytes:
        raise RemoteProtocolError(f"frame of {len(data)} bytes, at most {max_bytes} allowed", code="too_large")
    data = bytes(data)
    _check_structure(data)
    try:
        return cast(
            "object",
            msgpack.unpackb(
                data,
                raw=False,
                strict_map_key=True,
                use_list=True,
                object_pairs_hook=_unique_pairs,
                max_str_len=MAX_TEXT_BYTES,
                max_bin_len=MAX_TEXT_BYTES,
                max_array_len=MAX_ITEMS,
                max_map_len=MAX_ITEMS,
                max_ext_len=0,
            ),
        )
    # msgpack raises a mix of these (and its StackError, a ValueError) for bytes that are no msgpack of ours.
    except (ValueError, TypeError, UnicodeDecodeError, msgpack.UnpackException, RecursionError, OverflowError) as error:
        raise RemoteProtocolError(f"not a valid body: {type(error).__name__}: {error}"[:300]) from error


def _unique_pairs(pairs: list[tuple[object, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise RemoteProtocolError(f"a map key is of type {type(key).__name__}, expected text")
        if key in result:
            raise RemoteProtocolError(f"map key {key[:40]!r} occurs twice")
        result[key] = value
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lead:
    """What a msgpack value's first byte says about the bytes after it."""

    kind: Literal["flat", "text", "array", "map", "forbidden"]
    size: int
    """Of ``flat``: bytes of the value. Else: items or bytes, unless ``length_bytes`` holds their number."""
    length_bytes: int = 0


def _leads() -> tuple[_Lead, ...]:
    """The 256 first bytes of the msgpack specification."""
    leads = [_Lead(kind="flat", size=0)] * 128  # positive fixint
    leads += [_Lead(kind="map", size=n) for n in range(16)]
    leads += [_Lead(kind="array", size=n) for n in range(16)]
    leads += [_Lead(kind="text", size=n) for n in range(32)]
    leads += [_Lead(kind="forbidden", size=0)] * 32
    leads += [_Lead(kind="flat", size=0)] * 32  # negative fixint
    for first in (0xC0, 0xC2, 0xC3):  # nil, false, true
        leads[first] = _Lead(kind="flat", size=0)
    for power in range(3):
        leads[0xC4 + power] = leads[0xD9 + power] = _Lead(kind="text", size=0, length_bytes=2**power)  # bin, str
    for power in range(2):
        leads[0xDC + power] = _Lead(kind="array", size=0, length_bytes=2 ** (power + 1))
        leads[0xDE + power] = _Lead(kind="map", size=0, length_bytes=2 ** (power + 1))
        leads[0xCA + power] = _Lead(kind="flat", size=4 * 2**power)  # float
    for power in range(4):
        leads[0xCC + power] = leads[0xD0 + power] = _Lead(kind="flat", size=2**power)  # uint, int
    return tuple(leads)


_LEADS: Final = _leads()


def _check_structure(data: bytes) -> None:
    """Walk over one msgpack value without building it: allowed types, bounded depth, lengths and number of values.

    Raises:
        RemoteProtocolError: ``malformed``, or ``too_large`` for more values than any message has.
    """
    end = len(data)
    offset = 0
    remaining = [1]  # values still to come, of the top level and of each open container
    for _ in range(MAX_VALUES):
        while remaining and not remaining[-1]:
            remaining.pop()
        if not remaining:
            break
        remaining[-1] -= 1
        if offset >= end:
            raise RemoteProtocolError(f"the frame ends early, after {end} bytes")
        lead = _LEADS[data[offset]]
        size = lead.size
        offset += 1
        if lead.length_bytes:
            size = int.from_bytes(data[offset : offset + lead.length_bytes], "big")
            offset += lead.length_bytes
        if lead.kind == "flat":
            offset += size
        elif lead.kind == "text":
            if size > MAX_TEXT_BYTES:
                raise RemoteProtocolError(f"a text of {size} bytes, at most {MAX_TEXT_BYTES} allowed")
            offset += size
        elif lead.kind == "forbidden":
            raise RemoteProtocolError(
                f"a value starts with byte {data[offset - 1]:#x}: extension types are not allowed"
            )
        else:
            if size > MAX_ITEMS:
                raise RemoteProtocolError(f"an {lead.kind} of {size} items, at most {MAX_ITEMS} allowed")
            if len(remaining) > MAX_DEPTH:
                raise RemoteProtocolError(f"nested deeper than {MAX_DEPTH} levels")
            remaining.append(2 * size if lead.kind == "map" else size)
    else:
        if any(remaining):
            raise RemoteProtocolError(f"more than {MAX_VALUES} values in one frame", code="too_large")
    if offset != end:
        raise RemoteProtocolError(f"the frame has {end} bytes, its value {offset}")


def to_plain(value: object) -> object:
    """A dataclass as nested maps and lists; plain values as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in cast("list[object]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise LocalProtocolError(f"a number to be sent is {value}")
    return value


def from_plain(cls: type[T], value: object, *, where: str) -> T:
    """An instance of the dataclass ``cls`` from plain values, exactly its fields and their types.

    Raises:
        RemoteProtocolError: ``unknown_field`` for a field that this side does not know, ``non_finite`` for such a
            number, the code that a field names in its metadata (``refusal``), else ``malformed``.
    """
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"{where}: expected a map, got {type(value).__name__}")
    plain = cast("dict[str, object]", value)
    hints = _hints(cls)
    unknown = sorted(set(plain) - set(hints))
    if unknown:
        raise RemoteProtocolError(f"{where}: unknown field {unknown[0][:60]!r}", code="unknown_field")
    missing = sorted(set(hints) - set(plain))
    if missing:
        raise RemoteProtocolError(f"{where}: field {missing[0]!r} is missing")
    fields = {name: _convert_field(hints[name], plain[name], f"{where}.{name}") for name in hints}
    try:
        return cls(**fields)
    except ValueError as error:
        raise RemoteProtocolError(f"{where}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hint:
    type: Any
    refusal: RefusalCode | None
    """The code that answers a value of the wrong type, where it is not ``malformed``."""


@functools.cache
def _hints(cls: type[Any]) -> dict[str, _Hint]:
    hints = typing.get_type_hints(cls)
    return {f.name: _Hint(type=hints[f.name], refusal=f.metadata.get("refusal")) for f in dataclasses.fields(cls)}


def _convert_field(hint: _Hint, value: object, where: str) -> Any:
    try:
        return _convert(hint.type, value, where)
    except RemoteProtocolError as error:
        if hint.refusal is not None:
            raise RemoteProtocolError(str(error), code=hint.refusal) from error
        raise


def _convert(hint: Any, value: object, where: str) -> Any:
    while hasattr(hint, "__supertype__"):  # NewType
        hint = hint.__supertype__
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        (inner,) = (o for o in options if o is not type(None))
        return _convert(inner, value, where)
    if origin is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            got = repr(value[:40]) if isinstance(value, str) else type(value).__name__
            raise RemoteProtocolError(f"{where}: {got} is none of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise RemoteProtocolError(f"{where}: expected a list, got {type(value).__name__}")
        inner = get_args(hint)[0]
        return tuple(_convert(inner, v, f"{where}[{i}]") for i, v in enumerate(cast("list[object]", value)))
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast("type[Any]", hint), value, where=where)
    if hint is float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise RemoteProtocolError(f"{where}: expected a number, got {type(value).__name__}")
        if not math.isfinite(value):
            raise RemoteProtocolError(f"{where}: is {value}, expected a finite number", code="non_finite")
        return float(value)
    if type(value) is not hint:
        raise RemoteProtocolError(f"{where}: expected {hint.__name__}, got {type(value).__name__}")
    return value
