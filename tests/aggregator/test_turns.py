"""A run whose clients can only be asked: the same bits, the same refusals, and turns that get lost."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedblocks.aggregator.turns as turns_module
from fedblocks.aggregator.auth import Registry
from fedblocks.aggregator.endpoint import MessageReceived, PeerGone, PeerRejected, SecondSession
from fedblocks.aggregator.ledger import open_ledger
from fedblocks.aggregator.run_folder import open_run_folder
from fedblocks.aggregator.server import Aggregator
from fedblocks.aggregator.turns import TurnEndpoint
from fedblocks.protocol import transfer, turns
from fedblocks.protocol.messages import (
    ClientKey,
    Delta,
    Goodbye,
    Heartbeat,
    Message,
    Ready,
    Refused,
)


class Carrier:
    """What the sites of a ``World`` need of its endpoint, with every message carried as frames of turns.

    A site answers a turn with a task once it has said something, and any other at once; node n is the n-th site.
    """

    def __init__(self, endpoint: TurnEndpoint, keys: list[ClientKey]) -> None:
        self.endpoint, self.keys = endpoint, keys
        self.nodes = list(range(len(keys)))
        self.sent: list[tuple[ClientKey, Message, bytes]] = []
        self.said: dict[int, list[turns.Said]] = {node: [] for node in range(len(keys))}
        self.sessions: dict[int, str] = {}
        self.open: dict[int, str] = {}
        self.kinds: list[str] = []
        self.inbox = self

    def append(self, event: MessageReceived) -> None:
        self.said[self.keys.index(event.key)].append((event.message, b""))

    def announce(self, key: ClientKey, delta: Delta, payload: bytes) -> None:
        self.said[self.keys.index(key)].append((delta, payload))

    def carry(self, endpoint: TurnEndpoint) -> None:
        endpoint.seen(self.nodes)
        for kind in ("train", "evaluate", "query"):
            for turn in endpoint.take(kind):
                assert turn.node not in self.open
                self.open[turn.node] = turn.kind
                self.kinds.append(turn.kind)
                head, said = turns.decode(turn.frames, transfer.FROM_AGGREGATOR)
                self.sessions[turn.node] = head.session
                self.sent += [(self.keys[turn.node], message, bytes(data)) for message, data in said]
        for node in sorted(node for node, kind in self.open.items() if self.said[node] or kind == "query"):
            del self.open[node]
            head = turns.Head(session=self.sessions[node], key=self.keys[node])
            frames, self.said[node] = turns.encode(head, self.said[node]), []
            endpoint.heard(node, frames)


@pytest.fixture
def carried(make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``make_world``, with a :class:`TurnEndpoint` in the place of the sites' direct way."""
    monkeypatch.setattr(turns_module, "IDLE_S", 0.0)

    def start(world: Any) -> None:
        """A new process on the folder, in the place of one that was killed."""
        world.folder = open_run_folder(world.path)
        world.ledger = open_ledger(world.folder.ledger_path, world.folder.identity())
        world.registry = Registry(world.path)
        for name, site in world.sites.items():
            world.registry.enrol(site.key, name, now_unix_s=0.0)
        world.turns = TurnEndpoint(
            lambda endpoint: world.endpoint.carry(endpoint),
            registry=world.registry,
            vouch_s=2.0,
            say=world.lines.append,
            clock=lambda: world.now_s,
        )
        world.endpoint = Carrier(world.turns, [site.key for site in world.sites.values()])
        world.aggregator = Aggregator(
            world.folder,
            world.ledger,
            world.turns,
            roster=[(site.key, site.name) for site in world.sites.values()],
            clock=lambda: world.now_s,
            wall_clock=lambda: world.wall_s,
            on_event=world.lines.append,
        )

    def step(world: Any, seconds: float = 0.0) -> None:
        world.now_s += seconds
        for _ in range(4):  # an update that is let in becomes one that has come, and its answer goes out
            world.aggregator.step(0.0)

    def make(*names: str, **options: Any) -> Any:
        world = make_world(*names, **options)
        world.start, world.step = functools.partial(start, world), functools.partial(step, world)
        world.kill()
        world.start()
        return world

    return make


def test_three_rounds_through_turns_end_in_the_bits_of_three_rounds_without(
    carried: Callable[..., Any], undisturbed_sha256: str
) -> None:
    world = carried("ann", "bob", overrides=("run.max_rounds=3",))
    world.join()
    world.finish()
    assert world.aggregator.published_sha256 == undisturbed_sha256
    assert world.ledger.refusals() == {}
    assert all(site.goodbye is not None and site.goodbye.finished for site in world.sites.values())
    assert {"train", "evaluate", "query"} == set(world.endpoint.kinds)


def bad(kind: str, site: Any) -> tuple[Delta, bytes]:
    """An update with one thing wrong."""
    delta, payload = site.train(site.tasks[-1])
    match kind:
        case "non_finite":  # the first tensor is a vector: its scale is the first fp32 of the payload
            payload = np.float32(np.nan).tobytes() + payload[4:]
            return replace(delta, payload_sha256=hashlib.sha256(payload).hexdigest()), payload
        case "bad_weight":
            return replace(delta, num_examples=10**12), payload
        case "bad_steps":
            return replace(delta, steps=delta.steps + 1), payload
        case "incomplete":
            return replace(delta, tensors=delta.tensors[1:]), payload
        case "length_mismatch":
            return delta, payload[:-1]
        case "checksum_mismatch":
            return delta, payload[:-1] + bytes([payload[-1] ^ 1])
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind", ["non_finite", "bad_weight", "bad_steps", "incomplete", "length_mismatch", "checksum_mismatch"]
)
def test_a_bad_update_is_refused_by_its_code_and_the_state_is_as_if_it_had_never_come(
    carried: Callable[..., Any], without_eve_sha256: str, kind: str
) -> None:
    world = carried("ann", "bob", "eve")
    world.join()
    eve = world.sites["eve"]
    world.endpoint.announce(eve.key, *bad(kind, eve))
    world.step()
    world.round("ann", "bob")
    world.receive()
    assert [r.code for r in eve.refused] == [kind]
    assert world.ledger.refusals() == {eve.key: {kind: 1}}
    rows = world.path / "metrics.jsonl"
    for _ in range(20):  # what a carrier has damaged is no answer: eve would be asked again until the deadline
        if not rows.read_text():
            world.step(10.0)
    first = json.loads(rows.read_text().splitlines()[0])
    assert first["num_accepted"] == 2
    assert first["state_sha256"] == without_eve_sha256
    assert not list((world.path / "updates").rglob("*.part"))


def test_after_a_lost_turn_the_site_greets_anew_and_its_update_counts_once(
    carried: Callable[..., Any], undisturbed_sha256: str
) -> None:
    world = carried("ann", "bob", overrides=("run.max_rounds=3",))
    world.join()
    ann = world.sites["ann"]
    old = world.endpoint.sessions[0]
    ann.train(ann.tasks[-1])  # in its outbox; the reply that holds it never arrives
    world.turns.failed(0, "the node went away")
    world.endpoint.open.pop(0, None)
    assert any("node 0: the node went away" in line for line in world.lines)
    world.step(turns_module.RETRY_S)
    assert world.endpoint.sessions[0] != old
    ann.hello()
    for _ in range(2):
        world.step()
        world.receive()
    assert world.ledger.num_updates() == 1
    world.finish()
    assert world.aggregator.published_sha256 == undisturbed_sha256


def test_a_dead_node_holds_its_round_until_the_deadline_and_the_run_ends_without_it(
    carried: Callable[..., Any], without_eve_sha256: str
) -> None:
    world = carried("ann", "bob", "eve", overrides=("run.max_rounds=2",))
    world.join()
    world.endpoint.nodes.remove(2)
    del world.sites["eve"]
    world.round()
    rows = world.path / "metrics.jsonl"
    assert not rows.read_text()
    for _ in range(20):
        if not rows.read_text():
            world.step(10.0)
    world.finish()
    both = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["num_accepted"] for row in both] == [2, 2]
    assert both[0]["state_sha256"] == without_eve_sha256


def test_another_server_process_on_the_folder_goes_on_with_the_same_round(
    carried: Callable[..., Any], undisturbed_sha256: str
) -> None:
    world = carried("ann", "bob", overrides=("run.max_rounds=3",))
    world.join()
    world.round("ann")  # counted; bob is at work when the server dies
    attempts = [site.tasks[-1].attempt_id for site in world.sites.values()]
    world.kill()
    world.start()
    world.join()
    assert world.ledger.num_updates() == 1
    assert [site.tasks[-1].attempt_id for site in world.sites.values()] == attempts
    world.finish()
    assert world.aggregator.published_sha256 == undisturbed_sha256


def test_a_late_answer_of_an_earlier_session_is_not_looked_at(carried: Callable[..., Any]) -> None:
    world = carried("ann", "bob")
    world.join()
    ann = world.sites["ann"]
    stale = turns.encode(turns.Head(session=world.endpoint.sessions[0], key=ann.key), [ann.train(ann.tasks[-1])])
    world.turns.failed(0, "lost")
    world.endpoint.open.pop(0, None)
    world.step(turns_module.RETRY_S)
    world.turns.heard(0, stale)
    world.step()
    assert world.ledger.num_updates() == 0


def test_nothing_of_a_revoked_key_is_processed_and_its_round_does_not_wait(carried: Callable[..., Any]) -> None:
    world = carried("ann", "bob", "eve")
    world.join()
    eve = world.sites["eve"]
    world.registry.revoke("eve", now_unix_s=1.0)
    world.endpoint.announce(eve.key, *eve.train(eve.tasks[-1]))
    world.step()
    world.step()
    world.receive()
    assert "revoked" in [r.code for r in eve.refused]
    assert world.ledger.num_updates() == 0
    assert world.aggregator.state.tasks[eve.key].outcome == "failed"


class Line:
    """A :class:`TurnEndpoint` alone, its clock in the test's hand, with one enrolled key."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 0.0
        self.lines: list[str] = []
        self.key = ClientKey("ann" * 13 + "a")
        registry = Registry(folder)
        registry.enrol(self.key, "ann", now_unix_s=0.0)
        self.endpoint = TurnEndpoint(
            lambda _: None, registry=registry, vouch_s=5.0, say=self.lines.append, clock=lambda: self.now_s
        )

    def ask(self, node: int) -> turns.Head:
        (turn,) = [t for kind in ("train", "evaluate", "query") for t in self.endpoint.take(kind) if t.node == node]
        return turns.decode(turn.frames, transfer.FROM_AGGREGATOR)[0]

    def answer(self, node: int, *messages: Message, key: str | None = None) -> list[Any]:
        head = self.ask(node)
        frames = turns.encode(replace(head, key=self.key if key is None else key), [(m, b"") for m in messages])
        self.endpoint.heard(node, frames)
        return self.endpoint.poll(0.0)


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path)


def test_a_key_that_is_not_enrolled_is_told_so_and_nothing_of_it_is_processed(line: Line) -> None:
    line.endpoint.seen([7])
    (event,) = line.answer(7, Ready(), key="x" * 40)
    assert isinstance(event, PeerRejected)
    assert (event.code, event.address) == ("not_enrolled", "node 7")
    (turn,) = line.endpoint.take("query")
    (told, _), *rest = turns.decode(turn.frames, transfer.FROM_AGGREGATOR)[1]
    assert isinstance(told, Refused)
    assert (told.code, rest) == ("not_enrolled", [])


def test_frames_that_are_no_turn_are_refused_and_the_node_is_asked_again_later(line: Line) -> None:
    line.endpoint.seen([7])
    line.ask(7)
    line.endpoint.heard(7, [b"\xff\xff", b"junk"])
    (event,) = line.endpoint.poll(0.0)
    assert isinstance(event, PeerRejected)
    assert event.code == "malformed"
    assert line.ask(7)  # with the refusal


def test_a_second_node_with_the_same_key_is_not_served_and_the_operator_hears_of_it(line: Line) -> None:
    line.endpoint.seen([7, 8])
    first = line.endpoint.take("query")
    for turn, message in zip(first, (Ready(), Goodbye(reason="x")), strict=True):
        head = turns.decode(turn.frames, transfer.FROM_AGGREGATOR)[0]
        line.endpoint.heard(turn.node, turns.encode(replace(head, key=line.key), [(message, b"")]))
    events = line.endpoint.poll(0.0)
    assert [type(e) for e in events] == [MessageReceived, SecondSession]
    assert (events[1].served_address, events[1].ignored_address) == ("node 7", "node 8")


def test_a_client_that_came_back_as_another_node_greets_again_once_the_old_node_is_gone(line: Line) -> None:
    line.endpoint.seen([7])
    line.answer(7, Ready())
    line.endpoint.seen([7, 8])  # Flower lists a dead node for another minute
    ignored = line.ask(8)
    line.endpoint.heard(8, turns.encode(replace(ignored, key=line.key), [(Ready(), b"")]))
    line.endpoint.seen([8])
    assert [type(e) for e in line.endpoint.poll(0.0)] == [SecondSession, PeerGone]
    line.now_s += turns_module.RETRY_S
    again = line.ask(8)
    assert again.session != ignored.session
    line.endpoint.heard(8, turns.encode(replace(again, key=line.key), [(Ready(), b"")]))
    assert line.endpoint.poll(0.0)[0] == MessageReceived(key=line.key, message=Ready())


def test_a_client_of_a_node_that_is_there_counts_as_heard_until_it_says_goodbye(line: Line) -> None:
    line.endpoint.seen([7])
    line.answer(7, Ready())
    line.now_s += 5.0
    (event,) = line.endpoint.poll(0.0)
    assert isinstance(event.message, Heartbeat)
    line.now_s += turns_module.IDLE_S
    line.endpoint.poll(0.0)
    line.answer(7, Goodbye(reason="stops"))
    line.now_s += 50.0
    assert line.endpoint.poll(0.0) == []
    assert not line.endpoint.send(line.key, Refused(code="malformed", text=""))


def test_a_node_that_is_gone_takes_its_client_along(line: Line) -> None:
    line.endpoint.seen([7])
    line.answer(7, Ready())
    line.endpoint.seen([])
    assert line.endpoint.poll(0.0) == [PeerGone(key=line.key)]
    assert not line.endpoint.send(line.key, Refused(code="malformed", text=""))


def test_an_idle_client_is_asked_once_a_minute_and_at_once_if_there_is_something_to_say(line: Line) -> None:
    line.endpoint.seen([7])
    line.answer(7, Ready())
    assert line.endpoint.take("query") == []
    line.now_s += turns_module.IDLE_S
    line.answer(7)
    line.endpoint.send(line.key, Refused(code="malformed", text="now"))
    assert len(line.endpoint.take("query")) == 1


def test_closing_waits_for_last_words_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(tmp_path)
    line.endpoint.seen([7])
    line.answer(7, Ready())
    line.endpoint.send(line.key, Goodbye(reason="over", finished=True))
    carried: list[bytes] = []

    def pause(seconds: float) -> None:
        line.now_s += seconds
        carried.extend(f for turn in line.endpoint.take("query") for f in turn.frames)

    monkeypatch.setattr(turns_module.time, "sleep", pause)
    line.endpoint.close()
    assert carried
    assert line.now_s >= turns_module.CLOSE_S  # nobody answered
