"""How is a simulated run shown? Two tables, and a picture: score over virtual time, coverage, every client's time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from fedblocks.simulation import SimulationResult

COLOURS: Final = {"train": "#4878a8", "evaluate": "#6aa84f", "lost": "#c0504d", "away": "#d9d9d9"}
LONG_S: Final = 7200.0
"""From here on times are told in hours."""
MAX_ROWS: Final = 60
"""Clients of the picture; of more, every n-th is drawn."""


def print_result(result: SimulationResult) -> None:
    """What each kind of device did, and what came of the run."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    devices = Table(title="devices", title_justify="left")
    for column in ("device", "clients", "updates", "of all", "lost", "busy", "up", "down", "energy"):
        devices.add_column(column, justify="left" if column == "device" else "right")
    for row in result.device_classes():
        devices.add_row(
            row.device,
            str(row.clients),
            str(row.updates),
            f"{100 * row.share_of_updates:.0f} %",
            str(row.lost),
            f"{100 * row.busy_share:.0f} %",
            f"{row.bytes_up / 1e6:.1f} MB",
            f"{row.bytes_down / 1e6:.1f} MB",
            "?" if row.energy_j is None else f"{row.energy_j / 3600:.2f} Wh",
        )
    console.print(devices)
    if result.rounds:
        last = result.rounds[-1]
        scores = [
            f"{name} {last[key]:.3f}"
            for name, key in (("accuracy", "accuracy"), ("retention", "retention"))
            if last[key] is not None
        ]
        if last["kl"] is not None:
            scores.append(f"KL {last['kl']:.4f} of {last['kl_budget']:g}")
        console.print(f"last round: {', '.join(scores)}")
    end = "finished" if result.finished else "its hours were over"
    console.print(
        f"{len(result.rounds)} rounds in {_duration(result.virtual_s)} of virtual time ({end}), {result.wall_s:.0f} s "
        f"here; state {result.state_sha256[:12]}"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= LONG_S else f"{seconds:.0f} s"


def plot(result: SimulationResult, path: Path, say: Callable[[str], None]) -> None:
    """Writes the picture; said and left out where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        say("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    clients = result.clients[:: max(1, -(-len(result.clients) // MAX_ROWS))]
    height = 3.0 + 0.18 * len(clients)
    figure, (scores, cover, times) = plt.subplots(
        3, 1, figsize=(9, 5 + height), gridspec_kw={"height_ratios": [2.5, 1.5, height]}
    )
    unit_s, unit = (3600.0, "hours") if result.virtual_s >= LONG_S else (1.0, "seconds")
    moments = [row["virtual_s"] / unit_s for row in result.rounds]
    for key in ("accuracy", "retention"):
        points = [(t, row[key]) for t, row in zip(moments, result.rounds, strict=True) if row[key] is not None]
        scores.plot([t for t, _ in points], [v for _, v in points], marker="o", markersize=3, label=key)
    scores.set_xlabel(f"virtual {unit}")
    scores.set_xlim(0, result.virtual_s / unit_s)
    scores.set_ylim(0, 1.05)
    scores.legend(loc="lower right")

    blocks = sorted({block for counts in result.coverage.values() for block in counts})
    devices = list(result.coverage)
    table: list[list[Any]] = [[result.coverage[device].get(block, 0) for block in blocks] for device in devices]
    if table and blocks:
        cover.imshow(table, aspect="auto", cmap="Blues", vmin=0, alpha=0.6)
        cover.set_xticks(range(len(blocks)), [f"block {block}" for block in blocks])
        cover.set_yticks(range(len(devices)), devices)
        for y, counts in enumerate(table):
            for x, count in enumerate(counts):
                cover.text(x, y, str(count), ha="center", va="center", fontsize=8)
    cover.set_title("accepted updates", fontsize=9)

    for y, client in enumerate(clients):
        for span in client.spans:
            end_s = min(span["end_s"], result.virtual_s)
            took_s = end_s - span["start_s"]
            times.barh(y, took_s / unit_s, left=span["start_s"] / unit_s, color=COLOURS[span["kind"]])
    times.set_yticks(range(len(clients)), [client.name for client in clients], fontsize=6)
    times.set_xlabel(f"virtual {unit}")
    times.set_xlim(0, result.virtual_s / unit_s)
    times.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()],
        labels=list(COLOURS),
        loc="upper right",
        fontsize=7,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
