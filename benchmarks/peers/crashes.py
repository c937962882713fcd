"""What happens when processes die in the middle of a run? The same deaths for each system, each watched for minutes.

Two clients, 2 MB, a dozen rounds (Flower: six, which are longer). Processes are killed without warning in mid-round.
``dead_client``: one of the two and all below it, for good. ``server_killed``: the server's process alone, started again
two seconds later with what it kept on disk. ``box_killed``: that process and all below it, as when the machine loses
power; ours has one process, so both are the same death. NVFlare's simulator has no server to start again: only its
client is killed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import psutil
from light_clients import Fleet, enrol, write_run
from peers import flower, nvflare_simulator
from peers.processes import Watch, kill, wait_until

from fedblocks.aggregator.auth import load_or_create_server_keys

MB2: Final = {"hidden_size": 192, "intermediate_size": 576, "num_attention_heads": 3, "num_key_value_heads": 3}
VALUES: Final = 500_000
NODES: Final = 2
ROUNDS, FLOWER_ROUNDS = 12, 6
KILL_AFTER_ROUNDS: Final = 2
OBSERVE_S: Final = 200.0
"""How long a run is watched after the death, unless it ends."""
DOWN_S: Final = 2.0
DEADLINE_S: Final = 20.0
CLIENT_WAIT_S: Final = 1.0
"""What a client of the peers does with a task, so that the death falls into its work."""


class OurRun:
    """A run with two light clients, each a process, and its aggregator."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.run, self._log = folder / "run", folder / "log"
        address = f"tcp://127.0.0.1:{flower.free_ports(1)[0]}"
        plan = write_run(
            self.run,
            MB2,
            f"server.bind={address}",
            "allocation.cohort_fraction=1.0",
            f"allocation.deadline_s={DEADLINE_S}",
            "delta.format=fp32",
            "allocation.slim=false",
            f"run.max_rounds={ROUNDS}",
        )
        pairs, keys = enrol(self.run, NODES), load_or_create_server_keys(self.run)
        self.server = self.serve()
        self.fleet = Fleet(address, keys.public, pairs, plan, NODES)

    def serve(self) -> subprocess.Popen[bytes]:
        """Starts the aggregator on the folder and waits until it serves."""
        self._log.unlink(missing_ok=True)
        with self._log.open("wb") as out:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "fedblocks", "serve", str(self.run)], stdout=out, stderr=subprocess.STDOUT
            )
        wait_until(lambda: "serving" in self._log.read_text("utf-8"), timeout_s=60, what="a line that says serving")
        return self.server

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl so far."""
        path = self.run / "metrics.jsonl"
        return [json.loads(one) for one in path.read_text("utf-8").splitlines()] if path.is_file() else []

    def has_ended(self) -> bool:
        """True if the aggregator ended."""
        return self.server.poll() is not None

    def figures(self) -> dict[str, Any]:
        """What came of it."""
        final = self.run / "state" / "final.json"
        return {
            "rounds": ROUNDS,
            "rounds_done": len(self.rows()),
            "ended": self.server.poll() == 0,
            "accepted_by_round": [row["num_accepted"] for row in self.rows()],
            "round_s": [row["round_s"] for row in self.rows()],
            "state_sha256": json.loads(final.read_text("utf-8"))["state_sha256"] if final.is_file() else None,
        }


def ours(folder: Path, disturb: Callable[[OurRun], None]) -> dict[str, Any]:
    """One run of ours."""
    with Watch(()):
        run = OurRun(folder)
        wait_until(lambda: len(run.rows()) >= KILL_AFTER_ROUNDS, timeout_s=300, what="two rounds", every_s=0.02)
        began_s = time.monotonic()
        disturb(run)
        _watch_to_the_end(run.has_ended)
        found = {**run.figures(), "observed_s": time.monotonic() - began_s}
        run.fleet.kill()
    shutil.rmtree(folder)
    return found


def _our_client(run: OurRun) -> None:
    kill(run.fleet.pids[1])


def _our_server(run: OurRun) -> None:
    kill(run.server.pid)
    run.server.wait()
    time.sleep(DOWN_S)
    run.serve()


def our_server_killed(folder: Path) -> dict[str, Any]:
    """The same run undisturbed and with the aggregator's death: do both end in the same bits?"""
    undisturbed, killed = ours(folder, lambda _: None), ours(folder, _our_server)
    return {**killed, "same_bits_as_undisturbed": killed["state_sha256"] == undisturbed["state_sha256"]}


def with_flower(folder: Path, disturb: Callable[[flower.Flower], None], *, min_nodes: int = NODES) -> dict[str, Any]:
    """One run of Flower's."""
    config = {
        "num-values": VALUES,
        "num-rounds": FLOWER_ROUNDS,
        "min-nodes": min_nodes,
        "client-wait-s": CLIENT_WAIT_S,
    }
    with Watch(flower.CLIENT_WORDS):
        run = flower.Flower(folder, nodes=NODES, database=True)
        run.submit(**config)
        wait_until(lambda: len(run.notes("round_began")) > KILL_AFTER_ROUNDS, timeout_s=900, what="the third round")
        time.sleep(DOWN_S)
        began_s = time.monotonic()
        disturb(run)
        _watch_to_the_end(run.has_stopped)
        found = {
            "rounds": FLOWER_ROUNDS,
            "rounds_done": len(run.notes("round")),
            "ended": run.has_ended(),
            "status": run.status(),
            "accepted_by_round": [note["num_accepted"] for note in run.notes("round")],
            "round_s": [note["round_s"] for note in run.notes("round")],
            "observed_s": time.monotonic() - began_s,
        }
    shutil.rmtree(folder)
    return found


def _flower_node(run: flower.Flower) -> None:
    _kill_tree(run.nodes[1])


def _flower_superlink(run: flower.Flower) -> None:
    kill(run.superlink.pid)
    run.superlink.wait()
    time.sleep(DOWN_S)
    run.start_superlink()


def _flower_box(run: flower.Flower) -> None:
    _kill_tree(run.superlink)
    time.sleep(DOWN_S)
    run.start_superlink()


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    below = psutil.Process(process.pid).children(recursive=True)
    kill(process.pid)
    for one in below:
        kill(one.pid)
    process.wait()


def with_nvflare(folder: Path) -> dict[str, Any]:
    """A run of NVFlare's simulator that loses a client."""
    with Watch(nvflare_simulator.CLIENT_WORDS):
        job = nvflare_simulator.Simulator(folder, clients=NODES, num_values=VALUES, rounds=ROUNDS, wait_s=CLIENT_WAIT_S)
        wait_until(lambda: len(job.round_seconds(NODES)) >= KILL_AFTER_ROUNDS, timeout_s=900, what="the second round")
        time.sleep(CLIENT_WAIT_S / 2)
        began_s = time.monotonic()
        workers = [one for one in psutil.Process().children(recursive=True) if job.is_client(one.cmdline())]
        kill(workers[-1].pid)
        _watch_to_the_end(lambda: job.process.poll() is not None)
        found = {
            "rounds": ROUNDS,
            "rounds_done": job.rounds_ended(),
            "ended": job.process.poll() == 0,
            "exit_code": job.process.poll(),
            "accepted_by_round": job.aggregated_by_round(),
            "round_s": job.round_seconds(NODES),
            "observed_s": time.monotonic() - began_s,
        }
    shutil.rmtree(folder)
    return found


def _watch_to_the_end(has_ended: Callable[[], bool]) -> None:
    until_s = time.monotonic() + OBSERVE_S
    while not has_ended() and time.monotonic() < until_s:
        time.sleep(0.5)


#: Death and system -> the run in this folder, which is removed at its end.
CASES: Final[Mapping[tuple[str, str], Callable[[Path], dict[str, Any]]]] = {
    ("dead_client", "ours"): lambda folder: ours(folder, _our_client),
    ("dead_client", "flower"): lambda folder: with_flower(folder, _flower_node),
    ("dead_client", "nvflare"): with_nvflare,
    ("dead_client_min_nodes_1", "flower"): lambda folder: with_flower(folder, _flower_node, min_nodes=1),
    ("server_killed", "flower"): lambda folder: with_flower(folder, _flower_superlink),
    ("box_killed", "ours"): our_server_killed,
    ("box_killed", "flower"): lambda folder: with_flower(folder, _flower_box),
}
