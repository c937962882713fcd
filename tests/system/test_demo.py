"""``fedblocks demo --quick``: the main job as a newcomer runs it, on the bundled model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KEYS = {
    "retention", "kl_over_budget", "downstream_before", "downstream_after", "downstream_over_target", "rounds",
    "wall_s", "bytes_ratio_full_fp32", "clients", "export_dir",
}  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    file = folder / "result.json"
    done = subprocess.run(
        [str(Path(sys.executable).parent / "fedblocks"), "demo", "--quick", "--json", str(file)],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    logs = "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in (folder / "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + logs
    return json.loads(file.read_text()) | {"output": done.stdout, "folder": folder}


def test_it_prints_a_line_a_round_and_leaves_result_plot_and_checkpoint(result):
    assert result.keys() >= KEYS
    assert "round 3/3" in result["output"]
    assert (result["folder"] / "plot.png").stat().st_size > 5000
    assert (result["folder"] / "export" / "config.json").is_file()


def test_it_learns_something_and_keeps_the_rest_within_the_budget(result):
    assert result["downstream_after"] > result["downstream_before"] == 0.0
    assert result["proof"]["exported"]["downstream_nll"] < result["proof"]["base"]["downstream_nll"] / 2
    assert result["retention"] >= 0.97
    assert result["kl_over_budget"] <= 1
    assert result["kl_over_budget_4bit"] <= 1
    assert result["proof"]["max_abs_logit_difference_at_strength_0"] == 0.0


def test_unequal_devices_hold_unequal_assignments_and_memory_is_what_was_predicted(result):
    weak, strong = result["clients"]
    assert weak["device"] != strong["device"]
    assert [(a["blocks"], a["steps"]) for a in weak["assignments"]] != [
        (a["blocks"], a["steps"]) for a in strong["assignments"]
    ]
    for client in result["clients"]:
        assert client["updates"] == 3
        assert 0 < client["measured_peak_bytes"] < client["predicted_peak_bytes"] + 32 * 2**20
        assert client["bytes_up"] > 0


def test_the_export_equals_the_client_s_model_to_the_rounding_of_its_stored_type(result):
    proof = result["proof"]

    # bf16 keeps 8 bits; the difference of a logit is small beside the logits' own size.
    assert proof["export_vs_client_model_max_abs_logit_difference"] < 0.02 * proof["export_logit_scale"]


def test_a_folder_of_the_user_s_own_is_never_removed(tmp_path):
    mine = tmp_path / "data" / "precious.jsonl"
    mine.parent.mkdir()
    mine.write_text("{}")

    done = subprocess.run(
        [str(Path(sys.executable).parent / "fedblocks"), "demo", "--json", str(tmp_path / "result.json")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert done.returncode == 2
    assert "holds data" in done.stderr
    assert mine.read_text() == "{}"
