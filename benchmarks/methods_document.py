"""What do the methods' measurements say? Their part of docs/results.md, from methods.json, with its plots.

python benchmarks/methods_document.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from demos_document import PAGE, replace_part
from starter_runs import RESULTS

MARK: Final = "benchmarks/methods_document.py"
PLOTS: Final = PAGE.parent / "plots"
POINTS: Final = {
    "first": "the reference's score less half a point",
    "gain_75": "75 % of the reference's gain",
    "gain_50": "50 % of the reference's gain",
}


def quality(name: str, found: Mapping[str, Any]) -> str:
    """One experiment: what is kept at equal scores, and learnt within a budget."""
    lines: Mapping[str, Any] = found["lines"]
    done = "" if found["complete"] else " **Not complete:** `make experiments` goes on where it stopped."
    parts = [
        f"""### {name}: retention at equal scores

Task `{found["task"]}`; reference `{found["reference"]}`; the base scores {found["base"]["downstream"]:.3f}.{done}
Figures are of the test split, means over seeds; retention with its 95 % interval (seeds, then items)."""
    ]
    for key, label in POINTS.items():
        head = "| line | seeds that reach it | retention | 95 % | KL | score | first round, by seed |\n|---|---|---|---|---|---|---|"
        rows = [_point(label, line, key) for label, line in lines.items()]
        parts.append(f"**{label.capitalize()}** ({found['points'][key]:.3f}):\n\n{head}\n" + "\n".join(rows))
    budgets = next(iter(lines.values()))["budgets"] if lines else {}
    head = "| line | " + " | ".join(f"K_b {b}: share of gain, retention, KL / K_b" for b in budgets) + " |"
    rows = [
        f"| {label} | " + " | ".join(map(_budget, line["budgets"].values())) + " |" for label, line in lines.items()
    ]
    rule = "|" + "---|" * (len(budgets) + 1)
    parts.append(
        "**Within a budget** (nats per token; strength chosen on validation):\n\n" + "\n".join([head, rule, *rows])
    )
    plot = _fronts(name, lines)
    if plot is not None:
        parts.append(f"![Score against retention and KL]({plot.relative_to(PAGE.parent)})")
    return "\n\n".join(parts)


def _point(label: str, line: Mapping[str, Any], key: str) -> str:
    found = line[key]
    if found is None:
        return f"| {label} | 0 of {len(line['seeds'])} | not reached | - | - | - | - |"
    low, high = found["retention_interval_95"]
    rounds = ", ".join("-" if r is None else str(r) for r in line["first_round"][key])
    return (
        f"| {label} | {found['seeds_that_reach_it']} of {len(line['seeds'])} | {found['retention']:.3f} | "
        f"{low:.3f} to {high:.3f} | {found['kl']:.4f} | {found['downstream']:.3f} | {rounds} |"
    )


def _budget(found: Mapping[str, Any]) -> str:
    return f"{100 * found['share_of_gain']:.0f} %, {found['retention']:.3f}, {found['kl_over_budget_worst']:.2f}"


def _fronts(name: str, lines: Mapping[str, Any]) -> Path | None:
    """Score against retention and against KL at the matched points and at the end, a line each; a PNG."""
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for label, line in lines.items():
        points = [line[key] for key in ("gain_50", "gain_75", "first", "last") if line[key] is not None]
        for axis, key in zip(axes, ("retention", "kl"), strict=True):
            axis.plot(
                [p["downstream"] for p in points], [p[key] for p in points], marker="o", markersize=3, label=label
            )
    for axis, title in zip(axes, ("retention", "KL to the base, nats per token"), strict=True):
        axis.set_xlabel("score on the task")
        axis.set_ylabel(title)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    PLOTS.mkdir(exist_ok=True)
    path = PLOTS / f"{name}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def bytes_table(found: Mapping[str, Any]) -> str:
    """Traffic of the Qwen2.5-0.5B shape."""
    head = (
        "| what travels | up, MB per client and round | down | full fp32 exchange is times as much |\n|---|---|---|---|"
    )
    rows = [
        f"| {row['name']} | {row['up_bytes_per_update'] / 1e6:.2f} | {row['down_bytes_per_task'] / 1e6:.2f} | "
        f"{row['ratio_full_fp32_run']:.0f} |"
        for row in found["lines"]
    ]
    return f"""### Bytes at the socket, shape of Qwen2.5-0.5B

`{found["command"]}`: {found["rounds"]} rounds, {found["clients"]} clients, {100 * found["cohort_fraction"]:.0f} % of them a
round; random values with the spread of real updates, encoded and sent through the deployed transport with CURVE on; all
frames of both directions are counted.

{head}
{chr(10).join(rows)}"""


TTA: Final = {
    "tta": "every method as it comes, with the deadlines that its aggregator computes on the way",
    "tta_one_deadline": "all with FedIT's deadline",
    "tta_starter": "costs of the starter model, on which overheads are nearly all",
}


def tta_table(name: str, found: Mapping[str, Any]) -> str:
    """Time to target of a set of methods."""
    rows = []
    for arm, figures in found["arms"].items():
        hours = ", ".join("-" if s is None else f"{s / 3600:.2f}" for s in figures["virtual_s_to_target"])
        rounds = ", ".join("-" if r is None else str(r) for r in figures["rounds_to_target"])
        scores = ", ".join(f"{score:.3f}" for score in figures["score_mean_of_last_3"])
        gigabytes = sum(figures["bytes_up_and_down"]) / len(figures["bytes_up_and_down"]) / 1e9
        rows.append(
            f"| {arm} | {figures['learning_rate']:g} | {hours} | {rounds} | {scores} | {gigabytes:.1f} "
            f"| {_times(found['speedups'].get(arm))} |"
        )
    first, shape = next(iter(found["arms"])), found["costs_of"]
    return f"""### Time to target: {TTA[name]}

`{found["command"]}`: the 20 clients of the four-tier ladder, virtual clock, costs of {shape or "the starter model"}; target
{found["target"]:g} on the clients' held-out rows (mean of three rounds); {len(found["seeds"])} seeds, in this order. Each line has the learning
rate that did best on a pilot seed in at most 20 rounds{_tried(found)}. The last column is the
time of that line over that of `{first}`, mean and range over seeds; "at least": the line ended before the target.

| line | learning rate | virtual hours to target | rounds | score at the end | GB moved | times as long |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}{_not_run(found)}"""


def _not_run(found: Mapping[str, Any]) -> str:
    missing = found.get("not_run")
    return f"\n\nNot run yet under these rules: {', '.join(missing)}." if missing else ""


def _tried(found: Mapping[str, Any]) -> str:
    tried = next(iter(found.get("pilot", {}).values()), {})
    return f" ({', '.join(tried)} were tried for each)" if tried else ""


def _times(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "1"
    if found["mean"] is None:
        return f"- ({found['why']})"
    bound = "at least " if found["lower_bounds_at_seeds"] else ""
    return f"{bound}**{found['mean']:.2f}** ({found['low']:.2f} to {found['high']:.2f})"


def memory_table(found: Mapping[str, Any]) -> str:
    """Peak memory of the 135 M shape."""
    rows = [f"| {label} | {value / 2**20:.0f} |" for label, value in found["peak_anon_bytes"].items()]
    return f"""### Client memory, shape of 135 M parameters

`{found["command"]}`: peak anonymous memory above the imports while training, {found["tokens_per_step"]} tokens a step.
Full fine-tuning takes **{found["ratio_full_ft"]:.1f}** times as much as three blocks with the default placement.

| what | MiB |
|---|---|
{chr(10).join(rows)}"""


def growth_table(found: Mapping[str, Any]) -> str:
    """Growing runs beside those that do not grow."""
    settings = found["settings"]
    bits = "bit-equal (fp32 and bf16) at every one" if found["logits_bit_equal_at_every_event"] else "NOT bit-equal"
    return f"""### Growth

`{found["command"]}`: task `{settings["task"]}`, learning rate {settings["learning_rate"]:g}, {found["events"]} growths,
logits {bits}. Figures are of the test split, mean and standard deviation over the seeds; "within
the budget": at the largest strength whose KL is at most {settings["max_kl"]:g}. Rounds, decay and the place of the
growing block were set after shorter trials had been seen (24 and 36 rounds, in which it did not grow).

{_arms(found["lines"])}"""


def probe_table(found: Mapping[str, Any]) -> str:
    """What the probe found, and what one block is worth where it said and elsewhere."""
    lines = []
    for table in found["tables"]:
        (choice,) = table["choices"]
        slots = ", ".join(
            f"{'**' if slot['block'] == choice['block'] else ''}{slot['after_layer']}: {slot['score']:.3f}"
            f"{'**' if slot['block'] == choice['block'] else ''}"
            for slot in sorted(choice["slots"], key=lambda slot: slot["after_layer"])
        )
        lines.append(f"* seed {table['seed']}: {slots}")
    return f"""### Rollout probe

`{found["command"]}`: score of a block after each layer (nats per target token within the budget, less the cost of its steps),
the chosen one in bold:

{chr(10).join(lines)}

One block for the whole run, where the probe put it, where `thirds` puts it, and on top:

{_arms(found["one_block"])}"""


def _arms(lines: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {line['rounds']}, {line['round_decay']} | {len(line['seeds'])} | {line['downstream']['mean']:.3f} ± {line['downstream']['sd']:.3f} | "
        f"{line['kl']['mean']:.4f} | {line['within_budget']['downstream']['mean']:.3f} | "
        f"{line['within_budget']['retention']['mean']:.3f} | "
        f"{', '.join('-'.join(str(e['round']) for e in events) or 'never' for events in line['grown'])} |"
        for name, line in lines.items()
    ]
    head = "| blocks | rounds, decay | seeds | score | KL | score within the budget | retention there | grew after round, by seed |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])


def headline(found: Mapping[str, Any]) -> str:
    """The issue's figures in a sentence each."""
    kept = found["retention_fedblocks"]
    by = ", ".join(f"{name} {value:.3f}" for name, value in found["retention_by_experiment"].items())
    missed = f" Not reached in {', '.join(found['not_reached'])}: a miss." if found["not_reached"] else ""
    mean = f" **{kept:.3f}** ({by});" if kept is not None else ""
    difference = found["downstream_minus_fedit_points"]
    return "\n".join(
        [
            f"* Retention of ours at FedIT's score less half a point:{mean} target 0.97.{missed}",
            f"* Score at the end minus that of FedIT: {'-' if difference is None else f'**{difference:+.1f}** points'}.",
            f"* Worst KL over its budget: **{found['kl_over_budget_worst']:.2f}** (target 1.1).",
        ]
    )


def parts(results: Mapping[str, Any]) -> Sequence[str]:
    """The sections that there are results for."""
    made = ["## Methods"]
    if results.get("headline"):
        made.append(headline(results["headline"]))
    made += [quality(name, found) for name, found in results.get("quality", {}).items() if "lines" in found]
    made += [tta_table(name, results[name]) for name in TTA if name in results]
    tables = (
        ("bytes_qwen05b", bytes_table),
        ("memory_m135", memory_table),
        ("growth", growth_table),
        ("rollout_probe", probe_table),
    )
    for key, table in tables:
        if key in results:
            made.append(table(results[key]))
    return made


def write() -> None:
    """Replaces the part."""
    results = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))
    replace_part(PAGE, MARK, list(parts(results)))


if __name__ == "__main__":
    write()
