"""What are the base's own tensors once a run has changed them? Pairs merged, changes added, at a strength.

Source: methods.md 11.

    pairs          W + g·s·B A          s = alpha / r
    merged pairs   W + g·D              D = the sum of all stacks
    personal pairs W + g·U V            the client's, or the population's, prior
    base tensors   W + g·D              g = 0 is the base, 1 what was trained

Sums and products are made in fp64 and rounded once to the type that the checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor
from typing_extensions import assert_never

from fedblocks.edge_client.checkpoint import TORCH_DTYPE, Checkpoint
from fedblocks.edge_client.unit_values import base_name
from fedblocks.profiles.units import (
    EXTRA_UNIT,
    BaseTensors,
    ExpandedBlocks,
    LowRankPairs,
    MergedLinears,
    PersonalPairs,
    unit_tensors,
)
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.initial_pairs import initial_pair_tensor

State = Mapping[int, Mapping[str, np.ndarray]]


def changed_tensors(
    checkpoint: Checkpoint, plan: ExpansionPlan, state: State, strength: float
) -> dict[str, Callable[[], Tensor]]:
    """Name of each base tensor that the run has changed -> what makes it, in the stored type.

    Args:
        strength: g in [0, 1]; at 0 nothing has changed.

    Raises:
        ValueError: the strength is out of range, or the state is not one of this plan. The tensors' makers: a value
            does not fit the stored type.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, expected a number from 0 (the base) to 1 (as trained)")
    unknown = sorted(set(state) - set(plan.unit_ids))
    if unknown:
        raise ValueError(f"the state has units {unknown}, the plan only {list(plan.unit_ids)}")
    if strength == 0:
        return {}
    found: dict[str, Callable[[], Tensor]] = {}
    for unit, tensors in sorted(state.items()):
        if unit == EXTRA_UNIT:  # stands beside the base
            continue
        specs = unit_tensors(plan.units.held(), unit)
        odd = [s.name for s in specs if s.name in tensors and tensors[s.name].shape != s.shape]
        odd += sorted(set(tensors) - {spec.name for spec in specs})
        if odd:
            raise ValueError(f"unit {unit}: the state has tensors {odd}, which are not those of the plan")
        names = [spec.name for spec in specs if np.any(tensors.get(spec.name, 0))]
        match plan.trainable:
            case LowRankPairs(merged=False):
                for name in names:
                    if name.endswith(".lora_B"):
                        linear = name.removesuffix(".lora_B")
                        made = partial(_with_pair, plan.trainable, unit, linear, tensors, specs, strength)
                        weight = checkpoint.layer_name(unit, f"{linear}.weight")
                        found[weight] = partial(_rounded, checkpoint, weight, made)
            case LowRankPairs() | MergedLinears() | BaseTensors():
                for name in names:
                    stored = base_name(checkpoint, unit, name)
                    found[stored] = partial(_rounded, checkpoint, stored, partial(_scaled, tensors[name], strength))
            case ExpandedBlocks():
                raise ValueError("a run with expanded blocks changes no tensor of the base")
            case _:
                assert_never(plan.trainable)
    return found


def _scaled(delta: np.ndarray, strength: float) -> np.ndarray:
    return strength * delta.astype(np.float64)


def _with_pair(
    pairs: LowRankPairs,
    unit: int,
    linear: str,
    tensors: Mapping[str, np.ndarray],
    specs: tuple,
    strength: float,
) -> np.ndarray:
    """g·s·B A of one linear; of a prior g·B A."""
    by_name = {spec.name: spec for spec in specs}
    a_name, b_name = f"{linear}.lora_A", f"{linear}.lora_B"
    if isinstance(pairs, PersonalPairs):
        return strength * (tensors[b_name].astype(np.float64) @ tensors[a_name].astype(np.float64))
    a = initial_pair_tensor(pairs, unit, by_name[a_name])
    if a_name in tensors:
        a = a + tensors[a_name]
    return strength * pairs.scaling * (tensors[b_name].astype(np.float64) @ a.astype(np.float64))


def _rounded(checkpoint: Checkpoint, name: str, change: Callable[[], np.ndarray]) -> Tensor:
    """The stored tensor plus its change, in the stored type."""
    stored = checkpoint.tensor(name)
    dtype = checkpoint.stored[name].dtype
    value = (stored.double() + torch.from_numpy(change())).to(TORCH_DTYPE[dtype])
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} has values too large for the base's {dtype}; take a smaller strength")
    return value
