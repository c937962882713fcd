"""How long does something take on a device, and what is that device? Timers, budgets, versions, clocks.

On a CUDA device a sample is the time between two events, with the last-level cache emptied before it; on a CPU it is
wall time. Candidates are measured in turn, one sample each, so that all of them see the same clocks.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

PACKAGES: Final = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "liger_kernel", "cut_cross_entropy", "numpy",
)  # fmt: skip
FLUSH_BYTES: Final = 256 << 20
"""Written before each sample; at least four times the last-level cache."""
QUERIES: Final = (
    "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw",
    "power.limit", "temperature.gpu", "persistence_mode", "clocks_throttle_reasons.active",
)  # fmt: skip


class Budget:
    """Seconds of one part of the benchmark."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._ends - time.monotonic())

    @property
    def spent(self) -> bool:
        """Nothing is left."""
        return self.left_s == 0

    def part(self, share: float, *, at_least: float = 0.0) -> Budget:
        """A budget of a share of what is left."""
        return Budget(max(at_least, share * self.left_s))


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way of doing something, and what has to hold around it."""

    run: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


class Timer:
    """Seconds of calls on one device.

    Args:
        device: a CUDA device or the CPU.
        flush_bytes: see :data:`FLUSH_BYTES`.
    """

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
            free = torch.cuda.mem_get_info(device)[0]
            self._flush = torch.empty(min(max(flush_bytes, 4 * cache), free // 8), dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        """Waits until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sample(self, run: Callable[[], object]) -> float:
        """Seconds of one call; on a GPU its launches queue behind the write that empties the cache."""
        if self._flush is None:
            began = time.perf_counter()
            run()
            return max(time.perf_counter() - began, 1e-9)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) / 1e3, 1e-9)

    def wall(self, run: Callable[[], object]) -> float:
        """Wall seconds of one call, from an idle device to an idle device."""
        self.synchronize()
        began = time.perf_counter()
        run()
        self.synchronize()
        return max(time.perf_counter() - began, 1e-9)

    def interleaved(
        self, runs: Mapping[str, Candidate], *, seconds: float, at_least: int = 5, at_most: int = 50
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Samples of each candidate, taken in turn; what raises is dropped with its error.

        Args:
            seconds: for all of them together; ``at_least`` samples are taken whatever that costs.
        """
        samples: dict[str, list[float]] = {name: [] for name in runs}
        errors: dict[str, str] = {}
        began = time.monotonic()
        for turn in range(at_most):
            if turn >= at_least and time.monotonic() - began > seconds:
                break
            for name, candidate in runs.items():
                if name not in errors:
                    try:
                        with candidate.context():
                            candidate.run()  # looks up what the context has changed
                            samples[name].append(self.sample(candidate.run))
                    except Exception as error:  # noqa: BLE001 - a peer may raise anything; the others go on
                        errors[name] = describe_error(error)
        return {name: found for name, found in samples.items() if name not in errors}, errors


def describe_error(error: BaseException) -> str:
    """The class and the first line, for the results file."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}".rstrip(": ")


class DeviceLostError(RuntimeError):
    """Something left the device unusable for this process; what there is to keep is in ``rows``.

    Args:
        culprit: operation and backend, or model and system.
    """

    def __init__(self, culprit: tuple[str, str], rows: list[dict[str, Any]]) -> None:
        super().__init__(f"{culprit[1]} left the device unusable ({culprit[0]})")
        self.culprit = culprit
        self.rows = rows


def usable(device: torch.device) -> bool:
    """Does the device still compute? After an illegal address, for one, it does not until the process ends."""
    try:
        return torch.ones(2, device=device).sum().item() == 2.0
    except RuntimeError:
        return False


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile of seconds, and every sample."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median_s": statistics.median(ordered),
        "p20_s": ordered[round(0.2 * last)],
        "p80_s": ordered[round(0.8 * last)],
        "samples_s": list(samples),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """What the device reaches at best, measured here on random data."""

    copy_bytes_per_s: float
    """Bytes read and written."""
    gemm_flops_per_s: float
    """A square product in bf16: F of runtime.md 1.1."""
    entries: dict[str, Any]
    """Both with their samples, for the results file."""


def measure_peaks(timer: Timer, budget: Budget, *, size: int) -> Peaks:
    """Copy bandwidth and the rate of a ``size``³ product in bf16; smaller where memory is short."""
    device = timer.device
    cells = size * size
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        while size > 512 and 4 * 2 * size * size > free // 2:
            size //= 2
        cells = min(1 << 28, free // 8)
    half = budget.part(0.5)
    source = torch.randint(0, 255, (cells,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    copies = [timer.sample(partial(target.copy_, source)) for _ in _turns(half)]
    del source, target
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product_of = partial(torch.mm, a, b, out=out)
    for _ in range(3):
        product_of()
    products = [timer.sample(product_of) for _ in _turns(budget)]
    copy, product = spread(copies), spread(products)
    rates = 2.0 * cells / copy["median_s"], 2.0 * size**3 / product["median_s"]
    return Peaks(
        copy_bytes_per_s=rates[0],
        gemm_flops_per_s=rates[1],
        entries={
            "copy": {**copy, "bytes": 2 * cells, "bytes_per_s": rates[0]},
            "gemm_bf16": {**product, "size": size, "flops_per_s": rates[1], "data": "random"},
        },
    )


def _turns(budget: Budget, at_least: int = 5, at_most: int = 40) -> Iterator[int]:
    """Counts while the budget lasts."""
    for turn in range(at_most):
        if turn >= at_least and budget.spent:
            return
        yield turn


# What was measured on


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, capability, memory, driver, power mode and clocks, as far as they can be read."""
    facts: dict[str, Any] = {"type": device.type, "machine": platform.machine(), "system": _system()}
    if device.type != "cuda":
        return {"name": f"cpu-{platform.machine()}", **facts, "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "name": properties.name,
        **facts,
        "capability": 10 * major + minor,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "integrated": bool(getattr(properties, "is_integrated", False)),
        "l4t": _l4t(),
    }


def clocks() -> dict[str, Any]:
    """What nvidia-smi and nvpmodel say now; ``missing`` where they are not there."""
    return {"nvidia_smi": _nvidia_smi(), "nvpmodel": _command("nvpmodel", "-q")}


def versions() -> dict[str, str]:
    """Packages, and CUDA as torch was built with; a package that is not there says so."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found | {"cuda": torch.version.cuda or "none", "cudnn": str(torch.backends.cudnn.version() or "none")}


def _nvidia_smi() -> dict[str, str] | str:
    """The answers; one field that this driver does not know would cost all, so shorter questions follow."""
    answer = "missing"
    for queries in (QUERIES, QUERIES[:-1], QUERIES[:1]):
        answer = _command("nvidia-smi", f"--query-gpu={','.join(queries)}", "--format=csv,noheader")
        values = [value.strip() for value in answer.splitlines()[0].split(",")]
        if answer == "missing":
            break
        if len(values) == len(queries) and "not a valid field" not in answer:
            return dict(zip(queries, values, strict=True))
    return answer


def _command(*words: str) -> str:
    if shutil.which(words[0]) is None:
        return "missing"
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return describe_error(error)
    return (done.stdout or done.stderr).strip() or "said nothing"


def _l4t() -> str:
    release = Path("/etc/nv_tegra_release")
    return release.read_text(encoding="utf-8").splitlines()[0] if release.is_file() else ""


def _system() -> str:
    return f"{platform.system()} {platform.release()}"


def slug(name: str) -> str:
    """A device's name as a part of a file's name: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
