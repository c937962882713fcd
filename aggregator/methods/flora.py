"""The method ``flora``: the clients' pairs are stacked, not averaged, and merged (Wang et al., 2409.05976, section 4).

    A = [w_1 A_1; ..; w_K A_K],   B = [B_1, .., B_K],   B A = sum_k w_k B_k A_k exactly,   w_k = n_k / sum n
    W <- W + s B A,   s = alpha / r                          and every client starts the next round with fresh pairs

The download is the stack; each client adds the product to a growing fp32 change of its base, whose layers stay in 4
bits. Ranks may differ from client to client. (The published code's FedIT path aggregates one client only, a misspelt
variable: that is not reproduced.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedblocks.aggregator.aggregation import AcceptedUpdate, FoldResult
from fedblocks.aggregator.pairs import is_pair, linears, pairs_trainable, published_value, trained_value
from fedblocks.aggregator.plain_mean import example_weights, folded, mean_change, opened, units_of
from fedblocks.aggregator.run_rules import GlobalState, MethodState, PublishSettings, plan
from fedblocks.profiles.units import Units
from fedblocks.protocol import state as states
from fedblocks.protocol.tensors import State

__all__ = ["aggregate", "plan", "publish"]


def aggregate(updates: Sequence[AcceptedUpdate], *, shape: Units, state: MethodState, model: GlobalState) -> FoldResult:
    """The stacked pairs of all clients, A weighed."""
    del state
    members = opened(updates, shape)
    weights = example_weights(members)
    aggregate: State = {}
    for unit in units_of(members):
        if not is_pair(unit):
            aggregate[unit] = mean_change(updates, shape=shape).aggregate[unit]
            continue
        aggregate[unit] = {}
        for pair in linears(shape, unit):
            parts = [
                [
                    trained_value(
                        one,
                        unit,
                        spec,
                        published_value(shape, {}, unit, spec, version=model.version - one.update.staleness),
                    )
                    for one in members
                ]
                for spec in (pair.a, pair.b)
            ]
            weighed = [weight * a for a, weight in zip(parts[0], weights, strict=True)]
            aggregate[unit][pair.a.name] = np.vstack(weighed).astype(np.float32)
            aggregate[unit][pair.b.name] = np.hstack(parts[1]).astype(np.float32)
    return folded(aggregate, members, weights)


def publish(
    model: GlobalState, folded: FoldResult, *, shape: Units, settings: PublishSettings
) -> tuple[GlobalState, bytes] | None:
    """The weights changed by the product of the stack; the step is the stack."""
    del settings  # the stack is exact, and nothing waits
    if not folded.aggregate:
        return None
    published_units = states.published_units(shape)
    made = states.publish_stack(
        model.published, folded.aggregate, shape=published_units, scaling=pairs_trainable(shape).scaling
    )
    after = GlobalState(
        version=model.version + 1,
        published=made.published,
        residual={},
        sha256=states.state_sha256(published_units, made.published),
    )
    return after, made.step
