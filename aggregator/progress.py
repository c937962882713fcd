"""What does a run tell its operator after each round? One record (a line of metrics.jsonl) and one line of text.

Keys of the record, units in their names (stable; docs/cli.md):

``round, version, state_sha256, stop_reason``;
``loss`` (weighted mean of the clients' last quarter, nats per target token);
``score, accuracy, nll_per_token`` (pooled validation of the version that the round started from), ``general_accuracy,
general_nll_per_token, retention``; ``kl, kl_budget, kl_over_budget, forgetting``;
``epsilon`` (spent by a private run, else null);
``prior_error`` (what the priors that clients started from left out, mean; else null);
``anchor_weight`` (of this round), ``next_anchor_weight, learning_rate``;
``active_blocks`` (ids of the blocks that the model had), ``next_active_blocks`` (one more after a growth),
``growth_refused`` (why a block was not added; empty), ``spent`` (``seconds, num_bytes, joules`` so far);
``coverage`` (active block id -> number of clients that trained it), ``coverage_weight`` (active block id -> share of
the accepted weight);
``num_assigned, num_accepted, num_stale, num_refused, num_failed, late`` (names);
``bytes_up, bytes_down`` (at the socket, since the last record, from the clients' side);
``round_s, fold_s, deadline_s, extended, eta_s``;
``clients``, one record per assigned client (see :class:`ClientRecord`).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedblocks.aggregator import privacy
from fedblocks.aggregator.ledger import StoredAssignment, StoredRound, StoredUpdate
from fedblocks.aggregator.registry import KnownClient
from fedblocks.aggregator.run_folder import RunInfo
from fedblocks.aggregator.run_rules import (
    ClosedRound,
    GlobalState,
    MethodState,
    Pooled,
    learning_rate,
    pool,
    retention,
    score,
)
from fedblocks.aggregator.strength import choose_strength
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol.codec import to_plain
from fedblocks.protocol.messages import Assignment, ClientKey, Measurement
from fedblocks.protocol.run_config import ForgettingSection, RunConfig

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
    step_time_error: float | None
    """Median of |predicted / measured - 1| of its newest steps, each predicted before it was measured; null before."""
    mode: ExecutionMode | None
    """How the client carried it out, as its update says; null without one."""
    kernel_falls: tuple[str, ...]
    """Where a faster kernel was passed over on its GPU, and why."""
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
        step_time_error=client.calibration.error if client.calibration is not None else None,
        mode=report.mode if report is not None else None,
        kernel_falls=report.kernel_falls if report is not None else (),
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


def measured_values(pooled: Pooled, kept: float | None, forgetting: ForgettingSection) -> dict[str, Any]:
    """The measured part of a record; None where nobody measured. Of an encoder ``kl`` is the drift."""
    budget = forgetting.budget
    return {
        "score": score(pooled),
        "accuracy": pooled.accuracy,
        "nll_per_token": pooled.nll,
        "general_accuracy": pooled.general_accuracy,
        "general_nll_per_token": pooled.general_nll,
        "retention": kept,
        "kl": pooled.kl,
        "kl_budget": budget,
        "kl_over_budget": None if pooled.kl is None or budget is None else pooled.kl / budget,
        "forgetting": forgetting.name,
    }


def forgetting_text(values: Mapping[str, Any]) -> str:
    """``kl 0.0123/0.03``, ``drift 0.0040/0.01``, or ``drift 0.0040`` without a budget."""
    text = f"{values['forgetting']} {values['kl']:.4f}"
    return text if values["kl_budget"] is None else f"{text}/{values['kl_budget']:g}"


def round_record(
    record: StoredRound,
    closed: ClosedRound,
    *,
    before: MethodState,
    config: RunConfig,
    blocks: Sequence[int],
    active: Sequence[int],
    assigned: Sequence[StoredAssignment],
    updates: Sequence[StoredUpdate],
    clients: Mapping[ClientKey, KnownClient],
    bytes_by_key: Mapping[ClientKey, tuple[int, int]],
    earlier_s: Sequence[float],
    open_s: float,
    fold_s: float,
    prior_errors: Sequence[float] = (),
) -> dict[str, Any]:
    """The record of a round that is about to be committed.

    Args:
        before: the method's state that the round was planned with.
        blocks: ids of the units that were there to train.
        active: ids of the active expanded blocks.
        bytes_by_key: (up, down) of each client since the last record.
        earlier_s: durations of the last rounds.
        open_s: seconds from the assignments to the close.
        prior_errors: of the priors that clients started from.
    """
    by_attempt = {u.delta.attempt_id: u for u in updates}
    outcomes = Counter(a.outcome for a in assigned)
    round_s = open_s + fold_s
    return {
        "round": record.round,
        "version": closed.model.version,
        "state_sha256": closed.model.sha256,
        "stop_reason": closed.stop_reason,
        "loss": weighted_loss(updates),
        **measured_values(closed.pooled, retention(closed.pooled, closed.state), config.forgetting),
        "epsilon": epsilon_spent(closed, config),
        "prior_error": statistics.fmean(prior_errors) if prior_errors else None,
        "anchor_weight": before.anchor_weight,
        "next_anchor_weight": closed.state.anchor_weight,
        "learning_rate": learning_rate(config, record.round),
        "active_blocks": list(active),
        "next_active_blocks": list(closed.state.growth.active or active),
        "growth_refused": closed.state.growth.refused,
        "spent": to_plain(closed.state.spent),
        "coverage": contributors(updates, blocks),
        "coverage_weight": {str(block): closed.folded.coverage.get(block, 0.0) for block in blocks},
        "num_assigned": len(assigned),
        "num_accepted": len(updates),
        "num_stale": sum(u.delta.round != record.round for u in updates),
        "num_refused": outcomes["refused"],
        "num_failed": outcomes["failed"],
        "late": sorted(clients[a.client_key].name for a in assigned if a.outcome == "late"),
        "bytes_up": sum(up for up, _ in bytes_by_key.values()),
        "bytes_down": sum(down for _, down in bytes_by_key.values()),
        "round_s": round_s,
        "fold_s": fold_s,
        "deadline_s": record.deadline_s,
        "extended": record.extended,
        "eta_s": eta_s([*earlier_s, round_s], config.run.max_rounds - record.round),
        "clients": [
            to_plain(
                client_record(
                    clients[a.client_key],
                    a,
                    by_attempt.get(a.attempt_id),
                    bytes_up=bytes_by_key.get(a.client_key, (0, 0))[0],
                    bytes_down=bytes_by_key.get(a.client_key, (0, 0))[1],
                )
            )
            for a in assigned
        ],
    }


def epsilon_spent(closed: ClosedRound, config: RunConfig) -> float | None:
    """What a private run has spent so far; None for any other."""
    if closed.privacy is None:
        return None
    return privacy.epsilon(closed.privacy.noise_multipliers, config.privacy.delta)


def final_record(
    info: RunInfo,
    model: GlobalState,
    method: MethodState,
    *,
    active: Sequence[int],
    config: RunConfig,
    stop_reason: str | None,
    rounds: int,
    measured: Sequence[tuple[ClientKey, Measurement]],
    clients: Iterable[KnownClient],
) -> dict[str, Any]:
    """The result of the run, for final.json: what it ended with, how strong its blocks may be exported, and what the
    clients measured of it at that strength."""
    choice = choose_strength(
        [m for _, m in measured if m.version == model.version],
        max_kl=config.forgetting.max_kl,
        min_retention=config.forgetting.min_retention,
    )
    strength = 1.0 if choice is None else choice.strength
    pooled = pool(measured, version=model.version, strength=strength)
    known = list(clients)
    return {
        "run_id": info.run_id,
        "base_name": info.base_name,
        "base_hash": info.base_hash,
        "version": model.version,
        "state_sha256": model.sha256,
        "stop_reason": stop_reason,
        "rounds": rounds,
        "active_blocks": list(active),
        "growth_refused": method.growth.refused,
        "spent": to_plain(method.spent),
        **measured_values(pooled, retention(pooled, method), config.forgetting),
        "strength": strength,
        "strengths": [] if choice is None else [to_plain(point) for point in choice.points],
        "num_clients_measured": len({key for key, _ in measured}),
        "bytes_up": sum(c.received_bytes for c in known),
        "bytes_down": sum(c.sent_bytes for c in known),
        **_memberships(method, known),
    }


def _memberships(method: MethodState, clients: Sequence[KnownClient]) -> dict[str, Any]:
    """By which shares each client's own model is mixed from the clusters; nothing where one model is everybody's."""
    if method.mixture is None:
        return {}
    return {"memberships": {c.name: list(method.mixture.memberships(c.key)) for c in clients}}


def eta_s(seconds: Sequence[float], rounds_left: int) -> float:
    """Expected seconds until the last round, from the newest rounds' durations."""
    newest = list(seconds)[-ETA_ROUNDS:]
    return rounds_left * sum(newest) / len(newest) if newest else 0.0


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
        parts.append(forgetting_text(record))
    if record["epsilon"] is not None:
        parts.append(f"epsilon {record['epsilon']:.2f}")
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
    if record["strength"] == 0:
        refused = next((p["refused"] for p in record["strengths"] if p["refused"]), "no strength scores better")
        return "  ".join(
            [*parts, f"nothing could be learnt within the forgetting budget ({refused}): an export is the base"]
        )
    parts.append(f"strength {record['strength']:g}")
    if record["accuracy"] is not None:
        parts.append(f"accuracy {record['accuracy']:.3f}")
    if record["nll_per_token"] is not None:
        parts.append(f"nll {record['nll_per_token']:.3f}")
    if record["retention"] is not None:
        parts.append(f"retention {record['retention']:.3f}")
    if record["kl"] is not None:
        parts.append(forgetting_text(record))
    return "  ".join([*parts, f"state {record['state_sha256'][:12]}"])


def _size(num_bytes: int) -> str:
    if num_bytes >= 10_000_000:
        return f"{num_bytes / 1e6:.0f} MB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1_000_000 else f"{num_bytes / 1e3:.0f} kB"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
