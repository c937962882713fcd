"""What does an encoder learn, and what is it held to? The label of a text; where its base puts a text.

    L = CE + lambda·drift,   CE = mean over texts of -log p(label),
                             drift = mean over anchor texts of |e_0 - e|², e the normalised mean embedding

p is the softmax of the head over the embedding; e_0 is the base's, computed with the client's own layers. At the start
the drift is 0 to rounding. Source: methods.md 2.6 (ours), 5.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedblocks.edge_client.anchor import AnchorSet, Teacher
from fedblocks.edge_client.encoder_model import EncoderModel, pooled
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.objective import Losses, Objective
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore
from fedblocks.edge_client.samples import TokenisedSample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextBatch:
    """Padded texts and their labels."""

    inputs: Tensor
    """Hidden states (B, T, H) at the cut, or token ids (B, T) where the stack is run from the bottom."""
    lengths: Tensor  # (B,) int64
    targets: Tensor  # (B,) int64: the number of the label


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextAnchorBatch:
    """Padded anchor texts and where the base puts them."""

    inputs: Tensor  # as in TextBatch
    lengths: Tensor  # (B,) int64
    rows: Tensor  # (B, H) fp32, the base's normalised embeddings


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingRecord:
    """What the base says of a text."""

    embedding: Tensor  # (H,) fp32, of length 1


def text_losses(model: EncoderModel, from_position: int) -> Losses:
    """The loss parts of a model whose inputs enter at ``from_position``."""

    def embeddings(batch: TextBatch | TextAnchorBatch) -> Tensor:
        return pooled(model.forward(batch.inputs, from_position, lengths=batch.lengths), batch.lengths)

    def task(batch: TextBatch, scale: float) -> Tensor:
        return scale * functional.cross_entropy(model.class_logits(embeddings(batch)), batch.targets, reduction="sum")

    def anchor(batch: TextAnchorBatch, scale: float) -> Tensor:
        return scale * (batch.rows - embeddings(batch)).square().sum()

    return Losses(task=task, anchor=anchor)


def text_batch(samples: Sequence[TokenisedSample], inputs: Tensor) -> TextBatch:
    """Texts whose padded inputs (B, T, ...) are given."""
    labels = [sample.label for sample in samples]
    if None in labels:
        raise ValueError("a text has no label; an encoder trains on rows with a text and a label")
    return TextBatch(
        inputs=inputs,
        lengths=torch.tensor([len(sample.ids) for sample in samples], device=inputs.device),
        targets=torch.tensor(labels, device=inputs.device),
    )


def text_anchor_batch(records: Sequence[EmbeddingRecord], inputs: Tensor, lengths: Sequence[int]) -> TextAnchorBatch:
    """Anchor texts whose padded inputs are given."""
    return TextAnchorBatch(
        inputs=inputs,
        lengths=torch.tensor(lengths, device=inputs.device),
        rows=torch.stack([record.embedding for record in records]).to(inputs.device),
    )


OBJECTIVE = Objective(losses=text_losses, task_batch=text_batch, anchor_batch=text_anchor_batch)


class EmbeddingTeacher(Teacher):
    """The base's embeddings of an anchor set, made once and kept: 4·H bytes a text."""

    _model: EncoderModel

    @torch.no_grad()
    def _make(self, index: int) -> EmbeddingRecord:  # type: ignore[override]
        ids = self.anchors.sequences[index]
        lengths = torch.tensor([len(ids)], device=self._model.device)
        h = self._model.forward_base(self._prefix.padded([ids]), self._model.base_cut, lengths)
        return EmbeddingRecord(embedding=pooled(h, lengths)[0].cpu())

    def _unpack(self, index: int, data: bytes) -> EmbeddingRecord:  # type: ignore[override]
        del index
        return EmbeddingRecord(embedding=torch.from_numpy(np.frombuffer(data, dtype="<f4").copy()))

    def _pack(self, record: EmbeddingRecord) -> bytes:  # type: ignore[override]
        return record.embedding.numpy().astype("<f4").tobytes()


def open_teacher(
    *, anchors: AnchorSet, model: ExpandedModel, prefix: PrefixStates, store: RecordStore | None
) -> Teacher:
    """The teacher of this kind of model."""
    kind = EmbeddingTeacher if model.shape.encoder else Teacher
    return kind(anchors=anchors, model=model, prefix=prefix, store=store)


@torch.no_grad()
def score_texts(
    model: EncoderModel, samples: Sequence[TokenisedSample], prefix: PrefixStates | None, batches: Sequence[list[int]]
) -> list[tuple[bool, float, int]]:
    """(right, -log p of the label in nats, 1) of each text, in order; of equal logits the first label counts.

    Args:
        batches: indices that are computed together.
    """
    scores: list[tuple[bool, float, int]] = [(True, 0.0, 0)] * len(samples)
    for indices in batches:
        chosen = [samples[i] for i in indices]
        batch = text_batch(chosen, padded_inputs([sample.ids for sample in chosen], prefix, model))
        cut = 0 if prefix is None else model.base_cut
        logits = model.class_logits(pooled(model.forward(batch.inputs, cut, lengths=batch.lengths), batch.lengths))
        nll = functional.cross_entropy(logits.double(), batch.targets, reduction="none").tolist()
        right = (logits.argmax(-1) == batch.targets).tolist()
        for i, r, n in zip(indices, right, nll, strict=True):
            scores[i] = (r, n, 1)
    return scores


@torch.no_grad()
def embed_texts(
    model: EncoderModel, texts: Sequence[npt.NDArray[np.int32]], batches: Sequence[list[int]], *, of_base: bool = False
) -> Tensor:
    """Normalised embeddings (N, H) fp32 of tokenised texts.

    Args:
        batches: indices that are computed together.
        of_base: with the expanded blocks skipped.
    """
    found = torch.empty(len(texts), model.shape.hidden_size)
    for indices in batches:
        chosen = [texts[i] for i in indices]
        lengths = torch.tensor([len(ids) for ids in chosen], device=model.device)
        inputs = padded_inputs(chosen, None, model)
        forward = model.forward_base if of_base else model.forward
        found[indices] = pooled(forward(inputs, 0, lengths=lengths), lengths).cpu()
    return found


def padded_inputs(texts: Sequence[npt.NDArray[np.int32]], prefix: PrefixStates | None, model: EncoderModel) -> Tensor:
    """Hidden states at the cut, or ids (B, longest) padded with 0."""
    if prefix is not None:
        return prefix.padded(texts)
    batch = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, ids in zip(batch, texts, strict=True):
        row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    return batch.to(model.device)
