"""Row masks: the exact number of rows, the strongest and some others, and nothing else from the wire."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.row_mask import choose_rows, next_scores, num_rows, pack, unpack


def scores(seed=0, rows=40):
    return np.random.default_rng(seed).random(rows).astype(np.float32)


@pytest.mark.parametrize(("rows", "share", "expected"), [(40, 0.25, 10), (41, 0.25, 11), (40, 1.0, 40), (1, 0.25, 1)])
def test_a_share_names_exactly_so_many_rows(rows, share, expected):
    mask = choose_rows(scores(rows=rows), share, client="a", round=1, matrix="q")
    assert (num_rows(rows, share), int(mask.sum())) == (expected, expected)


def test_nine_tenths_are_the_strongest_rows_and_the_rest_changes_with_the_round():
    found = scores()
    best = set(np.argsort(-found)[:18].tolist())
    masks = [choose_rows(found, 0.5, client="a", round=t, matrix="q") for t in range(20)]
    assert all(best <= set(np.flatnonzero(mask).tolist()) for mask in masks)
    assert {int(mask.sum()) for mask in masks} == {20}
    explored = set().union(*(set(np.flatnonzero(mask).tolist()) - best for mask in masks))
    assert len(explored) > 15


@pytest.mark.parametrize("change", [{"client": "b"}, {"round": 2}, {"matrix": "v"}])
def test_the_draw_is_the_same_for_the_same_names_and_another_for_others(change):
    named = {"client": "a", "round": 1, "matrix": "q"}
    one = choose_rows(scores(rows=400), 0.5, **named)
    np.testing.assert_array_equal(one, choose_rows(scores(rows=400), 0.5, **named))
    assert (one != choose_rows(scores(rows=400), 0.5, **{**named, **change})).any()


def test_scores_remember_nine_tenths():
    found = next_scores(np.array([1.0, 0.0], np.float32), np.array([0.0, 2.0], np.float32))
    np.testing.assert_allclose(found, [0.9, 0.2], rtol=1e-6)
    assert found.dtype == np.float32


def test_a_share_outside_its_range_and_scores_that_overflowed_are_refused():
    with pytest.raises(ValueError, match="share of rows is 0, expected above 0 and at most 1"):
        num_rows(8, 0)
    with pytest.raises(ValueError, match="scores of q are not finite"):
        choose_rows(np.array([np.inf], np.float32), 1.0, client="a", round=1, matrix="q")


@given(st.integers(1, 70), st.sampled_from([0.25, 0.5, 1.0]), st.integers(0, 99))
def test_a_mask_survives_the_wire(rows, share, round):
    mask = choose_rows(scores(round, rows), share, client="a", round=round, matrix="q")
    np.testing.assert_array_equal(unpack(pack(mask), rows, num_rows(rows, share)), mask)


@given(st.binary(max_size=6))
def test_any_other_bytes_are_refused_or_name_the_right_number_of_rows(packed):
    try:
        mask = unpack(packed, 20, 5)
    except RemoteProtocolError:
        return
    assert int(mask.sum()) == 5
    assert pack(mask) == packed
