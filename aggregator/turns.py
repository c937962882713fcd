"""How does the aggregator reach clients that it may only ask? It keeps one turn open with each node that has to speak.

The same face to the server as ``endpoint.RouterEndpoint``, over a carrier of requests and replies such as Flower: whose
nodes are there, what comes back and what gets lost is told by the carrier's shell (``seen``, ``heard``, ``failed``),
which takes the turns that are due (``take``). No socket and no thread here, and nothing of Flower.

A client answers a turn once it has done all that the turn asked of it, so a round is one turn: the task out, the update
back. A turn that is lost ends the session; the next one begins a new session, in which the client greets and announces
what is unanswered, as after a broken connection. An acknowledgement waits for the next task to travel with.
The carrier vouches for a node between turns: while it is there, its client counts as heard.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from fedblocks.aggregator.auth import Registry
from fedblocks.aggregator.endpoint import (
    ByteCount,
    EndpointEvent,
    MessageReceived,
    PeerGone,
    PeerRejected,
    SecondSession,
    UploadAnnounced,
    UploadFailed,
    UploadFinished,
    UploadId,
)
from fedblocks.protocol import transfer, turns
from fedblocks.protocol.errors import RefusalCode, RemoteProtocolError
from fedblocks.protocol.messages import (
    Ack,
    Assignment,
    AttemptId,
    ClientKey,
    Delta,
    Evaluate,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    Probe,
    Refused,
)
from fedblocks.protocol.payloads import Bytes, FileSink

#: A client that has nothing to do is asked this often whether it has something to say (its hours have begun, say).
IDLE_S: Final = 60.0
#: A node whose turn failed, or whose key is not enrolled, is asked again after this.
RETRY_S: Final = 30.0
#: The shell is asked to carry turns this often.
EXCHANGE_S: Final = 0.5
#: Last words are waited for so long.
CLOSE_S: Final = 30.0

TurnKind = Literal["train", "evaluate", "query"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A request to carry to a node."""

    node: int
    kind: TurnKind
    round: int
    """0 where the turn belongs to no round."""
    frames: list[bytes]


@dataclass(slots=True, kw_only=True)
class _Node:
    session: str
    due_s: float
    """A turn opens now even if nothing urgent waits."""
    key: ClientKey | None = None
    """Who has spoken; None before, and after a goodbye."""
    waiting: list[turns.Said] = field(default_factory=list[turns.Said])
    is_open: bool = False
    task: AttemptId | None = None

    @property
    def kind(self) -> TurnKind:
        kinds = {type(message) for message, _ in self.waiting}
        return "train" if Assignment in kinds else "evaluate" if kinds & {Evaluate, Probe} else "query"


class TurnEndpoint:
    """The aggregator's side of the wire, where only it may ask.

    Args:
        exchange: carries turns; called with this endpoint from ``poll`` and ``close``.
        registry: who may take part.
        vouch_s: clients of nodes that are there count as heard this often.
        say: takes a line for the operator.
        clock: monotonic seconds.
        exchange_s: pause between two exchanges.
    """

    def __init__(
        self,
        exchange: Callable[[TurnEndpoint], None],
        *,
        registry: Registry,
        vouch_s: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        exchange_s: float = EXCHANGE_S,
    ) -> None:
        self.bytes_by_key: dict[ClientKey, ByteCount] = {}
        self._exchange = exchange
        self._registry = registry
        self._vouch_s = vouch_s
        self._say = say
        self._clock = clock
        self._exchange_s = exchange_s
        self._vouched_s = clock()
        self._nodes: dict[int, _Node] = {}
        self._uploads: dict[UploadId, tuple[int, Delta, Bytes]] = {}
        self._last_upload = 0
        self._events: list[EndpointEvent] = []

    # the server's side: aggregator.server.Endpoint

    @property
    def address(self) -> str:
        """Where the clients are."""
        return "the nodes of this grid"

    def poll(self, timeout_s: float) -> list[EndpointEvent]:
        """Exchanges turns until something happened or ``timeout_s`` is over; the events, possibly none."""
        until_s = self._clock() + timeout_s
        while True:
            self._exchange(self)
            self._vouch()
            left_s = until_s - self._clock()
            if self._events or left_s <= 0:
                events, self._events = self._events, []
                return events
            time.sleep(min(self._exchange_s, left_s))

    def send(self, key: ClientKey, message: Message, payload: Bytes | Path = b"") -> bool:
        """Puts a message into the next turn of this client; False if it is not there."""
        node = next((n for n in self._nodes.values() if n.key == key), None)
        if node is None or not self._registry.is_allowed(key):
            return False
        if isinstance(message, HeartbeatReply):  # to a heartbeat of our own making
            return True
        node.waiting.append((message, payload.read_bytes() if isinstance(payload, Path) else payload))
        return True

    def accept_upload(self, upload_id: UploadId, part_path: Path) -> None:
        """Writes an update, which is here already, to this file; UploadFinished or UploadFailed follows.

        Raises:
            OSError: the file cannot be made; the upload is still open, refuse it.
        """
        found = self._uploads.get(upload_id)
        if found is None:
            return
        sink = FileSink(part_path)
        del self._uploads[upload_id]
        number, delta, payload = found
        node = self._nodes.get(number)
        if node is None or node.key is None:  # gone meanwhile: PeerGone was told
            sink.discard()
            return
        try:
            turns.keep(delta, payload, sink)
        except RemoteProtocolError as error:
            self._upload_failed(node.key, delta, upload_id, error.code, str(error))
        except OSError as error:
            text = f"the payload cannot be stored: {error.strerror}"
            self._upload_failed(node.key, delta, upload_id, "no_space", text)
        else:
            self._events.append(UploadFinished(key=node.key, message=delta, upload_id=upload_id, path=part_path))

    def refuse_upload(self, upload_id: UploadId, refused: Refused) -> None:
        """Answers an update with a refusal."""
        found = self._uploads.pop(upload_id, None)
        if found is not None and (node := self._nodes.get(found[0])) is not None:
            node.waiting.append((refused, b""))

    def close(self) -> None:
        """Carries what still waits, for at most ``CLOSE_S``."""
        until_s = self._clock() + CLOSE_S
        while any(n.is_open or n.waiting for n in self._nodes.values()) and self._clock() < until_s:
            self._exchange(self)
            time.sleep(self._exchange_s)

    # the carrier's side

    def seen(self, nodes: Collection[int]) -> None:
        """These nodes are there, and no others."""
        for number in set(self._nodes) - set(nodes):
            self._gone(self._nodes.pop(number))
        for number in nodes:
            if number not in self._nodes:
                self._nodes[number] = self._fresh(after_s=0.0)

    def take(self, kind: TurnKind) -> list[Turn]:
        """The turns of this kind that are due; each is open until ``heard`` or ``failed`` tells how it ended."""
        now_s = self._clock()
        taken: list[Turn] = []
        for number, node in self._nodes.items():
            is_urgent = any(not isinstance(message, Ack) for message, _ in node.waiting)
            if node.is_open or node.kind != kind or not (is_urgent or now_s >= node.due_s):
                continue
            told, node.waiting = node.waiting[: turns.MAX_MESSAGES], node.waiting[turns.MAX_MESSAGES :]
            node.is_open = True
            tasks = [m for m, _ in told if isinstance(m, Assignment | Evaluate | Probe)]
            node.task = tasks[-1].attempt_id if tasks else None
            frames = turns.encode(turns.Head(session=node.session), told)
            if node.key is not None:
                self._count(node.key).sent += sum(map(len, frames))
            taken.append(Turn(node=number, kind=kind, round=tasks[-1].round if tasks else 0, frames=frames))
        return taken

    def heard(self, number: int, frames: Sequence[Bytes]) -> None:
        """A node has answered its turn; nothing of it counts unless all of it can be read and its key is enrolled."""
        node = self._nodes.get(number)
        if node is None:
            return
        try:
            head, said = turns.decode(frames, transfer.FROM_CLIENT)
        except RemoteProtocolError as error:
            node.is_open, node.due_s = False, self._clock() + RETRY_S
            self._events.append(PeerRejected(key=node.key, address=f"node {number}", code=error.code, text=str(error)))
            node.waiting.append((Refused(code=error.code, text=str(error)), b""))
            return
        if head.session not in (node.session, ""):  # the late answer to a turn that was given up
            return
        node.is_open, node.task, node.due_s = False, None, self._clock() + IDLE_S
        if not self._admit(number, node, ClientKey(head.key[:64])):
            return
        key = ClientKey(head.key)
        self._count(key).received += sum(map(len, frames))
        for message, payload in said:
            if isinstance(message, Delta):
                self._last_upload += 1
                upload_id = UploadId(self._last_upload)
                self._uploads[upload_id] = (number, message, payload)
                self._events.append(UploadAnnounced(key=key, message=message, upload_id=upload_id))
            else:
                self._events.append(MessageReceived(key=key, message=message))
            if isinstance(message, Hello | Goodbye):
                node.key = key if isinstance(message, Hello) else None

    def failed(self, number: int, text: str) -> None:
        """A node's turn was lost, or its application failed."""
        node = self._nodes.get(number)
        if node is not None and node.is_open:
            self._say(f"node {number}: {text[:1000]}; asked again in {RETRY_S:.0f} s")
            self._gone(node)
            self._nodes[number] = self._fresh(after_s=RETRY_S)

    # small steps

    def _fresh(self, *, after_s: float) -> _Node:
        return _Node(session=secrets.token_hex(8), due_s=self._clock() + after_s)

    def _gone(self, node: _Node) -> None:
        if node.key is not None:
            self._events.append(PeerGone(key=node.key))

    def _count(self, key: ClientKey) -> ByteCount:
        return self.bytes_by_key.setdefault(key, ByteCount())

    def _admit(self, number: int, node: _Node, key: ClientKey) -> bool:
        """May this node speak for this key? If not, it is told, and nothing of it is processed."""
        standing = self._registry.standing(key)
        if standing != "enrolled":
            code: RefusalCode = "revoked" if standing == "revoked" else "not_enrolled"
            text = f"key {key} is {'revoked' if standing == 'revoked' else 'not enrolled'} at this aggregator"
            self._events.append(PeerRejected(key=key, address=f"node {number}", code=code, text=text))
            self._nodes[number] = self._fresh(after_s=RETRY_S)
            self._nodes[number].session = node.session
            self._nodes[number].waiting.append((Refused(code=code, text=text), b""))
            return False
        holder = next((n for n, other in self._nodes.items() if other.key == key and n != number), None)
        if holder is not None:
            served, ignored = f"node {holder}", f"node {number}"
            self._events.append(SecondSession(key=key, served_address=served, ignored_address=ignored))
            # What it said is lost, its greeting too; after a crash the other node is soon gone, and it greets again.
            self._nodes[number] = self._fresh(after_s=RETRY_S)
            return False
        if node.key not in (None, key):
            self._gone(node)
        node.key = key
        return True

    def _vouch(self) -> None:
        now_s = self._clock()
        if now_s - self._vouched_s < self._vouch_s:
            return
        self._vouched_s = now_s
        for number, node in list(self._nodes.items()):
            if node.key is not None and self._admit(number, node, node.key):
                is_busy = node.is_open or node.waiting
                beat = Heartbeat(attempt_id=node.task, phase="working" if is_busy else "idle", steps_done=0)
                self._events.append(MessageReceived(key=node.key, message=beat))

    def _upload_failed(self, key: ClientKey, delta: Delta, upload_id: UploadId, code: RefusalCode, text: str) -> None:
        self._events.append(UploadFailed(key=key, upload_id=upload_id, code=code, text=text))
        self.send(key, Refused(code=code, text=text, attempt_id=delta.attempt_id))
