"""How does a GPU turn a chunk of logits into a loss and, in place, its gradient? One program a row (runtime.md 3)."""

import triton
import triton.language as tl


@triton.jit
def _normaliser(row, vocab, BLOCK: tl.constexpr):
    """Largest logit of a row and the sum of exp(z - largest), in one pass."""
    highest = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    for first in range(0, vocab, BLOCK):
        col = first + tl.arange(0, BLOCK)
        z = tl.load(row + col, mask=col < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(z, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), axis=0)
        highest = higher
    return highest, total


@triton.jit
def cross_entropy_(
    logits,  # (rows, vocab); becomes softmax - onehot if GRADIENT
    target,  # (rows,) int64 in 0..vocab-1
    loss,  # (rows,) fp32
    vocab,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * vocab
    label = tl.load(target + index)
    z_label = tl.load(row + label).to(tl.float32)
    highest, total = _normaliser(row, vocab, BLOCK)
    tl.store(loss + index, tl.log(total) + (highest - z_label))
    if GRADIENT:
        tl.debug_barrier()  # the label's logit has been read by all before anything is overwritten
        inverse = 1.0 / total
        for first in range(0, vocab, BLOCK):
            col = first + tl.arange(0, BLOCK)
            z = tl.load(row + col, mask=col < vocab, other=float("-inf")).to(tl.float32)
            d = tl.exp(z - highest) * inverse - tl.where(col == label, 1.0, 0.0)
            tl.store(row + col, d.to(logits.dtype.element_ty), mask=col < vocab)


@triton.jit
def kl_topk_(
    logits,  # (rows, vocab); spoilt, or the gradient if GRADIENT
    ids,  # (rows, num_top) int64
    logp,  # (rows, num_top) fp32
    log_tail,  # (rows,) fp32
    kl,  # (rows,) fp32
    vocab,
    num_top,
    tail_min,
    log_tail_floor,
    GRADIENT: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Top-K terms and the tail as one outcome (methods.md 5.1).

    The tail's mass is summed over the tail itself, since one minus the mass of the top would lose a small one to
    rounding: the top's logits are set to -inf in the buffer, so that the sum passes over them.
    """
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * vocab
    top = tl.arange(0, BLOCK_TOP)
    in_top = top < num_top
    column = tl.load(ids + index * num_top + top, mask=in_top, other=0)
    log_p = tl.load(logp + index * num_top + top, mask=in_top, other=float("-inf"))
    z_top = tl.load(row + column, mask=in_top, other=float("-inf")).to(tl.float32)
    highest, total = _normaliser(row, vocab, BLOCK)
    log_total = tl.log(total)
    tl.debug_barrier()
    tl.store(row + column, tl.full((BLOCK_TOP,), float("-inf"), tl.float32).to(logits.dtype.element_ty), mask=in_top)
    tl.debug_barrier()
    tail = tl.zeros((), dtype=tl.float32)
    for first in range(0, vocab, BLOCK):
        col = first + tl.arange(0, BLOCK)
        z = tl.load(row + col, mask=col < vocab, other=float("-inf")).to(tl.float32)
        tail += tl.sum(tl.exp(z - highest), axis=0)
    log_q_tail = tl.log(tail) - log_total  # -inf if nothing lies outside the top
    log_p_tail = tl.load(log_tail + index)
    p_tail = tl.exp(log_p_tail)
    log_q = z_top - highest - log_total
    p = tl.where(in_top, tl.exp(log_p), 0.0)
    terms = tl.where(in_top, p * (log_p - log_q), 0.0)
    kept = p_tail >= tail_min
    floored = tl.maximum(log_q_tail, log_tail_floor)
    tail_term = tl.where(kept, p_tail * (log_p_tail - floored), 0.0)
    tl.store(kl + index, tl.sum(terms, axis=0) + tail_term)
    if GRADIENT:
        counted = tl.where(kept & (log_q_tail > log_tail_floor), p_tail, 0.0)
        mass = tl.sum(p, axis=0) + counted
        outside = (mass - counted * tl.exp(-floored)) / total
        for first in range(0, vocab, BLOCK):
            col = first + tl.arange(0, BLOCK)
            z = tl.load(row + col, mask=col < vocab, other=float("-inf")).to(tl.float32)
            tl.store(row + col, (tl.exp(z - highest) * outside).to(logits.dtype.element_ty), mask=col < vocab)
        tl.debug_barrier()
        inside = tl.exp(log_q) * mass - p
        tl.store(row + column, inside.to(logits.dtype.element_ty), mask=in_top)
