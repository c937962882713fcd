"""Tests of the linear layer over 4-bit weights, kernels/ops.py."""

import os
import warnings
import weakref

import pytest
import torch
from torch.nn import functional

from fedblocks.kernels import nf4, ops

torch.set_num_threads(1)


def a_weight(n, k, seed=0):
    return ops.quantize_nf4(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05)


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(24,), (16, 8, 8)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_result_and_gradients_have_the_bits_of_a_linear_layer_over_the_decoded_weight(dtype, rows, has_bias):
    parts = tuple(a_weight(n, 96, seed=i) for i, n in enumerate(rows))
    dense = torch.cat([ops.nf4_dequant(part, dtype) for part in parts])
    results = []
    for layer in (lambda x, b: ops.frozen_nf4_linear(x, parts, b), lambda x, b: functional.linear(x, dense, b)):
        x = random(2, 5, 96, dtype=dtype).requires_grad_()
        bias = random(sum(rows), seed=2, dtype=dtype).requires_grad_() if has_bias else None
        y = layer(x, bias)
        y.backward(random(2, 5, sum(rows), seed=3, dtype=dtype))
        results.append((y, x.grad, bias.grad if has_bias else torch.zeros(0)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_is_saved_and_no_decoded_weight_lives_between_the_passes(monkeypatch):
    made, decoded = [], nf4.decoded

    def watched(*args):
        weight = decoded(*args)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(nf4, "decoded", watched)
    saved = []
    x = random(4, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.frozen_nf4_linear(x, (a_weight(8, 64), a_weight(8, 64, seed=1)))
    assert saved == []
    assert [ref() for ref in made] == [None]
    y.sum().backward()
    assert [ref() for ref in made] == [None, None]


def test_an_input_without_gradient_is_not_given_one_and_costs_no_decoding(monkeypatch):
    calls, decoded = [], nf4.decoded
    monkeypatch.setattr(nf4, "decoded", lambda *args: calls.append(1) or decoded(*args))
    assert not ops.frozen_nf4_linear(random(4, 64), (a_weight(8, 64),)).requires_grad
    bias = torch.zeros(8, requires_grad=True)
    ops.frozen_nf4_linear(random(4, 64), (a_weight(8, 64),), bias).sum().backward()
    assert bias.grad.tolist() == [4.0] * 8
    assert len(calls) == 2  # the two forward passes


def test_wrong_shapes_are_errors_that_name_them():
    for parts in ((), (a_weight(8, 64), a_weight(8, 96))):
        with pytest.raises(ValueError, match=r"expected \(N, 64\) each, for x of shape \(4, 64\)"):
            ops.frozen_nf4_linear(random(4, 64), parts)


def test_evaluating_between_steps_leaves_weight_and_gradient_right_where_bitsandbytes_repacks_its_own():
    """A forward pass of bitsandbytes' layer in eval mode repacks its weight in place: the decoding is then wrong and
    the input gets no gradient, in train mode too (0.50.2, CPUs with AVX512_BF16). Ours reads the same bytes."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bitsandbytes = pytest.importorskip("bitsandbytes")
        theirs = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
        theirs.load_state_dict({"weight": random(64, 128) * 0.05})
        theirs = theirs.to("cpu")
        state = theirs.weight.quant_state
        ours = ops.Nf4Weight(
            packed=theirs.weight.data.reshape(-1),
            absmax=state.absmax,
            nested_code=state.state2.code,
            nested_absmax=state.state2.absmax,
            offset=state.offset.item(),
            code=state.code,
            shape=(64, 128),
        )
        dense, data = ops.nf4_dequant(ours, torch.bfloat16), ours.packed.clone()
        x = random(3, 128, dtype=torch.bfloat16)
        with torch.no_grad():
            theirs.eval()(x)
            ops.frozen_nf4_linear(x, (ours,))
        x.requires_grad_()
        ops.frozen_nf4_linear(x, (ours,)).sum().backward()
        assert torch.equal(x.grad, torch.ones(3, 64, dtype=torch.bfloat16) @ dense)
        assert torch.equal(ours.packed, data)
        assert torch.equal(ops.nf4_dequant(ours, torch.bfloat16), dense)
        if torch.equal(theirs.weight.data.reshape(-1), data):
            pytest.skip("this bitsandbytes does not repack on this CPU (it needs AVX512_BF16): nothing to fall into")
        x.grad = None
        theirs.train()(x).sum().backward()
        assert x.grad is None or not torch.equal(x.grad, torch.ones(3, 64, dtype=torch.bfloat16) @ dense)
