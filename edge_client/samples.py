"""What does the trainer read? One tokenised example with a mask of its target tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenisedSample:
    """Token ids and targets of one example, cut after its last target token."""

    ids: npt.NDArray[np.int32]  # (n,)
    label_mask: npt.NDArray[np.bool_]
    """(n,): True where token i is a target, predicted from position i - 1; all True where the text has a label."""
    label: int | None = None
    """Number of the text's label, in an encoder's run."""
