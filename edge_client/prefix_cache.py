"""What is never computed twice? The hidden states that enter the lowest expanded block, one record per sample.

Everything below the base cut is frozen for the whole run, so a sample's states there are computed once and kept.
A record is computed from its sample alone, one sample at a time, so that its bits depend neither on the neighbours in a
batch nor on what was cached before: with or without a cache, after a crash or not, training sees the same numbers.

Durability (runtime.md 2.4): bytes of a shard are on disk before the journal's line that names them; a torn last line is
cut off at opening; a record whose CRC fails is computed again and counted. One process per folder. A disk that is full,
dead or locked means "no cache" and one warning, never a failed round.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.kernels.ops import NUMERICS_CLASS
from fedblocks.protocol.durable import sync_folder
from fedblocks.protocol.expansion import base_fields

SHARD_BYTES: Final = 256 << 20
ALIGNMENT: Final = 64
GIB: Final = 1 << 30
_LINE: Final = struct.Struct("<H16sIQII")  # length of the rest, key, shard, offset, bytes, CRC of the record
_CRC: Final = struct.Struct("<I")
WAVE_TOKENS: Final = 8192
"""Tokens that go through the prefix together: a layer is decoded once for each wave."""

Warn = Callable[[str], None]


def sample_key(ids: npt.NDArray[np.int32]) -> bytes:
    """blake2b-128 of the token ids; labels are not in it."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i4").tobytes(), digest_size=16).digest()


def cut_key(model: ExpandedModel, base_hash: str, *, cut: int, below: Sequence[tuple[int, str]] = ()) -> str:
    """Names what the states at ``cut`` depend on, beside the sample: 64 hexadecimal digits.

    Args:
        below: (block id, content digest) of each expanded block below the cut; none at the base cut.
    """
    fields = {
        "format": "fedblocks-prefix-v1",
        "base": base_hash,
        "backbone": model.backbone.digest,
        "cut": cut,
        "below": [list(block) for block in below],
        "model": base_fields(model.checkpoint.config),
        "compute": str(model.dtype),
        "store": "float32",
        "numerics": NUMERICS_CLASS,
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def default_max_bytes(folder: Path) -> int:
    """min(20 % of the free disk, 16 GiB)."""
    return min(shutil.disk_usage(folder).free // 5, 16 * GIB)


@dataclass(slots=True)
class _Place:
    shard: int
    offset: int
    num_bytes: int
    crc: int
    checked: bool = False


class RecordStore:
    """Records of bytes by 16-byte key in one folder: append-only, durable after :meth:`put` returns.

    Nothing here raises on a bad disk: the store then answers "not there" and stores nothing.
    """

    def __init__(self, folder: Path, *, max_bytes: int | None = None, warn: Warn) -> None:
        self.folder = folder
        self.corrupt = 0
        """Records whose CRC failed."""
        self._warn = warn
        self._warned = False
        self._index: dict[bytes, _Place] = {}
        self._shards: dict[int, int] = {}  # number -> descriptor
        self._lock: int | None = None
        self._journal: int | None = None
        self._bytes = 0
        self._max_bytes = 0
        self._end = (0, 0)  # shard and offset where the next record goes
        try:
            self._open(max_bytes)
        except OSError as e:
            self._give_up(f"cannot use {folder}: {e.strerror or e}")

    @property
    def usable(self) -> bool:
        """False once the disk has failed, or if another process holds the folder."""
        return self._journal is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of all records."""
        return self._bytes

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def _open(self, max_bytes: int | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process uses {self.folder}") from None
        self._max_bytes = default_max_bytes(self.folder) if max_bytes is None else max_bytes
        journal = os.open(self.folder / "index.journal", os.O_RDWR | os.O_CREAT, 0o600)
        self._journal = journal
        data = _read_all(journal)
        good = 0
        for key, place, end in _lines(data):
            if place.offset + place.num_bytes > self._size(place.shard):
                break  # the line got to disk, its bytes did not: only after a disk that lies about fsync
            self._index[key] = place
            self._end = max(self._end, (place.shard, place.offset + place.num_bytes))
            good = end
        self._bytes = sum(place.num_bytes for place in self._index.values())
        if good < len(data):
            os.ftruncate(journal, good)
            os.fsync(journal)
        os.lseek(journal, good, os.SEEK_SET)

    def _shard(self, number: int) -> int:
        if number not in self._shards:
            path = self.folder / f"shard-{number:05d}.bin"
            fresh = not path.exists()
            self._shards[number] = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            if fresh:
                sync_folder(self.folder)
        return self._shards[number]

    def _size(self, number: int) -> int:
        path = self.folder / f"shard-{number:05d}.bin"
        return path.stat().st_size if path.exists() else 0

    def get(self, key: bytes) -> bytes | None:
        """The record, or None if it is not there, cannot be read, or fails its CRC (checked at the first read)."""
        place = self._index.get(key)
        if place is None:
            return None
        try:
            data = os.pread(self._shard(place.shard), place.num_bytes, place.offset)
        except OSError as e:
            self._give_up(f"cannot read {self.folder}: {e.strerror or e}")
            return None
        if not place.checked:
            if len(data) != place.num_bytes or zlib.crc32(data) != place.crc:
                self.corrupt += 1
                del self._index[key]
                return None
            place.checked = True
        return data

    def put(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Stores the records, durably. What does not fit the limit is left out, highest keys first."""
        new = sorted(((k, d) for k, d in items if k not in self._index), key=lambda item: item[0])
        if not new or self._journal is None:
            return
        shard, offset = self._end
        lines: list[bytes] = []
        places: dict[bytes, _Place] = {}
        room = self._max_bytes - self._bytes
        touched: set[int] = set()
        try:
            for key, data in new:
                room -= len(data)
                if room < 0:
                    break
                offset = -(-offset // ALIGNMENT) * ALIGNMENT
                if offset and offset + len(data) > SHARD_BYTES:
                    shard, offset = shard + 1, 0
                _write_at(self._shard(shard), data, offset)
                touched.add(shard)
                place = _Place(shard, offset, len(data), zlib.crc32(data), checked=True)
                places[key] = place
                lines.append(_line(key, place))
                offset += len(data)
            for number in touched:
                os.fsync(self._shards[number])
            _write_all(self._journal, b"".join(lines))
            os.fsync(self._journal)
        except OSError as e:
            self._give_up(f"cannot write {self.folder}: {e.strerror or e}")
            return
        self._end = (shard, offset)
        self._index.update(places)
        self._bytes += sum(place.num_bytes for place in places.values())

    def _give_up(self, text: str) -> None:
        self._index.clear()
        self.close()
        if not self._warned:
            self._warned = True
            self._warn(f"{text}; going on without a cache, which costs time but changes no result")

    def close(self) -> None:
        """Closes all files and lets the folder go."""
        for descriptor in (*self._shards.values(), self._journal, self._lock):
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._shards.clear()
        self._journal = self._lock = None

    def wipe(self) -> None:
        """Closes and deletes the folder: hidden states are nearly the user's text."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class PrefixStates:
    """Hidden states at the base cut, from the store or computed.

    Args:
        model: only its layers below the base cut are used.
        store: None computes every time.
    """

    def __init__(self, model: ExpandedModel, store: RecordStore | None) -> None:
        self._model = model
        self._store = store
        self.computed = 0
        """Samples that had to be computed."""
        self.read = 0
        """Samples that were found in the store."""

    def fill(self, samples: Iterable[npt.NDArray[np.int32]]) -> None:
        """Computes and stores what is missing, wave by wave; a wave is durable before the next one begins."""
        if self._store is None or not self._store.usable:
            return
        missing = {key: ids for ids in samples if (key := sample_key(ids)) not in self._store}
        for wave in _waves(list(missing.items())):
            states = self._compute([ids for _, ids in wave])
            self._store.put((key, state.numpy().tobytes()) for (key, _), state in zip(wave, states, strict=True))

    def padded(self, samples: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """The samples' states, right-padded with zeros: (B, longest, H)."""
        hidden_size = self._model.shape.hidden_size
        longest = max(len(ids) for ids in samples)
        batch = torch.zeros(len(samples), longest, hidden_size, dtype=self._model.dtype)
        missing: list[int] = []
        for i, ids in enumerate(samples):
            data = self._store.get(sample_key(ids)) if self._store is not None else None
            if data is None:
                missing.append(i)
            else:
                batch[i, : len(ids)] = torch.frombuffer(bytearray(data), dtype=torch.float32).view(len(ids), -1)
        for i, state in zip(missing, self._compute([samples[i] for i in missing]), strict=True):
            batch[i, : len(state)] = state
        self.read += len(samples) - len(missing)
        return batch

    @torch.no_grad()
    def _compute(self, samples: Sequence[npt.NDArray[np.int32]]) -> list[Tensor]:
        """The states (n, H) in fp32 of each sample, each computed by itself; layer by layer over all of them."""
        self.computed += len(samples)
        states = [self._model.embed(torch.from_numpy(ids.astype(np.int64)).unsqueeze(0)) for ids in samples]
        for position in range(self._model.base_cut if samples else 0):
            states = [self._model.forward(state, position, position + 1) for state in states]
        return [state[0].float() for state in states]


def _waves(
    items: Sequence[tuple[bytes, npt.NDArray[np.int32]]],
) -> Iterator[list[tuple[bytes, npt.NDArray[np.int32]]]]:
    """Consecutive parts of at most WAVE_TOKENS tokens, or of one sample."""
    wave: list[tuple[bytes, npt.NDArray[np.int32]]] = []
    tokens = 0
    for item in items:
        if wave and tokens + len(item[1]) > WAVE_TOKENS:
            yield wave
            wave, tokens = [], 0
        wave.append(item)
        tokens += len(item[1])
    if wave:
        yield wave


def evict_others(folder: Path, keep: Iterable[str]) -> list[str]:
    """Deletes the caches in ``folder`` whose key is not in ``keep``; the names deleted."""
    kept = set(keep)
    gone = [path for path in folder.iterdir() if path.is_dir() and path.name not in kept] if folder.is_dir() else []
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in gone]


def _line(key: bytes, place: _Place) -> bytes:
    head = _LINE.pack(_LINE.size + _CRC.size - 2, key, place.shard, place.offset, place.num_bytes, place.crc)
    return head + _CRC.pack(zlib.crc32(head))


def _lines(data: bytes) -> Iterable[tuple[bytes, _Place, int]]:
    """Key, place and end offset of each whole line, up to the first that is torn."""
    size = _LINE.size + _CRC.size
    for start in range(0, len(data) - size + 1, size):
        head = data[start : start + _LINE.size]
        (crc,) = _CRC.unpack_from(data, start + _LINE.size)
        length, key, shard, offset, num_bytes, record_crc = _LINE.unpack(head)
        if length != size - 2 or zlib.crc32(head) != crc:
            return
        yield key, _Place(shard, offset, num_bytes, record_crc), start + size


def _read_all(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view: Any = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_all(descriptor: int, data: bytes) -> None:
    view: Any = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
