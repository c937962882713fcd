"""Does a federation give the same state through Flower as through ZeroMQ, and what if something dies?

With a real SuperLink and real SuperNodes. Flower pins older libraries than ours, so it stands in an environment of its
own, beside torch and this checkout: `make test-flower` makes it in `.peers/flwr`; FEDBLOCKS_PEERS names another folder
that holds `flwr/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
PEERS = Path(os.environ.get("FEDBLOCKS_PEERS", REPO / ".peers")) / "flwr" / "bin"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not ((PEERS / "flwr").exists() and (PEERS / "fedblocks").exists()),
        reason=f"no Flower with fedblocks in {PEERS}; make test-flower",
    ),
]
SETTINGS = (
    "run.max_rounds=2",
    "training.steps=4",
    "training.learning_rate=3e-3",
    "allocation.deadline_s=300",
    "server.keep_updates=true",
)
SITES = ("site-1", "site-2", "site-3")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Grid:
    """A SuperLink and its SuperNodes, each its own process, in a Flower home of their own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        home = folder / "flwr-home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.env = {
            **os.environ,
            "PATH": f"{PEERS}:{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(PEERS / command[0]), *command[1:]],
                cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def superlink(self) -> None:
        self.start("superlink", "flower-superlink", "--insecure", "--port", str(self.port),
                   "--disable-runtime-dependency-installation")  # fmt: skip
        until_s = time.monotonic() + 60
        while time.monotonic() < until_s:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise AssertionError(self.logs())

    def supernode(self, name: str, join: str) -> None:
        node_config = f'socket="{self.folder / name}.sock" join="{join}"'
        self.start(name, "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
                   "--port", str(free_port()), "--node-config", node_config)  # fmt: skip

    def flwr(self, *arguments: str) -> Any:
        done = subprocess.run(
            [str(PEERS / "flwr"), *arguments, "--format", "json"],
            cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def submit(self, run: Path) -> str:
        app = REPO / "fedblocks" / "flower" / "app"
        return str(self.flwr("run", str(app), "--run-config", f'run="{run}"')["run-id"])

    def status(self, run_id: str) -> str:
        return next(r["status"] for r in self.flwr("list")["runs"] if str(r["run-id"]) == run_id)

    def ended(self, run_id: str, timeout_s: float = 600) -> str:
        """Wait for the end of a run; its status."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            status = self.status(run_id)
            if status.startswith("finished"):
                return status
            time.sleep(3)
        raise AssertionError(f"not finished within {timeout_s} s\n{self.logs()}")

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-6000:]}" for path in sorted(self.folder.glob("*.log")))

    def serverapps(self) -> list[str]:
        """Processes of a ServerApp that this SuperLink has started."""
        command = f"flwr-serverapp .*:{self.port} "
        return subprocess.run(["pgrep", "-f", command], capture_output=True, text=True, timeout=20).stdout.split()

    def kill(self, name: str) -> None:
        """A node, what it has started, and its client: at once, as by a power cut."""
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()
        if (self.folder / f"{name}.sock").exists():
            os.kill(int((self.folder / f"{name}.lock").read_text()), signal.SIGKILL)
            (self.folder / f"{name}.sock").unlink()

    def end(self, name: str) -> None:
        """A process and what it has started, but not a node's client."""
        with contextlib.suppress(ProcessLookupError):  # a group outlives its first process
            os.killpg(self.processes[name].pid, signal.SIGTERM)
        try:
            self.processes[name].wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self.processes[name].pid, signal.SIGKILL)
            self.processes[name].wait()

    def close(self) -> None:
        for client in self.folder.glob("*.sock"):  # where a test failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(client.with_suffix(".lock").read_text()), signal.SIGKILL)
        for name in self.processes:
            self.end(name)


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[Grid]:
    made = Grid(tmp_path / "g")
    yield made
    made.close()


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "state" / "final.json").read_text())


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def arguments(c: Any, site: str, home: Path) -> str:
    return f"{c.folder}/{site}.toml --data {c.folder}/{site}.jsonl --model {c.model} --home {home}"


def test_two_rounds_of_three_sites_end_in_the_same_state_through_flower_and_through_zeromq(
    consortium: Callable[..., Any], grid: Grid
) -> None:
    c = consortium(*SETTINGS, clients=3)
    c.programs = PEERS  # the same libraries: bitsandbytes, say, rounds the base to 4 bits in another way than we do
    other = shutil.copytree(c.run, c.folder / "run-flower")
    homes = {site: shutil.copytree(c.home(site), grid.folder / site) for site in SITES}  # the same keys

    c.serve()
    for site in SITES:
        c.join(site)
    assert [c.wait(name, 240) for name in ("aggregator", *SITES)] == [0] * 4

    grid.superlink()
    for site in SITES:
        grid.supernode(site, arguments(c, site, homes[site]))
    assert grid.ended(grid.submit(other)) == "finished:completed", grid.logs()

    direct, carried = result(c.run), result(other)
    assert carried["stop_reason"] == "max_rounds"
    assert carried["version"] == 2
    assert carried["state_sha256"] == direct["state_sha256"], grid.logs()
    assert [r["num_accepted"] for r in rows(other)] == [3, 3]
    for site in SITES:  # the long-lived client took all turns of the run, and ended with it
        log = (grid.folder / f"{site}.log").read_text()
        assert log.count("ready: run ") == 1


def test_a_node_that_dies_holds_a_round_until_its_deadline_and_the_run_ends_without_it(
    consortium: Callable[..., Any], grid: Grid
) -> None:
    c = consortium(*SETTINGS, "allocation.deadline_s=60", "allocation.quorum=0.5", clients=3)
    grid.superlink()
    for site in SITES:
        grid.supernode(site, arguments(c, site, c.home(site)))
    run_id = grid.submit(c.run)
    c.until(lambda: len(rows(c.run)) == 1, "the first round", timeout_s=300)
    grid.kill("site-3")

    assert grid.ended(run_id) == "finished:completed", grid.logs()
    assert [r["num_accepted"] for r in rows(c.run)] == [3, 2], grid.logs()
    assert result(c.run)["stop_reason"] == "max_rounds"
    assert result(c.run)["version"] == 2


def test_a_node_that_dies_and_comes_back_within_the_deadline_is_counted(
    consortium: Callable[..., Any], grid: Grid
) -> None:
    c = consortium(*SETTINGS, clients=2)
    grid.superlink()
    for site in SITES[:2]:
        grid.supernode(site, arguments(c, site, c.home(site)))
    run_id = grid.submit(c.run)
    c.until(lambda: len(rows(c.run)) == 1, "the first round", timeout_s=300)
    grid.kill("site-2")
    grid.supernode("site-2", arguments(c, "site-2", c.home("site-2")))  # another node to Flower, the same key

    assert grid.ended(run_id) == "finished:completed", grid.logs()
    assert [r["num_accepted"] for r in rows(c.run)] == [2, 2], grid.logs()
    assert (grid.folder / "site-2.log").read_text().count("ready: run ") == 2


def test_without_its_superlink_or_when_stopped_the_serverapp_ends_soon_and_another_one_goes_on(
    consortium: Callable[..., Any], grid: Grid
) -> None:
    c = consortium(*SETTINGS, clients=2)
    grid.superlink()
    for site in SITES[:2]:
        grid.supernode(site, arguments(c, site, c.home(site)))
    grid.submit(c.run)
    c.until(lambda: len(rows(c.run)) == 1, "the first round", timeout_s=300)
    assert grid.serverapps()
    grid.processes["superlink"].kill()
    grid.processes["superlink"].wait()
    c.until(lambda: not grid.serverapps(), "the end of the ServerApp", timeout_s=60)
    (line,) = (c.run / "flower.log").read_text().splitlines()
    assert "the SuperLink has not answered for" in line
    assert "stopped with exit code 7; flwr run on" in line

    grid.superlink()
    for site in SITES[:2]:  # a SuperLink without --database does not know its nodes again, and they end
        grid.end(site)
        grid.supernode(site, arguments(c, site, c.home(site)))
    began_ns = (c.run / "effective.toml").stat().st_mtime_ns
    second = grid.submit(c.run)
    c.until(lambda: (c.run / "effective.toml").stat().st_mtime_ns > began_ns, "the second ServerApp", timeout_s=120)
    grid.flwr("stop", second)
    c.until(lambda: not grid.serverapps(), "the end of the second ServerApp", timeout_s=60)
    _, line = (c.run / "flower.log").read_text().splitlines()
    assert "the SuperLink serves this run no more" in line
    assert "stopped with exit code 7; flwr run on" in line

    assert grid.ended(grid.submit(c.run)) == "finished:completed", grid.logs()
    assert [r["num_accepted"] for r in rows(c.run)] == [2, 2], grid.logs()
