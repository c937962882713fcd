"""Tests of edge_client/recompute.py: the gradients of keeping everything, in the memory of keeping the input."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from fedblocks.edge_client.recompute import recomputed


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_() for size in ((48, 16), (16, 24))]


def run_with(weights, counter=None):
    def run(x):
        if counter is not None:
            counter.append(1)
        gate, up = functional.linear(x, weights[0]).chunk(2, dim=-1)
        return x + functional.linear(functional.silu(gate) * up, weights[1])

    return run


def gradients(weights, x, how, passes=1):
    for tensor in (*weights, x):
        tensor.grad = None
    for _ in range(passes):
        how(run_with(weights), x).square().sum().backward()
    return [tensor.grad for tensor in (*weights, x)]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("from_below", [True, False])
def test_gradients_have_the_same_bits(weights, from_below, passes):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_(from_below)
    plain = gradients(weights, x, lambda run, x: run(x), passes)
    again = gradients(weights, x, recomputed, passes)
    assert (plain[2] is not None) == from_below
    for mine, theirs in zip(again, plain, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


def test_nothing_is_kept_and_the_pass_runs_twice_but_not_to_its_end(weights):
    kept, calls, ends = [], [], []

    def run(x):
        y = run_with(weights, calls)(x)
        ends.append(1)
        return y

    x = torch.randn(5, 16)
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = recomputed(run, x)
    assert not kept
    y.sum().backward()
    assert len(calls) == 2
    assert len(ends) == 1  # the second pass ends with the last matrix's input: its product is not needed again


def test_a_chain_of_blocks_and_one_frozen_block_between(weights):
    frozen = [w.detach() for w in weights]

    def chain(how):
        for w in weights:
            w.grad = None
        h = torch.ones(3, 16)
        for held in (weights, frozen, weights):
            h = how(run_with(held), h)
        h.square().mean().backward()
        return [w.grad for w in weights]

    assert all(map(torch.equal, chain(recomputed), chain(lambda run, x: run(x))))


def test_a_graph_that_is_kept_can_be_gone_through_again(weights):
    loss = recomputed(run_with(weights), torch.ones(2, 16)).sum()
    loss.backward(retain_graph=True)
    first = [w.grad.clone() for w in weights]
    loss.backward()
    assert all(torch.equal(w.grad, 2 * g) for w, g in zip(weights, first, strict=True))


def test_a_second_pass_that_does_something_else_is_an_error(weights):
    calls = []

    def run(x):
        calls.append(1)
        return x * weights[0][0, 0] if len(calls) > 1 else run_with(weights)(x)

    y = recomputed(run, torch.ones(2, 16))
    with pytest.raises(RuntimeError, match=r"saved .* tensors in its first pass and .* in its second"):
        y.sum().backward()


def test_without_gradients_it_is_the_pass_itself(weights):
    calls = []
    with torch.no_grad():
        y = recomputed(run_with(weights, calls), torch.ones(2, 16))
    assert y.grad_fn is None
    assert len(calls) == 1
