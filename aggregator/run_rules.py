"""Which rules hold for the rounds of every method? Tasks from a plan, what is measured, when a run stops, what is kept.

Work is allocated by hardware and need (``allocation.py``); a method says what a round's updates amount to and how that
is published (``methods/``). Between rounds: the weight of the anchor term by dual ascent (methods.md 5.3), the learning
rate's decay and warm-up (5.4), who measures what (9), and when the run stops (9).

Everything here is a pure function of its arguments; :class:`MethodState` is all that is carried from round to round,
and it is written to the ledger with each round.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Protocol

from fedblocks.aggregator import aggregation, budgets, growth, personalisation
from fedblocks.aggregator.aggregation import AcceptedUpdate, FoldResult
from fedblocks.aggregator.allocation import (
    AllocationClient,
    AllocationSettings,
    Choice,
    Deadline,
    ProfiledSeconds,
    RoundPlan,
    cannot_train,
    plan_round,
    profiled_seconds,
)
from fedblocks.aggregator.budgets import Spent, SpentReason
from fedblocks.aggregator.cohort import choose_cohort
from fedblocks.aggregator.coverage import Coverage, Trained
from fedblocks.aggregator.fold_rule import FoldRule, fold_rule
from fedblocks.aggregator.growth import NLL_IMPROVEMENT, GrowthState, MeanScore
from fedblocks.aggregator.personalisation import Mixture, initial_mixture
from fedblocks.aggregator.privacy import PrivacyBooks, private_fold, spends_too_much
from fedblocks.aggregator.registry import KnownClient
from fedblocks.aggregator.robust import combine_of
from fedblocks.aggregator.server_optimizer import ServerRule, server_step
from fedblocks.profiles.cost import AS_PROFILED, StackLayout
from fedblocks.profiles.model_shape import WIDTHS
from fedblocks.profiles.units import TrainedUnits, Units, block_units, personal_pairs
from fedblocks.protocol import state as states
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import (
    STRENGTHS,
    Assignment,
    AttemptId,
    ClientKey,
    DeltaFormat,
    Evaluate,
    Measure,
    Measurement,
    StateUpdate,
    TrainReport,
)
from fedblocks.protocol.payloads import Bytes
from fedblocks.protocol.priors import prior_of
from fedblocks.protocol.row_mask import SHARES
from fedblocks.protocol.run_config import ForgettingSection, RunConfig
from fedblocks.protocol.tensors import FloatArray, State

NO_PAYLOAD_SHA256: Final = hashlib.sha256(b"").hexdigest()
StopReason = Literal["max_rounds", "target_score", "no_improvement", "diverged", "privacy_budget"] | SpentReason

#: The controller aims below the budget: room for the standard error used at export (methods.md 5.3).
SET_POINT: Final = 0.9
#: Until KL has once come so near to the set point, lambda stays where it started.
ARMING_SHARE: Final = 0.8
MEDIAN_FROM: Final = 3
LAST_ROUND_SHARE: Final = 0.1
#: Warm-up of a block that nobody has trained yet, and of all others (methods.md 5.4).
WARMUP_NEW, WARMUP_KNOWN = 8, 2
EVALUATING_SHARE: Final = 0.25
MIN_EVALUATING: Final = 2
SCORE_WINDOW: Final = 3
PATIENCE_ROUNDS: Final = 10
DIVERGED_FACTOR: Final = 3.0
DIVERGED_ROUNDS: Final = 5
BEST_KL_FACTOR: Final = 1.5
#: A block that nobody has trained in so many rounds is an orphan (methods.md 6.7).
ORPHAN_ROUNDS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenBlock:
    """How much a block has been trained, and on what (``allocation.Coverage``)."""

    block: int
    weights: tuple[float, ...]
    """Of each segment, the narrowest width's first."""
    topics: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleBlock:
    """For how many rounds with updates nobody has trained a block."""

    block: int
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNorms:
    """Norms of a block's updates in its last rounds, for clipping."""

    block: int
    rounds: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """What the clients measured of one published version, all sums added up."""

    version: int
    kl: float | None
    """Median over the clients of their mean KL, nats per token (mean below three clients)."""
    accuracy: float | None
    nll: float | None
    """Of the validation parts, nats per target token."""
    general_accuracy: float | None
    general_nll: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodState:
    """All that the method carries from one round to the next; constant in size."""

    anchor_weight: float
    """lambda."""
    armed: bool = False
    deadline: Deadline | None = None
    """The last round's, from which the next one departs slowly (methods.md 6.5); None while it rests on speeds that
    clients declared and nobody has measured."""
    seen: tuple[SeenBlock, ...] = ()
    idle: tuple[IdleBlock, ...] = ()
    """Blocks of the plan that the last rounds left out; those of the last one are absent."""
    norms: tuple[BlockNorms, ...] = ()
    mixture: Mixture | None = None
    """Who belongs to which cluster; None where one model is everybody's."""
    base_general_accuracy: float | None = None
    """On the general validation file at version 0."""
    base_general_nll: float | None = None
    recent: tuple[Pooled, ...] = ()
    """The newest rounds with a score, at most three."""
    best_accuracy: float | None = None
    """Best mean of three."""
    best_nll: float | None = None
    best_version: int = 0
    """Best score with KL within 1.5 budgets; what a diverged run falls back to."""
    best_version_accuracy: float | None = None
    best_version_nll: float | None = None
    rounds_since_best: int = 0
    """Or since the last growth."""
    diverged_rounds: int = 0
    growth: GrowthState = GrowthState()
    spent: Spent = Spent()


def initial_state(config: RunConfig) -> MethodState:
    """Before the first round. An infinite budget means no anchor at all."""
    unlimited = math.isinf(config.forgetting.max_kl)
    return MethodState(
        anchor_weight=0.0 if unlimited else config.forgetting.lambda_start,
        mixture=initial_mixture(config.mixture, config.run.seed),
    )


def next_anchor_weight(
    anchor_weight: float, armed: bool, kl: float | None, forgetting: ForgettingSection
) -> tuple[float, bool]:
    """lambda and ``armed`` after a round in which the global model's KL was measured as ``kl`` (methods.md 5.3).

    It never goes below ``min_lambda``: where KL lies far below the budget, pure dual ascent gives the anchor away and
    retention falls, for no fewer rounds (docs/results.md).
    """
    if kl is None or math.isinf(forgetting.max_kl):
        return anchor_weight, armed
    r = kl / (SET_POINT * forgetting.max_kl)
    if not armed and r < ARMING_SHARE:
        return anchor_weight, False
    moved = anchor_weight + forgetting.eta * min(2.0, max(-1.0, r - 1.0))
    return min(forgetting.lambda_max, max(forgetting.min_lambda, moved)), True


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What does not change during a run."""

    run_id: str
    config: RunConfig
    plan: ExpansionPlan
    anchor_sequences: int
    anchor_tokens: int
    units_of_tasks: tuple[int, ...] = ()
    """Of every task, where ``plan`` is that of another model whose costs are planned with; empty: those chosen."""

    @property
    def layout(self) -> StackLayout:
        """Where the expanded blocks stand."""
        return self.plan.layout

    @property
    def anchored(self) -> bool:
        """False without a budget to hold."""
        return not math.isinf(self.config.forgetting.max_kl)

    def allocation_settings(self) -> AllocationSettings:
        """The part of the configuration that planning needs."""
        training, delta, allocation = self.config.training, self.config.delta, self.config.allocation
        return AllocationSettings(
            steps=training.steps,
            batch_size=training.batch_size,
            anchor_batch_size=training.anchor_batch_size if self.anchored else 0,
            anchor_tokens=self.anchor_tokens,
            # The last eighth is kl_val (methods.md 5.2).
            anchor_sequences=self.anchor_sequences - self.anchor_sequences // 8,
            anchor_every=training.anchor_every,
            keeps_start=training.proximal_weight > 0,
            delta_format=delta.format,
            delta_density=delta.density,
            down_density=delta.down_density,
            deadline_s=allocation.deadline_s,
            debt_weight=allocation.debt_weight,
            rarity_weight=allocation.rarity_weight,
            widths=widths_of(self.config),
            policy=allocation.policy,
            seed=self.config.run.seed,
        )


def widths_of(config: RunConfig) -> tuple[float, ...]:
    """The widths that an assignment of the run may have, ascending: of fedhft the shares of B's rows."""
    if not config.allocation.slim:
        return (1.0,)
    return SHARES if config.run.method == "fedhft" else WIDTHS


def active_blocks(run: Run, state: MethodState) -> tuple[int, ...]:
    """Ids of the blocks that compute and train now, ascending (``growth.py``)."""
    return state.growth.active or growth.first_blocks(run.plan, run.config.expansion.blocks)


def grown(run: Run, state: MethodState) -> Run:
    """The run with the active blocks only: what is planned, sent and measured now."""
    return replace(run, plan=run.plan.reduced(active_blocks(run, state)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The published state that a round starts from."""

    round: int
    version: int
    state_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRound:
    """A round to be opened: a task for everybody who has one, and the reasons for all."""

    tasks: Mapping[ClientKey, Assignment | Evaluate]
    cohort: frozenset[ClientKey]
    """Who takes part; the others wait for their turn."""
    plan: RoundPlan
    deadline: Deadline | None
    """To be kept in the method's state."""


def plan(
    present: Sequence[KnownClient], run: Run, state: MethodState, start: Start, *, now_unix_s: float = 0.0
) -> PlannedRound:
    """Who does what in this round; ``tasks`` is empty if nobody can train (``plan.no_client_fits`` says why).

    Where nobody of the chosen part of the clients can train, all of them are planned for.

    Args:
        now_unix_s: tells how old the clients' measurements are; 0: they are not asked.
    """
    run = grown(run, state)
    last_chosen = {client.key: client.last_chosen_round for client in present if client.statistics.num_examples > 0}
    fraction, seed = run.config.allocation.cohort_fraction, run.config.run.seed
    chosen = choose_cohort(last_chosen, fraction=fraction, round=start.round, seed=seed)
    whole = len(chosen) == len(last_chosen)
    clients = present if whole else [client for client in present if client.key in chosen]
    planned = _plan(clients, run, state, start, now_unix_s)
    if planned.plan.no_client_fits and not whole:
        return _plan(present, run, state, start, now_unix_s)
    return planned


def _plan(
    clients: Sequence[KnownClient], run: Run, state: MethodState, start: Start, now_unix_s: float
) -> PlannedRound:
    cohort = frozenset(client.key for client in clients)
    found = plan_round(
        [allocation_client(client, start.version, now_unix_s) for client in clients],
        layout=run.layout,
        shape=run.plan.shape,
        settings=run.allocation_settings(),
        coverage=_coverage(state, run.plan.unit_ids),
        round=start.round,
        deadline=state.deadline,
    )
    measured = all(c.calibration is not None for c in clients if c.statistics.num_examples > 0)
    deadline = found.deadline if measured or state.deadline is not None else None
    if found.no_client_fits:
        return PlannedRound(tasks={}, cohort=cohort, plan=found, deadline=deadline)
    by_key = {client.key: client for client in clients}
    trainers = [by_key[c.client] for c in found.choices if c.role == "train"]
    evaluators = [by_key[c.client] for c in found.choices if c.role == "evaluate"]
    wanted = measures(trainers, evaluators, round=start.round, seed=run.config.run.seed)
    tasks: dict[ClientKey, Assignment | Evaluate] = {}
    for choice in found.choices:
        client = by_key[choice.client]
        if choice.role == "train":
            tasks[client.key] = assignment(
                client,
                choice,
                run,
                state,
                start,
                issue=0,
                deadline_s=found.deadline.seconds,
                measure=wanted[client.key],
            )
        elif choice.role == "evaluate":
            tasks[client.key] = evaluation(
                client, run, start, deadline_s=found.deadline.seconds, measure=wanted[client.key]
            )
    return PlannedRound(tasks=tasks, cohort=cohort, plan=found, deadline=deadline)


def smaller_assignment(
    client: KnownClient, failed: Assignment, run: Run, state: MethodState, start: Start, *, deadline_s: float
) -> tuple[Assignment, Choice] | None:
    """The next smaller task of a client whose task did not fit in memory; None if there is none (methods.md 6.7).

    Args:
        client: its memory scale raised already.
        deadline_s: what is left of the round.
    """
    if deadline_s <= 0:
        return None
    run = grown(run, state)
    (choice,) = plan_round(
        [allocation_client(client, start.version)],
        layout=run.layout,
        shape=run.plan.shape,
        settings=replace(run.allocation_settings(), deadline_s=deadline_s),
        coverage=_coverage(state, run.plan.unit_ids),
        round=start.round,
    ).choices
    if choice.role != "train":
        return None
    issued = assignment(client, choice, run, state, start, issue=1, deadline_s=deadline_s, measure=failed.measure)
    return None if _needs(issued) == _needs(failed) else (issued, choice)


def _needs(task: Assignment) -> tuple[object, ...]:
    """What decides how much memory a task takes; with a raised memory scale it changes only to something smaller."""
    return task.blocks, task.width, task.micro_batch_size, task.optimizer_mode, task.checkpoint_activations


def assignment(
    client: KnownClient,
    choice: Choice,
    run: Run,
    state: MethodState,
    start: Start,
    *,
    issue: int,
    deadline_s: float,
    measure: tuple[Measure, ...],
) -> Assignment:
    """The wire form of a choice. Its state update names the version only; the way there is added when it is sent.

    Args:
        run: :func:`grown`.
    """
    assert choice.predicted is not None
    mode = choice.predicted.mode
    training, delta = run.config.training, run.config.delta
    return Assignment(
        attempt_id=attempt_id(run.run_id, start.round, client.key, issue),
        round=start.round,
        state=named_state(start),
        payload_bytes=0,
        payload_sha256=NO_PAYLOAD_SHA256,
        active_blocks=run.plan.block_ids,
        # Everybody who trains trains what stands beside the stack too: an extra tensor set costs next to nothing.
        blocks=run.units_of_tasks or tuple(sorted((*choice.blocks, *run.layout.beside))),
        width=choice.width,
        steps=choice.steps,
        batch_size=choice.batch_size,
        anchor_batch_size=training.anchor_batch_size if run.anchored else 0,
        anchor_every=training.anchor_every,
        anchor_weight=state.anchor_weight,
        learning_rate=learning_rate(run.config, start.round),
        warmup_steps=warmup_steps(choice.steps, choice.blocks, state.seen),
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
        proximal_weight=training.proximal_weight,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        optimizer_mode=mode.optimizer,
        micro_batch_size=mode.micro_batch_size,
        checkpoint_activations=mode.checkpoint,
        delta_format=delta.format,
        delta_density=delta.density,
        seed=draw(run.config.run.seed, start.round, client.key),
        deadline_s=deadline_s,
        memory_budget_bytes=client.profile.memory_usable_bytes,
        predicted_peak_bytes=choice.predicted.memory_bytes,
        predicted_seconds=choice.predicted.seconds,
        measure=measure,
    )


def evaluation(
    client: KnownClient,
    run: Run,
    start: Start,
    *,
    deadline_s: float,
    measure: tuple[Measure, ...],
    strengths: tuple[float, ...] = (1.0,),
) -> Evaluate:
    """A task that measures the state, at these strengths, and trains nothing.

    Args:
        run: :func:`grown`.
    """
    return Evaluate(
        attempt_id=attempt_id(run.run_id, start.round, client.key, 0),
        round=start.round,
        state=named_state(start),
        payload_bytes=0,
        payload_sha256=NO_PAYLOAD_SHA256,
        active_blocks=run.plan.block_ids,
        measure=measure,
        deadline_s=deadline_s,
        strengths=strengths,
    )


def final_strengths(config: RunConfig) -> tuple[float, ...]:
    """At which strengths the final state is measured: all of the grid where there is a budget to keep."""
    limited = not math.isinf(config.forgetting.max_kl) or config.forgetting.min_retention > 0
    return STRENGTHS if limited else (1.0,)


def attempt_id(run_id: str, round: int, key: ClientKey, issue: int) -> AttemptId:
    """The same after every restart; a file name; tells nothing of the key."""
    digest = hashlib.sha256(f"{run_id}/{round}/{key}/{issue}".encode()).hexdigest()
    return AttemptId(f"r{round:05d}-{digest[:16]}")


def named_state(start: Start) -> StateUpdate:
    """The version that a task starts from; the way there is added when it is sent."""
    return StateUpdate(
        encoding="none", from_version=start.version, to_version=start.version, state_sha256=start.state_sha256
    )


def allocation_client(client: KnownClient, version: int, now_unix_s: float = 0.0) -> AllocationClient:
    """The client as the planner sees it, for a task that starts from ``version``."""
    measured_unix_s = max(client.profile.measured_unix_s, client.last_update_unix_s)
    held = client.held_version if 0 <= client.held_version <= version else 0
    return AllocationClient(
        key=client.key,
        name=client.name,
        profile=client.profile,
        statistics=client.statistics,
        gradient_energy={e.block: e.energy for e in client.gradient_energy},
        time_scale=client.calibration.scale if client.calibration is not None else 1.0,
        time_factors=client.calibration.relative if client.calibration is not None else AS_PROFILED,
        memory_scale=client.memory_scale,
        versions_behind=version - held,
        cached_examples=client.trained_sequences,
        cached_anchor_sequences=client.anchored_sequences,
        wants_evaluate_general=client.can_evaluate_general,
        speed_age_s=max(0.0, now_unix_s - measured_unix_s) if measured_unix_s > 0 else 0.0,
    )


def profiled(client: KnownClient, task: Assignment, report: TrainReport, run: Run) -> ProfiledSeconds:
    """What the client's profile predicts for a task that it carried out as it reports."""
    plan = run.plan.reduced(task.active_blocks) if task.active_blocks else run.plan
    return profiled_seconds(
        allocation_client(client, task.state.to_version),
        layout=plan.layout,
        shape=plan.shape,
        settings=run.allocation_settings(),
        blocks=plan.layout.blocks if run.units_of_tasks else block_units(task.blocks),
        width=task.width,
        steps=task.steps,
        mode=report.mode,
    )


def _coverage(state: MethodState, blocks: Iterable[int] = ()) -> Coverage:
    return Coverage(
        seen={**Coverage.of(blocks).seen, **{s.block: s.weights for s in state.seen}},
        topics={s.block: s.topics for s in state.seen if s.topics},
    )


def learning_rate(config: RunConfig, round: int) -> float:
    """The rate of a round, counted from 1: lr·(1 - 0.9·(round - 1)/max_rounds), or constant (methods.md 5.4)."""
    if config.training.round_decay == "constant":
        return config.training.learning_rate
    return config.training.learning_rate * (1.0 - (1.0 - LAST_ROUND_SHARE) * (round - 1) / config.run.max_rounds)


def warmup_steps(steps: int, blocks: Iterable[int], seen: Iterable[SeenBlock]) -> int:
    """Longer where one of the blocks has never been trained by anybody (methods.md 5.4)."""
    trained = {s.block for s in seen if max(s.weights) > 0}
    longest = WARMUP_KNOWN if set(blocks) <= trained else WARMUP_NEW
    return max(1, min(longest, steps // 2))


def draw(*parts: object) -> int:
    """A number below 2^31 that depends on the parts only: the same on every machine and after every restart."""
    digest = hashlib.sha256("/".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def measures(
    trainers: Sequence[KnownClient],
    evaluators: Sequence[KnownClient],
    *,
    round: int,
    seed: int,
) -> dict[ClientKey, tuple[Measure, ...]]:
    """What each client of the cohort measures of the global model before it trains (methods.md 5.3, 9).

    All of them the KL to the base; a quarter of them, at least two, their validation part, those first that have not
    for longest; one of those that hold the general file that one, unless clients with the role evaluate do.
    Clients with the role evaluate measure all they can.
    """

    def turn(last_round: int, client: KnownClient) -> tuple[int, int]:
        return last_round, draw(seed, round, client.key)

    wanted = max(MIN_EVALUATING, math.ceil(EVALUATING_SHARE * len(trainers)))
    validating = {c.key for c in sorted(trainers, key=lambda c: turn(c.last_validation_round, c))[: max(0, wanted)]}
    general: set[ClientKey] = set()
    if not any(c.can_evaluate_general for c in evaluators):
        able = sorted((c for c in trainers if c.can_evaluate_general), key=lambda c: turn(c.last_general_round, c))
        general = {c.key for c in able[:1]}
    chosen: dict[ClientKey, tuple[Measure, ...]] = {}
    for client in trainers:
        chosen[client.key] = _measures(client.key in validating, client.key in general)
    for client in evaluators:
        chosen[client.key] = _measures(True, client.can_evaluate_general)
    return chosen


def final_measures(client: KnownClient) -> tuple[Measure, ...]:
    """What a client measures of the final state: everything it can."""
    return _measures(True, client.can_evaluate_general)


def _measures(validation: bool, general: bool) -> tuple[Measure, ...]:
    found: list[Measure] = ["anchor"]
    if validation:
        found.append("validation")
    if general:
        found.append("general")
    return tuple(found)


def pool(measured: Iterable[tuple[ClientKey, Measurement]], *, version: int, strength: float = 1.0) -> Pooled:
    """The reports about ``version`` at this strength as one; others are left out."""
    of = [(key, m) for key, m in measured if m.version == version and m.strength == strength]
    kls = [m.kl_sum / m.num_tokens for _, m in of if m.measure == "anchor" and m.num_tokens > 0]
    accuracy, nll = _accuracy_and_nll([m for _, m in of if m.measure == "validation"])
    general_accuracy, general_nll = _accuracy_and_nll([m for _, m in of if m.measure == "general"])
    kl = None
    if kls:
        kl = statistics.median(kls) if len(kls) >= MEDIAN_FROM else statistics.fmean(kls)
    return Pooled(
        version=version,
        kl=kl,
        accuracy=accuracy,
        nll=nll,
        general_accuracy=general_accuracy,
        general_nll=general_nll,
    )


def _accuracy_and_nll(reports: Sequence[Measurement]) -> tuple[float | None, float | None]:
    num_items = sum(m.num_items for m in reports)
    num_tokens = sum(m.num_tokens for m in reports)
    return (
        sum(m.num_correct for m in reports) / num_items if num_items else None,
        math.fsum(m.nll_sum for m in reports) / num_tokens if num_tokens else None,
    )


def retention(pooled: Pooled, state: MethodState) -> float | None:
    """How much of the base's ability on the general file is left: the ratio of accuracies, or of perplexities where the
    base gets nothing right.

    None until both this version and version 0 were measured.
    """
    base_accuracy, base_nll = state.base_general_accuracy, state.base_general_nll
    if pooled.general_accuracy is not None and base_accuracy:
        return pooled.general_accuracy / base_accuracy
    if pooled.general_nll is not None and base_nll is not None:
        return math.exp(base_nll - pooled.general_nll)
    return None


def score(pooled: Pooled) -> float | None:
    """Pooled accuracy, or minus the NLL per token where nothing is right or wrong (methods.md 9)."""
    if pooled.accuracy is not None:
        return pooled.accuracy
    return None if pooled.nll is None else -pooled.nll


def observe(state: MethodState, pooled: Pooled, config: RunConfig) -> MethodState:
    """The state after a round's measurements: controller, bests, and the counters of the stop rules."""
    weight, armed = next_anchor_weight(state.anchor_weight, state.armed, pooled.kl, config.forgetting)
    state = replace(state, anchor_weight=weight, armed=armed)
    if pooled.version == 0 and state.base_general_accuracy is None and state.base_general_nll is None:
        state = replace(state, base_general_accuracy=pooled.general_accuracy, base_general_nll=pooled.general_nll)
    if pooled.kl is not None:
        over = pooled.kl > DIVERGED_FACTOR * config.forgetting.max_kl
        state = replace(state, diverged_rounds=state.diverged_rounds + 1 if over else 0)
    if pooled.accuracy is None and pooled.nll is None:
        return state
    state = replace(state, recent=(*state.recent, pooled)[-SCORE_WINDOW:])
    within = pooled.kl is None or pooled.kl <= BEST_KL_FACTOR * config.forgetting.max_kl
    best = _rank(state.best_version_accuracy, state.best_version_nll)
    if within and _rank(pooled.accuracy, pooled.nll) > best:
        state = replace(
            state,
            best_version=pooled.version,
            best_version_accuracy=pooled.accuracy,
            best_version_nll=pooled.nll,
        )
    accuracy, nll = recent_means(state)
    best_accuracy = accuracy is not None and (state.best_accuracy is None or accuracy > state.best_accuracy)
    best_nll = nll is not None and (state.best_nll is None or nll < state.best_nll - NLL_IMPROVEMENT)
    return replace(
        state,
        growth=growth.with_score(state.growth, MeanScore(accuracy=accuracy, nll=nll)),
        best_accuracy=accuracy if best_accuracy else state.best_accuracy,
        best_nll=nll if best_nll else state.best_nll,
        rounds_since_best=0 if best_accuracy or best_nll else state.rounds_since_best + 1,
    )


def _rank(accuracy: float | None, nll: float | None) -> tuple[float, float]:
    """Higher is better: by accuracy, among equals by NLL."""
    return (
        accuracy if accuracy is not None else -math.inf,
        -nll if nll is not None else -math.inf,
    )


def recent_means(state: MethodState) -> tuple[float | None, float | None]:
    """Mean accuracy and mean NLL of the last three measured rounds; None before there are three."""
    accuracies = [p.accuracy for p in state.recent if p.accuracy is not None]
    nlls = [p.nll for p in state.recent if p.nll is not None]
    return (
        statistics.fmean(accuracies) if len(accuracies) == SCORE_WINDOW else None,
        statistics.fmean(nlls) if len(nlls) == SCORE_WINDOW else None,
    )


def stop_reason(state: MethodState, config: RunConfig, *, round: int, may_grow: bool = False) -> StopReason | None:
    """Why the run ends with ``round``, None if it goes on (methods.md 9).

    Args:
        may_grow: a block may still be added: then the run waits for the growth instead of ending without improvement.
    """
    if state.diverged_rounds >= DIVERGED_ROUNDS:
        return "diverged"
    accuracy, _ = recent_means(state)
    if config.run.target_score > 0 and accuracy is not None and accuracy >= config.run.target_score:
        return "target_score"
    spent = budgets.exhausted(state.spent, config.run)
    if spent is not None:
        return spent
    if state.rounds_since_best >= PATIENCE_ROUNDS and (not may_grow or state.growth.refused):
        return "no_improvement"
    return "max_rounds" if round >= config.run.max_rounds else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Growing:
    """Who could train a further block."""

    run: Run
    """With all blocks of its plan."""
    clients: Sequence[KnownClient]
    """The cohort of the round."""


def grow(state: MethodState, growing: Growing, kl: float | None, *, round: int) -> MethodState:
    """The state with one block more, if the rule of ``growth.py`` asks for it and somebody can train it.

    Args:
        kl: as measured in this round.
    """
    run, config = growing.run, growing.run.config
    active = active_blocks(run, state)
    block = growth.next_block(run.plan, active, config.most_blocks)
    if block is None or not growth.wants_block(state.growth, round=round, kl=kl, max_kl=config.forgetting.max_kl):
        return state
    plan = run.plan.reduced((*active, block))
    reasons = [
        cannot_train(
            allocation_client(client, client.held_version),
            block,
            layout=plan.layout,
            shape=plan.shape,
            settings=run.allocation_settings(),
            deadline_s=state.deadline.seconds if state.deadline is not None else math.inf,
        )
        for client in growing.clients
    ]
    if all(reasons):
        refused = f"nobody can train block {block} after layer {plan.block(block).after_layer}: "
        nearest = min(reasons, key=len, default="no client took part")
        return replace(state, growth=replace(state.growth, refused=refused + nearest))
    if config.expansion.placement == "adaptive":  # the next round finds out where (``probing.py``)
        if round + 1 >= config.run.max_rounds:
            return state
        return replace(state, growth=replace(state.growth, probing=1, refused=""), rounds_since_best=0)
    return replace(state, growth=growth.with_block(state.growth, active, block, round=round), rounds_since_best=0)


def may_grow(run: Run, state: MethodState) -> bool:
    """True while the run has fewer blocks than it may come to have."""
    return growth.next_block(run.plan, active_blocks(run, state), run.config.most_blocks) is not None


def after_fold(
    state: MethodState,
    updates: Sequence[AcceptedUpdate],
    folded: FoldResult,
    topics: Mapping[ClientKey, tuple[int, ...]] | None = None,
    blocks: Iterable[int] = (),
) -> MethodState:
    """The state with the fold's norms and with the examples that trained each block, and their topics.

    Args:
        blocks: of the plan.
    """
    shared = topics or {}
    trained = {block for update in updates for block in update.blocks}
    idle = {one.block: one.rounds for one in state.idle}
    coverage = _coverage(state).after_round(
        Trained(
            blocks=block_units(u.blocks), num_examples=u.num_examples, topics=shared.get(u.client, ()), width=u.width
        )
        for u in updates
    )
    return replace(
        state,
        idle=tuple(IdleBlock(block=b, rounds=idle.get(b, 0) + 1) for b in sorted(set(blocks) - trained))
        if updates
        else state.idle,
        norms=tuple(BlockNorms(block=b, rounds=tuple(folded.history[b])) for b in sorted(folded.history)),
        seen=tuple(
            SeenBlock(block=b, weights=coverage.seen[b], topics=coverage.topics.get(b, ()))
            for b in sorted(coverage.seen)
        ),
    )


def regrouped(
    state: MethodState, updates: Sequence[AcceptedUpdate], *, shape: Units, model: GlobalState
) -> MethodState:
    """The state with the memberships after a round, where clients have models of their own.

    Args:
        model: the published state that the round started from.
    """
    if state.mixture is None:
        return state
    found = personalisation.regrouped(state.mixture, updates, shape=shape, published=model.published)
    return replace(state, mixture=found)


def personal_state(model: GlobalState, state: MethodState, client: ClientKey | None, *, shape: Units) -> GlobalState:
    """What a client starts from, in the units that it holds; with None, what stands for all of them.

    Args:
        shape: what an update consists of.
    """
    personal = isinstance(shape, TrainedUnits) and personal_pairs(shape) is not None
    if state.mixture is None and not personal:
        return model
    published = personalisation.mixed(model.published, memberships_of(state, client))
    error = None
    if isinstance(shape, TrainedUnits):
        if personal:
            prior = prior_of(published, shape)
            published, error = prior.state, prior.error
        shape = shape.held()
    sha256 = states.state_sha256(shape, published)
    return replace(model, published=published, residual={}, moments={}, sha256=sha256, prior_error=error)


def memberships_of(state: MethodState, client: ClientKey | None) -> tuple[float, ...]:
    """A client's share in each cluster; with None, the population's."""
    if state.mixture is None:
        return (1.0,)
    return state.mixture.population() if client is None else state.mixture.memberships(client)


def new_orphans(state: MethodState) -> dict[int, bool]:
    """Blocks that nobody has trained for just :data:`ORPHAN_ROUNDS` rounds -> whether somebody had before."""
    seen = {one.block for one in state.seen if max(one.weights) > 0}
    return {one.block: one.block in seen for one in state.idle if one.rounds == ORPHAN_ROUNDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSettings:
    """How a version was published; kept with the round, so that a replay does the same."""

    dense: bool
    """The last version of a run, so that nothing waits at export (methods.md 7.2)."""
    format: DeltaFormat
    density: float
    rule: ServerRule = ServerRule()
    fold: FoldRule = FoldRule()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GlobalState:
    """The published model: what every client can have, and what the steps still owe it."""

    version: int
    published: State
    residual: State
    sha256: str
    """Of ``published``."""
    moments: State = field(default_factory=dict[int, dict[str, FloatArray]])
    """Of the server's optimizer; empty for ``avg``."""
    prior_error: float | None = None
    """Of a client's prior: the share of what was learnt that its rank leaves out."""

    @classmethod
    def zero(cls, shape: Units) -> GlobalState:
        """Version 0: the base model."""
        return cls(version=0, published={}, residual={}, sha256=states.state_sha256(shape, {}))


def publish(
    model: GlobalState, folded: FoldResult, *, shape: Units, settings: PublishSettings
) -> tuple[GlobalState, Bytes] | None:
    """The next version and the step to it; None if nothing was learnt, and the version stays.

    The tensors of ``folded.aggregate`` are let go of on the way.
    """
    if not folded.aggregate and not (settings.dense and model.residual):
        return None
    change, moments = server_step(folded.aggregate, model.moments, settings.rule, shape=shape, widths=folded.widths)
    if settings.dense:
        made = states.publish_dense(model.published, change, model.residual, shape=shape, release=True)
    else:
        made = states.publish(
            model.published,
            change,
            model.residual,
            shape=shape,
            format=settings.format,
            density=settings.density,
            widths=folded.widths,
            release=True,
        )
    after = GlobalState(
        version=model.version + 1,
        published=made.published,
        residual=made.residual,
        sha256=states.state_sha256(shape, made.published),
        moments=moments,
    )
    return after, made.step


def publish_stacks(
    model: GlobalState, folded: FoldResult, *, shape: Units, scaling: float
) -> tuple[GlobalState, Bytes] | None:
    """The state after the products of the stacked pairs are added, and the step, which is the stacks; None for none.

    Args:
        scaling: what the products are multiplied by.
    """
    if not folded.aggregate:
        return None
    units = states.published_units(shape)
    made = states.publish_stack(model.published, folded.aggregate, shape=units, scaling=scaling)
    after = GlobalState(
        version=model.version + 1,
        published=made.published,
        residual={},
        sha256=states.state_sha256(units, made.published),
    )
    return after, made.step


class Method(Protocol):
    """What a method of ``methods/`` decides; pure functions of their arguments."""

    def plan(
        self, present: Sequence[KnownClient], run: Run, state: MethodState, start: Start, *, now_unix_s: float = 0.0
    ) -> PlannedRound:
        """Who does what in a round."""
        ...

    def aggregate(
        self, updates: Sequence[AcceptedUpdate], *, shape: Units, state: MethodState, model: GlobalState
    ) -> FoldResult:
        """The round's updates as one change per unit; a function of their set.

        Args:
            shape: what an update consists of.
            model: the published state that the round started from.
        """
        ...

    def publish(
        self, model: GlobalState, folded: FoldResult, *, shape: Units, settings: PublishSettings
    ) -> tuple[GlobalState, Bytes] | None:
        """The next version and the step to it; None if nothing was learnt, and the version stays."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClosedRound:
    """What a round amounts to; nothing of it is written yet."""

    model: GlobalState
    step: Bytes | None
    """None for a round that changed nothing."""
    state: MethodState
    pooled: Pooled
    folded: FoldResult
    """Without the aggregate, which is as large as the state and published by now."""
    stop_reason: StopReason | None
    settings: PublishSettings
    privacy: PrivacyBooks | None = None
    """Of a private run, after this round."""


def fold_round(
    method: Method,
    updates: Sequence[AcceptedUpdate],
    *,
    shape: Units,
    state: MethodState,
    model: GlobalState,
    rule: FoldRule,
    noise_key: bytes = b"",
    round: int = 0,
) -> FoldResult:
    """The round's updates as one change per unit: by the method, or by the rule that the operator has put in its
    place.

    Args:
        noise_key: of a private run; the noise is a function of it and of ``round``.
    """
    if rule.noise_multiplier > 0:
        assert noise_key, "a private run has a key"
        return private_fold(updates, shape=shape, rule=rule, key=noise_key, round=round)
    if state.mixture is not None and personal_pairs(shape) is None:
        history = {norms.block: norms.rounds for norms in state.norms}
        return personalisation.fold(updates, shape=shape, history=history, found=state.mixture)
    if rule.kind == "mean":
        return method.aggregate(updates, shape=shape, state=state, model=model)
    history = {norms.block: norms.rounds for norms in state.norms}
    return aggregation.fold(updates, shape=shape, history=history, combine=combine_of(rule.kind))


def close(
    model: GlobalState,
    updates: Sequence[AcceptedUpdate],
    measured: Iterable[tuple[ClientKey, Measurement]],
    *,
    config: RunConfig,
    shape: Units,
    state: MethodState,
    round: int,
    method: Method,
    topics: Mapping[ClientKey, tuple[int, ...]] | None = None,
    blocks: Iterable[int] = (),
    spent: Spent | None = None,
    growing: Growing | None = None,
    privacy: PrivacyBooks | None = None,
) -> ClosedRound:
    """Fold, observe, decide whether to grow and to go on, publish: a function of the set of updates and reports.

    Args:
        shape: what an update consists of.
        method: folds and publishes.
        topics: what the clients share of their data's topics.
        blocks: ids of the active units.
        spent: in all rounds, this one included; default: as before.
        growing: where blocks may be added; default: nowhere.
        privacy: of a private run, before this round.
    """
    pooled = pool(measured, version=model.version)
    state = observe(state, pooled, config)
    rule = fold_rule(config)
    key = b"" if privacy is None else privacy.key
    folded = fold_round(method, updates, shape=shape, state=state, model=model, rule=rule, noise_key=key, round=round)
    state = after_fold(state, updates, folded, topics, blocks)
    state = regrouped(state, updates, shape=shape, model=model)
    state = state if spent is None else replace(state, spent=spent)
    if growing is not None:  # from here on the configuration is not asked any more
        state = replace(state, growth=replace(state.growth, active=active_blocks(growing.run, state)))
    after_growth = state if growing is None else grow(state, growing, pooled.kl, round=round)
    may = growing is not None and may_grow(growing.run, state)
    reason = stop_reason(after_growth, config, round=round, may_grow=may)
    if privacy is not None and folded.aggregate:
        privacy = privacy.after(rule)
    if reason is None and privacy is not None and spends_too_much(privacy.after(rule), config.privacy):
        reason = "privacy_budget"
    if reason is None or after_growth.growth.refused:  # a run that ends does not grow any more
        state = after_growth
    settings = PublishSettings(
        dense=reason is not None,
        format=config.delta.format,
        density=config.delta.down_density,
        rule=ServerRule(
            optimizer=config.training.server_optimizer,
            learning_rate=learning_rate(config, round),
            steps=config.training.steps,
        ),
        fold=rule,
    )
    published = method.publish(model, folded, shape=shape, settings=settings)
    after, step = (model, None) if published is None else published
    return ClosedRound(
        model=after,
        step=step,
        state=state,
        pooled=pooled,
        folded=replace(folded, aggregate={}),
        stop_reason=reason,
        settings=settings,
        privacy=privacy,
    )
