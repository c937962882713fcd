"""From which values do low-rank pairs start? A from the plan's seed alone, B at zero: everybody draws the same bits.

A is uniform in ±1/sqrt(in), as peft draws it (Kaiming with a = sqrt(5)); with B at zero the start is the base itself
(Hu et al., 2106.09685); of personal pairs it is uniform in ±sqrt(3/r). Integers from SHA-256-seeded Philox become fp32
by one division and one multiplication each, so that every IEEE machine has the same A.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from fedblocks.profiles.model_shape import TensorSpec
from fedblocks.profiles.units import LowRankPairs, PersonalPairs
from fedblocks.protocol.tensors import FloatArray

BITS = 24
"""Of each draw: what fp32 holds exactly."""


def initial_pair_tensor(pairs: LowRankPairs, unit: int, spec: TensorSpec, *, version: int = 0) -> FloatArray:
    """The initial value of one tensor of a unit's pairs, fp32 in the tensor's shape.

    Args:
        spec: of the whole pair, not of a width: the first components of a draw are those of every smaller rank.
        version: published version that the task starts from. Pairs that are merged start anew in each version, each
            time in other directions; of all others the start is that of version 0.
    """
    if spec.is_out:
        return np.zeros(spec.shape, dtype=np.float32)
    if isinstance(pairs, PersonalPairs):
        # Of variance 1/r, as the method has it; from the same A in every round, so that what rounds add lies in few
        # directions and a prior of low rank leaves little out (docs/fedhft.md).
        limit = math.sqrt(3.0 / pairs.rank)
    else:
        limit = 1.0 / math.sqrt(spec.shape[1])
    turn = version if pairs.merged else 0
    digest = hashlib.sha256(f"fedblocks pair/{pairs.seed}/{turn}/{unit}/{spec.name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    drawn = generator.integers(0, 1 << BITS, size=spec.shape, dtype=np.int64).astype(np.float32)
    within = drawn / np.float32(1 << (BITS - 1)) - np.float32(1.0)
    return np.multiply(within, np.float32(limit), dtype=np.float32)
