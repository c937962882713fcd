"""How is NVFlare's simulator started, and what do its logs say? The job beside this file, a process per client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from peers.processes import Watch, wait_until

REPO: Final = Path(__file__).parents[2]
VENV: Final = REPO / ".peers" / "nvflare"
JOB: Final = Path(__file__).with_name("nvflare_job.py")
CLIENT_WORDS: Final = ("simulator_worker",)
PATIENCE_S: Final = 600.0


class Simulator:
    """One job in a folder; what is started here is ended by the :class:`Watch` around it."""

    def __init__(self, folder: Path, *, clients: int, num_values: int, rounds: int, wait_s: float = 0.0) -> None:
        self._folder = folder = folder.resolve()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        words = (clients, num_values, rounds, wait_s)
        with self._console.open("wb") as out:
            self.process = subprocess.Popen(
                [str(VENV / "bin" / "python"), str(JOB), str(folder), *(str(word) for word in words)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**environment, "OMP_NUM_THREADS": "1"},
                cwd=folder,
            )

    @property
    def _console(self) -> Path:
        return self._folder / "console.log"

    @property
    def _server(self) -> Path:
        return self._folder / "peers" / "server"

    def controller_lines(self) -> list[tuple[float, str]]:
        """Seconds and text of what the FedAvg controller logged so far."""
        path = self._server / "log.json"
        if not path.is_file():
            return []
        entries: list[Mapping[str, str]] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue  # the line that is being written
        return [(_seconds(e["asctime"]), e["message"]) for e in entries if e["name"] == "FedAvg"]

    def aggregated_by_round(self) -> list[int]:
        """Results that each round has had so far."""
        counts: list[int] = []
        for _, text in self.controller_lines():
            if _begins_a_round(text):
                counts.append(0)
            elif text.startswith("Aggregated "):
                counts[-1] += 1
        return counts

    def rounds_ended(self) -> int:
        """All but the last that began, and that one too if the job has finished."""
        texts = [text for _, text in self.controller_lines()]
        return sum(_begins_a_round(text) for text in texts) - (not any("Finished FedAvg" in text for text in texts))

    @staticmethod
    def is_client(command: Sequence[str]) -> bool:
        """True for the command line of a client's process."""
        return any(word in part for part in command for word in CLIENT_WORDS)

    def round_seconds(self, clients: int) -> list[float]:
        """From "Round n started" to the last result aggregated; saving the model is not in it."""
        found: list[float] = []
        began_s = 0.0
        for moment_s, text in self.controller_lines():
            if _begins_a_round(text):
                began_s = moment_s
            elif text == f"Aggregated {clients}/{clients} results":
                found.append(moment_s - began_s)
        return found

    def final(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The model of the end."""
        return np.load(self._server / "simulate_job" / "models" / "server.npy", allow_pickle=False)

    def log_tail(self) -> str:
        """The last lines, for an error."""
        return self._console.read_text(encoding="utf-8", errors="replace")[-2000:]


def _begins_a_round(text: str) -> bool:
    return "Round " in text and "started." in text


def _seconds(asctime: str) -> float:
    return datetime.strptime(f"{asctime}000+0000", "%Y-%m-%d %H:%M:%S,%f%z").timestamp()


def leg(folder: Path, *, clients: int, num_values: int, rounds: int) -> dict[str, Any]:
    """Rounds of an array that nobody trains.

    Raises:
        TimeoutError: the job did not end.
        RuntimeError: it ended with an error.
    """
    with Watch(CLIENT_WORDS) as watch:
        job = Simulator(folder, clients=clients, num_values=num_values, rounds=rounds)
        try:
            wait_until(lambda: job.process.poll() is not None, timeout_s=PATIENCE_S, what="the end of the job")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{job.log_tail()}") from None
    if job.process.returncode:
        raise RuntimeError(f"the simulator ended with {job.process.returncode}:\n{job.log_tail()}")
    seconds, final = job.round_seconds(clients), job.final()
    shutil.rmtree(folder)
    return {
        "round_s": seconds,
        "result_ok": len(seconds) == rounds and final.size == num_values and bool((final == rounds).all()),
        "encrypted": False,
        **watch.figures(),
    }
