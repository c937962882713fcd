"""Do the plans of a fleet keep their limits, how far are they from the best ones, and how long do they take?

    make bench-fleet                                 everything: benchmarks/results/fleet.json
    python benchmarks/bench_fleet.py --out FILE      into another file

Fleets are random and seeded: devices of the catalog with part of their memory, data of any size, measured speeds that
differ from the catalog's, blocks anywhere in the stack. Every prediction is made a second time from the cost model's
plain functions.

    allocation.over_budget           training choices beyond their own memory limit or deadline, of all instances
    allocation.choices               training choices that were looked at
    allocation.gap_to_optimum_median how far J of the plan lies below the best J (methods.md 6.4), a share of the best
    allocation.gap_to_optimum_worst  the largest of these
    allocation.optimal_share         share of the instances in which the plan is a best one
    allocation.plan_1000x8_s         CPU seconds of planning a round of 1,000 clients and 8 blocks, no two alike
    allocation.plan_1000x8_alike_s   the same where ten kinds of data and whole devices of the catalog recur

``cost_model`` (predicted against measured steps) is written by ``bench_cost_model.py``, ``ladder`` (the tiers of
methods.md 12.4) by ``bench_ladder.py``. A run keeps what other runs have written under other names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fedblocks.aggregator.allocation import (
    MEMORY_SAFETY,
    TIME_SAFETY,
    AllocationClient,
    AllocationSettings,
    Choice,
    RoundPlan,
    feasible_sets,
    objective,
    plan_round,
    relative_gains,
)
from fedblocks.aggregator.coverage import Coverage
from fedblocks.profiles.catalog_files import QWEN2_5_0_5B, load, names
from fedblocks.profiles.cost import (
    StackLayout,
    Workload,
    download_bytes,
    peak_memory,
    round_time,
    upload_bytes,
)
from fedblocks.profiles.model_shape import WIDTHS, ModelShape
from fedblocks.protocol.messages import ClientKey, DataStatistics

RESULTS: Final = Path(__file__).parent / "results"
#: Sizes of config.json of Llama-3.2-1B.
LLAMA_1B: Final = ModelShape(
    family="llama",
    num_layers=16,
    hidden_size=2048,
    intermediate_size=8192,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=128256,
    tied_embeddings=True,
)
INSTANCES: Final = 10_000
GAP_INSTANCES: Final = 1000
CLIENTS, BLOCKS = 1000, 8
RUNS: Final = 3
ROUNDING: Final = 1e-9
"""Share by which a figure may differ when it is computed another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One round to be planned."""

    clients: tuple[AllocationClient, ...]
    layout: StackLayout
    shape: ModelShape
    settings: AllocationSettings
    coverage: Coverage

    def plan(self) -> RoundPlan:
        """By the product's planner."""
        return plan_round(
            self.clients,
            layout=self.layout,
            shape=self.shape,
            settings=self.settings,
            coverage=self.coverage,
            round=1,
        )


def random_instance(rng: random.Random, *, clients: tuple[int, int], blocks: tuple[int, int]) -> Instance:
    """A fleet and its blocks; numbers of clients and blocks are drawn from these ranges, ends included.

    Half of the instances have a deadline of the user's, often too short for some.
    """
    shape = rng.choice((QWEN2_5_0_5B, LLAMA_1B))
    layout = _layout(rng, shape, rng.randint(*blocks))
    settings = AllocationSettings(
        steps=rng.choice((8, 16, 32)),
        batch_size=rng.choice((4, 8)),
        anchor_batch_size=rng.choice((0, 4)),
        deadline_s=10 ** rng.uniform(0, 3) if rng.random() < 0.5 else 0.0,
        rarity_weight=rng.choice((0.0, 0.5)),
    )
    seen = {block: rng.choice((0.0, rng.uniform(0, 5000))) for block in layout.blocks}
    topics = {block: tuple(rng.uniform(0, 500) for _ in range(8)) for block, sum_ in seen.items() if sum_ > 0}
    count = rng.randint(*clients)
    return Instance(
        clients=tuple(_client(rng, index, layout.blocks) for index in range(count)),
        layout=layout,
        shape=shape,
        settings=settings,
        coverage=Coverage(seen={block: (weight,) * len(WIDTHS) for block, weight in seen.items()}, topics=topics),
    )


def _layout(rng: random.Random, shape: ModelShape, count: int) -> StackLayout:
    """Blocks at the top, spread evenly, or anywhere; ids in any order."""
    entries = shape.num_layers + count
    places = rng.choice(("top", "spread", "anywhere"))
    if places == "top":
        positions = list(range(shape.num_layers, entries))
    elif places == "spread":
        positions = [(index + 1) * entries // count - 1 for index in range(count)]
    else:
        positions = rng.sample(range(entries), count)
    rng.shuffle(positions)
    return StackLayout(num_entries=entries, positions=dict(enumerate(positions)))


def _client(rng: random.Random, index: int, blocks: Sequence[int], least_share: float = 0.05) -> AllocationClient:
    """Any catalog device with at least ``least_share`` of its memory, and its data."""
    profile = load(rng.choice(names()))
    spare = profile.memory_usable_bytes - profile.runtime_memory_bytes
    tokens = rng.uniform(32, 512)
    examples = rng.choice((0, *(int(10 ** rng.uniform(1, 4)) for _ in range(19))))
    topics = [0] * 8
    for _ in range(min(examples, 100)):
        topics[min(int(rng.expovariate(0.5 + index % 3)), 7)] += 1
    return AllocationClient(
        key=ClientKey(f"{index:04d}"),
        name=f"site {index}",
        profile=replace(
            profile, memory_usable_bytes=profile.runtime_memory_bytes + int(least_share ** rng.random() * spare)
        ),
        statistics=DataStatistics(
            num_examples=examples,
            num_target_tokens=int(examples * tokens * rng.uniform(0.1, 1)),
            mean_tokens=tokens,
            max_tokens=math.ceil(tokens * rng.uniform(1, 3)),
            topics=tuple(topics) if rng.random() < 0.7 else (),
        ),
        gradient_energy={block: rng.lognormvariate(0, 1) for block in blocks if rng.random() < 0.8},
        time_scale=rng.uniform(0.7, 2.0),
        memory_scale=rng.choice((1.0, 1.0, 1.25)),
        versions_behind=rng.randint(0, 5),
        cached_examples=rng.randint(0, 1000),
        cached_anchor_sequences=rng.randint(0, 448),
    )


# Limits


def breaks(instance: Instance, choice: Choice) -> str:
    """What is wrong with a training choice: a limit that its own prediction breaks, or a prediction that is another
    when the cost model is asked directly; empty if nothing is."""
    predicted, limits = choice.predicted, choice.limits
    if predicted is None:
        return "no prediction"
    if predicted.seconds > limits.deadline_s:
        return f"{predicted.seconds} s are predicted, the deadline is {limits.deadline_s} s"
    if predicted.memory_bytes > limits.memory_bytes:
        return f"{predicted.memory_bytes} bytes are predicted, the limit is {limits.memory_bytes}"
    client = next(client for client in instance.clients if client.key == choice.client)
    runtime = client.profile.runtime_memory_bytes
    if limits.memory_bytes > runtime + MEMORY_SAFETY * max(0, client.profile.memory_usable_bytes - runtime):
        return "the memory limit is above what is usable"
    seconds, memory = predict(instance, client, choice)
    if not math.isclose(seconds, predicted.seconds, rel_tol=ROUNDING):
        return f"{predicted.seconds} s are predicted, the cost model says {seconds}"
    if memory != predicted.memory_bytes:
        return f"{predicted.memory_bytes} bytes are predicted, the cost model says {memory}"
    return ""


def predict(instance: Instance, client: AllocationClient, choice: Choice) -> tuple[float, int]:
    """Seconds and bytes of a training choice, from the plain functions of the cost model."""
    settings, data = instance.settings, client.statistics
    anchored = settings.anchor_batch_size > 0
    anchors = min(math.ceil(choice.steps / settings.anchor_every) * settings.anchor_batch_size, 448)
    work = Workload(
        batch_size=settings.batch_size,
        micro_batch_size=settings.batch_size,
        mean_tokens=data.mean_tokens,
        max_tokens=data.max_tokens,
        label_share=min(1.0, data.num_target_tokens / (data.num_examples * data.mean_tokens)),
        steps=choice.steps,
        anchor_batch_size=settings.anchor_batch_size,
        anchor_tokens=settings.anchor_tokens,
        anchor_every=settings.anchor_every,
        dtype_bytes=4 if client.profile.compute_dtype == "float32" else 2,
        new_tokens=data.mean_tokens
        * max(0, min(choice.steps * settings.batch_size, data.num_examples) - client.cached_examples),
        new_anchor_tokens=settings.anchor_tokens * max(0, anchors - client.cached_anchor_sequences) * anchored,
        measure_tokens=settings.measure_sequences * settings.anchor_tokens * anchored,
    )
    assert choice.mode is not None
    seconds = round_time(
        client.profile,
        instance.shape,
        instance.layout,
        choice.blocks,
        work,
        choice.mode,
        upload_num_bytes=upload_bytes(
            instance.shape, len(choice.blocks), settings.delta_format, settings.delta_density, choice.width
        ),
        download_num_bytes=download_bytes(
            instance.shape,
            len(instance.layout.blocks),
            settings.delta_format,
            settings.down_density,
            client.versions_behind,
        ),
        scale=client.time_scale,
        width=choice.width,
    ).total_s
    peak = peak_memory(
        instance.shape,
        instance.layout,
        choice.blocks,
        work,
        choice.mode,
        accelerator=client.profile.accelerator,
        width=choice.width,
    ).peak
    return TIME_SAFETY * seconds, client.profile.runtime_memory_bytes + math.ceil(client.memory_scale * peak)


def over_budget(count: int, seed: int = 1) -> dict[str, Any]:
    """Of ``count`` random instances."""
    rng = random.Random(seed)
    broken: list[str] = []
    by_binding = {"memory": 0, "deadline": 0, "none": 0}
    others = 0
    narrower = 0
    for number in range(count):
        instance = random_instance(rng, clients=(1, 6), blocks=(1, 8))
        if number % 2:  # every other run allows slim blocks
            instance = replace(instance, settings=replace(instance.settings, widths=WIDTHS))
        for choice in instance.plan().choices:
            if choice.role != "train":
                others += 1
                continue
            by_binding[choice.binding] += 1
            narrower += choice.width < 1
            if text := breaks(instance, choice):
                broken.append(text)
    for text in broken[:5]:
        print(text)
    return {
        "over_budget": len(broken),
        "instances": count,
        "choices": sum(by_binding.values()),
        "choices_by_binding_limit": by_binding,
        "choices_of_slim_blocks": narrower,
        "choices_without_training": others,
    }


# The best plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A plan beside the best one."""

    clients: int
    training: int
    """Clients that can train anything."""
    blocks: int
    plan_value: float
    """J of the sequential rule."""
    best_value: float
    """J of the optimum."""

    @property
    def share(self) -> float:
        """How far the plan is below, as a share of the best."""
        return (self.best_value - self.plan_value) / self.best_value


def best_plan(
    instance: Instance, sets: Mapping[ClientKey, Sequence[tuple[int, ...]]]
) -> dict[ClientKey, tuple[int, ...]]:
    """The sets of blocks with the largest J, one or none of each client's (HiGHS).

    Args:
        sets: what each client could train.
    """
    settings, blocks = instance.settings, instance.layout.blocks
    gains = relative_gains(instance.clients, blocks)
    mean_examples = statistics.fmean(client.statistics.num_examples for client in instance.clients)
    options = [(client, chosen) for client in instance.clients for chosen in sets.get(client.key, ())]
    values = [
        math.fsum(
            gains[client.key][block]
            + settings.rarity_weight * instance.coverage.rarity(block, client.statistics.topics)
            for block in chosen
        )
        for client, chosen in options
    ]
    debts = [settings.debt_weight * len(instance.clients) * instance.coverage.debts(block)[-1] for block in blocks]
    # Variables: an option is taken (whole numbers), then how much of each block is covered, at most all of it.
    rows: list[dict[int, float]] = []
    limits: list[float] = []
    for client in instance.clients:
        rows.append({index: 1.0 for index, (of, _) in enumerate(options) if of.key == client.key})
        limits.append(1.0)
    for place, block in enumerate(blocks):
        row = {
            index: -client.statistics.num_examples / mean_examples
            for index, (client, chosen) in enumerate(options)
            if block in chosen
        }
        rows.append({**row, len(options) + place: 1.0})
        limits.append(0.0)
    entries = [(row, column, value) for row, found in enumerate(rows) for column, value in found.items()]
    matrix = csr_array(
        ([e[2] for e in entries], ([e[0] for e in entries], [e[1] for e in entries])),
        shape=(len(rows), len(options) + len(blocks)),
    )
    solved = milp(
        -np.array([*values, *debts]),
        integrality=np.array([1] * len(options) + [0] * len(blocks)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, -np.inf, limits),
        options={"mip_rel_gap": 1e-9},
    )
    if not solved.success:
        raise RuntimeError(f"the solver gave up: {solved.message}")
    return {client.key: chosen for taken, (client, chosen) in zip(solved.x, options, strict=False) if taken > 0.5}


def gap(instance: Instance) -> Gap | None:
    """The sequential rule against the optimum of J; None where nobody can train.

    Each client may train any set that fits for as many steps as the plan gives it.
    """
    plan = instance.plan()
    training = {choice.client: choice for choice in plan.choices if choice.role == "train"}
    if not training:
        return None
    sets = {
        client.key: feasible_sets(
            client,
            layout=instance.layout,
            shape=instance.shape,
            settings=instance.settings,
            deadline_s=plan.deadline.seconds,
            steps=training[client.key].steps,
        )
        for client in instance.clients
        if client.key in training
    }

    def value(blocks_of: Mapping[ClientKey, tuple[int, ...]]) -> float:
        return objective(
            blocks_of,
            instance.clients,
            blocks=instance.layout.blocks,
            settings=instance.settings,
            coverage=instance.coverage,
        )

    found = Gap(
        clients=len(instance.clients),
        training=len(training),
        blocks=len(instance.layout.blocks),
        plan_value=value({key: choice.blocks for key, choice in training.items()}),
        best_value=value(best_plan(instance, sets)),
    )
    if found.share < -ROUNDING:
        raise RuntimeError(f"the plan's value {found.plan_value} is above the optimum {found.best_value}")
    return found


def gaps(count: int, seed: int = 2) -> Iterator[Gap]:
    """Of ``count`` random instances with 2 to 8 clients and 2 to 6 blocks in which somebody can train."""
    rng = random.Random(seed)
    found = 0
    while found < count:
        one = gap(random_instance(rng, clients=(2, 8), blocks=(2, 6)))
        if one is not None:
            found += 1
            yield one


# Time


def fleet(clients: int, blocks: int, *, alike: bool = False, seed: int = 3) -> Instance:
    """A large fleet; Llama-1B, blocks over the whole depth, the product's defaults and the computed deadline.

    Args:
        alike: whole devices of the catalog, one of ten kinds of data each, all of it seen before; they differ in
            measured speed and in gradient energy. Otherwise no two clients agree in anything.
    """
    rng = random.Random(seed)
    entries, ids = LLAMA_1B.num_layers + blocks, range(blocks)
    sites = [_client(rng, index, ids, least_share=0.25) for index in range(clients)]
    if alike:
        kinds = [site.statistics for site in sites if site.statistics.num_examples > 0][:10]
        sites = [
            replace(
                site,
                profile=load(rng.choice(names())),
                statistics=rng.choice(kinds),
                cached_examples=10_000,
                cached_anchor_sequences=448,
            )
            for site in sites
        ]
    return Instance(
        clients=tuple(sites),
        layout=StackLayout(
            num_entries=entries, positions={index: (index + 1) * entries // blocks - 1 for index in ids}
        ),
        shape=LLAMA_1B,
        settings=AllocationSettings(widths=WIDTHS),
        coverage=Coverage(seen={block: (rng.uniform(0, 5000),) * len(WIDTHS) for block in ids}),
    )


def plan_seconds(instance: Instance, runs: int = RUNS) -> float:
    """CPU seconds of planning one round: the least of some runs, because others use this machine too."""
    found: list[float] = []
    for _ in range(runs):
        began = time.process_time()
        instance.plan()
        found.append(time.process_time() - began)
    return min(found)


def measure(*, instances: int, gap_instances: int, clients: int, blocks: int) -> tuple[dict[str, Any], list[Any]]:
    """The figures under ``allocation``, and the gaps by number of clients that train."""
    figures = over_budget(instances)
    print(f"over budget: {figures['over_budget']} of {figures['choices']} choices", flush=True)
    found = list(gaps(gap_instances))
    shares = [one.share for one in found]
    figures |= {
        "gap_to_optimum_median": statistics.median(shares),
        "gap_to_optimum_p95": float(np.quantile(shares, 0.95)),
        "gap_to_optimum_worst": max(shares),
        "gap_to_optimum_worst_where_two_train": max((o.share for o in found if o.training > 1), default=0.0),
        "gap_instances": len(found),
        "optimal_share": statistics.fmean(share <= ROUNDING for share in shares),
    }
    print(f"gap to the optimum: median {statistics.median(shares):.2%}, worst {max(shares):.2%}", flush=True)
    for name, alike in (("", False), ("_alike", True)):
        taken_s = figures[f"plan_{clients}x{blocks}{name}_s"] = plan_seconds(fleet(clients, blocks, alike=alike))
        print(f"{clients} clients{name} x {blocks} blocks: {taken_s:.2f} s", flush=True)
    rows = [
        {
            "clients_that_train": size,
            "instances": len(of_size),
            "gap_median": statistics.median(one.share for one in of_size),
            "gap_worst": max(one.share for one in of_size),
        }
        for size in sorted({one.training for one in found})
        if (of_size := [one for one in found if one.training == size])
    ]
    return figures, rows


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    import torch  # planning does not need it; the results name its version
    from starter_runs import machine, write_results

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="plans of random fleets: limits, distance from the best, time")
    parser.add_argument("--instances", type=int, default=INSTANCES)
    parser.add_argument("--gap-instances", type=int, default=GAP_INSTANCES)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--out", type=Path, default=RESULTS / "fleet.json")
    options = parser.parse_args(arguments)
    figures, rows = measure(
        instances=options.instances,
        gap_instances=options.gap_instances,
        clients=options.clients,
        blocks=options.blocks,
    )
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    about = machine()
    about["versions"]["scipy"] = importlib.metadata.version("scipy")
    more = {key: value for key, value in known.items() if key not in ("command", "rows", "allocation", *about)}
    write_results(options.out, "python benchmarks/bench_fleet.py", rows, **about, allocation=figures, **more)


if __name__ == "__main__":
    main(sys.argv[1:])
