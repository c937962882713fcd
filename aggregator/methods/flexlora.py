"""The method ``flexlora``: products are averaged and cut to pairs by an SVD (Bai et al., 2402.11505, section 3).

    W = sum_k (n_k / n) B_k A_k,   W = U S Vᵀ,   A <- sqrt(S_r) V_rᵀ,   B <- U_r sqrt(S_r)

Components come in the order of their singular values, so that the first r_k are the best pair of that rank and each
client takes its own. The SVD is that of the stacked factors by QR: W itself is not formed while its rank, the sum of
the clients' ranks, is below its size (``protocol/low_rank.py``). Components beyond the rank of W start anew: A as at
first, B zero. The paper sends U S and Vᵀ; the root on both sides is the same product with pairs that train evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from fedblocks.aggregator.aggregation import AcceptedUpdate, FoldResult
from fedblocks.aggregator.pairs import (
    Linear,
    fold_pairs,
    pairs_trainable,
    published_value,
    trained_value,
)
from fedblocks.aggregator.plain_mean import Float64s, OpenUpdate
from fedblocks.aggregator.run_rules import GlobalState, MethodState, plan, publish
from fedblocks.profiles.units import Units
from fedblocks.protocol.initial_pairs import initial_pair_tensor
from fedblocks.protocol.low_rank import Factored, truncate
from fedblocks.protocol.tensors import FloatArray

#: Singular values below this share of the largest are rounding.
RANK_TOLERANCE: Final = 1e-7

__all__ = ["aggregate", "plan", "publish"]


def aggregate(updates: Sequence[AcceptedUpdate], *, shape: Units, state: MethodState, model: GlobalState) -> FoldResult:
    """The pairs of the mean product, minus the published ones."""
    del state

    def change(pair: Linear, members: Sequence[OpenUpdate], weights: Sequence[float]) -> tuple[Float64s, Float64s]:
        starts = [published_value(shape, model.published, pair.unit, spec) for spec in (pair.a, pair.b)]
        a, b = _redistributed(pair, starts, members, weights, shape)
        return a - starts[0].astype(np.float64), b - starts[1].astype(np.float64)

    return fold_pairs(updates, shape=shape, rule=change)


def _redistributed(
    pair: Linear,
    starts: Sequence[FloatArray],
    members: Sequence[OpenUpdate],
    weights: Sequence[float],
    shape: Units,
) -> tuple[Float64s, Float64s]:
    """A and B of the mean product, from clients that began with the values ``starts``."""
    lefts: list[Float64s] = []
    rights: list[Float64s] = []
    for one, weight in zip(members, weights, strict=True):
        lefts.append(weight * trained_value(one, pair.unit, pair.b, starts[1]))
        rights.append(np.transpose(trained_value(one, pair.unit, pair.a, starts[0])))
    stacked = Factored(left=np.hstack(lefts).astype(np.float32), right=np.hstack(rights).astype(np.float32))
    found = truncate(stacked, pair.a.shape[0])
    a, b = found.right.astype(np.float64), found.left.astype(np.float64)
    strength = np.square(b).sum(axis=0)  # the singular values
    unused = strength <= RANK_TOLERANCE * strength.max()
    b[:, unused] = 0
    fresh = initial_pair_tensor(pairs_trainable(shape), pair.unit, pair.a).astype(np.float64)
    a[unused] = fresh[unused]
    return a, b
