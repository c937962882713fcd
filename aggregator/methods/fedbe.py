"""The method ``fedbe``: expanded blocks, allocated by hardware and need, folded by coverage (methods.md 6, 8.2, 7.2).

Each client trains the blocks, or slices of them, that its device and the blocks' needs suggest; the fold weighs every
value by who trained it; the published state moves by int8 steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedblocks.aggregator import aggregation
from fedblocks.aggregator.aggregation import AcceptedUpdate, FoldResult
from fedblocks.aggregator.run_rules import GlobalState, MethodState, plan, publish
from fedblocks.profiles.units import Units

__all__ = ["aggregate", "plan", "publish"]


def aggregate(updates: Sequence[AcceptedUpdate], *, shape: Units, state: MethodState, model: GlobalState) -> FoldResult:
    """The round's updates as one change per block, by coverage."""
    del model
    return aggregation.fold(updates, shape=shape, history={n.block: n.rounds for n in state.norms})
