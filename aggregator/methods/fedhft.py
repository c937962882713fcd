"""What does a round of the method ``fedhft`` consist of? Personal priors, masked updates, clusters (methods.md 10).

FedHFT (arXiv 2510.14054) fine-tunes low-rank pairs of which a client trains only some rows, and gives each client its
own mixture of cluster models. This is a repaired algorithm; which defects of the published code it leaves out, and
which rules are ours, is listed in docs/fedhft.md.

1. :func:`prior`: the client's mixture of the clusters' accumulated changes, cut to a rank; the client holds it frozen.
2. The client chooses its rows before training (``protocol/row_mask.py``) and trains B[rows] and A from B = 0.
3. :func:`aggregate`, M-step: each cluster moves by the mean of the updates, weighted by membership *and divided by the
   membership of those who trained the row*; a row nobody trained keeps its bits.
4. :func:`aggregate`, E-step: memberships by a Gaussian mixture over the clients' projected updates (``mixture.py``).

What is not a low-rank pair (a classification head; an expanded block) is a *dense* tensor: the same memberships, the
same division, no rows. A run of dense tensors only is the same personalisation over expanded blocks.

Everything here is a pure function; the result depends on the set of updates, not on their order.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from fedblocks.aggregator import mixture
from fedblocks.aggregator.mixture import Float64s, Projection
from fedblocks.aggregator.personal_pairs import PairUpdate, Weight, dense_move, pair_moves, weights_of
from fedblocks.protocol import low_rank
from fedblocks.protocol.low_rank import Factored, Truncated
from fedblocks.protocol.messages import ClientKey
from fedblocks.protocol.row_mask import num_rows
from fedblocks.protocol.tensors import FloatArray

#: fp32 value, gradient, and both moments of AdamW.
TRAINED_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The method's constants (methods.md 10.1, 10.2)."""

    rank: int = 32
    """r of the pairs that clients train."""
    scale: float = 1.0
    """sc = alpha/r."""
    prior_rank: int = 32
    """r_d at the start."""
    max_prior_rank: int = 128
    max_prior_error: float = 0.1
    """A larger mean eps of the cohort's priors doubles r_d."""
    clusters: int = 1
    """K at the start."""
    choose_clusters: bool = True
    """Whether BIC may change K."""
    mixture_from_round: int = 5
    """Memberships are uniform before."""
    min_cohort: int = 8
    """Memberships stay as they are after a round with fewer updates."""
    test_rounds: int = 5
    """K is reconsidered every so many rounds."""
    smoothing: float = 0.5
    """Share of the old memberships that stays."""
    signature_decay: float = 0.5
    """Share of the old z that stays."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.clusters <= mixture.MAX_COMPONENTS:
            raise ValueError(f"clusters is {self.clusters}, expected 1 to {mixture.MAX_COMPONENTS}")
        if not 1 <= self.prior_rank <= self.max_prior_rank:
            raise ValueError(
                f"prior_rank is {self.prior_rank}, expected 1 to max_prior_rank, which is {self.max_prior_rank}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What is trained, and what tells clients apart."""

    matrices: Mapping[str, tuple[int, int]]
    """Target matrix -> (out, in)."""
    dense: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Tensors that are trained whole: vectors and matrices."""
    signature: tuple[str, ...]
    """Names of both kinds whose updates tell clients apart: the head if there is one, else the targets of the last two
    layers."""

    def __post_init__(self) -> None:
        known = {*self.matrices, *self.dense}
        missing = [name for name in self.signature if name not in known]
        if missing or not self.signature:
            raise ValueError(
                f"the signature names {', '.join(missing) or 'nothing'}, expected some of what is trained: "
                f"{', '.join(sorted(known))}"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """One client's accepted update."""

    client: ClientKey
    num_examples: int
    pairs: Mapping[str, PairUpdate] = field(default_factory=dict[str, PairUpdate])
    dense: Mapping[str, FloatArray] = field(default_factory=dict[str, FloatArray])
    """Changes of dense tensors; one that the client did not train is absent."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cluster:
    """What the members of one cluster have learnt, as changes of the base."""

    matrices: Mapping[str, Factored]
    """G_j"""
    dense: Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """What is known of one client."""

    num_examples: int
    memberships: tuple[float, ...]
    """p_k, one of each cluster; they sum to 1."""
    signature: Float64s | None = None
    """z: mean of its projected updates over the rounds that it took part in; None before the first."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureState:
    """All that the method carries from round to round."""

    round: int
    """Rounds with updates so far."""
    clusters: tuple[Cluster, ...]
    members: Mapping[ClientKey, Member]
    prior_rank: int
    proposed: int = 0
    """What the last test of K asked for and did not get yet; 0 for nothing."""

    def memberships(self, client: ClientKey) -> tuple[float, ...]:
        """p_k; of a client that nobody knows, the population's."""
        known = self.members.get(client)
        return known.memberships if known is not None else self.population()

    def population(self) -> tuple[float, ...]:
        """pbar."""
        if not self.members:
            return _uniform(len(self.clusters))
        known = [self.members[key] for key in sorted(self.members)]
        return mixture.mean_memberships([m.memberships for m in known], [m.num_examples for m in known])


def initial_state(layout: Layout, settings: Settings) -> MixtureState:
    """Before the first round: every cluster is the base, each an object of its own."""
    return MixtureState(
        round=0,
        clusters=tuple(
            Cluster(
                matrices={name: Factored.zero(*shape) for name, shape in layout.matrices.items()},
                dense={name: np.zeros(shape, dtype=np.float32) for name, shape in layout.dense.items()},
            )
            for _ in range(settings.clusters)
        ),
        members={},
        prior_rank=settings.prior_rank,
    )


def _uniform(number: int) -> tuple[float, ...]:
    return (1.0 / number,) * number


# What a client starts from


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prior:
    """A client's own mixture of the clusters, which it holds frozen."""

    matrices: Mapping[str, Truncated]
    """U_k, V_k"""
    dense: Mapping[str, FloatArray]

    @property
    def error(self) -> float:
        """eps_k: mean over the matrices of what the rank leaves out; 0 without matrices."""
        return statistics.fmean(t.error for t in self.matrices.values()) if self.matrices else 0.0


def prior(state: MixtureState, memberships: Sequence[float]) -> Prior:
    """The mixture of the clusters by these memberships (methods.md 10.2, step 1); equal memberships, equal bits."""
    return Prior(
        matrices={
            name: low_rank.truncate(
                low_rank.mixed([c.matrices[name] for c in state.clusters], memberships), state.prior_rank
            )
            for name in state.clusters[0].matrices
        },
        dense={name: _mixed_dense(state.clusters, memberships, name) for name in state.clusters[0].dense},
    )


def _mixed_dense(clusters: Sequence[Cluster], weights: Sequence[float], name: str) -> FloatArray:
    total = np.zeros(clusters[0].dense[name].shape, dtype=np.float64)
    for cluster, weight in zip(clusters, weights, strict=True):
        total += weight * cluster.dense[name].astype(np.float64)
    return total.astype(np.float32)


def after_priors(state: MixtureState, errors: Sequence[float], settings: Settings) -> MixtureState:
    """The state with twice the rank of the priors, if those of a cohort left out too much."""
    if not errors or statistics.fmean(errors) <= settings.max_prior_error:
        return state
    return replace(state, prior_rank=min(settings.max_prior_rank, 2 * state.prior_rank))


# What a round changes


def aggregate(state: MixtureState, updates: Sequence[Update], *, layout: Layout, settings: Settings) -> MixtureState:
    """The state after a round with these updates, in whatever order they come; the same state without any."""
    if not updates:
        return state
    ordered = sorted(updates, key=lambda update: update.client)
    members = dict(state.members)
    for update in ordered:
        members[update.client] = Member(
            num_examples=update.num_examples,
            memberships=state.memberships(update.client),
            signature=_signature(state, update, layout, settings),
        )
    weights = _weights(ordered, settings)
    clusters = tuple(
        _moved(cluster, ordered, weights, [members[u.client].memberships[j] for u in ordered], settings)
        for j, cluster in enumerate(state.clusters)
    )
    state = replace(state, round=state.round + 1, clusters=clusters, members=members)
    if state.round < settings.mixture_from_round or len(ordered) < settings.min_cohort:
        return state
    return _regrouped(state, settings)


def _weights(updates: Sequence[Update], settings: Settings) -> list[Weight]:
    return weights_of([update.num_examples for update in updates], [_norm(update, settings) for update in updates])


def _norm(update: Update, settings: Settings) -> float:
    parts = [low_rank.pair_norm(pair.left(settings.scale), pair.right) for pair in update.pairs.values()]
    parts += [float(np.linalg.norm(change.astype(np.float64))) for change in update.dense.values()]
    return math.sqrt(math.fsum(part**2 for part in parts))


def _moved(
    cluster: Cluster,
    updates: Sequence[Update],
    weights: Sequence[Weight],
    memberships: Sequence[float],
    settings: Settings,
) -> Cluster:
    """The M-step of one cluster (methods.md 10.2, step 5)."""
    matrices = dict(cluster.matrices)
    for name, matrix in cluster.matrices.items():
        moves = pair_moves(
            [update.pairs.get(name) for update in updates],
            weights,
            memberships,
            num_out=matrix.shape[0],
            scale=settings.scale,
        )
        pairs = [move for move in moves if move is not None]
        if pairs:
            matrices[name] = low_rank.add(matrix, pairs)
    dense = dict(cluster.dense)
    for name, value in cluster.dense.items():
        move = dense_move([update.dense.get(name) for update in updates], weights, memberships)
        if move is not None:
            dense[name] = (value.astype(np.float64) + move).astype(np.float32)
    return Cluster(matrices=matrices, dense=dense)


# Who belongs where


def projection(name: str, num_out: int, num_in: int, seed: int) -> Projection:
    """The fixed projection of one trained tensor in a run."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return Projection.drawn(num_out, num_in, int.from_bytes(digest[:8], "big"))


def _signature(state: MixtureState, update: Update, layout: Layout, settings: Settings) -> Float64s | None:
    """z after this update: of what the client ended with, less what the population's mixture is.

    Not of the update itself: once a client starts from what its own cluster has learnt, its updates no longer say where
    it belongs, and memberships were seen to dissolve again. Until the clusters part the two are the same.
    """
    known = state.members.get(update.client)
    before = known.signature if known is not None else None
    apart = [p - q for p, q in zip(state.memberships(update.client), state.population(), strict=True)]
    z = np.zeros(mixture.DIMENSIONS, dtype=np.float64)
    squared = 0.0
    for name in layout.signature:
        if name in update.pairs:
            pair = update.pairs[name]
            own = low_rank.mixed([cluster.matrices[name] for cluster in state.clusters], apart)
            total = low_rank.add(own, [(pair.left(settings.scale), pair.right)])
            left, right = total.left.astype(np.float64), total.right.astype(np.float64)
            z += projection(name, left.shape[0], right.shape[0], settings.seed).of_pair(left, right)
            squared += low_rank.pair_norm(left, right) ** 2
        elif name in update.dense:
            change = update.dense[name].astype(np.float64) + _mixed_dense(state.clusters, apart, name)
            change = np.atleast_2d(change)
            z += projection(name, change.shape[0], change.shape[1], settings.seed).of_matrix(change)
            squared += float(np.sum(change**2))
    if squared == 0.0:
        return before
    z /= math.sqrt(squared)
    return z if before is None else settings.signature_decay * before + (1.0 - settings.signature_decay) * z


def _regrouped(state: MixtureState, settings: Settings) -> MixtureState:
    """The E-step (methods.md 10.2, step 6): new memberships of all known clients, and at times another K."""
    known = [(key, state.members[key]) for key in sorted(state.members)]
    seen = [(key, member, member.signature) for key, member in known if member.signature is not None]
    points = np.array([signature for _, _, signature in seen])
    old = np.array([member.memberships for _, member, _ in seen])
    present = number = len(state.clusters)
    proposed = state.proposed
    if settings.choose_clusters and (state.round - settings.mixture_from_round) % settings.test_rounds == 0:
        wanted = mixture.best_number(points, present)
        if wanted == present:
            proposed = 0
        elif wanted == proposed:
            number, proposed = wanted, 0
        else:
            proposed = wanted
    if len(points) < number:
        return replace(state, proposed=proposed)
    new = mixture.fit(points, number).memberships
    clusters = state.clusters
    if number == present:
        new = mixture.relabelled(new, old)
        new = mixture.normalised(settings.smoothing * old + (1.0 - settings.smoothing) * new)
    else:
        clusters = _recombined(state.clusters, mixture.transition(new, old))
    found = {key: tuple(row.tolist()) for (key, _, _), row in zip(seen, new, strict=True)}
    everybody = mixture.mean_memberships(list(found.values()), [member.num_examples for _, member, _ in seen])
    return replace(
        state,
        clusters=clusters,
        proposed=proposed,
        members={key: replace(member, memberships=found.get(key, everybody)) for key, member in known},
    )


def _recombined(clusters: Sequence[Cluster], shares: Float64s) -> tuple[Cluster, ...]:
    """G_a <- sum_b R_ab G_b, each an object of its own."""
    return tuple(
        Cluster(
            matrices={
                name: _copy(low_rank.mixed([c.matrices[name] for c in clusters], row)) for name in clusters[0].matrices
            },
            dense={name: _mixed_dense(clusters, row, name) for name in clusters[0].dense},
        )
        for row in (tuple(r) for r in shares.tolist())
    )


def _copy(matrix: Factored) -> Factored:
    return Factored(left=np.array(matrix.left), right=np.array(matrix.right))


# What it costs a client


def trained_values(layout: Layout, settings: Settings, share: float) -> int:
    """How many values a client trains at this share of the rows."""
    pairs = sum(settings.rank * (num_rows(num_out, share) + num_in) for num_out, num_in in layout.matrices.values())
    return pairs + sum(math.prod(shape) for shape in layout.dense.values())


def trained_bytes(layout: Layout, settings: Settings, share: float) -> int:
    """Memory of values, gradients and moments while training; while the rows are scored B's gradient is held whole, but
    neither A's nor any moment."""
    training = TRAINED_BYTES * trained_values(layout, settings, share)
    scoring = sum(4 * settings.rank * (2 * num_out + num_in) for num_out, num_in in layout.matrices.values())
    return max(training, scoring)


def update_bytes(layout: Layout, settings: Settings, share: float, *, int8: bool = False) -> int:
    """Payload of one update: B's rows, A, a bit for every row, the dense tensors; a scale a row at int8."""
    beta, scale = (1, 4) if int8 else (4, 0)
    total = 0
    for num_out, num_in in layout.matrices.values():
        rows = num_rows(num_out, share)
        total += settings.rank * (rows + num_in) * beta + math.ceil(num_out / 8) + scale * (rows + settings.rank)
    for shape in layout.dense.values():
        total += math.prod(shape) * beta + scale * (shape[0] if len(shape) > 1 else 1)
    return total


def prior_bytes(layout: Layout, state: MixtureState) -> int:
    """Payload of one client's prior in fp32."""
    factors = sum(
        min(state.prior_rank, num_out, num_in) * (num_out + num_in) for num_out, num_in in layout.matrices.values()
    )
    return 4 * (factors + sum(math.prod(shape) for shape in layout.dense.values()))


def memberships_table(state: MixtureState) -> Float64s:
    """p of all known clients by ascending key: (clients, K)."""
    return np.array([state.members[key].memberships for key in sorted(state.members)])
