"""Is the predicted time of a training step the time that it takes, and how much do a client's own steps mend it?

    python benchmarks/bench_cost_model.py                measures (10 minutes); part `cost_model` of results/fleet.json
    python benchmarks/bench_cost_model.py --rows FILE    the same from steps that were measured before

Random assignments of three models are carried out by the client's own step loop (``edge_client/train.py``) on one
thread; one process holds the models and takes all assignments in turn, three times over, so that each is spread over
the machine's moods. A step's time is process CPU time, user and system: the machine is shared, and wall time would
measure the neighbours. **A client in the field reports wall time**, all its threads at work. The probe is the client's
own and goes by wall time: where neighbours are busy it promises too little, which is part of ``probe_only``.

A client trains one model, so each model is a client of its own: of its configurations, ordered by the hash of their
names, every second one, from the first on, is for fitting (one report each), and the others are only predicted. The
figures are of all predicted ones together. The constants of ``cost.py`` were chosen on other draws of the same grid
(seed 6), on the same machine. An *error* is |predicted / measured - 1|. Three predictions are compared:

    probe_only   the probe's profile alone, as for a client that just joined
    one_scale    one running factor for everything (0.3 of the newest), which is what a client had before calibration
    calibrated   ``profiles/calibration.py``

    cost_model.step_time_median_error, .step_time_worst_error    calibrated, on the configurations not used for fitting
    cost_model.step_time_median_error_probe_only, ..._one_scale  the same of the others; also ..._worst_error_...
    cost_model.prefix_median_error, ..._probe_only               first pass over samples, texts and teacher
    cost_model.by_model                                          the same figures for each model
    cost_model.one_client_for_all                                the same for one client that trains all three in turn
    cost_model.by_reports                                        calibrated, after so many reports: median over 50
                                                                 random halves and orders
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from random_models import MODELS, RandomModel, write_random_model
from rivals import Assigned, Data, false_hash, layout_of, quantised
from starter_runs import RESULTS, machine, put_entries
from timed_assignment import assignment

from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.profiles.calibration import EMA, Calibration, observe, with_prefix
from fedblocks.profiles.cost import (
    AS_PROFILED,
    ExecutionMode,
    StepParts,
    TimeFactors,
    Workload,
    fill_time,
    step_parts,
)
from fedblocks.profiles.device import DeviceProfile

WORK: Final = Path("runs/bench")
STARTER: Final = Path(__file__).parent.parent / "edge_client" / "starter" / "model"
SHAPES: Final = {
    "m15": MODELS["m15"],
    "q30": RandomModel(
        family="qwen2", layers=8, hidden=512, intermediate=1408, heads=8, kv_heads=2, head_dim=64, vocab=16384
    ),
}
SEED: Final = 7
PER_MODEL: Final = 16
STEPS: Final = 6
REPEATS: Final = 3
ANCHORS: Final = 32
ANCHORS_TRAINING: Final = 28
"""The last eighth is for measuring (methods.md 5.2)."""
#: Tokens of a step, anchor included: at least so many, at most so many.
TOKENS: Final = {"starter": (64, 4096), "m15": (48, 768), "q30": (48, 768)}
#: Random halves and orders, and the numbers of reports after which the error is looked at.
ORDERS: Final = 50
REPORTS: Final = (0, 1, 2, 4, 8)
PROFILE_RATES: Final = ("gemm_flops_per_s", "memory_bytes_per_s", "step_overhead_s", "disk_read_bytes_per_s")
PLANS: Final = (
    Assigned(placement="top", num_blocks=1),
    Assigned(placement="top", num_blocks=2),
    Assigned(placement="thirds", num_blocks=2, highest=1),
    Assigned(placement="thirds", num_blocks=2),
    Assigned(placement="thirds", num_blocks=3, highest=1),
    Assigned(placement="thirds", num_blocks=3, highest=2),
    Assigned(placement="thirds", num_blocks=3),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One assignment on one model, with its data."""

    model: str
    assigned: Assigned
    mode: ExecutionMode
    batch_size: int
    tokens: int
    label_share: float
    anchor_batch_size: int
    anchor_tokens: int

    @property
    def name(self) -> str:
        """E.g. ``m15 thirds 2/3, 4 x 128 + 2 x 64 tokens, 40% labels: 4 sequences at a time``."""
        trained = f"{self.assigned.highest or self.assigned.num_blocks}/{self.assigned.num_blocks}"
        anchor = f" + {self.anchor_batch_size} x {self.anchor_tokens}" if self.anchor_batch_size else ""
        texts = f"{self.batch_size} x {self.tokens}{anchor} tokens, {self.label_share:.0%} labels"
        return f"{self.model} {self.assigned.placement} {trained}, {texts}: {self.mode.text()}"

    @property
    def step_tokens(self) -> int:
        """Of one step, anchor included."""
        return self.batch_size * self.tokens + self.anchor_batch_size * self.anchor_tokens

    def work(self) -> Workload:
        """What the cost model is told."""
        return Workload(
            batch_size=self.batch_size,
            micro_batch_size=self.mode.micro_batch_size,
            mean_tokens=self.tokens,
            max_tokens=self.tokens,
            label_share=self.label_share,
            steps=STEPS,
            anchor_batch_size=self.anchor_batch_size,
            anchor_tokens=self.anchor_tokens,
            new_tokens=STEPS * self.batch_size * self.tokens,
            new_anchor_tokens=min(STEPS * self.anchor_batch_size, ANCHORS_TRAINING) * self.anchor_tokens,
        )


def configurations() -> tuple[Configuration, ...]:
    """As many of each model, drawn at random from a fixed seed; no two alike."""
    rng = random.Random(SEED)
    found: dict[str, Configuration] = {}
    for model, (fewest, most) in TOKENS.items():
        wanted = len(found) + PER_MODEL
        while len(found) < wanted:
            batch = rng.choice((1, 2, 4, 8))
            drawn = Configuration(
                model=model,
                assigned=rng.choice(PLANS),
                mode=ExecutionMode(
                    optimizer=rng.choice(("fp32", "fp32", "split_8bit")),
                    frozen=rng.choice(("decoded", "decoded", "decoded", "nf4")),
                    micro_batch_size=rng.choice((batch, batch, max(1, batch // 4))),
                    checkpoint=rng.random() < 0.25,
                ),
                batch_size=batch,
                tokens=rng.choice((16, 32, 64, 128, 256, 384)),
                label_share=rng.choice((0.1, 0.4, 0.7, 1.0)),
                anchor_batch_size=rng.choice((0, 2, 4)),
                anchor_tokens=rng.choice((32, 64, 128)),
            )
            if fewest <= drawn.step_tokens <= most:
                found.setdefault(drawn.name, drawn)
    return tuple(found.values())


# The process that measures


def measured_steps(work: Path) -> Iterator[dict[str, Any]]:
    """One row for each configuration and repeat: seconds of CPU time of each step, and of the whole."""
    import numpy as np

    from fedblocks.edge_client.anchor import AnchorSet, Teacher
    from fedblocks.edge_client.expanded_model import ExpandedModel
    from fedblocks.edge_client.memory import give_back_freed_memory, return_large_blocks
    from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore, cut_key
    from fedblocks.edge_client.train import train

    return_large_blocks()
    opened: dict[tuple[str, str, int], Any] = {}
    with tempfile.TemporaryDirectory(dir=work) as caches:
        for repeat in range(REPEATS):
            for index, item in enumerate(configurations()):
                key = (item.model, item.assigned.placement, item.assigned.num_blocks)
                if key not in opened:
                    checkpoint = Checkpoint.open(folder_of(item.model, work))
                    backbone = quantised(checkpoint.folder, work)
                    content = false_hash(checkpoint)
                    plan = item.assigned.plan(checkpoint.config, content)
                    model = ExpandedModel(backbone=backbone, checkpoint=checkpoint, plan=plan)
                    opened[key] = (model, plan, cut_key(model, content, cut=model.base_cut))
                model, plan, name = opened[key]
                data = Data(
                    sequences=STEPS * item.batch_size,
                    tokens=item.tokens,
                    batch_size=item.batch_size,
                    vocab=plan.shape.vocab_size,
                )
                samples = [s for i in range(STEPS) for s in data.batch(i, item.label_share)]
                generator = np.random.default_rng(7)
                texts = generator.integers(3, data.vocab, (ANCHORS, item.anchor_tokens))
                anchors = AnchorSet(sequences=tuple(texts.astype(np.int32)), seed=0)
                stores = [RecordStore(Path(caches) / f"{index}-{name}{end}", warn=print) for end in ("", ".teacher")]
                prefix = PrefixStates(model, stores[0])
                teacher = Teacher(anchors=anchors, model=model, prefix=prefix, store=stores[1])
                model.hold(residency=item.mode.residency, frozen=item.mode.frozen)
                ends: list[float] = []
                result = train(
                    model=model,
                    task=assignment(
                        item.assigned.trained(plan),
                        mode=item.mode,
                        steps=STEPS,
                        batch_size=item.batch_size,
                        anchor_batch_size=item.anchor_batch_size,
                        learning_rate=1e-5,
                    ),
                    mode=item.mode,
                    data=samples,
                    teacher=teacher,
                    prefix=prefix,
                    now=time.process_time,
                    status=lambda _phase, _steps, ends=ends: ends.append(time.process_time()),
                )
                model.release()
                for store in stores:
                    store.close()
                give_back_freed_memory()
                # The first is the announcement of the first pass, the second the end of the first step.
                steps_s = [after - before for before, after in itertools.pairwise(ends[1:])]
                yield {
                    "index": index,
                    "repeat": repeat,
                    "name": item.name,
                    "step_s": statistics.median(steps_s),
                    "steps_s": steps_s,
                    "train_s": result.train_s,
                    "prefix_s": result.prefix_s,
                }


def worker(work: Path) -> None:
    """Prints one JSON line: the device's profile; then one for each row."""
    import torch

    from fedblocks.profiles.probe import probe

    torch.set_num_threads(1)
    for model in TOKENS:
        quantised(folder_of(model, work), work)
    # As a client probes itself (edge_client/client.py).
    print(json.dumps({"profile": dataclasses.asdict(probe(folder=work, threads=1).profile)}), flush=True)
    for row in measured_steps(work):
        print(json.dumps(row), flush=True)


def folder_of(model: str, work: Path) -> Path:
    """The model's folder, written if it is not there yet."""
    if model == "starter":
        return STARTER
    return write_random_model(work / f"{model}-{SHAPES[model].layers}", SHAPES[model])


# Predicted against measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One configuration: what its profile predicts, and what was measured."""

    item: Configuration
    parts: StepParts
    profiled_prefix_s: float
    step_s: float
    """Median over the repeats."""
    prefix_s: float
    """Of the first repeat; later ones find their samples cached."""


def measured_configurations(profile: DeviceProfile, rows: Sequence[Mapping[str, Any]], work: Path) -> list[Measured]:
    """In the order of their names' hashes."""
    found: list[Measured] = []
    for item in sorted(configurations(), key=lambda c: hashlib.sha256(c.name.encode()).digest()):
        runs = sorted((row for row in rows if row["name"] == item.name), key=lambda row: row["repeat"])
        checkpoint = Checkpoint.open(folder_of(item.model, work))
        plan = item.assigned.plan(checkpoint.config, false_hash(checkpoint))
        about = (profile, plan.shape, layout_of(plan))
        found.append(
            Measured(
                item=item,
                parts=step_parts(*about, item.assigned.trained(plan), item.work(), item.mode),
                profiled_prefix_s=fill_time(*about, item.work()),
                step_s=statistics.median(run["step_s"] for run in runs),
                prefix_s=runs[0]["prefix_s"],
            )
        )
    return found


def calibrated(seen: Sequence[Measured]) -> Calibration:
    """By one report of each."""
    known: Calibration | None = None
    for one in seen:
        known = observe(known, one.parts, one.step_s).calibration
        known = with_prefix(known, one.profiled_prefix_s, one.prefix_s)
    assert known is not None
    return known


def one_scale(seen: Sequence[Measured]) -> TimeFactors:
    """The running mean of measured over predicted."""
    scale: float | None = None
    for one in seen:
        ratio = one.step_s / sum(one.parts)
        scale = ratio if scale is None else EMA * ratio + (1 - EMA) * scale
    assert scale is not None
    return TimeFactors(**dict.fromkeys(("arithmetic", "attention", "activations", "weights", "overhead"), scale))


def errors(factors: TimeFactors, unseen: Sequence[Measured]) -> list[float]:
    """Of the steps of these configurations."""
    return [abs(factors.step_s(one.parts) / one.step_s - 1) for one in unseen]


def prefix_errors(factors: TimeFactors, unseen: Sequence[Measured]) -> list[float]:
    """Of their first passes."""
    return [abs(factors.prefix * one.profiled_prefix_s / one.prefix_s - 1) for one in unseen]


def figures(clients: Sequence[Sequence[Measured]]) -> dict[str, Any]:
    """Errors on every second configuration of each client, after it has learnt from its others."""
    steps: dict[str, list[float]] = {"": [], "_probe_only": [], "_one_scale": []}
    prefixes: dict[str, list[float]] = {"": [], "_probe_only": []}
    for measured in clients:
        seen, unseen = measured[::2], measured[1::2]
        known = calibrated(seen).time_factors
        for end, factors in (("", known), ("_probe_only", AS_PROFILED), ("_one_scale", one_scale(seen))):
            steps[end] += errors(factors, unseen)
        for end, factors in (("", known), ("_probe_only", AS_PROFILED)):
            prefixes[end] += prefix_errors(factors, unseen)
    return {
        "configurations": sum(map(len, clients)),
        "configurations_not_used_for_fitting": len(steps[""]),
        **{f"step_time_median_error{end}": statistics.median(found) for end, found in steps.items()},
        **{f"step_time_worst_error{end}": max(found) for end, found in steps.items()},
        **{f"prefix_median_error{end}": statistics.median(found) for end, found in prefixes.items()},
    }


def by_reports(clients: Sequence[Sequence[Measured]]) -> dict[str, dict[str, float]]:
    """Reports of each client -> errors on the half that is not reported: medians over random halves and orders."""
    rng = random.Random(SEED)
    found: dict[int, list[list[float]]] = {count: [] for count in REPORTS}
    for _ in range(ORDERS):
        shuffled = [rng.sample(measured, len(measured)) for measured in clients]
        for count, of_orders in found.items():
            of_order: list[float] = []
            for measured in shuffled:
                seen, unseen = measured[: len(measured) // 2], measured[len(measured) // 2 :]
                of_order += errors(calibrated(seen[:count]).time_factors if count else AS_PROFILED, unseen)
            of_orders.append(of_order)
    return {
        str(count): {
            "step_time_median_error": statistics.median(map(statistics.median, of_orders)),
            "step_time_worst_error": statistics.median(map(max, of_orders)),
        }
        for count, of_orders in found.items()
    }


def result(profile: DeviceProfile, rows: Sequence[Mapping[str, Any]], work: Path) -> dict[str, Any]:
    """The part of the results file."""
    measured = measured_configurations(profile, rows, work)
    clients = {model: [one for one in measured if one.item.model == model] for model in TOKENS}
    factors = {model: calibrated(of_model[::2]).time_factors for model, of_model in clients.items()}
    table = [
        {
            "configuration": one.item.name,
            "used_for_fitting": place % 2 == 0,
            "measured_step_s": one.step_s,
            "profiled_step_s": sum(one.parts),
            "calibrated_step_s": factors[model].step_s(one.parts),
        }
        for model, of_model in clients.items()
        for place, one in enumerate(of_model)
    ]
    spread = [max(r) / min(r) for r in _repeats(rows)]
    return {
        "command": "python benchmarks/bench_cost_model.py",
        **figures(list(clients.values())),
        "by_model": {model: figures([of_model]) for model, of_model in clients.items()},
        "one_client_for_all": figures([measured]),
        "by_reports": by_reports(list(clients.values())),
        "factors": {model: dataclasses.asdict(found) for model, found in factors.items()},
        "spread_of_repeats_median": statistics.median(spread),
        "spread_of_repeats_worst": max(spread),
        "profile": {name: getattr(profile, name) for name in PROFILE_RATES},
        **machine(),
        "steps": table,
    }


def _repeats(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    by_name: dict[str, list[float]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row["step_s"])
    return list(by_name.values())


def merge(path: Path, part: Mapping[str, Any]) -> None:
    """Puts the part into the results file of the fleet; everything else in it stays."""
    put_entries(path, {"cost_model": part})


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    if arguments[:1] == ["--worker"]:
        worker(Path(arguments[1]))
        return
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="predicted against measured seconds of training steps")
    parser.add_argument("--rows", type=Path, help="steps that were measured before; default: they are measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "fleet.json")
    parser.add_argument("--work", type=Path, default=WORK, help="models, 4-bit files and the measured steps")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    lines = options.rows or options.work / "cost_model.jsonl"
    if options.rows is None:
        with lines.open("w", encoding="utf-8") as file:
            subprocess.run(
                [sys.executable, __file__, "--worker", str(options.work)],
                check=True,
                stdout=file,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
    first, *rows = (json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines())
    part = result(DeviceProfile(**first["profile"]), rows, options.work)
    for row in part["steps"]:
        kind = "fitting" if row["used_for_fitting"] else "       "
        seconds = (row[f"{name}_step_s"] for name in ("measured", "profiled", "calibrated"))
        print(kind, *(f"{1000 * s:8.1f}" for s in seconds), "ms", row["configuration"])
    print(*(f"{key} {value:.3f}" for key, value in part.items() if isinstance(value, float)), sep="\n")
    print(json.dumps(part["by_reports"]))
    merge(options.out, part)


if __name__ == "__main__":
    main(sys.argv[1:])
