"""Run folders for the system tests: a tiny random base, made as ``fedblocks init`` makes them."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedblocks.aggregator.auth import Registry
from fedblocks.aggregator.invitation import write_invitation
from fedblocks.edge_client.client import write_profile
from fedblocks.edge_client.identity import load_or_create_identity
from fedblocks.profiles.device import DeviceProfile


@pytest.fixture
def make_run(tmp_path, tiny_checkpoint) -> Callable[..., tuple[Path, Path]]:
    """A factory of (run folder, base model folder)."""

    def make(*overrides: str, layers: int = 4, name: str = "run") -> tuple[Path, Path]:
        from fedblocks.edge_client.init_run import init_run

        model = tiny_checkpoint(tmp_path, layers=layers)
        general = tmp_path / "general.jsonl"
        general.write_text("".join(json.dumps({"prompt": f"g{i}", "completion": "ab"}) + "\n" for i in range(8)))
        made = init_run(
            model=model,
            out=tmp_path / name,
            general=general,
            overrides=overrides,
            anchor_sequences=16,
            anchor_tokens=32,
        )
        return made.folder, model

    return make


@pytest.fixture
def tiny_run_folder(make_run) -> Path:
    """A run folder that can be served."""
    return make_run()[0]


class Consortium:
    """One aggregator and some clients, each its own process, on a run folder."""

    def __init__(self, run: Path, model: Path, folder: Path) -> None:
        self.run, self.model, self.folder = run, model, folder
        self.programs = Path(sys.executable).parent
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.listen_here()
        profile = DeviceProfile(
            device="test", source="measured", accelerator="cpu", compute_dtype="float32", cpu_cores=1,
            memory_usable_bytes=2**31, runtime_memory_bytes=2**26, gemm_flops_per_s=1e10, memory_bytes_per_s=1e10,
            step_overhead_s=0.01, uplink_bytes_per_s=1e8, downlink_bytes_per_s=1e8, disk_read_bytes_per_s=1e9,
            disk_free_bytes=2**33, four_bit="reference", measured_unix_s=time.time(),
        )  # fmt: skip
        self.profile = profile

    def listen_here(self) -> None:
        """Write the test's own port into run.toml."""
        text = (self.run / "run.toml").read_text()
        text = re.sub(r'bind = "[^"]*"', f'bind = "tcp://127.0.0.1:{self.port}"', text)
        text = re.sub(r'public_address = "[^"]*"', f'public_address = "tcp://127.0.0.1:{self.port}"', text)
        (self.run / "run.toml").write_text(text)

    def command(self, *arguments: str) -> list[str]:
        return [str(self.programs / "fedblocks"), *arguments]

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start (or restart) a process; its output is appended to ``<name>.log``."""
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.command(*arguments), stdout=log, stderr=subprocess.STDOUT, env=env
            )
        return self.processes[name]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def serve(self) -> subprocess.Popen[bytes]:
        return self.start("aggregator", "serve", str(self.run))

    def home(self, name: str) -> Path:
        return self.folder / name

    def enrol(self, name: str) -> None:
        """Make the site's invitation and key, and let the key in."""
        write_invitation(self.run, name=name, out=self.folder / f"{name}.toml")
        key = load_or_create_identity(self.home(name)).public
        Registry(self.run).enrol(key, name, now_unix_s=time.time())
        write_profile(self.home(name), self.profile)
        rows = [{"prompt": f"{name[-1]}{i % 10}", "completion": "xy"[i % 2] * 2} for i in range(40)]
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def join(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        return self.start(
            name, "join", str(self.folder / f"{name}.toml"), "--data", str(self.folder / f"{name}.jsonl"),
            "--model", str(self.model), "--home", str(self.home(name)), *arguments,
        )  # fmt: skip

    def wait(self, name: str, timeout_s: float = 120.0) -> int:
        """The exit code of a process; its log stands in the failure if it does not end."""
        try:
            return self.processes[name].wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} still runs after {timeout_s} s:\n{self.text(name)}") from None

    def text(self, name: str) -> str:
        return self.log(name).read_text()[-4000:]

    def metrics(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def until(self, holds: Callable[[], bool], what: str, timeout_s: float = 90.0) -> None:
        """Wait for a condition; every log stands in the failure."""
        end = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > end:
                logs = "\n".join(f"--- {n}\n{self.text(n)}" for n in self.processes)
                raise AssertionError(f"not within {timeout_s} s: {what}\n{logs}")
            time.sleep(0.05)

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def consortium(make_run, tmp_path) -> Iterator[Callable[..., Consortium]]:
    """A factory of :class:`Consortium`; every process is ended after the test."""
    made: list[Consortium] = []

    def make(*overrides: str, clients: int = 2) -> Consortium:
        run, model = make_run("server.heartbeat_interval_s=0.5", f"allocation.min_cohort={clients}", *overrides)
        made.append(Consortium(run, model, tmp_path))
        for i in range(clients):
            made[-1].enrol(f"site-{i + 1}")
        return made[-1]

    yield make
    for c in made:
        c.close()


class Desk:
    """Commands as a person types them in one folder, each in a shell of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.bind = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env['PATH']}"

    def _words(self, line: str, home: bool) -> list[str]:
        return [*shlex.split(line), *(["--home", str(self.folder / "home")] if home else [])]

    def run_line(self, line: str, *, home: bool = False) -> str:
        """Run a command to its end; what it printed."""
        done = subprocess.run(
            self._words(line, home), cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start_line(self, name: str, line: str, *, home: bool = False) -> None:
        """Start a command in a terminal of its own."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                self._words(line, home), cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT
            )

    def text(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-4000:]

    def wait_for_text(self, name: str, pattern: str, timeout_s: float = 60.0) -> str:
        """The first group of ``pattern`` in what the command printed."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if found := re.search(pattern, self.text(name)):
                return found.group(1)
            time.sleep(0.1)
        raise AssertionError(f"{name} did not print {pattern!r}:\n{self.text(name)}")

    def wait(self, name: str, timeout_s: float = 120.0) -> int:
        try:
            return self.processes[name].wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} still runs after {timeout_s} s:\n{self.text(name)}") from None


@pytest.fixture
def consortium_at() -> Iterator[Callable[[Path], Desk]]:
    """A factory of :class:`Desk`; every process is ended after the test."""
    made: list[Desk] = []

    def make(folder: Path) -> Desk:
        made.append(Desk(folder))
        return made[-1]

    yield make
    for desk in made:
        for process in desk.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
