"""How does the conversation travel where only one side may speak first? In turns: a request, and one reply to it.

Flower's messages are of that kind (``fedblocks/flower``). A turn is a list of frames, the same everywhere on its way:

    head | header, body, payload of a message | header, body, payload of the next | ...

Header and body are those of the wire (``codec.py``), decoded under the same limits; a payload stands whole beside its
message, since the carrier cuts it up by itself, and is empty for a message that has none.
The head names the session: a reconnect is a new one, and nothing of the one before counts in it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from fedblocks.protocol import codec
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.messages import KIND_OF, Message
from fedblocks.protocol.payloads import Bytes, Sink
from fedblocks.protocol.transfer import ANNOUNCING, Chunk, IncomingTransfer

#: Messages in one turn: what a peer may have to say at once is its files, a task and a few answers.
MAX_MESSAGES: Final = 64
_FRAMES_PER_MESSAGE: Final = 3

Said = tuple[Message, Bytes]
"""A message with its payload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """First frame of a turn."""

    session: str
    """Drawn by the aggregator; a client that sees another one than before greets again. Empty in a client's reply to a
    first turn that it could not read."""
    key: str = ""
    """In a reply: the public key of the client."""


def encode(head: Head, said: Sequence[Said]) -> list[bytes]:
    """The frames of a turn.

    Raises:
        LocalProtocolError: a message would not pass its own decoder.
    """
    frames = [codec.pack(codec.to_plain(head))]
    for message, payload in said:
        frames += [*codec.encode(message), bytes(payload)]
    return frames


def decode(frames: Sequence[Bytes], receives: frozenset[str]) -> tuple[Head, list[Said]]:
    """Head and messages of a turn; payloads are not looked at yet (:func:`keep`).

    Args:
        receives: kinds that this side takes from its peer.

    Raises:
        RemoteProtocolError: the frames are no such turn.
    """
    number, rest = divmod(len(frames) - 1, _FRAMES_PER_MESSAGE)
    if not frames or rest or number > MAX_MESSAGES:
        raise RemoteProtocolError(
            f"a turn of {len(frames)} frames, expected 1 and 3 for each of {MAX_MESSAGES} at most"
        )
    head = codec.from_plain(Head, codec.unpack(frames[0], max_bytes=codec.MAX_HEADER_BYTES), where="turn")
    said: list[Said] = []
    for i in range(1, len(frames), _FRAMES_PER_MESSAGE):
        message = codec.decode(frames[i], frames[i + 1])
        kind = KIND_OF[type(message)]
        if kind not in receives:
            raise RemoteProtocolError(f"{kind}: this side does not receive that kind")
        if len(frames[i + 2]) and kind not in ANNOUNCING:
            raise RemoteProtocolError(f"{kind}: carries a payload, but this kind has none")
        said.append((message, frames[i + 2]))
    return head, said


def keep(message: Message, payload: Bytes, sink: Sink) -> None:
    """Write a payload to its sink and finish it, if it is what its message says; else the sink is discarded.

    Raises:
        RemoteProtocolError: ``length_mismatch`` or ``checksum_mismatch``.
        OSError: the sink has no room.
    """
    size = cast("int", getattr(message, "payload_bytes", 0))
    transfer = IncomingTransfer(
        transfer=1,
        payload_bytes=size,
        payload_sha256=cast("str", getattr(message, "payload_sha256", "")),
        sink=sink,
        chunk_bytes=max(size, 1),
    )
    try:
        if size or len(payload):
            transfer.grant(1)
            if not size:
                text = f"a payload of {len(payload)} bytes, announced was none"
                raise RemoteProtocolError(text, code="length_mismatch")
            transfer.receive(Chunk(transfer=1, index=0, crc32=zlib.crc32(payload)), payload)
        transfer.finish_if_complete()
    except BaseException:
        sink.discard()
        raise
