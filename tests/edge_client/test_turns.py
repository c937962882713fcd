"""The client that is asked: what a turn brings, what its reply holds, and what happens when the asker is gone."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedblocks.edge_client.turns as turns_module
from fedblocks.edge_client.transport import Connected, Disconnected, Problem, Received
from fedblocks.edge_client.turns import NotAnsweredError, TurnTransport, ask
from fedblocks.protocol import turns
from fedblocks.protocol.messages import ClientKey, Fetch, Goodbye, Message, Ready, Refused, Resource
from fedblocks.protocol.run_config import ConfigError
from fedblocks.protocol.transfer import FROM_CLIENT

PAYLOAD = b"plan"
RESOURCE = Resource(
    name="plan.json", payload_bytes=len(PAYLOAD), payload_sha256=hashlib.sha256(PAYLOAD).hexdigest()
)  # fmt: skip


def turn(session: str, *said: turns.Said) -> list[bytes]:
    return turns.encode(turns.Head(session=session), said)


class Asker(threading.Thread):
    """What Flower's process does: ask, and wait for the reply."""

    def __init__(self, path: Path, frames: list[bytes]) -> None:
        super().__init__(daemon=True)
        self.path, self.frames = path, frames
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = ask(self.path, self.frames, join="none is started here")
        except BaseException as error:  # noqa: BLE001 - told by `replied`
            self.error = error

    def replied(self) -> tuple[turns.Head, list[Message]]:
        self.join(10)
        if self.error is not None:
            raise self.error
        head, said = turns.decode(self.answer, FROM_CLIENT)
        return head, [message for message, _ in said]


@pytest.fixture
def sent() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def transport(tmp_path: Path, sent: list[tuple[str, int]]) -> Iterator[TurnTransport]:
    made = TurnTransport(
        tmp_path / "site" / "s.sock", key=ClientKey("me"), on_sent=lambda kind, n, what: sent.append((kind, n))
    )
    yield made
    made.close()


def path_of(transport: TurnTransport) -> Path:
    return transport._path


def test_a_turn_brings_its_messages_and_is_answered_when_nothing_is_left_to_do(
    transport: TurnTransport, sent: list[tuple[str, int]]
) -> None:
    asker = Asker(path_of(transport), turn("s1", (RESOURCE, PAYLOAD)))
    assert transport.get(5) == Connected()
    transport.send(Fetch(name="anchor.bin"))
    assert transport.get(5) == Received(message=RESOURCE, payload=PAYLOAD)
    assert asker.is_alive()
    transport.send(Ready())
    assert transport.get(0.01) is None
    head, said = asker.replied()
    assert (head.session, head.key) == ("s1", "me")
    assert said == [Fetch(name="anchor.bin"), Ready()]
    assert [kind for kind, _ in sent] == ["fetch", "ready"]
    assert sum(n for _, n in sent) == sum(map(len, asker.answer)) - len(asker.answer[0])


def test_the_next_turn_of_the_session_brings_no_greeting(transport: TurnTransport) -> None:
    for _ in range(2):
        asker = Asker(path_of(transport), turn("s1", (RESOURCE, PAYLOAD)))
        event = transport.get(5)
        if event == Connected():
            event = transport.get(5)
        assert event == Received(message=RESOURCE, payload=PAYLOAD)
        assert transport.get(0.01) is None
        asker.replied()


def test_a_turn_of_another_session_is_a_new_connection_and_what_was_meant_for_the_old_one_is_dropped(
    transport: TurnTransport,
) -> None:
    first = Asker(path_of(transport), turn("s1"))
    assert transport.get(5) == Connected()
    assert transport.get(0.01) is None
    first.replied()
    transport.send(Goodbye(reason="for the session before"))
    second = Asker(path_of(transport), turn("s2"))
    assert isinstance(transport.get(5), Disconnected)
    assert transport.get(5) == Connected()
    transport.send(Ready())
    assert transport.get(0.01) is None
    assert second.replied()[1] == [Ready()]


def test_an_asker_that_died_costs_its_turn_and_the_same_session_begins_anew(transport: TurnTransport) -> None:
    caller = turns_module._connect(path_of(transport))
    assert caller is not None
    turns_module._send(caller, turn("s1"))
    assert transport.get(5) == Connected()
    caller.close()
    transport.send(Ready())
    assert transport.get(0.01) is None
    again = Asker(path_of(transport), turn("s1"))
    assert transport.get(5) == Connected()
    assert transport.get(0.01) is None
    assert again.replied()[1] == []


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b"junk"], "malformed"),
        (turn("s1", (Ready(), b"")), "malformed"),  # no aggregator says that
        (turn("s1", (RESOURCE, b"plam")), "checksum_mismatch"),
    ],
)
def test_frames_that_an_aggregator_does_not_send_are_refused(
    transport: TurnTransport, frames: list[bytes], code: str
) -> None:
    first = Asker(path_of(transport), turn("s1"))
    assert transport.get(5) == Connected()
    assert transport.get(0.01) is None
    first.replied()
    bad = Asker(path_of(transport), frames)
    assert transport.get(5) is None
    assert transport.get(0.01) is None
    (refused,) = bad.replied()[1]
    assert isinstance(refused, Refused)
    assert refused.code == code


def test_closing_answers_the_open_turn(transport: TurnTransport) -> None:
    asker = Asker(path_of(transport), turn("s1"))
    assert transport.get(5) == Connected()
    transport.send(Goodbye(reason="does not fit"))
    transport.close()
    assert asker.replied()[1] == [Goodbye(reason="does not fit")]
    assert not path_of(transport).exists()


def test_the_asker_hears_of_a_client_that_ended_before_it_answered(transport: TurnTransport) -> None:
    path_of(transport).with_suffix(".log").write_text("a line\nout of memory\n")
    asker = Asker(path_of(transport), turn("s1"))
    assert transport.get(5) == Connected()
    transport._caller.close()  # as the end of the process does
    with pytest.raises(NotAnsweredError, match=r"ended before it answered.*out of memory"):
        asker.replied()
    transport._caller = None


def test_only_one_client_answers_at_a_socket(transport: TurnTransport) -> None:
    assert path_of(transport).with_suffix(".lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(ConfigError, match="another client answers there"):
        TurnTransport(path_of(transport), key=ClientKey("me"), on_sent=lambda *_: None)


def test_a_path_that_is_too_long_for_a_socket_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="path too long"):
        TurnTransport(tmp_path / ("x" * 120), key=ClientKey("me"), on_sent=lambda *_: None)


def test_a_client_that_nobody_asks_for_an_hour_ends(tmp_path: Path) -> None:
    now = [0.0]
    transport = TurnTransport(tmp_path / "s.sock", key=ClientKey("me"), on_sent=lambda *_: None, clock=lambda: now[0])
    assert transport.get(0.01) is None
    now[0] += turns_module.FORSAKEN_S
    event = transport.get(0.01)
    transport.close()
    assert isinstance(event, Problem)
    assert (event.exit_code, event.fatal) == (3, True)


def test_a_client_that_cannot_be_started_is_told_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(NotAnsweredError, match=r"ended with exit code 2; its log .*s\.log ends with"):
        ask(tmp_path / "s.sock", [b"x"], join="no-such-site.toml --data d --model m")
