"""Are the state files those that the ledger names, and how is one made again that a disk has damaged?

The ledger holds the SHA-256 of every file of every version. Two ways lead back to a file that is not what it names:

* the accepted updates lead to everything: from the newest version that is whole, each round is folded again. They are
  kept until the next version is there, so the newest one can always be made from the one before it;
* the steps, which are kept for the whole run, lead to the published state.

What is made again has the recorded SHA-256, or it is not written. Nothing is overwritten: a damaged file is set aside
under another name first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from fedblocks.aggregator import run_rules
from fedblocks.aggregator.ledger import Ledger, LedgerDamagedError, StoredRound, is_made
from fedblocks.aggregator.replay import fold_again, state_at
from fedblocks.aggregator.run_folder import KEPT_STATES, RunFolder, RunFolderError, read_state, to_safetensors
from fedblocks.protocol.codec import from_plain
from fedblocks.protocol.durable import sync_folder, write_durably
from fedblocks.protocol.errors import LocalProtocolError, RemoteProtocolError
from fedblocks.protocol.payloads import Bytes
from fedblocks.protocol.state import state_sha256

Damage = Mapping[Path, str]
"""File -> what is wrong with it, in words."""
#: What a damaged state, step or update shows itself as.
_FAILURES: Final = (RunFolderError, RemoteProtocolError, LocalProtocolError)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewestVersion:
    """What a start finds."""

    model: run_rules.GlobalState
    notes: tuple[str, ...]
    """One line for each file that was damaged."""


def check_ledger_is_there(folder: RunFolder) -> None:
    """A run whose ledger is gone is no new run.

    Raises:
        LedgerDamagedError: there are state files, and no ledger that could name them.
    """
    newest = max((path.name for path in (folder.path / "state").glob("v*.safetensors")), default=None)
    if newest is not None and not is_made(folder.ledger_path):
        raise LedgerDamagedError(
            f"{folder.ledger_path} is empty or gone, but state/{newest} is there: this run was served before; "
            "nothing was overwritten: put the copy of your backup in its place, and serve again"
        )


def newest_version(folder: RunFolder, ledger: Ledger, version: int, *, goes_on: bool = True) -> NewestVersion:
    """The version that the ledger names as the newest; what is damaged of it is made again.

    Args:
        goes_on: False for a finished run, which needs no more than the published state.

    Raises:
        RunFolderError: it cannot be made again; the line says what there is.
    """
    if version == 0:
        return NewestVersion(model=run_rules.GlobalState.zero(folder.plan.units.published()), notes=())
    damage = damaged_files(folder, ledger, version)
    made, reasons = _made_again(folder, ledger, version, damage)
    needed = {folder.state_path(version)}
    if goes_on:
        needed |= {folder.residual_path(version), folder.moments_path(version)}
    if any(path in needed and path not in made for path in damage):
        raise RunFolderError(
            f"{folder.path}: version {version} cannot be made again: {_told(damage)}; {'; '.join(reasons)}; "
            f"{_inventory(folder, ledger, version)}; restore the folder from a backup"
        )
    lost = [f"{path} {damage[path]}; it cannot be made again: {reasons[0]}" for path in damage if path not in made]
    notes = [replace_damaged(path, data, damage[path]) for path, data in made.items()]
    if goes_on:
        return NewestVersion(model=_load(folder, version), notes=(*notes, *lost))
    published = read_state(folder.state_path(version))
    sha256 = state_sha256(folder.plan.units.published(), published)
    model = run_rules.GlobalState(version=version, published=published, residual={}, sha256=sha256)
    return NewestVersion(model=model, notes=(*notes, *lost))


def published_at(folder: RunFolder, ledger: Ledger, version: int) -> run_rules.GlobalState:
    """The published state at a version, without a residual: by the steps, else from its file, else from the updates.

    Raises:
        RunFolderError: none of them leads there.
    """
    if version == 0:
        return run_rules.GlobalState.zero(folder.plan.units.published())
    reasons: list[str] = []
    for way in (_by_steps, _from_file, _by_updates):
        try:
            return way(folder, ledger, version)
        except _FAILURES as error:
            reasons.append(str(error))
    raise RunFolderError(
        f"{folder.path}: the state of version {version} cannot be made again: {'; '.join(reasons)}; "
        "restore the folder from a backup"
    )


def read_step(folder: RunFolder, ledger: Ledger, from_version: int) -> bytes:
    """The step from this version to the next, its hash verified.

    Raises:
        RunFolderError: it is missing or damaged.
    """
    step = folder.read_step(from_version)
    path = folder.step_path(from_version + 1)
    named = ledger.files_of(from_version + 1).get(path.name)
    fault = "" if named is None else _fault_of(step, named)
    if fault:
        raise RunFolderError(f"{path} {fault}")
    return step


def make_step_again(folder: RunFolder, ledger: Ledger, version: int) -> str:
    """The step to this version, from the accepted updates; returns the line to be told.

    Raises:
        RunFolderError: the updates are gone.
    """
    path = folder.step_path(version)
    step = _files_from_updates(folder, ledger, version)[path]
    return replace_damaged(path, step, damaged_files(folder, ledger, version).get(path, "cannot be read"))


def damaged_files(folder: RunFolder, ledger: Ledger, version: int) -> dict[Path, str]:
    """What is missing of a version, or is not what the ledger names."""
    named = ledger.files_of(version)
    if named:
        return faults({folder.path / "state" / name: sha256 for name, sha256 in named.items()})
    return _unreadable_files(folder, ledger, version)


def faults(named: Mapping[Path, str]) -> dict[Path, str]:
    """Of files with their SHA-256: those that are missing or differ, and how."""
    found = {path: _fault(path, sha256) for path, sha256 in named.items()}
    return {path: what for path, what in found.items() if what}


def replace_damaged(path: Path, data: bytes, what: str) -> str:
    """Write ``data``, durably, in the place of a file that is set aside; returns the line to be told.

    Args:
        what: is wrong with the file.
    """
    aside = ""
    if path.exists():
        names = (path.with_name(f"{path.name}.damaged{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
        free = next(name for name in names if not name.exists())
        path.rename(free)
        sync_folder(path.parent)
        aside = f"set aside as {free.name} and "
    write_durably(path, data)
    return f"{path} {what}: {aside}made again, with the SHA-256 that the ledger names"


def _unreadable_files(folder: RunFolder, ledger: Ledger, version: int) -> dict[Path, str]:
    """The same for a version of an older release, which noted the hash of the published state alone."""
    record = _record(ledger, version)
    found: dict[Path, str] = {}
    for path in (folder.state_path(version), folder.residual_path(version), folder.moments_path(version)):
        if path == folder.moments_path(version) and not path.exists():
            continue
        try:
            state = read_state(path)
            if path == folder.state_path(version):
                sha256 = state_sha256(folder.plan.units.published(), state)
                if sha256 != record.state_sha256:
                    found[path] = f"holds state {sha256[:12]}…, the ledger says {str(record.state_sha256)[:12]}…"
        except _FAILURES:
            found[path] = "cannot be read" if path.exists() else "is missing"
    return found


def _fault(path: Path, sha256: str) -> str:
    return _fault_of(path.read_bytes(), sha256) if path.is_file() else "is missing"


def _fault_of(data: bytes, sha256: str) -> str:
    found = hashlib.sha256(data).hexdigest()
    if found == sha256:
        return ""
    return f"is damaged ({len(data)} bytes with SHA-256 {found[:12]}…, the ledger says {sha256[:12]}…)"


def _made_again(
    folder: RunFolder, ledger: Ledger, version: int, damage: Collection[Path]
) -> tuple[dict[Path, bytes], list[str]]:
    """As many of the damaged files as there is a way to, and why not the others."""
    made: dict[Path, bytes] = {}
    reasons: list[str] = []
    for way in (_files_from_updates, _files_from_steps):
        if made.keys() >= set(damage):
            break
        try:
            found = way(folder, ledger, version)
        except _FAILURES as error:
            reasons.append(str(error))
        else:
            made |= {path: data for path, data in found.items() if path in damage}
    return made, reasons


def _files_from_updates(folder: RunFolder, ledger: Ledger, version: int) -> dict[Path, bytes]:
    model, step = _folded_up_to(folder, ledger, version)
    found = folder.version_files(
        version, step=step, published=model.published, residual=model.residual, moments=model.moments
    )
    return _verified(found, ledger, version)


def _files_from_steps(folder: RunFolder, ledger: Ledger, version: int) -> dict[Path, bytes]:
    model = _by_steps(folder, ledger, version)
    return _verified({folder.state_path(version): to_safetensors(model.published)}, ledger, version)


def _verified(found: Mapping[Path, Sequence[Bytes]], ledger: Ledger, version: int) -> dict[Path, bytes]:
    named = ledger.files_of(version)
    whole = {path: b"".join(pieces) for path, pieces in found.items()}
    for path, data in whole.items():
        if path.name in named and _fault_of(data, named[path.name]):
            raise RunFolderError(f"{path.name} made again is another one than the ledger names")
    return whole


def _by_steps(folder: RunFolder, ledger: Ledger, version: int) -> run_rules.GlobalState:
    return _same(state_at(folder, version, partial(read_step, folder, ledger)), ledger)


def _from_file(folder: RunFolder, ledger: Ledger, version: int) -> run_rules.GlobalState:
    published = read_state(folder.state_path(version))
    sha256 = state_sha256(folder.plan.units.published(), published)
    return _same(run_rules.GlobalState(version=version, published=published, residual={}, sha256=sha256), ledger)


def _by_updates(folder: RunFolder, ledger: Ledger, version: int) -> run_rules.GlobalState:
    model, _ = _folded_up_to(folder, ledger, version)
    return run_rules.GlobalState(version=version, published=model.published, residual={}, sha256=model.sha256)


def _folded_up_to(folder: RunFolder, ledger: Ledger, version: int) -> tuple[run_rules.GlobalState, Bytes]:
    """The version and its step, folded again from the newest earlier version that is whole."""
    earlier = range(version - 1, max(0, version - 1 - KEPT_STATES), -1)
    start = next((v for v in earlier if _is_whole(folder, ledger, v)), 0)
    model = _load(folder, start)
    step: Bytes | None = None
    for number in range(start + 1, version + 1):
        record = _record(ledger, number)
        before = ledger.get_round(record.round - 1)
        method = (
            run_rules.initial_state(folder.config)
            if before is None
            else from_plain(run_rules.MethodState, before.method_state, where="ledger.rounds")
        )
        again = fold_again(folder, ledger, record, model=model, method=method)
        model, step = _same(again.model, ledger), again.step
    if step is None:
        raise RunFolderError(f"round {_record(ledger, version).round} folded again publishes nothing")
    return model, step


def _is_whole(folder: RunFolder, ledger: Ledger, version: int) -> bool:
    """True if a round can be folded on top of it: the step that led to it does not matter."""
    return not {*damaged_files(folder, ledger, version)} - {folder.step_path(version)}


def _load(folder: RunFolder, version: int) -> run_rules.GlobalState:
    published, residual, moments = folder.load_version(version)
    sha256 = state_sha256(folder.plan.units.published(), published)
    return run_rules.GlobalState(
        version=version, published=published, residual=residual, sha256=sha256, moments=moments
    )


def _same(model: run_rules.GlobalState, ledger: Ledger) -> run_rules.GlobalState:
    recorded = _record(ledger, model.version).state_sha256
    if model.sha256 != recorded:
        raise RunFolderError(
            f"version {model.version} made again is state {model.sha256[:12]}…, the ledger says {str(recorded)[:12]}…"
        )
    return model


def _record(ledger: Ledger, version: int) -> StoredRound:
    record = ledger.round_of_version(version)
    if record is None:
        raise RunFolderError(f"the ledger knows no round that made version {version}")
    return record


def _told(damage: Damage) -> str:
    return ", ".join(f"{path.name} {what}" for path, what in damage.items())


def _inventory(folder: RunFolder, ledger: Ledger, version: int) -> str:
    """Which files are whole, of the newest versions."""
    parts: list[str] = []
    for number in range(version, max(0, version - KEPT_STATES), -1):
        damage = damaged_files(folder, ledger, number)
        whole = [path.name for path in folder.paths_of(number) if path.exists() and path not in damage]
        parts.append(f"of version {number} there is {', '.join(whole) or 'nothing'}")
    return "; ".join(parts)
