"""What does a round's mean update do to the model? The server's own optimizer, block by block (methods.md 8.3).

``avg`` adds it. ``avgm`` and ``adam`` are those of Reddi et al. (arXiv 2003.00295): they carry moments from round to
round, which damps what clients of unlike data pull back and forth. What nobody trained in a round keeps its value and
its moments.

Every value is computed in fp64 by elementwise operations and rounded once, so that a replay gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedblocks.profiles.units import Units, unit_tensors
from fedblocks.protocol.run_config import ServerOptimizer
from fedblocks.protocol.tensors import FloatArray, State, cut

MOMENTUM: Final = 0.9
ADAM_BETAS: Final = (0.9, 0.99)
#: Share of the mean update that ``avgm`` adds: its momentum adds up to ten of them.
MOMENTUM_RATE: Final = 0.3
#: Of the largest change that a client's round can make (lr·tau): keeps ``adam`` from blowing up what hardly moved.
ADAM_EPS: Final = 1e-3
#: Names of the moments: before the tensor's, as in ``m1/mlp.up_proj.weight``.
FIRST, SECOND = "m1/", "m2/"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRule:
    """The optimizer of a round."""

    optimizer: ServerOptimizer = "avg"
    learning_rate: float = 0.0
    """lr of the clients in this round; only ``adam`` looks at it."""
    steps: int = 1
    """tau of the clients."""


def server_step(
    aggregate: State, moments: State, rule: ServerRule, *, shape: Units, widths: Mapping[int, float]
) -> tuple[State, State]:
    """The change of the model, and the moments afterwards; no argument is changed.

    Args:
        aggregate: mean update of the blocks that somebody trained, zero where nobody did.
        moments: block id -> names with :data:`FIRST` or :data:`SECOND` before them; what is missing is zero.
        widths: block id -> the largest width that somebody trained; a missing block was trained whole.
    """
    if rule.optimizer == "avg":
        return aggregate, moments
    change: State = {}
    after: State = {block: dict(tensors) for block, tensors in moments.items()}
    for block, tensors in aggregate.items():
        trained = unit_tensors(shape, block, widths.get(block, 1.0))
        kept = after.setdefault(block, {})
        change[block] = {}
        for spec, part in zip(unit_tensors(shape, block), trained, strict=True):
            whole = np.zeros(spec.shape, dtype=np.float32)
            change[block][spec.name] = whole
            gradient = cut(tensors[spec.name], part.shape).astype(np.float64)
            first = _moved(kept, FIRST + spec.name, whole, part.shape, gradient, rule)
            if rule.optimizer == "avgm":
                cut(whole, part.shape)[...] = MOMENTUM_RATE * first
                continue
            second = _moved(kept, SECOND + spec.name, whole, part.shape, np.square(gradient), rule)
            floor = ADAM_EPS * rule.learning_rate * rule.steps
            cut(whole, part.shape)[...] = rule.learning_rate * first / (np.sqrt(second) + floor)
    return change, after


def _moved(
    kept: dict[str, FloatArray],
    name: str,
    like: FloatArray,
    shape: tuple[int, ...],
    new: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    rule: ServerRule,
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The moment after ``new``, fp64, of what was trained; ``kept`` holds it in fp32, and the rest as it was."""
    before = kept.get(name)
    moment = np.array(before) if before is not None else np.zeros_like(like)
    old = cut(moment, shape).astype(np.float64)
    if rule.optimizer == "avgm":
        moved = MOMENTUM * old + new
    else:
        beta = ADAM_BETAS[0] if name.startswith(FIRST) else ADAM_BETAS[1]
        moved = beta * old + (1 - beta) * new
    cut(moment, shape)[...] = moved
    kept[name] = moment
    return moved
