"""What does the aggregator know of each client? What it said of itself, and what its work has shown since.

Pure records; ``server.py`` keeps them in the ledger. A client's own words (profile, statistics) come with every Hello;
what was measured (speed, memory, held version, bytes) outlives a reconnection, so that a client that lies about its
hardware is believed for one round only (field.md F16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from fedblocks.aggregator.allocation import ProfiledSeconds, running_mean
from fedblocks.profiles import calibration
from fedblocks.profiles.calibration import Calibration
from fedblocks.profiles.device import DeviceProfile
from fedblocks.protocol.codec import from_plain
from fedblocks.protocol.messages import (
    Assignment,
    ClientKey,
    DataStatistics,
    Delta,
    FailureReason,
    Hello,
    TrainReport,
)

#: After running out of memory a client's predicted memory grows by this factor (methods.md 6.7).
OOM_FACTOR: Final = 1.25
#: A held version that no step leads from: the client is sent the whole state.
UNKNOWN_VERSION: Final = -1
MEMORY_FAILURES: Final[frozenset[FailureReason]] = frozenset({"oom", "over_memory_budget"})
#: A failed task of these kinds had already taken the new state in.
FAILURES_WITH_STATE: Final[frozenset[FailureReason]] = frozenset(
    {"oom", "over_memory_budget", "non_finite", "deadline"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEnergy:
    """Running mean of the gradient energy that a client reported for a block (methods.md 5.5)."""

    block: int
    energy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownClient:
    """One client, as planning sees it."""

    key: ClientKey
    name: str
    software: str
    profile: DeviceProfile
    statistics: DataStatistics
    can_evaluate_general: bool
    held_version: int
    calibration: Calibration | None = None
    """What its steps have shown of its profile; None until one was measured."""
    memory_scale: float = 1.0
    """Factor on the predicted memory; grows with every task that ran out of it."""
    gradient_energy: tuple[BlockEnergy, ...] = ()
    trained_sequences: int = 0
    """Training sequences of its accepted rounds: so many prefixes are cached by now, up to all it has."""
    anchored_sequences: int = 0
    """The same for the anchor set."""
    last_validation_round: int = 0
    """The round in which it last measured its validation part; 0 for never."""
    last_general_round: int = 0
    last_chosen_round: int = 0
    """The last round that it took part in; 0 for none."""
    last_update_unix_s: float = 0.0
    """When an update of its was last accepted."""
    received_bytes: int = 0
    """At the socket, from this client, over the whole run."""
    sent_bytes: int = 0


def client_from_hello(key: ClientKey, hello: Hello, known: KnownClient | None) -> KnownClient:
    """The record after a Hello: the client's own words replaced, what was measured kept.

    A new device (another name in the profile) starts with a clean slate of measurements.
    """
    fresh = KnownClient(
        key=key,
        name=hello.client_name,
        software=hello.software,
        profile=hello.profile,
        statistics=hello.statistics,
        can_evaluate_general=hello.can_evaluate_general,
        held_version=hello.held_version,
    )
    if known is None:
        return fresh
    kept = replace(
        fresh,
        gradient_energy=known.gradient_energy,
        last_validation_round=known.last_validation_round,
        last_general_round=known.last_general_round,
        last_chosen_round=known.last_chosen_round,
        received_bytes=known.received_bytes,
        sent_bytes=known.sent_bytes,
    )
    if known.profile.device != hello.profile.device:
        return kept
    return replace(
        kept,
        calibration=(
            None if known.calibration is None else calibration.rebased(known.calibration, known.profile, hello.profile)
        ),
        memory_scale=known.memory_scale,
        last_update_unix_s=known.last_update_unix_s,
        trained_sequences=known.trained_sequences,
        anchored_sequences=known.anchored_sequences,
    )


def after_update(
    client: KnownClient, assignment: Assignment, delta: Delta, profiled: ProfiledSeconds
) -> tuple[KnownClient, str]:
    """The record after an accepted update: its speed as measured, its gradient energies, what it holds now.

    Args:
        profiled: what its profile predicts for what it did.

    Returns:
        The record, and a line for the operator where the client has another speed than it had; else an empty one.
    """
    known, change = _with_report(client.calibration, assignment, delta.train, profiled)
    energies = {e.block: e.energy for e in client.gradient_energy}
    if len(delta.train.gradient_energy) == len(assignment.blocks):
        for block, energy in zip(assignment.blocks, delta.train.gradient_energy, strict=True):
            energies[block] = running_mean(energies.get(block), energy)
    anchored = -(-delta.steps // assignment.anchor_every) * assignment.anchor_batch_size
    after = replace(
        client,
        calibration=known,
        gradient_energy=tuple(BlockEnergy(block=b, energy=energies[b]) for b in sorted(energies)),
        trained_sequences=client.trained_sequences + delta.steps * assignment.batch_size,
        anchored_sequences=client.anchored_sequences + anchored,
        held_version=assignment.state.to_version,
    )
    return after, "" if change is None else speed_note(client.name, change)


def _with_report(
    known: Calibration | None, assignment: Assignment, report: TrainReport, profiled: ProfiledSeconds
) -> tuple[Calibration | None, float | None]:
    """The calibration with a report, and measured over predicted where that set the device to a new speed.

    The first report replaces the declared speed at once (field.md F16); a client that cannot say how long a step took
    teaches nothing.
    """
    if not (math.isfinite(report.step_s) and report.step_s > 0):
        return known, None
    seen = calibration.observe(known, profiled.step, report.step_s)
    found = calibration.with_prefix(seen.calibration, profiled.prefix_s, report.prefix_s)
    if "anchor" in assignment.measure:  # what is predicted is the anchor's part, whatever else was asked for
        found = calibration.with_measuring(found, profiled.measuring_s, report.measure_s)
    return found, seen.change


def speed_note(name: str, change: float) -> str:
    """What an operator is told of a client whose steps took ``change`` times what was predicted, twice in a row."""
    planned = "twice in a row: planned for at its new speed"
    if change < 1:
        return f"{name} is {1 / change:.1f} times as fast as was predicted, {planned}"
    return (
        f"{name} takes {change:.1f} times what was predicted, {planned}. If nothing else should be running there, look "
        "at its load and temperature; fedblocks probe shows what it can do now"
    )


def after_failure(client: KnownClient, version: int, reason: FailureReason) -> KnownClient:
    """The record after a failed task that started from ``version``."""
    scale = OOM_FACTOR if reason in MEMORY_FAILURES else 1.0
    held = version if reason in FAILURES_WITH_STATE else UNKNOWN_VERSION
    return replace(client, memory_scale=client.memory_scale * scale, held_version=held)


def client_from_record(record: Mapping[str, Any]) -> KnownClient:
    """The record as the ledger kept it.

    Raises:
        RemoteProtocolError: it was written by another release.
    """
    return from_plain(KnownClient, dict(record), where="ledger.clients")
