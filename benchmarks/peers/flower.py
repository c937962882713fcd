"""How is Flower started? A SuperLink, SuperNodes and one run of the app beside this file, all on this machine.

Stock settings but these: no encryption (``--insecure``), no telemetry, no update check, no installation of packages at
run time. Process isolation is the default: a process for the ServerApp, and one per message for a ClientApp.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from peers.processes import Watch, wait_until

REPO: Final = Path(__file__).parents[2]
VENV: Final = REPO / ".peers" / "flwr"
APP: Final = Path(__file__).parent / "flower_app"
CLIENT_WORDS: Final = ("flower-supernode",)
PATIENCE_S: Final = 900.0


def free_ports(count: int) -> list[int]:
    """That nobody listens at now."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


class Flower:
    """A SuperLink and its nodes in a folder; what is started here is ended by the :class:`Watch` around it."""

    def __init__(self, folder: Path, *, nodes: int, database: bool = False) -> None:
        self._folder = folder = folder.resolve()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.journal = folder / "journal.jsonl"
        self._port, *self._node_ports = free_ports(nodes + 1)
        self._database = ("--database", str(folder / "state.db")) if database else ()
        home = folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "local"\n\n'
            f'[superlink.local]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        shutil.copytree(APP, folder / "app")
        shutil.copy(REPO / "LICENSE", folder / "app")
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.superlink = self.start_superlink()
        self.nodes = [self._start_node(number) for number in range(nodes)]

    def start_superlink(self) -> subprocess.Popen[bytes]:
        """Starts it, at the same port and with the same database as before."""
        options = ("--insecure", "--port", str(self._port), "--disable-runtime-dependency-installation")
        self.superlink = self._start("flower-superlink", *options, *self._database, log="superlink.log")
        wait_until(self._listens, timeout_s=120, what=f"the SuperLink at port {self._port}")
        return self.superlink

    def _listens(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self._port)) == 0

    def _start_node(self, number: int) -> subprocess.Popen[bytes]:
        options = ("--insecure", "--superlink", f"127.0.0.1:{self._port}", "--port", str(self._node_ports[number]))
        partition = f"partition-id={number} num-partitions={len(self._node_ports)}"
        return self._start("flower-supernode", *options, "--node-config", partition, log=f"node-{number}.log")

    def _start(self, program: str, *options: str, log: str) -> subprocess.Popen[bytes]:
        with (self._folder / log).open("ab") as out:
            return subprocess.Popen(
                [str(VENV / "bin" / program), *options],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                cwd=self._folder,
            )

    def _flwr(self, *options: str) -> Any:
        done = subprocess.run(
            [str(VENV / "bin" / "flwr"), *options, "--format", "json"],
            capture_output=True,
            text=True,
            env=self._environment,
            cwd=self._folder,
            timeout=120,
            check=False,
        )
        try:
            return json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            raise RuntimeError(f"flwr {' '.join(options)}: {done.stdout[-1500:]} {done.stderr[-1500:]}") from None

    def submit(self, **config: float | str) -> None:
        """Submits the app."""
        given = {"min-nodes": len(self.nodes), **config, "journal": str(self.journal)}
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in given.items())
        answer = self._flwr("run", str(self._folder / "app"), "local", "--run-config", text)
        if not answer.get("success", False):
            raise RuntimeError(f"flwr run: {answer}")

    def status(self) -> str:
        """Of the one run, as ``flwr list`` has it."""
        return str(self._flwr("list", "local")["runs"][0]["status"])

    def notes(self, event: str) -> list[Mapping[str, Any]]:
        """The app's lines of one kind so far."""
        if not self.journal.is_file():
            return []
        lines = [json.loads(line) for line in self.journal.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line["event"] == event]

    def has_ended(self) -> bool:
        """True if the app wrote its last line."""
        return bool(self.notes("finished"))

    def has_stopped(self) -> bool:
        """True if it did, or if Flower calls the run finished, for whatever reason."""
        return self.has_ended() or self.status().startswith("finished")

    def log_tail(self) -> str:
        """The last lines of the SuperLink, for an error."""
        return (self._folder / "superlink.log").read_text(encoding="utf-8", errors="replace")[-2000:]


def leg(folder: Path, *, clients: int, num_values: int, rounds: int) -> dict[str, Any]:
    """Rounds of arrays that nobody trains.

    Raises:
        TimeoutError: the run did not end.
    """
    with Watch(CLIENT_WORDS) as watch:
        flower = Flower(folder, nodes=clients)
        flower.submit(**{"num-values": num_values, "num-rounds": rounds})
        try:
            wait_until(flower.has_ended, timeout_s=PATIENCE_S, what="the end of the run")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{flower.log_tail()}") from None
    done, (end,) = flower.notes("round"), flower.notes("finished")
    shutil.rmtree(folder)
    return {
        "round_s": [one["round_s"] for one in done],
        "result_ok": end["lowest"] == end["highest"] == rounds
        and all(one["num_accepted"] == clients for one in done)
        and end["num_values"] == num_values,
        "encrypted": False,
        **watch.figures(),
    }
