"""In what state is this machine: its power mode, the limits of its clocks, its heat?

Read from the files in which Linux, NVIDIA's Jetson tools and a Raspberry Pi's firmware say so, below a folder that
stands for ``/``. What is not there or may not be read is left out; nothing here raises or changes anything.
Two commands are asked where a file does not say it: ``nvpmodel -q`` and, for a GPU of its own, ``nvidia-smi``.

Sources: Jetson Linux Developer Guide, Platform Power and Performance (nvpmodel and its file of modes; its status file
after public scripts that read it); the kernel's Documentation/ABI (sysfs-class-power, sysfs-class-devfreq,
sysfs-platform_profile), driver-api/thermal/sysfs-api and admin-guide/pm/cpufreq; Raspberry Pi documentation, vcgencmd
get_throttled; NVML API reference, nvmlClocksEventReasons.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: A clock's limit that moved by less is the same.
SAME_CLOCK: Final = 0.10
COMMAND_TIMEOUT_S: Final = 2.0
#: What a sensor of a running machine may say, degrees Celsius; switched-off zones say -256, for example.
SENSIBLE_C: Final = (-40.0, 150.0)
#: Ends of the names that Jetson's GPUs have among the devices with scaled clocks (Orin, Xavier, TX2).
GPU_NAMES: Final = (".gpu", ".ga10b", ".gv11b", ".gp10b")
#: Chips of hwmon that measure the processor, for machines without thermal zones.
PROCESSOR_SENSORS: Final = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
#: Bits of get_throttled that hold now; those from 16 on say that it was so since the start.
PI_BITS: Final = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
#: Bits of nvidia-smi's clocks_throttle_reasons.active that are heat or a failing supply, not idleness or a set limit.
NVIDIA_BITS: Final = {
    0x08: "GPU hardware slowdown",
    0x20: "GPU software thermal slowdown",
    0x40: "GPU hardware thermal slowdown",
    0x80: "GPU power brake",
}
NVIDIA_QUERY: Final = "power.limit,temperature.gpu,clocks_throttle_reasons.active"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineState:
    """What decides the speed of one machine besides its parts. Empty and None: not readable here."""

    nvpmodel: str = ""
    """Jetson's power mode, id and name: ``2 MAXN_SUPER``."""
    platform_profile: str = ""
    """A laptop's: ``low-power``, ``balanced``, ``performance``."""
    governor: str = ""
    """Of the processor's clock."""
    power_source: str = ""
    """``mains`` or ``battery``; empty on a machine without a battery."""
    cpu_limit_hz: float | None = None
    """Highest clock that any core may take."""
    gpu_limit_hz: float | None = None
    gpu_power_limit_w: float | None = None
    temperature_c: float | None = None
    """Of the hottest sensor."""
    hottest: str = ""
    """Its name."""
    throttled: str = ""
    """What holds the clocks back now."""
    throttle_count: int | None = None
    """Times that heat has held a core back since the start (Intel)."""

    def mode(self) -> str:
        """Power mode and limits as words; empty where nothing could be read."""
        parts = [
            f"nvpmodel {self.nvpmodel}" if self.nvpmodel else "",
            f"platform profile {self.platform_profile}" if self.platform_profile else "",
            f"governor {self.governor}" if self.governor else "",
            f"on {self.power_source}" if self.power_source else "",
            f"CPU at most {self.cpu_limit_hz / 1e9:.2f} GHz" if self.cpu_limit_hz is not None else "",
            f"GPU at most {self.gpu_limit_hz / 1e9:.2f} GHz" if self.gpu_limit_hz is not None else "",
            f"GPU at most {self.gpu_power_limit_w:.0f} W" if self.gpu_power_limit_w is not None else "",
        ]
        return ", ".join(part for part in parts if part)


def changed(before: MachineState, now: MachineState) -> str:
    """Why figures measured in the state ``before`` do not hold ``now``; empty if they do.

    What could not be read in one of the two says nothing.
    """
    words = (
        ("nvpmodel", before.nvpmodel, now.nvpmodel),
        ("platform profile", before.platform_profile, now.platform_profile),
        ("governor", before.governor, now.governor),
        ("power source", before.power_source, now.power_source),
    )
    for name, old, new in words:
        if old and new and old != new:
            return f"{name} was {old}, is {new}"
    limits = (
        ("CPU clock limit", before.cpu_limit_hz, now.cpu_limit_hz, 1e9, "GHz"),
        ("GPU clock limit", before.gpu_limit_hz, now.gpu_limit_hz, 1e9, "GHz"),
        ("GPU power limit", before.gpu_power_limit_w, now.gpu_power_limit_w, 1.0, "W"),
    )
    for name, was, limit, scale, unit in limits:
        if was is not None and limit is not None and abs(limit - was) > SAME_CLOCK * was:
            return f"{name} was {was / scale:.3g} {unit}, is {limit / scale:.3g} {unit}"
    if bool(before.throttled) != bool(now.throttled):
        return f"held back now: {now.throttled}" if now.throttled else f"no longer held back: {before.throttled}"
    return ""


def read_state(root: Path = Path("/")) -> MachineState:
    """The state of the machine whose files lie below ``root``; takes milliseconds, with the commands at most 4 s."""
    sensors = sorted(_temperatures(root))
    reasons = [*_hot_zones(root), *_pi_reasons(root)]
    power_w, gpu_c, gpu_reasons = _nvidia(root)
    if gpu_c is not None:
        sensors = sorted([*sensors, (gpu_c, "GPU")])
    policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    governors = sorted({_text(policy / "scaling_governor") for policy in policies} - {""})
    limits = [hz for policy in policies if (hz := _number(policy / "scaling_max_freq", scale=1e3)) is not None]
    clocks = [
        hz
        for device in sorted((root / "sys/class/devfreq").glob("*"))
        if device.name.endswith(GPU_NAMES) and (hz := _number(device / "max_freq")) is not None
    ]
    counts = [
        count
        for file in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
        if (count := _number(file)) is not None
    ]
    return MachineState(
        nvpmodel=_nvpmodel(root),
        platform_profile=_text(root / "sys/firmware/acpi/platform_profile"),
        governor=" and ".join(governors),
        power_source=_power_source(root),
        cpu_limit_hz=max(limits, default=None),
        gpu_limit_hz=max(clocks, default=None),
        gpu_power_limit_w=power_w,
        temperature_c=sensors[-1][0] if sensors else None,
        hottest=sensors[-1][1] if sensors else "",
        throttled=", ".join([*reasons, *gpu_reasons]),
        throttle_count=int(sum(counts)) if counts else None,
    )


def is_tegra(root: Path = Path("/")) -> bool:
    """True on a Jetson: processor and GPU share one memory there, whatever the driver says."""
    return "nvidia,tegra" in _text(root / "proc/device-tree/compatible")


def parse_nvpmodel_status(text: str) -> int | None:
    """The id of the mode in ``/var/lib/nvpmodel/status``: ``pmode:0002`` is 2."""
    found = re.search(r"^pmode:(\d+)", text, re.MULTILINE)
    return None if found is None else int(found.group(1))


def parse_nvpmodel_conf(text: str) -> dict[int, str]:
    """Id to name of the modes in ``/etc/nvpmodel.conf``: lines ``< POWER_MODEL ID=2 NAME=MAXN_SUPER >``."""
    found = re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=([^\s>]+)", text, re.MULTILINE)
    return {int(number): name for number, name in found}


def parse_nvpmodel_query(text: str) -> str:
    """Id and name from what ``nvpmodel -q`` prints: ``NV Power Mode: MAXN_SUPER`` and the id in the next line."""
    found = re.search(r"^NV Power Mode:\s*(\S+)\s*\n\s*(\d+)\s*$", text, re.MULTILINE)
    return "" if found is None else f"{found.group(2)} {found.group(1)}"


def parse_pi_throttled(text: str) -> tuple[str, ...]:
    """What holds a Raspberry Pi back now, from the number of ``get_throttled`` (hexadecimal)."""
    try:
        bits = int(text, 16)
    except ValueError:
        return ()
    return tuple(name for bit, name in PI_BITS.items() if bits >> bit & 1)


def parse_nvidia_smi(text: str) -> tuple[float | None, float | None, tuple[str, ...]]:
    """Power limit (W), temperature (degrees Celsius) and what holds the GPU back; nothing where there are several GPUs.

    Args:
        text: of ``nvidia-smi --query-gpu=`` :data:`NVIDIA_QUERY` ``--format=csv,noheader,nounits``, a line a GPU.
    """
    lines = text.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if len(lines) == 1 else []
    if len(values) != len(NVIDIA_QUERY.split(",")):
        return None, None, ()
    try:
        bits = int(values[2], 16)
    except ValueError:
        bits = 0
    return _float(values[0]), _float(values[1]), tuple(name for bit, name in NVIDIA_BITS.items() if bits & bit)


def _nvpmodel(root: Path) -> str:
    number = parse_nvpmodel_status(_text(root / "var/lib/nvpmodel/status"))
    if number is not None:
        name = parse_nvpmodel_conf(_text(root / "etc/nvpmodel.conf")).get(number, "")
        return f"{number} {name}".strip()
    return parse_nvpmodel_query(_command((root / "usr/sbin/nvpmodel",), "-q"))


def _nvidia(root: Path) -> tuple[float | None, float | None, tuple[str, ...]]:
    places = (root / "usr/bin/nvidia-smi", root / "usr/lib/wsl/lib/nvidia-smi")
    return parse_nvidia_smi(_command(places, f"--query-gpu={NVIDIA_QUERY}", "--format=csv,noheader,nounits"))


def _power_source(root: Path) -> str:
    """Mains if any supply is plugged in, battery if a battery of the machine itself is all there is."""
    supplies = [
        supply
        for supply in (root / "sys/class/power_supply").glob("*")
        if _text(supply / "scope") != "Device"  # a mouse has a battery too
    ]
    if not any(_text(supply / "type") == "Battery" for supply in supplies):
        return ""
    plugged = any(_text(s / "type") in ("Mains", "USB") and _text(s / "online") == "1" for s in supplies)
    return "mains" if plugged else "battery"


def _zones(root: Path) -> Iterator[tuple[Path, str, float]]:
    """Folder, name and degrees Celsius of each thermal zone that measures."""
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, celsius = _text(zone / "type"), _number(zone / "temp", scale=1e-3)
        # PMIC-Die of a Jetson Nano always says 100.
        if celsius is not None and SENSIBLE_C[0] < celsius < SENSIBLE_C[1] and not name.startswith("PMIC"):
            yield zone, name, celsius


def _temperatures(root: Path) -> Iterator[tuple[float, str]]:
    for _, name, celsius in _zones(root):
        yield celsius, name
    for chip in (root / "sys/class/hwmon").glob("hwmon*"):
        name = _text(chip / "name")
        if name in PROCESSOR_SENSORS:
            for file in chip.glob("temp*_input"):
                celsius = _number(file, scale=1e-3)
                if celsius is not None and SENSIBLE_C[0] < celsius < SENSIBLE_C[1]:
                    yield celsius, name


def _hot_zones(root: Path) -> Iterator[str]:
    """Zones at or above a passive trip point: there the kernel lowers clocks."""
    for zone, name, celsius in _zones(root):
        for kind in sorted(zone.glob("trip_point_*_type")):
            limit = _number(kind.with_name(kind.name.replace("_type", "_temp")), scale=1e-3)
            if _text(kind) == "passive" and limit is not None and 0 < limit <= celsius:
                yield f"{name} at {celsius:.0f} °C, slowed from {limit:.0f} °C on"
                break


def _pi_reasons(root: Path) -> tuple[str, ...]:
    return parse_pi_throttled(_text(root / "sys/devices/platform/soc/soc:firmware/get_throttled"))


def _command(places: Sequence[Path], *arguments: str) -> str:
    """What the first of ``places`` that exists prints; empty if there is none or it fails or takes over two seconds."""
    for place in places:
        if place.is_file():
            try:
                done = subprocess.run(
                    [str(place), *arguments], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
                )
            except (OSError, ValueError, subprocess.TimeoutExpired):
                return ""
            return done.stdout if done.returncode == 0 else ""
    return ""


def _text(path: Path) -> str:
    """A file's first words; empty if it cannot be read (a switched-off sensor answers with an error)."""
    try:
        return path.read_bytes()[:65536].replace(b"\0", b" ").decode("utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path, *, scale: float = 1.0) -> float | None:
    value = _float(_text(path))
    return None if value is None else scale * value


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
