"""Tests of kernels/reference/head.py: the two losses of the output head."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedblocks.kernels import head, ops
from fedblocks.kernels.reference import head as reference

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
    assert log_tail[0].exp() < reference.TAIL_MIN < log_tail[1].exp()
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


# Memory and work


class Watch(TorchDispatchMode):
    """Remembers the storages that were made, in bytes, and how often each operation ran."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.calls = {}
        self._kept = []  # so that no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in given:
                self.storages[storage.data_ptr()] = storage.nbytes()
                self._kept.append(tensor)
        return result


BOTH_LOSSES = pytest.mark.parametrize("loss", ["cross entropy", "kl"])


def watched(loss, dtype, grad, monkeypatch, rows=200, vocab=3000):
    """What one forward and backward pass makes with chunks of 64 rows and pieces of 4."""
    monkeypatch.setattr(head, "MIN_ROWS", 32)
    monkeypatch.setattr(head, "LOGITS_BYTES", 64 * vocab * dtype.itemsize)
    monkeypatch.setattr(reference, "PIECE_BYTES", 4 * vocab * 4)
    h, weight, target = operands(rows=rows, vocab=vocab, hidden=8, dtype=torch.float32)
    h, weight = h.to(dtype), weight.to(dtype)
    record = ops.top_k(h + 0.1, weight, 5)
    h.requires_grad_(grad)
    with Watch() as watch:
        if loss == "kl":
            total = ops.linear_kl_topk(h, weight, *record, 1 / rows)
        else:
            total = ops.linear_cross_entropy(h, weight, target, 1 / rows)
        if grad:
            total.backward()
    return watch


@BOTH_LOSSES
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_chunk_of_logits_is_all_that_is_ever_made_of_rows_times_vocabulary(loss, dtype, grad, monkeypatch):
    watch = watched(loss, dtype, grad, monkeypatch)
    largest = sorted(watch.storages.values(), reverse=True)
    assert largest[0] == 64 * 3000 * dtype.itemsize  # a third of all logits
    wide = [4 * 3000 * 4] * 4 if dtype == torch.bfloat16 else []  # for each of the four chunks, one after the other
    assert largest[1 : 1 + len(wide)] == wide  # what is widened to fp32 at a time
    assert largest[1 + len(wide)] < 3000 * 4  # less than one row of logits


def test_the_record_of_the_teacher_is_made_in_one_chunk_too(monkeypatch):
    monkeypatch.setattr(head, "MIN_ROWS", 32)
    monkeypatch.setattr(head, "LOGITS_BYTES", 32 * 3000 * 4)
    monkeypatch.setattr(reference, "PIECE_BYTES", 4 * 3000 * 4)
    h, weight, _ = operands(rows=200, vocab=3000, hidden=8, dtype=torch.float32)
    with Watch() as watch:
        ops.top_k(h, weight, 5)
    chunk, *rest = sorted(watch.storages.values(), reverse=True)
    assert chunk == 32 * 3000 * 4
    assert rest[0] <= 4 * 3000 * 4


@BOTH_LOSSES
def test_without_a_gradient_there_is_one_matrix_product_a_chunk_and_with_one_there_are_two(loss, monkeypatch):
    assert watched(loss, torch.float32, False, monkeypatch).calls["mm"] == 4
    assert watched(loss, torch.float32, True, monkeypatch).calls["mm"] == 8


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (0, 0),
        (1, 1),
        (255, 255),
        (256, 256),
        (640, 640),  # exactly the budget
        (641, 352),  # one more: two even chunks
        (1281, 448),
    ],
)
def test_chunks_are_even_and_within_the_budget(rows, expected, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_BYTES", 640 * 1000 * 4)
    assert head.chunk_rows(rows, 1000, 4) == expected


def test_a_vocabulary_too_wide_for_the_budget_still_gets_the_smallest_chunk():
    assert head.chunk_rows(10_000, 1 << 20, 4) == head.MIN_ROWS


def test_softmax_and_its_logarithm_may_overwrite_what_they_read():
    for shape in ((1, 1), (3, 7), (5, 33), (2, 1000), (17, 4099)):
        for dtype in (torch.float32, torch.float64):
            z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 5
            for made, expected in (
                (reference._log_softmax_out, torch.log_softmax),
                (reference._softmax_out, torch.softmax),
            ):
                place = z.clone()
                made(place, 1, False, out=place)
                assert torch.equal(place, expected(z, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_operands_give_the_loss_and_gradient_of_wide_ones(dtype, monkeypatch):
    """Against fp64 on the same rounded operands; logits are rounded once to the operands' dtype."""
    monkeypatch.setattr(reference, "PIECE_BYTES", 3 * 300 * 4)
    h, weight, target = operands(rows=40, vocab=300, hidden=16, dtype=torch.float64)
    h, weight = h.to(dtype), weight.to(dtype)
    record = ops.top_k(h.double().flip(0), weight.double(), 8)
    eps = torch.finfo(dtype).eps
    for loss, args in ((ops.linear_cross_entropy, (target,)), (ops.linear_kl_topk, record)):
        results = []
        for wide in (False, True):
            a, w = (h.double(), weight.double()) if wide else (h.clone(), weight)
            a.requires_grad_()
            total = loss(a, w, *args, 1 / 40)
            total.backward()
            results.append((total.item(), a.grad.double()))
        (ours, grad), (exact, exact_grad) = results
        assert ours == pytest.approx(exact, rel=4 * eps, abs=16 * eps)
        assert (grad - exact_grad).norm() <= 4 * eps * exact_grad.norm() + 1e-6


def test_logits_far_apart_give_finite_losses_and_gradients():
    weight = torch.eye(4)
    student = torch.tensor([[300.0, 0, 0, 0], [0.0, 300, 0, -300]], requires_grad=True)
    teacher = ops.top_k(torch.tensor([[2.0, 1, 0, 0], [1.0, 2, 0, 0]]), weight, 2)
    ce = ops.linear_cross_entropy(student, weight, torch.tensor([1, 1]), 1.0)
    assert ce.item() == pytest.approx(300)
    kl = ops.linear_kl_topk(student, weight, *teacher, 1.0)
    assert kl.isfinite()
    (ce + kl).backward()
    assert student.grad.isfinite().all()
