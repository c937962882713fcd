"""Writes the edge runtime's part of docs/results.md from runtime*.json, memory.json and gpu-*.json, left by the benchmarks.

python benchmarks/runtime_document.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from demos_document import PAGE, replace_part
from starter_runs import RESULTS

MARK: Final = "benchmarks/runtime_document.py"
RIVALS: Final = {"full": "full fine-tuning", "lora": "LoRA r=8", "qlora": "QLoRA r=8"}
GIB: Final = 1 << 30


def speed(kept: dict[str, Any]) -> str:
    """Ratios of CPU time, one line for each shape, placement, share of labels and dtype."""
    lines = [_speed_line(name, entry) for name, entry in kept.items() if _is_speed(entry)]
    first = next(entry for entry in kept.values() if _is_speed(entry))
    return f"""## The edge runtime: CPU time of training

`make bench-runtime` ({first["device"]}; {first["tokens_per_step"]} tokens a step, {first["repeats"]} interleaved repeats, medians of process CPU
time, the same data, dtype and tokens for all, random weights; every number in benchmarks/results/runtime.json).
How many times less CPU time ours takes than each stack as its documentation has it: from the second pass on / over three
passes, ours with its prefix pass. In brackets the ratio of computed FLOPs, the most that leaving work out can give.
*Same head* gives the rival our frozen-head, label-only loss, so what is left is the split's share; *no cache* is ours with
the prefix run in every step. Rows of m15 top2 in fp32, of qwen05, and of m135 in bf16 were
measured while other work used both cores. Of the llama1b shape full fine-tuning is not run: it does not fit beside the
others.

| shape, trained blocks | labels | dtype | {" | ".join(RIVALS.values())} | QLoRA, same head | ours, no cache |
|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}"""


def _is_speed(entry: object) -> bool:
    return isinstance(entry, dict) and "speedup_vs_qlora_steady" in entry


def _speed_line(name: str, entry: dict[str, Any]) -> str:
    cells = [_ratio(entry, rival) for rival in (*RIVALS, "qlora_label_only", "no_cache")]
    label = name.removesuffix("_all_labels").removesuffix("_bf16").replace("_", " ")
    return f"| {label} | {entry['label_share']:.0%} | {entry['dtype']} | " + " | ".join(cells) + " |"


def _ratio(entry: dict[str, Any], rival: str) -> str:
    def one(when: str) -> str:
        measured, most = entry.get(f"speedup_vs_{rival}_{when}"), entry.get(f"ceiling_vs_{rival}_{when}")
        if measured is None:
            return "–"
        return f"{measured:.1f}" + (f" ({most:.1f})" if most is not None else "")

    return f"{one('steady')} / {one('3_passes')}"


def memory(kept: dict[str, Any], seven: dict[str, Any] | None) -> str:
    """Peak memory beside QLoRA, and of a 7B shape."""
    entry = kept["llama1b_top1"]
    text = f"""## The edge runtime: memory

Peak anonymous memory of the process (RssAnon + RssShmem every 20 ms) above that after imports.

Llama-3.2-1B shape, one block on top, 512 tokens a step, bf16 arithmetic for both: exact weights
{entry["peak_anon_bytes"] / GIB:.2f} GiB, with 8-bit moments {entry["peak_anon_bytes_8bit"] / GIB:.2f} GiB. Beside QLoRA r=8, in four ways
(weights mapped from the file count as cache, read into memory they count; *lean*: adapters in bf16 instead of fp32):

| QLoRA | peak, GiB | ours, exact | ours, 8-bit moments |
|---|---|---|---|
{chr(10).join(_qlora_line(entry, key) for key in entry if key.startswith("peak_anon_bytes_qlora"))}

The rivals run with the allocator as their users have it. Given the setting of our client (edge_client/memory.py), stock QLoRA
took 2.51 GiB in one run: 0.60 times that is ours."""
    if seven is None:
        return text
    return f"""{text}

Qwen2.5-7B shape ({seven["parameters"] / 1e9:.1f} billion random parameters, {seven["layers"]} layers; `make bench-7b`), top block,
{seven["tokens_per_step"]} tokens a step, {seven["dtype"]}, exact weights: {seven["peak_anon_bytes"] / GIB:.2f} GiB. CPU time per token: prefix
{seven["prefix_cpu_s_per_token"] * 1e3:.0f} ms once, suffix {seven["suffix_cpu_s_per_token"] * 1e3:.0f} ms a step."""


def _qlora_line(entry: dict[str, Any], key: str) -> str:
    label = key.removeprefix("peak_anon_bytes_")
    exact, rounded = (entry[f"peak_anon_ratio_{kind}vs_{label}"] for kind in ("", "8bit_"))
    return f"| {label} | {entry[key] / GIB:.2f} | {exact:.2f} | {rounded:.2f} |"


def model(kept: dict[str, Any]) -> str:
    """Predicted against measured peaks."""
    figures = kept["memory_model"]
    lines = [
        f"| {row['point']} | {row['predicted_bytes'] / 2**20:.0f} | {row['measured_bytes'] / 2**20:.0f} "
        f"| {row['predicted_bytes'] / row['measured_bytes'] - 1:+.1%} |"
        for row in kept["rows"]
    ]
    return f"""### Predicted against measured peak

`make bench-memory`: {len(lines)} points, each in a process of its own. Median error {figures["median_error"]:.1%}, worst
{figures["max_error"]:.1%}; furthest below the measured: {figures["worst_under"]:.1%}.

| shape, mode, batch | predicted, MiB | measured, MiB | error |
|---|---|---|---|
{chr(10).join(lines)}"""


def gpu(kept: Sequence[dict[str, Any]]) -> str:
    """One part for each device that was measured; a sentence where none was."""
    if not kept:
        return """## The edge runtime on a GPU

Not yet measured; `make bench-gpu` measures it on a machine with a CUDA device and writes benchmarks/results/gpu-*.json.
Until then every figure for a GPU in this repository is a prediction."""
    return "\n\n".join(["## The edge runtime on a GPU", *map(_gpu_device, kept)])


def _gpu_device(found: dict[str, Any]) -> str:
    device, versions, peaks = found["device"], found["versions"], found["peaks"]
    operations = [row for row in found["operations"] if row.get("median_s") is not None]
    shapes = list(dict.fromkeys(row["shape"] for row in found["operations"]))
    backends = list(dict.fromkeys(row["backend"] for row in found["operations"]))
    lines: list[str] = []
    for shape in shapes:
        for op, form in dict.fromkeys((r["op"], r["form"]) for r in found["operations"] if r["shape"] == shape):
            rows = {
                r["backend"]: r for r in found["operations"] if (r["shape"], r["op"], r["form"]) == (shape, op, form)
            }
            cells = " | ".join(_gpu_cell(rows.get(backend)) for backend in backends)
            lines.append(f"| {op} | {shape}: {form} | {cells} |")
    refused = sorted(
        {f"{r['op']}, {r['backend']} ({r['reason']})" for r in found["operations"] if r["status"] == "wrong"}
    )
    steps = [_gpu_step(row) for row in found["steps"]]
    predicted = [abs(row["predicted_error"]) for row in found["steps"] if "predicted_error" in row]
    memory_line = (
        f"Predicted against measured peak: median error {statistics.median(predicted):.1%}, worst {max(predicted):.1%}."
        if predicted
        else ""
    )
    return f"""### {device["name"]}, {found["date"]}

`{found["command"]}`: capability {device.get("capability", "–")}, driver {_driver(found)}, torch {versions["torch"]}, CUDA {versions["cuda"]},
triton {versions["triton"]}. Copy {peaks["copy"]["bytes_per_s"] / 1e9:.0f} GB/s, bf16 product on random data
{peaks["gemm_bf16"]["flops_per_s"] / 1e12:.1f} TFLOP/s. {len(operations)} timed pairs of operation and backend; CUDA graphs: {found["graphs"]}.
{"Wrong, so not timed: " + "; ".join(refused) + "." if refused else "No rung failed the comparison with float64."}

Microseconds (median), and the share of the device's own copy rate or product rate:

| operation | size | {" | ".join(backends)} |
|---|---|{"---|" * len(backends)}
{chr(10).join(lines)}

Training steps; *passes* is three passes with the prefix pass; the roofline is that of the FLOPs each system needs. {memory_line}

| model | system | tokens a step, labels | tokens/s, step | passes | roofline | peak, GiB | ours against, passes (peak) |
|---|---|---|---|---|---|---|---|
{chr(10).join(steps)}"""


def _driver(found: dict[str, Any]) -> str:
    answer = found["clocks_before"]["nvidia_smi"]
    return answer.get("driver_version", "–") if isinstance(answer, dict) else "–"


def _gpu_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row.get("median_s") is None:
        return row["status"]
    return f"{row['median_s'] * 1e6:.1f} ({row['share_of_peak']:.0%})"


def _gpu_step(row: dict[str, Any]) -> str:
    head = f"| {row['shape']} | {row['system']} {row['assignment']} | {row['tokens_per_step']}, {row['labels']:.0%} "
    if row["status"] != "ok":
        return f"{head}| {row['status']}: {row['reason']} | | | | |"
    against = ", ".join(
        f"{other} {ratio['speedup_passes']:.1f}x ({ratio['peak_ratio']:.2f})"
        for other, ratio in row.get("against", {}).items()
    )
    return (
        f"{head}| {row['tokens_per_s_step']:.0f} | {row['tokens_per_s_passes']:.0f} | {row['share_of_roofline']:.0%} "
        f"| {row['peak_bytes'] / GIB:.2f} | {against or '–'} |"
    )


def _read_gpu(folder: Path) -> list[dict[str, Any]]:
    """The newest file of each device."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("gpu-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        held = newest.get(found["device"]["name"])
        if held is None or found["date"] >= held["date"]:
            newest[found["device"]["name"]] = found
    return list(newest.values())


def _read(name: str) -> dict[str, Any] | None:
    path: Path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main() -> None:
    """Rewrite the part of the page between the two marks; append it where it is not there yet."""
    runtime, seven, points = (_read(name) for name in ("runtime.json", "runtime_7b.json", "memory.json"))
    parts: list[str] = []
    if runtime is not None:
        parts += [speed(runtime), memory(runtime, seven)]
    if points is not None:
        parts.append(model(points))
    parts.append(gpu(_read_gpu(RESULTS)))
    replace_part(PAGE, MARK, parts)


if __name__ == "__main__":
    main()
