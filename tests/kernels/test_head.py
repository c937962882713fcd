"""Tests of kernels/reference/head.py: the two losses of the output head."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedblocks.kernels import ops
from fedblocks.kernels.reference import head

torch.set_num_threads(1)


def operands(rows=5, vocab=11, hidden=4, seed=0, dtype=torch.float64, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=g, dtype=dtype) * spread
    weight = torch.randn(vocab, hidden, generator=g, dtype=dtype)
    return h, weight, torch.randint(0, vocab, (rows,), generator=g)


def full_kl(p_logits, q_logits):
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    return (log_p.exp() * (log_p - log_q)).sum()


def test_cross_entropy_and_its_gradients_are_those_of_torch():
    h, weight, target = operands()
    for w in (weight, weight.clone().requires_grad_()):
        ours, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
        reference_weight = w.detach().clone().requires_grad_()
        ops.linear_cross_entropy(ours, w, target, 0.25).backward()
        expected = torch.nn.functional.cross_entropy(theirs @ reference_weight.T, target, reduction="sum") * 0.25
        expected.backward()
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)
        assert (w.grad is None) == (not w.requires_grad)
        if w.requires_grad:
            assert torch.allclose(w.grad, reference_weight.grad, atol=1e-12)


def test_the_number_of_chunks_changes_nothing(monkeypatch):
    h, weight, target = operands(rows=30)
    whole = ops.linear_cross_entropy(h, weight, target, 1.0)
    record = ops.top_k(h, weight, 3)
    kl = ops.linear_kl_topk(h + 0.1, weight, *record, 1.0)
    monkeypatch.setattr(head, "LOGITS_BYTES", 1)
    monkeypatch.setattr(head, "MIN_ROWS", 7)
    assert ops.linear_cross_entropy(h, weight, target, 1.0).item() == pytest.approx(whole.item(), rel=1e-12)
    assert ops.linear_kl_topk(h + 0.1, weight, *record, 1.0).item() == pytest.approx(kl.item(), rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(record, ops.top_k(h, weight, 3), strict=True))


def test_no_rows_give_loss_zero_and_gradient_zero():
    h, weight, target = operands(rows=0)
    h.requires_grad_()
    loss = ops.linear_cross_entropy(h, weight, target, 1.0) + ops.linear_kl_topk(
        h, weight, *ops.top_k(h.detach(), weight, 3), 1.0
    )
    loss.backward()
    assert loss.item() == 0
    assert h.grad.shape == (0, 4)


@pytest.mark.parametrize("k", [1, 3, 11])
def test_gradcheck_of_both_losses_with_the_tail_counted_dropped_and_absent(k):
    h, weight, target = operands()
    h.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ops.linear_cross_entropy(a, b, target, 0.5), (h, weight))
    record = ops.top_k(h.detach() + 0.3, weight.detach(), k)
    assert torch.autograd.gradcheck(lambda a, b: ops.linear_kl_topk(a, b, *record, 0.5), (h, weight))


def test_gradcheck_with_a_tail_below_the_threshold_and_one_at_the_floor():
    weight = torch.eye(4, dtype=torch.float64)
    teacher = torch.tensor([[30.0, 29, 0, 0], [3.0, 2, 1, 0]], dtype=torch.float64)
    ids, logp, log_tail = ops.top_k(teacher, weight, 2)
    assert log_tail[0].exp() < head.TAIL_MIN < log_tail[1].exp()
    student = torch.tensor([[1.0, 2, 0.5, 0], [40.0, 40, 0, -1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: ops.linear_kl_topk(s, weight, ids, logp, log_tail, 1.0), (student,))
    dropped = student.detach()[:1]
    expected = (logp[0].exp() * (logp[0] - torch.log_softmax(dropped, -1)[0, ids[0]])).sum().item()
    one = ops.linear_kl_topk(dropped, weight, ids[:1], logp[:1], log_tail[:1], 1.0)
    assert one.item() == pytest.approx(expected)


def test_a_student_with_almost_nothing_in_the_tail_keeps_the_bound():
    weight = torch.eye(4)
    teacher, student = torch.tensor([[2.0, 1, -8, -9]]), torch.tensor([[2.0, 1, -17, -18]])
    kl = ops.linear_kl_topk(student, weight, *ops.top_k(teacher, weight, 2), 1.0).item()
    assert 0 < kl <= full_kl(teacher.double(), student.double()).item() + 1e-7


@example(seed=1144, k=6, shift=3.0, spread=1.0)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 11), shift=st.floats(0, 3), spread=st.floats(0.1, 4))
@settings(max_examples=60)
def test_kl_of_the_top_k_lies_between_zero_and_the_full_kl(seed, k, shift, spread):
    h, weight, _ = operands(seed=seed, dtype=torch.float32, spread=spread)
    other = h + shift * torch.randn(h.shape, generator=torch.Generator().manual_seed(seed + 1))
    kl = ops.linear_kl_topk(other, weight, *ops.top_k(h, weight, k), 1.0).item()
    assert kl >= -1e-5 * len(h)
    assert kl <= full_kl(h.double() @ weight.double().T, other.double() @ weight.double().T).item() + 1e-5 * len(h)
    same = ops.linear_kl_topk(h, weight, *ops.top_k(h, weight, k), 1.0).item()
    assert abs(same) < 1e-6 * len(h)


def test_a_complete_record_gives_the_full_kl():
    h, weight, _ = operands(dtype=torch.float32)
    ids, logp, log_tail = ops.top_k(h, weight, 99)
    assert ids.shape == (5, 11)
    assert torch.isneginf(log_tail).all()
    kl = ops.linear_kl_topk(h + 0.5, weight, ids, logp, log_tail, 1.0).item()
    assert kl == pytest.approx(full_kl(h @ weight.T, (h + 0.5) @ weight.T).item(), rel=1e-4)
