"""Which part of a block is a slim block?"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from fedblocks.profiles.model_shape import WIDTHS, ModelShape

QWEN = ModelShape(
    family="qwen2",
    num_layers=24,
    hidden_size=896,
    intermediate_size=4864,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=151936,
    tied_embeddings=True,
    qkv_bias=True,
)
SHAPES = {
    "grouped": QWEN,
    "one kv head": replace(QWEN, num_kv_heads=1),
    "as many kv heads": replace(QWEN, num_kv_heads=14, qkv_bias=False, o_bias=True, mlp_bias=True),
    "tiny": replace(QWEN, hidden_size=64, intermediate_size=100, num_heads=4, head_dim=16, qk_norm=True),
    "one head": replace(QWEN, hidden_size=64, intermediate_size=7, num_heads=1, num_kv_heads=1),
}


def test_the_slices_of_a_known_model() -> None:
    """methods.md 3.1 by hand: groups of seven heads, neurons in multiples of 64."""
    assert [QWEN.slice_sizes(w) for w in WIDTHS] == [(1, 1, 576), (3, 1, 1216), (7, 1, 2432), (14, 2, 4864)]
    assert [QWEN.slice_parameters(w) for w in WIDTHS][-1] == QWEN.block_parameters == 14_912_384


@pytest.mark.parametrize("name", SHAPES)
def test_widths_are_nested_and_the_last_is_the_whole_block(name: str) -> None:
    shape = SHAPES[name]
    assert shape.block_tensors(1.0) == shape.block_tensors()
    for narrow, wide in pairwise(WIDTHS):
        for small, large in zip(shape.block_tensors(narrow), shape.block_tensors(wide), strict=True):
            assert (small.name, small.is_out, len(small.shape)) == (large.name, large.is_out, len(large.shape))
            assert all(a <= b for a, b in zip(small.shape, large.shape, strict=True))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_heads_of_a_slim_block_share_keys_as_those_of_the_whole_one(name: str, width: float) -> None:
    shape = SHAPES[name]
    heads, kv_heads, neurons = shape.slice_sizes(width)
    group = shape.num_heads // shape.num_kv_heads
    assert {head // group for head in range(heads)} == set(range(kv_heads))
    assert heads % kv_heads == 0
    assert 1 <= neurons <= shape.intermediate_size


def test_a_width_of_no_slim_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block width is 0\.3, expected one of 0\.125, 0\.25, 0\.5, 1\.0"):
        QWEN.block_tensors(0.3)
