"""What can a device do? One frozen record, measured by the probe or read from the catalog."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Accelerator = Literal["cpu", "cuda"]
ComputeDtype = Literal["float32", "bfloat16"]
ProfileSource = Literal["measured", "catalog"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """Achieved (not peak) rates and usable (not installed) memory of one device.

    Raises:
        ValueError: a number is not finite, negative, or zero where a rate must be positive.
    """

    device: str
    """Name shown to people, e.g. ``jetson-orin-nano-8gb`` or the probed processor's name."""
    source: ProfileSource
    accelerator: Accelerator
    compute_dtype: ComputeDtype
    cpu_cores: int
    memory_usable_bytes: int
    """What this process may still take: for training, on the device that trains."""
    runtime_memory_bytes: int
    """R of runtime.md 4.1: context, library workspaces and allocator slack above the imports."""
    gemm_flops_per_s: float
    memory_bytes_per_s: float
    step_overhead_s: float
    """Fixed seconds of one optimizer step, independent of its tokens."""
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    disk_read_bytes_per_s: float
    disk_free_bytes: int
    four_bit: str
    """What a real 4-bit operation said: ``ok``, or the reason why our own decoder is used."""
    measured_unix_s: float = 0.0
    """Wall-clock time of the probe; 0 for a catalog entry."""

    def __post_init__(self) -> None:
        for field in (
            "gemm_flops_per_s",
            "memory_bytes_per_s",
            "uplink_bytes_per_s",
            "downlink_bytes_per_s",
            "disk_read_bytes_per_s",
        ):
            value = getattr(self, field)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"device profile {self.device!r}: {field} is {value!r}, expected a positive number")
        for field in (
            "memory_usable_bytes",
            "runtime_memory_bytes",
            "step_overhead_s",
            "disk_free_bytes",
            "measured_unix_s",
        ):
            value = getattr(self, field)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"device profile {self.device!r}: {field} is {value!r}, expected 0 or more")
        if self.cpu_cores < 1:
            raise ValueError(f"device profile {self.device!r}: cpu_cores is {self.cpu_cores}, expected at least 1")
