"""How does one pre-norm decoder block compute? As plain functions over its weights, equal to transformers' own classes.

One block serves llama, mistral, qwen2 and qwen3: they differ in biases and in a norm on q and k, which the weights
show. Rows are right-padded, so causal attention needs no padding mask: pads come after every real token and are never
read.

    x → norm → q|k|v (one matrix) → q/k norm → rotary → causal attention → o → + x → norm → gate|up → silu·up → down → +

Where only some rows of the output are wanted (the topmost block of a training step: those that carry a label), keys and
values are computed of all rows, and everything else of those rows alone (runtime.md 2.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from fedblocks.edge_client.rotary import Rotary
from fedblocks.kernels.ops import (
    Nf4Weight,
    Ranges,
    attention_in,
    frozen_nf4_linear,
    mlp,
    rms_norm,
    rope,
    slim_linear,
    swiglu,
)
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.protocol.expansion import DEFAULT_WINDOW, family_of, layer_types

CPU: Final = torch.device("cpu")
LINEARS: Final = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a named tensor lies: rows ``start:stop`` of a field of :class:`BlockWeights`."""

    field: str
    start: int
    stop: int


def layout(shape: ModelShape) -> dict[str, Piece]:
    """Suffix of each block tensor -> its place, in the order of ``shape.block_tensors()``."""
    q, kv, i = shape.q_size, shape.kv_size, shape.intermediate_size
    joined = {
        "attention.self.query": ("qkv", 0),
        "attention.self.key": ("qkv", q),
        "attention.self.value": ("qkv", q + kv),
        "attention.output.dense": ("o", 0),
        "attention.output.LayerNorm": ("post_norm", 0),
        "intermediate.dense": ("gate_up", 0),
        "output.dense": ("down", 0),
        "output.LayerNorm": ("output_norm", 0),
        "self_attn.q_proj": ("qkv", 0),
        "self_attn.k_proj": ("qkv", q),
        "self_attn.v_proj": ("qkv", q + kv),
        "self_attn.o_proj": ("o", 0),
        "mlp.gate_proj": ("gate_up", 0),
        "mlp.up_proj": ("gate_up", i),
        "mlp.down_proj": ("down", 0),
        "input_layernorm": ("input_norm", 0),
        "post_attention_layernorm": ("post_norm", 0),
        "self_attn.q_norm": ("q_norm", 0),
        "self_attn.k_norm": ("k_norm", 0),
    }
    places: dict[str, Piece] = {}
    for spec in shape.block_tensors():
        module, kind = spec.name.rsplit(".", 1)
        name, start = joined[module]
        places[spec.name] = Piece(name + "_bias" if kind == "bias" else name, start, start + spec.shape[0])
    return places


@dataclass(frozen=True, slots=True)
class LoraPair:
    """A low-rank addition to one linear layer: ``y += scale · (x Aᵀ) Bᵀ`` (Hu et al., arXiv 2106.09685)."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r), or (k, r) of the rows alone
    scale: float
    rows: Tensor | None = None  # (k,) int64, ascending: the outputs that B adds to; None: all
    num_out: int = 0
    """out, where there are ``rows``."""
    prior: LoraPair | None = None
    """Another pair beneath it, frozen."""

    def of(self, x: Tensor) -> Tensor:
        """What it adds: x (..., in) -> (..., out)."""
        change = self.scale * functional.linear(functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        if self.rows is not None:
            change = change.new_zeros(*change.shape[:-1], self.num_out).index_add(-1, self.rows, change)
        return change if self.prior is None else change + self.prior.of(x)


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """NF4 matrices of equal width, stacked; decoded at each use, in the backward pass again."""

    parts: tuple[Nf4Weight, ...]


@dataclass(frozen=True, slots=True, eq=False)
class SlimMatrix:
    """A matrix that is there whole and of which a slice trains (methods.md 3.3); of its bias the same rows do."""

    whole: Tensor  # (N, K), in the compute dtype
    leaf: Tensor  # rows ``rows`` of it below each other (n, K), or its first columns (N, k)
    rows: Ranges | None
    """None: columns train."""
    bias: Tensor | None = None  # (N,), in the compute dtype
    bias_leaf: Tensor | None = None  # (n,)

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings the leaves' values to where the arithmetic reads them."""
        if self.rows is None:
            self.whole[:, : self.leaf.shape[1]].copy_(self.leaf)
            return
        sizes = [stop - start for start, stop in self.rows]
        for whole, leaf in ((self.whole, self.leaf), (self.bias, self.bias_leaf)):
            if whole is not None and leaf is not None:
                for (start, stop), part in zip(self.rows, leaf.split(sizes), strict=True):
                    whole[start:stop].copy_(part)

    def split(self, row: int) -> tuple[SlimMatrix, SlimMatrix]:
        """The rows before ``row`` and those from it on; no range of rows may lie on both sides."""
        assert self.rows is not None
        upper = tuple(r for r in self.rows if r[1] <= row)
        lower = tuple((start - row, stop - row) for start, stop in self.rows if start >= row)
        sizes = [sum(stop - start for start, stop in rows) for rows in (upper, lower)]
        leaves = self.leaf.split(sizes)
        biases = (None, None) if self.bias is None else (self.bias[:row], self.bias[row:])
        bias_leaves = (None, None) if self.bias_leaf is None else self.bias_leaf.split(sizes)
        return (
            SlimMatrix(self.whole[:row], leaves[0], upper, biases[0], bias_leaves[0]),
            SlimMatrix(self.whole[row:], leaves[1], lower, biases[1], bias_leaves[1]),
        )


Matrix = Tensor | PackedRows | SlimMatrix
"""A weight that is there, one that is decoded when it is read, or one of which a slice trains."""


def slim_shape(shape: ModelShape, width: float) -> ModelShape:
    """The shape whose whole blocks are the slices of this width: ``block_tensors()`` is ``shape.block_tensors(width)``.

    Raises:
        ValueError: not one of ``model_shape.WIDTHS``.
    """
    heads, kv_heads, neurons = shape.slice_sizes(width)
    return replace(shape, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=neurons)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockWeights:
    """All tensors of one block; q, k, v and gate, up are rows of one matrix each.

    A frozen block may hold its matrices packed (:meth:`packed`), a slim one has matrices of which a slice trains
    (:meth:`slim`); then :meth:`named` and :meth:`tensors` are not for it.
    """

    qkv: Matrix  # (q + 2·kv, H)
    o: Matrix  # (H, q)
    post_norm: Tensor  # (H,), after the attention
    gate_up: Matrix  # (2·I, H); (I, H) in an encoder
    down: Matrix  # (H, I)
    input_norm: Tensor | None = None  # (H,), of a decoder
    post_norm_bias: Tensor | None = None  # of an encoder, as are the next two
    output_norm: Tensor | None = None
    output_norm_bias: Tensor | None = None
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None  # (hd,)
    k_norm: Tensor | None = None  # (hd,)
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    lora: Mapping[str, LoraPair] = field(default_factory=dict)
    """Module path (``self_attn.q_proj``) -> pair; empty but for the LoRA baselines."""

    @classmethod
    def empty(cls, shape: ModelShape, dtype: torch.dtype, device: torch.device = CPU) -> BlockWeights:
        """Uninitialised tensors of the right sizes, to be filled through :meth:`named`."""
        sizes: dict[str, list[int]] = {}
        for spec, piece in zip(shape.block_tensors(), layout(shape).values(), strict=True):
            rows, *rest = spec.shape
            size = sizes.setdefault(piece.field, [0, *rest])
            size[0] += rows
        return cls(**{name: torch.empty(size, dtype=dtype, device=device) for name, size in sizes.items()})

    @classmethod
    def of(
        cls, shape: ModelShape, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device = CPU
    ) -> BlockWeights:
        """From tensors named by suffix; each is copied and cast."""
        weights = cls.empty(shape, dtype, device)
        for name, place in weights.named(shape).items():
            place.copy_(tensors[name])
        return weights

    @classmethod
    def packed(cls, shape: ModelShape, stored: Mapping[str, Nf4Weight | Tensor], dtype: torch.dtype) -> BlockWeights:
        """From a layer as the backbone stores it; vectors are cast, matrices stay in NF4."""
        matrices: dict[str, list[Nf4Weight]] = {}
        vectors: dict[str, list[Tensor]] = {}
        for name, piece in layout(shape).items():
            value = stored[name]
            if isinstance(value, Nf4Weight):
                matrices.setdefault(piece.field, []).append(value)
            else:
                vectors.setdefault(piece.field, []).append(value.to(dtype))
        return cls(
            **{name: PackedRows(tuple(parts)) for name, parts in matrices.items()},
            **{name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in vectors.items()},
        )

    @classmethod
    def slim(cls, whole: BlockWeights, leaves: BlockWeights, shape: ModelShape, width: float) -> BlockWeights:
        """A block that computes with all of ``whole`` and of which only ``leaves`` train.

        Args:
            whole: in the compute dtype; its slices take over the values of ``leaves``.
            leaves: a block of :func:`slim_shape`; norms and the biases of the out-projections are whole in it.
        """
        outer, inner = layout(shape), layout(slim_shape(shape, width))

        def rows(place: str) -> Ranges:
            names = [name for name, piece in outer.items() if piece.field == place]
            return tuple((outer[n].start, outer[n].start + inner[n].stop - inner[n].start) for n in names)

        weights = replace(
            leaves,
            qkv=SlimMatrix(whole.qkv, leaves.qkv, rows("qkv"), whole.qkv_bias, leaves.qkv_bias),
            o=SlimMatrix(whole.o, leaves.o, None),
            gate_up=SlimMatrix(whole.gate_up, leaves.gate_up, rows("gate_up"), whole.gate_up_bias, leaves.gate_up_bias),
            down=SlimMatrix(whole.down, leaves.down, None),
            qkv_bias=None,
            gate_up_bias=None,
        )
        weights.refresh()
        return weights

    @property
    def is_slim(self) -> bool:
        """True for a block of :meth:`slim`."""
        return isinstance(self.qkv, SlimMatrix)

    def refresh(self) -> None:
        """Brings the trained values of a slim block to where its arithmetic reads them."""
        for matrix in (self.qkv, self.o, self.gate_up, self.down):
            if isinstance(matrix, SlimMatrix):
                matrix.refresh()

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor, absent ones left out; what an optimizer holds."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "lora")
        return {name: tensor for name, tensor in named if tensor is not None}

    def named(self, shape: ModelShape) -> dict[str, Tensor]:
        """Suffix -> view of its rows."""
        return {name: getattr(self, p.field)[p.start : p.stop] for name, p in layout(shape).items()}

    def gradients(self, shape: ModelShape) -> dict[str, Tensor | None]:
        """Suffix -> view of its rows of the gradient, None before the first backward pass."""
        grads = {name: tensor.grad for name, tensor in self.tensors().items()}
        return {
            name: None if grads[p.field] is None else grads[p.field][p.start : p.stop]  # type: ignore[index]
            for name, p in layout(shape).items()
        }

    def out_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that carry identity and strength (methods.md 2.2)."""
        return tuple(t for t in (self.o, self.o_bias, self.down, self.down_bias) if t is not None)

    def at_strength(self, strength: float) -> BlockWeights:
        """The same block with its out-tensors multiplied by ``strength``, in their own precision (fp32)."""
        names = [name for name in ("o", "o_bias", "down", "down_bias") if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name) * strength for name in names})

    def cast(self, dtype: torch.dtype) -> BlockWeights:
        """The same block in the compute dtype; differentiable; itself where nothing changes."""
        if self.post_norm.dtype == dtype:
            return self
        held = {name: tensor for name, tensor in self.tensors().items() if isinstance(tensor, Tensor)}
        return replace(self, **{name: tensor.to(dtype) for name, tensor in held.items()})

    def as_leaves(self) -> BlockWeights:
        """The same memory as leaf parameters that require a gradient."""
        return replace(self, **{name: tensor.detach().requires_grad_() for name, tensor in self.tensors().items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """What a block needs to know beside its weights."""

    shape: ModelShape
    eps: float
    window: int | None = None
    """Sliding attention window in tokens; None: full attention."""
    fused: bool = False
    """Run what lies before and behind attention as one step each, which saves launches and kept bytes and costs some
    arithmetic: for a GPU."""


def attention_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Sliding window of each base layer, None for full attention.

    Args:
        config: the base's config.json.
        num_layers: its depth.
    """
    family = family_of(config)
    if family.windows == "none":  # a family without windows ignores a stray key
        return (None,) * num_layers
    window = config.get("sliding_window", DEFAULT_WINDOW)
    if family.windows == "by layer" and not config.get("use_sliding_window", False):
        window = None
    types = layer_types(config)
    if types is None:  # without a list the window is one number for all layers (mistral)
        return (window,) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def linear(
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    pairs: Mapping[str, LoraPair] | None = None,
    names: Sequence[str] = (),
) -> Tensor:
    """``x Wᵀ + bias`` in whatever form W is held, and the low-rank pairs of the linears ``names`` beside it."""
    if isinstance(weight, SlimMatrix):
        if weight.rows is None:
            return slim_linear(x, weight.whole, weight.leaf, None, bias, bias)
        return slim_linear(x, weight.whole, weight.leaf, weight.rows, weight.bias, weight.bias_leaf)
    if isinstance(weight, PackedRows):
        y = frozen_nf4_linear(x, weight.parts, bias)
    else:
        y = functional.linear(x, weight, bias)
    if not pairs:
        return y
    return y + torch.cat([pairs[name].of(x) for name in names], dim=-1)


def _window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys) bool, True where the query may look; the queries are the last rows of the keys' positions."""
    positions = torch.arange(keys, device=device)
    distance = positions[keys - queries :].unsqueeze(1) - positions
    return (distance >= 0) & (distance < window)


def _parts_of(weight: Tensor | PackedRows) -> Tensor | tuple[Nf4Weight, ...]:
    return weight.parts if isinstance(weight, PackedRows) else weight


def _project(x: Tensor, w: BlockWeights, spec: BlockSpec, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projection, q/k norm and rotation: q (B, nh, T, hd), k and v (B, nkv, T, hd)."""
    shape = spec.shape
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    if spec.fused and w.q_norm is None and not w.lora and not w.is_slim:
        parts = attention_in(x, w.input_norm, _parts_of(w.qkv), w.qkv_bias, (cos, sin), (heads, kv_heads), spec.eps)
        q, k, v = (part.transpose(1, 2) for part in parts)
        return q, k, v
    joined = linear(rms_norm(x, w.input_norm, spec.eps), w.qkv, w.qkv_bias, w.lora, LINEARS[:3])
    joined = joined.view(*x.shape[:2], heads + 2 * kv_heads, shape.head_dim).transpose(1, 2)
    v = joined[:, heads + kv_heads :]
    if w.q_norm is not None and w.k_norm is not None:
        q = rms_norm(joined[:, :heads], w.q_norm, spec.eps)
        k = rms_norm(joined[:, heads : heads + kv_heads], w.k_norm, spec.eps)
        return rope(q, cos, sin), rope(k, cos, sin), v
    q, k = rope(joined[:, : heads + kv_heads], cos, sin).split((heads, kv_heads), dim=1)
    return q, k, v


def _split_qkv(w: BlockWeights, q_size: int) -> tuple[tuple[Matrix, Tensor | None], tuple[Matrix, Tensor | None]]:
    """(matrix, bias) of q, and of k and v together."""
    bias = w.qkv_bias
    biases = (None, None) if bias is None else (bias[:q_size], bias[q_size:])
    if isinstance(w.qkv, PackedRows):
        return (PackedRows(w.qkv.parts[:1]), biases[0]), (PackedRows(w.qkv.parts[1:]), biases[1])
    if isinstance(w.qkv, SlimMatrix):
        q, kv = w.qkv.split(q_size)
        return (q, None), (kv, None)
    return (w.qkv[:q_size], biases[0]), (w.qkv[q_size:], biases[1])


def _repeat_kv(x: Tensor, groups: int) -> Tensor:
    """Every key or value head once for each of its query heads: (B, nkv, T, hd) -> (B, nh, T, hd)."""
    return x if groups == 1 else x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, spec: BlockSpec) -> Tensor:
    """Causal attention of the last T_q positions over all T_k: (B, T_q, nh·hd)."""
    groups = spec.shape.num_heads // spec.shape.num_kv_heads
    queries, keys = q.shape[2], k.shape[2]
    windowed = spec.window is not None and keys > spec.window
    if q.is_cuda and groups > 1 and not windowed:  # its kernels read shared keys as they are; a CPU's does not
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)
    k, v = _repeat_kv(k, groups), _repeat_kv(v, groups)
    if windowed:
        assert spec.window is not None
        mask = _window_mask(queries, keys, spec.window, q.device)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:  # one query alone may look at everything; otherwise queries and keys are the same positions
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=queries > 1)
    return out.transpose(1, 2).flatten(2)


def _finish(x: Tensor, attended: Tensor, w: BlockWeights, spec: BlockSpec) -> Tensor:
    """Output projection, residual and the MLP half."""
    x = x + linear(attended, w.o, w.o_bias, w.lora, LINEARS[3:4])
    if spec.fused and not w.lora and not w.is_slim:
        weights = (_parts_of(w.gate_up), w.gate_up_bias, _parts_of(w.down), w.down_bias)
        return mlp(x, w.post_norm, *weights, spec.eps)
    gate_up = linear(rms_norm(x, w.post_norm, spec.eps), w.gate_up, w.gate_up_bias, w.lora, LINEARS[4:6])
    return x + linear(swiglu(gate_up), w.down, w.down_bias, w.lora, LINEARS[6:])


def block_forward(
    x: Tensor, weights: BlockWeights, spec: BlockSpec, rotary: Rotary, rows: Tensor | None = None
) -> Tensor:
    """One block over right-padded rows: x (B, T, H) -> (B, T, H), or only ``rows`` of it.

    Args:
        rows: (N,) int64, ascending indices into B·T, at least one; the result is then (N, H).
    """
    weights = weights.cast(x.dtype)
    if rows is not None:
        return _rows_forward(x, weights, spec, rotary, rows)
    q, k, v = _project(x, weights, spec, *rotary.tables(x.shape[1]))
    return _finish(x, _attend(q, k, v, spec), weights, spec)


def _rows_forward(x: Tensor, w: BlockWeights, spec: BlockSpec, rotary: Rotary, rows: Tensor) -> Tensor:
    """Keys and values of all rows of x (B, T, H); queries, output projection and MLP of ``rows`` alone: (N, H)."""
    if w.lora:
        raise ValueError("rows of a block with low-rank pairs are not computed apart; run the whole block")
    shape = spec.shape
    size, length = x.shape[:2]
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    cos, sin = rotary.tables(length)
    normed = rms_norm(x, w.input_norm, spec.eps)
    of_q, of_kv = _split_qkv(w, shape.q_size)
    kv = linear(normed, *of_kv, {}, ()).view(size, length, 2 * kv_heads, head_dim).transpose(1, 2)
    k, v = kv.split((kv_heads, kv_heads), dim=1)
    sample, position = rows // length, rows % length
    q = linear(normed.flatten(0, 1).index_select(0, rows), *of_q, {}, ()).view(-1, heads, head_dim)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = rms_norm(q, w.q_norm, spec.eps), rms_norm(k, w.k_norm, spec.eps)
    q = rope(q, cos[position].unsqueeze(1), sin[position].unsqueeze(1))
    k = rope(k, cos, sin)
    counts = torch.bincount(sample, minlength=size)
    longest = int(counts.max())
    slot = (
        torch.arange(len(rows), device=x.device) - (torch.cumsum(counts, 0) - counts)[sample]
    )  # which query of its sample
    places = sample * longest + slot
    ragged = len(rows) != size * longest
    if ragged:
        q = q.new_zeros(size * longest, heads, head_dim).index_copy(0, places, q)
    q = q.view(size, longest, heads, head_dim).transpose(1, 2)
    looks_from = rows.new_zeros(size * longest)  # an empty place looks at the first token: no NaN
    looks_from[places] = position
    distance = looks_from.view(size, 1, longest, 1) - torch.arange(length, device=x.device)
    mask = distance >= 0
    if spec.window is not None:
        mask &= distance < spec.window
    groups = heads // kv_heads
    out = functional.scaled_dot_product_attention(q, _repeat_kv(k, groups), _repeat_kv(v, groups), attn_mask=mask)
    attended = out.transpose(1, 2).reshape(size * longest, heads * head_dim)
    if ragged:
        attended = attended.index_select(0, places)
    return _finish(x.flatten(0, 1).index_select(0, rows), attended, w, spec)


def block_step(
    x: Tensor, weights: BlockWeights, spec: BlockSpec, rotary: Rotary, past: tuple[Tensor, Tensor], position: int
) -> Tensor:
    """One block for one more token of every row: x (B, 1, H) -> (B, 1, H).

    Args:
        past: keys and values (B, nkv, T_max, hd), written at ``position``.
        position: how many tokens came before.
    """
    weights = weights.cast(x.dtype)
    cos, sin = rotary.tables(position + 1)
    q, k, v = _project(x, weights, spec, cos[position:], sin[position:])
    keys, values = past
    keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
    return _finish(x, _attend(q, keys[:, :, : position + 1], values[:, :, : position + 1], spec), weights, spec)
