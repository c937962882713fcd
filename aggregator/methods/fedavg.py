"""The method ``fedavg``: every parameter of the base trains (McMahan et al., 1602.05629, algorithm 1).

theta <- theta + sum_k (n_k / n) (theta_k - theta)
"""

from __future__ import annotations

from collections.abc import Sequence

from fedblocks.aggregator.aggregation import AcceptedUpdate, FoldResult
from fedblocks.aggregator.plain_mean import mean_change
from fedblocks.aggregator.run_rules import GlobalState, MethodState, plan, publish
from fedblocks.profiles.units import Units

__all__ = ["aggregate", "plan", "publish"]


def aggregate(updates: Sequence[AcceptedUpdate], *, shape: Units, state: MethodState, model: GlobalState) -> FoldResult:
    """The mean change, weighed by examples."""
    del state, model
    return mean_change(updates, shape=shape)
