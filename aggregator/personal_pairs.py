"""What do clients' masked pairs amount to? The mean of those who trained a row, by membership, as factors (methods.md
10.2, step 5).

The same rule in process (``methods/fedhft.py``) and in a served run (``methods/fedhft_served.py``). A cluster moves by
``sum_k c_k B_k A_k``, c_k one number for each row: nothing of a whole matrix's size is formed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedblocks.aggregator.aggregation import FULL_COVERAGE, NORM_CLIP, WEIGHT_CAP
from fedblocks.aggregator.pairs import Linear, pairs_trainable
from fedblocks.aggregator.plain_mean import OpenUpdate
from fedblocks.profiles.units import Units
from fedblocks.protocol.initial_pairs import initial_pair_tensor
from fedblocks.protocol.low_rank import Float64s
from fedblocks.protocol.row_mask import RowMask
from fedblocks.protocol.tensors import FloatArray

#: The median norm clips from so many updates on.
MEDIAN_FROM = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairUpdate:
    """What a client trained of one matrix."""

    rows: RowMask
    """(out,)"""
    b: FloatArray
    """(rows trained, r)"""
    a: FloatArray
    """(r, in)"""

    def __post_init__(self) -> None:
        trained = int(self.rows.sum())
        if self.b.shape != (trained, self.a.shape[0]):
            raise ValueError(f"B has shape {self.b.shape}, expected {(trained, self.a.shape[0])} for {trained} rows")

    @property
    def right(self) -> Float64s:
        """A transposed, (in, r)."""
        return np.transpose(self.a.astype(np.float64))

    def left(self, scale: float) -> Float64s:
        """sc·B with all its rows, (out, r), those not trained zero."""
        full = np.zeros((len(self.rows), self.a.shape[0]), dtype=np.float64)
        full[self.rows] = np.multiply(self.b.astype(np.float64), scale)
        return full


def trained_pair(one: OpenUpdate, pair: Linear, shape: Units) -> PairUpdate | None:
    """What an update of a served run holds of one pair, which began at its initial value; None if it has not trained
    it."""
    change, b = one.change(pair.unit, pair.a.name), one.change(pair.unit, pair.b.name)
    if change is None or b is None:
        return None
    start = initial_pair_tensor(pairs_trainable(shape), pair.unit, pair.a)
    rows = one.trained_rows(pair.unit, pair.b.name)
    return PairUpdate(rows=rows, b=b[rows], a=start + change)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """What one update counts for."""

    examples: float
    """w_k: the number of examples, bounded (methods.md 8.2)."""
    clip: float
    """Factor on the update."""


def weights_of(num_examples: Sequence[int], norms: Sequence[float], factors: Sequence[float] = ()) -> list[Weight]:
    """The weights of a round's updates.

    Args:
        num_examples, norms: of each.
        factors: on the number of examples of each, once it is bounded; default: 1.
    """
    median = statistics.median(num_examples)
    # An update that changes nothing has no say, as in the fold of expanded blocks.
    positive = [norm for norm in norms if norm > 0]
    bound = NORM_CLIP * statistics.median(positive) if len(positive) >= MEDIAN_FROM else math.inf
    return [
        Weight(
            examples=min(float(count), WEIGHT_CAP * median) * factor,
            clip=1.0 if norm <= bound else bound / norm,
        )
        for count, norm, factor in zip(num_examples, norms, factors or [1.0] * len(norms), strict=True)
    ]


def pair_moves(
    updates: Sequence[PairUpdate | None],
    weights: Sequence[Weight],
    memberships: Sequence[float],
    *,
    num_out: int,
    scale: float,
) -> list[tuple[Float64s, Float64s] | None]:
    """By what the updates move one matrix of one cluster: factors (out, r) and (in, r) of each, in their order.

    None for one that has no part in it; a row that nobody trained has zeros everywhere.

    Args:
        updates: None: that client has not trained this matrix.
        memberships: of each client in the cluster.
        scale: sc.
    """
    trained = [
        (weight, share, update.rows.astype(np.float64))
        for update, weight, share in zip(updates, weights, memberships, strict=True)
        if update is not None
    ]
    divisor = _divisor(trained, np.zeros(num_out))
    return [
        None
        if update is None or share <= 0.0
        else (
            update.left(scale) * (weight.examples * weight.clip * share * divisor)[:, None],
            update.right,
        )
        for update, weight, share in zip(updates, weights, memberships, strict=True)
    ]


def dense_move(
    changes: Sequence[FloatArray | None], weights: Sequence[Weight], memberships: Sequence[float]
) -> Float64s | None:
    """By what the updates move one tensor that is trained whole; None where nobody trained it.

    Args:
        changes: None: that client has not trained it.
    """
    trained = [
        (change, weight, share)
        for change, weight, share in zip(changes, weights, memberships, strict=True)
        if change is not None
    ]
    divisor = _divisor([(weight, share, np.ones(())) for _, weight, share in trained], np.zeros(()))
    if not divisor > 0:
        return None
    total = np.zeros(trained[0][0].shape, dtype=np.float64)
    for change, weight, share in trained:
        total += (weight.examples * weight.clip * share) * change.astype(np.float64)
    return np.multiply(total, divisor)


def _divisor(trained: Sequence[tuple[Weight, float, Float64s]], zero: Float64s) -> Float64s:
    """damp / den: den is the membership of those who trained the row, so a mean stays a mean; 0 where nobody did.

    damp is ours. Where only clients trained that hardly belong to the cluster, their mean would become the cluster's
    whatever their membership. So a cluster moves by less where the mean membership of its contributors, weighted by
    that membership, is below :data:`FULL_COVERAGE`; uniform memberships of up to four clusters are not damped.
    """
    den = squared = zero
    for weight, membership, mask in trained:
        den = np.add(den, np.multiply(mask, weight.examples * membership))
        squared = np.add(squared, np.multiply(mask, weight.examples * membership**2))
    safe = np.where(den > 0, den, 1.0)
    return np.where(den > 0, np.minimum(1.0, squared / safe / FULL_COVERAGE) / safe, 0.0)
