"""The method ``hetlora``: each client trains the first r_k components of the pairs (Cho et al., 2401.06432, section 3).

    A <- sum_k a_k pad(A_k),   B <- sum_k a_k pad(B_k),   a_k = |B_k A_k|_F / sum_j |B_j A_j|_F

``pad`` fills up to r_max with zeros, so that components that only few clients train shrink. Where no client's product
has a norm the weights are those of the examples. The rank-decay penalty and self-pruning of the paper are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedblocks.aggregator.aggregation import AcceptedUpdate, FoldResult
from fedblocks.aggregator.low_rank import pair_norm
from fedblocks.aggregator.pairs import is_pair, linears, published_value, trained_value
from fedblocks.aggregator.plain_mean import add_first, example_weights, folded, mean_change, opened, units_of
from fedblocks.aggregator.run_rules import GlobalState, MethodState, plan, publish
from fedblocks.profiles.units import Units
from fedblocks.protocol.tensors import State

__all__ = ["aggregate", "plan", "publish"]


def aggregate(updates: Sequence[AcceptedUpdate], *, shape: Units, state: MethodState, model: GlobalState) -> FoldResult:
    """The norm-weighted mean of zero-padded pairs, minus the published ones."""
    del state
    members = opened(updates, shape)
    examples = example_weights(members)
    aggregate: State = {}
    for unit in units_of(members):
        if not is_pair(unit):
            aggregate[unit] = mean_change(updates, shape=shape).aggregate[unit]
            continue
        aggregate[unit] = {}
        for pair in linears(shape, unit):
            starts = [published_value(shape, model.published, unit, spec) for spec in (pair.a, pair.b)]
            trained = [
                (trained_value(one, unit, pair.a, starts[0]), trained_value(one, unit, pair.b, starts[1]))
                for one in members
            ]
            norms = [pair_norm(b, np.transpose(a)) for a, b in trained]
            total_norm = sum(norms)
            weights = [norm / total_norm for norm in norms] if total_norm > 0 else examples
            for position, (spec, start) in enumerate(zip((pair.a, pair.b), starts, strict=True)):
                mean = np.zeros(spec.shape, dtype=np.float64)
                for values, weight in zip(trained, weights, strict=True):
                    add_first(mean, values[position], weight)
                aggregate[unit][spec.name] = (mean - start.astype(np.float64)).astype(np.float32)
    return folded(aggregate, members, examples)
