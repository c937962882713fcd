"""Tests of kernels/reference/pointwise.py."""

import pytest
import torch

from fedblocks.kernels import ops

torch.set_num_threads(1)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_every_backward_pass_agrees_with_finite_differences():
    x, weight = random(2, 3, 8).requires_grad_(), random(8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: ops.rms_norm(a, w, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda a: ops.rope(a, random(3, 8, seed=2), random(3, 8, seed=3)), (x,))
    assert torch.autograd.gradcheck(ops.swiglu, (x,))


def test_a_frozen_norm_weight_gets_no_gradient_and_a_frozen_input_neither():
    x, weight = random(2, 8), random(8, seed=1)
    for a, w in ((x.clone().requires_grad_(), weight), (x, weight.clone().requires_grad_())):
        ops.rms_norm(a, w, 1e-5).sum().backward()
        assert (a.grad is None) != a.requires_grad
        assert (w.grad is None) != w.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rotation_have_the_bits_of_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    x, weight = random(2, 5, 16, dtype=torch.float32).to(dtype), random(16, seed=1, dtype=torch.float32).to(dtype)
    norm = LlamaRMSNorm(16, eps=1e-5)
    norm.weight = torch.nn.Parameter(weight)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), norm(x))
    q = random(2, 3, 5, 16, dtype=torch.float32).to(dtype)
    cos, sin = (
        random(5, 16, seed=4, dtype=torch.float32).to(dtype),
        random(5, 16, seed=5, dtype=torch.float32).to(dtype),
    )
    assert torch.equal(ops.rope(q, cos, sin), apply_rotary_pos_emb(q, q, cos[None], sin[None])[0])


def test_rotating_back_restores_the_input():
    angle = random(5, 4)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    x = random(2, 5, 8, seed=1)
    assert torch.allclose(ops.rope(ops.rope(x, cos, sin), cos, -sin), x)
