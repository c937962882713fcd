"""The method ``fedhft`` in a served run: FedHFT, corrected (arXiv 2510.14054; methods.md 10; docs/fedhft.md).

    G_j <- G_j + sum_k n_k p_kj m_k·sc·B_k A_k / sum_k n_k p_kj m_k       row by row; m_k the rows that client k trained
    client k starts from  W_0 + sum_j p_kj G_j, cut to rank r_d

The published state is what the clusters have learnt, G_j whole, each under numbers of its own (``personalisation.py``,
which also says who belongs where); a step is the stack of all clients' pairs, one for each cluster. What the rule is
made of stands in ``personal_pairs.py``, what a client is sent in ``protocol/priors.py``, and the same method in one
process, for comparisons, in ``fedhft.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedblocks.aggregator.aggregation import STALENESS_DISCOUNT, AcceptedUpdate, Clipped, FoldResult
from fedblocks.aggregator.pairs import Linear, linears, pairs_trainable
from fedblocks.aggregator.personal_pairs import (
    PairUpdate,
    Weight,
    dense_move,
    pair_moves,
    trained_pair,
    weights_of,
)
from fedblocks.aggregator.plain_mean import OpenUpdate, folded, opened, units_of
from fedblocks.aggregator.run_rules import GlobalState, MethodState, PublishSettings, plan, publish_stacks
from fedblocks.profiles.model_shape import WIDTHS
from fedblocks.profiles.units import CLUSTER_STRIDE, EXTRA_UNIT, Units, unit_tensors
from fedblocks.protocol.low_rank import pair_norm
from fedblocks.protocol.messages import ClientKey
from fedblocks.protocol.payloads import Bytes
from fedblocks.protocol.tensors import FloatArray, State

__all__ = ["aggregate", "plan", "publish"]


def aggregate(updates: Sequence[AcceptedUpdate], *, shape: Units, state: MethodState, model: GlobalState) -> FoldResult:
    """For each cluster the stacked pairs of all clients, B weighed row by row."""
    del model
    members = opened(updates, shape)
    if not members:
        return folded({}, [], [])
    scale = pairs_trainable(shape).scaling
    weights = weights_of(
        [one.update.num_examples for one in members],
        [_norm(one, shape, scale) for one in members],
        [STALENESS_DISCOUNT**one.update.staleness for one in members],
    )
    shares = _memberships(members, state)
    aggregate: State = {}
    for unit in units_of(members):
        if unit == EXTRA_UNIT:
            for spec in unit_tensors(shape, unit):
                changes = [one.change(unit, spec.name) for one in members]
                for number, of_cluster in shares.items():
                    move = dense_move(changes, weights, of_cluster)
                    value = np.zeros(spec.shape) if move is None else move
                    aggregate.setdefault(number + unit, {})[spec.name] = value.astype(np.float32)
            continue
        for pair in linears(shape, unit):
            trained = [trained_pair(one, pair, shape) for one in members]
            right = np.vstack([_right(one, pair) for one in trained])
            for number, of_cluster in shares.items():
                left = _left(trained, weights, of_cluster, pair, scale)
                stack = aggregate.setdefault(number + unit, {})
                stack[pair.a.name], stack[pair.b.name] = right, left
    return _books(aggregate, members, weights)


def _memberships(members: Sequence[OpenUpdate], state: MethodState) -> dict[int, list[float]]:
    """What is added to the number of a cluster's units -> membership of each client in it."""
    found = state.mixture
    if found is None:
        return {0: [1.0] * len(members)}
    return {
        cluster * CLUSTER_STRIDE: [found.memberships(one.update.client)[cluster] for one in members]
        for cluster in range(found.clusters)
    }


def _norm(one: OpenUpdate, shape: Units, scale: float) -> float:
    """|update|_F: of each pair its product's."""
    squares: list[float] = []
    for unit in one.update.blocks:
        if unit == EXTRA_UNIT:
            changes = [one.change(unit, spec.name) for spec in unit_tensors(shape, unit)]
            squares += [float(np.sum(np.square(c.astype(np.float64)))) for c in changes if c is not None]
            continue
        for pair in linears(shape, unit):
            trained = trained_pair(one, pair, shape)
            assert trained is not None
            squares.append(pair_norm(trained.left(scale), trained.right) ** 2)
    return math.sqrt(math.fsum(squares))


def _right(trained: PairUpdate | None, pair: Linear) -> FloatArray:
    return np.zeros(pair.a.shape, dtype=np.float32) if trained is None else trained.a


def _left(
    trained: Sequence[PairUpdate | None],
    weights: Sequence[Weight],
    memberships: Sequence[float],
    pair: Linear,
    scale: float,
) -> FloatArray:
    """B of all clients beside each other, (out, R); zeros where one has no part in it."""
    moves = pair_moves(trained, weights, memberships, num_out=pair.b.shape[0], scale=scale)
    return np.hstack([np.zeros(pair.b.shape) if move is None else move[0] for move in moves]).astype(np.float32)


def _books(aggregate: State, members: Sequence[OpenUpdate], weights: Sequence[Weight]) -> FoldResult:
    total = math.fsum(weight.examples for weight in weights)
    by_client: dict[ClientKey, float] = {}
    for one, weight in zip(members, weights, strict=True):
        by_client[one.update.client] = by_client.get(one.update.client, 0.0) + weight.examples
    segments = {
        unit: tuple(
            math.fsum(
                weight.examples
                for one, weight in zip(members, weights, strict=True)
                if unit in one.update.blocks and (unit == EXTRA_UNIT or one.update.width >= width)
            )
            / total
            for width in WIDTHS
        )
        for unit in units_of(members)
    }
    return FoldResult(
        aggregate=aggregate,
        coverage={unit: shares[0] for unit, shares in segments.items()},
        segment_coverage=segments,
        history={},
        weights=by_client,
        clipped=tuple(
            Clipped(client=one.update.client, block=one.update.blocks[0], factor=weight.clip)
            for one, weight in zip(members, weights, strict=True)
            if weight.clip < 1
        ),
    )


def publish(
    model: GlobalState, folded: FoldResult, *, shape: Units, settings: PublishSettings
) -> tuple[GlobalState, Bytes] | None:
    """The clusters' changes plus the products of their stacks; the step is the stacks."""
    del settings  # the stacks are exact, and nothing waits
    return publish_stacks(model, folded, shape=shape, scaling=1.0)
