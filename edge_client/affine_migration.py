"""With which values does a block begin whose layer normalises after the sum? The norm before it moves into it.

A post-norm layer ends in ``y = gamma·n + beta`` with n of mean 0 and variance 1, and a norm with (1, 0) maps n to
itself. So the layer below the slot emits n (its norm becomes (1, 0): :func:`normalised_layers`), and the block

* reads n with the projections of its source layer, which have absorbed the norm before them:
  ``W <- W·diag(gamma)``, ``b <- b + W·beta`` with the original W;
* does the same between its attention and its dense half, whose norm is (1, 0) too;
* adds nothing at first, its output projections being zero;
* ends in (gamma, beta), if it is the topmost of its slot, else in (1, 0).

Its output is then ``gamma·LN(LN(n)) + beta = y``: the function of the base, to rounding.
All blocks of a slot are copies of the same source layer and read what that layer emitted.
Source: methods.md 2.6 (ours).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedblocks.edge_client.checkpoint import Checkpoint
    from fedblocks.protocol.expansion import ExpansionPlan

OUTPUT_NORM: Final = "output.LayerNorm"
ATTENTION_NORM: Final = "attention.output.LayerNorm"
_READS_INPUT: Final = ("attention.self.query", "attention.self.key", "attention.self.value")
_READS_ATTENTION: Final = "intermediate.dense"


def normalised_layers(plan: ExpansionPlan) -> frozenset[int]:
    """Base layers whose output norm is (1, 0) in the grown model: those with a block in the slot after them."""
    return frozenset(plan.slots()) if plan.shape.encoder else frozenset()


def plain_norm(kind: str, like: Tensor) -> Tensor:
    """The (1, 0) norm's ``weight`` or ``bias``."""
    return torch.ones_like(like) if kind == "weight" else torch.zeros_like(like)


def migrated(checkpoint: Checkpoint, plan: ExpansionPlan, block_id: int, name: str) -> Tensor:
    """The initial value of a tensor of a block, the out-tensors excepted: fp32, in memory of its own.

    The sums are exact and rounded once, so that every machine has the same bits whatever its threads.
    """
    block = plan.block(block_id)
    module, kind = name.rsplit(".", 1)

    def stored(layer: int, suffix: str) -> Tensor:
        return checkpoint.tensor(checkpoint.layer_name(layer, suffix)).to(torch.float32)

    if module == OUTPUT_NORM:
        value = stored(block.after_layer, name)
        return value if plan.slots()[block.after_layer][-1] == block_id else plain_norm(kind, value)
    if module == ATTENTION_NORM:
        return plain_norm(kind, stored(block.source_layer, name))
    if module in _READS_INPUT:
        layer, norm = block.after_layer, OUTPUT_NORM
    elif module == _READS_ATTENTION:
        layer, norm = block.source_layer, ATTENTION_NORM
    else:
        raise ValueError(f"{name} is no tensor of a post-norm block that starts with a value of the base")
    if kind == "weight":
        return stored(block.source_layer, name) * stored(layer, f"{norm}.weight")
    key = (layer, f"{block.source_layer}.{name}")
    if key not in checkpoint.absorbed:
        weight, beta = stored(block.source_layer, f"{module}.weight"), stored(layer, f"{norm}.bias")
        products = weight.double() * beta.double()  # exact: 24 + 24 bits
        bias = stored(block.source_layer, name).double().tolist()
        sums = [math.fsum([own, *row]) for own, row in zip(bias, products.tolist(), strict=True)]
        checkpoint.absorbed[key] = torch.tensor(sums, dtype=torch.float64).to(torch.float32)
    return checkpoint.absorbed[key].clone()
