"""How does a client behave whose device is only assumed? A real session, a real socket and real training, on a clock
that the simulation moves.

What a task takes is the cost model's prediction for the assumed device, times what happens to it; the arithmetic itself
is done at once, and its result is held back until that time has passed.
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
from fedblocks.profiles.cost import ModeSearch, StackLayout, Workload, measure_time
from fedblocks.protocol import transfer
from fedblocks.protocol.keys import KeyPair
from fedblocks.protocol.messages import (
    Assignment,
    AttemptId,
    Delta,
    Evaluate,
    Goodbye,
    Heartbeat,
    Message,
    Resource,
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
                    assert isinstance(message, Resource | Assignment | Evaluate)
                    self._take(self._connection.accept(number, MemorySink()), arrived)
                case transfer.PayloadArrived(message=message, sink=MemorySink() as sink):
                    arrived.append(s.Received(message=message, payload=sink.payload()))
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


@dataclass(slots=True, kw_only=True)
class Circumstances:
    """What lies on a client at the moment."""

    slow: float = 1.0
    link: float = 1.0


@dataclass(slots=True)
class VirtualClient:
    """One client of a simulated fleet.

    Args:
        site: the client's own half: files, data, identity, and the assumed device.
        clock: of the simulation.
        connect: makes a link; the caller counts it.
        chance: what may happen to its tasks.
        seed: of what does.
        heartbeat_s: virtual seconds between its heartbeats.
    """

    site: SiteClient
    group: str
    clock: VirtualClock
    connect: Callable[[KeyPair], VirtualLink]
    disconnect: Callable[[VirtualLink], None]
    chance: Chance
    seed: int
    heartbeat_s: float
    shared: Shared
    link: VirtualLink | None = None
    stopped: bool = False
    now: Circumstances = field(default_factory=Circumstances)
    spans: list[Span] = field(default_factory=list)
    _state: s.SessionState | None = None
    _shell: Shell | None = None
    _held: list[tuple[Message, Bytes | Path]] | None = None
    """What a task's shell sends while its virtual time has not passed yet."""
    _life: int = 0
    """Counts connections: what was planned in an earlier one is void."""
    _seen: set[bytes] = field(default_factory=set)
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
        self._life += 1
        self.disconnect(self.link)
        self.link = None
        attempt = self._state.busy if self._state is not None else None
        if attempt is not None and self._shell is not None:  # the task has not ended in virtual time: nothing is kept
            self._shell.bench.residuals.discard(attempt)
            self.site.store.drop_update()
        if self._running is not None:
            self.spans.append(replace(self._running, kind="lost", end_s=self.clock()))
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

    def _work(self, task: Assignment | Evaluate, payload: bytes) -> None:
        """Does the task now, and lets its end come when the assumed device would have done it."""
        assert self._shell is not None
        self._tasks += 1
        rng = np.random.Generator(np.random.Philox(key=[self.seed, self._tasks]))
        self._held = []
        ended = self._shell.perform(s.StartTask(task=task, payload=payload))
        held, self._held = self._held, None
        assert ended is not None
        luck = math.exp(self.chance.jitter * float(rng.standard_normal()))
        if rng.random() < self.chance.straggler:
            luck *= self.chance.straggler_factor
        duration_s = self._duration_s(task, len(payload), luck)
        blocks = task.blocks if isinstance(task, Assignment) else ()
        kind = "train" if isinstance(task, Assignment) else "evaluate"
        start_s, life = self.clock(), self._life
        self._running = Span(kind=kind, start_s=start_s, end_s=start_s + duration_s, round=task.round, blocks=blocks)

        def end() -> None:
            if life != self._life:
                return
            if self._running is not None:
                self.spans.append(self._running)
            self._running = None
            for message, body in held:
                self.send(message, body)
            self._feed(ended)

        if rng.random() < self.chance.dropout:
            vanish_s = start_s + float(rng.random()) * duration_s
            self.clock.at(vanish_s, lambda: self.leave(self.chance.rejoin_s) if life == self._life else None)
        self.clock.at(start_s + duration_s, end)

    def _duration_s(self, task: Assignment | Evaluate, down_bytes: int, luck: float) -> float:
        """Download, first passes, steps or measuring, and upload on the assumed device; an update is told so."""
        assert self._shell is not None
        bench, profile = self._shell.bench, self.site.profile
        shape = bench.plan.shape
        layout = StackLayout(
            num_entries=len(bench.plan.stack()), positions={b: bench.plan.position(b) for b in bench.plan.block_ids}
        )
        down_s = down_bytes / (profile.downlink_bytes_per_s * self.now.link)
        slow = self.now.slow * luck
        data = self.site.data.statistics()
        anchors = bench.teacher.anchors
        measure_tokens = (
            KL_VAL_SEQUENCES * max(1, anchors.num_tokens // len(anchors.sequences)) if "anchor" in task.measure else 0
        )
        if "validation" in task.measure:
            measure_tokens += sum(len(sample.ids) for sample in self.site.data.validation)
        if "general" in task.measure:
            measure_tokens += sum(len(sample.ids) for sample in bench.general)
        found = self.site.store.update() if isinstance(task, Assignment) else None
        training = task if isinstance(task, Assignment) else None
        work = Workload(
            batch_size=training.batch_size if training else 1,
            micro_batch_size=training.micro_batch_size if training else 1,
            mean_tokens=data.mean_tokens,
            max_tokens=data.max_tokens,
            label_share=data.num_target_tokens / (data.num_examples * data.mean_tokens),
            steps=training.steps if training else 1,
            anchor_batch_size=training.anchor_batch_size if training and training.anchor_weight > 0 else 0,
            anchor_tokens=max(1, anchors.num_tokens // len(anchors.sequences)),
            anchor_every=training.anchor_every if training else 1,
            dtype_bytes=bench.model.dtype.itemsize,
            new_tokens=self._new_tokens(training) if training else 0.0,
            measure_tokens=measure_tokens,
        )
        measure_s = slow * measure_time(profile, shape, layout, work)
        if training is None or found is None:
            return down_s + measure_s
        delta, path = found
        cost = ModeSearch(profile, shape, layout, work).cost(training.blocks, delta.train.mode)
        train_s, up_s = (
            slow * cost.step_s * training.steps,
            delta.payload_bytes / (profile.uplink_bytes_per_s * self.now.link),
        )
        report = replace(
            delta.train,
            prefix_s=slow * max(0.0, cost.seconds - cost.step_s * training.steps),
            train_s=train_s,
            measure_s=measure_s,
            encode_s=0.0,
            step_s=slow * cost.step_s,
        )
        self.site.store.put_update(replace(delta, train=report), path.read_bytes())
        return down_s + measure_s + slow * cost.seconds + up_s

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
        new = 0
        for ids in chosen:
            key = ids.tobytes()
            if key not in self._seen:
                self._seen.add(key)
                new += len(ids)
        return float(new)
