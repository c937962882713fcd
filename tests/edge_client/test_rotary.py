"""Tests of edge_client/rotary.py: the tables of transformers, bit for bit, without transformers."""

from __future__ import annotations

import sys

import pytest
import torch

from fedblocks.edge_client.decoder_block import attention_windows
from fedblocks.edge_client.rotary import KINDS, Rotary
from fedblocks.protocol.expansion import ExpansionError

HEAD_DIM = 32
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
LENGTHS = (1, 2, 17, 63, 64, 65, 200, 700)
SHORT, LONG = [1.0 + 0.01 * i for i in range(HEAD_DIM // 2)], [1.0 + 0.4 * i for i in range(HEAD_DIM // 2)]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SETTINGS = [
    pytest.param({"rope_type": "default"}, id="default"),
    pytest.param({"rope_type": "linear", "factor": 2.5}, id="linear"),
    pytest.param({"type": "linear", "factor": 4}, id="linear, oldest spelling"),
    pytest.param({"rope_type": "dynamic", "factor": 2.0}, id="dynamic"),
    pytest.param({"rope_type": "dynamic", "factor": 3}, id="dynamic, whole factor"),
    pytest.param({"rope_type": "llama3", **LLAMA3}, id="llama3"),
    pytest.param({"rope_type": "llama3", **LLAMA3, "factor": 32, "high_freq_factor": 4}, id="llama3, whole factor"),
    pytest.param({"rope_type": "yarn", "factor": 4.0}, id="yarn"),
    pytest.param(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16, "beta_slow": 2},
        id="yarn, own ramp",
    ),
    pytest.param({"rope_type": "yarn", "factor": 40, "mscale": 0.7, "mscale_all_dim": 1.0}, id="yarn, two scales"),
    pytest.param({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "truncate": False}, id="yarn, as given"),
    pytest.param(
        {
            "rope_type": "longrope",
            "short_factor": SHORT,
            "long_factor": LONG,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        id="longrope",
    ),
    pytest.param(
        {
            "rope_type": "longrope",
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 64,
            "attention_factor": 0.9,
        },
        id="longrope, attention as given",
    ),
    pytest.param(
        {
            "rope_type": "longrope",
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 32,
        },
        id="longrope, factor from the lengths",
    ),
]


def of_transformers(config, length, dtype):
    """cos, sin of a new module of transformers: those that change with the length remember the longest they saw."""
    from transformers import MODEL_MAPPING, AutoConfig

    made = AutoConfig.for_model(**config)
    model = MODEL_MAPPING[type(made)]
    module = getattr(sys.modules[model.__module__], model.__name__.removesuffix("Model") + "RotaryEmbedding")(made)
    cos, sin = module(torch.empty(0, dtype=dtype), torch.arange(length).unsqueeze(0))
    return cos[0], sin[0]


def config_of(family, **fields):
    return {"model_type": family, "head_dim": HEAD_DIM, "max_position_embeddings": 512, **SIZES, **fields}


def assert_equal_tables(config, lengths=LENGTHS, dtype=torch.float32):
    ours = Rotary(config, HEAD_DIM, dtype)
    for length in (*lengths, *reversed(lengths)):
        for mine, theirs in zip(ours.tables(length), of_transformers(config, length, dtype), strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine, theirs), length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_kind_has_the_bits_of_transformers(settings, dtype):
    assert_equal_tables(config_of("llama", rope_theta=50000.0, rope_scaling=settings), dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "dynamic"])
def test_both_spellings_of_every_family_have_the_bits_of_transformers(family, kind):
    settings = {"rope_type": kind, **LLAMA3} if kind == "llama3" else {"rope_type": kind, "factor": 4.0}
    assert_equal_tables(config_of(family, rope_theta=1000000.0, rope_scaling=settings), (5, 600))
    assert_equal_tables(config_of(family, rope_parameters={"rope_theta": 1000000.0, **settings}), (5, 600))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_without_rotary_fields_has_the_defaults_of_its_family(family):
    bare = config_of(family)
    del bare["max_position_embeddings"]
    assert_equal_tables(bare, (9,))
    assert_equal_tables({**bare, "rope_scaling": None, "rope_theta": 500000}, (9,))
    assert_equal_tables({**bare, "rope_scaling": {"type": "yarn", "factor": 2.0}}, (9,))


def test_the_trained_length_beside_the_rotary_fields_goes_before_the_one_among_them():
    settings = {"rope_type": "llama3", **LLAMA3}
    assert_equal_tables(config_of("llama", rope_scaling=settings, original_max_position_embeddings=128), (70,))


def test_a_partial_rotary_factor_is_ignored_by_the_plain_kind_as_in_transformers():
    assert_equal_tables(config_of("llama", rope_theta=10000.0, partial_rotary_factor=0.5), (9,))


def test_a_table_depends_on_nothing_but_its_length():
    """In transformers' dynamic kind, texts between two lengths get the frequencies of the longest seen before."""
    config = config_of("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=64)
    used, fresh = Rotary(config, HEAD_DIM, torch.float32), Rotary(config, HEAD_DIM, torch.float32)
    used.tables(300)
    assert torch.equal(used.tables(100)[0], fresh.tables(100)[0])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"rope_scaling": {"rope_type": "mrope"}},
            r"rotary kind 'mrope' is not known; known kinds are default, linear",
        ),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rotary kind \['yarn'\] is not known"),
        ({"rope_parameters": {"full_attention": {"rope_type": "mrope"}}}, r"separate rotary settings"),
        ({"rope_scaling": 8}, r"rotary settings are 8, expected a map"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"factor \(rotary kind linear\) is None, expected a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, r"factor \(rotary kind linear\) is nan"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, r"factor \(rotary kind linear\) is True"),
        ({"rope_theta": 0}, r"rope_theta is 0, expected a number above zero"),
        ({"rope_theta": None}, r"rope_theta is None"),
        ({"max_position_embeddings": "long"}, r"max_position_embeddings is 'long'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": [1.0]}},
            r"long_factor \(rotary kind longrope\) must be a list of 16 numbers",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
            r"partial_rotary_factor is 0\.5, but these models turn whole heads",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1}, r"kind yarn has no frequencies"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "a"}},
            r"beta_fast \(rotary kind yarn\) is",
        ),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, r"are equal"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, text):
    with pytest.raises(ExpansionError, match=text):
        Rotary(config_of("llama", **fields), HEAD_DIM, torch.float32)


def test_odd_heads_are_refused():
    with pytest.raises(ExpansionError, match="heads are 5 wide, expected an even number"):
        Rotary(config_of("llama"), 5, torch.float32)


def test_all_known_kinds_are_compared():
    named = {value.get("rope_type", value.get("type")) for case in SETTINGS for value in case.values}
    assert named == set(KINDS)


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {}, (None,) * 4),
        ("llama", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 4}, (None,) * 4),
        ("mistral", {}, (4096,) * 4),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("mistral", {"sliding_window": 8}, (8,) * 4),
        ("qwen2", {"sliding_window": 8}, (None,) * 4),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 8)),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}, (None, None, 4096, 4096)),
        ("qwen3", {"use_sliding_window": True}, (None,) * 4),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
        ("qwen2", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 4}, (None,) * 4),
    ],
)
def test_windows_are_those_of_the_family(family, fields, expected):
    assert attention_windows({"model_type": family, "num_hidden_layers": 4, **fields}, 4) == expected


def test_another_family_is_refused():
    with pytest.raises(ExpansionError, match="gemma2"):
        attention_windows({"model_type": "gemma2", "num_hidden_layers": 4}, 4)
