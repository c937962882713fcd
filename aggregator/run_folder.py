"""Where does a run keep its files, and how does each of them survive a kill or a power cut?

    RUN/run.toml run.json plan.json base/config.json resources/*    made by ``fedblocks init``, read only here
    RUN/effective.toml    the configuration in force, written at each start
    RUN/serve.lock        held by the one aggregator that serves the folder
    RUN/ledger.sqlite     see ``ledger.py``; it decides what counts, the files below only hold bytes
    RUN/incoming/<attempt_id>.<n>.part           an upload while it arrives
    RUN/updates/<round>/<attempt_id>.delta       accepted payloads, by the round that folds them
    RUN/state/*.damaged, *.damaged-2, ...        what was not what the ledger names, and was made again
    RUN/state/v00007.qdown                       the step from version 6 to version 7 (``protocol/state.py``)
    RUN/state/v00007.safetensors                 the published state at version 7
    RUN/state/v00007.residual.safetensors        what the published steps still owe
    RUN/state/v00007.moments.safetensors         of the server's optimizer, where it has any
    RUN/state/final.safetensors final.json       the result
    RUN/metrics.jsonl                            one line per round

A file is complete under its final name or not there: temporary name, fsync, rename, fsync of the folder.
Steps are kept for the whole run (clients that return catch up from them); of a version's other files those of the
newest :data:`KEPT_STATES`. Payloads are kept until the next version is there, so that a file that a disk has damaged
can be made again (``repair.py``), or for the whole run (``server.keep_updates``).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import safetensors.numpy

from fedblocks.protocol import run_config
from fedblocks.protocol.codec import from_plain
from fedblocks.protocol.durable import naming, sync_folder, write_durably
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import AttemptId, DataFormat, ResourceInfo
from fedblocks.protocol.method_plan import check_plan
from fedblocks.protocol.payloads import Bytes
from fedblocks.protocol.run_config import ConfigError, RunConfig
from fedblocks.protocol.tensors import FloatArray, State, flatten, unflatten

KEPT_STATES: Final = 2
GENERAL_FILE: Final = "general.jsonl"
#: The anchor set of methods.md 5.2, for a run.json that does not say.
DEFAULT_ANCHOR: Final = {"anchor_sequences": 512, "anchor_tokens": 256}
_ATTEMPT: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class RunFolderError(Exception):
    """The folder cannot be served; the text says what is wrong and what to do."""

    exit_code: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """``run.json``: what identifies the run."""

    run_id: str
    base_name: str
    base_hash: str
    tokenizer_hash: str
    created_unix_s: float
    anchor_sequences: int
    anchor_tokens: int
    """Of the longest anchor sequence."""
    resources: tuple[ResourceInfo, ...]
    labels: tuple[str, ...] = ()
    """Of an encoder's run, in the order of the head's rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """One run's files. ``config`` is the effective one."""

    path: Path
    info: RunInfo
    plan: ExpansionPlan
    config: RunConfig

    @property
    def data_format(self) -> DataFormat:
        """How every site turns its rows into tokens and labels."""
        section = self.config.data
        return DataFormat(
            max_tokens=section.max_tokens, append_eos=section.append_eos, join=section.join, labels=self.info.labels
        )

    @property
    def ledger_path(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def resource(self, name: str) -> ResourceInfo | None:
        """The resource of this name, None if the run has no such file."""
        return next((r for r in self.info.resources if r.name == name), None)

    def resource_path(self, info: ResourceInfo) -> Path:
        return self.path / "resources" / info.name

    def identity(self) -> dict[str, str]:
        """What must not change while the run goes on."""
        return {"run_id": self.info.run_id, "base_hash": self.info.base_hash, "plan": self.plan.digest()}

    # updates

    def part_path(self, attempt_id: AttemptId, upload: int) -> Path:
        """Where an upload is written while it arrives; two of one attempt never share a file."""
        return self.path / "incoming" / f"{_file_name(attempt_id)}.{upload}.part"

    def update_path(self, round: int, attempt_id: AttemptId) -> Path:
        """The payload of an accepted update, in the folder of the round whose fold counts it."""
        return self.path / "updates" / f"{round:05d}" / f"{_file_name(attempt_id)}.delta"

    def make_room_for(self, update: Path) -> None:
        """The folder for a payload, durable before anything is renamed into it."""
        if not update.parent.exists():
            update.parent.mkdir(mode=0o700)
            sync_folder(update.parent.parent)

    def drop_updates(self, before_round: int) -> None:
        """Delete the payloads that earlier rounds folded."""
        for folder in (self.path / "updates").iterdir():
            if folder.name.isdecimal() and int(folder.name) < before_round:
                shutil.rmtree(folder, ignore_errors=True)

    def drop_parts(self) -> None:
        """Delete what half-finished uploads of an earlier process left behind."""
        for part in (self.path / "incoming").glob("*.part"):
            part.unlink(missing_ok=True)

    # states

    def step_path(self, version: int) -> Path:
        """The step that leads to ``version``."""
        return self.path / "state" / f"v{version:05d}.qdown"

    def read_step(self, from_version: int) -> bytes:
        """The step from ``from_version`` to the next version.

        Raises:
            RunFolderError: the file is missing.
        """
        path = self.step_path(from_version + 1)
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise RunFolderError(f"{path} is missing; restore the run folder from a backup") from error

    def version_files(
        self, version: int, *, step: Bytes, published: State, residual: State, moments: State | None = None
    ) -> dict[Path, list[Bytes]]:
        """What a version consists of, in the order of writing and in pieces that are not copied."""
        files: dict[Path, list[Bytes]] = {
            self.step_path(version): [step],
            self.state_path(version): to_safetensors(published),
            self.residual_path(version): to_safetensors(residual),
        }
        return {**files, self.moments_path(version): to_safetensors(moments)} if moments else files

    def save_version(
        self, version: int, *, step: Bytes, published: State, residual: State, moments: State | None = None
    ) -> dict[str, str]:
        """All files of a new version, durable; the ledger's row comes after, with their names and SHA-256."""
        return _write_all(
            self.version_files(version, step=step, published=published, residual=residual, moments=moments)
        )

    def load_version(self, version: int) -> tuple[State, State, State]:
        """Published state, residual and the server optimizer's moments at ``version``; all empty at version 0.

        Raises:
            RunFolderError: a file is missing or damaged.
        """
        if version == 0:
            return {}, {}, {}
        moments = self.moments_path(version)
        return (
            read_state(self.state_path(version)),
            read_state(self.residual_path(version)),
            read_state(moments) if moments.exists() else {},
        )

    def drop_old_states(self, version: int) -> None:
        """Keep the newest :data:`KEPT_STATES` states up to ``version``; steps are never dropped."""
        for old in range(version - KEPT_STATES, 0, -1):
            path = self.state_path(old)
            if not path.exists():
                break
            path.unlink()
            self.residual_path(old).unlink(missing_ok=True)
            self.moments_path(old).unlink(missing_ok=True)

    def save_final(self, published: State, record: Mapping[str, Any], clusters: Sequence[State] = ()) -> dict[str, str]:
        """The result of the run; returns name -> SHA-256."""
        return _write_all(self.final_files(published, record, clusters))

    def final_files(
        self, published: State, record: Mapping[str, Any], clusters: Sequence[State] = ()
    ) -> dict[Path, list[Bytes]]:
        """What the result consists of, in pieces that are not copied.

        Args:
            clusters: what the clients' own models are mixed from, by the memberships in ``record``.
        """
        folder = self.path / "state"
        own = {
            folder / f"final.cluster-{number}.safetensors": to_safetensors(state)
            for number, state in enumerate(clusters)
        }
        return {
            folder / "final.safetensors": to_safetensors(published),
            **own,
            folder / "final.json": [(json.dumps(record, indent=2) + "\n").encode()],
        }

    def paths_of(self, version: int) -> tuple[Path, ...]:
        """All files that a version may have."""
        return (
            self.step_path(version),
            self.state_path(version),
            self.residual_path(version),
            self.moments_path(version),
        )

    def state_path(self, version: int) -> Path:
        """The published state at ``version``."""
        return self.path / "state" / f"v{version:05d}.safetensors"

    def residual_path(self, version: int) -> Path:
        """What the steps up to ``version`` still owe."""
        return self.path / "state" / f"v{version:05d}.residual.safetensors"

    def moments_path(self, version: int) -> Path:
        """The server optimizer's moments at ``version``; there is no file where it has none."""
        return self.path / "state" / f"v{version:05d}.moments.safetensors"

    # metrics

    def mend_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The newest lines anew, from the ledger: a kill may have cost the last one.

        Args:
            rows: those of the newest rounds; what the file holds of earlier rounds stays.
        """
        first = rows[0]["round"] if rows else 0
        kept = [line for line in self._metrics_lines() if line["round"] < first]
        write_durably(self.metrics_path, "".join(json.dumps(row) + "\n" for row in (*kept, *rows)).encode())

    def _metrics_lines(self) -> Iterator[Mapping[str, Any]]:
        """The lines that can be read."""
        try:
            text = self.metrics_path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and isinstance(found.get("round"), int):
                    yield found

    def append_metrics(self, line: object) -> None:
        with naming(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save_effective_config(self) -> None:
        """What this process goes by, overrides included."""
        text = run_config.to_toml(self.config, encoder=self.plan.shape.encoder)
        write_durably(self.path / "effective.toml", text.encode())

    def lock(self) -> int:
        """A descriptor that holds the folder for this process until it ends.

        Raises:
            RunFolderError: another process serves the folder.
        """
        descriptor = os.open(self.path / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise RunFolderError(f"{self.path} is being served by another process; stop that one first") from error
        return descriptor


def open_run_folder(path: Path, overrides: tuple[str, ...] = ()) -> RunFolder:
    """The run in ``path``, its identity and resources verified; makes the folders that serving needs.

    Raises:
        RunFolderError: a file of ``fedblocks init`` is missing or does not match its hash.
        ConfigError: ``run.toml`` or an override cannot be used, or asks for what the run's files cannot show.
    """
    folder = read_run_folder(path, overrides)
    try:
        check_plan(folder.config, folder.plan)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if folder.config.forgetting.min_retention > 0 and folder.resource(GENERAL_FILE) is None:
        raise ConfigError(
            f"{path}: forgetting.min_retention is {folder.config.forgetting.min_retention:g}, but the run has no "
            f"{GENERAL_FILE} to measure it on, so nothing but the base could be exported; make the run with "
            "fedblocks init --general FILE, or set it to 0"
        )
    if folder.config.expansion.max_blocks > len(folder.plan.blocks):
        raise ConfigError(
            f"{path}: expansion.max_blocks is {folder.config.expansion.max_blocks}, but the run was made for at most "
            f"{len(folder.plan.blocks)} blocks; make it anew with fedblocks init --set expansion.max_blocks=N"
        )
    for info in folder.info.resources:
        resource = folder.resource_path(info)
        if not resource.is_file():
            raise RunFolderError(f"{resource} is missing; copy the whole folder that fedblocks init made")
        data = resource.read_bytes()
        if len(data) != info.num_bytes or hashlib.sha256(data).hexdigest() != info.sha256:
            raise RunFolderError(
                f"{resource}: {len(data)} bytes whose hash is not the one in run.json ({info.num_bytes} bytes, "
                f"{info.sha256[:12]}…); copy the whole folder that fedblocks init made"
            )
    path.chmod(0o700)
    for name in ("incoming", "updates", "state"):
        (path / name).mkdir(mode=0o700, exist_ok=True)
    sync_folder(path)
    return folder


def read_run_folder(path: Path, overrides: tuple[str, ...] = ()) -> RunFolder:
    """The run in ``path``, nothing verified and nothing made: for the verbs that only read.

    Raises:
        RunFolderError: a file of ``fedblocks init`` is missing or cannot be read.
        ConfigError: ``run.toml`` or an override cannot be used.
    """
    config = run_config.load(path / "run.toml", overrides)
    try:
        described = json.loads((path / "run.json").read_text(encoding="utf-8"))
        info = from_plain(RunInfo, {**DEFAULT_ANCHOR, "labels": [], **described}, where="run.json")
        plan = ExpansionPlan.from_json((path / "plan.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{error.filename} does not exist; make a run folder with: fedblocks init --model DIR --out RUN"
        ) from error
    except (ValueError, RemoteProtocolError) as error:
        raise RunFolderError(f"{path}: {error}") from error
    if plan.base_hash != info.base_hash:
        raise RunFolderError(f"{path}: plan.json is of base {plan.base_hash}, run.json of base {info.base_hash}")
    try:
        foreign = run_config.foreign_override(overrides, encoder=plan.shape.encoder)
        if foreign is not None:
            raise ConfigError(f"{foreign}: {run_config.foreign_key_text(foreign)}")
        config = run_config.for_model(config, encoder=plan.shape.encoder)
    except ConfigError as error:
        raise ConfigError(f"{path / 'run.toml'}: {error}") from error
    return RunFolder(path=path, info=info, plan=plan, config=config)


def _file_name(attempt_id: AttemptId) -> str:
    if not _ATTEMPT.fullmatch(attempt_id):
        raise ValueError(f"attempt id {attempt_id[:80]!r} is no file name")
    return attempt_id


def _write_all(files: Mapping[Path, Sequence[Bytes]]) -> dict[str, str]:
    """Name -> SHA-256 of what was written."""
    digests: dict[str, str] = {}
    for path, pieces in files.items():
        write_durably(path, *pieces)
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        digests[path.name] = digest.hexdigest()
    return digests


def to_safetensors(state: State) -> list[Bytes]:
    """What a state's file holds, byte for byte as ``safetensors.numpy.save`` has it: that copies the state twice.

    ``<length of the header, 8 bytes little-endian> <header, JSON, filled up to 8 bytes with spaces> <fp32 values>``,
    tensors by name.
    """
    tensors = {name: np.asarray(values, dtype="<f4") for name, values in sorted(flatten(state).items())}
    header: dict[str, Any] = {}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + values.nbytes
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *(values.data.cast("B") for values in tensors.values())]


def read_state(path: Path) -> State:
    """The state in a file.

    Raises:
        RunFolderError: the file is missing, or no safetensors.
    """
    try:
        return unflatten(cast("dict[str, FloatArray]", safetensors.numpy.load(path.read_bytes())))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise RunFolderError(f"{path}: {error}") from error
