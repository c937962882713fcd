"""Which low-rank pairs did each client train, and from which did it start? Values from changes, layer by layer.

An update holds changes; the methods over low-rank pairs are about values: ``value_k = initial + D + change_k``, cut to
the components that the client trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedblocks.aggregator.aggregation import AcceptedUpdate, FoldResult
from fedblocks.aggregator.plain_mean import (
    Float64s,
    OpenUpdate,
    example_weights,
    folded,
    mean_of_unit,
    opened,
    units_of,
)
from fedblocks.profiles.model_shape import TensorSpec
from fedblocks.profiles.units import EXTRA_UNIT, LowRankPairs, TrainedUnits, Units, unit_tensors
from fedblocks.protocol.initial_pairs import initial_pair_tensor
from fedblocks.protocol.tensors import FloatArray, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """The pair over one linear of one unit: A ``[r, in]``, B ``[out, r]``."""

    unit: int
    a: TensorSpec
    b: TensorSpec


def pairs_trainable(shape: Units) -> LowRankPairs:
    """What the run trains; only a run of pairs comes here."""
    assert isinstance(shape, TrainedUnits)
    assert isinstance(shape.trainable, LowRankPairs)
    return shape.trainable


def linears(shape: Units, unit: int) -> Iterator[Linear]:
    """All pairs of a unit in their order."""
    specs = unit_tensors(shape, unit)
    for a, b in zip(specs[::2], specs[1::2], strict=True):
        yield Linear(unit=unit, a=a, b=b)


class PairRule(Protocol):
    """What the clients' work on one pair amounts to."""

    def __call__(
        self, pair: Linear, members: Sequence[OpenUpdate], weights: Sequence[float]
    ) -> tuple[Float64s, Float64s]:
        """What A and B change by (or are, if the run publishes stacks); ``weights`` are those of the examples."""
        ...


def fold_pairs(updates: Sequence[AcceptedUpdate], *, shape: Units, rule: PairRule) -> FoldResult:
    """Every pair that somebody trained by the rule; an extra tensor set, which has no pairs, by the plain mean."""
    members = opened(updates, shape)
    weights = example_weights(members)
    aggregate: State = {}
    for unit in units_of(members):
        if unit == EXTRA_UNIT:
            aggregate[unit] = mean_of_unit(unit, members, weights, shape=shape)
            continue
        aggregate[unit] = {}
        for pair in linears(shape, unit):
            for spec, values in zip((pair.a, pair.b), rule(pair, members, weights), strict=True):
                aggregate[unit][spec.name] = values.astype(np.float32)
    return folded(aggregate, members, weights)


def published_value(
    shape: Units, published: Mapping[int, Mapping[str, FloatArray]], unit: int, spec: TensorSpec, version: int = 0
) -> FloatArray:
    """``initial + D`` of a tensor of a pair, one fp32 addition as on the clients.

    Args:
        version: that the task started from, for pairs that start anew.
    """
    start = initial_pair_tensor(pairs_trainable(shape), unit, spec, version=version)
    change = published.get(unit, {}).get(spec.name)
    return start if change is None else start + change


def trained_value(one: OpenUpdate, unit: int, spec: TensorSpec, start: FloatArray) -> Float64s:
    """What a client ended with, cut to what it trained; empty (rank 0) if it has not trained this unit.

    Args:
        start: the whole value that it started from.
    """
    change = one.change(unit, spec.name)
    if change is None:
        nothing = (spec.shape[0], 0) if spec.is_out else (0, spec.shape[1])
        return np.zeros(nothing, dtype=np.float64)
    cut = start[tuple(slice(size) for size in change.shape)]
    return cut.astype(np.float64) + change.astype(np.float64)
