"""How much has each part of each block been trained so far, and on what?

Parts are the segments of a block: what one width of slim block trains beyond the next narrower one. What lags behind is
in debt, which is a reason to train it (methods.md 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Final

from fedblocks.profiles.model_shape import WIDTHS

#: Per round, what was covered counts this much less (methods.md 6.3).
COVERAGE_DECAY: Final = 0.95
#: Coverage of a block that nobody has trained.
UNSEEN: Final = (0.0,) * len(WIDTHS)

Segments = tuple[float, ...]
"""A number for each segment of a block, the narrowest width's first (``model_shape.WIDTHS``): what a width trains
beyond the next narrower one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much each part of each block has been trained so far, and on what; older rounds count less."""

    seen: Mapping[int, Segments]
    """Block id -> sum of accepted n_k, of each segment."""
    topics: Mapping[int, tuple[float, ...]] = field(default_factory=dict[int, tuple[float, ...]])
    """Block id -> sum of the accepted clients' topic histograms; absent where nobody shared one."""

    @classmethod
    def of(cls, blocks: Iterable[int]) -> Coverage:
        """Nothing covered yet."""
        return cls(seen=dict.fromkeys(blocks, UNSEEN))

    def debts(self, block: int) -> Segments:
        """``1 - seen / largest seen`` of each segment, 1 where nothing has been covered at all: in [0, 1]."""
        return self.debts_of((block,))[block]

    def debts_of(self, blocks: Iterable[int]) -> dict[int, Segments]:
        """The same of each of these blocks."""
        most = max((max(segments) for segments in self.seen.values()), default=0.0)
        if most <= 0:
            return dict.fromkeys(blocks, (1.0,) * len(WIDTHS))
        return {block: tuple([1.0 - weight / most for weight in self.seen.get(block, UNSEEN)]) for block in blocks}

    def rarity(self, block: int, topics: tuple[int, ...]) -> float:
        """How unlike what the block has seen these topics are, in [0, 1]; 0 where either is unknown."""
        return topic_divergence(topics, self.topics.get(block, ()))

    def adding(
        self, blocks: Iterable[int], num_examples: int, topics: tuple[int, ...] = (), width: float = 1.0
    ) -> Coverage:
        """With one more client's examples, and the topics among them, on these blocks up to this width."""
        seen, seen_topics = dict(self.seen), dict(self.topics)
        trained = tuple(num_examples if segment <= width else 0.0 for segment in WIDTHS)
        for block in blocks:
            seen[block] = _sum_of(seen.get(block, UNSEEN), trained)
            if topics:
                seen_topics[block] = _sum_of(seen_topics.get(block, ()), topics)
        return Coverage(seen=seen, topics=seen_topics)

    def after_round(self, accepted: Iterable[Trained]) -> Coverage:
        """After a closed round: what there was decays, what was accepted is added, in any order."""
        total = Coverage(seen={})
        for update in accepted:
            total = total.adding(update.blocks, update.num_examples, update.topics, update.width)
        return Coverage(
            seen={
                block: _sum_of(_decayed(self.seen.get(block, UNSEEN)), total.seen.get(block, UNSEEN))
                for block in sorted({*self.seen, *total.seen})
            },
            topics={
                block: _sum_of(_decayed(self.topics.get(block, ())), total.topics.get(block, ()))
                for block in sorted({*self.topics, *total.topics})
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What an accepted update adds to the coverage."""

    blocks: tuple[int, ...]
    num_examples: int
    topics: tuple[int, ...] = ()
    width: float = 1.0


def topic_divergence(first: Sequence[float], second: Sequence[float]) -> float:
    """Jensen-Shannon divergence of two histograms, base 2: 0 for equal shares, 1 for none in common (methods.md 6.3).

    Bins that only the longer one has are empty in the other; a histogram without a count is unlike nothing: 0.
    """
    total_first, total_second = math.fsum(first), math.fsum(second)
    if not (total_first > 0 and total_second > 0):
        return 0.0
    terms: list[float] = []
    for a, b in zip_longest(first, second, fillvalue=0.0):
        p, q = a / total_first, b / total_second
        middle = (p + q) / 2
        terms += [0.5 * share * math.log2(share / middle) for share in (p, q) if share > 0]
    return min(1.0, max(0.0, math.fsum(terms)))


def _decayed(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(COVERAGE_DECAY * number for number in numbers)


def _sum_of(first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip_longest(first, second, fillvalue=0.0))
