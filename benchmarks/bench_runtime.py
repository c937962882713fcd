"""How much faster and smaller is the client's training step than the usual stacks' on the same machine?

    make bench-runtime                                                   everything: benchmarks/results/runtime.json
    python benchmarks/bench_runtime.py --only m135_top2 --dtypes fp32    a part, merged into the same file
    python benchmarks/bench_runtime.py --only m135_top2 --quick          small, into runs/bench/quick.json

Each system is a process of its own that stays alive; the driver lets one of them at a time take one step, in turn, so
that all see the same machine. Times are process CPU time (all threads; threads wait asleep, not spinning) beside wall
time. A *series* is three passes over the same samples with a new optimizer; ours begins with the prefix pass and a new
cache. *Steady* is a step from the second pass on. Per repeat the mean, over repeats the median; a ratio is one of
medians. An entry without suffix is fp32 at 40 % label rows; ``_bf16`` and ``_all_labels`` say otherwise. A row's
``start_loss`` is that of the untrained model at 40 %: equal for ours and qlora, and for full and lora.

    speedup_vs_X_steady, speedup_vs_X_3_passes     CPU time of X over ours; wall_speedup_... the same of wall time
    ceiling_vs_X_steady, ceiling_vs_X_3_passes     the same ratio of the FLOPs of runtime.md 1.1: what would be
                                                   measured if X had as many FLOPs a second as ours
    X = qlora, lora, full; each with _label_only (our loss) too, at 40 %; no_cache, base_cut; see rivals.py

``llama1b_top1`` also has memory, bf16 for all: peak anonymous memory above the imports. Ours is the peak of everything
from opening the checkpoint on (the NF4 files are there); QLoRA's is that of its steps alone, without its loading.
``qlora`` is as its packages make it. It leaves embedding and head mapped from the file: pages that every step reads,
but not anonymous ones; ``_read`` has them read into memory, as ours does. ``_lean`` has adapters in bf16, where peft
makes them fp32.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil
from random_models import MODELS, RandomModel, write_random_model
from rivals import (
    LORA_RANK,
    RIVALS,
    Assigned,
    Data,
    Kind,
    Ours,
    Rival,
    Series,
    System,
    import_rivals,
    layout_of,
    quantised,
)
from starter_runs import RESULTS, machine, write_results

from fedblocks.profiles.cost import (
    ExecutionMode,
    StackLayout,
    Workload,
    forward_block_flops,
    frozen_block_flops,
    head_flops,
    step_flops,
    trained_block_flops,
)
from fedblocks.profiles.model_shape import ModelShape

PASSES: Final = 3
LABEL_SHARES: Final = {"": 0.4, "_all_labels": 1.0}
DTYPE_SUFFIX: Final = {"fp32": "", "bf16": "_bf16"}
WORK: Final = Path("runs/bench")
FULL_MEMORY_SHARE: Final = 0.4
"""Full fine-tuning takes part where its weights, gradients and moments are at most this share of the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model with the assignments and the batch that are measured on it."""

    model: RandomModel
    assignments: Mapping[str, Assigned]
    batch_size: int
    tokens: int = 256
    steps_per_pass: int = 1
    rivals: tuple[Kind, ...] = RIVALS

    @property
    def data(self) -> Data:
        """The samples of one pass."""
        return Data(
            sequences=self.batch_size * self.steps_per_pass,
            tokens=self.tokens,
            batch_size=self.batch_size,
            vocab=self.model.vocab,
        )


BOTH: Final = {
    "top2": Assigned(placement="top", num_blocks=2),
    "thirds2": Assigned(placement="thirds", num_blocks=2),
    "thirds2_highest": Assigned(placement="thirds", num_blocks=2, highest=1),
}
ONE: Final = {"top1": Assigned(placement="top", num_blocks=1)}
CASES: Final = {
    "m15": Case(model=MODELS["m15"], assignments=BOTH, batch_size=4, steps_per_pass=2),
    "m135": Case(model=MODELS["m135"], assignments=BOTH, batch_size=2, steps_per_pass=2),
    "qwen05": Case(model=MODELS["qwen05"], assignments=ONE, batch_size=1),
    "llama1b": Case(model=MODELS["llama1b"], assignments=ONE, batch_size=1, rivals=("lora", "qlora")),
}
MEMORY: Final = "llama1b_top1_memory"
MEMORY_CASE: Final = replace(CASES["llama1b"], batch_size=1, tokens=512)


# The process of one system


def worker_main(out: Any) -> None:
    """Reads one JSON line per command from stdin and answers each with one."""

    def answer(**fields: Any) -> None:
        out.write(json.dumps(fields) + "\n")
        out.flush()

    spec = json.loads(sys.stdin.readline())
    import torch

    torch.set_num_threads(spec["threads"])
    if spec["do"] == "prepare":
        model = RandomModel(**spec["model"])
        quantised(write_random_model(Path(spec["folder"]), model), Path(spec["work"]))
        answer(done=True)
    elif spec["do"] == "memory":
        answer(**_peaks(spec))
    else:
        system = _make(spec)
        try:
            answer(ready=True)
            for line in sys.stdin:
                command = json.loads(line)
                if command.pop("do") == "phases":
                    answer(**_phases(system, **command))
                else:
                    _serve_series(system, Series(**command), answer)
        finally:
            system.close()


def _make(spec: Mapping[str, Any]) -> System:
    data, folder = Data(**spec["data"]), Path(spec["folder"])
    chosen = dict(spec["system"])
    if chosen["kind"] in RIVALS:
        return Rival(folder, data=data, dtype=spec["dtype"], **chosen)
    del chosen["kind"]
    chosen["assigned"] = Assigned(**chosen["assigned"])
    if "mode" in chosen:
        chosen["mode"] = ExecutionMode(**chosen["mode"])
    return Ours(folder, Path(spec["work"]), data=data, dtype=spec["dtype"], **chosen)


def _clock() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _since(start: tuple[float, float]) -> dict[str, float]:
    now = _clock()
    return {"cpu_s": now[0] - start[0], "wall_s": now[1] - start[1]}


def _serve_series(system: System, wanted: Series, answer: Callable[..., None]) -> None:
    """One series; the system asks for each batch, and the driver says when it may have it."""
    start = _clock()
    system.fill()
    fill = _since(start)
    start = _clock()

    def batches() -> Iterator[int]:
        nonlocal start
        answer(fill=fill, begin=_since(start))
        for line in sys.stdin:
            index = json.loads(line)["batch"]
            start = _clock()
            yield index

    def done(loss: float) -> None:
        answer(loss=loss, **_since(start))

    system.series(wanted, batches(), done)


def _phases(system: System, label_share: float) -> dict[str, float]:
    """Shares of a prefix pass and of one steady step, from torch's profiler (wall time of the operations)."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from fedblocks.edge_client import backbone

    def decode(*arguments: Any, **more: Any) -> Any:
        with record_function("nf4_dequant"):  # the client calls it without a name that the profiler would see
            return undecorated(*arguments, **more)

    def shares(prefix: str, profiler: Any, **parts: str) -> dict[str, float]:
        events = profiler.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        return {
            f"{prefix}_{name}_share": sum(e.cpu_time_total for e in events if text in e.key) / total
            for name, text in parts.items()
        }

    undecorated = backbone.nf4_dequant
    backbone.nf4_dequant = decode
    try:
        with profile(activities=[ProfilerActivity.CPU]) as fill:
            system.fill()
    finally:
        backbone.nf4_dequant = undecorated
    step = profile(activities=[ProfilerActivity.CPU])

    def batches() -> Iterator[int]:
        yield 0
        step.start()
        yield 0

    ended = iter((lambda: None, step.stop))
    system.series(Series(steps=2, label_share=label_share), batches(), lambda _: next(ended)())
    return {
        **shares("prefix", fill, decode="nf4_dequant", attention="scaled_dot_product_flash_attention_for_cpu"),
        **shares("step", step, head="LinearCrossEntropy", attention="scaled_dot_product_flash_attention_for_cpu"),
    }


def _peaks(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Peak anonymous memory above the imports, and seconds, while a system is made, filled, and trained."""
    from fedblocks.edge_client.memory import PeakMemory, anonymous_bytes, give_back_freed_memory, return_large_blocks

    if spec["system"]["kind"] in RIVALS:
        import_rivals()
    else:
        return_large_blocks()  # as the client does; the rivals run with what their users have
    gc.collect()
    give_back_freed_memory()
    imports, mapped = anonymous_bytes(), _status_bytes("RssFile")
    with PeakMemory(imports) as loading:
        system = _make(spec)
    start = _clock()
    with PeakMemory(imports) as filling:
        system.fill()
    fill = _since(start)
    steps: list[dict[str, float]] = []

    def batches() -> Iterator[int]:
        nonlocal start
        for index in itertools.cycle(range(system.data.num_batches)):
            start = _clock()
            yield index

    with PeakMemory(imports) as training:
        wanted = Series(steps=spec["steps"], label_share=spec["label_share"])
        system.series(wanted, batches(), lambda loss: steps.append({"loss": loss, **_since(start)}))
    mapped = _status_bytes("RssFile") - mapped
    system.close()
    return {
        "imports_bytes": imports,
        "load_peak_bytes": loading.peak_bytes,
        "fill_peak_bytes": filling.peak_bytes,
        "train_peak_bytes": training.peak_bytes,
        "mapped_bytes": mapped,
        "hwm_bytes": _status_bytes("VmHWM"),
        "fill": fill,
        "steps": steps,
    }


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    return 0


class Worker:
    """The driver's end of one system's process."""

    def __init__(self, *, threads: int, **spec: Any) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))),
            "PYTHONSAFEPATH": "1",
            "KINETO_LOG_LEVEL": "99",  # the profiler's own lines
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._send({"threads": threads, **spec})

    def _send(self, fields: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line.

        Raises:
            RuntimeError: the process ended; its stderr went to ours.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a benchmark process ended with status {self._process.wait()}; see its text above")
        return json.loads(line)

    def ask(self, **fields: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer."""
        self._send(fields)
        return self.answer()

    def close(self) -> None:
        """Lets the process end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


# What is measured


@dataclass(slots=True, kw_only=True)
class Measured:
    """One system in one condition: per repeat the seconds of its parts, CPU and wall."""

    fill: list[dict[str, float]]
    begin: list[dict[str, float]]
    steps: list[list[dict[str, float]]]

    def steady(self, clock: str) -> list[float]:
        """Mean step from the second pass on, per repeat."""
        return [statistics.fmean(s[clock] for s in steps[len(steps) // PASSES :]) for steps in self.steps]

    def passes(self, clock: str) -> list[float]:
        """The whole series, per repeat."""
        return [
            fill[clock] + begin[clock] + sum(s[clock] for s in steps)
            for fill, begin, steps in zip(self.fill, self.begin, self.steps, strict=True)
        ]

    def row(self) -> dict[str, Any]:
        """The figures of the results file."""
        found: dict[str, Any] = {"repeats": len(self.steps)}
        for clock in ("cpu_s", "wall_s"):
            for name, values in (
                ("step", self.steady(clock)),
                ("passes", self.passes(clock)),
                ("prefix", [fill[clock] for fill in self.fill]),
            ):
                found[f"{name}_{clock}"] = statistics.median(values)
                found[f"{name}_{clock}_range"] = [min(values), max(values)]
        return found


def measure(workers: Mapping[str, Worker], wanted: Series, *, repeats: int, num_batches: int) -> dict[str, Measured]:
    """All systems in one condition, step by step in turn."""
    found = {name: Measured(fill=[], begin=[], steps=[]) for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            began = worker.ask(do="series", **asdict(wanted))
            found[name].fill.append(began["fill"])
            found[name].begin.append(began["begin"])
            found[name].steps.append([])
        for step in range(wanted.steps):
            for name, worker in workers.items():
                found[name].steps[-1].append(worker.ask(batch=step % num_batches))
    return found


def systems_of(case: Case, chosen: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> what :func:`_make` needs, of the rivals and of ours in the chosen assignments."""
    systems: dict[str, dict[str, Any]] = {}
    for name in chosen:
        ours = {"kind": "ours", "assigned": asdict(case.assignments[name])}
        systems[f"ours {name}"] = ours
        systems[f"no_cache {name}"] = {**ours, "cached": False}
        if case.assignments[name].highest:
            systems[f"base_cut {name}"] = {**ours, "round_cut": False}
    return systems | {kind: {"kind": kind} for kind in case.rivals}


def run_case(
    name: str, case: Case, chosen: Sequence[str], *, dtype: str, repeats: int, threads: int, work: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One model in one dtype: the entries of the results file and its rows."""
    common = prepared(name, case, threads=threads, work=work)
    spec = {**common, "do": "train", "dtype": dtype}
    case = _without_what_does_not_fit(case, dtype)
    num_batches = case.data.num_batches
    series = Series(steps=PASSES * num_batches, label_share=0.4)
    entries: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    workers: dict[str, Worker] = {}
    try:
        for system, made in systems_of(case, chosen).items():
            workers[system] = Worker(system=made, **spec)
        for worker in workers.values():
            worker.answer()
        rivals = {kind: workers[kind] for kind in case.rivals}
        warm_up = replace(series, steps=1)
        warm = measure(workers, warm_up, repeats=1, num_batches=1)
        for suffix, share in LABEL_SHARES.items():
            wanted = replace(series, label_share=share)
            found = measure(workers, wanted, repeats=repeats, num_batches=num_batches)
            if not suffix:  # with every row labelled their own loss is nearly ours
                label_only = measure(
                    rivals, replace(wanted, loss="label_only"), repeats=repeats, num_batches=num_batches
                )
                found |= {f"{kind}_label_only": measured for kind, measured in label_only.items()}
            for assignment in chosen:
                entry = f"{name}_{assignment}{DTYPE_SUFFIX[dtype]}{suffix}"
                mine = {_plain(system, assignment): m for system, m in found.items() if _plain(system, assignment)}
                phases = workers[f"ours {assignment}"].ask(do="phases", label_share=share)
                entries[entry] = {
                    "dtype": dtype,
                    "label_share": share,
                    "tokens_per_step": case.batch_size * case.tokens,
                    "tokens_per_sequence": case.tokens,
                    "steps_per_pass": num_batches,
                    "threads": threads,
                    "repeats": repeats,
                    **_ratios(case, assignment, share, mine),
                    "phases": phases,
                    "parameters": case.model.shape.total_parameters,
                    **({"skipped": skipped} if (skipped := _skipped(case)) else {}),
                    **versions(threads),
                }
                for system, measured in mine.items():
                    flops = _flops(case, assignment, share, system)
                    row = {"entry": entry, "system": system, **measured.row()}
                    row["gflop_per_cpu_s"] = flops / row["step_cpu_s"] / 1e9
                    for key in (system, f"{system} {assignment}"):
                        if key in warm:
                            row["start_loss"] = warm[key].steps[0][0]["loss"]
                    rows.append(row)
                print(_line(entry, entries[entry]), flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return entries, rows


def prepared(name: str, case: Case, *, threads: int, work: Path) -> dict[str, Any]:
    """Writes and quantises the model where that is still to be done; what all its workers are told."""
    folder = work / name
    common = {"folder": str(folder), "work": str(work), "threads": threads, "data": asdict(case.data)}
    worker = Worker(do="prepare", model=asdict(case.model), **common)
    worker.answer()
    worker.close()
    return common


def _full_bytes(case: Case, dtype: str) -> int:
    return case.model.shape.total_parameters * (16 if dtype == "fp32" else 8)


def _without_what_does_not_fit(case: Case, dtype: str) -> Case:
    if _full_bytes(case, dtype) <= FULL_MEMORY_SHARE * psutil.virtual_memory().total:
        return case
    return replace(case, rivals=tuple(kind for kind in case.rivals if kind != "full"))


def _skipped(case: Case) -> str:
    if "full" in case.rivals:
        return ""
    gigabytes = _full_bytes(case, "fp32") / 1e9
    return f"full fine-tuning: {gigabytes:.1f} GB of weights, gradients and moments in fp32"


def _plain(system: str, assignment: str) -> str:
    """The system's name without its assignment; empty if it belongs to another one."""
    name, _, of = system.partition(" ")
    return name if of in ("", assignment) else ""


def _ratios(case: Case, assignment: str, label_share: float, measured: Mapping[str, Measured]) -> dict[str, float]:
    ours = measured["ours"]
    own = _flops(case, assignment, label_share, "ours")
    own_passes = PASSES * own + _fill_flops(case, assignment, "ours")
    found: dict[str, float] = {}
    for system, other in measured.items():
        if system == "ours":
            continue
        for prefix, clock in (("", "cpu_s"), ("wall_", "wall_s")):
            for kind, seconds in (("steady", Measured.steady), (f"{PASSES}_passes", Measured.passes)):
                ratio = statistics.median(seconds(other, clock)) / statistics.median(seconds(ours, clock))
                found[f"{prefix}speedup_vs_{system}_{kind}"] = ratio
        theirs = _flops(case, assignment, label_share, system)
        their_passes = PASSES * theirs + _fill_flops(case, assignment, system)
        found[f"ceiling_vs_{system}_steady"] = theirs / own
        found[f"ceiling_vs_{system}_{PASSES}_passes"] = their_passes / own_passes
    return dict(sorted(found.items()))


# FLOPs of one step (runtime.md 1.1)


def _layout(case: Case, assignment: str) -> tuple[StackLayout, tuple[int, ...]]:
    plan = case.assignments[assignment].plan(case.model.config(), "0" * 64)
    return layout_of(plan), case.assignments[assignment].trained(plan)


def _fill_flops(case: Case, assignment: str, system: str) -> float:
    """Of the prefix pass over the samples of one step; 0 for what has no cache."""
    if system not in ("ours", "base_cut"):
        return 0.0
    layout, trained = _layout(case, assignment)
    cut = layout.base_cut if system == "base_cut" else min(layout.positions[block] for block in trained)
    return case.batch_size * case.tokens * cut * forward_block_flops(case.model.shape, case.tokens)


def _flops(case: Case, assignment: str, label_share: float, system: str) -> float:
    """Of one steady step."""
    shape, tokens = case.model.shape, case.batch_size * case.tokens
    kind = system.removesuffix("_label_only")
    if kind in RIVALS:
        share = 1.0 if kind == system else label_share  # transformers computes the head for every token
        return tokens * _rival_flops(shape, kind, case.tokens, share)
    layout, trained = _layout(case, assignment)
    work = Workload(
        batch_size=case.batch_size,
        micro_batch_size=case.batch_size,
        mean_tokens=case.tokens,
        max_tokens=case.tokens,
        label_share=label_share,
        steps=1,
    )
    if system != "base_cut":  # what lies below the lowest block that trains is cached for the round
        low = min(layout.positions[block] for block in trained)
        layout = replace(layout, positions={b: p for b, p in layout.positions.items() if p >= low})
    step = step_flops(shape, layout, trained, work)
    return step + (_fill_flops(case, assignment, "ours") if system == "no_cache" else 0)


def _rival_flops(shape: ModelShape, kind: str, context: int, head_share: float) -> float:
    """Per token; the pairs of LoRA cost 6 FLOPs per parameter."""
    if kind == "full":
        return shape.num_layers * trained_block_flops(shape, context) + 1.5 * head_flops(shape, head_share)
    pairs = LORA_RANK * sum(sum(spec.shape) for spec in shape.block_tensors() if len(spec.shape) == 2)
    return shape.num_layers * (frozen_block_flops(shape, context) + 6.0 * pairs) + head_flops(shape, head_share)


# Memory


def run_memory(case: Case, name: str, *, threads: int, work: Path, label_share: float = 0.4) -> dict[str, Any]:
    """Peak anonymous memory of ours in its exact and its 8-bit mode, and of QLoRA, in bf16; one process at a time."""
    common = prepared(name, case, threads=threads, work=work)
    assigned = asdict(next(iter(case.assignments.values())))
    found: dict[str, dict[str, Any]] = {}
    for label, system in (
        ("ours", {"kind": "ours", "assigned": assigned}),
        ("ours_8bit", {"kind": "ours", "assigned": assigned, "mode": {"optimizer": "split_8bit"}}),
        ("qlora", {"kind": "qlora"}),
        ("qlora_read", {"kind": "qlora", "mapped": False}),
        ("qlora_lean", {"kind": "qlora", "lean": True}),
        ("qlora_lean_read", {"kind": "qlora", "lean": True, "mapped": False}),
    ):
        worker = Worker(do="memory", dtype="bf16", system=system, label_share=label_share, steps=2, **common)
        found[label] = worker.answer()
        worker.close()
        print(f"{name} {label}: {memory_line(found[label])}", flush=True)
    exact, rounded = highest(found["ours"]), highest(found["ours_8bit"])
    rivals = {label: parts["train_peak_bytes"] for label, parts in found.items() if label.startswith("qlora")}
    return {
        "peak_anon_bytes": exact,
        "peak_anon_bytes_8bit": rounded,
        **{f"peak_anon_bytes_{label}": peak for label, peak in rivals.items()},
        **{f"peak_anon_ratio_vs_{label}": exact / peak for label, peak in rivals.items()},
        **{f"peak_anon_ratio_8bit_vs_{label}": rounded / peak for label, peak in rivals.items()},
        "memory": {
            "dtype": "bf16",
            "label_share": label_share,
            "tokens_per_step": case.batch_size * case.tokens,
            "steps": 2,
            "imports_bytes": {label: parts["imports_bytes"] for label, parts in found.items()},
            "parts": found,
            **versions(threads),
        },
    }


def highest(found: Mapping[str, Any]) -> int:
    """The peak over loading, prefix pass and training, bytes above the imports."""
    return max(found[f"{part}_peak_bytes"] for part in ("load", "fill", "train"))


def memory_line(found: Mapping[str, Any]) -> str:
    """The figures of one process, for people."""
    sizes = {key.removesuffix("_bytes"): value / 2**20 for key, value in found.items() if key.endswith("_bytes")}
    return ", ".join(f"{key} {value:.0f} MiB" for key, value in sizes.items())


# The results file


def versions(threads: int) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    known = machine()
    rivals = {name: importlib.metadata.version(name) for name in ("peft", "bitsandbytes")}
    return {
        "device": re.sub(r"\d+ thread", f"{threads} thread" + ("s" if threads > 1 else ""), known["device"]),
        "processor": _processor(),
        "versions": {**known["versions"], **rivals},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def merge_results(path: Path, command: str, entries: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Puts entries and rows into the results file; fields of an entry that are not given again stay, and so do rows."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    held.pop("command", None)
    old_rows = [row for row in held.pop("rows", []) if row["entry"] not in {new["entry"] for new in rows}]
    for name, entry in entries.items():
        held[name] = {**held.get(name, {}), **entry}
    write_results(path, command, [*old_rows, *rows], **held)


def _line(name: str, entry: Mapping[str, Any]) -> str:
    keys = [f"speedup_vs_{kind}_{part}" for part in ("steady", f"{PASSES}_passes") for kind in RIVALS]
    return f"{name}: " + ", ".join(f"{key} {entry[key]:.2f}" for key in keys if key in entry)


def quick(case: Case) -> Case:
    """The same with one sequence and one step per pass."""
    return replace(case, batch_size=1, steps_per_pass=1)


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    names = [f"{name}_{assignment}" for name, case in CASES.items() for assignment in case.assignments]
    parser = argparse.ArgumentParser(description="speed and memory of a training step against the usual stacks")
    parser.add_argument("--only", nargs="+", choices=[*names, MEMORY], default=[*names, MEMORY])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPE_SUFFIX), default=list(DTYPE_SUFFIX))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--quick", action="store_true", help="one sequence per step; not for the results file")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=WORK, help="models, 4-bit files and caches")
    options = parser.parse_args(arguments)
    out = options.out or (options.work / "quick.json" if options.quick else RESULTS / "runtime.json")
    command = "python benchmarks/bench_runtime.py"
    options.work.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        chosen = [a for a in case.assignments if f"{name}_{a}" in options.only]
        for dtype in options.dtypes if chosen else ():
            entries, rows = run_case(
                name,
                quick(case) if options.quick else case,
                chosen,
                dtype=dtype,
                repeats=options.repeats,
                threads=options.threads,
                work=options.work,
            )
            merge_results(out, command, entries, rows)
    if MEMORY in options.only:
        found = run_memory(MEMORY_CASE, "llama1b", threads=options.threads, work=options.work)
        merge_results(out, command, {"llama1b_top1": found})


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
            os.dup2(2, 1)  # what a library prints goes to stderr
            worker_main(stream)
    else:
        main(sys.argv[1:])
