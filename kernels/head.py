"""What do the output head and its two losses compute? Labelled rows only, chunk by chunk, gradient in the forward pass.

Both losses take hidden rows ``h`` (N, H) after the final norm and the head's matrix (V, H). Rows go through in chunks
whose logits fit :data:`LOGITS_BYTES`; one buffer of that size serves all of them, and where a gradient is wanted it is
made in the place of the logits. So no tensor of N x V elements ever exists. The backward pass only multiplies ``dh``
(and ``dW`` where the matrix trains) by the upstream number.

Numerics: the matrix products in the operands' dtype; what is between them is ``reference/head.py``'s or a device
kernel's; d_logits is rounded once to the operands' dtype, and ``scale`` multiplies dh. Source: runtime.md 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fedblocks.kernels import launches
from fedblocks.kernels.dispatch import Operation
from fedblocks.kernels.reference import head as reference

LOGITS_BYTES: Final = 64 << 20
MIN_ROWS: Final = 256
"""A chunk is not cut smaller than this, however wide the vocabulary: the matrix products would starve."""
ROW_MULTIPLE: Final = 32
"""Chunks of 341 rows were 10 to 30 % slower per row in both matrix products than chunks of 256 or 512."""

cross_entropy_ = Operation("cross_entropy_", launches.cross_entropy_, reference.cross_entropy_)
kl_topk_ = Operation("kl_topk_", launches.kl_topk_, reference.kl_topk_)


def chunk_rows(rows: int, vocab: int, element_size: int) -> int:
    """Rows of a chunk: as even as the byte budget allows, so that the last chunk is not a rest."""
    most = min(max(LOGITS_BYTES // (vocab * element_size), MIN_ROWS), rows)
    if most == 0:
        return 0
    even = -(-rows // -(-rows // most))
    return min(-(-even // ROW_MULTIPLE) * ROW_MULTIPLE, most)


class _Logits:
    """The one buffer (R, V)."""

    def __init__(self, h: Tensor, weight: Tensor) -> None:
        self._h, self._weight = h, weight
        self._rows = chunk_rows(len(h), len(weight), h.element_size())
        self._buffer = h.new_empty(self._rows, len(weight))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their logits); each is overwritten by the next."""
        for start in range(0, len(self._h), self._rows or 1):
            rows = slice(start, min(start + self._rows, len(self._h)))
            logits = self._buffer[: rows.stop - start]
            torch.mm(self._h[rows], self._weight.T, out=logits)
            yield rows, logits


class _Gradients:
    """Collects dh and dW chunk by chunk, for those operands that want one."""

    def __init__(self, h: Tensor, weight: Tensor, scale: float, wanted: Sequence[bool]) -> None:
        self._h, self._weight, self._scale = h, weight, scale
        self.dh = torch.empty_like(h) if wanted[0] else None
        self.dw = torch.zeros_like(weight) if wanted[1] else None

    @property
    def wanted(self) -> bool:
        return self.dh is not None or self.dw is not None

    def add(self, rows: slice, d_logits: Tensor) -> None:
        if self.dh is not None:
            dh = self.dh[rows]
            torch.mm(d_logits, self._weight, out=dh)
            dh.mul_(self._scale)
        if self.dw is not None:
            self.dw.addmm_(d_logits.T, self._h[rows], alpha=self._scale)

    def times(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return tuple(None if gradient is None else gradient * upstream for gradient in (self.dh, self.dw))


def _loss(
    h: Tensor,
    weight: Tensor,
    scale: float,
    wanted: Sequence[bool],
    of_chunk: Callable[[Tensor, slice, bool], Tensor],
) -> tuple[Tensor, _Gradients]:
    """``scale`` times the sum over rows, and the gradients that are wanted.

    Args:
        wanted: of h, of the matrix.
        of_chunk: (logits, rows, gradient) -> the rows' losses; with ``gradient`` the logits become their gradient.
    """
    gradients = _Gradients(h, weight, scale, wanted)
    total = h.new_zeros((), dtype=reference.wide_dtype(h.dtype))
    for rows, logits in _Logits(h, weight).chunks():
        total += of_chunk(logits, rows, gradients.wanted).sum()
        if gradients.wanted:
            gradients.add(rows, logits)
    return total * scale, gradients


def _cross_entropy(
    h: Tensor, weight: Tensor, target: Tensor, scale: float, wanted: Sequence[bool]
) -> tuple[Tensor, _Gradients]:
    return _loss(h, weight, scale, wanted, lambda z, rows, grad: cross_entropy_(z, target[rows], gradient=grad))


def _kl_topk(
    h: Tensor, weight: Tensor, ids: Tensor, logp: Tensor, log_tail: Tensor, scale: float, wanted: Sequence[bool]
) -> tuple[Tensor, _Gradients]:
    return _loss(
        h,
        weight,
        scale,
        wanted,
        lambda z, rows, grad: kl_topk_(z, ids[rows], logp[rows], log_tail[rows], gradient=grad),
    )


class LinearCrossEntropy(torch.autograd.Function):
    """``scale · sum of -log softmax(h Wᵀ)[target]`` over rows: a scalar."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, target: Tensor, scale: float) -> Tensor:
        total, ctx.gradients = _cross_entropy(h, weight, target, scale, ctx.needs_input_grad[:2])
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return *ctx.gradients.times(upstream), None, None


class LinearKlTopK(torch.autograd.Function):
    """``scale · sum over rows of KL_K(p || q)``: top-K terms and the tail as one outcome (methods.md 5.1)."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, ids: Tensor, logp: Tensor, log_tail: Tensor, scale: float
    ) -> Tensor:
        total, ctx.gradients = _kl_topk(h, weight, ids, logp, log_tail, scale, ctx.needs_input_grad[:2])
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        return *ctx.gradients.times(upstream), None, None, None, None


@torch.no_grad()
def cross_entropy_with_gradient(h: Tensor, weight: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The loss of :class:`LinearCrossEntropy` and dh (N, H); no gradient of the matrix."""
    total, gradients = _cross_entropy(h, weight, target, scale, (True, False))
    assert gradients.dh is not None
    return total, gradients.dh


@torch.no_grad()
def kl_topk_with_gradient(
    h: Tensor, weight: Tensor, ids: Tensor, logp: Tensor, log_tail: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The loss of :class:`LinearKlTopK` and dh (N, H); no gradient of the matrix."""
    total, gradients = _kl_topk(h, weight, ids, logp, log_tail, scale, (True, False))
    assert gradients.dh is not None
    return total, gradients.dh


@torch.no_grad()
def top_k(h: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's record of each row: ids (N, K) int64, log-probabilities (N, K) and log tail (N,), fp32.

    K is capped at V; the tail of a complete record is -inf.
    """
    k = min(k, len(weight))
    ids = torch.empty(len(h), k, dtype=torch.int64, device=h.device)
    logp = torch.empty(len(h), k, dtype=torch.float32, device=h.device)
    tail = torch.empty(len(h), dtype=torch.float32, device=h.device)
    for rows, logits in _Logits(h, weight).chunks():
        reference.top_k_(logits, ids[rows], logp[rows], tail[rows])
    return ids, logp, tail
