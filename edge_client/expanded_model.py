"""How does the expanded model compute, and which of its tensors train? A stack of blocks over one frozen base.

A position of the stack holds a frozen base layer, a frozen expanded block, or weights that train: an expanded block as
a client trains it, or, for the baselines, base layers (all of them) or low-rank pairs over them. Nothing else differs,
so all of them run through the same functions.

Rows are right-padded. The hidden state "at cut c" is the residual stream that enters position c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from fedblocks.edge_client.backbone import FrozenLayers
from fedblocks.edge_client.checkpoint import Checkpoint, initial_block
from fedblocks.edge_client.decoder_block import (
    LINEARS,
    BlockSpec,
    BlockWeights,
    LoraPair,
    Rotary,
    attention_windows,
    block_forward,
    block_step,
    layout,
)
from fedblocks.kernels.ops import rms_norm
from fedblocks.protocol.expansion import ExpansionPlan, StackEntry

State = Mapping[int, Mapping[str, npt.NDArray[np.float32]]]
"""Accumulated deltas: block id -> tensor name -> array of the tensor's shape; what is missing is zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroup:
    """Leaf tensors that train together, and how they are called outside."""

    name: str
    """``block 2``, ``layer 0``, ``embeddings``, ``lora``."""
    tensors: tuple[Tensor, ...]
    decayed: tuple[Tensor, ...] = ()
    """Those of ``tensors`` that weight decay pulls towards zero: the out-tensors of an expanded block."""
    named: Mapping[str, Tensor]
    """Outside name -> view of its rows in one of ``tensors``."""

    def energy(self) -> Tensor:
        """|gradient|² of the out-tensors over their size (u_raw of methods.md 5.5), before clipping: a scalar."""
        size = sum(t.numel() for t in self.decayed)
        return torch.stack([t.grad.pow(2).sum() for t in self.decayed if t.grad is not None]).sum() / size

    def values(self) -> dict[str, npt.NDArray[np.float32]]:
        """A copy of every named tensor."""
        return {name: t.detach().float().numpy().copy() for name, t in self.named.items()}


def load_libraries(config: Mapping[str, Any]) -> None:
    """Imports what a model of this config.json imports when it is made.

    Called before a measurement of memory begins: these imports take about 100 MiB that no task is to blame for.
    """
    Rotary(_transformers_config(config), torch.float32)


def _transformers_config(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**config)


class ExpandedModel:
    """The base with its expanded blocks, at some state and strength.

    Args:
        backbone: the frozen base layers, NF4 or dense.
        checkpoint: the base checkpoint: embeddings, final norm, head, and the blocks' initial values.
        plan: which blocks are where; None is the plain base (for the baselines).
        state: accumulated deltas of the expanded blocks.
        dtype: compute dtype; trained tensors are fp32 whatever it is.
    """

    def __init__(
        self,
        *,
        backbone: FrozenLayers,
        checkpoint: Checkpoint,
        plan: ExpansionPlan | None = None,
        state: State | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = _transformers_config(checkpoint.config)
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act is {config.hidden_act!r}, expected 'silu': no supported family uses another")
        self.checkpoint = checkpoint
        self.backbone = backbone
        self.plan = plan
        self.shape = backbone.shape
        self.dtype = dtype
        self.stack: tuple[StackEntry, ...] = (
            plan.stack()
            if plan is not None
            else tuple(StackEntry(kind="base", index=layer) for layer in range(self.shape.num_layers))
        )
        self.recompute = False
        """Recompute each block's activations in the backward pass instead of keeping them."""
        windows = attention_windows(config, self.shape.num_layers)
        sources = plan.sources() if plan is not None else tuple(range(self.shape.num_layers))
        self._specs = [
            BlockSpec(shape=self.shape, eps=float(config.rms_norm_eps), window=windows[source]) for source in sources
        ]
        self._eps = float(config.rms_norm_eps)
        self._rotary = Rotary(config, dtype)
        self._embedding = checkpoint.tensor("model.embed_tokens.weight").to(dtype)
        self._final_norm = checkpoint.tensor("model.norm.weight").to(dtype)
        self._head = self._embedding if self.shape.tied_embeddings else checkpoint.tensor("lm_head.weight").to(dtype)
        self._replaced: dict[int, BlockWeights] = {}  # position -> weights that are not the backbone's
        self._strength = 1.0
        self._blocks: dict[int, BlockWeights] = {}  # block id -> fp32 value at strength 1
        self.load_state(state or {})

    # What the model is

    @property
    def num_positions(self) -> int:
        """L' = base layers and expanded blocks."""
        return len(self.stack)

    @property
    def base_cut(self) -> int:
        """Position of the lowest expanded block; the depth of the base where there is none."""
        return self.plan.base_cut if self.plan is not None else self.num_positions

    @property
    def strength(self) -> float:
        """Factor on the out-tensors of all expanded blocks."""
        return self._strength

    def load_state(self, state: State) -> None:
        """Sets every expanded block to its initial value plus its accumulated delta; ends any training."""
        self._state = state
        self._replaced.clear()
        self._blocks.clear()
        for block_id in self.plan.block_ids if self.plan is not None else ():
            self._blocks[block_id] = self._value(block_id)
        self._place_blocks()

    def set_strength(self, strength: float) -> None:
        """Multiplies the out-tensors of all expanded blocks, in fp32; ends any training."""
        self._strength = strength
        self._place_blocks()

    def _value(self, block_id: int) -> BlockWeights:
        """Initial value + accumulated delta, one fp32 addition each."""
        assert self.plan is not None
        initial = initial_block(self.checkpoint, self.plan, block_id)
        for name, array in self._state.get(block_id, {}).items():
            initial[name] += torch.tensor(array, dtype=torch.float32)
        return BlockWeights.of(self.shape, initial, torch.float32)

    def _place_blocks(self) -> None:
        for position, entry in enumerate(self.stack):
            if entry.kind == "block":
                value = self._blocks[entry.index]
                self._replaced[position] = value if self._strength == 1.0 else value.at_strength(self._strength)

    def weights(self, position: int) -> BlockWeights:
        """The weights at a position of the stack; base layers are decoded by the backbone."""
        if position in self._replaced:
            return self._replaced[position]
        return self.backbone.block(self.stack[position].index, self.dtype)

    # How it computes

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> (B, T, H)."""
        return torch.nn.functional.embedding(ids, self._embedding).to(self.dtype)

    def forward(self, inputs: Tensor, from_position: int = 0, to_position: int | None = None) -> Tensor:
        """Runs the blocks ``from_position .. to_position - 1``.

        Args:
            inputs: hidden states (B, T, H) entering ``from_position``, or token ids (B, T) where that is 0.
            to_position: default: the top of the stack.

        Returns:
            The residual stream (B, T, H), before the final norm at the top.
        """
        h = inputs if inputs.is_floating_point() else self.embed(inputs)
        for position in range(from_position, self.num_positions if to_position is None else to_position):
            h = self._run(h, position)
        return h

    def forward_base(self, inputs: Tensor, from_position: int = 0) -> Tensor:
        """As :meth:`forward` to the top, skipping every expanded block: the base itself (the teacher)."""
        h = inputs if inputs.is_floating_point() else self.embed(inputs)
        for position in range(from_position, self.num_positions):
            if self.stack[position].kind == "base":
                h = self._run(h, position)
        return h

    def _run(self, h: Tensor, position: int) -> Tensor:
        weights, spec = self.weights(position), self._specs[position]
        if self.recompute and torch.is_grad_enabled():
            return recomputed(block_forward, h, weights, spec, self._rotary, use_reentrant=False)
        return block_forward(h, weights, spec, self._rotary)

    def final_rows(self, h: Tensor) -> Tensor:
        """The final norm on rows (N, H) of the residual stream: what the head reads."""
        return rms_norm(h, self._final_norm.to(h.dtype), self._eps)

    @property
    def head(self) -> Tensor:
        """The output matrix (V, H)."""
        return self._head.to(self.dtype)

    def rows_logits(self, rows: Tensor) -> Tensor:
        """Logits (N, V) of rows (N, H) of the residual stream at the top."""
        return torch.nn.functional.linear(self.final_rows(rows), self.head)

    def decode_step(self, ids: Tensor, past: list[tuple[Tensor, Tensor]], position: int) -> Tensor:
        """Logits (B, V) after one more token of every row.

        Args:
            ids: (B,) int64.
            past: :meth:`empty_past`'s, filled below ``position``; filled at it afterwards.
            position: how many tokens came before.
        """
        h = self.embed(ids.unsqueeze(1))
        for i in range(self.num_positions):
            h = block_step(h, self.weights(i), self._specs[i], self._rotary, past[i], position)
        return self.rows_logits(h[:, 0])

    def empty_past(self, rows: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Room for keys and values (rows, nkv, length, hd) of every position."""
        size = (rows, self.shape.num_kv_heads, length, self.shape.head_dim)
        return [
            (
                torch.empty(size, dtype=self.dtype),
                torch.empty(size, dtype=self.dtype),
            )
            for _ in self.stack
        ]

    # What trains

    def train_blocks(self, blocks: Sequence[int]) -> list[ParamGroup]:
        """Makes these expanded blocks leaf parameters; every other tensor stays frozen.

        They train in place: from here to the next :meth:`load_state` the model is the local one.

        Raises:
            ValueError: the strength is not 1.
        """
        assert self.plan is not None
        if self._strength != 1.0:
            raise ValueError(
                f"training at strength {self._strength}, expected 1: strength is for evaluation and export"
            )
        self._place_blocks()
        groups: list[ParamGroup] = []
        for block_id in blocks:
            leaves = self._blocks[block_id].as_leaves()
            self._replaced[self.plan.position(block_id)] = leaves
            groups.append(_group(f"block {block_id}", leaves, leaves.named(self.shape), leaves.out_tensors()))
        return groups

    def train_base(self, positions: Sequence[int] | None = None, *, embeddings: bool = True) -> list[ParamGroup]:
        """Makes base layers (default all), embedding, final norm and head fp32 leaf parameters: full fine-tuning.

        Names are those of the checkpoint.
        """
        groups: list[ParamGroup] = []
        for position, entry in enumerate(self.stack):
            if entry.kind == "base" and (positions is None or position in positions):
                weights = self._replaced.get(position)
                if weights is None:
                    tensors = self.checkpoint.layer_tensors(entry.index)
                    weights = BlockWeights.of(self.shape, tensors, torch.float32)
                leaves = weights.as_leaves()
                self._replaced[position] = leaves
                named = {f"model.layers.{entry.index}.{n}": t for n, t in leaves.named(self.shape).items()}
                groups.append(_group(f"layer {entry.index}", leaves, named))
        if embeddings:
            tied = self._head is self._embedding
            self._embedding = self._embedding.detach().float().clone().requires_grad_()
            self._final_norm = self._final_norm.detach().float().clone().requires_grad_()
            named = {"model.embed_tokens.weight": self._embedding, "model.norm.weight": self._final_norm}
            if tied:
                self._head = self._embedding
            else:
                self._head = self._head.detach().float().clone().requires_grad_()
                named["lm_head.weight"] = self._head
            groups.append(ParamGroup(name="embeddings", tensors=tuple(named.values()), named=named))
        return groups

    def train_lora(self, *, rank: int, alpha: float, seed: int) -> list[ParamGroup]:
        """Puts a low-rank pair over every linear layer of every base layer (all-linear LoRA): one group.

        A is drawn uniformly as peft does (Kaiming, a = √5: bound 1/√in), B is zero, so the start is the base.
        Names: ``model.layers.3.self_attn.q_proj.lora_A`` and ``.lora_B``.
        """
        generator = torch.Generator().manual_seed(seed)
        named: dict[str, Tensor] = {}
        places = layout(self.shape)
        specs = {spec.name: spec for spec in self.shape.block_tensors()}
        for position, entry in enumerate(self.stack):
            if entry.kind != "base":
                continue
            pairs: dict[str, LoraPair] = {}
            for linear in LINEARS:
                assert f"{linear}.weight" in places
                out, inner = specs[f"{linear}.weight"].shape
                a = (torch.rand(rank, inner, generator=generator) * 2 - 1) / inner**0.5
                b = torch.zeros(out, rank)
                a.requires_grad_()
                b.requires_grad_()
                pairs[linear] = LoraPair(a, b, alpha / rank)
                named[f"model.layers.{entry.index}.{linear}.lora_A"] = a
                named[f"model.layers.{entry.index}.{linear}.lora_B"] = b
            self._replaced[position] = replace(self.weights(position), lora=pairs)
        return [ParamGroup(name="lora", tensors=tuple(named.values()), named=named)]

    def deltas(self, groups: Sequence[ParamGroup]) -> dict[int, dict[str, npt.NDArray[np.float32]]]:
        """Trained value minus the value that training started from, of the groups of :meth:`train_blocks`.

        The start is derived again from the checkpoint and the state instead of being kept beside the weights.
        """
        found: dict[int, dict[str, npt.NDArray[np.float32]]] = {}
        for group in groups:
            block_id = int(group.name.removeprefix("block "))
            start = self._value(block_id).named(self.shape)
            found[block_id] = {
                name: (value.detach() - start[name]).float().numpy() for name, value in group.named.items()
            }
        return found


def _group(
    name: str, leaves: BlockWeights, named: Mapping[str, Tensor], decayed: tuple[Tensor, ...] = ()
) -> ParamGroup:
    return ParamGroup(name=name, tensors=tuple(leaves.tensors().values()), decayed=decayed, named=named)
