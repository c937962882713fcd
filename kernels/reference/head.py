"""What do the output head and its two losses compute? Labelled rows only, chunk by chunk, gradient in the forward pass.

Both losses take hidden rows ``h`` (N, H) after the final norm and the head's matrix (V, H). Rows go through in chunks
whose logits fit :data:`LOGITS_BYTES`; one buffer of that size serves all of them, and where a gradient is wanted it is
made in the place of the logits. So no tensor of N x V elements ever exists. The backward pass only multiplies ``dh``
(and ``dW`` where the matrix trains) by the upstream number.

Numerics: the matrix products in the operands' dtype; maximum, exponential, sum and logarithm in fp32 (fp64 for fp64
input), for which narrower logits are widened a few rows at a time; d_logits is rounded once to the operands' dtype, and
``scale`` multiplies dh. Source: runtime.md 3, methods.md 5.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

LOGITS_BYTES: Final = 64 << 20
MIN_ROWS: Final = 256
"""A chunk is not cut smaller than this, however wide the vocabulary: the matrix products would starve."""
ROW_MULTIPLE: Final = 32
"""Chunks of 341 rows were 10 to 30 % slower per row in both matrix products than chunks of 256 or 512."""
PIECE_BYTES: Final = 4 << 20
"""Rows whose statistics are taken at once: few enough to stay in a CPU's cache."""
TAIL_MIN: Final = 1e-6
"""A tail term with less teacher mass than this is dropped."""
LOG_TAIL_FLOOR: Final = -30.0

_softmax_out = torch.ops.aten._softmax.out  # noqa: SLF001 - the public functions take no ``out``
_log_softmax_out = torch.ops.aten._log_softmax.out  # noqa: SLF001


def chunk_rows(rows: int, vocab: int, element_size: int) -> int:
    """Rows of a chunk: as even as the byte budget allows, so that the last chunk is not a rest."""
    most = min(max(LOGITS_BYTES // (vocab * element_size), MIN_ROWS), rows)
    if most == 0:
        return 0
    even = -(-rows // -(-rows // most))
    return min(-(-even // ROW_MULTIPLE) * ROW_MULTIPLE, most)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Logits:
    """The one buffer (R, V), and what is widened of it at a time."""

    def __init__(self, h: Tensor, weight: Tensor) -> None:
        self._h, self._weight = h, weight
        self._rows = chunk_rows(len(h), len(weight), h.element_size())
        self._wide = _wide_dtype(h.dtype)
        self._piece_rows = max(1, PIECE_BYTES // (len(weight) * self._wide.itemsize))
        self._buffer = h.new_empty(self._rows, len(weight))
        widened = min(self._piece_rows, self._rows) if self._wide != h.dtype else 0
        self._scratch = h.new_empty(widened, len(weight), dtype=self._wide)

    def chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, logits (stop - start, V)); each is overwritten by the next."""
        for start in range(0, len(self._h), self._rows or 1):
            stop = min(start + self._rows, len(self._h))
            logits = self._buffer[: stop - start]
            torch.mm(self._h[start:stop], self._weight.T, out=logits)
            yield start, stop, logits

    def pieces(self, logits: Tensor, *, write_back: bool) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows in wide numbers) of a chunk; what is made of them returns to the chunk if asked for."""
        for start in range(0, len(logits), self._piece_rows):
            stop = min(start + self._piece_rows, len(logits))
            rows = logits[start:stop]
            if self._wide == logits.dtype:
                yield start, stop, rows
            else:
                wide = self._scratch[: stop - start].copy_(rows)
                yield start, stop, wide
                if write_back:
                    rows.copy_(wide)


class _Gradients:
    """Collects dh and dW chunk by chunk, for those operands that want one."""

    def __init__(self, ctx: Any, h: Tensor, weight: Tensor, scale: float) -> None:
        self._h, self._weight, self._scale = h, weight, scale
        self.dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        self.dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None

    @property
    def wanted(self) -> bool:
        return self.dh is not None or self.dw is not None

    def add(self, start: int, stop: int, d_logits: Tensor) -> None:
        if self.dh is not None:
            dh = self.dh[start:stop]
            torch.mm(d_logits, self._weight, out=dh)
            dh.mul_(self._scale)
        if self.dw is not None:
            self.dw.addmm_(d_logits.T, self._h[start:stop], alpha=self._scale)

    def save(self, ctx: Any) -> None:
        ctx.gradients = (self.dh, self.dw)


def _times(gradients: tuple[Tensor | None, Tensor | None], upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    dh, dw = gradients
    return (None if dh is None else dh * upstream, None if dw is None else dw * upstream)


def _softmax_(z: Tensor) -> Tensor:
    """Turns logits (R, V) into probabilities in place; returns log of the sum of exponentials, (R, 1)."""
    highest = z.amax(dim=1, keepdim=True)
    _softmax_out(z, 1, False, out=z)
    # The highest probability is 1 / sum of exp(z - highest), which is never small enough to lose digits.
    return highest.sub_(z.amax(dim=1, keepdim=True).log_())


class LinearCrossEntropy(torch.autograd.Function):
    """``scale · sum of -log softmax(h Wᵀ)[target]`` over rows: a scalar."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, target: Tensor, scale: float) -> Tensor:
        gradients = _Gradients(ctx, h, weight, scale)
        total = h.new_zeros((), dtype=_wide_dtype(h.dtype))
        logits = _Logits(h, weight)
        for start, stop, chunk in logits.chunks():
            targets = target[start:stop].unsqueeze(1)  # (R, 1)
            for first, last, z in logits.pieces(chunk, write_back=gradients.wanted):
                t = targets[first:last]
                if gradients.wanted:
                    z_t = z.gather(1, t)
                    total += (_softmax_(z) - z_t).sum()
                    z.scatter_add_(1, t, torch.full_like(z_t, -1))
                else:
                    total -= _log_softmax_out(z, 1, False, out=z).gather(1, t).sum()
            if gradients.wanted:
                gradients.add(start, stop, chunk)
        gradients.save(ctx)
        return total * scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return *_times(ctx.gradients, upstream), None, None


class LinearKlTopK(torch.autograd.Function):
    """``scale · sum over rows of KL_K(p || q)``: top-K terms and the tail as one outcome (methods.md 5.1)."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, ids: Tensor, logp: Tensor, log_tail: Tensor, scale: float
    ) -> Tensor:
        gradients = _Gradients(ctx, h, weight, scale)
        total = h.new_zeros((), dtype=_wide_dtype(h.dtype))
        logits = _Logits(h, weight)
        for start, stop, chunk in logits.chunks():
            for first, last, z in logits.pieces(chunk, write_back=gradients.wanted):
                record = slice(start + first, start + last)
                top, log_p = ids[record], logp[record].to(z.dtype)
                p = log_p.exp()  # (R, K)
                log_q = z.gather(1, top).sub_(_softmax_(z))
                q_top = z.gather(1, top)
                # Summed over the rest itself: one minus the mass of the top loses a small rest to rounding, and with it
                # the bound KL_K ≤ KL.
                log_q_tail = z.scatter_(1, top, 0.0).sum(dim=1).log_()  # (R,)
                log_p_tail = log_tail[record].to(z.dtype)
                p_tail = log_p_tail.exp()
                kept = p_tail >= TAIL_MIN
                tail = p_tail * (log_p_tail - log_q_tail.clamp(min=LOG_TAIL_FLOOR))
                total += (p * (log_p - log_q)).sum() + torch.where(kept, tail, 0.0).sum()
                if gradients.wanted:
                    # In the top dz_j = q_j·mass - p_j, elsewhere dz_j = q_j·(mass - counted/q_tail); mass is the top's
                    # plus what is counted of the tail: nothing where its term is dropped or lies at the floor.
                    counted = torch.where(kept & (log_q_tail > LOG_TAIL_FLOOR), p_tail, 0.0)
                    mass = p.sum(dim=1) + counted
                    outside = mass - counted * torch.exp(-log_q_tail.clamp(min=LOG_TAIL_FLOOR))
                    inside = q_top.mul_(mass.unsqueeze(1)).sub_(p)
                    z.mul_(outside.unsqueeze(1)).scatter_(1, top, inside)
            if gradients.wanted:
                gradients.add(start, stop, chunk)
        gradients.save(ctx)
        return total * scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        return *_times(ctx.gradients, upstream), None, None, None, None


@torch.no_grad()
def top_k(h: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's record of each row: ids (N, K) int64, log-probabilities (N, K) and log tail (N,), fp32.

    K is capped at V; the tail of a complete record is -inf.
    """
    k = min(k, len(weight))
    ids = torch.empty(len(h), k, dtype=torch.int64, device=h.device)
    logp = torch.empty(len(h), k, dtype=torch.float32, device=h.device)
    tail = torch.empty(len(h), dtype=torch.float32, device=h.device)
    logits = _Logits(h, weight)
    for start, _, chunk in logits.chunks():
        for first, last, z in logits.pieces(chunk, write_back=False):
            record = slice(start + first, start + last)
            _log_softmax_out(z, 1, False, out=z)
            logp[record], ids[record] = z.topk(k, dim=1)
            tail[record] = z.scatter_(1, ids[record], -torch.inf).logsumexp(dim=1)
    return ids, logp, tail
