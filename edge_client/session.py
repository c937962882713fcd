"""What does the client do next? A pure state machine: an event in, the next state and a list of actions out.

Theory of operation
-------------------
A session greets (Hello), is welcomed, fetches the files of the run that it lacks, and then carries out one task at a
time.
A finished update lies in the outbox, durable, until the aggregator has answered it: an Ack commits the residual, a
final refusal discards it, "retry later" and a broken connection leave it where it is, and every reconnection announces
it again.
Sending the same update twice is harmless by construction (same client key, round and attempt id), so the client never
needs to know whether an earlier send arrived.

Four rules follow:
1. A task that arrives while an update is unanswered replaces nothing: the update is announced first, the task starts
   after its answer.
2. A task with the attempt id of the update in the outbox is that update's own assignment, sent again: it is answered
   with the update, never trained twice.
3. A refusal of an update that was acknowledged only ends a second transfer of the same bytes: nothing is said of it.
4. An answer that comes before the session is prepared was meant for the process before this one: the residual cannot be
   committed yet, so the update is announced again and answered again.

Outside the hours in which its site takes part a client rests: connected, but not ready, so that it is not planned for.
It begins to rest once nothing of it is unanswered: it says Goodbye and greets again (until it is Ready, its heartbeats
do not make it a member of the next round), and says Ready when the hours begin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from fedblocks.protocol.errors import FATAL_CODES, RETRY_CODES
from fedblocks.protocol.messages import (
    Ack,
    Assignment,
    AttemptId,
    Evaluate,
    Goodbye,
    HeartbeatReply,
    Message,
    Probe,
    Refused,
    Resource,
    ResourceInfo,
    Welcome,
)

#: Seconds until an update that was refused with "retry later" is announced again.
RETRY_LATER_S = 10.0
#: Seconds without an answer after which an update is announced again on a connection that seems alive.
ANSWER_TIMEOUT_S = 30.0

EXIT_DONE = 0
EXIT_REFUSED = 4


class Phase(Enum):
    """Where the session stands."""

    CONNECTING = "connecting"
    GREETING = "greeting"
    FETCHING = "fetching"
    READY = "ready"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The transport has a (new) authenticated connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The transport lost it and is trying again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A message and, for the kinds that carry one, its verified payload."""

    message: Message
    payload: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDone:
    """The task has ended; if it trained, its update now lies in the outbox."""

    attempt_id: AttemptId
    has_update: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""

    uploading: bool = False
    """True while chunks of an announced update are still on their way."""
    resting: bool = False
    """True outside the hours in which this site takes part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The transport cannot go on."""

    exit_code: int
    text: str


Event: TypeAlias = Connected | Disconnected | Received | TaskDone | Tick | Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class SendHello:
    """Greet the aggregator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SendFetch:
    """Ask for one file of the run."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreResource:
    """Keep a fetched file (its hash is checked by the transport and against the Welcome)."""

    info: ResourceInfo
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """All files are here: load what the tasks need."""

    welcome: Welcome


@dataclass(frozen=True, slots=True, kw_only=True)
class SendReady:
    """Tell the aggregator that tasks may come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """Tell the aggregator not to wait for this client; the connection stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTask:
    """Carry out this assignment or evaluation."""

    task: Assignment | Evaluate | Probe
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnounceUpdate:
    """Send the update in the outbox (again)."""

    attempt_id: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitUpdate:
    """The update is durable and counted: its residual becomes ours, the outbox is emptied."""

    attempt_id: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardUpdate:
    """The update will never be counted: as if this round had not happened."""

    attempt_id: AttemptId
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Say:
    """One line for the person who runs the client."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """End the session with this exit code."""

    exit_code: int
    text: str


Action: TypeAlias = (
    SendHello
    | SendFetch
    | StoreResource
    | Prepare
    | SendReady
    | Rest
    | StartTask
    | AnnounceUpdate
    | CommitUpdate
    | DiscardUpdate
    | Say
    | Stop
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionState:
    """All that the session remembers; the outbox itself lies on disk."""

    phase: Phase = Phase.CONNECTING
    welcome: Welcome | None = None
    missing: tuple[ResourceInfo, ...] = ()
    have: frozenset[str] = frozenset()
    """SHA-256 of the run's files that are already on disk."""
    prepared: bool = False
    outbox: AttemptId | None = None
    announced_s: float | None = None
    retry_at_s: float | None = None
    pending: StartTask | None = None
    """The newest task that waits for the outbox to be answered."""
    busy: AttemptId | None = None
    acked: AttemptId | None = None
    """The update that was acknowledged last."""
    resting: bool = False


def handle(state: SessionState, event: Event, *, now_s: float) -> tuple[SessionState, list[Action]]:
    """The next state and what to do, in order.

    Args:
        now_s: monotonic seconds.
    """
    if state.phase is Phase.STOPPED:
        return state, []
    match event:
        case Connected():
            return replace(state, phase=Phase.GREETING, announced_s=None), [SendHello()]
        case Disconnected():
            return replace(state, phase=Phase.CONNECTING, announced_s=None), [Say(text="connection lost; trying again")]
        case Problem(exit_code=code, text=text):
            return _stop(state, code, text)
        case TaskDone(attempt_id=attempt_id, has_update=has_update):
            state = replace(state, busy=None, outbox=attempt_id if has_update else state.outbox)
            return _proceed(state, now_s)
        case Tick(uploading=uploading, resting=resting):
            if resting and not state.resting and _may_rest(state):
                return _rest(state)
            if state.resting and not resting:
                return _wake(state, now_s)
            return _tick(state, uploading, now_s)
        case Received(message=message, payload=payload):
            return _received(state, message, payload or b"", now_s)


def _received(state: SessionState, message: Message, payload: bytes, now_s: float) -> tuple[SessionState, list[Action]]:
    match message:
        case Welcome():
            missing = tuple(r for r in message.resources if r.sha256 not in state.have)
            state = replace(state, welcome=message, missing=missing, phase=Phase.FETCHING)
            return _fetch_or_prepare(state, now_s)
        case Resource(name=name):
            info = next((r for r in state.missing if r.name == name), None)
            if info is None or info.sha256 != message.payload_sha256:
                return state, [Say(text=f"ignored a file that was not asked for: {name[:60]!r}")]
            state = replace(
                state, missing=tuple(r for r in state.missing if r is not info), have=state.have | {info.sha256}
            )
            state, actions = _fetch_or_prepare(state, now_s)
            return state, [StoreResource(info=info, payload=payload), *actions]
        case Assignment() | Evaluate() | Probe():
            if state.resting:  # sent before our Goodbye was read; sent again after our Ready if it is still wanted
                return state, []
            if message.attempt_id in (state.outbox, state.busy):
                return _announce(state, now_s) if message.attempt_id == state.outbox else (state, [])
            return _proceed(replace(state, pending=StartTask(task=message, payload=payload)), now_s)
        case Ack(attempt_id=attempt_id):
            if attempt_id != state.outbox or not state.prepared:
                return state, []
            answered = replace(state, outbox=None, announced_s=None, retry_at_s=None, acked=attempt_id)
            state, actions = _proceed(answered, now_s)
            return state, [CommitUpdate(attempt_id=attempt_id), *actions]
        case Refused():
            return _refused(state, message, now_s)
        case Goodbye(reason=reason, finished=finished):
            if finished:
                return _stop(state, EXIT_DONE, reason)
            return replace(state, phase=Phase.CONNECTING), [Say(text=f"the aggregator left: {reason}")]
        case HeartbeatReply():
            return state, []
        case _:
            return state, [Say(text=f"ignored a message that no aggregator sends: {type(message).__name__}")]


def _refused(state: SessionState, refused: Refused, now_s: float) -> tuple[SessionState, list[Action]]:
    text = f"refused ({refused.code}): {refused.text}"
    if refused.code in FATAL_CODES:
        return _stop(state, EXIT_REFUSED, text)
    if refused.attempt_id is not None and refused.attempt_id == state.outbox and not state.prepared:
        return state, []
    if refused.attempt_id is None or refused.attempt_id != state.outbox:
        is_counted = refused.code == "conflict" and refused.attempt_id is not None and refused.attempt_id == state.acked
        return state, [] if is_counted else [Say(text=text)]
    if refused.code in RETRY_CODES:
        return replace(state, announced_s=None, retry_at_s=now_s + RETRY_LATER_S), [
            Say(text=f"{text}; kept, trying again")
        ]
    attempt_id = refused.attempt_id
    state, actions = _proceed(replace(state, outbox=None, announced_s=None, retry_at_s=None), now_s)
    return state, [DiscardUpdate(attempt_id=attempt_id, text=text), *actions]


def _fetch_or_prepare(state: SessionState, now_s: float) -> tuple[SessionState, list[Action]]:
    if state.missing:
        return state, [SendFetch(name=state.missing[0].name)]
    assert state.welcome is not None
    actions: list[Action] = [] if state.prepared else [Prepare(welcome=state.welcome)]
    if state.resting:
        actions += [Say(text="outside this site's hours: connected, takes no task until they begin"), Rest()]
    else:
        actions.append(SendReady())
    state, more = _proceed(replace(state, phase=Phase.READY, prepared=True), now_s)
    return state, actions + more


def _proceed(state: SessionState, now_s: float) -> tuple[SessionState, list[Action]]:
    """Announce the outbox if it is unanswered, else start the waiting task."""
    if state.phase is not Phase.READY or state.busy is not None:
        return state, []
    if state.outbox is not None:
        return _announce(state, now_s) if state.announced_s is None and state.retry_at_s is None else (state, [])
    if state.pending is None:
        return state, []
    task = state.pending
    return replace(state, pending=None, busy=task.task.attempt_id), [task]


def _announce(state: SessionState, now_s: float) -> tuple[SessionState, list[Action]]:
    if state.phase is not Phase.READY or state.outbox is None:
        return state, []
    attempt_id = state.outbox
    state = replace(state, announced_s=now_s, retry_at_s=None)
    return state, [AnnounceUpdate(attempt_id=attempt_id)]


def _may_rest(state: SessionState) -> bool:
    """True if the aggregator waits for nothing of ours, or could not be told now."""
    return state.phase is not Phase.READY or (state.busy, state.pending, state.outbox) == (None, None, None)


def _rest(state: SessionState) -> tuple[SessionState, list[Action]]:
    told: list[Action] = [Rest(), SendHello()] if state.phase is Phase.READY else []
    return replace(state, resting=True, pending=None), told


def _wake(state: SessionState, now_s: float) -> tuple[SessionState, list[Action]]:
    state = replace(state, resting=False)
    if state.phase is not Phase.READY:
        return state, []
    state, more = _proceed(state, now_s)
    return state, [SendReady(), *more]


def _tick(state: SessionState, uploading: bool, now_s: float) -> tuple[SessionState, list[Action]]:
    if uploading and state.announced_s is not None:
        return replace(state, announced_s=now_s), []
    retry = state.retry_at_s is not None and now_s >= state.retry_at_s
    silent = state.announced_s is not None and now_s >= state.announced_s + ANSWER_TIMEOUT_S
    return _announce(state, now_s) if retry or silent else (state, [])


def _stop(state: SessionState, exit_code: int, text: str) -> tuple[SessionState, list[Action]]:
    return replace(state, phase=Phase.STOPPED), [Stop(exit_code=exit_code, text=text)]
