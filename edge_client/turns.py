"""How does a site take part where it is only asked, as in Flower? One process stays, and answers turn after turn.

Flower starts a process for each message, and loading a model takes minutes on a small board. So the client is the
same long-lived ``join`` as over ZeroMQ, and what Flower starts only passes the turn on (:func:`ask`), over a Unix
socket in a folder of the site's own: connecting fails at once where nobody listens, and the connection ends with the
process that held it, so neither side waits for one that is gone. It is started at first use, and ends as ``join`` does.

A turn ends when the session has nothing left to do: the reply is then all that was said meanwhile. A turn of a session
other than the last one is a new connection: the session greets and announces its update again.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, TextIO

from fedblocks.edge_client.link import LinkMeter
from fedblocks.edge_client.transport import (
    Connected,
    Disconnected,
    OnSent,
    Problem,
    Received,
    TransportEvent,
    describe,
)
from fedblocks.protocol import transfer, turns
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.messages import KIND_OF, AttemptId, ClientKey, Message, Refused
from fedblocks.protocol.payloads import Bytes, MemorySink
from fedblocks.protocol.run_config import ConfigError

#: From the start of the client to its socket: data and base hash are read, and the device is measured (20 s).
START_S: Final = 900.0
START_POLL_S: Final = 0.2
#: Without a turn for so long nobody asks any more, and the client ends; the next turn starts it again.
FORSAKEN_S: Final = 3600.0
#: One frame on the socket holds a payload at most.
MAX_FRAME_BYTES: Final = 1 << 40


class NotAnsweredError(RuntimeError):
    """The client did not answer a turn; the text says what its log says last."""


class TurnTransport:
    """What the client needs of ``transport.Transport``, where the other side asks.

    Args:
        path: of the Unix socket; its folder should be the site's alone.
        key: this client's public key.
        on_sent: takes (kind, bytes, what is in it) of everything that is said.

    Raises:
        ConfigError: the socket cannot be made, for instance since its path is longer than 107 bytes; or another client
            listens at it.
    """

    #: Nothing that was said can get lost within a session, so nothing is to be announced again.
    uploading = True

    def __init__(
        self,
        path: Path,
        *,
        key: ClientKey,
        on_sent: OnSent,
        meter: LinkMeter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.meter = meter or LinkMeter()
        self._key = key
        self._on_sent = on_sent
        self._path = path
        self._clock = clock
        self._asked_s = clock()
        self._session = ""
        self._events: deque[TransportEvent] = deque()
        self._said: list[turns.Said] = []
        self._caller: Connection | None = None
        self._lock, self._listener = _listen(path)

    def send(self, message: Message, payload: Bytes | Path = b"") -> None:
        """Says this with the next reply."""
        data = payload.read_bytes() if isinstance(payload, Path) else payload
        self._said.append((message, data))

    def set_status(self, *, attempt_id: AttemptId | None, phase: str, steps_done: int) -> None:
        """Nothing: there are no heartbeats, the carrier says that the node is there."""

    def get(self, timeout_s: float) -> TransportEvent | None:
        """The next event, or None after ``timeout_s``; where none is left the turn is over and is answered."""
        if not self._events:
            self._answer()
            self._listener.settimeout(timeout_s)
            try:
                caller, _ = self._listener.accept()
            except TimeoutError:
                if self._clock() - self._asked_s < FORSAKEN_S:
                    return None
                text = (
                    f"nobody has asked at {self._path} for {FORSAKEN_S / 60:.0f} minutes; the next turn starts it again"
                )
                return Problem(exit_code=3, reason="unreachable", text=text, fatal=True)
            caller.settimeout(None)
            self._asked_s = self._clock()
            self._caller = Connection(caller.detach())
            self._take(self._caller)
        return self._events.popleft() if self._events else None

    def close(self) -> None:
        """Answers the turn that is open, and listens no more."""
        self._answer()
        self._path.unlink(missing_ok=True)
        self._listener.close()
        self._lock.close()

    def _take(self, caller: Connection) -> None:
        try:
            head, said = turns.decode(_receive(caller), transfer.FROM_AGGREGATOR)
            received = [Received(message=message, payload=_payload(message, data)) for message, data in said]
        except RemoteProtocolError as error:
            self._said.append((Refused(code=error.code, text=str(error)), b""))
            return
        except (EOFError, OSError):
            self._caller = None
            return
        if head.session != self._session:
            if self._session:
                self._events.append(Disconnected(text="the aggregator began anew"))
            self._session = head.session
            self._said.clear()
            self._events.append(Connected())
        self._events.extend(received)

    def _answer(self) -> None:
        if self._caller is None:
            return
        frames = turns.encode(turns.Head(session=self._session, key=self._key), self._said)
        try:
            _send(self._caller, frames)
            for i, (message, _) in enumerate(self._said):
                num_bytes = sum(len(frame) for frame in frames[1 + 3 * i : 4 + 3 * i])
                self._on_sent(KIND_OF[type(message)], num_bytes, describe(message))
        except OSError:  # the caller is gone, and with it this turn: the aggregator will begin a new session
            self._session = ""
        self._caller.close()
        self._caller = None
        self._said.clear()
        self._asked_s = self._clock()


def ask(path: Path, frames: Sequence[Bytes], *, join: str) -> list[bytes]:
    """Pass a turn on to the client that listens at ``path``, and wait for its reply as long as it takes.

    Args:
        join: arguments of ``fedblocks join``, as in a shell, to start the client with where none listens.

    Raises:
        NotAnsweredError: the client could not be started, or ended before it answered.
    """
    caller = _connect(path) or _started(path, join)
    try:
        _send(caller, frames)
        return _receive(caller)
    except (EOFError, OSError) as error:
        raise NotAnsweredError(f"the client ended before it answered; {_last_line(path)}") from error
    finally:
        caller.close()


def _listen(path: Path) -> tuple[TextIO, socket.socket]:
    """The lock that says which process answers at ``path`` (its number stands in the file), and the socket there."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = path.with_suffix(".lock").open("a", encoding="ascii")
    listener = socket.socket(socket.AF_UNIX)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        listener.bind(str(path))
    except OSError as error:
        lock.close()
        listener.close()
        why = "another client answers there" if isinstance(error, BlockingIOError) else error.strerror or str(error)
        raise ConfigError(f"cannot listen at {path}: {why}; give another --flower") from error
    lock.truncate(0)
    print(os.getpid(), file=lock, flush=True)
    path.chmod(0o600)
    listener.listen()
    return lock, listener


def _started(path: Path, join: str) -> Connection:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = [sys.executable, "-m", "fedblocks", "join", *shlex.split(join), "--flower", str(path)]
    with _log(path).open("ab") as log:
        # A session of its own: it outlives this process, and the end of its process group.
        client = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and client.poll() is None:
        if (caller := _connect(path)) is not None:
            return caller
        time.sleep(START_POLL_S)
    ended = client.poll()
    how = f"listens not after {START_S:.0f} s" if ended is None else f"ended with exit code {ended}"
    raise NotAnsweredError(f"the client {how}; {_last_line(path)}")


def _connect(path: Path) -> Connection | None:
    caller = socket.socket(socket.AF_UNIX)
    try:
        caller.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        caller.close()
        return None
    return Connection(caller.detach())


def _send(caller: Connection, frames: Sequence[Bytes]) -> None:
    caller.send_bytes(len(frames).to_bytes(4, "little"))
    for frame in frames:
        caller.send_bytes(frame)


def _receive(caller: Connection) -> list[bytes]:
    number = int.from_bytes(caller.recv_bytes(4), "little")
    return [caller.recv_bytes(MAX_FRAME_BYTES) for _ in range(number)]


def _payload(message: Message, data: Bytes) -> bytes | None:
    if KIND_OF[type(message)] not in transfer.ANNOUNCING:
        return None
    sink = MemorySink()
    turns.keep(message, data, sink)
    return sink.payload()


def _log(path: Path) -> Path:
    return path.with_suffix(".log")


def _last_line(path: Path) -> str:
    lines = _log(path).read_text(encoding="utf-8", errors="replace").splitlines() if _log(path).is_file() else []
    return f"its log {_log(path)} ends with: {lines[-1]}" if lines else f"its log would be {_log(path)}"
