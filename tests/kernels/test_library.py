"""Tests of kernels/library.py: the registered operations, their schemas, fakes and backward passes."""

import pytest
import torch

from fedblocks.kernels import ops
from fedblocks.kernels.reference.adamw import Moments, Moments8Bit
from fedblocks.kernels.reference.head import top_k_

torch.set_num_threads(1)
REGISTERED = torch.ops.fedblocks


def random(*shape, seed=0, dtype=torch.float32, grad=False):
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return tensor.requires_grad_(grad)


def a_record(rows, vocab, k):
    ids, logp = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k)
    log_tail = torch.empty(rows)
    top_k_(random(rows, vocab, seed=9), ids, logp, log_tail)
    return ids, logp, log_tail


def nf4_parts(rows=6, cols=64):
    weight = ops.quantize_nf4(random(rows, cols))
    return (*weight.buffers, weight.offset)


def samples():
    """Every registered operation with arguments."""
    x, norm = random(3, 8, grad=True), random(8, seed=1, grad=True)
    tables = random(2, 8, seed=2), random(2, 8, seed=3)
    target = torch.tensor([0, 5, 16])
    state = (torch.zeros(5), torch.zeros(5))
    eight = Moments8Bit.zeros(5, torch.device("cpu"))
    number = (1, 1e-2, [0.9, 0.99], 1e-8, 0.01)
    return {
        "rms_norm": (x, norm, 1e-5),
        "add_rms_norm": (x, random(3, 8, seed=4, grad=True), norm, 1e-5),
        "rms_norm_backward": (random(3, 8), random(3, 8), random(3, 8), random(8), random(3).abs()),
        "rope": (random(4, 2, 8, grad=True), *tables, False),
        "rope_": (random(4, 2, 8), *tables, True),
        "swiglu": (random(3, 8, grad=True),),
        "swiglu_backward": (random(3, 4), random(3, 8)),
        "swiglu_backward_": (random(3, 4), random(3, 8)),
        "cross_entropy_": (random(3, 17), target, True),
        "kl_topk_": (random(3, 17), *a_record(3, 17, 4), True),
        "linear_cross_entropy": (random(3, 8, grad=True), random(17, 8), target, 0.5),
        "linear_kl_topk": (random(3, 8, grad=True), random(17, 8), *a_record(3, 17, 4), 0.5),
        "nf4_dequant": (*nf4_parts(), [6, 64], torch.bfloat16),
        "nf4_dequant_into": (*nf4_parts(), torch.empty(6, 64)),
        "nf4_linear": (random(3, 64, grad=True), *nf4_parts(), 6),
        "nf4_linear_dgrad": (random(3, 6), *nf4_parts(), 64),
        "adamw_": (random(5), None, random(5), *state, None, None, *number),
        "square_norm": (random(5),),
        "delta_rows": (random(3, 7), random(3, 7, seed=1), random(3, 7, seed=2), 0.1),
        "delta_codes": (random(3, 7), torch.tensor([0, 2]), torch.tensor([0.1, 0.2])),
    } | {"adamw_ 8 bit": (random(5), None, random(5), eight.m, eight.v, eight.m_scale, eight.v_scale, *number)}


@pytest.mark.parametrize("name", samples())
def test_every_registered_operation_passes_opcheck(name):
    torch.library.opcheck(getattr(REGISTERED, name.split()[0]).default, samples()[name])


def test_no_operation_is_registered_without_a_case_here():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fedblocks::")
    }
    assert registered == {name.split()[0] for name in samples()}


def test_gradients_of_the_registered_operations_agree_with_finite_differences():
    wide = torch.float64
    x, norm = random(2, 6, dtype=wide, grad=True), random(6, seed=1, dtype=wide, grad=True)
    other = random(2, 6, seed=2, dtype=wide, grad=True)
    tables = random(2, 6, seed=3, dtype=wide), random(2, 6, seed=4, dtype=wide)
    weight = random(7, 6, seed=5, dtype=wide)
    record = a_record(2, 7, 3)
    check = torch.autograd.gradcheck
    assert check(lambda a, w: REGISTERED.rms_norm(a, w, 1e-5)[0], (x, norm))
    assert check(lambda a, b, w: REGISTERED.add_rms_norm(a, b, w, 1e-5)[:2], (x, other, norm))
    assert check(REGISTERED.swiglu, (x,))
    heads = random(2, 3, 6, dtype=wide, grad=True)
    for inverse in (False, True):
        assert check(lambda a, i=inverse: REGISTERED.rope(a, *tables, i), (heads,))
    assert check(lambda a: REGISTERED.linear_cross_entropy(a, weight, torch.tensor([1, 6]), 0.3)[0], (x,))
    assert check(lambda a: REGISTERED.linear_kl_topk(a, weight, *record, 0.3)[0], (x,))


def test_they_compute_what_the_functions_of_ops_compute():
    x, norm = random(3, 8), random(8, seed=1)
    assert torch.equal(REGISTERED.rms_norm(x, norm, 1e-5)[0], ops.rms_norm(x, norm, 1e-5))
    assert torch.equal(REGISTERED.swiglu(x), ops.swiglu(x))
    tables = random(3, 8, seed=2), random(3, 8, seed=3)
    assert torch.equal(REGISTERED.rope(x.view(3, 1, 8), *tables, False).view(3, 8), ops.rope(x, *tables))
    h, weight, target = random(3, 8, grad=True), random(17, 8, seed=1), torch.tensor([0, 5, 16])
    loss = REGISTERED.linear_cross_entropy(h, weight, target, 0.5)[0]
    assert torch.equal(loss, ops.linear_cross_entropy(h, weight, target, 0.5))
    record = a_record(3, 17, 4)
    kl = REGISTERED.linear_kl_topk(h, weight, *record, 0.5)[0]
    assert torch.equal(kl, ops.linear_kl_topk(h, weight, *record, 0.5))
    one, two = random(5), random(5)
    hyper = {"step": 1, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    ops.adamw_step_(one, None, random(5, seed=1), Moments.zeros(5, torch.device("cpu")), **hyper)
    zeros = torch.zeros(5), torch.zeros(5)
    REGISTERED.adamw_(two, None, random(5, seed=1), *zeros, None, None, 1, 1e-2, [0.9, 0.99], 1e-8, 0.01)
    assert torch.equal(one, two)


def test_a_call_with_wrong_shapes_says_what_it_got_under_fake_tensors_too():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"rms_norm: weight has shape \(7,\), expected \(8,\)"):
        REGISTERED.rms_norm(torch.empty(3, 8), torch.empty(7), 1e-5)
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"swiglu: gate_up has shape \(3, 7\)"):
        REGISTERED.swiglu(torch.empty(3, 7))
