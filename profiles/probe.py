"""What can this machine do? Measured within a time budget, with the spread of every figure.

Each item has a share of what is left of the budget and is the median of at least five runs after a warm-up, on random
data; what could not be measured is recorded with its reason, and the profile then holds a cautious prior.
torch is imported only here, inside functions; without it the matrix rate comes from numpy, and the item says so.
What may crash or hang (CUDA's first call, a 4-bit library on hardware it was not built for) runs in a child process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import psutil

from fedblocks.profiles.board import MachineState, is_tegra, read_state
from fedblocks.profiles.device import Accelerator, ComputeDtype, DeviceProfile
from fedblocks.profiles.link import LinkRecord
from fedblocks.profiles.model_shape import ModelShape

#: Fewest runs of which a median counts.
MIN_RUNS: Final = 5
MIB: Final = 2**20
COPY_BYTES: Final = 256 * MIB
#: More than the caches of the processors that clients have.
LEAST_COPY_BYTES: Final = 64 * MIB
DISK_BYTES: Final = 64 * MIB
GEMM_SIZES: Final = (512, 1024, 2048)
LAUNCHES: Final = 200
#: Rows of the product at a block's own sizes (runtime.md 10).
BLOCK_GEMM_ROWS: Final = 512
#: Share of the budget within which the child process must have imported its libraries and answered.
CHILD_SHARE: Final = 0.6
#: In this order; of the time that is left after the child.
ITEM_SHARES: Final = {
    "gemm": 0.35,
    "block": 0.1,
    "copy": 0.13,
    "step": 0.13,
    "disk": 0.25,
    "decode": 0.1,
    "launch": 0.04,
}
#: With less the medians of a machine that is busy elsewhere would mean nothing.
MIN_LEFT_S: Final = 1.0
#: An assumption and said to be one: tier A of methods.md 12.4, until the link to the aggregator is known.
PRIOR_LINK: Final = (5e6 / 8, 20e6 / 8)
PRIOR_DISK_BYTES_PER_S: Final = 100e6
PRIOR_STEP_OVERHEAD_S: Final = 0.02
PRIOR_RUNTIME_BYTES: Final[dict[Accelerator, int]] = {"cpu": MIB, "cuda": 1_200_000_000}
#: cgroup files that bound this process's memory, version 2 and 1.
CGROUP_LIMITS: Final = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRun:
    """A 4-bit weight to decode, in the way in which the client will."""

    num_weights: int
    run: Callable[[], object]
    """Decodes all of them once."""
    note: str
    """Who decodes, into what."""


MakeDecodeRun = Callable[[Accelerator, ComputeDtype], DecodeRun]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeItem:
    """One figure: the median, its spread, and how it came about."""

    name: str
    """The unit is the end of the name."""
    value: float | None
    """None: not measured."""
    low: float | None = None
    """Slowest or smallest of the runs."""
    high: float | None = None
    runs: int = 0
    note: str = ""
    """Why it was not measured, or with what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """The profile and the figures it was made of."""

    profile: DeviceProfile
    items: tuple[ProbeItem, ...]
    seconds: float
    """What the probe took."""
    before: MachineState
    """Power mode, clocks and heat when it began."""
    after: MachineState

    def item(self, name: str) -> ProbeItem:
        """The item of this name.

        Raises:
            KeyError: there is none.
        """
        for item in self.items:
            if item.name == name:
                return item
        raise KeyError(name)


def probe(
    *,
    budget_s: float = 12.0,
    folder: Path,
    link: LinkRecord | None = None,
    shape: ModelShape | None = None,
    threads: int | None = None,
    decoder: MakeDecodeRun | None = None,
    root: Path = Path("/"),
) -> ProbeResult:
    """Measures this machine.

    Args:
        budget_s: seconds to spend once torch is ready. Below about 10, a busy machine leaves items unmeasured.
        folder: a folder on the disk that will hold the client's caches; a 64 MiB file is written and deleted there.
        link: what traffic with the aggregator has shown; priors, which say so, for what it has not.
        shape: the model to be trained; its own matrix sizes then decide the matrix rate instead of large squares.
        threads: arithmetic threads of the client process to come; default: torch's own choice.
        decoder: makes what decodes 4-bit weights (this room knows no kernels).
        root: below which the machine's own files lie.
    """
    torch = _torch()
    usual_threads = torch.get_num_threads() if torch is not None else 1
    if torch is not None and threads is not None:
        torch.set_num_threads(threads)
    try:
        return _probe(
            torch, budget_s=budget_s, folder=folder, link=link or LinkRecord(), shape=shape, decoder=decoder, root=root
        )
    finally:
        if torch is not None:
            torch.set_num_threads(usual_threads)


def _probe(
    torch: Any,
    *,
    budget_s: float,
    folder: Path,
    link: LinkRecord,
    shape: ModelShape | None,
    decoder: MakeDecodeRun | None,
    root: Path,
) -> ProbeResult:
    began = time.monotonic()
    before = read_state(root)
    accelerator: Accelerator = "cuda" if torch is not None and _cuda_works(torch) else "cpu"
    items: list[ProbeItem] = [_memory_item(accelerator, torch, root)]
    items += _child_items(accelerator, torch, root, timeout_s=CHILD_SHARE * budget_s)
    shares = {name: share for name, share in ITEM_SHARES.items() if name != "block" or shape is not None}

    def share_s(name: str) -> float:
        """Seconds for this item: what took longer than its own leaves less for those after it."""
        left_s = max(MIN_LEFT_S, budget_s - (time.monotonic() - began))
        return left_s * shares[name] / sum([shares.pop(name), *shares.values()])

    items += _gemm_items(accelerator, torch, budget_s=share_s("gemm"))
    if shape is not None:
        items.append(_block_gemm_item(accelerator, torch, shape, budget_s=share_s("block")))
    items.append(_copy_item(accelerator, torch, budget_s=share_s("copy")))
    items.append(_step_item(accelerator, torch, budget_s=share_s("step")))
    items += _disk_items(folder, budget_s=share_s("disk"))
    dtype = _faster_dtype(accelerator, items)
    items.append(_decode_item(accelerator, torch, dtype, decoder, budget_s=share_s("decode")))
    items.append(_launch_item(accelerator, torch, budget_s=share_s("launch")))
    items += _link_items(link)
    after = read_state(root)
    items += _state_items(before, after)
    return ProbeResult(
        profile=_profile(accelerator, torch, items, folder),
        items=tuple(items),
        seconds=time.monotonic() - began,
        before=before,
        after=after,
    )


def to_json(result: ProbeResult) -> str:
    """The result as JSON; :func:`load_profile` reads the profile back."""
    content = {
        "profile": asdict(result.profile),
        "items": [asdict(item) for item in result.items],
        "state": {"before": asdict(result.before), "after": asdict(result.after)},
        "probe_s": result.seconds,
    }
    return json.dumps(content, indent=1) + "\n"


def load_profile(path: Path) -> DeviceProfile | None:
    """The profile in a file that :func:`to_json` wrote; None if it is unreadable or from another release."""
    try:
        return DeviceProfile(**json.loads(path.read_text(encoding="utf-8"))["profile"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def describe(result: ProbeResult) -> str:
    """The figures as lines for people."""
    p = result.profile
    items = {item.name: item for item in result.items}

    def measured(name: str, scale: float, unit: str) -> str:
        item = items[name]
        return "not measured" if item.value is None else f"{item.value / scale:.3g} {unit}{_spread(item, scale)}"

    gemm = "gemm_block_flops_per_s" if "gemm_block_flops_per_s" in items else f"gemm_{p.compute_dtype}_flops_per_s"
    disk = f"{p.disk_read_bytes_per_s / 1e6:.0f} MB/s{_spread(items['disk_read_bytes_per_s'], 1e6)}"
    link = f"{p.uplink_bytes_per_s / 1e6:.2f} MB/s up, {p.downlink_bytes_per_s / 1e6:.2f} MB/s down"
    lines = [
        f"device             {p.device} ({p.accelerator}, {p.cpu_cores} cores), trains in {p.compute_dtype}",
        f"power mode         {result.after.mode() or 'this machine has no file that says it'}",
        f"heat               {_heat(result)}",
        f"usable memory      {p.memory_usable_bytes / 2**30:.2f} GiB: {items['memory_usable_bytes'].note}",
        f"library workspaces {p.runtime_memory_bytes / MIB:.1f} MiB",
        f"matrix products    {p.gemm_flops_per_s / 1e9:.1f} GFLOP/s{_spread(items[gemm], 1e9)}",
        f"NF4 decoding       {measured('nf4_decode_weights_per_s', 1e9, 'billion weights/s')}",
        f"memory copy        {p.memory_bytes_per_s / 1e9:.1f} GB/s{_spread(items['copy_bytes_per_s'], 1e9)}",
        f"kernel launch      {measured('launch_s', 1e-6, 'us')}",
        f"step overhead      {p.step_overhead_s * 1e3:.1f} ms{_spread(items['step_overhead_s'], 1e-3)}",
        f"disk read          {disk}, {p.disk_free_bytes / 2**30:.1f} GiB free",
        f"link               {link}, round trip {measured('round_trip_s', 1e-3, 'ms')}",
        f"4-bit              {p.four_bit}",
    ]
    lines += [f"not measured       {item.name}: {item.note}" for item in result.items if item.value is None]
    return "\n".join([*lines, f"took               {result.seconds:.1f} s"])


def _spread(item: ProbeItem, scale: float) -> str:
    if item.low is None or item.high is None or item.runs < 2:
        return ""
    return f" ({item.low / scale:.3g} to {item.high / scale:.3g} in {item.runs} runs)"


def _heat(result: ProbeResult) -> str:
    before, after = result.before, result.after
    if after.temperature_c is None:
        words = "no temperature to read"
    else:
        earlier = "" if before.temperature_c is None else f", {before.temperature_c:.0f} °C before"
        words = f"{after.temperature_c:.0f} °C ({after.hottest}){earlier}"
    return f"{words}; held back: {after.throttled}" if after.throttled else words


def _faster_dtype(accelerator: Accelerator, items: Sequence[ProbeItem]) -> ComputeDtype:
    """A CPU client computes in fp32 unless its site says otherwise; a GPU in whatever is faster."""
    rates = {item.name: item.value or 0.0 for item in items}
    faster = rates["gemm_bfloat16_flops_per_s"] > rates["gemm_float32_flops_per_s"]
    return "bfloat16" if accelerator == "cuda" and faster else "float32"


def _profile(accelerator: Accelerator, torch: Any, items: Sequence[ProbeItem], folder: Path) -> DeviceProfile:
    values = {item.name: item.value for item in items}

    def measured(name: str, prior: float) -> float:
        value = values.get(name)
        return prior if value is None else value

    rates: dict[ComputeDtype, float | None] = {
        "float32": values["gemm_float32_flops_per_s"],
        "bfloat16": values["gemm_bfloat16_flops_per_s"],
    }
    dtype = _faster_dtype(accelerator, items)
    four_bit = next(item for item in items if item.name == "four_bit_ok_count")
    return DeviceProfile(
        device=_device_name(accelerator, torch),
        source="measured",
        accelerator=accelerator,
        compute_dtype=dtype,
        cpu_cores=_cores(),
        memory_usable_bytes=int(measured("memory_usable_bytes", 0.0)),
        runtime_memory_bytes=int(measured("runtime_memory_bytes", PRIOR_RUNTIME_BYTES[accelerator])),
        gemm_flops_per_s=measured("gemm_block_flops_per_s", rates[dtype] or 1e9 * _cores()),
        memory_bytes_per_s=measured("copy_bytes_per_s", 1e9),
        step_overhead_s=measured("step_overhead_s", PRIOR_STEP_OVERHEAD_S),
        uplink_bytes_per_s=measured("uplink_bytes_per_s", PRIOR_LINK[0]),
        downlink_bytes_per_s=measured("downlink_bytes_per_s", PRIOR_LINK[1]),
        disk_read_bytes_per_s=measured("disk_read_bytes_per_s", PRIOR_DISK_BYTES_PER_S),
        disk_free_bytes=shutil.disk_usage(folder).free if folder.is_dir() else 0,
        four_bit="ok" if four_bit.value else four_bit.note,
        measured_unix_s=time.time(),
    )


def _torch() -> Any:
    """torch with what it imports at its first step, or None where it is not installed or does not load."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    weight = torch.zeros(1, requires_grad=True)
    weight.sum().backward()
    torch.optim.AdamW([weight], fused=True).step()
    return cast("Any", torch)


def _cuda_works(torch: Any) -> bool:
    """True if a product on the GPU gives a number; a driver that is too old says no here instead of later."""
    try:
        return (
            bool(torch.cuda.is_available())
            and float((torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum()) == 512.0
        )
    except (RuntimeError, AssertionError):
        return False


def _device_name(accelerator: Accelerator, torch: Any) -> str:
    if accelerator == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _cores() -> int:
    """Cores that this process may use, at least one."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, psutil.cpu_count() or 1)


def _memory_item(accelerator: Accelerator, torch: Any, root: Path) -> ProbeItem:
    """Memory that may still be taken: the device's own if it has one, else the machine's, within the cgroup's limit."""
    unified = accelerator == "cuda" and _is_unified(torch, root)
    if accelerator == "cuda" and not unified:
        return ProbeItem(
            name="memory_usable_bytes", value=float(torch.cuda.mem_get_info()[0]), runs=1, note="free on the GPU"
        )
    # On unified memory CUDA counts page cache as used: there too the system's own figure stands (runtime.md 4.1).
    available = int(psutil.virtual_memory().available)
    note = "available on this machine, which its GPU shares" if unified else "available on this machine"
    for limit_file, used_file in CGROUP_LIMITS:
        free = cgroup_free_bytes(root / limit_file.lstrip("/"), root / used_file.lstrip("/"))
        if free is not None and free < available:
            available, note = free, f"limit of this control group ({limit_file})"
    return ProbeItem(name="memory_usable_bytes", value=float(available), runs=1, note=note)


def _is_unified(torch: Any, root: Path) -> bool:
    """True if the GPU has no memory of its own."""
    return bool(torch.cuda.get_device_properties(0).is_integrated) or is_tegra(root)


def cgroup_free_bytes(limit_file: Path, used_file: Path) -> int | None:
    """Bytes left under a control group's memory limit; None where there is no limit."""
    try:
        limit, used = limit_file.read_text(encoding="ascii").strip(), used_file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    # Version 2 writes "max" for no limit, version 1 a number near 2^63.
    if not limit.isdigit() or not used.isdigit() or int(limit) > 2**60:
        return None
    return max(0, int(limit) - int(used))


CHILD: Final = """
import sys, warnings
import torch
torch.set_num_threads(1)
memory = sys.argv[1]
device = "cpu" if memory == "cpu" else "cuda"
def kilobytes(file, name):
    with open(file) as lines:
        for line in lines:
            if line.startswith(name + ":"):
                return int(line.split()[1])
    raise OSError(f"{file} has no {name}")
def held():
    if memory == "cuda":
        free, total = torch.cuda.mem_get_info()
        return (total - free,)
    own = kilobytes("/proc/self/status", "RssAnon") * 1024
    # What the driver takes of a memory that the GPU shares is not counted as this process's.
    return (own, -kilobytes("/proc/meminfo", "MemAvailable") * 1024) if memory == "unified" else (own,)
def step(width, where):
    layer = torch.nn.Linear(width, width, device=where)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(width, width, device=where)).sum().backward()
    optimizer.step()
try:
    step(8, "cpu")  # what the libraries import at their first step is part of the imports, not of R
    before = (0,) if memory == "cuda" else held()
    step(256, device)
    print("runtime", max(0, *(now - then for then, now in zip(before, held()))), flush=True)
except (OSError, RuntimeError) as error:
    print("runtime_failed", str(error).splitlines()[0], flush=True)
import os
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
import bitsandbytes.functional as f
weight = torch.randn(16, 64, device=device)
packed, state = f.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
back = f.dequantize_4bit(packed, state)
error = float((back - weight).norm() / weight.norm())
print("four_bit", "ok" if error < 0.2 else f"wrong values, relative error {error:.2f}", flush=True)
"""
"""One fresh process says two lines: R (a first product, backward pass and optimizer step), and whether a real 4-bit
operation gives right values. 16 x 64: bitsandbytes decodes wrongly on CPU where the width is no multiple of 64
(docs/runtime.md 5.1), and its CUDA builds may look healthy until the first operation."""


def _child_items(accelerator: Accelerator, torch: Any, root: Path, *, timeout_s: float) -> list[ProbeItem]:
    names = ("runtime_memory_bytes", "four_bit_ok_count")
    if torch is None:
        return [_missing(name, "torch is not installed") for name in names]
    memory = "unified" if accelerator == "cuda" and _is_unified(torch, root) else accelerator
    said, why = _child(CHILD, memory, timeout_s=timeout_s)
    runtime, four_bit = said.get("runtime"), said.get("four_bit")
    items: list[ProbeItem] = []
    if runtime is not None:
        items.append(ProbeItem(name=names[0], value=float(runtime), runs=1, note="in a process of its own"))
    else:
        items.append(_missing(names[0], said.get("runtime_failed", why)))
    if four_bit == "ok":
        items.append(ProbeItem(name=names[1], value=1.0, runs=1, note="16 x 64 quantised and decoded by bitsandbytes"))
    elif importlib.util.find_spec("bitsandbytes") is None:
        items.append(_missing(names[1], "bitsandbytes is not installed; our own decoder is used"))
    else:
        items.append(_missing(names[1], f"bitsandbytes: {four_bit or why}; our own decoder is used"))
    return items


def _child(code: str, memory: str, *, timeout_s: float) -> tuple[dict[str, str], str]:
    """First word -> rest of each line that a child said, and why it went wrong (empty if it did not).

    Args:
        memory: ``cpu``, ``cuda``, or ``unified`` where the GPU has none of its own.
    """
    command = [sys.executable, "-c", code, memory]
    why = ""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code_s = subprocess.run(
                command,
                stdout=out,
                stderr=err,
                timeout=timeout_s,
                check=False,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            ).returncode
            if code_s:
                err.seek(0)
                why = f"exit code {code_s}" + "".join(
                    f": {line[:200]}" for line in err.read().strip().splitlines()[-1:]
                )
        except subprocess.TimeoutExpired:
            why = f"no answer within {timeout_s:.0f} s"
        except OSError as error:
            why = str(error)
        out.seek(0)
        lines = [line.strip().partition(" ") for line in out.read().splitlines()]
    return {word: rest for word, _, rest in lines}, why


def _gemm_items(accelerator: Accelerator, torch: Any, *, budget_s: float) -> list[ProbeItem]:
    if torch is None:
        return [
            _gemm_numpy(budget_s=budget_s),
            _missing("gemm_bfloat16_flops_per_s", "torch is not installed"),
        ]
    # On a CPU nothing of ours computes in fp16.
    dtypes = ("float32", "bfloat16", *(("float16",) if accelerator == "cuda" else ()))
    items: list[ProbeItem] = []
    for dtype in dtypes:
        with torch.no_grad():
            items.append(_gemm_torch(accelerator, torch, dtype, budget_s=budget_s / len(dtypes)))
    return items


def _gemm_torch(accelerator: Accelerator, torch: Any, dtype: str, *, budget_s: float) -> ProbeItem:
    name = f"gemm_{dtype}_flops_per_s"

    def runner(size: int) -> Callable[[], None]:
        a, b = (torch.randn(size, size, device=accelerator).to(getattr(torch, dtype)) for _ in range(2))

        def run() -> None:
            torch.matmul(a, b)
            if accelerator == "cuda":
                torch.cuda.synchronize()

        return run

    try:
        return _gemm(name, runner, budget_s=budget_s, note=f"torch, {torch.get_num_threads()} threads")
    except (RuntimeError, MemoryError) as error:
        return _missing(name, _first_line(error))


def _block_gemm_item(accelerator: Accelerator, torch: Any, shape: ModelShape, *, budget_s: float) -> ProbeItem:
    """One MLP matrix of a block on 512 rows, fp32: what the rate is at the model's own sizes."""
    name = "gemm_block_flops_per_s"
    if torch is None:
        return _missing(name, "torch is not installed")
    rows, inner, out = BLOCK_GEMM_ROWS, shape.hidden_size, shape.intermediate_size
    a, b = torch.randn(rows, inner, device=accelerator), torch.randn(inner, out, device=accelerator)
    # Several products per run: one alone is shorter than what a clock resolves.
    repeats = max(1, round(1e8 / (2 * rows * inner * out)))

    def run() -> None:
        for _ in range(repeats):
            torch.matmul(a, b)
        if accelerator == "cuda":
            torch.cuda.synchronize()

    run()
    note = f"{rows} x {inner} x {out}, torch, {torch.get_num_threads()} threads"
    return _rate(name, 2.0 * rows * inner * out * repeats, _times(run, budget_s=budget_s), note=note)


def _gemm_numpy(*, budget_s: float) -> ProbeItem:
    generator = np.random.default_rng(0)

    def runner(size: int) -> Callable[[], None]:
        a, b = (generator.standard_normal((size, size), dtype=np.float32) for _ in range(2))

        def run() -> None:
            np.matmul(a, b)

        return run

    return _gemm("gemm_float32_flops_per_s", runner, budget_s=budget_s, note="numpy: torch is not installed")


def _gemm(name: str, runner: Callable[[int], Callable[[], None]], *, budget_s: float, note: str) -> ProbeItem:
    """The largest square product of which a warm-up and five runs fit into the budget."""
    began = time.monotonic()
    size = GEMM_SIZES[0]
    run = runner(size)
    run()
    for larger in GEMM_SIZES[1:]:
        expected_s = statistics.median(_seconds(run) for _ in range(3)) * (larger / size) ** 3
        if (MIN_RUNS + 1) * expected_s > budget_s - (time.monotonic() - began):
            break
        size, run = larger, runner(larger)
        run()
    times = _times(run, budget_s=budget_s - (time.monotonic() - began))
    return _rate(name, 2.0 * size**3, times, note=f"{size} x {size}, {note}")


def _decode_item(
    accelerator: Accelerator, torch: Any, dtype: ComputeDtype, decoder: MakeDecodeRun | None, *, budget_s: float
) -> ProbeItem:
    """NF4 weights decoded per second, as the client decodes them."""
    name = "nf4_decode_weights_per_s"
    if torch is None or decoder is None:
        return _missing(name, "torch is not installed" if torch is None else "no decoder was given")
    try:
        decode = decoder(accelerator, dtype)

        def run() -> None:
            decode.run()
            if accelerator == "cuda":
                torch.cuda.synchronize()

        with torch.no_grad():
            run()
            times = _times(run, budget_s=budget_s)
    except (ImportError, RuntimeError, MemoryError) as error:
        return _missing(name, _first_line(error))
    return _rate(name, float(decode.num_weights), times, note=decode.note)


def _launch_item(accelerator: Accelerator, torch: Any, *, budget_s: float) -> ProbeItem:
    """Seconds from one launch of the smallest kernel to the next, its way through torch included."""
    name = "launch_s"
    if accelerator == "cpu":
        return _missing(name, "a CPU launches no kernels")
    try:
        number = torch.zeros(1, device="cuda")

        def run() -> None:
            for _ in range(LAUNCHES):
                number.add_(1)
            torch.cuda.synchronize()

        run()
        times = [seconds / LAUNCHES for seconds in _times(run, budget_s=budget_s)]
    except RuntimeError as error:
        return _missing(name, _first_line(error))
    return ProbeItem(
        name=name,
        value=statistics.median(times),
        low=min(times),
        high=max(times),
        runs=len(times),
        note=f"{LAUNCHES} additions to one number by torch, one after the other",
    )


def _copy_item(accelerator: Accelerator, torch: Any, *, budget_s: float) -> ProbeItem:
    """Bytes read and written per second by a plain copy of 256 MiB (less where memory or time is short)."""
    size = min(COPY_BYTES, int(psutil.virtual_memory().available) // 8)
    few = np.frombuffer(np.random.default_rng(0).bytes(8 * MIB), dtype=np.uint8)
    if accelerator == "cpu":
        # Making and filling both arrays costs about as much as four copies.
        fits = few.size * budget_s / (_seconds(lambda: few + 1) * (MIN_RUNS + 5))
        size = max(LEAST_COPY_BYTES, min(size, int(fits) // LEAST_COPY_BYTES * LEAST_COPY_BYTES))
    if accelerator == "cuda":
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)

        def run() -> None:
            target.copy_(source)
            torch.cuda.synchronize()
    else:
        array = np.resize(few, size)
        copy = np.empty_like(array)

        def run() -> None:
            np.copyto(copy, array)

    run()
    return _rate(
        "copy_bytes_per_s", 2.0 * size, _times(run, budget_s=budget_s), note=f"{size // MIB} MiB, read and write"
    )


def _step_item(accelerator: Accelerator, torch: Any, *, budget_s: float) -> ProbeItem:
    """Seconds of a training step so small that only its overhead is left: eight blocks' worth of width 8, AdamW."""
    if torch is None:
        return _missing("step_overhead_s", "torch is not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is worth sharing, and on a busy machine threads wait for each other
    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(56))).to(accelerator)
    optimizer = torch.optim.AdamW(layers.parameters(), fused=True)
    x = torch.randn(2, 8, device=accelerator)

    def run() -> None:
        layers(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if accelerator == "cuda":
            torch.cuda.synchronize()

    run()
    times = _times(run, budget_s=budget_s)
    torch.set_num_threads(threads)
    return ProbeItem(
        name="step_overhead_s",
        value=statistics.median(times),
        low=min(times),
        high=max(times),
        runs=len(times),
        note="56 layers of width 8: as many products as eight blocks have",
    )


def _disk_items(folder: Path, *, budget_s: float) -> list[ProbeItem]:
    """Sequential read and fsynced write of a 64 MiB file, in pieces, as far as the budget reaches."""
    names = ("disk_write_bytes_per_s", "disk_read_bytes_per_s")
    data = np.random.default_rng(0).bytes(DISK_BYTES // 8)
    began = time.monotonic()
    writes: list[float] = []
    reads: list[float] = []
    try:
        with tempfile.TemporaryDirectory(prefix="fedblocks-probe-", dir=folder) as made:
            for i in range(DISK_BYTES // len(data)):
                path = Path(made) / f"{i}.bin"
                writes.append(_seconds(lambda path=path: _write(path, data)))
                reads.append(_seconds(lambda path=path: _read(path)))
                if time.monotonic() - began > budget_s and len(writes) >= MIN_RUNS:
                    break
    except OSError as error:
        why = f"{folder}: {error.strerror or error}"
        return [_missing(name, why) for name in names]
    note = f"{len(data) // MIB} MiB files"
    return [
        _rate(names[0], float(len(data)), writes, note=f"{note}, fsync"),
        _rate(names[1], float(len(data)), reads, note=f"{note}, page cache dropped where the system allows it"),
    ]


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(4 * MIB):
            pass


def _link_items(link: LinkRecord) -> list[ProbeItem]:
    """What real traffic with the aggregator has shown; `fedblocks preflight` and `join` make some."""
    found = (
        ("round_trip_s", link.round_trip_s, ""),
        ("uplink_bytes_per_s", link.uplink_bytes_per_s, "; the profile holds 5 Mbit/s"),
        ("downlink_bytes_per_s", link.downlink_bytes_per_s, "; the profile holds 20 Mbit/s"),
    )
    why = "no traffic with an aggregator has shown it yet"
    note = "running mean of traffic with the aggregator"
    return [
        _missing(name, f"{why}{prior}")
        if figure is None
        else ProbeItem(name=name, value=figure.value, low=figure.low, high=figure.high, runs=figure.runs, note=note)
        for name, figure, prior in found
    ]


def _state_items(before: MachineState, after: MachineState) -> list[ProbeItem]:
    """Heat before and after, and how often it held a core back meanwhile."""
    items = [
        _missing("temperature_c", "no thermal zone or sensor of the processor can be read"),
        _missing("throttle_events_count", "no counter of the processor can be read"),
    ]
    if before.temperature_c is not None and after.temperature_c is not None:
        ends = (before.temperature_c, after.temperature_c)
        items[0] = ProbeItem(
            name="temperature_c",
            value=ends[1],
            low=min(ends),
            high=max(ends),
            runs=2,
            note=f"{after.hottest}, at the end",
        )
    if before.throttle_count is not None and after.throttle_count is not None:
        count = max(0, after.throttle_count - before.throttle_count)
        items[1] = ProbeItem(
            name="throttle_events_count", value=float(count), runs=1, note="during the probe, all cores"
        )
    return items


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _missing(name: str, why: str) -> ProbeItem:
    return ProbeItem(name=name, value=None, note=why)


def _rate(name: str, amount: float, times: Sequence[float], *, note: str) -> ProbeItem:
    """Amount per second: of the median time, and of the slowest and fastest."""
    return ProbeItem(
        name=name,
        value=amount / statistics.median(times),
        low=amount / max(times),
        high=amount / min(times),
        runs=len(times),
        note=note,
    )


def _times(run: Callable[[], None], *, budget_s: float) -> list[float]:
    """Seconds of each run: at least five, then as many as fit into the budget, at most fifty."""
    began = time.monotonic()
    times: list[float] = []
    while len(times) < MIN_RUNS or (len(times) < 50 and time.monotonic() - began < budget_s):
        times.append(_seconds(run))
    return times


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    # A clock tick is the shortest time there is: a rate must stay finite.
    return max(time.perf_counter() - began, math.ulp(1.0))
