"""Under which schemas does torch know the operations? Registered with torch.library under ``fedblocks::``.

Each has a check of shapes and dtypes that runs without data, so that a wrong call is an error that names the value; the
functional ones have their backward pass. ``ops.py`` calls the same functions with less overhead; these are for
torch.compile, torch.export and whoever inspects a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from fedblocks.kernels import delta, head, nf4, optimizer, pointwise
from fedblocks.kernels.reference import nf4 as _nf4
from fedblocks.kernels.reference.adamw import Moments, Moments8Bit

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)

# Defined through Library, not custom_op: the first call of such an op imports the compiler, 67 MiB and 1.5 s.
_LIBRARY = torch.library.Library("fedblocks", "FRAGMENT")
_NF4_ARGS = "Tensor packed, Tensor absmax, Tensor nested_code, Tensor nested_absmax, Tensor code, float offset"
_LIBRARY.define(f"nf4_dequant({_NF4_ARGS}, SymInt[] shape, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"nf4_dequant_into({_NF4_ARGS}, Tensor(a!) out) -> ()")


@torch.library.impl(_LIBRARY, "nf4_dequant", "CompositeExplicitAutograd")
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor,
    nested_absmax: Tensor,
    code: Tensor,
    offset: float,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    out = packed.new_empty(shape, dtype=dtype)
    nf4.nf4_dequant(packed, absmax, nested_code, nested_absmax, code, offset, out)
    return out


@torch.library.register_fake("fedblocks::nf4_dequant", lib=_LIBRARY)
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor,
    nested_absmax: Tensor,
    code: Tensor,
    offset: float,  # noqa: ARG001
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    _check_nf4(packed, absmax, nested_code, nested_absmax, code, shape, dtype)
    return packed.new_empty(shape, dtype=dtype)


_LIBRARY.impl("nf4_dequant_into", nf4.nf4_dequant, "CompositeExplicitAutograd")


@torch.library.register_fake("fedblocks::nf4_dequant_into", lib=_LIBRARY)
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor,
    nested_absmax: Tensor,
    code: Tensor,
    offset: float,  # noqa: ARG001
    out: Tensor,
) -> None:
    _check_nf4(packed, absmax, nested_code, nested_absmax, code, list(out.shape), out.dtype)


def _check_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor,
    nested_absmax: Tensor,
    code: Tensor,
    shape: list[int],
    dtype: torch.dtype,
) -> None:
    check = torch._check  # noqa: SLF001 - torch.library's documented way to check shapes under fake tensors
    check(len(shape) == 2, lambda: f"nf4_dequant: shape is {shape}, expected two sizes")
    n = shape[0] * shape[1]
    groups = (n + _nf4.BLOCKSIZE - 1) // _nf4.BLOCKSIZE
    nested = (groups + _nf4.NESTED_BLOCKSIZE - 1) // _nf4.NESTED_BLOCKSIZE
    for name, part, length in (
        ("packed", packed, (n + 1) // 2),
        ("absmax", absmax, groups),
        ("nested_code", nested_code, 256),
        ("nested_absmax", nested_absmax, nested),
        ("code", code, 16),
    ):
        check(
            part.dim() == 1 and part.shape[0] == length,
            lambda name=name, part=part, length=length: (
                f"nf4_dequant: {name} has shape {tuple(part.shape)}, expected ({length},) for a weight of {shape}"
            ),
        )
    check(dtype in FLOATS, lambda: f"nf4_dequant: dtype is {dtype}, expected one of {FLOATS}")


def _define(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> None:
    name = "fedblocks::" + schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name.split("::")[1], function, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=save, lib=_LIBRARY)


def _check(condition: bool, op: str, text: str) -> None:
    torch._check(condition, lambda: f"{op}: {text}")  # noqa: SLF001 - the documented way under fake tensors


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- norm ----


def _check_norm(op: str, s: Tensor, weight: Tensor) -> None:
    _check(
        weight.dim() == 1 and weight.shape[0] == s.shape[-1],
        op,
        f"weight has shape {tuple(weight.shape)}, expected ({s.shape[-1]},) for rows of {tuple(s.shape)}",
    )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = pointwise.add_rms_norm(x.contiguous(), None, weight, eps)
    return y, rstd


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    _check_norm("rms_norm", x, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=_wide(x))


def _rms_norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def _rms_norm_gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    x, weight, rstd = ctx.saved_tensors
    return *torch.ops.fedblocks.rms_norm_backward(dy, None, x, weight, rstd), None


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return pointwise.add_rms_norm(x.contiguous(), residual.contiguous(), weight, eps)


def _add_rms_norm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm("add_rms_norm", x, weight)
    _check(x.shape == residual.shape, "add_rms_norm", f"x {tuple(x.shape)} and residual {tuple(residual.shape)} differ")
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=_wide(x))


def _add_rms_norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.mark_non_differentiable(output[2])


def _add_rms_norm_gradients(ctx: Any, dy: Tensor, ds: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    dx, dw = torch.ops.fedblocks.rms_norm_backward(dy, ds, *ctx.saved_tensors)
    return dx, dx, dw, None


def _rms_norm_backward(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    upstream = None if ds is None else ds.contiguous()
    dx, dw = pointwise.rms_norm_backward(
        dy.contiguous(), upstream, s.contiguous(), weight, rstd, need_dx=True, need_dw=True
    )
    assert dx is not None
    assert dw is not None
    return dx, dw


def _rms_norm_backward_fake(
    dy: Tensor,
    ds: Tensor | None,  # noqa: ARG001
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    _check_norm("rms_norm_backward", s, weight)
    _check(dy.shape == s.shape, "rms_norm_backward", f"dy has shape {tuple(dy.shape)}, expected {tuple(s.shape)}")
    return s.new_empty(s.shape), weight.new_empty(weight.shape)


_define(
    "rms_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _rms_norm_backward,
    _rms_norm_backward_fake,
)
_define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm,
    _rms_norm_fake,
    _rms_norm_gradients,
    _rms_norm_save,
)
_define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_rms_norm,
    _add_rms_norm_fake,
    _add_rms_norm_gradients,
    _add_rms_norm_save,
)


# ---- rotation and gate ----


def _check_rope(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    _check(
        x.dim() == 3 and cos.dim() == 2 and cos.shape == sin.shape and cos.shape[1] == x.shape[2] and len(cos) > 0,
        op,
        f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}, expected (tokens, heads, hd) and (P, hd)",
    )


def _rope_in_place(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    pointwise.rope_(x, cos, sin, inverse=inverse)


def _rope_in_place_fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:  # noqa: ARG001
    _check_rope("rope_", x, cos, sin)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    pointwise.rope_(y, cos, sin, inverse=inverse)
    return y


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:  # noqa: ARG001
    _check_rope("rope", x, cos, sin)
    return x.new_empty(x.shape)


def _rope_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.inverse = inputs[3]


def _rope_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.fedblocks.rope(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None


def _swiglu(gate_up: Tensor) -> Tensor:
    return pointwise.swiglu(gate_up.contiguous())


def _swiglu_fake(gate_up: Tensor) -> Tensor:
    _check(
        gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0,
        "swiglu",
        f"gate_up has shape {tuple(gate_up.shape)}, expected (rows, 2·width)",
    )
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _swiglu_backward_in_place(dh: Tensor, gate_up: Tensor) -> Tensor:
    h = pointwise.swiglu_backward_(dh.contiguous(), gate_up, need_h=True)
    assert h is not None
    return h


def _swiglu_backward_in_place_fake(dh: Tensor, gate_up: Tensor) -> Tensor:
    _check(
        dh.dim() == 2 and gate_up.shape == (dh.shape[0], 2 * dh.shape[1]),
        "swiglu_backward_",
        f"dh has shape {tuple(dh.shape)}, gate_up {tuple(gate_up.shape)}, expected (rows, width), (rows, 2·width)",
    )
    return dh.new_empty(dh.shape)


def _swiglu_backward(dh: Tensor, gate_up: Tensor) -> Tensor:
    d_gate_up = gate_up.clone(memory_format=torch.contiguous_format)
    pointwise.swiglu_backward_(dh.contiguous(), d_gate_up, need_h=False)
    return d_gate_up


def _swiglu_backward_fake(dh: Tensor, gate_up: Tensor) -> Tensor:
    _swiglu_backward_in_place_fake(dh, gate_up)
    return gate_up.new_empty(gate_up.shape)


def _swiglu_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0])


def _swiglu_gradients(ctx: Any, dh: Tensor) -> Tensor:
    return torch.ops.fedblocks.swiglu_backward(dh, *ctx.saved_tensors)


_define("rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse) -> ()", _rope_in_place, _rope_in_place_fake)
_define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor", _rope, _rope_fake, _rope_gradients, _rope_save
)
_define("swiglu_backward(Tensor dh, Tensor gate_up) -> Tensor", _swiglu_backward, _swiglu_backward_fake)
_define(
    "swiglu_backward_(Tensor dh, Tensor(a!) gate_up) -> Tensor",
    _swiglu_backward_in_place,
    _swiglu_backward_in_place_fake,
)
_define("swiglu(Tensor gate_up) -> Tensor", _swiglu, _swiglu_fake, _swiglu_gradients, _swiglu_save)


# ---- head: the matrix is frozen, its gradient is never made ----


def _check_rows(op: str, logits: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        _check(
            len(other) == len(logits),
            op,
            f"{name} has shape {tuple(other.shape)}, expected {len(logits)} rows, those of {tuple(logits.shape)}",
        )


def _cross_entropy(logits: Tensor, target: Tensor, gradient: bool) -> Tensor:
    return head.cross_entropy_(logits, target, gradient=gradient)


def _cross_entropy_fake(logits: Tensor, target: Tensor, gradient: bool) -> Tensor:  # noqa: ARG001
    _check_rows("cross_entropy_", logits, target=target)
    return logits.new_empty(len(logits), dtype=_wide(logits))


def _kl_topk(logits: Tensor, ids: Tensor, logp: Tensor, log_tail: Tensor, gradient: bool) -> Tensor:
    return head.kl_topk_(logits, ids, logp, log_tail, gradient=gradient)


def _kl_topk_fake(
    logits: Tensor,
    ids: Tensor,
    logp: Tensor,
    log_tail: Tensor,
    gradient: bool,  # noqa: ARG001
) -> Tensor:
    _check_rows("kl_topk_", logits, ids=ids, logp=logp, log_tail=log_tail)
    return logits.new_empty(len(logits), dtype=_wide(logits))


def _linear_cross_entropy(h: Tensor, weight: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return head.cross_entropy_with_gradient(h.contiguous(), weight, target, scale)


def _linear_cross_entropy_fake(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    _check_head("linear_cross_entropy", h, weight)
    _check_rows("linear_cross_entropy", h, target=target)
    return h.new_empty((), dtype=_wide(h)), h.new_empty(h.shape)


def _linear_kl_topk(
    h: Tensor, weight: Tensor, ids: Tensor, logp: Tensor, log_tail: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return head.kl_topk_with_gradient(h.contiguous(), weight, ids, logp, log_tail, scale)


def _linear_kl_topk_fake(
    h: Tensor,
    weight: Tensor,
    ids: Tensor,
    logp: Tensor,
    log_tail: Tensor,
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    _check_head("linear_kl_topk", h, weight)
    _check_rows("linear_kl_topk", h, ids=ids, logp=logp, log_tail=log_tail)
    return h.new_empty((), dtype=_wide(h)), h.new_empty(h.shape)


def _check_head(op: str, h: Tensor, weight: Tensor) -> None:
    _check(
        h.dim() == 2 and weight.dim() == 2 and h.shape[1] == weight.shape[1] and h.dtype == weight.dtype,
        op,
        f"h is {h.dtype} {tuple(h.shape)}, the head {weight.dtype} {tuple(weight.shape)}, expected (N, H) and (V, H)",
    )


def _loss_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.num_inputs = len(inputs)


def _loss_gradients(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (dh,) = ctx.saved_tensors
    return (dh * upstream).to(dh.dtype), *(None,) * (ctx.num_inputs - 1)


_define(
    "cross_entropy_(Tensor(a!) logits, Tensor target, bool gradient) -> Tensor", _cross_entropy, _cross_entropy_fake
)
_define(
    "kl_topk_(Tensor(a!) logits, Tensor ids, Tensor logp, Tensor log_tail, bool gradient) -> Tensor",
    _kl_topk,
    _kl_topk_fake,
)
_define(
    "linear_cross_entropy(Tensor h, Tensor weight, Tensor target, float scale) -> (Tensor, Tensor)",
    _linear_cross_entropy,
    _linear_cross_entropy_fake,
    _loss_gradients,
    _loss_save,
)
_define(
    "linear_kl_topk(Tensor h, Tensor weight, Tensor ids, Tensor logp, Tensor log_tail, float scale)"
    " -> (Tensor, Tensor)",
    _linear_kl_topk,
    _linear_kl_topk_fake,
    _loss_gradients,
    _loss_save,
)


# ---- products with an NF4 matrix ----


def _part(parts: tuple[Any, ...], shape: tuple[int, int]) -> tuple[_nf4.Nf4Weight, ...]:
    names = ("packed", "absmax", "nested_code", "nested_absmax", "code", "offset")
    return (_nf4.Nf4Weight(**dict(zip(names, parts, strict=True)), shape=shape),)


def _nf4_linear(x: Tensor, *parts_and_rows: Any) -> Tensor:
    *parts, rows = parts_and_rows
    return nf4.matmul(x, _part(tuple(parts), (rows, x.shape[1])), None)


def _nf4_linear_fake(x: Tensor, *parts_and_rows: Any) -> Tensor:
    *parts, rows = parts_and_rows
    _check_nf4(*parts[:5], [rows, x.shape[1]], x.dtype)
    return x.new_empty(len(x), rows)


def _nf4_linear_dgrad(dy: Tensor, *parts_and_cols: Any) -> Tensor:
    *parts, cols = parts_and_cols
    return nf4.matmul_dgrad(dy, _part(tuple(parts), (dy.shape[1], cols)))


def _nf4_linear_dgrad_fake(dy: Tensor, *parts_and_cols: Any) -> Tensor:
    *parts, cols = parts_and_cols
    _check_nf4(*parts[:5], [dy.shape[1], cols], dy.dtype)
    return dy.new_empty(len(dy), cols)


def _nf4_linear_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:6])
    ctx.offset, ctx.cols = inputs[6], inputs[0].shape[1]


def _nf4_linear_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.ops.fedblocks.nf4_linear_dgrad(dy, *ctx.saved_tensors, ctx.offset, ctx.cols)
    return dx, *(None,) * 7


_define(f"nf4_linear_dgrad(Tensor dy, {_NF4_ARGS}, SymInt cols) -> Tensor", _nf4_linear_dgrad, _nf4_linear_dgrad_fake)
_define(
    f"nf4_linear(Tensor x, {_NF4_ARGS}, SymInt rows) -> Tensor",
    _nf4_linear,
    _nf4_linear_fake,
    _nf4_linear_gradients,
    _nf4_linear_save,
)


# ---- optimizer and delta ----


def _adamw(
    weight: Tensor,
    low: Tensor | None,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor | None,
    v_scale: Tensor | None,
    step: int,
    lr: float,
    betas: list[float],
    eps: float,
    weight_decay: float,
) -> None:
    moments: Moments | Moments8Bit = Moments(m=m, v=v)
    if m_scale is not None and v_scale is not None:
        moments = Moments8Bit(m=m, v=v, m_scale=m_scale, v_scale=v_scale)
    optimizer.adamw_step_(
        weight,
        low,
        gradient,
        moments,
        step=step,
        lr=lr,
        betas=(betas[0], betas[1]),
        eps=eps,
        weight_decay=weight_decay,
    )


def _adamw_fake(weight: Tensor, low: Tensor | None, gradient: Tensor, m: Tensor, v: Tensor, *_: Any) -> None:
    for name, other in (("low", low), ("gradient", gradient), ("m", m), ("v", v)):
        _check(
            other is None or other.shape == weight.shape,
            "adamw_",
            f"{name} has shape {None if other is None else tuple(other.shape)}, expected {tuple(weight.shape)}",
        )


def _delta_rows(
    end: Tensor, start: Tensor, residual: Tensor | None, cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return delta.delta_rows(end, start, residual, cap)


def _delta_rows_fake(
    end: Tensor,
    start: Tensor,
    residual: Tensor | None,
    cap: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for name, other in (("start", start), ("residual", residual)):
        _check(
            other is None or other.shape == end.shape,
            "delta_rows",
            f"{name} has shape {None if other is None else tuple(other.shape)}, expected {tuple(end.shape)}",
        )
    rows = len(end)
    return (
        end.new_empty(end.shape),
        end.new_empty(rows, dtype=torch.float64),
        end.new_empty(rows),
        end.new_empty(rows, dtype=torch.int32),
    )


_define(
    "adamw_(Tensor(a!) weight, Tensor(b!)? low, Tensor gradient, Tensor(c!) m, Tensor(d!) v, Tensor(e!)? m_scale, "
    "Tensor(f!)? v_scale, int step, float lr, float[] betas, float eps, float weight_decay) -> ()",
    _adamw,
    _adamw_fake,
)
_define(
    "square_norm(Tensor value) -> Tensor",
    lambda value: optimizer.square_norm(value),
    lambda value: value.new_empty(2, dtype=torch.float32),
)
_define(
    "delta_rows(Tensor end, Tensor start, Tensor? residual, float cap) -> (Tensor, Tensor, Tensor, Tensor)",
    _delta_rows,
    _delta_rows_fake,
)
_define(
    "delta_codes(Tensor(a!) x, Tensor index, Tensor scale) -> Tensor",
    lambda x, index, scale: delta.delta_codes(x, index, scale),
    lambda x, index, scale: x.new_empty(len(index), x.shape[1], dtype=torch.int8),  # noqa: ARG005
)
