"""F18 of field.md: many rounds of a tiny model; memory and descriptors stay where they are."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import psutil
import pytest

ROUNDS = 1000


@pytest.mark.slow
def test_f18_a_thousand_rounds_leave_memory_and_descriptors_where_they_were(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=(f"run.max_rounds={ROUNDS + 10}", "delta.format=fp32"))
    for site in world.sites.values():
        site.accuracy = lambda version: min(1.0, version / ROUNDS)  # always better: the run goes on
        site.kl = lambda version: 0.001
    world.join()
    process = psutil.Process()
    rss: list[int] = []
    for number in range(ROUNDS):
        world.round()
        world.lines.clear()  # what the test itself would keep
        world.endpoint.announced.clear()
        world.endpoint.payloads.clear()
        for site in world.sites.values():
            del site.tasks[:-1], site.acked[:]
        if number % 10 == 9:
            rss.append(process.memory_info().rss)
    half = len(rss) // 2
    early, late = statistics.median(rss[half : half + 10]), statistics.median(rss[-10:])
    assert world.aggregator.state.round == ROUNDS + 1
    assert late - early < 2e6, f"{(late - early) / 1e6:.1f} MB more in {ROUNDS // 2} rounds"
    assert process.num_fds() < 64
    assert len(list((world.path / "updates").iterdir())) <= 1
    assert len(list((world.path / "state").glob("*.safetensors"))) <= 4
