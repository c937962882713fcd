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
from fedblocks.aggregator.pairs import Linear, fold_pairs, pairs_trainable, published_value, trained_value
from fedblocks.aggregator.plain_mean import Float64s, OpenUpdate
from fedblocks.aggregator.run_rules import GlobalState, MethodState, PublishSettings, plan, publish_stacks
from fedblocks.profiles.model_shape import TensorSpec
from fedblocks.profiles.units import Units
from fedblocks.protocol.payloads import Bytes

__all__ = ["aggregate", "plan", "publish"]


def aggregate(updates: Sequence[AcceptedUpdate], *, shape: Units, state: MethodState, model: GlobalState) -> FoldResult:
    """The stacked pairs of all clients, A weighed."""
    del state

    def trained(one: OpenUpdate, unit: int, spec: TensorSpec) -> Float64s:
        version = model.version - one.update.staleness  # that the client's fresh pairs belong to
        return trained_value(one, unit, spec, published_value(shape, {}, unit, spec, version=version))

    def stack(pair: Linear, members: Sequence[OpenUpdate], weights: Sequence[float]) -> tuple[Float64s, Float64s]:
        weighed = [w * trained(one, pair.unit, pair.a) for one, w in zip(members, weights, strict=True)]
        return np.vstack(weighed), np.hstack([trained(one, pair.unit, pair.b) for one in members])

    return fold_pairs(updates, shape=shape, rule=stack)


def publish(
    model: GlobalState, folded: FoldResult, *, shape: Units, settings: PublishSettings
) -> tuple[GlobalState, Bytes] | None:
    """The weights changed by the product of the stack; the step is the stack."""
    del settings  # the stack is exact, and nothing waits
    return publish_stacks(model, folded, shape=shape, scaling=pairs_trainable(shape).scaling)
