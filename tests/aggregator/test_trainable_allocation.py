"""Is what trains whole given whole, to whom it fits, at the width that fits? And is the rest told why not?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedblocks.aggregator.allocation import (
    AllocationClient,
    AllocationSettings,
    RoundPlan,
    blocks_text,
    plan_round,
)
from fedblocks.aggregator.coverage import Coverage
from fedblocks.aggregator.explain import sentence
from fedblocks.profiles import catalog_files
from fedblocks.profiles.catalog_files import QWEN2_5_0_5B
from fedblocks.profiles.cost import Workload, peak_memory, step_time, unit_bytes, upload_bytes
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.model_shape import ChosenRows
from fedblocks.profiles.units import (
    BaseTensors,
    LowRankPairs,
    PersonalPairs,
    Trainable,
    unit_parameters,
    unit_tensors,
)
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import ClientKey, DataStatistics

SHAPE = QWEN2_5_0_5B
LAYERS = tuple(range(SHAPE.num_layers))
FULL = BaseTensors(layers=LAYERS, tables=True)
PAIRS = LowRankPairs(rank=16)
WORK = Workload(batch_size=8, micro_batch_size=8, mean_tokens=64.0, max_tokens=64, label_share=0.5, steps=16)


def plan_of(trainable: Trainable) -> ExpansionPlan:
    return ExpansionPlan(base_hash="0" * 64, shape=SHAPE, placement="top", blocks=(), trainable=trainable)


def client(name: str, device: str, memory_gb: float = 0.0) -> AllocationClient:
    profile = catalog_files.load(device)
    if memory_gb:
        profile = replace(profile, memory_usable_bytes=int(memory_gb * 1e9))
    return AllocationClient(
        key=ClientKey(name.ljust(40, "k")),
        name=name,
        profile=profile,
        statistics=DataStatistics(num_examples=100, num_target_tokens=3200, mean_tokens=64.0, max_tokens=64),
    )


def planned(
    trainable: Trainable, *clients: AllocationClient, widths: tuple[float, ...] = (1.0,), deadline_s: float = 1e6
) -> RoundPlan:
    plan = plan_of(trainable)
    return plan_round(
        clients,
        layout=plan.layout,
        shape=SHAPE,
        settings=AllocationSettings(
            policy="whole", widths=widths, delta_format="fp32", anchor_batch_size=0, deadline_s=deadline_s
        ),
        coverage=Coverage.of(plan.unit_ids),
        round=1,
    )


@pytest.mark.parametrize("trainable", [PAIRS, FULL, BaseTensors(layers=LAYERS[-2:], tables=False)])
def test_everybody_whom_it_fits_trains_all_of_it(trainable: Trainable) -> None:
    [choice] = planned(trainable, client("big", "jetson-agx-orin-64gb")).choices
    assert choice.role == "train"
    assert choice.blocks == tuple(plan_of(trainable).layout.positions)
    assert choice.width == 1.0


def test_a_device_that_a_method_does_not_fit_is_left_out_with_the_reason() -> None:
    small, big = client("small", "jetson-orin-nano-8gb", memory_gb=4.0), client("big", "jetson-agx-orin-64gb")
    by_name = {choice.name: choice for choice in planned(FULL, small, big).choices}
    assert by_name["big"].role == "train"
    assert by_name["small"].role == "evaluate"
    assert by_name["small"].binding == "memory"
    assert "MiB over the memory limit" in by_name["small"].reason
    both = {choice.name: choice.role for choice in planned(PAIRS, small, big).choices}
    assert both == {"small": "train", "big": "train"}


def test_the_sentence_says_layers_and_pairs_and_not_blocks() -> None:
    big, small = client("big", "jetson-agx-orin-64gb"), client("small", "jetson-orin-nano-8gb", memory_gb=4.0)
    pairs, full = (planned(trainable, big, small).choices for trainable in (PAIRS, FULL))
    assert sentence(pairs[0]).startswith("big trains pairs of layers 0 to 23 for 16 steps")
    assert sentence(full[0]).startswith("big trains layers 0 to 23 for 16 steps")
    assert sentence(full[1]).startswith("small only measures: nothing fits: layers 0 to 23 for")
    assert blocks_text((3,), 0.25, "pairs of layer") == "1/4 of pairs of layer 3"
    assert blocks_text((0, 1, 2, 3)) == "blocks 0, 1, 2 and 3"
    assert blocks_text((0, 1, 2, 3, 5)) == "blocks 0, 1, 2, 3 and 5"


def test_a_width_of_pairs_is_the_largest_that_fits() -> None:
    pairs, widths = LowRankPairs(rank=32), (0.125, 0.25, 0.5, 1.0)
    one = client("one", "jetson-orin-nano-8gb")
    [whole] = planned(pairs, one, widths=widths).choices
    assert whole.width == 1.0
    assert whole.predicted is not None
    widths_at = {
        share: planned(pairs, one, widths=widths, deadline_s=share * whole.predicted.seconds).choices[0].width
        for share in (1.01, 0.97, 0.9, 0.8)
    }
    assert widths_at[1.01] == 1.0
    assert list(widths_at.values()) == sorted(widths_at.values(), reverse=True)
    assert min(widths_at.values()) < 1.0


def test_of_personal_pairs_a_weak_device_gets_fewer_rows_and_needs_less_memory() -> None:
    pairs, widths = PersonalPairs(rank=128, targets="all", prior_rank=32), (0.25, 0.5, 1.0)
    plan = plan_of(pairs)
    peaks = [
        peak_memory(SHAPE, plan.layout, plan.layout.blocks, WORK, accelerator="cuda", width=width).peak
        for width in widths
    ]
    trained = [sum(unit_parameters(plan.units, unit, width) for unit in plan.unit_ids) for width in widths]
    assert peaks == sorted(peaks)
    # Value, gradient and two moments, each of four bytes; the passes over all rows beforehand are no more than that.
    assert peaks[2] - peaks[1] == pytest.approx(16 * (trained[2] - trained[1]), rel=0.3)
    assert trained[0] < 0.65 * trained[2]
    sizes = [client("one", "jetson-orin-nano-8gb", memory_gb=2.0 + 0.02 * i) for i in range(40)]
    given = [choice for one in sizes for choice in planned(pairs, one, widths=widths).choices if choice.role == "train"]
    assert [choice.width for choice in given] == sorted(choice.width for choice in given)
    assert {choice.width for choice in given} == set(widths)
    assert given[0].predicted is not None
    assert given[0].predicted.upload_bytes == sum(unit_bytes(plan.units, unit, "fp32", 1.0, 0.25) for unit in LAYERS)
    masks = sum(-(-spec.num_rows // 8) for spec in unit_tensors(plan.units, 0, 0.25) if isinstance(spec, ChosenRows))
    assert unit_bytes(plan.units, 0, "fp32", 1.0, 0.25) == 4 * unit_parameters(plan.units, 0, 0.25) + masks


def test_pairs_cost_less_memory_than_the_top_layers_and_those_less_than_everything() -> None:
    def peak(trainable: Trainable, work: Workload = WORK) -> int:
        plan = plan_of(trainable)
        return peak_memory(SHAPE, plan.layout, plan.layout.blocks, work, accelerator="cpu").peak

    full = peak(FULL)
    assert peak(PAIRS) < 0.5 * full
    assert peak(BaseTensors(layers=LAYERS[-2:], tables=False)) < 0.3 * full
    # All parameters, their gradients and both moments, in fp32.
    assert full > 16 * SHAPE.total_parameters
    # What the run started from, kept for the proximal term.
    assert peak(FULL, replace(WORK, keeps_start=True)) - full == 4 * SHAPE.total_parameters
    merged = LowRankPairs(rank=16, merged=True)
    assert peak(PAIRS) < peak(merged) < full


def test_a_step_over_pairs_runs_back_through_all_layers_but_has_small_weight_gradients() -> None:
    device = catalog_files.load("jetson-orin-nano-8gb")
    arithmetic_alone = replace(device, memory_bytes_per_s=1e18)

    def seconds(trainable: Trainable, on: DeviceProfile = device) -> float:
        plan = plan_of(trainable)
        return step_time(on, SHAPE, plan.layout, plan.layout.blocks, WORK)

    full, pairs = seconds(FULL), seconds(PAIRS)
    assert 0.55 < seconds(PAIRS, arithmetic_alone) / seconds(FULL, arithmetic_alone) < 0.8  # 4 of 6 products
    assert pairs < 0.5 * full  # the optimizer's traffic on top
    assert seconds(LowRankPairs(rank=64)) > pairs
    assert seconds(BaseTensors(layers=LAYERS[-2:], tables=False)) < 0.3 * full


def test_upload_bytes_are_those_of_the_units() -> None:
    plan = plan_of(PAIRS)
    pair = unit_bytes(plan.units, 0, "fp32")
    # methods.md 7.2: rank 16 all-linear is 35 MB in fp32 each way.
    assert 24 * pair == pytest.approx(35.2e6, rel=0.01)
    [choice] = planned(PAIRS, client("one", "jetson-agx-orin-64gb")).choices
    assert choice.predicted is not None
    assert choice.predicted.upload_bytes == 24 * pair
    full = plan_of(FULL)
    assert sum(unit_bytes(full.units, unit, "fp32") for unit in full.unit_ids) == 4 * SHAPE.total_parameters
    assert upload_bytes(SHAPE, 3, "int8", 0.25) == 3 * unit_bytes(SHAPE, 7, "int8", 0.25)
