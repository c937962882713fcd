"""What does each way of dealing out the work cost until the model is good enough? One fleet, some seeds, arms as data.

A *set* compares *arms* that differ in what they override, under the same seeds, cohorts, deadline and straggler rule.
Every finished run is a line of JSON and is not run again; times are those of the simulation's virtual clock.
The target is a mean over three rounds of the pooled accuracy on the clients' held-out rows; an arm that does not reach
it within its rounds is listed so, and a ratio to it is a bound.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from starter_runs import RESULTS, RowBook, machine, put_entries

from fedblocks.fleet_file import Chance, Fleet, load
from fedblocks.simulation import SimulationResult, inputs_of, simulate

FLEETS: Final = Path(__file__).parent / "fleets"
RUNS: Final = Path("runs/bench/ladder")
SEEDS: Final = (1, 2, 3)
TARGET: Final = 0.9
"""Of the demo's task, on held-out rows (``docs/demo.md``)."""
MEAN_OF_ROUNDS: Final = 3
BOOTSTRAP_DRAWS: Final = 10_000
DEADLINE_ROUNDS: Final = 2
"""In the first round nobody's speed has been measured; the deadline of the second one rests on measurements."""
MANY: Final = "many200"
SAMPLE_S: Final = 0.2
COMMON: Final[Mapping[str, Any]] = {
    "run.max_rounds": 24,
    "run.target_score": TARGET,
    "allocation.cohort_fraction": 0.4,
    "allocation.slim": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What one side of a comparison overrides."""

    run: Mapping[str, Any] = field(default_factory=dict)
    """Keys of run.toml."""
    fleet: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the fleet file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Some arms, the first of which the others are held against."""

    arms: Mapping[str, Arm]
    fleet: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    own_deadlines: bool = False
    """Every arm has the deadline that it computes itself: where that is a part of what is compared."""
    moving_deadlines: bool = False
    """Every arm as it comes: the aggregator computes the deadline, and moves it as rounds go by (methods.md 6.5)."""
    deadline_of: str = ""
    """Else the arm whose deadline all have; empty: the first."""


POLICIES: Final = {
    "fitted": Arm(),
    "uniform": Arm(run={"allocation.policy": "uniform"}),
    "weakest": Arm(run={"allocation.policy": "weakest"}),
}
#: The tiers' memory and lines mean something for a model of this size: of the starter model the overheads are all.
LARGE: Final[Mapping[str, Any]] = {"costs_of": "qwen2.5-0.5b", "tick_s": 5.0}
LARGE_RUN: Final[Mapping[str, Any]] = {"server.heartbeat_interval_s": 60.0}
PILOT_SEED: Final = 0
PILOT_ROUNDS: Final = 20
RATES: Final = (3e-3, 1e-2)
#: The demo's, which every fleet has that names none.
USUAL_RATE: Final = 3e-3
#: Each takes the learning rate that was best on the pilot seed (:func:`swept`); the pairs' tiers are 4, 8, 16 and 32.
METHODS: Final = {
    # The densities are the product's; the demo's fleet has others, for a model of which a row is nothing.
    "fedbe": Arm(run={"allocation.slim": True, "delta.density": 0.25, "delta.down_density": 0.25}),
    "fedit": Arm(run={"run.method": "fedit", "training.learning_rate": USUAL_RATE}),
    "hetlora": Arm(run={"run.method": "hetlora", "training.learning_rate": USUAL_RATE, "allocation.slim": True}),
    "flexlora": Arm(run={"run.method": "flexlora", "training.learning_rate": USUAL_RATE, "allocation.slim": True}),
    "flora": Arm(run={"run.method": "flora", "training.learning_rate": USUAL_RATE, "allocation.slim": True}),
}
#: 0.97 of what ``fedit`` gains, which gets every held-out row right (methods.md 12.4).
OF_GAIN: Final[Mapping[str, Any]] = {"run.target_score": 0.97, "run.max_rounds": 40}
HETEROGENEOUS: Final = ("hetlora", "flexlora", "flora")
COMPARISONS: Final[Mapping[str, Comparison]] = {
    "ladder": Comparison(arms=POLICIES, fleet={**LARGE, "alpha": 0.5}, run=LARGE_RUN),
    "ladder_default": Comparison(  # ours as it comes, against the others with the deadlines that they come with
        arms={**POLICIES, "fitted": Arm(run={"allocation.slim": True})},
        fleet={**LARGE, "alpha": 0.5},
        run=LARGE_RUN,
        own_deadlines=True,
    ),
    "slim": Comparison(
        arms={"slim": Arm(run={"allocation.slim": True}), "whole": Arm()},
        fleet={**LARGE, "alpha": 0.5},
        run=LARGE_RUN,
        own_deadlines=True,  # the deadline follows from the smallest piece of work that a run may hand out
    ),
    "data_term": Comparison(
        arms={
            "weighed": Arm(run={"allocation.rarity_weight": 0.5}, fleet={"share_topics": True}),
            "unweighed": Arm(),
            "random": Arm(run={"allocation.policy": "random"}),
        },
        fleet={**LARGE, "alpha": 0.1},
        run=LARGE_RUN,
    ),
    "robust": Comparison(
        arms={
            "undisturbed": Arm(),
            "disturbed": Arm(fleet={"chance": Chance(dropout=0.3, straggler=0.2, straggler_factor=10.0)}),
        },
        fleet={**LARGE, "alpha": 0.5},
        run={**LARGE_RUN, "run.target_score": 0.0, "run.max_rounds": 16},
    ),
    "ladder_starter": Comparison(arms=POLICIES, fleet={"alpha": 0.5}),
    "tta": Comparison(  # every method as it comes
        arms=METHODS, fleet={**LARGE, "alpha": 0.5}, run={**LARGE_RUN, **OF_GAIN}, moving_deadlines=True
    ),
    "tta_one_deadline": Comparison(
        arms=METHODS, fleet={**LARGE, "alpha": 0.5}, run={**LARGE_RUN, **OF_GAIN}, deadline_of="fedit"
    ),
    "tta_starter": Comparison(arms=METHODS, fleet={"alpha": 0.5}, run=OF_GAIN, moving_deadlines=True),
}
#: Comparisons of methods: their figures stand in methods.json.
OF_METHODS: Final = ("tta", "tta_one_deadline", "tta_starter")


def fleet_of(comparison: Comparison, arm: Arm, seed: int) -> Fleet:
    """The four-tier fleet with everything that the arm overrides, without a deadline."""
    ladder = load(FLEETS / "ladder20.toml")
    run = {**ladder.run, **COMMON, "run.seed": seed, **comparison.run, **arm.run}
    return replace(ladder, **{**comparison.fleet, **arm.fleet}, seed=seed, run=run)


def target_of(fleet: Fleet) -> float:
    """The score that is waited for; a run that never stops for a score is measured by the usual one."""
    return float(fleet.run["run.target_score"]) or TARGET


def run_id(fleet: Fleet) -> str:
    """Names a run: the same fleet, the same name."""
    return hashlib.sha256(json.dumps(asdict(fleet), sort_keys=True).encode()).hexdigest()[:16]


def measured(fleet: Fleet, *, workers: int) -> SimulationResult:
    """The run; its folder is removed."""
    out = RUNS / run_id(fleet)
    try:
        return simulate(fleet, inputs_of(None, None, None, out), out, workers=workers)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def time_to_target(rounds: Sequence[Mapping[str, Any]], target: float) -> tuple[int, float] | None:
    """Round and virtual seconds at which the mean of three rounds' scores first reaches the target."""
    scores: list[float] = []
    for row in rounds:
        if row["score"] is None:
            continue
        scores.append(row["score"])
        if len(scores) >= MEAN_OF_ROUNDS and statistics.fmean(scores[-MEAN_OF_ROUNDS:]) >= target:
            return row["round"], row["virtual_s"]
    return None


def row_of(name: str, arm: str, fleet: Fleet, result: SimulationResult, wall_s: float) -> dict[str, Any]:
    """The line that is kept of a run."""
    reached = time_to_target(result.rounds, target_of(fleet))
    scores = [row["score"] for row in result.rounds if row["score"] is not None]
    return {
        "id": run_id(fleet),
        "comparison": name,
        "arm": arm,
        "seed": fleet.seed,
        "reached": reached is not None,
        "rounds_to_target": reached[0] if reached else None,
        "virtual_s_to_target": reached[1] if reached else None,
        "finished": result.finished,
        "rounds": len(result.rounds),
        "virtual_s": result.virtual_s,
        "score_mean_of_last_3": statistics.fmean(scores[-MEAN_OF_ROUNDS:]) if scores else None,
        "retention": next((row["retention"] for row in reversed(result.rounds) if row["retention"] is not None), None),
        "kl": next((row["kl"] for row in reversed(result.rounds) if row["kl"] is not None), None),
        "deadline_s": result.rounds[-1]["deadline_s"] if result.rounds else None,
        "assigned": sum(row["num_assigned"] for row in result.rounds),
        "accepted": sum(row["num_accepted"] for row in result.rounds),
        "lost": sum(client.lost for client in result.clients),
        "bytes_up": sum(client.bytes_up for client in result.clients),
        "bytes_down": sum(client.bytes_down for client in result.clients),
        "energy_wh": sum(client.energy_j or 0.0 for client in result.clients) / 3600,
        "coverage": {device: dict(blocks) for device, blocks in result.coverage.items()},
        "classes": [asdict(found) for found in result.device_classes()],
        "curve": [(row["virtual_s"], row["score"], row["num_accepted"]) for row in result.rounds],
        "state_sha256": result.state_sha256,
        "costs_of": result.costs_of,
        "wall_s": wall_s,
        "versions": machine()["versions"],
    }


class Book:
    """The finished runs by the fleet that was run.

    Args:
        path: of the rows (:class:`RowBook`).
    """

    def __init__(self, path: Path) -> None:
        self._file = RowBook(path)
        self._rows = {row["id"]: row for row in self._file.rows}

    def row(self, name: str, arm: str, fleet: Fleet, *, workers: int) -> dict[str, Any]:
        """That of a run, which is made if it is not there."""
        found = self._rows.get(run_id(fleet))
        if found is not None:
            return {**found, "comparison": name, "arm": arm}
        began = time.monotonic()
        row = row_of(name, arm, fleet, measured(fleet, workers=workers), time.monotonic() - began)
        self._rows[row["id"]] = self._file.add(row)
        print(
            f"{name} {arm} seed {row['seed']}: target after {row['rounds_to_target']} rounds and "
            f"{row['virtual_s_to_target']} virtual s; score {row['score_mean_of_last_3']:.3f} after {row['rounds']} "
            f"rounds and {row['virtual_s']:.0f} s; {row['wall_s']:.0f} s here",
            flush=True,
        )
        return row


def rows_of(
    name: str, seeds: Sequence[int], book: Book, *, workers: int, without: Collection[str] = ()
) -> list[dict[str, Any]]:
    """All runs of a comparison: seed by seed, so that an interrupted one has whole seeds.

    All arms of a seed have the deadline that one of them computes from its own measured speeds, or each its own; or
    each has those that its aggregator computes on the way.
    """
    comparison = COMPARISONS[name]
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for arm_name, arm in comparison.arms.items():
            if arm_name in without:
                continue
            rate = USUAL_RATE
            if name in OF_METHODS:
                rate = best_rate(swept(arm_name, book, workers=workers))
            rows.append(_run(name, arm_name, arm, seed, rate, book, workers=workers))
    return rows


def _run(name: str, arm_name: str, arm: Arm, seed: int, rate: float, book: Book, *, workers: int) -> dict[str, Any]:
    """One run with the deadline that it is to have."""
    comparison = COMPARISONS[name]
    own = {} if rate == USUAL_RATE else {"training.learning_rate": rate}
    fleet = fleet_of(comparison, arm, seed)
    fleet = replace(fleet, run={**fleet.run, **own})
    if comparison.moving_deadlines:
        return {**book.row(name, arm_name, fleet, workers=workers), "learning_rate": rate}
    first = comparison.arms[comparison.deadline_of or next(iter(comparison.arms))]
    plain = fleet_of(comparison, arm if comparison.own_deadlines else first, seed)
    run = {key: value for key, value in plain.run.items() if key != "allocation.policy"}
    short = replace(plain, run={**run, "run.max_rounds": DEADLINE_ROUNDS}, chance=Chance())
    deadline_s = book.row(name, "deadline", short, workers=workers)["deadline_s"]  # rates have no part in it
    fleet = replace(fleet, run={**fleet.run, "allocation.deadline_s": deadline_s})
    return {**book.row(name, arm_name, fleet, workers=workers), "learning_rate": rate}


def swept(arm: str, book: Book, *, workers: int) -> list[dict[str, Any]]:
    """A method's runs of the pilot seed, one for each of :data:`RATES`, :data:`PILOT_ROUNDS` long at most."""
    short = replace(METHODS[arm], run={**METHODS[arm].run, "run.max_rounds": PILOT_ROUNDS})
    return [_run("tta", arm, short, PILOT_SEED, rate, book, workers=workers) for rate in RATES]


def best_rate(pilot: Sequence[Mapping[str, Any]]) -> float:
    """That of the run that is first at the target; if none gets there, of the one that has learnt most."""
    return max(
        pilot,
        key=lambda row: (-(row["virtual_s_to_target"] or float("inf")), row["score_mean_of_last_3"] or 0.0),
    )["learning_rate"]


def speedup(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Their virtual seconds to the target over ours, seed by seed; a bound where they do not reach it.

    Mean of the ratios, their range, and the 95 % percentile interval of that mean over resampled seeds.
    """
    ratios: list[float] = []
    bounds: list[int] = []
    for own, other in zip(ours, theirs, strict=True):
        if not own["reached"]:
            return {"mean": None, "why": f"seed {own['seed']}: {own['arm']} does not reach the target itself"}
        if not other["reached"]:
            bounds.append(other["seed"])
        ratios.append((other["virtual_s_to_target"] or other["virtual_s"]) / own["virtual_s_to_target"])
    draws = np.random.default_rng(0).integers(0, len(ratios), (BOOTSTRAP_DRAWS, len(ratios)))
    low, high = np.quantile(np.asarray(ratios)[draws].mean(axis=1), (0.025, 0.975))
    return {
        "mean": statistics.fmean(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "interval_95": [float(low), float(high)],
        "by_seed": ratios,
        "lower_bounds_at_seeds": bounds,
    }


def summary(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a comparison under its key of the results file."""
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in COMPARISONS[name].arms}
    not_run = [arm for arm, of_arm in by_arm.items() if not of_arm]
    by_arm = {arm: of_arm for arm, of_arm in by_arm.items() if of_arm}
    found: dict[str, Any] = {
        "target": COMPARISONS[name].run.get("run.target_score") or TARGET,
        "costs_of": rows[0]["costs_of"],
        "clock": "virtual",
        "seeds": [row["seed"] for row in next(iter(by_arm.values()))],
        "deadline_s": [row["deadline_s"] for row in next(iter(by_arm.values()))],
        "arms": {arm: _arm_summary(of_arm) for arm, of_arm in by_arm.items()},
    }
    first, *others = by_arm
    speedups = {arm: speedup(by_arm[first], by_arm[arm]) for arm in others}
    match name:
        case "robust":
            return {**found, **_robustness(by_arm["undisturbed"], by_arm["disturbed"])}
        case _ if name in OF_METHODS:
            run = [speedups[arm]["mean"] for arm in HETEROGENEOUS if arm in speedups]
            het = [mean for mean in run if mean is not None]
            return {
                "speedup_vs_fedit": speedups["fedit"]["mean"],
                "speedup_vs_best_het_lora": min(het, default=None),
                **found,
                "speedups": speedups,
                "not_run": not_run,
            }
        case _ if name.startswith("ladder"):
            return {
                "tta_speedup_vs_uniform": speedups["uniform"]["mean"],
                "tta_speedup_vs_weakest_can": speedups["weakest"]["mean"],
                **found,
                "speedups": speedups,
            }
        case _:
            return {**found, "speedups": speedups}


def _arm_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    times = [row["virtual_s_to_target"] for row in rows]
    return {
        "reached": sum(row["reached"] for row in rows),
        "virtual_s_to_target": times,
        "rounds_to_target": [row["rounds_to_target"] for row in rows],
        "score_mean_of_last_3": [row["score_mean_of_last_3"] for row in rows],
        "retention": [row["retention"] for row in rows],
        "bytes_up_and_down": [row["bytes_up"] + row["bytes_down"] for row in rows],
        "energy_wh": [row["energy_wh"] for row in rows],
        "updates_by_device": [{found["device"]: found["updates"] for found in row["classes"]} for row in rows],
        "coverage": [row["coverage"] for row in rows],
        "wall_s": [row["wall_s"] for row in rows],
        "learning_rate": rows[0].get("learning_rate", USUAL_RATE),
        "run_ids": [row["id"] for row in rows],
    }


def _robustness(calm: Sequence[Mapping[str, Any]], rough: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses = [100 * (a["score_mean_of_last_3"] - b["score_mean_of_last_3"]) for a, b in zip(calm, rough, strict=True)]
    return {
        "finished": all(row["finished"] for row in rough),
        "score_loss_points": statistics.fmean(losses),
        "score_loss_points_worst": max(losses),
        "tasks_lost": [row["lost"] for row in rough],
        "updates_accepted_share": [row["accepted"] / row["assigned"] for row in rough],
        "blocks_covered": [
            sorted({block for blocks in row["coverage"].values() for block in blocks}, key=int) for row in rough
        ],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a simulation took of this machine, as a process of its own with its workers."""

    clients: int
    wall_s: float
    cpu_s: float
    peak_own_bytes: int
    """Largest sum over its processes of the memory that is no file's and not shared with one another."""
    result: Mapping[str, Any]


def footprint(fleet: Path, out: Path, *, workers: int) -> Footprint:
    """Runs ``fedblocks simulate`` and watches it.

    Raises:
        RuntimeError: it failed; the text holds its last lines.
    """
    command = [
        *(sys.executable, "-m", "fedblocks", "simulate", str(fleet)),
        *("--out", str(out), "--workers", str(workers), "--json", str(out / "found.json")),
    ]
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _own_bytes(process.pid))
            time.sleep(SAMPLE_S)
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads((out / "found.json").read_text(encoding="utf-8"))
    shutil.rmtree(out, ignore_errors=True)
    return Footprint(
        clients=len(result["clients"]),
        wall_s=time.monotonic() - began,
        cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        peak_own_bytes=peak,
        result=result,
    )


def _own_bytes(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_full_info().uss
    return total


def many(*, workers: int) -> dict[str, Any]:
    """200 clients beside a tenth of them: wall time, and memory per client from the difference."""
    whole = FLEETS / "many200.toml"
    found: dict[str, Any] = {"workers": workers}
    with tempfile.TemporaryDirectory() as folder:
        tenth = Path(folder) / "tenth.toml"
        text = whole.read_text(encoding="utf-8")
        tenth.write_text(re.sub(r"count = (\d+)0\b", r"count = \1", text), encoding="utf-8")
        small, large = (footprint(path, RUNS / "many", workers=workers) for path in (tenth, whole))
    for one in (small, large):
        found[f"clients_{one.clients}"] = {
            "wall_s": one.wall_s,
            "cpu_s": one.cpu_s,
            "peak_own_bytes": one.peak_own_bytes,
            "rounds": len(one.result["rounds"]),
            "accepted": [row["num_accepted"] for row in one.result["rounds"]],
            "finished": one.result["finished"],
            "state_sha256": one.result["state_sha256"],
        }
    found["own_bytes_per_client"] = (large.peak_own_bytes - small.peak_own_bytes) / (large.clients - small.clients)
    return found


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="time to target of ways of dealing out the work, on the ladder")
    parser.add_argument("comparison", choices=(*COMPARISONS, MANY), nargs="*", default=["ladder"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--without", nargs="+", default=[], help="arms that are left out, and named as not run")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: fleet.json of the results, of methods methods.json")
    options = parser.parse_args(arguments)
    book = Book(RUNS / "runs.jsonl")
    for name in options.comparison:
        if name == MANY:
            figures = many(workers=options.workers)
        else:
            rows = rows_of(name, options.seeds, book, workers=options.workers, without=options.without)
            figures = summary(name, rows)
            if name in OF_METHODS:
                figures["pilot"] = {
                    arm: {
                        f"{row['learning_rate']:g}": row["virtual_s_to_target"] or f"{row['score_mean_of_last_3']:.3f}"
                        for row in swept(arm, book, workers=options.workers)
                    }
                    for arm in METHODS
                    if arm not in options.without
                }
        out = options.out or RESULTS / ("methods.json" if name in OF_METHODS else "fleet.json")
        command = f"python benchmarks/bench_ladder.py {name}"
        put_entries(out, {name: {"command": command, **figures, **machine()}})


if __name__ == "__main__":
    main(sys.argv[1:])
