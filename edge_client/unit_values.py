"""Which value does a tensor of a unit start from? Expanded block, low-rank pair, base tensor or extra set, in fp32.

The published value is this initial value plus the accumulated change, one addition (methods.md 2.4); where pairs are
merged the change is that of the weights themselves, and the pairs start anew.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_never

from fedblocks.edge_client.checkpoint import Checkpoint, initial_tensor
from fedblocks.profiles.model_shape import TensorSpec
from fedblocks.profiles.units import EXTRA_UNIT, BaseTensors, ExpandedBlocks, LowRankPairs, MergedLinears
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.initial_pairs import initial_pair_tensor


def initial_value(checkpoint: Checkpoint, plan: ExpansionPlan, unit: int, spec: TensorSpec, version: int = 0) -> Tensor:
    """A new fp32 tensor on the CPU.

    Args:
        spec: of the whole unit.
        version: the published state that a task starts from; only merged pairs depend on it.
    """
    if unit == EXTRA_UNIT and plan.extra is not None:
        return torch.zeros(spec.shape)
    match plan.trainable:
        case ExpandedBlocks():
            return initial_tensor(checkpoint, plan, unit, spec)
        case LowRankPairs():
            return torch.from_numpy(initial_pair_tensor(plan.trainable, unit, spec, version=version))
        case BaseTensors() | MergedLinears():
            name = base_name(checkpoint, unit, spec.name)
        case _:
            assert_never(plan.trainable)
    return checkpoint.tensor(name).to(torch.float32)


def base_name(checkpoint: Checkpoint, unit: int, name: str) -> str:
    """What the checkpoint calls a tensor of a base layer, or of the tables that come after the last one."""
    return name if unit >= checkpoint.shape.num_layers else checkpoint.layer_name(unit, name)
