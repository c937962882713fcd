"""Which device kernels are there, what do they take, and in which variants are they compiled ahead of time?

Pure data: nothing here imports Triton. The launches of ``launches.py`` name a kernel of this catalog and one of its
variants; a pack holds the compiled form of exactly these (runtime.md 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

DTYPES: Final = ("bf16", "fp16", "fp32")
"""What T may stand for in a kernel's parameters, in Triton's names."""
PACKED_DTYPES: Final = ("bf16", "fp16")
"""Those that packs carry; a GPU that computes in fp32 uses the JIT or torch."""

TARGETS: Final = (80, 86, 87, 89, 90, 120)
"""Compute capabilities that packs are built for: A100, GeForce 30, Orin, GeForce 40, H100/H200, GeForce 50."""
COMPILED_ONLY: Final = (110,)
"""Capabilities whose compilation is checked but not shipped (Thor: the JIT, else torch)."""


@dataclass(frozen=True, slots=True)
class Param:
    """One runtime argument.

    A pointer type begins with ``*``; ``*T`` is a pointer to the variant's dtype. The aligned form of a variant assumes
    that every pointer, and every integer marked ``by_16``, is divisible by 16.
    """

    name: str
    type: str
    by_16: bool = False

    @property
    def is_pointer(self) -> bool:
        """True for an address."""
        return self.type.startswith("*")

    def resolved(self, dtype: str) -> str:
        """The type with T replaced."""
        return self.type.replace("T", dtype)


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of a kernel: what T is, the compile-time numbers, the warps of a program."""

    dtype: str
    constexprs: tuple[tuple[str, int], ...]
    num_warps: int

    @property
    def name(self) -> str:
        """``bf16-BLOCK_1024-w4``."""
        numbers = "".join(f"-{name}_{value}" for name, value in self.constexprs)
        return f"{self.dtype}{numbers}-w{self.num_warps}"


def variant(dtype: str, num_warps: int, **constexprs: int) -> Variant:
    """A variant from keyword arguments; booleans become 0 and 1."""
    return Variant(dtype, tuple((name, int(value)) for name, value in sorted(constexprs.items())), num_warps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One Triton function.

    Args:
        module: file of ``sources/`` that holds it.
        variants: those that packs carry; a launch may ask for another, which only the JIT can give.
        dots: it multiplies matrices and must do so with the tensor cores in bf16 and fp16.
        general: packs carry, beside the form for arguments divisible by 16, one for any: where arguments that are not
            do occur (an odd vocabulary, the rows of a small tensor). The other kernels leave such calls to the JIT or
            to torch.
    """

    name: str
    module: str
    params: tuple[Param, ...]
    variants: tuple[Variant, ...]
    dots: bool = False
    general: bool = False

    def signature(self, dtype: str) -> dict[str, str]:
        """Parameter name -> type."""
        return {param.name: param.resolved(dtype) for param in self.params}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


# ---- tile choices, read by the launches and by the variants below ----

NF4_BLOCK: Final = 512
ROW_BLOCKS: Final = (128, 1024, 2048, 4096, 8192)
"""Tiles that hold a whole row: 128 for the norms of single heads, the others for hidden sizes."""
SWIGLU_BLOCK: Final = 1024
VOCAB_BLOCK: Final = 4096
TOP_BLOCK: Final = 32
ROPE_HEADS: Final = 8
ROPE_HALVES: Final = (32, 64)
ADAMW_BLOCK: Final = 1024
NORM_BLOCK: Final = 4096
DELTA_BLOCK: Final = 1024
GEMM_M: Final = 64
GEMM_N: Final = 64
GEMM_GROUP: Final = 8


def row_block(num_cols: int) -> int:
    """Tile of a kernel that holds a whole row; a row wider than all of them gets one that no pack has."""
    return next((block for block in ROW_BLOCKS if block >= num_cols), power_of_two(num_cols))


def row_warps(block: int) -> int:
    """Warps of such a kernel: 8 columns a thread, 4 to 16 warps."""
    return max(4, min(16, block // 256))


def _pointers(*names_types: str) -> tuple[Param, ...]:
    return tuple(Param(*pair.split(":")) for pair in names_types)


def _each(values: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    return ((dtype, value) for dtype in PACKED_DTYPES for value in values)


_NF4 = _pointers("packed:*u8", "absmax:*u8", "nested_code:*fp32", "nested_absmax:*fp32", "code:*fp32")


def _adamw(name: str, *, split: bool, eight_bit: bool) -> Kernel:
    weight, moment = "i16" if split else "fp32", "u8" if eight_bit else "fp32"
    return Kernel(
        name=name,
        module="optimizer",
        general=True,
        params=(
            *_pointers(f"weight:*{weight}", "low:*i16", "gradient:*fp32", f"m:*{moment}", f"v:*{moment}"),
            *_pointers("m_scale:*fp32", "v_scale:*fp32", "dither_table:*i32", "hyper:*fp32"),
            Param("n", "i64"),
            Param("dither_step", "i32"),
        ),
        variants=(variant("fp32", 4, SPLIT=split, EIGHT_BIT=eight_bit, BLOCK=ADAMW_BLOCK),),
    )


_KERNELS = (
    Kernel(
        name="nf4_dequant",
        module="nf4",
        general=True,
        params=(*_NF4, Param("out", "*T"), Param("offset", "fp32"), Param("num_elements", "i64")),
        variants=tuple(variant(dtype, 4, BLOCK=NF4_BLOCK) for dtype in DTYPES),
    ),
    Kernel(
        name="add_rms_norm",
        module="pointwise",
        params=(
            *_pointers("x:*T", "residual:*T", "weight:*T", "y:*T", "s:*T", "rstd:*fp32"),
            Param("num_cols", "i32", by_16=True),
            Param("eps", "fp32"),
        ),
        variants=tuple(
            variant(dtype, row_warps(block), HAS_RESIDUAL=residual, BLOCK=block)
            for dtype, block in _each(ROW_BLOCKS)
            for residual in (False, True)
        ),
    ),
    Kernel(
        name="rms_norm_backward",
        module="pointwise",
        params=(
            *_pointers("dy:*T", "ds:*T", "s:*T", "weight:*T", "rstd:*fp32", "dx:*T", "dw_partial:*fp32"),
            Param("num_rows", "i32"),
            Param("num_cols", "i32", by_16=True),
        ),
        variants=tuple(
            variant(dtype, row_warps(block), HAS_DS=ds, HAS_DW=dw, BLOCK=block)
            for dtype, block in _each(ROW_BLOCKS)
            for ds in (False, True)
            for dw in (False, True)
        ),
    ),
    Kernel(
        name="rope_",
        module="pointwise",
        params=(
            *_pointers("x:*T", "cos:*T", "sin:*T"),
            Param("token_stride", "i32", by_16=True),
            Param("num_heads", "i32"),
            Param("num_positions", "i32"),
            Param("half", "i32", by_16=True),
        ),
        variants=tuple(
            variant(dtype, 4, INVERSE=inverse, BLOCK_HEADS=ROPE_HEADS, BLOCK_HALF=half)
            for dtype, half in _each(ROPE_HALVES)
            for inverse in (False, True)
        ),
    ),
    Kernel(
        name="swiglu",
        module="pointwise",
        params=(*_pointers("gate_up:*T", "h:*T"), Param("width", "i32", by_16=True)),
        variants=tuple(variant(dtype, 4, BLOCK=SWIGLU_BLOCK) for dtype in PACKED_DTYPES),
    ),
    Kernel(
        name="swiglu_backward_",
        module="pointwise",
        params=(*_pointers("dh:*T", "gate_up:*T", "h:*T"), Param("width", "i32", by_16=True)),
        variants=tuple(
            variant(dtype, 4, HAS_H=has_h, BLOCK=SWIGLU_BLOCK) for dtype in PACKED_DTYPES for has_h in (0, 1)
        ),
    ),
    Kernel(
        name="cross_entropy_",
        module="head",
        general=True,
        params=(*_pointers("logits:*T", "target:*i64", "loss:*fp32"), Param("vocab", "i32", by_16=True)),
        variants=tuple(
            variant(dtype, 8, GRADIENT=gradient, BLOCK=VOCAB_BLOCK) for dtype in PACKED_DTYPES for gradient in (0, 1)
        ),
    ),
    Kernel(
        name="kl_topk_",
        module="head",
        general=True,
        params=(
            *_pointers("logits:*T", "ids:*i64", "logp:*fp32", "log_tail:*fp32", "kl:*fp32"),
            Param("vocab", "i32", by_16=True),
            Param("num_top", "i32"),
            Param("tail_min", "fp32"),
            Param("log_tail_floor", "fp32"),
        ),
        variants=tuple(
            variant(dtype, 8, GRADIENT=gradient, BLOCK_TOP=TOP_BLOCK, BLOCK=VOCAB_BLOCK)
            for dtype in PACKED_DTYPES
            for gradient in (0, 1)
        ),
    ),
    _adamw("adamw_", split=False, eight_bit=False),
    _adamw("adamw_split_", split=True, eight_bit=False),
    _adamw("adamw_split_8bit_", split=True, eight_bit=True),
    _adamw("adamw_8bit_", split=False, eight_bit=True),
    Kernel(
        name="square_norm",
        module="optimizer",
        general=True,
        params=(*_pointers("value:*fp32", "partial:*fp32"), Param("n", "i64")),
        variants=(variant("fp32", 4, BLOCK=NORM_BLOCK),),
    ),
    Kernel(
        name="delta_rows",
        module="delta",
        general=True,
        params=(
            *_pointers("end:*fp32", "start:*fp32", "residual:*fp32", "x:*fp32"),
            *_pointers("energy:*fp64", "peak:*fp32", "not_finite:*i32"),
            Param("num_cols", "i32", by_16=True),
            Param("cap", "fp32"),
        ),
        variants=tuple(variant("fp32", 4, HAS_RESIDUAL=residual) for residual in (0, 1)),
    ),
    Kernel(
        name="delta_codes",
        module="delta",
        general=True,
        params=(
            *_pointers("x:*fp32", "index:*i64", "scale:*fp32", "codes:*i8"),
            Param("num_cols", "i32", by_16=True),
        ),
        variants=(variant("fp32", 4, BLOCK=DELTA_BLOCK),),
    ),
    Kernel(
        name="nf4_linear",
        module="nf4",
        params=(
            Param("x", "*T"),
            *_NF4,
            Param("y", "*T"),
            Param("offset", "fp32"),
            Param("M", "i32"),
            Param("N", "i32"),
            Param("K", "i32", by_16=True),
            Param("y_stride", "i32", by_16=True),
        ),
        variants=tuple(variant(d, 4, BLOCK_M=GEMM_M, BLOCK_N=GEMM_N, GROUP=GEMM_GROUP) for d in PACKED_DTYPES),
        dots=True,
    ),
    Kernel(
        name="nf4_linear_dgrad",
        module="nf4",
        params=(
            Param("dy", "*T"),
            *_NF4,
            Param("dx", "*fp32"),
            Param("offset", "fp32"),
            Param("M", "i32"),
            Param("N", "i32"),
            Param("K", "i32", by_16=True),
            Param("dy_stride", "i32", by_16=True),
        ),
        variants=tuple(
            variant(d, 4, ADD=add, BLOCK_M=GEMM_M, BLOCK_N=GEMM_N, GROUP=GEMM_GROUP)
            for d in PACKED_DTYPES
            for add in (0, 1)
        ),
        dots=True,
    ),
)

KERNELS: Final[Mapping[str, Kernel]] = {kernel.name: kernel for kernel in _KERNELS}

FUNCTIONS: Final[Mapping[str, str]] = {
    "adamw_split_": "adamw_",
    "adamw_split_8bit_": "adamw_",
    "adamw_8bit_": "adamw_",
}
"""Kernels that are one Triton function with other argument types; the others carry their function's name."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, as far as it does not depend on who carries it out.

    ``args`` follow the kernel's parameters: a tensor for each pointer, an int or a float for the rest.
    """

    kernel: str
    variant: Variant
    grid: tuple[int, int, int]
    args: tuple[object, ...] = field(repr=False)
