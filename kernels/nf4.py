"""How are NF4 weights decoded and multiplied by? Decoded into a buffer for one product, or tile by tile inside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedblocks.kernels import launches
from fedblocks.kernels.dispatch import DISPATCHER, Operation
from fedblocks.kernels.reference import nf4 as reference
from fedblocks.kernels.reference.nf4 import Nf4Weight

nf4_dequant = Operation("nf4_dequant", launches.nf4_dequant, reference.nf4_dequant)
nf4_linear = Operation("nf4_linear", launches.nf4_linear, reference.nf4_linear)
nf4_linear_dgrad = Operation("nf4_linear_dgrad", launches.nf4_linear_dgrad, reference.nf4_linear_dgrad)


def decoded(parts: tuple[Nf4Weight, ...], dtype: torch.dtype) -> Tensor:
    """The decoded parts below each other: (sum of N_i, K)."""
    rows = [part.shape[0] for part in parts]
    weight = torch.empty(sum(rows), parts[0].shape[1], dtype=dtype, device=parts[0].packed.device)
    for part, place in zip(parts, weight.split(rows), strict=True):
        nf4_dequant(*part.buffers, part.offset, place)
    return weight


def matmul(x: Tensor, parts: tuple[Nf4Weight, ...], bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias`` of x (..., K), outside autograd."""
    if DISPATCHER.rungs("nf4_linear", x):
        y = nf4_linear(x.flatten(0, -2).contiguous(), parts).view(*x.shape[:-1], -1)
        return y if bias is None else y.add_(bias)
    return torch.nn.functional.linear(x, decoded(parts, x.dtype), bias)


def matmul_dgrad(dy: Tensor, parts: tuple[Nf4Weight, ...]) -> Tensor:
    """``dy W`` of dy (..., N), outside autograd."""
    if DISPATCHER.rungs("nf4_linear_dgrad", dy):
        return nf4_linear_dgrad(dy.flatten(0, -2).contiguous(), parts).view(*dy.shape[:-1], -1)
    return dy @ decoded(parts, dy.dtype)


class FrozenNf4Linear(torch.autograd.Function):
    """``y = x Wᵀ + bias``; W is decoded for each pass and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, parts: tuple[Nf4Weight, ...]) -> Tensor:
        ctx.parts = parts
        return matmul(x, parts, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = matmul_dgrad(dy, ctx.parts) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None
