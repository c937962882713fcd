"""How is a run watched from a browser or by Prometheus? A read-only HTTP server beside ``serve``, on loopback.

``/`` is one static page, ``/status.json`` what it reads (``fedblocks status --json`` with the newest rounds only), and
``/metrics`` the same as Prometheus text. It opens the ledger for reading, like ``status``, and answers GET and HEAD and
nothing else; it is off unless ``server.metrics_address`` names where to listen.

There is no password: who reaches the address may read. On loopback, requests that a foreign web page makes a browser
send under another host name are refused (DNS rebinding).
"""

from __future__ import annotations

import http.server
import ipaddress
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from typing import Any, Final

from fedblocks.aggregator.ledger import LedgerError
from fedblocks.aggregator.run_folder import RunFolderError
from fedblocks.aggregator.status import run_status
from fedblocks.protocol.run_config import ConfigError, split_address

PAGE_FILE: Final = "status_page.html"
NEWEST_ROUNDS: Final = 300
#: The ledger is read at most so often, however many ask.
READ_INTERVAL_S: Final = 2.0
#: A connection that says nothing is closed, and no more than so many are held at once.
CONNECTION_TIMEOUT_S: Final = 10.0
MAX_CONNECTIONS: Final = 32
HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_PHASES: Final = ("never_served", "running", "stopped", "finished")
_OF_RUN: Final = (
    ("round", "the round that is open, or the last one"),
    ("max_rounds", "the run ends after this many rounds"),
    ("version", "published version of the model"),
    ("score", "pooled validation score of the newest measured version"),
    ("accuracy", "pooled validation accuracy"),
    ("nll_per_token", "pooled validation loss, nats per target token"),
    ("retention", "share of the base's general ability that is left"),
    ("kl", "KL to the base model, nats per token"),
    ("kl_budget", "the forgetting budget, nats per token"),
    ("epsilon", "privacy spent so far"),
    ("anchor_weight", "weight of the anchor term"),
    ("eta_s", "expected seconds until the last round"),
)
_OF_NEWEST: Final = (
    ("loss", "weighted training loss of the newest round"),
    ("num_assigned", "clients with a task in the newest round"),
    ("num_accepted", "updates that the newest round counted"),
    ("num_refused", "updates of the newest round that were refused"),
    ("num_failed", "tasks of the newest round that failed"),
    ("round_s", "seconds of the newest round"),
    ("fold_s", "seconds of the newest fold"),
)


class StatusPageError(Exception):
    """The page cannot be served; the text says what to do."""

    exit_code: Final = 2


class StatusServer:
    """The HTTP server, in threads of its own.

    Args:
        address: ``host:port``; port 0 takes a free one (see ``address``).

    Raises:
        StatusPageError: the address cannot be listened at.
    """

    def __init__(self, run: Path, address: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        host, port = split_address(address)
        self._source = _Source(run, clock)
        self.is_loopback = is_loopback(host)
        handler = type("Handler", (_Handler,), {"source": self._source, "only_loopback_names": self.is_loopback})
        try:
            self._server = _Server((host, port), handler)
        except OSError as error:
            raise StatusPageError(
                f"server.metrics_address: cannot listen at {address}: {error.strerror}; choose another address or port"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="status-page", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens, with the port that was taken."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}/"

    def close(self) -> None:
        """End it; answers under way are cut."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def is_loopback(host: str) -> bool:
    """True for a host that only this machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class _Source:
    """The newest status, read at most every :data:`READ_INTERVAL_S`."""

    def __init__(self, run: Path, clock: Callable[[], float]) -> None:
        self._run = run
        self._clock = clock
        self._lock = threading.Lock()
        self._read_s: float | None = None
        self._status: dict[str, Any] = {}

    def status(self) -> dict[str, Any]:
        with self._lock:
            now_s = self._clock()
            if self._read_s is None or now_s - self._read_s >= READ_INTERVAL_S:
                self._status = run_status(self._run, newest_rounds=NEWEST_ROUNDS)
                self._read_s = now_s
            return self._status


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    # A thread that waits for a silent peer must not keep the aggregator from ending.
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that breaks off is nobody's error."""


class _Handler(http.server.BaseHTTPRequestHandler):
    source: _Source
    only_loopback_names: bool
    timeout = CONNECTION_TIMEOUT_S
    server_version = "fedblocks"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """The operator's terminal is for the run."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library answers to other methods and to bad requests, without its page."""
        del explain
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._send(status, "text/plain; charset=utf-8", (message or status.phrase).encode() + b"\n", with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if self.only_loopback_names and not _names_loopback(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN, "this page answers to localhost only")
            return
        path = self.path.partition("?")[0]
        try:
            match path:
                case "/":
                    kind, body = "text/html; charset=utf-8", page()
                case "/status.json":
                    kind, body = "application/json", json.dumps(self.source.status()).encode()
                case "/metrics":
                    kind, body = "text/plain; version=0.0.4; charset=utf-8", metrics_text(self.source.status()).encode()
                case _:
                    self.send_error(HTTPStatus.NOT_FOUND, "there are /, /status.json and /metrics")
                    return
        except (RunFolderError, ConfigError, LedgerError, sqlite3.Error, OSError) as error:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, f"the run cannot be read: {type(error).__name__}")
            return
        self._send(HTTPStatus.OK, kind, body, with_body=with_body)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, *, with_body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _names_loopback(host_header: str) -> bool:
    host = host_header.rpartition(":")[0] if host_header.rpartition(":")[2].isdigit() else host_header
    return is_loopback(host)


def page() -> bytes:
    """The static page."""
    return resources.files("fedblocks.aggregator").joinpath(PAGE_FILE).read_bytes()


def metrics_text(status: Mapping[str, Any]) -> str:
    """The status as Prometheus text; what was not measured is absent."""
    return "".join(f"{line}\n" for line in _lines(status))


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    labels = {"run_id": status["run_id"], "base": status["base_name"], "method": status["method"]}
    yield from _metric("info", "gauge", "what is run", [(labels, 1)])
    phases = [({"phase": phase}, int(phase == status["phase"])) for phase in _PHASES]
    yield from _metric("phase", "gauge", "1 for the phase that the run is in", phases)
    for name, about in _OF_RUN:
        yield from _metric(_named(name), "gauge", about, [({}, status[name])])
    newest: Mapping[str, Any] = status["rounds"][-1] if status["rounds"] else {}
    for name, about in _OF_NEWEST:
        yield from _metric(f"last_{_named(name)}", "gauge", about, [({}, newest.get(name))])
    coverage: Mapping[str, Any] = status["coverage"] or {}
    weights: Mapping[str, Any] = status["coverage_weight"] or {}
    trained = [({"block": block}, count) for block, count in coverage.items()]
    yield from _metric("block_updates", "gauge", "updates of the newest round that trained the block", trained)
    shares = [({"block": block}, share) for block, share in weights.items()]
    yield from _metric("block_coverage", "gauge", "share of the accepted weight that trained the block", shares)
    clients: list[Mapping[str, Any]] = status["clients"]
    for name, kind, about in (
        ("bytes_up", "counter", "bytes that came from the client"),
        ("bytes_down", "counter", "bytes that went to the client"),
        ("quarantined", "gauge", "1 for a client that gets no task"),
        ("held_version", "gauge", "published version that the client holds"),
    ):
        values = [(_client(client), float(client[name])) for client in clients]
        yield from _metric(f"client_{name}{'_total' if kind == 'counter' else ''}", kind, about, values)
    refused = [
        ({**_client(client), "code": code}, count) for client in clients for code, count in client["refusals"].items()
    ]
    refused += [({"client": "", "key": "", "code": code}, count) for code, count in status["strangers"].items()]
    yield from _metric("refusals_total", "counter", "refusals, by client and code; strangers have no name", refused)


def _client(client: Mapping[str, Any]) -> dict[str, str]:
    return {"client": client["name"], "key": client["key"]}


def _named(name: str) -> str:
    return f"{name[:-2]}_seconds" if name.endswith("_s") else name


def _metric(name: str, kind: str, about: str, values: list[tuple[dict[str, str], Any]]) -> Iterator[str]:
    measured = [(labels, value) for labels, value in values if value is not None]
    if not measured:
        return
    yield f"# HELP fedblocks_{name} {about}"
    yield f"# TYPE fedblocks_{name} {kind}"
    for labels, value in measured:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"fedblocks_{name}{'{' + inside + '}' if inside else ''} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
