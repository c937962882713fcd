"""The rules of the method between rounds: controller, learning rate, warm-up, who measures, when it stops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedblocks.aggregator import run_rules
from fedblocks.aggregator.aggregation import AcceptedUpdate, FoldResult
from fedblocks.aggregator.allocation import TIME_SAFETY
from fedblocks.aggregator.registry import KnownClient, after_failure, after_update, client_from_hello
from fedblocks.profiles.calibration import Calibration
from fedblocks.profiles.device import DeviceProfile
from fedblocks.protocol import run_config
from fedblocks.protocol.codec import from_plain, to_plain
from fedblocks.protocol.expansion import plan_expansion
from fedblocks.protocol.messages import (
    PROTOCOL_VERSION,
    Assignment,
    AttemptId,
    ClientKey,
    DataStatistics,
    Delta,
    Hello,
    Measure,
    Measurement,
    TensorHeader,
)

PLAN = plan_expansion(
    base_hash="ab" * 32,
    config={
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    placement="thirds",
    num_blocks=3,
)
START = run_rules.Start(round=1, version=0, state_sha256="0" * 64)


def config(*overrides: str) -> run_config.RunConfig:
    return run_config.from_mapping({}, overrides)


def run_of(*overrides: str) -> run_rules.Run:
    return run_rules.Run(run_id="tiny", config=config(*overrides), plan=PLAN, anchor_sequences=512, anchor_tokens=256)


def device(memory_bytes: int = 1 << 30, flops_per_s: float = 1e9, name: str = "device") -> DeviceProfile:
    return DeviceProfile(
        device=name,
        source="catalog",
        accelerator="cpu",
        compute_dtype="float32",
        cpu_cores=1,
        memory_usable_bytes=memory_bytes,
        runtime_memory_bytes=0,
        gemm_flops_per_s=flops_per_s,
        memory_bytes_per_s=1e9,
        step_overhead_s=0.001,
        uplink_bytes_per_s=1e6,
        downlink_bytes_per_s=1e6,
        disk_read_bytes_per_s=1e8,
        disk_free_bytes=1 << 30,
        four_bit="ok",
    )


def client(name: str, **changes: Any) -> KnownClient:
    known = KnownClient(
        key=ClientKey((name * 40)[:40]),
        name=name,
        software="test",
        profile=device(),
        statistics=DataStatistics(num_examples=100, num_target_tokens=500, mean_tokens=10.0, max_tokens=16),
        can_evaluate_general=False,
        held_version=0,
    )
    return replace(known, **changes)


def pooled(version: int, **values: float | None) -> run_rules.Pooled:
    empty = dict.fromkeys(("kl", "accuracy", "nll", "general_accuracy", "general_nll"))
    return run_rules.Pooled(version=version, **{**empty, **values})


def test_lambda_waits_until_the_kl_first_comes_near_the_set_point() -> None:
    forgetting = config("forgetting.max_kl=0.1", "forgetting.min_lambda=0").forgetting
    assert run_rules.next_anchor_weight(1.0, False, 0.0, forgetting) == (1.0, False)
    assert run_rules.next_anchor_weight(1.0, False, 0.0719, forgetting) == (1.0, False)
    weight, armed = run_rules.next_anchor_weight(1.0, False, 0.0721, forgetting)
    assert armed
    assert weight == pytest.approx(1.0 + 0.25 * (0.0721 / 0.09 - 1))


def test_lambda_rises_above_the_set_point_and_falls_below_it_once_armed() -> None:
    forgetting = config("forgetting.max_kl=0.1", "forgetting.min_lambda=0").forgetting
    assert run_rules.next_anchor_weight(1.0, True, 0.18, forgetting)[0] == pytest.approx(1.25)
    assert run_rules.next_anchor_weight(1.0, True, 0.045, forgetting)[0] == pytest.approx(0.875)
    assert run_rules.next_anchor_weight(1.0, True, 9.0, forgetting)[0] == pytest.approx(1.5)


def test_lambda_gives_back_what_it_rose_by_and_stops_at_its_floor() -> None:
    forgetting = config("forgetting.max_kl=0.1").forgetting
    assert run_rules.next_anchor_weight(1.5, True, 0.045, forgetting)[0] == pytest.approx(1.375)
    assert run_rules.next_anchor_weight(1.1, True, 0.0, forgetting)[0] == 1.0
    assert run_rules.next_anchor_weight(1.0, True, 0.0, forgetting) == (1.0, True)
    assert run_rules.next_anchor_weight(1.0, True, 0.18, forgetting)[0] == pytest.approx(1.25)


def test_a_floor_of_zero_is_pure_dual_ascent() -> None:
    forgetting = config("forgetting.max_kl=0.1", "forgetting.min_lambda=0").forgetting
    weights = [1.0]
    for _ in range(5):
        weights.append(run_rules.next_anchor_weight(weights[-1], True, 0.0, forgetting)[0])
    assert weights == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_a_run_whose_kl_stays_far_below_the_budget_keeps_its_anchor() -> None:
    run = config("forgetting.max_kl=0.1")
    state = run_rules.initial_state(run)
    for version, kl in enumerate((0.08, 0.001, 0.002, 0.001)):
        state = run_rules.observe(state, pooled(version, kl=kl), run)
    assert (state.anchor_weight, state.armed) == (1.0, True)


@given(
    st.floats(0, 1),
    st.floats(0, 20),
    st.booleans(),
    st.none() | st.floats(-1e-5, 1e3, allow_nan=False),
    st.floats(1e-6, 1e3),
)
def test_lambda_never_leaves_its_bounds_and_rises_exactly_when_the_kl_is_above_the_set_point(
    floor: float, above: float, armed: bool, kl: float | None, budget: float
) -> None:
    forgetting = replace(config().forgetting, max_kl=budget, min_lambda=floor)
    weight = min(20.0, floor + above)
    after, armed_after = run_rules.next_anchor_weight(weight, armed, kl, forgetting)
    assert floor <= after <= 20
    assert armed_after or not armed
    if kl is not None and kl > 0.9 * budget:
        assert after > weight or weight == 20 or after == pytest.approx(weight)
        assert armed_after
    if kl is None:
        assert after == weight


def test_nobody_measured_so_lambda_stays() -> None:
    assert run_rules.next_anchor_weight(3.0, True, None, config().forgetting) == (3.0, True)


def test_an_infinite_budget_means_no_anchor_at_all() -> None:
    run = run_of("forgetting.max_kl=inf")
    state = run_rules.initial_state(run.config)
    assert state.anchor_weight == 0.0
    planned = run_rules.plan([client("ann")], run, state, START)
    (task,) = planned.tasks.values()
    assert isinstance(task, Assignment)
    assert (task.anchor_weight, task.anchor_batch_size) == (0.0, 0)
    assert run_rules.observe(state, pooled(0, kl=5.0), run.config).anchor_weight == 0.0


def test_the_learning_rate_falls_in_a_line_to_a_tenth_beyond_the_last_round() -> None:
    linear = config("training.learning_rate=1e-3", "run.max_rounds=10")
    rates = [run_rules.learning_rate(linear, number) for number in range(1, 12)]
    assert rates[0] == 1e-3
    assert rates[10] == pytest.approx(1e-4)
    assert rates == sorted(rates, reverse=True)
    constant = config("training.learning_rate=1e-3", "training.round_decay=constant")
    assert run_rules.learning_rate(constant, 99) == 1e-3


@pytest.mark.parametrize(
    ("steps", "blocks", "expected"),
    [(16, (0, 1), 8), (16, (0,), 2), (8, (0, 1), 4), (4, (0,), 2), (2, (0, 1), 1), (1, (0, 1), 1), (40, (1,), 8)],
)
def test_a_block_that_nobody_has_trained_gets_the_long_warm_up(
    steps: int, blocks: tuple[int, ...], expected: int
) -> None:
    seen = (run_rules.SeenBlock(block=0, weights=(10.0,) * 4), run_rules.SeenBlock(block=1, weights=(0.0,) * 4))
    assert run_rules.warmup_steps(steps, blocks, seen) == expected


def test_a_quarter_of_the_cohort_but_at_least_two_measure_their_validation_part_in_turn() -> None:
    clients = [client(name, last_validation_round=i) for i, name in enumerate("abcdefghijkl")]
    chosen = run_rules.measures(clients, [], round=20, seed=1)
    validating = [c.name for c in clients if "validation" in chosen[c.key]]
    assert validating == ["a", "b", "c"]
    few = run_rules.measures(clients[:3], [], round=20, seed=1)
    assert sum("validation" in m for m in few.values()) == 2
    assert all("anchor" in m for m in chosen.values())


def test_over_the_rounds_everybody_has_a_turn() -> None:
    clients = [client(name) for name in "abcd"]
    seen: set[str] = set()
    for number in (1, 2):
        chosen = run_rules.measures(clients, [], round=number, seed=1)
        validating = {c.name for c in clients if "validation" in chosen[c.key]}
        clients = [replace(c, last_validation_round=number) if c.name in validating else c for c in clients]
        seen |= validating
    assert seen == set("abcd")


def test_general_ability_is_measured_by_the_evaluators_or_else_by_one_client_that_can() -> None:
    able = [client(name, can_evaluate_general=True) for name in "ab"]
    chosen = run_rules.measures(able, [], round=1, seed=1)
    assert sum("general" in m for m in chosen.values()) == 1
    evaluator = client("eve", can_evaluate_general=True)
    chosen = run_rules.measures(able, [evaluator], round=1, seed=1)
    assert [key for key, m in chosen.items() if "general" in m] == [evaluator.key]
    assert chosen[evaluator.key] == ("anchor", "validation", "general")


def measured(name: str, measure: Measure, *, version: int = 1, **sums: Any) -> tuple[ClientKey, Measurement]:
    return client(name).key, Measurement(measure=measure, version=version, **sums)


def test_reports_are_pooled_by_sums_and_the_kl_by_its_median() -> None:
    reports = [
        measured("a", "anchor", num_tokens=100, kl_sum=1.0),
        measured("b", "anchor", num_tokens=100, kl_sum=2.0),
        measured("c", "anchor", num_tokens=100, kl_sum=900.0),
        measured("a", "validation", num_items=10, num_correct=1, num_tokens=10, nll_sum=20.0),
        measured("b", "validation", num_items=30, num_correct=30, num_tokens=30, nll_sum=20.0),
        measured("b", "general", num_items=5, num_correct=4),
        measured("d", "validation", version=0, num_items=1000, num_correct=0),
    ]
    found = run_rules.pool(reports, version=1)
    assert found.kl == pytest.approx(0.02)
    assert found.accuracy == pytest.approx(31 / 40)
    assert found.nll == pytest.approx(1.0)
    assert found.general_accuracy == 0.8
    two = run_rules.pool(reports[:2], version=1)
    assert two.kl == pytest.approx(0.015)
    assert run_rules.pool([], version=1) == pooled(1)


def test_retention_is_the_ratio_to_version_0_of_accuracies_or_of_perplexities() -> None:
    settings = config()
    state = run_rules.observe(
        run_rules.initial_state(settings), pooled(0, general_accuracy=0.8, general_nll=1.0), settings
    )
    assert run_rules.retention(pooled(5, general_accuracy=0.76), state) == pytest.approx(0.95)
    text = run_rules.observe(run_rules.initial_state(settings), pooled(0, general_nll=1.0), settings)
    assert run_rules.retention(pooled(5, general_nll=1.1), text) == pytest.approx(math.exp(-0.1))
    hopeless = run_rules.observe(
        run_rules.initial_state(settings), pooled(0, general_accuracy=0.0, general_nll=5.0), settings
    )
    assert run_rules.retention(pooled(5, general_accuracy=0.0, general_nll=5.0), hopeless) == 1.0
    assert run_rules.retention(pooled(5), state) is None
    assert run_rules.retention(pooled(5, general_accuracy=0.5), run_rules.initial_state(settings)) is None


def after_scores(settings: run_config.RunConfig, scores: list[run_rules.Pooled]) -> list[str | None]:
    """The stop reason after each round."""
    state, reasons = run_rules.initial_state(settings), list[str | None]()
    for number, found in enumerate(scores, start=1):
        state = run_rules.observe(state, found, settings)
        reasons.append(run_rules.stop_reason(state, settings, round=number))
    return reasons


def test_the_run_ends_with_its_last_round() -> None:
    assert after_scores(config("run.max_rounds=3"), [pooled(v) for v in range(3)]) == [None, None, "max_rounds"]


def test_the_target_is_reached_by_the_mean_of_three_measured_rounds() -> None:
    settings = config("run.target_score=0.5")
    scores = [pooled(0, accuracy=0.9), pooled(1, accuracy=0.2), pooled(1), pooled(2, accuracy=0.4)]
    assert after_scores(settings, scores) == [None, None, None, "target_score"]


def test_ten_rounds_without_a_better_mean_end_the_run() -> None:
    flat = [pooled(v, accuracy=0.5) for v in range(13)]
    reasons = after_scores(config(), flat)
    # Round 3 brings the first mean; rounds 4 to 13 bring no better one.
    assert reasons == [None] * 12 + ["no_improvement"]


def test_a_falling_nll_is_an_improvement_even_where_nothing_is_right_yet() -> None:
    falling = [pooled(v, accuracy=0.0, nll=5.0 - 0.02 * v) for v in range(60)]
    assert set(after_scores(config(), falling)) == {None}
    stuck = [pooled(v, accuracy=0.0, nll=5.0 - 0.0004 * v) for v in range(14)]
    assert "no_improvement" in after_scores(config(), stuck)


def test_five_rounds_in_a_row_above_three_budgets_are_a_divergence() -> None:
    settings = config("forgetting.max_kl=0.01")
    over = [pooled(v, kl=0.031) for v in range(4)]
    assert after_scores(settings, [*over, pooled(4, kl=0.029), *over])[-1] is None
    assert after_scores(settings, [*over, pooled(4, kl=0.031)])[-1] == "diverged"


def test_the_best_version_is_the_best_within_one_and_a_half_budgets() -> None:
    settings = config("forgetting.max_kl=0.01")
    state = run_rules.initial_state(settings)
    for version, accuracy, kl in ((0, 0.1, 0.0), (1, 0.5, 0.014), (2, 0.9, 0.016), (3, 0.5, 0.01)):
        state = run_rules.observe(state, pooled(version, accuracy=accuracy, kl=kl), settings)
    assert state.best_version == 1


def test_what_the_method_carries_survives_the_ledger_and_does_not_grow() -> None:
    settings = config()
    state = replace(
        run_rules.initial_state(settings),
        seen=(run_rules.SeenBlock(block=1, weights=(2.5,) * 4),),
        norms=(run_rules.BlockNorms(block=0, rounds=((1.0, 2.0), ())),),
    )
    for version in range(50):
        state = run_rules.observe(state, pooled(version, accuracy=0.1, kl=0.02, nll=1.0), settings)
    kept = json.loads(json.dumps(to_plain(state)))
    assert from_plain(run_rules.MethodState, kept, where="test") == state
    assert len(state.recent) == 3


def test_a_plan_gives_every_fitting_client_a_task_and_leaves_out_the_one_without_data() -> None:
    run = run_of("allocation.deadline_s=60.0")
    nobody = client("nob", statistics=DataStatistics(num_examples=0, num_target_tokens=0, mean_tokens=1, max_tokens=1))
    planned = run_rules.plan([client("ann"), nobody], run, run_rules.initial_state(run.config), START)
    task = planned.tasks[client("ann").key]
    assert isinstance(task, Assignment)
    assert task.blocks == (0, 1, 2)
    assert task.warmup_steps == 8
    assert not isinstance(planned.tasks.get(nobody.key), Assignment)
    assert {c.name for c in planned.plan.choices} == {"ann", "nob"}


def test_the_plan_does_not_depend_on_the_order_of_the_clients() -> None:
    run = run_of()
    clients = [client("ann"), client("bob", profile=device(flops_per_s=1e8)), client("cid")]
    state = run_rules.initial_state(run.config)
    assert run_rules.plan(clients, run, state, START) == run_rules.plan(clients[::-1], run, state, START)


def test_nobody_fits_so_the_plan_has_no_task_and_says_what_came_nearest() -> None:
    run = run_of()
    tiny = client("ann", profile=device(memory_bytes=1000))
    planned = run_rules.plan([tiny], run, run_rules.initial_state(run.config), START)
    assert not planned.tasks
    assert "ann" in planned.plan.no_client_fits


SLOW = Calibration.of_scale(30.0)


def test_a_deadline_from_declared_speeds_is_forgotten_and_one_from_measured_speeds_is_kept() -> None:
    run = run_of()
    state = run_rules.initial_state(run.config)
    declared = run_rules.plan([client("ann"), client("bob", calibration=SLOW)], run, state, START)
    assert declared.deadline is None
    both = [client("ann", calibration=SLOW), client("bob", calibration=SLOW)]
    measured_plan = run_rules.plan(both, run, state, START)
    assert measured_plan.deadline is not None
    assert measured_plan.deadline.seconds > declared.plan.deadline.seconds
    kept = replace(state, deadline=measured_plan.deadline)
    with_a_newcomer = run_rules.plan([*both, client("cid")], run, kept, replace(START, round=2))
    assert with_a_newcomer.deadline == measured_plan.deadline


def test_a_client_that_is_slower_than_it_said_gets_less_next_time() -> None:
    run = run_of("allocation.deadline_s=3.0", "training.steps=16")
    state = run_rules.initial_state(run.config)
    honest = run_rules.plan([client("ann")], run, state, START).tasks[client("ann").key]
    slow = run_rules.plan([client("ann", calibration=Calibration.of_scale(6.0))], run, state, START).tasks[
        client("ann").key
    ]
    assert isinstance(honest, Assignment)
    assert isinstance(slow, Assignment)
    assert (len(slow.blocks), slow.steps) < (len(honest.blocks), honest.steps)


@pytest.fixture
def trained_task(make_world: Callable[..., Any]) -> tuple[Assignment, Delta]:
    """A task of the test's world and its update."""
    world = make_world("ann")
    world.join()
    world.step(11.0)
    world.receive()
    ann = world.sites["ann"]
    task = ann.tasks[-1]
    delta, _ = ann.train(task)
    return task, delta


def reporting(delta: Delta, **seconds: float) -> Delta:
    return replace(delta, train=replace(delta.train, **seconds))


def test_the_first_measured_speed_replaces_the_declared_one_and_later_ones_are_averaged(
    trained_task: tuple[Assignment, Delta],
) -> None:
    task, delta = trained_task
    ann, run = client("ann"), run_of()
    profiled = run_rules.profiled(ann, task, delta.train, run)
    step_s = sum(profiled.step)
    known, note = after_update(ann, task, reporting(delta, step_s=4 * step_s), profiled)
    assert note == ""
    assert known.calibration is not None
    assert known.calibration.scale == pytest.approx(4.0)
    assert known.gradient_energy[0].energy == 1.0
    assert known.trained_sequences == 16 * 8
    again, _ = after_update(known, task, reporting(delta, step_s=4 * step_s), profiled)
    assert again.calibration is not None
    assert again.calibration.scale == pytest.approx(4.0)
    slower, _ = after_update(again, task, reporting(delta, step_s=4.8 * step_s), profiled)
    assert slower.calibration is not None
    assert 4.1 < slower.calibration.level < 4.5


def test_a_report_is_held_against_what_the_planner_predicts_for_the_same_task(
    trained_task: tuple[Assignment, Delta],
) -> None:
    task, delta = trained_task
    ann, run = client("ann"), run_of()
    [choice] = run_rules.plan([ann], run, run_rules.initial_state(run.config), START).plan.choices
    assert choice.predicted is not None
    done = replace(task, blocks=choice.blocks, steps=choice.steps, width=choice.width)
    profiled = run_rules.profiled(ann, done, replace(delta.train, mode=choice.predicted.mode), run)
    assert sum(profiled.step) == pytest.approx(choice.predicted.step_s)
    transfers_s = choice.predicted.upload_bytes / ann.profile.uplink_bytes_per_s
    transfers_s += choice.predicted.download_bytes / ann.profile.downlink_bytes_per_s
    computed_s = profiled.prefix_s + profiled.measuring_s + choice.steps * sum(profiled.step)
    assert choice.predicted.seconds == pytest.approx(TIME_SAFETY * (transfers_s + computed_s))


def test_after_a_report_the_planner_predicts_what_was_measured(trained_task: tuple[Assignment, Delta]) -> None:
    task, delta = trained_task
    ann, run = client("ann"), run_of("allocation.deadline_s=1000.0")
    state = run_rules.initial_state(run.config)
    [choice] = run_rules.plan([ann], run, state, START).plan.choices
    assert choice.predicted is not None
    done = replace(task, blocks=choice.blocks, steps=choice.steps, width=choice.width)
    report = replace(delta.train, mode=choice.predicted.mode, step_s=0.02, prefix_s=5.0, measure_s=0.7)
    profiled = run_rules.profiled(ann, done, report, run)
    known, _ = after_update(ann, done, replace(delta, train=report), profiled)
    known = replace(known, trained_sequences=0, anchored_sequences=0, held_version=0)
    [after] = run_rules.plan([known], run, state, START).plan.choices
    assert after.predicted is not None
    assert (after.blocks, after.predicted.mode) == (choice.blocks, choice.predicted.mode)
    assert after.predicted.step_s == pytest.approx(0.02)
    transfers_s = after.predicted.upload_bytes / ann.profile.uplink_bytes_per_s
    transfers_s += after.predicted.download_bytes / ann.profile.downlink_bytes_per_s
    assert after.predicted.seconds == pytest.approx(TIME_SAFETY * (transfers_s + 5.0 + 0.7 + after.steps * 0.02))


def test_a_client_that_slows_down_is_planned_for_at_its_new_speed_after_two_updates_and_the_operator_is_told(
    trained_task: tuple[Assignment, Delta],
) -> None:
    task, delta = trained_task
    known, run = client("orin-2"), run_of()
    profiled = run_rules.profiled(known, task, delta.train, run)
    step_s = sum(profiled.step)
    notes = []
    for times in (1.0, 1.0, 1.0, 2.1, 2.1, 1.0, 1.0):
        known, note = after_update(known, task, reporting(delta, step_s=times * step_s), profiled)
        notes.append(note)
    assert notes[:4] == [""] * 4
    assert notes[4].startswith(
        "orin-2 takes 2.1 times what was predicted, twice in a row: planned for at its new speed. If nothing else "
    )
    assert "fedblocks probe" in notes[4]
    assert notes[5] == ""
    assert notes[6] == "orin-2 is 2.1 times as fast as was predicted, twice in a row: planned for at its new speed"
    assert known.calibration is not None
    assert known.calibration.level == pytest.approx(1.0, rel=0.01)


def test_only_a_client_that_measured_the_anchor_says_how_long_measuring_takes(
    trained_task: tuple[Assignment, Delta],
) -> None:
    task, delta = trained_task
    profiled = run_rules.profiled(client("ann"), task, delta.train, run_of())
    found = {}
    for measure in (("anchor", "validation"), ("validation",)):
        known, _ = after_update(client("ann"), replace(task, measure=measure), delta, profiled)
        assert known.calibration is not None
        found[measure] = known.calibration.measuring
    assert found["anchor", "validation"] == pytest.approx(delta.train.measure_s / profiled.measuring_s)
    assert found["validation",] is None


def test_a_report_without_a_step_time_teaches_nothing_of_the_speed(trained_task: tuple[Assignment, Delta]) -> None:
    task, delta = trained_task
    profiled = run_rules.profiled(client("ann"), task, delta.train, run_of())
    for step_s in (0.0, -1.0, math.nan, math.inf):
        known, note = after_update(client("ann"), task, reporting(delta, step_s=step_s), profiled)
        assert (known.calibration, note) == (None, "")


def test_out_of_memory_raises_the_predicted_memory_by_a_quarter() -> None:
    known = after_failure(client("ann"), 3, "oom")
    assert (known.memory_scale, known.held_version) == (1.25, 3)
    unsure = after_failure(client("ann", held_version=2), 3, "internal")
    assert (unsure.memory_scale, unsure.held_version) == (1.0, -1)


def test_a_hello_keeps_what_was_measured_on_the_same_device_and_forgets_it_on_a_new_one() -> None:
    two = Calibration.of_scale(2.0)
    known = client(
        "ann", calibration=two, memory_scale=1.25, received_bytes=7, trained_sequences=50, last_update_unix_s=9.0
    )
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        run_id="tiny",
        base_hash="ab" * 32,
        client_name="ann",
        software="test",
        profile=known.profile,
        statistics=known.statistics,
        held_version=4,
        can_evaluate_general=True,
    )
    back = client_from_hello(known.key, hello, known)
    assert (back.calibration, back.memory_scale, back.trained_sequences) == (two, 1.25, 50)
    assert (back.held_version, back.received_bytes, back.can_evaluate_general) == (4, 7, True)
    assert back.last_update_unix_s == 9.0
    moved = client_from_hello(known.key, replace(hello, profile=device(name="other")), known)
    assert (moved.calibration, moved.memory_scale, moved.received_bytes) == (None, 1.0, 7)
    assert moved.last_update_unix_s == 0.0
    # Probed again, the same device promises twice as much: its steps have shown what it does.
    twice = replace(known.profile, gemm_flops_per_s=2 * known.profile.gemm_flops_per_s)
    promised = client_from_hello(known.key, replace(hello, profile=twice), known)
    assert promised.calibration is not None
    assert promised.calibration.time_factors.arithmetic == 4.0


def test_a_round_of_many_clients_is_planned_for_those_whose_turn_it_is() -> None:
    run = run_of("allocation.deadline_s=60.0", "allocation.cohort_fraction=0.4")
    clients = [client(name) for name in ("ann", "bob", "cid", "dan", "eve")]
    planned = run_rules.plan(clients, run, run_rules.initial_state(run.config), START)
    assert len(planned.cohort) == 2
    assert set(planned.tasks) == planned.cohort == {c.client for c in planned.plan.choices}


def test_where_nobody_whose_turn_it_is_can_train_all_are_planned_for() -> None:
    run = run_of("allocation.deadline_s=60.0", "allocation.cohort_fraction=0.2")
    tiny = replace(client("ann").profile, memory_usable_bytes=1)
    clients = [client("ann", profile=tiny), client("bob", profile=tiny), client("cid", last_chosen_round=START.round)]
    for number in range(20):
        start = replace(START, round=number)
        planned = run_rules.plan(clients, run, run_rules.initial_state(run.config), start)
        assert isinstance(planned.tasks[clients[2].key], Assignment)


def accepted(name: str, blocks: tuple[int, ...], num_examples: int, width: float = 1.0) -> AcceptedUpdate:
    return AcceptedUpdate(
        client=client(name).key,
        attempt_id=AttemptId(name),
        num_examples=num_examples,
        steps=1,
        staleness=0,
        format="int8",
        density=1.0,
        width=width,
        tensors=tuple(TensorHeader(block=block, name="input_layernorm.weight", rows_sent=1) for block in blocks),
        read_payload=lambda: memoryview(b""),
    )


def test_a_block_that_nobody_trains_is_told_once_after_ten_rounds_with_updates() -> None:
    state, told = run_rules.MethodState(anchor_weight=1.0), []
    fold = FoldResult(aggregate={}, coverage={}, segment_coverage={}, history={}, weights={}, clipped=())
    for number in range(1, 31):
        blocks = (0, 1) if number <= 2 or number == 15 else (0,)
        updates = [accepted("ann", blocks, 10)] if number % 5 else []  # an empty round says nothing
        state = run_rules.after_fold(state, updates, fold, blocks=(0, 1, 2))
        told += [(number, run_rules.new_orphans(state))] if updates and run_rules.new_orphans(state) else []
    assert told == [(12, {2: False}), (14, {1: True})]
    assert from_plain(run_rules.MethodState, json.loads(json.dumps(to_plain(state))), where="test") == state


def test_what_was_trained_on_which_topics_is_remembered_by_block_and_segment() -> None:
    state = run_rules.after_fold(
        run_rules.MethodState(anchor_weight=1.0),
        [accepted("ann", (0,), 10, width=0.25), accepted("bob", (0, 2), 30)],
        FoldResult(aggregate={}, coverage={}, segment_coverage={}, history={}, weights={}, clipped=()),
        {client("ann").key: (4, 6), client("bob").key: (0, 0, 30)},
    )
    assert state.seen == (
        run_rules.SeenBlock(block=0, weights=(40.0, 40.0, 30.0, 30.0), topics=(4.0, 6.0, 30.0)),
        run_rules.SeenBlock(block=2, weights=(30.0,) * 4, topics=(0.0, 0.0, 30.0)),
    )
