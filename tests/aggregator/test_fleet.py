"""Plans of random fleets: inside their limits, and near the best by the objective of methods.md 6.4."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import bench_fleet

from fedblocks.aggregator.allocation import feasible_sets, objective, plan_round
from fedblocks.aggregator.coverage import Coverage
from fedblocks.profiles.catalog_files import QWEN2_5_0_5B, load, names
from fedblocks.profiles.cost import StackLayout


def instances(count, seed, **ranges):
    rng = random.Random(seed)
    usual = {"clients": (1, 6), "blocks": (1, 8)}
    return [bench_fleet.random_instance(rng, **{**usual, **ranges}) for _ in range(count)]


def sets_of(instance, client, deadline_s, steps):
    return feasible_sets(
        client,
        layout=instance.layout,
        shape=instance.shape,
        settings=instance.settings,
        deadline_s=deadline_s,
        steps=steps,
    )


def value(instance, blocks_of):
    return objective(
        blocks_of,
        instance.clients,
        blocks=instance.layout.blocks,
        settings=instance.settings,
        coverage=instance.coverage,
    )


def test_no_training_choice_exceeds_a_limit_by_its_own_prediction_or_by_the_cost_models():
    found = bench_fleet.over_budget(250, seed=11)
    assert found["over_budget"] == 0
    assert min(found["choices_by_binding_limit"].values()) > 30, "limits bind in these instances"


def test_a_choice_above_its_limit_or_with_another_prediction_would_be_found():
    instance = next(i for i in instances(20, 5) if any(c.role == "train" for c in i.plan().choices))
    choice = next(c for c in instance.plan().choices if c.role == "train")
    assert bench_fleet.breaks(instance, choice) == ""
    low = dataclasses.replace(choice.limits, memory_bytes=choice.predicted.memory_bytes - 1)
    assert "limit" in bench_fleet.breaks(instance, dataclasses.replace(choice, limits=low))
    soon = dataclasses.replace(choice.limits, deadline_s=0.99 * choice.predicted.seconds)
    assert "deadline" in bench_fleet.breaks(instance, dataclasses.replace(choice, limits=soon))
    wrong = dataclasses.replace(choice.predicted, seconds=0.99 * choice.predicted.seconds)
    assert "cost model" in bench_fleet.breaks(instance, dataclasses.replace(choice, predicted=wrong))


def test_what_fits_of_a_set_fits_without_one_of_its_higher_blocks():
    """Why the planner may look for the end of a branch by bisection."""
    looked_at = 0
    for instance in instances(40, 21, clients=(1, 2), blocks=(3, 5)):
        plan, positions = instance.plan(), instance.layout.positions
        for client in instance.clients:
            if client.statistics.num_examples == 0:
                continue
            fitting = set(sets_of(instance, client, plan.deadline.seconds, instance.settings.steps))
            for chosen in fitting:
                lowest = min(chosen, key=positions.__getitem__)
                for dropped in set(chosen) - {lowest, instance.layout.top_block}:
                    assert tuple(b for b in chosen if b != dropped) in fitting
                    looked_at += 1
    assert looked_at > 100


def test_the_solver_finds_the_best_of_all_plans():
    for instance in instances(12, 7, clients=(1, 3), blocks=(1, 3)):
        plan = instance.plan()
        sets = {
            c.key: sets_of(instance, c, plan.deadline.seconds, instance.settings.steps)
            for c in instance.clients
            if c.statistics.num_examples > 0
        }
        every = itertools.product(*([(), *found] for found in sets.values()))
        best = max(value(instance, dict(zip(sets, chosen, strict=True))) for chosen in every)
        assert value(instance, bench_fleet.best_plan(instance, sets)) == pytest.approx(best)


def test_the_objective_counts_gains_and_rarity_of_each_client_and_each_blocks_debt_once():
    base = instances(1, 3, clients=(2, 2), blocks=(2, 2))[0]
    one, two = (
        dataclasses.replace(
            client,
            gradient_energy={},
            statistics=dataclasses.replace(client.statistics, num_examples=n, topics=topics),
        )
        for client, n, topics in zip(base.clients, (10, 30), ((10, 0), ()), strict=True)
    )
    instance = dataclasses.replace(
        base,
        clients=(one, two),
        settings=dataclasses.replace(base.settings, rarity_weight=0.5, debt_weight=2.0),
        coverage=Coverage(seen={0: (4.0,) * 4, 1: (1.0,) * 4}, topics={1: (0.0, 5.0)}),
    )
    # Mean examples 20; debt 0 of block 0 and 0.75 of block 1; N = 2 and beta = 2.
    assert value(instance, {}) == 0
    assert value(instance, {one.key: (0,)}) == 1
    assert value(instance, {one.key: (1,)}) == 1 + 0.5 + 4 * 0.75 * 0.5
    assert value(instance, {two.key: (1,)}) == 1 + 4 * 0.75
    assert value(instance, {one.key: (1,), two.key: (0, 1)}) == 1 + 0.5 + 2 + 4 * 0.75


def test_the_sequential_rule_is_near_the_optimum_of_the_objective():
    shares = [one.share for one in bench_fleet.gaps(30, seed=4)]
    assert min(shares) > -1e-9
    assert statistics.median(shares) <= 0.05


@pytest.mark.parametrize("name", names())
def test_every_device_of_the_catalog_can_be_planned_for(name):
    base = bench_fleet.fleet(1, 2)
    site = dataclasses.replace(base.clients[0], profile=load(name))
    found = plan_round(
        [site],
        layout=StackLayout(num_entries=26, positions={0: 16, 1: 25}),
        shape=QWEN2_5_0_5B,
        settings=base.settings,
        coverage=Coverage.of((0, 1)),
        round=0,
    )
    assert [choice.role for choice in found.choices] == ["train"]


def test_the_benchmark_runs_on_small_numbers_and_keeps_what_others_wrote(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import json

    out = tmp_path / "fleet.json"
    out.write_text(json.dumps({"command": "old", "ladder": {"tiers": 4}, "allocation": {"over_budget": 7}, "rows": []}))
    bench_fleet.main(["--instances", "3", "--gap-instances", "2", "--clients", "4", "--blocks", "2", "--out", str(out)])
    content = json.loads(out.read_text())
    assert content["ladder"] == {"tiers": 4}
    assert "cost_model" not in content
    assert content["allocation"]["over_budget"] == 0
    assert 0 <= content["allocation"]["gap_to_optimum_median"] <= content["allocation"]["gap_to_optimum_worst"]
    assert content["allocation"]["plan_4x2_s"] > 0
    assert {"device", "versions", "command"} <= content.keys()
    assert "scipy" in content["versions"]
    assert sum(row["instances"] for row in content["rows"]) == 2
