"""When does a round open, whom does it wait for, and when does it close?

``handle(state, event, rules) -> (state, actions)`` is pure: no socket, file, thread or clock. Time arrives as monotonic
seconds inside the events; the shell (``server.py``) carries the actions out and reports back with further events.

    gathering --enough clients--> planning --RoundPlanned--> open --all in | deadline--> closing --RoundFolded--.
        ^            ^-------------PlanFailed----'                                                              |
        '--------------------------------------------------- no stop reason ------------------------------------+
                                                                                                                |
    finished <--all in | deadline-- measuring <--MeasurePlanned-- preparing <-- concluding <---- stop reason ---'

Only the elapsed part of a deadline is kept in the state, never a point in time, so that a restart of the aggregator
neither renews nor expires it (field.md F14).
A silent client is late, not dead: its task stays open until the deadline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from fedblocks.protocol.messages import AttemptId, ClientKey

Phase = Literal["gathering", "planning", "open", "closing", "concluding", "preparing", "measuring", "finished"]
TaskKind = Literal["train", "evaluate"]
Outcome = Literal["open", "stored", "reported", "refused", "failed", "late"]
"""stored: a durable update; reported: measurements only; late: still open when its round closed."""
Presence = Literal["expected", "present", "left"]
"""expected: known of old, not heard yet by this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The waiting rules of a run (methods.md 6.5, 8.2)."""

    min_cohort: int = 1
    quorum: float = 0.7
    rejoin_grace_s: float = 30.0
    gather_s: float = 10.0
    """How long the first round waits for the expected clients once ``min_cohort`` of them are there."""
    silent_after_s: float = 15.0
    """Without a sign of life for so long a client is not planned for; an open task stays open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What the rounds know of one client: is it there, and what is it busy with."""

    name: str
    presence: Presence
    heard_s: float = -math.inf
    busy_with: AttemptId | None = None
    """The attempt that its last heartbeat named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One client's part in the current round."""

    attempt_id: AttemptId
    kind: TaskKind
    outcome: Outcome = "open"
    reissued: bool = False
    """True for the smaller task that replaced one which did not fit in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsState:
    """The whole state; ``members`` and ``tasks`` are never changed in place."""

    phase: Phase = "gathering"
    round: int = 1
    """Rounds count from 1."""
    version: int = 0
    members: Mapping[ClientKey, Member] = field(default_factory=dict[ClientKey, Member])
    tasks: Mapping[ClientKey, Task] = field(default_factory=dict[ClientKey, Task])
    late: Mapping[ClientKey, AttemptId] = field(default_factory=dict[ClientKey, AttemptId])
    """Attempts of the previous round that were open when it closed; their updates still count, at a lower weight."""
    now_s: float = 0.0
    elapsed_s: float = 0.0
    """Seconds spent in this phase; of phase ``gathering`` those since ``min_cohort`` clients were there."""
    deadline_s: float = 0.0
    extended: bool = False
    blocked: str = ""
    """Why no round could be opened from the clients at hand; a new Hello clears it."""
    empty_rounds: int = 0
    """Rounds in a row that closed without an update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientJoined:
    key: ClientKey
    name: str
    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientHeard:
    """Any message of a known client; ``busy_with`` from a heartbeat."""

    key: ClientKey
    name: str
    now_s: float
    busy_with: AttemptId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLeft:
    """The client said goodbye, or its key was revoked."""

    key: ClientKey


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlanned:
    """The answer to PlanRound, once it is in the ledger."""

    tasks: Mapping[ClientKey, Task]
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFailed:
    """The answer to PlanRound when no client can train anything."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStored:
    """An update is durable in the ledger."""

    key: ClientKey
    attempt_id: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRefused:
    """An update of this attempt was refused for good (not: retry later)."""

    key: ClientKey
    attempt_id: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFailed:
    key: ClientKey
    attempt_id: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReplaced:
    """A smaller task takes the place of one that did not fit (methods.md 6.7)."""

    key: ClientKey
    task: Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportReceived:
    """The measurements of an evaluate task are durable."""

    key: ClientKey
    attempt_id: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFolded:
    """The answer to CloseRound, once the new version is durable."""

    version: int
    accepted: int
    stop_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurePlanned:
    """The answer to MeasureFinal."""

    tasks: Mapping[ClientKey, Task]
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    now_s: float


Event = (
    ClientJoined
    | ClientHeard
    | ClientLeft
    | RoundPlanned
    | PlanFailed
    | UpdateStored
    | UpdateRefused
    | TaskFailed
    | TaskReplaced
    | ReportReceived
    | RoundFolded
    | MeasurePlanned
    | Tick
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRound:
    """Plan ``round`` for these clients; answer RoundPlanned or PlanFailed."""

    round: int
    clients: tuple[ClientKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendTask:
    """Send (again) the open task of this client."""

    key: ClientKey


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseRound:
    """Freeze the accepted set, fold, publish; answer RoundFolded."""

    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureFinal:
    """Plan the measurement of the final state by these clients; answer MeasurePlanned."""

    clients: tuple[ClientKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRun:
    """Write the final record and say goodbye to all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One line for the operator."""

    text: str


Action = PlanRound | SendTask | CloseRound | MeasureFinal | FinishRun | Note


def handle(state: RoundsState, event: Event, rules: Rules) -> tuple[RoundsState, tuple[Action, ...]]:
    """The state after ``event``, and what the shell must now do, in order."""
    state, actions = _apply(state, event, rules)
    for row in TRANSITIONS:
        if row.phase == state.phase and row.when(state, rules):
            state, more = row.then(state, rules)
            return state, (*actions, *more)
    return state, actions


def _apply(state: RoundsState, event: Event, rules: Rules) -> tuple[RoundsState, tuple[Action, ...]]:
    none: tuple[Action, ...] = ()
    match event:
        case Tick(now_s=now_s):
            return _advanced(state, now_s, rules), none
        case ClientJoined(key=key, name=name, now_s=now_s):
            state = _with_member(state, key, Member(name=name, presence="present", heard_s=now_s))
            task = state.tasks.get(key)
            resend: tuple[Action, ...] = (SendTask(key=key),) if task and task.outcome == "open" else ()
            return replace(state, blocked=""), resend
        case ClientHeard(key=key, name=name, now_s=now_s, busy_with=busy_with):
            return _with_member(
                state, key, Member(name=name, presence="present", heard_s=now_s, busy_with=busy_with)
            ), none
        case ClientLeft(key=key):
            member = state.members.get(key)
            if member is None:
                return state, none
            return _with_member(state, key, replace(member, presence="left", busy_with=None)), none
        case RoundPlanned(tasks=tasks, deadline_s=deadline_s):
            state = replace(_entering(state, "open"), tasks=dict(tasks), deadline_s=deadline_s)
            return state, tuple(SendTask(key=key) for key in sorted(tasks))
        case PlanFailed(text=text):
            return replace(_entering(state, "gathering"), blocked=text), (Note(text=text),)
        case UpdateStored(key=key, attempt_id=attempt_id):
            return _with_outcome(state, key, attempt_id, "stored"), none
        case ReportReceived(key=key, attempt_id=attempt_id):
            return _with_outcome(state, key, attempt_id, "reported"), none
        case UpdateRefused(key=key, attempt_id=attempt_id):
            return _with_outcome(state, key, attempt_id, "refused"), none
        case TaskFailed(key=key, attempt_id=attempt_id):
            return _with_outcome(state, key, attempt_id, "failed"), none
        case TaskReplaced(key=key, task=task):
            return replace(state, tasks={**state.tasks, key: task}), (SendTask(key=key),)
        case RoundFolded():
            return _folded(state, event)
        case MeasurePlanned(tasks=tasks, deadline_s=deadline_s):
            state = replace(_entering(state, "measuring"), tasks=dict(tasks), deadline_s=deadline_s)
            return state, tuple(SendTask(key=key) for key in sorted(tasks))


def _folded(state: RoundsState, event: RoundFolded) -> tuple[RoundsState, tuple[Action, ...]]:
    late = {
        key: task.attempt_id for key, task in state.tasks.items() if task.kind == "train" and task.outcome == "open"
    }
    state = replace(
        _entering(state, "gathering"),
        round=state.round + 1,
        version=event.version,
        tasks={},
        late=late,
        empty_rounds=0 if event.accepted else state.empty_rounds + 1,
    )
    notes: tuple[Action, ...] = ()
    if state.empty_rounds == EMPTY_ROUNDS_BEFORE_WARNING:
        missing = ", ".join(sorted(state.members[key].name for key in late if key in state.members))
        cause = f"no answer from {missing}" if missing else "every update was refused or every task failed"
        notes = (Note(text=f"{state.empty_rounds} rounds in a row brought no update: {cause}"),)
    if event.stop_reason is None:
        return state, notes
    return _entering(state, "concluding"), notes


@dataclass(frozen=True, slots=True)
class Transition:
    """In ``phase``, once ``when`` holds, do ``then``."""

    phase: Phase
    when: Callable[[RoundsState, Rules], bool]
    then: Callable[[RoundsState, Rules], tuple[RoundsState, tuple[Action, ...]]]


def _enough_clients(state: RoundsState, rules: Rules) -> bool:
    if state.blocked or len(plannable_clients(state, rules)) < rules.min_cohort:
        return False
    return not _expected(state) or state.elapsed_s >= rules.gather_s


def _plan(state: RoundsState, rules: Rules) -> tuple[RoundsState, tuple[Action, ...]]:
    clients = plannable_clients(state, rules)
    return _entering(_without_expectations(state), "planning"), (PlanRound(round=state.round, clients=clients),)


def _everybody_there(state: RoundsState, rules: Rules) -> bool:
    return not _expected(state) or state.elapsed_s >= rules.gather_s


def _measure(state: RoundsState, rules: Rules) -> tuple[RoundsState, tuple[Action, ...]]:
    """Silent clients measure only where nobody else is there: the final measurement waits minutes for each it asks."""
    state = _without_expectations(state)
    present = present_clients(state)
    heard = tuple(key for key in present if not is_silent(state, key, rules))
    return _entering(state, "preparing"), (MeasureFinal(clients=heard or present),)


def _all_in(state: RoundsState, _rules: Rules) -> bool:
    return not any(task.outcome == "open" for task in state.tasks.values())


def _only_the_left_are_missing(state: RoundsState, rules: Rules) -> bool:
    missing = (key for key, task in state.tasks.items() if task.outcome == "open")
    return _quorum(state, rules) and all(state.members[key].presence == "left" for key in missing)


def _deadline_with_quorum(state: RoundsState, rules: Rules) -> bool:
    return state.elapsed_s >= state.deadline_s and _quorum(state, rules)


def _deadline(state: RoundsState, _rules: Rules) -> bool:
    return state.elapsed_s >= state.deadline_s


def _deadline_first_time(state: RoundsState, rules: Rules) -> bool:
    return _deadline(state, rules) and not state.extended


def _close(state: RoundsState, _rules: Rules) -> tuple[RoundsState, tuple[Action, ...]]:
    return _entering(state, "closing"), (CloseRound(round=state.round),)


def _extend(state: RoundsState, rules: Rules) -> tuple[RoundsState, tuple[Action, ...]]:
    state = replace(state, extended=True, deadline_s=state.deadline_s + rules.rejoin_grace_s)
    text = f"round {state.round}: quorum missed at the deadline, extended once by {rules.rejoin_grace_s:g} s"
    return state, (Note(text=f"{text}; waiting for {', '.join(_missing_names(state))}"),)


def _finish(state: RoundsState, _rules: Rules) -> tuple[RoundsState, tuple[Action, ...]]:
    return _entering(state, "finished"), (FinishRun(),)


#: The first row that holds is taken; at most one per event.
TRANSITIONS: Final[tuple[Transition, ...]] = (
    Transition("gathering", _enough_clients, _plan),
    Transition("open", _all_in, _close),
    Transition("open", _only_the_left_are_missing, _close),
    Transition("open", _deadline_with_quorum, _close),
    Transition("open", _deadline_first_time, _extend),
    Transition("open", _deadline, _close),
    Transition("concluding", _everybody_there, _measure),
    Transition("measuring", _all_in, _finish),
    Transition("measuring", _deadline, _finish),
)

EMPTY_ROUNDS_BEFORE_WARNING: Final = 3


def present_clients(state: RoundsState) -> tuple[ClientKey, ...]:
    """All clients that are connected as far as is known, ascending."""
    return tuple(sorted(key for key, m in state.members.items() if m.presence == "present"))


def is_silent(state: RoundsState, key: ClientKey, rules: Rules) -> bool:
    """True if a present client has given no sign of life for ``silent_after_s``."""
    member = state.members[key]
    return member.presence == "present" and state.now_s - member.heard_s > rules.silent_after_s


def plannable_clients(state: RoundsState, rules: Rules) -> tuple[ClientKey, ...]:
    """Present, not silent, and not busy with an attempt whose late update would still count.

    Busy ones are included when the others are fewer than ``min_cohort``: a new assignment then replaces the old one.
    """
    there = [key for key in present_clients(state) if not is_silent(state, key, rules)]
    free = [key for key in there if not _works_on_late_attempt(state, key)]
    return tuple(free if len(free) >= rules.min_cohort else there)


def waiting_for(state: RoundsState, rules: Rules) -> str:
    """What the run waits for, in words: who is missing, and when the wait ends."""
    match state.phase:
        case "gathering":
            if state.blocked:
                return f"a client that fits: {state.blocked}"
            there = len(plannable_clients(state, rules))
            absent = [state.members[key].name for key in _expected(state)]
            who = f" (not here yet: {', '.join(sorted(absent))})" if absent else ""
            if there < rules.min_cohort:
                return f"clients: {there} of at least {rules.min_cohort} are here{who}"
            return f"clients{who}; round {state.round} opens in {max(0.0, rules.gather_s - state.elapsed_s):.0f} s"
        case "planning":
            return f"the plan of round {state.round}"
        case "open" | "measuring":
            what = f"round {state.round}" if state.phase == "open" else "the final measurement"
            names = ", ".join(_missing_names(state, rules))
            return f"{what}: {names}; at most {max(0.0, state.deadline_s - state.elapsed_s):.0f} s more"
        case "closing":
            return f"the fold of round {state.round}"
        case "concluding":
            absent = ", ".join(sorted(state.members[key].name for key in _expected(state)))
            return f"clients for the final measurement ({absent}); {max(0.0, rules.gather_s - state.elapsed_s):.0f} s"
        case "preparing":
            return "the plan of the final measurement"
        case "finished":
            return "nothing: the run is finished"


def _advanced(state: RoundsState, now_s: float, rules: Rules) -> RoundsState:
    passed_s = max(0.0, now_s - state.now_s)
    gathering = state.phase == "gathering"
    counts = not gathering or len(plannable_clients(state, rules)) >= rules.min_cohort
    return replace(state, now_s=now_s, elapsed_s=state.elapsed_s + passed_s if counts else 0.0)


def _entering(state: RoundsState, phase: Phase) -> RoundsState:
    return replace(state, phase=phase, elapsed_s=0.0, deadline_s=0.0, extended=False)


def _with_member(state: RoundsState, key: ClientKey, member: Member) -> RoundsState:
    return replace(state, members={**state.members, key: member})


def _with_outcome(state: RoundsState, key: ClientKey, attempt_id: AttemptId, outcome: Outcome) -> RoundsState:
    task = state.tasks.get(key)
    if task is None or task.attempt_id != attempt_id or task.outcome != "open":
        late = {k: a for k, a in state.late.items() if (k, a) != (key, attempt_id)}
        return replace(state, late=late)
    return replace(state, tasks={**state.tasks, key: replace(task, outcome=outcome)})


def _without_expectations(state: RoundsState) -> RoundsState:
    """Who did not come while it was waited for is not waited for again."""
    absent = {key: replace(state.members[key], presence="left") for key in _expected(state)}
    return replace(state, members={**state.members, **absent})


def _expected(state: RoundsState) -> list[ClientKey]:
    return [key for key, member in state.members.items() if member.presence == "expected"]


def _works_on_late_attempt(state: RoundsState, key: ClientKey) -> bool:
    return key in state.late and state.members[key].busy_with == state.late[key]


def _quorum(state: RoundsState, rules: Rules) -> bool:
    assigned = [task for task in state.tasks.values() if task.kind == "train"]
    stored = sum(task.outcome == "stored" for task in assigned)
    return stored >= max(1, math.ceil(rules.quorum * len(assigned) - 1e-9))


def _missing_names(state: RoundsState, rules: Rules | None = None) -> list[str]:
    names: list[str] = []
    for key, task in state.tasks.items():
        if task.outcome != "open":
            continue
        member = state.members[key]
        remark = ""
        if member.presence != "present":
            remark = " (not connected)"
        elif rules is not None and is_silent(state, key, rules):
            remark = f" (silent for {state.now_s - member.heard_s:.0f} s)"
        names.append(member.name + remark)
    return sorted(names)


def initial_state(
    *,
    now_s: float,
    expected: Iterable[tuple[ClientKey, str]],
    round: int = 1,
    version: int = 0,
) -> RoundsState:
    """Nobody heard yet; ``expected`` are (key, name) of those worth a short wait."""
    members = {key: Member(name=name, presence="expected") for key, name in expected}
    return RoundsState(round=round, version=version, members=members, now_s=now_s)
