"""Is the predicted memory the memory that a client takes? Whole tasks of the client, predicted and measured.

    make bench-memory                                             everything: benchmarks/results/memory.json
    python benchmarks/bench_memory.py --only m15 --out FILE       a part, into another file

Each point is a process of its own that imports the client's libraries, takes its anonymous memory as zero, and carries
out one assignment as the client does (``edge_client/work.py``): measuring, the first pass over the samples, three
steps, the change and its encoding. With the bundled model it does so eight times: steps are shorter than the samples of
memory there, and the few MiB that stay from task to task are a share of the peak. The peak is that of anonymous memory
(RssAnon + RssShmem, every 20 ms). Models are random (sizes are what counts) or the bundled one; their 4-bit files are
made before, by another process.

An *error* is predicted over measured, less one: below zero the prediction was too low.

    memory_model.median_error, .max_error        of the errors' magnitudes
    memory_model.max_error_mib                   the largest difference where the error is above a tenth, MiB
    memory_model.worst_under                     the lowest error: how far a prediction was below what was measured
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench_runtime import merge_results
from random_models import MODELS, RandomModel, write_random_model
from rivals import DTYPES, Assigned, Data, false_hash, layout_of, quantised
from starter_runs import RESULTS, machine, write_results
from timed_assignment import assignment

from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.profiles.cost import ExecutionMode, MemoryBreakdown, Workload, peak_memory

MIB: Final = 1 << 20
STEPS: Final = 3
WORK: Final = Path("runs/bench")
STARTER: Final = Path(__file__).parent.parent / "edge_client" / "starter" / "model"
LARGE: Final = {
    "llama1b": dataclasses.replace(MODELS["llama1b"], layers=2),
    "qwen05": dataclasses.replace(MODELS["qwen05"], layers=2),
}
"""One block of the published shape is trained; two layers below it keep the disk small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One task on one model."""

    model: str
    assigned: Assigned
    mode: ExecutionMode
    dtype: str
    batch_size: int
    tokens: int
    label_share: float = 0.4
    anchor_batch_size: int = 2
    anchor_tokens: int = 64

    @property
    def tasks(self) -> int:
        """How often the process carries out the assignment."""
        return 8 if self.model == "starter" else 1

    @property
    def name(self) -> str:
        """E.g. ``m135 thirds 2/2, bf16, 4 x 256 tokens: 2 sequences at a time, with 8-bit moments``."""
        trained = f"{self.assigned.highest or self.assigned.num_blocks}/{self.assigned.num_blocks}"
        labels = "" if self.label_share == 0.4 else f", {self.label_share:.0%} labels"
        anchor = f" + {self.anchor_batch_size} x {self.anchor_tokens}" if self.anchor_batch_size else ""
        texts = f"{self.batch_size} x {self.tokens}{anchor} tokens{labels}"
        return f"{self.model} {self.assigned.placement} {trained}, {self.dtype}, {texts}: {self.mode.text()}"

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
            dtype_bytes=DTYPES[self.dtype].itemsize,
        )


def _mode(**changes: Any) -> ExecutionMode:
    return ExecutionMode(**changes)


TOP1, TOP2, THIRDS2 = (
    Assigned(placement="top", num_blocks=1),
    Assigned(placement="top", num_blocks=2),
    Assigned(placement="thirds", num_blocks=2),
)
THIRDS3: Final = Assigned(placement="thirds", num_blocks=3)


def points() -> Iterator[Point]:
    """The grid: five models, both types, every mode that a client may choose, labels everywhere and in part."""

    def starter(highest: int, micro: int, **changes: Any) -> Point:
        return Point(
            model="starter",
            assigned=dataclasses.replace(THIRDS3, highest=highest),
            mode=_mode(micro_batch_size=micro, **changes),
            dtype="fp32",
            batch_size=8,
            tokens=16,
            anchor_batch_size=4,
            anchor_tokens=96,
        )

    yield from (starter(1, 8), starter(3, 8), starter(3, 2), starter(3, 8, checkpoint=True))

    def small(assigned: Assigned, dtype: str, **changes: Any) -> Point:
        mode = {"optimizer": "split" if dtype == "bf16" else "fp32", "micro_batch_size": 4}
        other = {k: changes.pop(k) for k in ("label_share", "tokens", "anchor_batch_size") if k in changes}
        fields = {"batch_size": 4, "tokens": 256, **other}
        return Point(model=name, assigned=assigned, mode=_mode(**{**mode, **changes}), dtype=dtype, **fields)

    name = "m15"
    yield from (
        small(TOP2, "fp32"),
        small(TOP2, "fp32", label_share=1.0),
        small(THIRDS2, "bf16"),
        small(THIRDS2, "fp32", checkpoint=True, micro_batch_size=2, tokens=512),
    )
    name = "m135"
    yield from (
        small(TOP2, "fp32"),
        small(TOP2, "bf16"),
        small(TOP2, "bf16", optimizer="split_8bit", micro_batch_size=1),
        small(THIRDS2, "fp32"),
        small(THIRDS2, "fp32", frozen="nf4", micro_batch_size=2),
        small(THIRDS2, "bf16", checkpoint=True, label_share=1.0),
        small(THIRDS2, "bf16", residency="resident", optimizer="split_8bit"),
        small(dataclasses.replace(THIRDS2, highest=1), "fp32", anchor_batch_size=0),
    )

    def large(model: str, dtype: str, tokens: int, **changes: Any) -> Point:
        mode = {"optimizer": "split" if dtype == "bf16" else "fp32", "micro_batch_size": 1}
        return Point(
            model=model,
            assigned=TOP1,
            mode=_mode(**{**mode, **changes}),
            dtype=dtype,
            batch_size=1,
            tokens=tokens,
            anchor_batch_size=1,
        )

    yield from (
        large("qwen05", "fp32", 512),
        large("qwen05", "bf16", 512),
        large("llama1b", "bf16", 512),
        large("llama1b", "bf16", 512, optimizer="split_8bit"),
        large("llama1b", "fp32", 256),
    )


# The process of one point


def carry_out(point: Point, folder: Path, work: Path) -> dict[str, Any]:
    """One task, measured; everything that the client imports is imported before."""
    import numpy as np

    from fedblocks.edge_client import work as client
    from fedblocks.edge_client.anchor import AnchorSet, Teacher
    from fedblocks.edge_client.evaluate import measure_anchor
    from fedblocks.edge_client.expanded_model import ExpandedModel
    from fedblocks.edge_client.memory import PeakMemory, anonymous_bytes, give_back_freed_memory, return_large_blocks
    from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore, cut_key
    from fedblocks.edge_client.train import train
    from fedblocks.protocol.tensors import encode_delta

    checkpoint = Checkpoint.open(folder)
    return_large_blocks()
    backbone = quantised(folder, work)
    content = false_hash(checkpoint)
    plan = point.assigned.plan(checkpoint.config, content)
    data = Data(
        sequences=STEPS * point.batch_size,
        tokens=point.tokens,
        batch_size=point.batch_size,
        vocab=checkpoint.shape.vocab_size,
    )
    samples = [s for i in range(STEPS) for s in data.batch(i, point.label_share)]
    generator = np.random.default_rng(7)
    texts = generator.integers(3, data.vocab, (8 + STEPS * point.anchor_batch_size, point.anchor_tokens))
    anchors = AnchorSet(sequences=tuple(texts.astype(np.int32)), seed=0)
    task = assignment(
        point.assigned.trained(plan),
        mode=point.mode,
        steps=STEPS,
        batch_size=point.batch_size,
        anchor_batch_size=point.anchor_batch_size,
        learning_rate=1e-4,
    )
    give_back_freed_memory()
    zero = anonymous_bytes()
    highest: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory(dir=work) as caches, PeakMemory(zero) as memory:

        def status(phase: str, steps: int) -> None:
            highest.append((f"{phase} {steps}", memory.peak_bytes))

        model = ExpandedModel(backbone=backbone, checkpoint=checkpoint, plan=plan, dtype=DTYPES[point.dtype])
        key = cut_key(model, content, cut=model.base_cut)
        stores = [RecordStore(Path(caches) / f"{key}{end}", warn=print) for end in ("", ".teacher")]
        prefix = PrefixStates(model, stores[0])
        teacher = Teacher(anchors=anchors, model=model, prefix=prefix, store=stores[1])
        for _ in range(point.tasks):
            model.hold(residency=point.mode.residency, frozen=point.mode.frozen)
            status("measuring", 0)
            measure_anchor(model, teacher, list(anchors.kl_val_indices), prefix)
            give_back_freed_memory()
            result = train(
                model=model,
                task=task,
                mode=point.mode,
                data=samples,
                teacher=teacher,
                prefix=prefix,
                now=time.monotonic,
                status=status,
            )
            status("trained", STEPS)
            model.release()
            encoded = encode_delta(
                plan.shape,
                task.blocks,
                result.deltas,
                {},
                format="int8",
                density=0.25,
                cap=3 * task.learning_rate * STEPS,
            )
            status("encoded", len(encoded.parts))
        for store in stores:
            store.close()
    assert client.train is train
    layout = layout_of(plan)
    predicted = peak_memory(plan.shape, layout, task.blocks, point.work(), point.mode)
    return {
        "point": point.name,
        "measured_bytes": memory.peak_bytes,
        "predicted_bytes": predicted.peak,
        "error": predicted.peak / memory.peak_bytes - 1,
        "imports_bytes": zero,
        "step_s": result.step_s,
        "breakdown": _plain(predicted),
        "highest_so_far_bytes": highest,
    }


def _plain(found: MemoryBreakdown) -> dict[str, Any]:
    return dataclasses.asdict(found)


def worker(index: int, folder: Path, work: Path, threads: int) -> None:
    """Prints one JSON line: a point's figures; for index -1 only makes the 4-bit files."""
    import torch

    torch.set_num_threads(threads)
    if index < 0:
        quantised(folder, work)
        return
    point = next(itertools.islice(points(), index, None))
    print(json.dumps(carry_out(point, folder, work)))


# The parent


def folder_of(model: str, work: Path) -> Path:
    """The model's folder, written if it is not there yet."""
    if model == "starter":
        return STARTER
    known: RandomModel = LARGE.get(model, MODELS[model])
    return write_random_model(work / f"{model}-{known.layers}", known)


def run(*arguments: str) -> str:
    """This file in a process of its own; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": arguments[-1]}
    found = subprocess.run(
        [sys.executable, __file__, "--worker", *arguments],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=environment,
    )
    return found.stdout.strip().splitlines()[-1] if found.stdout.strip() else ""


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures that the targets are about."""
    errors = [row["error"] for row in rows]
    wide = [abs(r["predicted_bytes"] - r["measured_bytes"]) / MIB for r in rows if abs(r["error"]) > 0.1]
    return {
        "median_error": statistics.median(map(abs, errors)),
        "max_error": max(map(abs, errors)),
        "max_error_mib": max(wide, default=0.0),
        "worst_under": min(*errors, 0.0),
        "points": len(rows),
    }


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    predicted, measured = row["predicted_bytes"] / MIB, row["measured_bytes"] / MIB
    return f"{predicted:8.1f} {measured:8.1f} {row['error']:+7.1%}  {row['breakdown']['phase']:9} {row['point']}"


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    if arguments[:1] == ["--worker"]:
        index, folder, work, threads = arguments[1:]
        worker(int(index), Path(folder), Path(work), int(threads))
        return
    parser = argparse.ArgumentParser(description="predicted against measured memory of whole tasks")
    parser.add_argument("--only", nargs="+", help="models, or parts of a point's name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--work", type=Path, default=WORK, help="models and 4-bit files")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    prepared: set[str] = set()
    print(f"{'MiB':>8} {'measured':>8} {'error':>7}")
    for index, point in enumerate(points()):
        if options.only and not any(part in point.name for part in options.only):
            continue
        folder = folder_of(point.model, options.work)
        common = (str(folder), str(options.work), str(options.threads))
        if point.model not in prepared:
            run("-1", *common)
            prepared.add(point.model)
        rows.append(json.loads(run(str(index), *common)))
        print(line(rows[-1]), flush=True)
    found = summary(rows)
    print(", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    write_results(options.out, "python benchmarks/bench_memory.py", rows, **machine(), memory_model=found)
    if options.out == RESULTS / "memory.json":
        merge_results(RESULTS / "runtime.json", "python benchmarks/bench_runtime.py", {"memory_model": found})


if __name__ == "__main__":
    main(sys.argv[1:])
