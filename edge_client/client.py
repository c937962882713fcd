"""How does a site take part? ``join``: the shell that carries out what the session decides.

One process, two threads: this one trains, the transport's keeps in touch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol, TextIO

from typing_extensions import assert_never

from fedblocks import __version__
from fedblocks.edge_client import session as s
from fedblocks.edge_client.data import SiteData, TextEncoder, load_site_data
from fedblocks.edge_client.identity import KEY_FILE, load_or_create_identity
from fedblocks.edge_client.link import LinkMeter, read_record, with_link, write_record
from fedblocks.edge_client.store import ClientStore
from fedblocks.edge_client.summary import Summary, SummaryFile, held_out_sha256
from fedblocks.edge_client.transport import (
    Connected,
    Disconnected,
    OnSent,
    Problem,
    Received,
    Transport,
    TransportEvent,
    UploadSent,
)
from fedblocks.edge_client.turns import TurnTransport
from fedblocks.profiles.board import MachineState, changed, read_state
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.link import LinkRecord
from fedblocks.protocol.codec import from_plain, to_plain
from fedblocks.protocol.durable import write_durably
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.keys import KeyPair
from fedblocks.protocol.messages import (
    PROTOCOL_VERSION,
    Assignment,
    AttemptId,
    Evaluate,
    Fetch,
    Goodbye,
    Hello,
    Message,
    Probe,
    Ready,
    Report,
    Welcome,
)
from fedblocks.protocol.run_config import ConfigError
from fedblocks.protocol.site_file import CacheSettings, JoinSettings, RuntimeSettings, SiteFile

if TYPE_CHECKING:
    from fedblocks.edge_client.work import Shared, Workbench
    from fedblocks.protocol.payloads import Bytes

EXIT_BUG = 1
EXIT_REFUSED = 4
EXIT_DOES_NOT_FIT = 5
EXIT_INTERRUPTED = 7
#: Pause between two looks whether the operator has enrolled a new key.
ENROLMENT_POLL_S = 5.0
#: The aggregator plans nothing for a speed that is seven days old (aggregator/allocation.py).
PROFILE_MAX_AGE_S = 86400.0
#: So far from the future a stored profile may be: the clock was just set a little back.
CLOCK_SLACK_S = 60.0
PROFILE_FILE = "profile.json"
RUNNING_FILE = "running"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredProfile:
    """What ``profile.json`` in the client's home holds; nothing of the state leaves the machine."""

    profile: DeviceProfile
    state: MachineState | None
    """Of the machine when it was measured; None: not recorded."""


class WrongBaseError(Exception):
    """The model folder is not the base of the run."""

    exit_code = EXIT_REFUSED


class _StopTask(Exception):  # noqa: N818 - a request, not an error
    """Ctrl-C: end the task after the current step and send nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """What ``fedblocks join`` was asked for."""

    site: SiteFile
    """The invitation, with what the command line says of the site's own settings."""
    data: Path
    model: Path
    home: Path
    evaluate_general: bool = False
    dry_run: bool = False
    wait_for_enrolment: bool = False
    emulate: str | None = None
    emulate_scale: float = 1.0
    socks_proxy: str | None = None
    flower: Path | None = None
    """The Unix socket at which a Flower SuperNode asks; None: over ZeroMQ."""

    @property
    def cache(self) -> CacheSettings:
        """Where hidden states are kept, how many, and for how long."""
        return self.site.cache

    @property
    def runtime(self) -> RuntimeSettings:
        """What the training may use."""
        return self.site.runtime


def join(options: JoinOptions, *, say: Say) -> int:
    """Take part in a run until it ends; returns the exit code."""
    site = options.site
    encoder = TextEncoder(options.model, site.data)
    data = load_site_data(options.data, encoder)
    say(data.summary.line())
    _check_base(options.model, site)
    profile = device_profile(options, say)
    if options.dry_run:
        say(_what_would_leave(site, _hello(options, site, data, profile, held_version=0), options.flower))
        return 0
    key_is_new = not (options.home / KEY_FILE).exists()
    identity = load_or_create_identity(options.home)
    store = ClientStore(options.home / site.run_id)
    client = SiteClient(
        options=options,
        site=site,
        encoder=encoder,
        data=data,
        identity=identity,
        store=store,
        summary=SummaryFile(store.folder, _empty_summary(site, data)),
        profile=profile,
        say=say,
    )
    if key_is_new:
        say("this site has a new key; send the operator this line:")
    say(f"fedblocks keys enrol RUN {site.client_name} --key='{identity.public}'")
    try:
        with marked_running(store.folder):
            code = client.run(wait_for_enrolment=key_is_new or options.wait_for_enrolment)
    except Exception as error:
        client.summary.ended(getattr(error, "exit_code", EXIT_BUG))
        raise
    client.summary.ended(code)
    if code == s.EXIT_DONE or client.summary.summary.last is not None:
        say(client.summary.summary.line())
    return code


def _empty_summary(site: SiteFile, data: SiteData) -> Summary:
    return Summary(
        run_id=site.run_id,
        base_name=site.base_name,
        client_name=site.client_name,
        num_train=len(data.train),
        num_held_out=len(data.validation),
        held_out_sha256=held_out_sha256(data.validation),
    )


def _hello(options: JoinOptions, site: SiteFile, data: SiteData, profile: DeviceProfile, *, held_version: int) -> Hello:
    """What a site tells about itself."""
    return Hello(
        protocol_version=PROTOCOL_VERSION,
        run_id=site.run_id,
        base_hash=site.base_hash,
        client_name=site.client_name,
        software=f"fedblocks {__version__}",
        profile=profile,
        statistics=data.statistics(share_topics=site.join.share_topics),
        held_version=held_version,
        can_evaluate_general=options.evaluate_general,
    )


def greeting(options: JoinOptions, data: SiteData, profile: DeviceProfile) -> Hello:
    """What ``join`` would say first now."""
    held_version, _ = ClientStore(options.home / options.site.run_id).held_state()
    return _hello(options, options.site, data, profile, held_version=held_version)


def _what_would_leave(site: SiteFile, hello: Hello, flower: Path | None) -> str:
    """Everything that would leave this machine, before anything has."""
    way = f"to {site.address}, one outbound TCP connection, encrypted for the key {site.server_key}:"
    if flower is not None:
        way = (
            f"to the Flower SuperNode that asks at {flower}, which sends it on as it was set up to (its TLS, its keys):"
        )
    lines = [
        way,
        "hello (once per connection): " + json.dumps(to_plain(hello), indent=2),
        "ready (once per connection): nothing but the word",
        "heartbeat (every few seconds): attempt id, phase, steps done",
        "fetch: names of the run's files (plan.json, anchor.bin, general.jsonl)",
        "delta (once per round): int8 changes of the assigned expanded blocks; number of examples; losses; scores",
        "report (instead of a delta): sums of scores, what blocks that could be added gave, or why a task failed",
        "goodbye (when it leaves or rests): why",
        "no text, token or label is sent"
        + (", but how many rows there are in each of 64 topic bins" if site.join.share_topics else "")
        + "; yet a delta can tell the aggregator something about the text behind it",
    ]
    return "\n".join(lines)


def _check_base(model: Path, site: SiteFile) -> None:
    from fedblocks.edge_client.checkpoint import base_hash

    found = base_hash(model)
    if found != site.base_hash:
        raise WrongBaseError(
            f"{model} is another base model than the run's: hash {found[:16]}…, the run's {site.base_name} has "
            f"{site.base_hash[:16]}…; get the same checkpoint as the operator"
        )


def device_profile(options: JoinOptions, say: Say) -> DeviceProfile:
    """This device as probed within the last day, with what is known of its line; or the device to emulate on it."""
    measured = _measured_profile(options.home, say)
    if options.runtime.dtype != "auto":
        measured = replace(measured, compute_dtype=options.runtime.dtype)
    if options.emulate is None:
        return with_link(measured, read_record(options.home, options.site.address))
    from fedblocks.profiles import catalog_files

    return catalog_files.scaled(catalog_files.load(options.emulate), options.emulate_scale, host=measured)


def _measured_profile(home: Path, say: Say) -> DeviceProfile:
    path = home / PROFILE_FILE
    if path.is_file():
        try:
            known = from_plain(StoredProfile, json.loads(path.read_text(encoding="utf-8")), where=str(path))
        except (ValueError, RemoteProtocolError) as error:
            say(f"{path} cannot be used ({error}); measuring again")
        else:
            outdated = why_outdated(known, read_state(), now_unix_s=time.time())
            if not outdated:
                return known.profile
            say(f"this device's figures are void: {outdated}")
    from fedblocks.edge_client.decode_rate import nf4_decode_run
    from fedblocks.profiles.probe import probe

    say("measuring this device (under 20 s; again after a day, or in another power mode)")
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    measured = probe(folder=home, decoder=nf4_decode_run)
    write_profile(home, measured.profile, measured.before)
    return measured.profile


def why_outdated(known: StoredProfile, now: MachineState, *, now_unix_s: float) -> str:
    """Why this device is to be measured again; empty if its stored figures hold."""
    age_s = now_unix_s - known.profile.measured_unix_s
    if age_s >= PROFILE_MAX_AGE_S:
        return f"measured {age_s / 3600:.0f} hours ago"
    if age_s < -CLOCK_SLACK_S:
        return "measured in the future, by this machine's clock"
    return "" if known.state is None else changed(known.state, now)


def write_profile(home: Path, profile: DeviceProfile, state: MachineState | None = None) -> None:
    """Keep a measured profile, and the state in which it was measured, where ``join`` looks for them."""
    stored = StoredProfile(profile=profile, state=state)
    write_durably(home / PROFILE_FILE, json.dumps(to_plain(stored), indent=2).encode())


@contextlib.contextmanager
def marked_running(folder: Path) -> Iterator[None]:
    """While this lasts, :func:`is_running` says so of the run's folder in any process; a kill ends it too."""
    with (folder / RUNNING_FILE).open("w") as file:
        with contextlib.suppress(BlockingIOError):  # the same site started twice: the aggregator tells its operator
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_running(folder: Path) -> bool:
    """True if a client takes part in the run of this folder."""
    try:
        with (folder / RUNNING_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class Link(Protocol):
    """What actions need of a transport."""

    def send(self, message: Message, payload: Bytes | Path = b"") -> None:
        """Queues a message."""
        ...

    def set_status(self, *, attempt_id: AttemptId | None, phase: str, steps_done: int) -> None:
        """What the next heartbeats say."""
        ...


class SiteClient:
    """The shell around the session: sockets, files, the workbench."""

    def __init__(
        self,
        *,
        options: JoinOptions,
        site: SiteFile,
        encoder: TextEncoder,
        data: SiteData,
        identity: KeyPair,
        store: ClientStore,
        summary: SummaryFile,
        profile: DeviceProfile,
        say: Say,
    ) -> None:
        self.options = options
        self.site = site
        self.encoder = encoder
        self.data = data
        self.identity = identity
        self.store = store
        self.summary = summary
        self.profile = profile
        self.say = say
        self.stop_asked = False
        self.line = LinkRecord()
        """What the run's own traffic has shown of the line to the aggregator."""

    @property
    def memory_limit_bytes(self) -> int:
        """Most memory above the imports that a task may take: the user's limit, or the emulated device's memory."""
        if self.options.runtime.memory_bytes or self.options.emulate is None:
            return self.options.runtime.memory_bytes
        return self.profile.memory_usable_bytes

    def hello(self) -> Hello:
        """Our greeting, with the version that we hold now."""
        held_version, _ = self.store.held_state()
        profile = self.profile if self.options.emulate else with_link(self.profile, self.line)
        return _hello(self.options, self.site, self.data, profile, held_version=held_version)

    def run(self, *, wait_for_enrolment: bool) -> int:
        """Connect and follow the session until it stops."""
        previous = signal.signal(signal.SIGINT, self._on_interrupt)
        sent = open_sent(self.store.folder)
        self.line = read_record(self.options.home, self.site.address)
        try:
            while True:
                transport = self._open_transport(
                    lambda kind, num_bytes, what: sent.write(sent_line(kind, num_bytes, what))
                )
                try:
                    code, refused_key = self._follow(transport)
                except Exception as error:
                    transport.send(Goodbye(reason=why_it_leaves(error)))
                    raise
                finally:
                    transport.close()
                    self._keep_line(transport.meter.record, ends=True)
                if not (refused_key and wait_for_enrolment) or self.stop_asked:
                    return code
                self.say("waiting for the operator to enrol this key")
                time.sleep(ENROLMENT_POLL_S)
        finally:
            sent.close()
            signal.signal(signal.SIGINT, previous)
            if not self.options.cache.keep:
                shutil.rmtree(self.store.cache_folder / "prefix", ignore_errors=True)

    def _open_transport(self, on_sent: OnSent) -> Transport | TurnTransport:
        meter = LinkMeter(self.line)
        if self.options.flower is not None:
            return TurnTransport(self.options.flower, key=self.identity.public, on_sent=on_sent, meter=meter)
        return Transport(
            self.site.address,
            server_key=self.site.server_key,
            key_pair=self.identity,
            socks_proxy=self.options.socks_proxy,
            on_sent=on_sent,
            meter=meter,
        )

    def _on_interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self.stop_asked:
            raise KeyboardInterrupt
        self.stop_asked = True
        self.say("stopping after this step; press Ctrl-C again to stop now")

    def _follow(self, transport: Transport | TurnTransport) -> tuple[int, bool]:
        """The session's actions, one after the other; returns the exit code, and whether our key was refused."""
        shell = Shell(self, transport)
        state = s.SessionState(
            have=self.store.resource_hashes(), outbox=self.store.pending_attempt(), resting=rests(self.site.join)
        )
        events: deque[s.Event] = deque()
        while True:
            if not events:
                if self.stop_asked:
                    transport.send(Goodbye(reason="interrupted at the site"))
                    return EXIT_INTERRUPTED, False
                incoming = transport.get(0.5)
                if isinstance(incoming, Problem) and incoming.fatal and incoming.reason == "key_refused":
                    self.say(incoming.text)
                    return incoming.exit_code, True
                events.append(_session_event(incoming, transport, self.say, resting=rests(self.site.join)))
            self._keep_line(transport.meter.record, ends=False)
            state, actions = s.handle(state, events.popleft(), now_s=time.monotonic())
            for action in actions:
                if isinstance(action, s.Stop):
                    self.say(action.text)
                    return action.exit_code, False
                event = shell.perform(action)
                if event is not None:
                    events.append(event)

    def _keep_line(self, record: LinkRecord, *, ends: bool) -> None:
        """Notes what the traffic has shown; written at each new rate and at the end, not at each heartbeat."""
        known, self.line = self.line, record
        rates = [(r.uplink_bytes_per_s, r.downlink_bytes_per_s) for r in (known, record)]
        if rates[0] != rates[1] or (ends and record != LinkRecord()):
            try:
                write_record(self.options.home, self.site.address, record)
            except OSError as error:
                self.say(f"the speed of the line cannot be kept in {self.options.home}: {error.strerror}")


def why_it_leaves(error: Exception) -> str:
    """What the operator is told of an error that ends ``join``: no text of ours may carry paths or rows of the site."""
    code = getattr(error, "exit_code", EXIT_BUG)
    in_words = getattr(error, "in_words", "does not fit")
    return f"{in_words}: {error}"[:1000] if code == EXIT_DOES_NOT_FIT else f"an error, exit code {code}"


def _session_event(
    event: TransportEvent | None, transport: Transport | TurnTransport, say: Say, *, resting: bool
) -> s.Event:
    match event:
        case None | UploadSent():
            return s.Tick(uploading=transport.uploading, resting=resting)
        case Connected():
            return s.Connected()
        case Disconnected(text=text):
            say(text)
            return s.Disconnected()
        case Received(message=message, payload=payload):
            return s.Received(message=message, payload=payload)
        case Problem(exit_code=code, text=text, fatal=True):
            return s.Problem(exit_code=code, text=text)
        case Problem(text=text):
            say(text)
            return s.Tick(uploading=transport.uploading, resting=resting)


class Shell:
    """Carries out single actions."""

    def __init__(self, client: SiteClient, transport: Link, shared: Shared | None = None) -> None:
        self.client = client
        self.transport = transport
        self.shared = shared
        self.store = client.store
        self._bench: Workbench | None = None

    def perform(self, action: s.Action) -> s.Event | None:
        """Carry out one action; a task ends in an event."""
        match action:
            case s.SendHello():
                self.transport.set_status(attempt_id=None, phase="idle", steps_done=0)
                self.transport.send(self.client.hello())
            case s.SendFetch(name=name):
                self.transport.send(Fetch(name=name))
            case s.StoreResource(info=info, payload=payload):
                self.store.put_resource(info, payload)
            case s.Prepare(welcome=welcome):
                self._prepare(welcome)
            case s.SendReady():
                self.transport.send(Ready())
            case s.Rest():
                self.transport.send(Goodbye(reason="rests: outside its hours"))
            case s.StartTask(task=task, payload=payload):
                return self._start(task, payload)
            case s.AnnounceUpdate():
                self._announce()
            case s.CommitUpdate(attempt_id=attempt_id):
                self.bench.residuals.commit(attempt_id)
                self.store.drop_update()
                self.client.summary.counted()
            case s.DiscardUpdate(attempt_id=attempt_id, text=text):
                self.client.say(text)
                self.bench.residuals.discard(attempt_id)
                self.store.drop_update()
            case s.Say(text=text):
                self.client.say(text)
            case s.Stop():
                raise AssertionError("the caller ends the session")
            case _:
                assert_never(action)
        return None

    @property
    def bench(self) -> Workbench:
        """The workbench; made by Prepare, which the session orders before anything that needs it."""
        assert self._bench is not None
        return self._bench

    def _prepare(self, welcome: Welcome) -> None:
        """Load model, data and anchor texts. The first import of torch may take seconds; heartbeats go on meanwhile.

        Raises:
            ConfigError: the run turns rows into tokens in another way than the invitation said.
        """
        from fedblocks.edge_client.checkpoint import Checkpoint
        from fedblocks.edge_client.kernel_choice import choose_kernels, training_device
        from fedblocks.edge_client.work import Emulation, Workbench

        client = self.client
        if welcome.data != client.site.data:
            raise ConfigError(
                f"the run's data format is {welcome.data}, the invitation says {client.site.data}; "
                "ask the operator for a new site file"
            )
        self.transport.set_status(attempt_id=None, phase="loading", steps_done=0)
        device = training_device(client.profile.accelerator)
        choose_kernels(client.options.home, client.options.site.kernels, device, say=client.say)
        self._bench = Workbench(
            checkpoint=Checkpoint.open(client.options.model),
            store=self.store,
            data=client.data,
            encoder=client.encoder,
            client=client.identity.public,
            profile=client.profile,
            memory_limit_bytes=client.memory_limit_bytes,
            cache=client.options.cache,
            emulation=Emulation(profile=client.profile) if client.options.emulate else None,
            shared=self.shared,
            allow_base_training=client.options.site.limits.allow_base_training,
            least_width=welcome.least_width,
            active_blocks=welcome.active_blocks,
            say=client.say,
        )
        self.transport.set_status(attempt_id=None, phase="idle", steps_done=0)
        client.say(f"ready: run {welcome.run_id}, round {welcome.round}; {len(client.data.train)} examples")

    def _start(self, task: Assignment | Evaluate | Probe, payload: bytes) -> s.Event:
        """Carry out a task and put its update into the outbox, or report."""

        def status(phase: str, steps_done: int) -> None:
            self.transport.set_status(attempt_id=task.attempt_id, phase=phase, steps_done=steps_done)
            if self.client.stop_asked:
                raise _StopTask

        try:
            if isinstance(task, Evaluate):
                status("evaluating", 0)
                outcome = self.bench.evaluate(task, payload)
            elif isinstance(task, Probe):
                status("probing", 0)
                outcome = self.bench.probe(task, payload, status=status)
            else:
                outcome = self.bench.train(task, payload, status=status)
        except _StopTask:
            return s.TaskDone(attempt_id=task.attempt_id, has_update=False)
        except RemoteProtocolError as error:
            outcome = Report(attempt_id=task.attempt_id, round=task.round, failure="internal", text=str(error)[:1000])
        self.transport.set_status(attempt_id=None, phase="idle", steps_done=0)
        measured = outcome.measurements if isinstance(outcome, Report) else outcome[0].measurements
        self.client.summary.measured(measured, round=task.round)
        if isinstance(outcome, Report):
            if outcome.failure:
                self.client.say(f"round {task.round}: failed ({outcome.failure}): {outcome.text}")
            self.transport.send(outcome)
            return s.TaskDone(attempt_id=task.attempt_id, has_update=False)
        delta, body = outcome
        self.store.put_update(delta, body)
        report = delta.train
        self.client.say(
            f"round {task.round}: blocks {list(task.blocks)}  {delta.steps} steps  loss {report.loss_first:.3f} -> "
            f"{report.loss_last:.3f}  peak {report.peak_memory_bytes / 2**20:.1f} MiB  up {len(body) / 1024:.1f} KiB"
        )
        return s.TaskDone(attempt_id=task.attempt_id, has_update=True)

    def _announce(self) -> None:
        found = self.store.update()
        if found is not None:
            delta, path = found
            self.transport.send(delta, path)


def rests(settings: JoinSettings) -> bool:
    """True outside the hours in which this site takes part, by this machine's clock and time zone."""
    hours = settings.parsed_hours()
    now = time.localtime()
    return hours is not None and not hours.contain(now.tm_hour * 60 + now.tm_min)


def open_sent(folder: Path) -> TextIO:
    """The file of a run's folder that tells what left this machine, one line each."""
    return (folder / "sent.jsonl").open("a", encoding="utf-8", buffering=1)


def sent_line(kind: str, num_bytes: int, what: str) -> str:
    """One line of sent.jsonl: what left this machine."""
    return json.dumps({"unix_s": round(time.time(), 3), "kind": kind, "bytes": num_bytes, "what": what}) + "\n"
