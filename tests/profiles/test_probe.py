"""The probe measures, stays in its budget, and says what it could not measure."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedblocks.edge_client.decode_rate import nf4_decode_run
from fedblocks.profiles import probe as probe_module
from fedblocks.profiles.board import MachineState
from fedblocks.profiles.link import LinkRecord
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.profiles.probe import DecodeRun, cgroup_free_bytes, describe, load_profile, probe, to_json

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
    folder = tmp_path_factory.mktemp("probe")
    return probe(budget_s=4.0, folder=folder, shape=SHAPE, threads=1, decoder=nf4_decode_run, root=folder)


def test_the_probe_ends_within_twenty_seconds(result):
    assert result.seconds < 20


def test_an_item_that_takes_long_leaves_less_to_those_after_it(monkeypatch, tmp_path):
    clock = SimpleNamespace(now_s=0.0)
    given = {}

    def item(name, *, takes_s=0.0):
        def measure(*_args, budget_s):
            given[name] = budget_s
            clock.now_s += takes_s
            return probe_module._missing(name, "not here")

        return measure

    gemm = item("gemm", takes_s=9.0)

    def gemms(*_args, budget_s):
        gemm(budget_s=budget_s)
        return [probe_module._missing(f"gemm_{dtype}_flops_per_s", "") for dtype in ("float32", "bfloat16")]

    monkeypatch.setattr(probe_module, "time", SimpleNamespace(monotonic=lambda: clock.now_s, time=time.time))
    monkeypatch.setattr(probe_module, "_torch", lambda: None)
    monkeypatch.setattr(probe_module, "_gemm_items", gemms)
    for name in ("copy", "step", "decode", "launch"):
        monkeypatch.setattr(probe_module, f"_{name}_item", item(name))
    monkeypatch.setattr(probe_module, "_disk_items", lambda *_args, budget_s: [item("disk")(budget_s=budget_s)])
    probe(budget_s=12.0, folder=tmp_path, root=tmp_path)
    shares = probe_module.ITEM_SHARES
    assert given["gemm"] == pytest.approx(12.0 * shares["gemm"] / (sum(shares.values()) - shares["block"]))
    after = sum(shares[name] for name in ("copy", "step", "disk", "decode", "launch"))
    assert given["copy"] == pytest.approx(3.0 * shares["copy"] / after)
    assert given["launch"] == pytest.approx(3.0)
    clock.now_s, given["copy"] = 0.0, None
    probe(budget_s=0.5, folder=tmp_path, root=tmp_path)
    assert given["launch"] == probe_module.MIN_LEFT_S


def test_rates_are_medians_of_at_least_five_runs_with_their_spread(result):
    for name in (
        "gemm_float32_flops_per_s",
        "gemm_block_flops_per_s",
        "nf4_decode_weights_per_s",
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


def test_a_machine_without_readable_state_or_gpu_says_so_and_is_measured(result):
    text = describe(result)
    assert "power mode         this machine has no file that says it" in text
    assert "heat               no temperature to read" in text
    assert "not measured       launch_s: a CPU launches no kernels" in text
    assert result.item("temperature_c").value is None
    assert result.item("throttle_events_count").value is None


def with_items(result, *items, **fields):
    """The result with these items instead of those of their names."""
    names = {item.name for item in items}
    return replace(result, items=(*(i for i in result.items if i.name not in names), *items), **fields)


def test_power_mode_and_heat_stand_in_the_result_with_what_happened_meanwhile(result):
    before = MachineState(nvpmodel="0 15W", temperature_c=48.0, hottest="tj-thermal", throttle_count=7)
    after = replace(before, temperature_c=71.0, throttle_count=9, throttled="cpu-thermal at 99 °C")
    found = with_items(result, *probe_module._state_items(before, after), before=before, after=after)
    heat, events = found.item("temperature_c"), found.item("throttle_events_count")
    assert (heat.value, heat.low, heat.high, heat.runs) == (71.0, 48.0, 71.0, 2)
    assert events.value == 2
    text = describe(found)
    assert "power mode         nvpmodel 0 15W" in text
    assert "heat               71 °C (tj-thermal), 48 °C before; held back: cpu-thermal at 99 °C" in text
    state = json.loads(to_json(found))["state"]
    assert (state["before"]["nvpmodel"], state["after"]["throttle_count"]) == ("0 15W", 9)


def test_the_round_trip_is_shown_with_its_spread(result):
    record = LinkRecord().with_figure("round_trip_s", 0.04).with_figure("round_trip_s", 0.05)
    found = with_items(result, *probe_module._link_items(record))
    assert found.item("round_trip_s").value == pytest.approx(0.043)
    assert "round trip 43 ms (40 to 50 in 2 runs)" in describe(found)
    assert "5 Mbit/s" in found.item("uplink_bytes_per_s").note


def test_a_decoder_that_cannot_serve_is_a_reason_not_an_error():
    def broken(_accelerator, _dtype):
        raise RuntimeError("no kernel image is available\nand more")

    torch = pytest.importorskip("torch")
    item = probe_module._decode_item("cpu", torch, "float32", broken, budget_s=0.1)
    assert (item.value, item.note) == (None, "no kernel image is available")
    calls = []
    run = DecodeRun(num_weights=1000, run=lambda: (calls.append(1), time.sleep(0.001)), note="slow")
    item = probe_module._decode_item("cpu", torch, "float32", lambda *_: run, budget_s=0.0)
    assert len(calls) == 1 + item.runs == 6
    assert 1000 / 0.1 < item.value < 1000 / 0.001


def test_a_launch_is_the_time_of_many_over_their_number(monkeypatch):
    clock = SimpleNamespace(now_s=0.0)
    waits = []

    class Number:
        def add_(self, _one):
            clock.now_s += 5e-6

    def synchronize():
        waits.append(clock.now_s)

    times = SimpleNamespace(perf_counter=lambda: clock.now_s, monotonic=lambda: clock.now_s)
    monkeypatch.setattr(probe_module, "time", times)
    torch = SimpleNamespace(zeros=lambda *_, **__: Number(), cuda=SimpleNamespace(synchronize=synchronize))
    item = probe_module._launch_item("cuda", torch, budget_s=0.0)
    assert item.value == pytest.approx(5e-6)
    assert item.runs == len(waits) - 1 == probe_module.MIN_RUNS
    assert "additions to one number" in item.note

    def refuse(*_args, **_options):
        raise RuntimeError("CUDA error: no kernel image is available")

    torch.zeros = refuse
    assert probe_module._launch_item("cuda", torch, budget_s=0.0).note == "CUDA error: no kernel image is available"


def test_what_is_decoded_for_the_rate_is_a_weight():
    run = nf4_decode_run("cpu", "float32")
    out = run.run()
    assert out.numel() == run.num_weights
    rows = out.shape[0] // 4
    assert 0.9 < out[:rows].std().item() < 1.1
    np.testing.assert_array_equal(out[:rows].numpy(), out[-rows:].numpy())
    assert "by torch" in run.note


def test_on_unified_memory_the_systems_figure_stands_and_on_a_gpu_of_its_own_the_drivers(monkeypatch, tmp_path):
    def cuda(*, integrated):
        properties = SimpleNamespace(is_integrated=integrated)
        return SimpleNamespace(
            cuda=SimpleNamespace(get_device_properties=lambda _: properties, mem_get_info=lambda: (123, 456))
        )

    monkeypatch.setattr(probe_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    own = probe_module._memory_item("cuda", cuda(integrated=False), tmp_path)
    assert (own.value, own.note) == (123.0, "free on the GPU")
    shared = probe_module._memory_item("cuda", cuda(integrated=True), tmp_path)
    assert (shared.value, shared.note) == (5000.0, "available on this machine, which its GPU shares")
    tree = tmp_path / "proc" / "device-tree"
    tree.mkdir(parents=True)
    (tree / "compatible").write_bytes(b"nvidia,p3767-0005\0nvidia,tegra234\0")
    assert probe_module._memory_item("cuda", cuda(integrated=False), tmp_path).value == 5000.0
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("4000\n")
    (group / "memory.current").write_text("1000\n")
    limited = probe_module._memory_item("cuda", cuda(integrated=True), tmp_path)
    assert limited.value == 3000.0
    assert "control group" in limited.note


@pytest.mark.slow
def test_the_child_counts_what_the_driver_takes_of_a_shared_memory():
    code = probe_module.CHILD.split("import os\n")[0].replace('else "cuda"', 'else "cpu"')
    said, why = probe_module._child(code, "unified", timeout_s=60.0)
    assert why == ""
    assert 0 <= int(said["runtime"]) < 2**30


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
    link = LinkRecord().with_figure("uplink_bytes_per_s", 1e6).with_figure("downlink_bytes_per_s", 2e6)
    found = probe(budget_s=1.0, folder=tmp_path, link=link, decoder=nf4_decode_run)
    assert "numpy" in found.item("gemm_float32_flops_per_s").note
    assert found.item("nf4_decode_weights_per_s").note == "torch is not installed"
    assert "NF4 decoding       not measured" in describe(found)
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
