"""Tests of kernels/sources: every kernel against its reference in float64, interpreted or on a GPU.

The rung is chosen by ``FEDBLOCKS_TEST_RUNG``: ``interpreter`` (the CPU), ``triton`` or ``pack``.
"""

import os

import numpy as np
import pytest
import torch

from fedblocks.kernels import delta, head, nf4, optimizer, pointwise
from fedblocks.kernels.dispatch import DISPATCHER, BackendError
from fedblocks.kernels.fused import attention_in, mlp
from fedblocks.kernels.reference import adamw as adamw_reference
from fedblocks.kernels.reference import head as head_reference
from fedblocks.kernels.reference import nf4 as nf4_reference
from fedblocks.kernels.reference import pointwise as reference
from fedblocks.kernels.reference.adamw import Moments, Moments8Bit
from fedblocks.kernels.reference.split import merge_split, split_fp32

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROWS = (1, 5, 63)
HIDDEN = (60, 64, 100, 288, 896, 1030)
VOCAB = (17, 1000, 32003)
ANY = pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
DOTS = pytest.mark.parametrize(
    "dtype", ["fp32", "fp16"] if os.environ["FEDBLOCKS_TEST_RUNG"] == "interpreter" else ["fp16", "bf16"]
)


RUNG = os.environ["FEDBLOCKS_TEST_RUNG"]
INTERPRETED = RUNG == "interpreter"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _one_rung_only():
    """No call may fall to torch unseen."""
    with torch.device(DEVICE), DISPATCHER.demanding("pack" if RUNG == "pack" else "triton"):
        yield


def random(*shape, seed=0, dtype="fp32", spread=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu") * spread).to(DEVICE, DTYPES[dtype])


def wide(*tensors):
    return tuple(None if t is None else t.double() for t in tensors)


@ANY
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (7, 80), (40, 192), (3, 1000), (70, 300)])
def test_nf4_dequant(shape, dtype, guarded, compare):
    weight = nf4_reference.quantize_nf4(random(*shape))
    out = torch.empty(shape, dtype=DTYPES[dtype])
    nf4.nf4_dequant(*weight.buffers, weight.offset, out)
    exact = torch.zeros(shape)
    nf4_reference.nf4_dequant(*weight.buffers, weight.offset, exact)
    compare("nf4_dequant", dtype, out, exact)
    if dtype != "bf16" or not INTERPRETED:  # the interpreter cuts bf16 off
        assert torch.equal(out, exact.to(DTYPES[dtype]))


def test_a_group_of_zeros_decodes_to_zero(guarded):
    weight = nf4_reference.quantize_nf4(torch.cat((torch.zeros(1, 64), torch.ones(1, 64))))
    out = torch.empty(2, 64)
    nf4.nf4_dequant(*weight.buffers, weight.offset, out)
    assert out[0].tolist() == [0.0] * 64


@ANY
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cols", HIDDEN)
def test_norm_forward_and_backward(rows, cols, residual, dtype, guarded, compare):
    x, weight = random(rows, cols, dtype=dtype), random(cols, seed=1, dtype=dtype)
    other = random(rows, cols, seed=2, dtype=dtype) if residual else None
    y, s, rstd = pointwise.add_rms_norm(x, other, weight, 1e-5)
    exact_y, exact_s, exact_rstd = reference.add_rms_norm(*wide(x, other, weight), 1e-5)
    compare("add_rms_norm", dtype, y, exact_y)
    compare("add_rms_norm", dtype, s, exact_s)
    compare("add_rms_norm", dtype, rstd, exact_rstd)
    dy, ds = random(rows, cols, seed=3, dtype=dtype), random(rows, cols, seed=4, dtype=dtype) if residual else None
    for need_dw in (True, False):
        dx, dw = pointwise.rms_norm_backward(dy, ds, s, weight, rstd, need_dx=True, need_dw=need_dw)
        expected = reference.rms_norm_backward(*wide(dy, ds, s, weight, rstd), need_dx=True, need_dw=True)
        compare("rms_norm_backward", dtype, dx, expected[0])
        if need_dw:
            compare("rms_norm_backward", dtype, dw, expected[1])
        else:
            assert dw is None


def test_the_rows_that_a_program_of_the_backward_pass_shares_are_all_counted(guarded, compare, monkeypatch):
    monkeypatch.setattr("fedblocks.kernels.launches._NORM_PROGRAMS", 3)
    s, dy, weight, rstd = random(10, 64), random(10, 64, seed=1), random(64, seed=2), random(10, seed=3).abs()
    dx, dw = pointwise.rms_norm_backward(dy, None, s, weight, rstd, need_dx=True, need_dw=True)
    expected = reference.rms_norm_backward(*wide(dy, None, s, weight, rstd), need_dx=True, need_dw=True)
    compare("rms_norm_backward", "fp32", dx, expected[0])
    compare("rms_norm_backward", "fp32", dw, expected[1])


@ANY
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "head_dim", "positions"), [(1, 1, 2, 1), (5, 3, 20, 5), (14, 9, 64, 7)])
def test_rope_turns_the_first_heads_of_wider_rows(tokens, heads, head_dim, positions, inverse, dtype, guarded, compare):
    joined = random(tokens, heads + 2, head_dim, dtype=dtype)
    before = joined.clone()
    cos, sin = random(positions, head_dim, seed=1, dtype=dtype), random(positions, head_dim, seed=2, dtype=dtype)
    pointwise.rope_(joined[:, :heads], cos, sin, inverse=inverse)
    expected = before[:, :heads].double()
    reference.rope_(expected, *wide(cos, sin), inverse=inverse)
    compare("rope_", dtype, joined[:, :heads], expected)
    assert torch.equal(joined[:, heads:], before[:, heads:])


@ANY
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 60, 1030])
def test_swiglu_and_its_gradient_in_place(rows, width, dtype, guarded, compare):
    gate_up, dh = random(rows, 2 * width, dtype=dtype), random(rows, width, seed=1, dtype=dtype)
    h = pointwise.swiglu(gate_up)
    exact = reference.swiglu(gate_up.double())
    compare("swiglu", dtype, h, exact)
    expected = reference.swiglu_backward(dh.double(), gate_up.double())
    for need_h in (True, False):
        place = gate_up.clone()
        again = pointwise.swiglu_backward_(dh, place, need_h=need_h)
        compare("swiglu_backward_", dtype, place, expected)
        assert (again is None) == (not need_h)
        assert again is None or torch.equal(again, h)


@ANY
@pytest.mark.parametrize("vocab", VOCAB)
@pytest.mark.parametrize("rows", [1, 5])
def test_cross_entropy_and_its_gradient(rows, vocab, dtype, guarded, compare):
    logits = random(rows, vocab, dtype=dtype, spread=4)
    target = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    target[0] = vocab - 1
    exact = logits.double()
    expected = head_reference.cross_entropy_(exact, target, gradient=True)
    plain = head.cross_entropy_(logits.clone(), target, gradient=False)
    loss = head.cross_entropy_(logits, target, gradient=True)
    compare("cross_entropy_", "fp32", loss, expected)  # the loss is fp32 whatever the logits are
    assert torch.equal(loss, plain)
    compare("cross_entropy_", dtype, logits, exact)


def test_logits_far_from_zero_lose_nothing(guarded, compare):
    logits = random(2, 100) + 3e4
    logits[0, 7] += 200  # all other probabilities vanish
    target = torch.tensor([7, 3])
    exact = logits.double()
    expected = head_reference.cross_entropy_(exact, target, gradient=True)
    loss = head.cross_entropy_(logits, target, gradient=True)
    assert loss[0].item() == 0
    compare("cross_entropy_", "fp32", loss, expected)
    compare("cross_entropy_", "fp32", logits, exact)


@ANY
@pytest.mark.parametrize("vocab", VOCAB)
@pytest.mark.parametrize("k", [1, 8, 32])
def test_kl_and_its_gradient(k, vocab, dtype, guarded, compare):
    k = min(k, vocab)
    logits = random(4, vocab, dtype=dtype, spread=2)
    ids, logp = torch.zeros(4, k, dtype=torch.int64), torch.zeros(4, k)
    log_tail = torch.zeros(4)
    head_reference.top_k_(random(4, vocab, seed=1, spread=2), ids, logp, log_tail)
    exact = logits.double()
    expected = head_reference.kl_topk_(exact, ids, logp, log_tail, gradient=True)
    plain = head.kl_topk_(logits.clone(), ids, logp, log_tail, gradient=False)
    kl = head.kl_topk_(logits, ids, logp, log_tail, gradient=True)
    compare("kl_topk_", "fp32", kl, expected)
    assert torch.equal(kl, plain)
    compare("kl_topk_", dtype, logits, exact)


def test_kl_of_a_complete_record_of_a_dropped_tail_and_of_one_at_the_floor(guarded, compare):
    teacher = torch.tensor([[30.0, 29, 0, 0], [3.0, 2, 1, 0], [1.0, 2, 3, 4]])
    student = torch.tensor([[1.0, 2, 3, 4], [50.0, 49, 0, 0], [4.0, 3, 2, 1]])
    for k in (2, 4):
        ids, logp, log_tail = torch.zeros(3, k, dtype=torch.int64), torch.zeros(3, k), torch.zeros(3)
        head_reference.top_k_(teacher.clone(), ids, logp, log_tail)
        exact, logits = student.double(), student.clone()
        expected = head_reference.kl_topk_(exact, ids, logp, log_tail, gradient=True)
        compare("kl_topk_", "fp32", head.kl_topk_(logits, ids, logp, log_tail, gradient=True), expected)
        compare("kl_topk_", "fp32", logits, exact)


def test_no_rows_are_no_launch_and_no_error(guarded):
    empty = torch.zeros(0, 17)
    none = torch.zeros(0, dtype=torch.int64)
    assert head.cross_entropy_(empty, none, gradient=True).shape == (0,)
    assert head.kl_topk_(empty, none.view(0, 1), torch.zeros(0, 1), torch.zeros(0), gradient=True).shape == (0,)
    assert pointwise.swiglu(torch.zeros(0, 8)).shape == (0, 4)
    assert pointwise.add_rms_norm(torch.zeros(0, 8), None, torch.ones(8), 1e-5)[0].shape == (0, 8)
    pointwise.rope_(torch.zeros(0, 2, 8), torch.ones(1, 8), torch.ones(1, 8), inverse=False)
    assert nf4.nf4_linear(torch.zeros(0, 64), (nf4_reference.quantize_nf4(random(8, 64)),)).shape == (0, 8)


@DOTS
@pytest.mark.parametrize(("m", "rows", "k"), [(1, (1,), 64), (5, (60, 9), 128), (70, (96,), 192)])
def test_products_with_nf4_matrices(m, rows, k, dtype, guarded, compare):
    parts = tuple(nf4_reference.quantize_nf4(random(n, k, seed=n)) for n in rows)
    dense = torch.cat([nf4_reference.decoded((part,), torch.float32) for part in parts])
    exact = dense.to(DTYPES[dtype]).double()
    x, dy = random(m, k, seed=1, dtype=dtype), random(m, sum(rows), seed=2, dtype=dtype)
    compare("nf4_linear", dtype, nf4.nf4_linear(x, parts), x.double() @ exact.T)
    compare("nf4_linear_dgrad", dtype, nf4.nf4_linear_dgrad(dy, parts), dy.double() @ exact)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU gets it right")
def test_a_bf16_product_is_refused_in_the_interpreter_which_would_get_it_wrong():
    with pytest.raises(ValueError, match="multiplies bf16 matrices wrongly"):
        nf4.nf4_linear(random(2, 64, dtype="bf16"), (nf4_reference.quantize_nf4(random(8, 64)),))


def test_a_width_that_a_group_of_scales_would_cross_is_declined():
    with pytest.raises(BackendError, match="80 columns, expected a multiple of 64"):
        nf4.nf4_linear(random(2, 80), (nf4_reference.quantize_nf4(random(8, 80)),))


@pytest.mark.parametrize("n", [1, 255, 1024, 3000])
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_adamw(split, eight_bit, n, compare):
    kind = Moments8Bit if eight_bit else Moments
    hyper = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    results = []
    for step_ in (optimizer.adamw_step_, adamw_reference.adamw_):
        weight = random(n)
        low = None
        if split:
            high, low = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int16)
            split_fp32(weight, high, low)
            weight = high
        moments = kind.zeros(n, DEVICE)
        for step in range(1, 6):
            gradient = random(n, seed=step) * torch.where(torch.arange(n) % 7 == 0, 0.0, 1.0)  # some never move
            step_(weight, low, gradient, moments, step=step, **hyper)
        if split:
            whole = torch.zeros(n)
            merge_split(weight, low, whole)
            weight = whole
        m = moments.decoded() if eight_bit else moments
        results.append((weight, m.m, m.v))
    for got, expected in zip(*results, strict=True):
        if eight_bit:  # a bit of difference may turn a rounding: one code of a block's range
            assert (got - expected).abs().max() <= 0.13 * expected.abs().max()
            assert ((got - expected).abs() > 1e-6 * expected.abs().max()).float().mean() < 0.01
        else:
            compare("adamw_", "fp32", got, expected)


def test_a_tensor_that_never_had_a_gradient_stays_what_it_is():
    for kind in (Moments, Moments8Bit):
        weight, moments = torch.ones(300), kind.zeros(300, DEVICE)
        hyper = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
        optimizer.adamw_step_(weight, None, torch.zeros(300), moments, step=1, **hyper)
        assert weight.tolist() == [1.0] * 300


@pytest.mark.parametrize("n", [1, 4096, 9000])
def test_square_norm_counts_what_is_not_finite(n, compare):
    value = random(n)
    clean = optimizer.square_norm(value)
    compare("square_norm", "fp32", clean[0], value.double().square().sum())
    assert clean[1].item() == 0
    value[0] = float("nan")
    value[-1] = float("inf")
    assert optimizer.square_norm(value)[1].item() == min(n, 2)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(1, 7), (9, 300), (12, 1030)])
def test_an_encoded_delta_has_the_bits_of_the_protocols(shape, density, residual, guarded, compare):
    from fedblocks.protocol.tensors import encode_tensor

    end, start = random(*shape, spread=1e-2), random(*shape, seed=1, spread=1e-2)
    owed = random(*shape, seed=2, spread=1e-2) if residual else None
    end[0] = start[0]  # a row that carries nothing but what is owed
    if shape[0] > 3:
        end[1], start[1] = start[2], end[2]  # two rows of equal energy
    cap = 5e-3
    if shape[0] == 1:  # a vector: all or nothing
        shape, density = shape[1:], 1.0
    expected = encode_tensor(
        (end - start).view(shape).cpu().numpy(),
        None if owed is None else owed.view(shape).cpu().numpy(),
        format="int8",
        density=density,
        cap=cap,
    )
    max_rows = None if density == 1 else int(np.ceil(density * shape[0]))
    made = delta.delta_encode(end, start, owed, max_rows=max_rows, cap=cap)
    bitmap = np.zeros(len(end), dtype=np.bool_)
    bitmap[made.index.cpu().numpy()] = True
    first = b"" if max_rows is None else np.packbits(bitmap, bitorder="little").tobytes()
    assert first + made.scale.cpu().numpy().tobytes() + made.codes.cpu().numpy().tobytes() == expected.payload
    compare("delta_codes", "fp32", made.residual.view(shape), torch.from_numpy(np.array(expected.residual)).to(DEVICE))
    rows = delta.delta_rows(end, start, owed, cap)
    for got, exact in zip(rows, delta.delta_rows.reference(end, start, owed, cap), strict=True):
        compare("delta_rows", "fp32", got, exact)


def test_a_change_that_is_not_finite_is_never_encoded():
    end = random(3, 300)
    end[1, 299] = float("nan")
    end[2, 0] = float("inf")
    with pytest.raises(ValueError, match="2 values of the change are not finite; nothing may be uploaded"):
        delta.delta_encode(end, torch.zeros(3, 300), None, max_rows=None, cap=1.0)


@pytest.mark.parametrize("zero_out", [False, True])
def test_fused_halves_of_a_block_follow_the_reference_in_every_gradient(zero_out):
    size, length, hidden, width, heads, kv, head_dim = 2, 5, 64, 96, 4, 2, 16
    x = random(size, length, hidden)
    leaves = {
        "norm": random(hidden, seed=1),
        "qkv": random((heads + 2 * kv) * head_dim, hidden, seed=2, spread=0.2),
        "bias": random((heads + 2 * kv) * head_dim, seed=3),
        "post": random(hidden, seed=4),
        "gate_up": random(2 * width, hidden, seed=5, spread=0.2),
        "down": random(hidden, width, seed=6, spread=0.0 if zero_out else 0.2),
    }
    tables = (random(length, head_dim, seed=7), random(length, head_dim, seed=8))
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        with DISPATCHER.demanding(backend):
            w = {name: t.clone().to(dtype).requires_grad_() for name, t in leaves.items()}
            at = x.clone().to(dtype).requires_grad_()
            q, k, v = attention_in(
                at, w["norm"], w["qkv"], w["bias"], tuple(t.to(dtype) for t in tables), (heads, kv), 1e-5
            )
            mixed = torch.cat((q * 2, k * 3, v), dim=2).flatten(2)[..., :hidden] + at
            y = mlp(mixed, w["post"], w["gate_up"], None, w["down"], None, 1e-5)
            (y * random(*y.shape, seed=9).to(dtype)).sum().backward()
            results.append({"y": y.detach(), "x": at.grad, **{name: t.grad for name, t in w.items()}})
    for name, exact in results[1].items():
        got = results[0][name].double()
        assert (got - exact).abs().max() <= 3e-6 * max(exact.abs().max().item(), 1e-6), name


def test_a_second_backward_pass_through_what_a_kernel_overwrote_is_an_error():
    x = random(2, 8).requires_grad_()
    y = pointwise.SwiGlu.apply(x * 1).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
