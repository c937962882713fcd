"""How well does the model predict plain texts? Perplexity per token and bits per byte.

*Single* (the default): each text by itself. *Packed*: all texts one after another with nothing between them, as if
they were one. Either is cut into windows; every window begins with bos where the tokenizer names one (else its first
token has no prediction and is not counted), and every other token is predicted from those before it in its window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedblocks.edge_client.data import TextEncoder
from fedblocks.edge_client.evaluate import score_examples
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.multiple_choice import start_ids, window_tokens
from fedblocks.edge_client.samples import TokenisedSample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextScores:
    """Sums over each text; packed: over each window."""

    nll: npt.NDArray[np.float64]  # (n,) nats
    num_tokens: npt.NDArray[np.int64]  # (n,) predicted ones
    num_bytes: int
    """UTF-8 bytes of all texts."""

    @property
    def perplexity(self) -> float:
        """exp of the mean nll per predicted token."""
        return math.exp(self.nll.sum() / self.num_tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return float(self.nll.sum() / math.log(2) / self.num_bytes)


def score_texts(
    model: ExpandedModel,
    texts: Sequence[str],
    encoder: TextEncoder,
    *,
    packed: bool = False,
    window: int | None = None,
) -> TextScores:
    """The sums over texts.

    Args:
        packed: as one text; see above.
        window: tokens of a window, bos included; default :func:`~fedblocks.edge_client.multiple_choice.window_tokens`.
    """
    longest = window_tokens(model.checkpoint) if window is None else window
    start = start_ids(encoder)
    ids = [list(encoder.tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    if packed:
        ids = [[token for text in ids for token in text]]
    step = longest - len(start)
    cut = [(i, [*start, *text[at : at + step]]) for i, text in enumerate(ids) for at in range(0, len(text), step)]
    windows = [(i, tokens) for i, tokens in cut if len(tokens) > 1]
    samples = [
        TokenisedSample(ids=np.array(tokens, dtype=np.int32), label_mask=np.arange(len(tokens)) > 0)
        for _, tokens in windows
    ]
    size = len(windows) if packed else len(texts)
    nll, num_tokens = np.zeros(size), np.zeros(size, dtype=np.int64)
    for window_number, (_, window_nll, count) in enumerate(score_examples(model, samples)):
        place = window_number if packed else windows[window_number][0]
        nll[place] += window_nll
        num_tokens[place] += count
    return TextScores(nll=nll, num_tokens=num_tokens, num_bytes=sum(len(text.encode()) for text in texts))
