"""The benchmark of predicted step times: what it counts, and that it leaves the rest of its results file alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import bench_cost_model
from bench_cost_model import Assigned, Checkpoint, configurations, fill_time, folder_of, step_parts
from rivals import false_hash, layout_of

from fedblocks.profiles.catalog_files import load

PROFILE = dataclasses.replace(load("laptop-cpu"), source="measured")


def rows(work, *, arithmetic, weights):
    """Steps and first passes of a device that is that much slower than its profile says."""
    for item in configurations():
        checkpoint = Checkpoint.open(folder_of(item.model, work))
        plan = item.assigned.plan(checkpoint.config, false_hash(checkpoint))
        about = (PROFILE, plan.shape, layout_of(plan))
        parts = step_parts(*about, item.assigned.trained(plan), item.work(), item.mode)
        step_s = sum(parts) + (arithmetic - 1) * parts.arithmetic_s + (weights - 1) * parts.weights_s
        prefix_s = 2.0 * fill_time(*about, item.work())
        for repeat in range(2):
            yield {"name": item.name, "repeat": repeat, "step_s": step_s * (1 + 0.02 * repeat), "prefix_s": prefix_s}


def test_a_device_that_is_slower_in_one_part_is_found_out_from_half_of_the_configurations(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_cost_model, "TOKENS", {"starter": (64, 4096)})
    lines = [{"profile": dataclasses.asdict(PROFILE)}, *rows(tmp_path, arithmetic=1.3, weights=4.0)]
    file, out = tmp_path / "rows.jsonl", tmp_path / "fleet.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out.write_text(json.dumps({"command": "old", "allocation": {"over_budget": 0}, "rows": [{"kept": True}]}))
    bench_cost_model.main(["--rows", str(file), "--out", str(out), "--work", str(tmp_path)])
    content = json.loads(out.read_text())
    assert (content["command"], content["allocation"], content["rows"]) == (
        "old",
        {"over_budget": 0},
        [{"kept": True}],
    )
    part = content["cost_model"]
    assert part["configurations"] == 16
    assert part["configurations_not_used_for_fitting"] == 8
    assert sum(row["used_for_fitting"] for row in part["steps"]) == 8
    assert part["step_time_median_error"] < part["step_time_median_error_one_scale"]
    assert part["step_time_median_error"] < 0.1 < part["step_time_median_error_probe_only"]
    assert part["prefix_median_error"] == pytest.approx(0, abs=1e-6)
    assert part["prefix_median_error_probe_only"] == pytest.approx(0.5)
    errors = [part["by_reports"][n]["step_time_median_error"] for n in ("0", "8")]
    assert errors[1] < errors[0]
    assert part["by_model"]["starter"]["step_time_median_error"] == part["step_time_median_error"]


def test_the_grid_is_the_same_at_every_call_and_has_no_configuration_twice():
    found = configurations()
    assert found == configurations()
    assert len(found) == len({item.name for item in found}) == 48
    assert {item.model for item in found} == {"starter", "m15", "q30"}
    assert any(item.mode.checkpoint for item in found)
    assert any(item.mode.frozen == "nf4" for item in found)
    assert {item.mode.optimizer for item in found} == {"fp32", "split_8bit"}
    assert {item.assigned for item in found} >= {Assigned(placement="thirds", num_blocks=3, highest=1)}
