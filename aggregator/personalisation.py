"""How does each client get a model of its own? As its mixture of clusters' states (methods.md 10.2).

With ``mixture.clusters`` above 1 the published state holds every unit once per cluster, under the number
``cluster·CLUSTER_STRIDE + unit``. A client downloads the mixture of them by its memberships, under the plan's own
numbers; it trains and sends as ever. A round's updates are folded once for each cluster, every client's weight times
its membership, so the mean is divided by the membership of those who trained a value. Afterwards the memberships
follow from the clients' projected updates (``mixture.py``).

Of personal pairs (``methods/fedhft_served.py``) the clusters' states are what the weights have changed by, and the
method folds the round itself; who belongs where is found out here.

The number of clusters stays as it is: two populations that turn out to be one cost both clusters a part of their data.

Everything here is a pure function; :class:`Mixture` is written to the ledger with each round.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from fedblocks.aggregator import aggregation, mixture
from fedblocks.aggregator.aggregation import FULL_COVERAGE, AcceptedUpdate, FoldResult, NormHistory
from fedblocks.aggregator.mixture import Float64s, Projection
from fedblocks.aggregator.pairs import linears, pairs_trainable
from fedblocks.aggregator.personal_pairs import trained_pair
from fedblocks.aggregator.plain_mean import OpenUpdate
from fedblocks.profiles.units import CLUSTER_STRIDE, EXTRA_UNIT, Units, personal_pairs, unit_tensors
from fedblocks.protocol.low_rank import pair_norm
from fedblocks.protocol.messages import ClientKey
from fedblocks.protocol.run_config import MixtureSection
from fedblocks.protocol.state import LORA_B
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
        wanted = _signature_units(update, shape)
        own = mixed({n: t for n, t in published.items() if n % CLUSTER_STRIDE in wanted}, apart)
        of_update = _pair_signature if personal_pairs(shape) is not None and EXTRA_UNIT not in wanted else _signatures
        for block, values in of_update(update, wanted, shape, found.seed, own).items():
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


def _signature_units(update: AcceptedUpdate, shape: Units) -> tuple[int, ...]:
    """The units of an update that tell clients apart: of pairs the head if there is one, else the last two layers."""
    if personal_pairs(shape) is None:
        return update.blocks
    return (EXTRA_UNIT,) if EXTRA_UNIT in update.blocks else update.blocks[-2:]


def _pair_signature(
    update: AcceptedUpdate, units: Sequence[int], shape: Units, seed: int, own: State
) -> dict[int, tuple[float, ...]]:
    """The same of the pairs of these layers, as one: ``own + sc·B A``, from the factors; under the last layer's number.

    Args:
        own: changes of the weights.
    """
    scale = pairs_trainable(shape).scaling
    one = OpenUpdate(update, shape)
    z: Float64s = np.zeros(mixture.DIMENSIONS, dtype=np.float64)
    squares: list[float] = []
    for unit in units:
        for pair in linears(shape, unit):
            trained = trained_pair(one, pair, shape)
            assert trained is not None
            left, right = trained.left(scale), trained.right
            name = pair.b.name.removesuffix(LORA_B)
            projection = _projection(f"{unit}.{name}", len(left), len(right), seed)
            z = np.add(z, projection.of_pair(left, right))
            squares.append(pair_norm(left, right) ** 2)
            start = own.get(unit, {}).get(f"{name}.weight")
            if start is not None:
                wide = start.astype(np.float64)
                z = np.add(z, projection.of_matrix(wide))
                squares += [float(np.sum(np.square(wide))), 2 * float(np.sum(np.multiply(wide @ right, left)))]
    squared = math.fsum(squares)
    return {units[-1]: tuple((z / squared**0.5).tolist())} if squared > 0 else {}


def _signatures(
    update: AcceptedUpdate, units: Sequence[int], shape: Units, seed: int, own: State
) -> dict[int, tuple[float, ...]]:
    """Unit -> the projection of what the client ended with, less the population's state, divided by its norm; a unit
    where that is zero is absent.

    Not of the update alone, which no longer says where a client belongs once it starts from its own cluster's state.
    Of a block the out-tensors, of the head the matrix; a slim block's change has zeros beyond its width.

    Args:
        own: the client's state less the population's, as the round started.
    """
    found: dict[int, tuple[float, ...]] = {}
    members = aggregation.by_block([update], [1.0], shape)
    for block in units:
        (member,) = members[block]
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
