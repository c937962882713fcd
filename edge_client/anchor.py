"""What is the model held to? Text sampled from the base itself, and what the base says about each of its tokens.

The anchor set is made once per base by any machine that can run it; the aggregator ships it as opaque bytes. The
teacher is the client's own base (its expanded blocks skipped), so that KL is 0 at the start and the prefix pass is
shared. Source: methods.md 5.2; the loss is ``kernels.ops.linear_kl_topk``.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedblocks.edge_client.backbone import DenseBackbone
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore, sample_key
from fedblocks.kernels.ops import top_k

TOP_K: Final = 32
MIN_TOKENS: Final = 16
"""A sequence that ends earlier is drawn again."""
SAMPLING_BYTES: Final = 256 << 20
"""Room for the keys and values of the sequences that are sampled side by side."""

_MAGIC: Final = b"FBANCHR1"
_HEADER: Final = struct.Struct("<8sIBq")  # magic, number of sequences, bytes per id, seed
MAX_SEQUENCES: Final = 1 << 20


class AnchorError(ValueError):
    """These bytes are no anchor set, or this base cannot be sampled from."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnchorSet:
    """Token sequences; the first 7/8 train, the last 1/8 (``kl_val``) measure the forgetting for the controller."""

    sequences: tuple[npt.NDArray[np.int32], ...]
    seed: int

    @property
    def num_train(self) -> int:
        """448 of 512; at least one, and all of a set of one."""
        return max(1, len(self.sequences) - len(self.sequences) // 8)

    @property
    def train_indices(self) -> range:
        """Sequences that training may see."""
        return range(self.num_train)

    @property
    def kl_val_indices(self) -> range:
        """Sequences that only measure."""
        return range(self.num_train, len(self.sequences))

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, start tokens included."""
        return sum(map(len, self.sequences))

    def to_bytes(self) -> bytes:
        """Little-endian: header, lengths (u16), ids (u16 where all of them fit, else u32), SHA-256 of all before."""
        wide = max(int(s.max()) for s in self.sequences) > 0xFFFF
        body = _HEADER.pack(_MAGIC, len(self.sequences), 4 if wide else 2, self.seed)
        body += np.array([len(s) for s in self.sequences], dtype="<u2").tobytes()
        body += np.concatenate(self.sequences).astype("<u4" if wide else "<u2").tobytes()
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> AnchorSet:
        """The inverse of :meth:`to_bytes`; checks everything before it allocates.

        Raises:
            AnchorError: these bytes are no anchor set, or not all of one.
        """
        body, digest = data[:-32], data[-32:]
        if len(body) < _HEADER.size or body[:8] != _MAGIC or hashlib.sha256(body).digest() != digest:
            raise AnchorError(
                f"anchor set: {len(data)} bytes that are no anchor set or were cut or changed; fetch them again"
            )
        _, count, width, seed = _HEADER.unpack_from(body)
        if width not in (2, 4) or not 1 <= count <= MAX_SEQUENCES or len(body) < _HEADER.size + 2 * count:
            raise AnchorError(
                f"anchor set: {count} sequences with {width} bytes per id, expected 1 or more with 2 or 4"
            )
        lengths = np.frombuffer(body, dtype="<u2", count=count, offset=_HEADER.size)
        start = _HEADER.size + 2 * count
        if int(lengths.min()) < 2 or len(body) != start + width * int(lengths.sum(dtype=np.int64)):
            raise AnchorError("anchor set: the lengths of the sequences do not match the number of bytes")
        ids = np.frombuffer(body, dtype=f"<u{width}", offset=start)
        if int(ids.max()) > 0x7FFFFFFF:
            raise AnchorError(f"anchor set: token id {int(ids.max())} is too large")
        parts = np.split(ids.astype(np.int32), np.cumsum(lengths[:-1], dtype=np.int64))
        return cls(sequences=tuple(parts), seed=seed)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises:
        AnchorError: a token id does not exist in this vocabulary.
        """
        highest = max(int(s.max()) for s in self.sequences)
        if highest >= vocab_size:
            raise AnchorError(
                f"anchor set: token id {highest} in a vocabulary of {vocab_size}; made from another base?"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`to_bytes`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


@torch.no_grad()
def sample_anchor(checkpoint: Checkpoint, num_sequences: int = 512, num_tokens: int = 256, seed: int = 0) -> AnchorSet:
    """Samples from the full-precision base: ancestral, temperature 1, nothing cut off.

    Each sequence begins with bos (else eos), counts it, has at most ``num_tokens`` tokens (never more than the base's
    positions) and ends after eos; one that ends before :data:`MIN_TOKENS` is drawn again.

    Raises:
        AnchorError: the base names neither bos nor eos, or ends nearly every sequence at once.
    """
    config = checkpoint.config
    start, ends = _special_tokens(config.get("bos_token_id"), config.get("eos_token_id"))
    length = min(num_tokens, int(config.get("max_position_embeddings", num_tokens)))
    model = ExpandedModel(backbone=DenseBackbone(checkpoint), checkpoint=checkpoint)
    generator = torch.Generator().manual_seed(seed)
    shape = checkpoint.shape
    side_by_side = max(1, SAMPLING_BYTES // (8 * shape.num_layers * shape.kv_size * length))
    found: list[npt.NDArray[np.int32]] = []
    drawn = 0
    while len(found) < num_sequences:
        rows = min(side_by_side, num_sequences - len(found))
        drawn += rows
        if drawn > 20 * num_sequences + 1000:
            raise AnchorError(
                f"the base ended {drawn - len(found)} of {drawn} sampled texts before {min(MIN_TOKENS, length)} "
                "tokens; it cannot serve as its own anchor"
            )
        texts = _sample(model, start, ends, rows, length, generator)
        found += [ids for ids in texts if len(ids) >= min(MIN_TOKENS, length)]
    return AnchorSet(sequences=tuple(found), seed=seed)


def _special_tokens(bos: int | None, eos: int | list[int] | None) -> tuple[int, frozenset[int]]:
    ends = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if bos is None and not ends:
        raise AnchorError("config.json names neither bos_token_id nor eos_token_id; sampling needs a first token")
    return (min(ends) if bos is None else bos), ends


def _sample(
    model: ExpandedModel, start: int, ends: frozenset[int], rows: int, length: int, generator: torch.Generator
) -> Iterator[npt.NDArray[np.int32]]:
    """``rows`` sequences side by side, each cut after its first end token."""
    ids = torch.full((rows, length), start, dtype=torch.int64)
    past = model.empty_past(rows, length)
    end_ids = torch.tensor(sorted(ends), dtype=torch.int64)
    ended = torch.zeros(rows, dtype=torch.bool)
    for position in range(length - 1):
        logits = model.decode_step(ids[:, position], past, position)
        probabilities = torch.softmax(logits.float().cpu(), dim=-1)
        ids[:, position + 1] = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        ended |= torch.isin(ids[:, position + 1], end_ids)
        if bool(ended.all()):
            break
    for row in ids.numpy().astype(np.int32):
        found = np.flatnonzero(np.isin(row[1:], end_ids.numpy()))
        yield row[: found[0] + 2].copy() if len(found) else row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherRecord:
    """What the base says at the n - 1 positions of a sequence that predict its next token."""

    ids: Tensor  # (n - 1, K) int64
    logp: Tensor  # (n - 1, K) fp32
    log_tail: Tensor  # (n - 1,) fp32


class Teacher:
    """The base's records of an anchor set, made once and kept.

    Args:
        anchors: the set.
        model: its frozen layers are the teacher; its expanded blocks are skipped.
        prefix: hidden states at the base cut.
        store: where records are kept; None computes them again in every process.
    """

    def __init__(
        self, *, anchors: AnchorSet, model: ExpandedModel, prefix: PrefixStates, store: RecordStore | None
    ) -> None:
        anchors.check_vocabulary(model.shape.vocab_size)
        self.anchors = anchors
        self._model = model
        self._prefix = prefix
        self._store = store
        self._k = min(TOP_K, model.shape.vocab_size)
        self._id_type = "<u2" if model.shape.vocab_size <= 0x10000 else "<u4"
        self._made: dict[int, TeacherRecord] = {}

    def fill(self, indices: Sequence[int]) -> None:
        """Makes the missing records of these sequences, and their prefix states."""
        self._prefix.fill([self.anchors.sequences[i] for i in indices])
        new: list[tuple[bytes, bytes]] = []
        with self._model.base_only():  # what it reads of the base serves all of them
            for i in indices:
                if self._read(i) is None:
                    record = self._make(i)
                    if self._store is None or not self._store.usable:
                        self._made[i] = record
                    else:
                        new.append((sample_key(self.anchors.sequences[i]), self._pack(record)))
        if self._store is not None:
            self._store.put(new)

    def records(self, indices: Sequence[int]) -> list[TeacherRecord]:
        """The records of these sequences."""
        return [self._read(i) or self._make(i) for i in indices]

    @torch.no_grad()
    def _make(self, index: int) -> TeacherRecord:
        hidden = self._prefix.padded([self.anchors.sequences[index]])
        with self._model.base_only():
            h = self._model.forward_base(hidden, self._model.base_cut)[0, :-1]
            ids, logp, log_tail = top_k(self._model.final_rows(h), self._model.head, self._k)
        return TeacherRecord(ids=ids.cpu(), logp=logp.cpu(), log_tail=log_tail.cpu())

    def _read(self, index: int) -> TeacherRecord | None:
        if index in self._made:
            return self._made[index]
        data = self._store.get(sample_key(self.anchors.sequences[index])) if self._store is not None else None
        return None if data is None else self._unpack(index, data)

    def _unpack(self, index: int, data: bytes) -> TeacherRecord:
        rows, k = len(self.anchors.sequences[index]) - 1, self._k
        at_logp, at_tail = np.dtype(self._id_type).itemsize * rows * k, 4 * rows
        ids = np.frombuffer(data, dtype=self._id_type, count=rows * k).astype(np.int64).reshape(rows, k)
        floats = np.frombuffer(data, dtype="<f4", offset=at_logp).copy()
        assert len(floats) * 4 == at_tail + 4 * rows * k
        return TeacherRecord(
            ids=torch.from_numpy(ids),
            logp=torch.from_numpy(floats[: rows * k].reshape(rows, k)),
            log_tail=torch.from_numpy(floats[rows * k :]),
        )

    def _pack(self, record: TeacherRecord) -> bytes:
        parts = (
            record.ids.numpy().astype(self._id_type),
            record.logp.numpy(),
            record.log_tail.numpy(),
        )
        return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
