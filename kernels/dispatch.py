"""Who carries out an operation: a compiled pack, Triton's compiler, or torch? And who was asked first, and why not?

The ladder on a GPU is pack → triton → torch; on a CPU torch serves everything. A rung is left out where a short
calibration found it slower or wrong (``calibration.py``), and skipped where it says that it cannot carry out the call.
Every fall is an event that names its reason, logged once and counted; nothing falls silently (runtime.md 6).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import ParamSpec

from fedblocks.kernels import jit
from fedblocks.kernels.catalog import Launch

Backend = Literal["auto", "pack", "triton", "torch"]
SizeClass = Literal["small", "large"]
Run = Callable[[Launch], None]

LADDER: Final = ("pack", "triton")
"""Rungs above torch, the first to be asked first."""
ONLY_CALIBRATED: Final = frozenset({"nf4_linear", "nf4_linear_dgrad"})
"""Operations whose kernels lose against torch on most devices: asked only where a calibration found them faster."""
LARGE_ELEMENTS: Final = 1 << 20
"""Elements of an operation's first tensor from which on a call counts as large."""

P = ParamSpec("P")
R = TypeVar("R")


class NotSupportedError(RuntimeError):
    """A rung cannot carry out this call; the text says why. Raised before anything is launched."""


class BackendError(RuntimeError):
    """A backend that was demanded cannot serve an operation."""


class Rung(Protocol):
    """One way of carrying out launches."""

    def missing(self, device: torch.device) -> str | None:
        """Why this rung cannot serve ``device`` at all, or None."""
        ...

    def run(self, launch: Launch) -> None:
        """Launches; raises :class:`NotSupportedError` before it does anything if it cannot."""
        ...


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of fall from a rung."""

    op: str
    wanted: str
    got: str
    reason: str

    def __str__(self) -> str:
        return f"kernel {self.op}: {self.got} instead of {self.wanted}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSettings:
    """What the owner of a device may demand.

    Args:
        backend: ``auto``, or the only rung that may serve; one that cannot is an error then.
        overrides: the same for single operations.
    """

    backend: Backend = "auto"
    overrides: Mapping[str, Backend] = field(default_factory=dict)

    def of(self, op: str) -> Backend:
        """The backend demanded for ``op``."""
        return self.overrides.get(op, self.backend)


class _TritonRung:
    def missing(self, device: torch.device) -> str | None:
        if device.type == "cpu":
            return None if jit.interpreting() else "triton's kernels run on a GPU"
        return jit.missing()

    def run(self, launch: Launch) -> None:
        jit.run(launch)


class Dispatcher:
    """Chooses the rungs of each call.

    Args:
        rungs: name -> rung.
    """

    def __init__(self, rungs: Mapping[str, Rung]) -> None:
        self._rungs = dict(rungs)
        self._settings = KernelSettings()
        self._choices: dict[tuple[str, str, SizeClass], tuple[str, ...]] = {}
        self._cache: dict[tuple[str, torch.device, torch.dtype, SizeClass], tuple[tuple[str, Run], ...]] = {}
        self.demands = False
        """Somebody demands a backend; otherwise torch serves every CPU."""
        self.counts: Counter[Event] = Counter()
        """Every fall so far and how often."""
        self.listener: Callable[[Event], None] = _log

    def add_rung(self, name: str, rung: Rung) -> None:
        """Takes on a rung, or another in its place."""
        self._rungs[name] = rung
        self._cache.clear()

    @property
    def rungs_by_name(self) -> Mapping[str, Rung]:
        """Those that there are, the ladder's order."""
        return {name: self._rungs[name] for name in LADDER if name in self._rungs}

    def explain(self, op: str, dtype: str, size: SizeClass, device: torch.device) -> tuple[str, str]:
        """Who serves such a call first, and why: ``("torch", "pack: no driver; triton: no GPU")``."""
        wanted = self._settings.of(op)
        if wanted != "auto":
            return wanted, "demanded by [kernels]"
        if device.type == "cpu":
            return "torch", "on a CPU"
        chosen = self._choices.get((op, dtype, size))
        if chosen is None and op in ONLY_CALIBRATED:
            return "torch", "its kernel is used only where a calibration found it faster"
        reasons: list[str] = []
        for name in LADDER if chosen is None else chosen:
            reason = self._rungs[name].missing(device) if name in self._rungs else "not part of this installation"
            if reason is None:
                return name, "; ".join([*reasons, "calibrated" if chosen is not None else "the ladder's order"])
            reasons.append(f"{name}: {reason}")
        return "torch", "; ".join(reasons) or "calibrated: no kernel is faster"

    def configure(self, settings: KernelSettings) -> None:
        """What the owner demands from now on.

        Raises:
            BackendError: an override of an operation that does not exist.
        """
        for op in settings.overrides:
            if op not in OPERATIONS:
                raise BackendError(f"[kernels] names {op!r}, expected one of {', '.join(sorted(OPERATIONS))}")
        self._settings = settings
        self.demands = settings != KernelSettings()
        self._cache.clear()

    def choose(self, op: str, dtype: str, size: SizeClass, rungs: tuple[str, ...]) -> None:
        """The rungs that a calibration allows for such calls, best first; none: torch."""
        self._choices[op, dtype, size] = rungs
        self._cache.clear()

    def forget(self) -> None:
        """Drops what calibrations have chosen."""
        self._choices.clear()
        self._cache.clear()

    @contextmanager
    def demanding(self, backend: Backend) -> Iterator[None]:
        """Within it every operation is served by ``backend``."""
        before = self._settings
        self.configure(KernelSettings(backend=backend))
        try:
            yield
        finally:
            self.configure(before)

    def rungs(self, op: str, x: Tensor) -> tuple[tuple[str, Run], ...]:
        """(name, run) of those to be asked for a call whose first tensor is ``x``, before torch.

        Raises:
            BackendError: the demanded one cannot serve this device.
        """
        size: SizeClass = "large" if x.numel() >= LARGE_ELEMENTS else "small"
        key = (op, x.device, x.dtype, size)
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = tuple(self._find(op, x.device, str(x.dtype).removeprefix("torch."), size))
        return found

    def _find(self, op: str, device: torch.device, dtype: str, size: SizeClass) -> Iterator[tuple[str, Run]]:
        wanted = self._settings.of(op)
        if wanted == "torch" or (wanted == "auto" and device.type == "cpu"):
            return
        names = (wanted,)
        if wanted == "auto":
            names = self._choices.get((op, dtype, size), () if op in ONLY_CALIBRATED else LADDER)
        for name in names:
            reason = self._rungs[name].missing(device) if name in self._rungs else "not part of this installation"
            if reason is None:
                yield name, self._rungs[name].run
            elif wanted != "auto":
                raise BackendError(f"[kernels] demands {wanted} for {op}, which is not there: {reason}")
            else:
                self._fell(Event(op, name, "the next rung", reason))

    def fell(self, op: str, name: str, got: str, reason: str) -> None:
        """Counts that ``name`` declined one call of ``op``.

        Raises:
            BackendError: it is the demanded one.
        """
        if self._settings.of(op) == name:
            raise BackendError(f"[kernels] demands {name} for {op}, which declines this call: {reason}")
        self._fell(Event(op, name, got, reason))

    def _fell(self, event: Event) -> None:
        self.counts[event] += 1
        if self.counts[event] == 1:
            self.listener(event)


def _log(event: Event) -> None:
    logging.getLogger("fedblocks.kernels").warning("%s", event)


DISPATCHER: Final = Dispatcher({"triton": _TritonRung()})
"""The one of this process."""

OPERATIONS: Final[dict[str, Operation[..., Any]]] = {}
"""Name -> operation, in the order of their definition."""


class Operation(Generic[P, R]):
    """One operation on tensors: called like its specification, carried out by the best rung that can.

    Args:
        launch: the launches; its first argument is who carries them out, the others are the specification's.
        reference: the specification in torch, for any device and any float dtype.
    """

    def __init__(self, name: str, launch: Callable[..., R], reference: Callable[P, R]) -> None:
        self.name = name
        self.launch = launch
        self.reference = reference
        self.__doc__ = reference.__doc__
        OPERATIONS[name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """As the specification."""
        first: Tensor = args[0]  # type: ignore[assignment] # every operation begins with a tensor
        if first.is_cpu and not DISPATCHER.demands:
            return self.reference(*args, **kwargs)
        rungs = DISPATCHER.rungs(self.name, first)
        for place, (name, run) in enumerate(rungs):
            try:
                return self.launch(run, *args, **kwargs)
            except NotSupportedError as error:
                got = rungs[place + 1][0] if place + 1 < len(rungs) else "torch"
                DISPATCHER.fell(self.name, name, got, str(error))
        return self.reference(*args, **kwargs)
