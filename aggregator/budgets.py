"""What has a run spent, and is that all it may spend? Seconds, bytes and joules (``run.max_*``; methods.md 9)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from fedblocks.profiles import catalog_files
from fedblocks.protocol.messages import TrainReport
from fedblocks.protocol.run_config import RunSection

SpentReason = Literal["max_seconds", "max_bytes", "max_joules"]
POWER: Final = "board_power_w"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Sums over all rounds that have closed."""

    seconds: float = 0.0
    """While a round was open; waiting for clients in between is not counted."""
    num_bytes: int = 0
    """At the sockets, up and down."""
    joules: float = 0.0
    """Of the clients' accepted work, by the power that the catalog says of their boards (:func:`energy_j`)."""


def exhausted(spent: Spent, limits: RunSection) -> SpentReason | None:
    """The first limit that is reached; 0 is no limit."""
    if 0 < limits.max_seconds <= spent.seconds:
        return "max_seconds"
    if 0 < limits.max_bytes <= spent.num_bytes:
        return "max_bytes"
    return "max_joules" if 0 < limits.max_joules <= spent.joules else None


def power_w(device: str) -> float | None:
    """Power of a board of the catalog; None for another device, or where the catalog does not say."""
    if device not in catalog_files.names():
        return None
    fact = catalog_files.entry(device).facts.get(POWER)
    return None if fact is None else float(fact.value)


def energy_j(reports: Iterable[tuple[str, TrainReport]]) -> float:
    """Of these reports by device: seconds of work times the board's power. Boards of unknown power count as 0."""
    seconds: dict[str, float] = {}
    for device, report in reports:
        worked_s = report.prefix_s + report.train_s + report.measure_s + report.encode_s
        seconds[device] = seconds.get(device, 0.0) + worked_s
    return sum(worked_s * (power_w(device) or 0.0) for device, worked_s in sorted(seconds.items()))
