"""Which rung is right and fastest on this device, for each operation, dtype and size? Measured once, then stored.

For every case each rung is first held against the reference; one that is wrong is shut out, with the error it made.
The others and torch are then timed in turns, and those that beat torch keep their place in the ladder, fastest first.
Source: runtime.md 6.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fedblocks.kernels import delta, head, nf4, optimizer, pointwise  # noqa: F401 - each defines its operations
from fedblocks.kernels.dispatch import (
    LARGE_ELEMENTS,
    OPERATIONS,
    Dispatcher,
    NotSupportedError,
    Rung,
    SizeClass,
)
from fedblocks.kernels.reference.adamw import Moments
from fedblocks.kernels.reference.nf4 import quantize_nf4
from fedblocks.kernels.reference.split import split_fp32

TOLERANCES: Final = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error over the largest magnitude: twice what the rounding of a result can make."""
REPEATS: Final = 7
MIN_GAIN: Final = 1.03
"""A rung must be this many times as fast as torch to keep its place; less is noise."""

Make = Callable[[torch.device, torch.dtype, SizeClass], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was found for one operation, dtype and size."""

    op: str
    dtype: str
    size: SizeClass
    rungs: tuple[str, ...]
    """Those that are right and faster than torch, fastest first; none: torch."""
    seconds: Mapping[str, float]
    """Median time of each that is right, torch among them."""
    refused: Mapping[str, str]
    """Rungs that were shut out, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """All rows, and what they hold for."""

    key: str
    """Device, driver and versions; a calibration of another key is not used."""
    rows: tuple[Row, ...]

    def apply(self, dispatcher: Dispatcher) -> None:
        """Makes the choices the dispatcher's."""
        for row in self.rows:
            dispatcher.choose(row.op, row.dtype, row.size, row.rungs)

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Calibration:
        """From what :meth:`to_plain` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            rows = tuple(Row(**{**row, "rungs": tuple(row["rungs"])}) for row in plain["rows"])
            return cls(key=str(plain["key"]), rows=rows)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a calibration of kernels: {error!r}") from error


def key_of(device: torch.device, numerics_class: int) -> str:
    """Everything that a time on ``device`` depends on."""
    from fedblocks.kernels import jit

    triton = "none"
    if jit.missing() is None:
        import triton as module

        triton = module.__version__
    if device.type != "cuda":
        return f"{device.type}; torch {torch.__version__}; triton {triton}; numerics {numerics_class}"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name} {properties.major}.{properties.minor}; torch {torch.__version__}; "
        f"cuda {torch.version.cuda}; triton {triton}; numerics {numerics_class}"
    )


def calibrate(
    device: torch.device,
    rungs: Mapping[str, Rung],
    *,
    dtypes: Sequence[torch.dtype],
    numerics_class: int,
    budget_s: float = 20.0,
    now: Callable[[], float],
    wait: Callable[[], None],
) -> Calibration:
    """Measures every operation on ``device``; what the budget leaves out keeps the ladder's order.

    Args:
        rungs: those to compare with torch, the ladder's order.
        dtypes: those that a client computes in.
        now: monotonic seconds.
        wait: returns when the device has done all its work.
    """
    began = now()
    rows: list[Row] = []
    present = {name: rung for name, rung in rungs.items() if rung.missing(device) is None}
    for op, dtype, size, make in _cases(dtypes):
        if not present or now() - began > budget_s:
            break
        rows.append(_measure(op, dtype, size, make, device, present, now, wait))
    return Calibration(key=key_of(device, numerics_class), rows=tuple(rows))


def _measure(
    op: str,
    dtype: torch.dtype,
    size: SizeClass,
    make: Make,
    device: torch.device,
    rungs: Mapping[str, Rung],
    now: Callable[[], float],
    wait: Callable[[], None],
) -> Row:
    operation = OPERATIONS[op]
    args, kwargs = make(device, dtype, size)
    name = str(args[0].dtype).removeprefix("torch.")  # by which the dispatcher knows such calls
    tolerance = TOLERANCES.get(name) or TOLERANCES[str(dtype).removeprefix("torch.")]
    right: dict[str, Callable[[], Any]] = {"torch": lambda: operation.reference(*args, **kwargs)}
    refused: dict[str, str] = {}
    for rung_name, rung in rungs.items():
        ours, theirs = _copied(args), _copied(args)
        try:
            made = operation.launch(rung.run, *ours, **kwargs)
        except NotSupportedError as error:
            refused[rung_name] = str(error)
            continue
        difference = _difference((made, ours), (operation.reference(*theirs, **kwargs), theirs))
        if difference > tolerance:
            refused[rung_name] = f"wrong: its error against the reference is {difference:.1e}, expected {tolerance}"
        else:
            right[rung_name] = lambda run=rung.run: operation.launch(run, *args, **kwargs)
    samples: dict[str, list[float]] = {rung_name: [] for rung_name in right}
    for repeat in range(REPEATS + 1):  # the first turn warms up
        for rung_name, call in right.items():
            wait()
            start = now()
            call()
            wait()
            if repeat:
                samples[rung_name].append(now() - start)
    seconds = {rung_name: statistics.median(times) for rung_name, times in samples.items()}
    faster = [n for n in right if n != "torch" and seconds[n] * MIN_GAIN <= seconds["torch"]]
    return Row(
        op=op,
        dtype=name,
        size=size,
        rungs=tuple(sorted(faster, key=seconds.__getitem__)),
        seconds=seconds,
        refused=refused,
    )


def _copied(value: Any) -> Any:
    """Tensors in nested tuples and moments, copied: some operations write into their arguments."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(_copied(part) for part in value)
    if isinstance(value, Moments):
        return Moments(m=value.m.clone(), v=value.v.clone())
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Moments):
        yield from _tensors((value.m, value.v))


def _difference(ours: Any, theirs: Any) -> float:
    """Largest error of any floating-point tensor over its largest magnitude; infinite if it is not finite."""
    worst = 0.0
    for got, expected in zip(_tensors(ours), _tensors(theirs), strict=True):
        if got.is_floating_point() and got.numel():
            wide, exact = got.double(), expected.double()
            if not bool(torch.isfinite(wide).all()):
                return float("inf")
            worst = max(worst, ((wide - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item())
    return worst


# ---- the cases: sizes of a 0.5B model's block, small and large ----


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _rows(size: SizeClass) -> int:
    """Rows of 1024 columns on either side of the limit between the classes."""
    return (64 << 10 if size == "small" else 4 * LARGE_ELEMENTS) // 1024


def _norm(device: torch.device, dtype: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = _random(device, dtype, _rows(size), 1024)
    return (x, None, _random(device, dtype, 1024), 1e-5), {}


def _norm_backward(device: torch.device, dtype: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dy, s = (_random(device, dtype, _rows(size), 1024) for _ in range(2))
    rstd = torch.ones(_rows(size), device=device)
    return (dy, None, s, _random(device, dtype, 1024), rstd), {"need_dx": True, "need_dw": True}


def _rope(device: torch.device, dtype: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    angle = torch.rand(64, 64, device=device)
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    return (_random(device, dtype, _rows(size), 16, 64), *tables), {"inverse": False}


def _swiglu(device: torch.device, dtype: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_random(device, dtype, _rows(size), 2048),), {}


def _swiglu_backward(
    device: torch.device, dtype: torch.dtype, size: SizeClass
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rows = _rows(size)
    return (_random(device, dtype, rows, 1024), _random(device, dtype, rows, 2048)), {"need_h": True}


def _logits(device: torch.device, dtype: torch.dtype, size: SizeClass) -> Tensor:
    return _random(device, dtype, *((8, 8192) if size == "small" else (64, 131072)))


def _cross_entropy(device: torch.device, dtype: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    logits = _logits(device, dtype, size)
    return (logits, torch.arange(len(logits), device=device)), {"gradient": True}


def _kl(device: torch.device, dtype: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    logits = _logits(device, dtype, size)
    top = torch.log_softmax(_random(device, torch.float32, *logits.shape), dim=1).topk(32, dim=1)
    log_tail = torch.log1p(-top.values.exp().sum(dim=1))
    return (logits, top.indices, top.values.contiguous(), log_tail), {"gradient": True}


def _dequant(device: torch.device, dtype: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # The first tensor holds half a byte a weight: the class is that of the bytes.
    weight = quantize_nf4(_random(device, torch.float32, 2 * _rows(size), 1024))
    return (*weight.buffers, weight.offset, torch.empty(weight.shape, device=device, dtype=dtype)), {}


def _linear(device: torch.device, dtype: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = quantize_nf4(_random(device, torch.float32, 1024, 1024))
    return (_random(device, dtype, _rows(size), 1024), (weight,)), {}


def _adamw(device: torch.device, _: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    n = 1024 * _rows(size)
    value = torch.randn(n, device=device)
    high, low = (torch.empty(n, device=device, dtype=d) for d in (torch.bfloat16, torch.int16))
    split_fp32(value, high, low)
    hyper = {"step": 1, "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    return (high, low, torch.randn(n, device=device), Moments.zeros(n, device)), hyper


def _values(device: torch.device, _: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(1024 * _rows(size), device=device),), {}


def _change(device: torch.device, _: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    end, start = (torch.randn(_rows(size), 1024, device=device) for _ in range(2))
    return (end, start, None, 1.0), {}


def _codes(device: torch.device, _: torch.dtype, size: SizeClass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = torch.randn(_rows(size), 1024, device=device)
    return (x, torch.arange(0, len(x), 4, device=device), x.abs().amax(dim=1)[::4].contiguous() / 127), {}


CASES: Final[Mapping[str, Make]] = {
    "nf4_dequant": _dequant,
    "nf4_linear": _linear,
    "nf4_linear_dgrad": _linear,
    "cross_entropy_": _cross_entropy,
    "kl_topk_": _kl,
    "add_rms_norm": _norm,
    "rms_norm_backward": _norm_backward,
    "rope_": _rope,
    "swiglu": _swiglu,
    "swiglu_backward_": _swiglu_backward,
    "adamw_": _adamw,
    "square_norm": _values,
    "delta_rows": _change,
    "delta_codes": _codes,
}
"""Operation -> its arguments for a device, dtype and size."""
_ONE_DTYPE: Final = frozenset({"nf4_dequant", "adamw_"})
"""Operations that the dispatcher knows by a dtype of their own: packed bytes, the halves of a weight."""
_FP32_ONLY: Final = frozenset({"square_norm", "delta_rows", "delta_codes"})


def call_kinds() -> list[tuple[str, str]]:
    """Operation and the dtype by which the dispatcher knows its calls, of a client that computes in bf16."""
    own = {"nf4_dequant": "uint8", **dict.fromkeys(_FP32_ONLY, "float32")}
    return [(op, own.get(op, "bfloat16")) for op in CASES]


def _cases(dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, torch.dtype, SizeClass, Make]]:
    sizes: tuple[SizeClass, ...] = ("large", "small")
    for size in sizes:
        for op, make in CASES.items():
            for dtype in (torch.float32,) if op in _FP32_ONLY else dtypes[:1] if op in _ONE_DTYPE else dtypes:
                yield op, dtype, size, make
