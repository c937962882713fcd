"""What does a client keep on disk between two moments at which it may be killed?

One folder per run: the files of the run, the published state it holds, and the update that waits for its answer.
Every write is a temporary file, fsync, rename, fsync of the folder; a file whose checksum fails is treated as absent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedblocks.protocol import codec
from fedblocks.protocol.durable import sync_folder, write_durably
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.messages import AttemptId, Delta, ResourceInfo
from fedblocks.protocol.tensors import State, flatten, unflatten


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

    def held_state(self) -> tuple[int, State]:
        """The published version on disk and its accumulated deltas; version 0 and nothing if there is none."""
        path = self.folder / "held.safetensors"
        meta_path = self.folder / "held.json"
        try:
            meta = json.loads(meta_path.read_text())
            payload = path.read_bytes()
            if hashlib.sha256(payload).hexdigest() != meta["sha256"]:
                return 0, {}
            tensors = load_tensors(payload)
        except (FileNotFoundError, json.JSONDecodeError, KeyError, SafetensorError):
            return 0, {}
        return int(meta["version"]), unflatten(tensors)

    def put_held_state(self, version: int, state: State) -> None:
        """Keep a published version. A kill between the two files leaves a mismatch, which reads as version 0."""
        payload = save_tensors(flatten(state))
        write_durably(self.folder / "held.safetensors", payload)
        meta = {"version": version, "sha256": hashlib.sha256(payload).hexdigest()}
        write_durably(self.folder / "held.json", json.dumps(meta).encode())

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
