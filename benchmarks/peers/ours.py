"""The same job with ours, and with the bare wire: who is started, and what comes of it.

One process per client, as the peers have it. A client sends an update that was made once (light_clients.py); nothing is
trained. The first round of each run sends nothing down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench_aggregator import serve
from peers.processes import Watch

BENCHMARKS: Final = Path(__file__).parents[1]
DEADLINE_S: Final = 900.0
FORMATS: Final[Mapping[str, Sequence[str]]] = {
    "fp32": ("delta.format=fp32",),
    "int8": ("delta.format=int8", "delta.density=1.0", "delta.down_density=1.0"),
}
FLOOR: Final = (
    "import bare_wire, json, sys; given = json.loads(sys.argv[1]); "
    "print(json.dumps(bare_wire.rounds(*given['args'], processes=given['processes'], encrypted=given['encrypted'])))"
)


def bare_leg(*, clients: int, num_bytes: int, rounds: int, encrypted: bool) -> dict[str, Any]:
    """Bare ZeroMQ; it leaves its first round out by itself."""
    given = {"args": (clients, num_bytes, rounds - 1), "processes": clients, "encrypted": encrypted}
    with Watch(("bare_wire.py",)) as watch:
        done = subprocess.run(
            [sys.executable, "-c", FLOOR, json.dumps(given)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(BENCHMARKS)},
            text=True,
            check=True,
        )
    return {"round_s": [None, *json.loads(done.stdout)], "result_ok": True, "encrypted": encrypted, **watch.figures()}


def leg(folder: Path, sizes: Mapping[str, int], *, clients: int, rounds: int, format: str) -> dict[str, Any]:
    """``fedblocks serve`` with the ledger and the updates on the disk of ``folder``, CURVE on."""
    with Watch(("light_clients.py",)) as watch:
        served = serve(
            folder,
            sizes,
            clients=clients,
            processes=clients,
            overrides=(f"run.max_rounds={rounds}", f"allocation.deadline_s={DEADLINE_S}", *FORMATS[format]),
        )
    accepted = [row["num_accepted"] for row in served.rows]
    return {
        "round_s": [row["round_s"] for row in served.rows],
        "result_ok": accepted == [clients] * rounds and served.clients["refused"] == 0,
        "encrypted": True,
        **watch.figures(),
    }
