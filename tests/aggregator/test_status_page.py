"""The status page: what it answers by http, that it only reads, and how it looks in a browser where there is one."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedblocks.aggregator import status_page
from fedblocks.aggregator.status import run_status
from fedblocks.aggregator.status_page import MAX_CONNECTIONS, StatusPageError, StatusServer, metrics_text
from fedblocks.protocol import run_config
from fedblocks.protocol.run_config import ConfigError

EVIL = '<img src=x onerror="document.title=1">'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def world(make_world: Callable[..., Any]) -> Any:
    """Two rounds of two sites, one of them with a name that is markup, and one refusal."""
    world = make_world("ann", EVIL, overrides=("run.max_rounds=5",))
    for site in world.sites.values():
        site.accuracy = lambda version: 0.3 + 0.1 * version
    world.sites["ann"].can_evaluate_general = True
    world.join()
    world.round()
    world.round()
    world.ledger.add_refusal(world.sites["ann"].key, "over_norm", 'too "large" \\', unix_s=1.0)
    return world


@pytest.fixture
def server(world: Any) -> Iterator[StatusServer]:
    with contextlib.closing(StatusServer(world.path, "127.0.0.1:0")) as server:
        yield server


def ask(server: StatusServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    port = int(server.address.rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_the_json_is_that_of_the_status_verb(world: Any, server: StatusServer) -> None:
    code, headers, body = ask(server, "/status.json")
    assert (code, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body) == json.loads(json.dumps(run_status(world.path)))


def test_only_the_newest_rounds_are_sent(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_page, "NEWEST_ROUNDS", 1)
    with contextlib.closing(StatusServer(world.path, "127.0.0.1:0")) as server:
        status = json.loads(ask(server, "/status.json")[2])
    assert [r["round"] for r in status["rounds"]] == [2]
    whole = run_status(world.path)
    assert {**status, "rounds": whole["rounds"]} == json.loads(json.dumps(whole))


def test_the_page_is_static_and_loads_nothing_from_elsewhere(server: StatusServer) -> None:
    code, headers, body = ask(server, "/")
    assert code == 200
    assert body == status_page.page()
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Server"].startswith("fedblocks")
    assert "Python" not in headers["Server"]
    elsewhere = rb"(?:src|href)=|https?://(?!www\.w3\.org/2000/svg)|innerHTML|insertAdjacentHTML|eval\("
    assert re.findall(elsewhere, body) == []


def test_prometheus_text_has_a_type_for_every_metric_and_escapes_what_peers_say(
    world: Any, server: StatusServer
) -> None:
    code, headers, body = ask(server, "/metrics")
    assert code == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    typed: set[str] = set()
    samples: dict[str, float] = {}
    for line in body.decode().splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert kind in ("gauge", "counter")
            assert name not in typed
            typed.add(name)
        elif not line.startswith("#"):
            found = re.fullmatch(r'(\w+)(\{(?:\w+="(?:[^"\\\n]|\\["\\n])*",?)+\})? (-?[0-9.e+-]+)', line)
            assert found, line
            assert found[1] in typed
            assert found[1] + (found[2] or "") not in samples
            samples[found[1] + (found[2] or "")] = float(found[3])
    assert samples["fedblocks_round"] == 3
    assert samples["fedblocks_version"] == 2
    assert samples["fedblocks_accuracy"] == pytest.approx(0.4)
    assert samples["fedblocks_kl_budget"] == 0.03
    assert samples['fedblocks_phase{phase="stopped"}'] == 1
    ann = world.sites["ann"].key
    assert samples[f'fedblocks_refusals_total{{client="ann",key="{ann}",code="over_norm"}}'] == 1
    assert samples['fedblocks_block_updates{block="0"}'] == 2
    assert any('client="<img src=x onerror=\\"document.title=1\\">"' in name for name in samples)


def test_a_run_that_was_never_served_has_metrics_too(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    world.kill()
    for path in world.path.glob("ledger.sqlite*"):
        path.unlink()
    assert 'fedblocks_phase{phase="never_served"} 1' in metrics_text(run_status(world.path))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_but_reading_is_answered(world: Any, server: StatusServer, method: str) -> None:
    code, _, body = ask(server, "/status.json", method)
    assert code == 405
    assert b"run_id" not in body


def test_head_has_no_body_and_other_paths_are_not_there(world: Any, server: StatusServer) -> None:
    code, headers, body = ask(server, "/status.json", "HEAD")
    assert (code, body) == (200, b"")
    assert int(headers["Content-Length"]) > 100
    for path in ("/ledger.sqlite", "/../server.key.json", "/status.json/x", "//etc/passwd", "/run.toml"):
        assert ask(server, path)[0] == 404


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("[::1]:9100", 200),
        ("evil.example", 403),
        ("evil.example:9100", 403),
        ("", 403),
    ],
)
def test_on_loopback_a_foreign_host_name_is_refused(server: StatusServer, host: str, code: int) -> None:
    assert ask(server, "/status.json", Host=host)[0] == code


def test_reading_changes_no_byte_of_the_run(world: Any, server: StatusServer) -> None:
    def bytes_of_run() -> dict[Path, bytes]:
        # SQLite's readers mark themselves in the shared memory file; nothing of the content is in it.
        return {p: p.read_bytes() for p in world.path.rglob("*") if p.is_file() and not p.name.endswith("-shm")}

    before = bytes_of_run()
    for path in ("/", "/status.json", "/metrics"):
        assert ask(server, path)[0] == 200
    assert bytes_of_run() == before


def test_the_run_goes_on_while_it_is_watched_and_the_page_follows(world: Any) -> None:
    now_s = [0.0]
    with contextlib.closing(StatusServer(world.path, "127.0.0.1:0", clock=lambda: now_s[0])) as server:
        assert json.loads(ask(server, "/status.json")[2])["version"] == 2
        world.round()
        assert json.loads(ask(server, "/status.json")[2])["version"] == 2  # read just now
        now_s[0] += 2.0
        assert json.loads(ask(server, "/status.json")[2])["version"] == 3


def test_a_ledger_that_cannot_be_read_is_an_answer_without_details(world: Any, server: StatusServer) -> None:
    world.kill()
    (world.path / "run.json").unlink()
    code, _, body = ask(server, "/status.json")
    assert code == 503
    assert str(world.path).encode() not in body
    assert ask(server, "/")[0] == 200


def test_silent_and_broken_connections_are_bounded_and_hold_nobody_up(server: StatusServer) -> None:
    port = int(server.address.rstrip("/").rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(MAX_CONNECTIONS - 2)]
    broken = socket.create_connection(("127.0.0.1", port))
    broken.send(b"GET /status.json HT")
    broken.close()
    time.sleep(0.2)
    began_s = time.monotonic()
    assert ask(server, "/status.json")[0] == 200
    assert time.monotonic() - began_s < 2
    more = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    time.sleep(0.2)
    assert sum(t.name.startswith("Thread-") for t in threading.enumerate()) <= MAX_CONNECTIONS + 4
    for one in (*silent, *more):
        one.close()


def test_an_address_that_is_taken_is_one_clear_line(world: Any, server: StatusServer) -> None:
    taken = server.address.removeprefix("http://").rstrip("/")
    with pytest.raises(StatusPageError, match=f"cannot listen at {taken}"):
        StatusServer(world.path, taken)


@pytest.mark.parametrize("address", ["9100", ":9100", "127.0.0.1", "127.0.0.1:port", "127.0.0.1:70000", "a:-1"])
def test_what_is_no_address_is_refused_with_the_key(address: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.metrics_address"):
        run_config.from_mapping({"server": {"metrics_address": address}})


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("box", False)]
)
def test_loopback_is_told_from_the_rest(host: str, loopback: bool) -> None:
    assert status_page.is_loopback(host) is loopback


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_the_run_and_takes_no_name_for_markup(world: Any, server: StatusServer, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", server.address,
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    shown = done.stdout
    assert 'data-read="yes"' in shown, done.stderr[-2000:]
    assert "tiny-run on tiny: stopped" in shown
    assert "<title>tiny-run · round 3/5</title>" in shown
    assert shown.count("<polyline") == 3
    assert "budget 0.03" in shown
    assert "over_norm" in shown
    assert "&lt;img src=x" in shown
    assert "<img" not in shown
