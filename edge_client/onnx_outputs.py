"""What does a recorded graph give? A decoder's logits at every token; an encoder's embedding, and its labels' logits.

An encoder's pooling is part of its graph, so that ONNX Runtime alone gives what ``encoder_model.py`` computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.export import Head, build_base_hf, read_head


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A module of ids and mask (B, T), and the names of what it gives."""

    module: torch.nn.Module
    outputs: tuple[str, ...]
    per_token: bool
    """Each output is (B, T, ...), of which only real tokens count; else (B, ...)."""


class _Logits(torch.nn.Module):
    """Token ids and mask (B, T) -> logits (B, T, V), and nothing else of what the model returns."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return (self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits,)


class _Embedding(torch.nn.Module):
    """Token ids and mask (B, T) -> normalised mean embedding (B, H), and the labels' logits (B, classes)."""

    def __init__(self, model: torch.nn.Module, head: Head | None) -> None:
        super().__init__()
        self.model = model
        self.has_head = head is not None
        if head is not None:
            self.register_buffer("weight", torch.from_numpy(head.weight))
            self.register_buffer("bias", torch.from_numpy(head.bias))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask.unsqueeze(2).to(hidden.dtype)
        embedding = functional.normalize((hidden * real).sum(1) / real.sum(1), dim=1)
        if not self.has_head:
            return (embedding,)
        return embedding, functional.linear(embedding * embedding.shape[1] ** 0.5, self.weight, self.bias)


def recorded(checkpoint: Checkpoint) -> Recorded:
    """What is recorded of an exported checkpoint, in fp32 and evaluation mode."""
    model = build_base_hf(checkpoint, torch.float32)
    if not checkpoint.shape.encoder:
        return Recorded(module=_Logits(model).eval(), outputs=("logits",), per_token=True)
    head = read_head(checkpoint.folder)
    outputs = ("embedding",) if head is None else ("embedding", "logits")
    return Recorded(module=_Embedding(model, head).eval(), outputs=outputs, per_token=False)


def counted(of: Recorded, value: npt.NDArray[np.float32], mask: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """What of an output means something: real tokens, or all of it."""
    return value[mask == 1] if of.per_token else value
