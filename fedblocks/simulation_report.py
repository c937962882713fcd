"""How is a simulated run shown? Tables of devices and rounds, and a picture: score over virtual time and over what was
sent and used up, coverage, every client's time.

Where the costs are those of another model than the one that was trained, every part says so.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedblocks.simulation import SimulationResult

if TYPE_CHECKING:
    from rich.table import Table

COLOURS: Final = {"train": "#4878a8", "evaluate": "#6aa84f", "lost": "#c0504d", "away": "#d9d9d9"}
LONG_S: Final = 7200.0
"""From here on times are told in hours."""
MAX_ROWS: Final = 60
"""Clients of the picture; of more, every n-th is drawn."""
MAX_ROUNDS: Final = 12
"""Rounds of the table; of more, every n-th and the last."""


def print_result(result: SimulationResult) -> None:
    """What each kind of device did, how the rounds went, and what came of the run."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_devices(result))
    if result.rounds:
        console.print(_rounds(result))
    if result.rounds:
        last = result.rounds[-1]
        scores = [
            f"{name} {last[key]:.3f}"
            for name, key in (("accuracy", "accuracy"), ("retention", "retention"))
            if last[key] is not None
        ]
        if last["kl"] is not None:
            budget = "" if last["kl_budget"] is None else f" of {last['kl_budget']:g}"
            scores.append(f"{'drift' if last['forgetting'] == 'drift' else 'KL'} {last['kl']:.4f}{budget}")
        console.print(f"last round: {', '.join(scores)}")
    even = f"{result.jain_index_of_updates:.2f}"
    console.print(f"fairness: Jain's index of the clients' updates {even} (1: all gave as many)")
    end = "finished" if result.finished else "its hours were over"
    console.print(
        f"{len(result.rounds)} rounds in {_duration(result.virtual_s)} of virtual time ({end}), {result.wall_s:.0f} s "
        f"here; state {result.state_sha256[:12]}"
    )


def _title(result: SimulationResult, what: str) -> str:
    return f"{what} (time, bytes and memory of {result.costs_of})" if result.costs_of else what


def _devices(result: SimulationResult) -> Table:
    from rich.table import Table

    table = Table(title=_title(result, "devices"), title_justify="left")
    columns = ("device", "clients", "updates", "of all", "lost", "busy", "up", "down", "memory", "energy")
    for column in (*columns, "accuracy", "worst"):
        table.add_column(column, justify="left" if column == "device" else "right")
    for row in result.device_classes():
        table.add_row(
            row.device,
            f"{row.clients} ({100 * row.share_of_clients:.0f} %)",
            str(row.updates),
            f"{100 * row.share_of_updates:.0f} %",
            str(row.lost),
            f"{100 * row.busy_share:.0f} %",
            f"{row.bytes_up / 1e6:.1f} MB",
            f"{row.bytes_down / 1e6:.1f} MB",
            f"{row.peak_memory_bytes / 2**20:.0f} MiB",
            _or_unknown(None if row.energy_j is None else row.energy_j / 3600, ".2f", " Wh"),
            _or_unknown(row.accuracy, ".3f"),
            _or_unknown(row.accuracy_worst, ".3f"),
        )
    return table


def _rounds(result: SimulationResult) -> Table:
    from rich.table import Table

    table = Table(title=_title(result, "rounds"), title_justify="left")
    for column in ("round", "virtual time", "score", "KL", "updates", "late", "up", "down", "energy", "by block"):
        table.add_column(column, justify="right")
    every = -(-len(result.rounds) // MAX_ROUNDS)
    last = len(result.rounds) - 1
    for row in (row for i, row in enumerate(result.rounds) if i % every == 0 or i == last):
        table.add_row(
            str(row["round"]),
            _duration(row["virtual_s"]),
            _or_unknown(row["score"], ".3f"),
            _or_unknown(row["kl"], ".4f"),
            f"{row['num_accepted']} of {row['num_assigned']}",
            str(len(row["late"])),
            f"{row['bytes_up'] / 1e6:.1f} MB",
            f"{row['bytes_down'] / 1e6:.1f} MB",
            _or_unknown(None if row["energy_j"] is None else row["energy_j"] / 3600, ".3f", " Wh"),
            " ".join(str(count) for count in row["coverage"].values()),
        )
    return table


def _or_unknown(value: float | None, form: str, unit: str = "") -> str:
    return "?" if value is None else f"{value:{form}}{unit}"


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
    figure, (scores, costs, cover, times) = plt.subplots(
        4, 1, figsize=(9, 7.5 + height), gridspec_kw={"height_ratios": [2.5, 2.5, 1.5, height]}
    )
    if result.costs_of:
        figure.suptitle(_title(result, "a model that is trained, and what it would cost"), fontsize=9)
    unit_s, unit = (3600.0, "hours") if result.virtual_s >= LONG_S else (1.0, "seconds")
    moments = [row["virtual_s"] / unit_s for row in result.rounds]
    for key in ("accuracy", "retention"):
        points = [(t, row[key]) for t, row in zip(moments, result.rounds, strict=True) if row[key] is not None]
        scores.plot([t for t, _ in points], [v for _, v in points], marker="o", markersize=3, label=key)
    scores.set_xlabel(f"virtual {unit}")
    scores.set_xlim(0, result.virtual_s / unit_s)
    scores.set_ylim(0, 1.05)
    scores.legend(loc="lower right")

    _draw_costs(costs, result)
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


def _draw_costs(axes: Any, result: SimulationResult) -> None:
    """Score over the bytes that have been sent, and over the energy, by the end of each round."""
    measured = [row for row in result.rounds if row["score"] is not None]
    sent = list(itertools.accumulate((row["bytes_up"] + row["bytes_down"]) / 1e6 for row in result.rounds))
    by_round = {row["round"]: total for row, total in zip(result.rounds, sent, strict=True)}
    axes.plot([by_round[row["round"]] for row in measured], [row["score"] for row in measured], "o-", markersize=3)
    axes.set_xlabel("MB sent, both directions")
    axes.set_ylabel("score")
    axes.set_ylim(0, 1.05)
    energies = [row["energy_j"] for row in result.rounds]
    if measured and None not in energies:
        spent = dict(zip(by_round, itertools.accumulate(energy / 3600 for energy in energies), strict=True))
        above = axes.twiny()
        above.plot(
            [spent[row["round"]] for row in measured], [row["score"] for row in measured], "s--", color="#c0504d"
        )
        above.set_xlabel("Wh of training", color="#c0504d")
