"""A pair of which only some rows train: its function, its gradients, what stays as it is (H5), what it takes (H7)."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fedblocks.edge_client.masked_low_rank import FrozenPrior, MaskedLowRank, first_factor
from fedblocks.protocol.row_mask import choose_rows, num_rows

OUT, IN, RANK = 12, 8, 4


def prior(seed=1, rank=3):
    rng = np.random.default_rng(seed)
    draw = [rng.standard_normal(shape).astype(np.float32) for shape in ((OUT, rank), (rank, IN))]
    return FrozenPrior(left=draw[0], right=draw[1])


def module(**changes):
    base = torch.nn.Linear(IN, OUT)
    return MaskedLowRank(base, num_out=OUT, a=first_factor(RANK, IN, 5), **{"scale": 0.5, **changes})


def half(seed=0):
    return choose_rows(np.random.default_rng(seed).random(OUT), 0.5, client="a", round=1, matrix="q")


def trained(found, steps=5):
    optimizer = torch.optim.AdamW(found.trained.values(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.from_numpy(np.random.default_rng(step).standard_normal((3, 6, IN)).astype(np.float32))
        found(x).square().mean().backward()
        optimizer.step()
    return found


@pytest.mark.parametrize("mask", [half(), np.ones(OUT, dtype=np.bool_)], ids=["half", "all"])
@pytest.mark.parametrize("over", [None, prior()], ids=["base", "prior"])
def test_the_output_is_base_plus_prior_plus_the_scaled_product(mask, over):
    found = module(prior=over)
    found.train_rows(mask)
    found = trained(found)
    x = torch.randn(2, 3, IN)
    weight = found.base.weight.detach().numpy() + 0.5 * found.whole_b() @ found.a.detach().numpy()
    if over is not None:
        weight = weight + over.left @ over.right
    expected = x.numpy() @ weight.T + found.base.bias.detach().numpy()
    np.testing.assert_allclose(found(x).detach().numpy(), expected, atol=1e-4)


def test_at_the_start_of_a_round_the_output_is_the_priors_bit_for_bit():
    found, x = module(prior=prior()), torch.randn(4, IN)
    before = found(x)
    found.train_rows(half())
    assert torch.equal(found(x), before)


def test_h5_rows_outside_the_mask_and_all_that_is_frozen_keep_their_bits():
    found = module(prior=prior())
    frozen = {name: value.clone() for name, value in found.state_dict().items() if name != "a"}
    mask = half()
    found.train_rows(mask)
    trained(found)
    whole = found.whole_b()
    assert not whole[~mask].any()
    assert (np.abs(whole[mask]).sum(axis=1) > 0).all()
    after = found.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert {name: tuple(tensor.shape) for name, tensor in found.trained.items()} == {"a": (RANK, IN), "b": (6, RANK)}


def test_rows_trained_alone_move_as_they_would_beside_all_others():
    """The mask takes rows away; it changes nothing for those that stay, while A is held."""
    mask = half()
    whole, some = module(), module()
    some.base.load_state_dict(whole.base.state_dict())
    x = torch.randn(7, IN)
    for found, rows in ((whole, np.ones(OUT, dtype=np.bool_)), (some, mask)):
        found.train_rows(rows)
        found(x).square().sum().backward()
    np.testing.assert_allclose(whole.b.grad.numpy()[mask], some.b.grad.numpy(), rtol=1e-5)


def test_the_energy_before_training_is_the_gradients_of_b_by_row():
    found = module(prior=prior())
    x, target = torch.randn(9, IN), torch.randn(9, OUT)
    found.begin_scoring()
    (found(x) * target).sum().backward()
    gradient = 0.5 * target.T @ (x @ found.a.T)
    np.testing.assert_allclose(found.take_energy(), gradient.square().sum(dim=1).detach().numpy(), rtol=1e-4)
    assert found.a.grad is None
    with pytest.raises(RuntimeError, match="no gradient of B"):
        found.take_energy()
    found.train_rows(half())
    assert found.b.shape == (6, RANK)


def test_the_first_factor_is_the_same_for_a_seed_and_of_variance_one_over_the_rank():
    assert torch.equal(first_factor(16, 512, 3), first_factor(16, 512, 3))
    assert not torch.equal(first_factor(16, 512, 3), first_factor(16, 512, 4))
    assert first_factor(16, 512, 3).var().item() == pytest.approx(1 / 16, rel=0.05)


def test_a_prior_of_another_matrix_is_refused():
    wrong = FrozenPrior(left=np.ones((OUT + 1, 2), np.float32), right=np.ones((2, IN), np.float32))
    with pytest.raises(ValueError, match=r"shape \(13, 8\) over a layer of shape \(12, 8\)"):
        module(prior=wrong)


PEAK = """
import sys
import numpy as np, torch
from fedblocks.edge_client.masked_low_rank import MaskedLowRank, first_factor
from fedblocks.edge_client.memory import PeakMemory, return_large_blocks
from fedblocks.protocol.row_mask import num_rows
return_large_blocks()
share, out, inner, rank, layers = float(sys.argv[1]), 8192, 256, 64, 8
base = torch.nn.Linear(inner, out)
x = torch.randn(1, inner)
def step(modules):
    optimizer = torch.optim.AdamW([t for m in modules for t in m.trained.values()])
    sum(m(x).square().sum() for m in modules).backward()
    optimizer.step()
    return optimizer
def pairs(count, share):
    made = [MaskedLowRank(base, num_out=out, a=first_factor(rank, inner, i)) for i in range(count)]
    for m in made:
        mask = np.zeros(out, dtype=np.bool_)
        mask[:num_rows(out, share)] = True
        m.train_rows(mask)
    return made
step(pairs(1, 0.1))  # what the libraries take once
with PeakMemory() as memory:
    kept = pairs(layers, share)
    optimizer = step(kept)
print(memory.peak_bytes)
"""


@pytest.mark.slow
def test_h7_the_peak_of_a_step_falls_with_the_share_of_rows():
    """16 bytes a trained value, and little else."""
    found = {}
    for share in (0.25, 0.5, 1.0):
        run = subprocess.run([sys.executable, "-c", PEAK, str(share)], capture_output=True, text=True, check=True)
        found[share] = int(run.stdout)
        expected = 8 * 16 * 64 * (num_rows(8192, share) + 256)
        assert 0.9 * expected < found[share] < 1.25 * expected + (8 << 20), (share, found[share], expected)
    assert found[0.25] < 0.6 * found[0.5]
    assert found[0.5] < 0.6 * found[1.0]
