"""What does the demo show at its end? Two tables and a plot, all from recorded and measured figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def client_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per client, summed over the rounds that the aggregator recorded."""
    rows: dict[str, dict[str, Any]] = {}
    for record in history:
        for client in record["clients"]:
            if client["role"] != "train":
                continue
            row = rows.setdefault(
                client["name"],
                {
                    "name": client["name"],
                    "device": client["device"],
                    "assignments": [],
                    "updates": 0,
                    "predicted_peak_bytes": 0,
                    "measured_peak_bytes": 0,
                    "bytes_up": 0,
                    "bytes_down": 0,
                },
            )
            row["assignments"].append({"round": record["round"], "blocks": client["blocks"], "steps": client["steps"]})
            row["updates"] += client["outcome"] == "stored"
            row["predicted_peak_bytes"] = max(row["predicted_peak_bytes"], client["predicted_peak_bytes"])
            row["measured_peak_bytes"] = max(row["measured_peak_bytes"], client["peak_memory_bytes"])
            row["bytes_up"] += client["bytes_up"]
            row["bytes_down"] += client["bytes_down"]
    for row in rows.values():
        last = row["assignments"][-1]
        row["blocks"], row["steps"] = last["blocks"], last["steps"]
    return [rows[name] for name in sorted(rows)]


def say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def print_result(result: dict[str, Any]) -> None:
    """The two tables: what each client did, and what came of it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    clients = Table(title="clients", title_justify="left")
    for column in ("client", "device", "blocks", "steps", "updates", "predicted peak", "measured peak", "up", "down"):
        clients.add_column(column, justify="left" if column in ("client", "device", "blocks") else "right")
    for row in result["clients"]:
        distinct = dict.fromkeys((tuple(a["blocks"]), a["steps"]) for a in row["assignments"])
        clients.add_row(
            row["name"],
            row["device"],
            " → ".join(",".join(map(str, blocks)) for blocks in dict.fromkeys(blocks for blocks, _ in distinct)),
            " → ".join(str(steps) for steps in dict.fromkeys(steps for _, steps in distinct)),
            str(row["updates"]),
            f"{row['predicted_peak_bytes'] / 2**20:.1f} MiB",
            f"{row['measured_peak_bytes'] / 2**20:.1f} MiB",
            f"{row['bytes_up'] / 1e3:.0f} kB",
            f"{row['bytes_down'] / 1e3:.0f} kB",
        )
    console.print(clients)
    overall = Table(title="the model", title_justify="left")
    for column in ("", "base", "exported checkpoint", "4-bit stack"):
        overall.add_column(column, justify="left" if not column else "right")
    proof = result["proof"]
    columns = (proof["base"], proof["exported"], proof["four_bit"])
    for key, label in (
        ("downstream_accuracy", "downstream accuracy"),
        ("downstream_nll", "downstream nll (nats/token)"),
        ("general_accuracy", "general accuracy"),
        ("general_nll", "general nll (nats/token)"),
        ("retention", "retention (general, of the base's)"),
        ("kl_nats_per_token", f"KL to the base (budget {proof['max_kl']:g} nats/token)"),
    ):
        if columns[1][key] is not None:
            overall.add_row(label, *(f"{c[key]:.4f}" for c in columns))
    console.print(overall)
    target = result["downstream_target"]
    reached = (
        ""
        if target is None
        else f"; target {target:g}: {'reached' if result['downstream_after'] >= target else 'MISSED'}"
    )
    console.print(
        f"{result['rounds']} rounds in {result['wall_s']:.0f} s; strength {result['strength']:g}{reached}; "
        f"a full fp32 exchange would be {result['bytes_ratio_full_fp32']:.0f} times the bytes on the wire"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Downstream and retention by round, as a PNG; said and left out where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        say("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["history"]
    figure, axes = plt.subplots(figsize=(7, 4))
    for key, label in (
        ("accuracy", "downstream (validation, pooled over sites)"),
        ("retention", "retention (general)"),
    ):
        points = [(r["version"], r[key]) for r in rows if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    if result["downstream_target"]:
        axes.axhline(result["downstream_target"], linestyle=":", color="grey", label="downstream target")
    axes.set_xlabel("published version (rounds folded)")
    axes.set_ylim(0, 1.05)
    axes.legend(loc="lower right")
    axes.set_title(f"KL {result['kl_nats_per_token']:.4f} of a budget of {result['proof']['max_kl']:g} nats/token")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bytes_ratio(history: list[dict[str, Any]], total_parameters: int) -> tuple[float, float]:
    """(full fp32 exchange over ours, our bytes per client and round), both directions, counted at the socket."""
    exchanged = [c["bytes_up"] + c["bytes_down"] for r in history for c in r["clients"] if c["role"] == "train"]
    mean = sum(exchanged) / len(exchanged)
    return 2 * 4 * total_parameters / mean, mean
