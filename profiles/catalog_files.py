"""What is known of devices that were not probed? One TOML file each, every number with its source and its kind.

Another power mode of a board is a file that names the board's (``mode_of``) and the facts that the mode changes.
A catalog entry is a prior: :func:`load` turns peak rates into achieved ones by the shares that the file states, and the
probe's measurements override it.
:func:`scaled` makes a small model meet a large device's limits, for the demo and for simulations.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Final, Literal, cast, get_args

from fedblocks.profiles.device import Accelerator, ComputeDtype, DeviceProfile
from fedblocks.profiles.model_shape import ModelShape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FactKind = Literal["datasheet", "published", "probe", "estimate", "definition"]
Tier = Literal["A", "B", "C", "D"]

#: Up and down, bytes/s, of each tier of the ladder (methods.md 12.4: 5/20, 10/50, 50/100, 100/200 Mbit/s).
LINK_BYTES_PER_S: Final[Mapping[Tier, tuple[float, float]]] = {
    "A": (5e6 / 8, 20e6 / 8),
    "B": (10e6 / 8, 50e6 / 8),
    "C": (50e6 / 8, 100e6 / 8),
    "D": (100e6 / 8, 200e6 / 8),
}

#: A fact's unit is the end of its key.
UNITS: Final = (
    "_count",
    "_per_clock_per_sm",
    "_mhz",
    "_tflops",
    "_share",
    "_gb_per_s",
    "_mb_per_s",
    "_gb",
    "_ms",
    "_w",
)

#: The model whose block is the yardstick of :func:`scale_factor` (config.json of Qwen2.5-0.5B).
QWEN2_5_0_5B: Final = ModelShape(
    family="qwen2",
    num_layers=24,
    hidden_size=896,
    intermediate_size=4864,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=151936,
    tied_embeddings=True,
    qkv_bias=True,
)


class CatalogError(ValueError):
    """A catalog file that cannot be used; the text names the file, the key and what is expected."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One number, where it comes from and how far it can be trusted."""

    value: float
    kind: FactKind
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """One device of the catalog, as its file states it; the unit of each fact is the end of its key."""

    name: str
    title: str
    accelerator: Accelerator
    compute_dtype: ComputeDtype
    tier: Tier
    facts: Mapping[str, Fact]
    mode_of: str | None = None
    """The entry of the same board in the power mode that its file describes; None for that one."""

    def profile(self) -> DeviceProfile:
        """Achieved rates: the peaks times the shares that the file states. GB are 10⁹ bytes."""

        def value(key: str) -> float:
            return self.facts[key].value

        up, down = LINK_BYTES_PER_S[self.tier]
        return DeviceProfile(
            device=self.name,
            source="catalog",
            accelerator=self.accelerator,
            compute_dtype=self.compute_dtype,
            cpu_cores=int(value("cpu_count")),
            memory_usable_bytes=round(value("memory_usable_gb") * 1e9),
            runtime_memory_bytes=round(value("runtime_memory_gb") * 1e9),
            gemm_flops_per_s=value("dense_tflops") * 1e12 * value("achieved_compute_share"),
            memory_bytes_per_s=value("memory_bandwidth_gb_per_s") * 1e9 * value("achieved_bandwidth_share"),
            step_overhead_s=value("step_overhead_ms") * 1e-3,
            uplink_bytes_per_s=up,
            downlink_bytes_per_s=down,
            disk_read_bytes_per_s=value("disk_read_mb_per_s") * 1e6,
            disk_free_bytes=round(value("disk_free_gb") * 1e9),
            four_bit="not measured: catalog entry",
        )


REQUIRED: Final = (
    "dense_tflops",
    "achieved_compute_share",
    "memory_bandwidth_gb_per_s",
    "achieved_bandwidth_share",
    "memory_installed_gb",
    "memory_usable_gb",
    "runtime_memory_gb",
    "cpu_count",
    "board_power_w",
    "step_overhead_ms",
    "disk_read_mb_per_s",
    "disk_free_gb",
)

#: What a power mode of a board can change.
MODE_FACTS: Final = (
    "gpu_clock_mhz",
    "dense_tflops",
    "achieved_compute_share",
    "memory_bandwidth_gb_per_s",
    "achieved_bandwidth_share",
    "cpu_count",
    "board_power_w",
    "step_overhead_ms",
)


def names() -> tuple[str, ...]:
    """All devices of the catalog, in alphabetical order."""
    folder = resources.files("fedblocks.profiles") / "catalog"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def load(name: str) -> DeviceProfile:
    """The achieved profile of a device of the catalog.

    Raises:
        CatalogError: no such device, or a file that contradicts the schema.
    """
    return entry(name).profile()


def entry(name: str) -> CatalogEntry:
    """A device of the catalog with all its facts.

    Raises:
        CatalogError: no such device, or a file that contradicts the schema.
    """
    if name not in names():
        raise CatalogError(f"device {name!r} is not in the catalog; there are: {', '.join(names())}")
    text = (resources.files("fedblocks.profiles") / "catalog" / f"{name}.toml").read_text(encoding="utf-8")
    return parse(name, text)


def parse(name: str, text: str) -> CatalogEntry:
    """A catalog file's text, checked.

    Raises:
        CatalogError: a key is missing, unknown, of the wrong type, without unit, source or kind, or two disagree.
    """
    content = tomllib.loads(text)
    of_board = {"accelerator", "compute_dtype", "tier"}
    expected = {"name", "title", "facts"} | ({"mode_of"} if "mode_of" in content else of_board)
    if set(content) != expected:
        raise CatalogError(f"catalog {name!r}: keys are {sorted(content)}, expected {sorted(expected)}")
    _one_of(name, "name", content["name"], (name,))
    facts = {key: _fact(name, key, raw) for key, raw in cast("dict[str, Any]", content["facts"]).items()}
    if "mode_of" in content:
        return _mode(name, content, facts)
    _one_of(name, "accelerator", content["accelerator"], get_args(Accelerator))
    _one_of(name, "compute_dtype", content["compute_dtype"], get_args(ComputeDtype))
    _one_of(name, "tier", content["tier"], get_args(Tier))
    missing = [key for key in REQUIRED if key not in facts]
    if missing:
        raise CatalogError(f"catalog {name!r}: facts {', '.join(missing)} are missing")
    found = CatalogEntry(
        name=name,
        title=str(content["title"]),
        accelerator=content["accelerator"],
        compute_dtype=content["compute_dtype"],
        tier=content["tier"],
        facts=facts,
    )
    _check_consistent(found)
    return found


def _mode(name: str, content: Mapping[str, Any], facts: Mapping[str, Fact]) -> CatalogEntry:
    """Another power mode of a board whose own file says the rest."""
    _one_of(name, "mode_of", content["mode_of"], tuple(other for other in names() if other != name))
    board = entry(content["mode_of"])
    if board.mode_of is not None:
        raise CatalogError(f"catalog {name!r}: mode_of is {board.name!r}, a mode itself, expected {board.mode_of!r}")
    fixed = sorted(facts.keys() - set(MODE_FACTS))
    if fixed:
        raise CatalogError(f"catalog {name!r}: a power mode does not change {', '.join(fixed)}")
    found = replace(board, name=name, title=str(content["title"]), facts={**board.facts, **facts}, mode_of=board.name)
    _check_consistent(found)
    less, more = sorted((board, found), key=lambda one: (one.facts["board_power_w"].value, one is found))
    for rate in ("gemm_flops_per_s", "memory_bytes_per_s"):
        if getattr(less.profile(), rate) > getattr(more.profile(), rate):
            raise CatalogError(f"catalog {name!r}: {more.name} takes more power than {less.name} at a lower {rate}")
    return found


#: Memory above R that a process takes whatever the size of its model: what the libraries keep, and what stays from one
#: task to the next (profiles/cost.py, the allocator's constant without the holes).
UNSCALED_BYTES: Final = 3 << 20


def scale_factor(shape: ModelShape, reference: ModelShape = QWEN2_5_0_5B) -> float:
    """Multiply-adds of one block of ``shape`` over those of one block of ``reference``: P / P_reference.

    The starter model (width 64, MLP 192, 4 heads) against Qwen2.5-0.5B: 53,248 / 14,909,440 = 1/280.
    """
    return shape.linear_parameters / reference.linear_parameters


def scaled(device: DeviceProfile, factor: float, *, host: DeviceProfile) -> DeviceProfile:
    """The device that a small model meets on ``host`` in the place of ``device``.

    One factor multiplies the matrix rate, the memory rate, the disk rate and the memory above R alike, so that a block
    of the small model costs the same share of the device as a block ``1/factor`` times larger costs of the real one.
    Three things are not scaled, because they are those of the process that really runs: R (its ``host`` measurement
    stands in for the device's own) with :data:`UNSCALED_BYTES`, the arithmetic (the host's accelerator and compute
    type), and the links, which carry the small model's real bytes. The fixed overhead of a step does not shrink with a
    model either.
    Where the scaled device would be faster than the host, it is as fast as the host: pauses can only slow down.

    Args:
        factor: usually :func:`scale_factor`.
        host: measured profile of the machine that plays the device, as one client process sees it.

    Raises:
        ValueError: a factor outside (0, 1].
    """
    if not 0 < factor <= 1:
        raise ValueError(f"scaled device: factor is {factor}, expected a number in (0, 1]")
    return replace(
        device,
        accelerator=host.accelerator,
        compute_dtype=host.compute_dtype,
        four_bit=host.four_bit,
        memory_usable_bytes=host.runtime_memory_bytes
        + UNSCALED_BYTES
        + int(factor * (device.memory_usable_bytes - device.runtime_memory_bytes)),
        runtime_memory_bytes=host.runtime_memory_bytes,
        gemm_flops_per_s=min(factor * device.gemm_flops_per_s, host.gemm_flops_per_s),
        memory_bytes_per_s=min(factor * device.memory_bytes_per_s, host.memory_bytes_per_s),
        disk_read_bytes_per_s=min(factor * device.disk_read_bytes_per_s, host.disk_read_bytes_per_s),
        step_overhead_s=max(device.step_overhead_s, host.step_overhead_s),
        disk_free_bytes=host.disk_free_bytes,
    )


def _one_of(name: str, key: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise CatalogError(f"catalog {name!r}: {key} is {value!r}, expected {' or '.join(map(repr, options))}")


def _fact(name: str, key: str, raw: Any) -> Fact:
    if not key.endswith(UNITS):
        raise CatalogError(f"catalog {name!r}: {key} ends in no unit, expected one of {', '.join(UNITS)}")
    if not isinstance(raw, dict) or set(cast("dict[str, Any]", raw)) != {"value", "kind", "source"}:
        raise CatalogError(f"catalog {name!r}: {key} is {raw!r}, expected value, kind and source")
    fact = cast("dict[str, Any]", raw)
    _one_of(name, f"{key}.kind", fact["kind"], get_args(FactKind))
    if not isinstance(fact["source"], str) or not fact["source"].strip():
        raise CatalogError(f"catalog {name!r}: {key}.source is {fact['source']!r}, expected a text")
    if type(fact["value"]) not in (int, float) or not fact["value"] > 0:
        raise CatalogError(f"catalog {name!r}: {key}.value is {fact['value']!r}, expected a positive number")
    return Fact(value=float(fact["value"]), kind=fact["kind"], source=fact["source"])


def _check_consistent(found: CatalogEntry) -> None:
    """No entry contradicts itself."""

    def value(key: str) -> float:
        return found.facts[key].value

    def require(holds: bool, text: str) -> None:
        if not holds:
            raise CatalogError(f"catalog {found.name!r}: {text}")

    for key in ("cpu_count", "sm_count"):
        count = found.facts.get(key)
        require(count is None or count.value.is_integer(), f"{key} is no whole number")
    require(
        value("runtime_memory_gb") < value("memory_usable_gb") <= value("memory_installed_gb"),
        f"memory for the runtime {value('runtime_memory_gb')}, usable {value('memory_usable_gb')} and installed "
        f"{value('memory_installed_gb')} GB, expected each below the next",
    )
    for rate, share in (
        ("dense_tflops", "achieved_compute_share"),
        ("memory_bandwidth_gb_per_s", "achieved_bandwidth_share"),
    ):
        achieved = found.facts[rate].kind == "probe"
        low, high = (1.0, 1.0) if achieved else (0.5, 0.9)
        require(low <= value(share) <= high, f"{share} is {value(share)}, expected {low} to {high} for this {rate}")
    parts = ("sm_count", "tensor_fma_per_clock_per_sm", "gpu_clock_mhz")
    if found.accelerator == "cuda":
        require(all(part in found.facts for part in parts), f"a GPU needs {', '.join(parts)}")
        computed = value(parts[0]) * value(parts[1]) * 2 * value(parts[2]) * 1e6 / 1e12
        require(
            abs(computed - value("dense_tflops")) <= 0.02 * computed,
            f"dense_tflops is {value('dense_tflops')}, but its SMs, FMA per clock and clock give {computed:.1f}",
        )
