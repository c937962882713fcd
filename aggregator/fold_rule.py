"""By which rule are a round's updates folded? What the operator chose, kept with each round for a replay."""

from __future__ import annotations

from dataclasses import dataclass

from fedblocks.protocol.run_config import FoldKind, RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldRule:
    """How the updates of a round become one change."""

    kind: FoldKind = "mean"
    clip_norm: float = 0.0
    """C: most that one client's part in a round may measure; 0 where nothing is clipped."""
    noise_multiplier: float = 0.0
    """z: the noise's standard deviation over C; above 0 the fold is private (``privacy.py``)."""


def fold_rule(config: RunConfig) -> FoldRule:
    """The rule that the configuration asks for."""
    private = config.privacy.noise_multiplier > 0
    return FoldRule(
        kind=config.training.fold,
        clip_norm=config.privacy.clip_norm if private else 0.0,
        noise_multiplier=config.privacy.noise_multiplier,
    )
