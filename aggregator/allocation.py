"""Which client trains which blocks in this round, for how many steps, and why?

``plan_round`` is pure and deterministic: measured profiles, the shape of the model and what has been covered so far in;
one :class:`Choice` per client out, with its prediction, its limits and what was refused.

Clients are served weakest first. For each one the search enumerates the lowest block ``a`` and adds the blocks above
it in the order of their value: for a fixed ``a`` every further block costs the same, so taking the most valuable first
is optimal and the enumeration is exact (docs/methods.md 6.4, full width).
Planned coverage is booked at once, so that stronger clients fill the gaps that weaker ones leave.
What is given up first when something does not fit: sequences per forward pass (memory only; it changes no result), then
blocks, then steps (halved down to four), then training itself (evaluate, else rest).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from fedblocks.profiles.cost import (
    StackLayout,
    TimeBreakdown,
    Workload,
    download_bytes,
    measure_memory,
    measure_time,
    peak_memory,
    round_time,
    upload_bytes,
)
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.protocol.messages import ClientKey, DataStatistics, DeltaFormat

Role = Literal["train", "evaluate", "rest"]
Limit = Literal["deadline", "memory"]
Binding = Literal["deadline", "memory", "none"]

#: Every predicted duration is multiplied by this before it is compared (methods.md 6.1).
TIME_SAFETY: Final = 1.15
#: Share of the memory above R that a prediction may fill; R itself is measured, not predicted (methods.md 6.1).
MEMORY_SAFETY: Final = 0.9
#: Steps below which halving is given up (methods.md 6.4).
MIN_STEPS: Final = 4
#: Per round, what was covered counts this much less (methods.md 6.3).
COVERAGE_DECAY: Final = 0.95
#: Weight of the newest value in a running mean (methods.md 6.1, 6.3).
EMA: Final = 0.3
#: The deadline is this times the quantile of the clients' times for the top block (methods.md 6.5).
DEADLINE_FACTOR: Final = 1.25
DEADLINE_QUANTILE: Final = 0.8
#: Rounds between two computations of the deadline, and the largest change at once (methods.md 6.5).
DEADLINE_EVERY_ROUNDS: Final = 5
DEADLINE_MAX_CHANGE: Final = 0.2


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
    measure_sequences: int = 8
    """Anchor sequences on which a client measures the published state before it trains."""
    delta_format: DeltaFormat = "int8"
    delta_density: float = 0.25
    down_density: float = 0.25
    deadline_s: float = 0.0
    """The user's deadline; 0: computed."""
    debt_weight: float = 1.0
    """beta of methods.md 6.3."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "anchor_tokens", "anchor_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"allocation: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("anchor_batch_size", "anchor_sequences", "measure_sequences", "deadline_s", "debt_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"allocation: {name} is {getattr(self, name)}, expected 0 or more")


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
    """Running mean of measured over predicted seconds, transfers left out."""
    memory_scale: float = 1.0
    """Factor on the predicted memory above R: 1.25 after each task that ran out of memory."""
    versions_behind: int = 1
    """Published versions that the client lacks: what it must download first."""
    cached_examples: int = 0
    """Examples whose prefix is cached on the client."""
    cached_anchor_sequences: int = 0
    wants_evaluate_general: bool = False
    """The site measures the general validation file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much each block has been trained so far: sums of accepted n_k, older rounds counting less."""

    seen: Mapping[int, float]

    @classmethod
    def of(cls, blocks: Iterable[int]) -> Coverage:
        """Nothing covered yet."""
        return cls(seen=dict.fromkeys(blocks, 0.0))

    def debt(self, block: int) -> float:
        """``1 - seen / largest seen``, 1 where nothing has been covered at all: in [0, 1]."""
        most = max(self.seen.values(), default=0.0)
        return 1.0 - self.seen.get(block, 0.0) / most if most > 0 else 1.0

    def adding(self, blocks: Iterable[int], num_examples: int) -> Coverage:
        """With one more client's examples on these blocks."""
        seen = dict(self.seen)
        for block in blocks:
            seen[block] = seen.get(block, 0.0) + num_examples
        return Coverage(seen=seen)

    def after_round(self, accepted: Iterable[tuple[Iterable[int], int]]) -> Coverage:
        """After a closed round: what there was decays, the accepted (blocks, n_k) are added, in any order."""
        total = Coverage(seen={})
        for blocks, num_examples in accepted:
            total = total.adding(blocks, num_examples)
        blocks_known = sorted({*self.seen, *total.seen})
        return Coverage(seen={b: COVERAGE_DECAY * self.seen.get(b, 0.0) + total.seen.get(b, 0.0) for b in blocks_known})


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the prediction was held against."""

    deadline_s: float
    memory_bytes: int
    """R plus :data:`MEMORY_SAFETY` of the memory above it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueParts:
    """Where the value of the chosen blocks comes from; rarity is 0 until topic histograms are shared (part 4)."""

    gain: float = 0.0
    debt: float = 0.0
    rarity: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """An option that does not fit."""

    blocks: tuple[int, ...]
    steps: int
    reason: Limit
    excess: float
    """Seconds (deadline) or bytes (memory) above the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """The most wanted option that was not taken."""

    blocks: tuple[int, ...]
    steps: int
    micro_batch_size: int
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
    steps: int
    batch_size: int
    micro_batch_size: int
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
    problem = _Problem(layout=layout, shape=shape, settings=settings, round=round)
    slowness = {
        client.key: problem.predict(client, (layout.top_block,), settings.steps, settings.batch_size).seconds
        for client in clients
        if client.statistics.num_examples > 0
    }
    deadline = next_deadline(deadline, settings=settings, seconds=tuple(slowness.values()), round=round)
    gains = relative_gains(clients, layout.blocks)
    planned = coverage
    choices: dict[ClientKey, Choice] = {}
    for client in sorted(clients, key=lambda c: (-slowness.get(c.key, math.inf), c.key)):
        choice = problem.choose(client, deadline.seconds, planned, gains[client.key])
        choices[client.key] = choice
        if choice.role == "train":
            planned = planned.adding(choice.blocks, client.statistics.num_examples)
    ordered = tuple(choices[key] for key in sorted(choices))
    return RoundPlan(
        round=round,
        deadline=deadline,
        choices=ordered,
        coverage=planned,
        no_client_fits="" if any(c.role == "train" for c in ordered) else _nearest_miss(ordered),
    )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    blocks: tuple[int, ...]
    """Ascending ids."""
    steps: int
    micro_batch_size: int
    value: float
    predicted: Prediction

    def rank(self, layout: StackLayout) -> tuple[float, int, int, int]:
        """Larger is better: value, fewer bytes up, the higher lowest block, larger forward passes."""
        low = min(layout.positions[block] for block in self.blocks)
        return (self.value, -self.predicted.upload_bytes, low, self.micro_batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """What all clients of a round have in common."""

    layout: StackLayout
    shape: ModelShape
    settings: AllocationSettings
    round: int

    def workload(self, client: AllocationClient, steps: int, micro_batch_size: int) -> Workload:
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
            micro_batch_size=micro_batch_size,
            mean_tokens=mean_tokens,
            max_tokens=max(data.max_tokens, math.ceil(mean_tokens)),
            label_share=min(1.0, data.num_target_tokens / max(1.0, data.num_examples * data.mean_tokens)),
            steps=steps,
            anchor_batch_size=settings.anchor_batch_size,
            anchor_tokens=settings.anchor_tokens,
            anchor_every=settings.anchor_every,
            dtype_bytes=4 if client.profile.compute_dtype == "float32" else 2,
            new_tokens=mean_tokens * max(0, task_sequences - client.cached_examples),
            new_anchor_tokens=settings.anchor_tokens
            * (max(0, anchor_sequences - client.cached_anchor_sequences) if anchored else 0),
            measure_tokens=settings.measure_sequences * settings.anchor_tokens if anchored else 0,
        )

    def predict(
        self, client: AllocationClient, blocks: tuple[int, ...], steps: int, micro_batch_size: int
    ) -> Prediction:
        """Seconds, bytes and memory of an option."""
        settings, profile = self.settings, client.profile
        work = self.workload(client, steps, micro_batch_size)
        up = upload_bytes(self.shape, len(blocks), settings.delta_format, settings.delta_density)
        down = self._download_bytes(client)
        time: TimeBreakdown = round_time(
            profile,
            self.shape,
            self.layout,
            blocks,
            work,
            upload_num_bytes=up,
            download_num_bytes=down,
            scale=client.time_scale,
        )
        memory = peak_memory(self.shape, self.layout, blocks, work, accelerator=profile.accelerator)
        return Prediction(
            seconds=TIME_SAFETY * time.total_s,
            step_s=time.step_s,
            upload_bytes=up,
            download_bytes=down,
            memory_bytes=profile.runtime_memory_bytes + math.ceil(client.memory_scale * memory.peak),
            largest_memory=memory.largest,
        )

    def predict_measuring(self, client: AllocationClient) -> Prediction:
        """The same for a client that only measures."""
        profile = client.profile
        work = self.workload(client, 1, 1)
        memory = measure_memory(self.shape, self.layout, work, accelerator=profile.accelerator)
        down = self._download_bytes(client)
        seconds = down / profile.downlink_bytes_per_s
        seconds += measure_time(profile, self.shape, self.layout, work, scale=client.time_scale)
        return Prediction(
            seconds=TIME_SAFETY * seconds,
            step_s=0.0,
            upload_bytes=0,
            download_bytes=down,
            memory_bytes=profile.runtime_memory_bytes + math.ceil(client.memory_scale * memory.peak),
            largest_memory=memory.largest,
        )

    def choose(
        self, client: AllocationClient, deadline_s: float, coverage: Coverage, gains: Mapping[int, float]
    ) -> Choice:
        """The best option that fits; the exact search of methods.md 6.4 at full width."""
        profile = client.profile
        above_runtime = max(0, profile.memory_usable_bytes - profile.runtime_memory_bytes)
        limits = Limits(
            deadline_s=deadline_s,
            memory_bytes=profile.runtime_memory_bytes + int(MEMORY_SAFETY * above_runtime),
        )
        debts = {block: self.settings.debt_weight * coverage.debt(block) for block in self.layout.blocks}
        worth = {block: gains[block] + debts[block] for block in self.layout.blocks}
        refused: list[Refused] = []
        best: _Option | None = None
        steps = self.settings.steps
        if client.statistics.num_examples > 0:
            while True:
                fitting = self._fitting(client, steps, limits, worth, refused)
                if fitting or steps // 2 < MIN_STEPS or not _deadline_is_in_the_way(refused, steps):
                    break
                steps //= 2
            best = max(fitting, key=lambda option: option.rank(self.layout), default=None)
            if best is not None:
                return self._training(client, best, fitting, limits, worth, gains, debts, tuple(refused))
        return self._not_training(client, limits, tuple(refused))

    def _fitting(
        self,
        client: AllocationClient,
        steps: int,
        limits: Limits,
        worth: Mapping[int, float],
        refused: list[Refused],
    ) -> list[_Option]:
        """Every option of the enumeration that fits; what ends a branch is noted in ``refused``."""
        positions = self.layout.positions
        found: list[_Option] = []
        for lowest in self.layout.blocks:
            above = [block for block in self.layout.blocks if positions[block] > positions[lowest]]
            above.sort(key=lambda block: (-worth[block], -positions[block]))
            for count in range(len(above) + 1):
                blocks = tuple(sorted((lowest, *above[:count])))
                option, refusal = self._fit(client, blocks, steps, limits, worth)
                if option is None:
                    assert refusal is not None
                    refused.append(refusal)
                    break
                found.append(option)
        return found

    def _fit(
        self,
        client: AllocationClient,
        blocks: tuple[int, ...],
        steps: int,
        limits: Limits,
        worth: Mapping[int, float],
    ) -> tuple[_Option | None, Refused | None]:
        """The option with the largest forward passes that fit, or why none does."""
        refusal: Refused | None = None
        for micro_batch_size in _halvings(self.settings.batch_size):
            predicted = self.predict(client, blocks, steps, micro_batch_size)
            refusal = _refusal(blocks, steps, predicted, limits)
            if refusal is None:
                value = math.fsum(worth[block] for block in blocks)
                return (
                    _Option(
                        blocks=blocks,
                        steps=steps,
                        micro_batch_size=micro_batch_size,
                        value=value,
                        predicted=predicted,
                    ),
                    None,
                )
            if refusal.reason == "deadline":
                break
        return None, refusal

    def _training(
        self,
        client: AllocationClient,
        best: _Option,
        fitting: Sequence[_Option],
        limits: Limits,
        worth: Mapping[int, float],
        gains: Mapping[int, float],
        debts: Mapping[int, float],
        refused: tuple[Refused, ...],
    ) -> Choice:
        runner_up = self._runner_up(client, best, fitting, limits, worth, refused)
        return Choice(
            client=client.key,
            name=client.name,
            round=self.round,
            role="train",
            blocks=best.blocks,
            steps=best.steps,
            batch_size=self.settings.batch_size,
            micro_batch_size=best.micro_batch_size,
            predicted=best.predicted,
            limits=limits,
            value=best.value,
            parts=ValueParts(
                gain=math.fsum(gains[block] for block in best.blocks),
                debt=math.fsum(debts[block] for block in best.blocks),
            ),
            binding=runner_up.limit if runner_up is not None else "none",
            runner_up=runner_up,
            refused=refused,
            reason="",
        )

    def _not_training(self, client: AllocationClient, limits: Limits, refused: tuple[Refused, ...]) -> Choice:
        if client.statistics.num_examples <= 0:
            reason, binding = "it has no training examples", "none"
        else:
            nearest = min(refused, key=lambda r: _relative_excess(r, limits))
            reason, binding = f"nothing fits: {_refused_text(nearest)}", nearest.reason
        measuring = self.predict_measuring(client)
        over = _refusal((), 0, measuring, limits)
        role: Role = "evaluate" if over is None else "rest"
        if over is not None:
            reason += f"; nor does measuring: {_excess_text(over)}"
        return Choice(
            client=client.key,
            name=client.name,
            round=self.round,
            role=role,
            blocks=(),
            steps=0,
            batch_size=0,
            micro_batch_size=0,
            predicted=measuring if role == "evaluate" else None,
            limits=limits,
            value=0.0,
            parts=ValueParts(),
            binding=binding,
            runner_up=None,
            refused=refused,
            reason=reason,
        )

    def _runner_up(
        self,
        client: AllocationClient,
        best: _Option,
        fitting: Sequence[_Option],
        limits: Limits,
        worth: Mapping[int, float],
        refused: tuple[Refused, ...],
    ) -> RunnerUp | None:
        """What would have been taken next: without limits, with larger forward passes, or at a lower value.

        A branch that ends at its j-th block is ended for every larger set as well, so the largest set of each branch
        stands for what the limit cost.
        """
        positions = self.layout.positions
        candidates: list[tuple[int, float, tuple[int, ...]]] = []
        for refusal in refused:
            low = min(positions[block] for block in refusal.blocks)
            largest = tuple(sorted(block for block in self.layout.blocks if positions[block] >= low))
            candidates.append((refusal.steps, math.fsum(worth[block] for block in largest), largest))
        wanted = max(candidates, default=None)
        if wanted is not None and wanted[:2] > (best.steps, best.value):
            steps, value, blocks = wanted
            over = self._in_the_way(client, blocks, steps, limits)
            return _runner_up(blocks, steps, self.settings.batch_size, value, _excess_text(over), over.reason)
        if best.micro_batch_size < self.settings.batch_size:
            larger = next(m for m in reversed(_halvings(self.settings.batch_size)) if m > best.micro_batch_size)
            over = _refusal(best.blocks, best.steps, self.predict(client, best.blocks, best.steps, larger), limits)
            assert over is not None
            return _runner_up(best.blocks, best.steps, larger, best.value, _excess_text(over), over.reason)
        others = [option for option in fitting if option.blocks != best.blocks]
        if not others:
            return None
        second = max(others, key=lambda option: option.rank(self.layout))
        if second.value < best.value:
            why = f"it is worth {best.value - second.value:.2f} less"
        else:
            why = "it is worth the same, but costs more to send or to compute"
        return _runner_up(second.blocks, second.steps, second.micro_batch_size, second.value, why, "none")

    def _in_the_way(self, client: AllocationClient, blocks: tuple[int, ...], steps: int, limits: Limits) -> Refused:
        """Which limit keeps a set of blocks out.

        Memory, if not even one sequence at a time fits; else the deadline, if even whole batches are too slow; else
        memory again, because it forbids the passes that would be fast enough.
        """
        one, whole = (self.predict(client, blocks, steps, micro) for micro in (1, self.settings.batch_size))
        if one.memory_bytes <= limits.memory_bytes and whole.seconds > limits.deadline_s:
            excess = whole.seconds - limits.deadline_s
            return Refused(blocks=blocks, steps=steps, reason="deadline", excess=excess)
        needed = one if one.memory_bytes > limits.memory_bytes else whole
        excess = float(needed.memory_bytes - limits.memory_bytes)
        return Refused(blocks=blocks, steps=steps, reason="memory", excess=excess)

    def _download_bytes(self, client: AllocationClient) -> int:
        return download_bytes(
            self.shape,
            len(self.layout.positions),
            self.settings.delta_format,
            self.settings.down_density,
            client.versions_behind,
        )


def _runner_up(
    blocks: tuple[int, ...], steps: int, micro_batch_size: int, value: float, why_not: str, limit: Binding
) -> RunnerUp:
    return RunnerUp(
        blocks=blocks, steps=steps, micro_batch_size=micro_batch_size, value=value, why_not=why_not, limit=limit
    )


def _halvings(size: int) -> tuple[int, ...]:
    """``size``, ``size // 2``, ... 1."""

    def each() -> Iterator[int]:
        left = size
        while left:
            yield left
            left //= 2

    return tuple(each())


def _refusal(blocks: tuple[int, ...], steps: int, predicted: Prediction, limits: Limits) -> Refused | None:
    """The limit that an option breaks: memory first, because smaller forward passes may mend it."""
    if predicted.memory_bytes > limits.memory_bytes:
        excess = float(predicted.memory_bytes - limits.memory_bytes)
        return Refused(blocks=blocks, steps=steps, reason="memory", excess=excess)
    if predicted.seconds > limits.deadline_s:
        excess = predicted.seconds - limits.deadline_s
        return Refused(blocks=blocks, steps=steps, reason="deadline", excess=excess)
    return None


def _deadline_is_in_the_way(refused: Iterable[Refused], steps: int) -> bool:
    return any(refusal.reason == "deadline" for refusal in refused if refusal.steps == steps)


def _relative_excess(refusal: Refused, limits: Limits) -> float:
    limit = limits.deadline_s if refusal.reason == "deadline" else limits.memory_bytes
    return refusal.excess / limit if limit > 0 else math.inf


def _excess_text(refusal: Refused) -> str:
    if refusal.reason == "deadline":
        return f"{refusal.excess:.2f} s over the deadline"
    return f"{refusal.excess / 2**20:.1f} MiB over the memory limit"


def _refused_text(refusal: Refused) -> str:
    blocks = ", ".join(map(str, refusal.blocks))
    return (
        f"block{'s' if len(refusal.blocks) > 1 else ''} {blocks} for {refusal.steps} steps is {_excess_text(refusal)}"
    )


def _nearest_miss(choices: Sequence[Choice]) -> str:
    """NO_CLIENT_FITS: which client comes nearest, with what, and what is in its way (methods.md 6.7)."""
    misses = [(_relative_excess(r, choice.limits), choice.name, r) for choice in choices for r in choice.refused]
    if not misses:
        return "no client has training examples"
    _, name, refusal = min(misses, key=lambda miss: miss[:2])
    return f"no client can train anything; nearest is {name}: {_refused_text(refusal)}"
