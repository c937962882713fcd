"""How does the expanded model compute, and which of its tensors train? A stack of blocks over one frozen base.

A position of the stack holds a frozen base layer, a frozen expanded block, or weights that train: an expanded block as
a client trains it, or, for other methods, base layers or low-rank pairs over them. Nothing else differs, so all of them
run through the same functions. The plan says which of them a run has (``profiles/units.py``).

Rows are right-padded. The hidden state "at cut c" is the residual stream that enters position c.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedblocks.edge_client.backbone import FrozenLayers
from fedblocks.edge_client.checkpoint import Checkpoint, at_strength
from fedblocks.edge_client.decoder_block import (
    LINEARS,
    BlockSpec,
    BlockWeights,
    LoraPair,
    attention_windows,
    block_forward,
    block_step,
    layout,
    slim_shape,
)
from fedblocks.edge_client.recompute import recomputed
from fedblocks.edge_client.rotary import Rotary
from fedblocks.edge_client.store import LazyTensors
from fedblocks.edge_client.unit_values import initial_value
from fedblocks.kernels.ops import merge_split, rms_norm, split_fp32
from fedblocks.profiles.model_shape import ChosenRows, ModelShape, TensorSpec
from fedblocks.profiles.units import (
    EXPANDED_BLOCKS,
    BaseTensors,
    ExpandedBlocks,
    LowRankPairs,
    MergedLinears,
    PersonalPairs,
    Trainable,
    unit_tensors,
)
from fedblocks.protocol.expansion import ExpansionPlan, StackEntry
from fedblocks.protocol.row_mask import RowMask

if TYPE_CHECKING:
    from fedblocks.profiles.cost import FrozenForm, OptimizerMode, Residency

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
FINAL_NORM: Final = "model.norm.weight"
ROWS_APART_SHARE: Final = 0.9
"""Above this share of rows the topmost block computes all of them: choosing rows is not free."""

State = Mapping[int, Mapping[str, npt.NDArray[np.float32]]]
"""Accumulated deltas: block id -> tensor name -> array of the tensor's shape; what is missing is zero."""
Chosen = Mapping[int, Mapping[str, RowMask]]
"""Unit -> name of a pair's B -> the rows of it that train, (out,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroup:
    """Leaf tensors that train together, and how they are called outside."""

    name: str
    """``block 2``, ``layer 0``, ``tables 8``: the last word is the unit's number; of benchmarks also ``lora``."""
    tensors: tuple[Tensor, ...]
    """fp32, or the bf16 high halves of fp32 values; what the arithmetic reads, but for slim blocks."""
    lows: tuple[Tensor, ...] = ()
    """The int16 remainders of those halves, one for each of ``tensors``; none where they are fp32."""
    decayed: tuple[Tensor, ...] = ()
    """Those of ``tensors`` that weight decay pulls towards zero: the out-tensors of an expanded block."""
    named: Mapping[str, Tensor]
    """Outside name -> view of its rows in one of ``tensors``."""
    named_lows: Mapping[str, Tensor] = field(default_factory=dict)
    """Outside name -> view of its rows in one of ``lows``."""
    after_step: Callable[[], None] = lambda: None
    """To be called whenever the tensors have changed: brings them to where the arithmetic reads them."""

    def value(self, name: str) -> Tensor:
        """The fp32 value of a named tensor; the tensor itself where that is fp32."""
        tensor = self.named[name].detach()
        return merge_split(tensor, self.named_lows[name]) if self.named_lows else tensor.float()

    def values(self) -> dict[str, npt.NDArray[np.float32]]:
        """A copy of every named tensor."""
        return {name: self.value(name).cpu().numpy().copy() for name in self.named}


class ExpandedModel:
    """The base with its expanded blocks, at some state and strength; :func:`open_model` makes one for any base.

    Nothing is held before it is used: a block that no pass reaches costs no memory, nor does the embedding table while
    all inputs are hidden states.

    Args:
        backbone: the frozen base layers, NF4 or dense; its device is the model's.
        checkpoint: the base checkpoint: embeddings, final norm, head, and the blocks' initial values.
        plan: which blocks are where, or what else trains; None is the plain base.
        state: accumulated deltas; read again whenever a value is made.
        dtype: compute dtype; trained values are fp32 whatever it is.
    """

    embedding_name = EMBEDDING
    linears: tuple[str, ...] = LINEARS
    """Module paths of a layer's linears, in the order in which they are applied."""

    def __init__(
        self,
        *,
        backbone: FrozenLayers,
        checkpoint: Checkpoint,
        plan: ExpansionPlan | None = None,
        state: State | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.checkpoint = checkpoint
        self.backbone = backbone
        self.device = backbone.device
        """Where it computes; what it reads is moved there."""
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
        self._residency: Residency = "resident"
        self._frozen: FrozenForm = "decoded"
        self._tables: dict[str, Tensor] = {}  # embedding and head: name -> matrix in the compute dtype, once it is read
        self._replaced: dict[int, BlockWeights] = {}  # position -> weights that train
        self._placed: dict[int, BlockWeights] = {}  # block id -> its value at the strength, in the compute dtype
        self._packed: dict[int, BlockWeights] = {}  # base layer -> its packed form
        self._strength = 1.0
        self._state: State = state or {}
        self._version = 0
        self._trainable: Trainable = plan.trainable if plan is not None else EXPANDED_BLOCKS
        self._trains_tables = isinstance(self._trainable, BaseTensors) and self._trainable.tables
        self._pairs: dict[int, dict[str, LoraPair]] = {}  # base layer -> published low-rank pairs at the strength
        self._as_base = False
        self._base_parts: dict[int | str, BlockWeights | Tensor] = {}  # of the base itself, where others stand in
        self._set_up(checkpoint.config)

    def _set_up(self, config: Mapping[str, Any]) -> None:
        """What the arithmetic of this kind of model needs beside the stack."""
        activation, eps = config.get("hidden_act", "silu"), float(config.get("rms_norm_eps", 1e-6))
        if activation != "silu":
            raise ValueError(f"hidden_act is {activation!r}, expected 'silu': no supported decoder uses another")
        windows = attention_windows(config, self.shape.num_layers)
        sources = self.plan.sources() if self.plan is not None else tuple(range(self.shape.num_layers))
        fused = self.device.type != "cpu"
        self._specs = [BlockSpec(shape=self.shape, eps=eps, window=windows[source], fused=fused) for source in sources]
        self._eps = eps
        self._rotary = Rotary(config, self.shape.head_dim, self.dtype, self.device)
        self._final_norm = self.checkpoint.tensor(FINAL_NORM).to(self.device, self.dtype)

    # What the model is

    @property
    def num_positions(self) -> int:
        """L' = base layers and expanded blocks."""
        return len(self.stack)

    @property
    def base_cut(self) -> int:
        """Position of the lowest layer that trains; the depth of the base where there is none."""
        return self.plan.base_cut if self.plan is not None else self.num_positions

    @property
    def takes_tokens(self) -> bool:
        """True where the embedding itself trains: inputs are token ids, and no hidden state can be kept."""
        return self._trains_tables

    @property
    def strength(self) -> float:
        """Factor on what the run has learnt: on out-tensors, on pairs, or on the change of base tensors."""
        return self._strength

    def load_state(self, state: State, version: int = 0) -> None:
        """Sets everything that trains to its initial value plus its accumulated delta; ends any training.

        Args:
            version: of the published state; merged pairs start in other directions in each.
        """
        self._state, self._version = state, version
        self._forget_values()

    def set_strength(self, strength: float) -> None:
        """Multiplies the out-tensors of all expanded blocks, the pairs, or the change of the base's tensors, in fp32;
        ends any training. 0 is the base itself."""
        self._strength = strength
        self._forget_values()

    def _forget_values(self) -> None:
        self._replaced.clear()
        self._placed.clear()
        self._pairs.clear()
        if self._trains_tables:
            self._tables.clear()

    @contextlib.contextmanager
    def base_only(self) -> Iterator[None]:
        """Inside, the model is the base, whatever has been learnt and whatever trains: the teacher."""
        if self._as_base:
            yield
            return
        self._as_base = True
        try:
            yield
        finally:
            self._as_base = False
            self._base_parts.clear()

    def hold(self, *, residency: Residency, frozen: FrozenForm) -> None:
        """Chooses what stays in memory between passes (runtime.md 4.1); the numbers computed stay the same.

        Args:
            residency: ``resident`` keeps the embedding table and the packed bytes of the layers below the base cut.
            frozen: base layers above the cut are kept decoded, or packed and decoded at each use.
        """
        self._residency, self._frozen = residency, frozen
        self._packed.clear()
        if residency == "suffix" and not self.shape.tied_embeddings:
            self._tables.pop(self.embedding_name, None)
        entries = [entry.index for entry in self.stack if entry.kind == "base"]
        trained = self._trainable.layers if isinstance(self._trainable, BaseTensors) else ()
        above = [e.index for e in self.stack[self.base_cut :] if e.kind == "base" and e.index not in trained]
        below = [layer for layer in entries if layer not in above and layer not in trained]
        held: dict[str, list[int]] = {"decoded": [], "packed": []}
        merged = isinstance(self._trainable, LowRankPairs) and self._trainable.merged  # those are held changed
        held["decoded" if frozen == "decoded" and not merged else "packed"] += above
        if residency == "resident":
            held["packed"] += below
        self.backbone.hold(decoded=held["decoded"], packed=held["packed"], dtype=self.dtype)

    def release(self) -> None:
        """Gives back everything that can be read again: tables, decoded layers, blocks that do not train."""
        if not any(table.requires_grad for table in self._tables.values()):
            self._tables.clear()
        self._placed.clear()
        self._pairs.clear()
        self._packed.clear()
        self.backbone.release()

    def _start(self, block_id: int, spec: TensorSpec, state: State | None = None) -> Tensor:
        """Published fp32 value of one tensor, on the CPU: initial value + accumulated delta, one addition.

        Source: methods.md 2.4.

        Args:
            state: default: the loaded one.
        """
        assert self.plan is not None
        value = initial_value(self.checkpoint, self.plan, block_id, spec, self._version)
        if isinstance(self._trainable, PersonalPairs):
            return value  # the state is the prior beneath the pairs, which start anew
        delta = (self._state if state is None else state).get(block_id, {}).get(spec.name)
        return value if delta is None else value.add_(torch.from_numpy(np.ascontiguousarray(delta)))

    def _moved(self, start: Tensor, unit: int, name: str) -> Tensor:
        """``start`` plus the accumulated change of a base tensor times the strength, fp32; ``start`` is overwritten."""
        delta = self._state.get(unit, {}).get(name)
        if delta is None or self._strength == 0.0:
            return start
        change = torch.from_numpy(np.ascontiguousarray(delta)).to(start.device)
        return start.add_(change if self._strength == 1.0 else change * self._strength)

    def _block(self, block_id: int, dtype: torch.dtype) -> BlockWeights:
        """An expanded block at the strength; strength is applied in fp32, then the value is rounded once."""
        weights = BlockWeights.empty(self.shape, dtype, self.device)
        places = weights.named(self.shape)
        for spec in self.shape.block_tensors():
            value = self._start(block_id, spec)
            value = at_strength(value, lambda spec=spec: self._start(block_id, spec, {}), spec, self._strength)
            places[spec.name].copy_(value)
        return weights

    def weights(self, position: int) -> BlockWeights:
        """The weights at a position of the stack; base layers are decoded by the backbone."""
        entry = self.stack[position]
        if self._as_base and entry.kind == "base":
            return self._base_layer(position, entry)
        if position in self._replaced:
            return self._replaced[position]
        if entry.kind == "block":
            if entry.index not in self._placed:
                self._placed[entry.index] = self._block(entry.index, self.dtype)
            return self._placed[entry.index]
        match self._trainable:
            case BaseTensors(layers=layers) if entry.index in layers:
                return self._changed_layer(entry)
            case LowRankPairs(merged=True):
                return self._changed_layer(entry)
            case LowRankPairs():
                pairs = self._published_pairs(entry.index)
                frozen = self._frozen_layer(position, entry)
                return replace(frozen, lora=pairs) if pairs else frozen
            case _:
                return self._frozen_layer(position, entry)

    def _base_layer(self, position: int, entry: StackEntry) -> BlockWeights:
        """A layer of the base as it was before the run: where it trains itself, from the checkpoint."""
        if not isinstance(self._trainable, BaseTensors) or entry.index not in self._trainable.layers:
            return self._frozen_layer(position, entry)
        found = self._base_parts.get(entry.index)
        if not isinstance(found, BlockWeights):
            tensors = self.checkpoint.layer_tensors(entry.index)
            found = self._base_parts[entry.index] = BlockWeights.of(self.shape, tensors, self.dtype, self.device)
        return found

    def _changed_layer(self, entry: StackEntry) -> BlockWeights:
        """A base layer whose own weights have changed, in the compute dtype: one fp32 addition, rounded once."""
        if entry.index not in self._placed:
            weights = BlockWeights.empty(self.shape, self.dtype, self.device)
            places = weights.named(self.shape)
            if isinstance(self._trainable, BaseTensors):
                for name, value in self.checkpoint.layer_tensors(entry.index).items():
                    places[name].copy_(self._moved(value.float(), entry.index, name))
            else:
                for name, value in self.backbone.block(entry.index, self.dtype).named(self.shape).items():
                    places[name].copy_(self._moved(value.float().clone(), entry.index, name))
            self._placed[entry.index] = weights
        return self._placed[entry.index]

    def _published_pairs(self, layer: int) -> dict[str, LoraPair]:
        """The pairs of a layer at the strength, or its prior; none where nothing was learnt."""
        assert isinstance(self._trainable, LowRankPairs)
        if self._strength == 0.0 or layer not in self._state:
            return {}
        if layer not in self._pairs:
            if isinstance(self._trainable, PersonalPairs):
                values = {name: self._from_state(layer, name) for name in self._state[layer]}
                self._pairs[layer] = self._pairs_from(values, self._strength)
            else:
                values = {
                    spec.name: self._start(layer, spec).to(self.device, self.dtype) for spec in self._specs_of(layer)
                }
                self._pairs[layer] = self._pairs_from(values, self._strength * self._trainable.scaling)
        return self._pairs[layer]

    def _from_state(self, unit: int, name: str) -> Tensor:
        """A tensor of the state in the compute dtype."""
        return torch.from_numpy(np.array(self._state[unit][name], dtype=np.float32)).to(self.device, self.dtype)

    def _specs_of(self, unit: int) -> tuple[TensorSpec, ...]:
        assert self.plan is not None
        return unit_tensors(self.plan.units, unit)

    def _pairs_from(self, values: Mapping[str, Tensor], scale: float) -> dict[str, LoraPair]:
        """A pair for every linear; those that are no target get one of rank 0, which adds zeros."""
        sizes = {spec.name: spec.shape for spec in self.shape.block_tensors()}
        pairs: dict[str, LoraPair] = {}
        for linear in self.linears:
            a, b = values.get(f"{linear}.lora_A"), values.get(f"{linear}.lora_B")
            if a is None or b is None:
                out, inner = sizes[f"{linear}.weight"]
                a = torch.zeros(0, inner, dtype=self.dtype, device=self.device)
                b = torch.zeros(out, 0, dtype=self.dtype, device=self.device)
            pairs[linear] = LoraPair(a, b, scale)
        return pairs

    def _frozen_layer(self, position: int, entry: StackEntry) -> BlockWeights:
        """A base layer as the backbone has it."""
        if self._frozen == "nf4" and position >= self.base_cut:
            if entry.index not in self._packed:
                stored = self.backbone.packed(entry.index)
                self._packed[entry.index] = BlockWeights.packed(self.shape, stored, self.dtype)
            return self._packed[entry.index]
        return self.backbone.block(entry.index, self.dtype)

    def _table(self, name: str) -> Tensor:
        """Embedding or head (V, H), or the final norm where it trains, in the compute dtype or as it trains; read when
        it is first needed."""
        if name == HEAD and self.shape.tied_embeddings:
            name = EMBEDDING
        if self._as_base and self._trains_tables:
            found = self._base_parts.get(name)
            if not isinstance(found, Tensor):
                found = self._base_parts[name] = self.checkpoint.tensor(name).to(self.device, self.dtype)
            return found
        if name not in self._tables:
            value = self.checkpoint.tensor(name)
            if self._trains_tables:
                value = self._moved(value.float(), self.shape.num_layers, name)
            self._tables[name] = value.to(self.device, self.dtype)
        return self._tables[name]

    # How it computes

    def embed_samples(self, samples: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """What enters position 0 of samples, one after another: (tokens, H)."""
        return self.embed(torch.from_numpy(np.concatenate(samples).astype(np.int64)).unsqueeze(0))[0]

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> (B, T, H); only the rows of these tokens are read where the table is not held."""
        name = self.embedding_name
        if self._residency == "suffix" and name not in self._tables and not self._trains_tables:
            rows = self.checkpoint.rows(name, ids.flatten().cpu().numpy(), self.dtype)
            return rows.view(*ids.shape, self.shape.hidden_size).to(self.device)
        return torch.nn.functional.embedding(ids.to(self.device), self._table(name)).to(self.dtype)

    def forward(
        self, inputs: Tensor, from_position: int = 0, to_position: int | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Runs the blocks ``from_position .. to_position - 1``.

        Args:
            inputs: hidden states (B, T, H) entering ``from_position``, or token ids (B, T) where that is 0.
            to_position: default: the top of the stack.
            rows: (N,) ascending flat indices into B·T: only these rows of the result are wanted.

        Returns:
            The residual stream (B, T, H), before the final norm at the top; (N, H) where ``rows`` are given.
        """
        h = inputs if inputs.is_floating_point() else self.embed(inputs)
        last = (self.num_positions if to_position is None else to_position) - 1
        for position in range(from_position, last + 1):
            apart = position == last and rows is not None and self._pays(rows, h, position)
            h = self.run(h, position, rows=rows if apart else None)
        return h.flatten(0, 1).index_select(0, rows) if rows is not None and h.dim() == 3 else h

    def _pays(self, rows: Tensor, h: Tensor, position: int) -> bool:
        """Is it worth computing these rows apart? Also: no rows at all need the ordinary way to have a gradient."""
        replaced = self._replaced.get(position)
        if isinstance(self._trainable, LowRankPairs) or (replaced is not None and replaced.lora):
            return False
        return 0 < len(rows) <= ROWS_APART_SHARE * h.shape[0] * h.shape[1]

    def forward_base(self, inputs: Tensor, from_position: int = 0) -> Tensor:
        """As :meth:`forward` to the top, skipping every expanded block: the base itself (the teacher)."""
        with self.base_only():
            h = inputs if inputs.is_floating_point() else self.embed(inputs)
            for position in range(from_position, self.num_positions):
                if self.stack[position].kind == "base":
                    h = self.run(h, position)
            return h

    def run(
        self,
        h: Tensor,
        position: int,
        weights: BlockWeights | None = None,
        rows: Tensor | None = None,
        lengths: Tensor | None = None,  # noqa: ARG002 - an encoder's
    ) -> Tensor:
        """One position of the stack: (B, T, H) -> (B, T, H), or (N, H) for ``rows``.

        Args:
            weights: instead of those that the model holds for this position.
            lengths: (B,) real tokens of each row, where there are pads; only an encoder asks.
        """
        weights, spec = weights or self.weights(position), self._specs[position]
        if self.recompute and torch.is_grad_enabled():
            return recomputed(lambda x: block_forward(x, weights, spec, self._rotary, rows), h)
        return block_forward(h, weights, spec, self._rotary, rows)

    def final_rows(self, h: Tensor) -> Tensor:
        """The final norm on rows (N, H) of the residual stream: what the head reads."""
        weight = self._table(FINAL_NORM) if self._trains_tables else self._final_norm
        return rms_norm(h, weight.to(h.dtype), self._eps)

    @property
    def head(self) -> Tensor:
        """The output matrix (V, H)."""
        return self._table(HEAD).to(self.dtype)

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
                torch.empty(size, dtype=self.dtype, device=self.device),
                torch.empty(size, dtype=self.dtype, device=self.device),
            )
            for _ in self.stack
        ]

    # What trains

    def train_units(
        self,
        units: Sequence[int],
        optimizer: OptimizerMode = "fp32",
        width: float = 1.0,
        chosen: Chosen | None = None,
    ) -> list[ParamGroup]:
        """Makes these units of the plan leaf parameters, at this width where they have one; all else stays frozen.

        Args:
            chosen: the rows of each pair's B that train, of personal pairs at a width below 1.

        Returns:
            One group for each unit, in their order, its tensors named and shaped as ``unit_tensors`` says.

        Raises:
            ValueError: the strength is not 1, there is no such width, or no rows are chosen where it asks for them.
        """
        match self._trainable:
            case ExpandedBlocks():
                return self.train_blocks(units, optimizer, width)
            case LowRankPairs() | BaseTensors():
                if self._strength != 1.0:
                    raise ValueError(f"training at strength {self._strength}, expected 1: it is for evaluation only")
                self._replaced.clear()
                if isinstance(self._trainable, LowRankPairs):
                    return [self._train_pairs(unit, width, (chosen or {}).get(unit, {})) for unit in units]
                return [self._train_base_unit(unit) for unit in units]
            case MergedLinears():
                raise ValueError("merged weights are published, not trained: the pairs train")

    def score_units(self, units: Sequence[int]) -> list[ParamGroup]:
        """Personal pairs before their rows are chosen: B of all rows, zero, is a leaf; A has no gradient.

        Returns:
            One group for each unit, in their order; only what is B has a name in it.
        """
        self._replaced.clear()
        groups: list[ParamGroup] = []
        for layer in units:
            values = {spec.name: self._start(layer, spec).to(self.device) for spec in self._specs_of(layer)}
            named = {name: value.requires_grad_() for name, value in values.items() if name.endswith(".lora_B")}
            self._put_pairs(layer, values, {})
            groups.append(ParamGroup(name=f"layer {layer}", tensors=tuple(named.values()), named=named))
        return groups

    def _put_pairs(self, layer: int, values: Mapping[str, Tensor], chosen: Mapping[str, RowMask]) -> None:
        """Have these pairs over a layer, and over its prior where it has one."""
        assert isinstance(self._trainable, LowRankPairs)
        position = self.stack.index(StackEntry(kind="base", index=layer))
        entry = self.stack[position]
        frozen = self._changed_layer(entry) if self._trainable.merged else self._frozen_layer(position, entry)
        pairs = self._pairs_from(values, self._trainable.scaling)
        prior = self._published_pairs(layer) if isinstance(self._trainable, PersonalPairs) else {}
        for linear, pair in pairs.items():
            mask = chosen.get(f"{linear}.lora_B")
            if mask is not None:
                rows = torch.from_numpy(np.flatnonzero(mask)).to(self.device)
                pairs[linear] = replace(pair, rows=rows, num_out=len(mask))
            if linear in prior and len(prior[linear].a):
                pairs[linear] = replace(pairs[linear], prior=prior[linear])
        self._pairs.pop(layer, None)
        self._replaced[position] = replace(frozen, lora=pairs)

    def _train_pairs(self, layer: int, width: float, chosen: Mapping[str, RowMask]) -> ParamGroup:
        """Low-rank pairs over one layer, which is frozen beside them."""
        assert self.plan is not None
        named: dict[str, Tensor] = {}
        decayed: list[Tensor] = []
        trained = unit_tensors(self.plan.units, layer, width)
        for spec, part in zip(self._specs_of(layer), trained, strict=True):
            mask = chosen.get(part.name)
            if isinstance(part, ChosenRows) and (mask is None or int(mask.sum()) != part.shape[0]):
                raise ValueError(
                    f"layer {layer}: {part.name} trains {part.shape[0]} rows at width {width:g}, and "
                    f"{0 if mask is None else int(mask.sum())} are chosen"
                )
            value = _first(self._start(layer, spec), part.shape)
            named[spec.name] = value.to(self.device).contiguous().clone().requires_grad_()
            if spec.is_out:
                decayed.append(named[spec.name])
        self._put_pairs(layer, named, chosen if width < 1.0 else {})
        return ParamGroup(name=f"layer {layer}", tensors=tuple(named.values()), decayed=tuple(decayed), named=named)

    def _train_base_unit(self, unit: int) -> ParamGroup:
        """One base layer, or embedding, final norm and head, in fp32."""
        if unit == self.shape.num_layers:
            self._tables.clear()
            for spec in self._specs_of(unit):
                self._tables[spec.name] = self._start(unit, spec).to(self.device).requires_grad_()
            return ParamGroup(name=f"tables {unit}", tensors=tuple(self._tables.values()), named=dict(self._tables))
        self._placed.pop(unit, None)
        weights = BlockWeights.empty(self.shape, torch.float32, self.device)
        places = weights.named(self.shape)
        for spec in self._specs_of(unit):
            places[spec.name].copy_(self._start(unit, spec))
        leaves = weights.as_leaves()
        self._replaced[self.stack.index(StackEntry(kind="base", index=unit))] = leaves
        return _group(f"layer {unit}", leaves, leaves.named(self.shape))

    def train_blocks(
        self, blocks: Sequence[int], optimizer: OptimizerMode = "fp32", width: float = 1.0
    ) -> list[ParamGroup]:
        """Makes these expanded blocks, or the slices of this width, leaf parameters; all else stays frozen.

        They train in place: from here to the next :meth:`load_state` the model is the local one. A slim block computes
        as the whole one does; its tensors have the shapes of ``shape.block_tensors(width)``.

        Args:
            optimizer: with bf16 arithmetic, ``split`` and ``split_8bit`` keep the fp32 value as a bf16 half, which the
                arithmetic reads, and its int16 remainder; otherwise the value is one fp32 tensor.

            width: one of ``model_shape.WIDTHS``.

        Raises:
            ValueError: the strength is not 1, or there is no such width.
        """
        assert self.plan is not None
        trained = slim_shape(self.shape, width)
        if self._strength != 1.0:
            raise ValueError(
                f"training at strength {self._strength}, expected 1: strength is for evaluation and export"
            )
        self._replaced.clear()
        groups: list[ParamGroup] = []
        for block_id in blocks:
            self._placed.pop(block_id, None)
            lows = None
            if optimizer != "fp32" and self.dtype != torch.float32:
                leaves, lows = self._split_block(block_id, trained)
            else:
                leaves = self._leaf_block(block_id, trained)
            weights = leaves
            if width != 1.0:
                weights = BlockWeights.slim(self._block(block_id, self.dtype), leaves, self.shape, width)
            self._replaced[self.plan.position(block_id)] = weights
            groups.append(
                ParamGroup(
                    name=f"block {block_id}",
                    tensors=tuple(leaves.tensors().values()),
                    lows=tuple(lows.tensors().values()) if lows else (),
                    decayed=leaves.out_tensors(),
                    named=leaves.named(trained),
                    named_lows=lows.named(trained) if lows else {},
                    after_step=weights.refresh,
                )
            )
        return groups

    def _start_of(self, block_id: int, trained: ModelShape) -> Iterator[tuple[str, Tensor]]:
        """The published fp32 values of a block's trained slices, one at a time."""
        for spec, part in zip(self.shape.block_tensors(), trained.block_tensors(), strict=True):
            yield spec.name, _first(self._start(block_id, spec), part.shape)

    def _leaf_block(self, block_id: int, trained: ModelShape) -> BlockWeights:
        """The published value as fp32 leaves."""
        weights = BlockWeights.empty(trained, torch.float32, self.device)
        places = weights.named(trained)
        for name, value in self._start_of(block_id, trained):
            places[name].copy_(value)
        return weights.as_leaves()

    def _split_block(self, block_id: int, trained: ModelShape) -> tuple[BlockWeights, BlockWeights]:
        """The published value as bf16 leaves and int16 remainders; one fp32 tensor exists at a time."""
        high, low = (BlockWeights.empty(trained, dtype, self.device) for dtype in (torch.bfloat16, torch.int16))
        highs, lows = high.named(trained), low.named(trained)
        for name, value in self._start_of(block_id, trained):
            split = split_fp32(value)
            highs[name].copy_(split[0])
            lows[name].copy_(split[1])
        return high.as_leaves(), low

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
                    weights = BlockWeights.of(self.shape, tensors, torch.float32, self.device)
                leaves = weights.as_leaves()
                self._replaced[position] = leaves
                named = {f"model.layers.{entry.index}.{n}": t for n, t in leaves.named(self.shape).items()}
                groups.append(_group(f"layer {entry.index}", leaves, named))
        if embeddings:
            self._final_norm = self._final_norm.detach().float().clone().requires_grad_()
            named = {FINAL_NORM: self._final_norm}
            for name in (EMBEDDING,) if self.shape.tied_embeddings else (EMBEDDING, HEAD):
                self._tables[name] = self._table(name).detach().float().clone().requires_grad_()
                named[name] = self._tables[name]
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
                a = ((torch.rand(rank, inner, generator=generator) * 2 - 1) / inner**0.5).to(self.device)
                b = torch.zeros(out, rank, device=self.device)
                a.requires_grad_()
                b.requires_grad_()
                pairs[linear] = LoraPair(a, b, alpha / rank)
                named[f"model.layers.{entry.index}.{linear}.lora_A"] = a
                named[f"model.layers.{entry.index}.{linear}.lora_B"] = b
            self._replaced[position] = replace(self.weights(position), lora=pairs)
        return [ParamGroup(name="lora", tensors=tuple(named.values()), named=named)]

    def ends(self, groups: Sequence[ParamGroup]) -> Callable[[int, str], tuple[Tensor, Tensor]]:
        """(block id, tensor name) -> trained value and the value that training started from, fp32 on the device, in
        the shape that was trained."""
        assert self.plan is not None
        state = self._state
        by_block = _by_block(groups)
        specs = {
            (block_id, spec.name): spec for block_id in by_block for spec in unit_tensors(self.plan.units, block_id)
        }

        def both(block_id: int, name: str) -> tuple[Tensor, Tensor]:
            value = by_block[block_id].value(name)
            start = _first(self._start(block_id, specs[block_id, name], state), value.shape)
            return value, start.to(value.device)

        return both

    def deltas(self, groups: Sequence[ParamGroup]) -> dict[int, LazyTensors]:
        """Trained value minus the value that training started from, of the groups of :meth:`train_units`; of slim
        blocks in the shapes that were trained.

        Computed tensor by tensor as they are asked for; the start is derived again from the checkpoint and the state
        instead of being kept beside the weights.
        """
        ends = self.ends(groups)

        def reader(block_id: int) -> Callable[[str], npt.NDArray[np.float32]]:
            def read(name: str) -> npt.NDArray[np.float32]:
                value, start = ends(block_id, name)
                return (value - start).cpu().numpy()

            return read

        return {block_id: LazyTensors(group.named, reader(block_id)) for block_id, group in _by_block(groups).items()}


def open_model(
    *,
    backbone: FrozenLayers,
    checkpoint: Checkpoint,
    plan: ExpansionPlan | None = None,
    state: State | None = None,
    dtype: torch.dtype = torch.float32,
) -> ExpandedModel:
    """The model over this base: an :class:`ExpandedModel`, or the ``EncoderModel`` of an encoder."""
    from fedblocks.edge_client.encoder_model import EncoderModel

    kind = EncoderModel if checkpoint.shape.encoder else ExpandedModel
    return kind(backbone=backbone, checkpoint=checkpoint, plan=plan, state=state, dtype=dtype)


def _by_block(groups: Sequence[ParamGroup]) -> dict[int, ParamGroup]:
    """Those of :meth:`ExpandedModel.train_units` by the number of their unit."""
    return {int(group.name.rpartition(" ")[2]): group for group in groups}


def _first(values: Tensor, shape: Sequence[int]) -> Tensor:
    """A view of the first rows and columns: a slim block's part of a whole tensor."""
    return values[tuple(slice(size) for size in shape)]


def _group(
    name: str, leaves: BlockWeights, named: Mapping[str, Tensor], decayed: tuple[Tensor, ...] = ()
) -> ParamGroup:
    return ParamGroup(name=name, tensors=tuple(leaves.tensors().values()), decayed=decayed, named=named)
