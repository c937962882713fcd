"""Sums of low-rank pairs: kept exactly, cut to a rank as the SVD of the whole matrix would."""

from __future__ import annotations

import numpy as np
import pytest

from fedblocks.protocol.low_rank import Factored, add, mixed, truncate


def pairs(seed, out, inner, *ranks):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((out, r)), rng.standard_normal((inner, r))) for r in ranks]


@pytest.mark.parametrize(("out", "inner"), [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("ranks", [(3,), (3, 4), (4, 4, 4), (8, 8, 8)])
def test_a_sum_of_pairs_is_kept_exactly_at_a_rank_of_at_most_the_smaller_side(out, inner, ranks):
    found = pairs(1, out, inner, *ranks)
    total = add(Factored.zero(out, inner), found)
    np.testing.assert_allclose(total.dense(), sum(a @ b.T for a, b in found), atol=1e-5)
    assert total.rank == min(out, inner, sum(ranks))
    np.testing.assert_allclose(add(total, found).dense(), 2 * total.dense(), atol=1e-5)


@pytest.mark.parametrize(("out", "inner"), [(12, 20), (20, 12)])
def test_once_it_is_of_full_rank_rows_that_no_pair_touches_keep_their_bits(out, inner):
    whole = add(Factored.zero(out, inner), pairs(1, out, inner, 16))
    left, right = pairs(2, out, inner, 2)[0]
    left[3:] = 0
    np.testing.assert_array_equal(add(whole, [(left, right)]).dense()[3:], whole.dense()[3:])


@pytest.mark.parametrize("ranks", [(2, 3), (30,)])
@pytest.mark.parametrize(("out", "inner"), [(24, 40), (40, 24)])
def test_the_cut_is_that_of_the_whole_matrix_and_says_what_it_leaves_out(out, inner, ranks):
    matrix = add(Factored.zero(out, inner), pairs(3, out, inner, *ranks))
    u, singular, vt = np.linalg.svd(matrix.dense())
    cut = truncate(matrix, 4)
    np.testing.assert_allclose(cut.left @ cut.right, (u[:, :4] * singular[:4]) @ vt[:4], atol=1e-4)
    expected = np.linalg.norm(singular[4:]) / np.linalg.norm(singular)
    assert cut.error == pytest.approx(expected, rel=1e-5)
    strongest = np.abs(cut.left).argmax(axis=0)
    assert (cut.left[strongest, range(4)] > 0).all()


def test_beyond_the_matrixs_own_rank_the_cut_is_exact_and_its_shapes_stay():
    matrix = add(Factored.zero(24, 40), pairs(4, 24, 40, 2))
    cut = truncate(matrix, 8)
    assert (cut.left.shape, cut.right.shape) == ((24, 8), (8, 40))
    np.testing.assert_allclose(cut.left @ cut.right, matrix.dense(), atol=1e-4)
    assert cut.error < 1e-6
    nothing = truncate(Factored.zero(24, 40), 8)
    assert (nothing.left.shape, nothing.error, nothing.left.any()) == ((24, 8), 0.0, False)


@pytest.mark.parametrize("ranks", [(2, 3), (3, 30), (30, 30)])
def test_a_mixture_is_the_weighted_sum_and_of_one_matrix_it_is_that_one(ranks):
    one, other = (add(Factored.zero(24, 16), pairs(i, 24, 16, r)) for i, r in enumerate(ranks))
    expected = 0.25 * one.dense() + 0.75 * other.dense()
    np.testing.assert_allclose(mixed([one, other], [0.25, 0.75]).dense(), expected, atol=1e-5)
    assert mixed([one, other], [1.0, 0.0]) is one


def test_factors_that_do_not_multiply_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(3, 2\) and \(2, 5\) do not multiply"):
        Factored(left=np.zeros((3, 2), np.float32), right=np.zeros((2, 5), np.float32))
