"""Which of the given answers does the model find the most likely? Multiple choice as lm-evaluation-harness has it.

One JSON object per line, of one of the forms of :data:`FORMS`. An answer's log-likelihood is that of its tokens given
the question's; white space that ends the question counts as the answer's, and the tokens are those of question and
answer together, cut after as many as the question alone has.
The highest log-likelihood wins (acc), or the highest per UTF-8 byte of the answer as it stands in the file (acc_norm;
the harness divides by characters, which is the same for ASCII); ties go to the earlier answer.
A row with a single answer, as LAMBADA's, is right if greedy decoding would produce it.
Source: methods.md 12.1; Gao et al., lm-evaluation-harness, 0.4.13.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.data import DataError, TextEncoder
from fedblocks.edge_client.evaluate import score_examples
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.samples import TokenisedSample

FORMS: Final = (
    ("query", "choices", "gold"),
    ("ctx", "endings", "label"),
    ("context", "continuation"),
    ("prompt", "completion"),
    ("good", "bad"),
    ("text",),
)
"""Keys of a row: MosaicML's layout, HellaSwag's, LAMBADA's, our own, BLiMP's (with ``uid``: a task for each), plain
texts."""

MAX_WINDOW_TOKENS: Final = 2048
"""Longest input, where the model would take longer ones: measuring must not need the memory of a long context."""


class CompletionTooLongError(DataError):
    """An answer does not fit into the window, whatever is cut from its question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question with its answers."""

    line: int
    context: str
    """May be empty: whole sentences are compared."""
    completions: tuple[str, ...]
    gold: int
    """Index of the right one."""

    @property
    def chance(self) -> float:
        """Accuracy of a guess; 0 where there is a single answer to produce."""
        return 1 / len(self.completions) if len(self.completions) > 1 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one file asks, or one ``uid`` of it. Either items or texts."""

    name: str
    path: Path
    items: tuple[Item, ...] = ()
    texts: tuple[str, ...] = ()
    num_left_out: int = 0
    """Items taken out by :func:`fitting`."""

    @property
    def chance(self) -> float:
        """Mean accuracy of guessing."""
        return float(np.mean([item.chance for item in self.items]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemScore:
    """What a model says to one item."""

    line: int
    loglikelihoods: tuple[float, ...]
    """nats."""
    num_bytes: tuple[int, ...]
    """UTF-8 bytes of each answer."""
    is_greedy: tuple[bool, ...]
    """Each token of the answer is the most probable one."""
    gold: int

    @property
    def prediction(self) -> int:
        """The most likely answer."""
        return int(np.argmax(self.loglikelihoods))

    @property
    def prediction_per_byte(self) -> int:
        """The answer of the highest log-likelihood per byte."""
        return int(np.argmax(np.divide(self.loglikelihoods, self.num_bytes)))

    @property
    def is_right(self) -> bool:
        """Counts for acc."""
        return self.is_greedy[0] if len(self.is_greedy) == 1 else self.prediction == self.gold

    @property
    def is_right_per_byte(self) -> bool:
        """Counts for acc_norm."""
        return self.is_greedy[0] if len(self.is_greedy) == 1 else self.prediction_per_byte == self.gold


def read_tasks(path: Path, limit: int | None = None) -> list[Task]:
    """The tasks of a JSONL file: one named by the file, or ``file/uid`` for each ``uid`` of sentence pairs.

    Args:
        limit: the first rows of each task only.

    Raises:
        DataError: the file cannot be read, or a row is of no known form or of another than the first.
    """
    rows = _json_rows(path)
    form = _form(path, *rows[0])
    items: dict[str, list[Item]] = {}
    texts: list[str] = []
    for line, row in rows:
        where = f"{path}, line {line}"
        if (found := _form(path, line, row)) != form:
            raise DataError(f"{where}: has the keys {', '.join(found)}, expected {', '.join(form)} as in the first row")
        if form == ("text",):
            if limit is None or len(texts) < limit:
                texts.append(_text(where, row, "text"))
            continue
        name = f"{path.stem}/{row['uid']}" if form == ("good", "bad") and "uid" in row else path.stem
        group = items.setdefault(name, [])
        if limit is None or len(group) < limit:
            group.append(_item(where, line, form, row))
    if texts:
        return [Task(name=path.stem, path=path, texts=tuple(texts))]
    return [Task(name=name, path=path, items=tuple(group)) for name, group in items.items()]


def _json_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        # Not splitlines(): a JSON text may hold U+2028 and other characters that it takes for line ends.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a JSONL file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text at byte {error.start}; expected a JSONL file") from error
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: no valid JSON ({error})") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: a JSON {type(value).__name__}, expected an object")
        rows.append((number, value))
    if not rows:
        raise DataError(f"{path}: holds no rows; expected one JSON object per line")
    return rows


def _form(path: Path, line: int, row: Mapping[str, Any]) -> tuple[str, ...]:
    for form in FORMS:
        if all(key in row for key in form):
            return form
    expected = "; or ".join(" and ".join(form) for form in FORMS)
    raise DataError(f"{path}, line {line}: has the keys {sorted(map(str, row))[:8]}, expected {expected}")


def _item(where: str, line: int, form: tuple[str, ...], row: Mapping[str, Any]) -> Item:
    if form == ("good", "bad"):
        return Item(line=line, context="", completions=(_text(where, row, "good"), _text(where, row, "bad")), gold=0)
    if len(form) == 2:
        context, completion = (_text(where, row, form[0], may_be_empty=True), _text(where, row, form[1]))
        return Item(line=line, context=context, completions=(completion,), gold=0)
    question, answers, right = form
    choices = row[answers]
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: {answers!r} is {str(choices)[:40]!r}, expected a list of two texts or more")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(f"{where}: {answers!r} holds {str(choice)[:40]!r}, expected text that is not empty")
    gold = row[right]
    if isinstance(gold, str) and gold.isdecimal():  # HellaSwag's labels are texts in some copies
        gold = int(gold)
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise DataError(f"{where}: {right!r} is {str(gold)[:40]!r}, expected an index into {len(choices)} {answers}")
    context = _text(where, row, question, may_be_empty=True)
    return Item(line=line, context=context, completions=tuple(choices), gold=gold)


def _text(where: str, row: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise DataError(f"{where}: {key!r} is {str(value)[:40]!r}, expected text that is not empty")
    return value


def window_tokens(checkpoint: Checkpoint) -> int:
    """The longest input that is measured: the model's positions, at most :data:`MAX_WINDOW_TOKENS`."""
    return min(int(checkpoint.config.get("max_position_embeddings", MAX_WINDOW_TOKENS)), MAX_WINDOW_TOKENS)


def start_ids(encoder: TextEncoder) -> list[int]:
    """What every text begins with: bos, where the tokenizer names one."""
    return [] if encoder.bos_id is None else [encoder.bos_id]


def completion_sample(
    context: str, completion: str, encoder: TextEncoder, window: int, *, where: str
) -> TokenisedSample:
    """The tokens of context and completion, those of the completion being the targets.

    The run's ``join`` stands between the two where neither brings white space. There are at most ``window`` tokens
    before the last one: a context that is too long loses its beginning. An empty context is bos, or eos where the
    tokenizer names no bos.

    Raises:
        CompletionTooLongError: the completion alone does not fit into the window.
        DataError: nothing can precede its first token.
    """
    between = encoder.format.join if context and not context[-1].isspace() and not completion[0].isspace() else ""
    before = context.rstrip()
    after = context[len(before) :] + between + completion
    start = start_ids(encoder)
    whole = _ids(before + after, encoder)
    num_targets = max(1, len(whole) - len(_ids(before, encoder))) if before else len(whole)
    if num_targets == len(whole) and not start:
        if encoder.eos_id is None:
            raise DataError(
                f"{where}: a text without a context, and the tokenizer names neither bos nor eos to begin it"
            )
        start = [encoder.eos_id]
    if num_targets > window:
        raise CompletionTooLongError(f"{where}: the answer has {num_targets} tokens, expected at most {window}")
    ids = [*start, *whole][-(window + 1) :]  # the last one is a target only
    return TokenisedSample(ids=np.array(ids, dtype=np.int32), label_mask=np.arange(len(ids)) >= len(ids) - num_targets)


def fitting(task: Task, encoder: TextEncoder, window: int) -> Task:
    """The task without the items of which an answer alone does not fit into the window."""

    def fits(item: Item) -> bool:
        try:
            for completion in item.completions:
                completion_sample(item.context, completion, encoder, window, where="")
        except CompletionTooLongError:
            return False
        return True

    items = tuple(item for item in task.items if fits(item))
    if task.items and not items:
        raise CompletionTooLongError(f"{task.path}: no item's answers have at most the window's {window} tokens")
    return replace(task, items=items, num_left_out=task.num_left_out + len(task.items) - len(items))


def _ids(text: str, encoder: TextEncoder) -> list[int]:
    return list(encoder.tokenizer.encode(text, add_special_tokens=False).ids)


def score_items(model: ExpandedModel, task: Task, encoder: TextEncoder, window: int | None = None) -> list[ItemScore]:
    """What the model says to each item, in order.

    Answers of one token that follow the same tokens share a single pass over them.

    Args:
        window: the longest input in tokens; default :func:`window_tokens`.
    """
    longest = window_tokens(model.checkpoint) if window is None else window
    samples = [
        completion_sample(item.context, completion, encoder, longest, where=f"{task.path}, line {item.line}")
        for item in task.items
        for completion in item.completions
    ]
    scores = _loglikelihoods(model, samples)
    found: list[ItemScore] = []
    for item in task.items:
        own, scores = scores[: len(item.completions)], scores[len(item.completions) :]
        found.append(
            ItemScore(
                line=item.line,
                loglikelihoods=tuple(loglikelihood for loglikelihood, _ in own),
                num_bytes=tuple(len(completion.encode()) for completion in item.completions),
                is_greedy=tuple(greedy for _, greedy in own),
                gold=item.gold,
            )
        )
    return found


def _loglikelihoods(model: ExpandedModel, samples: Sequence[TokenisedSample]) -> list[tuple[float, bool]]:
    """(log-likelihood of the targets in nats, greedy decoding gives them) of each sample."""
    found: dict[int, tuple[float, bool]] = {}
    same_context: dict[bytes, list[int]] = {}
    for i, sample in enumerate(samples):
        if sample.label_mask.sum() == 1:
            same_context.setdefault(sample.ids[:-1].tobytes(), []).append(i)
    for indices in same_context.values():
        if len(indices) > 1:
            found |= zip(indices, _last_tokens(model, [samples[i] for i in indices]), strict=True)
    others = [i for i in range(len(samples)) if i not in found]
    scores = score_examples(model, [samples[i] for i in others])
    found |= {i: (-nll, right) for i, (right, nll, _) in zip(others, scores, strict=True)}
    return [found[i] for i in range(len(samples))]


@torch.no_grad()
def _last_tokens(model: ExpandedModel, samples: Sequence[TokenisedSample]) -> list[tuple[float, bool]]:
    """The same of samples that differ in their last token only."""
    inputs = torch.from_numpy(samples[0].ids[:-1].astype(np.int64)).unsqueeze(0)  # (1, T)
    rows = torch.tensor([inputs.shape[1] - 1], device=model.device)
    logits = model.rows_logits(model.forward(inputs.to(model.device), rows=rows))[0].float()  # (V,)
    logp = torch.log_softmax(logits, dim=-1)
    best = int(logits.argmax())
    return [(logp[int(sample.ids[-1])].item(), int(sample.ids[-1]) == best) for sample in samples]
