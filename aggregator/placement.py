"""Which slot does an ``adaptive`` run give its next block? Decided by what a few capable clients tried (methods.md 4).

Each of them trains every candidate alone for a few anchored steps and measures, at some strengths, how much better its
held-out examples are predicted and how far the model has moved from the base:

    gain[k, c]  = the largest ce(0) - ce(g) over the strengths g whose KL is within the budget; 0 if none is
    G[c]        = sum n_k gain[k, c] / sum n_k            over the clients with rows of c
    cost[c]     = step time with c / step time with a block on top, minus 1
    score[c]    = G[c] (1 - 0.3 min(1, cost[c]))

The largest score is chosen; a slot other than the default (the one that ``thirds`` takes next) wins only with 1.1 times
the default's score, and of equal ones the higher. Rows that are not finite are ignored; if nothing is left, the default
is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fedblocks.protocol.messages import ProbeRow

#: Strengths of the tried block at which it is measured; 0 is the model without it.
PROBE_STRENGTHS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
PROBE_STEPS: Final = 16
PROBE_WARMUP: Final = 4
PROBE_EXAMPLES: Final = 64
PROBE_ANCHORS: Final = 16
#: Clients that try the candidates, and the training examples that each of them must have.
PROBE_CLIENTS: Final = 3
PROBE_MIN_EXAMPLES: Final = 200
#: mu: what share of its gain a slot loses that doubles the time of a step.
COST_WEIGHT: Final = 0.3
#: A slot other than the default must be so much better.
MARGIN: Final = 1.10


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeTable:
    """What one client found."""

    num_examples: int
    """n_k."""
    rows: tuple[ProbeRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotScore:
    """What was found of one candidate."""

    block: int
    gain: float
    """G: nats per target token, over the clients by their examples."""
    cost: float
    score: float
    num_clients: int
    """That had rows of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotChoice:
    """The decision and its reasons."""

    block: int
    default: int
    scores: tuple[SlotScore, ...]
    """In the order of the candidates."""


def choose_slot(
    tables: Sequence[ProbeTable],
    candidates: Sequence[int],
    *,
    cost: Mapping[int, float],
    position: Mapping[int, int],
    max_kl: float,
) -> SlotChoice:
    """The block to add.

    Args:
        tables: in any order.
        candidates: block ids; the first is the default.
        cost: of each candidate; may be negative.
        position: of each candidate in the stack: higher wins among equals.
        max_kl: the forgetting budget, nats per token; may be infinite.
    """
    scores: list[SlotScore] = []
    for block in candidates:
        gains = [(table.num_examples, gain) for table in tables if (gain := _gain(table, block, max_kl)) is not None]
        weight = sum(n for n, _ in gains)
        gain = math.fsum(n * g for n, g in gains) / weight if weight else 0.0
        score = gain * (1 - COST_WEIGHT * min(1.0, cost[block]))
        scores.append(SlotScore(block=block, gain=gain, cost=cost[block], score=score, num_clients=len(gains)))
    default = scores[0]
    best = max(scores, key=lambda s: (s.score, position[s.block]))
    wins = best.score > 0 and best.score >= MARGIN * default.score
    return SlotChoice(block=best.block if wins else default.block, default=default.block, scores=tuple(scores))


def _gain(table: ProbeTable, block: int, max_kl: float) -> float | None:
    """gain[k, c]; None without a usable row of the model as it was and one of the block."""
    nll: dict[float, float] = {}
    within: dict[float, bool] = {}
    for row in table.rows:
        finite = math.isfinite(row.nll_sum) and math.isfinite(row.kl_sum)
        if row.block == block and finite and row.num_tokens > 0 and row.num_anchor_tokens > 0:
            nll[row.strength] = row.nll_sum / row.num_tokens
            within[row.strength] = row.kl_sum / row.num_anchor_tokens <= max_kl
    before = nll.pop(0.0, None)
    if before is None or not nll:
        return None
    return max([0.0, *(before - ce for strength, ce in nll.items() if within[strength])])
