"""What can go wrong between the two sides, and whose fault is it?

ProtocolError
├── LocalProtocolError     we tried to send something that the protocol forbids: a bug on this side
└── RemoteProtocolError    the peer sent something that the protocol forbids; carries a refusal code
"""

from __future__ import annotations

from typing import Final, Literal, get_args

RefusalCode = Literal[
    "malformed",
    "unknown_field",
    "too_large",
    "over_quota",
    "version_skew",
    "model_mismatch",
    "not_enrolled",
    "revoked",
    "unknown_attempt",
    "stale_round",
    "conflict",
    "not_assigned",
    "incomplete",
    "shape_mismatch",
    "dtype_mismatch",
    "length_mismatch",
    "checksum_mismatch",
    "bad_weight",
    "bad_steps",
    "non_finite",
    "over_norm",
    "no_space",
]

#: The closed list in the order in which the checks run: the first failing one is the answer (methods.md 8.1).
REFUSAL_CODES: Final[tuple[RefusalCode, ...]] = get_args(RefusalCode)

#: Refusals that mean "retry later": the client keeps its update.
RETRY_CODES: Final[frozenset[RefusalCode]] = frozenset({"over_quota", "no_space"})

#: Refusals after which a client stops with exit code 4 instead of asking again.
FATAL_CODES: Final[frozenset[RefusalCode]] = frozenset({"version_skew", "model_mismatch", "not_enrolled", "revoked"})


class ProtocolError(Exception):
    """Root of this room's errors."""


class LocalProtocolError(ProtocolError):
    """This side is about to break the protocol: our own bug."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol.

    Attributes:
        code: the refusal code that answers it.
    """

    def __init__(self, text: str, *, code: RefusalCode = "malformed") -> None:
        super().__init__(text)
        self.code: RefusalCode = code
