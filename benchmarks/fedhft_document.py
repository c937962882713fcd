"""Writes FedHFT's part of docs/results.md from methods.json: ``python benchmarks/fedhft_document.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from demos_document import PAGE, replace_part
from starter_runs import RESULTS

MARK: Final = "benchmarks/fedhft_document.py"
KEY: Final = "fedhft"
NAMES: Final = {
    "two": "Two populations: the ten domains of CLINC150, which every second client names otherwise",
    "banking77": "Banking77",
    "clinc150": "CLINC150",
}
KIB: Final = 1 << 10
MIB: Final = 1 << 20


def parts_of(found: Mapping[str, Any]) -> list[str]:
    """The sections."""
    return [_opening(found), *(_place(found["table"], data, alpha) for data, alpha in _places(found["table"]))]


def _places(table: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    order = {name: i for i, name in enumerate(NAMES)}
    return sorted({(e["data"], e["alpha"]) for e in table}, key=lambda p: (order[p[0]], p[1]))


def _opening(found: Mapping[str, Any]) -> str:
    missing = found["runs_missing"]
    state = (
        f"**{missing} of {found['runs_planned']} runs are missing:** `make bench-fedhft` goes on. " if missing else ""
    )
    swept = {row["line"] for row in found["sweep"]}
    rates = ", ".join(f"{line} {rate:g}" for line, rate in found["learning_rates"].items() if line in swept)
    chosen = f"Learning rates chosen on seed 0: {rates}." if swept else "No learning rate has been swept yet."
    return f"""## FedHFT over MiniLM

{state}`{found["command"]}`: all-MiniLM-L6-v2, {found["clients"]} clients, a share of {found["cohort_fraction"]:g} in each round,
12 rounds, three device classes (a quarter, half, all of the rows; ranks 8, 16, 32 for hetlora), fp32 payloads. {chosen}
Accuracy is the mean over clients on their own parts of the test file, of each client's own model (personal) and of one for
all (population); worst is the mean of the worst tenth. STS-B: Spearman of 400 pairs, population's model. Means over seeds."""


def _place(table: Sequence[Mapping[str, Any]], data: str, alpha: float) -> str:
    rows = [_row(entry) for entry in table if (entry["data"], entry["alpha"]) == (data, alpha)]
    title = NAMES[data] if data == "two" else f"{NAMES[data]}, Dirichlet {alpha:g}"
    return f"""### {title}

| line | seeds | personal | population | worst | fedhft minus this, points | STS-B (before) | drift | up, down KiB a client and round | \
trained MiB, weak to strong | clusters |
|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}"""


def _row(entry: Mapping[str, Any]) -> str:
    gap = entry.get("fedhft_minus_this_points")
    interval = f"{gap['points']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f})" if gap else ""
    memory = " / ".join(f"{value / MIB:.1f}" for value in entry["trained_bytes"].values())
    found = [value for value in entry.get("adjusted_rand", ()) if value is not None]
    agreement = f", adjusted Rand {min(found):.2f}" if found else ""
    clusters = "".join(map(str, sorted(set(entry.get("clusters", ())))))
    up, down = (entry[f"{way}_bytes_per_client_round"] / KIB for way in ("up", "down"))
    return (
        f"| {entry['line']} | {len(entry['seeds'])} | {_accuracy(entry, 'personal_mean')} | "
        f"{_accuracy(entry, 'population_mean')} | {_accuracy(entry, 'personal_worst')} | {interval} | "
        f"{entry['sts_population']:.3f} ({entry['sts_before']:.3f}) | {entry['drift_population']:.3f} | "
        f"{up:,.0f}, {down:,.0f} | {memory} | {clusters}{agreement} |"
    )


def _accuracy(entry: Mapping[str, Any], key: str) -> str:
    spread = entry[f"{key}_accuracy_sd"]
    return f"{entry[f'{key}_accuracy']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def write() -> None:
    """Replaces the part."""
    content = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))
    replace_part(PAGE, MARK, parts_of(content[KEY]))


if __name__ == "__main__":
    write()
