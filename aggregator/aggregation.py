"""What does a round change? The coverage-weighted sum of its accepted updates, block by block (methods.md 8.2).

``fold`` is a function of the *set* of updates: it goes through them in ascending client key, accumulates in fp64 with
one multiplication and one addition per value, takes its scalars from ``math.fsum``, and rounds once at the end.
Neither the order of arrival nor a restart can change a bit.
It holds one tensor's accumulator and one tensor of one update at a time, however many clients there are.

Slim blocks are nested, so those who trained a value are those whose width reaches its *segment*: what a width of
``WIDTHS`` has and the one below it has not. Weight, coverage and damping are those of the segment, at most four a
tensor.
"""

from __future__ import annotations

import math
import mmap
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedblocks.profiles.model_shape import WIDTHS, TensorSpec
from fedblocks.profiles.units import Units, unit_parameters, unit_tensors, unit_width
from fedblocks.protocol.messages import AttemptId, ClientKey, Delta, DeltaFormat, TensorHeader
from fedblocks.protocol.tensors import FloatArray, Rows, State, TensorSlot, delta_layout, read_rows

STALENESS_DISCOUNT: Final = 0.6  # rho_s
MAX_STALENESS: Final = 1
#: No client counts for more than this many times the median number of examples.
WEIGHT_CAP: Final = 10
#: Bounds of nova, the correction for unequal numbers of steps (FedNova, 2007.07481; the bounds are ours).
NOVA_MIN, NOVA_MAX = 0.5, 2.0
#: An update whose norm is above this many times the median is scaled down to it.
NORM_CLIP: Final = 3.0
NORM_ROUNDS: Final = 5
#: A block trained by less than this share of the weight moves by less than its mean update.
FULL_COVERAGE: Final = 0.25

NormHistory = Mapping[int, tuple[tuple[float, ...], ...]]
"""Block id -> the norms N_k of its updates in each of the last rounds in which it was trained, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedUpdate:
    """One admitted update: its announcement, and how to read its bytes."""

    client: ClientKey
    attempt_id: AttemptId
    num_examples: int
    steps: int
    staleness: int
    """Published version at the fold minus the version that the update started from."""
    format: DeltaFormat
    density: float
    width: float = 1.0
    """Share of each of its blocks that it trained, one of ``model_shape.WIDTHS``."""
    tensors: tuple[TensorHeader, ...]
    read_payload: Callable[[], memoryview]
    """The spooled bytes; called once or twice per block, so it should map the file instead of reading it."""

    @classmethod
    def of(
        cls, client: ClientKey, delta: Delta, *, version: int, read_payload: Callable[[], memoryview]
    ) -> AcceptedUpdate:
        """The update announced by ``delta``, folded into published ``version``."""
        return cls(
            client=client,
            attempt_id=delta.attempt_id,
            num_examples=delta.num_examples,
            steps=delta.steps,
            staleness=version - delta.version,
            format=delta.format,
            density=delta.density,
            width=delta.width,
            tensors=delta.tensors,
            read_payload=read_payload,
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that it trained, ascending."""
        return tuple(sorted({header.block for header in self.tensors}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipped:
    """An update's block that was scaled down, and by how much."""

    client: ClientKey
    block: int
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldResult:
    """What the round's updates amount to."""

    aggregate: State
    """Only the blocks that somebody trained; the others stay untouched."""
    coverage: Mapping[int, float]
    """Share of the accepted weight that trained each block of ``aggregate``, at whatever width; a missing block has
    none."""
    segment_coverage: Mapping[int, tuple[float, ...]]
    """Block id -> the same for each of ``WIDTHS``: the share that trained at this width or a larger one, 0 where nobody
    did."""
    history: NormHistory
    """To be handed to the next fold."""
    weights: Mapping[ClientKey, float]
    """w_k; the sum, where two updates of one client were folded."""
    clipped: tuple[Clipped, ...]

    @property
    def widths(self) -> dict[int, float]:
        """Block id -> the largest width that somebody trained: nobody trained what lies beyond."""
        return {
            block: max(width for width, share in zip(WIDTHS, shares, strict=True) if share > 0)
            for block, shares in self.segment_coverage.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One update's part in one block."""

    update: AcceptedUpdate
    weight: float
    slots: Mapping[str, TensorSlot]

    def rows(self, payload: memoryview, name: str) -> Rows:
        """The rows of this tensor in the update's payload."""
        slot = self.slots[name]
        return read_rows(
            slot.spec, slot.rows_sent, slot.of(payload), format=self.update.format, density=self.update.density
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The values that this width has and the next smaller one that was trained has not, and what divides their sum."""

    width: float
    weight: float
    """den: of all who trained them."""
    damping: float


def map_payload(path: Path) -> memoryview:
    """A spooled payload as a mapping of its file: pages are read when touched and cost no memory of the process."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class Combine(Protocol):
    """How the members of a block become one whole tensor of it; a function of their set, in fp64, rounded once."""

    def __call__(
        self,
        members: Sequence[Member],
        factors: Sequence[float],
        block: int,
        spec: TensorSpec,
        shape: Units,
        segments: Sequence[Segment],
    ) -> FloatArray:
        """What nobody trained is 0.

        Args:
            members: in ascending client key.
            factors: of each, its weight times its corrections.
            segments: those that somebody trained, the narrowest first.
        """
        ...


def fold(
    updates: Sequence[AcceptedUpdate],
    *,
    shape: Units,
    history: NormHistory | None = None,
    combine: Combine | None = None,
    shares: Mapping[ClientKey, float] | None = None,
) -> FoldResult:
    """The mean update of every block that somebody trained, weighted unless ``combine`` says otherwise.

    Args:
        updates: in any order; a repeated (client, attempt) counts once. None at all gives an empty aggregate.
        history: the norms of earlier rounds, as returned by the last fold.
        shares: factors on the clients' weights, above 0; default: 1 for everybody.

    Raises:
        RemoteProtocolError: a spooled payload is not what was admitted.
    """
    ordered = in_order(updates)
    weights = _weights(ordered)
    if shares is not None:
        weights = [weight * shares[update.client] for update, weight in zip(ordered, weights, strict=True)]
    accepted_weight = math.fsum(weights)
    members = by_block(ordered, weights, shape)
    norms = dict(history or {})
    aggregate: State = {}
    segment_coverage: dict[int, tuple[float, ...]] = {}
    clipped: list[Clipped] = []
    for block in sorted(members):
        trained = members[block]
        novas = _step_corrections(trained)
        found = [_norm(member, block, nova, shape) for member, nova in zip(trained, novas, strict=True)]
        clips = _clips(found, norms.get(block, ()))
        norms[block] = (*norms.get(block, ()), tuple(found))[-NORM_ROUNDS:]
        clipped += [
            Clipped(client=member.update.client, block=block, factor=clip)
            for member, clip in zip(trained, clips, strict=True)
            if clip < 1
        ]
        factors = [m.weight * nova * clip for m, nova, clip in zip(trained, novas, clips, strict=True)]
        segments, segment_coverage[block] = segments_of(trained, block, shape, accepted_weight)
        aggregate[block] = {
            spec.name: (combine or weighted_mean)(trained, factors, block, spec, shape, segments)
            for spec in unit_tensors(shape, block)
        }
    by_client: dict[ClientKey, float] = {}
    for update, weight in zip(ordered, weights, strict=True):
        by_client[update.client] = by_client.get(update.client, 0.0) + weight
    return FoldResult(
        aggregate=aggregate,
        coverage={block: shares[0] for block, shares in segment_coverage.items()},
        segment_coverage=segment_coverage,
        history=norms,
        weights=by_client,
        clipped=tuple(clipped),
    )


def in_order(updates: Sequence[AcceptedUpdate]) -> list[AcceptedUpdate]:
    """Each (client, attempt) once, in ascending client key: the order of arrival is forgotten here."""
    unique = {(update.client, update.attempt_id): update for update in updates}
    return [unique[key] for key in sorted(unique)]


def by_block(ordered: Sequence[AcceptedUpdate], weights: Sequence[float], shape: Units) -> dict[int, list[Member]]:
    """Who trained each block, in the order of ``ordered``.

    Raises:
        RemoteProtocolError: an update is not what was admitted.
    """
    members: dict[int, list[Member]] = {}
    for update, weight in zip(ordered, weights, strict=True):
        layout = delta_layout(
            update.tensors,
            shape=shape,
            blocks=update.blocks,
            format=update.format,
            density=update.density,
            width=update.width,
        )
        for block in update.blocks:
            slots = {slot.spec.name: slot for slot in layout.slots if slot.block == block}
            members.setdefault(block, []).append(Member(update=update, weight=weight, slots=slots))
    return members


def segments_of(
    trained: Sequence[Member], block: int, shape: Units, accepted_weight: float
) -> tuple[list[Segment], tuple[float, ...]]:
    """The segments of a block that somebody trained, and the share of the accepted weight at each of ``WIDTHS``."""
    width_of = [unit_width(shape, block, m.update.width) for m in trained]
    trained_by = {
        width: math.fsum(m.weight for m, own in zip(trained, width_of, strict=True) if own >= width) for width in WIDTHS
    }
    segments = [
        Segment(
            width=width,
            weight=trained_by[width],
            damping=min(1.0, trained_by[width] / accepted_weight / FULL_COVERAGE),
        )
        for width in sorted(set(width_of))
    ]
    return segments, tuple(weight / accepted_weight for weight in trained_by.values())


def _weights(updates: Sequence[AcceptedUpdate]) -> list[float]:
    """w_k = min(n_k, 10·median n)·0.6^staleness."""
    if not updates:
        return []
    most = WEIGHT_CAP * statistics.median(update.num_examples for update in updates)
    return [min(u.num_examples, most) * STALENESS_DISCOUNT**u.staleness for u in updates]


def _step_corrections(members: Sequence[Member]) -> list[float]:
    """nova_k = clip(tbar / tau_k, 0.5, 2): who took more steps than the mean counts less per step."""
    mean_steps = math.fsum(m.weight * m.update.steps for m in members) / math.fsum(m.weight for m in members)
    return [min(NOVA_MAX, max(NOVA_MIN, mean_steps / m.update.steps)) for m in members]


def _norm(member: Member, block: int, nova: float, shape: Units) -> float:
    """N_k = |xhat|·nova / sqrt(number of parameters that it trained)."""
    payload = member.update.read_payload()
    squares = [member.rows(payload, spec.name).sum_of_squares() for spec in unit_tensors(shape, block)]
    return math.sqrt(math.fsum(squares)) * nova / math.sqrt(unit_parameters(shape, block, member.update.width))


def _clips(norms: Sequence[float], earlier: Sequence[Sequence[float]]) -> list[float]:
    """min(1, 3·med / N_k); med over this round from three updates on, else over the last rounds, else unbounded.

    Updates that change nothing have no say in the median: two idle clients would otherwise silence a third.
    """
    pool = list(norms) if len(norms) >= 3 else [norm for one_round in earlier for norm in one_round]
    positive = [norm for norm in pool if norm > 0]
    if not positive:
        return [1.0] * len(norms)
    most = NORM_CLIP * statistics.median(positive)
    return [min(1.0, most / norm) if norm > 0 else 1.0 for norm in norms]


def weighted_mean(
    members: Sequence[Member],
    factors: Sequence[float],
    block: int,
    spec: TensorSpec,
    shape: Units,
    segments: Sequence[Segment],
) -> FloatArray:
    """damp·num/den of one whole tensor: den counts all who trained a value, whether or not they sent its row; what
    nobody trained is 0 (methods.md 8.2)."""
    numerator = weighted_sum(members, factors, spec)
    for segment, rectangles in zip(segments, rectangles_of(segments, block, spec, shape), strict=True):
        for rectangle in rectangles:
            numerator[rectangle] *= segment.damping
            numerator[rectangle] /= segment.weight
    return numerator.astype(np.float32).reshape(spec.shape)


def weighted_sum(members: Sequence[Member], factors: Sequence[float], spec: TensorSpec) -> NDArray[np.float64]:
    """The sum of factor·xhat, ``(R, C)`` of the whole tensor."""
    total = np.zeros(spec.rows_cols, dtype=np.float64)
    for member, factor in zip(members, factors, strict=True):
        for rows in member.rows(member.update.read_payload(), spec.name).chunks():
            coefficients = rows.scales.astype(np.float64) * factor  # (k,)
            slim = total[:, : rows.values.shape[1]]
            slim[rows.place] += rows.values * coefficients[:, None]
    return total


def rectangles_of(
    segments: Sequence[Segment], block: int, spec: TensorSpec, shape: Units
) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Where each segment lies in a whole tensor ``(R, C)``: the rows below the segment before it, and the columns
    beside that."""
    inner_rows = inner_cols = 0
    for segment in segments:
        num_rows, num_cols = _rows_cols(shape, block, segment.width, spec.name)
        yield (slice(inner_rows, num_rows), slice(0, num_cols)), (slice(0, inner_rows), slice(inner_cols, num_cols))
        inner_rows, inner_cols = num_rows, num_cols


def _rows_cols(shape: Units, block: int, width: float, name: str) -> tuple[int, int]:
    return next(spec.rows_cols for spec in unit_tensors(shape, block, width) if spec.name == name)
