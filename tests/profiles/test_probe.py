"""The probe measures, stays in its budget, and says what it could not measure."""

from __future__ import annotations

import json
import time

import pytest

from fedblocks.profiles import probe as probe_module
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.profiles.probe import LinkSpeed, cgroup_free_bytes, describe, load_profile, probe, to_json

SHAPE = ModelShape(
    family="llama",
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=64,
    tied_embeddings=True,
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return probe(budget_s=4.0, folder=tmp_path_factory.mktemp("probe"), shape=SHAPE, threads=1)


def test_the_probe_ends_within_twenty_seconds(result):
    assert result.seconds < 20


def test_rates_are_medians_of_at_least_five_runs_with_their_spread(result):
    for name in (
        "gemm_float32_flops_per_s",
        "gemm_block_flops_per_s",
        "copy_bytes_per_s",
        "step_overhead_s",
        "disk_write_bytes_per_s",
        "disk_read_bytes_per_s",
    ):
        item = result.item(name)
        assert item.runs >= 5, name
        assert item.low <= item.value <= item.high, name
        assert item.note, name


def test_the_rate_at_the_models_own_sizes_decides_where_the_model_is_known(result):
    assert result.profile.gemm_flops_per_s == result.item("gemm_block_flops_per_s").value


def test_what_was_not_measured_says_why_and_leaves_a_prior(result):
    item = result.item("uplink_bytes_per_s")
    assert item.value is None
    assert "aggregator" in item.note
    assert result.profile.uplink_bytes_per_s == 5e6 / 8
    assert "not measured" in describe(result)


def test_the_profile_survives_its_file(result, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(to_json(result), encoding="utf-8")
    assert load_profile(path) == result.profile
    assert {item["name"] for item in json.loads(path.read_text())["items"]} == {i.name for i in result.items}


@pytest.mark.parametrize("content", ["", "{", "{}", '{"profile": {"device": "x"}}', "[]"])
def test_an_unreadable_profile_file_is_no_profile(content, tmp_path):
    path = tmp_path / "profile.json"
    assert load_profile(path) is None
    path.write_text(content, encoding="utf-8")
    assert load_profile(path) is None


def test_no_file_of_the_probe_is_left_behind(tmp_path):
    probe_module._disk_items(tmp_path, budget_s=0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_reason_not_an_error(tmp_path):
    items = probe_module._disk_items(tmp_path / "missing", budget_s=0.1)
    assert [item.value for item in items] == [None, None]
    assert "missing" in items[0].note


def test_without_torch_numpy_measures_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(probe_module, "_torch", lambda: None)
    found = probe(budget_s=1.0, folder=tmp_path, link=LinkSpeed(uplink_bytes_per_s=1e6, downlink_bytes_per_s=2e6))
    assert "numpy" in found.item("gemm_float32_flops_per_s").note
    assert found.item("step_overhead_s").value is None
    assert found.profile.four_bit == "torch is not installed"
    assert (found.profile.uplink_bytes_per_s, found.profile.downlink_bytes_per_s) == (1e6, 2e6)


def test_a_child_that_hangs_costs_its_timeout_and_keeps_what_it_said():
    began = time.monotonic()
    said, why = probe_module._child("import time; print('runtime 5', flush=True); time.sleep(60)", "cpu", timeout_s=1.0)
    assert time.monotonic() - began < 10
    assert said == {"runtime": "5"}
    assert "no answer within 1 s" in why


def test_a_child_that_crashes_is_quoted():
    said, why = probe_module._child("raise RuntimeError('named symbol not found')", "cpu", timeout_s=10.0)
    assert said == {}
    assert "named symbol not found" in why


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [("1000\n", "400\n", 600), ("1000", "2000", 0), ("max\n", "400", None), ("9223372036854771712", "400", None)],
)
def test_memory_limits_of_control_groups_count(limit, used, free, tmp_path):
    (tmp_path / "limit").write_text(limit)
    (tmp_path / "used").write_text(used)
    assert cgroup_free_bytes(tmp_path / "limit", tmp_path / "used") == free
    assert cgroup_free_bytes(tmp_path / "none", tmp_path / "used") is None
