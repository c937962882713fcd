"""How are steps and sums over a block's parameters taken? One launch for a tensor, or torch's own fused step."""

from __future__ import annotations

import torch
from torch import Tensor

from fedblocks.kernels import launches
from fedblocks.kernels.dispatch import Operation
from fedblocks.kernels.reference import adamw as reference


def _square_norm(value: Tensor) -> Tensor:
    """(2,) fp32: the sum of squares of the finite values of ``value`` (n,), and the number of the others."""
    wide = value.double()
    finite = torch.isfinite(wide)
    total = torch.where(finite, wide, 0.0).square().sum()
    return torch.stack((total, (~finite).sum().double())).float()


adamw_step_ = Operation("adamw_", launches.adamw_, reference.adamw_)
square_norm = Operation("square_norm", launches.square_norm, _square_norm)
