"""How do a site's rows become training samples, and what is wrong with them?

One JSON object per line: ``{"text": ...}``, ``{"prompt": ..., "completion": ...}`` or ``{"messages": [...]}`` (through
the tokenizer's chat template); in an encoder's run ``{"text": ..., "label": ...}``.
A row that cannot be read is an error with file and line (exit code 6); what is merely doubtful is counted and told in
one line before training.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.protocol.messages import MAX_TOPICS, DataFormat, DataStatistics

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FEW_EXAMPLES = 8
MAX_LABEL_CHARACTERS = 40
"""A longer completion is no label."""


class DataError(ValueError):
    """A file or row that cannot be used (exit code 6); the text names file and line."""

    exit_code = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One example as read, before tokenising. Exactly one of the three forms is set."""

    line: int
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    label: str | None = None
    """Beside ``text``: what an encoder's run learns of it."""
    topic: str = ""
    """What the row says it is about (key ``topic``); else its completion, where that is short enough for a label."""

    def digest(self) -> bytes:
        """16 bytes that two rows share only if they say the same."""
        parts = [self.text, self.prompt, self.completion, self.messages]
        content = json.dumps(parts if self.label is None else [*parts, self.label], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What the one line before training says."""

    path: str
    num_rows: int
    num_train: int
    num_validation: int
    num_truncated: int
    num_labels_cut: int
    """Rows left out because no target token remained within the context."""
    num_duplicates: int
    num_evaluation_overlap: int
    has_chat_template: bool

    def line(self) -> str:
        """The summary as one line for people."""
        notes = [f"{self.num_rows} examples ({self.num_train} train, {self.num_validation} held out)"]
        if self.num_truncated:
            notes.append(f"{self.num_truncated} cut at the context length")
        if self.num_labels_cut:
            notes.append(f"{self.num_labels_cut} left out: no target token within the context length")
        if self.num_duplicates:
            notes.append(f"{self.num_duplicates} duplicates")
        if self.num_evaluation_overlap:
            notes.append(f"{self.num_evaluation_overlap} also stand in the evaluation file")
        if self.num_train < FEW_EXAMPLES:
            notes.append(f"fewer than {FEW_EXAMPLES} to train on")
        if not self.has_chat_template:
            notes.append("no chat template in the tokenizer")
        return f"{self.path}: " + "; ".join(notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteData:
    """A site's samples: the larger part trains, every tenth row (by content) is held out."""

    train: tuple[TokenisedSample, ...]
    validation: tuple[TokenisedSample, ...]
    summary: DataSummary
    topics: tuple[int, ...] = ()
    """Training rows by :func:`topic_bin`; rows without a topic are not counted."""

    def statistics(self, *, share_topics: bool = False) -> DataStatistics:
        """The few numbers that leave the site.

        Args:
            share_topics: the histogram of topics too.
        """
        lengths = [len(s.ids) for s in self.train]
        return DataStatistics(
            num_examples=len(self.train),
            num_target_tokens=int(sum(int(s.label_mask.sum()) for s in self.train)),
            mean_tokens=float(np.mean(lengths)),
            max_tokens=max(lengths),
            topics=self.topics if share_topics else (),
        )


def topic_bin(topic: str) -> int:
    """One of 64 bins, the same at every site; which topics there are is told to nobody."""
    return hashlib.blake2b(topic.encode(), digest_size=1).digest()[0] % MAX_TOPICS


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSONL file.

    Raises:
        DataError: the file is missing or empty, or a line is no JSON object of one of the three forms.
    """
    try:
        # Not splitlines(): a JSON text may hold U+2028 and other characters that it takes for line ends.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a JSONL file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text at byte {error.start}; expected a JSONL file") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: holds no rows; expected one JSON object per line")
    return rows


def _row(path: Path, number: int, line: str) -> Row:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}, expected an object")
    topic = value.get("topic", "")
    if not isinstance(topic, str | int):
        raise DataError(f"{where}: 'topic' is {str(topic)[:40]!r}, expected a text or a number")
    if "messages" in value:
        return Row(line=number, messages=_messages(where, value["messages"]), topic=str(topic))
    for fields in (("prompt", "completion"), ("text",)):
        if all(f in value for f in fields):
            for f in fields:
                if not isinstance(value[f], str) or (f != "prompt" and not value[f].strip()):
                    raise DataError(f"{where}: {f!r} is {str(value[f])[:40]!r}, expected text that is not empty")
            label = None
            if fields == ("text",) and "label" in value:
                label = value["label"]
                if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
                    raise DataError(f"{where}: 'label' is {str(label)[:40]!r}, expected a text or a whole number")
                label = str(label)
            about = value.get("completion", label or "")
            if topic == "" and len(about) <= MAX_LABEL_CHARACTERS:
                topic = about.strip()
            return Row(line=number, topic=str(topic), label=label, **{f: value[f] for f in fields})
    raise DataError(
        f"{where}: has the keys {sorted(map(str, value))[:6]}, "
        'expected "text", or "prompt" and "completion", or "messages"'
    )


def _messages(where: str, value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' is no list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"{where}: a message is {str(message)[:60]!r}, expected role and content as text")
    if value[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is of role {value[-1]['role']!r}, expected 'assistant' (the target)"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


class TextEncoder:
    """A model folder's tokenizer together with the run's data format."""

    def __init__(self, folder: Path, data_format: DataFormat) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{folder}: has no tokenizer.json; save the tokenizer with save_pretrained() of a fast one")
        self.folder = folder
        self.format = data_format
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings = _json_or_empty(folder / "tokenizer_config.json")
        self.eos_id = self._special_id(settings.get("eos_token"))
        self.bos_id = self._special_id(settings.get("bos_token"))
        self.has_chat_template = "chat_template" in settings or (folder / "chat_template.jinja").is_file()

    def _special_id(self, token: Any) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        return None if text is None else self.tokenizer.token_to_id(text)

    def sample(self, row: Row, *, where: str) -> tuple[TokenisedSample | None, bool]:
        """The row cut to the context length, and whether anything was cut off; None if no target is left of it.

        Raises:
            DataError: the row has no label of the run's, or asks for a chat template that is not there.
        """
        if self.format.labels:
            return self._labelled(row, where)
        ids, mask = self.encode(row, where=where)
        most = self.format.max_tokens
        return _sample(ids[:most], mask[:most]), len(ids) > most

    def _labelled(self, row: Row, where: str) -> tuple[TokenisedSample, bool]:
        if row.text is None or row.label is None:
            raise DataError(f'{where}: expected "text" and "label": this run trains an encoder')
        if row.label not in self.format.labels:
            near = difflib.get_close_matches(row.label, self.format.labels, n=1, cutoff=0.6)
            raise DataError(
                f"{where}: label {row.label[:40]!r} is none of the run's {len(self.format.labels)} labels"
                + (f"; the nearest is {near[0]!r}" if near else "")
            )
        ids, cut = self.whole_text(row.text)
        label = self.format.labels.index(row.label)
        return TokenisedSample(ids=ids, label_mask=np.ones(len(ids), dtype=np.bool_), label=label), cut

    def whole_text(self, text: str) -> tuple[npt.NDArray[np.int32], bool]:
        """A text for an encoder: with the tokenizer's special tokens, the last of which outlives a cut; was it cut?"""
        encoding = self.tokenizer.encode(text)
        ids, most = list(encoding.ids), self.format.max_tokens
        if len(ids) > most:
            closing = [ids[-1]] if encoding.special_tokens_mask[-1] else []
            return np.array([*ids[: most - len(closing)], *closing], dtype=np.int32), True
        return np.array(ids, dtype=np.int32), False

    def encode(self, row: Row, *, where: str) -> tuple[list[int], list[bool]]:
        """Token ids and the mask of target tokens, untruncated.

        A plain text is a target throughout, except for its first token (nothing predicts it).
        """
        if row.text is not None:
            ids = self._ids(row.text)
            ids = self._with_eos(ids)
            return ids, [False] + [True] * (len(ids) - 1)
        if row.messages is not None:
            prompt, whole = self._chat(row.messages, where)
            encoding = self.tokenizer.encode(whole, add_special_tokens=False)
            mask = [end > len(prompt) for _, end in encoding.offsets]
            return list(encoding.ids), mask
        assert row.prompt is not None
        assert row.completion is not None
        prompt, completion = row.prompt, row.completion
        if prompt and not prompt[-1].isspace() and not completion[0].isspace():
            prompt += self.format.join
        encoding = self.tokenizer.encode(prompt + completion)
        special = encoding.special_tokens_mask
        offsets = encoding.offsets
        mask = [end > len(prompt) and not s for (_, end), s in zip(offsets, special, strict=True)]
        ids = self._without_trailing_eos(list(encoding.ids))
        mask = mask[: len(ids)]
        if self.bos_id is not None and not any(special):
            ids, mask = self._with_bos(ids, mask)
        if self.format.append_eos and self.eos_id is not None:
            ids, mask = [*ids, self.eos_id], [*mask, True]
        return ids, mask

    def _ids(self, text: str) -> list[int]:
        encoding = self.tokenizer.encode(text)
        ids = self._without_trailing_eos(list(encoding.ids))
        return ids if any(encoding.special_tokens_mask) or self.bos_id is None else [self.bos_id, *ids]

    def _with_bos(self, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
        assert self.bos_id is not None
        return [self.bos_id, *ids], [False, *mask]

    def _with_eos(self, ids: list[int]) -> list[int]:
        return [*ids, self.eos_id] if self.format.append_eos and self.eos_id is not None else ids

    def _without_trailing_eos(self, ids: list[int]) -> list[int]:
        return ids[:-1] if self.eos_id is not None and ids and ids[-1] == self.eos_id else ids

    def _chat(self, messages: tuple[dict[str, str], ...], where: str) -> tuple[str, str]:
        if not self.has_chat_template:
            raise DataError(
                f"{where}: 'messages' need a chat template, and the tokenizer of {self.folder.name} has none; "
                "use prompt and completion instead"
            )
        from transformers import AutoTokenizer

        if not hasattr(self, "_auto"):
            self._auto = AutoTokenizer.from_pretrained(str(self.folder))
        conversation = [dict(m) for m in messages]
        prompt = self._auto.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True)
        whole = self._auto.apply_chat_template(conversation, tokenize=False)
        if not whole.startswith(prompt):
            raise DataError(
                f"{where}: the chat template renders the prompt differently with and without its answer; "
                "use prompt and completion instead"
            )
        return prompt, whole


def load_site_data(path: Path, encoder: TextEncoder, *, evaluation: Path | None = None) -> SiteData:
    """Read, tokenise and split a site's file.

    One row in ten is held out, chosen by its content, so that duplicates land on the same side and an appended file
    keeps the split.

    Raises:
        DataError: see :func:`read_rows`; also when no row keeps a target token.
    """
    rows = read_rows(path)
    evaluation_digests = {r.digest() for r in read_rows(evaluation)} if evaluation else set[bytes]()
    digests = [r.digest() for r in rows]
    seen: set[bytes] = set()
    train: list[TokenisedSample] = []
    validation: list[TokenisedSample] = []
    topics: list[str] = []  # of the rows that train
    truncated = labels_cut = duplicates = 0
    for row, digest in zip(rows, digests, strict=True):
        duplicates += digest in seen
        seen.add(digest)
        sample, cut = encoder.sample(row, where=f"{path}, line {row.line}")
        truncated += cut
        if sample is None:
            labels_cut += 1
        elif digest[0] * 10 < 256:
            validation.append(sample)
        else:
            train.append(sample)
            topics.append(row.topic)
    if not train and validation:
        train, validation, topics = validation, [], [""] * len(validation)
    if not train:
        raise DataError(
            f"{path}: none of the {len(rows)} rows keeps a target token within {encoder.format.max_tokens} "
            "tokens; raise data.max_tokens of the run or shorten the prompts"
        )
    if not validation and len(train) >= 2:
        validation.append(train.pop())
        topics.pop()
    summary = DataSummary(
        path=str(path),
        num_rows=len(rows),
        num_train=len(train),
        num_validation=len(validation),
        num_truncated=truncated,
        num_labels_cut=labels_cut,
        num_duplicates=duplicates,
        num_evaluation_overlap=sum(d in evaluation_digests for d in digests),
        has_chat_template=encoder.has_chat_template or bool(encoder.format.labels),
    )
    counts = Counter(topic_bin(topic) for topic in topics if topic)
    return SiteData(
        train=tuple(train),
        validation=tuple(validation),
        summary=summary,
        topics=tuple(counts[i] for i in range(MAX_TOPICS)) if counts else (),
    )


def tokenise_file(path: Path, encoder: TextEncoder) -> list[TokenisedSample]:
    """Every usable row of ``path`` as a sample, in order (evaluation files)."""
    samples = (encoder.sample(r, where=f"{path}, line {r.line}")[0] for r in read_rows(path))
    return [s for s in samples if s is not None]


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One compact JSON object per line."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def _sample(ids: Sequence[int], mask: Sequence[bool]) -> TokenisedSample | None:
    """The sample up to its last target token; None if it has none (the first token has no predecessor)."""
    label_mask = np.asarray(mask, dtype=bool)
    if label_mask.size:
        label_mask[0] = False
    if not label_mask.any():
        return None
    end = int(np.flatnonzero(label_mask)[-1]) + 1
    return TokenisedSample(ids=np.asarray(ids[:end], dtype=np.int32), label_mask=label_mask[:end])


def _json_or_empty(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
