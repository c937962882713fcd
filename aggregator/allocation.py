"""Which client trains which blocks in this round, for how many steps, and why?

``plan_round`` is pure and deterministic: measured profiles, the shape of the model and what has been covered so far in;
one :class:`Choice` per client out, with its prediction, its limits and what was refused.

Clients are served weakest first. For each one the search enumerates the lowest block ``a`` and adds the blocks above
it in the order of their value: for a fixed ``a`` every further block costs the same, so taking the most valuable first
is optimal and the enumeration is exact (docs/methods.md 6.4). So it does for each width of block that the run allows: a
slim block costs less memory, time and bytes, and trains only its first heads and neurons (methods.md 3).
Along such a branch time and memory only grow, so that its last set that fits is found by bisection.
Planned coverage is booked at once, so that stronger clients fill the gaps that weaker ones leave.
Each option is predicted in the best mode that fits (``profiles/cost.py``): smaller passes, recomputed activations,
frozen layers decoded at each use and 8-bit moments save memory and leave the weights exact.
What is given up when nothing of that helps: blocks and width, then steps (halved down to four), then training itself
(evaluate, else rest).

Where a method asks for everything at once (policy ``whole``), the only options are all blocks, at each width.

``fitted`` is the usual policy; the others (``run_config.Policy``) exist to be compared with it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Final, Literal, NamedTuple, TypeVar, overload

from typing_extensions import assert_never

from fedblocks.aggregator.coverage import Coverage, Segments
from fedblocks.profiles.cost import (
    AS_PROFILED,
    MEMORY_SAFETY,
    ExecutionMode,
    ModeSearch,
    OptimizerMode,
    StackLayout,
    StepParts,
    TimeFactors,
    Workload,
    fill_time,
    measure_memory,
    measure_time,
    step_parts,
    unit_bytes,
)
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.model_shape import WIDTHS, ModelShape
from fedblocks.profiles.units import (
    BaseTensors,
    ExpandedBlocks,
    LowRankPairs,
    MergedLinears,
    PersonalPairs,
    TrainedUnits,
    Units,
    unit_parameters,
)
from fedblocks.protocol.messages import ClientKey, DataStatistics, DeltaFormat
from fedblocks.protocol.run_config import Policy

_T = TypeVar("_T")
Role = Literal["train", "evaluate", "rest"]
Limit = Literal["deadline", "memory"]
Binding = Literal["deadline", "memory", "none"]
What = Literal["block", "layer", "pairs of layer"]
"""What the numbers of a choice are of, in words."""

#: Every predicted duration is multiplied by this before it is compared (methods.md 6.1).
TIME_SAFETY: Final = 1.15
#: Steps below which halving is given up (methods.md 6.4).
MIN_STEPS: Final = 4
#: Weight of the newest value in a running mean (methods.md 6.1, 6.3).
EMA: Final = 0.3
#: The deadline is this times the quantile of the clients' times for the top block (methods.md 6.5).
DEADLINE_FACTOR: Final = 1.25
DEADLINE_QUANTILE: Final = 0.8
#: Rounds between two computations of the deadline, and the largest change at once (methods.md 6.5).
DEADLINE_EVERY_ROUNDS: Final = 5
DEADLINE_MAX_CHANGE: Final = 0.2
#: A device whose speed was last measured longer ago is given nothing to train (methods.md 6.7).
MAX_SPEED_AGE_S: Final = 7 * 86400.0
#: Mode searches that are kept during a plan: devices with the same rates and the same work share one.
KEPT_SEARCHES: Final = 256
#: More numbers in a row than that are told as a range.
MOST_LISTED: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationSettings:
    """The part of the run's configuration that a plan depends on."""

    steps: int = 16
    batch_size: int = 8
    anchor_batch_size: int = 4
    anchor_tokens: int = 256
    """Tokens of the longest anchor sequence."""
    anchor_sequences: int = 448
    """Sequences of the anchor set that train; what is not cached yet costs a first pass."""
    anchor_every: int = 1
    keeps_start: bool = False
    """There is a proximal term."""
    measure_sequences: int = 8
    """Anchor sequences on which a client measures the published state before it trains."""
    delta_format: DeltaFormat = "int8"
    delta_density: float = 0.25
    down_density: float = 0.25
    deadline_s: float = 0.0
    """The user's deadline; 0: computed."""
    debt_weight: float = 1.0
    """beta of methods.md 6.3."""
    rarity_weight: float = 0.0
    """gamma of methods.md 6.3; 0: topic histograms are not looked at."""
    widths: tuple[float, ...] = (1.0,)
    """Widths of block that may be assigned, ascending (``model_shape.WIDTHS``)."""
    policy: Policy = "fitted"
    seed: int = 0
    """Of the policy ``random``."""
    optimizers: tuple[OptimizerMode, ...] = ("fp32", "split", "split_8bit")
    """How trained values and their moments may be stored; without ``split_8bit`` all moments are exact too."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "anchor_tokens", "anchor_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"allocation: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("anchor_batch_size", "anchor_sequences", "measure_sequences", "deadline_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"allocation: {name} is {getattr(self, name)}, expected 0 or more")
        for name in ("debt_weight", "rarity_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"allocation: {name} is {getattr(self, name)}, expected 0 or more")
        if not self.widths or list(self.widths) != sorted(set(self.widths)) or not set(self.widths) <= set(WIDTHS):
            known = ", ".join(map(str, WIDTHS))
            raise ValueError(f"allocation: widths are {self.widths}, expected some of {known}, ascending")


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationClient:
    """What the planner knows of one client that is there."""

    key: ClientKey
    name: str
    profile: DeviceProfile
    statistics: DataStatistics
    gradient_energy: Mapping[int, float] = field(default_factory=dict[int, float])
    """Block id -> running mean of the reported gradient energy (:func:`running_mean`); unseen blocks are absent."""
    time_scale: float = 1.0
    """Factor on all predicted seconds, transfers left out (``profiles/calibration.py``)."""
    time_factors: TimeFactors = AS_PROFILED
    """Further factors, by what the seconds are spent on."""
    memory_scale: float = 1.0
    """Factor on the predicted memory above R: 1.25 after each task that ran out of memory."""
    versions_behind: int = 1
    """Published versions that the client lacks: what it must download first."""
    cached_examples: int = 0
    """Examples whose prefix is cached on the client."""
    cached_anchor_sequences: int = 0
    wants_evaluate_general: bool = False
    """The site measures the general validation file."""
    speed_age_s: float = 0.0
    """Seconds since its device was last measured, by the probe or by a task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """Seconds from the assignment to the end of the upload, and the round that computed them."""

    seconds: float
    computed_round: int
    source: Literal["user", "computed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What an option costs; seconds and memory contain their safety factors and corrections."""

    seconds: float
    step_s: float
    """One step, without the safety factor: the pace that a device of this profile keeps."""
    upload_bytes: int
    download_bytes: int
    memory_bytes: int
    largest_memory: str
    """The term of the memory model that takes the most."""
    mode: ExecutionMode
    """How the work is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the prediction was held against."""

    deadline_s: float
    memory_bytes: int
    """R plus :data:`MEMORY_SAFETY` of the memory above it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueParts:
    """Where the value of the chosen blocks comes from; rarity is 0 unless topic histograms are shared and weighed."""

    gain: float = 0.0
    debt: float = 0.0
    rarity: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """An option that does not fit."""

    blocks: tuple[int, ...]
    width: float
    steps: int
    reason: Limit
    excess: float
    """Seconds (deadline) or bytes (memory) above the limit."""
    fits_with_more_time: bool
    """A later deadline, or fewer steps, would let it fit: true of every deadline, and where memory forbids only the
    modes that are fast enough."""
    what: What = "block"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """The most wanted option that was not taken."""

    blocks: tuple[int, ...]
    width: float
    steps: int
    mode: ExecutionMode
    """The best for these blocks if there were no limit."""
    value: float
    why_not: str
    limit: Binding
    """What stands against it; none: it fits, and is worth less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One client's part in the round, and the reasons for it."""

    client: ClientKey
    name: str
    round: int
    role: Role
    blocks: tuple[int, ...]
    """Ascending ids; empty unless the role is train."""
    width: float
    """Share of each of them that trains."""
    steps: int
    batch_size: int
    predicted: Prediction | None
    """None for a client that rests."""
    limits: Limits
    value: float
    parts: ValueParts
    binding: Binding
    runner_up: RunnerUp | None
    refused: tuple[Refused, ...]
    reason: str
    """Why a client that does not train does not; empty for one that does."""
    what: What = "block"

    @property
    def mode(self) -> ExecutionMode | None:
        """How a client that trains does it."""
        return self.predicted.mode if self.predicted is not None and self.role == "train" else None

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass; 0 without training."""
        return self.mode.micro_batch_size if self.mode is not None else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """The whole round; choices in ascending order of client keys."""

    round: int
    deadline: Deadline
    choices: tuple[Choice, ...]
    coverage: Coverage
    """Coverage as it will stand if every planned update is accepted, before decay."""
    no_client_fits: str = ""
    """Why the round must not be opened: nobody can train anything; the nearest miss and its limit."""


def running_mean(old: float | None, new: float) -> float:
    """0.3·new + 0.7·old; ``new`` where there is no old value."""
    return new if old is None else EMA * new + (1 - EMA) * old


def plan_round(
    clients: Sequence[AllocationClient],
    *,
    layout: StackLayout,
    shape: ModelShape,
    settings: AllocationSettings,
    coverage: Coverage,
    round: int,
    deadline: Deadline | None = None,
) -> RoundPlan:
    """Plans one round for the clients that are there.

    Args:
        clients: in any order; keys are unique.
        layout: where the expanded blocks stand.
        coverage: before this round (:meth:`Coverage.after_round` of the previous one).
        deadline: the previous round's; kept for five rounds, then moved by at most a fifth.

    Raises:
        ValueError: no client, or the same key twice.
    """
    if not clients or len({client.key for client in clients}) != len(clients):
        raise ValueError(f"plan of round {round}: {len(clients)} clients, expected at least one and each key only once")
    problem = _Problem(layout=layout, shape=shape, settings=settings, round=round, num_clients=len(clients))
    slowness = {client.key: problem.seconds_of_top_block(client) for client in clients if _is_assignable(client)}
    deadline = next_deadline(deadline, settings=settings, seconds=tuple(slowness.values()), round=round)
    gains = relative_gains(clients, layout.blocks)
    planned = coverage
    choices: dict[ClientKey, Choice] = {}
    everybody = (
        _Part(blocks=tuple(sorted(layout.blocks)), steps=settings.steps) if settings.policy == "uniform" else None
    )
    for client in sorted(clients, key=lambda c: (-slowness.get(c.key, math.inf), c.key)):
        choice = problem.choose(client, deadline.seconds, planned, gains[client.key], everybody)
        choices[client.key] = choice
        if choice.role == "train":
            data = client.statistics
            planned = planned.adding(choice.blocks, data.num_examples, data.topics, choice.width)
            if settings.policy == "weakest" and everybody is None:
                everybody = _Part(blocks=choice.blocks, width=choice.width, steps=choice.steps)
    ordered = tuple(choices[key] for key in sorted(choices))
    return RoundPlan(
        round=round,
        deadline=deadline,
        choices=ordered,
        coverage=planned,
        no_client_fits="" if any(c.role == "train" for c in ordered) else _nearest_miss(ordered),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledSeconds:
    """What a client's profile alone predicts for a task: its report is held against it."""

    step: StepParts
    prefix_s: float
    measuring_s: float


def profiled_seconds(
    client: AllocationClient,
    *,
    layout: StackLayout,
    shape: ModelShape,
    settings: AllocationSettings,
    blocks: tuple[int, ...],
    width: float,
    steps: int,
    mode: ExecutionMode,
) -> ProfiledSeconds:
    """The seconds of a task as the planner counts them, without what the client's own steps have shown.

    Args:
        mode: how the client carried it out.
    """
    work = _Problem(layout=layout, shape=shape, settings=settings, round=0).workload(client, steps)
    return ProfiledSeconds(
        step=step_parts(client.profile, shape, layout, blocks, work, mode, width),
        prefix_s=fill_time(client.profile, shape, layout, work, mode.residency),
        measuring_s=measure_time(client.profile, shape, layout, work),
    )


def objective(
    blocks_of: Mapping[ClientKey, Iterable[int]],
    clients: Sequence[AllocationClient],
    *,
    blocks: Sequence[int],
    settings: AllocationSettings,
    coverage: Coverage,
) -> float:
    """J of methods.md 6.4 for whole blocks, what the sequential rule approximates: the higher, the better the plan.

    Gains and rarities of what each client trains, and beta·N times the debts (of the round's start) of the blocks that
    are trained, each counted in full once a mean client's examples have gone into it.

    Args:
        blocks_of: what each client trains; clients that do not train may be absent.
        clients: the cohort, N of them.
        blocks: ids of all expanded blocks.
        coverage: at the start of the round.
    """
    gains = relative_gains(clients, blocks)
    examples = {client.key: client.statistics.num_examples for client in clients}
    mean_examples = math.fsum(examples.values()) / len(clients)
    trained = dict.fromkeys(blocks, 0)
    own: list[float] = []
    for client in clients:
        for block in blocks_of.get(client.key, ()):
            trained[block] += examples[client.key]
            own.append(gains[client.key][block] + _rarity(settings, coverage, client, block))
    covered = math.fsum(
        coverage.debts(block)[-1] * min(1.0, trained[block] / mean_examples) for block in blocks if trained[block] > 0
    )
    return math.fsum(own) + settings.debt_weight * len(clients) * covered


def feasible_sets(
    client: AllocationClient,
    *,
    layout: StackLayout,
    shape: ModelShape,
    settings: AllocationSettings,
    deadline_s: float,
    steps: int,
    width: float = 1.0,
) -> tuple[tuple[int, ...], ...]:
    """Every set of blocks that the client can train within its limits, by the planner's own predictions.

    All 2^M - 1 are asked about: for holding a plan against the best one, not for planning.
    """
    problem = _Problem(layout=layout, shape=shape, settings=settings, round=0)
    candidate = _Candidate(problem, client, steps, problem.limits(client, deadline_s))
    sizes = range(1, len(layout.blocks) + 1)
    every = (chosen for size in sizes for chosen in combinations(sorted(layout.blocks), size))
    return tuple(chosen for chosen in every if candidate.fits(chosen, width))


def cannot_train(
    client: AllocationClient,
    block: int,
    *,
    layout: StackLayout,
    shape: ModelShape,
    settings: AllocationSettings,
    deadline_s: float,
) -> str:
    """What keeps the client from training this block alone, at the smallest width and with as few steps as are ever
    asked for; empty if nothing does."""
    if not _is_assignable(client):
        return f"{client.name} has no training examples, or was measured too long ago"
    steps = settings.steps
    while steps // 2 >= MIN_STEPS:
        steps //= 2
    problem = _Problem(layout=layout, shape=shape, settings=settings, round=0)
    candidate = _Candidate(problem, client, steps, problem.limits(client, deadline_s))
    if candidate.fits((block,), settings.widths[0]):
        return ""
    return f"{client.name}: {_refused_text(candidate.refusal((block,), settings.widths[0]))}"


def step_seconds(
    client: AllocationClient, block: int, *, layout: StackLayout, shape: ModelShape, settings: AllocationSettings
) -> float:
    """One step on this block alone, whole, in the fastest mode, as the planner counts it."""
    problem = _Problem(layout=layout, shape=shape, settings=settings, round=0)
    candidate = _Candidate(problem, client, settings.steps, problem.limits(client, math.inf))
    return candidate.prediction((block,), candidate.free_mode((block,), 1.0), 1.0).step_s


def _is_assignable(client: AllocationClient) -> bool:
    return client.statistics.num_examples > 0 and client.speed_age_s <= MAX_SPEED_AGE_S


def _rarity(settings: AllocationSettings, coverage: Coverage, client: AllocationClient, block: int) -> float:
    """gamma·rare; nothing is computed where the weight is 0."""
    if settings.rarity_weight == 0:
        return 0.0
    return settings.rarity_weight * coverage.rarity(block, client.statistics.topics)


def next_deadline(
    previous: Deadline | None, *, settings: AllocationSettings, seconds: Sequence[float], round: int
) -> Deadline:
    """The deadline of a round (methods.md 6.5): the user's, or 1.25 times the 0.8 quantile of ``seconds``.

    Args:
        previous: kept until five rounds have passed, then changed by at most 20 %.
        seconds: predicted time of each client for the top block alone at full steps.
    """
    if settings.deadline_s > 0:
        return Deadline(seconds=settings.deadline_s, computed_round=round, source="user")
    if previous is not None and previous.source == "computed":
        if not seconds or round - previous.computed_round < DEADLINE_EVERY_ROUNDS:
            return previous
        low, high = ((1 + sign * DEADLINE_MAX_CHANGE) * previous.seconds for sign in (-1, 1))
        wanted = DEADLINE_FACTOR * quantile(seconds, DEADLINE_QUANTILE)
        return Deadline(seconds=min(max(wanted, low), high), computed_round=round, source="computed")
    wanted = DEADLINE_FACTOR * quantile(seconds, DEADLINE_QUANTILE) if seconds else math.inf
    return Deadline(seconds=wanted, computed_round=round, source="computed")


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values; 0 is the least, 1 the largest."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def relative_gains(clients: Sequence[AllocationClient], blocks: Sequence[int]) -> dict[ClientKey, dict[int, float]]:
    """u_hat of methods.md 6.3: gradient energy over its mean over all clients and blocks of the cohort, 1 if unseen.

    Energies that are not finite or negative count as unseen.
    """
    known = {
        (client.key, block): energy
        for client in sorted(clients, key=lambda c: c.key)
        for block in blocks
        if math.isfinite(energy := client.gradient_energy.get(block, math.nan)) and energy >= 0
    }
    mean = math.fsum(known.values()) / len(known) if known else 0.0
    return {
        client.key: {
            block: known[client.key, block] / mean if mean > 0 and (client.key, block) in known else 1.0
            for block in blocks
        }
        for client in clients
    }


class _Part(NamedTuple):
    """A piece of work, whoever does it."""

    blocks: tuple[int, ...]
    steps: int
    width: float = 1.0


class _Branch(Sequence[tuple[int, ...]]):
    """Sets that begin with the same blocks and grow by one further block at a time; made when they are asked for."""

    def __init__(self, start: tuple[int, ...], further: Sequence[int]) -> None:
        self._start, self._further = start, further

    def __len__(self) -> int:
        return len(self._further) + 1

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...

    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(index, slice):
            return [self[count] for count in range(*index.indices(len(self)))]
        return tuple(sorted((*self._start, *self._further[:index])))


class _Option(NamedTuple):
    blocks: tuple[int, ...]
    """Ascending ids."""
    width: float
    steps: int
    value: float
    upload_bytes: int
    low: int
    """Position of the lowest block."""

    @property
    def rank(self) -> tuple[float, int, int, float]:
        """Larger is better: value, fewer bytes up, the higher lowest block, the narrower slice."""
        return (self.value, -self.upload_bytes, self.low, -self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worth:
    """v of methods.md 6.3 for one client, and the terms that it is the sum of."""

    gains: Mapping[int, float]
    debts: Mapping[int, Segments]
    """Weighed."""
    rarities: Mapping[int, float]
    """Weighed."""
    shares: Segments
    """size(i): the share of a block's parameters in each segment."""

    def of_block(self, block: int, width: float) -> float:
        """v[k, m, w]."""
        return math.fsum(
            share * (self.gains[block] + debt + self.rarities[block])
            for share, debt, segment in zip(self.shares, self.debts[block], WIDTHS, strict=True)
            if segment <= width
        )

    def parts(self, blocks: Iterable[int], width: float) -> ValueParts:
        """The value of these blocks by where it comes from."""
        chosen = tuple(blocks)
        trained = [(i, share) for i, share in enumerate(self.shares) if WIDTHS[i] <= width]
        share = math.fsum(share for _, share in trained)
        return ValueParts(
            gain=share * math.fsum(self.gains[block] for block in chosen),
            debt=math.fsum(part * self.debts[block][i] for block in chosen for i, part in trained),
            rarity=share * math.fsum(self.rarities[block] for block in chosen),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """What all clients of a round have in common."""

    layout: StackLayout
    shape: ModelShape
    settings: AllocationSettings
    round: int
    num_clients: int = 1
    searches: dict[tuple[DeviceProfile, TimeFactors, Workload], ModeSearch] = field(
        default_factory=dict[tuple[DeviceProfile, TimeFactors, Workload], ModeSearch]
    )
    """The newest :data:`KEPT_SEARCHES`."""
    uploads: dict[tuple[int, float], int] = field(default_factory=dict[tuple[int, float], int])
    """What :meth:`upload_bytes` has found."""
    blocks: tuple[int, ...] = field(init=False)
    """From the bottom of the stack to the top."""
    shares: Segments = field(init=False)
    """size(i) of methods.md 6.3: the share of a block's parameters in each segment."""

    def __post_init__(self) -> None:
        sizes = [unit_parameters(self.units, self.layout.blocks[0], width) for width in WIDTHS]
        shares = ((size - less) / sizes[-1] for size, less in zip(sizes, [0, *sizes], strict=False))
        object.__setattr__(self, "blocks", self.layout.blocks)
        object.__setattr__(self, "shares", tuple(shares))

    def search(self, client: AllocationClient, work: Workload) -> ModeSearch:
        """All modes of this work on such a device; which device it is and how much memory it has are no matter."""
        profile, factors = client.profile, client.time_factors
        key = (replace(profile, device="", memory_usable_bytes=0, measured_unix_s=0.0), factors, work)
        found = self.searches.pop(key, None)
        if found is None:
            found = ModeSearch(profile, self.shape, self.layout, work, self.settings.optimizers, factors)
            if len(self.searches) >= KEPT_SEARCHES:
                del self.searches[next(iter(self.searches))]
        self.searches[key] = found
        return found

    def workload(self, client: AllocationClient, steps: int) -> Workload:
        """The client's round in numbers; padding and label share follow from its data statistics."""
        settings, data = self.settings, client.statistics
        mean_tokens = max(1.0, data.mean_tokens)
        task_sequences = min(steps * settings.batch_size, data.num_examples)
        anchored = settings.anchor_batch_size > 0
        anchor_sequences = min(
            math.ceil(steps / settings.anchor_every) * settings.anchor_batch_size, settings.anchor_sequences
        )
        return Workload(
            batch_size=settings.batch_size,
            micro_batch_size=settings.batch_size,
            mean_tokens=mean_tokens,
            max_tokens=max(data.max_tokens, math.ceil(mean_tokens)),
            label_share=min(1.0, data.num_target_tokens / max(1.0, data.num_examples * data.mean_tokens)),
            steps=steps,
            anchor_batch_size=settings.anchor_batch_size,
            anchor_tokens=settings.anchor_tokens,
            anchor_every=settings.anchor_every,
            keeps_start=settings.keeps_start,
            dtype_bytes=4 if client.profile.compute_dtype == "float32" else 2,
            new_tokens=mean_tokens * max(0, task_sequences - client.cached_examples),
            new_anchor_tokens=settings.anchor_tokens
            * (max(0, anchor_sequences - client.cached_anchor_sequences) if anchored else 0),
            measure_tokens=settings.measure_sequences * settings.anchor_tokens if anchored else 0,
        )

    def seconds_of_top_block(self, client: AllocationClient) -> float:
        """Predicted time of the cheapest option at full steps, in the best mode that fits, else in the best of all."""
        candidate = _Candidate(self, client, self.settings.steps, self.limits(client, math.inf))
        blocks = tuple(sorted(self.layout.blocks)) if self.settings.policy == "whole" else (self.layout.top_block,)
        width = self.settings.widths[0]
        mode = candidate.best_mode(blocks, width) or candidate.free_mode(blocks, width)
        return candidate.prediction(blocks, mode, width).seconds

    def limits(self, client: AllocationClient, deadline_s: float) -> Limits:
        """What the client's predictions are held against."""
        profile = client.profile
        above_runtime = max(0, profile.memory_usable_bytes - profile.runtime_memory_bytes)
        return Limits(
            deadline_s=deadline_s, memory_bytes=profile.runtime_memory_bytes + int(MEMORY_SAFETY * above_runtime)
        )

    def predict_measuring(self, client: AllocationClient) -> Prediction:
        """Of a client that only measures."""
        profile = client.profile
        work = self.workload(client, 1)
        memory = measure_memory(self.shape, self.layout, work, accelerator=profile.accelerator)
        down = self.download_bytes(client)
        seconds = down / profile.downlink_bytes_per_s
        seconds += self.measuring_s(client, work)
        return Prediction(
            seconds=TIME_SAFETY * seconds,
            step_s=0.0,
            upload_bytes=0,
            download_bytes=down,
            memory_bytes=_scaled_memory(client, memory.peak),
            largest_memory=memory.largest,
            mode=ExecutionMode(),
        )

    def measuring_s(self, client: AllocationClient, work: Workload) -> float:
        """Seconds to measure the published state."""
        scale = client.time_scale * client.time_factors.measuring
        return measure_time(client.profile, self.shape, self.layout, work, scale=scale)

    @property
    def what(self) -> What:
        """In words, what there is to be trained."""
        match self.layout.trainable:
            case ExpandedBlocks():
                return "block"
            case LowRankPairs():
                return "pairs of layer"
            case MergedLinears() | BaseTensors():
                return "layer"
            case _:
                assert_never(self.layout.trainable)

    @property
    def units(self) -> Units:
        """What has the tensors of a block, whatever a block is here."""
        if isinstance(self.layout.trainable, ExpandedBlocks):
            return self.shape
        return TrainedUnits(shape=self.shape, trainable=self.layout.trainable)

    def upload_bytes(self, num_blocks: int, width: float) -> int:
        """Largest payload of an update."""
        found = self.uploads.get((num_blocks, width))
        if found is None:
            form, density = self.settings.delta_format, self.settings.delta_density
            of_block = unit_bytes(self.units, self.blocks[0], form, density, width)
            found = self.uploads[num_blocks, width] = num_blocks * of_block + self._beside_bytes(form)
        return found

    def download_bytes(self, client: AllocationClient) -> int:
        """Largest payload of catching up: each version replayed, or an fp32 snapshot if that is smaller (methods.md
        7.2). Of merged pairs a version is the pairs of all clients; of personal ones it is the client's prior."""
        settings, num_blocks, block = self.settings, len(self.layout.positions), self.blocks[0]
        of_block = unit_bytes(self.units, block, settings.delta_format, settings.down_density)
        replay = num_blocks * of_block + self._beside_bytes(settings.delta_format)
        whole, trainable = self.units, self.layout.trainable
        if isinstance(trainable, LowRankPairs) and trainable.merged and isinstance(whole, TrainedUnits):
            whole, replay = whole.published(), replay * self.num_clients
        if isinstance(trainable, PersonalPairs) and isinstance(whole, TrainedUnits):  # always whole
            prior = num_blocks * unit_bytes(whole.held(), block, "fp32") + self._beside_bytes("fp32")
            return prior if client.versions_behind else 0
        snapshot = num_blocks * unit_bytes(whole, block, "fp32") + self._beside_bytes("fp32")
        return min(client.versions_behind * replay, snapshot)

    def _beside_bytes(self, payload_format: DeltaFormat) -> int:
        """Of the units that stand nowhere in the stack."""
        return sum(self.layout.beside.values()) * {"int8": 1, "bf16": 2, "fp32": 4}[payload_format]

    def choose(
        self,
        client: AllocationClient,
        deadline_s: float,
        coverage: Coverage,
        gains: Mapping[int, float],
        everybody: _Part | None = None,
    ) -> Choice:
        """The best option that fits; the exact search of methods.md 6.4.

        Args:
            everybody: what all clients are given, by the policies ``uniform`` and ``weakest``.
        """
        limits = self.limits(client, deadline_s)
        if not _is_assignable(client):
            return self._not_training(client, limits, ())
        worth = self._worth(client, coverage, gains)
        if everybody is not None:
            return self._given(client, limits, worth, everybody)
        refused: list[Refused] = []
        steps = self.settings.steps
        while True:
            candidate = _Candidate(self, client, steps, limits)
            fitting = self._fitting(candidate, worth, refused)
            if fitting:
                best = self._drawn(client, fitting) if self.settings.policy == "random" else _best(fitting, candidate)
                return self._training(candidate, best, fitting, worth, tuple(refused))
            if steps // 2 < MIN_STEPS or not any(r.fits_with_more_time for r in refused if r.steps == steps):
                break
            steps //= 2
        return self._not_training(client, limits, tuple(refused))

    def _worth(self, client: AllocationClient, coverage: Coverage, gains: Mapping[int, float]) -> _Worth:
        beta = self.settings.debt_weight
        return _Worth(
            gains=gains,
            debts={b: tuple([beta * debt for debt in debts]) for b, debts in coverage.debts_of(self.blocks).items()},
            rarities={block: _rarity(self.settings, coverage, client, block) for block in self.blocks},
            shares=self.shares,
        )

    def _given(self, client: AllocationClient, limits: Limits, worth: _Worth, part: _Part) -> Choice:
        """What everybody is given, to a client that can hold it; only ``uniform`` does not ask how long it takes."""
        late = self.settings.policy == "uniform"
        asked = replace(limits, deadline_s=math.inf) if late else limits
        candidate = _Candidate(self, client, part.steps, asked)
        if not candidate.fits(part.blocks, part.width):
            return self._not_training(client, limits, (candidate.refusal(part.blocks, part.width),))
        of_block = {block: worth.of_block(block, part.width) for block in part.blocks}
        option = self._option(part, of_block)
        return replace(self._training(candidate, option, [option], worth, ()), limits=limits)

    def _drawn(self, client: AllocationClient, fitting: Sequence[_Option]) -> _Option:
        digest = hashlib.sha256(f"{self.settings.seed}/{self.round}/{client.key}".encode()).digest()
        return fitting[int.from_bytes(digest[:8], "big") % len(fitting)]

    def _option(self, part: _Part, of_block: Mapping[int, float]) -> _Option:
        return _Option(
            blocks=part.blocks,
            width=part.width,
            steps=part.steps,
            value=math.fsum(map(of_block.__getitem__, part.blocks)),
            upload_bytes=self.upload_bytes(len(part.blocks), part.width),
            low=min(map(self.layout.positions.__getitem__, part.blocks)),
        )

    def _fitting(self, candidate: _Candidate, worth: _Worth, refused: list[Refused]) -> list[_Option]:
        """Every option of the enumeration that fits; what ends a branch is noted in ``refused``.

        Where a block alone does not fit, no set with a lower one does: those are not looked at. Nor is a width at which
        all blocks together are worth less than what a wider one has given (``random`` draws from all of them).
        """
        found: list[_Option] = []
        best = 0.0
        for width in reversed(self.settings.widths):
            of_block = {block: worth.of_block(block, width) for block in self.blocks}
            if math.fsum(of_block.values()) < best and self.settings.policy != "random":
                break
            fitting = len(self.blocks)
            for branch in self._branches(of_block):
                # A neighbouring branch usually ends at the same size; every miss costs a look at all modes.
                fitting = _count_while(branch, lambda b, w=width: candidate.fits(b, w), fitting)
                if fitting < len(branch):
                    refused.append(candidate.refusal(branch[fitting], width))
                if fitting == 0 and len(branch[0]) == 1:
                    break
                parts = (_Part(blocks=blocks, width=width, steps=candidate.steps) for blocks in branch[:fitting])
                found += [self._option(part, of_block) for part in parts]
            best = max((option.value for option in found), default=0.0)
        return found

    def _branches(self, worth: Mapping[int, float]) -> Iterator[Sequence[tuple[int, ...]]]:
        """Sets that grow by one block, the most valuable first; each costs more than the one before.

        The highest lowest block comes first. Blocks above the lowest cost the same, save one at the top of the stack,
        which costs less: so the sets with it and those without it are two branches.
        """
        if self.settings.policy == "whole":
            yield [tuple(sorted(self.layout.blocks))]
            return
        positions, top = self.layout.positions, self.blocks[-1]
        apart = positions[top] == self.layout.num_entries - 1
        by_worth = sorted(self.blocks, key=lambda block: (-worth[block], -positions[block]))
        for lowest in reversed(self.blocks):
            above = [
                block for block in by_worth if positions[block] > positions[lowest] and not (apart and block == top)
            ]
            yield _Branch((lowest,), above)
            if apart and lowest != top:
                yield _Branch((lowest, top), above)

    def _training(
        self,
        candidate: _Candidate,
        best: _Option,
        fitting: Sequence[_Option],
        worth: _Worth,
        refused: tuple[Refused, ...],
    ) -> Choice:
        client = candidate.client
        mode = candidate.best_mode(best.blocks, best.width)
        assert mode is not None
        runner_up = self._runner_up(candidate, best, mode, fitting, worth, refused)
        return Choice(
            client=client.key,
            name=client.name,
            round=self.round,
            role="train",
            blocks=best.blocks,
            width=best.width,
            steps=best.steps,
            batch_size=self.settings.batch_size,
            predicted=candidate.prediction(best.blocks, mode, best.width),
            limits=candidate.limits,
            value=best.value,
            parts=worth.parts(best.blocks, best.width),
            binding=runner_up.limit if runner_up is not None else "none",
            runner_up=runner_up,
            refused=refused,
            reason="",
            what=self.what,
        )

    def _not_training(self, client: AllocationClient, limits: Limits, refused: tuple[Refused, ...]) -> Choice:
        if client.statistics.num_examples <= 0:
            reason, binding = "it has no training examples", "none"
        elif client.speed_age_s > MAX_SPEED_AGE_S:
            days, most = client.speed_age_s / 86400, MAX_SPEED_AGE_S / 86400
            reason = (
                f"its device was last measured {days:.0f} days ago, expected at most {most:.0f}: restart its client"
            )
            binding = "none"
        else:
            nearest = min(refused, key=lambda r: _relative_excess(r, limits))
            reason, binding = f"nothing fits: {_refused_text(nearest)}", nearest.reason
        measuring = self.predict_measuring(client)
        over = _refusal(_Part(blocks=(), steps=0), measuring, limits)
        role: Role = "evaluate" if over is None else "rest"
        if over is not None:
            reason += f"; nor does measuring: {_excess_text(over)}"
        return Choice(
            client=client.key,
            name=client.name,
            round=self.round,
            role=role,
            blocks=(),
            width=1.0,
            steps=0,
            batch_size=0,
            predicted=measuring if role == "evaluate" else None,
            limits=limits,
            value=0.0,
            parts=ValueParts(),
            binding=binding,
            runner_up=None,
            refused=refused,
            reason=reason,
            what=self.what,
        )

    def _runner_up(
        self,
        candidate: _Candidate,
        best: _Option,
        mode: ExecutionMode,
        fitting: Sequence[_Option],
        worth: _Worth,
        refused: tuple[Refused, ...],
    ) -> RunnerUp | None:
        """What would have been taken next: without limits, in a faster mode, or at a lower value."""
        blocks, width, steps = tuple(sorted(self.layout.blocks)), self.settings.widths[-1], self.settings.steps
        value = math.fsum(worth.of_block(block, width) for block in blocks)
        if refused and (best.steps < steps or best.value < value):
            # Memory and time only grow with lower blocks and wider slices, so that the whole is out of reach too.
            other = candidate if steps == best.steps else _Candidate(self, candidate.client, steps, candidate.limits)
            over = other.refusal(blocks, width)
            return RunnerUp(
                blocks=blocks,
                width=width,
                steps=steps,
                mode=other.free_mode(blocks, width),
                value=value,
                why_not=_excess_text(over),
                limit=over.reason,
            )
        free = candidate.free_mode(best.blocks, best.width)
        over = None
        if free != mode:
            part = _Part(blocks=best.blocks, width=best.width, steps=best.steps)
            over = _refusal(part, candidate.prediction(best.blocks, free, best.width), candidate.limits)
        if over is not None:
            return RunnerUp(
                blocks=best.blocks,
                width=best.width,
                steps=best.steps,
                mode=free,
                value=best.value,
                why_not=_excess_text(over),
                limit=over.reason,
            )
        others = [option for option in fitting if (option.blocks, option.width) != (best.blocks, best.width)]
        if not others:
            return None
        second = _best(others, candidate)
        second_mode = candidate.best_mode(second.blocks, second.width)
        assert second_mode is not None
        if second.value < best.value:
            why = f"it is worth {best.value - second.value:.2f} less"
        elif second.value > best.value:
            why = f"it is worth {second.value - best.value:.2f} more, but options are drawn at random"
        else:
            why = "it is worth the same, but costs more to send or to compute"
        return RunnerUp(
            blocks=second.blocks,
            width=second.width,
            steps=second.steps,
            mode=second_mode,
            value=second.value,
            why_not=why,
            limit="none",
        )


class _Candidate:
    """One client with a number of steps: every set of blocks in every mode, held against the client's limits."""

    def __init__(self, problem: _Problem, client: AllocationClient, steps: int, limits: Limits) -> None:
        self.client = client
        self.steps = steps
        self.limits = limits
        self._problem = problem
        profile, work = client.profile, problem.workload(client, steps)
        self._search = problem.search(client, work)
        self._measure_s = problem.measuring_s(client, work)
        self._download_s = problem.download_bytes(client) / profile.downlink_bytes_per_s
        # A hair below the limits, so that rounding on the way back cannot pass them.
        above_runtime = limits.memory_bytes - profile.runtime_memory_bytes
        self._budget_bytes = (1 - 1e-12) * above_runtime / client.memory_scale

    def best_mode(self, blocks: tuple[int, ...], width: float) -> ExecutionMode | None:
        """The mode to take; None if none is within the limits."""
        max_seconds = self._compute_limit_s(blocks, width)
        return self._search.best(blocks, width=width, budget_bytes=self._budget_bytes, max_seconds=max_seconds)

    def fits(self, blocks: tuple[int, ...], width: float) -> bool:
        """Is there a mode within the limits?"""
        max_seconds = self._compute_limit_s(blocks, width)
        return self._search.fits(blocks, width=width, budget_bytes=self._budget_bytes, max_seconds=max_seconds)

    def free_mode(self, blocks: tuple[int, ...], width: float) -> ExecutionMode:
        """The mode to take if there were no limit."""
        mode = self._search.best(blocks, width=width)
        assert mode is not None
        return mode

    def refusal(self, blocks: tuple[int, ...], width: float) -> Refused:
        """Which limit keeps these blocks out, and how far they are beyond it.

        Memory, if not even the most sparing mode fits; else the deadline, if even without a memory limit no mode is
        fast enough; else memory again, because it forbids the modes that would be.
        """
        reason: Limit = "memory"
        least = self._search.least_bytes(blocks, width)
        fits_slowly = least <= self._budget_bytes
        if fits_slowly:
            max_seconds = self._compute_limit_s(blocks, width)
            fast_enough = self._search.least_bytes_in_time(blocks, max_seconds, width)
            if fast_enough is None:
                reason = "deadline"
            else:
                least = fast_enough
        if reason == "deadline":
            excess = self._total_s(blocks, width, self._search.fastest_s(blocks, width)) - self.limits.deadline_s
        else:
            excess = float(_scaled_memory(self.client, least) - self.limits.memory_bytes)
        return Refused(
            blocks=blocks,
            width=width,
            steps=self.steps,
            reason=reason,
            excess=excess,
            fits_with_more_time=fits_slowly,
            what=self._problem.what,
        )

    def prediction(self, blocks: tuple[int, ...], mode: ExecutionMode, width: float) -> Prediction:
        """Seconds, bytes and memory of these blocks in this mode."""
        found = self._search.cost(blocks, mode, width)
        return Prediction(
            seconds=self._total_s(blocks, width, found.seconds),
            step_s=self.client.time_scale * found.step_s,
            upload_bytes=self._problem.upload_bytes(len(blocks), width),
            download_bytes=self._problem.download_bytes(self.client),
            memory_bytes=_scaled_memory(self.client, found.memory.peak),
            largest_memory=found.memory.largest,
            mode=mode,
        )

    def _total_s(self, blocks: tuple[int, ...], width: float, seconds: float) -> float:
        """Of a round whose first pass and steps take ``seconds`` by the cost model."""
        return TIME_SAFETY * (self._other_s(blocks, width) + self.client.time_scale * seconds)

    def _compute_limit_s(self, blocks: tuple[int, ...], width: float) -> float:
        """The inverse: what the deadline leaves for first pass and steps."""
        left_s = self.limits.deadline_s / TIME_SAFETY - self._other_s(blocks, width)
        return (1 - 1e-12) * left_s / self.client.time_scale

    def _other_s(self, blocks: tuple[int, ...], width: float) -> float:
        upload_s = self._problem.upload_bytes(len(blocks), width) / self.client.profile.uplink_bytes_per_s
        return self._download_s + self._measure_s + upload_s


def _best(options: Sequence[_Option], candidate: _Candidate) -> _Option:
    """The option of the highest rank; among equals the one with the larger forward passes, then the first."""
    highest = max(option.rank for option in options)
    equals = [option for option in options if option.rank == highest]
    if len(equals) == 1:
        return equals[0]

    def sequences(option: _Option) -> int:
        mode = candidate.best_mode(option.blocks, option.width)
        return mode.micro_batch_size if mode is not None else 0

    return max(equals, key=sequences)


def _count_while(items: Sequence[_T], holds: Callable[[_T], bool], guess: int) -> int:
    """How many of the first items hold, where none holds after one that does not; ``guess`` is looked at first."""
    low, high = 0, len(items)  # items before low hold; the one at high, if there is one, does not
    probe = min(guess, high) - 1
    while low < high:
        probe = min(max(probe, low), high - 1)
        if holds(items[probe]):
            low = probe + 1
            # From a right guess one step up; from a wrong one by halves.
            probe = low if probe == guess - 1 else (low + high) // 2
        else:
            high = probe
            probe = high - 1 if probe == guess else (low + high) // 2
    return low


def _scaled_memory(client: AllocationClient, peak_bytes: int) -> int:
    return client.profile.runtime_memory_bytes + math.ceil(client.memory_scale * peak_bytes)


def _refusal(part: _Part, predicted: Prediction, limits: Limits) -> Refused | None:
    """The limit that a prediction breaks: memory first, because a slower mode may mend it."""
    reason: Limit
    if predicted.memory_bytes > limits.memory_bytes:
        reason, excess = "memory", float(predicted.memory_bytes - limits.memory_bytes)
    elif predicted.seconds > limits.deadline_s:
        reason, excess = "deadline", predicted.seconds - limits.deadline_s
    else:
        return None
    return Refused(
        blocks=part.blocks,
        width=part.width,
        steps=part.steps,
        reason=reason,
        excess=excess,
        fits_with_more_time=reason == "deadline",
    )


def _relative_excess(refusal: Refused, limits: Limits) -> float:
    limit = limits.deadline_s if refusal.reason == "deadline" else limits.memory_bytes
    return refusal.excess / limit if limit > 0 else math.inf


def _excess_text(refusal: Refused) -> str:
    if refusal.reason == "deadline":
        return f"{refusal.excess:.2f} s over the deadline"
    return f"{refusal.excess / 2**20:.1f} MiB over the memory limit"


def _refused_text(refusal: Refused) -> str:
    what = blocks_text(refusal.blocks, refusal.width, refusal.what)
    return f"{what} for {refusal.steps} steps is {_excess_text(refusal)}"


def blocks_text(blocks: Sequence[int], width: float = 1.0, what: What = "block") -> str:
    """``block 2``, ``blocks 0, 1 and 2``, ``1/4 of block 2``, ``pairs of layers 0 to 23``."""
    names = list(map(str, blocks))
    if len(names) == 1:
        text = f"{what} {names[0]}"
    elif len(names) > MOST_LISTED and list(blocks) == list(range(blocks[0], blocks[-1] + 1)):
        text = f"{what}s {names[0]} to {names[-1]}"
    else:
        text = f"{what}s {', '.join(names[:-1])} and {names[-1]}"
    return text if width == 1.0 else f"1/{round(1 / width)} of {text}"


def _nearest_miss(choices: Sequence[Choice]) -> str:
    """NO_CLIENT_FITS: which client comes nearest, with what, and what is in its way (methods.md 6.7)."""
    misses = [(_relative_excess(r, choice.limits), choice.name, r) for choice in choices for r in choice.refused]
    if not misses:
        reasons = [f"{choice.name}: {choice.reason}" for choice in choices[:3]]
        return f"no client can train anything; {'; '.join(reasons)}"
    _, name, refusal = min(misses, key=lambda miss: miss[:2])
    return f"no client can train anything; nearest is {name}: {_refused_text(refusal)}"
