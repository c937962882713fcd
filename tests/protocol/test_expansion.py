"""Which models can be expanded, where do blocks go, and what does the grown configuration say?"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedblocks.profiles.model_shape import TensorSpec
from fedblocks.profiles.units import BaseTensors, LowRankPairs, NamedTensors
from fedblocks.protocol.expansion import (
    FAMILIES,
    LATER_FAMILIES,
    ExpandedBlock,
    ExpansionError,
    ExpansionPlan,
    StackEntry,
    base_fields,
    expand_config,
    grow,
    layer_types,
    plan_expansion,
    plan_trainable,
    shape_from_config,
)

HASH = "0123456789abcdef" * 4


def make_config(family: str = "llama", layers: int = 4, **fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["SomeForCausalLM"],
        "model_type": family,
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        **fields,
    }


def make_plan(layers: int = 4, placement: Any = "thirds", num_blocks: int = 2, **fields: Any) -> ExpansionPlan:
    config = make_config(layers=layers, **fields)
    return plan_expansion(base_hash=HASH, config=config, placement=placement, num_blocks=num_blocks)


def slots(plan: ExpansionPlan) -> list[int]:
    return [block.after_layer for block in plan.blocks]


# Shapes


def test_a_missing_head_dim_is_hidden_size_over_heads() -> None:
    config = make_config()
    del config["head_dim"]
    assert shape_from_config(config).head_dim == 16
    assert shape_from_config(make_config(head_dim=None)).head_dim == 16


def test_a_head_dim_of_its_own_is_taken_as_it_is() -> None:
    shape = shape_from_config(make_config("mistral", head_dim=32))
    assert (shape.q_size, shape.kv_size) == (128, 64)


def test_qwen3_without_a_head_dim_has_the_128_of_its_class() -> None:
    config = make_config("qwen3")
    del config["head_dim"]
    assert shape_from_config(config).head_dim == 128


def test_missing_or_null_kv_heads_follow_the_class_in_transformers() -> None:
    llama = make_config()
    del llama["num_key_value_heads"]
    assert shape_from_config(llama).num_kv_heads == 4
    mistral = make_config("mistral", num_attention_heads=16)
    del mistral["num_key_value_heads"]
    assert shape_from_config(mistral).num_kv_heads == 8
    assert shape_from_config(make_config("mistral", num_key_value_heads=None)).num_kv_heads == 4


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {}, (False, False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False, False)),
        ("llama", {"mlp_bias": True}, (False, False, True, False)),
        ("mistral", {"attention_bias": True}, (False, False, False, False)),
        ("qwen2", {}, (True, False, False, False)),
        ("qwen3", {}, (False, False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_query_norms_are_those_of_the_class(family: str, fields: dict[str, Any], expected: Any) -> None:
    shape = shape_from_config(make_config(family, **fields))
    assert (shape.qkv_bias, shape.o_bias, shape.mlp_bias, shape.qk_norm) == expected


def test_the_out_tensors_are_the_zero_set_with_their_biases() -> None:
    shape = shape_from_config(make_config(attention_bias=True, mlp_bias=True))
    out = {spec.name for spec in shape.block_tensors() if spec.is_out}
    assert out == {f"{m}.{t}" for m in FAMILIES["llama"].out_modules for t in ("weight", "bias")}


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -4, 4.0, "4", True])
def test_an_impossible_size_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(ExpansionError, match=f"{field} is {value!r}") as e:
        shape_from_config(make_config(**{field: value}))
    assert e.value.code == "E_EXPAND_CONFIG"
    assert e.value.exit_code == 2


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ExpansionError, match="no multiple"):
        shape_from_config(make_config(num_key_value_heads=3))
    with pytest.raises(ExpansionError, match="no head_dim"):
        shape_from_config(make_config(hidden_size=66, head_dim=None))


# Refusals (E6)


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        ("E_EXPAND_POSTNORM", {"model_type": "openai-gpt"}),
        ("E_EXPAND_POSTNORM", {"model_type": "opt", "do_layer_norm_before": False}),
        ("E_EXPAND_POSTNORM", {"model_type": "roberta"}),
        ("E_EXPAND_DEPTH_SCALED", {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}),
        ("E_EXPAND_DEPTH_SCALED", {"model_type": "minicpm"}),
        ("E_EXPAND_DEPTH_SCALED", {"model_type": "llama", "scale_depth": 1.4}),
        ("E_EXPAND_DEPTH_SCALED", {"model_type": "unheard-of", "deepnorm": True}),
        ("E_EXPAND_SHARED", {"model_type": "albert", "num_hidden_groups": 1}),
        ("E_EXPAND_SHARED", {"model_type": "zamba2"}),
        ("E_EXPAND_SHARED", {"model_type": "gemma3n_text", "num_kv_shared_layers": 10}),
        ("E_EXPAND_SHARED", {"model_type": "llama", "cla_share_factor": 2}),
        ("E_EXPAND_MOE", {"model_type": "mixtral", "num_local_experts": 8}),
        ("E_EXPAND_MOE", {"model_type": "qwen2_moe", "num_experts": 60}),
        ("E_EXPAND_MOE", {"model_type": "deepseek_v3", "n_routed_experts": 256}),
        ("E_EXPAND_MOE", {"model_type": "llama", "num_local_experts": 4}),
        ("E_EXPAND_ENCDEC", {"model_type": "t5"}),
        ("E_EXPAND_ENCDEC", {"model_type": "unheard-of", "is_encoder_decoder": True}),
        ("E_EXPAND_STATEFUL", {"model_type": "mamba"}),
        ("E_EXPAND_STATEFUL", {"model_type": "qwen3", "layer_types": ["full_attention"] * 3 + ["linear_attention"]}),
        ("E_EXPAND_PERLAYER_FIELD", {"model_type": "llama", "layer_scales": [1, 1, 2, 2]}),
        ("E_EXPAND_PERLAYER_FIELD", {"model_type": "qwen2", "layer_types": ["full_attention"] * 3}),
        *(("E_EXPAND_UNKNOWN_FAMILY", {"model_type": family}) for family in LATER_FAMILIES),
        ("E_EXPAND_UNKNOWN_FAMILY", {"model_type": "unheard-of"}),
        ("E_EXPAND_UNKNOWN_FAMILY", {"model_type": None}),
    ],
)
def test_every_refusal_has_its_code_and_says_what_works(code: str, fields: dict[str, Any]) -> None:
    config = make_config() | fields
    with pytest.raises(ExpansionError, match="what works") as e:
        plan_expansion(base_hash=HASH, config=config, placement="top", num_blocks=1)
    assert e.value.code == code
    assert str(e.value).startswith(code)
    assert any(name in str(e.value) and repr(value) in str(e.value) for name, value in fields.items())


def test_an_unknown_family_is_told_the_nearest_name() -> None:
    with pytest.raises(ExpansionError, match=r"nearest name is 'qwen2'"):
        shape_from_config(make_config("qwen2_5"))
    with pytest.raises(ExpansionError, match=r"nearest name is 'llama'"):
        shape_from_config(make_config("lama"))


def test_a_later_family_is_told_that_it_is_not_supported_yet() -> None:
    with pytest.raises(ExpansionError, match="not supported yet"):
        shape_from_config(make_config("gemma"))


def test_lists_that_do_not_count_layers_are_no_per_layer_fields() -> None:
    config = make_config(layers=2, eos_token_id=[1, 2], architectures=["A", "B"])
    assert shape_from_config(config).num_layers == 2
    assert shape_from_config(make_config(layers=4, something=[1, 2])).num_layers == 4


# Placement


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(3, [1, 2, 0]), (4, [2, 3, 1]), (5, [3, 4, 1]), (6, [3, 5, 1]), (24, [15, 23, 7]), (28, [18, 27, 9])],
)
def test_thirds_begins_two_thirds_up_then_on_top_then_one_third_up(layers: int, expected: list[int]) -> None:
    assert slots(make_plan(layers, "thirds", 3)) == expected
    assert slots(make_plan(layers, "thirds", 2)) == expected[:2]


@given(layers=st.integers(3, 200))
def test_thirds_with_three_blocks_has_the_slots_of_interleaved_with_three(layers: int) -> None:
    assert sorted(slots(make_plan(layers, "thirds", 3))) == slots(make_plan(layers, "interleaved", 3))


@given(per_block=st.integers(1, 20), blocks=st.integers(1, 12))
def test_interleaved_is_llama_pros_rule_where_the_blocks_divide_the_depth(per_block: int, blocks: int) -> None:
    layers = per_block * blocks
    expected = [i for i in range(layers) if (i + 1) % (layers // blocks) == 0]
    assert slots(make_plan(layers, "interleaved", blocks)) == expected


@given(layers=st.integers(1, 60), blocks=st.integers(1, 60))
def test_interleaved_never_puts_two_blocks_in_one_slot(layers: int, blocks: int) -> None:
    if blocks > layers:
        with pytest.raises(ExpansionError, match="at most"):
            make_plan(layers, "interleaved", blocks)
    else:
        assert len(set(slots(make_plan(layers, "interleaved", blocks)))) == blocks


def test_top_stacks_its_blocks_in_the_order_of_their_ids() -> None:
    plan = make_plan(2, "top", 3)
    assert plan.stack() == (
        StackEntry(kind="base", index=0),
        StackEntry(kind="base", index=1),
        StackEntry(kind="block", index=0),
        StackEntry(kind="block", index=1),
        StackEntry(kind="block", index=2),
    )
    assert plan.base_cut == 2
    assert plan.sources() == (0, 1, 1, 1, 1)


def test_the_cut_is_the_position_of_the_lowest_block() -> None:
    plan = make_plan(6, "thirds", 3)
    assert [plan.position(block_id) for block_id in plan.block_ids] == [5, 8, 2]
    assert plan.base_cut == 2


@pytest.mark.parametrize(
    ("layers", "placement", "blocks", "works"),
    [
        (6, "thirds", 4, "at most 3 blocks, or placement 'top' or 'interleaved'"),
        (2, "thirds", 3, "at most 2 blocks, or placement 'top'"),
        (1, "thirds", 2, "at most 1 blocks, or placement 'top'"),
        (3, "interleaved", 4, "at most 3 blocks, or placement 'top'"),
    ],
)
def test_too_many_blocks_are_told_what_fits(layers: int, placement: str, blocks: int, works: str) -> None:
    with pytest.raises(ExpansionError, match=works) as e:
        make_plan(layers, placement, blocks)
    assert e.value.code == "E_EXPAND_PLACEMENT"
    make_plan(layers, placement, blocks - 1)


def test_a_placement_that_does_not_exist_or_no_blocks_are_refused() -> None:
    with pytest.raises(ExpansionError, match="thirds, top, interleaved or adaptive"):
        make_plan(placement="middle")
    with pytest.raises(ExpansionError, match="at least 1"):
        make_plan(num_blocks=0)


# The plan as a value (P1, P2)

plans = st.builds(
    make_plan,
    layers=st.integers(3, 40),
    placement=st.sampled_from(["thirds", "top", "interleaved"]),
    num_blocks=st.integers(1, 3),
    family=st.sampled_from(sorted(FAMILIES)),
    tie_word_embeddings=st.booleans(),
)


@given(plan=plans)
def test_a_plan_survives_json_and_msgpack(plan: ExpansionPlan) -> None:
    assert ExpansionPlan.from_json(plan.to_json()) == plan
    assert ExpansionPlan.from_plain(msgpack.unpackb(msgpack.packb(plan.to_plain()))) == plan
    assert ExpansionPlan.from_json(plan.to_json()).digest() == plan.digest()


@given(layers=st.integers(3, 40), placement=st.sampled_from(["thirds", "top", "interleaved"]))
def test_a_plan_is_a_pure_function_of_its_inputs(layers: int, placement: str) -> None:
    config = make_config(layers=layers)
    before = copy.deepcopy(config)
    reordered = dict(reversed(config.items()))
    one = plan_expansion(base_hash=HASH, config=config, placement=placement, num_blocks=2)
    two = plan_expansion(base_hash=HASH, config=reordered, placement=placement, num_blocks=2)
    assert one == two
    assert one.to_json() == two.to_json()
    assert config == before


def test_a_plan_has_the_same_digest_in_another_process() -> None:
    plan = make_plan()
    code = (
        "import sys; from fedblocks.protocol.expansion import *; print(ExpansionPlan.from_json(sys.argv[1]).digest())"
    )
    other = subprocess.run([sys.executable, "-c", code, plan.to_json()], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == plan.digest()


@given(plan=plans)
def test_growing_keeps_old_ids_and_adds_one(plan: ExpansionPlan) -> None:
    if plan.placement == "interleaved" or (plan.placement == "thirds" and len(plan.blocks) == 3):
        with pytest.raises(ExpansionError) as e:
            grow(plan)
        assert e.value.code == "E_EXPAND_PLACEMENT"
        return
    if plan.shape.encoder and plan.placement == "top":
        with pytest.raises(ExpansionError, match="holds a block already"):
            grow(plan)
        return
    grown = grow(plan)
    assert grown.blocks[:-1] == plan.blocks
    assert grown.blocks[-1].block_id == plan.blocks[-1].block_id + 1
    assert grown == make_plan_like(plan, len(plan.blocks) + 1)


def make_plan_like(plan: ExpansionPlan, num_blocks: int) -> ExpansionPlan:
    config = make_config(plan.shape.family, plan.shape.num_layers, tie_word_embeddings=plan.shape.tied_embeddings)
    return plan_expansion(base_hash=HASH, config=config, placement=plan.placement, num_blocks=num_blocks)


@given(plan=plans)
def test_the_stack_holds_each_layer_and_block_once_in_order(plan: ExpansionPlan) -> None:
    stack = plan.stack()
    assert len(stack) == plan.shape.num_layers + len(plan.blocks)
    assert [entry.index for entry in stack if entry.kind == "base"] == list(range(plan.shape.num_layers))
    for block in plan.blocks:
        below = [entry for entry in stack[: plan.position(block.block_id)] if entry.kind == "base"]
        assert below[-1].index == block.after_layer
    assert stack[plan.base_cut].kind == "block"
    assert all(entry.kind == "base" for entry in stack[: plan.base_cut])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(path=st.sampled_from([(), ("shape",), ("blocks",), ("blocks", 0)]), data=st.data(), value=json_values)
def test_a_damaged_plan_is_refused_and_nothing_else(path: tuple[Any, ...], data: st.DataObject, value: Any) -> None:
    plain = json.loads(make_plan().to_json())
    node = plain
    for step in path:
        node = node[step]
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key = data.draw(st.sampled_from(keys))
    if data.draw(st.booleans()) and isinstance(node, dict):
        del node[key]
    else:
        node[key] = value
    try:
        read = ExpansionPlan.from_plain(plain)
    except ExpansionError as e:
        code = e.code
    else:
        assert json.loads(read.to_json()) == plain
        return
    assert code == "E_EXPAND_PLAN"


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, '{"base_hash": 1}'])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ExpansionError) as e:
        ExpansionPlan.from_json(text)
    assert e.value.code == "E_EXPAND_PLAN"


def test_a_block_that_the_plan_has_not_is_named() -> None:
    with pytest.raises(KeyError, match="no block 7"):
        make_plan().position(7)
    plan = make_plan()
    with pytest.raises(ExpansionError, match="after_layer 4, expected 0 to 3"):
        ExpansionPlan(
            base_hash=HASH,
            shape=plan.shape,
            placement="top",
            blocks=(ExpandedBlock(block_id=0, source_layer=3, after_layer=4),),
        )


# The grown configuration (E3)


def test_known_lists_grow_by_the_entry_of_the_source_layer() -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = make_config("qwen2", layer_types=types, no_rope_layers=[1, 0, 1, 0], max_window_layers=4)
    plan = plan_expansion(base_hash=HASH, config=config, placement="thirds", num_blocks=3)
    grown = expand_config(config, plan)
    assert grown["num_hidden_layers"] == 7
    assert grown["layer_types"] == [types[i] for i in (0, 1, 1, 2, 2, 3, 3)]
    assert grown["no_rope_layers"] == [1, 0, 0, 1, 1, 0, 0]
    assert grown["max_window_layers"] == 1
    assert config["layer_types"] == types


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_that_the_configuration_implies_are_written_out_before_growing(family: str) -> None:
    config = make_config(family, 6, use_sliding_window=True, sliding_window=32, max_window_layers=2)
    plan = plan_expansion(base_hash=HASH, config=config, placement="thirds", num_blocks=3)
    assert layer_types(config) == ["full_attention"] * 2 + ["sliding_attention"] * 4
    grown = expand_config(config, plan)
    assert grown["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"] * 6
    assert grown["max_window_layers"] == 3


@pytest.mark.parametrize(
    "fields", [{}, {"use_sliding_window": False}, {"use_sliding_window": True, "sliding_window": None}]
)
def test_without_windows_the_first_windowed_layer_is_the_depth(fields: dict[str, Any]) -> None:
    config = make_config("qwen2", 6, max_window_layers=2, **fields)
    plan = plan_expansion(base_hash=HASH, config=config, placement="top", num_blocks=2)
    grown = expand_config(config, plan)
    assert grown["layer_types"] == ["full_attention"] * 8
    assert grown["max_window_layers"] == 8


def test_a_window_for_all_layers_needs_no_list() -> None:
    config = make_config("mistral", sliding_window=32)
    plan = plan_expansion(base_hash=HASH, config=config, placement="top", num_blocks=1)
    grown = expand_config(config, plan)
    assert grown == config | {"num_hidden_layers": 5}


def test_all_other_fields_are_carried_through() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}
    config = make_config(rope_parameters=rope, rope_theta=5e5, rope_scaling=None, something_new={"deep": [1]})
    plan = plan_expansion(base_hash=HASH, config=config, placement="thirds", num_blocks=1)
    grown = expand_config(config, plan)
    assert grown == config | {"num_hidden_layers": 5}
    grown["something_new"]["deep"].append(2)
    assert config["something_new"] == {"deep": [1]}


def test_a_configuration_of_another_base_is_refused() -> None:
    with pytest.raises(ExpansionError, match="the plan was made for"):
        expand_config(make_config(layers=5), make_plan(layers=4))


# What enters the base hash


def test_both_spellings_of_the_rotary_settings_are_one_base() -> None:
    old = make_config(rope_theta=10000, rope_scaling={"type": "linear", "factor": 2})
    new = make_config(rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0})
    assert base_fields(old) == base_fields(new)
    assert base_fields(make_config()) == base_fields(make_config(rope_parameters={"rope_type": "default"}))
    assert base_fields(make_config(rope_theta=5e5)) != base_fields(make_config())


def test_comments_and_lengths_are_no_part_of_the_base_but_the_epsilon_is() -> None:
    plain = base_fields(make_config())
    assert base_fields(make_config(_name_or_path="/somewhere", max_position_embeddings=9, use_cache=False)) == plain
    assert base_fields(make_config(rms_norm_eps=1e-4)) != plain


def test_rotary_settings_that_are_no_map_are_refused() -> None:
    with pytest.raises(ExpansionError, match="rope_scaling is 'linear', expected a map"):
        base_fields(make_config(rope_scaling="linear"))


def test_the_module_needs_the_standard_library_only() -> None:
    code = (
        "import sys; import fedblocks.protocol.expansion\n"
        "heavy = {'torch', 'numpy', 'transformers', 'msgpack', 'zmq', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plan_of_blocks_is_written_as_it_always_was() -> None:
    plan = plan_expansion(base_hash="a" * 64, config=make_config(), placement="top", num_blocks=1)
    assert set(plan.to_plain()) == {"base_hash", "shape", "placement", "blocks"}
    assert plan.unit_ids == plan.block_ids
    assert plan.units.published() == plan.units


@pytest.mark.parametrize(
    "trainable",
    [
        LowRankPairs(rank=4, targets="qv", seed=9),
        LowRankPairs(rank=4, merged=True),
        BaseTensors(layers=(0, 1), tables=True),
    ],
)
def test_a_plan_of_other_trainables_survives_its_file(trainable: LowRankPairs | BaseTensors) -> None:
    plan = plan_trainable(base_hash="a" * 64, config=make_config(), trainable=trainable)
    again = ExpansionPlan.from_json(plan.to_json())
    assert again == plan
    assert again.units.trainable == trainable
    assert again.base_cut == 0
    assert len(again.stack()) == again.shape.num_layers
    head = NamedTensors(name="head", tensors=(TensorSpec(name="weight", shape=(3, 64)),))
    with_head = replace(plan, extra=head)
    assert ExpansionPlan.from_json(with_head.to_json()) == with_head


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ({"kind": "other"}, "it trains 'other', expected low_rank, personal_pairs or base"),
        (7, "it trains None"),
        ({"kind": "base", "layers": [0]}, "exactly the fields"),
        ({"kind": "base", "layers": [99], "tables": False}, "layers are"),
        ({"kind": "low_rank", "rank": 4.5, "scaling": 2, "targets": "all", "seed": 1, "merged": False}, "rank is 4.5"),
        ({"kind": "low_rank", "rank": 9999, "scaling": 2, "targets": "all", "seed": 1, "merged": False}, "at most"),
    ],
)
def test_a_plan_with_an_impossible_trainable_is_refused(trainable: object, message: str) -> None:
    plan = plan_trainable(base_hash="a" * 64, config=make_config(), trainable=LowRankPairs(rank=2)).to_plain()
    with pytest.raises(ExpansionError, match=message):
        ExpansionPlan.from_plain({**plan, "trainable": trainable})
