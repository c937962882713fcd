"""F8 and F11 of field.md: a client killed at each point of its journal, alone or with everything else, loses nothing.

The clients are the real session, shell, store and residuals on a disk; only what a task computes is made up, from the
attempt's seed. The aggregator is the real one, without sockets. Whatever is killed, the run ends in the bits of the
undisturbed run, with every update counted once. The aggregator's own points stand in test_server.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedblocks.aggregator.endpoint import MessageReceived
from fedblocks.aggregator.replay import replay
from fedblocks.edge_client import session as s
from fedblocks.edge_client import store as store_module
from fedblocks.edge_client.client import Shell
from fedblocks.edge_client.residual import ResidualStore
from fedblocks.edge_client.store import ClientStore
from fedblocks.protocol.messages import Assignment, Delta, Evaluate, Report
from fedblocks.protocol.state import apply_update

THREE_ROUNDS = ("run.max_rounds=3", "server.keep_updates=true")
VICTIM = "bob"


class Killed(BaseException):
    """kill -9, as far as this process can act it."""


class MadeUpBench:
    """What the shell asks of a workbench; the state, the residual and the outbox lie on the disk."""

    def __init__(self, site: DiskSite) -> None:
        self.site = site
        self.residuals = ResidualStore(site.store.residual_folder, plan=site.world.plan)

    def take_state(self, task: Assignment | Evaluate, payload: bytes) -> None:
        plan = self.site.world.plan
        version, lazy = self.site.store.held_state()
        held = {b: {n: np.array(v) for n, v in t.items()} for b, t in lazy.items()}
        after = apply_update(
            held if version == task.state.from_version else {},
            task.state,
            payload,
            shape=plan.shape,
            blocks=plan.block_ids,
        )
        self.site.store.put_held_state(task.state.to_version, after)

    def train(self, task: Assignment, payload: bytes, *, status: Callable[[str, int], None]) -> tuple[Delta, bytes]:
        self.take_state(task, payload)
        status("training", 1)
        maths = self.site.maths
        owed = self.residuals.load(task.blocks, round=task.round)
        maths.residual = {b: {n: np.array(v) for n, v in t.items()} for b, t in owed.items()}
        maths.staged.clear()
        delta, body = maths.train(task)
        residuals = maths.staged[task.attempt_id][2]
        self.residuals.stage(task.attempt_id, residuals, round=task.round, width=task.width)
        return delta, body

    def evaluate(self, task: Evaluate, payload: bytes) -> Report:
        self.take_state(task, payload)
        found = self.site.maths.measurements(task)
        return Report(attempt_id=task.attempt_id, round=task.round, measurements=found)


class MadeUpShell(Shell):
    def _prepare(self, welcome: Any) -> None:
        self._bench = MadeUpBench(self.client)


class DiskSite:
    """One client process at a time on a folder: the shell's client and its transport at once."""

    stop_asked = False
    trained = 0

    def __init__(self, world: Any, maths: Any, folder: Path) -> None:
        self.world, self.maths, self.folder = world, maths, folder
        self.key, self.name = maths.key, maths.name
        self.summary = self
        self.finished = False
        self.start()

    def start(self) -> None:
        """A new process; what was in the memory of the last one is gone."""
        self.store = ClientStore(self.folder)
        self.shell = MadeUpShell(self, self)
        self.state = s.SessionState(have=self.store.resource_hashes(), outbox=self.store.pending_attempt())
        self.events: deque[s.Event] = deque([s.Connected()])
        self.world.endpoint.sent = [item for item in self.world.endpoint.sent if item[0] != self.key]

    def reconnect(self) -> None:
        self.events += [s.Disconnected(), s.Connected()]

    def pump(self) -> None:
        """All that has come, and what follows from it."""
        self.world.running = self.name
        mine = [(m, p) for k, m, p in self.world.endpoint.sent if k == self.key]
        self.world.endpoint.sent = [item for item in self.world.endpoint.sent if item[0] != self.key]
        self.events += [s.Received(message=m, payload=p) for m, p in mine]
        self.events.append(s.Tick())
        while self.events and not self.finished:
            self.state, actions = s.handle(self.state, self.events.popleft(), now_s=self.world.now_s)
            for action in actions:
                if isinstance(action, s.Stop):
                    assert action.exit_code == 0, action.text
                    self.finished = True
                    return
                event = self.shell.perform(action)
                if event is not None:
                    self.events.append(event)
        self.world.running = ""

    # what the shell asks of its client

    def hello(self) -> Any:
        said: list[Any] = []
        self.maths.say, say = said.append, self.maths.say
        self.maths.hello(held_version=self.store.held_state()[0])
        self.maths.say = say
        return said[0]

    def say(self, text: str) -> None:
        pass

    def counted(self) -> None:
        pass

    def measured(self, *_: Any, **__: Any) -> None:
        pass

    # and of its transport

    def send(self, message: Any, payload: Path | None = None) -> None:
        if isinstance(message, Delta):
            self.announce(message, payload.read_bytes())
        else:
            self.world.endpoint.inbox.append(MessageReceived(key=self.key, message=message))

    def announce(self, delta: Delta, body: bytes) -> None:
        self.world.endpoint.announce(self.key, delta, body)

    def set_status(self, *, attempt_id: Any, phase: str, steps_done: int) -> None:
        if phase == "training":
            self.in_training()

    def in_training(self) -> None:
        self.trained += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The nth call of a function by the victim that a file name, where one is given, marks."""

    owner: Any
    name: str
    nth: int = 1
    file: str = ""
    after: bool = False

    def arm(self, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        original, calls = getattr(self.owner, self.name), [0]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts = world.running == VICTIM and (not self.file or args[0].name == self.file)
            calls[0] += counts
            if counts and calls[0] == self.nth and not self.after:
                raise Killed
            result = original(*args, **kwargs)
            if counts and calls[0] == self.nth:
                raise Killed
            return result

        monkeypatch.setattr(self.owner, self.name, wrapped)


#: In the order in which a client comes by them. The second update owes something from the first.
CLIENT_JOURNAL = {
    "before a file of the run is kept": Point(owner=ClientStore, name="put_resource"),
    "after a file of the run is kept": Point(owner=ClientStore, name="put_resource", nth=2, after=True),
    "before the state is kept": Point(owner=ClientStore, name="put_held_state", nth=2),
    "between the two files of the state": Point(owner=store_module, name="write_durably", file="held.json", nth=2),
    "after the state is kept": Point(owner=ClientStore, name="put_held_state", nth=2, after=True),
    "in training": Point(owner=DiskSite, name="in_training", nth=2),
    "before the residual is staged": Point(owner=ResidualStore, name="stage", nth=2),
    "after the residual is staged": Point(owner=ResidualStore, name="stage", nth=2, after=True),
    "before the update is in the outbox": Point(owner=ClientStore, name="put_update", nth=2),
    "in the middle of the outbox": Point(owner=store_module, name="write_durably", file="header.msgpack", nth=2),
    "after the update is in the outbox": Point(owner=ClientStore, name="put_update", nth=2, after=True),
    "before the update is announced": Point(owner=DiskSite, name="announce", nth=2),
    "after the update is announced": Point(owner=DiskSite, name="announce", nth=2, after=True),
    "before the residual is committed": Point(owner=ResidualStore, name="commit", nth=2),
    "after the residual is committed": Point(owner=ResidualStore, name="commit", nth=2, after=True),
    # put_update empties the outbox as well: calls 1 and 3.
    "before the outbox is emptied": Point(owner=ClientStore, name="drop_update", nth=4),
    "after the outbox is emptied": Point(owner=ClientStore, name="drop_update", nth=4, after=True),
    "in the last update": Point(owner=ResidualStore, name="stage", nth=3, after=True),
}


def finish(world: Any, sites: list[DiskSite], on_kill: Callable[[], None]) -> int:
    """To the end of the run; how often somebody was killed."""
    kills = 0
    for _ in range(200):
        if all(site.finished for site in sites):
            return kills
        world.step(0.5)
        for site in sites:
            try:
                site.pump()
            except Killed:
                kills += 1
                on_kill()
                break
    raise AssertionError(f"the run does not end; it waits for {world.ledger.get_run('waiting_for')}")


def sites_of(world: Any, folder: Path) -> list[DiskSite]:
    world.running = ""
    return [DiskSite(world, maths, folder / maths.name) for maths in world.sites.values()]


UNDISTURBED: dict[str, str] = {}


@pytest.fixture
def undisturbed(make_world: Callable[..., Any], tmp_path: Path) -> str:
    """The final state of the same sites when nothing goes wrong; computed once."""
    if not UNDISTURBED:
        world = make_world("ann", VICTIM, folder="undisturbed", overrides=THREE_ROUNDS)
        sites = sites_of(world, tmp_path / "undisturbed-sites")
        assert finish(world, sites, lambda: None) == 0
        assert [site.trained for site in sites] == [3, 3]
        UNDISTURBED["sha256"] = world.aggregator.published_sha256
    return UNDISTURBED["sha256"]


@pytest.mark.parametrize("dies", ["the client alone", "everything at once"])
@pytest.mark.parametrize("point", CLIENT_JOURNAL.values(), ids=[name.replace(" ", "-") for name in CLIENT_JOURNAL])
def test_killed_at_any_point_of_a_clients_journal_the_run_ends_in_the_same_bits(
    make_world: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: str,
    point: Point,
    dies: str,
) -> None:
    world = make_world("ann", VICTIM, overrides=THREE_ROUNDS)
    sites = sites_of(world, tmp_path / "sites")
    victim = next(site for site in sites if site.name == VICTIM)

    def on_kill() -> None:
        world.running = ""
        if dies == "everything at once":
            world.kill()
            world.start()
            for site in sites:
                site.start()
        else:
            victim.start()

    with monkeypatch.context() as patched:
        point.arm(world, patched)
        assert finish(world, sites, on_kill) == 1
    assert world.aggregator.published_sha256 == undisturbed
    assert [r["num_accepted"] for r in (row.metrics for row in world.ledger.rounds() if row.kind == "train")] == [2] * 3
    assert world.ledger.num_updates() == 6
    assert world.ledger.refusals() == {}
    assert all(r.equal for r in replay(world.path))


@pytest.mark.parametrize("round", [1, 2, 3])
def test_the_aggregator_killed_under_live_clients_is_reconnected_to_and_the_bits_are_the_same(
    make_world: Callable[..., Any], tmp_path: Path, undisturbed: str, round: int
) -> None:
    world = make_world("ann", VICTIM, overrides=THREE_ROUNDS)
    sites = sites_of(world, tmp_path / "sites")
    killed = False
    for _ in range(200):
        if all(site.finished for site in sites):
            break
        world.step(0.5)
        for number, site in enumerate(sites):
            site.pump()
            if world.aggregator.state.round == round and number == 0 and not killed:
                killed = True  # one update may be announced, the other not yet made
                world.kill()
                world.start()
                for one in sites:
                    one.reconnect()
    assert killed
    assert world.aggregator.published_sha256 == undisturbed
    assert world.ledger.num_updates() == 6
