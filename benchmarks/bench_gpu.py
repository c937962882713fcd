"""What do the kernels and a training step give on this GPU, against the device's own limits and against others?

    make bench-gpu                                          everything: benchmarks/results/gpu-<device>-<date>.json
    python benchmarks/bench_gpu.py --device cpu --tiny      the same code on a CPU with tiny sizes, in a minute

Under eight minutes by a time budget; what the budget leaves out has a row that says so, and what raises has a row with
its error. What leaves the device unusable ends the process: a new one takes its place and goes on without the culprit.
The file is written after each part.

peaks        copy bandwidth and the rate of a bf16 product on random data: what the other figures are shares of
operations   every operation of kernels/ on the sizes of three models: first held against float64 (gpu_operations.py);
             a rung that is wrong is not timed. Rungs and peers take turns, one sample each
steps        training steps of three models with random weights, with peak memory and the prediction (gpu_steps.py)

A sample is the time between two CUDA events with the last-level cache emptied before; on a CPU it is wall time. Steps
are wall time from an idle device to an idle device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from gpu_operations import RUNGS, measure_operations
from gpu_steps import ASSIGNMENTS, GRAPHS, import_peers, measure_model
from gpu_timing import (
    Budget,
    DeviceLostError,
    Timer,
    clocks,
    describe_error,
    device_facts,
    measure_peaks,
    slug,
    versions,
)
from random_models import MODELS, RandomModel
from rivals import Data
from starter_runs import RESULTS

from fedblocks.edge_client.kernel_choice import choose_kernels
from fedblocks.kernels.dispatch import LADDER, OPERATIONS
from fedblocks.kernels.ops import DISPATCHER
from fedblocks.protocol.site_file import KernelsSettings

SCHEMA: Final = 1
WORK: Final = Path("runs/bench-gpu")
SECONDS: Final = 440.0
"""For everything; half a minute more for the imports and the last system to end."""
SHAPES: Final = {"llama1b": 0.45, "qwen05": 0.45, "qwen7b": 1.0}
"""Name of the model -> share of the time left when its steps are due."""
NAMES: Final = {"llama1b": "Llama-3.2-1B", "qwen05": "Qwen2.5-0.5B", "qwen7b": "Qwen2.5-7B"}
SEQUENCE: Final = 512
STEP_TOKENS: Final = (2048, 8192)
STEPS_PER_PASS: Final = 2
TINY: Final[dict[str, Any]] = {
    "layers": 3, "hidden": 64, "intermediate": 128, "heads": 2, "kv_heads": 1, "head_dim": 32, "vocab": 512,
}  # fmt: skip


def shapes(names: Sequence[str], *, tiny: bool) -> dict[str, RandomModel]:
    """The models, or models of their families with tiny sizes."""
    return {name: replace(MODELS[name], **TINY) if tiny else MODELS[name] for name in names}


def sizes(model: RandomModel, *, tiny: bool) -> list[Data]:
    """The batches of a step."""
    if tiny:
        return [Data(sequences=2, tokens=16, batch_size=2, vocab=model.vocab)]
    return [
        Data(
            sequences=STEPS_PER_PASS * tokens // SEQUENCE,
            tokens=SEQUENCE,
            batch_size=tokens // SEQUENCE,
            vocab=model.vocab,
        )
        for tokens in STEP_TOKENS
    ]


def run(
    *,
    device: torch.device,
    tiny: bool,
    seconds: float,
    out: Path,
    work: Path,
    models: Sequence[str],
    parts: Sequence[str],
    assignments: Sequence[str] = tuple(ASSIGNMENTS),
    resume: bool = False,
) -> dict[str, Any]:
    """Measures, writes ``out`` after each part, and returns what is in it.

    Args:
        resume: go on with what ``out`` holds, without what is in its list ``lost``.

    Raises:
        DeviceLostError: this process cannot go on; ``out`` says what it has and to whom the device was lost.
    """
    began = time.monotonic()
    budget = Budget(seconds)
    peers = _warm_imports()
    timer = Timer(device)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "command": "make bench-gpu" if not tiny else "python benchmarks/bench_gpu.py --tiny",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "tiny": tiny,
        "device": device_facts(device),
        "versions": versions(),
        "peers": peers,
        "clocks_before": clocks(),
        "rungs": {name: _rung_state(name, device) for name in RUNGS},
        "graphs": GRAPHS,
        "operations": [],
        "steps": [],
        "lost": [],
        "seconds": {},
    }
    if resume:
        held = json.loads(out.read_text(encoding="utf-8"))
        found |= {key: held[key] for key in ("clocks_before", "operations", "steps", "lost", "seconds")}
    peaks = measure_peaks(timer, Budget(0.3 if tiny else 8.0), size=256 if tiny else 8192)
    found["peaks"] = peaks.entries
    _write(out, found)
    print(peaks_line(found), flush=True)
    chosen = shapes(models, tiny=tiny)
    if "operations" in parts:
        part = time.monotonic()
        try:
            found["operations"] = measure_operations(
                {name: model.shape for name, model in chosen.items()},
                timer,
                peaks,
                budget.part(0.35 if "steps" in parts else 1.0),
                tokens=32 if tiny else STEP_TOKENS[0],
                compile_with="eager" if tiny else "inductor",
                done=found["operations"],
                lost={(lost["in"], lost["backend"]) for lost in found["lost"]},
            )
        except DeviceLostError as error:
            found["operations"] = error.rows
            _lose(error, found, out)
        found["seconds"].setdefault("operations", time.monotonic() - part)
        _write(out, found)
    found["kernels"] = _choose_kernels(found["operations"], device, work)
    for place, (name, model) in enumerate(chosen.items() if "steps" in parts else ()):
        if f"steps {name}" in found["seconds"]:
            continue
        part = time.monotonic()
        try:
            found["steps"] += measure_model(
                name,
                model,
                timer,
                peaks,
                budget.part(SHAPES[name]),
                work=work,
                sizes=sizes(model, tiny=tiny),
                assignments=assignments[:1] if tiny and place else assignments,
                lost={lost["backend"] for lost in found["lost"] if lost["in"] == name},
            )
        except DeviceLostError as error:
            _lose(error, found, out)
        found["seconds"][f"steps {name}"] = time.monotonic() - part
        _write(out, found)
    found["falls"] = [{"event": str(event), "count": count} for event, count in DISPATCHER.counts.items()]
    found["clocks_after"] = clocks()
    found["seconds"]["all"] = time.monotonic() - began
    _write(out, found)
    return found


def _lose(error: DeviceLostError, found: dict[str, Any], out: Path) -> NoReturn:
    found["lost"].append({"in": error.culprit[0], "backend": error.culprit[1]})
    _write(out, found)
    raise error


def _choose_kernels(rows: Sequence[Mapping[str, Any]], device: torch.device, work: Path) -> dict[str, Any] | None:
    """As a client does before it trains; and no rung serves an operation that it was found to compute wrongly."""
    chosen = choose_kernels(work, KernelsSettings(), device, say=print, again=True)
    wrong = {(row["op"], row["backend"]) for row in rows if row["status"] in ("wrong", "error")}
    for op in OPERATIONS:
        if any((op, rung) in wrong for rung in LADDER):
            left = tuple(rung for rung in LADDER if (op, rung) not in wrong)
            for dtype, size in itertools.product(("bfloat16", "float32", "uint8"), ("small", "large")):
                DISPATCHER.choose(op, dtype, size, left)  # type: ignore[arg-type]
    return None if chosen is None else chosen.to_plain()


def _warm_imports() -> dict[str, str]:
    """Imports the peers before anything is timed; which of them are there."""
    warnings.simplefilter("ignore")
    found: dict[str, str] = {}
    for name, load in (("transformers, peft, bitsandbytes", import_peers), ("liger_kernel", _import_liger)):
        try:
            load()
            found[name] = "there"
        except Exception as error:  # noqa: BLE001 - a broken installation is a missing peer
            found[name] = f"missing: {describe_error(error)}"
    return found


def _import_liger() -> None:
    import liger_kernel.transformers  # noqa: F401


def _rung_state(name: str, device: torch.device) -> str:
    if name == "torch":
        return "there"
    rung = DISPATCHER.rungs_by_name.get(name)
    if rung is None:
        return "not part of this installation"
    return rung.missing(device) or "there"


def _write(path: Path, found: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def peaks_line(found: Mapping[str, Any]) -> str:
    """Device and limits, for people."""
    copy, product = found["peaks"]["copy"]["bytes_per_s"], found["peaks"]["gemm_bf16"]["flops_per_s"]
    return f"{found['device']['name']}: copy {copy / 1e9:.0f} GB/s, bf16 product {product / 1e12:.2f} TFLOP/s"


def table(found: Mapping[str, Any]) -> str:
    """What was found, for people: operations by their share of the device's limit, then steps."""
    lines = [peaks_line(found), "", "operation, size: median us of each backend (share of the device's limit)"]
    cases: dict[tuple[str, str, str], list[str]] = {}
    for row in found["operations"]:
        cell = (
            f"{row['backend']} {row['median_s'] * 1e6:.1f} ({row['share_of_peak']:.0%})"
            if row["status"] == "ok" and "median_s" in row
            else f"{row['backend']} {row['status']}"
        )
        cases.setdefault((row["shape"], row["op"], row["form"]), []).append(cell)
    lines += [f"  {' '.join(case)}: {', '.join(cells)}" for case, cells in cases.items()]
    lines += ["", "steps: tokens/s of one step, over three passes, share of the roofline, peak GiB"]
    for row in found["steps"]:
        name = f"  {row['shape']} {row['system']} {row['assignment']}, {row['tokens_per_step']} x {row['labels']:.0%}"
        if row["status"] == "ok":
            against = ", ".join(f"{v['speedup_passes']:.1f}x {k}" for k, v in row.get("against", {}).items())
            lines.append(
                f"{name}: {row['tokens_per_s_step']:.0f}, {row['tokens_per_s_passes']:.0f}, "
                f"{row['share_of_roofline']:.0%}, {row['peak_bytes'] / 2**30:.2f}" + (f"; {against}" if against else "")
            )
        else:
            lines.append(f"{name}: {row['status']}, {row['reason']}")
    lines += ["", f"CUDA graphs: {found['graphs']}"]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """The command line; 2 where there is no such device."""
    parser = argparse.ArgumentParser(description="kernels and training steps on one GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: for trying the code, not for figures")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time budget")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=("operations", "steps"), default=["operations", "steps"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on with the file of a run that lost the device")
    parser.add_argument("--work", type=Path, default=WORK, help="4-bit files and caches")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "there is no CUDA device here; --device cpu --tiny runs the same code on this machine's CPU",
            file=sys.stderr,
        )
        return 2
    device = torch.device(options.device, 0 if options.device == "cuda" else None)
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = slug(device_facts(device)["name"])
    date = time.strftime("%Y-%m-%d", time.gmtime())
    real = device.type == "cuda" and not options.tiny
    out = options.out or (RESULTS if real else options.work) / f"gpu-{name}-{date}.json"
    began = time.monotonic()
    try:
        found = run(
            device=device,
            tiny=options.tiny,
            seconds=options.seconds,
            out=out,
            work=options.work,
            models=options.models,
            parts=options.parts,
            resume=options.resume,
        )
    except DeviceLostError as error:
        left = options.seconds - (time.monotonic() - began)
        if left <= 0:
            print(f"{error}; no time is left to go on. What was measured is in {out}", file=sys.stderr)
            return 1
        print(f"{error}; a new process goes on without it", flush=True)
        again = [word for word in arguments if word != "--resume"]
        more = ["--resume", "--out", str(out), "--seconds", str(left)]
        os.execv(sys.executable, [sys.executable, str(Path(__file__)), *again, *more])
    print(table(found))
    print(f"\nwritten to {out} in {found['seconds']['all']:.0f} s")
    if real:
        print("python benchmarks/runtime_document.py puts it into docs/results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
