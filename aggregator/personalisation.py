"""How does each client get expanded blocks of its own? As its mixture of clusters' states (methods.md 10.2).

With ``mixture.clusters`` above 1 the published state holds every unit once per cluster, under the number
``cluster·CLUSTER_STRIDE + unit``. A client downloads the mixture of them by its memberships, under the plan's own
numbers; it trains and sends as ever. A round's updates are folded once for each cluster, every client's weight times
its membership, so the mean is divided by the membership of those who trained a value. Afterwards the memberships
follow from the clients' projected updates (``mixture.py``).

The number of clusters stays as it is: two populations that turn out to be one cost both clusters a part of their data.

Everything here is a pure function; :class:`Mixture` is written to the ledger with each round.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from fedblocks.aggregator import aggregation, mixture
from fedblocks.aggregator.aggregation import FULL_COVERAGE, AcceptedUpdate, FoldResult, NormHistory
from fedblocks.aggregator.mixture import Float64s, Projection
from fedblocks.profiles.units import CLUSTER_STRIDE, EXTRA_UNIT, Units, unit_tensors
from fedblocks.protocol.messages import ClientKey
from fedblocks.protocol.run_config import MixtureSection
from fedblocks.protocol.tensors import FloatArray, State

#: Share of the old memberships that stays, and of a client's old projected update.
SMOOTHING, SIGNATURE_DECAY = 0.5, 0.5
#: A smaller membership would leave a cluster without any weight to divide by.
LEAST_MEMBERSHIP: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a client's updates of one block look like, projected; a mean over its rounds."""

    block: int
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What is known of one client."""

    client: ClientKey
    num_examples: int
    memberships: tuple[float, ...]
    """One of each cluster; they sum to 1."""
    signatures: tuple[Signature, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Who belongs where, after the newest round; in size a few kB for each client."""

    clusters: int
    from_round: int
    min_clients: int
    seed: int
    rounds: int = 0
    """Rounds with updates so far."""
    members: tuple[Member, ...] = ()
    """By ascending key."""

    def memberships(self, client: ClientKey) -> tuple[float, ...]:
        """p_k; of a client that nobody knows, the population's."""
        return next((m.memberships for m in self.members if m.client == client), self.population())

    def population(self) -> tuple[float, ...]:
        """pbar: the mean of the clients, by examples."""
        if not self.members:
            return (1.0 / self.clusters,) * self.clusters
        return mixture.mean_memberships([m.memberships for m in self.members], [m.num_examples for m in self.members])

    def news(self, before: Mixture | None) -> bool:
        """True if some client belongs elsewhere than before, first of all once they are told apart."""
        old = before.sizes if before is not None and before.rounds >= before.from_round else ()
        return self.rounds >= self.from_round and self.sizes != old

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many clients belong to each cluster more than to any other."""
        found = Counter(int(np.argmax(m.memberships)) for m in self.members)
        return tuple(found[j] for j in range(self.clusters))


def initial_mixture(section: MixtureSection, seed: int) -> Mixture | None:
    """Before the first round; None where one model is everybody's."""
    if section.clusters == 1:
        return None
    return Mixture(clusters=section.clusters, from_round=section.from_round, min_clients=section.min_clients, seed=seed)


def published_ids(blocks: Sequence[int], found: Mixture | None) -> tuple[int, ...]:
    """The numbers under which the published state holds the plan's blocks."""
    return tuple(
        cluster * CLUSTER_STRIDE + block for cluster in range(found.clusters if found else 1) for block in blocks
    )


def cluster_state(published: State, cluster: int) -> State:
    """One cluster's blocks under the plan's own numbers."""
    return {
        number % CLUSTER_STRIDE: tensors for number, tensors in published.items() if number // CLUSTER_STRIDE == cluster
    }


def mixed(published: State, memberships: Sequence[float]) -> State:
    """One client's state, under the plan's own numbers: the clusters' weighted by its memberships, rounded once."""
    blocks = sorted({number % CLUSTER_STRIDE for number in published})
    state: State = {}
    for block in blocks:
        copies = [published.get(cluster * CLUSTER_STRIDE + block, {}) for cluster in range(len(memberships))]
        state[block] = {
            name: _weighted([copy.get(name) for copy in copies], memberships)
            for name in dict.fromkeys(name for copy in copies for name in copy)
        }
    return state


def _weighted(copies: Sequence[FloatArray | None], weights: Sequence[float]) -> FloatArray:
    shape = next(copy.shape for copy in copies if copy is not None)
    total = np.zeros(shape, dtype=np.float64)
    for copy, weight in zip(copies, weights, strict=True):
        if copy is not None:
            total += copy.astype(np.float64) * weight
    return total.astype(np.float32)


def fold(updates: Sequence[AcceptedUpdate], *, shape: Units, history: NormHistory, found: Mixture) -> FoldResult:
    """One change for every block of every cluster; coverage, norms and weights are those of all updates together."""
    whole = aggregation.fold(updates, shape=shape, history=history)
    aggregate: State = {}
    segments: dict[int, tuple[float, ...]] = {}
    for cluster in range(found.clusters):
        shares = {u.client: max(LEAST_MEMBERSHIP, found.memberships(u.client)[cluster]) for u in updates}
        folded = aggregation.fold(updates, shape=shape, history=history, shares=shares)
        damping = np.float32(_damping(folded.weights, shares))
        for block, tensors in folded.aggregate.items():
            number = cluster * CLUSTER_STRIDE + block
            aggregate[number] = {name: np.multiply(value, damping) for name, value in tensors.items()}
            segments[number] = folded.segment_coverage[block]
    return replace(whole, aggregate=aggregate, segment_coverage=segments)


def _damping(weights: Mapping[ClientKey, float], shares: Mapping[ClientKey, float]) -> float:
    """min(1, c / 0.25), c the mean membership of those who trained, weighted by that membership (ours).

    A cluster none of whose members took part would otherwise move as far as the others' members do.
    """
    total = sum(weights[client] for client in sorted(weights))
    if total == 0:
        return 1.0
    mean = sum(weights[client] * shares[client] for client in sorted(weights)) / total
    return min(1.0, mean / FULL_COVERAGE)


def regrouped(found: Mixture, updates: Sequence[AcceptedUpdate], *, shape: Units, published: State) -> Mixture:
    """After a round: the updates' signatures, and from ``from_round`` on new memberships of all known clients.

    The mixture is fitted to one unit, since what different ones were taught cannot be compared: to the head if the run
    has one, else to the block that most clients have trained, of equal ones the highest. Clients that never trained it
    belong where the population does.

    Args:
        published: the state that the round started from.
    """
    if not updates:
        return found
    everybody = found.population()
    members = {member.client: member for member in found.members}
    for update in aggregation.in_order(updates):
        before = members.get(update.client)
        known = {s.block: s.values for s in before.signatures} if before is not None else {}
        apart = [p - q for p, q in zip(found.memberships(update.client), everybody, strict=True)]
        for block, values in _signatures(update, shape, found.seed, mixed(published, apart)).items():
            old = known.get(block)
            known[block] = values if old is None else _decayed(old, values)
        members[update.client] = Member(
            client=update.client,
            num_examples=update.num_examples,
            memberships=found.memberships(update.client),
            signatures=tuple(Signature(block=b, values=known[b]) for b in sorted(known)),
        )
    ordered = tuple(members[key] for key in sorted(members))
    found = replace(found, rounds=found.rounds + 1, members=ordered)
    return _fitted(found) if found.rounds >= found.from_round else found


def _decayed(old: Sequence[float], new: Sequence[float]) -> tuple[float, ...]:
    return tuple(SIGNATURE_DECAY * a + (1.0 - SIGNATURE_DECAY) * b for a, b in zip(old, new, strict=True))


def _fitted(found: Mixture) -> Mixture:
    trained = Counter(s.block for member in found.members for s in member.signatures)
    if not trained:
        return found
    block = max(trained, key=lambda b: (b == EXTRA_UNIT, trained[b], b))
    if trained[block] < max(found.min_clients, found.clusters):
        return found
    points = {m.client: s.values for m in found.members for s in m.signatures if s.block == block}
    seen = [member for member in found.members if member.client in points]
    old = np.array([member.memberships for member in seen])
    new = mixture.fit(np.array([points[member.client] for member in seen]), found.clusters).memberships
    smoothed = mixture.normalised(SMOOTHING * old + (1.0 - SMOOTHING) * mixture.relabelled(new, old))
    table = {member.client: tuple(row.tolist()) for member, row in zip(seen, smoothed, strict=True)}
    everybody = mixture.mean_memberships(list(table.values()), [member.num_examples for member in seen])
    return replace(
        found,
        members=tuple(replace(m, memberships=table.get(m.client, everybody)) for m in found.members),
    )


def _signatures(update: AcceptedUpdate, shape: Units, seed: int, own: State) -> dict[int, tuple[float, ...]]:
    """Unit -> the projection of what the client ended with, less the population's state, divided by its norm; a unit
    where that is zero is absent.

    Not of the update alone, which no longer says where a client belongs once it starts from its own cluster's state.
    Of a block the out-tensors, of the head the matrix; a slim block's change has zeros beyond its width.

    Args:
        own: the client's state less the population's, as the round started.
    """
    found: dict[int, tuple[float, ...]] = {}
    members = aggregation.by_block([update], [1.0], shape)
    for block, (member,) in members.items():
        payload = update.read_payload()
        z: Float64s = np.zeros(mixture.DIMENSIONS, dtype=np.float64)
        squared = 0.0
        for spec in unit_tensors(shape, block):
            if len(spec.shape) != 2 or not (spec.is_out or block == EXTRA_UNIT):
                continue
            start = own.get(block, {}).get(spec.name)
            ended = np.zeros(spec.shape, dtype=np.float64) if start is None else start.astype(np.float64)
            for chunk in member.rows(payload, spec.name).chunks():
                values = np.multiply(chunk.values.astype(np.float64), chunk.scales.astype(np.float64)[:, None])
                ended[chunk.index, : values.shape[1]] += values
            z = np.add(z, _projection(spec.name, *spec.shape, seed).of_matrix(ended))
            squared += float(np.sum(np.square(ended)))
        if squared > 0:
            found[block] = tuple((z / squared**0.5).tolist())
    return found


def _projection(name: str, num_out: int, num_in: int, seed: int) -> Projection:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return Projection.drawn(num_out, num_in, int.from_bytes(digest[:8], "big"))
