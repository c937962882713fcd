"""Does the ledger alone lead to the published state? Fold every round again from the kept updates, and compare.

Needs the payloads of all rounds (``server.keep_updates = true``); without them :func:`state_at` still leads from the
published steps to any version.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedblocks.aggregator import methods, run_rules
from fedblocks.aggregator.aggregation import AcceptedUpdate, map_payload
from fedblocks.aggregator.ledger import Ledger, StoredRound, StoredUpdate, open_read_only
from fedblocks.aggregator.personalisation import initial_mixture, published_ids
from fedblocks.aggregator.run_folder import RunFolder, RunFolderError, read_run_folder
from fedblocks.protocol.codec import from_plain
from fedblocks.protocol.payloads import Bytes
from fedblocks.protocol.state import ReadStep, apply_step, state_sha256
from fedblocks.protocol.tensors import State


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedVersion:
    """One round of the ledger, folded again."""

    round: int
    version: int
    num_updates: int
    state_sha256: str
    recorded_sha256: str

    @property
    def equal(self) -> bool:
        """True if the replay gave the bits that were published."""
        return self.state_sha256 == self.recorded_sha256


def replay(run: Path) -> tuple[ReplayedVersion, ...]:
    """All folded rounds of a run, folded again from version 0 in the ledger's order.

    Raises:
        RunFolderError: a kept update is missing (``server.keep_updates`` was false).
        LedgerError: the run was never served.
    """
    folder = read_run_folder(run)
    ledger = open_read_only(folder.ledger_path)
    try:
        model = run_rules.GlobalState.zero(folder.plan.units.published())
        method = run_rules.initial_state(folder.config)
        found: list[ReplayedVersion] = []
        for record in ledger.rounds():
            if record.kind != "train" or record.phase != "folded":
                continue
            again = fold_again(folder, ledger, record, model=model, method=method)
            model, method = again.model, again.method
            found.append(
                ReplayedVersion(
                    round=record.round,
                    version=model.version,
                    num_updates=again.num_updates,
                    state_sha256=model.sha256,
                    recorded_sha256=record.state_sha256 or "",
                )
            )
        return tuple(found)
    finally:
        ledger.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedAgain:
    """What a folded round gave, made a second time."""

    model: run_rules.GlobalState
    step: Bytes | None
    """None for a round that published nothing."""
    method: run_rules.MethodState
    """As far as folding goes: norms and memberships; what was measured in the round is not in it."""
    num_updates: int


def fold_again(
    folder: RunFolder,
    ledger: Ledger,
    record: StoredRound,
    *,
    model: run_rules.GlobalState,
    method: run_rules.MethodState,
) -> FoldedAgain:
    """A folded round of kind train once more, by the settings that its row holds.

    Args:
        model, method: as they were before the round.

    Raises:
        RunFolderError: an update is gone or damaged.
    """
    shape = folder.plan.units
    rules = methods.of(folder.config.run.method, folder.config.run.rule)
    updates = [accepted_update(folder, u, version=model.version) for u in ledger.updates_of(record.round)]
    settings = from_plain(run_rules.PublishSettings, record.settings, where="ledger.rounds")
    folded = run_rules.fold_round(
        rules,
        updates,
        shape=shape,
        state=method,
        model=model,
        rule=settings.fold,
        noise_key=bytes.fromhex(ledger.get_run("noise_key") or ""),
        round=record.round,
    )
    method = run_rules.after_fold(method, updates, folded)
    method = run_rules.regrouped(method, updates, shape=shape, model=model)
    published = rules.publish(model, folded, shape=shape, settings=settings)
    after, step = (model, None) if published is None else published
    return FoldedAgain(model=after, step=step, method=method, num_updates=len(updates))


def accepted_update(folder: RunFolder, stored: StoredUpdate, *, version: int) -> AcceptedUpdate:
    """A ledger row and its payload as the fold takes them, the payload's hash verified.

    Raises:
        RunFolderError: the payload is gone, or not the one that was accepted.
    """
    path = folder.update_path(stored.folded_in, stored.delta.attempt_id)
    if not path.is_file():
        raise RunFolderError(
            f"{path} is missing: restore it from a backup (of rounds that are folded, updates are kept for long only "
            "with --set server.keep_updates=true)"
        )
    found = hashlib.sha256(map_payload(path)).hexdigest()
    if found != stored.delta.payload_sha256:
        raise RunFolderError(
            f"{path} has SHA-256 {found[:12]}…, the update that was accepted {stored.delta.payload_sha256[:12]}…: "
            "the disk has damaged it, and its client keeps no copy; restore it from a backup"
        )
    return AcceptedUpdate.of(stored.client_key, stored.delta, version=version, read_payload=partial(map_payload, path))


def state_at(folder: RunFolder, version: int, read_step: ReadStep | None = None) -> run_rules.GlobalState:
    """The published state at ``version``, from the steps alone; without a residual.

    Args:
        read_step: default: the folder's.

    Raises:
        RunFolderError: a step is missing.
    """
    shape = folder.plan.units.published()
    read_step = read_step or folder.read_step
    published: State = {}
    config = folder.config
    blocks = published_ids(folder.plan.unit_ids, initial_mixture(config.mixture, config.run.seed))
    for from_version in range(version):
        published = apply_step(published, read_step(from_version), shape=shape, blocks=blocks)
    return run_rules.GlobalState(
        version=version, published=published, residual={}, sha256=state_sha256(shape, published)
    )
