"""What is never computed twice? The hidden states that enter a block, one record per sample.

Everything below the base cut is frozen for the whole run, so a sample's states there are computed once and kept; within
a round the same holds below the lowest block that trains. A pass goes in waves (runtime.md 2.2): the states of a few
thousand tokens stay in memory and every layer is read and decoded once for all of them. Samples of equal length go
through a layer together, so a record's last bits may depend on its neighbours (fp32: 1e-6 relative), never on what was
cached before a crash: a wave is made of what is missing in a fixed order, and it is stored before the next one begins.

Durability (runtime.md 2.4): bytes of a shard are on disk before the journal's lines that name them; what is stored
together counts when its last line is there; a torn journal is cut off; a record whose CRC fails is computed again and
counted. The journal names the cache that it belongs to, so nothing that was copied from another one is read. One
process per folder. A disk that is full, dead or locked costs time and one line in the log, never a round.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from fedblocks.edge_client.decoder_block import BlockWeights
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.kernels.ops import NUMERICS_CLASS
from fedblocks.profiles import cost
from fedblocks.protocol.durable import sync_folder, write_durably
from fedblocks.protocol.expansion import base_fields

FORMAT: Final = "fedblocks-prefix-2"
SHARD_BYTES: Final = 256 << 20
ALIGNMENT: Final = 64
GIB: Final = 1 << 30
KEPT_FREE_BYTES: Final = 256 << 20
"""Free disk space that a cache never takes."""
RAM_SHARE: Final = 0.25
"""Of the available memory: the most that records may take there unless told otherwise."""
WAVE_TOKENS: Final = cost.WAVE_TOKENS["cpu"]
"""Tokens that go through the prefix together: a layer is read and decoded once for each wave."""
BATCH_TOKENS: Final = cost.PREFIX_BATCH_TOKENS["cpu"]
"""Tokens that go through one layer at once: large matrices, few activations."""
WAVE_TOKENS_ON_GPU: Final = cost.WAVE_TOKENS["cuda"]
BATCH_TOKENS_ON_GPU: Final = cost.PREFIX_BATCH_TOKENS["cuda"]
_JOURNAL: Final = "index.journal"
_META: Final = "meta.json"
_HEADER: Final = struct.Struct("<32s32s")  # format, blake2b-256 of the folder's name
_LINE: Final = struct.Struct("<H16sIQII?")  # length of the rest, key, shard, offset, bytes, CRC of the record, last?
_CRC: Final = struct.Struct("<I")

Location = Literal["disk", "ram", "auto"]
Warn = Callable[[str], None]
Buffer = Any
"""What ``memoryview`` takes."""


def sample_key(ids: npt.NDArray[np.int32]) -> bytes:
    """blake2b-128 of the token ids; labels are not in it."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i4").tobytes(), digest_size=16).digest()


def cut_fields(
    model: ExpandedModel, base_hash: str, *, cut: int, below: Sequence[tuple[int, str]] = ()
) -> dict[str, Any]:
    """Everything that the states at ``cut`` depend on, beside the sample: what ``meta.json`` says.

    Args:
        below: :func:`blocks_below` of the cut; none at the base cut.
    """
    return {
        "format": FORMAT,
        "base": base_hash,
        "backbone": model.backbone.digest,
        "cut": cut,
        "below": [list(block) for block in below],
        "model": base_fields(model.checkpoint.config),  # with all that attention and rotary embedding depend on
        "compute": _name(model.dtype),
        "store": _name(model.dtype),
        "numerics": NUMERICS_CLASS,
    }


def cut_key(model: ExpandedModel, base_hash: str, *, cut: int, below: Sequence[tuple[int, str]] = ()) -> str:
    """Names :func:`cut_fields`: blake2b-256, 64 hexadecimal digits."""
    text = json.dumps(cut_fields(model, base_hash, cut=cut, below=below), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def blocks_below(model: ExpandedModel, cut: int) -> list[tuple[int, str]]:
    """Block id and content digest of each expanded block below ``cut``, in the order of the stack."""
    return [
        (entry.index, _digest(model.weights(position)))
        for position, entry in enumerate(model.stack[:cut])
        if entry.kind == "block"
    ]


def _digest(weights: BlockWeights) -> str:
    """blake2b-256 of a block's tensors as they are computed with."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in weights.tensors().items():
        digest.update(f"{name} {_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor.detach()))
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def default_max_bytes(folder: Path, held_bytes: int = 0) -> int:
    """min(20 % of the free disk, 16 GiB); what the cache itself holds counts as free."""
    return min((_free_bytes(folder) + held_bytes) // 5, 16 * GIB)


def _free_bytes(folder: Path) -> int:
    """Free space where the folder is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


class RecordStore:
    """Records of bytes by 16-byte key: in one folder, durable after :meth:`put` returns, or in memory.

    Nothing here raises on a bad disk: the store then answers "not there" or stores nothing, and says so once.

    Args:
        folder: the cache's own; its name is the cache's key. Not touched by a store in memory.
        max_bytes: most bytes of records; default :func:`default_max_bytes`, in memory 25 % of what is available.
        location: ``auto`` takes memory if the limit fits 25 % of what is available there and the folder has nothing yet
            (records in memory end with the process), else the disk.
        expected_bytes: what all records will take, if known: lets ``auto`` choose memory under a generous limit.
        meta: what the key was made of, for ``meta.json``.
        warn: takes one line for the log.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int | None = None,
        location: Location = "disk",
        expected_bytes: int | None = None,
        meta: Mapping[str, Any] | None = None,
        warn: Warn,
    ) -> None:
        self.folder = folder
        self.corrupt = 0
        """Records whose CRC failed."""
        self.location: Literal["disk", "ram"] = "disk"
        self._warn = warn
        self._records: _Disk | _Memory | None = None
        self._writable = False
        self._max_bytes = 0
        self._nearly_full_said = False
        try:
            in_memory = int(RAM_SHARE * psutil.virtual_memory().available)
            if location == "auto":
                limit = default_max_bytes(folder) if max_bytes is None else max_bytes
                needed = limit if expected_bytes is None else min(limit, expected_bytes)
                location = "ram" if needed <= in_memory and not (folder / _JOURNAL).exists() else "disk"
            self.location = location
            if location == "ram":
                self._records = _Memory()
                self._max_bytes = in_memory if max_bytes is None else max_bytes
            else:
                self._records = _Disk(folder, meta or {}, warn)
                self._max_bytes = default_max_bytes(folder, self.num_bytes) if max_bytes is None else max_bytes
            self._writable = True
        except OSError as e:
            self._give_up(f"cannot use {folder}: {e.strerror or e}")

    @property
    def usable(self) -> bool:
        """Can records be stored? False once the disk has failed or is full, or if another process holds the folder."""
        return self._writable

    @property
    def num_bytes(self) -> int:
        """Bytes of all records, those that were damaged and stored again included."""
        return self._records.num_bytes if self._records is not None else 0

    def __contains__(self, key: bytes) -> bool:
        return self._records is not None and key in self._records

    def __len__(self) -> int:
        return len(self._records) if self._records is not None else 0

    def admitted(self, sizes: Mapping[bytes, int]) -> list[bytes]:
        """Which of these new records, key -> bytes, have room: lowest keys first, up to the first that does not fit."""
        if not self._writable or self._records is None:
            return []
        room = self._max_bytes - self._records.num_bytes
        if self.location == "disk":
            try:
                on_disk = _free_bytes(self.folder) - KEPT_FREE_BYTES
            except OSError as e:
                self._stop_writing(e)
                return []
            if on_disk < min(room, sum(sizes.values())) and not self._nearly_full_said:
                self._nearly_full_said = True
                self._warn(
                    f"{self.folder}: the disk is nearly full; the cache leaves its last {KEPT_FREE_BYTES >> 20} MiB "
                    "free, and what has no room is computed each time"
                )
            room = min(room, on_disk)
        keys = sorted(sizes)
        ends = itertools.accumulate(sizes[key] for key in keys)
        return [key for key, end in zip(keys, ends, strict=True) if end <= room]

    def get(self, key: bytes) -> bytes | None:
        """The record, or None if it is not there, cannot be read, or fails its CRC (checked at the first read)."""
        size = self._records.size(key) if self._records is not None else None
        if size is None:
            return None
        buffer = bytearray(size)
        return bytes(buffer) if self.read_into(key, buffer) else None

    def read_into(self, key: bytes, buffer: Buffer) -> bool:
        """The same into a writable buffer of the record's length; False if it is not there, and then anything may be.

        Raises:
            ValueError: the record has another length.
        """
        size = self._records.size(key) if self._records is not None else None
        if self._records is None or size is None:
            return False
        view = memoryview(buffer).cast("B")
        if len(view) != size:
            raise ValueError(f"read_into: the record has {size} bytes, the buffer {len(view)}")
        try:
            if self._records.read_into(key, view):
                return True
        except OSError as e:
            self._give_up(f"cannot read {self.folder}: {e.strerror or e}")
            return False
        self.corrupt += 1
        if self.corrupt & (self.corrupt - 1) == 0:  # the 1st, 2nd, 4th, 8th ...: a dead disk must not fill the log
            self._warn(
                f"{self.folder}: a record failed its checksum and is computed again ({self.corrupt} so far); "
                "the disk may be failing"
            )
        return False

    def put(self, items: Iterable[tuple[bytes, Buffer]]) -> None:
        """Stores records (key, bytes), durably. What does not fit the limit is left out, highest keys first."""
        new = {key: memoryview(data).cast("B") for key, data in items if key not in self}
        kept = self.admitted({key: len(data) for key, data in new.items()})
        if not kept or self._records is None:
            return
        try:
            self._records.append([(key, new[key]) for key in kept])
        except OSError as e:
            self._stop_writing(e)

    def _stop_writing(self, error: OSError) -> None:
        self._writable = False
        self._warn(
            f"cannot write {self.folder}: {error.strerror or error}; {len(self)} records stay in use and nothing more "
            "is stored, which costs time but changes no result"
        )

    def _give_up(self, text: str) -> None:
        self.close()
        self._warn(f"{text}; going on without a cache, which costs time but changes no result")

    def close(self) -> None:
        """Closes all files and lets the folder go; records in memory end."""
        self._writable = False
        if self._records is not None:
            self._records.close()
            self._records = None

    def wipe(self) -> None:
        """Closes and deletes the records and their folder, if no other process uses it.

        Hidden states are nearly the user's text.
        """
        self.close()
        if self.location == "disk" and self.folder.is_dir():
            _delete(self.folder)


class _Memory:
    """Records in memory."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._records: dict[bytes, bytes] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    def size(self, key: bytes) -> int | None:
        return len(self._records[key]) if key in self._records else None

    def read_into(self, key: bytes, view: memoryview) -> bool:
        view[:] = self._records[key]
        return True

    def append(self, items: Sequence[tuple[bytes, memoryview]]) -> None:
        self._records.update((key, bytes(data)) for key, data in items)
        self.num_bytes += sum(len(data) for _, data in items)

    def close(self) -> None:
        self._records.clear()


@dataclass(slots=True)
class _Place:
    """Where a record lies."""

    shard: int
    offset: int
    num_bytes: int
    crc: int
    checked: bool = False


class _Disk:
    """Records in the shards of one folder, named by its journal; every method may raise OSError."""

    def __init__(self, folder: Path, meta: Mapping[str, Any], warn: Warn) -> None:
        self.num_bytes = 0
        self._folder = folder
        self._index: dict[bytes, _Place] = {}
        self._end = (0, 0)  # shard and offset where the next record goes
        self._shards: dict[int, int] = {}  # number -> descriptor
        self._journal: int | None = None
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(folder)
        if self._lock is None:
            raise OSError(f"another process uses {folder}")
        try:
            self._read_journal(warn)
            self._write_meta(meta)
        except BaseException:
            self.close()
            raise

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def _read_journal(self, warn: Warn) -> None:
        self._journal = journal = os.open(self._folder / _JOURNAL, os.O_RDWR | os.O_CREAT, 0o600)
        data = os.pread(journal, os.fstat(journal).st_size, 0)
        header = _HEADER.pack(FORMAT.encode(), hashlib.blake2b(self._folder.name.encode(), digest_size=32).digest())
        if data[: len(header)] != header:
            if data:
                warn(f"{self._folder}: the journal is another cache's or its head is damaged; everything is made again")
            os.ftruncate(journal, 0)
            _write_at(journal, memoryview(header), 0)
            os.fsync(journal)
            sync_folder(self._folder)
            data = header
        good = len(header)
        stored: dict[bytes, _Place] = {}  # what one put stored; counts when its last line is there
        for key, place, last, end in _lines(data, good):
            if place.offset + place.num_bytes > self._shard_size(place.shard):
                break  # the line got to disk, its bytes did not: only after a disk that lies about fsync
            stored[key] = place
            if last:
                self._take(stored)
                stored, good = {}, end
        if good < len(data):
            warn(
                f"{self._folder}: the journal is torn, its last {len(data) - good} bytes are cut off; "
                f"{len(self._index)} records are left, the others are computed again"
            )
            os.ftruncate(journal, good)
            os.fsync(journal)
        self._journal_end = good
        self._drop_unnamed()

    def _drop_unnamed(self) -> None:
        """Gives back the bytes behind the last record that the journal names."""
        last, end = self._end
        for path in self._folder.glob("shard-[0-9][0-9][0-9][0-9][0-9].bin"):
            number = int(path.stem.removeprefix("shard-"))
            if number > last:
                path.unlink()
                with contextlib.suppress(KeyError):
                    os.close(self._shards.pop(number))
            elif number == last and path.stat().st_size > end:
                os.truncate(path, end)

    def _write_meta(self, meta: Mapping[str, Any]) -> None:
        """For people, and for the line that says why a cache was evicted; nothing is believed because of it."""
        path = self._folder / _META
        text = (json.dumps(meta, indent=1) + "\n").encode()
        with contextlib.suppress(OSError):
            if meta and not (path.exists() and path.read_bytes() == text):
                write_durably(path, text)
                path.chmod(0o600)

    def _shard_path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.bin"

    def _shard_size(self, number: int) -> int:
        path = self._shard_path(number)
        return path.stat().st_size if path.exists() else 0

    def _shard(self, number: int) -> int:
        if number not in self._shards:
            fresh = not self._shard_path(number).exists()
            self._shards[number] = os.open(self._shard_path(number), os.O_RDWR | os.O_CREAT, 0o600)
            if fresh:
                sync_folder(self._folder)
        return self._shards[number]

    def size(self, key: bytes) -> int | None:
        return self._index[key].num_bytes if key in self._index else None

    def read_into(self, key: bytes, view: memoryview) -> bool:
        """False, and the record is forgotten, if its bytes are not those that were written."""
        place = self._index[key]
        whole = _read_at(self._shard(place.shard), view, place.offset)
        if not place.checked:
            if not whole or zlib.crc32(view) != place.crc:
                del self._index[key]
                return False
            place.checked = True
        return True

    def append(self, items: Sequence[tuple[bytes, memoryview]]) -> None:
        """Stores all of these or none."""
        assert self._journal is not None
        shard, offset = self._end
        places: dict[bytes, _Place] = {}
        try:
            for key, data in items:
                offset = -(-offset // ALIGNMENT) * ALIGNMENT
                if offset and offset + len(data) > SHARD_BYTES:
                    shard, offset = shard + 1, 0
                _write_at(self._shard(shard), data, offset)
                places[key] = _Place(shard, offset, len(data), zlib.crc32(data), checked=True)
                offset += len(data)
            for number in {place.shard for place in places.values()}:
                os.fsync(self._shards[number])
            *_, last_key = places
            lines = b"".join(_line(key, place, last=key == last_key) for key, place in places.items())
            _write_at(self._journal, memoryview(lines), self._journal_end)
            os.fsync(self._journal)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._journal, self._journal_end)  # a part of a line would end the journal there
                self._drop_unnamed()
            raise
        self._journal_end += len(lines)
        self._take(places)

    def _take(self, places: Mapping[bytes, _Place]) -> None:
        self._index.update(places)
        self._end = max(self._end, *((place.shard, place.offset + place.num_bytes) for place in places.values()))
        self.num_bytes += sum(place.num_bytes for place in places.values())

    def close(self) -> None:
        self._index.clear()
        for descriptor in (*self._shards.values(), self._journal, self._lock):
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._shards.clear()
        self._journal = self._lock = None


class PrefixStates:
    """Hidden states at a cut, from the store or computed.

    Args:
        model: only its positions below the cut are used.
        store: None computes every time.
        cut: position whose input is meant; default the base cut, below which nothing ever changes.
        source: states at a lower cut, where a pass then begins; without it a pass begins at the tokens.
    """

    def __init__(
        self,
        model: ExpandedModel,
        store: RecordStore | None,
        *,
        cut: int | None = None,
        source: PrefixStates | None = None,
    ) -> None:
        self.cut = model.base_cut if cut is None else cut
        """The position that the states enter."""
        if source is not None and source.cut > self.cut:
            raise ValueError(f"prefix states at cut {self.cut} cannot begin at cut {source.cut}, which is higher")
        self._model = model
        self._store = store
        self._source = source
        self.computed = 0
        """Samples that had to be computed."""
        self.read = 0
        """Samples that were found in the store."""

    def fill(self, samples: Iterable[npt.NDArray[np.int32]]) -> None:
        """Computes and stores what is missing and has room, wave by wave; each is durable before the next begins."""
        if self._store is None or not self._store.usable:
            return
        missing = {key: ids for ids in samples if (key := sample_key(ids)) not in self._store}
        token_bytes = self._model.shape.hidden_size * self._model.dtype.itemsize
        chosen = self._store.admitted({key: len(ids) * token_bytes for key, ids in missing.items()})
        for wave in _waves([missing[key] for key in chosen], self._wave_tokens):
            parts = self._compute(wave).cpu().split([len(ids) for ids in wave])
            self._store.put((sample_key(ids), _bytes_of(part)) for ids, part in zip(wave, parts, strict=True))
            if not self._store.usable:
                return  # what cannot be kept need not be computed now

    def padded(self, samples: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """The samples' states in the compute dtype, right-padded with zeros: (B, longest, H)."""
        longest = max(len(ids) for ids in samples)
        batch = torch.zeros(len(samples), longest, self._model.shape.hidden_size, dtype=self._model.dtype)
        self.write_states(samples, [row[: len(ids)] for row, ids in zip(batch, samples, strict=True)])
        return batch.to(self._model.device)

    def write_states(self, samples: Sequence[npt.NDArray[np.int32]], places: Sequence[Tensor]) -> None:
        """The samples' states into ``places``: contiguous (n, H) each, on the CPU, in the compute dtype."""
        missing: dict[bytes, list[int]] = {}
        for i, (ids, place) in enumerate(zip(samples, places, strict=True)):
            key = sample_key(ids)
            if self._store is None or not self._store.read_into(key, _bytes_of(place)):
                missing.setdefault(key, []).append(i)
        self.read += len(samples) - sum(map(len, missing.values()))
        for wave in _waves([samples[i] for i, *_ in missing.values()], self._wave_tokens):
            parts = self._compute(wave).split([len(ids) for ids in wave])
            for ids, part in zip(wave, parts, strict=True):
                for i in missing[sample_key(ids)]:
                    places[i].copy_(part)

    @torch.no_grad()
    def _compute(self, wave: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """The states of samples in ascending length, one after another: (tokens, H)."""
        self.computed += len(wave)
        model = self._model
        lengths = [len(ids) for ids in wave]
        if self._source is None:
            start = 0
            h = model.embed_samples(wave)
        else:
            start = self._source.cut
            h = torch.empty(sum(lengths), model.shape.hidden_size, dtype=model.dtype)
            self._source.write_states(wave, h.split(lengths))
            h = h.to(model.device)
        run = self._run_padded if self._on_gpu else self._run_equal
        with contextlib.closing(self._weights(start)) as layers:
            run(h, lengths, enumerate(layers, start))
        return h

    def _run_equal(self, h: Tensor, lengths: Sequence[int], layers: Iterable[tuple[int, BlockWeights | None]]) -> None:
        """Samples of equal length together: what a sample gets does not depend on its neighbours, to the bit."""
        batches = _batches(lengths)
        for position, weights in layers:
            for tokens, length in batches:
                part = h[tokens].view(-1, length, h.shape[1])
                h[tokens] = self._model.run(part, position, weights).flatten(0, 1)

    def _run_padded(self, h: Tensor, lengths: Sequence[int], layers: Iterable[tuple[int, BlockWeights | None]]) -> None:
        """Neighbours together, filled up on the right: matrices large enough for a GPU. Pads are never read."""
        batches = [(tokens, *_padding(sizes, h.device)) for tokens, sizes in _neighbours(lengths)]
        for position, weights in layers:
            for tokens, places, real in batches:
                h[tokens] = self._model.run(h[tokens][places], position, weights, lengths=real.sum(1))[real]

    @property
    def _on_gpu(self) -> bool:
        return self._model.device.type != "cpu"

    @property
    def _wave_tokens(self) -> int:
        return WAVE_TOKENS_ON_GPU if self._on_gpu else WAVE_TOKENS

    def _weights(self, start: int) -> Generator[BlockWeights | None]:
        """Of each position below the cut; None where the model holds them or knows how to make them."""
        if start == 0 and self.cut <= self._model.base_cut:
            layers = [entry.index for entry in self._model.stack[: self.cut]]
            yield from self._model.backbone.stream(layers, self._model.dtype)
        else:
            yield from itertools.repeat(None, self.cut - start)


class TokenInputs(PrefixStates):
    """Stands in where the embedding trains: the inputs are the token ids themselves, and nothing can be kept."""

    def __init__(self, model: ExpandedModel) -> None:
        super().__init__(model, None, cut=0)

    def fill(self, samples: Iterable[npt.NDArray[np.int32]]) -> None:
        """Nothing can be prepared."""

    def padded(self, samples: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """Token ids (B, longest) int64, right-padded with 0: no real token looks at a pad."""
        batch = torch.zeros(len(samples), max(map(len, samples)), dtype=torch.int64)
        for row, ids in zip(batch, samples, strict=True):
            row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
        return batch.to(self._model.device)


def _waves(samples: Iterable[npt.NDArray[np.int32]], most: int) -> Iterator[list[npt.NDArray[np.int32]]]:
    """Parts of at most ``most`` tokens, or of one sample, in ascending length; equal lengths by their tokens.

    The order depends on the samples alone, so that what was missing after a crash makes the same waves as before it.
    """
    wave: list[npt.NDArray[np.int32]] = []
    tokens = 0
    for ids in sorted(samples, key=lambda ids: (len(ids), sample_key(ids))):
        if wave and tokens + len(ids) > most:
            yield wave
            wave, tokens = [], 0
        wave.append(ids)
        tokens += len(ids)
    if wave:
        yield wave


def _batches(lengths: Sequence[int]) -> list[tuple[slice, int]]:
    """Neighbours of equal length, at most BATCH_TOKENS tokens or one sample: their tokens' range, and that length."""
    batches: list[tuple[slice, int]] = []
    start = 0
    for length, same in itertools.groupby(lengths):
        end = start + length * len(list(same))
        step = length * max(1, BATCH_TOKENS // length)
        batches += [(slice(at, min(at + step, end)), length) for at in range(start, end, step)]
        start = end
    return batches


def _neighbours(lengths: Sequence[int]) -> list[tuple[slice, list[int]]]:
    """Samples in ascending length, at most BATCH_TOKENS_ON_GPU with padding, or one of them: its tokens and lengths."""
    parts: list[tuple[slice, list[int]]] = []
    start, sizes = 0, list[int]()
    for length in (*lengths, 0):
        if sizes and (length == 0 or (len(sizes) + 1) * length > BATCH_TOKENS_ON_GPU):
            parts.append((slice(start, start + sum(sizes)), sizes))
            start, sizes = start + sum(sizes), []
        sizes = [*sizes, length]
    return parts


def _padding(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each place (B, longest) of a padded batch is taken from, and which of them are real."""
    sizes = torch.tensor(lengths, device=device)
    column = torch.arange(max(lengths), device=device)
    first = (torch.cumsum(sizes, 0) - sizes).unsqueeze(1)
    real = column < sizes.unsqueeze(1)
    return torch.where(real, first + column, 0), real


def evict_others(folder: Path, keep: Iterable[str], say: Warn, *, now: Mapping[str, Any] | None = None) -> list[str]:
    """Deletes the caches in ``folder`` whose key is not in ``keep``, save those that a process uses.

    Args:
        say: takes a line for the log for each.
        now: what the current key is made of (:func:`cut_fields`): the line then says what changed.

    Returns:
        The names deleted.
    """
    kept = set(keep)
    gone: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir() or path.name in kept:
            continue
        meta, size = _read_meta(path), sum(file.stat().st_size for file in path.iterdir())
        if _delete(path):
            gone.append(path.name)
            text = f"evicted the cache {path}, {size / 1e6:.1f} MB: no plan names its key any more"
            say(text + _changes(meta, now or {}))
    return gone


def _delete(folder: Path) -> bool:
    """Deletes a cache's folder; False if a process uses it or the disk does not let us."""
    try:
        lock = _lock(folder)
        if lock is None:
            return False
        try:
            shutil.rmtree(folder)
        finally:
            os.close(lock)
    except OSError:
        return False
    return True


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """`` (cut was 8, is 6)`` for the fields that differ; long values are not written out."""
    texts: list[str] = []
    for name in sorted(old.keys() & new.keys()):
        before, after = json.dumps(old[name]), json.dumps(new[name])
        if before != after:
            texts.append(f"{name} was {before}, is {after}" if len(before) + len(after) < 60 else f"{name} changed")
    return f" ({'; '.join(texts)})" if texts else ""


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder for this process, or None if another holds it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _line(key: bytes, place: _Place, *, last: bool) -> bytes:
    length = _LINE.size + _CRC.size - 2
    head = _LINE.pack(length, key, place.shard, place.offset, place.num_bytes, place.crc, last)
    return head + _CRC.pack(zlib.crc32(head))


def _lines(data: bytes, start: int) -> Iterator[tuple[bytes, _Place, bool, int]]:
    """Key, place, "last of its put" and end offset of each whole line from ``start``, up to the first torn one."""
    size = _LINE.size + _CRC.size
    for at in range(start, len(data) - size + 1, size):
        head = data[at : at + _LINE.size]
        (crc,) = _CRC.unpack_from(data, at + _LINE.size)
        length, key, shard, offset, num_bytes, record_crc, last = _LINE.unpack(head)
        if length != size - 2 or zlib.crc32(head) != crc:
            return
        yield key, _Place(shard, offset, num_bytes, record_crc), last, at + size


def _read_at(descriptor: int, view: memoryview, offset: int) -> bool:
    """Fills the view; False if the file ends before."""
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            return False
        view, offset = view[got:], offset + got
    return True


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
