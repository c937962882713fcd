"""What does a client of personal pairs start from? Its mixture of what was learnt, cut to pairs of a low rank.

The aggregator cuts what it sends (methods.md 10.2, step 1), an export what it writes, by the same rule.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from fedblocks.profiles.units import EXTRA_UNIT, PersonalPairs, TrainedUnits, unit_tensors
from fedblocks.protocol.low_rank import Factored, truncate
from fedblocks.protocol.state import LORA_A, LORA_B
from fedblocks.protocol.tensors import State


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prior:
    """A state of ``TrainedUnits.held``, and what it leaves out."""

    state: State
    error: float
    """eps: mean over the matrices of ``|change - prior|_F / |change|_F``; 0 where nothing has changed."""


def prior_of(changes: State, units: TrainedUnits) -> Prior:
    """The best approximation of the weights' changes by the prior's rank; what is no matrix of a layer is kept.

    Args:
        changes: of ``units.published()``.
        units: of personal pairs.
    """
    pairs = units.trainable
    assert isinstance(pairs, PersonalPairs)
    state: State = {}
    errors: list[float] = []
    for unit, tensors in sorted(changes.items()):
        if unit == EXTRA_UNIT:
            state[unit] = dict(tensors)
            continue
        state[unit] = {}
        for spec in unit_tensors(units.published(), unit):
            linear = spec.name.removesuffix(".weight")
            matrix = tensors.get(spec.name)
            num_out, num_in = spec.shape
            whole = Factored.zero(num_out, num_in) if matrix is None or not matrix.any() else Factored.of(matrix)
            found = truncate(whole, pairs.prior_rank)
            state[unit][linear + LORA_A] = np.ascontiguousarray(found.right)
            state[unit][linear + LORA_B] = np.ascontiguousarray(found.left)
            if whole.rank:
                errors.append(found.error)
    return Prior(state=state, error=statistics.fmean(errors) if errors else 0.0)
