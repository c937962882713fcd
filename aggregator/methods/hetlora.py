"""The method ``hetlora``: each client trains the first r_k components of the pairs (Cho et al., 2401.06432, section 3).

    A <- sum_k a_k pad(A_k),   B <- sum_k a_k pad(B_k),   a_k = |B_k A_k|_F / sum_j |B_j A_j|_F

``pad`` fills up to r_max with zeros, so that components that only few clients train shrink. Where no client's product
has a norm the weights are those of the examples. The rank-decay penalty and self-pruning of the paper are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedblocks.aggregator.aggregation import AcceptedUpdate, FoldResult
from fedblocks.aggregator.pairs import Linear, fold_pairs, published_value, trained_value
from fedblocks.aggregator.plain_mean import Float64s, OpenUpdate, add_first
from fedblocks.aggregator.run_rules import GlobalState, MethodState, plan, publish
from fedblocks.profiles.units import Units
from fedblocks.protocol.low_rank import pair_norm

__all__ = ["aggregate", "plan", "publish"]


def aggregate(updates: Sequence[AcceptedUpdate], *, shape: Units, state: MethodState, model: GlobalState) -> FoldResult:
    """The norm-weighted mean of zero-padded pairs, minus the published ones."""
    del state

    def change(pair: Linear, members: Sequence[OpenUpdate], weights: Sequence[float]) -> tuple[Float64s, Float64s]:
        start_a, start_b = (published_value(shape, model.published, pair.unit, spec) for spec in (pair.a, pair.b))
        trained = [
            (trained_value(one, pair.unit, pair.a, start_a), trained_value(one, pair.unit, pair.b, start_b))
            for one in members
        ]
        norms = [pair_norm(b, np.transpose(a)) for a, b in trained]
        total_norm = sum(norms)
        shares = [norm / total_norm for norm in norms] if total_norm > 0 else weights
        a, b = np.zeros(start_a.shape, dtype=np.float64), np.zeros(start_b.shape, dtype=np.float64)
        for (trained_a, trained_b), share in zip(trained, shares, strict=True):
            add_first(a, trained_a, share)
            add_first(b, trained_b, share)
        return a - start_a.astype(np.float64), b - start_b.astype(np.float64)

    return fold_pairs(updates, shape=shape, rule=change)
