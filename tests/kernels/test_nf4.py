"""Tests of kernels/reference/nf4.py and its registered operation."""

import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fedblocks.kernels import ops
from fedblocks.kernels.reference import nf4

torch.set_num_threads(1)


def bitsandbytes():
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def a_weight(n, k, seed=0, dtype=torch.float32):
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def from_bitsandbytes(weight):
    """Theirs as our type, with their own state object."""
    packed, state = bitsandbytes().functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return (
        packed,
        state,
        ops.Nf4Weight(
            packed=packed.reshape(-1),
            absmax=state.absmax,
            nested_code=state.state2.code,
            nested_absmax=state.state2.absmax,
            offset=state.offset.item(),
            code=state.code,
            shape=tuple(weight.shape),
        ),
    )


def decoded_slowly(weight):
    """One element at a time, as the layout is described; numpy fp32 scalars round each operation once."""
    import numpy as np

    packed, absmax = weight.packed.tolist(), weight.absmax.tolist()
    nested_code, nested = weight.nested_code.numpy(), weight.nested_absmax.numpy()
    code, offset = weight.code.numpy(), np.float32(weight.offset)
    out = []
    for i in range(weight.num_elements):
        nibble = packed[i // 2] >> 4 if i % 2 == 0 else packed[i // 2] & 15
        group = i // 64
        scale = np.float32(nested_code[absmax[group]] * nested[group // 256]) + offset
        out.append(code[nibble] * scale)
    return torch.from_numpy(np.array(out, dtype=np.float32)).view(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 192), (1, 64), (300, 1024)])
def test_decoding_equals_bitsandbytes_bit_for_bit_where_theirs_is_right(shape, dtype):
    packed, state, ours = from_bitsandbytes(a_weight(*shape, dtype=dtype))
    theirs = bitsandbytes().functional.dequantize_4bit(packed, state)
    assert torch.equal(ops.nf4_dequant(ours, dtype), theirs)


@pytest.mark.parametrize("k", [64, 80, 96, 288, 66])
def test_decoding_equals_the_slow_reading_of_the_layout_at_every_width(k):
    for weight in (from_bitsandbytes(a_weight(7, k))[2], ops.quantize_nf4(a_weight(7, k))):
        assert torch.equal(ops.nf4_dequant(weight, torch.float32), decoded_slowly(weight))


@given(n=st.integers(1, 5), k=st.integers(1, 200), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_shape_decodes_as_the_layout_says(n, k, seed):
    weight = ops.quantize_nf4(a_weight(n, k, seed))
    assert torch.equal(ops.nf4_dequant(weight, torch.float32), decoded_slowly(weight))


@pytest.mark.parametrize("k", [80, 96, 288, 400])
def test_widths_that_bitsandbytes_decodes_wrongly_on_a_cpu_are_right_here(k):
    """Its CPU path is wrong where K is a multiple of 16 but not of 64 (0.50.2): error 25 % instead of 9 %."""
    dense = a_weight(32, k)
    packed, state, ours = from_bitsandbytes(dense)
    decoded = ops.nf4_dequant(ours, torch.float32)
    assert (decoded - dense).norm() / dense.norm() < 0.12
    theirs = bitsandbytes().functional.dequantize_4bit(packed, state)
    if torch.equal(theirs, decoded):
        pytest.skip("this bitsandbytes decodes these widths rightly on this CPU")
    assert (theirs - dense).norm() / dense.norm() > 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [16383, 16384, 16385, 16384 + 63, 16384 + 64, 3 * 16384 + 65])
def test_the_pieces_in_which_it_is_decoded_change_nothing(n, dtype, monkeypatch):
    weight = ops.quantize_nf4(a_weight(1, n))
    whole = ops.nf4_dequant(weight, dtype)
    assert n != 16385 or torch.equal(whole, decoded_slowly(weight).to(dtype))
    monkeypatch.setattr(nf4, "PIECE", 16384)
    assert torch.equal(ops.nf4_dequant(weight, dtype), whole)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that was made and that does not lie in a given one."""

    def __init__(self, *given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.given:
                    self.bytes = max(self.bytes, storage.nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_into_a_buffer_makes_nothing_of_the_weights_size(dtype, monkeypatch):
    monkeypatch.setattr(nf4, "PIECE", 16384)
    weight = ops.quantize_nf4(a_weight(64, 4096))
    out = torch.empty(64, 4096, dtype=dtype)
    with Largest(out, weight.packed, weight.absmax) as largest:
        nf4.nf4_dequant(
            weight.packed, weight.absmax, weight.nested_code, weight.nested_absmax, weight.code, weight.offset, out
        )
    assert torch.equal(out, ops.nf4_dequant(weight, dtype))
    assert 0 < largest.bytes <= 4 * 16384


def test_an_all_zero_group_decodes_to_zero_although_its_scale_is_not_zero():
    dense = a_weight(4, 256)
    dense[1, 64:128] = 0
    for weight in (ops.quantize_nf4(dense), from_bitsandbytes(dense)[2]):
        decoded = ops.nf4_dequant(weight, torch.float32)
        assert torch.equal(decoded[1, 64:128], torch.zeros(64))
        assert decoded[1, :64].abs().sum() > 0
    assert torch.equal(ops.nf4_dequant(ops.quantize_nf4(torch.zeros(3, 70)), torch.float32), torch.zeros(3, 70))


def test_the_dynamic_code_is_that_of_bitsandbytes():
    assert torch.equal(nf4.dynamic_code(), bitsandbytes().functional.create_dynamic_map())


@pytest.mark.parametrize("shape", [(192, 64), (64, 288), (512, 512)])
def test_our_quantiser_gives_the_codes_of_bitsandbytes_on_nearly_all_elements(shape):
    dense = a_weight(*shape)
    ours, theirs = ops.quantize_nf4(dense), from_bitsandbytes(dense)[2]
    assert (ours.packed == theirs.packed).float().mean() > 0.999
    assert (ours.absmax == theirs.absmax).float().mean() > 0.99
    error = [((ops.nf4_dequant(w, torch.float32) - dense).norm() / dense.norm()).item() for w in (ours, theirs)]
    assert error[0] == pytest.approx(error[1], rel=1e-3)
    assert error[0] < 0.1


def test_decoding_into_rows_of_a_larger_buffer_writes_there_and_nowhere_else():
    weight = ops.quantize_nf4(a_weight(5, 64))
    buffer = torch.full((9, 64), 7.0)
    assert ops.nf4_dequant(weight, torch.float32, out=buffer[2:7]).data_ptr() == buffer[2:7].data_ptr()
    assert torch.equal(buffer[2:7], ops.nf4_dequant(weight, torch.float32))
    assert torch.equal(buffer[[0, 1, 7, 8]], torch.full((4, 64), 7.0))


def test_wrong_calls_say_what_was_got_and_what_was_expected():
    weight = ops.quantize_nf4(a_weight(5, 64))
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        ops.nf4_dequant(weight, torch.float64)
    with pytest.raises(ValueError, match=r"out is torch\.float32 \(4, 64\) .*, expected torch\.float32 \(5, 64\)"):
        ops.nf4_dequant(weight, torch.float32, out=torch.empty(4, 64))
    with pytest.raises(ValueError, match="contiguous"):
        ops.nf4_dequant(weight, torch.float32, out=torch.empty(64, 5).T)
    with pytest.raises(ValueError, match=r"packed is torch\.uint8 \(3,\)"):
        ops.Nf4Weight(
            packed=weight.packed[:3],
            absmax=weight.absmax,
            nested_code=weight.nested_code,
            nested_absmax=weight.nested_absmax,
            offset=weight.offset,
            code=weight.code,
            shape=weight.shape,
        )
    for bad in (torch.zeros(3), torch.zeros(0, 4), torch.full((2, 64), torch.inf), torch.zeros(2, 2, dtype=torch.int8)):
        with pytest.raises(ValueError, match="quantize_nf4"):
            ops.quantize_nf4(bad)


def test_the_registered_operations_pass_opcheck():
    w = ops.quantize_nf4(a_weight(6, 96))
    parts = (w.packed, w.absmax, w.nested_code, w.nested_absmax, w.code, w.offset)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.fedblocks.nf4_dequant.default, (*parts, list(w.shape), dtype))
        torch.library.opcheck(torch.ops.fedblocks.nf4_dequant_into.default, (*parts, torch.empty(6, 96, dtype=dtype)))
