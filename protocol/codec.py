"""How does a message become bytes, and what may bytes from a peer become?

``encode`` makes the two small frames of a message (header, body) and ``decode`` reads them under explicit limits: plain
maps, arrays, strings, numbers, bytes, booleans and nil only; no extension types, no duplicate keys, bounded depth,
finite numbers, and exactly the fields of the dataclass named by the header.
Whatever else arrives raises :class:`RemoteProtocolError` and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin

import msgpack

from fedblocks.protocol.errors import LocalProtocolError, RemoteProtocolError
from fedblocks.protocol.messages import KIND_OF, KINDS, PROTOCOL_VERSION, Message

#: A body is small: tensors travel outside it. The largest legitimate one is a Delta that lists every tensor of every
#: trained block (about 60 bytes each), well under 64 KiB for a hundred blocks.
MAX_BODY_BYTES: Final = 256 * 1024
MAX_HEADER_BYTES: Final = 256
MAX_DEPTH: Final = 8
MAX_ITEMS: Final = 4096
MAX_TEXT_BYTES: Final = 16 * 1024

T = TypeVar("T")


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
    if len(body) > MAX_BODY_BYTES:
        raise LocalProtocolError(f"{kind}: body of {len(body)} bytes, at most {MAX_BODY_BYTES} allowed")
    return encode_header(Header(kind=kind, transfer=transfer)), body


def encode_header(header: Header) -> bytes:
    """The header frame; ``transfer`` stands in it only where there is one."""
    plain: dict[str, object] = {"protocol": PROTOCOL_VERSION, "kind": header.kind}
    if header.transfer is not None:
        plain["transfer"] = header.transfer
    return pack(plain)


def decode(header: bytes | memoryview, body: bytes | memoryview) -> Message:
    """The message in these two frames.

    Raises:
        RemoteProtocolError: for anything that is not exactly one message of this protocol version.
    """
    return decode_body(decode_header(header).kind, body)


def decode_header(frame: bytes | memoryview) -> Header:
    """The header in this frame; the kind in it is not yet known to be one of this protocol.

    Raises:
        RemoteProtocolError: ``version_skew`` for another protocol version, else ``malformed`` or ``too_large``.
    """
    head = unpack(frame, max_bytes=MAX_HEADER_BYTES)
    if not isinstance(head, dict) or set(head) | {"transfer"} != {"protocol", "kind", "transfer"}:
        raise RemoteProtocolError(
            "header: expected the fields protocol and kind, and transfer where a payload is meant"
        )
    if head["protocol"] != PROTOCOL_VERSION or type(head["protocol"]) is not int:
        raise RemoteProtocolError(
            f"the peer speaks protocol version {head['protocol']!r}, this side speaks {PROTOCOL_VERSION}; "
            "install the same fedblocks release on both sides",
            code="version_skew",
        )
    if not isinstance(head["kind"], str):
        raise RemoteProtocolError(f"header: kind is {type(head['kind']).__name__}, expected text")
    transfer = head.get("transfer")
    if "transfer" in head and (type(transfer) is not int or transfer < 0):
        raise RemoteProtocolError("header: transfer is not a number of 0 or more")
    return Header(kind=head["kind"], transfer=transfer)


def decode_body(kind: str, body: bytes | memoryview) -> Message:
    """The message of this kind in this frame.

    Raises:
        RemoteProtocolError: the kind is unknown, or the body is not exactly one message of it.
    """
    cls = KINDS.get(kind)
    if cls is None:
        raise RemoteProtocolError(f"unknown message kind {kind[:40]!r}")
    return from_plain(cls, unpack(body, max_bytes=MAX_BODY_BYTES), where=kind)


def pack(value: object) -> bytes:
    """msgpack bytes of plain values."""
    try:
        return msgpack.packb(value, use_bin_type=True, strict_types=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"cannot pack {type(value).__name__}: {error}") from error


def unpack(data: bytes | memoryview, *, max_bytes: int) -> Any:
    """Plain values from untrusted bytes, within the limits of this module."""
    if len(data) > max_bytes:
        raise RemoteProtocolError(f"frame of {len(data)} bytes, at most {max_bytes} allowed", code="too_large")
    try:
        value = msgpack.unpackb(
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
        )
    except RemoteProtocolError:
        raise
    # msgpack raises a mix of these (and its StackError, a ValueError) for bytes that are no msgpack of ours.
    except (ValueError, TypeError, UnicodeDecodeError, msgpack.UnpackException, RecursionError, OverflowError) as error:
        raise RemoteProtocolError(f"not a valid body: {type(error).__name__}: {error}"[:300]) from error
    _check_plain(value, depth=0)
    return value


def _unique_pairs(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise RemoteProtocolError(f"a map key is of type {type(key).__name__}, expected text")
        if key in result:
            raise RemoteProtocolError(f"map key {key[:40]!r} occurs twice")
        result[key] = value
    return result


def _check_plain(value: Any, *, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RemoteProtocolError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for item in value.values():
            _check_plain(item, depth=depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, depth=depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RemoteProtocolError(f"a number is {value}, expected a finite one", code="non_finite")
    elif value is not None and type(value) not in (int, str, bytes, bool):
        raise RemoteProtocolError(f"a value of type {type(value).__name__} is not allowed")


def to_plain(value: object) -> Any:
    """A dataclass as nested maps and lists; plain values as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise LocalProtocolError(f"a number to be sent is {value}")
    return value


def from_plain(cls: type[T], value: Any, *, where: str) -> T:
    """An instance of the dataclass ``cls`` from plain values, exactly its fields and their types.

    Raises:
        RemoteProtocolError: ``unknown_field`` for a field that this side does not know, else ``malformed``.
    """
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"{where}: expected a map, got {type(value).__name__}")
    hints = _hints(cls)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise RemoteProtocolError(f"{where}: unknown field {unknown[0][:60]!r}", code="unknown_field")
    missing = sorted(set(hints) - set(value))
    if missing:
        raise RemoteProtocolError(f"{where}: field {missing[0]!r} is missing")
    fields = {name: _convert(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}
    try:
        return cls(**fields)
    except ValueError as error:
        raise RemoteProtocolError(f"{where}: {error}") from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _convert(hint: Any, value: Any, where: str) -> Any:
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
        if value not in get_args(hint) or isinstance(value, bool):
            raise RemoteProtocolError(f"{where}: {str(value)[:40]!r} is none of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise RemoteProtocolError(f"{where}: expected a list, got {type(value).__name__}")
        inner = get_args(hint)[0]
        return tuple(_convert(inner, v, f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast("type[Any]", hint), value, where=where)
    if hint is float:
        if type(value) not in (int, float):
            raise RemoteProtocolError(f"{where}: expected a number, got {type(value).__name__}")
        if not math.isfinite(value):
            raise RemoteProtocolError(f"{where}: is {value}, expected a finite number", code="non_finite")
        return float(value)
    if type(value) is not hint:
        raise RemoteProtocolError(f"{where}: expected {hint.__name__}, got {type(value).__name__}")
    return value
