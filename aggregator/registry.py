"""What does the aggregator know of each client? What it said of itself, and what its work has shown since.

Pure records; ``server.py`` keeps them in the ledger. A client's own words (profile, statistics) come with every Hello;
what was measured (speed, memory, held version, bytes) outlives a reconnection, so that a client that lies about its
hardware is believed for one round only (field.md F16).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from fedblocks.profiles.device import DeviceProfile
from fedblocks.protocol.codec import from_plain
from fedblocks.protocol.messages import (
    Assignment,
    ClientKey,
    DataStatistics,
    Delta,
    FailureReason,
    Hello,
)

#: How fast a measurement replaces the older ones (methods.md 6.1).
EMA: Final = 0.3
#: After running out of memory a client's predicted memory grows by this factor (methods.md 6.7).
OOM_FACTOR: Final = 1.25
MEMORY_FAILURES: Final[frozenset[FailureReason]] = frozenset({"oom", "over_memory_budget"})
#: A failed task of these kinds had already taken the new state in.
FAILURES_WITH_STATE: Final[frozenset[FailureReason]] = frozenset(
    {"oom", "over_memory_budget", "non_finite", "deadline"}
)


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
    time_scale: float = 1.0
    """Measured over predicted seconds of a step, moving average."""
    memory_scale: float = 1.0
    """Grows with every out-of-memory and with a measured peak above the predicted one."""
    last_validation_round: int = -1
    """The round in which it last measured its validation part; -1 for never."""
    last_general_round: int = -1
    received_bytes: int = 0
    """At the socket, from this client, over the whole run."""
    sent_bytes: int = 0


def client_from_hello(key: ClientKey, hello: Hello, known: KnownClient | None) -> KnownClient:
    """The record after a Hello: the client's own words replaced, what was measured kept.

    A new device (another name in the profile) starts with a clean slate of measurements.
    """
    same_device = known is not None and known.profile.device == hello.profile.device
    return KnownClient(
        key=key,
        name=hello.client_name,
        software=hello.software,
        profile=hello.profile,
        statistics=hello.statistics,
        can_evaluate_general=hello.can_evaluate_general,
        held_version=hello.held_version,
        time_scale=known.time_scale if known is not None and same_device else 1.0,
        memory_scale=known.memory_scale if known is not None and same_device else 1.0,
        last_validation_round=known.last_validation_round if known is not None else -1,
        last_general_round=known.last_general_round if known is not None else -1,
        received_bytes=known.received_bytes if known is not None else 0,
        sent_bytes=known.sent_bytes if known is not None else 0,
    )


def after_update(client: KnownClient, assignment: Assignment, delta: Delta, predicted_step_s: float) -> KnownClient:
    """The record after an accepted update: its speed and its memory as measured.

    Args:
        predicted_step_s: what planning expected of one step of this assignment, at time scale 1; 0 if unknown.
    """
    time_scale = client.time_scale
    if predicted_step_s > 0 and delta.train.step_s > 0:
        measured = delta.train.step_s / predicted_step_s
        # The first measurement replaces the declared speed at once (field.md F16).
        time_scale = measured if time_scale == 1.0 else (1 - EMA) * time_scale + EMA * measured
    predicted, peak = assignment.predicted_peak_bytes, delta.train.peak_memory_bytes
    memory_scale = client.memory_scale * (peak / predicted) if 0 < predicted < peak else client.memory_scale
    return replace(
        client, time_scale=time_scale, memory_scale=memory_scale, held_version=assignment.state.to_version
    )


def after_failure(client: KnownClient, version: int, reason: FailureReason) -> KnownClient:
    """The record after a failed task that started from ``version``."""
    scale = OOM_FACTOR if reason in MEMORY_FAILURES else 1.0
    held = version if reason in FAILURES_WITH_STATE else client.held_version
    return replace(client, memory_scale=client.memory_scale * scale, held_version=held)


def client_from_record(record: Mapping[str, Any]) -> KnownClient:
    """The record as the ledger kept it.

    Raises:
        RemoteProtocolError: it was written by another release.
    """
    return from_plain(KnownClient, dict(record), where="ledger.clients")
