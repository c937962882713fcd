"""What does the aggregator cost? Rounds beside the bare wire, memory by number of clients, a thousand clients, a soak.

    make bench-aggregator                                    everything -> benchmarks/results/aggregator.json (an hour)
    python benchmarks/bench_aggregator.py round              a part: round, memory, clients, soak, trickle

The aggregator is ``fedblocks serve`` in a process of its own, CURVE on, the ledger and every update on the disk that is
named; the clients are those of light_clients.py. A round lasts from its plan to its published state, by the metrics of
the aggregator. The floor (bare_wire.py) moves the same bytes between as many sockets and processes; both take turns.

``round``    16 clients, one block of 25 MB in fp32, down and up; and as int8 with all rows. Spool on tmpfs and on disk
``memory``   peak memory of the aggregator's process with 4, 16 and 64 clients of 25 MB
``clients``  1,000 clients: how long until all are in, rounds, memory and descriptors
``soak``     10,000 rounds of a tiny model: slope of memory, descriptors and the ledger's size over the second half
``trickle``  8 clients of 25 MB in fp32, with and without 200 strangers that send one byte a second each, in turns
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import bare_wire
import numpy as np
import psutil
from light_clients import MB25, TINY, Fleet, enrol, write_run
from starter_runs import RESULTS, machine, put_entries

from fedblocks.aggregator.auth import load_or_create_server_keys
from fedblocks.profiles.cost import upload_bytes

DISK: Final = Path("runs/bench/aggregator")
TMPFS: Final = Path("/dev/shm")
CLIENTS: Final = 16
ROUNDS: Final = 3
REPEATS: Final = 3
MANY: Final = 1000
SOAK_ROUNDS: Final = 10_000
#: Of the part ``trickle``: a run with and one without the strangers, so many times.
TURNS: Final = 5
FEW: Final = 8
TRICKLERS: Final = 200
#: What a peer of ZMTP 3.1 says first.
GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(54, b"\x00")
SAMPLE_S: Final = 0.05
PATIENCE_S: Final = 1800.0


@dataclass(slots=True, kw_only=True)
class Watched:
    """What was seen of a process while it lived, a sample every now and then."""

    seconds: list[float] = field(default_factory=list)
    anonymous_bytes: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A run that was served to its end."""

    rows: list[dict[str, Any]]
    """metrics.jsonl."""
    clients: Mapping[str, Any]
    watched: Watched
    idle_bytes: int
    """Anonymous memory of the aggregator before any client came."""
    all_in_s: float
    """From the start of the clients to the first round's plan."""
    ledger_bytes: int


def serve(
    folder: Path,
    sizes: Mapping[str, int],
    *,
    clients: int,
    processes: int,
    overrides: Sequence[str],
    sample_s: float = SAMPLE_S,
    beside: Callable[[str], AbstractContextManager[object]] = nullcontext,
    under: Sequence[str] = (),
) -> Served:
    """Serves a run of light clients to its end and removes its folder.

    Args:
        beside: what else goes on at the aggregator's address from before the first client until the run is over.
        under: a command that the aggregator is run by.

    Raises:
        RuntimeError: the aggregator ended with an error, or the run took too long; the text holds its last lines.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run, log = folder / "run", folder / "log"
    address = f"tcp://127.0.0.1:{_free_port()}"
    # A light client sends the same update in every round: no round may ask for a narrower block than the first.
    fixed = ("allocation.cohort_fraction=1.0", "allocation.slim=false")
    common = (f"server.bind={address}", f"allocation.min_cohort={clients}", *fixed)
    plan = write_run(run, sizes, *common, *overrides)
    pairs, keys = enrol(run, clients), load_or_create_server_keys(run)
    command = [*under, sys.executable, "-m", "fedblocks", "serve", str(run)]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    fleet: Fleet | None = None
    cleanup = ExitStack()
    try:
        _until(lambda: "serving" in log.read_text(encoding="utf-8"), server, log)
        time.sleep(0.5)
        idle = _anonymous_bytes(server.pid)
        cleanup.enter_context(beside(address))
        began = time.monotonic()
        fleet = Fleet(address, keys.public, pairs, plan, processes)
        watched, metrics = Watched(), run / "metrics.jsonl"
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(server.pid, metrics, watched, sample_s, done))
        watcher.start()
        _until(lambda: _round_open(run), server, log)
        all_in_s = time.monotonic() - began
        counted = fleet.wait()
        server.wait(timeout=60)
        done.set()
        watcher.join()
        if server.returncode:
            raise RuntimeError(f"serve ended with {server.returncode}:\n{log.read_text(encoding='utf-8')[-2000:]}")
        return Served(
            rows=[json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()],
            clients=counted,
            watched=watched,
            idle_bytes=idle,
            all_in_s=all_in_s,
            ledger_bytes=sum(path.stat().st_size for path in run.glob("ledger*")),
        )
    finally:
        cleanup.close()
        server.kill()
        server.wait()
        if fleet is not None:
            fleet.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _until(holds: Callable[[], bool], server: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not holds():
        if server.poll() is not None or time.monotonic() > until_s:
            raise RuntimeError(f"the aggregator did not get there:\n{log.read_text(encoding='utf-8')[-2000:]}")
        time.sleep(0.02)


def _round_open(run: Path) -> bool:
    import sqlite3

    with sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        return bool(ledger.execute("SELECT count(*) FROM rounds").fetchone()[0])


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


def _watch(pid: int, metrics: Path, watched: Watched, sample_s: float, done: threading.Event) -> None:
    began, process = time.monotonic(), psutil.Process(pid)
    while not done.wait(sample_s):
        try:
            anonymous, descriptors = _anonymous_bytes(pid), process.num_fds()
        except (psutil.Error, OSError):
            return
        watched.seconds.append(time.monotonic() - began)
        watched.anonymous_bytes.append(anonymous)
        watched.descriptors.append(descriptors)
        watched.rounds.append(metrics.read_bytes().count(b"\n") if metrics.is_file() else 0)


def rounds(*, processes: int) -> dict[str, Any]:
    """The aggregator's round beside the bare wire's, in turns; medians of all rounds but each run's first."""
    formats = {
        "fp32": ("delta.format=fp32",),
        "int8": ("delta.format=int8", "delta.density=1.0", "delta.down_density=1.0"),
    }
    found: dict[str, list[float]] = {}
    loads: list[float] = []
    payload = 0
    for repeat in range(REPEATS):
        with tempfile.TemporaryDirectory(dir=DISK) as empty:
            plan = write_run(Path(empty) / "run", MB25)
        payload = upload_bytes(plan.shape, 1, "fp32")
        loads.append(os.getloadavg()[0])
        found.setdefault("bare_curve", []).extend(bare_wire.rounds(CLIENTS, payload, ROUNDS, processes=processes))
        for place, folder in (("disk", DISK), ("tmpfs", TMPFS / "fedblocks-bench")):
            for name, overrides in formats.items():
                if place == "tmpfs" and name == "int8":
                    continue
                served = serve(
                    folder / "round",
                    MB25,
                    clients=CLIENTS,
                    processes=processes,
                    overrides=(f"run.max_rounds={ROUNDS + 1}", *overrides),
                )
                # The first round sends nothing down, and the clients make their update in it.
                found.setdefault(f"{name}_{place}", []).extend(row["round_s"] for row in served.rows[1:])
        print({name: statistics.median(values) for name, values in found.items()}, f"repeat {repeat + 1}", flush=True)
    median = {name: statistics.median(values) for name, values in found.items()}
    syncs = syncs_per_round(processes=processes)
    return {
        "round_over_bare_curve": median["fp32_disk"] / median["bare_curve"],
        "round_over_bare_curve_tmpfs": median["fp32_tmpfs"] / median["bare_curve"],
        "int8_round_over_fp32": median["int8_disk"] / median["fp32_disk"],
        "round": {
            "clients": CLIENTS,
            "payload_bytes": payload,
            "median_s": median,
            "all_s": found,
            "load_average": loads,
            "encrypted": True,
            "syncs_per_round": syncs,
        },
    }


def syncs_per_round(*, processes: int) -> float | None:
    """How often the aggregator waits for the disk in a round of the fp32 run, by strace, in a run that is not timed.

    The syncs of start and end are shared out among the rounds. None where there is no strace.
    """
    if shutil.which("strace") is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".strace") as log:
        served = serve(
            DISK / "round",
            MB25,
            clients=CLIENTS,
            processes=processes,
            overrides=(f"run.max_rounds={ROUNDS + 1}", "delta.format=fp32"),
            under=("strace", "-f", "-qq", "-e", "trace=fsync,fdatasync", "-o", log.name),
        )
        calls = sum("sync(" in line for line in Path(log.name).read_text(encoding="utf-8").splitlines())
    return calls / len(served.rows)


def memory(*, processes: int) -> dict[str, Any]:
    """Peak anonymous memory of the aggregator by number of clients."""
    found: dict[str, Any] = {}
    for clients in (4, CLIENTS, 64):
        served = serve(
            DISK / "memory",
            MB25,
            clients=clients,
            processes=processes,
            overrides=(f"run.max_rounds={ROUNDS}", "delta.format=fp32", "allocation.deadline_s=900.0"),
        )
        peak = max(served.watched.anonymous_bytes)
        found[str(clients)] = {"idle_bytes": served.idle_bytes, "peak_bytes": peak}
        print(clients, found[str(clients)], flush=True)
    peaks = {name: one["peak_bytes"] for name, one in found.items()}
    return {
        "memory_64_over_4_clients": peaks["64"] / peaks["4"],
        "memory_16_over_4_clients": peaks["16"] / peaks["4"],
        "memory": {"by_clients": found, "limit_bytes": found["16"]["idle_bytes"] + 4 * 25_000_000},
    }


def clients(*, processes: int, count: int = MANY, rounds: int = 5) -> dict[str, Any]:
    """Very many clients of a tiny model."""
    served = serve(
        DISK / "clients",
        TINY,
        clients=count,
        processes=processes,
        overrides=(f"run.max_rounds={rounds}", "allocation.deadline_s=600.0"),
    )
    rows = served.rows
    peak = max(served.watched.anonymous_bytes)
    return {
        "clients_1000": {
            "clients": count,
            "served": served.clients["welcomed"],
            "updates_by_round": [row["num_accepted"] for row in rows],
            "all_in_s": served.all_in_s,
            "round_s": [row["round_s"] for row in rows],
            "aggregator_idle_bytes": served.idle_bytes,
            "aggregator_peak_bytes": peak,
            "aggregator_bytes_per_client": (peak - served.idle_bytes) / count,
            "aggregator_descriptors": max(served.watched.descriptors),
            "client_bytes_each": sum(served.clients["peak_rss_bytes"]) / count,
            "client_processes": served.clients["processes"],
            "connections": served.clients["connections"],
            "refused": served.clients["refused"],
        }
    }


def soak(*, count: int = SOAK_ROUNDS) -> dict[str, Any]:
    """Very many rounds of two clients: slopes over the second half."""
    served = serve(
        DISK / "soak",
        TINY,
        clients=2,
        processes=1,
        overrides=(f"run.max_rounds={count}", "run.target_score=0.0"),
        sample_s=1.0,
    )
    watched = served.watched
    later = [i for i, done in enumerate(watched.rounds) if done > count / 2]
    done = np.asarray([watched.rounds[i] for i in later], dtype=float)

    def slope(values: Sequence[int]) -> float:
        return float(np.polyfit(done, np.asarray([values[i] for i in later], dtype=float), 1)[0])

    times = [row["round_s"] for row in served.rows]
    return {
        "soak": {
            "rounds": len(served.rows),
            "rss_slope_bytes_per_round": slope(watched.anonymous_bytes),
            "descriptor_slope_per_round": slope(watched.descriptors),
            "first_half_bytes": watched.anonymous_bytes[later[0]],
            "last_bytes": watched.anonymous_bytes[later[-1]],
            "ledger_bytes": served.ledger_bytes,
            "ledger_bytes_per_round": served.ledger_bytes / len(served.rows),
            "round_s_first_tenth": statistics.median(times[: count // 10]),
            "round_s_last_tenth": statistics.median(times[-count // 10 :]),
            "wall_s": watched.seconds[-1],
        }
    }


@contextmanager
def tricklers(address: str, *, count: int) -> Generator[None]:
    """Strangers that each send one byte of a greeting a second, until the end; who is dropped comes back."""
    host, port = address.removeprefix("tcp://").split(":")
    sent: dict[socket.socket, int] = {}
    done = threading.Event()

    def trickle() -> None:
        while not done.wait(1.0):
            for one, position in list(sent.items()):
                try:
                    one.send(GREETING[position : position + 1] or b"\x00")
                    sent[one] += 1
                except OSError:
                    del sent[one]
                    one.close()
                    with suppress(OSError):  # the aggregator is gone: the run is over
                        come()

    def come() -> None:
        one = socket.create_connection((host, int(port)))
        one.setblocking(False)
        sent[one] = 0

    for _ in range(count):
        come()
    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for one in sent:
            one.close()


def slow_loris(
    *,
    processes: int,
    clients: int = FEW,
    turns: int = TURNS,
    strangers: int = TRICKLERS,
    sizes: Mapping[str, int] = MB25,
) -> dict[str, Any]:
    """Rounds with and without strangers that trickle, a run of each by turns; all rounds but each run's first."""
    found: dict[str, list[list[float]]] = {"without": [], "with": []}
    loads: list[float] = []
    for turn in range(turns):
        order = ("without", "with") if turn % 2 == 0 else ("with", "without")
        for name in order:
            loads.append(os.getloadavg()[0])
            served = serve(
                DISK / "trickle",
                sizes,
                clients=clients,
                processes=processes,
                overrides=(f"run.max_rounds={ROUNDS + 1}", "delta.format=fp32", "allocation.deadline_s=600.0"),
                beside=partial(tricklers, count=strangers) if name == "with" else nullcontext,
            )
            found[name].append([row["round_s"] for row in served.rows[1:]])
        print({name: runs[-1] for name, runs in found.items()}, f"turn {turn + 1}", flush=True)
    median = {name: statistics.median(itertools.chain.from_iterable(runs)) for name, runs in found.items()}
    pairs = zip(found["with"], found["without"], strict=True)
    return {
        "slow_loris": {
            "round_ratio": median["with"] / median["without"],
            "round_ratio_by_turn": [statistics.median(a) / statistics.median(b) for a, b in pairs],
            "strangers": strangers,
            "clients": clients,
            "median_s": median,
            "all_s": found,
            "load_average": loads,
        }
    }


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "round": lambda: rounds(processes=2),
        "memory": lambda: memory(processes=2),
        "clients": lambda: clients(processes=4),
        "soak": soak,
        "trickle": lambda: slow_loris(processes=1),
    }
    parser = argparse.ArgumentParser(description="what the aggregator costs")
    parser.add_argument("part", nargs="*", choices=[*parts, []], default=list(parts))
    parser.add_argument("--out", type=Path, default=RESULTS / "aggregator.json")
    options = parser.parse_args(arguments)
    DISK.mkdir(parents=True, exist_ok=True)
    for name in options.part:
        found = parts[name]()
        print(json.dumps(found), flush=True)
        put_entries(options.out, {"command": "python benchmarks/bench_aggregator.py", **found, **machine()})


if __name__ == "__main__":
    main(sys.argv[1:])
