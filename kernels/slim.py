"""How does a matrix take part in autograd of which only a slice trains? Read whole; its gradient is made for the slice.

The whole matrix holds the slice's values; a leaf of the slice's size stands for them in the graph. So nothing of the
whole matrix's size is made in the backward pass, and of the input only the columns are kept that the slice reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

Ranges = tuple[tuple[int, int], ...]
"""(start, stop) each, ascending and apart."""


class SlimLinear(torch.autograd.Function):
    """``y = x Wᵀ + bias``, with gradients for x, for a slice of W and for a slice of the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        leaf: Tensor,
        bias_leaf: Tensor | None,
        whole: Tensor,
        bias: Tensor | None,
        rows: Ranges | None,
    ) -> Tensor:
        kept = x if rows is not None else x[..., : leaf.shape[1]].contiguous()
        ctx.save_for_backward(kept, leaf, bias_leaf, whole)
        ctx.rows = rows
        return linear(x, whole, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, leaf, bias_leaf, whole = ctx.saved_tensors
        need_x, need_leaf, need_bias = ctx.needs_input_grad[:3]
        dx = dy @ whole if need_x else None
        dy = dy.reshape(-1, dy.shape[-1])  # (T, N)
        ranges = ((0, dy.shape[1]),) if ctx.rows is None else ctx.rows
        d_leaf = d_bias = None
        if need_leaf:
            d_leaf = dy.new_empty(leaf.shape)
            kept = kept.reshape(-1, kept.shape[-1])
            for (start, stop), place in zip(ranges, d_leaf.split([b - a for a, b in ranges]), strict=True):
                torch.mm(dy[:, start:stop].T, kept, out=place)
            d_leaf = d_leaf.to(leaf.dtype)
        if need_bias and bias_leaf is not None:
            d_bias = torch.cat([dy[:, start:stop].sum(0) for start, stop in ranges]).to(bias_leaf.dtype)
        return dx, d_leaf, d_bias, None, None, None
