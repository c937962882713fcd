"""How much memory does a client take on the 135 M shape, beside full fine-tuning and adapters? One process at a time.

    PYTHONPATH=benchmarks python benchmarks/memory_m135.py      -> benchmarks/results/methods.json, key memory_m135

Peak anonymous memory above the imports, with the processes and the reading of bench_runtime.py: ours from opening the
checkpoint on, prefix pass included; the rivals' of their training steps alone, without their loading. fp32 for all, so
that all weights that train are exact; 512 tokens a step, 40 % of them targets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import psutil
from bench_runtime import CASES, WORK, Worker, highest, memory_line, prepared, versions
from rivals import Assigned
from starter_runs import RESULTS, put_entries

STEPS: Final = 2
LABEL_SHARE: Final = 0.4
OURS: Final = {
    "1 block, top": Assigned(placement="top", num_blocks=1),
    "2 blocks, thirds": Assigned(placement="thirds", num_blocks=2),
    "3 blocks, thirds": Assigned(placement="thirds", num_blocks=3),
}
DEFAULT: Final = "3 blocks, thirds"
FULL: Final = "full fine-tuning"
RIVALS: Final = {FULL: "full", "LoRA r=8": "lora", "QLoRA r=8": "qlora"}


def measure(*, threads: int, work: Path) -> dict[str, Any]:
    """Each system in a process of its own."""
    case = CASES["m135"]
    common = prepared("m135", case, threads=threads, work=work)
    systems: dict[str, dict[str, Any]] = {
        **{label: {"kind": "ours", "assigned": asdict(assigned)} for label, assigned in OURS.items()},
        **{label: {"kind": kind} for label, kind in RIVALS.items()},
    }
    found: dict[str, dict[str, Any]] = {}
    for label, system in systems.items():
        worker = Worker(do="memory", dtype="fp32", system=system, label_share=LABEL_SHARE, steps=STEPS, **common)
        found[label] = worker.answer()
        worker.close()
        print(f"{label}: {memory_line(found[label])}", flush=True)
    peaks = {label: highest(parts) if label in OURS else parts["train_peak_bytes"] for label, parts in found.items()}
    return {
        "ratio_full_ft": peaks[FULL] / peaks[DEFAULT],
        "ratios_full_ft": {label: peaks[FULL] / peaks[label] for label in peaks},
        "peak_anon_bytes": peaks,
        "imports_bytes": {label: parts["imports_bytes"] for label, parts in found.items()},
        "dtype": "fp32",
        "tokens_per_step": case.batch_size * case.tokens,
        "label_share": LABEL_SHARE,
        "steps": STEPS,
        **versions(threads),
    }


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="client memory on the 135 M shape")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--out", type=Path, default=RESULTS / "methods.json")
    parser.add_argument("--work", type=Path, default=WORK)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/memory_m135.py"
    entry = {"command": command, **measure(threads=options.threads, work=options.work)}
    put_entries(options.out, {"memory_m135": entry})


if __name__ == "__main__":
    main(sys.argv[1:])
