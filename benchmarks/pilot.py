"""Can the frozen tasks show forgetting, and what is the target? The two baselines at the pilot seed, every rate.

    python benchmarks/pilot.py             runs what is missing -> benchmarks/results/pilot.json
    python benchmarks/pilot.py --freeze    writes target, table and hash into edge_client/starter/frozen_task.json

Only FedAvg full fine-tuning and FedAvg-LoRA run here, without anchor, before expanded blocks ever ran on these tasks.
The rules (target, best rate, forgetting) stand in the frozen file and were written before the first run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's folder off the path

from federation import Settings, first_at_least
from starter_runs import RESULTS, Starter, config_hash, frozen, frozen_digest, results_rows, write_results

from fedblocks.edge_client.starter import frozen_task_file

FILE = RESULTS / "pilot.json"
COMMAND = "python benchmarks/pilot.py"
TARGET = 0.90
BASELINES = ("full", "lora")
Rows = Sequence[Mapping[str, Any]]


def lines(content: Mapping[str, Any]) -> Iterable[Settings]:
    """Every rate of the two baselines, the middle ones first."""
    training = content["training"]
    for place in (1, 2, 0, 3):
        for method in BASELINES:
            yield Settings(
                method=method,
                learning_rate=content["learning_rates"][method][place],
                seed=content["pilot_seed"],
                rounds=training["rounds"],
                steps=training["steps_per_round"],
                batch_size=training["batch_size"],
            )


def run() -> None:
    """Runs the missing rows of both tasks; writes after each."""
    content = frozen()
    if content["target"] is not None:
        raise SystemExit("the frozen file has its target already; the pilot is over and is not run again")
    rows = results_rows(FILE)
    base: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for task in content["tasks"]:
            starter = Starter(task, cache=Path(cache))
            base[task] = starter.base_figures()
            for settings in lines(content):
                name = config_hash(settings, task, starter.federation.base_hash, starter.partition_hash)
                if any(row["config_hash"] == name for row in rows):
                    continue
                rows.append(starter.run(settings, target=TARGET, label=f"{task} {_name(settings)}"))
                write_results(FILE, COMMAND, rows, base=base)
    write_results(FILE, COMMAND, rows, base=base)


def _name(settings: Settings) -> str:
    return f"{settings.method} {settings.learning_rate:g}"


def target_of(rows: Rows) -> float:
    """The target rule of the frozen file for one task's rows."""
    best = max(entry["downstream"] for row in rows for entry in row["rounds_log"])
    return TARGET if best >= TARGET else math.floor((best - 0.05) / 0.05 + 1e-9) * 0.05


def outcome(rows: Rows, target: float, base: float) -> dict[str, Any]:
    """The table of one task: every rate, which is best, and whether the task can show forgetting.

    Args:
        base: general accuracy of the base on the validation split.
    """
    table: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (BASELINES.index(r["method"]), r["learning_rate"])):
        log = row["rounds_log"]
        reached = first_at_least([entry["downstream"] for entry in log], target)
        measured = row["at_target"] if row["at_target"] is not None and row["at_target"]["round"] == reached else None
        line = {
            "method": row["method"],
            "learning_rate": row["learning_rate"],
            "rounds_to_target": reached,
            "forgetting_at_target_validation": None
            if reached is None
            else round(1 - log[reached - 1]["general"] / base, 4),
            "at_target": _short(measured),
            "last": _short(row["last"]),
        }
        table.append(line)
    best: dict[str, Any] = {}
    for method in BASELINES:
        able = [line for line in table if line["method"] == method and line["rounds_to_target"] is not None]
        best[method] = min(able, key=lambda r: (r["rounds_to_target"], r["learning_rate"])) if able else None
    lost = [line["at_target"]["forgetting"] for line in best.values() if line is not None and line["at_target"]]
    return {
        "target": target,
        "best_learning_rate": {m: line["learning_rate"] if line else None for m, line in best.items()},
        "forgetting_at_target_at_best": {
            m: line["at_target"]["forgetting"] if line and line["at_target"] else None for m, line in best.items()
        },
        "can_show_forgetting": bool(lost) and max(lost) >= 0.05,
        "table": table,
    }


def _short(figures: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if figures is None:
        return None
    chosen = {key: round(figures[key], 4) for key in ("downstream", "general", "kl")}
    return {"round": figures["round"], **chosen, "forgetting": round(1 - figures["retention"], 4)}


def freeze() -> None:
    """Fills target, pilot and hash of the frozen file; everything above them keeps its bytes."""
    path = frozen_task_file()
    content = frozen()
    if content["target"] is not None:
        raise SystemExit(f"{path.name} is frozen already")
    rows = results_rows(FILE)
    by_task = {task: [row for row in rows if row["task"] == task] for task in content["tasks"]}
    expected = len(list(lines(content)))
    for task, found in by_task.items():
        if len(found) != expected:
            raise SystemExit(f"{task}: {len(found)} of {expected} pilot runs are there; run {COMMAND} first")
    base = json.loads(FILE.read_text(encoding="utf-8"))["base"]
    outcomes = {
        task: outcome(found, target_of(found), base[task]["general_validation"]) for task, found in by_task.items()
    }
    pilot = {
        "command": COMMAND,
        "seed": content["pilot_seed"],
        "base_hash": rows[0]["base_hash"],
        "figures": "at_target and last: test split; forgetting = 1 - general / general of the base; "
        "forgetting_at_target_validation: the same on validation",
        **outcomes,
    }
    targets = {task: found["target"] for task, found in outcomes.items()}
    text = path.read_text(encoding="utf-8")
    for name, value in (("target", targets), ("pilot", pilot)):
        inner = json.dumps(value, indent=2).replace("\n", "\n  ")
        if text.count(f'"{name}": null') != 1:
            raise SystemExit(f'{path.name} has no line "{name}": null to fill')
        text = text.replace(f'"{name}": null', f'"{name}": {inner}')
    digest = frozen_digest(json.loads(text))
    path.write_text(text.rstrip()[:-1].rstrip() + f',\n  "sha256": "{digest}"\n}}\n', encoding="utf-8")
    print(json.dumps({task: {**o, "table": "..."} for task, o in outcomes.items()}, indent=1), digest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--freeze", action="store_true", help="write the outcome into the frozen file")
    if parser.parse_args().freeze:
        freeze()
    else:
        run()
