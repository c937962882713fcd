"""How fast is the line to the aggregator? Running means of real traffic, by the client's own clock.

A transfer's rate is its bytes over all of its time: the round trip until it may flow and what the other side does
before it answers are part of it, since the next transfer of that size will wait for them too. So only transfers that
are large, or long, say something about the line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

#: Weight of the newest figure in a running mean.
NEWEST_SHARE: Final = 0.3
#: A transfer of one full chunk counts; a smaller one if it took so long that waiting was not most of it.
ENOUGH_BYTES: Final = 256 * 1024
ENOUGH_S: Final = 2.0
ENOUGH_BYTES_IF_SLOW: Final = 16 * 1024

LinkFigureName = Literal["round_trip_s", "uplink_bytes_per_s", "downlink_bytes_per_s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigure:
    """One figure of a line.

    Raises:
        ValueError: a number is not finite or not positive, or there is no run.
    """

    value: float
    """Running mean: the newest counts 0.3."""
    low: float
    high: float
    runs: int

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) and x > 0 for x in (self.value, self.low, self.high)) or self.runs < 1:
            raise ValueError(
                f"link figure {self.value!r} ({self.low!r} to {self.high!r}, {self.runs} runs): expected positive "
                "numbers and at least one run"
            )

    def then(self, value: float) -> LinkFigure:
        """This figure with one more run."""
        return LinkFigure(
            value=self.value + NEWEST_SHARE * (value - self.value),
            low=min(self.low, value),
            high=max(self.high, value),
            runs=self.runs + 1,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRecord:
    """What is known of the line to one aggregator; None: not measured yet."""

    round_trip_s: LinkFigure | None = None
    uplink_bytes_per_s: LinkFigure | None = None
    downlink_bytes_per_s: LinkFigure | None = None

    def with_figure(self, name: LinkFigureName, value: float) -> LinkRecord:
        """The record after one more run of one figure; what is no positive number changes nothing."""
        if not math.isfinite(value) or value <= 0:
            return self
        known: LinkFigure | None = getattr(self, name)
        figure = LinkFigure(value=value, low=value, high=value, runs=1) if known is None else known.then(value)
        return replace(self, **{name: figure})

    def text(self) -> str:
        """In words, what is known."""
        parts: list[str] = []
        if (trip := self.round_trip_s) is not None:
            parts.append(f"round trip {_milliseconds(trip.value)} ms{_spread(trip, _milliseconds)}")
        for word, rate in (("up", self.uplink_bytes_per_s), ("down", self.downlink_bytes_per_s)):
            if rate is not None:
                parts.append(f"{word} {_megabytes(rate.value)} MB/s{_spread(rate, _megabytes)}")
        return ", ".join(parts) or "not measured yet"


def says_something(num_bytes: int, seconds: float) -> bool:
    """True if a transfer is large or long enough for its rate to be the line's."""
    return num_bytes >= ENOUGH_BYTES or (num_bytes >= ENOUGH_BYTES_IF_SLOW and seconds >= ENOUGH_S)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _megabytes(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.3g}"


def _spread(figure: LinkFigure, text: Callable[[float], str]) -> str:
    if figure.runs == 1:
        return ""
    return f" ({text(figure.low)} to {text(figure.high)} in {figure.runs})"
