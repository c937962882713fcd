"""How good is the model, and how far has it moved from the base? Sums over samples, so that sites can be pooled.

Works on any :class:`ExpandedModel`: the client's 4-bit stack, a dense one, at any strength.
An answer is right if every one of its tokens is the most probable one given the right tokens before it, which is
exactly when greedy decoding would produce it. Source: methods.md 5.3 (kl_t), 12.1 (Down, KLgen, Agree1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedblocks.edge_client.anchor import Teacher
from fedblocks.edge_client.encoder_model import EncoderModel
from fedblocks.edge_client.encoder_objective import score_texts
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.objective import objective_of
from fedblocks.edge_client.prefix_cache import PrefixStates
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.train import task_batch

BATCH_TOKENS: Final = 256
"""Padded tokens of one forward pass: measuring must not need more memory than a small training step."""
LOGITS_BYTES: Final = 32 << 20
"""Room for one chunk of logits in double precision."""

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSums:
    """Sums over examples; the fields are those of ``protocol.messages.Measurement``."""

    num_items: int = 0
    num_correct: int = 0
    """Items whose target tokens are all predicted right."""
    nll_sum: float = 0.0
    """nats over ``num_tokens`` target tokens."""
    num_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KlSums:
    """Sums over tokens."""

    kl_sum: float = 0.0
    """nats."""
    num_tokens: int = 0
    square_sum: float = 0.0
    """Sum over the sequences of the square of each one's sum, nats²."""
    num_agree: int = 0
    """Tokens at which both models put the same token first (ties: the lower id); only from :func:`kl_full`."""


@torch.no_grad()
def score_examples(
    model: ExpandedModel, samples: Sequence[TokenisedSample], prefix: PrefixStates | None = None
) -> list[tuple[bool, float, int]]:
    """(all targets right, nll sum in nats, number of targets) of each sample, in order.

    Args:
        prefix: cached hidden states at the base cut, for samples that are measured again and again.
    """
    batches = batches_of([len(sample.ids) for sample in samples])
    if isinstance(model, EncoderModel):
        return score_texts(model, samples, prefix, list(batches))
    scores: list[tuple[bool, float, int]] = [(True, 0.0, 0)] * len(samples)
    for indices in batches:
        chosen = [samples[i] for i in indices]
        batch = task_batch(chosen, _inputs([sample.ids for sample in chosen], prefix, model.device))
        rows = model.forward(batch.inputs, 0 if prefix is None else model.base_cut, rows=batch.rows)
        right, nll = _judge(model, rows, batch.targets)
        counts = [int(sample.label_mask.sum()) for sample in chosen]
        for i, r, n in zip(
            indices, np.split(right, np.cumsum(counts)[:-1]), np.split(nll, np.cumsum(counts)[:-1]), strict=True
        ):
            scores[i] = (bool(r.all()), float(n.sum()), len(n))
    return scores


def evaluate_examples(
    model: ExpandedModel, samples: Sequence[TokenisedSample], prefix: PrefixStates | None = None
) -> ExampleSums:
    """The sums of :func:`score_examples`."""
    scores = score_examples(model, samples, prefix)
    return ExampleSums(
        num_items=len(scores),
        num_correct=sum(right for right, _, _ in scores),
        nll_sum=sum(nll for _, nll, _ in scores),
        num_tokens=sum(count for _, _, count in scores),
    )


@torch.no_grad()
def measure_anchor(model: ExpandedModel, teacher: Teacher, indices: Sequence[int], prefix: PrefixStates) -> KlSums:
    """KL_K of the model to its own base on these anchor sequences (kl_t of methods.md 5.3); of an encoder the drift, a
    text in the place of a token."""
    teacher.fill(indices)
    objective = objective_of(model)
    anchor_loss = objective.losses(model, model.base_cut).anchor
    kl_sum, square_sum, num_tokens = 0.0, 0.0, 0
    sequences = teacher.anchors.sequences
    for i in indices:  # one at a time: how much they differ is wanted too
        batch = objective.anchor_batch(teacher.records([i]), prefix.padded([sequences[i]]), [len(sequences[i])])
        kl = anchor_loss(batch, 1.0).item()
        kl_sum += kl
        square_sum += kl * kl
        num_tokens += len(batch.rows)
    return KlSums(kl_sum=kl_sum, num_tokens=num_tokens, square_sum=square_sum)


@torch.no_grad()
def kl_full(
    model_p: ExpandedModel,
    model_q: ExpandedModel,
    sequences: Sequence[npt.NDArray[np.int32]],
    *,
    p_is_base: bool = False,
) -> KlSums:
    """Full-vocabulary KL(p ‖ q) and agreement of the first choice, at every position that predicts a next token.

    Args:
        p_is_base: skip the expanded blocks of ``model_p``.
    """
    kl_sum, square_sum, num_tokens, num_agree = 0.0, 0.0, 0, 0
    for indices in batches_of([len(ids) for ids in sequences]):
        chosen = [sequences[i] for i in indices]
        of_tokens: list[Tensor] = []
        length = max(map(len, chosen))
        rows = torch.cat([torch.arange(len(ids) - 1) + i * length for i, ids in enumerate(chosen)]).to(model_p.device)
        inputs = _padded_ids(chosen)
        p_forward: Forward = model_p.forward_base if p_is_base else model_p.forward
        p_rows = p_forward(inputs).flatten(0, 1)[rows]
        q_rows = model_q.forward(inputs).flatten(0, 1)[rows]
        for p_part, q_part in zip(p_rows.split(_chunk(model_p)), q_rows.split(_chunk(model_p)), strict=True):
            with model_p.base_only() if p_is_base else contextlib.nullcontext():
                p_logits = model_p.rows_logits(p_part)
            q_logits = model_q.rows_logits(q_part)
            log_p = torch.log_softmax(p_logits.double(), dim=-1)
            log_q = torch.log_softmax(q_logits.double(), dim=-1)
            of_tokens.append((log_p.exp() * (log_p - log_q)).sum(-1))
            num_agree += int((p_logits.argmax(-1) == q_logits.argmax(-1)).sum())
            num_tokens += len(p_part)
        of_sequences = torch.stack([t.sum() for t in torch.cat(of_tokens).split([len(ids) - 1 for ids in chosen])])
        kl_sum += of_sequences.sum().item()
        square_sum += of_sequences.square().sum().item()
    return KlSums(kl_sum=kl_sum, num_tokens=num_tokens, square_sum=square_sum, num_agree=num_agree)


def _judge(
    model: ExpandedModel, rows: Tensor, targets: Tensor
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Right or not, and negative log-likelihood, of each row (N, H)."""
    right: list[Tensor] = []
    nll: list[Tensor] = []
    for part, target in zip(rows.split(_chunk(model)), targets.split(_chunk(model)), strict=True):
        logits = model.rows_logits(part).float()
        right.append(logits.argmax(-1) == target)
        nll.append(torch.logsumexp(logits, -1) - logits.gather(1, target.unsqueeze(1)).squeeze(1))
    return torch.cat(right).cpu().numpy(), torch.cat(nll).double().cpu().numpy()


def _chunk(model: ExpandedModel) -> int:
    """Rows of logits that are looked at together."""
    return max(1, LOGITS_BYTES // (8 * model.shape.vocab_size))


def _inputs(ids: Sequence[npt.NDArray[np.int32]], prefix: PrefixStates | None, device: torch.device) -> Tensor:
    return _padded_ids(ids).to(device) if prefix is None else prefix.padded(ids)


def _padded_ids(samples: Sequence[npt.NDArray[np.int32]]) -> Tensor:
    """(B, longest) int64, right-padded with 0: no real token looks at a pad."""
    batch = torch.zeros(len(samples), max(map(len, samples)), dtype=torch.int64)
    for row, ids in zip(batch, samples, strict=True):
        row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    return batch


def batches_of(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices by ascending length, cut so that no batch has more than BATCH_TOKENS padded tokens (or one sample)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
