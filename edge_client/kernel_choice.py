"""Which kernels does this device train with? What the site demands, else what a short calibration has found.

On a CPU there is nothing to choose: torch carries out every operation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from fedblocks.kernels.ops import (
    DISPATCHER,
    NUMERICS_CLASS,
    BackendError,
    Event,
    KernelSettings,
    calibration,
    pack_sizes,
)
from fedblocks.protocol.durable import write_durably
from fedblocks.protocol.run_config import ConfigError
from fedblocks.protocol.site_file import KernelsSettings

CALIBRATION_FILE: Final = "kernels.json"
BUDGET_S: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Who serves one kind of call."""

    op: str
    dtype: str
    size: str
    rung: str
    why: str
    seconds: dict[str, float]
    """Measured, by rung; empty where nothing was."""
    refused: dict[str, str]
    """Rungs that a calibration shut out, and why."""


def training_device(accelerator: str) -> torch.device:
    """Where a client with this accelerator (of its device profile) trains."""
    return torch.device("cuda", torch.cuda.current_device()) if accelerator == "cuda" else torch.device("cpu")


def choose_kernels(
    home: Path,
    settings: KernelsSettings,
    device: torch.device,
    *,
    say: Callable[[str], None],
    again: bool = False,
) -> calibration.Calibration | None:
    """Makes the choice for this process; every fall from a rung from now on is said once.

    Args:
        home: folder of this device's profile, where the calibration is kept.
        device: where the client trains.
        again: calibrate even if a calibration of this device is there.

    Returns:
        The calibration, None where nothing was to be calibrated.

    Raises:
        ConfigError: an override of an operation that does not exist, or a backend that cannot serve here.
    """

    def listen(event: Event) -> None:
        say(str(event))

    DISPATCHER.listener = listen
    try:
        DISPATCHER.configure(KernelSettings(backend=settings.backend, overrides=settings.parsed_overrides()))
    except BackendError as error:
        raise ConfigError(str(error)) from error
    rungs = DISPATCHER.rungs_by_name
    for wanted in {settings.backend, *settings.parsed_overrides().values()} - {"auto", "torch"}:
        reason = rungs[wanted].missing(device) if wanted in rungs else "not part of this installation"
        if reason is not None:
            raise ConfigError(f"[kernels] demands {wanted}, which cannot serve here: {reason}; take auto or torch")
    if device.type == "cpu" or all(rung.missing(device) is not None for rung in rungs.values()):
        return None
    path = home / CALIBRATION_FILE
    found = None if again else _stored(path, device, say)
    if found is None:
        say(f"choosing kernels (under {BUDGET_S:.0f} s; once for this device and its software)")
        dtypes = [torch.bfloat16] if torch.cuda.is_bf16_supported() else [torch.float32]
        found = calibration.calibrate(
            device,
            rungs,
            dtypes=dtypes,
            numerics_class=NUMERICS_CLASS,
            budget_s=BUDGET_S,
            now=time.monotonic,
            wait=torch.cuda.synchronize,
        )
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(path, json.dumps(found.to_plain(), indent=1).encode())
    for row in found.rows:
        for rung, reason in row.refused.items():
            if reason.startswith("wrong"):
                say(f"kernel {row.op} ({row.dtype}, {row.size}): {rung} is shut out: {reason}")
    found.apply(DISPATCHER)
    return found


def _stored(path: Path, device: torch.device, say: Callable[[str], None]) -> calibration.Calibration | None:
    if not path.is_file():
        return None
    try:
        found = calibration.Calibration.from_plain(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        say(f"{path} cannot be used ({error}); calibrating again")
        return None
    if found.key != calibration.key_of(device, NUMERICS_CLASS):
        say(f"{path} is of {found.key}; calibrating again")
        return None
    return found


def choices(device: torch.device, found: calibration.Calibration | None) -> list[Choice]:
    """Of every operation, in both sizes, who serves it on ``device`` now."""
    measured = {} if found is None else {(row.op, row.dtype, row.size): row for row in found.rows}
    made: list[Choice] = []
    for op, dtype in calibration.call_kinds():
        for size in ("small", "large"):
            rung, why = DISPATCHER.explain(op, dtype, size, device)  # type: ignore[arg-type]
            row = measured.get((op, dtype, size))
            made.append(
                Choice(
                    op=op,
                    dtype=dtype,
                    size=size,
                    rung=rung,
                    why=why,
                    seconds={} if row is None else dict(row.seconds),
                    refused={} if row is None else dict(row.refused),
                )
            )
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """What ``fedblocks kernels`` says."""

    device: str
    software: str
    """torch, and what else a time depends on."""
    rungs: dict[str, str]
    """pack, triton and torch -> ``ready``, or why it cannot serve here."""
    packs: dict[int, int]
    """Compute capability -> bytes of its pack in this installation."""
    choices: tuple[Choice, ...]
    falls: tuple[dict[str, Any], ...]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For a terminal: what serves whom; equal reasons are given once."""
        lines = [f"device  {self.device} ({self.software})"]
        lines += [f"{name:<7} {state}" for name, state in self.rungs.items()]
        sizes = ", ".join(f"sm_{capability} {size / 1e3:.0f} kB" for capability, size in self.packs.items())
        lines += [f"packs   {sizes or 'none in this installation'}", ""]
        lines.append(f"{'operation':<18} {'dtype':<9} {'small':<8} {'large':<8} why")
        for small, large in zip(self.choices[::2], self.choices[1::2], strict=True):
            why = small.why if small.why == large.why else f"{small.why} | {large.why}"
            times = [
                f"{name} {value * 1e6:.0f} us" for name, value in sorted(large.seconds.items(), key=lambda kv: kv[1])
            ]
            shut_out = [f"{name} {reason}" for name, reason in {**small.refused, **large.refused}.items()]
            because = "; ".join([why, *times, *shut_out])
            lines.append(f"{small.op:<18} {small.dtype:<9} {small.rung:<8} {large.rung:<8} {because}")
        return "\n".join(lines)


def describe_kernels(home: Path, settings: KernelsSettings, *, again: bool, say: Callable[[str], None]) -> KernelReport:
    """Calibrates if that is due, and says who serves what on this machine.

    Raises:
        ConfigError: see :func:`choose_kernels`.
    """
    device = training_device("cuda" if torch.cuda.is_available() else "cpu")
    found = choose_kernels(home, settings, device, say=say, again=again)
    on_gpu = device if device.type == "cuda" else torch.device("cuda", 0)
    states = {name: rung.missing(on_gpu) or "ready" for name, rung in DISPATCHER.rungs_by_name.items()}
    return KernelReport(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        software=calibration.key_of(device, NUMERICS_CLASS),
        rungs={**states, "torch": "ready"},
        packs=pack_sizes(),
        choices=tuple(choices(device, found)),
        falls=tuple(falls()),
    )


def falls() -> list[dict[str, Any]]:
    """Every kind of fall from a rung so far: operation, rungs, reason and how often."""
    return [
        {"op": event.op, "wanted": event.wanted, "got": event.got, "reason": event.reason, "count": count}
        for event, count in DISPATCHER.counts.items()
    ]
