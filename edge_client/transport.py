"""How does the client stay in touch with the aggregator while it computes? In a thread that training cannot block.

The thread owns the ZeroMQ context and the one DEALER socket; the caller's thread talks to it through two queues
(:meth:`Transport.send`, :meth:`Transport.get`). It sends heartbeats, moves payloads under credit, notices a dead
connection, and builds a new one with growing pauses.

    connecting --handshake--> connected --nothing heard for 3 intervals | connection lost--> waiting --pause over--.
        ^   |                                                                  ^                                   |
        |   '--refused, nobody there, too slow--------------------------------'                                   |
        '----------------------------------------------------------------------------------------------------------'
    any --key refused | other mechanism | nobody there for connect_timeout_s--> stopped, with a fatal Problem

libzmq's own reconnecting is off: it would keep messages of the lost connection, whose transfers mean nothing on the
next one. A reconnect starts from nothing: what was under way is dropped, ``Connected`` is reported, and the caller
sends its Hello and its open update again. Messages that the caller sends before it has seen that event are dropped too,
since they were meant for the connection before.

libzmq is silent about refused keys; the socket monitor is not (field.md 3.2, rule 5).
"""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import zmq
from zmq.utils.monitor import recv_monitor_message

from fedblocks.edge_client.link import LinkMeter
from fedblocks.protocol import transfer
from fedblocks.protocol.errors import LocalProtocolError, RemoteProtocolError
from fedblocks.protocol.keys import KeyPair, parse_key, require_secure_zmq
from fedblocks.protocol.messages import (
    KIND_OF,
    Ack,
    Assignment,
    AttemptId,
    Delta,
    Evaluate,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    Probe,
    Refused,
    Resource,
    Welcome,
)
from fedblocks.protocol.payloads import Bytes, MemorySink, Source, open_source
from fedblocks.protocol.transfer import Connection, Outbound

#: Silent intervals after which a connection counts as dead.
SILENT_INTERVALS: Final = 3
#: An attempt to connect that is no handshake by then is given up: packets vanish, or the name does not resolve.
ATTEMPT_TIMEOUT_S: Final = 10.0
#: Failed handshakes in a row after which the other side does not hold the expected key, and the pause between them.
WRONG_KEY_ATTEMPTS: Final = 3
WRONG_KEY_PAUSE_S: Final = 0.3
BACKOFF_MIN_S: Final = 1.0
BACKOFF_MAX_S: Final = 32.0
#: The aggregator may ask for any interval; outside of this it would flood or never notice a loss.
HEARTBEAT_RANGE_S: Final = (0.05, 300.0)
#: Payloads that the aggregator may have open to us at once (a few files of the run, and a task).
MAX_INCOMING: Final = 16
#: Events that wait for a caller who is busy; beyond, nothing more is read from the socket.
MAX_WAITING_EVENTS: Final = 1000
HIGH_WATER_MARK: Final = 64
CLOSE_LINGER_S: Final = 2.0

Reason: TypeAlias = Literal[
    "key_refused",
    "wrong_server_key",
    "other_mechanism",
    "version_skew",
    "unreachable",
    "too_large",
    "malformed",
    "internal",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """A new authenticated connection. Send Hello, then what is still unanswered; nothing of before was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The connection is lost; the next attempt is under way or will be."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A message; for the kinds that carry a payload, with its verified bytes."""

    message: Message
    payload: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadSent:
    """All chunks of this update are on their way; its Ack or Refused will follow."""

    attempt_id: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that the user should read. After a fatal one the transport has stopped."""

    exit_code: Literal[3, 4, 5]
    reason: Reason
    text: str
    fatal: bool


TransportEvent: TypeAlias = Connected | Disconnected | Received | UploadSent | Problem
OnSent: TypeAlias = Callable[[str, int, str], None]
"""Called in the transport's thread with (kind, bytes, what is in it) for everything that leaves this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outgoing:
    """A message of the caller, and the connection that it was meant for."""

    epoch: int
    message: Message
    source: Source | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Status:
    attempt_id: AttemptId | None = None
    phase: str = "starting"
    steps_done: int = 0


class Transport:
    """The client's side of the wire. Starts its thread at once; end it with :meth:`close`.

    Args:
        address: ``tcp://host:port`` of the aggregator.
        server_key: its CURVE public key, Z85.
        key_pair: ours.
        heartbeat_interval_s: until a Welcome names another one.
        connect_timeout_s: nobody there for so long before the first connection is fatal (exit 3).
        lost_timeout_s: the same after a connection was lost: an aggregator box may reboot.
        max_payload_bytes: larger payloads are refused (they are held in memory).
        on_sent: see :data:`OnSent`; the bytes of all calls sum up to ``bytes_sent``.
        socks_proxy: ``host:port`` of a SOCKS5 proxy.
        seed: of the jitter in the pauses; None draws one.
        meter: takes the times of the traffic.

    Raises:
        KeyFileError: a key is malformed, or libzmq is unfit.
        ValueError: the address is none.
    """

    def __init__(
        self,
        address: str,
        *,
        server_key: str,
        key_pair: KeyPair,
        heartbeat_interval_s: float = 5.0,
        connect_timeout_s: float = 20.0,
        lost_timeout_s: float = 3600.0,
        max_payload_bytes: int = 1 << 30,
        on_sent: OnSent | None = None,
        socks_proxy: str | None = None,
        backoff_s: tuple[float, float] = (BACKOFF_MIN_S, BACKOFF_MAX_S),
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        meter: LinkMeter | None = None,
    ) -> None:
        require_secure_zmq(zmq.zmq_version_info(), has_curve=bool(zmq.has("curve")))
        if not address.startswith("tcp://") or not address.rpartition(":")[2].isdigit():
            raise ValueError(f"address is {address!r}, expected tcp://host:port")
        self.bytes_sent = 0
        """Bytes of all frames at the socket, headers included, encryption not."""
        self.bytes_received = 0
        self.connections = 0
        """Connections made so far."""
        self.last_reply: HeartbeatReply | None = None
        self._address = address
        self._server_key = parse_key(server_key)
        self._key_pair = key_pair
        self._interval_s = heartbeat_interval_s
        self._connect_timeout_s = connect_timeout_s
        self._lost_timeout_s = lost_timeout_s
        self._max_payload_bytes = max_payload_bytes
        self._on_sent = on_sent
        self._socks_proxy = socks_proxy
        self._backoff_s = backoff_s
        self._random = random.Random(seed)
        self._clock = clock
        self.meter = meter or LinkMeter(clock=clock)

        self._events: queue.SimpleQueue[tuple[int, TransportEvent]] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[_Outgoing] = queue.SimpleQueue()
        self._seen_epoch = 0
        """Connection that the caller has heard of."""
        self._status = _Status()
        self._lock = threading.Lock()
        self._queued_uploads = 0
        self._open_uploads = 0
        self._stopping = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._connection: Connection | None = None
        self._pending: Outbound | None = None
        self._epoch = 0
        self._greeted = False
        self._unlogged_credit_bytes = 0
        self._alone_since_s = clock()
        self._attempt_since_s = clock()
        self._retry_at_s = clock()
        self._heard_s = clock()
        self._beat_at_s = clock()
        self._failures = 0
        self._wrong_key_failures = 0
        self._last_failure = "no attempt has ended yet"
        self._thread = threading.Thread(target=self._run, name="fedblocks-transport", daemon=True)
        self._thread.start()

    def send(self, message: Message, payload: Bytes | Path = b"") -> None:
        """Queues a message, with its payload if its kind has one; returns at once.

        The message belongs to the connection of the last ``Connected`` that :meth:`get` returned, and goes with it.
        A payload in memory is not copied: leave it unchanged until ``UploadSent``.

        Raises:
            LocalProtocolError: the payload is not as long as the message says, or the message is none that a client
                sends.
            OSError: the payload's file cannot be opened.
        """
        if KIND_OF.get(type(message)) not in transfer.FROM_CLIENT:
            raise LocalProtocolError(f"{type(message).__name__} is no message that a client sends")
        source = None
        if isinstance(message, Delta):
            source = open_source(payload)
            if source.num_bytes != message.payload_bytes:
                source.close()
                raise LocalProtocolError(
                    f"delta: payload of {source.num_bytes} bytes, payload_bytes says {message.payload_bytes}"
                )
            with self._lock:
                self._queued_uploads += 1
        self._commands.put(_Outgoing(epoch=self._seen_epoch, message=message, source=source))
        self._wake()

    def get(self, timeout_s: float) -> TransportEvent | None:
        """The next event, or None after ``timeout_s``."""
        try:
            epoch, event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(event, Connected):
            self._seen_epoch = epoch
        return event

    def set_status(self, *, attempt_id: AttemptId | None, phase: str, steps_done: int) -> None:
        """What the next heartbeats say."""
        self._status = _Status(attempt_id=attempt_id, phase=phase, steps_done=steps_done)

    @property
    def uploading(self) -> bool:
        """True while chunks of an update are still on their way."""
        with self._lock:
            return self._queued_uploads + self._open_uploads > 0

    def close(self) -> None:
        """Sends what was queued on a live connection, for at most two seconds, and ends the thread."""
        self._stopping = True
        self._wake()
        self._thread.join()

    def _wake(self) -> None:
        # A full pipe means that the thread will wake anyway; a closed one, that it has stopped.
        with contextlib.suppress(OSError):
            self._wake_write.send(b"x")

    def _run(self) -> None:
        clean = False
        try:
            self._loop()
            clean = True
        finally:
            self._disconnect(linger_s=CLOSE_LINGER_S if clean else 0.0)
            self._context.destroy(linger=int(CLOSE_LINGER_S * 1000))
            self._wake_read.close()
            self._wake_write.close()
            if not clean:
                text = "the transport stopped on an error of its own; its traceback stands on the error output"
                self._emit(Problem(exit_code=3, reason="internal", text=text, fatal=True))

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_read.fileno(), zmq.POLLIN)
        while not self._stopping:
            now_s = self._clock()
            if self._dealer is None and now_s >= self._retry_at_s:
                self._connect(poller)
            ready = dict(poller.poll(max(1, int(self._next_timer_s() * 1000))))
            if self._wake_read.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
            if self._monitor is not None and self._monitor in ready:
                self._watch(poller)
            if self._dealer is not None and self._dealer in ready:
                self._receive(poller)
            self._take_commands(poller)
            self._keep_alive(poller)
            self._flush()
        self._take_commands(poller)
        until_s = self._clock() + CLOSE_LINGER_S
        while self._connection is not None and not self._flush() and self._clock() < until_s:
            time.sleep(0.01)

    def _next_timer_s(self) -> float:
        now_s = self._clock()
        if self._dealer is None:
            timers = [self._retry_at_s]
        elif self._connection is None:
            timers = [self._attempt_since_s + ATTEMPT_TIMEOUT_S]
        else:
            timers = [self._beat_at_s, self._heard_s + SILENT_INTERVALS * self._interval_s]
            if self._pending is not None:
                timers.append(now_s + 0.02)
        if self._connection is None:
            timers.append(self._alone_since_s + self._patience_s)
        return max(0.0, min(timers) - now_s)

    @property
    def _patience_s(self) -> float:
        return self._lost_timeout_s if self.connections else self._connect_timeout_s

    def _connect(self, poller: zmq.Poller) -> None:
        dealer = self._context.socket(zmq.DEALER)
        dealer.curve_serverkey = self._server_key.encode("ascii")
        dealer.curve_publickey = self._key_pair.public.encode("ascii")
        dealer.curve_secretkey = self._key_pair.secret.encode("ascii")
        dealer.set(zmq.RECONNECT_IVL, -1)
        dealer.set(zmq.MAXMSGSIZE, transfer.MAX_FRAME_BYTES)
        dealer.set(zmq.SNDHWM, HIGH_WATER_MARK)
        dealer.set(zmq.RCVHWM, HIGH_WATER_MARK)
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.HANDSHAKE_IVL, int(ATTEMPT_TIMEOUT_S * 1000))
        dealer.set(zmq.HEARTBEAT_IVL, 5_000)
        dealer.set(zmq.HEARTBEAT_TIMEOUT, 30_000)
        dealer.set(zmq.HEARTBEAT_TTL, 60_000)
        dealer.set(zmq.TCP_KEEPALIVE, 1)
        dealer.set(zmq.TCP_KEEPALIVE_IDLE, 60)
        dealer.set(zmq.IPV6, int("[" in self._address))
        if self._socks_proxy is not None:
            dealer.set(zmq.SOCKS_PROXY, self._socks_proxy.encode())
        monitor = dealer.get_monitor_socket()
        self._dealer, self._monitor = dealer, monitor
        self._attempt_since_s = self._clock()
        poller.register(monitor, zmq.POLLIN)
        poller.register(dealer, zmq.POLLIN)
        try:
            dealer.connect(self._address)
        except zmq.ZMQError as error:
            self._lost(poller, f"the system says: {error.strerror}")

    def _watch(self, poller: zmq.Poller) -> None:
        """Reads what libzmq says about the attempt or the connection."""
        while self._monitor is not None and self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            match event["event"]:
                case zmq.Event.HANDSHAKE_SUCCEEDED:
                    self._connected()
                case zmq.Event.HANDSHAKE_FAILED_AUTH:
                    self._stop(
                        poller,
                        4,
                        "key_refused",
                        f"this client's key {self._key_pair.public} is not enrolled at {self._address} (or was "
                        "revoked); send your public key to the operator, who runs: fedblocks keys enrol",
                    )
                case zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
                    self._stop(
                        poller,
                        4,
                        "other_mechanism",
                        f"what answers at {self._address} speaks another security mechanism than CURVE; "
                        "check address and port",
                    )
                case zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
                    self._handshake_cut(poller)
                case zmq.Event.DISCONNECTED:
                    # What came before the end is still there to be read: a last Goodbye or Refused.
                    self._receive(poller)
                    if self._dealer is not None:
                        self._lost(poller, "the connection was closed")
                case zmq.Event.CLOSED | zmq.Event.CLOSE_FAILED | zmq.Event.CONNECT_RETRIED:
                    self._lost(poller, "nothing accepts connections there")
                case _:
                    pass

    def _handshake_cut(self, poller: zmq.Poller) -> None:
        """The other side closed in mid-handshake: it has another key, or it only forwards and its far side is down."""
        self._wrong_key_failures += 1
        if self._wrong_key_failures >= WRONG_KEY_ATTEMPTS and not self.connections:
            self._stop(
                poller,
                4,
                "wrong_server_key",
                f"what answers at {self._address} does not hold the server key in your config "
                f"({self._server_key}), or does not speak CURVE: {self._wrong_key_failures} handshakes were cut; ask "
                "the operator for a new site file, or check that the address leads to the aggregator itself",
            )
            return
        self._lost(poller, "the handshake was cut")
        if not self.connections:
            self._retry_at_s = self._clock() + WRONG_KEY_PAUSE_S

    def _connected(self) -> None:
        now_s = self._clock()
        self._connection = Connection(receives=transfer.FROM_AGGREGATOR, max_incoming=MAX_INCOMING)
        self._epoch += 1
        self._greeted = False
        self._heard_s = now_s
        self._beat_at_s = now_s + self._interval_s
        self._wrong_key_failures = 0
        self.connections += 1
        self._emit(Connected())

    def _lost(self, poller: zmq.Poller, text: str) -> None:
        """Ends this attempt or connection and plans the next one."""
        was_connected = self._connection is not None
        self._disconnect(poller=poller)
        now_s = self._clock()
        least_s, most_s = self._backoff_s
        pause_s = min(most_s, least_s * 2 ** min(self._failures, 16)) * self._random.uniform(0.5, 1.0)
        self._failures += 1
        self._retry_at_s = now_s + pause_s
        self._last_failure = text
        if was_connected:
            self._alone_since_s = now_s
            self._emit(Disconnected(text=f"{self._address}: {text}; next attempt in {pause_s:.1f} s"))

    def _disconnect(self, *, poller: zmq.Poller | None = None, linger_s: float = 0.0) -> None:
        if self._connection is not None:
            for outgoing in self._connection.open_outgoing:
                self._log_payload(outgoing.message, outgoing.sent_bytes, "cut off")
            self._log_credit()
            self._connection.close()
        self._connection = None
        self._pending = None
        self.meter.lost()
        self._count_uploads()
        for each in (self._dealer, self._monitor):
            if each is not None and poller is not None:
                poller.unregister(each)
        if self._dealer is not None:
            self._dealer.disable_monitor()
            self._dealer.close(linger=int(linger_s * 1000))
        if self._monitor is not None:
            self._monitor.close(linger=0)
        self._dealer = self._monitor = None

    def _stop(self, poller: zmq.Poller, exit_code: Literal[3, 4], reason: Reason, text: str) -> None:
        self._disconnect(poller=poller, linger_s=CLOSE_LINGER_S)
        self._stopping = True
        self._emit(Problem(exit_code=exit_code, reason=reason, text=text, fatal=True))

    def _keep_alive(self, poller: zmq.Poller) -> None:
        now_s = self._clock()
        if self._stopping:
            return
        if self._connection is None:
            if now_s - self._alone_since_s >= self._patience_s:
                self._stop(
                    poller,
                    3,
                    "unreachable",
                    f"cannot reach {self._address} for {now_s - self._alone_since_s:.0f} s ({self._last_failure}): the "
                    "port is blocked on the way, or no aggregator listens there; check address (does its name "
                    "resolve?), firewall and [transport] socks_proxy, and that `fedblocks serve` runs",
                )
            elif self._dealer is not None and now_s - self._attempt_since_s >= ATTEMPT_TIMEOUT_S:
                self._lost(poller, "no answer to the attempt to connect")
            return
        if now_s - self._heard_s >= SILENT_INTERVALS * self._interval_s:
            self._lost(poller, f"nothing heard for {now_s - self._heard_s:.1f} s")
        elif now_s >= self._beat_at_s:
            self._beat_at_s = now_s + self._interval_s
            if self._greeted:
                status = self._status
                beat = Heartbeat(attempt_id=status.attempt_id, phase=status.phase, steps_done=status.steps_done)
                self._queue(poller, beat)

    def _take_commands(self, poller: zmq.Poller) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if self._connection is not None and command.epoch == self._epoch:
                self._greeted = True
                self._queue(poller, command.message, command.source)
            elif command.source is not None:
                command.source.close()
            if command.source is not None:
                self._count_uploads(taken=1)

    def _queue(self, poller: zmq.Poller, message: Message, source: Source | None = None) -> None:
        assert self._connection is not None
        try:
            self._connection.send(message, source)
        except RemoteProtocolError as error:
            if source is not None:
                source.close()
            self._lost(poller, str(error))

    def _count_uploads(self, taken: int = 0) -> None:
        with self._lock:
            self._queued_uploads -= taken
            self._open_uploads = 0 if self._connection is None else len(self._connection.open_outgoing)

    def _flush(self) -> bool:
        """Hands libzmq what it takes; True if nothing is left that could be sent now."""
        while self._connection is not None and self._dealer is not None:
            outbound = self._pending or self._connection.next_outbound()
            self._pending = outbound
            if outbound is None:
                return True
            try:
                self._dealer.send_multipart(list(outbound.frames), flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            self._pending = None
            self.bytes_sent += outbound.num_bytes
            self._log(outbound)
            self._time(outbound)
            if outbound.payload_bytes_sent is not None and isinstance(outbound.message, Delta):
                self._count_uploads()
                self._emit(UploadSent(attempt_id=outbound.message.attempt_id))
        return True

    def _time(self, outbound: Outbound) -> None:
        match outbound.message:
            case Hello():
                self.meter.greeted()
            case Heartbeat():
                self.meter.beat()
            case Delta() as update if outbound.kind == "chunk":
                self.meter.chunk_sent(update)
            case Delta() as update:
                self.meter.announced(update)
            case _:
                pass

    def _receive(self, poller: zmq.Poller) -> None:
        while self._dealer is not None and self._connection is not None:
            if self._events.qsize() >= MAX_WAITING_EVENTS:
                time.sleep(0.01)
                return
            try:
                frames = self._dealer.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            self.bytes_received += sum(len(frame) for frame in frames)
            self._heard_s = self._clock()
            self._failures = 0
            try:
                events = self._connection.receive(frames)
                self._translate(events)
                self._connection.grant()
            except RemoteProtocolError as error:
                self._refuse(poller, error)

    def _refuse(self, poller: zmq.Poller, error: RemoteProtocolError) -> None:
        text = f"{self._address} sent something that this client does not accept: {error}"
        self._queue(poller, Refused(code=error.code, text=str(error)))
        if error.code in ("version_skew", "unknown_field"):
            self._flush()
            self._stop(poller, 4, "version_skew", text)
        else:
            self._emit(Problem(exit_code=4, reason="malformed", text=text, fatal=False))

    def _translate(self, events: list[transfer.ConnectionEvent]) -> None:
        assert self._connection is not None
        for event in events:
            match event:
                case transfer.MessageArrived(message=message):
                    self._note(message)
                    self._emit(Received(message=message))
                case transfer.PayloadAnnounced(transfer=number, message=message):
                    self._answer(number, message)
                case transfer.PayloadArrived(transfer=number, message=message, sink=MemorySink() as sink):
                    self._log_credit()
                    payload = sink.payload()
                    self.meter.payload_ends(number, len(payload))
                    self._emit(Received(message=message, payload=payload))
                case transfer.PayloadFailed(transfer=number, message=message, text=text):
                    self._log_credit()
                    self.meter.payload_ends(number, 0)
                    text = f"{self._address}: the payload of {KIND_OF[type(message)]} was not accepted: {text}"
                    self._emit(Problem(exit_code=4, reason="malformed", text=text, fatal=False))
                case transfer.PayloadRefused(message=message, sent_bytes=sent_bytes):
                    self._count_uploads()
                    self._log_payload(message, sent_bytes, "stopped by a refusal")
                case _:
                    raise AssertionError(f"no sink of ours: {event}")

    def _answer(self, number: int, message: Message) -> None:
        assert self._connection is not None
        assert isinstance(message, Resource | Assignment | Evaluate | Probe)
        if message.payload_bytes <= self._max_payload_bytes:
            self.meter.payload_begins(number)
            self._translate(self._connection.accept(number, MemorySink()))
            return
        text = (
            f"the payload of {KIND_OF[type(message)]} has {message.payload_bytes} bytes, "
            f"this client takes at most {self._max_payload_bytes}"
        )
        attempt_id = None if isinstance(message, Resource) else message.attempt_id
        self._connection.refuse(number, Refused(code="too_large", text=text, attempt_id=attempt_id))
        self._emit(Problem(exit_code=5, reason="too_large", text=text, fatal=False))

    def _note(self, message: Message) -> None:
        if isinstance(message, HeartbeatReply):
            self.last_reply = message
            self.meter.beat_answered()
        elif isinstance(message, Ack):
            self.meter.answered(message.attempt_id, accepted=True)
        elif isinstance(message, Refused) and message.attempt_id is not None:
            self.meter.answered(message.attempt_id, accepted=False)
        elif isinstance(message, Welcome):
            self.meter.welcomed()
            least_s, most_s = HEARTBEAT_RANGE_S
            self._interval_s = min(most_s, max(least_s, message.heartbeat_interval_s))
            self._beat_at_s = self._clock() + self._interval_s

    def _emit(self, event: TransportEvent) -> None:
        self._events.put((self._epoch, event))

    def _log(self, outbound: Outbound) -> None:
        if outbound.kind == "credit":
            self._unlogged_credit_bytes += outbound.num_bytes
        elif outbound.kind == "chunk":
            if outbound.payload_bytes_sent is not None:
                self._log_payload(outbound.message, outbound.payload_bytes_sent, "complete")
        elif self._on_sent is not None and outbound.message is not None:
            self._on_sent(outbound.kind, outbound.num_bytes, describe(outbound.message))

    def _log_payload(self, message: Message | None, num_bytes: int, how: str) -> None:
        if self._on_sent is not None and isinstance(message, Delta) and num_bytes:
            self._on_sent("payload", num_bytes, f"encoded tensors of attempt {message.attempt_id}, {how}")

    def _log_credit(self) -> None:
        if self._on_sent is not None and self._unlogged_credit_bytes:
            self._on_sent("credit", self._unlogged_credit_bytes, "flow control of what was received")
        self._unlogged_credit_bytes = 0


def describe(message: Message) -> str:
    """What a message tells about this site, in words, for ``sent.jsonl`` and ``join --dry-run``."""
    match message:
        case Delta():
            blocks = sorted({tensor.block for tensor in message.tensors})
            rows = sum(tensor.rows_sent for tensor in message.tensors)
            return (
                f"update of attempt {message.attempt_id}, round {message.round}: {rows} rows of {len(message.tensors)} "
                f"tensors of blocks {blocks} as {message.format}, {message.payload_bytes} bytes to follow; "
                f"training report and {len(message.measurements)} measurements (sums)"
            )
        case _:
            fields: dict[str, Any] = {name: getattr(message, name) for name in message.__dataclass_fields__}
            return ", ".join(f"{name}={value!r}" for name, value in fields.items())
