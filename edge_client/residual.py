"""What do my accepted updates still owe? The error-feedback residual on disk, by block and tensor (methods.md 7.3).

A finished update stages what its encoding left out under its attempt id; the aggregator's answer commits or discards
it. A commit is one rename, so a kill leaves the residual of the last *acknowledged* update or of the one before.
The folder belongs to one run; a file made under another plan (another base or other blocks) is dropped when it is seen.

Files: ``staged-<attempt>.safetensors`` and ``<sequence>-<attempt>.safetensors``, tensors named ``<block>/<tensor>``,
with the plan's digest, the round and the width in the metadata. A file holds the slice that its update trained, which
is always the first rows and columns: a block's residual is that of the committed files that hold it, laid over each
other in ascending sequence. So an update of a slim block replaces its slice and leaves the rest as old as it is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from safetensors import SafetensorError, safe_open

from fedblocks.edge_client.store import LazyState, LazyTensors, lazy_state, write_tensors
from fedblocks.profiles.units import unit_tensors
from fedblocks.protocol.durable import sync_folder
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import AttemptId
from fedblocks.protocol.tensors import FloatArray, cut, pad

logger = logging.getLogger(__name__)

#: Per round in which a value was not part of an accepted update: the model has moved on since.
DECAY: Final = 0.9
#: After so many such rounds nothing is left of it.
MAX_UNSENT_ROUNDS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One file and what it holds."""

    path: Path
    plan_digest: str
    round: int
    width: float
    blocks: frozenset[int]

    def factor(self, round: int) -> float:
        """What is left of it when training for ``round``: 0.9^k, k rounds after the next one, and nothing at k = 10."""
        unsent = max(0, round - self.round - 1)
        return DECAY**unsent if unsent < MAX_UNSENT_ROUNDS else 0.0


class ResidualStore:
    """The residual of one client in one run.

    Args:
        folder: inside the client's folder of the run; made if absent.
        plan: the run's plan; what was kept under another one is deleted now.
    """

    def __init__(self, folder: Path, *, plan: ExpansionPlan) -> None:
        self._folder = folder
        self._plan_digest = plan.digest()
        self._sizes = {
            (unit, spec.name): spec.shape for unit in plan.unit_ids for spec in unit_tensors(plan.units, unit)
        }
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.tmp"):  # a kill while staging
            path.unlink()
        for path in folder.glob("staged-*.safetensors"):
            self._entry(path)
        self._drop_superseded()

    def load(self, blocks: Iterable[int], *, round: int) -> LazyState:
        """What is owed on ``blocks`` when training for ``round``, whole; blocks that owe nothing are absent.

        A value whose last accepted update lies k rounds before the previous one is decayed by 0.9^k, and dropped at
        k = 10. The files keep their values; a tensor is read when it is asked for.
        """
        owed: LazyState = {}
        entries = self._committed()
        for block in blocks:
            layers: list[_Entry] = []
            for entry in reversed(entries):
                if block in entry.blocks and (not layers or entry.width > layers[-1].width):
                    layers.append(entry)
            if any(entry.factor(round) for entry in layers):
                owed[block] = self._laid_over(
                    block, [lazy_state(e.path, e.factor(round))[block] for e in reversed(layers)]
                )
        return owed

    def _laid_over(self, block: int, layers: Sequence[LazyTensors]) -> LazyTensors:
        """Whole tensors from slices, each layer over those before it."""

        def read(name: str) -> FloatArray:
            whole: FloatArray | None = None
            for layer in layers:
                if name not in layer:
                    continue
                values = layer[name]
                if whole is None:
                    whole = pad(values, self._sizes[block, name])
                else:
                    cut(whole, values.shape)[...] = values
            assert whole is not None
            return whole

        return LazyTensors(sorted({name for layer in layers for name in layer}), read)

    def stage(
        self,
        attempt_id: AttemptId,
        residuals: Mapping[int, Mapping[str, FloatArray]],
        *,
        round: int,
        width: float = 1.0,
    ) -> None:
        """Keep ``residuals`` until the update's fate is known; what was staged for another attempt is discarded.

        No residuals at all (format bf16 or fp32) means that a commit drops everything: those formats owe nothing.

        Args:
            width: share of each block that the update trained, and whose shapes ``residuals`` have.
        """
        tensors = {
            f"{block}/{name}": np.ascontiguousarray(values, dtype=np.float32)
            for block, by_name in residuals.items()
            for name, values in by_name.items()
        }
        staged = self._staged_path(attempt_id)
        for other in self._folder.glob("staged-*.safetensors"):
            if other != staged:
                other.unlink()
        write_tensors(staged, tensors, {"plan": self._plan_digest, "round": str(round), "width": str(width)})

    def commit(self, attempt_id: AttemptId) -> None:
        """The update was accepted (also late): its residual replaces what its slices of its blocks owed.

        Does nothing if nothing is staged for it, as after a kill between a commit and the deletion of the update.
        """
        staged = self._staged_path(attempt_id)
        if not staged.exists():
            return
        entries = self._committed()
        sequence = 1 + (int(entries[-1].path.name.split("-")[0]) if entries else 0)
        staged.rename(self._folder / f"{sequence:08d}-{_file_id(attempt_id)}.safetensors")
        sync_folder(self._folder)
        self._drop_superseded()

    def discard(self, attempt_id: AttemptId) -> None:
        """The update will never count: what its blocks owed stays as it was."""
        self._staged_path(attempt_id).unlink(missing_ok=True)

    def _staged_path(self, attempt_id: AttemptId) -> Path:
        return self._folder / f"staged-{_file_id(attempt_id)}.safetensors"

    def _committed(self) -> list[_Entry]:
        """Readable files of this plan, oldest first."""
        paths = sorted(self._folder.glob("[0-9]*-*.safetensors"))
        return [entry for entry in map(self._entry, paths) if entry is not None]

    def _entry(self, path: Path) -> _Entry | None:
        """What a file holds; one that cannot be used is deleted: a lost residual costs a little progress, no more."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata()
                blocks = frozenset(int(key.split("/")[0]) for key in file.keys())  # noqa: SIM118  (no mapping)
            entry = _Entry(
                path=path,
                plan_digest=metadata["plan"],
                round=int(metadata["round"]),
                width=float(metadata.get("width", "1.0")),  # files of older versions hold whole blocks
                blocks=blocks,
            )
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            logger.warning("dropped the residual file %s: %s", path.name, error)
            path.unlink(missing_ok=True)
            return None
        if entry.plan_digest != self._plan_digest:
            path.unlink()
            return None
        return entry

    def _drop_superseded(self) -> None:
        widest: dict[int, float] = {}  # block -> the largest width in a newer file
        entries = self._committed()
        for position, entry in reversed(list(enumerate(entries))):
            if not entry.blocks:  # a dense update: nothing older is owed
                for old in entries[: position + 1]:
                    old.path.unlink()
                return
            if all(widest.get(block, 0.0) >= entry.width for block in entry.blocks):
                entry.path.unlink()
            widest |= {block: max(entry.width, widest.get(block, 0.0)) for block in entry.blocks}


def _file_id(attempt_id: AttemptId) -> str:
    """The attempt id is the peer's text: a hash of it is a safe file name."""
    return hashlib.sha256(attempt_id.encode()).hexdigest()[:32]
