"""What has an encoder learnt, and does its embedding still say the same? ``fedblocks evaluate`` of an encoder.

General ability is the embedding's: Spearman's correlation between the cosine of two sentences' embeddings and the score
that people gave them (STS-B: Cer et al., 1708.00055). Retention is the tuned model's over its base's, both on the same
stack; drift is the mean squared distance of the two embeddings of a sentence. Source: methods.md 2.6, 12.1.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedblocks.edge_client.backbone import Backbone, DenseBackbone
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.data import DataError, TextEncoder, tokenise_file
from fedblocks.edge_client.encoder_model import EncoderModel
from fedblocks.edge_client.encoder_objective import embed_texts
from fedblocks.edge_client.evaluate import batches_of, evaluate_examples
from fedblocks.edge_client.expanded_model import open_model
from fedblocks.edge_client.export import head_of, load_final, read_head, strength_of
from fedblocks.protocol.messages import DataFormat
from fedblocks.protocol.run_config import ConfigError

MIN_PAIRS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFigures:
    """One model's figures; None where the file to measure with was not given, or the model has no head."""

    downstream_accuracy: float | None
    downstream_nll: float | None
    """nats per text."""
    spearman: float | None
    """Of the general file's pairs, from -1 to 1."""
    retention: float | None
    """That over the base's."""
    drift: float | None
    """Mean over the different sentences of the general file."""
    drift_standard_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Sentence pairs and how near people found them."""

    texts: tuple[npt.NDArray[np.int32], ...]
    """The different sentences, tokenised."""
    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    """(n,) which texts make each pair."""
    scores: npt.NDArray[np.float64]


def read_pairs(path: Path, encoder: TextEncoder) -> Pairs:
    """The rows ``{"sentence1", "sentence2", "score"}`` of a JSONL file.

    Raises:
        DataError: the file cannot be read, a row is none, or there are too few to rank.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a JSONL file") from error
    number: dict[str, int] = {}
    pairs: list[tuple[int, int, float]] = []
    for row, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            one, two, score = value["sentence1"], value["sentence2"], float(value["score"])
            if not (isinstance(one, str) and isinstance(two, str) and one.strip() and two.strip()):
                raise ValueError("a sentence is empty or no text")
            if not math.isfinite(score):
                raise ValueError(f"score is {score}")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}, row {row}: {error}; expected sentence1 and sentence2 as text and score as a number"
            ) from error
        pairs.append((number.setdefault(one, len(number)), number.setdefault(two, len(number)), score))
    if len({score for _, _, score in pairs}) < 2 or len(pairs) < MIN_PAIRS:
        raise DataError(f"{path}: {len(pairs)} pairs, expected at least {MIN_PAIRS}, and not all of the same score")
    columns = list(zip(*pairs, strict=True))
    return Pairs(
        texts=tuple(encoder.whole_text(text)[0] for text in number),
        first=np.array(columns[0], dtype=np.int64),
        second=np.array(columns[1], dtype=np.int64),
        scores=np.array(columns[2], dtype=np.float64),
    )


def spearman(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Spearman's rank correlation of (n,) and (n,), equal values with their mean rank; NaN if one side is constant."""
    ranks = [_ranks(values) for values in (a, b)]
    centred = [r - r.mean() for r in ranks]
    scale = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale else math.nan


def _ranks(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((2 * ends - counts + 1) / 2)[places.reshape(-1)]


def evaluate_encoder(
    target: Path,
    checkpoint: Checkpoint,
    *,
    data: DataFormat,
    downstream: Path | None,
    general: Path | None,
    strength: float | None = None,
) -> dict[str, Any]:
    """Measure an exported encoder, or a run folder's published state on the 4-bit stack, beside its base.

    Args:
        checkpoint: the base.
        data: how rows become tokens; the labels are the target's.

    Raises:
        CheckpointError: a folder holds no model.
        ConfigError: rows of the task are given, and the target has no head.
        DataError: a file cannot be used.
    """
    is_run = (target / "run.json").is_file()
    wanted: float | None = None
    with tempfile.TemporaryDirectory(prefix="fedblocks-") as folder:
        if is_run:
            plan, state = load_final(target)
            wanted = strength_of(target, strength)
            head = head_of(target, plan, state)
            backbone = Backbone.open(checkpoint, Path(folder), base_hash=base_hash(checkpoint.folder))
            backbone.hold(decoded=range(checkpoint.shape.num_layers), dtype=torch.float32)
            model = _encoder(open_model(backbone=backbone, checkpoint=checkpoint, plan=plan, state=state))
            model.set_strength(wanted)
            base = model
        else:
            grown = Checkpoint.open(target)
            head = read_head(target)
            model = _encoder(open_model(backbone=DenseBackbone(grown), checkpoint=grown))
            base = _encoder(open_model(backbone=DenseBackbone(checkpoint), checkpoint=checkpoint))
        if head is not None:
            model.set_head(torch.from_numpy(head.weight), torch.from_numpy(head.bias))
        elif downstream is not None:
            raise ConfigError(f"{target} has no classification head, so --downstream {downstream} cannot be measured")
        labels = () if head is None else head.labels
        encoder = TextEncoder(
            checkpoint.folder,
            DataFormat(max_tokens=data.max_tokens, append_eos=data.append_eos, join=data.join, labels=labels),
        )
        pairs = None if general is None else read_pairs(general, encoder)
        before = after = None
        if pairs is not None:
            before, after = _embeddings(base, pairs, of_base=True), _embeddings(model, pairs)
        scores = None if downstream is None else evaluate_examples(model, tokenise_file(downstream, encoder))
    of_base = _general(pairs, before, before, None)
    figures = EncoderFigures(
        downstream_accuracy=None if scores is None else scores.num_correct / scores.num_items,
        downstream_nll=None if scores is None else scores.nll_sum / scores.num_tokens,
        **_general(pairs, before, after, of_base["spearman"]),
    )
    return {
        "target": str(target),
        "stack": "4-bit" if is_run else "as stored",
        "strength": wanted,
        "base": asdict(EncoderFigures(downstream_accuracy=None, downstream_nll=None, **of_base)),
        "model": asdict(figures),
    }


def _encoder(model: object) -> EncoderModel:
    assert isinstance(model, EncoderModel)
    return model


def _embeddings(model: EncoderModel, pairs: Pairs, *, of_base: bool = False) -> Tensor:
    batches: Sequence[list[int]] = list(batches_of([len(ids) for ids in pairs.texts]))
    return embed_texts(model, pairs.texts, batches, of_base=of_base)


def _general(
    pairs: Pairs | None, before: Tensor | None, after: Tensor | None, base: float | None
) -> dict[str, float | None]:
    """Correlation, retention and drift of ``after``; ``base`` is the correlation of ``before``, None if it is that."""
    if pairs is None or before is None or after is None:
        return dict.fromkeys(("spearman", "retention", "drift", "drift_standard_error"))
    found = after.double().numpy()
    correlation = spearman((found[pairs.first] * found[pairs.second]).sum(1), pairs.scores)
    drifts = (before - after).double().square().sum(1).numpy()
    return {
        "spearman": correlation,
        "retention": 1.0 if base is None else correlation / base,
        "drift": float(drifts.mean()),
        "drift_standard_error": float(drifts.std(ddof=1) / math.sqrt(len(drifts))),
    }


def describe_encoder(result: Mapping[str, Any]) -> str:
    """The result of :func:`evaluate_encoder` as a few lines."""
    lines = [f"{result['target']} ({result['stack']}), beside the base:"]
    for key, label in (
        ("downstream_accuracy", "downstream accuracy"),
        ("downstream_nll", "downstream nll, nats per text"),
        ("spearman", "Spearman of the general pairs"),
        ("retention", "retention"),
        ("drift", "drift from the base"),
    ):
        before, after = result["base"][key], result["model"][key]
        if after is not None:
            lines.append(f"  {label:32} {'' if before is None else format(before, '8.4f'):>8} -> {after:8.4f}")
    return "\n".join(lines)
