"""What do the two losses of the output head make of a chunk of logits? The rows' losses, and in place their gradient.

Plain torch, any float dtype. Maximum, exponential, sum and logarithm are taken in fp32 (fp64 for fp64 logits), for
which narrower logits are widened a few rows at a time. This is the specification of the device kernels, and what runs
where there is none. Source: runtime.md 3, methods.md 5.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

PIECE_BYTES: Final = 4 << 20
"""Rows whose statistics are taken at once: few enough to stay in a CPU's cache."""
TAIL_MIN: Final = 1e-6
"""A tail term with less teacher mass than this is dropped."""
LOG_TAIL_FLOOR: Final = -30.0

_softmax_out = torch.ops.aten._softmax.out  # noqa: SLF001 - the public functions take no ``out``
_log_softmax_out = torch.ops.aten._log_softmax.out  # noqa: SLF001


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics of ``dtype`` are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pieces(logits: Tensor, *, write_back: bool) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits in wide numbers); what is made of them returns to ``logits`` if asked for."""
    wide_type = wide_dtype(logits.dtype)
    num_rows = max(1, PIECE_BYTES // (logits.shape[1] * wide_type.itemsize))
    narrow = wide_type != logits.dtype
    scratch = logits.new_empty(min(num_rows, len(logits)) if narrow else 0, logits.shape[1], dtype=wide_type)
    for start in range(0, len(logits), num_rows):
        rows = slice(start, min(start + num_rows, len(logits)))
        if narrow:
            wide = scratch[: rows.stop - start].copy_(logits[rows])
            yield rows, wide
            if write_back:
                logits[rows].copy_(wide)
        else:
            yield rows, logits[rows]


def _softmax_(z: Tensor) -> Tensor:
    """Turns logits (R, V) into probabilities in place; returns log of the sum of exponentials, (R, 1)."""
    highest = z.amax(dim=1, keepdim=True)
    _softmax_out(z, 1, False, out=z)
    # The highest probability is 1 / sum of exp(z - highest), which is never small enough to lose digits.
    return highest.sub_(z.amax(dim=1, keepdim=True).log_())


def cross_entropy_(logits: Tensor, target: Tensor, *, gradient: bool) -> Tensor:
    """``-log softmax(logits)[target]`` of each row (R,), in wide numbers.

    The logits (R, V) become ``softmax - onehot`` if ``gradient``; else they are spoilt.
    """
    loss = logits.new_empty(len(logits), dtype=wide_dtype(logits.dtype))
    for rows, z in _pieces(logits, write_back=gradient):
        t = target[rows].unsqueeze(1)  # (r, 1)
        if gradient:
            z_t = z.gather(1, t)
            torch.sub(_softmax_(z).squeeze(1), z_t.squeeze(1), out=loss[rows])
            z.scatter_add_(1, t, torch.full_like(z_t, -1))
        else:
            torch.neg(_log_softmax_out(z, 1, False, out=z).gather(1, t).squeeze(1), out=loss[rows])
    return loss


def kl_topk_(logits: Tensor, ids: Tensor, logp: Tensor, log_tail: Tensor, *, gradient: bool) -> Tensor:
    """``KL_K(p || q)`` of each row (R,), in wide numbers: top-K terms and the tail as one outcome.

    The logits (R, V) of q become the gradient if ``gradient``; else they are spoilt.

    Args:
        ids: (R, K) int64, the teacher's top.
        logp: (R, K) fp32, their log-probabilities.
        log_tail: (R,) fp32, log of the mass outside.
    """
    kl = logits.new_empty(len(logits), dtype=wide_dtype(logits.dtype))
    for rows, z in _pieces(logits, write_back=gradient):
        top, log_p = ids[rows], logp[rows].to(z.dtype)
        p = log_p.exp()  # (r, K)
        log_q = z.gather(1, top).sub_(_softmax_(z))
        q_top = z.gather(1, top)
        # Summed over the rest itself: one minus the mass of the top loses a small rest to rounding, and with it the
        # bound KL_K ≤ KL.
        log_q_tail = z.scatter_(1, top, 0.0).sum(dim=1).log_()  # (r,)
        log_p_tail = log_tail[rows].to(z.dtype)
        p_tail = log_p_tail.exp()
        kept = p_tail >= TAIL_MIN
        tail = p_tail * (log_p_tail - log_q_tail.clamp(min=LOG_TAIL_FLOOR))
        torch.add((p * (log_p - log_q)).sum(dim=1), torch.where(kept, tail, 0.0), out=kl[rows])
        if gradient:
            # In the top dz_j = q_j·mass - p_j, elsewhere dz_j = q_j·(mass - counted/q_tail); mass is the top's plus
            # what is counted of the tail: nothing where its term is dropped or lies at the floor.
            counted = torch.where(kept & (log_q_tail > LOG_TAIL_FLOOR), p_tail, 0.0)
            mass = p.sum(dim=1) + counted
            outside = mass - counted * torch.exp(-log_q_tail.clamp(min=LOG_TAIL_FLOOR))
            inside = q_top.mul_(mass.unsqueeze(1)).sub_(p)
            z.mul_(outside.unsqueeze(1)).scatter_(1, top, inside)
    return kl


def top_k_(logits: Tensor, ids: Tensor, logp: Tensor, log_tail: Tensor) -> None:
    """Writes each row's K highest: ids (R, K), their log-probabilities, and the log of the rest's mass (R,).

    The logits (R, V) are spoilt.
    """
    for rows, z in _pieces(logits, write_back=False):
        _log_softmax_out(z, 1, False, out=z)
        logp[rows], ids[rows] = z.topk(ids.shape[1], dim=1)
        log_tail[rows] = z.scatter_(1, ids[rows], -torch.inf).logsumexp(dim=1)
