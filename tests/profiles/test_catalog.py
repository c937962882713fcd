"""Every number of the catalog says where it comes from, and no entry contradicts itself."""

from __future__ import annotations

import dataclasses
import re
from importlib import resources

import pytest

from fedblocks.profiles.catalog_files import (
    QWEN2_5_0_5B,
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
        "jetson-orin-nx-16gb",
        "jetson-agx-orin-64gb",
        "rtx-3060-12gb",
        "rtx-4090",
        "laptop-cpu",
        "server-cpu-2core",
    }


@pytest.mark.parametrize("name", names())
def test_every_entry_is_valid_and_makes_a_profile_below_its_peaks(name):
    found, profile = entry(name), load(name)
    assert profile.device == name
    assert profile.source == "catalog"
    assert profile.gemm_flops_per_s <= found.facts["dense_tflops"].value * 1e12
    assert profile.memory_bytes_per_s <= found.facts["memory_bandwidth_gb_per_s"].value * 1e9
    assert profile.runtime_memory_bytes < profile.memory_usable_bytes


def test_our_own_guess_of_a_laptop_is_marked_as_one():
    assert {fact.kind for fact in entry("laptop-cpu").facts.values()} == {"estimate"}
    assert "estimate" in entry("laptop-cpu").title


def test_devices_are_ordered_as_their_makers_say():
    rates = [
        load(name).gemm_flops_per_s
        for name in (
            "server-cpu-2core",
            "laptop-cpu",
            "jetson-orin-nano-8gb",
            "jetson-orin-nx-16gb",
            "jetson-orin-nano-8gb-super",
            "rtx-3060-12gb",
            "jetson-agx-orin-64gb",
            "rtx-4090",
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
    assert small.memory_usable_bytes - small.runtime_memory_bytes == int((5.2e9 - 1.2e9) / 280)
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
