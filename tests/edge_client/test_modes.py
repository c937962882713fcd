"""Do all exact ways of execution train the same blocks? One assignment, carried out in each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedblocks.edge_client.prefix_cache import PrefixStates
from fedblocks.edge_client.train import Hyper, data_order, run_steps, stack_losses, task_batch
from fedblocks.kernels.ops import merge_split

STEPS = 12


def trained(
    make_model,
    samples,
    *,
    dtype=torch.float32,
    optimizer="fp32",
    residency="suffix",
    frozen="decoded",
    checkpoint=False,
    placement="thirds",
    steps=STEPS,
    **config,
):
    """(loss of each step, final fp32 values, the groups) of training block 0 and 1 in one mode."""
    model = make_model(blocks=2, layers=6, placement=placement, dtype=dtype, **config)
    model.hold(residency=residency, frozen=frozen)
    model.recompute = checkpoint
    prefix = PrefixStates(model, None)
    groups = model.train_blocks((0, 1), optimizer)
    order = data_order(len(samples), 4, seed=5)
    windows = (next(order) for _ in range(steps))
    result = run_steps(
        groups=groups,
        losses=stack_losses(model, model.base_cut),
        task=([task_batch([samples[i] for i in w], prefix.padded([samples[i].ids for i in w]))] for w in windows),
        anchor=(),
        hyper=Hyper(steps=steps, learning_rate=3e-3, warmup_steps=2),
        optimizer_mode=optimizer,
        now=lambda: 0.0,
        status=lambda _phase, _steps: None,
    )
    return result.task_loss, {f"{g.name} {n}": v for g in groups for n, v in g.values().items()}, groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "mode",
    [{"residency": "resident"}, {"frozen": "nf4"}, {"checkpoint": True}, {"frozen": "nf4", "checkpoint": True}],
    ids=["resident", "nf4", "recomputed", "nf4 and recomputed"],
)
def test_what_is_held_in_memory_changes_no_bit(make_model, make_samples, mode, dtype):
    samples = make_samples(count=10)
    losses, values, _ = trained(make_model, samples, dtype=dtype)
    other_losses, other_values, _ = trained(make_model, samples, dtype=dtype, **mode)
    assert losses == other_losses
    assert losses[-1] < losses[0]
    for name, value in values.items():
        assert value.tobytes() == other_values[name].tobytes(), name


def test_untied_and_tied_models_read_the_same_rows_of_their_table(make_model, make_samples):
    samples = make_samples(count=6)
    for tied in (True, False):
        found = [trained(make_model, samples, residency=r, tied=tied, steps=2)[0] for r in ("resident", "suffix")]
        assert found[0] == found[1]


def test_a_split_value_trains_like_an_fp32_one(make_model, make_samples):
    """In bf16 arithmetic: the same number of bits in the trained value, whatever it is stored as."""
    samples = make_samples(count=10)
    losses, values, _ = trained(make_model, samples, dtype=torch.bfloat16)
    split_losses, split_values, groups = trained(make_model, samples, dtype=torch.bfloat16, optimizer="split")
    assert all(t.dtype == torch.bfloat16 for g in groups for t in g.tensors)
    assert all(t.dtype == torch.int16 for g in groups for t in g.lows)
    np.testing.assert_allclose(split_losses, losses, rtol=2e-2)
    moved = {name: np.linalg.norm(value - split_values[name]) for name, value in values.items()}
    for name, difference in moved.items():
        assert difference <= 0.05 * np.linalg.norm(values[name]) + 1e-3, name
    remainders = [t for g in groups for t in g.lows]
    assert any(t.any() for t in remainders)  # a value between two bf16 numbers is kept


def test_small_steps_are_not_lost_in_the_rounding_of_bf16(make_model, make_samples):
    """With steps far below half a unit of bf16 the value still moves, by as much as an fp32 one."""
    samples = make_samples(count=10)
    model = make_model(blocks=2, layers=6, dtype=torch.bfloat16)
    groups = model.train_blocks((0, 1), "split")
    group = groups[0]
    name = "mlp.gate_proj.weight"
    before = group.value(name).clone()
    hi, lo = group.named[name], group.named_lows[name]
    assert torch.equal(merge_split(hi.detach(), lo), before)
    prefix = PrefixStates(model, None)
    order = data_order(len(samples), 4, seed=5)
    run_steps(
        groups=groups,
        losses=stack_losses(model, model.base_cut),
        task=(
            [task_batch([samples[i] for i in w], prefix.padded([samples[i].ids for i in w]))]
            for w in (next(order) for _ in range(8))
        ),
        anchor=(),
        hyper=Hyper(steps=8, learning_rate=1e-6),
        optimizer_mode="split",
        now=lambda: 0.0,
        status=lambda _phase, _steps: None,
    )
    after = group.value(name)
    changed = (after != before).float().mean().item()
    assert changed > 0.8
    assert (after - before).abs().max() <= 1e-5


def test_8_bit_moments_reach_the_same_loss(make_model, make_samples):
    samples = make_samples(count=10)
    for dtype in (torch.float32, torch.bfloat16):
        losses, _, _ = trained(make_model, samples, dtype=dtype, steps=40)
        small, _, _ = trained(make_model, samples, dtype=dtype, optimizer="split_8bit", steps=40)
        assert losses[-1] < 0.9 * losses[0]
        assert np.mean(small[-5:]) == pytest.approx(np.mean(losses[-5:]), rel=0.1)


def test_the_delta_of_a_split_block_is_its_exact_change(make_model, make_samples):
    model = make_model(blocks=2, layers=6, dtype=torch.bfloat16)
    groups = model.train_blocks((0, 1), "split")
    assert not any(value.any() for value in model.deltas(groups)[0].values())
    name = "mlp.up_proj.weight"
    groups[0].named_lows[name].add_(1)  # one unit of the remainder is the smallest change there is
    delta = model.deltas(groups)[0][name]
    assert (delta != 0).all()
    assert np.abs(delta).max() < 1e-6
