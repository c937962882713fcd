"""The figures in docs/allocation.md and docs/results.md are those of benchmarks/results/fleet.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "benchmarks"))

import fleet_document  # noqa: E402


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def test_the_page_says_what_was_measured():
    found = json.loads((REPO / "benchmarks" / "results" / "fleet.json").read_text())["allocation"]
    page = " ".join((REPO / "docs" / "allocation.md").read_text().split())
    binding = found["choices_by_binding_limit"]
    for text in (
        f"Of {found['instances']:,} random fleets",
        f"{found['over_budget']} of {found['choices']:,} training choices",
        f"Memory binds in {binding['memory']:,} of them, the deadline in {binding['deadline']:,}",
        f"median {percent(found['gap_to_optimum_median'])}, 95th percentile {percent(found['gap_to_optimum_p95'])}",
        f"worst {percent(found['gap_to_optimum_worst'])}",
        f"{percent(found['optimal_share'], 0)} of the {found['gap_instances']:,} plans",
        f"two or more clients train: {percent(found['gap_to_optimum_worst_where_two_train'])}",
        f"{found['plan_1000x8_s']:.1f} s of CPU time",
        f"recur: {found['plan_1000x8_alike_s']:.1f} s",
    ):
        assert text in page, text


def test_the_fleets_part_of_the_results_is_written_from_what_was_measured():
    content = json.loads((REPO / "benchmarks" / "results" / "fleet.json").read_text())
    page = (REPO / "docs" / "results.md").read_text()
    for part in fleet_document.parts_of(content):
        assert part in page, part
