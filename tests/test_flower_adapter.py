"""The thin parts of the Flower adapter, with stand-ins for what they import of Flower: records, messages and a grid.

The real thing is in tests/system/test_flower.py, in an environment of its own.
"""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedblocks.aggregator.auth import Registry
from fedblocks.aggregator.endpoint import MessageReceived, PeerGone
from fedblocks.aggregator.turns import TurnEndpoint
from fedblocks.protocol import transfer, turns
from fedblocks.protocol.messages import ClientKey, Ready, Refused

KEY = ClientKey("ann" * 13 + "a")


class RecordDict(dict[str, Any]):
    @property
    def config_records(self) -> dict[str, Any]:
        return dict(self)


class Message:
    def __init__(
        self, content: Any, dst_node_id: int = 0, message_type: str = "", *, group_id: str = "", reply_to: Any = None
    ) -> None:
        self.content, self.error = content, content if isinstance(content, SimpleNamespace) else None
        asked = "" if reply_to is None else reply_to.metadata.message_id
        self.metadata = SimpleNamespace(
            dst_node_id=dst_node_id,
            message_type=message_type,
            group_id=group_id,
            message_id=f"m{id(self)}",
            reply_to_message_id=asked,
        )

    def has_error(self) -> bool:
        return self.error is not None


class App:
    def __getattr__(self, _name: str) -> Any:
        return lambda: lambda function: function


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Both applications, imported over the stand-ins."""
    parts = {
        "flwr": {},
        "flwr.app": {"RecordDict": RecordDict, "Message": Message, "Context": object, "ConfigRecord": dict,
                     "ArrayRecord": dict, "MetricRecord": dict},
        "flwr.clientapp": {"ClientApp": App},
        "flwr.common": {},
        "flwr.common.logger": {"log": lambda *_: None},
        "flwr.serverapp": {"ServerApp": App, "Grid": object},
        "flwr.serverapp.strategy": {"Strategy": object, "Result": SimpleNamespace},
    }  # fmt: skip
    for name, members in parts.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    found = {}
    for name in ("server_app", "client_app"):
        monkeypatch.delitem(sys.modules, f"fedblocks.flower.{name}", raising=False)
        found[name] = importlib.import_module(f"fedblocks.flower.{name}")
        monkeypatch.delitem(sys.modules, f"fedblocks.flower.{name}")
    return SimpleNamespace(**found)


class Grid:
    """Two nodes; ``replies`` are made by the test."""

    def __init__(self) -> None:
        self.nodes = [7, 8]
        self.pushed: list[Message] = []
        self.replies: list[Message] = []
        self.takes = True

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def push_messages(self, messages: list[Message]) -> list[str | None]:
        self.pushed += messages
        return [m.metadata.message_id if self.takes else None for m in messages]

    def pull_messages(self, ids: list[str]) -> list[Message]:
        found, self.replies = [m for m in self.replies if m.metadata.reply_to_message_id in ids], []
        return found


@pytest.fixture
def strategy(flower: SimpleNamespace, tmp_path: Path) -> Any:
    made = flower.server_app.BlockStrategy(tmp_path)
    registry = Registry(tmp_path)
    registry.enrol(KEY, "ann", now_unix_s=0.0)
    made.grid, made.lines = Grid(), []
    made._endpoint = TurnEndpoint(
        lambda _: made._exchange(made.grid), registry=registry, vouch_s=1e9, say=made.lines.append
    )
    return made


def greeted(strategy: Any) -> list[Any]:
    """Both nodes are asked; the first one's client answers."""
    strategy.endpoint.poll(0.0)
    first = strategy.grid.pushed[0]
    head, _ = turns.decode(first.content["fedblocks"]["frames"], transfer.FROM_AGGREGATOR)
    frames = turns.encode(turns.Head(session=head.session, key=KEY), [(Ready(), b"")])
    strategy.grid.replies.append(Message(RecordDict({"fedblocks": {"frames": frames}}), reply_to=first))
    return strategy.endpoint.poll(0.0)


def test_frames_go_out_and_come_back_bit_for_bit_and_a_node_has_one_message_at_a_time(strategy: Any) -> None:
    assert greeted(strategy) == [MessageReceived(key=KEY, message=Ready())]
    assert [m.metadata.dst_node_id for m in strategy.grid.pushed] == [7, 8]
    assert {m.metadata.message_type for m in strategy.grid.pushed} == {"query"}
    refused = Refused(code="malformed", text="x")
    assert strategy.endpoint.send(KEY, refused)
    strategy.endpoint.poll(0.0)
    *_, last = strategy.grid.pushed
    assert turns.decode(last.content["fedblocks"]["frames"], transfer.FROM_AGGREGATOR)[1] == [(refused, b"")]
    assert len(strategy.grid.pushed) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (SimpleNamespace(code=1, reason="out of memory"), "out of memory"),
        (RecordDict(), "without the record"),
        (RecordDict({"fedblocks": {"frames": ["text"]}}), "without the record"),
    ],
)
def test_an_error_or_a_foreign_reply_ends_the_session_and_is_told(strategy: Any, content: Any, says: str) -> None:
    greeted(strategy)
    strategy.endpoint.send(KEY, Refused(code="malformed", text="x"))
    strategy.endpoint.poll(0.0)
    strategy.grid.replies.append(Message(content, reply_to=strategy.grid.pushed[-1]))
    assert strategy.endpoint.poll(0.0) == [PeerGone(key=KEY)]
    assert any(says in line for line in strategy.lines)


def test_a_message_that_the_superlink_does_not_take_is_told_and_tried_again_later(strategy: Any) -> None:
    strategy.grid.takes = False
    strategy.endpoint.poll(0.0)
    strategy.endpoint.poll(0.0)
    assert len(strategy.grid.pushed) == 2  # one for each node, and none again at once
    assert all("did not take the message" in line for line in strategy.lines)


@pytest.mark.parametrize("is_stopping", [True, False])
def test_a_superlink_that_answers_nothing_ends_the_run_with_one_line_also_where_flower_tries_for_ever(
    flower: SimpleNamespace, strategy: Any, monkeypatch: pytest.MonkeyPatch, is_stopping: bool
) -> None:
    for_ever, calls = threading.Event(), []
    strategy.grid.get_node_ids = lambda: calls.append(1) or for_ever.wait()
    monkeypatch.setattr(flower.server_app, "LOST_STOPPING_S" if is_stopping else "LOST_S", 0.1)
    if is_stopping:
        threading.Timer(0.1, strategy._stop.set).start()
    line = r"has not answered for \d s; stopped with exit code 7; flwr run on .* again goes on"
    for _ in range(2):  # the second time as the endpoint closes
        with pytest.raises(flower.server_app.InterruptedRunError, match=line):
            strategy.endpoint.poll(0.0)
    for_ever.set()
    assert len(calls) == 1


def test_a_superlink_that_refuses_ends_the_run_with_one_line_that_says_how(
    flower: SimpleNamespace, strategy: Any
) -> None:
    class RunNotRunningException(BaseException):
        """No Exception in Flower either."""

    def refuse(_ids: list[str]) -> list[Message]:
        raise RunNotRunningException("unauthorised\nsee the manual")

    strategy.grid.pull_messages = refuse
    with pytest.raises(flower.server_app.InterruptedRunError, match=r"\(.*NotRunning.*: unauthorised\); .* 7;"):
        strategy.endpoint.poll(0.0)


def test_how_a_serverapp_was_interrupted_stands_in_the_run_folder(
    flower: SimpleNamespace, strategy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower.server_app, "serve", lambda *_, **__: 7)
    with pytest.raises(flower.server_app.InterruptedRunError):
        strategy.start(strategy.grid)
    (line,) = (tmp_path / "flower.log").read_text().splitlines()
    assert line.endswith(f"UTC stopped with exit code 7; flwr run on {tmp_path} again goes on")


def test_the_clients_half_passes_frames_to_the_nodes_socket_and_back(
    flower: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        flower.client_app, "ask", lambda path, frames, join: asked.append((path, frames, join)) or [b"a"]
    )
    context = SimpleNamespace(node_config={"socket": "/run/s.sock", "join": "s.toml --data d"})
    message = Message(RecordDict({"fedblocks": {"frames": [b"q"]}}))
    answer = flower.client_app.answer(message, context)
    assert asked == [(Path("/run/s.sock"), [b"q"], "s.toml --data d")]
    assert answer.content == {"fedblocks": {"frames": [b"a"]}}
    assert answer.metadata.reply_to_message_id == message.metadata.message_id


def test_a_node_or_a_run_that_is_not_configured_is_one_sentence(flower: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="no join and no socket"):
        flower.client_app.answer(Message(RecordDict()), SimpleNamespace(node_config={}))
    with pytest.raises(ValueError, match="no run folder is named"):
        flower.server_app.main(Grid(), SimpleNamespace(run_config={"run": ""}))


@pytest.mark.parametrize("name", ["server_app", "client_app"])
def test_without_flower_the_error_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.delitem(sys.modules, f"fedblocks.flower.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"fedblocks\[flower\]"):
        importlib.import_module(f"fedblocks.flower.{name}")
