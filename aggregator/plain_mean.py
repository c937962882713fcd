"""What do a round's updates amount to, as the papers average them? Weights n_k / sum n, nothing clipped or damped.

McMahan et al., 1602.05629: ``theta += sum_k w_k (theta_k - theta)``, w_k = n_k / sum n. The fold of the house
(``aggregation.py``) also corrects for steps, clips norms and weighs each value by who trained it; here only its order
is kept: ascending client keys, fp64, one rounding at the end, so that the order of arrival changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedblocks.aggregator.aggregation import AcceptedUpdate, FoldResult
from fedblocks.profiles.model_shape import WIDTHS, ChosenRows
from fedblocks.profiles.units import Units, unit_tensors
from fedblocks.protocol.messages import ClientKey
from fedblocks.protocol.row_mask import RowMask
from fedblocks.protocol.tensors import FloatArray, State, TensorSlot, decode_tensor, delta_layout, read_row_mask

Float64s = NDArray[np.float64]


class OpenUpdate:
    """An accepted update whose tensors can be asked for."""

    def __init__(self, update: AcceptedUpdate, shape: Units) -> None:
        self.update = update
        layout = delta_layout(
            update.tensors,
            shape=shape,
            blocks=update.blocks,
            format=update.format,
            density=update.density,
            width=update.width,
        )
        self._slots: dict[tuple[int, str], TensorSlot] = {(slot.block, slot.spec.name): slot for slot in layout.slots}

    def change(self, unit: int, name: str) -> FloatArray | None:
        """Trained minus start of one tensor, in the shape that was trained, or whole where the client chose the rows;
        None if this update has not trained it.
        """
        slot = self._slots.get((unit, name))
        if slot is None:
            return None
        payload = slot.of(self.update.read_payload())
        decoded = decode_tensor(
            slot.spec, slot.rows_sent, payload, format=self.update.format, density=self.update.density
        )
        return decoded if isinstance(slot.spec, ChosenRows) else decoded.reshape(slot.spec.shape)

    def trained_rows(self, unit: int, name: str) -> RowMask:
        """Which rows of a matrix this update has trained: those it names, or all."""
        slot = self._slots[unit, name]
        if isinstance(slot.spec, ChosenRows):
            return read_row_mask(slot.spec, slot.of(self.update.read_payload()))
        return np.ones(slot.spec.shape[0], dtype=np.bool_)


def opened(updates: Sequence[AcceptedUpdate], shape: Units) -> list[OpenUpdate]:
    """The updates in ascending client key, each (client, attempt) once."""
    unique = {(update.client, update.attempt_id): update for update in updates}
    return [OpenUpdate(unique[key], shape) for key in sorted(unique)]


def example_weights(updates: Sequence[OpenUpdate]) -> list[float]:
    """w_k = n_k / sum n; they add up to 1."""
    total = sum(one.update.num_examples for one in updates)
    return [one.update.num_examples / total for one in updates]


def add_first(total: Float64s, values: FloatArray | Float64s, weight: float) -> None:
    """``total[first rows and columns] += weight · values``."""
    total[tuple(slice(size) for size in values.shape)] += values.astype(np.float64) * weight


def units_of(updates: Sequence[OpenUpdate]) -> list[int]:
    """The units that somebody trained, ascending."""
    return sorted({unit for one in updates for unit in one.update.blocks})


def mean_change(updates: Sequence[AcceptedUpdate], *, shape: Units) -> FoldResult:
    """``sum_k w_k (theta_k - theta)`` of every unit that somebody trained; what one has not trained counts as 0."""
    members = opened(updates, shape)
    weights = example_weights(members)
    aggregate = {unit: mean_of_unit(unit, members, weights, shape=shape) for unit in units_of(members)}
    return folded(aggregate, members, weights)


def mean_of_unit(
    unit: int, members: Sequence[OpenUpdate], weights: Sequence[float], *, shape: Units
) -> dict[str, FloatArray]:
    """``sum_k w_k (theta_k - theta)`` of one unit."""
    found: dict[str, FloatArray] = {}
    for spec in unit_tensors(shape, unit):
        total = np.zeros(spec.shape, dtype=np.float64)
        for one, weight in zip(members, weights, strict=True):
            change = one.change(unit, spec.name)
            if change is not None:
                add_first(total, change, weight)
        found[spec.name] = total.astype(np.float32)
    return found


def folded(aggregate: State, members: Sequence[OpenUpdate], weights: Sequence[float]) -> FoldResult:
    """The books of a fold that clips nothing and keeps no norms; every unit of ``aggregate`` is published whole."""
    share = {
        unit: math.fsum(w for one, w in zip(members, weights, strict=True) if unit in one.update.blocks)
        for unit in aggregate
    }
    by_client: dict[ClientKey, float] = {}
    for one, weight in zip(members, weights, strict=True):
        by_client[one.update.client] = by_client.get(one.update.client, 0.0) + weight
    segments: Mapping[int, tuple[float, ...]] = {unit: (part,) * len(WIDTHS) for unit, part in share.items()}
    return FoldResult(
        aggregate=aggregate,
        coverage=share,
        segment_coverage=segments,
        history={},
        weights=by_client,
        clipped=(),
    )
