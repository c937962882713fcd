"""Which of the clients that are there take part in a round? A share of them, each in its turn.

Pure and deterministic: drawn by a hash of the run's seed, the round and the client's key (methods.md 6.5).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Final

from fedblocks.protocol.messages import ClientKey

#: With ``fraction`` 0 everybody takes part in a small federation, and this share, but so many, of a larger one.
WHOLE_UP_TO: Final = 16
USUAL_FRACTION: Final = 0.4
USUAL_MIN: Final = 8
#: Who was not chosen for so many rounds comes first.
OVERDUE_ROUNDS: Final = 5


def cohort_size(num_clients: int, fraction: float) -> int:
    """How many of the clients take part; ``fraction`` 0 chooses by their number."""
    if fraction > 0:
        return max(1, math.ceil(fraction * num_clients))
    if num_clients <= WHOLE_UP_TO:
        return num_clients
    return max(USUAL_MIN, math.ceil(USUAL_FRACTION * num_clients))


def choose_cohort(
    last_chosen: Mapping[ClientKey, int], *, fraction: float, round: int, seed: int
) -> frozenset[ClientKey]:
    """The clients that take part in ``round``.

    Args:
        last_chosen: client -> the last round that it took part in, 0 for none.
        fraction: share of the clients, in (0, 1]; 0: all up to 16 of them, else 0.4 and at least 8.
    """
    size = cohort_size(len(last_chosen), fraction)

    def turn(key: ClientKey) -> tuple[bool, bytes]:
        waits = round - last_chosen[key] > OVERDUE_ROUNDS
        return not waits, hashlib.sha256(f"{seed}/{round}/{key}".encode()).digest()

    return frozenset(sorted(last_chosen, key=turn)[:size])
