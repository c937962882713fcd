"""Is a training step slower or faster than in another checkout of this project? CPU time of both, in turns.

    python benchmarks/bench_versions.py --other DIR    # DIR: a checkout with its own .venv, made by its `make setup`

Both run the same steps on the same random models and cached states; step by step in turns, so that what else the
machine does falls on both; the figures are medians of ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import bench_runtime
from bench_runtime import CASES, Series, Worker, prepared, systems_of, versions

CASES_COMPARED: Final = {"m15": ("top2", "thirds2"), "m135": ("top2",)}
OUT: Final = Path(__file__).parent / "results" / "versions.json"
WORK: Final = Path(__file__).parents[1] / "runs" / "bench"


def worker_of(checkout: Path, **spec: Any) -> Worker:
    """A process of that checkout's own interpreter and code."""
    here, python = bench_runtime.__file__, sys.executable
    bench_runtime.__file__ = str(checkout / "benchmarks" / "bench_runtime.py")
    sys.executable = str(checkout / ".venv" / "bin" / "python")
    try:
        return Worker(**spec)
    finally:
        bench_runtime.__file__, sys.executable = here, python


def commit_of(checkout: Path) -> str:
    """Its commit, with a mark if files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def compare(other: Path, *, repeats: int, threads: int, dtype: str, work: Path) -> dict[str, Any]:
    """Entry -> ratio of CPU time of this checkout over the other's: below 1 is faster."""
    here = Path(__file__).parents[1]
    found: dict[str, Any] = {}
    for name, assignments in CASES_COMPARED.items():
        case = CASES[name]
        spec = {**prepared(name, case, threads=threads, work=work), "do": "train", "dtype": dtype}
        for assignment in assignments:
            system = systems_of(case, [assignment])[f"ours {assignment}"]
            workers = {key: worker_of(at, system=system, **spec) for key, at in (("other", other), ("this", here))}
            try:
                for worker in workers.values():
                    worker.answer()
                wanted = Series(steps=bench_runtime.PASSES * case.data.num_batches, label_share=0.4)
                bench_runtime.measure(workers, wanted, repeats=1, num_batches=1)  # warms up and fills the caches
                measured = bench_runtime.measure(workers, wanted, repeats=repeats, num_batches=case.data.num_batches)
            finally:
                for worker in workers.values():
                    worker.close()
            times = [measured[key].steady("cpu_s") for key in ("this", "other")]
            ratios = [this / that for this, that in zip(*times, strict=True)]
            losses = [measured[key].steps[0][-1]["loss"] for key in ("this", "other")]
            entry = f"{name}_{assignment}_{dtype}"
            found[entry] = {"ratio": statistics.median(ratios), "ratios": ratios, "losses": losses}
            print(f"{entry:<24} {found[entry]['ratio']:.3f}  ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    return found


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, default=WORK)
    chosen = parser.parse_args()
    other = chosen.other.resolve()
    entries: dict[str, Any] = {}
    for dtype in chosen.dtypes:
        entries |= compare(other, repeats=chosen.repeats, threads=chosen.threads, dtype=dtype, work=chosen.work)
    result = {
        "command": "python benchmarks/bench_versions.py --other DIR",
        "this": commit_of(Path(__file__).parents[1]),
        "other": commit_of(other),
        **versions(chosen.threads),
        "cpu_time_over_the_other": entries,
    }
    chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
