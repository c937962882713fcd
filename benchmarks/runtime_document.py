"""Writes the edge runtime's part of docs/results.md from runtime*.json and memory.json, which the benchmarks left.

python benchmarks/runtime_document.py
"""

from __future__ import annotations

import json
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
the prefix run in every step.

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
    replace_part(PAGE, MARK, parts)


if __name__ == "__main__":
    main()
