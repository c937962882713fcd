"""What does an operator give to an encoder's run? The labels that it knows, and texts to hold the embedding to.

A decoder's anchor texts are sampled from the base itself; an encoder cannot write, so the operator supplies some: of
any subject that the embedding should stay good for, and none of the task's own evaluation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from fedblocks.edge_client.anchor import AnchorSet
from fedblocks.edge_client.data import DataError, TextEncoder, read_rows

#: An eighth of the texts measures and never trains: at least one must.
MIN_ANCHOR_TEXTS: Final = 8


def read_labels(path: Path) -> tuple[str, ...]:
    """The labels in a file, sorted: of its JSONL rows with ``label``, or else one on each line.

    Raises:
        DataError: the file cannot be read, a row has no label, or there are fewer than two.
    """
    lines = _lines(path)
    if lines[0].startswith("{"):
        rows = read_rows(path)
        for row in rows:
            if row.label is None:
                raise DataError(f'{path}, line {row.line}: expected a row with "text" and "label"')
        labels = sorted({row.label for row in rows if row.label is not None})
    else:
        labels = sorted(set(lines))
    if len(labels) < 2:
        raise DataError(f"{path}: {len(labels)} label, expected at least two to tell apart")
    return tuple(labels)


def read_anchor_texts(path: Path, encoder: TextEncoder, *, most: int) -> AnchorSet:
    """The first ``most`` different texts of a file, tokenised: of its JSONL rows with ``text``, or one on each line.

    Raises:
        DataError: the file cannot be read, or has fewer than :data:`MIN_ANCHOR_TEXTS` different texts.
    """
    lines = _lines(path)
    texts = lines
    if lines[0].startswith("{"):
        texts = []
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line).get("text")
            except (ValueError, AttributeError) as error:
                raise DataError(f"{path}, row {number}: no JSON object: {error}") from error
            if not isinstance(text, str) or not text.strip():
                raise DataError(f'{path}, row {number}: "text" is {str(text)[:40]!r}, expected text that is not empty')
            texts.append(text)
    chosen = list(dict.fromkeys(texts))[:most]
    if len(chosen) < MIN_ANCHOR_TEXTS:
        raise DataError(
            f"{path}: {len(chosen)} different texts, expected at least {MIN_ANCHOR_TEXTS}, better some hundred: they "
            "say where the embedding must stay"
        )
    return AnchorSet(sequences=tuple(encoder.whole_text(text)[0] for text in chosen), seed=0)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text at byte {error.start}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{path}: is empty")
    return lines
