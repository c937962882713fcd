"""The mixture: planted groups, no group where there is none, matching, and sums of one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedblocks.aggregator import mixture
from fedblocks.aggregator.mixture import Projection


def planted(seed, *, groups, each, spread=0.3):
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((groups, mixture.DIMENSIONS))
    return np.repeat(centers, each, axis=0) + spread * rng.standard_normal((groups * each, mixture.DIMENSIONS))


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("present", [1, 2])
def test_bic_finds_the_number_of_planted_groups_and_the_fit_finds_them(groups, present):
    points = planted(groups, groups=groups, each=8)
    assert mixture.best_number(points, present) == groups
    found = mixture.fit(points, groups).memberships.argmax(axis=1).reshape(groups, 8)
    assert (found == found[:, :1]).all()
    assert len(set(found[:, 0])) == groups


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_found_where_each_clients_own_part_is_larger_than_the_common_one(seed):
    """From spread points in all 64 dimensions EM ends at outliers."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(mixture.DIMENSIONS)
    group = np.arange(20) % 2
    points = 0.45 * np.where(group[:, None], common, -common) + rng.standard_normal((20, mixture.DIMENSIONS))
    found = mixture.fit(points, 2).memberships.argmax(axis=1)
    assert (found == group).all() or (found == 1 - group).all()


@pytest.mark.parametrize("clients", [8, 20, 50])
def test_one_population_is_never_cut_up(clients):
    assert all(mixture.best_number(planted(seed, groups=1, each=clients, spread=1.0), 1) == 1 for seed in range(5))


def test_identical_clients_are_one_group_and_every_number_stays_finite():
    points = np.ones((8, mixture.DIMENSIONS))
    assert mixture.best_number(points, 1) == 1
    for number in (1, 2, 3):
        found = mixture.fit(points, number)
        assert np.isfinite(found.memberships).all()
        np.testing.assert_allclose(found.memberships.sum(axis=1), 1.0, atol=1e-12)


def test_too_few_clients_for_the_components_are_refused_by_number():
    with pytest.raises(ValueError, match="2 clients cannot be fitted by 3 components"):
        mixture.fit(np.zeros((2, 4)), 3)


def test_likelihood_of_one_component_is_the_gaussians():
    points = planted(7, groups=1, each=9)
    variance = points.var(axis=0)
    expected = -0.5 * np.sum((points - points.mean(axis=0)) ** 2 / variance + np.log(2 * np.pi * variance))
    found = mixture.fit(points, 1)
    assert found.log_likelihood == pytest.approx(float(expected))
    assert found.bic == pytest.approx(-2 * float(expected) + 2 * 64 * np.log(9))


def test_any_permutation_of_the_components_is_undone():
    rng = np.random.default_rng(0)
    old = mixture.normalised(rng.random((9, 4)) ** 4)
    for order in itertools.permutations(range(4)):
        np.testing.assert_array_equal(mixture.relabelled(old[:, list(order)], old), old)


def test_a_split_and_a_merger_take_their_clients_histories_along():
    halves = np.repeat(np.eye(2), 3, axis=0)
    np.testing.assert_array_equal(mixture.transition(halves, np.ones((6, 1))), [[1.0], [1.0]])
    np.testing.assert_allclose(mixture.transition(np.ones((6, 1)), halves), [[0.5, 0.5]])
    empty = np.hstack([np.ones((6, 1)), np.zeros((6, 1))])
    np.testing.assert_allclose(mixture.transition(empty, halves).sum(axis=1), 1.0)


def test_projections_of_a_pair_are_those_of_its_product_and_keep_products_on_average():
    rng = np.random.default_rng(3)
    left, right = rng.standard_normal((20, 3)), rng.standard_normal((12, 3))
    one = Projection.drawn(20, 12, seed=5)
    np.testing.assert_allclose(one.of_pair(left, right), one.of_matrix(left @ right.T), atol=1e-9)
    many = Projection.drawn(20, 12, seed=6, dimensions=20_000)
    x, y = left @ right.T, rng.standard_normal((20, 12))
    found = np.mean(many.of_matrix(x) * many.of_matrix(y))
    assert found == pytest.approx(np.sum(x * y), abs=0.05 * np.linalg.norm(x) * np.linalg.norm(y))
    assert set(np.unique(one.left)) == {-1.0, 1.0}
