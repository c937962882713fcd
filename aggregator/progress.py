"""What does a run tell its operator after each round? One record (a line of metrics.jsonl) and one line of text.

Keys of the record, units in their names (stable; docs/cli.md):

``round, version, state_sha256, stop_reason``; ``loss`` (weighted mean of the clients' last quarter, nats per target
token); ``score, accuracy, nll_per_token`` (pooled validation of the version that the round started from);
``general_accuracy, general_nll_per_token, retention``; ``kl, kl_budget, kl_over_budget, anchor_weight, learning_rate``;
``coverage`` (block id -> number of clients that trained it), ``coverage_weight`` (block id -> share of the accepted
weight); ``num_accepted, num_stale, num_refused, num_failed, late`` (names); ``bytes_up, bytes_down`` (at the socket,
since the last record, from the clients' side); ``round_s, fold_s, deadline_s, extended, eta_s``; ``clients``, one
record per assigned client (see :class:`ClientRecord`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedblocks.aggregator.ledger import StoredAssignment, StoredUpdate
from fedblocks.aggregator.methods.fedbe import Pooled, score
from fedblocks.aggregator.registry import KnownClient
from fedblocks.protocol.codec import to_plain
from fedblocks.protocol.messages import Assignment

ETA_ROUNDS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRecord:
    """One client's round."""

    name: str
    key: str
    device: str
    role: str
    """train or evaluate."""
    outcome: str
    """stored, reported, refused, failed or late."""
    detail: str
    blocks: tuple[int, ...]
    steps: int
    steps_done: int
    predicted_seconds: float
    measured_seconds: float
    predicted_peak_bytes: int
    peak_memory_bytes: int
    step_s: float
    loss_first: float | None
    loss_last: float | None
    bytes_up: int
    bytes_down: int


def client_record(
    client: KnownClient,
    assignment: StoredAssignment,
    update: StoredUpdate | None,
    *,
    bytes_up: int,
    bytes_down: int,
) -> ClientRecord:
    """What became of one assignment."""
    message = assignment.message
    train = message if isinstance(message, Assignment) else None
    report = update.delta.train if update is not None else None
    return ClientRecord(
        name=client.name,
        key=client.key,
        device=client.profile.device,
        role="train" if train is not None else "evaluate",
        outcome=assignment.outcome,
        detail=assignment.detail,
        blocks=train.blocks if train is not None else (),
        steps=train.steps if train is not None else 0,
        steps_done=update.delta.steps if update is not None else 0,
        predicted_seconds=train.predicted_seconds if train is not None else 0.0,
        measured_seconds=(
            report.prefix_s + report.train_s + report.measure_s + report.encode_s if report is not None else 0.0
        ),
        predicted_peak_bytes=train.predicted_peak_bytes if train is not None else 0,
        peak_memory_bytes=report.peak_memory_bytes if report is not None else 0,
        step_s=report.step_s if report is not None else 0.0,
        loss_first=report.loss_first if report is not None else None,
        loss_last=report.loss_last if report is not None else None,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
    )


def weighted_loss(updates: Sequence[StoredUpdate]) -> float | None:
    """Mean of the clients' last losses, weighted by their target tokens."""
    tokens = sum(u.delta.train.num_target_tokens for u in updates)
    if not tokens:
        return None
    return sum(u.delta.train.loss_last * u.delta.train.num_target_tokens for u in updates) / tokens


def contributors(updates: Sequence[StoredUpdate], blocks: Sequence[int]) -> dict[str, int]:
    """Block id (as text, for JSON) -> number of accepted updates that trained it; 0 for a hole."""
    trained = [{header.block for header in u.delta.tensors} for u in updates]
    return {str(block): sum(block in found for found in trained) for block in blocks}


def measured_values(pooled: Pooled, retention: float | None, budget: float) -> dict[str, Any]:
    """The measured part of a record; None where nobody measured."""
    return {
        "score": score(pooled),
        "accuracy": pooled.accuracy,
        "nll_per_token": pooled.nll,
        "general_accuracy": pooled.general_accuracy,
        "general_nll_per_token": pooled.general_nll,
        "retention": retention,
        "kl": pooled.kl,
        "kl_budget": budget,
        "kl_over_budget": None if pooled.kl is None else pooled.kl / budget,
    }


def eta_s(seconds: Sequence[float], rounds_left: int) -> float:
    """Expected seconds until the last round, from the newest rounds' durations."""
    newest = list(seconds)[-ETA_ROUNDS:]
    return rounds_left * sum(newest) / len(newest) if newest else 0.0


def plain_clients(records: Sequence[ClientRecord]) -> list[Any]:
    """The records as JSON values."""
    return [to_plain(record) for record in records]


def round_line(record: Mapping[str, Any], max_rounds: int) -> str:
    """The record as the one line that people read (field.md 7)."""
    parts = [f"round {record['round']}/{max_rounds}"]
    if record["loss"] is not None:
        parts.append(f"loss {record['loss']:.3f}")
    if record["accuracy"] is not None:
        parts.append(f"accuracy {record['accuracy']:.3f}")
    elif record["nll_per_token"] is not None:
        parts.append(f"nll {record['nll_per_token']:.3f}")
    if record["retention"] is not None:
        parts.append(f"retention {record['retention']:.3f}")
    if record["kl"] is not None:
        parts.append(f"kl {record['kl']:.4f}/{record['kl_budget']:g}")
    counts = list(record["coverage"].values())
    covered = sum(count > 0 for count in counts)
    parts.append(f"coverage {covered}/{len(counts)} (min {min(counts, default=0)})")
    parts.append(f"up {_size(record['bytes_up'])} down {_size(record['bytes_down'])}")
    parts += [f"{what} {record[f'num_{what}']}" for what in ("refused", "failed") if record[f"num_{what}"]]
    if record["late"]:
        parts.append(f"late {len(record['late'])} ({', '.join(record['late'])})")
    if not record["num_accepted"]:
        parts.append("EMPTY: the state is unchanged")
    if record["stop_reason"] is None:
        parts.append(f"eta {_duration(record['eta_s'])}")
    else:
        parts.append(f"stop: {record['stop_reason']}")
    return "  ".join(parts)


def final_line(record: Mapping[str, Any]) -> str:
    """The result in one line."""
    parts = [f"finished after {record['rounds']} rounds ({record['stop_reason']})"]
    if record["accuracy"] is not None:
        parts.append(f"accuracy {record['accuracy']:.3f}")
    if record["nll_per_token"] is not None:
        parts.append(f"nll {record['nll_per_token']:.3f}")
    if record["retention"] is not None:
        parts.append(f"retention {record['retention']:.3f}")
    if record["kl"] is not None:
        parts.append(f"kl {record['kl']:.4f}/{record['kl_budget']:g}")
    return "  ".join([*parts, f"state {record['state_sha256'][:12]}"])


def _size(num_bytes: int) -> str:
    if num_bytes >= 10_000_000:
        return f"{num_bytes / 1e6:.0f} MB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1_000_000 else f"{num_bytes / 1e3:.0f} kB"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
