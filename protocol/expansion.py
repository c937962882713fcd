"""Which blocks are added to which model, and where?

An :class:`ExpansionPlan` lists the expanded blocks of a run: everybody derives the same initial values from it and from
the base checkpoint whose hash it names. This module reads configurations only: no weights, no torch.

Theory (methods.md 2). A pre-norm layer computes ``u = x + Wo·a(N1(x)) + bo``, ``y = u + Wd·h(N2(u)) + bd``; with
``Wo = bo = Wd = bd = 0`` it is the identity bit for bit. An expanded block is a copy of a base layer with those
tensors (the out-tensors) at zero; copying and zeroing follow LLaMA Pro (Wu et al., 2401.02415). The grown model is
built from a grown configuration and never patched into a live one.

An encoder of the BERT kind normalises after the sum, ``y = gamma·n + beta``. There the layer below a block emits ``n``
(its norm becomes 1, 0), the block's projections absorb gamma and beta, and its last norm gets them (2.6, ours); the
arithmetic is in ``edge_client/affine_migration.py``.

What cannot be expanded is refused by name before a weight is read: :class:`ExpansionError`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

from typing_extensions import assert_never

from fedblocks.profiles.cost import StackLayout
from fedblocks.profiles.model_shape import ModelShape, TensorSpec
from fedblocks.profiles.units import (
    EXPANDED_BLOCKS,
    BaseTensors,
    ExpandedBlocks,
    LowRankPairs,
    MergedLinears,
    NamedTensors,
    PersonalPairs,
    Trainable,
    TrainedUnits,
    trained_unit_ids,
    unit_parameters,
)

ExpansionCode = Literal[
    "E_EXPAND_POSTNORM",
    "E_EXPAND_DEPTH_SCALED",
    "E_EXPAND_SHARED",
    "E_EXPAND_MOE",
    "E_EXPAND_ENCDEC",
    "E_EXPAND_STATEFUL",
    "E_EXPAND_PERLAYER_FIELD",
    "E_EXPAND_UNKNOWN_FAMILY",
    "E_EXPAND_CONFIG",
    "E_EXPAND_PLACEMENT",
    "E_EXPAND_PLAN",
    "E_IDENTITY",
]
"""methods.md 2.3, plus CONFIG (a size is missing or impossible), PLACEMENT (the blocks asked for do not fit the depth)
and PLAN (a plan that is none). Local to one machine, never on the wire."""

Placement = Literal["thirds", "top", "interleaved", "adaptive"]


class ExpansionError(ValueError):
    """This model, placement or plan cannot be used; the text says why and what can. Exit code 2.

    Attributes:
        code: which rule of methods.md 2.3 it is.
    """

    exit_code: Final = 2

    def __init__(self, code: ExpansionCode, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code: ExpansionCode = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What expansion must know about one ``model_type``; no code elsewhere asks for a model type.

    A bias is True (always there), False (never, whatever the configuration says) or the name of the configuration
    field that switches it, as in the model's class in transformers.
    """

    model_type: str
    layer_prefix: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    depth_field: str = "num_hidden_layers"
    residual: Literal["pre-norm", "post-norm"] = "pre-norm"
    """post-norm: an encoder with affine migration (methods.md 2.6)."""
    out_modules: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    """The zero set: weight, and bias when present."""
    per_layer_fields: tuple[str, ...] = ("layer_types", "no_rope_layers", "mlp_layer_types")
    """Lists with one entry per layer; a block takes its source layer's entry."""
    required_fields: tuple[tuple[str, Any, str], ...] = ()
    """(field, the value that it must have, which is also its default, why)."""
    windows: Literal["none", "all layers", "by layer"] = "none"
    """Who attends to a sliding window only: nobody; everybody where ``sliding_window`` is set; or the layers that
    ``layer_types``, or ``use_sliding_window`` and ``max_window_layers``, say."""
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    default_kv_heads: int | None = None
    """Of the class in transformers, for a configuration without ``num_key_value_heads``; None: as many as heads."""
    default_head_dim: int | None = None
    """The same for ``head_dim``; None: hidden_size / num_attention_heads."""


FAMILIES: Final[dict[str, Family]] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
        Family(model_type="mistral", windows="all layers", default_kv_heads=8),
        Family(model_type="qwen2", qkv_bias=True, windows="by layer", default_kv_heads=32),
        Family(
            model_type="qwen3",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
            windows="by layer",
            default_kv_heads=32,
            default_head_dim=128,
        ),
        Family(
            model_type="bert",
            layer_prefix="encoder.layer",
            embedding="embeddings.word_embeddings.weight",
            residual="post-norm",
            out_modules=("attention.output.dense", "output.dense"),
            per_layer_fields=(),
            required_fields=(
                ("hidden_act", "gelu", "the encoder's blocks compute with the exact GELU"),
                ("position_embedding_type", "absolute", "relative positions have tensors that a copied layer shares"),
                ("is_decoder", False, "with a causal mask it is a decoder, whose embedding is not that of its text"),
            ),
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
        ),
    )
}

#: Tokens; of all classes in transformers that have the field ``sliding_window``.
DEFAULT_WINDOW: Final = 4096

#: Specified in methods.md 2.2 and not built yet.
LATER_FAMILIES: Final = (
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "olmo2",
    "phi",
    "phi3",
)

#: (code, why, model types) of families that no later version is planned for either.
_BY_MODEL_TYPE: Final[tuple[tuple[ExpansionCode, str, frozenset[str]], ...]] = (
    (
        "E_EXPAND_ENCDEC",
        "it has an encoder and a decoder, and where blocks belong in one is not specified yet",
        frozenset(
            {
                "bart",
                "blenderbot",
                "encoder-decoder",
                "led",
                "m2m_100",
                "marian",
                "mbart",
                "mt5",
                "pegasus",
                "prophetnet",
                "t5",
                "t5gemma",
                "umt5",
                "whisper",
            }
        ),
    ),
    (
        "E_EXPAND_SHARED",
        "its layers share weights or caches, so a copy of one has no meaning of its own",
        frozenset({"albert", "gemma3n", "gemma3n_text", "zamba", "zamba2"}),
    ),
    (
        "E_EXPAND_STATEFUL",
        "it has layers that carry a recurrent state, for which expansion is not specified yet",
        frozenset(
            {
                "bamba",
                "falcon_h1",
                "falcon_mamba",
                "granitemoehybrid",
                "jamba",
                "lfm2",
                "mamba",
                "mamba2",
                "nemotron_h",
                "qwen3_next",
                "recurrent_gemma",
                "rwkv",
                "xlstm",
            }
        ),
    ),
    (
        "E_EXPAND_MOE",
        "its layers hold sparse experts: a copied layer would copy all of them, and their router",
        frozenset(
            {
                "dbrx",
                "deepseek_v2",
                "deepseek_v3",
                "gpt_oss",
                "granitemoe",
                "jetmoe",
                "mixtral",
                "olmoe",
                "phimoe",
                "qwen2_moe",
                "qwen3_moe",
            }
        ),
    ),
    (
        "E_EXPAND_POSTNORM",
        "it normalises after the residual sum, so zeroed projections do not make a layer the identity",
        frozenset(
            {
                "camembert",
                "deberta",
                "deberta-v2",
                "distilbert",
                "electra",
                "openai-gpt",
                "roberta",
                "xlm",
                "xlm-roberta",
            }
        ),
    ),
    (
        "E_EXPAND_DEPTH_SCALED",
        "it scales each branch by the number of layers, so new ones would change the old",
        frozenset({"minicpm", "minicpm3"}),
    ),
)


def _above(limit: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value > limit


#: (field, when it matters, code, why) for any model type: a configuration may hide its kind behind a known name.
_BY_FIELD: Final[tuple[tuple[str, Callable[[Any], bool], ExpansionCode, str], ...]] = (
    ("is_encoder_decoder", bool, "E_EXPAND_ENCDEC", "where blocks belong in an encoder-decoder is not specified yet"),
    ("num_kv_shared_layers", _above(0), "E_EXPAND_SHARED", "layers that read another layer's cache have no copy"),
    ("cla_share_factor", _above(1), "E_EXPAND_SHARED", "layers that read another layer's cache have no copy"),
    ("num_hidden_groups", _above(0), "E_EXPAND_SHARED", "layers that share weights have no copy of their own"),
    ("num_local_experts", _above(1), "E_EXPAND_MOE", "a copied layer would copy every expert and the router"),
    ("num_experts", _above(1), "E_EXPAND_MOE", "a copied layer would copy every expert and the router"),
    ("n_routed_experts", _above(1), "E_EXPAND_MOE", "a copied layer would copy every expert and the router"),
    ("moe_num_experts", _above(1), "E_EXPAND_MOE", "a copied layer would copy every expert and the router"),
    ("ssm_cfg", bool, "E_EXPAND_STATEFUL", "layers with a recurrent state are not specified yet"),
    (
        "do_layer_norm_before",
        lambda value: value is False,
        "E_EXPAND_POSTNORM",
        "a norm after the residual sum keeps a zeroed layer from being the identity",
    ),
    ("scale_attn_by_inverse_layer_idx", bool, "E_EXPAND_DEPTH_SCALED", "a new layer would move the index of others"),
    ("scale_depth", _above(0), "E_EXPAND_DEPTH_SCALED", "new layers would change the scale of the old ones"),
    ("deepnorm", bool, "E_EXPAND_DEPTH_SCALED", "new layers would change the scale of the old ones"),
)

#: Layer types that are attention over the whole context or a window of it; all else keeps a state.
_ATTENTION_TYPES: Final = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

#: Top-level lists that count something else than layers, whatever their length.
_NOT_PER_LAYER: Final = frozenset(
    {
        "architectures",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "eos_token_id",
        "keys_to_ignore_at_inference",
        "pad_token_id",
        "suppress_tokens",
    }
)


def _model_name(config: Mapping[str, Any]) -> str:
    """The model in words, for messages."""
    architectures = config.get("architectures")
    kind = f"model_type {config.get('model_type')!r}"
    if isinstance(architectures, list) and architectures:
        return f"this model ({architectures[0]}, {kind})"  # pyright: ignore[reportUnknownMemberType]
    return f"this model ({kind})"


def _what_works() -> str:
    return f"what works: a base model of the family {_one_of(tuple(FAMILIES))}"


def _one_of(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]


def family_of(config: Mapping[str, Any]) -> Family:
    """The record of the configuration's family.

    Raises:
        ExpansionError: the model cannot be expanded; the code says which rule of methods.md 2.3.
    """
    model = _model_name(config)
    for field, matters, code, why in _BY_FIELD:
        if field in config and matters(config[field]):
            raise ExpansionError(
                code, f"{model} cannot be expanded: {field} is {config[field]!r}, and {why}; {_what_works()}"
            )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ExpansionError(
            "E_EXPAND_UNKNOWN_FAMILY", f"config.json has model_type {model_type!r}, expected a name; {_what_works()}"
        )
    for code, why, model_types in _BY_MODEL_TYPE:
        if model_type in model_types:
            raise ExpansionError(code, f"{model} cannot be expanded: {why}; {_what_works()}")
    if model_type in LATER_FAMILIES:
        raise ExpansionError(
            "E_EXPAND_UNKNOWN_FAMILY",
            f"{model} is not supported yet: its family is specified for a later version; {_what_works()}",
        )
    family = FAMILIES.get(model_type)
    if family is None:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.4)
        hint = f" (the nearest name is {near[0]!r})" if near else ""
        raise ExpansionError(
            "E_EXPAND_UNKNOWN_FAMILY", f"{model} is of a family that is not known{hint}; {_what_works()}"
        )
    return family


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The sizes of the model that this ``config.json`` describes.

    Raises:
        ExpansionError: the model cannot be expanded, or a size is missing or impossible.
    """
    family = family_of(config)
    num_layers = _size(config, family.depth_field)
    _check_per_layer_fields(config, family, num_layers)
    for field, value, why in family.required_fields:
        found = config.get(field, value)
        if found != value:
            raise ExpansionError(
                "E_EXPAND_CONFIG",
                f"{_model_name(config)} cannot be expanded: {field} is {found!r}, expected {value!r}: {why}; "
                + _what_works(),
            )
    encoder = family.residual == "post-norm"
    hidden_size = _size(config, "hidden_size")
    num_heads = _size(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads", family.default_kv_heads)
    head_dim = config.get("head_dim", family.default_head_dim)
    if encoder:  # its class knows neither of the two
        kv_heads = head_dim = None
    if head_dim is None and hidden_size % num_heads:
        raise ExpansionError(
            "E_EXPAND_CONFIG",
            f"{_model_name(config)}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads} and "
            "there is no head_dim; check config.json",
        )

    def flag(bias: bool | str) -> bool:
        return bias if isinstance(bias, bool) else bool(config.get(bias, False))

    try:
        return ModelShape(
            family=family.model_type,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=_size(config, "intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_heads if kv_heads is None else kv_heads,
            head_dim=hidden_size // num_heads if head_dim is None else head_dim,
            vocab_size=_size(config, "vocab_size"),
            tied_embeddings=encoder or bool(config.get("tie_word_embeddings", False)),
            qkv_bias=flag(family.qkv_bias),
            o_bias=flag(family.o_bias),
            mlp_bias=flag(family.mlp_bias),
            qk_norm=family.qk_norm,
            encoder=encoder,
        )
    except ValueError as e:
        raise ExpansionError("E_EXPAND_CONFIG", f"{_model_name(config)}: {e}; check config.json") from e


def _size(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if type(value) is not int or value < 1:
        raise ExpansionError(
            "E_EXPAND_CONFIG",
            f"{_model_name(config)}: {field} is {value!r}, expected a whole number of at least 1; check config.json",
        )
    return value


def _check_per_layer_fields(config: Mapping[str, Any], family: Family, num_layers: int) -> None:
    """Every list that has one entry per layer must be one that the family record knows how to grow."""
    model = _model_name(config)
    for field, value in config.items():
        if not isinstance(value, (list, tuple)):
            continue
        entries: list[Any] = list(value)  # pyright: ignore[reportUnknownArgumentType]
        if field in family.per_layer_fields:
            if len(entries) != num_layers:
                raise ExpansionError(
                    "E_EXPAND_PERLAYER_FIELD",
                    f"{model}: {field} has {len(entries)} entries for {num_layers} layers; what works: a config.json "
                    "with one entry per layer, or without this list",
                )
        elif len(entries) == num_layers and field not in _NOT_PER_LAYER:
            raise ExpansionError(
                "E_EXPAND_PERLAYER_FIELD",
                f"{model} cannot be expanded: {field} is a list with {num_layers} entries, one per layer it seems, and "
                f"would fall out of step with new layers; known lists are {_one_of(family.per_layer_fields)}. "
                f"If it does not count layers, remove it from config.json; otherwise {_what_works()} without it",
            )
    for layer, kind in enumerate(config.get("layer_types") or ()):
        if kind not in _ATTENTION_TYPES:
            raise ExpansionError(
                "E_EXPAND_STATEFUL",
                f"{model} cannot be expanded: layer {layer} is of type {kind!r} (layer_types), expected "
                f"{_one_of(tuple(sorted(_ATTENTION_TYPES)))}: layers with a state are not specified yet; "
                + _what_works(),
            )


def layer_types(config: Mapping[str, Any]) -> list[str] | None:
    """Type of each layer, written out where the configuration only implies it; None where it has no such notion.

    Mistral has one window for all layers (``sliding_window``) and no list: transformers warns when it finds one.
    """
    written = config.get("layer_types")
    if written is not None:
        return list(written)
    family = family_of(config)
    if family.windows != "by layer":
        return None
    windowed = bool(config.get("use_sliding_window", False)) and _window(config) is not None
    first_windowed = config.get("max_window_layers", 28)  # the default of Qwen2Config and Qwen3Config
    return [
        "sliding_attention" if windowed and layer >= first_windowed else "full_attention"
        for layer in range(_size(config, family.depth_field))
    ]


def _window(config: Mapping[str, Any]) -> int | None:
    return config.get("sliding_window", DEFAULT_WINDOW)


def base_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration fields that enter the base hash: sizes, and what else decides what the weights compute.

    Defaults are written out and the two spellings of the rotary settings are made one, so that a configuration that
    another version of transformers saved again is the same base.

    Raises:
        ExpansionError: as :func:`shape_from_config`.
    """
    shape = shape_from_config(config)
    if shape.encoder:
        return {
            **shape_fields(shape),
            "hidden_act": "gelu",
            "layer_norm_eps": float(config.get("layer_norm_eps", 1e-12)),
            "max_position_embeddings": _size(config, "max_position_embeddings"),
            "type_vocab_size": config.get("type_vocab_size", 2),
        }
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta", 10000.0)}
    for field in ("rope_scaling", "rope_parameters"):
        settings: Any = config.get(field) or {}
        if not isinstance(settings, Mapping):
            raise ExpansionError(
                "E_EXPAND_CONFIG", f"{_model_name(config)}: {field} is {settings!r}, expected a map; check config.json"
            )
        rope |= cast("Mapping[str, Any]", settings)
    oldest_spelling = rope.pop("type", None)
    rope.setdefault("rope_type", oldest_spelling or "default")
    if rope["rope_type"] != "default":  # only the other types look at the trained length
        rope["max_position_embeddings"] = config.get("max_position_embeddings")
    types = layer_types(config)
    if types is None:
        windowed = family_of(config).windows == "all layers"
    else:
        windowed = "sliding_attention" in types
    return {
        **shape_fields(shape),
        "hidden_act": config.get("hidden_act", "silu"),
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "rope": {key: float(value) if type(value) is int else value for key, value in rope.items()},
        "layer_types": types,
        "sliding_window": _window(config) if windowed else None,
    }


def shape_fields(shape: ModelShape) -> dict[str, Any]:
    """The shape as plain values; ``encoder`` only where it is one, so that decoders keep their hashes."""
    fields = dataclasses.asdict(shape)
    if not shape.encoder:
        del fields["encoder"]
    return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandedBlock:
    """One added layer: a copy of ``source_layer``, in the slot after base layer ``after_layer``."""

    block_id: int
    source_layer: int
    after_layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StackEntry:
    """One layer of the grown model: base layer or expanded block, by its index or id."""

    kind: Literal["base", "block"]
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpansionPlan:
    """The expanded blocks of a run, ascending by id, or what else it trains in their place.

    Ids are given in the order in which blocks are created and are never reused; several blocks in one slot stand in
    the order of their ids, bottom to top.
    """

    base_hash: str
    shape: ModelShape
    placement: Placement
    blocks: tuple[ExpandedBlock, ...]
    """None at all where ``trainable`` is something else."""
    trainable: Trainable = EXPANDED_BLOCKS
    extra: NamedTensors | None = None
    """A tensor set that trains beside the units, e.g. a classification head."""

    def __post_init__(self) -> None:
        def refuse(what: str) -> None:
            raise ExpansionError("E_EXPAND_PLAN", f"expansion plan: {what}")

        if not re.fullmatch("[0-9a-f]{64}", self.base_hash):
            refuse(f"base_hash is {self.base_hash!r}, expected 64 hexadecimal digits (SHA-256)")
        if self.placement not in get_args(Placement):
            refuse(f"placement is {self.placement!r}, expected {_one_of(get_args(Placement))}")
        ids = [block.block_id for block in self.blocks]
        if not isinstance(self.trainable, ExpandedBlocks):
            if ids:
                refuse(f"it has blocks {ids} and trains {type(self.trainable).__name__}, expected one of both")
        elif not ids or ids != sorted(set(ids)) or ids[0] < 0:
            refuse(f"block ids are {ids}, expected ascending ids from 0 without repeats, at least one")
        for block in self.blocks:
            for field in ("source_layer", "after_layer"):
                if not 0 <= getattr(block, field) < self.shape.num_layers:
                    refuse(
                        f"block {block.block_id} has {field} {getattr(block, field)}, "
                        f"expected 0 to {self.shape.num_layers - 1}"
                    )
        try:
            self.units.published()
        except ValueError as error:
            refuse(str(error))

    @property
    def units(self) -> TrainedUnits:
        """What an update consists of; ``units.published()`` is what the published state consists of."""
        return TrainedUnits(shape=self.shape, trainable=self.trainable, extra=self.extra)

    @property
    def unit_ids(self) -> tuple[int, ...]:
        """The numbers of all units, ascending: ids of blocks, or base layers (``profiles/units.py``)."""
        return trained_unit_ids(self.units, self.block_ids)

    def block(self, block_id: int) -> ExpandedBlock:
        """The block with this id.

        Raises:
            KeyError: there is none.
        """
        for block in self.blocks:
            if block.block_id == block_id:
                return block
        raise KeyError(f"the expansion plan has no block {block_id}; its blocks are {list(self.block_ids)}")

    @property
    def block_ids(self) -> tuple[int, ...]:
        """All ids, ascending."""
        return tuple(block.block_id for block in self.blocks)

    def stack(self) -> tuple[StackEntry, ...]:
        """The L' layers of the grown model, bottom to top."""
        entries: list[StackEntry] = []
        for layer in range(self.shape.num_layers):
            entries.append(StackEntry(kind="base", index=layer))
            entries += [
                StackEntry(kind="block", index=block.block_id) for block in self.blocks if block.after_layer == layer
            ]
        return tuple(entries)

    def sources(self) -> tuple[int, ...]:
        """For each layer of the stack the base layer that it is, or is a copy of."""
        return tuple(
            entry.index if entry.kind == "base" else self.block(entry.index).source_layer for entry in self.stack()
        )

    def slots(self) -> dict[int, tuple[int, ...]]:
        """Base layer -> ids of the blocks in the slot after it, bottom to top; layers with empty slots are absent."""
        found: dict[int, tuple[int, ...]] = {}
        for block in self.blocks:
            found[block.after_layer] = (*found.get(block.after_layer, ()), block.block_id)
        return dict(sorted(found.items()))

    def position(self, block_id: int) -> int:
        """Index of a block in the stack.

        Raises:
            KeyError: there is no such block.
        """
        self.block(block_id)
        return self.stack().index(StackEntry(kind="block", index=block_id))

    def trainable_text(self) -> str:
        """What trains, in words."""
        match self.trainable:
            case ExpandedBlocks():
                return f"{len(self.blocks)} expanded blocks, placement {self.placement}"
            case LowRankPairs(rank=rank, targets=targets, merged=merged):
                where = "every projection" if targets == "all" else "the projections of queries and values"
                if isinstance(self.trainable, PersonalPairs):
                    return (
                        f"low-rank pairs of rank {rank} over {where}, their rows by device, over a prior of rank "
                        f"{self.trainable.prior_rank} of each client's own"
                    )
                return f"low-rank pairs of rank {rank} over {where}" + (", merged in every round" if merged else "")
            case MergedLinears():
                return "merged pairs"
            case BaseTensors(layers=layers, tables=tables):
                rest = ", embedding, final norm and head" if tables else ""
                return f"the base's layers {layers[0]} to {layers[-1]}{rest}"
            case _:
                assert_never(self.trainable)

    @property
    def layout(self) -> StackLayout:
        """Where what trains stands in the stack, as the cost model takes it."""
        if isinstance(self.trainable, ExpandedBlocks):
            positions = {block: self.position(block) for block in self.block_ids}
        else:
            positions = {unit: unit for unit in self.unit_ids if unit < self.shape.num_layers}
        return StackLayout(
            num_entries=len(self.stack()),
            positions=positions,
            trainable=self.trainable,
            beside={unit: unit_parameters(self.units, unit) for unit in self.unit_ids if unit not in positions},
        )

    def reduced(self, block_ids: Collection[int]) -> ExpansionPlan:
        """The plan with only these blocks: one that is not active yet is the identity and is left out.

        Raises:
            ExpansionError: a block that the plan does not have, or none of those that it has.
        """
        unknown = sorted(set(block_ids) - set(self.block_ids))
        if unknown or (self.blocks and not block_ids):
            raise ExpansionError(
                "E_EXPAND_PLAN",
                f"blocks {sorted(block_ids)} are asked for, expected some of the plan's {list(self.block_ids)}",
            )
        return dataclasses.replace(self, blocks=tuple(b for b in self.blocks if b.block_id in block_ids))

    @property
    def base_cut(self) -> int:
        """Position of the lowest layer that trains: those below it never change in this run."""
        match self.trainable:
            case ExpandedBlocks():
                return next(i for i, entry in enumerate(self.stack()) if entry.kind == "block")
            case BaseTensors(layers=layers, tables=tables):
                return 0 if tables else layers[0]
            case LowRankPairs() | MergedLinears():
                return 0
            case _:
                assert_never(self.trainable)

    def to_plain(self) -> dict[str, Any]:
        """Maps, lists, strings, numbers and booleans only, for JSON and msgpack.

        What a plan of expanded blocks alone does not need is left out, so that such plans are what they always were.
        """
        plain = dataclasses.asdict(self)
        plain["blocks"] = list(plain["blocks"])
        plain["shape"] = shape_fields(self.shape)
        if isinstance(self.trainable, ExpandedBlocks):
            del plain["trainable"]
        else:
            plain["trainable"]["kind"] = _KIND_OF[type(self.trainable)]
        if self.extra is None:
            del plain["extra"]
        return json.loads(json.dumps(plain))

    @classmethod
    def from_plain(cls, plain: object) -> ExpansionPlan:
        """The inverse of :meth:`to_plain`, from anywhere: checks everything.

        Raises:
            ExpansionError: this is no plan.
        """
        fields = _exact_fields("expansion plan", plain, cls, optional=("trainable", "extra"))
        if not isinstance(fields["base_hash"], str):
            raise ExpansionError("E_EXPAND_PLAN", "expansion plan: base_hash is no text")
        blocks = fields["blocks"]
        if not isinstance(blocks, (list, tuple)):
            raise ExpansionError("E_EXPAND_PLAN", "expansion plan: blocks is no list")
        read: list[ExpandedBlock] = []
        for item in cast("list[object]", blocks):
            block = _exact_fields("expanded block", item, ExpandedBlock)
            for field, value in block.items():
                if type(value) is not int:
                    raise ExpansionError("E_EXPAND_PLAN", f"expanded block: {field} is {value!r}, expected a number")
            read.append(ExpandedBlock(**block))
        shape = fields["shape"]
        if isinstance(shape, dict):  # a decoder's shape does not say that it is no encoder
            shape = {"encoder": False, **cast("dict[str, object]", shape)}
        shape = _exact_fields("model shape", shape, ModelShape)
        types = {field.name: field.type for field in dataclasses.fields(ModelShape)}
        for field, value in shape.items():
            if type(value).__name__ != types[field]:
                raise ExpansionError("E_EXPAND_PLAN", f"model shape: {field} is {value!r}, expected {types[field]}")
        try:
            return cls(
                base_hash=fields["base_hash"],
                shape=ModelShape(**shape),
                placement=fields["placement"],
                blocks=tuple(read),
                trainable=_trainable_from(fields["trainable"]) if "trainable" in fields else EXPANDED_BLOCKS,
                extra=_extra_from(fields["extra"]) if "extra" in fields else None,
            )
        except ExpansionError:
            raise
        except (ValueError, TypeError) as e:
            raise ExpansionError("E_EXPAND_PLAN", str(e)) from e

    def to_json(self) -> str:
        """One canonical line: equal plans have equal text."""
        return json.dumps(self.to_plain(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> ExpansionPlan:
        """The plan in this text.

        Raises:
            ExpansionError: this is no plan.
        """
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ExpansionError("E_EXPAND_PLAN", f"expansion plan: no JSON: {e}") from e
        return cls.from_plain(plain)

    def digest(self) -> str:
        """SHA-256 of :meth:`to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


#: Kind in plan.json -> what trains there.
_TRAINABLES: Final[dict[str, type[LowRankPairs | BaseTensors]]] = {
    "low_rank": LowRankPairs,
    "personal_pairs": PersonalPairs,
    "base": BaseTensors,
}
_KIND_OF: Final[dict[type, str]] = {cls: kind for kind, cls in _TRAINABLES.items()}


def _trainable_from(plain: object) -> Trainable:
    kind = cast("dict[str, object]", plain).get("kind") if isinstance(plain, dict) else None
    cls = _TRAINABLES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        known = _one_of(tuple(_TRAINABLES))
        raise ExpansionError("E_EXPAND_PLAN", f"expansion plan: it trains {kind!r}, expected {known}")
    fields = {k: v for k, v in cast("dict[str, Any]", plain).items() if k != "kind"}
    fields = _typed_fields(f"trainable {kind}", fields, cls)
    return cls(**fields)


def _extra_from(plain: object) -> NamedTensors:
    fields = _typed_fields("extra tensors", plain, NamedTensors)
    specs = [_typed_fields("extra tensor", spec, TensorSpec) for spec in fields["tensors"]]
    for spec in specs:
        if not spec["shape"] or any(type(size) is not int or size < 1 for size in spec["shape"]):
            raise ExpansionError("E_EXPAND_PLAN", f"extra tensor {spec['name']!r}: shape is {spec['shape']}")
    return NamedTensors(name=fields["name"], tensors=tuple(TensorSpec(**spec) for spec in specs))


def _typed_fields(what: str, plain: object, cls: type) -> dict[str, Any]:
    """Exactly the fields of ``cls``; numbers, texts and lists where it has them, and a tuple for each list."""
    fields = _exact_fields(what, plain, cls)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        value = fields[field.name]
        kind = str(field.type).split("[")[0]
        expected = {"int": int, "float": (int, float), "bool": bool, "tuple": list}.get(kind, str)
        if not isinstance(value, expected) or isinstance(value, bool) != (kind == "bool"):
            raise ExpansionError("E_EXPAND_PLAN", f"{what}: {field.name} is {value!r}, expected {field.type}")
        found[field.name] = tuple(cast("list[object]", value)) if isinstance(value, list) else value
    return found


def _exact_fields(what: str, plain: object, cls: type, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(plain, dict) or set(plain) | set(optional) != names:  # pyright: ignore[reportUnknownArgumentType]
        raise ExpansionError("E_EXPAND_PLAN", f"{what}: expected a map with exactly the fields {sorted(names)}")
    return plain  # pyright: ignore[reportUnknownVariableType]


def plan_expansion(
    *, base_hash: str, config: Mapping[str, Any], placement: Placement, num_blocks: int
) -> ExpansionPlan:
    """The plan with which a run on this base starts (methods.md 4). A pure function.

    Raises:
        ExpansionError: the model cannot be expanded, or not with so many blocks in this placement.
    """
    shape = shape_from_config(config)
    if shape.encoder and placement == "adaptive":
        raise ExpansionError(
            "E_EXPAND_PLACEMENT",
            "placement 'adaptive' compares what blocks do to a decoder's predictions, and this is an encoder; what "
            "works: 'thirds', 'top' or 'interleaved'",
        )
    slots = _slots(placement, shape.num_layers, num_blocks)
    return ExpansionPlan(
        base_hash=base_hash,
        shape=shape,
        placement=placement,
        blocks=tuple(ExpandedBlock(block_id=i, source_layer=slot, after_layer=slot) for i, slot in enumerate(slots)),
    )


def plan_trainable(*, base_hash: str, config: Mapping[str, Any], trainable: Trainable) -> ExpansionPlan:
    """The plan of a run that adds no blocks and trains something else. A pure function.

    Raises:
        ExpansionError: the model is of no known family, or the trainable does not fit it.
    """
    return ExpansionPlan(
        base_hash=base_hash,
        shape=shape_from_config(config),
        placement="top",
        blocks=(),
        trainable=trainable,
    )


def grow(plan: ExpansionPlan) -> ExpansionPlan:
    """The plan with one block more, at the next slot of its placement; all ids stay as they are.

    Raises:
        ExpansionError: this placement has no further slot.
    """
    slot = _slots(plan.placement, plan.shape.num_layers, len(plan.blocks) + 1)[-1]
    if plan.placement in ("interleaved", "adaptive"):
        raise ExpansionError(
            "E_EXPAND_PLACEMENT",
            f"placement {plan.placement!r} has all its blocks in the plan; what works: 'thirds' or 'top'",
        )
    if plan.shape.encoder and slot in plan.slots():
        # The norm of the block below would have to become (1, 0), and it is trained.
        raise ExpansionError(
            "E_EXPAND_PLACEMENT",
            f"an encoder's run does not grow into a slot that holds a block already (after layer {slot}); what works: "
            "placement 'thirds', or all blocks at the start",
        )
    new = ExpandedBlock(block_id=plan.blocks[-1].block_id + 1, source_layer=slot, after_layer=slot)
    return dataclasses.replace(plan, blocks=(*plan.blocks, new))


def _slots(placement: Placement, num_layers: int, num_blocks: int) -> list[int]:
    """Slots ("after base layer l") of the first ``num_blocks`` blocks in the order of their creation.

    Of ``adaptive`` all that it may choose from: those of ``thirds`` first, which it takes where nothing speaks against
    it.
    """
    if type(num_blocks) is not int or num_blocks < 1:
        raise ExpansionError("E_EXPAND_PLACEMENT", f"{num_blocks!r} blocks asked for, expected at least 1")

    if placement not in get_args(Placement):
        raise ExpansionError(
            "E_EXPAND_PLACEMENT", f"placement is {placement!r}, expected {_one_of(get_args(Placement))}"
        )

    def share(j: int, of: int) -> int:  # the last layer of the lowest j parts of `of`: ceil(j·L/of) - 1
        return -(-j * num_layers // of) - 1

    match placement:
        case "thirds":
            sequence = list(dict.fromkeys((share(2, 3), share(3, 3), share(1, 3))))
            if num_blocks > len(sequence):
                raise ExpansionError(
                    "E_EXPAND_PLACEMENT",
                    f"placement 'thirds' has {len(sequence)} slots in a model of {num_layers} layers, and {num_blocks} "
                    f"blocks were asked for; what works: at most {len(sequence)} blocks, or placement 'top'"
                    + (" or 'interleaved'" if num_blocks <= num_layers else ""),
                )
            return sequence[:num_blocks]
        case "interleaved":
            if num_blocks > num_layers:
                raise ExpansionError(
                    "E_EXPAND_PLACEMENT",
                    f"placement 'interleaved' has one slot per layer, {num_layers} here, and {num_blocks} blocks were "
                    f"asked for; what works: at most {num_layers} blocks, or placement 'top'",
                )
            return [share(j, num_blocks) for j in range(1, num_blocks + 1)]
        case "top":
            return [num_layers - 1] * num_blocks
        case "adaptive":
            quarters = (share(j, 4) for j in (4, 3, 2, 1))
            found = list(dict.fromkeys((share(2, 3), share(3, 3), share(1, 3), *quarters)))
            if num_blocks > len(found):
                raise ExpansionError(
                    "E_EXPAND_PLACEMENT",
                    f"placement 'adaptive' has {len(found)} slots in a model of {num_layers} layers, and {num_blocks} "
                    f"blocks were asked for; what works: at most {len(found)} blocks, or placement 'top'",
                )
            return found


def expand_config(config: Mapping[str, Any], plan: ExpansionPlan) -> dict[str, Any]:
    """The configuration of the grown model: depth and every per-layer list grown, all else copied (methods.md 2.4).

    Raises:
        ExpansionError: the configuration is not that of the plan's base.
    """
    shape = shape_from_config(config)
    if shape != plan.shape:
        raise ExpansionError(
            "E_EXPAND_PLAN", f"the plan was made for {plan.shape}, this configuration describes {shape}"
        )
    family = family_of(config)
    grown: dict[str, Any] = copy.deepcopy(dict(config))
    types = layer_types(config)
    if types is not None:
        grown["layer_types"] = types
    sources = plan.sources()
    for field in family.per_layer_fields:
        if grown.get(field) is not None:
            grown[field] = [grown[field][source] for source in sources]
    grown[family.depth_field] = len(sources)
    if "max_window_layers" in grown:
        windowed = [i for i, kind in enumerate(grown.get("layer_types") or ()) if kind == "sliding_attention"]
        grown["max_window_layers"] = windowed[0] if windowed else len(sources)
    return grown
