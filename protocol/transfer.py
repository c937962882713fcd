"""How do messages and large payloads share one connection so that neither side queues more than a few chunks?

A message that announces a payload carries a ``transfer`` id in its header. The payload follows in chunks of exactly
``CHUNK_BYTES`` (the last one may be shorter), in order, each only after the receiver granted credit for it, and credit
is granted only after the receiver's owner accepted the announcement. So a refused upload never sends a byte, and what
is in flight is bounded by the receiver, whatever the sender announces.

    sender                               receiver
    announce(transfer, bytes, sha256) ─▶ owner accepts: opens a sink       (or refuses: Refused with the transfer id)
                                      ◀─ credit(transfer, chunks)
    chunk(transfer, index, crc32, raw)▶  length, CRC-32, then the sink; more credit
    …                                    after the last one: SHA-256 of the whole

:class:`Connection` is this protocol for one connection and both directions, without sockets, threads or clocks: frames
go in (``receive``) and come out (``next_outbound``). A reconnect is a new ``Connection``; nothing survives it.
Transfer ids ascend per connection and direction.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from fedblocks.protocol import codec
from fedblocks.protocol.errors import LocalProtocolError, RefusalCode, RemoteProtocolError
from fedblocks.protocol.messages import KIND_OF, Message, Refused
from fedblocks.protocol.payloads import Bytes, Sink, Source

#: Small enough that a heartbeat behind a full window passes a 1 Mbit/s uplink in 8 s, large enough that header, credit
#: and encryption cost under 0.1 %. The field's ceiling is 4 MiB.
CHUNK_BYTES: Final = 256 * 1024
#: Chunks that a receiver lets be in flight on one connection, over all its transfers.
WINDOW_CHUNKS: Final = 4
#: What a sender tolerates: credit beyond this would let a peer fill the sender's queues.
MAX_CREDIT_CHUNKS: Final = 8
#: No single payload is larger; owners set far lower limits of their own.
MAX_PAYLOAD_BYTES: Final = 1 << 40
#: The largest frame that either side may send, for the transport's own limit: encryption adds 33 bytes to each.
MAX_FRAME_BYTES: Final = max(CHUNK_BYTES, codec.MAX_BODY_BYTES) + 256
MAX_FRAMES: Final = 3
#: Small messages that wait for a peer that does not read.
MAX_OUTBOX: Final = 256
MAX_OUTGOING: Final = 64

FROM_CLIENT: Final = frozenset({"hello", "fetch", "ready", "delta", "report", "heartbeat", "refused", "goodbye"})
FROM_AGGREGATOR: Final = frozenset(
    {"welcome", "resource", "assignment", "evaluate", "probe", "ack", "heartbeat_reply", "refused", "goodbye"}
)
ANNOUNCING: Final = frozenset({"resource", "assignment", "evaluate", "probe", "delta"})

Frames = tuple[Bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Body of a chunk frame; the raw bytes are the frame after it."""

    transfer: int
    index: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Body of a credit frame: the receiver takes this many more chunks."""

    transfer: int
    chunks: int


def num_chunks(payload_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Chunks of a payload: all full but the last; none for an empty payload."""
    return -(-payload_bytes // chunk_bytes)


class OutgoingTransfer:
    """The sending half: never sends a chunk without credit."""

    def __init__(self, *, transfer: int, message: Message, source: Source, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.transfer = transfer
        self.message = message
        self.sent_bytes = 0
        """Bytes of all its chunks so far, headers included."""
        self._source = source
        self._chunk_bytes = chunk_bytes
        self._num_chunks = num_chunks(source.num_bytes, chunk_bytes)
        self._granted = 0
        self._next = 0

    @property
    def has_credit(self) -> bool:
        return self._next < self._granted

    @property
    def is_finished(self) -> bool:
        return self._next == self._num_chunks

    def grant(self, chunks: int) -> None:
        """The peer takes ``chunks`` more.

        Raises:
            RemoteProtocolError: more than the payload has, or more at once than this side lets itself queue.
        """
        total = self._granted + chunks
        if chunks < 1 or total > self._num_chunks or total - self._next > MAX_CREDIT_CHUNKS:
            raise RemoteProtocolError(
                f"credit for {chunks} chunks of transfer {self.transfer}: {self._next} sent of {self._num_chunks}, "
                f"{self._granted} granted before, at most {MAX_CREDIT_CHUNKS} may be open"
            )
        self._granted = total

    def next_chunk(self) -> Frames:
        """The three frames of the next chunk; call only with credit."""
        if not self.has_credit:
            raise LocalProtocolError(f"transfer {self.transfer}: no credit for chunk {self._next}")
        offset = self._next * self._chunk_bytes
        data = self._source.read(offset, min(self._chunk_bytes, self._source.num_bytes - offset))
        chunk = Chunk(transfer=self.transfer, index=self._next, crc32=zlib.crc32(data))
        frames = (codec.encode_header(codec.Header(kind="chunk")), codec.pack(codec.to_plain(chunk)), data)
        self._next += 1
        self.sent_bytes += sum(len(frame) for frame in frames)
        return frames

    def close(self) -> None:
        self._source.close()


class IncomingTransfer:
    """The receiving half: checks order, length and CRC of each chunk before it is kept, and the hash of the whole."""

    def __init__(
        self, *, transfer: int, payload_bytes: int, payload_sha256: str, sink: Sink, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.transfer = transfer
        self.sink = sink
        self._payload_bytes = payload_bytes
        self._payload_sha256 = payload_sha256
        self._chunk_bytes = chunk_bytes
        self._num_chunks = num_chunks(payload_bytes, chunk_bytes)
        self._granted = 0
        self._next = 0
        self._sha256 = hashlib.sha256()

    @property
    def in_flight(self) -> int:
        """Chunks granted and not yet here."""
        return self._granted - self._next

    @property
    def ungranted(self) -> int:
        """Chunks that still need credit."""
        return self._num_chunks - self._granted

    def grant(self, limit: int) -> Credit | None:
        """Credit for up to ``limit`` chunks; None if all is granted or the limit is 0."""
        chunks = min(limit, self.ungranted)
        if chunks < 1:
            return None
        self._granted += chunks
        return Credit(transfer=self.transfer, chunks=chunks)

    def receive(self, chunk: Chunk, data: Bytes) -> None:
        """Keeps one chunk.

        Raises:
            RemoteProtocolError: no credit, out of order, wrong length, wrong CRC.
            OSError: the sink has no room.
        """
        if self.in_flight < 1:
            raise RemoteProtocolError(f"transfer {self.transfer}: chunk {chunk.index} came without credit")
        if chunk.index != self._next:
            raise RemoteProtocolError(f"transfer {self.transfer}: chunk {chunk.index} came, expected {self._next}")
        expected = min(self._chunk_bytes, self._payload_bytes - self._next * self._chunk_bytes)
        if len(data) != expected:
            raise RemoteProtocolError(
                f"transfer {self.transfer}: chunk {chunk.index} has {len(data)} bytes, expected {expected}",
                code="length_mismatch",
            )
        if zlib.crc32(data) != chunk.crc32:
            raise RemoteProtocolError(
                f"transfer {self.transfer}: CRC-32 of chunk {chunk.index} differs", code="checksum_mismatch"
            )
        self.sink.write(data)
        self._sha256.update(data)
        self._next += 1

    def finish_if_complete(self) -> bool:
        """True once all is here and its hash is the announced one; the sink is finished then.

        Raises:
            RemoteProtocolError: the hash differs.
        """
        if self._next < self._num_chunks:
            return False
        digest = self._sha256.hexdigest()
        if digest != self._payload_sha256:
            raise RemoteProtocolError(
                f"payload of {self._payload_bytes} bytes has SHA-256 {digest[:12]}…, "
                f"announced was {self._payload_sha256[:12]}…",
                code="checksum_mismatch",
            )
        self.sink.finish()
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageArrived:
    """A message without a payload."""

    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadAnnounced:
    """The peer wants to send this payload: answer with ``accept`` or ``refuse``."""

    transfer: int
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadArrived:
    """The whole payload is in its sink, verified."""

    transfer: int
    message: Message
    sink: Sink


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadFailed:
    """The payload was given up on this side and the peer was told why; its sink is discarded."""

    transfer: int
    message: Message
    code: RefusalCode
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadRefused:
    """The peer does not want (the rest of) a payload of ours; its Refused follows as MessageArrived."""

    transfer: int
    message: Message
    sent_bytes: int


ConnectionEvent = MessageArrived | PayloadAnnounced | PayloadArrived | PayloadFailed | PayloadRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbound:
    """Frames to hand to the socket now, in this order and as one multipart."""

    frames: Frames
    kind: str
    message: Message | None = None
    """The message itself, or the one whose payload this chunk belongs to; None for credit."""
    payload_bytes_sent: int | None = None
    """On the last chunk of a payload: bytes of all its chunks, headers included."""

    @property
    def num_bytes(self) -> int:
        return sum(len(frame) for frame in self.frames)


class Connection:
    """Both directions of one connection: messages, payloads, credit.

    Args:
        receives: kinds that this side takes from its peer.
        max_incoming: payloads that the peer may have open at once; more are refused with ``over_quota``.
    """

    def __init__(
        self,
        *,
        receives: frozenset[str],
        max_incoming: int,
        chunk_bytes: int = CHUNK_BYTES,
        window: int = WINDOW_CHUNKS,
    ) -> None:
        self._receives = receives
        self._max_incoming = max_incoming
        self._chunk_bytes = chunk_bytes
        self._window = window
        self._outbox: deque[Outbound] = deque()
        self._outgoing: dict[int, OutgoingTransfer] = {}
        self._last_outgoing = 0
        self._announced: dict[int, Message] = {}
        self._incoming: dict[int, IncomingTransfer] = {}
        self._last_incoming = 0
        self._late_chunks = 0
        """Chunks of refused payloads that had credit and may still be under way."""

    def send(self, message: Message, payload: Source | None = None) -> None:
        """Queues a message; a kind with a payload needs its source.

        Raises:
            LocalProtocolError: the source's length is not the announced one, or a source without such a kind.
            RemoteProtocolError: ``over_quota``, the peer does not read what waits for it.
        """
        kind = KIND_OF.get(type(message), type(message).__name__)
        if (kind in ANNOUNCING) != (payload is not None):
            raise LocalProtocolError(f"{kind}: payload given: {payload is not None}, expected: {kind in ANNOUNCING}")
        if payload is None:
            self._queue(Outbound(frames=codec.encode(message), kind=kind, message=message))
            return
        announced = _payload_bytes(message)
        if payload.num_bytes != announced:
            raise LocalProtocolError(f"{kind}: payload of {payload.num_bytes} bytes, payload_bytes says {announced}")
        if len(self._outgoing) >= MAX_OUTGOING:
            raise RemoteProtocolError(f"{MAX_OUTGOING} payloads wait for the peer", code="over_quota")
        transfer = self._last_outgoing + 1
        self._queue(Outbound(frames=codec.encode(message, transfer=transfer), kind=kind, message=message))
        self._last_outgoing = transfer
        outgoing = OutgoingTransfer(transfer=transfer, message=message, source=payload, chunk_bytes=self._chunk_bytes)
        if outgoing.is_finished:
            outgoing.close()
        else:
            self._outgoing[transfer] = outgoing

    def next_outbound(self) -> Outbound | None:
        """What may be sent now: waiting messages first, then one chunk of the oldest payload that has credit."""
        if self._outbox:
            return self._outbox.popleft()
        for outgoing in self._outgoing.values():
            if outgoing.has_credit:
                frames = outgoing.next_chunk()
                if not outgoing.is_finished:
                    return Outbound(frames=frames, kind="chunk", message=outgoing.message)
                del self._outgoing[outgoing.transfer]
                # The chunk still refers to the source's memory or is a copy of its own: closing is safe.
                outgoing.close()
                return Outbound(
                    frames=frames, kind="chunk", message=outgoing.message, payload_bytes_sent=outgoing.sent_bytes
                )
        return None

    def receive(self, frames: Sequence[Bytes]) -> list[ConnectionEvent]:
        """Takes one multipart from the peer.

        Raises:
            RemoteProtocolError: it is nothing that this protocol allows here; nothing was processed. A fault inside a
                payload does not raise: the payload is refused, see :class:`PayloadFailed`.
        """
        if not 2 <= len(frames) <= MAX_FRAMES:
            raise RemoteProtocolError(f"a message of {len(frames)} frames, expected 2, or 3 for a chunk")
        header = codec.decode_header(frames[0])
        if header.kind == "chunk":
            if len(frames) != MAX_FRAMES or header.transfer is not None:
                raise RemoteProtocolError("chunk: expected header, body and raw bytes")
            plain = codec.unpack(frames[1], max_bytes=codec.MAX_HEADER_BYTES)
            return self._receive_chunk(codec.from_plain(Chunk, plain, where="chunk"), frames[2])
        if len(frames) != MAX_FRAMES - 1:
            raise RemoteProtocolError(f"{header.kind[:40]}: expected header and body, got {len(frames)} frames")
        if header.kind == "credit":
            if header.transfer is not None:
                raise RemoteProtocolError("credit: its transfer belongs in the body")
            plain = codec.unpack(frames[1], max_bytes=codec.MAX_HEADER_BYTES)
            self._receive_credit(codec.from_plain(Credit, plain, where="credit"))
            return []
        message = codec.decode_body(header.kind, frames[1])
        if header.kind not in self._receives:
            raise RemoteProtocolError(f"{header.kind}: this side does not receive that kind")
        if header.kind in ANNOUNCING:
            return self._receive_announcement(header, message)
        if isinstance(message, Refused):
            return self._receive_refusal(header, message)
        if header.transfer is not None:
            raise RemoteProtocolError(f"{header.kind}: carries a transfer, but this kind has no payload")
        return [MessageArrived(message=message)]

    def accept(self, transfer: int, sink: Sink) -> list[ConnectionEvent]:
        """The owner wants an announced payload, into this sink. Credit goes out with the next :meth:`grant`."""
        message = self._announced[transfer]
        self._incoming[transfer] = IncomingTransfer(
            transfer=transfer,
            payload_bytes=_payload_bytes(message),
            payload_sha256=_payload_sha256(message),
            sink=sink,
            chunk_bytes=self._chunk_bytes,
        )
        return self._advance(transfer, lambda _incoming: None)

    def refuse(self, transfer: int, refused: Refused) -> None:
        """The owner does not want an announced or half-received payload; its sink is discarded, the peer is told.

        Unknown ids are no error: the payload may just have failed by itself.
        """
        if self._announced.pop(transfer, None) is None:
            return
        incoming = self._incoming.pop(transfer, None)
        if incoming is not None:
            incoming.sink.discard()
            self._late_chunks += incoming.in_flight
        self._queue(Outbound(frames=codec.encode(refused, transfer=transfer), kind="refused", message=refused))

    @property
    def wants_credit(self) -> bool:
        """True while an accepted payload has chunks without credit."""
        return any(incoming.ungranted for incoming in self._incoming.values())

    @property
    def in_flight(self) -> int:
        """Chunks granted to the peer and not yet here."""
        return sum(incoming.in_flight for incoming in self._incoming.values())

    def grant(self, window: int | None = None) -> int:
        """Queues credit for accepted payloads, oldest first, up to the window; the chunks granted."""
        room = min(self._window, self._window if window is None else window) - self.in_flight
        granted = 0
        for incoming in self._incoming.values():
            credit = incoming.grant(room - granted)
            if credit is not None:
                granted += credit.chunks
                frames = (codec.encode_header(codec.Header(kind="credit")), codec.pack(codec.to_plain(credit)))
                self._queue(Outbound(frames=frames, kind="credit"))
        return granted

    def close(self) -> None:
        """Gives up everything that is under way, without a word to the peer; half-received sinks are discarded."""
        for outgoing in self._outgoing.values():
            outgoing.close()
        for incoming in self._incoming.values():
            incoming.sink.discard()
        self._outgoing.clear()
        self._incoming.clear()
        self._announced.clear()
        self._outbox.clear()

    @property
    def open_outgoing(self) -> tuple[OutgoingTransfer, ...]:
        """Payloads of ours that are not fully sent."""
        return tuple(self._outgoing.values())

    @property
    def open_incoming(self) -> dict[int, Message]:
        """Announced payloads that are not fully here, by transfer id."""
        return dict(self._announced)

    def _queue(self, outbound: Outbound) -> None:
        if len(self._outbox) >= MAX_OUTBOX:
            raise RemoteProtocolError(f"{MAX_OUTBOX} messages wait for the peer, it does not read", code="over_quota")
        self._outbox.append(outbound)

    def _receive_announcement(self, header: codec.Header, message: Message) -> list[ConnectionEvent]:
        transfer = header.transfer
        if transfer is None or transfer <= self._last_incoming:
            raise RemoteProtocolError(
                f"{header.kind}: transfer id is {transfer}, expected one above {self._last_incoming}"
            )
        sha256 = _payload_sha256(message)
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise RemoteProtocolError(f"{header.kind}: payload_sha256 is not 64 hexadecimal digits")
        if _payload_bytes(message) < 0:
            raise RemoteProtocolError(f"{header.kind}: payload_bytes is {_payload_bytes(message)}")
        self._last_incoming = transfer
        full = len(self._announced) >= self._max_incoming
        self._announced[transfer] = message
        if _payload_bytes(message) > MAX_PAYLOAD_BYTES:
            text = f"payload_bytes is {_payload_bytes(message)}, at most {MAX_PAYLOAD_BYTES} allowed"
            return [self._fail(transfer, "too_large", text)]
        if full:
            return [self._fail(transfer, "over_quota", f"{self._max_incoming} payloads are under way already")]
        return [PayloadAnnounced(transfer=transfer, message=message)]

    def _receive_refusal(self, header: codec.Header, message: Refused) -> list[ConnectionEvent]:
        events: list[ConnectionEvent] = []
        outgoing = None if header.transfer is None else self._outgoing.pop(header.transfer, None)
        if outgoing is not None:
            outgoing.close()
            events.append(
                PayloadRefused(transfer=outgoing.transfer, message=outgoing.message, sent_bytes=outgoing.sent_bytes)
            )
        return [*events, MessageArrived(message=message)]

    def _receive_credit(self, credit: Credit) -> None:
        outgoing = self._outgoing.get(credit.transfer)
        if outgoing is not None:
            outgoing.grant(credit.chunks)
        else:
            raise RemoteProtocolError(f"credit for transfer {credit.transfer}, which is not under way")

    def _receive_chunk(self, chunk: Chunk, data: Bytes) -> list[ConnectionEvent]:
        if chunk.transfer in self._incoming:
            return self._advance(chunk.transfer, lambda incoming: incoming.receive(chunk, data))
        if chunk.transfer in self._announced:
            return [self._fail(chunk.transfer, "malformed", "a chunk came before its payload was accepted")]
        if self._late_chunks < 1:
            raise RemoteProtocolError(f"chunk of transfer {chunk.transfer}, which is not under way")
        self._late_chunks -= 1
        return []

    def _advance(self, transfer: int, step: Callable[[IncomingTransfer], None]) -> list[ConnectionEvent]:
        incoming = self._incoming[transfer]
        try:
            step(incoming)
            if not incoming.finish_if_complete():
                return []
        except RemoteProtocolError as error:
            return [self._fail(transfer, error.code, str(error))]
        except OSError as error:
            return [self._fail(transfer, "no_space", f"the payload cannot be stored: {error.strerror}")]
        del self._incoming[transfer]
        return [PayloadArrived(transfer=transfer, message=self._announced.pop(transfer), sink=incoming.sink)]

    def _fail(self, transfer: int, code: RefusalCode, text: str) -> PayloadFailed:
        message = self._announced[transfer]
        self.refuse(transfer, Refused(code=code, text=text, attempt_id=getattr(message, "attempt_id", None)))
        return PayloadFailed(transfer=transfer, message=message, code=code, text=text)


def _payload_bytes(message: Message) -> int:
    return getattr(message, "payload_bytes", 0)


def _payload_sha256(message: Message) -> str:
    return getattr(message, "payload_sha256", "")
