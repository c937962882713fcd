"""What do the measurements say? docs/results.md from the files in benchmarks/results/, and nothing else.

Only the part between the two marks is written; what stands around it is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from evidence import BLOCK_RATES, LINES, Line
from starter_runs import CHANCE, RESULTS, frozen
from stories_gsm8k import line_name, matched_points

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "results.md"
BEGIN, END = "<!-- begin: benchmarks/results_document.py -->", "<!-- end: benchmarks/results_document.py -->"
Row = Mapping[str, Any]
OURS: Final = LINES[2:5]
EQUAL: Final = 0.01
"""Differences of general retention below this are called none: one seed, standard error about 0.005."""


def write() -> None:
    """Replaces the generated part of docs/results.md."""
    old = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    if BEGIN not in old or END not in old:
        raise SystemExit(f"{DOCUMENT}: the marks {BEGIN} and {END} are missing; put them where the tables belong")
    head, tail = old.split(BEGIN)[0], old.split(END)[1]
    parts = [section for section in (_tasks(), _pilot(), _evidence(), _stories()) if section]
    DOCUMENT.write_text(head + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + tail, encoding="utf-8")
    print(DOCUMENT)


def _load(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


Choose = Callable[[Sequence[Row], Line, str], "Row | None"]
"""Which of a line's rates stands for it."""


def _tasks() -> str:
    content = frozen()
    skills = ", ".join(content["skills"])
    chance = ", ".join(f"{name} {value:.3g}" for name, value in CHANCE.items())
    training = content["training"]
    return f"""## What is measured

The bundled starter model (0.34 M parameters) learns a task that is split over 8 clients (Dirichlet 0.5 over the
label, 960 examples): `rule`, a new rule over known tokens, and `association`, a new association of known words.
Every client trains in every one of {training["rounds"]} rounds, {training["steps_per_round"]} AdamW steps of
{training["batch_size"]} examples. Skills, maps, split, rates, round limit, target and what "best rate" means stand in
`edge_client/starter/frozen_task.json` (SHA-256 of its content `{content.get("sha256", "not frozen")}`).
It was filled from one pilot seed with the two baselines before expanded blocks ran on these tasks.

- **downstream**: share of exact answers on 400 held-out examples. **general**: mean over the {len(content["skills"])}
  general skills ({skills}) of the share of exact answers, 300 items each. **retention**: general / general of the base.
- **Ret**: the same as a ratio of sums above chance (methods.md 12.1); chance: {chance}; 0 for the others.
- **KL**: nats per token, full vocabulary, to the unquantised base on 128 texts of 256 tokens sampled from it with a
  seed that is not the anchor's.
- **target**: {", ".join(f"{task} {value:g}" for task, value in (content["target"] or {}).items())}, on the validation
  split; **round**: the first that reaches it. **Best rate**: reaches it in the fewest rounds (ties: the lower rate).
- Figures are of the test split. Baselines train the unquantised fp32 base; expanded blocks train over the NF4 base, and
  are measured as exported (unquantised base, blocks in bf16) and on the client's 4-bit stack.
- One process, no sockets, equal devices. Bytes are payload per client and round, mean over the run.
- **One seed, one tiny model.** Less than about 0.01 in retention or 0.03 in downstream is no difference."""


def _pilot() -> str | None:
    content, results = frozen(), _load("pilot.json")
    if content["pilot"] is None or results is None:
        return None
    parts = [
        f"""## Pilot: can the tasks show forgetting?

`{results["command"]}` (seed {content["pilot_seed"]}; baselines only, no anchor; every rate that was tried)"""
    ]
    for task in content["tasks"]:
        outcome = content["pilot"][task]
        rows = [
            [
                f"{line['method']} {line['learning_rate']:g}"
                + (" (best)" if outcome["best_learning_rate"][line["method"]] == line["learning_rate"] else ""),
                "-" if line["rounds_to_target"] is None else str(line["rounds_to_target"]),
                *_short_cells(line["at_target"]),
                *_short_cells(line["last"]),
            ]
            for line in outcome["table"]
        ]
        head = ["rate", "round", "downstream", "retention", "KL", "end: downstream", "retention", "KL"]
        verdict = "can" if outcome["can_show_forgetting"] else "can **not**"
        lost = ", ".join(
            f"{m} {'not reached' if v is None else f'{100 * v:.1f} %'}"
            for m, v in outcome["forgetting_at_target_at_best"].items()
        )
        parts.append(
            f"**{task}**, target {outcome['target']:g}: {verdict} show forgetting; "
            f"lost at the target at the best rate: {lost}.\n\n" + _table(head, rows)
        )
    parts.append(_gentlest(content))
    return "\n\n".join(parts)


def _gentlest(content: Mapping[str, Any]) -> str:
    """What the rates that forget least say: the choice of "best" matters."""
    told: list[str] = []
    for task in content["tasks"]:
        able = [line for line in content["pilot"][task]["table"] if line["at_target"] is not None]
        if not able:
            continue
        least = min(able, key=lambda line: line["at_target"]["forgetting"])
        told.append(
            f"on {task}, {least['method']} at {least['learning_rate']:g} reaches the target in round "
            f"{least['rounds_to_target']} and loses {100 * least['at_target']['forgetting']:.1f} % "
            f"({100 * least['last']['forgetting']:.1f} % at the end)"
        )
    return (
        "The loss depends on the learning rate as much as on the task: "
        + "; ".join(told)
        + ". Where a gentle rate loses nothing, whoever has rounds to spare needs none of what follows."
    )


def _short_cells(figures: Mapping[str, Any] | None) -> list[str]:
    if figures is None:
        return ["-", "-", "-"]
    return [_number(figures["downstream"]), _number(1 - figures["forgetting"]), _number(figures["kl"], 4)]


def best_row(rows: Sequence[Row], line: Line, task: str) -> Row | None:
    """The line's best rate by the frozen rule; None if no rate reaches the target."""
    able = [r for r in rows if r["task"] == task and line.matches(r) and r["rounds_to_target"] is not None]
    return min(able, key=lambda r: (r["rounds_to_target"], r["learning_rate"])) if able else None


def kindest_row(rows: Sequence[Row], line: Line, task: str) -> Row | None:
    """The line's rate that keeps most general ability where it reaches the target; None if no rate reaches it."""
    able = [r for r in rows if r["task"] == task and line.matches(r) and r["rounds_to_target"] is not None]
    return max(able, key=lambda r: (r["at_target"]["retention"], -r["rounds_to_target"])) if able else None


def _cells(figures: Mapping[str, Any] | None) -> list[str]:
    if figures is None:
        return ["-"] * 4
    return [
        _number(figures["downstream"]),
        _number(figures["retention"]),
        _number(figures["ret_above_chance"]),
        _number(figures["kl"], 4),
    ]


def _evidence() -> str | None:
    results = _load("evidence.json")
    if results is None:
        return None
    rows: list[Row] = results["rows"]
    content = frozen()
    seed, machine = rows[0]["seed"], rows[0]
    base = next(iter(results["base"].values()))
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"""## Frozen tasks: ours beside the baselines

`{results["command"]}` (seed {seed}; {machine["device"]}; {versions}; base `{base["base_hash"][:16]}`; {len(rows)} runs)

Anchor: KL on 256 texts of 256 tokens sampled from the base, {rows[0]["anchor_batch_size"]} in each step (the product's
default is 4), for every anchored line alike; lambda is 1 for the baselines and the aggregator's (dual ascent, budget
{LINES[2].max_kl:g} nats/token) for ours, but for the line that says lambda 1. Rates of expanded blocks:
{", ".join(f"{rate:g}" for rate in BLOCK_RATES)}. "All rows" is int8 without row masks, up and down; rho 0.25 is the
product's default. The 4-bit base itself: general {base["nf4"]["general"]:.3f}, KL {base["nf4"]["kl"]:.4f} to the
unquantised base, the floor of every KL on the 4-bit stack."""
    ]
    head = ["line", "rate", "round", "downstream", "retention", "Ret", "KL"]
    head += ["end: downstream", "retention", "Ret", "KL", "up, kB", "down, kB"]
    for task in content["tasks"]:
        parts.append(f"### {task}, target {content['target'][task]:g}: each line at its best rate")
        parts.append(_table(head, [_headline(rows, line, task, best_row) for line in LINES]))
        parts.append(
            "The same at the rate that keeps most where the target is reached, which asks more of us (rounds to spare):"
        )
        parts.append(_table(head, [_headline(rows, line, task, kindest_row) for line in LINES]))
        parts.append(_stack_table(rows, task))
        parts += [_reading(rows, line, task, content["target"][task]) for line in OURS]
        parts.append(_against_us(rows, task))
    parts.append("### Every rate")
    parts.append(_table(["task", *head], _all_rows(rows, content["tasks"])))
    missing = _missing(rows, content)
    if missing:
        parts.append("Not run: " + "; ".join(missing) + ".")
    return "\n\n".join(part for part in parts if part)


def _bytes(row: Row) -> list[str]:
    return [f"{row['upload_bytes'] / 1000:.1f}", f"{row['download_bytes'] / 1000:.1f}"]


def _headline(rows: Sequence[Row], line: Line, task: str, choose: Choose) -> list[str]:
    row = choose(rows, line, task)
    if row is not None:
        return [
            line.name,
            f"{row['learning_rate']:g}",
            str(row["rounds_to_target"]),
            *_cells(row["at_target"]),
            *_cells(row["last"]),
            *_bytes(row),
        ]
    tried = [r for r in rows if r["task"] == task and line.matches(r)]
    if not tried:
        return [line.name, "not run", *["-"] * 11]
    nearest = max(tried, key=lambda r: max(entry["downstream"] for entry in r["rounds_log"]))
    return [
        line.name,
        f"{nearest['learning_rate']:g}",
        "not reached",
        *["-"] * 4,
        *_cells(nearest["last"]),
        *_bytes(nearest),
    ]


def _stack_table(rows: Sequence[Row], task: str) -> str:
    """Ours as exported and on the 4-bit stack, at the last round."""
    cells: list[list[str]] = []
    for line in LINES:
        row = best_row(rows, line, task)
        if line.method != "blocks" or row is None:
            continue
        cells.append([line.name, "exported (bf16)", *_cells(row["last"])])
        cells.append(["", "4-bit stack", *_cells(row["last"]["stack"])])
    if not cells:
        return ""
    return "At the end, as exported and as a client runs it:\n\n" + _table(
        ["line", "weights", "downstream", "retention", "Ret", "KL"], cells
    )


def _all_rows(rows: Sequence[Row], tasks: Sequence[str]) -> list[list[str]]:
    cells: list[list[str]] = []
    for task in tasks:
        for line in LINES:
            for row in sorted(
                (r for r in rows if r["task"] == task and line.matches(r)), key=lambda r: r["learning_rate"]
            ):
                reached = "not reached" if row["rounds_to_target"] is None else str(row["rounds_to_target"])
                figures = [*_cells(row["at_target"]), *_cells(row["last"]), *_bytes(row)]
                cells.append([task, line.name, f"{row['learning_rate']:g}", reached, *figures])
    return cells


def _missing(rows: Sequence[Row], content: Mapping[str, Any]) -> list[str]:
    missing: list[str] = []
    for task in content["tasks"]:
        for line in LINES:
            rates = BLOCK_RATES if line.method == "blocks" else content["learning_rates"][line.method]
            done = {r["learning_rate"] for r in rows if r["task"] == task and line.matches(r)}
            absent = [f"{rate:g}" for rate in rates if rate not in done]
            if absent:
                missing.append(f"{task}, {line.name} at {', '.join(absent)}")
    return missing


def _reading(rows: Sequence[Row], mine: Line, task: str, target: float) -> str:
    """Sentences that follow from the table for one of our lines."""
    ours = best_row(rows, mine, task)
    if ours is None:
        tried = [r for r in rows if r["task"] == task and mine.matches(r)]
        if not tried:
            return ""
        best = max((max(e["downstream"] for e in r["rounds_log"]) for r in tried), default=0.0)
        rates = ", ".join(f"{r['learning_rate']:g}" for r in tried)
        return (
            f"**{mine.name}** does not reach {target:g} on {task} within the round limit: "
            f"the best of the rates {rates} comes to {best:.3f} on validation. This is a miss."
        )
    retention = ours["last"]["retention"]
    told = [
        f"Ours reaches the target in round {ours['rounds_to_target']} and keeps {ours['at_target']['retention']:.3f} "
        f"of the general ability there, {retention:.3f} at the end (aim: 0.97, "
        + ("met)." if min(retention, ours["at_target"]["retention"]) >= 0.97 else "**missed**).")
    ]
    plain = [best_row(rows, line, task) for line in LINES[:2]]
    told += [
        f"{line.name} without anchor keeps {row['at_target']['retention']:.3f} at the target (round "
        f"{row['rounds_to_target']}) and {row['last']['retention']:.3f} at the end."
        for line, row in zip(LINES[:2], plain, strict=True)
        if row is not None
    ]
    rivals = [
        (line, row) for line in LINES if line.method != "blocks" and (row := best_row(rows, line, task)) is not None
    ]
    for choose, how in ((best_row, "at the best rate"), (kindest_row, "at the rate that keeps most")):
        told += _against_anchored(rows, mine, task, choose, how)
    faster = [
        f"{x.name} ({r['rounds_to_target']})" for x, r in rivals if r["rounds_to_target"] < ours["rounds_to_target"]
    ]
    if faster:
        told.append(f"Fewer rounds than ours ({ours['rounds_to_target']}): {', '.join(faster)}.")
    full = next((row for line, row in rivals if line.method == "full"), None)
    lora = next((row for line, row in rivals if line.method == "lora"), None)
    for name, row in (("full fine-tuning", full), ("LoRA", lora)):
        if row is not None:
            ratio = (row["upload_bytes"] + row["download_bytes"]) / (ours["upload_bytes"] + ours["download_bytes"])
            told.append(
                f"Per client and round, fp32 {name} moves {ratio:.1f} times the bytes of ours "
                f"({ratio / 4:.2f} times if it were sent as dense int8)."
            )
    return f"**{mine.name}.** " + "\n".join(told)


def _against_us(rows: Sequence[Row], task: str) -> str:
    """Baselines without anchor that keep 0.97 or more at some rate."""
    gentle = [
        row
        for row in rows
        if row["task"] == task
        and row["method"] != "blocks"
        and not row["anchor"]
        and row["at_target"] is not None
        and row["at_target"]["retention"] >= 0.97
    ]
    told = [
        f"Against us: {row['method']} without anchor at the gentle rate {row['learning_rate']:g} reaches the target "
        f"in round {row['rounds_to_target']} with retention {row['at_target']['retention']:.3f} "
        f"({row['last']['retention']:.3f} at the end)."
        for row in gentle
    ]
    return "\n".join(told)


def _against_anchored(rows: Sequence[Row], mine: Line, task: str, choose: Choose, how: str) -> list[str]:
    """Ours beside the anchored baseline that keeps most, both at the rate that ``choose`` takes."""
    ours = choose(rows, mine, task)
    anchored = [
        (line, row)
        for line in LINES
        if line.method != "blocks" and line.anchor and (row := choose(rows, line, task)) is not None
    ]
    if ours is None or not anchored:
        return []
    line, row = max(anchored, key=lambda pair: pair[1]["at_target"]["retention"])
    difference = ours["at_target"]["retention"] - row["at_target"]["retention"]
    if abs(difference) < EQUAL:
        verdict = "no difference at this precision: the retention is the anchor's, not the blocks'"
    elif difference > 0:
        verdict = f"ours keeps {difference:.3f} more"
    else:
        verdict = f"it keeps {-difference:.3f} **more than ours**"
    kept = f"{ours['at_target']['retention']:.3f} in round {ours['rounds_to_target']}"
    sentence = (
        f"Nearest anchored baseline {how}: {line.name} at {row['learning_rate']:g} keeps "
        f"{row['at_target']['retention']:.3f} at the target in round {row['rounds_to_target']}, ours at "
        f"{ours['learning_rate']:g} {kept}: {verdict}."
    )
    return [sentence]


def _stories() -> str | None:
    results = _load("stories_gsm8k.json")
    if results is None:
        return None
    rows: list[Row] = results["rows"]
    base = results["base"]
    points = matched_points(rows, base)
    head = ["line", "rate", "matched by", "TinyStories perplexity ratio", "KL"]
    parts = [
        f"""## stories260K on GSM8K

`{results["command"]}` (seed {rows[0]["seed"]}; {rows[0]["device"]}; needs ../shared/data)

The answers of 400 GSM8K training questions, dealt to 8 clients, cut to 256 tokens; {rows[0]["rounds"]} rounds of
{rows[0]["steps"]} steps of {rows[0]["batch_size"]} examples, {rows[0]["anchor_batch_size"]} anchor texts in each step
of the anchored lines. Perplexity is per token of the answers of 100 other questions (base
{_perplexity(base["gsm8k_nll"])}) and of 50 TinyStories (base {_perplexity(base["stories_nll"])}); KL to the base on 32
texts of 256 tokens sampled from it. Methods are compared **at the same GSM8K perplexity**: where a run's curve first
comes down to it, along its rounds or along the strength g of its last round (LoRA: B times g; full fine-tuning:
theta_0 + g (theta - theta_0)), linear in log perplexity between neighbouring points. Of a line's rates the one with the
least KL at that point is shown, for every line alike. One seed."""
    ]
    for share in dict.fromkeys(point["share"] for point in points):
        chosen = [point for point in points if point["share"] == share]
        perplexity = chosen[0]["gsm8k_perplexity"]
        cells = [
            [
                point["line"],
                "-" if point["learning_rate"] is None else f"{point['learning_rate']:g}",
                point["by"],
                "not reached" if point["perplexity_ratio"] is None else _number(point["perplexity_ratio"]),
                _number(point["kl"], 4),
            ]
            for point in chosen
        ]
        parts.append(
            f"**GSM8K perplexity {perplexity:.3f}** ({100 * share:.0f} % of LoRA's gain)\n\n" + _table(head, cells)
        )
    ends = [
        [
            line_name(row),
            f"{row['learning_rate']:g}",
            _perplexity(row["rounds_log"][-1]["gsm8k_nll"]),
            _number(math.exp(row["rounds_log"][-1]["stories_nll"] - base["stories_nll"])),
            _number(row["rounds_log"][-1]["kl"], 4),
            _number(row["rounds_log"][-1]["agree1"]),
            f"{row['wall_s']:.0f}",
        ]
        for row in rows
    ]
    head = ["line", "rate", "GSM8K perplexity", "TinyStories ratio", "KL", "Agree1", "seconds"]
    parts.append("Every run at its last round:\n\n" + _table(head, ends))
    return "\n\n".join(parts)


def _perplexity(nll: float) -> str:
    return f"{math.exp(nll):.3f}"
