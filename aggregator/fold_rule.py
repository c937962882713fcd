"""By which rule are a round's updates folded? What the operator chose, kept with each round for a replay."""

from __future__ import annotations

from dataclasses import dataclass

from fedblocks.protocol.run_config import FoldKind, RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldRule:
    """How the updates of a round become one change."""

    kind: FoldKind = "mean"


def fold_rule(config: RunConfig) -> FoldRule:
    """The rule that the configuration asks for."""
    return FoldRule(kind=config.training.fold)
