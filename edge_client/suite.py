"""What does a suite of general tasks say about a model beside its base? ``fedblocks evaluate --suite``.

Every ``*.jsonl`` of the folder is a task named by its file. Several targets are runs of one experiment with different
seeds. The reference is the base on the same stack: for a run folder its own 4-bit stack with the expanded blocks at
strength 0, else the base checkpoint as stored. KL and agreement are over text that the full-precision base has written.
Source: methods.md 12.1, 12.3.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedblocks.edge_client.anchor import sample_anchor
from fedblocks.edge_client.backbone import DenseBackbone
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.data import DataError, TextEncoder
from fedblocks.edge_client.evaluate import KlSums, kl_full
from fedblocks.edge_client.evaluation import KL_SEED, KL_TOKENS, data_format, four_bit_model
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.export import load_final, strength_of
from fedblocks.edge_client.multiple_choice import (
    ItemScore,
    Task,
    fitting,
    read_tasks,
    score_items,
    window_tokens,
)
from fedblocks.edge_client.perplexity import TextScores, score_texts
from fedblocks.edge_client.retention import DRAWS, Interval, Rights, mean_interval, perplexity_ratio, retention
from fedblocks.protocol.run_config import ConfigError

KL_SEQUENCES: Final = 256
NUM_LISTED: Final = 30
"""Tasks in the table; of more, only those that retention is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteOptions:
    """How a suite is measured."""

    limit: int | None = None
    """First rows of each task only."""
    packed: bool = False
    """Plain texts as one text, cut into full windows; else each by itself."""
    window: int | None = None
    """Longest input in tokens; None: the model's positions, at most 2048."""
    kl_sequences: int = KL_SEQUENCES
    draws: int = DRAWS
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        for name, lowest in (("limit", 1), ("window", 2), ("kl_sequences", 1), ("draws", 100)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise DataError(f"suite: {name} is {value}, expected {lowest} or more")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SuiteScores:
    """One model's answers: items by task, sums by task of plain texts."""

    items: Mapping[str, list[ItemScore]]
    texts: Mapping[str, TextScores]


def read_suite(folder: Path, limit: int | None = None) -> list[Task]:
    """The tasks of every ``*.jsonl`` of a folder, by name.

    Raises:
        DataError: there is none, or one cannot be used.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(f"{folder}: holds no *.jsonl, expected one file for each task")
    return [task for file in files for task in read_tasks(file, limit)]


def score_suite(
    model: ExpandedModel, tasks: Sequence[Task], encoder: TextEncoder, *, window: int, packed: bool = False
) -> SuiteScores:
    """What the model says to every item and text."""
    return SuiteScores(
        items={task.name: score_items(model, task, encoder, window) for task in tasks if task.items},
        texts={
            task.name: score_texts(model, task.texts, encoder, packed=packed, window=window)
            for task in tasks
            if task.texts
        },
    )


def evaluate_suite(
    targets: Sequence[Path],
    *,
    base: Path,
    suite: Path,
    strength: float | None = None,
    overrides: tuple[str, ...] = (),
    options: SuiteOptions | None = None,
) -> dict[str, Any]:
    """Measure models, or runs on their 4-bit stack, and the base on a suite; keys: docs/evaluation.md.

    Args:
        targets: one, or several seeds of the same experiment.
        strength: of a run's blocks; default: for each run the one that it chose within its forgetting budget.
        overrides: ``data.key=value``, as ``data.join``.

    Raises:
        CheckpointError: a folder holds no model.
        DataError: a task cannot be used, or the targets are not of one kind.
    """
    chosen = options or SuiteOptions()
    kinds = {(target / "run.json").is_file() for target in targets}
    if len(kinds) != 1:
        raise DataError(f"evaluate: {len(targets)} targets, expected models only or runs only")
    (is_run,) = kinds
    checkpoint = Checkpoint.open(base)
    if checkpoint.shape.encoder:
        raise ConfigError(
            f"--suite {suite}: its tasks ask what a model would write, and {base} is an encoder; give --general FILE "
            "with rows of sentence1, sentence2 and score"
        )
    encoder = TextEncoder(checkpoint.folder, data_format(targets[0] if is_run else None, overrides))
    longest = window_tokens(checkpoint)
    window = longest if chosen.window is None else min(chosen.window, longest)
    tasks = [fitting(task, encoder, window) for task in read_suite(suite, chosen.limit)]
    written = sample_anchor(checkpoint, num_sequences=chosen.kl_sequences, num_tokens=KL_TOKENS, seed=KL_SEED).sequences
    before: SuiteScores | None = None
    after: list[SuiteScores] = []
    distances: list[list[KlSums]] = []
    strengths = [strength_of(target, strength) for target in targets] if is_run else [1.0] * len(targets)
    for target, own_strength in zip(targets, strengths, strict=True):
        with _opened(target, checkpoint, own_strength) as (model, reference):
            if before is None:
                if is_run:
                    model.set_strength(0.0)
                before = score_suite(reference, tasks, encoder, window=window, packed=chosen.packed)
                if is_run:
                    model.set_strength(own_strength)
            after.append(score_suite(model, tasks, encoder, window=window, packed=chosen.packed))
            distances.append([kl_full(reference, model, [text], p_is_base=is_run) for text in written])
    assert before is not None
    result = compare(tasks, before, after, draws=chosen.draws)
    result |= _distance(distances, chosen.draws)
    return {
        "targets": [str(target) for target in targets],
        "base": str(base),
        "stack": "4-bit" if is_run else "as stored",
        "strengths": strengths if is_run else None,
        **asdict(chosen),
        "window": window,
        **result,
        "items": [row for task in tasks if task.items for row in _item_rows(task, before, after)],
    }


@contextlib.contextmanager
def _opened(target: Path, base: Checkpoint, strength: float) -> Iterator[tuple[ExpandedModel, ExpandedModel]]:
    """The model, and the base on the same stack; of a run both are one, whose expanded blocks can be skipped."""
    if (target / "run.json").is_file():
        plan, state = load_final(target)
        with tempfile.TemporaryDirectory(prefix="fedblocks-") as folder:
            model = four_bit_model(base, plan, state, Path(folder))
            model.set_strength(strength)
            yield model, model
        return
    grown = Checkpoint.open(target)
    reference = ExpandedModel(backbone=DenseBackbone(base), checkpoint=base)
    yield ExpandedModel(backbone=DenseBackbone(grown), checkpoint=grown), reference


def compare(
    tasks: Sequence[Task], before: SuiteScores, after: Sequence[SuiteScores], *, draws: int = DRAWS
) -> dict[str, Any]:
    """Accuracies, perplexities and retention of one or several runs beside the base."""
    asked = [task for task in tasks if task.items]
    rights = [
        Rights(
            task=task.name,
            chance=task.chance,
            base=np.array([score.is_right_per_byte for score in before.items[task.name]]),
            tuned=np.array([[score.is_right_per_byte for score in run.items[task.name]] for run in after]),
        )
        for task in asked
    ]
    kept = retention(rights, draws=draws)
    return {
        "tasks": [_task_row(task, before, after, in_retention=task.name in kept.tasks) for task in asked],
        "texts": [_text_row(task, before, after, draws) for task in tasks if task.texts],
        "retention": _plain(kept.retention),
        "retention_tasks": list(kept.tasks),
        "raw_retention": _plain(kept.raw_retention),
        "forget_percent": _plain(kept.forget_percent),
    }


def _task_row(task: Task, before: SuiteScores, after: Sequence[SuiteScores], *, in_retention: bool) -> dict[str, Any]:
    runs = [run.items[task.name] for run in after]
    base = before.items[task.name]
    by_run = [_accuracy(scores, per_byte=False) for scores in runs]
    by_run_norm = [_accuracy(scores, per_byte=True) for scores in runs]
    return {
        "task": task.name,
        "num_items": len(task.items),
        "num_left_out": task.num_left_out,
        "chance": task.chance,
        "in_retention": in_retention,
        "base_acc": _accuracy(base, per_byte=False),
        "base_acc_norm": _accuracy(base, per_byte=True),
        "acc": float(np.mean(by_run)),
        "acc_norm": float(np.mean(by_run_norm)),
        "acc_by_run": by_run,
        "acc_norm_by_run": by_run_norm,
    }


def _text_row(task: Task, before: SuiteScores, after: Sequence[SuiteScores], draws: int) -> dict[str, Any]:
    base, runs = before.texts[task.name], [run.texts[task.name] for run in after]
    tuned = np.stack([run.nll for run in runs])
    return {
        "task": task.name,
        "num_texts": len(task.texts),
        "num_tokens": int(base.num_tokens.sum()),
        "num_bytes": base.num_bytes,
        "base_perplexity": base.perplexity,
        "base_bits_per_byte": base.bits_per_byte,
        "perplexity_by_run": [run.perplexity for run in runs],
        "bits_per_byte_by_run": [run.bits_per_byte for run in runs],
        "perplexity_retention": _plain(
            perplexity_ratio(base.nll, tuned, base.num_tokens.astype(np.float64), draws=draws)
        ),
    }


def _distance(runs: Sequence[Sequence[KlSums]], draws: int) -> dict[str, Any]:
    """KLgen and Agree1 over the texts that the base has written."""
    tokens = np.array([text.num_tokens for text in runs[0]], dtype=np.float64)
    kl = np.array([[text.kl_sum for text in run] for run in runs])
    agree = np.array([[text.num_agree for text in run] for run in runs], dtype=np.float64)
    return {
        "kl_nats_per_token": _plain(mean_interval(kl, tokens, draws=draws)),
        "agreement": _plain(mean_interval(agree, tokens, draws=draws)),
        "num_kl_tokens": int(tokens.sum()),
    }


def _item_rows(task: Task, before: SuiteScores, after: Sequence[SuiteScores]) -> Iterator[dict[str, Any]]:
    """A row for each item: where it stands, and each model's log-likelihoods, the base's first."""
    for i, item in enumerate(task.items):
        models = [before.items[task.name][i], *(run.items[task.name][i] for run in after)]
        yield {
            "task": task.name,
            "line": item.line,
            "gold": item.gold,
            "num_bytes": list(models[0].num_bytes),
            "base_loglikelihoods": list(models[0].loglikelihoods),
            "base_is_greedy": list(models[0].is_greedy),
            "loglikelihoods_by_run": [list(score.loglikelihoods) for score in models[1:]],
            "is_greedy_by_run": [list(score.is_greedy) for score in models[1:]],
        }


def _accuracy(scores: Sequence[ItemScore], *, per_byte: bool) -> float:
    return float(np.mean([score.is_right_per_byte if per_byte else score.is_right for score in scores]))


def _plain(interval: Interval | None) -> dict[str, float | None] | None:
    """For JSON; an end that is infinite is null."""
    if interval is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in asdict(interval).items()}


def describe_suite(result: Mapping[str, Any]) -> str:
    """The result of :func:`evaluate_suite` as a table and a few lines."""
    lines: list[str] = []
    if result["tasks"]:
        lines.append(f"{'task':32} {'items':>6} {'chance':>7} {'acc':>16} {'acc_norm':>16}  in Ret")
    few = len(result["tasks"]) <= NUM_LISTED
    listed = [row for row in result["tasks"] if few or row["in_retention"]]
    for row in listed:
        pairs = [f"{row[f'base_{key}']:.3f} -> {row[key]:.3f}" for key in ("acc", "acc_norm")]
        lines.append(
            f"{row['task']:32.32} {row['num_items']:6} {row['chance']:7.3f} {pairs[0]:>16} {pairs[1]:>16}  "
            f"{'yes' if row['in_retention'] else 'no'}"
        )
    if left := len(result["tasks"]) - len(listed):
        lines.append(f"{left} more tasks, at which the base is not above chance by three standard errors (--json)")
    if too_long := sum(row["num_left_out"] for row in result["tasks"]):
        lines.append(f"{too_long} items left out: an answer alone has more than {result['window']} tokens")
    for row in result["texts"]:
        mean = float(np.exp(np.mean(np.log(row["perplexity_by_run"]))))
        kept = _described(row["perplexity_retention"])
        lines.append(f"{row['task']}: perplexity {row['base_perplexity']:.3f} -> {mean:.3f}, base over ours {kept}")
    if result["retention"] is not None:
        lines.append(
            f"retention above chance over {len(result['retention_tasks'])} tasks: {_described(result['retention'])}"
        )
    elif result["tasks"]:
        lines.append("retention is not reported: the base is at chance on every task")
    if result["raw_retention"] is not None:
        lines.append(f"raw retention: {_described(result['raw_retention'])}")
        lines.append(f"forgotten, percent: {_described(result['forget_percent'])}")
    lines.append(f"KL to the base, nats per token: {_described(result['kl_nats_per_token'])}")
    lines.append(f"same first choice as the base: {_described(result['agreement'])}")
    return "\n".join(lines)


def _described(interval: Mapping[str, float | None]) -> str:
    value, low, high = (
        "no bound" if x is None else f"{x:.4f}" for x in (interval[k] for k in ("value", "low", "high"))
    )
    return f"{value} (95 %: {low} to {high})"
