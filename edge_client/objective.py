"""What does training lower, and what is it held to? The losses of one kind of model, and the batches that they read.

A decoder predicts tokens and is held to what its base says of each next one; an encoder gives a text a label and is
held to where its base puts each text. Everything else about training is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.samples import TokenisedSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The two loss parts as sums times a scale."""

    task: Callable[[Any, float], Tensor]
    anchor: Callable[[Any, float], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The losses of a kind of model, and how its batches are made."""

    losses: Callable[[Any, int], Losses]
    """(model, the position that inputs enter) -> its losses."""
    task_batch: Callable[[Sequence[TokenisedSample], Tensor], Any]
    """(samples, their padded inputs) -> a batch; ``targets`` are what the loss is a mean over."""
    anchor_batch: Callable[[Sequence[Any], Tensor, Sequence[int]], Any]
    """(teacher records, padded inputs, lengths) -> a batch; ``rows`` are what the term is a mean over."""


def objective_of(model: ExpandedModel) -> Objective:
    """The objective of this model."""
    from fedblocks.edge_client import encoder_objective, train

    return encoder_objective.OBJECTIVE if model.shape.encoder else train.OBJECTIVE
