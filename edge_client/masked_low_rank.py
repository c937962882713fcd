"""How does a client train a low-rank pair of which only some rows of B are its own, over a prior that stays frozen?

``y = base(x) + U (V x) + scale·B (A x)``. The rows of B are chosen before training (``protocol/row_mask.py``), and only
those are a leaf tensor: a row left out has no gradient, no moments and no memory, and is 0 whatever happens. A pair
lives for one round: B starts at 0 (methods.md 10.2; LoRA, Hu et al., 2106.09685), and A at the same draw in every
round, so that what rounds add lies in few directions and a prior of low rank leaves little out (docs/fedhft.md).

Scoring comes first: :meth:`MaskedLowRank.begin_scoring` puts a zero B of all rows in place, whose gradient
:meth:`MaskedLowRank.take_energy` turns into one number a row; :meth:`MaskedLowRank.train_rows` drops it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedblocks.protocol.row_mask import RowMask


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrozenPrior:
    """What the client's mixture of the clusters adds to one matrix: ``left @ right``."""

    left: npt.NDArray[np.float32]
    """U, (out, rank)"""
    right: npt.NDArray[np.float32]
    """V, (rank, in)"""


def first_factor(rank: int, num_in: int, seed: int) -> Tensor:
    """A, Gaussian of variance 1/rank, (rank, in) fp32; the same for a seed on every machine."""
    drawn = np.random.default_rng(seed).standard_normal((rank, num_in)) / math.sqrt(rank)
    return torch.from_numpy(drawn.astype(np.float32))


class MaskedLowRank(nn.Module):
    """A linear layer, its frozen prior, and a low-rank pair of which B has only the rows that train.

    Args:
        base: the frozen layer, (..., in) -> (..., out), of any precision.
        num_out, a: rows of the layer; A, (r, in), fp32.
        prior: None for the base itself.
        scale: sc = alpha/r.

    Raises:
        ValueError: a prior of another shape than the layer's.
    """

    def __init__(
        self, base: nn.Module, *, num_out: int, a: Tensor, prior: FrozenPrior | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        num_in = a.shape[1]
        if prior is not None and (prior.left.shape[0], prior.right.shape[1]) != (num_out, num_in):
            raise ValueError(
                f"a prior of shape {(prior.left.shape[0], prior.right.shape[1])} over a layer of shape "
                f"{(num_out, num_in)}: it belongs to another matrix or another base"
            )
        self.base = base.requires_grad_(False)
        self.num_out = num_out
        self.scale = scale
        self.a = nn.Parameter(a.clone(), requires_grad=False)
        self.b: nn.Parameter | None = None
        """The rows that train, (k, r); all rows while they are scored; None for the prior alone."""
        used = prior is not None and prior.left.any()
        self.register_buffer("left", torch.from_numpy(prior.left.copy()) if prior is not None and used else None)
        self.register_buffer("right", torch.from_numpy(prior.right.copy()) if prior is not None and used else None)
        self.register_buffer("rows", None)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, (..., out)."""
        y = self.base(x)  # (..., out)
        if self.left is not None:
            y = y + functional.linear(functional.linear(x, self.right), self.left)
        if self.b is None:
            return y
        change = functional.linear(functional.linear(x, self.a), self.b) * self.scale  # (..., k)
        return y + change if self.rows is None else y.index_add(-1, self.rows, change)

    def begin_scoring(self) -> None:
        """All rows of B are there, zero, and have a gradient; A has none."""
        self.a.requires_grad_(False)
        self.rows = None
        self.b = nn.Parameter(torch.zeros(self.num_out, self.a.shape[0], device=self.a.device))

    def take_energy(self) -> npt.NDArray[np.float32]:
        """|dL/dB[i,:]|² of the backward pass since the last call, (out,); forgets the gradient.

        Raises:
            RuntimeError: no backward pass reached B.
        """
        if self.b is None or self.b.grad is None:
            raise RuntimeError("there is no gradient of B: call begin_scoring() and run a backward pass first")
        energy = self.b.grad.square().sum(dim=1).cpu().numpy()
        self.b.grad = None
        return energy

    def train_rows(self, mask: RowMask) -> None:
        """From here on A and these rows of B train, from B = 0."""
        device = self.a.device
        # A mask of all rows needs no index: the plain sum is faster.
        self.rows = None if mask.all() else torch.from_numpy(np.flatnonzero(mask)).to(device)
        self.b = nn.Parameter(torch.zeros(int(mask.sum()), self.a.shape[0], device=device))
        self.a.requires_grad_(True)

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """The leaf tensors that train, by name; none before :meth:`train_rows`."""
        return {"a": self.a, "b": self.b} if self.b is not None and self.a.requires_grad else {}

    def whole_b(self) -> npt.NDArray[np.float32]:
        """B with all its rows, (out, r); those that do not train are exactly 0."""
        whole = np.zeros((self.num_out, self.a.shape[0]), dtype=np.float32)
        if self.b is not None:
            index = slice(None) if self.rows is None else self.rows.cpu().numpy()
            whole[index] = self.b.detach().cpu().numpy()
        return whole
