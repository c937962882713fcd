"""Does a block of a 7B model train in the memory of a small board? Peak memory and time per token, in exact weights.

    make bench-7b                                       benchmarks/results/runtime_7b.json
    python benchmarks/bench_7b.py --layers 4 --out X    fewer layers, for a try; the JSON says so

Qwen2.5-7B's sizes with random weights: bf16 shards (15 GB) are written into a temporary folder, quantised layer by
layer (4 GB), and all of it is removed at the end. One expanded block on top trains for a few steps in bf16 with exact
fp32 weights (optimizer mode ``split``). The peak is anonymous memory above the imports, over opening, prefix pass and
training. Less than 25 GB of free disk: a message, and nothing is done.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import psutil
from bench_runtime import ONE, WORK, Case, Worker, highest, memory_line, prepared, versions
from random_models import MODELS, RandomModel
from starter_runs import RESULTS, write_results

NEEDED_BYTES: Final = 25 * 10**9
TOKENS: Final = 512
LABEL_SHARE: Final = 0.4


def run(model: RandomModel, *, steps: int, optimizer: str, threads: int, work: Path) -> dict[str, Any]:
    """Writes, quantises and trains; the figures.

    Args:
        work: everything is written below it, and stays.
    """
    case = Case(model=model, assignments=ONE, batch_size=1, tokens=TOKENS)
    began = time.monotonic()
    common = prepared("model", case, threads=threads, work=work)
    prepare_s = time.monotonic() - began
    system = {"kind": "ours", "assigned": asdict(ONE["top1"]), "mode": {"optimizer": optimizer}}
    worker = Worker(do="memory", dtype="bf16", system=system, label_share=LABEL_SHARE, steps=steps, **common)
    found = worker.answer()
    worker.close()
    print(memory_line(found), flush=True)
    later = found["steps"][1:] or found["steps"]
    return {
        "layers": model.layers,
        "parameters": model.shape.total_parameters,
        "dtype": "bf16",
        "optimizer": optimizer,
        "tokens_per_step": TOKENS,
        "label_share": LABEL_SHARE,
        "peak_anon_bytes": highest(found),
        "write_and_quantise_s": prepare_s,
        "prefix_cpu_s_per_token": found["fill"]["cpu_s"] / TOKENS,
        "prefix_wall_s_per_token": found["fill"]["wall_s"] / TOKENS,
        "suffix_cpu_s_per_token": statistics.median(step["cpu_s"] for step in later) / TOKENS,
        "suffix_wall_s_per_token": statistics.median(step["wall_s"] for step in later) / TOKENS,
        "parts": found,
        **versions(threads),
    }


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    full = MODELS["qwen7b"]
    parser = argparse.ArgumentParser(description="one block of a 7B model: peak memory, time per token")
    parser.add_argument("--layers", type=int, default=full.layers, help="fewer than the model has: a try")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--optimizer", choices=["split", "split_8bit"], default="split")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--out", type=Path, default=RESULTS / "runtime_7b.json")
    parser.add_argument("--work", type=Path, default=WORK, help="where the temporary folder is made")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    model = replace(full, layers=options.layers)
    free = shutil.disk_usage(options.work).free
    needed = NEEDED_BYTES * model.num_bytes // full.num_bytes
    if free < needed:
        print(f"skipped: {options.work} has {free / 1e9:.1f} GB of free disk, this benchmark needs {needed / 1e9:.1f}")
        return
    with tempfile.TemporaryDirectory(prefix="7b-", dir=options.work) as folder:
        figures = run(
            model, steps=options.steps, optimizer=options.optimizer, threads=options.threads, work=Path(folder)
        )
    write_results(options.out, "python benchmarks/bench_7b.py", [], **figures)
    print(f"peak {figures['peak_anon_bytes'] / 2**30:.2f} GiB, of a model of {figures['parameters'] / 1e9:.2f} billion")


if __name__ == "__main__":
    main(sys.argv[1:])
