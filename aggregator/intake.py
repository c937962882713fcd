"""Does this update count? What is asked when it is announced, and what when its bytes are here.

An update that was stored before is acknowledged again, whatever else has happened since; everything else goes through
``admission.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedblocks.aggregator import admission
from fedblocks.aggregator.aggregation import map_payload
from fedblocks.aggregator.ledger import Ledger
from fedblocks.aggregator.registry import KnownClient
from fedblocks.aggregator.run_folder import RunFolder
from fedblocks.protocol.messages import (
    Ack,
    Assignment,
    ClientKey,
    Delta,
    Evaluate,
    Measurement,
    Probe,
    ProbeRow,
    Refused,
)
from fedblocks.protocol.payloads import commit_file

#: The operator's cap on n_k; above it a declared number is taken for a mistake.
MAX_NUM_EXAMPLES: Final = 10_000_000
#: A client may upload so many of the largest payloads in one round.
QUOTA_PAYLOADS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where the run stands when an update is looked at."""

    round: int
    """The round whose fold would count it."""
    version: int
    open: bool
    """False once the last round is closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """The update is durable and will be folded once its ledger row is committed."""

    assignment: Assignment
    measured: tuple[Measurement, ...]
    """Of what the client reports, what it was asked for."""


class Intake:
    """The checks of one run, and what each client has uploaded in this round."""

    def __init__(self, folder: RunFolder, ledger: Ledger) -> None:
        self._folder = folder
        self._ledger = ledger
        self._shape = folder.plan.units
        self._limits = admission.Limits(
            max_payload_bytes=admission.largest_payload_bytes(self._shape, folder.plan.unit_ids),
            max_num_examples=MAX_NUM_EXAMPLES,
            max_learning_rate=folder.config.training.learning_rate,
        )
        self._uploaded_bytes: Counter[ClientKey] = Counter()

    def new_round(self) -> None:
        """Quotas start anew."""
        self._uploaded_bytes.clear()

    def announced(
        self, key: ClientKey, client: KnownClient | None, delta: Delta, moment: Moment
    ) -> Ack | Refused | None:
        """None if the payload may come; an Ack if this very update was stored before."""
        accepted = self._ledger.stored_sha256(key, delta.round, delta.attempt_id)
        if accepted is not None and accepted == delta.payload_sha256:
            return Ack(attempt_id=delta.attempt_id, payload_sha256=accepted)
        quota_bytes = QUOTA_PAYLOADS * self._limits.max_payload_bytes - self._uploaded_bytes[key]
        refused = self._check(client, delta, moment, accepted, quota_bytes)
        if refused is None:
            self._uploaded_bytes[key] += delta.payload_bytes
        return refused

    def arrived(
        self, key: ClientKey, client: KnownClient, delta: Delta, part: Path, moment: Moment, *, unix_s: float
    ) -> Counted | Ack | Refused:
        """Verify the values in ``part``, make them durable and write the ledger row, to be committed by the caller.

        The bytes' hash was verified on arrival (:class:`endpoint.UploadFinished`) and is again before the fold.

        The round may have closed since the announcement, or the same update may have come over another connection, so
        all is asked again. ``part`` is gone afterwards.

        Raises:
            OSError: the payload cannot be made durable.
        """
        try:
            accepted = self._ledger.stored_sha256(key, delta.round, delta.attempt_id)
            if accepted is not None and accepted == delta.payload_sha256:
                return Ack(attempt_id=delta.attempt_id, payload_sha256=accepted)
            refused = self._check(client, delta, moment, accepted, delta.payload_bytes)
            if refused is not None:
                return refused
            stored = self._ledger.assignment(delta.attempt_id)
            assert stored is not None
            assert isinstance(stored.message, Assignment)
            refused = admission.check_payload(
                delta, stored.message, map_payload(part), shape=self._shape, limits=self._limits, hashed=True
            )
            if refused is not None:
                return refused
            final = self._folder.update_path(moment.round, delta.attempt_id)
            self._folder.make_room_for(final)
            commit_file(part, final)
        finally:
            part.unlink(missing_ok=True)
        measured = asked_for(stored.message, delta.measurements)
        self._ledger.add_update(key, delta, measurements=measured, folded_in=moment.round, unix_s=unix_s)
        return Counted(assignment=stored.message, measured=measured)

    def _check(
        self, client: KnownClient | None, delta: Delta, moment: Moment, accepted: str | None, quota_bytes: int
    ) -> Refused | None:
        """The checks of methods.md 8.1 that need no payload."""
        if client is None:
            text = "no Hello came from this key yet: say Hello first"
            return Refused(code="unknown_attempt", text=text, attempt_id=delta.attempt_id)
        stored = self._ledger.assignment(delta.attempt_id)
        issued = stored if stored is not None and stored.client_key == client.key else None
        assignment = issued.message if issued is not None and isinstance(issued.message, Assignment) else None
        refused = admission.check_announcement(
            delta,
            assignment=assignment,
            shape=self._shape,
            limits=self._limits,
            quota_bytes=quota_bytes,
            declared_num_examples=client.statistics.num_examples,
            version=moment.version,
            accepted_sha256=accepted,
        )
        if refused is not None:
            return refused
        if not moment.open:
            text = f"round {delta.round} is closed and the run is ending"
            return Refused(code="stale_round", text=text, attempt_id=delta.attempt_id)
        if issued is not None and issued.outcome not in ("open", "late"):
            text = f"attempt {delta.attempt_id!r} has ended already ({issued.outcome}: {issued.detail})"
            return Refused(code="conflict", text=text[:1000], attempt_id=delta.attempt_id)
        return None


def tried(task: Probe, rows: Iterable[ProbeRow]) -> tuple[ProbeRow, ...]:
    """Of a client's table what it was asked for; of several rows alike the first."""
    found: dict[tuple[int, float], ProbeRow] = {}
    for row in rows:
        asked = row.block in task.candidates and row.strength in task.strengths
        if asked and row.num_tokens > 0 and row.num_anchor_tokens > 0:
            found.setdefault((row.block, row.strength), row)
    return tuple(found.values())


def asked_for(task: Assignment | Evaluate, measurements: Iterable[Measurement]) -> tuple[Measurement, ...]:
    """Of what a client reports, what it was asked to measure and could have found."""
    return tuple(
        m
        for m in measurements
        if m.measure in task.measure
        and m.version == task.state.to_version
        and m.strength in (task.strengths if isinstance(task, Evaluate) else (1.0,))
        and 0 <= m.num_correct <= m.num_items
        and m.num_tokens >= 0
    )
