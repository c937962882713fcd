"""How does the aggregator talk to all its clients over one encrypted port? A ROUTER socket, driven by ``poll``.

Who speaks is the CURVE public key that ZeroMQ attaches to every frame (``User-Id``), never a routing id: the routing id
is drawn by libzmq and only says where an answer goes. The registry is asked for every message, since ZeroMQ itself asks
only when a connection opens.

One thread, no blocking: ``send`` queues, ``poll`` moves bytes and returns what happened. Whatever bytes arrive, nothing
is raised out of ``poll``; they are answered with Refused and counted.
Memory per client is bounded: libzmq's queues count messages and are small, an upload flows only under credit, and a
client that does not read what waits for it is dropped.

libzmq cannot close one connection of a ROUTER, so a client that is dropped or revoked is *muted*: its connection stays
open, and nothing that comes over it is looked at.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NewType

import zmq
from zmq.utils.monitor import recv_monitor_message

from fedblocks.aggregator.auth import ZAP_DOMAIN, Gate, Registry
from fedblocks.protocol import codec, transfer
from fedblocks.protocol.errors import RefusalCode, RemoteProtocolError
from fedblocks.protocol.keys import KeyPair, require_secure_zmq
from fedblocks.protocol.messages import ClientKey, Delta, Message, Refused
from fedblocks.protocol.payloads import Bytes, FileSink, open_source
from fedblocks.protocol.transfer import Connection, Outbound

UploadId = NewType("UploadId", int)
"""Unique within one endpoint."""

#: Chunks in flight to this side over all clients: 16 MiB, whatever the number of uploads; each upload keeps at least 1.
MAX_CHUNKS_IN_FLIGHT: Final = 64
#: A client has one update at a time; a second one may be announced while the first is being answered.
MAX_OPEN_UPLOADS: Final = 2
#: Messages (not chunks) of one client: a burst, and then this many a second. A client needs about one a second.
MESSAGE_BURST: Final = 200
MESSAGES_PER_S: Final = 20.0
#: Multiparts taken from the socket before its owner gets a turn.
MAX_BATCH: Final = 256
#: libzmq queue lengths per client, in messages; above the credit window, so that credit is what limits.
HIGH_WATER_MARK: Final = 16
#: While a client's queue is full, it is tried again this often.
RETRY_S: Final = 0.02
#: After a reconnect, what the old connection still held may come out late; after this it is a second live session.
SECOND_SESSION_S: Final = 2.0
#: Older connections of one key that are remembered; a client has one at a time.
MAX_OLD_CONNECTIONS: Final = 16
LINGER_MS: Final = 1000
SELF_TEST_S: Final = 10.0


class EndpointError(RuntimeError):
    """The endpoint cannot start here; the text says what to do."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageReceived:
    """A message without a payload from an enrolled client."""

    key: ClientKey
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadAnnounced:
    """A client has an update: answer with ``accept_upload`` or ``refuse_upload``; nothing is sent before."""

    key: ClientKey
    message: Delta
    upload_id: UploadId


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadFinished:
    """All bytes are in the part file, length, checksums and hash verified; not yet fsynced."""

    key: ClientKey
    message: Delta
    upload_id: UploadId
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadFailed:
    """The upload ended before it was complete; its part file is gone. A refusal code was answered to the client."""

    key: ClientKey
    upload_id: UploadId
    code: RefusalCode | Literal["disconnected"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRejected:
    """Something was refused or ignored; nothing of it was processed."""

    key: ClientKey | None
    """None for a peer that never proved to hold a key."""
    address: str
    """IP address where ZeroMQ tells it, else empty."""
    code: RefusalCode
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerGone:
    """The connection of this client no longer exists; what was queued for it is dropped."""

    key: ClientKey


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondSession:
    """Two live connections hold the same key: a copied key, or the same site started twice. The newer one is served."""

    key: ClientKey
    served_address: str
    ignored_address: str


EndpointEvent = (
    MessageReceived | UploadAnnounced | UploadFinished | UploadFailed | PeerRejected | PeerGone | SecondSession
)


@dataclass(slots=True)
class ByteCount:
    """Bytes of all frames of one client at the socket, headers included, routing frames and encryption not."""

    received: int = 0
    sent: int = 0


class _Bucket:
    """A burst, and then so many a second."""

    def __init__(self, *, burst: int, per_s: float, now_s: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._tokens = float(burst)
        self._now_s = now_s

    def take(self, now_s: float) -> bool:
        """One of them, if there is one."""
        self._tokens = min(self._burst, self._tokens + (now_s - self._now_s) * self._per_s)
        self._now_s = now_s
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(slots=True, kw_only=True)
class _Session:
    key: ClientKey
    routing_id: bytes
    address: str
    since_s: float
    connection: Connection
    pending: Outbound | None = None
    uploads: dict[int, UploadId] = field(default_factory=dict[int, UploadId])
    """Transfer id of each open upload."""
    quota: _Bucket
    quota_told: bool = False
    skew_told: bool = False
    second_told: bool = False


class RouterEndpoint:
    """The aggregator's side of the wire.

    Args:
        bind: ZeroMQ address to listen on, e.g. ``tcp://*:5555``; port ``*`` takes a free one (see ``address``).
        keys: the aggregator's CURVE pair.
        registry: who may in.
        expected_clients: for the check of the descriptor limit.
        clock: monotonic seconds.

    Raises:
        EndpointError: the library is unfit, the address is taken, or too few descriptors are allowed.
        KeyFileError: libzmq is too old or lacks CURVE.
    """

    def __init__(
        self,
        bind: str,
        *,
        keys: KeyPair,
        registry: Registry,
        expected_clients: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        require_secure_zmq(zmq.zmq_version_info(), has_curve=bool(zmq.has("curve")))
        _raise_descriptor_limit(expected_clients)
        self.bytes_by_key: dict[ClientKey, ByteCount] = {}
        self.refused_by_key: dict[ClientKey, Counter[RefusalCode]] = {}
        """What this endpoint itself refused, per client and code."""
        self.failed_handshakes = 0
        """Peers that never proved to hold an enrolled key."""
        self._registry = registry
        self._clock = clock
        self._sessions: dict[ClientKey, _Session] = {}
        self._superseded: dict[ClientKey, deque[bytes]] = {}
        """Routing ids of a key's older connections: ignored, and reported if they go on speaking."""
        self._muted: dict[ClientKey, deque[bytes]] = {}
        """Routing ids of a client that was dropped or revoked; a new connection is heard again."""
        self._handshake_reports = _Bucket(burst=20, per_s=1.0, now_s=clock())
        self._uploads: dict[UploadId, tuple[ClientKey, int]] = {}
        self._next_upload = 1
        self._events: list[EndpointEvent] = []
        self._backlog: set[ClientKey] = set()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = Gate(self._context, registry)
        try:
            self._self_test()
            self._router = self._open(bind, keys)
        except BaseException:
            self._gate.close()
            self._context.destroy(linger=0)
            raise
        self._monitor = self._router.get_monitor_socket(
            zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH
        )
        self._poller = zmq.Poller()
        for socket in (self._router, self._gate.socket, self._monitor):
            self._poller.register(socket, zmq.POLLIN)

    @property
    def address(self) -> str:
        """Where it listens, with the port that was taken."""
        return _text(self._router.get(zmq.LAST_ENDPOINT))

    @property
    def connected(self) -> tuple[ClientKey, ...]:
        """Keys that have spoken and are not known to be gone."""
        return tuple(self._sessions)

    def poll(self, timeout_s: float) -> list[EndpointEvent]:
        """Moves bytes until something happened or ``timeout_s`` is over; the events, possibly none."""
        until_s = self._clock() + timeout_s
        self._purge_revoked()
        self._flush_backlog()
        while True:
            left_s = max(0.0, until_s - self._clock())
            wait_s = 0.0 if self._events else min(left_s, RETRY_S) if self._backlog else left_s
            ready = dict(self._poller.poll(math.ceil(wait_s * 1000)))
            if self._monitor in ready:
                self._watch_handshakes()
            if self._gate.socket in ready:
                self._answer_handshakes()
            if self._router in ready:
                self._receive_batch()
            self._grant()
            self._flush_backlog()
            if self._events or self._clock() >= until_s:
                events, self._events = self._events, []
                return events

    def send(self, key: ClientKey, message: Message, payload: Bytes | Path = b"") -> bool:
        """Queues a message, with its payload where its kind has one; False if this client is not connected.

        The payload is not copied: leave it unchanged until the client has it. Never blocks.

        Raises:
            LocalProtocolError: payload and ``payload_bytes`` differ.
            FileNotFoundError: the payload's file is gone.
        """
        session = self._sessions.get(key)
        if session is None or not self._registry.is_allowed(key):
            return False
        source = open_source(payload) if type(message) in _ANNOUNCING_TYPES else None
        try:
            session.connection.send(message, source)
        except RemoteProtocolError as error:
            if source is not None:
                source.close()
            self._drop(session, error.code, str(error))
            return False
        except BaseException:
            if source is not None:
                source.close()
            raise
        return self._flush(session)

    def accept_upload(self, upload_id: UploadId, part_path: Path) -> None:
        """Lets an announced upload come, into this file; UploadFinished or UploadFailed follows.

        Unknown ids are no error: the client may have gone meanwhile, which was or will be told by UploadFailed.

        Raises:
            OSError: the file cannot be made; the upload is still open, refuse it.
        """
        found = self._uploads.get(upload_id)
        if found is not None:
            session = self._sessions[found[0]]
            self._translate(session, session.connection.accept(found[1], FileSink(part_path)))
            self._grant()
            self._flush(session)

    def refuse_upload(self, upload_id: UploadId, refused: Refused) -> None:
        """Answers an announced or half-received upload with a refusal; its part file is deleted."""
        found = self._uploads.pop(upload_id, None)
        if found is None:
            return
        session = self._sessions[found[0]]
        del session.uploads[found[1]]
        try:
            session.connection.refuse(found[1], refused)
        except RemoteProtocolError as error:
            self._drop(session, error.code, str(error))
            return
        self._flush(session)

    def disconnect(self, key: ClientKey) -> None:
        """Forgets this client's connection and hears nothing more over it; a new connection is heard again."""
        session = self._sessions.get(key)
        if session is not None:
            self._flush(session)
            self._forget(session, "disconnected", "this side ended the connection", mute=True)

    def close(self) -> None:
        """Sends what libzmq still holds for at most a second, and ends. Half-received files are deleted."""
        for session in list(self._sessions.values()):
            self._flush(session)
            session.connection.close()
        self._sessions.clear()
        self._uploads.clear()
        self._router.disable_monitor()
        self._monitor.close(linger=0)
        self._gate.close()
        self._context.destroy(linger=LINGER_MS)

    def __enter__(self) -> RouterEndpoint:  # noqa: PYI034 (typing.Self came with Python 3.11)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, bind: str, keys: KeyPair) -> zmq.Socket[bytes]:
        self._context.set(zmq.MAX_SOCKETS, max(1023, self._context.get(zmq.MAX_SOCKETS)))
        router = self._context.socket(zmq.ROUTER)
        _secure(router, keys)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.ROUTER_HANDOVER, 0)
        router.set(zmq.MAXMSGSIZE, transfer.MAX_FRAME_BYTES)
        router.set(zmq.SNDHWM, HIGH_WATER_MARK)
        router.set(zmq.RCVHWM, HIGH_WATER_MARK)
        router.set(zmq.LINGER, LINGER_MS)
        router.set(zmq.HANDSHAKE_IVL, 30_000)
        router.set(zmq.HEARTBEAT_IVL, 5_000)
        router.set(zmq.HEARTBEAT_TIMEOUT, 30_000)
        router.set(zmq.HEARTBEAT_TTL, 60_000)
        router.set(zmq.TCP_KEEPALIVE, 1)
        router.set(zmq.TCP_KEEPALIVE_IDLE, 60)
        router.set(zmq.BACKLOG, 1024)
        router.set(zmq.IPV6, int("[" in bind))
        try:
            router.bind(bind)
        except zmq.ZMQError as error:
            raise EndpointError(f"cannot listen at {bind}: {error.strerror}; choose another address or port") from error
        return router

    def _self_test(self) -> None:
        """Proves that this ZeroMQ hands out the peer's key with its messages; without it nobody could be told apart.

        Raises:
            EndpointError: it does not (old stacks gave the constant ``user``).
        """
        server, client = (_new_pair(), _new_pair())
        router = self._context.socket(zmq.ROUTER)
        dealer = self._context.socket(zmq.DEALER)
        self._gate.admit_guest(client.public)
        try:
            _secure(router, server)
            port = router.bind_to_random_port("tcp://127.0.0.1")
            dealer.curve_publickey = client.public.encode("ascii")
            dealer.curve_secretkey = client.secret.encode("ascii")
            dealer.curve_serverkey = server.public.encode("ascii")
            dealer.connect(f"tcp://127.0.0.1:{port}")
            dealer.send(b"self-test")
            poller = zmq.Poller()
            poller.register(router, zmq.POLLIN)
            poller.register(self._gate.socket, zmq.POLLIN)
            until_s = time.monotonic() + SELF_TEST_S
            seen = None
            while seen is None and time.monotonic() < until_s:
                ready = dict(poller.poll(100))
                if self._gate.socket in ready:
                    self._gate.answer()
                if router in ready:
                    seen = _user_id(router.recv_multipart(copy=False)[-1])
        finally:
            self._gate.admit_guest(None)
            router.close(linger=0)
            dealer.close(linger=0)
        if seen != client.public:
            raise EndpointError(
                f"self-test: ZeroMQ {zmq.zmq_version()} with pyzmq {zmq.__version__} gives {seen!r} as the peer of a "
                "message, expected its public key; install pyzmq from its wheel"
            )

    def _watch_handshakes(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            self.failed_handshakes += 1
            if event["event"] == zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
                text = "a peer without CURVE, or with another server key, tried to connect"
                self._report_handshake(None, "not_enrolled", text)

    def _answer_handshakes(self) -> None:
        self._gate.answer()
        while self._gate.denials:
            denial = self._gate.denials.popleft()
            revoked = denial.standing == "revoked"
            text = f"key {denial.key} is {'revoked' if revoked else 'not enrolled'} and was not let in"
            self._report_handshake(denial.key, "revoked" if revoked else "not_enrolled", text)

    def _report_handshake(self, key: ClientKey | None, code: RefusalCode, text: str) -> None:
        # Strangers knock as often as they like; the books need not hold every knock.
        if self._handshake_reports.take(self._clock()):
            self._events.append(PeerRejected(key=key, address="", code=code, text=text))

    def _receive_batch(self) -> None:
        for _ in range(MAX_BATCH):
            try:
                parts = self._router.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._receive(parts)

    def _receive(self, parts: Sequence[zmq.Frame]) -> None:
        key = ClientKey(_user_id(parts[-1]) or "")
        routing_id = parts[0].bytes
        address = _address(parts[-1])
        count = self.bytes_by_key.setdefault(key, ByteCount())
        count.received += sum(len(part) for part in parts[1:])
        standing = self._registry.standing(key)
        if standing != "enrolled":
            self._turn_away(key, routing_id, address, "revoked" if standing == "revoked" else "not_enrolled")
            return
        if routing_id in self._muted.get(key, ()):
            return
        session = self._session_of(key, routing_id, address)
        if session is None:
            return
        frames: list[Bytes] = [part.buffer for part in parts[1:]]
        try:
            kind = codec.decode_header(frames[0]).kind if frames else ""
            if kind not in ("chunk", "credit") and not session.quota.take(self._clock()):
                raise RemoteProtocolError(
                    f"more than {MESSAGE_BURST} messages at once or {MESSAGES_PER_S:.0f} a second", code="over_quota"
                )
            self._translate(session, session.connection.receive(frames))
        except RemoteProtocolError as error:
            self._refuse(session, error)
        self._flush(session)

    def _session_of(self, key: ClientKey, routing_id: bytes, address: str) -> _Session | None:
        """The session that this connection belongs to; None if a newer connection of the same key has replaced it."""
        now_s = self._clock()
        session = self._sessions.get(key)
        if session is not None and session.routing_id == routing_id:
            return session
        superseded = self._superseded.setdefault(key, deque(maxlen=MAX_OLD_CONNECTIONS))
        if routing_id in superseded:
            if session is not None and not session.second_told and now_s - session.since_s > SECOND_SESSION_S:
                session.second_told = True
                self._events.append(SecondSession(key=key, served_address=session.address, ignored_address=address))
            return None
        if session is not None:
            superseded.append(session.routing_id)
            self._forget(session, "disconnected", "the client connected anew", mute=False)
        session = _Session(
            key=key,
            routing_id=routing_id,
            address=address,
            since_s=now_s,
            connection=Connection(receives=transfer.FROM_CLIENT, max_incoming=MAX_OPEN_UPLOADS),
            quota=_Bucket(burst=MESSAGE_BURST, per_s=MESSAGES_PER_S, now_s=now_s),
        )
        self._sessions[key] = session
        return session

    def _refuse(self, session: _Session, error: RemoteProtocolError) -> None:
        """Answers what was wrong, and falls silent where answers would feed a flood or a loop of two versions."""
        self._count_refusal(session.key, error.code)
        over_quota = error.code == "over_quota" or not session.quota.take(self._clock())
        if session.skew_told or (over_quota and session.quota_told):
            return
        session.quota_told = over_quota
        session.skew_told = error.code == "version_skew"
        self._events.append(PeerRejected(key=session.key, address=session.address, code=error.code, text=str(error)))
        try:
            session.connection.send(Refused(code=error.code, text=str(error)))
        except RemoteProtocolError as full:
            self._drop(session, full.code, str(full))

    def _translate(self, session: _Session, events: Sequence[transfer.ConnectionEvent]) -> None:
        for event in events:
            match event:
                case transfer.MessageArrived(message=message):
                    self._events.append(MessageReceived(key=session.key, message=message))
                case transfer.PayloadAnnounced(transfer=number, message=Delta() as message):
                    upload_id = UploadId(self._next_upload)
                    self._next_upload += 1
                    session.uploads[number] = upload_id
                    self._uploads[upload_id] = (session.key, number)
                    self._events.append(UploadAnnounced(key=session.key, message=message, upload_id=upload_id))
                case transfer.PayloadArrived(transfer=number, message=Delta() as message, sink=FileSink() as sink):
                    upload_id = session.uploads.pop(number)
                    del self._uploads[upload_id]
                    self._events.append(
                        UploadFinished(key=session.key, message=message, upload_id=upload_id, path=sink.path)
                    )
                case transfer.PayloadFailed(transfer=number, code=code, text=text):
                    upload_id = session.uploads.pop(number, None)
                    self._count_refusal(session.key, code)
                    if upload_id is None:
                        self._events.append(
                            PeerRejected(key=session.key, address=session.address, code=code, text=text)
                        )
                    else:
                        del self._uploads[upload_id]
                        self._events.append(UploadFailed(key=session.key, upload_id=upload_id, code=code, text=text))
                case _:
                    # PayloadRefused: its Refused follows as a message. Other announcing kinds are not in FROM_CLIENT.
                    pass

    def _grant(self) -> None:
        """Shares the chunks that may be in flight among the uploads, in turn."""
        waiting = [s for s in self._sessions.values() if s.connection.wants_credit]
        if not waiting:
            return
        window = max(1, min(transfer.WINDOW_CHUNKS, MAX_CHUNKS_IN_FLIGHT // len(waiting)))
        for session in waiting:
            try:
                granted = session.connection.grant(window)
            except RemoteProtocolError as error:
                self._drop(session, error.code, str(error))
                continue
            if granted:
                self._flush(session)

    def _flush_backlog(self) -> None:
        for key in list(self._backlog):
            session = self._sessions.get(key)
            if session is None:
                self._backlog.discard(key)
            else:
                self._flush(session)

    def _flush(self, session: _Session) -> bool:
        """Hands libzmq what it takes; False if the client turns out to be gone."""
        while True:
            outbound = session.pending or session.connection.next_outbound()
            session.pending = outbound
            if outbound is None:
                self._backlog.discard(session.key)
                return True
            try:
                self._router.send_multipart([session.routing_id, *outbound.frames], flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self._backlog.add(session.key)
                return True
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self._forget(session, "disconnected", "the client is gone", mute=False)
                self._events.append(PeerGone(key=session.key))
                return False
            session.pending = None
            self.bytes_by_key[session.key].sent += outbound.num_bytes

    def _turn_away(
        self, key: ClientKey, routing_id: bytes, address: str, code: Literal["revoked", "not_enrolled"]
    ) -> None:
        """A connection that was open when its key was taken off the list: told once, then not heard any more."""
        if routing_id in self._muted.get(key, ()):
            return
        self._mute(key, routing_id)
        text = f"key {key} is {'revoked' if code == 'revoked' else 'not enrolled'} at this aggregator"
        with contextlib.suppress(zmq.ZMQError):
            frames = codec.encode(Refused(code=code, text=text))
            self._router.send_multipart([routing_id, *frames], flags=zmq.NOBLOCK)
        self._reject(key, address, code, text)
        session = self._sessions.get(key)
        if session is not None:
            self._forget(session, code, text, mute=True)

    def _mute(self, key: ClientKey, routing_id: bytes) -> None:
        self._muted.setdefault(key, deque(maxlen=MAX_OLD_CONNECTIONS)).append(routing_id)

    def _purge_revoked(self) -> None:
        if self._registry.refresh():
            for session in list(self._sessions.values()):
                standing = self._registry.standing(session.key)
                if standing != "enrolled":
                    code = "revoked" if standing == "revoked" else "not_enrolled"
                    self._turn_away(session.key, session.routing_id, session.address, code)

    def _drop(self, session: _Session, code: RefusalCode, text: str) -> None:
        self._reject(session.key, session.address, code, text)
        self._forget(session, code, text, mute=True)

    def _forget(self, session: _Session, code: RefusalCode | Literal["disconnected"], text: str, *, mute: bool) -> None:
        for upload_id in session.uploads.values():
            del self._uploads[upload_id]
            self._events.append(UploadFailed(key=session.key, upload_id=upload_id, code=code, text=text))
        session.uploads.clear()
        session.connection.close()
        session.pending = None
        self._backlog.discard(session.key)
        self._sessions.pop(session.key, None)
        if mute:
            self._mute(session.key, session.routing_id)

    def _reject(self, key: ClientKey | None, address: str, code: RefusalCode, text: str) -> None:
        if key is not None:
            self._count_refusal(key, code)
        self._events.append(PeerRejected(key=key, address=address, code=code, text=text))

    def _count_refusal(self, key: ClientKey, code: RefusalCode) -> None:
        self.refused_by_key.setdefault(key, Counter())[code] += 1


_ANNOUNCING_TYPES: Final = frozenset(codec.KINDS[kind] for kind in transfer.ANNOUNCING)


def _new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public=ClientKey(public.decode("ascii")), secret=secret.decode("ascii"))


def _secure(router: zmq.Socket[bytes], keys: KeyPair) -> None:
    router.curve_server = True
    router.curve_publickey = keys.public.encode("ascii")
    router.curve_secretkey = keys.secret.encode("ascii")
    router.zap_domain = ZAP_DOMAIN.encode("ascii")
    # Without this a socket whose ZAP handler is missing lets everybody in.
    router.set(zmq.ZAP_ENFORCE_DOMAIN, 1)


def _user_id(frame: zmq.Frame) -> str | None:
    try:
        return _text(frame.get("User-Id"))
    except (zmq.ZMQError, UnicodeDecodeError):
        return None


def _address(frame: zmq.Frame) -> str:
    try:
        return _text(frame.get("Peer-Address"))
    except (zmq.ZMQError, UnicodeDecodeError):
        return ""


def _text(value: object) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _raise_descriptor_limit(expected_clients: int) -> None:
    """Lets this process open as many sockets as it may need, if the system allows it.

    Raises:
        EndpointError: the hard limit is too low.
    """
    # One per client, as many again for strangers in their handshake, and what the process itself holds.
    needed = 2 * expected_clients + 128
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise EndpointError(
                f"{expected_clients} clients need {needed} open files, the limit is {hard}; raise it (ulimit -Hn)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
