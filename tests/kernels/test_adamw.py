"""Tests of kernels/reference/adamw.py: one step in place, exact weights, moments in fp32 or 8 bits."""

import pytest
import torch

from fedblocks.kernels import ops
from fedblocks.kernels.reference import adamw
from fedblocks.kernels.reference.adamw import BLOCK, Moments, Moments8Bit, adamw_

torch.set_num_threads(1)

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
CPU = torch.device("cpu")


def normal(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def gradients(n, steps, spread=1.0):
    scale = torch.exp(normal(n, seed=99) * spread)
    return [normal(n, seed=100 + step) * scale for step in range(steps)]


def stepped(n, grads, kind, *, split=False, weight=None):
    """The weights and the moments after all of ``grads``."""
    weight = normal(n) if weight is None else weight.clone()
    low = None
    if split:
        weight, low = ops.split_fp32(weight)
    moments = kind.zeros(n, CPU)
    for step, gradient in enumerate(grads, 1):
        adamw_(weight, low, gradient, moments, step=step, **HYPER)
    return (ops.merge_split(weight, low) if split else weight), moments


@pytest.mark.parametrize("n", [1, 511, 512, 513, 1500])
@pytest.mark.parametrize("split", [False, True])
def test_exact_modes_have_the_bits_of_torchs_fused_adamw(n, split, monkeypatch):
    monkeypatch.setattr(adamw, "CHUNK", 512)
    theirs = normal(n).requires_grad_()
    optimizer = torch.optim.AdamW([theirs], **HYPER, fused=True)
    for gradient in gradients(n, 6):
        theirs.grad = gradient.clone()
        optimizer.step()
    ours, _ = stepped(n, gradients(n, 6), Moments, split=split)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 511, 512, 513, 1500])
def test_eight_bit_steps_are_the_same_on_fp32_and_split_weights_and_in_chunks(n, monkeypatch):
    whole, _ = stepped(n, gradients(n, 1), Moments8Bit)
    monkeypatch.setattr(adamw, "CHUNK", 512)
    first, _ = stepped(n, gradients(n, 1), Moments8Bit)
    assert torch.equal(first, whole)  # moments of zero: no rounding yet, so the chunks cannot be seen
    plain, plain_moments = stepped(n, gradients(n, 6), Moments8Bit)
    split, split_moments = stepped(n, gradients(n, 6), Moments8Bit, split=True)
    assert torch.equal(plain, split)
    assert torch.equal(plain_moments.m, split_moments.m)
    assert torch.equal(plain_moments.v, split_moments.v)
    assert torch.equal(plain, stepped(n, gradients(n, 6), Moments8Bit)[0])  # equal calls, equal bits


def test_the_first_eight_bit_step_is_the_exact_one():
    exact, _ = stepped(1000, gradients(1000, 1), Moments)
    assert torch.equal(stepped(1000, gradients(1000, 1), Moments8Bit)[0], exact)


def test_bytes_of_the_moments():
    for n, blocks in ((255, 1), (256, 1), (257, 2), (2560, 10)):
        assert Moments8Bit.zeros(n, CPU).num_bytes == 2 * n + 8 * blocks
        assert Moments.zeros(n, CPU).num_bytes == 8 * n


def test_fresh_moments_are_zero_and_a_zero_gradient_moves_nothing():
    for kind in (Moments, Moments8Bit):
        moments = kind.zeros(700, CPU)
        decoded = moments.decoded() if kind is Moments8Bit else moments
        assert not decoded.m.any()
        assert not decoded.v.any()
        weight = normal(700)
        before = weight.clone()
        for step in (1, 2):
            adamw_(weight, None, torch.zeros(700), moments, step=step, **{**HYPER, "weight_decay": 0.0})
        assert torch.equal(weight, before)
    assert not moments.decoded().m.any()
    assert not moments.decoded().v.any()


def test_elements_without_gradient_beside_others_do_not_move_and_wake_later():
    """The rule behind a fresh expanded block: q, k and v get a gradient of exactly zero on the first step."""
    live = torch.arange(600) % 2 == 0
    grads = [torch.where(live, g, 0.0) for g in gradients(600, 5)]
    start = normal(600)
    weight, moments = start.clone(), Moments8Bit.zeros(600, CPU)
    for step, gradient in enumerate(grads, 1):
        adamw_(weight, None, gradient, moments, step=step, **{**HYPER, "weight_decay": 0.0})
    assert torch.equal(weight[~live], start[~live])
    assert (weight[live] != start[live]).all()
    adamw_(weight, None, gradients(600, 6)[5], moments, step=6, **{**HYPER, "weight_decay": 0.0})
    assert ((weight - start)[~live].abs() > 0).all()


def test_codes_stand_for_what_they_were_made_of():
    """One step from zero: m = 0.1·g and v = 0.01·g², each read back within a code's width."""
    gradient = gradients(4096, 1, spread=3.0)[0]
    moments = Moments8Bit.zeros(4096, CPU)
    adamw_(torch.zeros(4096), None, gradient, moments, step=1, **HYPER)
    decoded = moments.decoded()
    m, v = 0.1 * gradient, 0.01 * gradient.square()
    m_top = m.view(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK)
    v_top = v.view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
    assert ((decoded.m - m).abs() <= m.abs() / 8 + m_top * 2**-17).all()
    assert ((decoded.v - v).abs() <= v / 8 + v_top * 2**-31).all()
    assert (decoded.v > 0).all()
    assert (decoded.m * m >= 0).all()


@pytest.mark.parametrize("largest", [1e-44, 1e-38, 1e-36])
def test_moments_at_the_lower_edge_of_fp32_keep_sign_and_size(largest):
    gradient = normal(BLOCK).clamp_(-1, 1) * largest
    weight, moments = torch.zeros(BLOCK), Moments8Bit.zeros(BLOCK, CPU)
    adamw_(weight, None, gradient, moments, step=1, **HYPER)
    m = 0.1 * gradient
    assert ((moments.decoded().m - m).abs() <= m.abs() / 8 + 1e-42).all()
    assert weight.isfinite().all()


@pytest.mark.parametrize("largest", [1e-30, 1e-12, 1.0, 1e12])
def test_a_small_second_moment_next_to_a_large_one_never_becomes_zero(largest):
    gradient = torch.full((BLOCK,), largest * 1e-9)
    gradient[0] = largest
    weight, moments = torch.zeros(BLOCK), Moments8Bit.zeros(BLOCK, CPU)
    for step in range(1, 20):
        before = weight.clone()
        adamw_(weight, None, gradient, moments, step=step, **HYPER)
        assert (weight - before).abs().max() <= HYPER["lr"] * 1.5
    v = moments.decoded().v
    assert v.isfinite().all()
    assert (v[1:] >= v[0] * 1e-10).all() or largest < 1e-18  # below that, fp32 itself has no v
    assert (v[1:] <= v[0] * 1e-9).all()


def test_rounding_is_unbiased_where_an_elements_share_of_its_block_changes():
    """Half of the elements fall to a tenth: with rounding to the nearest their v would stay where it was."""
    n, half = 4 * BLOCK, torch.arange(4 * BLOCK) % 2 == 0
    exact, eight = Moments.zeros(n, CPU), Moments8Bit.zeros(n, CPU)
    for step in range(1, 301):
        gradient = normal(n, seed=step) * torch.where(half, max(0.1, 1 - step / 150), 1.0)
        for moments in (exact, eight):
            adamw_(torch.zeros(n), None, gradient, moments, step=step, **HYPER)
    ratio = (eight.decoded().v / exact.v).sqrt()
    for part in (half, ~half):
        assert ratio[part].mean().item() == pytest.approx(1, abs=0.04)
        assert ratio[part].std() < 0.15


def test_the_dither_is_even_and_spreads_over_few_steps():
    one = adamw.dither(1 << 16, 3, CPU).double() / (1 << 20)
    assert one.min() >= 0
    assert one.max() < 1
    assert one.mean().item() == pytest.approx(0.5, abs=0.01)
    over_steps = torch.stack([adamw.dither(256, step, CPU) for step in range(8)]).double() / (1 << 20)
    assert (over_steps.mean(0) - 0.5).abs().max() < 0.15  # eight independent numbers would scatter to 0.3
    assert torch.equal(adamw.dither(100, 7, CPU), adamw.dither(300, 7, CPU)[:100])


def classified(kind, *, split=False, steps=200):
    """Held-out loss before and after training two layers on mini-batches of a noisy classification."""
    g = torch.Generator().manual_seed(5)
    teacher = torch.randn(24, 8, generator=g) * torch.exp(torch.randn(24, 1, generator=g)) * 0.5
    shapes = ((24, 48), (48,), (48, 8), (8,))
    starts = [torch.randn(s, generator=g) * (s[0] ** -0.5 if len(s) == 2 else 0) for s in shapes]
    x_out = torch.randn(1024, 24, generator=g)
    stored = [ops.split_fp32(w) if split else (w, None) for w in starts]
    moments = [kind.zeros(w.numel(), CPU) for w in starts]

    def leaves():
        return [(ops.merge_split(*s) if split else s[0]).clone().requires_grad_() for s in stored]

    def logits(x, a, b, c, d):
        return torch.tanh(x @ a + b) @ c + d

    def held_out():
        p = torch.softmax(x_out @ teacher, 1)
        return -(p * torch.log_softmax(logits(x_out, *leaves()), 1)).sum(1).mean().item()

    before = held_out()
    for step in range(1, steps + 1):
        x = torch.randn(64, 24, generator=g)
        y = torch.multinomial(torch.softmax(x @ teacher, 1), 1, generator=g)[:, 0]
        current = leaves()
        grads = torch.autograd.grad(torch.nn.functional.cross_entropy(logits(x, *current), y), current)
        for (w, low), gradient, m in zip(stored, grads, moments, strict=True):
            flat = None if low is None else low.view(-1)
            hyper = {**HYPER, "weight_decay": 0.0}
            adamw_(w.view(-1), flat, gradient.reshape(-1), m, step=step, **hyper)
    return before, held_out()


def test_training_with_eight_bit_moments_reaches_the_loss_of_fp32_moments():
    before, exact = classified(Moments)
    assert exact < 0.7 * before
    assert classified(Moments, split=True) == (before, exact)
    assert classified(Moments8Bit, split=True)[1] == pytest.approx(exact, rel=0.02)
