"""When does the model grow by a block? Every round is asked (docs/methods.md, Growth; methods.md 9).

The plan of the run folder lists every block that the run may come to have. Those that train and compute are *active*;
an inactive block is the identity, and everybody leaves it out of the model. So growth is one more id in the active set:
the new block starts as a copy of its base layer with nothing accumulated, and the model computes the same bits as
before.

    score    3-round means of the pooled accuracy (of -NLL per token where nothing is right or wrong)
    best5    the best of the last five of them
    grows    >= 8 rounds after the start or the last growth, best5 < 0.5 % better than the best one before those five
             (NLL: < 0.005 nats per token), kl_t <= 1.1 budgets, and some client can train the new block

Pure functions; :class:`GrowthState` is part of the method's state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from fedblocks.protocol.expansion import ExpansionPlan

#: Means that are looked at together.
WINDOW: Final = 5
#: Rounds from the start, or from one growth to the next, at least.
SPACING_ROUNDS: Final = 8
#: A smaller rise of the accuracy, relative, is no improvement.
ACCURACY_IMPROVEMENT: Final = 0.005
#: The same for the NLL, nats per token.
NLL_IMPROVEMENT: Final = 0.005
#: The controller holds KL near 0.9 budgets; where it lies higher a further block would only forget more.
MAX_KL_SHARE: Final = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanScore:
    """A mean over three rounds."""

    accuracy: float | None
    nll: float | None
    """nats per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthState:
    """What growth needs to know of the rounds so far; constant in size."""

    active: tuple[int, ...] = ()
    """Ids of the blocks that compute and train, ascending; empty: those of the start."""
    last_round: int = 0
    """The last round that ended with a growth; 0: none did."""
    probing: int = 0
    """Blocks whose place the next round is to find out (``placement.py``)."""
    refused: str = ""
    """Why the block that the rule asks for was not added; empty once it was, or is not asked for."""
    window: tuple[MeanScore, ...] = ()
    """The newest five."""
    best_accuracy: float | None = None
    """Best of the means before those five."""
    best_nll: float | None = None


def first_blocks(plan: ExpansionPlan, num_blocks: int) -> tuple[int, ...]:
    """The active set of a run that has not grown: the first ones of the plan."""
    return plan.block_ids[:num_blocks]


def next_block(plan: ExpansionPlan, active: tuple[int, ...], most: int) -> int | None:
    """The block that the placement adds next; None where there are ``most`` already, or the plan has no more."""
    left = [block for block in plan.block_ids if block not in active]
    return left[0] if left and len(active) < most else None


def with_score(state: GrowthState, mean: MeanScore) -> GrowthState:
    """The state after a round whose 3-round means are these; a round without any changes nothing."""
    if mean.accuracy is None and mean.nll is None:
        return state
    window = (*state.window, mean)
    accuracy, nll = state.best_accuracy, state.best_nll
    if len(window) > WINDOW:
        gone, window = window[0], window[1:]
        accuracy = _larger(accuracy, gone.accuracy)
        nll = _smaller(nll, gone.nll)
    return replace(state, window=window, best_accuracy=accuracy, best_nll=nll)


def stands_still(state: GrowthState) -> bool:
    """True if the best of the last five means is hardly better than the best one before them.

    False while there is none before them. An accuracy of 0 throughout says nothing: then the NLL is asked.
    """
    accuracies = [mean.accuracy for mean in state.window if mean.accuracy is not None]
    if state.best_accuracy is not None and accuracies and max(state.best_accuracy, *accuracies) > 0:
        return max(accuracies) < (1 + ACCURACY_IMPROVEMENT) * state.best_accuracy
    nlls = [mean.nll for mean in state.window if mean.nll is not None]
    return state.best_nll is not None and bool(nlls) and min(nlls) > state.best_nll - NLL_IMPROVEMENT


def wants_block(state: GrowthState, *, round: int, kl: float | None, max_kl: float) -> bool:
    """The rule above, for the end of ``round``; not whether there is a block to add, and somebody to train it.

    Args:
        kl: measured in this round, nats per token; unknown is not within the budget.
        max_kl: the forgetting budget; infinite: not asked.
    """
    if round - state.last_round < SPACING_ROUNDS or not stands_still(state):
        return False
    return math.isinf(max_kl) or (kl is not None and kl <= MAX_KL_SHARE * max_kl)


def with_block(state: GrowthState, active: tuple[int, ...], block: int, *, round: int) -> GrowthState:
    """The state once ``round`` has ended with this block added to the active ones."""
    return replace(state, active=tuple(sorted((*active, block))), last_round=round, refused="", probing=0)


def growth_line(plan: ExpansionPlan, active: tuple[int, ...], block: int) -> str:
    """For people: which block comes where, and what it does to what clients have cached."""
    before, after = plan.reduced(active), plan.reduced((*active, block))
    text = f"grew to {len(after.blocks)} blocks: block {block} after layer {plan.block(block).after_layer}"
    if after.base_cut == before.base_cut:
        return f"{text}; hidden states below layer {before.base_cut} stay cached"
    return (
        f"{text}; hidden states are cached below layer {after.base_cut} instead of {before.base_cut}, each text's are "
        "computed again when it is next seen"
    )


def _larger(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else max(a, b)


def _smaller(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)
