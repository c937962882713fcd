"""What does a round cost beside Flower and NVFlare, and what do they make of bad updates and of crashes?

    make bench-peers                                         everything -> benchmarks/results/peers.json (45 minutes)
    python benchmarks/bench_peers.py rounds --passes 2       a part: rounds, tiny, bad_inputs, crashes

``rounds``      16 clients, 25 MB of fp32 down and up, nothing trained: the bare wire, ours (fp32, int8), NVFlare and
                Flower in turns. Each leg has one round more than is counted: in the first, processes start and connect
``tiny``        the same with 9 kB: what a round costs by itself
``bad_inputs``  one client of four sends a bad update to the stock averaging of each system; no network
``crashes``     a client dies in mid-round, the server dies, everything on the server's machine dies

The peers live in environments of their own (`make peers`). docs/peers.md is written from the results by
peers_document.py, with what must be known to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from light_clients import MB25, TINY, write_run
from peers import crashes, flower, nvflare_simulator, our_bad_inputs, ours
from starter_runs import RESULTS, machine, put_entries

from fedblocks.profiles.cost import upload_bytes

FOLDER: Final = Path("runs/bench/peers")
CLIENTS: Final = 16
ROUNDS: Final = 3
PASSES: Final = 3
SIZES: Final = {
    "25MB": MB25,
    "1MB": {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2},
    "tiny": TINY,
}
RATIOS: Final = {
    "fp32_over_bare_curve": ("ours_fp32", "bare_curve"),
    "fp32_over_flower": ("ours_fp32", "flower"),
    "fp32_over_nvflare": ("ours_fp32", "nvflare"),
    "int8_over_flower": ("ours_int8", "flower"),
    "int8_over_nvflare": ("ours_int8", "nvflare"),
}
CRASHES: Final = tuple(":".join(case) for case in crashes.CASES)
Leg = Callable[[], dict[str, Any]]
Legs = dict[str, list[dict[str, Any]]]


def legs_of(size: str, *, clients: int, rounds: int) -> dict[str, Leg]:
    """The legs of one pass, in their order; each makes one round more than is counted."""
    sizes, more = SIZES[size], rounds + 1
    with tempfile.TemporaryDirectory() as empty:
        num_values = upload_bytes(write_run(Path(empty) / "run", sizes).shape, 1, "fp32") // 4
    common = {"clients": clients, "rounds": more}
    legs: dict[str, Leg] = {
        "bare_curve": lambda: ours.bare_leg(**common, num_bytes=4 * num_values, encrypted=True),
        "bare_plain": lambda: ours.bare_leg(**common, num_bytes=4 * num_values, encrypted=False),
        "ours_fp32": lambda: ours.leg(FOLDER / "ours", sizes, **common, format="fp32"),
        "ours_int8": lambda: ours.leg(FOLDER / "ours", sizes, **common, format="int8"),
        "nvflare": lambda: nvflare_simulator.leg(FOLDER / "nvflare", **common, num_values=num_values),
        "flower": lambda: flower.leg(FOLDER / "flower", **common, num_values=num_values),
    }
    return legs


def in_turns(
    size: str, *, clients: int, rounds: int, passes: int, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All legs, one after the other, so many times; what there is so far is kept after each leg."""
    found: Legs = {}
    for number in range(passes):
        for name, leg in legs_of(size, clients=clients, rounds=rounds).items():
            done = leg()
            found.setdefault(name, []).append(done)
            print(f"pass {number + 1}, {name}: {json.dumps(done)}", flush=True)
            keep(summary(found, size, clients=clients, rounds=rounds))
    return summary(found, size, clients=clients, rounds=rounds)


def summary(found: Legs, size: str, *, clients: int, rounds: int) -> dict[str, Any]:
    """Medians over all passes, the first round of each left out, and the ratios of those that were measured."""
    medians = {
        name: statistics.median(seconds for leg in legs for seconds in leg["round_s"][1:])
        for name, legs in found.items()
    }
    return {
        "size": size,
        "clients": clients,
        "rounds": rounds,
        "passes": max(len(legs) for legs in found.values()),
        "median_round_s": medians,
        **{name: medians[a] / medians[b] for name, (a, b) in RATIOS.items() if a in medians and b in medians},
        "legs": found,
    }


def bad_inputs() -> dict[str, dict[str, str]]:
    """Case -> system -> what comes of it."""
    found: dict[str, Mapping[str, str]] = {"ours": our_bad_inputs.answers()}
    for name, venv in (("flower", flower.VENV), ("nvflare", nvflare_simulator.VENV)):
        done = subprocess.run(
            [str(venv / "bin" / "python"), str(Path(__file__).parent / "peers" / f"{name}_bad_inputs.py")],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[name] = json.loads(done.stdout)
    return {case: {name: answers[case] for name, answers in found.items()} for case in found["ours"]}


def crash(case: str) -> dict[str, Any]:
    """One death, as DEATH:SYSTEM."""
    death, system = case.split(":")
    found = crashes.CASES[death, system](FOLDER / f"{death}-{system}")
    print(f"{case}: {json.dumps(found)}", flush=True)
    return found


def peer_versions() -> dict[str, str]:
    """Of what is installed in the peers' environments."""
    venvs = {"flwr": flower.VENV, "nvflare": nvflare_simulator.VENV}
    ask = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    found: dict[str, str] = {}
    for name, venv in venvs.items():
        python = venv / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{python} is missing: run make peers")
        done = subprocess.run([str(python), "-c", ask, name], stdout=subprocess.PIPE, text=True, check=True)
        found[name] = done.stdout.strip()
    return found


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parts = ("bad_inputs", "crashes", "rounds", "tiny")
    parser = argparse.ArgumentParser(description="beside Flower and NVFlare")
    parser.add_argument("part", nargs="*", choices=[*parts, []], default=list(parts))
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--cases", nargs="+", choices=CRASHES, default=CRASHES, metavar="DEATH:SYSTEM")
    parser.add_argument("--size", choices=[name for name in SIZES if name != "tiny"], default="25MB")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    options = parser.parse_args(arguments)
    about = {
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": machine()["versions"] | peer_versions(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)

    def held(part: str) -> dict[str, Any]:
        return json.loads(options.out.read_text(encoding="utf-8")).get(part, {}) if options.out.exists() else {}

    def keep(part: str, found: Mapping[str, Any]) -> None:
        put_entries(options.out, {"command": "make bench-peers", **about, part: found})

    for part in options.part:
        if part == "bad_inputs":
            keep(part, bad_inputs())
        elif part == "crashes":
            for case in options.cases:
                keep(part, {**held(part), case: crash(case)})
        else:
            size = options.size if part == "rounds" else "tiny"
            in_turns(
                size,
                clients=options.clients,
                rounds=options.rounds,
                passes=options.passes,
                keep=lambda found, part=part: keep(part, found),
            )


if __name__ == "__main__":
    main(sys.argv[1:])
