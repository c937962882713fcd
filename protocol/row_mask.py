"""Which rows of a low-rank pair's B does a client train? Those of the highest energy before training, and some others.

Chosen before training, so that a row left out costs neither gradient nor optimizer state nor bytes
(methods.md 10.2). The energy of row i is |dL/dB[i,:]|²: the Fisher energy of the row seen through A.
Both sides call the same pure functions: the client to choose, the aggregator to read.
"""

from __future__ import annotations

import hashlib
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedblocks.protocol.errors import RemoteProtocolError

#: Shares of the rows that a client may train; the weakest device the smallest.
SHARES: Final = (0.25, 0.5, 1.0)
#: Of the old score; a batch's energy has the rest.
SCORE_DECAY: Final = 0.9
#: Share of the rows that is drawn, so that a row with an outdated score has its turn.
EXPLORATION: Final = 0.1

FloatArray = NDArray[np.float32]
RowMask = NDArray[np.bool_]


def num_rows(num_out: int, share: float) -> int:
    """How many of ``num_out`` rows a share of them is."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of rows is {share}, expected above 0 and at most 1")
    return math.ceil(share * num_out)


def next_scores(scores: FloatArray, energy: FloatArray) -> FloatArray:
    """The rows' scores after one more batch (both (out,)); they are kept from round to round."""
    kept = np.multiply(scores, np.float32(SCORE_DECAY))
    return np.add(kept, np.multiply(energy, np.float32(1.0 - SCORE_DECAY)))


def choose_rows(scores: FloatArray, share: float, *, client: str, round: int, matrix: str) -> RowMask:
    """The rows to train, exactly :func:`num_rows` of them: nine tenths by score, the rest drawn by hash.

    Of equal scores the lower row goes first.

    Args:
        scores: (out,), finite.
        client, round, matrix: what the draw depends on; the same on every machine.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"the rows' scores of {matrix} are not finite: the gradient before training overflowed")
    count = num_rows(len(scores), share)
    best = np.argsort(-scores, kind="stable")[: math.floor((1.0 - EXPLORATION) * count)]
    mask = np.zeros(len(scores), dtype=np.bool_)
    mask[best] = True
    others = np.flatnonzero(~mask)
    digest = hashlib.sha256(f"{client}/{round}/{matrix}".encode()).digest()
    order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(len(others))
    mask[others[order[: count - len(best)]]] = True
    return mask


def pack(mask: RowMask) -> bytes:
    """One bit a row, the first row in the lowest bit of the first byte: ceil(out/8) bytes."""
    return np.packbits(mask, bitorder="little").tobytes()


def packed_bytes(num_out: int) -> int:
    """Length of a packed mask."""
    return (num_out + 7) // 8


def unpack(packed: bytes | memoryview, num_out: int, expected: int) -> RowMask:
    """The mask from its bytes.

    Args:
        expected: how many rows it must name, :func:`num_rows` of the assigned share.

    Raises:
        RemoteProtocolError: ``length_mismatch`` for another length, a bit beyond the last row, or another number of
            rows.
    """
    if len(packed) != packed_bytes(num_out):
        raise RemoteProtocolError(
            f"a row mask has {len(packed)} bytes, expected {packed_bytes(num_out)}", code="length_mismatch"
        )
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
    if bits[num_out:].any() or int(bits.sum()) != expected:
        raise RemoteProtocolError(
            f"a row mask names {int(bits.sum())} of {num_out} rows, expected exactly {expected}, the assigned share",
            code="length_mismatch",
        )
    return bits[:num_out].astype(np.bool_)
