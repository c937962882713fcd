"""Tests of edge_client/optimizer.py."""

import math

import pytest
import torch

from fedblocks.edge_client.expanded_model import ParamGroup
from fedblocks.edge_client.optimizer import AdamW, norm_by_kernel
from fedblocks.kernels import ops

torch.set_num_threads(1)

SHAPES = ((577,), (30, 101), (64, 57), (3,))
HYPER = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
MODES = pytest.mark.parametrize("mode", ["fp32", "split", "split_8bit"])


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_group(*, split=False, shapes=SHAPES, decayed=(1, 3), seed=0):
    values = [normal(shape, seed + i) for i, shape in enumerate(shapes)]
    halves = [ops.split_fp32(value) for value in values] if split else []
    tensors = tuple(t.requires_grad_() for t in ([high for high, _ in halves] or values))
    return ParamGroup(
        name=f"group {seed}",
        tensors=tensors,
        lows=tuple(low for _, low in halves),
        decayed=tuple(tensors[i] for i in decayed),
        named={str(i): t for i, t in enumerate(tensors)},
        named_lows={str(i): low for i, (_, low) in enumerate(halves)},
    )


def an_optimizer(*groups, mode="fp32"):
    optimizer = AdamW(groups, mode=mode, **HYPER)
    optimizer.begin()
    return optimizer


def backward(group, gradients):
    """Gives each tensor the gradient named, as a backward pass would, in the tensor's dtype."""
    pairs = [(t, g) for t, g in zip(group.tensors, gradients, strict=True) if g is not None]
    torch.autograd.backward(sum((t * g.to(t.dtype)).sum() for t, g in pairs))


def gradients(step, group_seed=0, shapes=SHAPES, rounded=False):
    made = [normal(shape, 1000 * group_seed + 10 * step + i) for i, shape in enumerate(shapes)]
    return [g.bfloat16().float() for g in made] if rounded else made


def values(group):
    return [group.value(name).clone() for name in group.named]


def test_fp32_steps_have_the_bits_of_torchs_adamw_and_clipping():
    ours, theirs = ([a_group(), a_group(seed=50, shapes=((17, 33),), decayed=())] for _ in range(2))
    optimizer = an_optimizer(*ours)
    every = [t for group in theirs for t in group.tensors]
    pulled = {id(t) for group in theirs for t in group.decayed}
    reference = torch.optim.AdamW(
        [
            {"params": [t for t in every if id(t) in pulled]},
            {"params": [t for t in every if id(t) not in pulled], "weight_decay": 0.0},
        ],
        lr=1.0,
        fused=True,
        **HYPER,
    )
    for step in range(8):
        for groups in (ours, theirs):
            for i, group in enumerate(groups):
                given = gradients(step, i, [t.shape for t in group.tensors])
                if step == 0:
                    given[0] = None if i == 0 else given[0]  # a tensor that wakes later
                factor = 10.0 if step % 2 else 1e-3  # clipped, not clipped
                backward(group, [None if g is None else g * factor for g in given])
        norm = torch.nn.utils.clip_grad_norm_(every, 1.0).item()
        assert optimizer.clip_norm(1.0) == norm
        assert (norm > 1) == bool(step % 2)
        lr = 0.01 * (step + 1)
        for parameters in reference.param_groups:
            parameters["lr"] = lr
        optimizer.step(lr)
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad(set_to_none=True)
        for a, b in zip((t for group in ours for t in group.tensors), every, strict=True):
            assert torch.equal(a, b)


@MODES
def test_split_weights_take_the_steps_of_fp32_weights_bit_for_bit(mode):
    """Given gradients that bf16 holds exactly; so every bit of the weight counts, none is lost to its rounding."""
    plain, split = a_group(), a_group(split=True)
    optimizers = [an_optimizer(group, mode=mode) for group in (plain, split)]
    for step in range(5):
        for group, optimizer in zip((plain, split), optimizers, strict=True):
            backward(group, gradients(step, rounded=True))
            optimizer.clip_norm(1.0)
            optimizer.step(1e-3)
            optimizer.zero_grad()
        for a, b in zip(values(plain), values(split), strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(t, v.bfloat16()) for t, v in zip(split.tensors, values(split), strict=True))


def test_steps_below_the_rounding_of_bf16_add_up():
    group = a_group(split=True, shapes=((4,),), decayed=())
    with torch.no_grad():
        group.tensors[0].fill_(1.0)
        group.lows[0].zero_()
    optimizer = an_optimizer(group, mode="split")
    for _ in range(100):
        backward(group, [torch.ones(4)])
        optimizer.step(1e-4)
        optimizer.zero_grad()
    assert values(group)[0].tolist() == pytest.approx([0.99] * 4, abs=1e-5)


def test_micro_batches_add_up_in_fp32_and_no_bf16_gradient_stays():
    group = a_group(split=True, shapes=((3,),), decayed=(0,))
    optimizer = an_optimizer(group, mode="split")
    for part in (1.0, 2.0**-10, 2.0**-10):  # bf16 would round both small ones away
        backward(group, [torch.full((3,), part)])
        assert group.tensors[0].grad is None
    assert optimizer.energies([group]) == [(1 + 2.0**-9) ** 2]
    optimizer.zero_grad()
    backward(group, [torch.full((3,), 0.5)])  # the first of the next window replaces what was there
    assert optimizer.energies([group]) == [0.25]


@pytest.mark.parametrize("split", [False, True])
def test_energies_are_those_of_the_decayed_tensors_of_the_groups_that_have_some(split):
    first, second = a_group(split=split), a_group(split=split, seed=50, decayed=())
    optimizer = an_optimizer(first, second, mode="split")
    given = gradients(1, rounded=True)
    backward(first, given)
    backward(second, given)
    expected = sum(given[i].double().square().sum().item() for i in (1, 3)) / sum(given[i].numel() for i in (1, 3))
    assert optimizer.energies([first, second]) == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("split", [False, True])
def test_a_norm_that_is_not_finite_is_returned(bad, split):
    group = a_group(split=split)
    optimizer = an_optimizer(group, mode="split")
    given = gradients(0)
    given[2][5, 5] = bad
    backward(group, given)
    norm = optimizer.clip_norm(1.0)
    assert not math.isfinite(norm)
    before = values(group)
    optimizer.zero_grad()
    optimizer.step(0.1)  # nothing collected: nothing moves
    assert all(torch.equal(a, b) for a, b in zip(before, values(group), strict=True))
    backward(group, gradients(1))
    assert math.isfinite(optimizer.clip_norm(1.0))


@MODES
@pytest.mark.parametrize("split", [False, True])
def test_gradients_of_zero_move_only_what_decays(mode, split):
    group = a_group(split=split)
    before = values(group)
    optimizer = an_optimizer(group, mode=mode)
    backward(group, [torch.zeros(shape) for shape in SHAPES])
    assert optimizer.clip_norm(1.0) == 0.0
    optimizer.step(0.1)
    for i, (a, b) in enumerate(zip(before, values(group), strict=True)):
        assert torch.equal(b, a * (1 - 0.1 * 0.1) if i in (1, 3) else a)


def test_without_any_gradient_the_norm_is_zero_and_a_step_does_nothing():
    group = a_group()
    optimizer = an_optimizer(group)
    before = values(group)
    assert optimizer.clip_norm(1.0) == 0.0
    assert optimizer.energies([group]) == [0.0]
    optimizer.step(0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, values(group), strict=True))


@MODES
@pytest.mark.parametrize("split", [False, True])
def test_the_bytes_held_per_trained_number_are_those_of_the_memory_model(mode, split):
    n = 64 * 1024
    group = a_group(split=split, shapes=((64, 1024),), decayed=())
    optimizer = an_optimizer(group, mode=mode)
    backward(group, [torch.ones(64, 1024)])
    optimizer.step(0.1)
    slot = optimizer._slots[0]
    held = [group.tensors[0], slot.gradient, *group.lows]
    total = sum(t.nbytes for t in held) + slot._moments.num_bytes
    assert total / n == (10 + 8 / 256 if mode == "split_8bit" else 16)


def test_closing_drops_the_state_and_the_tensors_collect_like_any_others():
    group = a_group(split=True, shapes=((3,),), decayed=())
    optimizer = an_optimizer(group, mode="split")
    backward(group, [torch.ones(3)])
    optimizer.close()
    backward(group, [torch.ones(3)])
    assert group.tensors[0].grad.tolist() == [1.0] * 3
    assert optimizer._slots[0]._moments is None
    assert optimizer._slots[0]._buffer is None


def test_beginning_again_forgets_moments_and_gradients():
    group, fresh = a_group(), a_group()
    used = an_optimizer(group)
    backward(group, gradients(0))
    used.step(0.1)
    used.begin()
    with torch.no_grad():
        for a, b in zip(group.tensors, fresh.tensors, strict=True):
            assert a.grad is None
            a.copy_(b)
    for g, optimizer in ((group, used), (fresh, an_optimizer(fresh))):
        backward(g, gradients(1))
        optimizer.step(0.1)
    assert all(torch.equal(a, b) for a, b in zip(group.tensors, fresh.tensors, strict=True))


def test_bf16_without_a_remainder_is_refused():
    tensor = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    group = ParamGroup(name="block 2", tensors=(tensor,), named={"x": tensor})
    with pytest.raises(ValueError, match=r"a tensor of block 2 is torch\.bfloat16 \(3,\) without a remainder"):
        AdamW([group])
    lone = torch.zeros(3, requires_grad=True)
    low = torch.zeros(3, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"torch\.float32 \(3,\) with a remainder"):
        AdamW([ParamGroup(name="block 2", tensors=(lone,), lows=(low,), named={"x": lone})])


def test_the_norm_that_a_gpu_takes_is_that_of_torch_and_is_not_finite_where_a_value_is_not():
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(shape, generator=generator) for shape in ((5, 7), (300,), (1,))]
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
    torch.testing.assert_close(norm_by_kernel(gradients), expected)
    assert norm_by_kernel([torch.zeros(4)]) == 0
    for bad in (math.nan, math.inf):
        gradients[1][17] = bad
        assert not math.isfinite(norm_by_kernel(gradients).item())
