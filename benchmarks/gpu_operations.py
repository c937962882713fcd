"""Which operations are timed, on which sizes, and against what? Every operation of kernels/, and the head's loss.

A case builds its operands from a seed, says how few bytes or FLOPs the work needs, and names peers. Before anything is
timed, each rung computes a small call of the same widths; it is held against the reference in float64 on the same
operands, and a rung that is wrong is recorded and not timed. Peers are not judged: they are others' code.

The bytes are the least that have to move: each operand read once, each result written once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from gpu_timing import Budget, Candidate, DeviceLostError, Peaks, Timer, describe_error, spread, usable
from torch import Tensor

from fedblocks.kernels import ops
from fedblocks.kernels.dispatch import DISPATCHER, OPERATIONS, BackendError
from fedblocks.kernels.reference import adamw as adamw_reference
from fedblocks.kernels.reference import head as head_reference
from fedblocks.kernels.reference import nf4 as nf4_reference
from fedblocks.kernels.reference.adamw import Moments, Moments8Bit
from fedblocks.profiles.model_shape import ModelShape

RUNGS: Final = ("pack", "triton", "torch")
SMALL_ROWS: Final = 16
SMALL_ELEMENTS: Final = 1 << 14
HEAD_ROWS: Final = 256
"""Rows of one chunk of logits at a vocabulary of 128k."""
TOP: Final = 32
LABEL_SHARE: Final = 0.4
COMPILE_SHARE: Final = 0.5
"""No compilation by torch begins when less than this share of the time is left."""
EPS: Final = 1e-6
ADAMW: Final[dict[str, Any]] = {"step": 3, "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}

TOLERANCES: Final = {
    "nf4_dequant": 8e-3,
    "add_rms_norm": 2.4e-2,
    "rms_norm_backward": 2.4e-2,
    "rope_": 1.6e-2,
    "swiglu": 1.6e-2,
    "swiglu_backward_": 1.6e-2,
    "cross_entropy_": 1.6e-2,
    "kl_topk_": 1.6e-2,
    "nf4_linear": 2.4e-2,
    "nf4_linear_dgrad": 2.4e-2,
    "linear_cross_entropy": 2.4e-2,
}
"""Largest error over the largest magnitude, bf16 against float64: one to three units in the last place."""
FP32_TOLERANCE: Final = 2e-6
"""Of operations whose results are fp32."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
Peer = Callable[[tuple[Any, ...]], Callable[[], object]]
"""Operands -> what is to be timed; raises ImportError where the package is missing."""


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors of nested tuples and records, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, (Moments, Moments8Bit)):
        for part in dataclasses.fields(value):
            yield from tensors_in(getattr(value, part.name))


def copied(value: Any, change: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """The same with every tensor replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(copied(item, change) for item in value)
    if isinstance(value, (Moments, Moments8Bit)):
        parts = {part.name: copied(getattr(value, part.name), change) for part in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def widened(value: Any) -> Any:
    """The same with float tensors in float64."""
    return copied(value, lambda t: t.double() if t.is_floating_point() else t.clone())


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation on one size."""

    op: str
    form: str
    """E.g. ``down``, ``split, 8-bit moments``."""
    function: Callable[..., Any]
    build: Callable[[torch.device, bool], Call]
    """Operands on a device; small ones for the comparison."""
    expected: Callable[[Call], Sequence[Tensor]]
    """What the results must be near."""
    changed: tuple[int, ...] = ()
    """Operands that are overwritten and count as results."""
    tolerance: float = FP32_TOLERANCE
    num_bytes: float = 0.0
    flops: float = 0.0
    compiled: Callable[..., Any] | None = None
    """What torch.compile is given."""
    peers: Mapping[str, Peer] = field(default_factory=dict)

    def results(self, device: torch.device) -> list[Tensor]:
        """Carries out the small call."""
        args, kwargs = self.build(device, True)
        returned = self.function(*args, **kwargs)
        return [*tensors_in(returned), *(t for i in self.changed for t in tensors_in(args[i]))]


def by_reference(op: str, changed: tuple[int, ...] = (), *, wide: bool = True) -> Callable[[Call], Sequence[Tensor]]:
    """The specification's results, in float64; where it defines bits (``wide`` False), in the operands' types."""

    def expected(call: Call) -> Sequence[Tensor]:
        args = widened(call[0]) if wide else copied(call[0])
        returned = OPERATIONS[op].reference(*args, **call[1])
        return [*tensors_in(returned), *(t for i in changed for t in tensors_in(args[i]))]

    return expected


def largest_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Over all results: largest difference over the largest magnitude; infinite where a result is not finite."""
    assert len(got) == len(expected)
    worst = 0.0
    for ours, theirs in zip(got, expected, strict=True):
        wide, exact = ours.double(), theirs.double()
        if wide.shape != exact.shape or not bool(torch.isfinite(wide).all()):
            return float("inf")
        if exact.numel():
            worst = max(worst, ((wide - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item())
    return worst


# The cases


class _Operands:
    """Random tensors on one device, from one seed."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=self._generator, device=self.device).mul_(spread).to(dtype)

    def below(self, high: int, *size: int) -> Tensor:
        return torch.randint(0, high, size, generator=self._generator, device=self.device)

    def nf4(self, rows: int, cols: int) -> ops.Nf4Weight:
        return ops.quantize_nf4(self.normal(rows, cols, dtype=torch.float32, spread=cols**-0.5))


def cases(shape: ModelShape, tokens: int) -> list[Case]:
    """Every operation on the sizes of a model, ``tokens`` a micro-batch."""
    return [
        *_nf4_cases(shape, tokens),
        *_pointwise_cases(shape, tokens),
        *_head_cases(shape, tokens),
        *_parameter_cases(shape),
    ]


def _nf4_cases(shape: ModelShape, tokens: int) -> Iterator[Case]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    stored = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight: half a byte, its group's scale, that group's scale

    def dequant(device: torch.device, small: bool) -> Call:
        weight = _Operands(device).nf4(SMALL_ROWS if small else hidden, inner)
        return (*weight.buffers, weight.offset, torch.empty(weight.shape, dtype=torch.bfloat16, device=device)), {}

    def exact_dequant(call: Call) -> Sequence[Tensor]:
        out = torch.empty_like(call[0][6], dtype=torch.float64)
        nf4_reference.nf4_dequant(*call[0][:6], out)
        return [out]

    yield Case(
        op="nf4_dequant",
        form=f"{hidden} x {inner}",
        function=OPERATIONS["nf4_dequant"],
        build=dequant,
        expected=exact_dequant,
        changed=(6,),
        tolerance=TOLERANCES["nf4_dequant"],
        num_bytes=hidden * inner * (stored + 2),
        peers={"bitsandbytes": _bitsandbytes_dequant},
    )
    rows = 2 * inner

    def linear(device: torch.device, small: bool) -> Call:
        made = _Operands(device)
        return (made.normal(SMALL_ROWS if small else tokens, hidden), (made.nf4(inner, hidden),) * 2), {}

    def dgrad(device: torch.device, small: bool) -> Call:
        made = _Operands(device)
        return (made.normal(SMALL_ROWS if small else tokens, rows), (made.nf4(inner, hidden),) * 2), {}

    for op, build, peers in (
        ("nf4_linear", linear, {"bitsandbytes": _bitsandbytes_linear}),
        ("nf4_linear_dgrad", dgrad, {}),
    ):
        yield Case(
            op=op,
            form=f"{tokens} x {hidden} x {rows}",
            function=OPERATIONS[op],
            build=build,
            expected=by_reference(op),
            tolerance=TOLERANCES[op],
            flops=2.0 * tokens * hidden * rows,
            peers=peers,
        )


def _pointwise_cases(shape: ModelShape, tokens: int) -> Iterator[Case]:
    hidden, inner, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
    rotated, heads = shape.num_heads + shape.num_kv_heads, shape.num_heads + 2 * shape.num_kv_heads

    def rows(small: bool) -> int:
        return SMALL_ROWS if small else tokens

    def norm(device: torch.device, small: bool) -> Call:
        made = _Operands(device)
        return (made.normal(rows(small), hidden), None, made.normal(hidden), EPS), {}

    def norm_backward(device: torch.device, small: bool) -> Call:
        made = _Operands(device)
        dy, ds, s = (made.normal(rows(small), hidden) for _ in range(3))
        rstd = torch.rsqrt(s.float().square().mean(-1) + EPS)
        return (dy, ds, s, made.normal(hidden), rstd), {"need_dx": True, "need_dw": True}

    def rope(device: torch.device, small: bool) -> Call:
        made, n = _Operands(device), rows(small)
        angles = made.normal(n, head // 2, dtype=torch.float32)
        angles = torch.cat((angles, angles), dim=1)
        joined = made.normal(n, heads, head)
        return (joined[:, :rotated], angles.cos().bfloat16(), angles.sin().bfloat16()), {"inverse": False}

    def gate(device: torch.device, small: bool) -> Call:
        return (_Operands(device).normal(rows(small), 2 * inner),), {}

    def gate_backward(device: torch.device, small: bool) -> Call:
        made = _Operands(device)
        return (made.normal(rows(small), inner), made.normal(rows(small), 2 * inner)), {"need_h": True}

    common: tuple[tuple[str, Any, tuple[int, ...], float, dict[str, Peer]], ...] = (
        ("add_rms_norm", norm, (), 4.0 * tokens * hidden, {"liger": _liger_norm}),
        ("rms_norm_backward", norm_backward, (), 8.0 * tokens * hidden, {}),
        ("rope_", rope, (0,), 4.0 * tokens * rotated * head, {"liger": _liger_rope}),
        ("swiglu", gate, (), 6.0 * tokens * inner, {"liger": _liger_swiglu}),
        ("swiglu_backward_", gate_backward, (1,), 12.0 * tokens * inner, {}),
    )
    for op, build, changed, num_bytes, peers in common:
        yield Case(
            op=op,
            form=f"{tokens} tokens",
            function=OPERATIONS[op],
            build=build,
            expected=by_reference(op, changed),
            changed=changed,
            tolerance=TOLERANCES[op],
            num_bytes=num_bytes,
            compiled=OPERATIONS[op].reference,
            peers=peers,
        )


def _head_cases(shape: ModelShape, tokens: int) -> Iterator[Case]:
    vocab, hidden = shape.vocab_size, shape.hidden_size

    def logits(device: torch.device, small: bool) -> tuple[_Operands, Tensor]:
        made = _Operands(device)
        return made, made.normal(SMALL_ROWS if small else HEAD_ROWS, vocab, spread=3.0)

    def entropy(device: torch.device, small: bool) -> Call:
        made, z = logits(device, small)
        return (z, made.below(vocab, len(z))), {"gradient": True}

    def divergence(device: torch.device, small: bool) -> Call:
        made, z = logits(device, small)
        k = min(TOP, vocab)
        ids = torch.empty(len(z), k, dtype=torch.int64, device=device)
        logp, tail = torch.empty(len(z), k, device=device), torch.empty(len(z), device=device)
        teacher = z.float().add_(made.normal(*z.shape, dtype=torch.float32))
        head_reference.top_k_(teacher, ids, logp, tail)
        return (z, ids, logp, tail), {"gradient": True}

    for op, build, compiled, peers in (
        ("cross_entropy_", entropy, _plain_cross_entropy, {"liger": _liger_cross_entropy}),
        ("kl_topk_", divergence, None, {}),
    ):
        yield Case(
            op=op,
            form=f"{HEAD_ROWS} x {vocab}",
            function=OPERATIONS[op],
            build=build,
            expected=by_reference(op, (0,)),
            changed=(0,),
            tolerance=TOLERANCES[op],
            num_bytes=4.0 * HEAD_ROWS * vocab,
            compiled=compiled,
            peers=peers,
        )
    rows = max(1, round(LABEL_SHARE * tokens))

    def loss(device: torch.device, small: bool) -> Call:
        made = _Operands(device)
        n = SMALL_ROWS if small else rows
        return (made.normal(n, hidden), made.normal(vocab, hidden, spread=hidden**-0.5), made.below(vocab, n)), {}

    yield Case(
        op="linear_cross_entropy",
        form=f"{rows} rows, head {vocab} x {hidden}, with gradient",
        function=_linear_cross_entropy,
        build=loss,
        expected=lambda call: _plain_linear_cross_entropy(*widened(call[0])),
        tolerance=TOLERANCES["linear_cross_entropy"],
        flops=4.0 * rows * vocab * hidden,
        compiled=_plain_linear_cross_entropy,
        peers={
            "torch whole logits": lambda args: partial(_plain_linear_cross_entropy, *args),
            "liger": _liger_linear_cross_entropy,
            "cut_cross_entropy": _cut_cross_entropy,
        },
    )


def _parameter_cases(shape: ModelShape) -> Iterator[Case]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    whole = hidden * inner

    def adamw(split: bool, eight_bit: bool, device: torch.device, small: bool) -> Call:
        made, n = _Operands(device), min(SMALL_ELEMENTS, whole) if small else whole
        weight, gradient = (made.normal(n, dtype=torch.float32, spread=s) for s in (0.02, 1e-3))
        high, low = ops.split_fp32(weight) if split else (weight, None)
        moments = (Moments8Bit if eight_bit else Moments).zeros(n, device)
        return (high, low, gradient, moments), dict(ADAMW)

    def exact_adamw(eight_bit: bool, call: Call) -> Sequence[Tensor]:
        if eight_bit:  # the codes' rounding is part of the specification
            args = copied(call[0])
            adamw_reference.adamw_(*args, **call[1])
            return [_value(args)]
        weight, gradient = _value(call[0]).double(), call[0][2].double()
        (b1, b2), step, lr = ADAMW["betas"], ADAMW["step"], ADAMW["lr"]
        m, v = (1 - b1) * gradient, (1 - b2) * gradient.square()
        size = (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + ADAMW["eps"])
        return [weight * (1 - lr * ADAMW["weight_decay"]) - lr * size, m, v]

    def stepped(eight_bit: bool, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        OPERATIONS["adamw_"](*args, **kwargs)
        return [_value(args)] if eight_bit else [_value(args), args[3].m, args[3].v]

    for form, split, eight_bit, per_element in (
        ("fp32", False, False, 28.0),
        ("split", True, False, 28.0),
        ("split, 8-bit moments", True, True, 16.0),
    ):
        yield Case(
            op="adamw_",
            form=f"{form}, {whole} elements",
            function=_AdamW(partial(stepped, eight_bit)),
            build=partial(adamw, split, eight_bit),
            expected=partial(exact_adamw, eight_bit),
            tolerance=1e-5,
            num_bytes=per_element * whole,
            peers={"bitsandbytes": _bitsandbytes_adamw} if eight_bit else {"torch fused": _torch_adamw},
        )

    def flat(device: torch.device, small: bool) -> Call:
        return (_Operands(device).normal(min(SMALL_ELEMENTS, whole) if small else whole, dtype=torch.float32),), {}

    def change(device: torch.device, small: bool) -> Call:
        made, rows = _Operands(device), min(SMALL_ROWS, hidden) if small else hidden
        end, start = (made.normal(rows, inner, dtype=torch.float32) for _ in range(2))
        return (end, start, made.normal(rows, inner, dtype=torch.float32), 0.5), {}

    def codes(device: torch.device, small: bool) -> Call:
        x = change(device, small)[0][0]
        index = torch.arange(0, len(x), 4, device=device)
        return (x, index, x[index].abs().amax(1) / 127), {}

    kept = -(-hidden // 4) * inner
    for op, build, changed, wide, num_bytes in (
        ("square_norm", flat, (), True, 4.0 * whole),
        ("delta_rows", change, (), False, 16.0 * whole),
        ("delta_codes", codes, (0,), False, 9.0 * kept),
    ):
        yield Case(
            op=op,
            form=f"{hidden} x {inner}",
            function=OPERATIONS[op],
            build=build,
            expected=by_reference(op, changed, wide=wide),
            changed=changed,
            num_bytes=num_bytes,
            compiled=OPERATIONS[op].reference,
        )


class _AdamW:
    """The step; for the comparison with its results, for timing without."""

    def __init__(self, with_results: Callable[..., Sequence[Tensor]]) -> None:
        self._with_results = with_results
        self.timed = OPERATIONS["adamw_"]

    def __call__(self, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        return self._with_results(*args, **kwargs)


def _value(args: Sequence[Any]) -> Tensor:
    return args[0] if args[1] is None else ops.merge_split(args[0], args[1])


def _linear_cross_entropy(h: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    rows = h.detach().requires_grad_()
    loss = ops.linear_cross_entropy(rows, weight, target, 1 / len(target))
    return loss.detach(), torch.autograd.grad(loss, rows)[0]


def _plain_linear_cross_entropy(h: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    rows = h.detach().requires_grad_()
    logits = torch.nn.functional.linear(rows, weight)
    loss = torch.nn.functional.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, target)
    return loss.detach(), torch.autograd.grad(loss, rows)[0]


def _plain_cross_entropy(logits: Tensor, target: Tensor, *, gradient: bool) -> Tensor:
    """The same as one expression, which a compiler can fuse."""
    assert gradient
    wide = logits.float()
    total = torch.logsumexp(wide, dim=1)
    picked = wide.gather(1, target.unsqueeze(1)).squeeze(1)
    probabilities = torch.exp(wide - total.unsqueeze(1))
    logits.copy_(probabilities.scatter_add(1, target.unsqueeze(1), torch.full_like(target, -1).unsqueeze(1).float()))
    return total - picked


# Peers


def _bitsandbytes_dequant(args: tuple[Any, ...]) -> Callable[[], object]:
    from bitsandbytes import functional

    weight = torch.randn(args[6].shape, device=args[6].device, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return lambda: functional.dequantize_4bit(packed, state)


def _bitsandbytes_linear(args: tuple[Any, ...]) -> Callable[[], object]:
    import bitsandbytes
    from bitsandbytes import functional

    x, parts = args
    rows = sum(part.shape[0] for part in parts)
    weight = torch.randn(rows, x.shape[1], device=x.device, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)


def _bitsandbytes_adamw(args: tuple[Any, ...]) -> Callable[[], object]:
    import bitsandbytes

    return _optimizer_step(bitsandbytes.optim.AdamW8bit, args)


def _torch_adamw(args: tuple[Any, ...]) -> Callable[[], object]:
    return _optimizer_step(partial(torch.optim.AdamW, fused=True), args)


def _optimizer_step(make: Callable[..., torch.optim.Optimizer], args: tuple[Any, ...]) -> Callable[[], object]:
    parameter = torch.nn.Parameter(_value(args).detach().float().clone())
    parameter.grad = args[2].clone()
    optimizer = make([parameter], lr=ADAMW["lr"], betas=ADAMW["betas"], weight_decay=ADAMW["weight_decay"])
    return optimizer.step


def _liger_norm(args: tuple[Any, ...]) -> Callable[[], object]:
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda: liger_rms_norm(args[0], args[2], EPS)


def _liger_rope(args: tuple[Any, ...]) -> Callable[[], object]:
    from liger_kernel.transformers.functional import liger_rope

    by_head = args[0].transpose(0, 1).unsqueeze(0).contiguous()
    heads = by_head.shape[1] * 2 // 3
    q, k = by_head[:, :heads].contiguous(), by_head[:, heads:].contiguous()
    cos, sin = args[1].unsqueeze(0), args[2].unsqueeze(0)
    return lambda: liger_rope(q, k, cos, sin)


def _liger_swiglu(args: tuple[Any, ...]) -> Callable[[], object]:
    from liger_kernel.transformers.functional import liger_swiglu

    gate, up = (half.contiguous() for half in args[0].chunk(2, dim=-1))
    return lambda: liger_swiglu(gate, up)


def _liger_cross_entropy(args: tuple[Any, ...]) -> Callable[[], object]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    logits = args[0].detach().requires_grad_()
    return lambda: liger_cross_entropy(logits, args[1])


def _liger_linear_cross_entropy(args: tuple[Any, ...]) -> Callable[[], object]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    rows = args[0].detach().requires_grad_()

    def run() -> object:
        return torch.autograd.grad(liger_fused_linear_cross_entropy(rows, args[1], args[2]), rows)

    return run


def _cut_cross_entropy(args: tuple[Any, ...]) -> Callable[[], object]:
    from cut_cross_entropy import linear_cross_entropy

    rows = args[0].detach().requires_grad_()
    return lambda: torch.autograd.grad(linear_cross_entropy(rows, args[1], args[2]), rows)


# Judging and timing


def judged(case: Case, rung: str, device: torch.device) -> dict[str, Any]:
    """``ok`` with the error, ``wrong``, ``missing`` with what the rung says, or ``error``."""
    try:
        with DISPATCHER.demanding(rung):  # type: ignore[arg-type]
            got = case.results(device)
        error = largest_error(got, case.expected(case.build(device, True)))
    except BackendError as refused:
        return {"status": "missing", "reason": str(refused)}
    except Exception as failed:  # noqa: BLE001 - one rung's failure must not end the run
        return {"status": "error", "reason": describe_error(failed)}
    found = {"error": error, "tolerance": case.tolerance}
    if not error <= case.tolerance:
        return {"status": "wrong", "reason": f"largest error {error:.2e}, allowed {case.tolerance:.1e}", **found}
    return {"status": "ok", **found}


def measure_case(
    case: Case,
    timer: Timer,
    peaks: Peaks,
    budget: Budget,
    *,
    shape: str,
    compile_with: str | None,
    why_not: str = "",
    lost: Collection[tuple[str, str]] = (),
) -> list[dict[str, Any]]:
    """One row for each rung and each peer.

    Args:
        compile_with: backend of torch.compile; None: not here, for the reason ``why_not``.
        lost: operations and backends that left the device unusable before; they are not tried again.

    Raises:
        DeviceLostError: one did so now; its rows are those of this case.
    """
    device = timer.device
    common = {"op": case.op, "shape": shape, "form": case.form, "bytes": case.num_bytes, "flops": case.flops}
    rows: dict[str, dict[str, Any]] = {}

    def check(names: Iterable[str]) -> None:
        failed = [name for name in names if rows[name]["status"] == "error"]
        if failed and not usable(device):
            rows[failed[0]]["reason"] += "; the device was unusable afterwards"
            for name in rows.keys() - failed:
                if rows[name]["status"] == "ok" and "median_s" not in rows[name]:
                    rows[name] |= {"status": "error", "reason": f"not measured: the device was lost to {failed[0]}"}
            raise DeviceLostError((case.op, failed[0]), [{**common, "backend": n, **row} for n, row in rows.items()])

    gone = {"status": "error", "reason": "left the device unusable before"}
    for rung in RUNGS:
        rows[rung] = dict(gone) if (case.op, rung) in lost else judged(case, rung, device)
        check([rung] if rows[rung] != gone else [])
    candidates: dict[str, Candidate] = {}
    try:
        args, kwargs = case.build(device, False)
    except Exception as error:  # noqa: BLE001 - out of memory, for one
        reason = {"status": "error", "reason": describe_error(error)}
        rows = {name: row if row["status"] != "ok" else {**row, **reason} for name, row in rows.items()}
        args, kwargs = (), {}
    function = getattr(case.function, "timed", case.function)
    for rung, row in rows.items():
        if row["status"] == "ok":
            run = partial(function, *args, **kwargs)
            candidates[rung] = Candidate(run, partial(DISPATCHER.demanding, rung))  # type: ignore[arg-type]
    for name, make in _peers(case, kwargs, compile_with, why_not).items() if args else ():
        if (case.op, name) in lost:
            rows[name] = dict(gone)
            continue
        try:
            run = make(args) if callable(make) else None
            if run is None:
                rows[name] = {"status": "missing", "reason": make}
                continue
            run()  # compiles
            candidates[name], rows[name] = Candidate(run), {"status": "ok"}
        except ImportError as error:
            rows[name] = {"status": "missing", "reason": describe_error(error)}
        except Exception as error:  # noqa: BLE001 - a peer may raise anything
            rows[name] = {"status": "error", "reason": describe_error(error)}
            check([name])
    samples, errors = timer.interleaved(candidates, seconds=budget.left_s)
    for name, found in samples.items():
        times = spread(found)
        rows[name] |= times | _rates(case, times["median_s"], peaks)
    for name, reason in errors.items():
        rows[name] |= {"status": "error", "reason": reason}
    check(errors)
    return [{**common, "backend": name, **row} for name, row in rows.items()]


def _peers(case: Case, kwargs: dict[str, Any], compile_with: str | None, why_not: str) -> dict[str, Peer | str]:
    found: dict[str, Peer | str] = dict(case.peers)
    if case.compiled is None:
        return found
    if compile_with is None:
        return found | {"torch.compile": why_not}

    def compiled(args: tuple[Any, ...]) -> Callable[[], object]:
        return partial(torch.compile(case.compiled, dynamic=False, backend=compile_with), *args, **kwargs)

    return found | {"torch.compile": compiled}


def _rates(case: Case, median: float, peaks: Peaks) -> dict[str, float]:
    if case.flops:
        return {"flops_per_s": case.flops / median, "share_of_peak": case.flops / median / peaks.gemm_flops_per_s}
    return {"bytes_per_s": case.num_bytes / median, "share_of_peak": case.num_bytes / median / peaks.copy_bytes_per_s}


def measure_operations(
    shapes: Mapping[str, ModelShape],
    timer: Timer,
    peaks: Peaks,
    budget: Budget,
    *,
    tokens: int,
    compile_with: str,
    say: Callable[[str], None] = print,
    done: Sequence[dict[str, Any]] = (),
    lost: Collection[tuple[str, str]] = (),
) -> list[dict[str, Any]]:
    """All cases of all shapes; what the budget leaves out has a row that says so.

    Args:
        done: rows of an earlier process, whose cases are not measured again.
        lost: see :func:`measure_case`.

    Raises:
        DeviceLostError: with all rows so far.
    """
    rows: list[dict[str, Any]] = list(done)
    measured = {(row["shape"], row["op"], row["form"]) for row in done}
    todo = [
        (name, case)
        for name, shape in shapes.items()
        for case in cases(shape, tokens)
        if (name, case.op, case.form) not in measured
    ]
    first = next(iter(shapes))
    compile_until = COMPILE_SHARE * budget.left_s
    for place, (name, case) in enumerate(todo):
        if budget.spent:
            rows += [
                {
                    "op": case.op,
                    "shape": name,
                    "form": case.form,
                    "backend": rung,
                    "status": "skipped",
                    "reason": "the time budget of this part is spent",
                }
                for rung in RUNGS
            ]
            continue
        try:
            found = measure_case(
                case,
                timer,
                peaks,
                budget.part(0.5 / (len(todo) - place)),
                shape=name,
                compile_with=compile_with if name == first and budget.left_s > compile_until else None,
                why_not=f"compiled for {first} alone, and in half of the time at most",
                lost=lost,
            )
        except DeviceLostError as error:
            raise DeviceLostError(error.culprit, [*rows, *error.rows]) from error
        rows += found
        say("  " + operation_line(found))
        if timer.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def operation_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """One case for people: microseconds of each backend, or why there are none."""
    cells = [
        f"{row['backend']} {row['median_s'] * 1e6:.0f} us ({row['share_of_peak']:.0%})"
        if "median_s" in row
        else f"{row['backend']} {row['status']}"
        for row in rows
    ]
    return f"{rows[0]['shape']:<8} {rows[0]['op']:<20} {rows[0]['form']:<28} " + ", ".join(cells)
