"""What sizes does a model have, and which tensors does one of its blocks consist of?

A :class:`ModelShape` is everything that cost, allocation and aggregation need to know about a model: no weights, no
torch, no configuration quirks.
``protocol/expansion.py`` makes one from a checkpoint's ``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

#: Widths of a slim block, ascending (methods.md 3): the share of its heads and neurons that train.
WIDTHS: Final = (0.125, 0.25, 0.5, 1.0)
#: Neurons are cut in multiples of this, in layers of at least so many (methods.md 3.1); else in eighths.
NEURON_UNIT: Final = 64
NEURON_UNIT_FROM: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a block, named by its suffix inside the layer (``self_attn.q_proj.weight``)."""

    name: str
    shape: tuple[int, ...]
    is_out: bool = False
    """True for the tensors that carry identity and strength (the output projections, methods.md 2.2)."""
    is_norm: bool = False
    """True for the norms of a post-norm block: strength multiplies what they have moved (methods.md 2.6)."""

    @property
    def size(self) -> int:
        """Number of elements."""
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def rows_cols(self) -> tuple[int, int]:
        """The tensor as ``[R, C]`` for the delta encoding: a vector is one row (methods.md 7.1)."""
        if len(self.shape) == 1:
            return 1, self.shape[0]
        return self.shape[0], self.size // self.shape[0]


@dataclass(frozen=True, slots=True)
class ChosenRows(TensorSpec):
    """Some rows of a tensor, chosen by who trains them: a row mask says which (``protocol/tensors.py``)."""

    num_rows: int = 0
    """Of the whole tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a pre-norm decoder of the Llama kind, or of an encoder; symbols of runtime.md in the comments."""

    family: str
    """The checkpoint's ``model_type``."""
    num_layers: int  # L
    hidden_size: int  # H
    intermediate_size: int  # I
    num_heads: int  # nh
    num_kv_heads: int  # nkv
    head_dim: int  # hd
    vocab_size: int  # V
    tied_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    encoder: bool = False
    """A post-norm encoder of the BERT kind: attention in both directions, LayerNorm, biases, GELU, no output matrix."""

    def __post_init__(self) -> None:
        for field in (
            "num_layers",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
        ):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"model shape: {field} is {value!r}, expected a whole number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model shape: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )

    @property
    def q_size(self) -> int:
        """Width of the query projection, nh·hd."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key (and of the value) projection, nkv·hd."""
        return self.num_kv_heads * self.head_dim

    @property
    def head_rows(self) -> int:
        """Rows of the output matrix: V, or 0 of an encoder, whose classification head costs next to nothing."""
        return 0 if self.encoder else self.vocab_size

    def slice_sizes(self, width: float) -> tuple[int, int, int]:
        """Query heads, key/value heads and neurons of a slim block (methods.md 3.1): always the first ones.

        Raises:
            ValueError: not one of :data:`WIDTHS`.
        """
        if width not in WIDTHS:
            raise ValueError(f"block width is {width!r}, expected one of {', '.join(map(str, WIDTHS))}")
        if width == 1.0:
            return self.num_heads, self.num_kv_heads, self.intermediate_size
        group = self.num_heads // self.num_kv_heads
        heads, kv_heads = max(1, int(width * self.num_heads)), 1
        if heads >= group:
            kv_heads = heads // group
            heads = group * kv_heads
        unit = NEURON_UNIT if self.intermediate_size >= NEURON_UNIT_FROM else max(1, self.intermediate_size // 8)
        return heads, kv_heads, max(unit, unit * int(width * self.intermediate_size / unit))

    def block_tensors(self, width: float = 1.0) -> tuple[TensorSpec, ...]:
        """All tensors of one block in the order in which they are hashed, encoded and folded.

        A slim block has the same tensors, each cut to its first rows (q, k, v, gate, up) or columns (o, down): nested,
        so that what a width trains every larger one trains too.

        Args:
            width: one of :data:`WIDTHS`.
        """
        return _block_tensors(self, width)

    def slice_parameters(self, width: float) -> int:
        """Parameters that train in a slim block of this width."""
        return sum(t.size for t in self.block_tensors(width))

    @property
    def linear_parameters(self) -> int:
        """P of runtime.md: parameters of the matrices of one block, 2Hq + 2H·kv + 3HI (encoders: 2HI)."""
        return sum(t.size for t in self.block_tensors() if len(t.shape) == 2)

    @property
    def block_parameters(self) -> int:
        """p_blk of runtime.md: all parameters of one block."""
        return sum(t.size for t in self.block_tensors())

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole base model; a tied head counts once, and an encoder's position table not at all."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * self.block_parameters + embeddings + self.hidden_size


@lru_cache(maxsize=256)
def _block_tensors(shape: ModelShape, width: float) -> tuple[TensorSpec, ...]:
    h = shape.hidden_size
    heads, kv_heads, i = shape.slice_sizes(width)
    q, kv = heads * shape.head_dim, kv_heads * shape.head_dim
    specs: list[TensorSpec] = []

    def linear(name: str, out: int, inner: int, bias: bool, is_out: bool = False) -> None:
        specs.append(TensorSpec(name=f"{name}.weight", shape=(out, inner), is_out=is_out))
        if bias:
            specs.append(TensorSpec(name=f"{name}.bias", shape=(out,), is_out=is_out))

    def layer_norm(name: str) -> None:
        specs.extend(TensorSpec(name=f"{name}.{kind}", shape=(h,), is_norm=True) for kind in ("weight", "bias"))

    if shape.encoder:
        linear("attention.self.query", q, h, shape.qkv_bias)
        linear("attention.self.key", kv, h, shape.qkv_bias)
        linear("attention.self.value", kv, h, shape.qkv_bias)
        linear("attention.output.dense", h, q, shape.o_bias, is_out=True)
        layer_norm("attention.output.LayerNorm")
        linear("intermediate.dense", i, h, shape.mlp_bias)
        linear("output.dense", h, i, shape.mlp_bias, is_out=True)
        layer_norm("output.LayerNorm")
        return tuple(specs)
    specs.append(TensorSpec(name="input_layernorm.weight", shape=(h,)))
    linear("self_attn.q_proj", q, h, shape.qkv_bias)
    linear("self_attn.k_proj", kv, h, shape.qkv_bias)
    linear("self_attn.v_proj", kv, h, shape.qkv_bias)
    if shape.qk_norm:
        specs += [
            TensorSpec(name="self_attn.q_norm.weight", shape=(shape.head_dim,)),
            TensorSpec(name="self_attn.k_norm.weight", shape=(shape.head_dim,)),
        ]
    linear("self_attn.o_proj", h, q, shape.o_bias, is_out=True)
    specs.append(TensorSpec(name="post_attention_layernorm.weight", shape=(h,)))
    linear("mlp.gate_proj", i, h, shape.mlp_bias)
    linear("mlp.up_proj", i, h, shape.mlp_bias)
    linear("mlp.down_proj", h, i, shape.mlp_bias, is_out=True)
    return tuple(specs)
