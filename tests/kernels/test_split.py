"""Tests of kernels/reference/split.py: fp32 as bf16 and a remainder."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedblocks.kernels import ops
from fedblocks.kernels.reference import split

torch.set_num_threads(1)

LARGEST_FINITE_HALF = 0x7F7F7FFF


def of_bits(*patterns):
    return torch.from_numpy(np.array(patterns, dtype=np.uint32).view(np.float32))


def bits(tensor):
    return tensor.view(torch.int32)


def test_every_bit_pattern_comes_back():
    patterns = torch.randint(-(2**31), 2**31, (1 << 20,), generator=torch.Generator().manual_seed(0))
    value = patterns.to(torch.int32).view(torch.float32)
    assert torch.equal(bits(ops.merge_split(*ops.split_fp32(value))), bits(value))


@given(npst.arrays(np.uint32, st.integers(0, 40), elements=st.integers(0, 2**32 - 1)))
def test_any_array_comes_back(patterns):
    value = torch.from_numpy(patterns.view(np.float32).copy())
    assert torch.equal(bits(ops.merge_split(*ops.split_fp32(value))), bits(value))


def test_every_upper_half_comes_back_with_the_lower_halves_where_rounding_turns():
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        value = torch.from_numpy((upper | lower).view(np.float32))
        assert torch.equal(bits(ops.merge_split(*ops.split_fp32(value))), bits(value))


def test_the_high_half_is_the_nearest_bf16_number_and_ties_go_away_from_zero():
    value = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    high, low = ops.split_fp32(value)
    ties = low == -(2**15)
    assert torch.equal(high[~ties], value.to(torch.bfloat16)[~ties])
    assert ops.split_fp32(of_bits(0x3F808000, 0xBF808000))[0].tolist() == [1.0078125, -1.0078125]
    assert (high.float() - value).abs().max() <= value.abs().max() * 2**-8


def test_zeros_denormals_and_the_edge_of_the_range():
    value = of_bits(0, 0x80000000, 1, 0x80000001, 0x007FFFFF, LARGEST_FINITE_HALF, 0xFF7F7FFF, 0x7F800000)
    high, low = ops.split_fp32(value)
    assert torch.equal(bits(ops.merge_split(high, low)), bits(value))
    assert torch.equal(high.isinf(), value.isinf())
    assert high[:2].view(torch.int16).tolist() == [0, -(2**15)]
    # One bit more and the half overflows, as rounding to bf16 does; the pair is still exact.
    beyond = of_bits(LARGEST_FINITE_HALF + 1, 0x7F7FFFFF, 0xFF7FFFFF)
    high, low = ops.split_fp32(beyond)
    assert high.isinf().all()
    assert beyond.to(torch.bfloat16).isinf().all()
    assert torch.equal(bits(ops.merge_split(high, low)), bits(beyond))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 40])
def test_chunks_change_nothing_and_given_tensors_are_filled(size, monkeypatch):
    value = torch.randn(size, generator=torch.Generator().manual_seed(2))
    whole = ops.split_fp32(value)
    monkeypatch.setattr(split, "CHUNK", 16)
    high, low, merged = torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.int16), torch.empty(size)
    assert ops.split_fp32(value, out=(high, low)) == (high, low) or size != 1
    assert torch.equal(high, whole[0])
    assert torch.equal(low, whole[1])
    assert ops.merge_split(high, low, out=merged).data_ptr() == merged.data_ptr()
    assert torch.equal(merged, value)


def test_shapes_and_leaves_are_taken_as_they_are():
    value = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    high, low = ops.split_fp32(value.T)
    assert high.shape == low.shape == (4, 3)
    merged = ops.merge_split(high.requires_grad_(), low)
    assert torch.equal(merged, value.T)
    assert not merged.requires_grad


def test_wrong_dtypes_and_shapes_are_errors_that_name_them():
    with pytest.raises(ValueError, match=r"got torch\.float64 \(3,\)"):
        ops.split_fp32(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected float32, bfloat16 and int16 of one shape"):
        ops.merge_split(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int16))
