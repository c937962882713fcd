"""What do the output head and its two losses compute? Labelled rows only, chunk by chunk, gradient in the forward pass.

Both losses take hidden rows ``h`` (N, H) after the final norm and the head's matrix (V, H), and work in chunks of rows
so that the logits buffer stays within :data:`LOGITS_BYTES`. Where ``h`` (or the matrix) requires a gradient it is
computed in the same pass, times ``scale``; the backward pass only multiplies by the upstream number.

Numerics: the matrix product in the operands' dtype; maximum, exponential, sum and logarithm in fp32 (fp64 for fp64
input). Source: runtime.md 3, methods.md 5.1.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

LOGITS_BYTES: Final = 64 << 20
MIN_ROWS: Final = 256
TAIL_MIN: Final = 1e-6
"""A tail term with less teacher mass than this is dropped."""
LOG_TAIL_FLOOR: Final = -30.0


def _chunks(rows: int, vocab: int, element_size: int) -> list[tuple[int, int]]:
    size = max(MIN_ROWS, LOGITS_BYTES // (vocab * element_size))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _Gradients:
    """Collects dh and dW chunk by chunk, for those operands that want one."""

    def __init__(self, ctx: Any, h: Tensor, weight: Tensor) -> None:
        self._h, self._weight = h, weight
        self.dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        self.dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None

    @property
    def wanted(self) -> bool:
        return self.dh is not None or self.dw is not None

    def add(self, start: int, stop: int, d_logits: Tensor) -> None:
        d_logits = d_logits.to(self._h.dtype)
        if self.dh is not None:
            torch.mm(d_logits, self._weight, out=self.dh[start:stop])
        if self.dw is not None:
            self.dw.addmm_(d_logits.T, self._h[start:stop])

    def save(self, ctx: Any) -> None:
        ctx.gradients = (self.dh, self.dw)


def _times(gradients: tuple[Tensor | None, Tensor | None], upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    dh, dw = gradients
    return (None if dh is None else dh * upstream, None if dw is None else dw * upstream)


class LinearCrossEntropy(torch.autograd.Function):
    """``scale · sum of -log softmax(h Wᵀ)[target]`` over rows: a scalar."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, target: Tensor, scale: float) -> Tensor:
        gradients = _Gradients(ctx, h, weight)
        total = h.new_zeros((), dtype=torch.float64 if h.dtype == torch.float64 else torch.float32)
        for start, stop in _chunks(len(h), len(weight), h.element_size()):
            logp = torch.log_softmax(_wide(h[start:stop] @ weight.T), dim=-1)  # (R, V)
            t = target[start:stop].unsqueeze(1)
            total -= logp.gather(1, t).sum()
            if gradients.wanted:
                d_logits = logp.exp_()
                d_logits.scatter_add_(1, t, torch.full_like(t, -1, dtype=d_logits.dtype))
                gradients.add(start, stop, d_logits.mul_(scale))
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
        gradients = _Gradients(ctx, h, weight)
        total = h.new_zeros((), dtype=torch.float64 if h.dtype == torch.float64 else torch.float32)
        for start, stop in _chunks(len(h), len(weight), h.element_size()):
            logq = torch.log_softmax(_wide(h[start:stop] @ weight.T), dim=-1)  # (R, V)
            top, log_p = ids[start:stop], logp[start:stop].to(logq.dtype)
            p = log_p.exp()  # (R, K)
            log_q = logq.gather(1, top)
            log_p_tail = log_tail[start:stop].to(logq.dtype)
            p_tail = log_p_tail.exp()
            log_q_tail = _log_rest(logq, top)
            kept = p_tail >= TAIL_MIN
            tail = p_tail * (log_p_tail - log_q_tail.clamp(min=LOG_TAIL_FLOOR))
            total += (p * (log_p - log_q)).sum() + torch.where(kept, tail, 0.0).sum()
            if gradients.wanted:
                # In the top dz_j = q_j·mass - p_j, elsewhere dz_j = q_j·(mass - counted/q_tail); mass is the top's plus
                # what is counted of the tail: nothing where its term is dropped or lies at the floor.
                counted = torch.where(kept & (log_q_tail > LOG_TAIL_FLOOR), p_tail, 0.0)
                mass = p.sum(dim=1) + counted
                outside = mass - counted * torch.exp(-log_q_tail.clamp(min=LOG_TAIL_FLOOR))
                q = logq.exp_()
                inside = q.gather(1, top) * mass.unsqueeze(1) - p
                d_logits = q.mul_(outside.unsqueeze(1)).scatter_(1, top, inside)
                gradients.add(start, stop, d_logits.mul_(scale))
        gradients.save(ctx)
        return total * scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        return *_times(ctx.gradients, upstream), None, None, None, None


def _log_rest(log_q: Tensor, top: Tensor) -> Tensor:
    """Log of the mass outside ``top``, (R,); -inf where nothing is outside.

    Summed over the rest itself: one minus the mass of the top loses a small rest to rounding, and with it the bound
    KL_K ≤ KL.
    """
    return torch.logsumexp(log_q.scatter(1, top, -torch.inf), dim=1)


@torch.no_grad()
def top_k(h: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's record of each row: ids (N, K) int64, log-probabilities (N, K) and log tail (N,), fp32.

    K is capped at V; the tail of a complete record is -inf.
    """
    k = min(k, len(weight))
    ids = torch.empty(len(h), k, dtype=torch.int64, device=h.device)
    logp = torch.empty(len(h), k, dtype=torch.float32, device=h.device)
    tail = torch.empty(len(h), dtype=torch.float32, device=h.device)
    for start, stop in _chunks(len(h), len(weight), h.element_size()):
        every = torch.log_softmax(_wide(h[start:stop] @ weight.T), dim=-1)
        values, ids[start:stop] = every.topk(k, dim=1)
        logp[start:stop] = values
        tail[start:stop] = _log_rest(every, ids[start:stop])
    return ids, logp, tail
