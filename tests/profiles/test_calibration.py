"""Measured steps correct predicted ones: what is learnt, how fast, and what is not believed."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedblocks.profiles.calibration import (
    ERRORS,
    Calibration,
    observe,
    rebased,
    with_measuring,
    with_prefix,
)
from fedblocks.profiles.catalog_files import load
from fedblocks.profiles.cost import (
    ExecutionMode,
    StackLayout,
    StepParts,
    TimeFactors,
    Workload,
    fill_time,
    step_parts,
)
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.protocol.codec import from_plain, to_plain

PARTS = StepParts(0.2, 0.05, 0.1, 0.08, 0.02)
OTHER = StepParts(0.1, 0.01, 0.01, 0.2, 0.1)
seconds = st.floats(1e-4, 10)
steps = st.builds(StepParts, seconds, seconds, seconds, seconds, seconds)


def after(observations, known=None):
    for parts, measured_s in observations:
        known = observe(known, parts, measured_s).calibration
    return known


def predicted(known, parts):
    return known.time_factors.step_s(parts)


def random_parts(rng):
    return StepParts(*(10 ** rng.uniform(-2, 0) for _ in range(5)))


@given(steps, seconds, steps)
def test_one_step_sets_one_scale_for_every_prediction(parts, measured_s, other):
    known = after([(parts, measured_s)])
    scale = measured_s / sum(parts)
    assert predicted(known, other) == pytest.approx(scale * sum(other))
    assert known.relative == TimeFactors()
    assert (known.scale, known.level, known.reports) == (pytest.approx(scale), pytest.approx(scale), 1)
    assert known.error == pytest.approx(abs(1 / scale - 1))


def test_the_factors_of_a_device_are_found_from_its_steps_and_steps_it_never_took_are_then_right():
    true = TimeFactors(arithmetic=1.2, attention=0.6, activations=2.5, weights=1.7, overhead=0.9)
    rng = random.Random(1)
    known = after((parts, true.step_s(parts)) for parts in (random_parts(rng) for _ in range(300)))
    for name in ("arithmetic", "attention", "activations", "weights", "overhead"):
        assert getattr(known.time_factors, name) == pytest.approx(getattr(true, name), rel=0.03)
    unseen = [random_parts(rng) for _ in range(50)]
    assert all(predicted(known, parts) == pytest.approx(true.step_s(parts), rel=0.02) for parts in unseen)
    assert known.error < 0.01


def test_few_noisy_steps_already_help_and_more_help_more():
    true = TimeFactors(arithmetic=1.5, attention=0.7, activations=2.0, weights=0.6, overhead=1.2)
    rng = random.Random(2)
    unseen = [random_parts(rng) for _ in range(200)]
    errors = []
    for count in (1, 6, 30):
        worst = []
        for _ in range(20):
            seen = [random_parts(rng) for _ in range(count)]
            known = after((parts, true.step_s(parts) * rng.lognormvariate(0, 0.1)) for parts in seen)
            worst.append(sum(abs(predicted(known, p) / true.step_s(p) - 1) for p in unseen) / len(unseen))
        errors.append(sum(worst) / len(worst))
    assert errors[0] > 1.3 * errors[1] > 1.3 * errors[2]
    assert errors[2] < 0.1


@given(st.lists(st.tuples(steps, seconds), min_size=1, max_size=12), steps)
def test_no_factor_is_ever_negative_and_no_number_is_not_finite(observations, other):
    known = after(observations)
    assert all(factor > 0 for factor in known.factors)
    assert all(math.isfinite(value) for value in (*known.factors, *known.covariance, *known.errors, known.level))
    assert predicted(known, other) > 0


def test_the_newest_of_many_equal_steps_weighs_about_three_tenths():
    known = after([(PARTS, sum(PARTS))] * 40)
    shifted = after([(PARTS, 1.2 * sum(PARTS))], known)
    weight = math.log(predicted(shifted, PARTS) / predicted(known, PARTS)) / math.log(1.2)
    assert 0.28 < weight < 0.36
    settled = after([(PARTS, 1.2 * sum(PARTS))] * 15, known)
    assert predicted(settled, PARTS) == pytest.approx(1.2 * sum(PARTS), rel=0.01)


def test_short_and_long_steps_weigh_alike():
    true = TimeFactors(arithmetic=1.3, weights=0.8)
    rng = random.Random(3)
    seen = [random_parts(rng) for _ in range(20)]
    observations = [(parts, true.step_s(parts)) for parts in seen]
    thousandfold = [(StepParts(*(1000 * x for x in parts)), 1000 * s) for parts, s in observations]
    assert after(observations).factors == pytest.approx(after(thousandfold).factors)


def test_a_single_step_that_is_far_off_changes_no_factor_and_is_in_the_error():
    known = after([(PARTS, sum(PARTS))] * 8)
    seen = observe(known, PARTS, 10 * sum(PARTS))
    assert seen.calibration.factors == known.factors
    assert seen.change is None
    assert seen.calibration.errors[-1] == pytest.approx(0.9)
    back = after([(PARTS, sum(PARTS))], seen.calibration)
    assert predicted(back, PARTS) == pytest.approx(sum(PARTS), rel=0.02)
    assert back.held is None
    # Not twice in a row, so it still is none.
    assert observe(back, PARTS, 10 * sum(PARTS)).change is None


@pytest.mark.parametrize("times", [2.1, 1 / 2.1, 30.0])
def test_twice_in_a_row_far_off_sets_the_whole_device_to_the_new_speed_and_later_back(times):
    known = with_measuring(with_prefix(after([(PARTS, sum(PARTS))] * 8), 1.0, 2.0), 1.0, 3.0)
    held = observe(known, PARTS, times * sum(PARTS))
    changed = observe(held.calibration, PARTS, times * sum(PARTS))
    assert held.change is None
    assert changed.change == pytest.approx(times, rel=0.01)
    now = changed.calibration
    assert predicted(now, PARTS) == pytest.approx(times * sum(PARTS))
    assert predicted(now, OTHER) == pytest.approx(times * predicted(known, OTHER))
    assert now.prefix == pytest.approx(2 * times, rel=0.01)
    assert now.measuring == pytest.approx(3 * times, rel=0.01)
    recovered = observe(observe(now, PARTS, sum(PARTS)).calibration, PARTS, sum(PARTS))
    assert recovered.change == pytest.approx(1 / times, rel=0.01)
    assert predicted(recovered.calibration, PARTS) == pytest.approx(sum(PARTS), rel=0.01)


@pytest.mark.parametrize(("times", "changes"), [(1.45, False), (1.55, True)])
def test_half_as_long_again_is_the_limit(times, changes):
    known = after([(PARTS, sum(PARTS))] * 8)
    known = observe(known, PARTS, times * predicted(known, PARTS)).calibration
    assert (known.held is not None) == changes
    assert (observe(known, PARTS, times * predicted(known, PARTS)).change is not None) == changes


def test_far_too_slow_and_then_far_too_fast_is_no_new_speed():
    known = after([(PARTS, sum(PARTS))] * 8)
    known = observe(known, PARTS, 2 * sum(PARTS)).calibration
    seen = observe(known, PARTS, sum(PARTS) / 2)
    assert seen.change is None
    assert seen.calibration.factors == known.factors


def test_a_task_that_is_always_far_off_between_others_that_are_right_is_learnt():
    true = TimeFactors(weights=6.0)
    known = after([(PARTS, sum(PARTS))] * 12)
    heavy = StepParts(0.05, 0.01, 0.01, 0.2, 0.01)
    for _ in range(12):
        known = after([(heavy, true.step_s(heavy)), (PARTS, sum(PARTS))], known)
    assert predicted(known, heavy) == pytest.approx(true.step_s(heavy), rel=0.2)
    assert predicted(known, PARTS) == pytest.approx(sum(PARTS), rel=0.2)


def test_the_same_steps_give_the_same_bits_and_survive_a_ledger():
    rng = random.Random(4)
    observations = [(random_parts(rng), rng.uniform(0.5, 3)) for _ in range(20)]
    known = with_prefix(after(observations), 1.0, 1.7)
    assert known == with_prefix(after(observations), 1.0, 1.7)
    plain = json.loads(json.dumps(to_plain(known)))
    assert from_plain(Calibration, plain, where="test") == known
    halfway = from_plain(Calibration, json.loads(json.dumps(to_plain(after(observations[:9])))), where="test")
    assert with_prefix(after(observations[9:], halfway), 1.0, 1.7) == known
    assert len(json.dumps(to_plain(after(observations * 20)))) < 1500


@given(st.permutations(range(5)))
@settings(max_examples=20)
def test_first_steps_tell_the_same_in_any_order_but_for_their_age(order):
    true = TimeFactors(arithmetic=1.2, activations=0.9, weights=1.1)
    rng = random.Random(5)
    seen = [random_parts(rng) for _ in range(5)]
    straight = after((parts, true.step_s(parts)) for parts in seen)
    shuffled = after((seen[i], true.step_s(seen[i])) for i in order)
    assert predicted(shuffled, PARTS) == pytest.approx(predicted(straight, PARTS), rel=0.1)


def test_the_error_is_the_median_of_the_newest_predictions_made_before_their_steps():
    known = after([(PARTS, 4 * sum(PARTS))])
    assert known.error == pytest.approx(0.75)
    known = after([(PARTS, 4 * sum(PARTS))] * 5, known)
    assert known.error == pytest.approx(0, abs=1e-9)
    seen = observe(known, PARTS, 1.1 * predicted(known, PARTS))
    assert seen.predicted_s == predicted(known, PARTS)
    assert seen.calibration.errors[-1] == pytest.approx(1 - 1 / 1.1)
    assert len(after([(PARTS, 1.0)] * 30).errors) == ERRORS


def test_first_pass_and_measuring_have_running_factors_of_their_own():
    known = after([(PARTS, 2 * sum(PARTS))])
    assert (known.time_factors.prefix, known.time_factors.measuring) == (2.0, 2.0)
    once = with_measuring(with_prefix(known, 10.0, 30.0), 1.0, 8.0)
    assert (once.time_factors.prefix, once.time_factors.measuring) == (3.0, 8.0)
    assert once.relative.prefix == 1.5
    twice = with_prefix(once, 10.0, 60.0)
    assert math.log(twice.prefix) == pytest.approx(0.7 * math.log(3) + 0.3 * math.log(6))
    assert twice.factors == known.factors
    # Everything was cached, or the clock stood still: no ratio.
    assert with_prefix(twice, 0.0, 0.2) == with_prefix(twice, 10.0, 0.0) == with_prefix(twice, 1.0, math.inf) == twice


SHAPE = ModelShape(
    family="llama",
    num_layers=6,
    hidden_size=64,
    intermediate_size=192,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=256,
    tied_embeddings=True,
)
LAYOUT = StackLayout(num_entries=9, positions={0: 5, 1: 8, 2: 2})


def test_a_device_that_is_probed_again_keeps_the_speed_that_was_measured():
    old = dataclasses.replace(load("laptop-cpu"), source="measured")
    new = dataclasses.replace(
        old,
        gemm_flops_per_s=old.gemm_flops_per_s / 2,
        memory_bytes_per_s=old.memory_bytes_per_s / 3,
        step_overhead_s=0.1,
    )
    work = Workload(
        batch_size=8,
        micro_batch_size=4,
        mean_tokens=20,
        max_tokens=30,
        label_share=0.5,
        steps=4,
        new_tokens=100,
        cache_bytes=0,
    )
    # Cached states are read at the disk's rate, which is not calibrated: of no weight here.
    old, new = (dataclasses.replace(d, disk_read_bytes_per_s=1e15) for d in (old, new))

    def parts(device, blocks, checkpoint=False):
        mode = ExecutionMode(micro_batch_size=4, checkpoint=checkpoint)
        return step_parts(device, SHAPE, LAYOUT, blocks, work, mode)

    known = after([(parts(old, (1,)), 1.0), (parts(old, (0, 2)), 5.0), (parts(old, (0,), True), 3.0)])
    known = with_prefix(known, fill_time(old, SHAPE, LAYOUT, work), 7.0)
    kept = rebased(known, old, new)
    for blocks in ((1,), (0, 1), (0, 1, 2)):
        assert predicted(kept, parts(new, blocks)) == pytest.approx(predicted(known, parts(old, blocks)))
    assert rebased(known, old, old) == known
    for changed in ({"accelerator": "cuda"}, {"compute_dtype": "bfloat16"}, {"source": "catalog"}):
        assert rebased(known, old, dataclasses.replace(new, **changed)) is None
    no_overhead = dataclasses.replace(new, step_overhead_s=0.0)
    assert rebased(known, old, no_overhead).factors[4] == known.factors[4]


@pytest.mark.parametrize("measured_s", [0.0, -1.0, math.nan, math.inf])
def test_a_report_without_a_positive_number_of_seconds_is_an_error(measured_s):
    with pytest.raises(ValueError, match=r"calibration: a step of .* s, predicted 0.45 s, expected positive numbers"):
        observe(None, PARTS, measured_s)


def test_a_calibration_of_another_form_is_refused():
    known = Calibration.of_scale(2.0)
    assert known.time_factors == TimeFactors(**dict.fromkeys(TimeFactors.__slots__, 2.0))
    with pytest.raises(ValueError, match="4 factors and 15 covariances, expected 5 and 15"):
        dataclasses.replace(known, factors=known.factors[1:])
    with pytest.raises(ValueError, match="expected positive numbers"):
        dataclasses.replace(known, factors=(1.0, 1.0, -1.0, 1.0, 1.0))


def test_an_impossible_ratio_moves_no_factor_out_of_range():
    known = after([(PARTS, 1e300), (PARTS, 1e-300), (PARTS, 1e-300), (PARTS, 1e300)])
    assert all(1e-13 < factor < 1e13 for factor in known.factors)
    assert all(math.isfinite(error) for error in known.errors)
