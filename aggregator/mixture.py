"""Which clients belong together? A mixture of diagonal Gaussians over what their updates look like (methods.md 10.2).

Each client's update, divided by its norm, is projected to :data:`DIMENSIONS` numbers by fixed +-1 vectors. The mixture
is fitted to all known clients by EM from fixed starts; the number of its components is chosen by BIC and changed with
hysteresis; the components of two fits are matched, so that clusters keep their histories.

Rows of memberships sum to 1 after every step. Pure functions of their arguments; nothing is drawn from a clock.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

Float64s = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

DIMENSIONS: Final = 64
MAX_COMPONENTS: Final = 4
STARTS: Final = 5
MAX_ITERATIONS: Final = 200
TOLERANCE: Final = 1e-9
#: Instead of a division by zero; squares of it do not overflow what they divide.
TINY: Final = 1e-150
#: Of the mean variance over the dimensions.
VARIANCE_FLOOR: Final = 1e-3
#: A number of components replaces the present one only if BIC falls by more than this.
BIC_GAIN: Final = 10.0
#: A component that holds fewer clients is no population (ours). The variances of one or two points are so small that
#: in 64 dimensions BIC rewards cutting them off: without this rule it did so in eleven of thirty draws of 8 to
#: 12 clients from one population.
MIN_CLIENTS: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Projection:
    """Fixed +-1 projections of matrices: z_d = a_d' X b_d with signs a_d, b_d; E of z·z' is the matrices' product.

    The outer product of two sign vectors is itself a +-1 matrix, and of a pair B A it costs r·(out + in) a dimension.
    """

    left: Float64s
    """(dimensions, out)"""
    right: Float64s
    """(dimensions, in)"""

    @classmethod
    def drawn(cls, num_out: int, num_in: int, seed: int, dimensions: int = DIMENSIONS) -> Projection:
        """The same on every machine."""
        rng = np.random.default_rng(seed)
        signs = rng.integers(0, 2, size=(dimensions, num_out + num_in)).astype(np.float64) * 2.0 - 1.0
        return cls(left=signs[:, :num_out], right=signs[:, num_out:])

    def of_matrix(self, matrix: Float64s) -> Float64s:
        """Of a matrix (out, in): (dimensions,)"""
        return np.sum(np.multiply(np.matmul(self.left, matrix), self.right), axis=1)

    def of_pair(self, left: Float64s, right: Float64s) -> Float64s:
        """Of ``left @ right.T``, (out, r) and (in, r): (dimensions,)"""
        return np.sum(np.multiply(np.matmul(self.left, left), np.matmul(self.right, right)), axis=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureFit:
    """One mixture fitted to the points, K components."""

    memberships: Float64s
    """(clients, K)"""
    log_likelihood: float
    bic: float
    """-2·log-likelihood + parameters·ln(clients); lower is better."""

    @property
    def num_components(self) -> int:
        """K."""
        return self.memberships.shape[1]


def fit(points: Float64s, num_components: int) -> MixtureFit:
    """The likeliest of the mixtures that EM reaches from :data:`STARTS` fixed starts, first of those of which every
    component is a population.

    Args:
        points: (clients, dimensions).

    Raises:
        ValueError: fewer points than components.
    """
    num_points, dimensions = points.shape
    if num_points < num_components:
        raise ValueError(f"{num_points} clients cannot be fitted by {num_components} components")
    mean_variance = float(np.sum(points.var(axis=0))) / dimensions
    floor = max(VARIANCE_FLOOR * mean_variance, TINY)
    starts = range(STARTS if num_components > 1 else 1)
    found = [_expectation_maximisation(points, _start(points, num_components, start), floor) for start in starts]
    memberships, likelihood = max(found, key=lambda one: (_populated(one[0]), one[1]))
    parameters = num_components * 2 * dimensions + num_components - 1
    return MixtureFit(
        memberships=memberships,
        log_likelihood=likelihood,
        bic=-2.0 * likelihood + parameters * math.log(num_points),
    )


def _start(points: Float64s, num_components: int, start: int) -> Float64s:
    """Hard memberships by the nearest of K spread points, seen in the first ``start + 1`` principal directions.

    In few directions what a group has in common outweighs what is each client's own; in all of them the spread points
    would be outliers.
    """
    centered = points - np.sum(points, axis=0) / len(points)
    u, singular, _ = np.linalg.svd(centered, full_matrices=False)
    seen = np.multiply(u, singular)[:, : start + 1]
    chosen = [int(np.argmax(np.sum(np.square(seen), axis=1)))]
    distance = _square_distance(seen, seen[chosen[0]])
    while len(chosen) < num_components:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, _square_distance(seen, seen[chosen[-1]]))
    nearest = np.stack([_square_distance(seen, seen[one]) for one in chosen]).argmin(axis=0)
    return np.eye(num_components)[nearest]


def _square_distance(points: Float64s, center: Float64s) -> Float64s:
    return np.sum((points - center) ** 2, axis=1)


def _expectation_maximisation(points: Float64s, memberships: Float64s, floor: float) -> tuple[Float64s, float]:
    """Memberships and log-likelihood at convergence."""
    before = likelihood = -math.inf
    for _ in range(MAX_ITERATIONS):
        mass = memberships.sum(axis=0)
        share = np.maximum(mass, TINY)[:, None]
        means = np.matmul(np.transpose(memberships), points) / share
        squares = np.matmul(np.transpose(memberships), np.square(points)) / share
        variances = np.maximum(squares - np.square(means), floor)
        with np.errstate(divide="ignore"):
            log_weights = np.log(mass / len(points))
        scaled = np.sum((points[:, None, :] - means) ** 2 / variances, axis=2)
        log_density = log_weights - 0.5 * (scaled + np.sum(np.log(2 * np.pi * variances), axis=1))
        highest = log_density.max(axis=1, keepdims=True)
        total = highest[:, 0] + np.log(np.sum(np.exp(log_density - highest), axis=1))
        memberships = normalised(np.exp(log_density - total[:, None]))
        likelihood = math.fsum(total)
        if likelihood - before <= TOLERANCE * abs(likelihood):
            break
        before = likelihood
    return memberships, likelihood


def normalised(memberships: Float64s) -> Float64s:
    """Rows divided by their sum."""
    return memberships / np.sum(memberships, axis=1, keepdims=True)


def _populated(memberships: Float64s) -> bool:
    return bool(np.min(np.sum(memberships, axis=0)) >= MIN_CLIENTS)


def best_number(points: Float64s, present: int) -> int:
    """The number of components that BIC prefers to the present one by more than :data:`BIC_GAIN`, or the present one.

    Fits with a component of less than :data:`MIN_CLIENTS` clients do not count, but for a single component.
    """
    fits = [fit(points, number) for number in range(1, min(MAX_COMPONENTS, len(points)) + 1)]
    counted = [f for f in fits if f.num_components == 1 or _populated(f.memberships)]
    best = min(counted, key=lambda f: f.bic)
    now = next((f.bic for f in counted if f.num_components == present), math.inf)
    return best.num_components if now - best.bic > BIC_GAIN else present


def relabelled(new: Float64s, old: Float64s) -> Float64s:
    """The columns of ``new`` in the order that agrees best with ``old`` (both (clients, K))."""
    agreement = np.matmul(np.transpose(new), old)
    number = new.shape[1]
    # Ties go to the first permutation, the identity where that is one.
    best = max(
        itertools.permutations(range(number)),
        key=lambda order: math.fsum(float(agreement[order[b], b]) for b in range(number)),
    )
    return new[:, list(best)]


def transition(new: Float64s, old: Float64s) -> Float64s:
    """R (K_new, K_old): which share of each new component's clients comes from which old component; rows sum to 1."""
    mass = np.matmul(np.transpose(new), old)
    sums: Float64s = np.sum(mass, axis=1, keepdims=True)
    # A component that nobody belongs to continues all old ones.
    return normalised(np.where(sums > 0, mass, 1.0))


def mean_memberships(memberships: Sequence[Sequence[float]], num_examples: Sequence[int]) -> tuple[float, ...]:
    """pbar_j = sum_k n_k p_kj / sum n: of the population, and of a client that nobody knows yet."""
    table, weights = np.asarray(memberships, dtype=np.float64), np.asarray(num_examples, dtype=np.float64)
    if weights.sum() <= 0:
        weights = np.ones(len(table))
    return tuple((weights @ table / weights.sum()).tolist())
