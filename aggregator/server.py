"""What does the aggregator do all day? Take events from the endpoint, ask the pure parts, write the ledger, answer.

The shell around ``rounds.py`` (when), ``run_rules.py`` and ``methods/`` (what), ``admission.py`` (whether it counts)
and the ledger.
Journal order (field.md F9), each arrow a place at which a kill loses nothing that was promised:

    chunks to .part -> verify -> fsync, rename, fsync folder -> ledger row -> Ack -> closing -> fold -> state files
    -> row of the round -> next assignments (rows first, then sent)

All events of one poll share one ledger transaction, and what they promise is sent after its commit, so that updates
which arrive together share their fsync.
On a restart everything is read back from the ledger: an open round goes on with the same attempts and the part of the
deadline that is left, a round that was closing is folded again from the same rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from typing_extensions import assert_never

from fedblocks.aggregator import (
    budgets,
    explain,
    growth,
    methods,
    privacy,
    probing,
    progress,
    registry,
    repair,
    rounds,
    run_rules,
)
from fedblocks.aggregator.allocation import Deadline
from fedblocks.aggregator.auth import Registry, load_or_create_server_keys
from fedblocks.aggregator.books import Books
from fedblocks.aggregator.budgets import Spent
from fedblocks.aggregator.endpoint import (
    ByteCount,
    EndpointEvent,
    MessageReceived,
    PeerGone,
    PeerRejected,
    RouterEndpoint,
    SecondSession,
    UploadAnnounced,
    UploadFailed,
    UploadFinished,
    UploadId,
)
from fedblocks.aggregator.heap import give_back_the_rest
from fedblocks.aggregator.intake import Counted, Intake, Moment, asked_for, tried
from fedblocks.aggregator.ledger import (
    Ledger,
    StoredRound,
    StoredUpdate,
    naming_damage,
    open_ledger,
)
from fedblocks.aggregator.personalisation import cluster_state
from fedblocks.aggregator.probing import PlannedProbe
from fedblocks.aggregator.registry import UNKNOWN_VERSION, KnownClient
from fedblocks.aggregator.replay import accepted_update
from fedblocks.aggregator.rounds import RoundsState, Rules, Task
from fedblocks.aggregator.run_folder import KEPT_STATES, RunFolder, RunFolderError, open_run_folder
from fedblocks.aggregator.stopping import stop_requested, withdraw_request
from fedblocks.protocol.codec import from_plain, to_plain
from fedblocks.protocol.errors import RETRY_CODES
from fedblocks.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Assignment,
    AttemptId,
    ClientKey,
    Delta,
    Evaluate,
    Fetch,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Measure,
    Message,
    Probe,
    ProbeRow,
    Ready,
    Refused,
    Report,
    Resource,
    StateUpdate,
    Welcome,
)
from fedblocks.protocol.payloads import Bytes
from fedblocks.protocol.state import make_update
from fedblocks.protocol.tensors import State

EXIT_DONE: Final = 0
EXIT_INTERRUPTED: Final = 7
POLL_S: Final = 0.25
#: The elapsed part of a deadline and the line that says what is waited for are written this often.
HOUSEKEEPING_S: Final = 1.0
#: A client that says it is idle although it has a task is sent the task again after this and its download's time.
RESEND_S: Final = 30.0
#: A client is not planned for after so many silent heartbeat intervals, and at least so many seconds.
SILENT_INTERVALS: Final = 3
MIN_SILENT_S: Final = 5.0
MIN_FINAL_MEASURE_S: Final = 60.0
#: State updates that are kept ready, by the version that they start from.
MAX_CACHED_UPDATES: Final = 8
#: From here on the operator is told that a larger rank keeps more of what clients have learnt (methods.md 10.2).
MAX_PRIOR_ERROR: Final = 0.1
#: After so long without a line the operator is told what the run waits for.
QUIET_S: Final = 10.0
#: Goodbyes leave before the socket closes.
FAREWELL_S: Final = 0.5


class Endpoint(Protocol):
    """What the server needs of ``endpoint.RouterEndpoint``."""

    @property
    def bytes_by_key(self) -> Mapping[ClientKey, ByteCount]: ...
    def poll(self, timeout_s: float) -> list[EndpointEvent]: ...
    def send(self, key: ClientKey, message: Message, payload: Bytes | Path = b"") -> bool: ...
    def accept_upload(self, upload_id: UploadId, part_path: Path) -> None: ...
    def refuse_upload(self, upload_id: UploadId, refused: Refused) -> None: ...


class OpenEndpoint(Endpoint, Protocol):
    """What serving needs beside it."""

    @property
    def address(self) -> str: ...
    def close(self) -> None: ...


MakeEndpoint = Callable[[RunFolder, Registry], OpenEndpoint]
"""How the clients of a run are reached, given its folder and who may take part."""


class Aggregator:
    """One run being served.

    Args:
        roster: (key, name) of the enrolled clients, asked at the start: the first round waits for them a little.
        clock: monotonic seconds.
        wall_clock: Unix seconds, for the books only.
        on_event: takes each line for the operator.
        gather_s: how long the first round waits for enrolled clients that are not there yet.

    Raises:
        RunFolderError: the state on disk is not the one that the ledger names.
    """

    def __init__(
        self,
        folder: RunFolder,
        ledger: Ledger,
        endpoint: Endpoint,
        *,
        roster: Sequence[tuple[ClientKey, str]],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        on_event: Callable[[str], None] | None = None,
        gather_s: float = 10.0,
    ) -> None:
        self._folder = folder
        self._ledger = ledger
        self._endpoint = endpoint
        self._clock = clock
        self._config = folder.config
        self._units = folder.plan.units
        self._published_units = self._units.published()
        self._held_units = self._units.held()
        self._rules_of_method = methods.of(self._config.run.method, self._config.run.rule)
        self._books = Books(
            ledger,
            clock=clock,
            wall_clock=wall_clock,
            on_event=on_event or _say_nothing,
            quarantine_after=self._config.server.quarantine_after,
        )
        self._intake = Intake(folder, ledger)
        self._run = run_rules.Run(
            run_id=folder.info.run_id,
            config=self._config,
            plan=folder.plan,
            anchor_sequences=folder.info.anchor_sequences,
            anchor_tokens=folder.info.anchor_tokens,
        )
        allocation = self._config.allocation
        self._rules = Rules(
            min_cohort=allocation.min_cohort,
            quorum=allocation.quorum,
            rejoin_grace_s=allocation.rejoin_grace_s,
            gather_s=gather_s,
            silent_after_s=max(MIN_SILENT_S, SILENT_INTERVALS * self._config.server.heartbeat_interval_s),
        )
        self._loading: set[ClientKey] = set()
        """Clients that said Hello to this process and are not Ready yet: not planned for."""
        self._tasks: dict[ClientKey, Assignment | Evaluate | Probe] = {}
        self._sent_s: dict[ClientKey, float] = {}
        self._unanswered: set[ClientKey] = set()
        """Clients that were sent a task and have not answered it: they may hold its state, or the one before."""
        self._uploads: dict[UploadId, tuple[ClientKey, AttemptId]] = {}
        self._prior_errors: list[float] = []
        self._updates_to: dict[tuple[int, tuple[float, ...]], tuple[StateUpdate, bytes, str]] = {}
        self._fell_back = False
        """The result is not the newest version: what a client holds of it was mixed by earlier memberships."""
        self._told: dict[ClientKey, object] = {}
        """The gist of the last plan that the operator was told of each client."""
        self._noted: set[str] = set()
        """Lines that are not said twice."""
        self._opened: RoundsState | None = None
        """The newest state in which a round was open: how long, until when, and whether it was extended."""
        self._actions: deque[rounds.Action] = deque()
        self._after_commit: list[Callable[[], object]] = []
        self._housekept_s = clock()
        self._waiting_for = ""
        self._restore(roster)

    @property
    def finished(self) -> bool:
        """True once the final state is measured and everybody was told."""
        return self._state.phase == "finished"

    @property
    def state(self) -> RoundsState:
        """Where the rounds stand."""
        return self._state

    @property
    def published_sha256(self) -> str:
        """Hash of the published state."""
        return self._model.sha256

    def step(self, timeout_s: float) -> None:
        """Wait for events at most ``timeout_s``, and do all that follows from them and from the time."""
        events = deque(self._endpoint.poll(timeout_s))
        while True:
            with self._ledger.transaction() if events else contextlib.nullcontext():
                # A round that is about to open or to close does so before the next event is looked at.
                while events and not self._must_act():
                    self._take(events.popleft())
            self._flush()
            self._feed(rounds.Tick(now_s=self._clock()))
            self._act()
            if not events:
                break
        self._keep_house(force=False)

    def farewell(self, reason: str) -> None:
        """Tell every client that the aggregator stops for now; the run goes on when it is served again."""
        self._keep_house(force=True)
        for key in self._connected():
            self._endpoint.send(key, Goodbye(reason=reason))

    # restart

    def _restore(self, roster: Sequence[tuple[ClientKey, str]]) -> None:
        folded = [r for r in self._ledger.rounds() if r.phase == "folded" and r.kind != "final"]
        last = self._ledger.last_round()
        newest = folded[-1] if folded else None
        self._method = (
            run_rules.initial_state(self._config)
            if newest is None
            else from_plain(run_rules.MethodState, newest.method_state, where="ledger.rounds")
        )
        version: int = newest.new_version or 0 if newest is not None else 0
        finished = last is not None and last.kind == "final" and last.phase == "folded"
        found = repair.newest_version(self._folder, self._ledger, version, goes_on=not finished)
        self._model = found.model
        for note in found.notes:
            self._books.note(note)
        if finished:
            self._restore_final()
        whole = self._ledger.folded_metrics(whole=True)
        self._durations_s: list[float] = [row["round_s"] for row in whole]
        self._privacy: privacy.PrivacyBooks | None = privacy.open_books(self._config, self._ledger)
        self._ledger.set_run("quarantine_after", self._config.server.quarantine_after)
        self._folder.drop_parts()
        self._folder.mend_metrics(whole)
        self._state = self._restored_rounds(last, roster)
        if last is not None:
            self._books.note(f"resumed: {self._state.phase} round {self._state.round} at version {self._model.version}")

    def _restore_final(self) -> None:
        """Write again what is damaged of a finished run's result."""
        named: dict[str, str] = self._ledger.get_run("final_files") or {}
        damage = repair.faults({self._folder.path / "state" / name: sha256 for name, sha256 in named.items()})
        if not damage:
            return
        final = self._ledger.get_run("final")
        model = repair.published_at(self._folder, self._ledger, final["version"])
        files = self._folder.final_files(*self._result(model, final))
        for path, what in damage.items():
            self._books.note(repair.replace_damaged(path, b"".join(files[path]), what))

    def _restored_rounds(self, last: StoredRound | None, roster: Sequence[tuple[ClientKey, str]]) -> RoundsState:
        now_s = self._clock()
        if last is None:
            return rounds.initial_state(now_s=now_s, expected=roster)
        assigned = self._ledger.assignments(last.round)
        names = {key: client.name for key, client in self._books.clients.items()}
        expected = [(a.client_key, names[a.client_key]) for a in assigned]
        state = rounds.initial_state(now_s=now_s, expected=expected, round=last.round, version=self._model.version)
        late = {a.client_key: a.attempt_id for a in assigned if a.outcome == "late"}
        if last.phase == "folded":
            if last.kind == "final":
                return replace(state, phase="finished")
            phase: rounds.Phase = "gathering" if last.stop_reason is None else "concluding"
            return replace(state, phase=phase, round=last.round + 1, late=late)
        tasks: dict[ClientKey, Task] = {}
        for a in assigned:  # a replacement comes after what it replaced
            kind: rounds.TaskKind = "train" if isinstance(a.message, Assignment) else "evaluate"
            tasks[a.client_key] = Task(attempt_id=a.attempt_id, kind=kind, outcome=a.outcome, reissued=a.reissued)
            self._tasks[a.client_key] = a.message
            if a.outcome == "open":
                self._unanswered.add(a.client_key)
        if last.kind == "final":
            self._use_final_state(last.version)
        elif last.kind == "train":
            self._restore_plan(last.plan)
        earlier = self._ledger.assignments(last.round - 1) if last.kind != "final" else []
        late = {a.client_key: a.attempt_id for a in earlier if a.outcome == "late"}
        state = replace(
            state,
            phase="open" if last.kind != "final" else "measuring",
            tasks=tasks,
            late=late,
            elapsed_s=last.elapsed_s,
            deadline_s=last.deadline_s,
            extended=last.extended,
        )
        self._opened = state
        if last.phase == "closing":
            self._actions.append(rounds.CloseRound(round=last.round))
            return replace(state, phase="closing")
        return state

    def _restore_plan(self, plan: Any) -> None:
        """What planning left in memory for the open round."""
        if plan["keep_deadline"]:
            deadline = from_plain(Deadline, plan["deadline"], where="ledger.rounds")
            self._method = replace(self._method, deadline=deadline)
        if "growth" in plan:  # older releases had none
            growth_state = from_plain(growth.GrowthState, plan["growth"], where="ledger.rounds")
            self._method = replace(self._method, growth=growth_state)

    # events from the endpoint

    def _take(self, event: EndpointEvent) -> None:
        match event:
            case MessageReceived(key=key, message=message):
                self._on_message(key, message)
            case UploadAnnounced(key=key, message=delta, upload_id=upload_id):
                self._on_announced(key, delta, upload_id)
            case UploadFinished(key=key, message=delta, upload_id=upload_id, path=path):
                self._uploads.pop(upload_id, None)
                self._on_uploaded(key, delta, path)
            case UploadFailed(key=key, upload_id=upload_id, code=code, text=text):
                _, attempt_id = self._uploads.pop(upload_id, (key, None))
                if code != "disconnected":  # the client was told, and will not send it again
                    self._refused_update(key, Refused(code=code, text=text, attempt_id=attempt_id))
            case PeerRejected(key=key, code=code, text=text):
                self._books.refused_by_endpoint(key, code, text)
                if key is not None and code == "revoked":
                    self._on_revoked(key)
            case SecondSession(key=key, served_address=served, ignored_address=ignored):
                name = self._books.name(key)
                self._books.note(f"two live sessions hold the key of {name}: served {served}, ignored {ignored}")
            case PeerGone():
                pass  # late, not dead: its silence shows in what the round waits for
            case _:
                assert_never(event)

    def _on_message(self, key: ClientKey, message: Message) -> None:
        if isinstance(message, Hello):
            self._on_hello(key, message)
            return
        client = self._books.clients.get(key)
        if client is None:
            self._refuse(key, Refused(code="malformed", text="no Hello came from this key yet: say Hello first"))
            return
        if isinstance(message, Ready):
            self._loading.discard(key)
            self._feed(rounds.ClientJoined(key=key, name=client.name, now_s=self._clock()))
            return
        busy_with = message.attempt_id if isinstance(message, Heartbeat) else None
        if not isinstance(message, Goodbye) and key not in self._loading:
            heard = rounds.ClientHeard(key=key, name=client.name, now_s=self._clock(), busy_with=busy_with)
            self._feed(heard)
        match message:
            case Heartbeat():
                self._on_heartbeat(client, message)
            case Fetch(name=name):
                self._on_fetch(key, name)
            case Report():
                self._on_report(client, message)
            case Refused(attempt_id=attempt_id, code=code, text=text):
                if attempt_id is not None:
                    self._task_failed(client, attempt_id, f"refused by the client ({code}): {text}")
            case Goodbye(reason=reason):
                member = self._state.members.get(key)
                if member is None or member.presence != "left":
                    self._books.say(f"{client.name} left: {reason}")
                self._feed(rounds.ClientLeft(key=key))
            case _:
                kind = type(message).__name__
                self._refuse(key, Refused(code="malformed", text=f"a client sends no {kind}"))

    def _on_hello(self, key: ClientKey, hello: Hello) -> None:
        refused = self._check_hello(hello)
        if refused is not None:
            self._refuse(key, refused)
            return
        if self._privacy is not None:  # a histogram of its data is more than a private run asks for
            hello = replace(hello, statistics=replace(hello.statistics, topics=()))
        client = registry.client_from_hello(key, hello, self._books.clients.get(key))
        self._unanswered.discard(key)
        self._books.save(client)
        welcome = Welcome(
            protocol_version=PROTOCOL_VERSION,
            run_id=self._folder.info.run_id,
            method=self._config.run.method,
            round=self._state.round,
            version=self._model.version,
            heartbeat_interval_s=self._config.server.heartbeat_interval_s,
            data=self._folder.data_format,
            resources=self._folder.info.resources,
            least_width=run_rules.widths_of(self._config)[0],
            active_blocks=run_rules.active_blocks(self._run, self._method),
        )
        self._send(key, welcome)
        if self._state.phase == "finished":
            self._send(key, Goodbye(reason="the run is finished", finished=True))
            return
        self._loading.add(key)

    def _check_hello(self, hello: Hello) -> Refused | None:
        info = self._folder.info
        if hello.protocol_version != PROTOCOL_VERSION:
            text = f"the client speaks protocol version {hello.protocol_version}, this aggregator {PROTOCOL_VERSION}"
            return Refused(code="version_skew", text=f"{text}; install the same fedblocks release on both sides")
        if hello.base_hash != info.base_hash:
            text = (
                f"the client's base model has hash {hello.base_hash[:64]}, this run's {info.base_name} {info.base_hash}"
            )
            return Refused(code="model_mismatch", text=f"{text}; use the same checkpoint")
        if hello.run_id != info.run_id:
            text = f"the client joins run {hello.run_id[:80]!r}, this is run {info.run_id!r}"
            return Refused(code="model_mismatch", text=f"{text}; use the site file of this run")
        return None

    def _on_heartbeat(self, client: KnownClient, heartbeat: Heartbeat) -> None:
        key = client.key
        self._send(
            key,
            HeartbeatReply(
                round=self._state.round,
                version=self._model.version,
                waiting_for=rounds.waiting_for(self._state, self._rules),
            ),
        )
        task = self._state.tasks.get(key)
        idle = heartbeat.attempt_id is None and heartbeat.phase == "idle" and key not in self._uploading()
        if task is None or task.outcome != "open" or not idle:
            return
        _, payload, _ = self._update_for(client.held_version, key)
        download_s = len(payload) / client.profile.downlink_bytes_per_s
        if self._clock() - self._sent_s.get(key, self._clock()) > RESEND_S + 2 * download_s:
            self._actions.append(rounds.SendTask(key=key))

    def _on_fetch(self, key: ClientKey, name: str) -> None:
        info = self._folder.resource(name)
        if info is None:
            known = ", ".join(r.name for r in self._folder.info.resources)
            self._refuse(key, Refused(code="malformed", text=f"this run has no file {name[:80]!r}, only {known}"))
            return
        message = Resource(name=name, payload_bytes=info.num_bytes, payload_sha256=info.sha256)
        self._send(key, message, self._folder.resource_path(info))

    def _on_report(self, client: KnownClient, report: Report) -> None:
        stored = self._ledger.assignment(report.attempt_id)
        if stored is None or stored.client_key != client.key:
            text = f"attempt {report.attempt_id[:60]!r} was not issued to this client"
            self._refuse(client.key, Refused(code="unknown_attempt", text=text, attempt_id=report.attempt_id))
        elif report.failure is not None:
            self._on_failure(client, stored.message, report)
        elif stored.outcome in ("open", "late") and isinstance(stored.message, Evaluate):
            self._ledger.add_report(client.key, report.attempt_id, asked_for(stored.message, report.measurements))
            self._answered(client.key, report.attempt_id)
            self._books.save(replace(client, held_version=stored.message.state.to_version))
            self._feed(rounds.ReportReceived(key=client.key, attempt_id=report.attempt_id))
        elif stored.outcome in ("open", "late") and isinstance(stored.message, Probe):
            self._ledger.add_probed(client.key, report.attempt_id, tried(stored.message, report.probed))
            self._answered(client.key, report.attempt_id)
            self._books.save(replace(client, held_version=stored.message.state.to_version))
            self._feed(rounds.ReportReceived(key=client.key, attempt_id=report.attempt_id))

    def _on_failure(self, client: KnownClient, message: Assignment | Evaluate | Probe, report: Report) -> None:
        assert report.failure is not None
        task = self._state.tasks.get(client.key)
        self._answered(client.key, report.attempt_id)
        client = registry.after_failure(client, message.state.to_version, report.failure)
        self._books.save(client)
        detail = f"{report.failure}: {report.text}"
        if (
            task is not None
            and (task.attempt_id, task.outcome, task.reissued) == (message.attempt_id, "open", False)
            and isinstance(message, Assignment)
            and report.failure in registry.MEMORY_FAILURES
            and self._state.phase == "open"
        ):
            smaller = self._smaller(client, message)
            if smaller is not None:
                self._ledger.set_outcome(message.attempt_id, "failed", detail)
                self._ledger.add_assignment(client.key, smaller, reissued=True)
                self._tasks[client.key] = smaller
                replacement = Task(attempt_id=smaller.attempt_id, kind="train", reissued=True)
                self._feed(rounds.TaskReplaced(key=client.key, task=replacement))
                self._books.note(f"{client.name}: {report.failure}; a smaller task was issued in its place")
                return
        self._task_failed(client, report.attempt_id, detail)

    def _task_failed(self, client: KnownClient, attempt_id: AttemptId, detail: str) -> None:
        stored = self._ledger.assignment(attempt_id)
        if stored is None or stored.client_key != client.key or stored.outcome not in ("open", "late"):
            return
        self._ledger.set_outcome(attempt_id, "failed", detail)
        self._feed(rounds.TaskFailed(key=client.key, attempt_id=attempt_id))
        self._books.note(f"round {stored.round}: {client.name} failed: {detail}")

    def _on_revoked(self, key: ClientKey) -> None:
        if key not in self._state.members:
            return
        self._feed(rounds.ClientLeft(key=key))
        task = self._state.tasks.get(key)
        if task is not None and task.outcome == "open" and key in self._books.clients:
            self._task_failed(self._books.clients[key], task.attempt_id, "its key was revoked")

    # uploads

    def _on_announced(self, key: ClientKey, delta: Delta, upload_id: UploadId) -> None:
        client = self._books.clients.get(key)
        if client is not None and key not in self._loading:
            self._feed(rounds.ClientHeard(key=key, name=client.name, now_s=self._clock()))
        verdict = self._intake.announced(key, client, delta, self._moment())
        if verdict is None:
            try:
                self._endpoint.accept_upload(upload_id, self._folder.part_path(delta.attempt_id, upload_id))
                self._uploads[upload_id] = key, delta.attempt_id
                return
            except OSError as error:
                verdict = self._no_space(delta.attempt_id, error)
        if isinstance(verdict, Ack):
            # The first Ack was lost. This one empties the client's outbox; the refusal after it only ends the transfer,
            # and a client that has seen the Ack says nothing of it.
            self._send(key, verdict)
            text = "this update was counted before; no need to send it again"
            verdict = Refused(code="conflict", text=text, attempt_id=delta.attempt_id)
        else:
            self._refused_update(key, verdict)
        refused = verdict
        self._after_commit.append(lambda: self._endpoint.refuse_upload(upload_id, refused))

    def _uploading(self) -> set[ClientKey]:
        return {key for key, _ in self._uploads.values()}

    def _on_uploaded(self, key: ClientKey, delta: Delta, part: Path) -> None:
        client = self._books.clients[key]
        try:
            verdict = self._intake.arrived(key, client, delta, part, self._moment(), unix_s=self._books.now_unix_s)
        except OSError as error:
            verdict = self._no_space(delta.attempt_id, error)
        match verdict:
            case Refused():
                self._refused_update(key, verdict)
                self._send(key, verdict)
            case Ack():
                self._send(key, verdict)
            case Counted(assignment=assignment, measured=measured):
                self._counted(client, assignment, delta, {m.measure for m in measured})
                self._send(key, Ack(attempt_id=delta.attempt_id, payload_sha256=delta.payload_sha256))
            case _:
                assert_never(verdict)

    def _counted(self, client: KnownClient, assignment: Assignment, delta: Delta, measured: set[Measure]) -> None:
        """What a counted update teaches about its client."""
        self._answered(client.key, delta.attempt_id)
        profiled = run_rules.profiled(client, assignment, delta.train, self._run)
        if self._privacy is not None:  # what is planned from gradients would depend on them without noise
            delta = replace(delta, train=replace(delta.train, gradient_energy=()))
        client, note = registry.after_update(client, assignment, delta, profiled)
        if note:
            self._books.note(note)
        client = replace(client, last_update_unix_s=self._books.now_unix_s)
        if "validation" in measured:
            client = replace(client, last_validation_round=delta.round)
        if "general" in measured:
            client = replace(client, last_general_round=delta.round)
        self._books.save(client)
        self._feed(rounds.UpdateStored(key=client.key, attempt_id=delta.attempt_id))

    def _moment(self) -> Moment:
        is_open = self._state.phase in ("gathering", "planning", "open")
        return Moment(round=self._state.round, version=self._model.version, open=is_open)

    def _no_space(self, attempt_id: AttemptId, error: OSError) -> Refused:
        text = f"the aggregator cannot write the update: {error.strerror}; keep it and try again later"
        self._books.note(f"{error.filename}: {error.strerror}: updates are refused until there is room")
        return Refused(code="no_space", text=text, attempt_id=attempt_id)

    def _refused_update(self, key: ClientKey, refused: Refused) -> None:
        """Books of a refused update; the attempt is over unless the client is to try again later."""
        self._books.refused(key, refused.code, refused.text)
        attempt_id = refused.attempt_id
        if attempt_id is None or refused.code in RETRY_CODES:
            return
        stored = self._ledger.assignment(attempt_id)
        if stored is not None and stored.client_key == key and stored.outcome in ("open", "late"):
            self._ledger.set_outcome(attempt_id, "refused", f"{refused.code}: {refused.text}")
            self._feed(rounds.UpdateRefused(key=key, attempt_id=attempt_id))

    def _refuse(self, key: ClientKey, refused: Refused) -> None:
        self._books.refused(key, refused.code, refused.text)
        self._send(key, refused)

    # actions of the rounds

    def _feed(self, event: rounds.Event) -> None:
        self._state, actions = rounds.handle(self._state, event, self._rules)
        if self._state.phase in ("open", "measuring"):
            self._opened = self._state
        self._actions.extend(actions)

    def _note_once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._books.note(text)

    def _must_act(self) -> bool:
        return any(not isinstance(a, (rounds.SendTask, rounds.Note)) for a in self._actions)

    def _act(self) -> None:
        while self._actions:
            action = self._actions.popleft()
            match action:
                case rounds.PlanRound(clients=clients):
                    self._open_round(clients)
                case rounds.SendTask(key=key):
                    self._send_task(key)
                case rounds.CloseRound():
                    self._close_round()
                case rounds.MeasureFinal(clients=clients):
                    self._measure_final(clients)
                case rounds.FinishRun():
                    self._finish()
                case rounds.Note(text=text):
                    self._books.note(text)
                case _:
                    assert_never(action)
            self._flush()

    def _open_round(self, keys: Sequence[ClientKey]) -> None:
        quarantined = self._ledger.quarantined(self._config.server.quarantine_after)
        clients = [self._books.clients[key] for key in keys if key not in quarantined]
        if not clients:
            names = ", ".join(self._books.clients[key].name for key in keys)
            self._feed(rounds.PlanFailed(text=f"every client here was refused too often: {names}"))
            return
        start = self._start()
        if probing.blocks_to_place(self._run, self._method):
            probe = probing.plan_probe(clients, self._run, self._method, start)
            if probe.tasks:
                self._open_probe(probe)
                return
            self._place((), start.round)
        planned = self._rules_of_method.plan(clients, self._run, self._method, start, now_unix_s=self._books.now_unix_s)
        if not planned.tasks:
            self._feed(rounds.PlanFailed(text=planned.plan.no_client_fits))
            return
        self._method = replace(self._method, deadline=planned.deadline)
        deadline_s = planned.plan.deadline.seconds
        with self._ledger.transaction():
            self._ledger.open_round(
                round=start.round,
                kind="train",
                version=start.version,
                deadline_s=deadline_s,
                plan={
                    "deadline": to_plain(planned.plan.deadline),
                    "keep_deadline": planned.deadline is not None,
                    "active_blocks": list(run_rules.active_blocks(self._run, self._method)),
                    "growth": to_plain(self._method.growth),
                    "choices": [explain.record(choice) for choice in planned.plan.choices],
                    "not_in_cohort": [client.name for client in clients if client.key not in planned.cohort],
                },
                tasks=planned.tasks.items(),
                unix_s=self._books.now_unix_s,
            )
            for client in clients:
                if client.key in planned.cohort:
                    self._books.save(replace(client, last_chosen_round=start.round))
        for choice in planned.plan.choices:
            said = explain.sentence(choice)
            gist = (choice.role, choice.blocks, choice.width, choice.steps, choice.micro_batch_size)
            if self._told.get(choice.client) != gist:
                self._told[choice.client] = gist
                self._books.say(said)
        self._begin(planned.tasks)
        tasks = {
            key: Task(attempt_id=m.attempt_id, kind="train" if isinstance(m, Assignment) else "evaluate")
            for key, m in planned.tasks.items()
        }
        self._feed(rounds.RoundPlanned(tasks=tasks, deadline_s=deadline_s))

    def _open_probe(self, probe: PlannedProbe) -> None:
        """A round in which a few clients try where a block should go."""
        start = self._start()
        names = [self._books.name(key) for key in sorted(probe.tasks)]
        candidates = next(iter(probe.tasks.values())).candidates
        self._ledger.open_round(
            round=start.round,
            kind="probe",
            version=start.version,
            deadline_s=probe.deadline_s,
            plan={"choices": [], "candidates": list(candidates)},
            tasks=probe.tasks.items(),
            unix_s=self._books.now_unix_s,
        )
        self._books.say(f"round {start.round}: {', '.join(names)} try {len(candidates)} places for a block")
        self._begin(probe.tasks)
        tasks = {key: Task(attempt_id=m.attempt_id, kind="evaluate") for key, m in probe.tasks.items()}
        self._feed(rounds.RoundPlanned(tasks=tasks, deadline_s=probe.deadline_s))

    def _place(self, tables: Sequence[tuple[ClientKey, tuple[ProbeRow, ...]]], number: int) -> None:
        """Block after block where the tables say."""
        before = run_rules.grown(self._run, self._method).plan
        placed = probing.place(self._run, self._method, tables, self._books.clients, round=number)
        self._method = placed.state
        if run_rules.grown(self._run, placed.state).plan.base_cut != before.base_cut:
            self._books.forget_caches()
        with self._ledger.transaction():
            self._ledger.set_run("probe", placed.record)
            self._books.note(f"round {number}: {placed.text}")

    def _close_probe(self, number: int) -> None:
        tables = self._ledger.probed(number)
        with self._ledger.transaction():
            self._place(tables, number)
            self._books.save_all()
            self._ledger.commit_round(
                number,
                new_version=self._model.version,
                state_sha256=self._model.sha256,
                settings=None,
                method_state=self._method,
                stop_reason=None,
                metrics=None,
                unix_s=self._books.now_unix_s,
            )
        self._feed(rounds.RoundFolded(version=self._model.version, accepted=len(tables), stop_reason=None))

    def _begin(self, tasks: Mapping[ClientKey, Assignment | Evaluate | Probe]) -> None:
        self._tasks = dict(tasks)
        self._sent_s.clear()
        self._intake.new_round()

    def _start(self) -> run_rules.Start:
        return run_rules.Start(round=self._state.round, version=self._model.version, state_sha256=self._model.sha256)

    def _smaller(self, client: KnownClient, failed: Assignment) -> Assignment | None:
        left_s = self._state.deadline_s - self._state.elapsed_s
        found = run_rules.smaller_assignment(client, failed, self._run, self._method, self._start(), deadline_s=left_s)
        if found is None:
            return None
        smaller, choice = found
        self._books.say(explain.sentence(choice))
        return smaller

    def _send_task(self, key: ClientKey) -> None:
        task, client = self._tasks.get(key), self._books.clients[key]
        if task is None:
            return
        update, payload, sha256 = self._update_for(
            UNKNOWN_VERSION if key in self._unanswered else client.held_version, key
        )
        left_s = max(1.0, self._state.deadline_s - self._state.elapsed_s)
        message = replace(
            task,
            state=update,
            payload_bytes=len(payload),
            payload_sha256=sha256,
            deadline_s=left_s,
        )
        if self._endpoint.send(key, message, payload):
            self._sent_s[key] = self._clock()
            self._unanswered.add(key)

    def _update_for(self, held_version: int, key: ClientKey) -> tuple[StateUpdate, bytes, str]:
        """The way from what a client holds to what it starts from, with its SHA-256; made once for all who hold alike.

        A model of the client's own is sent whole: no steps lead from one mixture to the next.
        """
        personal = self._method.mixture is not None or self._held_units != self._published_units
        if personal and (held_version != self._model.version or self._fell_back):
            held_version = UNKNOWN_VERSION
        which = (held_version, run_rules.memberships_of(self._method, key))
        found = self._updates_to.get(which)
        if found is None:
            model = run_rules.personal_state(self._model, self._method, key, shape=self._units)
            if model.prior_error is not None:
                self._prior_errors.append(model.prior_error)
            update = partial(
                make_update,
                self._read_step,
                shape=self._held_units,
                to_version=model.version,
                published=model.published,
                sha256=model.sha256,
            )
            try:
                made = update(from_version=held_version)
            except RunFolderError as error:
                self._note_once(f"{error}; clients that hold an older version get the whole state")
                made = update(from_version=UNKNOWN_VERSION)
            found = (*made, hashlib.sha256(made[1]).hexdigest())
            while len(self._updates_to) >= MAX_CACHED_UPDATES:
                del self._updates_to[next(iter(self._updates_to))]
            self._updates_to[which] = found
        return found

    def _read_step(self, from_version: int) -> bytes:
        """A step, verified; the newest one is made again where the disk has damaged it.

        Raises:
            RunFolderError: it is damaged, and was folded too long ago.
        """
        try:
            return repair.read_step(self._folder, self._ledger, from_version)
        except RunFolderError:
            if from_version + 1 != self._model.version:
                raise
        self._books.note(repair.make_step_again(self._folder, self._ledger, self._model.version))
        return repair.read_step(self._folder, self._ledger, from_version)

    def _close_round(self) -> None:
        began_s = self._clock()
        number = self._state.round
        opened = self._opened
        assert opened is not None
        self._ledger.save_elapsed(
            number, elapsed_s=opened.elapsed_s, deadline_s=opened.deadline_s, extended=opened.extended
        )
        self._ledger.start_closing(number)
        record = self._ledger.get_round(number)
        assert record is not None
        if record.kind == "probe":
            self._close_probe(number)
            return
        stored = self._ledger.updates_of(number)
        assigned = self._ledger.assignments(number)
        before = run_rules.grown(self._run, self._method).plan
        units = self._folder.plan.reduced(before.block_ids).unit_ids
        cohort = sorted({a.client_key for a in assigned})
        self._books.count_bytes(self._endpoint.bytes_by_key)
        self._updates_to.clear()  # as large as the state, and of a version that nobody starts from any more
        give_back_the_rest()  # the fold needs several times the state
        closed = run_rules.close(
            self._model,
            [accepted_update(self._folder, u, version=self._model.version) for u in stored],
            self._ledger.measurements(number),
            config=self._config,
            shape=self._units,
            state=self._method,
            round=number,
            method=self._rules_of_method,
            topics={key: client.statistics.topics for key, client in self._books.clients.items()},
            blocks=units,
            spent=self._spent(stored, opened.elapsed_s),
            growing=run_rules.Growing(run=self._run, clients=[self._books.clients[key] for key in cohort]),
            privacy=self._privacy,
        )
        model = closed.model
        files: dict[str, str] = {}
        if closed.step is not None:
            files = self._folder.save_version(
                model.version,
                step=closed.step,
                published=model.published,
                residual=model.residual,
                moments=model.moments,
            )
        metrics = progress.round_record(
            record,
            closed,
            before=self._method,
            config=self._config,
            blocks=units,
            active=before.block_ids,
            assigned=assigned,
            updates=stored,
            clients=self._books.clients,
            bytes_by_key=self._books.take_round_bytes(),
            earlier_s=self._durations_s,
            open_s=opened.elapsed_s,
            fold_s=self._clock() - began_s,
            prior_errors=self._prior_errors,
        )
        grown = run_rules.grown(self._run, closed.state).plan
        if grown.base_cut != before.base_cut:
            self._books.forget_caches()
        with self._ledger.transaction():
            self._books.save_all()
            self._ledger.commit_round(
                number,
                new_version=model.version,
                state_sha256=model.sha256,
                settings=to_plain(closed.settings),
                method_state=closed.state,
                stop_reason=closed.stop_reason,
                metrics=metrics,
                unix_s=self._books.now_unix_s,
                files=files,
            )
            if not self._config.server.keep_updates:
                self._ledger.compact(last_round=number, needed_version=model.version - KEPT_STATES)
        for block in sorted(set(grown.block_ids) - set(before.block_ids)):
            self._books.note(f"round {number}: {growth.growth_line(self._folder.plan, before.block_ids, block)}")
        if (regrouped := closed.state.mixture) is not None and regrouped.news(self._method.mixture):
            sizes = ", ".join(map(str, regrouped.sizes))
            self._books.note(f"round {number}: clients by cluster: {sizes}; each starts from its own mixture")
        refused = closed.state.growth.refused
        if refused and refused != self._method.growth.refused:
            self._books.note(f"round {number}: not grown: {refused}")
        if (error := metrics["prior_error"]) is not None and error > MAX_PRIOR_ERROR:
            self._books.note(
                f"round {number}: the priors leave out {error:.0%} of what was learnt (Frobenius norm); a larger "
                "trainable.prior_rank (another run: fedblocks init) keeps more"
            )
        self._prior_errors.clear()
        self._model, self._method, self._privacy = model, closed.state, closed.privacy
        self._updates_to.clear()
        self._durations_s = [*self._durations_s, metrics["round_s"]][-progress.ETA_ROUNDS :]
        self._folder.append_metrics(metrics)
        self._folder.drop_old_states(model.version)
        if files and not self._config.server.keep_updates:
            self._folder.drop_updates(number)
        for clip in closed.folded.clipped:
            name = self._books.name(clip.client)
            self._books.note(
                f"round {number}: the update of {name} to block {clip.block} was scaled by {clip.factor:.3f}"
            )
        for block, was_trained in (run_rules.new_orphans(closed.state) if stored else {}).items():
            rest = "it stays as it is" if was_trained else "an export leaves it out"
            self._books.note(
                f"round {number}: nobody has trained block {block} for {run_rules.ORPHAN_ROUNDS} rounds, {rest}; "
                "fedblocks plan says what keeps each client from it"
            )
        self._books.say(progress.round_line(metrics, self._config.run.max_rounds))
        self._feed(rounds.RoundFolded(version=model.version, accepted=len(stored), stop_reason=closed.stop_reason))

    def _spent(self, updates: Sequence[StoredUpdate], open_s: float) -> Spent:
        """In all rounds, with the one that is being closed."""
        clients, before = self._books.clients, self._method.spent
        reports = [(clients[u.client_key].profile.device, u.delta.train) for u in updates]
        return Spent(
            seconds=before.seconds + open_s,
            num_bytes=sum(c.received_bytes + c.sent_bytes for c in clients.values()),
            joules=before.joules + budgets.energy_j(reports),
        )

    def _measure_final(self, keys: Sequence[ClientKey]) -> None:
        last = self._ledger.last_round()
        assert last is not None
        best = self._method.best_version if last.stop_reason == "diverged" else self._model.version
        self._use_final_state(best)
        if best < last.version:
            self._books.note(
                f"the run diverged; the result is version {best}, the best one within the forgetting budget"
            )
        strengths = run_rules.final_strengths(self._config)
        deadline_s = max(MIN_FINAL_MEASURE_S, 2 * last.deadline_s) * len(strengths)
        start, run = self._start(), run_rules.grown(self._run, self._method)
        tasks = {
            key: run_rules.evaluation(
                self._books.clients[key],
                run,
                start,
                deadline_s=deadline_s,
                measure=run_rules.final_measures(self._books.clients[key]),
                strengths=strengths,
            )
            for key in keys
        }
        self._ledger.open_round(
            round=start.round,
            kind="final",
            version=start.version,
            deadline_s=deadline_s,
            plan=None,
            tasks=tasks.items(),
            unix_s=self._books.now_unix_s,
        )
        self._begin(tasks)
        planned = {key: Task(attempt_id=m.attempt_id, kind="evaluate") for key, m in tasks.items()}
        self._feed(rounds.MeasurePlanned(tasks=planned, deadline_s=deadline_s))

    def _use_final_state(self, version: int) -> None:
        """Go back to an earlier version, for a run that diverged; the steps lead there bit for bit."""
        if version != self._model.version:
            self._model = repair.published_at(self._folder, self._ledger, version)
            self._updates_to.clear()
            self._fell_back = True

    def _finish(self) -> None:
        number = self._state.round
        last_trained = self._ledger.get_round(number - 1)
        reason = last_trained.stop_reason if last_trained is not None else None
        self._books.count_bytes(self._endpoint.bytes_by_key)
        everybodys = run_rules.personal_state(self._model, self._method, None, shape=self._units)
        final = progress.final_record(
            self._folder.info,
            everybodys,
            self._method,
            active=run_rules.active_blocks(self._run, self._method),
            config=self._config,
            stop_reason=reason,
            rounds=number - 1,
            measured=self._ledger.measurements(number),
            clients=self._books.clients.values(),
        )
        files = self._folder.save_final(*self._result(self._model, final))
        with self._ledger.transaction():
            self._books.save_all()
            self._ledger.set_run("final", final)
            self._ledger.set_run("final_files", files)
            self._ledger.set_run("waiting_for", rounds.waiting_for(self._state, self._rules))
            self._ledger.commit_round(
                number,
                new_version=self._model.version,
                state_sha256=self._model.sha256,
                settings=None,
                method_state=self._method,
                stop_reason=reason,
                metrics=None,
                unix_s=self._books.now_unix_s,
            )
        if not self._config.server.keep_updates:
            self._folder.drop_updates(number)
        self._books.say(progress.final_line(final))
        for key in self._connected():
            self._endpoint.send(key, Goodbye(reason=f"the run is finished: {reason}", finished=True))

    def _result(
        self, model: run_rules.GlobalState, final: Mapping[str, Any]
    ) -> tuple[State, Mapping[str, Any], tuple[State, ...]]:
        """What is written of a finished run: everybody's state, the record, and what own models are mixed from."""
        everybodys = run_rules.personal_state(model, self._method, None, shape=self._units)
        mixture = self._method.mixture
        clusters = () if mixture is None else range(mixture.clusters)
        return everybodys.published, final, tuple(cluster_state(model.published, c) for c in clusters)

    # small steps

    def _send(self, key: ClientKey, message: Message, payload: Bytes | Path = b"") -> None:
        """Send after the ledger's commit."""
        self._after_commit.append(lambda: self._endpoint.send(key, message, payload))

    def _flush(self) -> None:
        waiting, self._after_commit = self._after_commit, []
        for send in waiting:
            send()

    def _connected(self) -> list[ClientKey]:
        """All clients that are connected as far as is known, those that load or rest included."""
        return sorted({*rounds.present_clients(self._state), *self._loading})

    def _answered(self, key: ClientKey, attempt_id: AttemptId) -> None:
        """The client has carried out its newest task, so it holds that task's state."""
        task = self._tasks.get(key)
        if task is not None and task.attempt_id == attempt_id:
            self._unanswered.discard(key)

    def _keep_house(self, *, force: bool) -> None:
        """Once a second: the elapsed part of the deadline, refusals by the endpoint, the line that is shown."""
        now_s = self._clock()
        if not force and now_s - self._housekept_s < HOUSEKEEPING_S:
            return
        self._housekept_s = now_s
        waiting_for = rounds.waiting_for(self._state, self._rules)
        is_open = self._state.phase in ("open", "measuring")
        if waiting_for != self._waiting_for or self._books.has_refusals or is_open:
            with self._ledger.transaction():
                if is_open:
                    self._ledger.save_elapsed(
                        self._state.round,
                        elapsed_s=self._state.elapsed_s,
                        deadline_s=self._state.deadline_s,
                        extended=self._state.extended,
                    )
                self._books.write_refusals()
                self._ledger.set_run("waiting_for", waiting_for)
            self._waiting_for = waiting_for
        if now_s - self._books.said_s >= QUIET_S:
            self._books.say(f"waiting for {waiting_for}")


def serve(
    run: Path,
    overrides: Sequence[str] = (),
    *,
    on_event: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    make_endpoint: MakeEndpoint | None = None,
) -> int:
    """Serve a run folder until the run is finished or interrupted; returns the exit code.

    Args:
        run: made by ``fedblocks init``; served before or not.
        overrides: ``section.key=value``.
        on_event: takes each line for the operator.
        stop: set it to stop as Ctrl-C does: nothing is lost, and serving again goes on. Signals are caught only in the
            main thread.
        make_endpoint: None: a port of our own (``server.bind``).

    Raises:
        RunFolderError, ConfigError, LedgerError, EndpointError, KeyFileError: with the cause and what to do.
    """
    say = on_event or _say_nothing
    stop = stop or threading.Event()
    folder = open_run_folder(run, tuple(overrides))
    try:
        with naming_damage(folder.ledger_path):
            return _serve(folder, say, stop, make_endpoint or _router)
    except sqlite3.OperationalError as error:
        say(f"{folder.ledger_path}: {error}; nothing that was acknowledged is lost, serve again to go on")
    except OSError as error:
        what = error.filename or folder.path
        say(f"{what}: {error.strerror}; nothing that was acknowledged is lost, serve again to go on")
    return EXIT_INTERRUPTED


def _router(folder: RunFolder, members: Registry) -> RouterEndpoint:
    """A port of our own."""
    expected = max(64, 2 * sum(e.standing == "enrolled" for e in members.list()))
    keys = load_or_create_server_keys(folder.path)
    return RouterEndpoint(folder.config.server.bind, keys=keys, registry=members, expected_clients=expected)


def _serve(folder: RunFolder, say: Callable[[str], None], stop: threading.Event, make_endpoint: MakeEndpoint) -> int:
    """All that :func:`serve` does but opening the folder and saying that the disk failed."""
    run = folder.path
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(os.close, folder.lock())
        cleanup.enter_context(_interrupts(stop))
        withdraw_request(run)
        folder.save_effective_config()
        repair.check_ledger_is_there(folder)
        ledger = open_ledger(folder.ledger_path, folder.identity())
        cleanup.callback(ledger.close)
        members = Registry(run)
        roster = [(e.key, e.name) for e in members.list() if e.standing == "enrolled"]
        endpoint = make_endpoint(folder, members)
        cleanup.callback(endpoint.close)
        say(f"serving {folder.info.run_id} at {endpoint.address}")
        if folder.config.server.metrics_address:
            _show_status(run, folder.config.server.metrics_address, say, cleanup)
        aggregator = Aggregator(folder, ledger, endpoint, roster=roster, on_event=say)
        while not aggregator.finished and not stop.is_set() and not stop_requested(run):
            aggregator.step(POLL_S)
        if not aggregator.finished:
            aggregator.farewell("the aggregator was stopped; it goes on when it is served again")
            return EXIT_INTERRUPTED
        # Late comers of the farewell's time are told as well.
        until_s = time.monotonic() + FAREWELL_S
        while time.monotonic() < until_s:
            aggregator.step(POLL_S)
        return EXIT_DONE


def _show_status(run: Path, address: str, say: Callable[[str], None], cleanup: contextlib.ExitStack) -> None:
    """The status page until ``cleanup``."""
    from fedblocks.aggregator.status_page import StatusServer  # http.server is not needed by who does not want it

    page = StatusServer(run, address)
    cleanup.callback(page.close)
    who = "" if page.is_loopback else "; whoever reaches this address can read it, no password is asked"
    say(f"status page at {page.address}{who}")


@contextlib.contextmanager
def _interrupts(stop: threading.Event) -> Generator[None]:
    """SIGINT and SIGTERM set ``stop``; a second SIGINT interrupts at once. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, _frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say_nothing(_line: str) -> None:
    """For who only wants the exit code."""
