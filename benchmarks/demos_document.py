"""Writes the demos' part of docs/results.md from their kept headlines: ``python benchmarks/demos_document.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from starter_runs import RESULTS

PAGE: Final = Path(__file__).parents[1] / "docs" / "results.md"
MARK: Final = "benchmarks/demos_document.py"
FIGURES: Final = {
    "downstream_accuracy": "downstream accuracy (400 held-out examples)",
    "general_accuracy": "general accuracy (1300 items)",
    "retention": "retention",
    "kl_nats_per_token": "KL to the base, nats/token",
}
STACKS: Final = ("base", "exported", "four_bit")


def starter(kept: dict[str, Any]) -> str:
    """The bundled model's section."""
    r = kept["rows"][0]
    p = r["proof"]
    figures = [
        f"| {label} | " + " | ".join(f"{p[s][key]:.4f}" for s in STACKS) + " |" for key, label in FIGURES.items()
    ]
    clients = [_client(c) for c in r["clients"]]
    lora, blocks = 8 * 61_440 / 1e3, 8 * p["expanded_parameters"] / 1e3
    return f"""## The demo: real processes, sockets and unequal devices

`{kept["command"]}` (`make demo`, its headline kept in benchmarks/results/demo.json; {kept["device"]}, with other
work on the machine). One run; docs/demo.md says what is emulated and how its settings were chosen.

{r["rounds"]} rounds in {r["wall_s"]:.0f} s, strength {r["strength"]:g}, budget {p["max_kl"]:g} nats/token,
target {r["downstream_target"]:g}.

| | base | exported checkpoint | 4-bit stack |
|---|---|---|---|
{chr(10).join(figures)}

Largest difference of a logit between the exported checkpoint (bf16 blocks) and the client's model (fp32 blocks), on a
text written by the base: {p["export_vs_client_model_max_abs_logit_difference"]:.3f}, where logits reach
{p["export_logit_scale"]:.1f}. At strength 0 the difference to the base is
{p["max_abs_logit_difference_at_strength_0"]:g}. Quantising the base alone costs
{p["four_bit_base_kl_to_fp32_base"]:.4f} nats/token.

| client | device | blocks x steps, in the order met | predicted peak, MiB | measured | up, kB/round | down, kB/round |
|---|---|---|---|---|---|---|
{chr(10).join(clients)}

A client exchanged {r["bytes_per_client_round"] / 1e3:.0f} kB a round, both ways, counted at the socket with all headers,
anchor texts and plan included; the full model in fp32 both ways would be {r["bytes_ratio_full_fp32"]:.1f} times as much.
The small model makes the ratio small: its three expanded blocks are half as large as itself. LoRA r=8 in fp32 (61,440
parameters) would be {lora:.0f} kB, LoRA of as many parameters as the three blocks {blocks:.0f} kB.

Other runs of the same command differ, because the plans depend on measured speeds. With a deadline of 8 s the laptop trained
one block only once its speed was known, and one run of five missed the target. Before the floor of lambda
(`forgetting.min_lambda`), retention of the 4-bit stack was 0.961 to 0.973 in three runs."""


def _client(row: dict[str, Any]) -> str:
    met = dict.fromkeys(f"{a['blocks']} x {a['steps']}" for a in row["assignments"])
    up, down = (row[key] / max(1, row["updates"]) / 1e3 for key in ("bytes_up", "bytes_down"))
    peaks = f"{row['predicted_peak_bytes'] / 2**20:.1f} | {row['measured_peak_bytes'] / 2**20:.1f}"
    return f"| {row['name']} | {row['device']} | {'; '.join(met)} | {peaks} | {up:.0f} | {down:.0f} |"


def stories(kept: dict[str, Any]) -> str:
    """The section of a model that is not ours."""
    r = kept["rows"][0]
    p = r["proof"]
    labels = {
        "downstream_nll": "GSM8K, nats per answer token (80 held-out rows)",
        "general_nll": "TinyStories, nats per token (90 stories)",
        "retention": "retention (perplexity of the base over ours)",
        "kl_nats_per_token": "KL to the base, nats/token",
    }
    figures = [f"| {label} | " + " | ".join(f"{p[s][key]:.4f}" for s in STACKS) + " |" for key, label in labels.items()]
    return f"""## The demo on a model that is not ours: stories260K on GSM8K

`{kept["command"]}`: 720 rows of GSM8K over four sites, {r["rounds"]} rounds, TinyStories as general ability, the rest as in
the demo. {r["wall_s"]:.0f} s; strength {r["strength"]:g} was the highest within the budget of {p["max_kl"]:g} nats/token.

| | base | exported checkpoint | 4-bit stack |
|---|---|---|---|
{chr(10).join(figures)}"""


def main() -> None:
    """Rewrite the part of the page between the two marks; append it where it is not there yet."""
    parts = [
        write(json.loads((RESULTS / file).read_text(encoding="utf-8")))
        for file, write in (("demo.json", starter), ("stories_demo.json", stories))
        if (RESULTS / file).is_file()
    ]
    replace_part(PAGE, MARK, parts)


def replace_part(page: Path, mark: str, parts: list[str]) -> None:
    """Puts the parts between the page's marks for ``mark``; at the page's end where there are none yet."""
    begin, end = f"<!-- begin: {mark} -->", f"<!-- end: {mark} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    text = "\n\n".join([begin, *parts, end])
    following = f"\n{after.lstrip()}" if after.strip() else ""
    page.write_text(f"{before.rstrip()}\n\n{text}\n{following}", encoding="utf-8")


if __name__ == "__main__":
    main()
