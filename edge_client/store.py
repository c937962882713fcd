"""What does a client keep on disk between two moments at which it may be killed?

One folder per run: the files of the run, the published state it holds, and the update that waits for its answer.
Every write is a temporary file, fsync, rename, fsync of the folder; a file whose checksum fails is treated as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from fedblocks.protocol import codec
from fedblocks.protocol.durable import sync_folder, write_durably
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.messages import AttemptId, Delta, ResourceInfo
from fedblocks.protocol.tensors import FloatArray, flatten


class LazyTensors(Mapping[str, FloatArray]):
    """Tensors by name, each made anew whenever it is asked for: a block's fp32 values need not be in memory at once."""

    def __init__(self, names: Iterable[str], read: Callable[[str], FloatArray]) -> None:
        self._names = tuple(names)
        self._read = read

    def __getitem__(self, name: str) -> FloatArray:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


LazyState = dict[int, LazyTensors]


def lazy_state(path: Path, factor: float = 1.0) -> LazyState:
    """The blocks of a file named as :func:`fedblocks.protocol.tensors.flatten` names them, times ``factor``.

    The file is open for as long as one of them is held: its content stays, also if the file is replaced or deleted.

    Raises:
        SafetensorError: the file is no such file.
    """
    file = safe_open(path, framework="numpy").__enter__()  # closes when nothing holds it any more

    def reader(block: str) -> Callable[[str], FloatArray]:
        def read(name: str) -> FloatArray:
            values: FloatArray = file.get_tensor(f"{block}/{name}")
            return values if factor == 1.0 else values * np.float32(factor)

        return read

    names: dict[str, list[str]] = {}
    for key in file.keys():  # noqa: SIM118  (no mapping)
        block, name = key.split("/", 1)
        names.setdefault(block, []).append(name)
    return {int(block): LazyTensors(found, reader(block)) for block, found in names.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, FloatArray], metadata: Mapping[str, str] | None = None) -> str:
    """A safetensors file of fp32 tensors, durable, without a second copy of them in memory; its SHA-256."""
    end = 0
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    digest = hashlib.sha256()
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for part in (
            len(text).to_bytes(8, "little"),
            text,
            *(np.ascontiguousarray(v, "<f4").data for v in tensors.values()),
        ):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
    return digest.hexdigest()


class ClientStore:
    """The folder of one client in one run (mode 0700)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._outbox = folder / "outbox"
        self._resources = folder / "resources"
        self._resources.mkdir(exist_ok=True)

    @property
    def cache_folder(self) -> Path:
        """Where the quantised backbone, hidden states and teacher records may be kept."""
        return self.folder / "cache"

    @property
    def residual_folder(self) -> Path:
        """Where the error-feedback residual is kept."""
        return self.folder / "residual"

    @property
    def row_scores_folder(self) -> Path:
        """Where the scores of the pairs' rows are kept."""
        return self.folder / "row_scores"

    def resource(self, name: str) -> Path:
        """Path of a file of the run."""
        return self._resources / name

    def resource_hashes(self) -> frozenset[str]:
        """SHA-256 of the run's files that are complete on disk."""
        return frozenset(
            hashlib.sha256(p.read_bytes()).hexdigest() for p in self._resources.iterdir() if p.suffix != ".tmp"
        )

    def put_resource(self, info: ResourceInfo, payload: bytes) -> None:
        """Keep a file of the run.

        Raises:
            RemoteProtocolError: its bytes are not those that the Welcome announced.
        """
        if not info.name or Path(info.name).name != info.name or info.name.startswith("."):
            raise RemoteProtocolError(f"a file of the run is called {info.name[:60]!r}, expected a plain file name")
        if len(payload) != info.num_bytes or hashlib.sha256(payload).hexdigest() != info.sha256:
            raise RemoteProtocolError(
                f"{info.name}: {len(payload)} bytes that are not the {info.num_bytes} announced",
                code="checksum_mismatch",
            )
        write_durably(self._resources / info.name, payload)

    def held_state(self) -> tuple[int, LazyState]:
        """The published version on disk and its accumulated deltas, read as they are asked for; version 0 and nothing
        if there is none."""
        path = self.folder / "held.safetensors"
        try:
            meta = json.loads((self.folder / "held.json").read_text())
            if _sha256(path) != meta["sha256"]:
                return 0, {}
            return int(meta["version"]), lazy_state(path)
        except (FileNotFoundError, json.JSONDecodeError, KeyError, SafetensorError):
            return 0, {}

    def put_held_state(self, version: int, state: Mapping[int, Mapping[str, FloatArray]]) -> None:
        """Keep a published version. A kill between the two files leaves a mismatch, which reads as version 0."""
        sha256 = write_tensors(self.folder / "held.safetensors", flatten(state))
        write_durably(self.folder / "held.json", json.dumps({"version": version, "sha256": sha256}).encode())

    def put_update(self, delta: Delta, payload: bytes) -> None:
        """Put a finished update into the outbox: from here on it survives any kill until it is answered."""
        self.drop_update()
        staging = self.folder / "outbox.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        header, body = codec.encode(delta)
        write_durably(staging / "payload.bin", payload)
        write_durably(staging / "body.msgpack", body)
        write_durably(staging / "header.msgpack", header)
        staging.rename(self._outbox)
        sync_folder(self.folder)

    def update(self) -> tuple[Delta, Path] | None:
        """The update that waits for its answer, if there is one and it is whole."""
        try:
            delta = codec.decode(
                (self._outbox / "header.msgpack").read_bytes(), (self._outbox / "body.msgpack").read_bytes()
            )
        except (FileNotFoundError, RemoteProtocolError):
            return None
        path = self._outbox / "payload.bin"
        if not isinstance(delta, Delta) or not path.is_file():
            return None
        if hashlib.sha256(path.read_bytes()).hexdigest() != delta.payload_sha256:
            return None
        return delta, path

    def pending_attempt(self) -> AttemptId | None:
        """The attempt id of the update in the outbox."""
        found = self.update()
        return found[0].attempt_id if found else None

    def drop_update(self) -> None:
        """Empty the outbox."""
        shutil.rmtree(self._outbox, ignore_errors=True)
