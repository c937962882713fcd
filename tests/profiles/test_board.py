"""Power mode, clocks and heat are read from other machines' files, written here below a folder that stands for ``/``.

The contents follow public documents: NVIDIA's Jetson Linux Developer Guide (nvpmodel; modes and clocks of an Orin Nano
Super), the kernel's Documentation (thermal/sysfs-api, sysfs-class-power, cpufreq), Raspberry Pi's on get_throttled,
NVML's on clock event reasons. None was recorded by us on such a machine.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from fedblocks.profiles.board import (
    MachineState,
    changed,
    is_tegra,
    parse_nvidia_smi,
    parse_nvpmodel_conf,
    parse_nvpmodel_query,
    parse_nvpmodel_status,
    parse_pi_throttled,
    read_state,
)

NVPMODEL_CONF = """\
# FORMAT: < POWER_MODEL ID=9 NAME=COMMENT >
###########################
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_1 /sys/devices/system/cpu/cpu1/online
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_1 1
GPU MAX_FREQ 612000000
< POWER_MODEL ID=1 NAME=25W >
GPU MAX_FREQ 918000000
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
GPU MAX_FREQ -1
< PM_CONFIG DEFAULT=1 >
"""


@pytest.fixture
def machine(tmp_path):
    """A factory of fake roots: ``machine({"etc/x": "content"})``."""

    def make(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return make


ORIN_NANO = {
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": NVPMODEL_CONF,
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1728000\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_max_freq": "1728000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "sys/class/devfreq/15340000.vic/max_freq": "729600000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "49250\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "99000\n",
    "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "-256000\n",
    "sys/class/thermal/thermal_zone8/type": "tj-thermal\n",
    "sys/class/thermal/thermal_zone8/temp": "50500\n",
    "sys/class/thermal/thermal_zone8/trip_point_0_type": "active\n",
    "sys/class/thermal/thermal_zone8/trip_point_0_temp": "46000\n",
    "sys/class/thermal/thermal_zone9/type": "PMIC-Die\n",
    "sys/class/thermal/thermal_zone9/temp": "100000\n",
}


def test_an_orin_nano_says_mode_clocks_and_heat(machine):
    state = read_state(machine(ORIN_NANO))
    assert state == MachineState(
        nvpmodel="2 MAXN_SUPER",
        governor="schedutil",
        cpu_limit_hz=1.728e9,
        gpu_limit_hz=1.02e9,
        temperature_c=50.5,
        hottest="tj-thermal",
    )
    assert state.mode() == ("nvpmodel 2 MAXN_SUPER, governor schedutil, CPU at most 1.73 GHz, GPU at most 1.02 GHz")


def test_a_zone_at_its_passive_trip_point_is_held_back_and_a_fan_is_not(machine):
    root = machine(ORIN_NANO)
    for celsius, held in ((98.9, False), (99.0, True), (99.1, True)):
        (root / "sys/class/thermal/thermal_zone0/temp").write_text(f"{celsius * 1000:.0f}\n")
        assert bool(read_state(root).throttled) is held, celsius
    assert read_state(root).throttled == "cpu-thermal at 99 °C, slowed from 99 °C on"


def test_a_jetson_is_known_by_its_device_tree(machine, tmp_path):
    assert not is_tegra(tmp_path)
    assert is_tegra(machine(ORIN_NANO))
    assert not is_tegra(machine({"proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0"}))


def test_the_command_is_asked_where_the_status_file_is_missing(machine):
    script = "#!/bin/sh\n[ \"$1\" = -q ] && printf 'NV Fan Mode:quiet\\nNV Power Mode: 25W\\n1\\n'\n"
    root = machine({"usr/sbin/nvpmodel": script})
    assert read_state(root).nvpmodel == ""  # not executable
    (root / "usr/sbin/nvpmodel").chmod(0o755)
    assert read_state(root).nvpmodel == "1 25W"
    (root / "usr/sbin/nvpmodel").write_text("#!/bin/sh\nprintf 'NV Power Mode: 25W\\n1\\n'; exit 1\n")
    assert read_state(root).nvpmodel == ""


def test_a_command_that_hangs_is_left(machine, monkeypatch):
    monkeypatch.setattr("fedblocks.profiles.board.COMMAND_TIMEOUT_S", 0.2)
    root = machine({"usr/sbin/nvpmodel": "#!/bin/sh\nexec sleep 30\n"})
    (root / "usr/sbin/nvpmodel").chmod(0o755)
    began = time.monotonic()
    assert read_state(root).nvpmodel == ""
    assert time.monotonic() - began < 5


def test_a_mode_that_the_list_does_not_name_keeps_its_number(machine):
    assert read_state(machine({"var/lib/nvpmodel/status": "pmode:0007\n"})).nvpmodel == "7"


LAPTOP = {
    "sys/firmware/acpi/platform_profile": "balanced\n",
    "sys/class/power_supply/AC/type": "Mains\n",
    "sys/class/power_supply/AC/online": "0\n",
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/status": "Discharging\n",
    "sys/class/power_supply/hidpp_battery_0/type": "Battery\n",
    "sys/class/power_supply/hidpp_battery_0/scope": "Device\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "powersave\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "4700000\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "12\n",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "3\n",
    "sys/class/hwmon/hwmon3/name": "coretemp\n",
    "sys/class/hwmon/hwmon3/temp1_input": "61000\n",
    "sys/class/hwmon/hwmon4/name": "nvme\n",
    "sys/class/hwmon/hwmon4/temp1_input": "70000\n",
}


def test_a_laptop_says_profile_supply_and_counts(machine):
    root = machine(LAPTOP)
    on_battery = read_state(root)
    assert on_battery.power_source == "battery"
    assert on_battery.platform_profile == "balanced"
    assert on_battery.throttle_count == 15
    assert (on_battery.temperature_c, on_battery.hottest) == (61.0, "coretemp")
    (root / "sys/class/power_supply/AC/online").write_text("1\n")
    assert read_state(root).power_source == "mains"
    assert changed(on_battery, read_state(root)) == "power source was battery, is mains"


def test_a_mouse_with_a_battery_makes_no_laptop(machine):
    root = machine({k: v for k, v in LAPTOP.items() if "hidpp" in k})
    assert read_state(root).power_source == ""


def test_a_machine_that_says_nothing_is_no_error(tmp_path):
    assert read_state(tmp_path) == MachineState()
    assert MachineState().mode() == ""


@pytest.mark.parametrize("content", ["", "many\n", "nan\n", "inf", "0x\n"])
def test_files_with_nonsense_are_left_out(content, machine):
    numbers = [name for name in {**ORIN_NANO, **LAPTOP} if not name.endswith(("type", "conf", "name", "governor"))]
    state = read_state(machine(dict.fromkeys(numbers, content)))
    assert (state.cpu_limit_hz, state.gpu_limit_hz, state.temperature_c, state.throttle_count) == (None,) * 4
    assert state.throttled == ""


@pytest.mark.parametrize(
    ("text", "number"), [("pmode:0000\n", 0), ("pmode:0002 fmode:quiet\n", 2), ("", None), ("mode:3", None)]
)
def test_the_status_of_nvpmodel(text, number):
    assert parse_nvpmodel_status(text) == number


def test_the_modes_of_nvpmodel_without_its_comments():
    assert parse_nvpmodel_conf(NVPMODEL_CONF) == {0: "15W", 1: "25W", 2: "MAXN_SUPER"}


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: MAXN_SUPER\n2\n", "2 MAXN_SUPER"),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: MODE_15W\n0\n", "0 MODE_15W"),
        ("NV Power Mode: 15W\n", ""),
        ("", ""),
    ],
)
def test_the_answer_of_nvpmodel(text, mode):
    assert parse_nvpmodel_query(text) == mode


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("0\n", ()),
        ("50000", ()),  # under-voltage and throttling happened, and are over
        ("50005", ("under-voltage", "throttled")),
        ("0x8", ("soft temperature limit",)),
        ("", ()),
    ],
)
def test_what_holds_a_raspberry_pi_back(text, reasons, machine):
    assert parse_pi_throttled(text) == reasons
    root = machine({"sys/devices/platform/soc/soc:firmware/get_throttled": text})
    assert read_state(root).throttled == ", ".join(reasons)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("450.00, 41, 0x0000000000000001\n", (450.0, 41.0, ())),  # idle
        ("450.00, 60, 0x0000000000000004\n", (450.0, 60.0, ())),  # at its power limit: that is a GPU at work
        ("80.00, 87, 0x0000000000000020\n", (80.0, 87.0, ("GPU software thermal slowdown",))),
        ("[N/A], 55, [N/A]\n", (None, 55.0, ())),
        ("450.00, 41, 0x1\n450.00, 42, 0x1\n", (None, None, ())),
        ("Failed to initialize NVML\n", (None, None, ())),
        ("", (None, None, ())),
    ],
)
def test_the_answer_of_nvidia_smi(text, found):
    assert parse_nvidia_smi(text) == found


def test_nvidia_smi_is_asked_where_it_is(machine):
    root = machine({"usr/bin/nvidia-smi": "#!/bin/sh\necho '450.00, 88, 0x0000000000000040'\n"})
    (root / "usr/bin/nvidia-smi").chmod(0o755)
    state = read_state(root)
    assert (state.gpu_power_limit_w, state.temperature_c, state.hottest) == (450.0, 88.0, "GPU")
    assert state.throttled == "GPU hardware thermal slowdown"


MEASURED = MachineState(
    nvpmodel="0 15W", governor="schedutil", power_source="mains", cpu_limit_hz=2e9, gpu_limit_hz=1e9, temperature_c=50.0
)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, ""),
        ({"temperature_c": 80.0, "throttle_count": 9}, ""),
        ({"nvpmodel": "2 MAXN_SUPER"}, "nvpmodel was 0 15W, is 2 MAXN_SUPER"),
        ({"nvpmodel": ""}, ""),
        ({"platform_profile": "performance"}, ""),  # was not readable before
        ({"governor": "performance"}, "governor was schedutil, is performance"),
        ({"gpu_limit_hz": 0.91e9}, ""),
        ({"gpu_limit_hz": 0.89e9}, "GPU clock limit was 1 GHz, is 0.89 GHz"),
        ({"cpu_limit_hz": 2.3e9}, "CPU clock limit was 2 GHz, is 2.3 GHz"),
        ({"gpu_limit_hz": None}, ""),
        ({"throttled": "under-voltage"}, "held back now: under-voltage"),
    ],
)
def test_another_mode_another_clock_or_heat_make_old_figures_void(fields, why):
    assert changed(MEASURED, replace(MEASURED, **fields)) == why


def test_a_machine_that_has_cooled_down_is_another_one_too():
    assert changed(replace(MEASURED, throttled="throttled"), MEASURED) == "no longer held back: throttled"
    hot = replace(MEASURED, throttled="a at 99 °C"), replace(MEASURED, throttled="a at 98 °C")
    assert changed(*hot) == ""
