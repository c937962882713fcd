"""How does a client behave whose device is only assumed? A real session, a real socket and real training, on a clock
that the simulation moves.

What a task takes is the cost model's prediction for the assumed device, times what happens to it; the arithmetic itself
is done at once, in this process or a worker, and its result is held back until that time has passed.
Time, bytes and memory may be those of another model than the one that trains (:class:`Costs`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq

from fedblocks.edge_client import session as s
from fedblocks.edge_client.client import Shell, SiteClient, why_it_leaves
from fedblocks.edge_client.train import data_order
from fedblocks.edge_client.work import KL_VAL_SEQUENCES, DoesNotFitError, Shared
from fedblocks.fleet_file import Chance
from fedblocks.profiles.cost import (
    ModeSearch,
    NoFit,
    StackLayout,
    Workload,
    choose_mode,
    download_bytes,
    measure_time,
    unit_bytes,
    upload_bytes,
)
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.profiles.units import block_units
from fedblocks.protocol import transfer
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.keys import KeyPair
from fedblocks.protocol.messages import (
    Assignment,
    AttemptId,
    Delta,
    DeltaFormat,
    Evaluate,
    Goodbye,
    Heartbeat,
    Hello,
    Measure,
    Message,
    Probe,
    Report,
    Resource,
    Welcome,
)
from fedblocks.protocol.payloads import Bytes, MemorySink, open_source
from fedblocks.protocol.transfer import Connection

MAX_INCOMING: Final = 16


class VirtualClock:
    """Seconds that pass only when the simulation says so, and what is to happen when."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def __call__(self) -> float:
        """Now."""
        return self.now_s

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        """Plans ``action``; those of one moment happen in the order in which they were planned."""
        heapq.heappush(self._events, (max(when_s, self.now_s), next(self._number), action))

    @property
    def next_s(self) -> float:
        """When the next planned action is due; infinite without one."""
        return self._events[0][0] if self._events else math.inf

    def advance(self, to_s: float) -> list[Callable[[], None]]:
        """Moves to ``to_s``, or to the next planned action if that is due before; the actions that are due then."""
        self.now_s = min(max(to_s, self.now_s), max(self.next_s, self.now_s))
        due: list[Callable[[], None]] = []
        while self._events and self._events[0][0] <= self.now_s:
            due.append(heapq.heappop(self._events)[2])
        return due


class VirtualLink:
    """One connection of one client: the wire's own framing over an encrypted socket, without threads and timers."""

    def __init__(self, context: zmq.Context[Any], address: str, server_key: str, keys: KeyPair) -> None:
        self._dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._dealer.curve_serverkey = server_key.encode("ascii")
        self._dealer.curve_publickey = keys.public.encode("ascii")
        self._dealer.curve_secretkey = keys.secret.encode("ascii")
        self._dealer.set(zmq.LINGER, 0)
        self._dealer.set(zmq.MAXMSGSIZE, transfer.MAX_FRAME_BYTES)
        self._connection = Connection(receives=transfer.FROM_AGGREGATOR, max_incoming=MAX_INCOMING)
        self.bytes_sent = 0
        self.bytes_received = 0
        self._dealer.connect(address)

    def send(self, message: Message, payload: Bytes | Path = b"") -> None:
        """Queues a message, with its payload if it is an update."""
        self._connection.send(message, open_source(payload) if isinstance(message, Delta) else None)

    def pump(self) -> list[s.Received]:
        """Sends what may be sent, and returns what has arrived whole."""
        arrived: list[s.Received] = []
        while self._dealer.get(zmq.EVENTS) & zmq.POLLIN:
            frames = self._dealer.recv_multipart()
            self.bytes_received += sum(map(len, frames))
            self._take(self._connection.receive(frames), arrived)
            self._connection.grant()
        while (outbound := self._connection.next_outbound()) is not None:
            self._dealer.send_multipart(list(outbound.frames))
            self.bytes_sent += outbound.num_bytes
        return arrived

    def _take(self, events: Sequence[transfer.ConnectionEvent], arrived: list[s.Received]) -> None:
        for event in events:
            match event:
                case transfer.MessageArrived(message=message):
                    arrived.append(s.Received(message=message))
                case transfer.PayloadAnnounced(transfer=number, message=message):
                    assert isinstance(message, Resource | Assignment | Evaluate | Probe)
                    self._take(self._connection.accept(number, MemorySink()), arrived)
                case transfer.PayloadArrived(message=message, sink=MemorySink() as sink):
                    arrived.append(s.Received(message=message, payload=sink.payload()))
                case transfer.PayloadRefused():
                    pass  # its Refused follows
                case _:
                    raise AssertionError(f"an aggregator of ours does not cause this: {event}")

    def close(self) -> None:
        """The connection ends without a word."""
        self._connection.close()
        self._dealer.close(linger=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A part of a client's time: what it did from when to when."""

    kind: str
    """``train``, ``evaluate``, ``away`` (it vanished or left) or ``lost`` (a task whose result never arrived)."""
    start_s: float
    end_s: float
    round: int = 0
    blocks: tuple[int, ...] = ()
    bytes_up: int = 0
    """Payload of the update."""
    bytes_down: int = 0
    """Payload of the state that the task starts from."""
    peak_memory_bytes: int = 0
    """As predicted, above the imports; 0 for what does not train."""


@dataclass(slots=True, kw_only=True)
class Circumstances:
    """What lies on a client at the moment."""

    slow: float = 1.0
    link: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Whose time, bytes and memory the tasks of a client take."""

    profile: DeviceProfile
    plan: ExpansionPlan
    """All blocks that the run may come to have."""
    delta_format: DeltaFormat
    down_density: float
    """Of the published state."""
    of_another_model: bool
    """Not of the one that trains: then bytes are predicted instead of counted."""

    @property
    def shape(self) -> ModelShape:
        """Of the model that costs."""
        return self.plan.shape

    def layout(self, task: Task) -> StackLayout:
        """Where the blocks stand that are active in this task."""
        return self.plan.reduced(task.active_blocks or self.plan.block_ids).layout

    def trained(self, task: Assignment) -> tuple[int, ...]:
        """What the task trains, as this plan numbers it: of pairs and base tensors always all."""
        return block_units(task.blocks) if self.plan.blocks else self.plan.layout.blocks

    def bytes_of_all(self) -> int:
        """An update of all units, dense."""
        return _bytes_of_all(self.plan, self.delta_format)


def _bytes_of_all(plan: ExpansionPlan, delta_format: DeltaFormat) -> int:
    return sum(unit_bytes(plan.units, unit, delta_format) for unit in plan.unit_ids)


class AssumedSite(SiteClient):
    """A site that greets with another device than the one that its arithmetic is done on."""

    def __init__(self, *, assumed: DeviceProfile, **of_site: Any) -> None:
        super().__init__(**of_site)
        self._assumed = assumed

    def hello(self) -> Hello:
        """Our greeting, with the assumed device."""
        return replace(super().hello(), profile=self._assumed)


Task = Assignment | Evaluate | Probe
Held = list[tuple[Message, Bytes | Path]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What carrying out a task gave, beside what it left in the client's folder."""

    ended: s.Event
    held: Held
    """What is to be sent when the task ends in virtual time."""


@dataclass(slots=True)
class VirtualClient:
    """One client of a simulated fleet.

    Args:
        number: of this client in the fleet.
        site: the client's own half: files, data, identity, and the assumed device.
        clock: of the simulation.
        begin: takes a task of this client with its payload; whoever took it carries it out and then calls
            :meth:`finish`.
        connect: makes a link; the caller counts it.
        chance: what may happen to its tasks.
        seed: of what does.
        heartbeat_s: virtual seconds between its heartbeats.
        costs: whose time, bytes and memory its tasks take.
    """

    number: int
    site: AssumedSite
    group: str
    device: str
    """Name in the catalog."""
    joins_s: float
    clock: VirtualClock
    begin: Callable[[VirtualClient, Task, bytes], None]
    connect: Callable[[KeyPair], VirtualLink]
    disconnect: Callable[[VirtualLink], None]
    chance: Chance
    seed: int
    heartbeat_s: float
    shared: Shared
    costs: Costs
    link: VirtualLink | None = None
    stopped: bool = False
    now: Circumstances = field(default_factory=Circumstances)
    spans: list[Span] = field(default_factory=list)
    _state: s.SessionState | None = None
    _shell: Shell | None = None
    _held: Held | None = None
    """What a task's shell sends while its virtual time has not passed yet."""
    _life: int = 0
    """Counts connections: what was planned in an earlier one is void."""
    _seen: set[bytes] = field(default_factory=set)
    _cut: int = -1
    """Below which the states of what was seen are kept."""
    """Samples whose hidden states this client has computed."""
    _tasks: int = 0
    _running: Span | None = None

    # what the simulation asks of it

    def join(self) -> None:
        """Appears, with what lies in its folder."""
        if self.link is not None or self.stopped:
            return
        self._life += 1
        self.link = self.connect(self.site.identity)
        if self.spans and self.spans[-1].kind == "away" and math.isinf(self.spans[-1].end_s):
            self.spans[-1] = replace(self.spans[-1], end_s=self.clock())
        store = self.site.store
        self._state = s.SessionState(have=store.resource_hashes(), outbox=store.pending_attempt())
        self._shell = self._shell or Shell(self.site, self, shared=self.shared)
        self._feed(s.Connected())
        self._beat(self._life)

    def leave(self, back_s: float = math.inf) -> None:
        """Vanishes without a word, and with it the task it is at; comes back by itself after ``back_s``."""
        if self.link is None:
            return
        self.disconnect(self.link)
        self._life += 1
        self.link = None
        attempt = self._state.busy if self._state is not None else None
        if attempt is not None and self._shell is not None:  # the task has not ended in virtual time: nothing is kept
            self._shell.bench.residuals.discard(attempt)
            self.site.store.drop_update()
        if self._running is not None:
            self.spans.append(replace(self._running, kind="lost", end_s=self.clock(), bytes_up=0))
            self._running = None
        self._held = None
        self.spans.append(Span(kind="away", start_s=self.clock(), end_s=self.clock() + back_s))
        if math.isfinite(back_s):
            self.clock.at(self.clock() + back_s, self.join)

    def pump(self) -> bool:
        """Takes what has arrived; True if there was something."""
        arrived = self.link.pump() if self.link is not None else []
        for event in arrived:
            self._feed(event)
            if self.link is not None:
                self.link.pump()
        return bool(arrived)

    # what the shell asks of its transport

    def send(self, message: Message, payload: Bytes | Path = b"") -> None:
        """Sends at once, or with the end of the task that is being worked on."""
        if self._held is not None:
            self._held.append((message, payload))
        elif self.link is not None:
            self.link.send(message, payload)
            self.link.pump()

    def set_status(self, *, attempt_id: AttemptId | None, phase: str, steps_done: int) -> None:
        """Nothing: a heartbeat here says what virtual time says, not what the arithmetic is at."""

    # how it works

    def _beat(self, life: int) -> None:
        if life != self._life or self.link is None or self.stopped:
            return
        if self._state is not None and self._state.welcome is not None:
            attempt, phase = (self._state.busy, "training") if self._running else (None, "idle")
            self.link.send(Heartbeat(attempt_id=attempt, phase=phase, steps_done=0))
            self.link.pump()
        self._feed(s.Tick(uploading=False, resting=False))
        self.clock.at(self.clock() + self.heartbeat_s, lambda: self._beat(life))

    def _feed(self, first: s.Event) -> None:
        events: deque[s.Event] = deque([first])
        while events and self._state is not None and not self.stopped:
            self._state, actions = s.handle(self._state, events.popleft(), now_s=self.clock())
            for action in actions:
                match action:
                    case s.Stop(text=text):
                        self.site.say(text)
                        self.stopped = True
                    case s.StartTask(task=task, payload=payload):
                        self._work(task, payload)
                    case _:
                        assert self._shell is not None
                        try:
                            event = self._shell.perform(action)
                        except DoesNotFitError as error:
                            self._give_up(error)
                            return
                        if event is not None:
                            events.append(event)

    def _give_up(self, error: DoesNotFitError) -> None:
        """As ``join`` does on a device that is too small: the operator is told, and this client takes no part."""
        self.site.say(str(error))
        self.send(Goodbye(reason=why_it_leaves(error)))
        self.stopped = True

    @property
    def welcome(self) -> Welcome | None:
        """What the aggregator has told about the run."""
        return self._state.welcome if self._state is not None else None

    def carry_out(self, welcome: Welcome, task: Task, payload: bytes) -> Outcome:
        """Does the task in this process, which may be another one than that of the session."""
        if self._shell is None:
            self._shell = Shell(self.site, self, shared=self.shared)
            self._shell.perform(s.Prepare(welcome=welcome))
        self._held = []
        ended = self._shell.perform(s.StartTask(task=task, payload=payload))
        held, self._held = self._held, None
        assert ended is not None
        return Outcome(ended=ended, held=held)

    def _work(self, task: Task, payload: bytes) -> None:
        refused = self._refused(task) if isinstance(task, Assignment) else None
        if refused is None:
            self.begin(self, task, payload)
            return
        ended = s.TaskDone(attempt_id=task.attempt_id, has_update=False)
        self.finish(task, payload, Outcome(ended=ended, held=[(refused, b"")]))

    def finish(self, task: Task, payload: bytes, outcome: Outcome) -> None:
        """Lets the end of a task that was carried out come when the assumed device would have done it."""
        self._tasks += 1
        rng = np.random.Generator(np.random.Philox(key=[self.seed, self._tasks]))
        luck = math.exp(self.chance.jitter * float(rng.standard_normal()))
        if rng.random() < self.chance.straggler:
            luck *= self.chance.straggler_factor
        running = self._span(task, len(payload), luck)
        self._running, life = running, self._life

        def end() -> None:
            if life != self._life:
                return
            if self._running is not None:
                self.spans.append(self._running)
            self._running = None
            for message, body in outcome.held:
                self.send(message, body)
            self._feed(outcome.ended)

        if rng.random() < self.chance.dropout:
            vanish_s = running.start_s + float(rng.random()) * (running.end_s - running.start_s)
            self.clock.at(vanish_s, lambda: self.leave(self.chance.rejoin_s) if life == self._life else None)
        self.clock.at(running.end_s, end)

    def _refused(self, task: Assignment) -> Report | None:
        """What a device answers that cannot hold the task, where the costs are those of another model."""
        if not self.costs.of_another_model:
            return None
        costs, profile = self.costs, self.costs.profile
        budget_bytes = profile.memory_usable_bytes - profile.runtime_memory_bytes
        found = choose_mode(
            profile,
            costs.shape,
            costs.layout(task),
            costs.trained(task),
            self._workload(task),
            budget_bytes=budget_bytes,
            width=task.width,
        )
        if not isinstance(found, NoFit):
            return None
        text = f"blocks {list(task.blocks)} do not fit: {found.text}"
        self.site.say(f"round {task.round}: failed (over_memory_budget): {text}")
        return Report(attempt_id=task.attempt_id, round=task.round, failure="over_memory_budget", text=text[:1000])

    def _span(self, task: Task, payload_bytes: int, luck: float) -> Span:
        """Download, first passes, steps or measuring, and upload on the assumed device; an update is told so."""
        costs, profile = self.costs, self.costs.profile
        found = self.site.store.update() if isinstance(task, Assignment) else None
        slow = self.now.slow * luck
        down_bytes, up_bytes = payload_bytes, 0 if found is None else found[0].payload_bytes
        if costs.of_another_model:
            down_bytes, up_bytes = self._predicted_bytes(task, down_bytes, up_bytes, has_update=found is not None)
        down_s = down_bytes / (profile.downlink_bytes_per_s * self.now.link)
        up_s = up_bytes / (profile.uplink_bytes_per_s * self.now.link)
        span = Span(
            kind="train" if isinstance(task, Assignment) else "evaluate",
            start_s=self.clock(),
            end_s=math.inf,
            round=task.round,
            blocks=task.blocks if isinstance(task, Assignment) else (),
            bytes_up=up_bytes,
            bytes_down=down_bytes,
        )
        if isinstance(task, Probe):
            return replace(span, end_s=self.clock() + down_s + slow * self._probe_s(task))
        new_tokens = self._new_tokens(task) if isinstance(task, Assignment) and found is not None else 0.0
        work = replace(self._workload(task), new_tokens=new_tokens)
        layout = costs.layout(task)
        measure_s = slow * measure_time(profile, costs.shape, layout, work)
        if found is None or not isinstance(task, Assignment):
            return replace(span, end_s=self.clock() + down_s + measure_s)
        delta, path = found
        mode = delta.train.mode
        if costs.of_another_model:
            budget_bytes = profile.memory_usable_bytes - profile.runtime_memory_bytes
            chosen = choose_mode(
                profile,
                costs.shape,
                layout,
                costs.trained(task),
                work,
                budget_bytes=budget_bytes,
                width=task.width,
            )
            assert not isinstance(chosen, NoFit)
            mode = chosen.mode
        search = ModeSearch(profile, costs.shape, layout, work)
        cost = search.cost(costs.trained(task), mode, task.width)
        report = replace(
            delta.train,
            prefix_s=slow * max(0.0, cost.seconds - cost.step_s * task.steps),
            train_s=slow * cost.step_s * task.steps,
            measure_s=measure_s,
            encode_s=0.0,
            step_s=slow * cost.step_s,
            mode=mode,
        )
        if costs.of_another_model:
            report = replace(report, peak_memory_bytes=cost.memory.peak, predicted_peak_bytes=cost.memory.peak)
        self.site.store.put_update(replace(delta, train=report), path.read_bytes())
        end_s = self.clock() + down_s + measure_s + slow * cost.seconds + up_s
        return replace(span, end_s=end_s, peak_memory_bytes=report.peak_memory_bytes)

    def _probe_s(self, task: Probe) -> float:
        """Steps and measuring of every candidate."""
        costs, work = self.costs, self._workload(task)
        data = self.site.data.statistics()
        tokens = task.num_examples * data.mean_tokens + task.num_anchor_sequences * work.anchor_tokens
        measuring = replace(work, measure_tokens=int(len(task.strengths) * tokens))
        seconds = 0.0
        for block in task.candidates:
            layout = costs.plan.reduced((*task.active_blocks, block)).layout
            search = ModeSearch(costs.profile, costs.shape, layout, work)
            mode = search.best((block,))
            assert mode is not None
            seconds += task.steps * search.cost((block,), mode).step_s
            seconds += measure_time(costs.profile, costs.shape, layout, measuring)
        return seconds

    def _predicted_bytes(self, task: Task, payload_bytes: int, up_bytes: int, *, has_update: bool) -> tuple[int, int]:
        """Down and up, of the shape that the costs are of; of pairs and base tensors as many times as much as those of
        the model that trains as its units are larger."""
        if not self.costs.plan.blocks:
            assert self._shell is not None
            factor = self.costs.bytes_of_all() / _bytes_of_all(self._shell.bench.plan, self.costs.delta_format)
            return round(factor * payload_bytes), round(factor * up_bytes)
        shape, blocks = self.costs.shape, self.costs.layout(task).blocks
        behind = task.state.to_version - max(0, task.state.from_version)
        down = 0
        if behind:
            down = download_bytes(shape, len(blocks), self.costs.delta_format, self.costs.down_density, behind)
        if not has_update or not isinstance(task, Assignment):
            return down, 0
        return down, upload_bytes(shape, len(task.blocks), task.delta_format, task.delta_density, task.width)

    def _workload(self, task: Task) -> Workload:
        """The task's, without first passes."""
        assert self._shell is not None
        bench = self._shell.bench
        data = self.site.data.statistics()
        anchors = bench.teacher.anchors
        mean_anchor_tokens = max(1, anchors.num_tokens // len(anchors.sequences))
        strengths = len(task.strengths) if isinstance(task, Evaluate) else 1
        kl_sequences = len(anchors.kl_val_indices) if strengths > 1 else KL_VAL_SEQUENCES
        measure: tuple[Measure, ...] = () if isinstance(task, Probe) else task.measure
        measure_tokens = kl_sequences * mean_anchor_tokens if "anchor" in measure else 0
        if "validation" in measure:
            measure_tokens += sum(len(sample.ids) for sample in self.site.data.validation)
        if "general" in measure:
            measure_tokens += sum(len(sample.ids) for sample in bench.general)
        assigned = task if isinstance(task, Assignment) else None
        training = task if isinstance(task, Assignment | Probe) else None
        batch_size = training.batch_size if training else 1
        return Workload(
            batch_size=batch_size,
            micro_batch_size=assigned.micro_batch_size if assigned else batch_size,
            mean_tokens=data.mean_tokens,
            max_tokens=data.max_tokens,
            label_share=data.num_target_tokens / (data.num_examples * data.mean_tokens),
            steps=training.steps if training else 1,
            anchor_batch_size=training.anchor_batch_size if training and training.anchor_weight > 0 else 0,
            anchor_tokens=mean_anchor_tokens,
            anchor_every=assigned.anchor_every if assigned else 1,
            dtype_bytes=4 if self.costs.profile.compute_dtype == "float32" else 2,
            measure_tokens=strengths * measure_tokens,
        )

    def _new_tokens(self, task: Assignment) -> float:
        """Tokens of the samples that the task uses and this client has not computed before."""
        train = self.site.data.train
        order = data_order(len(train), task.batch_size, task.seed)
        chosen = [train[i].ids for i in {i for batch in itertools.islice(order, task.steps) for i in batch}]
        assert self._shell is not None
        anchors = self._shell.bench.teacher.anchors
        if task.anchor_weight > 0 and task.anchor_batch_size > 0:
            part = anchors.train_indices
            batches = data_order(len(part), task.anchor_batch_size, task.seed + 1)
            used = {i for batch in itertools.islice(batches, -(-task.steps // task.anchor_every)) for i in batch}
            chosen += [anchors.sequences[part[i]] for i in used]
        cut = self.costs.layout(task).base_cut
        if cut != self._cut:
            self._seen.clear()
            self._cut = cut
        new = 0
        for ids in chosen:
            key = ids.tobytes()
            if key not in self._seen:
                self._seen.add(key)
                new += len(ids)
        return float(new)
