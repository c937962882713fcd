"""Every number of the catalog says where it comes from, and no entry contradicts itself."""

from __future__ import annotations

import dataclasses
import re
from importlib import resources

import pytest

from fedblocks.profiles.catalog_files import (
    QWEN2_5_0_5B,
    UNSCALED_BYTES,
    CatalogError,
    entry,
    load,
    names,
    parse,
    scale_factor,
    scaled,
)
from fedblocks.profiles.model_shape import ModelShape

STARTER = ModelShape(
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


def text_of(name="jetson-orin-nano-8gb"):
    return (resources.files("fedblocks.profiles") / "catalog" / f"{name}.toml").read_text(encoding="utf-8")


def test_the_catalog_holds_the_devices_of_the_design():
    assert set(names()) >= {
        "jetson-orin-nano-8gb",
        "jetson-orin-nano-8gb-super",
        "jetson-orin-nano-8gb-super-25w",
        "jetson-orin-nx-16gb",
        "jetson-agx-orin-64gb",
        "jetson-agx-thor-128gb",
        "rtx-3060-12gb",
        "rtx-4070",
        "rtx-4090",
        "rtx-5090",
        "h200",
        "raspberry-pi-5-8gb",
        "laptop-cpu",
        "server-cpu-2core",
        "server-cpu-16core",
    }


@pytest.mark.parametrize("name", names())
def test_every_entry_is_valid_and_makes_a_profile_below_its_peaks(name):
    found, profile = entry(name), load(name)
    assert profile.device == name
    assert profile.source == "catalog"
    assert profile.gemm_flops_per_s <= found.facts["dense_tflops"].value * 1e12
    assert profile.memory_bytes_per_s <= found.facts["memory_bandwidth_gb_per_s"].value * 1e9
    assert profile.runtime_memory_bytes < profile.memory_usable_bytes
    assert profile.memory_usable_bytes <= found.facts["memory_installed_gb"].value * 1e9
    assert found.facts["board_power_w"].value > 0
    assert profile.disk_read_bytes_per_s < profile.memory_bytes_per_s
    assert profile.uplink_bytes_per_s < profile.downlink_bytes_per_s


@pytest.mark.parametrize("name", names())
def test_every_fact_says_enough_to_be_looked_up(name):
    for key, fact in entry(name).facts.items():
        assert len(fact.source) >= 8, key
        if fact.kind == "datasheet":
            assert "data sheet" in fact.source, key
        if fact.kind != "estimate":
            assert not re.search(r"\b(guess|estimate|unverified|prior)\b", fact.source), key


def test_more_power_never_makes_a_board_slower():
    boards = {}
    for name in names():
        boards.setdefault(entry(name).mode_of or name, []).append(entry(name))
    assert {len(modes) for modes in boards.values()} == {1, 3}
    for modes in boards.values():
        modes.sort(key=lambda one: (one.facts["board_power_w"].value, one.profile().gemm_flops_per_s))
        for rate in ("gemm_flops_per_s", "memory_bytes_per_s"):
            rates = [getattr(one.profile(), rate) for one in modes]
            assert rates == sorted(rates)
        assert len({one.profile().memory_usable_bytes for one in modes}) == 1


def test_a_power_mode_changes_rates_and_power_and_nothing_else():
    board, mode = entry("jetson-orin-nano-8gb"), entry("jetson-orin-nano-8gb-super")
    assert mode.mode_of == board.name
    assert (mode.tier, mode.facts["memory_usable_gb"]) == (board.tier, board.facts["memory_usable_gb"])
    changed = {key for key, fact in mode.facts.items() if fact != board.facts[key]}
    assert {"gpu_clock_mhz", "dense_tflops", "memory_bandwidth_gb_per_s", "board_power_w"} <= changed


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r'mode_of = "[^"]*"', 'mode_of = "jetson-orin-mini"', "jetson-orin-nano-8gb"),
        (r'mode_of = "[^"]*"', 'mode_of = "jetson-orin-nano-8gb-super-25w"', "a mode itself"),
        (r'mode_of = "[^"]*"', 'mode_of = "jetson-orin-nano-8gb-super"', "mode_of"),
        (r'mode_of = "[^"]*"', "", "keys are"),
        (r"gpu_clock_mhz", "memory_usable_gb", "does not change memory_usable_gb"),
        (r"value = 25,", "value = 10,", "takes more power"),
        (r"value = 102,", "value = 34,", "lower memory_bytes_per_s"),
        (r"value = 16.7,", "value = 33.4,", "give 16.7"),
    ],
)
def test_a_mode_that_contradicts_its_board_is_refused(pattern, replacement, message):
    broken, count = re.subn(pattern, replacement, text_of("jetson-orin-nano-8gb-super"), count=1)
    assert count == 1
    with pytest.raises(CatalogError, match=message):
        parse("jetson-orin-nano-8gb-super", broken)


def test_the_ladder_is_a_definition_with_the_speeds_memories_and_links_of_its_four_tiers():
    tiers = [load(f"ladder-{letter}") for letter in "abcd"]
    anchor = load("jetson-orin-nano-8gb")
    for profile, speed, gib, up, down in zip(
        tiers, (1, 2.5, 6, 12), (4, 8, 16, 24), (5, 10, 50, 100), (20, 50, 100, 200), strict=True
    ):
        for rate in ("gemm_flops_per_s", "memory_bytes_per_s", "disk_read_bytes_per_s"):
            assert getattr(profile, rate) == pytest.approx(speed * getattr(anchor, rate), rel=5e-3)
        assert profile.step_overhead_s == pytest.approx(anchor.step_overhead_s / speed, rel=1e-3)
        assert profile.memory_usable_bytes == pytest.approx(gib * 2**30, rel=1e-3)
        assert (profile.uplink_bytes_per_s, profile.downlink_bytes_per_s) == (up * 1e6 / 8, down * 1e6 / 8)
        assert {fact.kind for fact in entry(profile.device).facts.values()} == {"definition"}


def test_our_own_guess_of_a_laptop_is_marked_as_one():
    assert {fact.kind for fact in entry("laptop-cpu").facts.values()} == {"estimate"}
    assert "estimate" in entry("laptop-cpu").title


def test_devices_are_ordered_as_their_makers_say():
    rates = [
        load(name).gemm_flops_per_s
        for name in (
            "raspberry-pi-5-8gb",
            "server-cpu-2core",
            "laptop-cpu",
            "server-cpu-16core",
            "jetson-orin-nano-8gb",
            "jetson-orin-nx-16gb",
            "jetson-orin-nano-8gb-super",
            "rtx-3060-12gb",
            "jetson-agx-orin-64gb",
            "rtx-4070",
            "rtx-4090",
            "jetson-agx-thor-128gb",
            "rtx-5090",
            "h200",
        )
    ]
    assert rates == sorted(rates)


def test_an_unknown_device_is_answered_with_the_list():
    with pytest.raises(CatalogError, match="rtx-4090"):
        load("rtx-9090")


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r'kind = "datasheet"', 'kind = "hearsay"', "hearsay"),
        (r', source = "[^"]*"', "", "expected value, kind and source"),
        (r'source = "[^"]*"', 'source = " "', "expected a text"),
        (r"value = 68,", 'value = "68",', "positive number"),
        (r"gpu_clock_mhz", "gpu_clock", "ends in no unit"),
        (r"disk_free_gb", "disk_spare_gb", "disk_free_gb"),
        (r"value = 5.2,", "value = 9.2,", "expected each below the next"),
        (r"value = 10.2,", "value = 40,", "give 10.2"),
        (r"value = 0.7,", "value = 1.3,", "achieved_compute_share"),
        (r"value = 15,", "value = 0,", "positive number"),
        (r"board_power_w", "board_power", "ends in no unit"),
        (r"board_power_w", "module_power_w", "board_power_w are missing"),
        (r"cpu_count = { value = 6,", "cpu_count = { value = 6.5,", "whole number"),
        (r'tier = "A"', 'tier = "Z"', "tier"),
        (r'name = "jetson-orin-nano-8gb"', 'name = "other"', "name"),
    ],
)
def test_a_file_that_breaks_the_schema_or_contradicts_itself_is_refused(pattern, replacement, message):
    broken, count = re.subn(pattern, replacement, text_of(), count=1)
    assert count == 1
    with pytest.raises(CatalogError, match=message):
        parse("jetson-orin-nano-8gb", broken)


def test_the_starter_model_scales_devices_by_one_over_280():
    assert scale_factor(STARTER) == 53248 / 14909440 == 1 / 280
    assert scale_factor(QWEN2_5_0_5B) == 1.0


def host(**changes):
    usual = {
        "device": "host",
        "source": "measured",
        "accelerator": "cpu",
        "compute_dtype": "float32",
        "memory_usable_bytes": 2**34,
        "runtime_memory_bytes": 3 * 2**20,
        "gemm_flops_per_s": 5e10,
        "step_overhead_s": 0.004,
        "disk_free_bytes": 123,
        "four_bit": "ok",
    }
    return dataclasses.replace(load("server-cpu-2core"), **{**usual, **changes})


def test_a_scaled_device_has_its_share_of_memory_above_what_the_process_itself_holds():
    device = load("jetson-orin-nano-8gb")
    small = scaled(device, 1 / 280, host=host())
    assert small.runtime_memory_bytes == 3 * 2**20
    assert small.memory_usable_bytes - small.runtime_memory_bytes == UNSCALED_BYTES + int((5.2e9 - 1.2e9) / 280)
    assert small.gemm_flops_per_s == device.gemm_flops_per_s / 280
    assert (small.uplink_bytes_per_s, small.step_overhead_s) == (device.uplink_bytes_per_s, device.step_overhead_s)
    assert (small.accelerator, small.compute_dtype) == ("cpu", "float32")


def test_a_scaled_device_is_never_faster_than_its_host():
    small = scaled(load("rtx-4090"), 1.0, host=host())
    assert small.gemm_flops_per_s == 5e10
    assert small.step_overhead_s == load("rtx-4090").step_overhead_s
    assert scaled(load("laptop-cpu"), 1 / 280, host=host(step_overhead_s=0.5)).step_overhead_s == 0.5


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.5])
def test_a_factor_that_does_not_scale_down_is_refused(factor):
    with pytest.raises(ValueError, match="factor"):
        scaled(load("rtx-4090"), factor, host=host())
