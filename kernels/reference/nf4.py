"""How are NF4 weights made and read? This is the specification: plain torch, bitsandbytes' layout, any device.

Layout (runtime.md 5.1). A weight ``(N, K)`` is flattened row by row; 64 consecutive elements form a group. Byte ``j``
holds element ``2j`` in its high nibble and ``2j + 1`` in its low one. A value is ``code[nibble] · absmax[group]``; the
group scales are themselves stored in 8 bits: ``absmax[g] = nested_code[absmax_u8[g]] · nested_absmax[g // 256] +
offset``. The decoding is exact in any order of evaluation that rounds each fp32 product and sum once, so it is
bit-equal between backends; the quantiser need not be (a value half-way between two codes may go either way).

Source: Dettmers et al., QLoRA, arXiv 2305.14314 (NF4, double quantisation) and 2110.02861 (the 8-bit dynamic code).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import torch
from torch import Tensor

BLOCKSIZE: Final = 64
NESTED_BLOCKSIZE: Final = 256

PIECE: Final = 1 << 18
"""Weights decoded at a time; a multiple of a nested group's 64 · 256, small enough to stay in a CPU's cache."""
PIECE_ON_ACCELERATOR: Final = 1 << 24

NF4_VALUES: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The NF4 code that the quantiser uses; a decoder reads the code from the file instead."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Nf4Weight:
    """One weight ``(N, K)`` in NF4 with double quantisation; every tensor lies on one device.

    Raises:
        ValueError: a part has another dtype or length than ``shape`` asks for.
    """

    packed: Tensor  # (ceil(N·K / 2),) uint8
    absmax: Tensor  # (G,) uint8, G = ceil(N·K / 64)
    nested_code: Tensor  # (256,) fp32
    nested_absmax: Tensor  # (ceil(G / 256),) fp32
    offset: float
    """Mean of the group scales; a number that fp32 holds exactly."""
    code: Tensor  # (16,) fp32, ascending
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        groups = -(-self.num_elements // BLOCKSIZE)
        for name, dtype, length in (
            ("packed", torch.uint8, -(-self.num_elements // 2)),
            ("absmax", torch.uint8, groups),
            ("nested_code", torch.float32, 256),
            ("nested_absmax", torch.float32, -(-groups // NESTED_BLOCKSIZE)),
            ("code", torch.float32, 16),
        ):
            part: Tensor = getattr(self, name)
            if part.dtype != dtype or tuple(part.shape) != (length,):
                raise ValueError(
                    f"NF4 weight of shape {self.shape}: {name} is {part.dtype} {tuple(part.shape)}, "
                    f"expected {dtype} ({length},)"
                )

    @property
    def num_elements(self) -> int:
        """N·K."""
        return self.shape[0] * self.shape[1]

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """packed, absmax, nested_code, nested_absmax, code."""
        return self.packed, self.absmax, self.nested_code, self.nested_absmax, self.code

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers together."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)

    def to(self, device: torch.device) -> Nf4Weight:
        """The same weight on ``device``."""
        names = ("packed", "absmax", "nested_code", "nested_absmax", "code")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@cache
def dynamic_code() -> Tensor:
    """The signed 8-bit dynamic code: 256 ascending fp32 values in [-1, 1], finer near zero.

    Decade ``10^-e``, e = 6..0, holds ``2^(6-e)`` values per sign, at the midpoints of an even split of [0.1, 1];
    zero and one are added. (Only +1 is a code value: the largest negative one lies half a step inside -1.)
    """
    positive: list[float] = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        positive += (10.0 ** (exponent - 6) * middles).tolist()
    return torch.tensor(sorted([-value for value in positive] + [0.0] + positive + [1.0]), dtype=torch.float32)


def _nearest(values: Tensor, code: Tensor) -> Tensor:
    """Index (uint8) of the code value nearest to each value; an exact middle goes to the lower one."""
    return torch.bucketize(values, (code[:-1] + code[1:]) / 2).to(torch.uint8)


def _scaled_groups(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Groups of ``size`` elements, each scaled into [-1, 1]: (n,) scaled and (ceil(n / size),) largest magnitudes."""
    groups = -(-flat.numel() // size)
    padded = torch.nn.functional.pad(flat, (0, groups * size - flat.numel())).view(groups, size)
    largest = padded.abs().amax(dim=1)  # (groups,)
    scaled = padded * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)  # clamp: an all-zero group stays zero
    return scaled.clamp_(-1, 1).view(-1)[: flat.numel()], largest


def quantize_nf4(weight: Tensor) -> Nf4Weight:
    """Quantises ``weight`` (N, K), any float dtype, to NF4 with double quantisation; arithmetic in fp32.

    Raises:
        ValueError: the weight is not a matrix, or holds a value that is not finite.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            f"quantize_nf4: got {weight.dtype} of shape {tuple(weight.shape)}, expected a non-empty float matrix"
        )
    flat = weight.detach().reshape(-1).float()
    if not bool(torch.isfinite(flat).all()):
        raise ValueError(
            f"quantize_nf4: the weight of shape {tuple(weight.shape)} holds NaN or infinity; check the file"
        )
    code = torch.tensor(NF4_VALUES, dtype=torch.float32, device=flat.device)
    scaled, absmax = _scaled_groups(flat, BLOCKSIZE)
    nibbles = _nearest(scaled, code)
    if nibbles.numel() % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    offset = absmax.mean()
    nested_code = dynamic_code().to(flat.device)
    nested, nested_absmax = _scaled_groups(absmax - offset, NESTED_BLOCKSIZE)
    return Nf4Weight(
        packed=(nibbles[::2] << 4) | nibbles[1::2],
        absmax=_nearest(nested, nested_code),
        nested_code=nested_code,
        nested_absmax=nested_absmax,
        offset=offset.item(),
        code=code,
        shape=(weight.shape[0], weight.shape[1]),
    )


def nf4_dequant(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor,
    nested_absmax: Tensor,
    code: Tensor,
    offset: float,
    out: Tensor,
) -> None:
    """Decodes into ``out`` (N, K), contiguous, in its dtype: fp32 arithmetic, one cast at the end.

    One look-up gives both values of a byte. Piece by piece, so that what is held beside ``out`` stays below 8 MiB for
    :data:`PIECE` weights at a time, whatever their number.
    """
    n = out.numel()
    flat = out.view(-1)
    piece = PIECE if out.device.type == "cpu" else PIECE_ON_ACCELERATOR
    pairs = torch.cartesian_prod(code, code).view(torch.int64).view(-1)  # (256,): two fp32 values each
    bytes_ = min(piece, n + n % 2) // 2
    index = packed.new_empty(bytes_, dtype=torch.int32)
    looked_up = packed.new_empty(bytes_, dtype=torch.int64)
    for start in range(0, n, piece):
        target = flat[start : start + piece]
        size = target.numel()
        num_bytes = -(-size // 2)
        index[:num_bytes].copy_(packed[start // 2 : start // 2 + num_bytes])
        torch.index_select(pairs, 0, index[:num_bytes], out=looked_up[:num_bytes])
        values = looked_up[:num_bytes].view(torch.float32)[:size]
        scale = _scales(absmax, nested_code, nested_absmax, offset, start // BLOCKSIZE, -(-size // BLOCKSIZE))
        whole = size - size % BLOCKSIZE
        _scale_into(target[:whole].view(-1, BLOCKSIZE), values[:whole].view(-1, BLOCKSIZE), scale[: whole // BLOCKSIZE])
        if whole < size:
            _scale_into(target[whole:].view(1, -1), values[whole:].view(1, -1), scale[-1:])


def _scales(
    absmax: Tensor, nested_code: Tensor, nested_absmax: Tensor, offset: float, first: int, count: int
) -> Tensor:
    """Scales (count,) of the groups ``first, first + 1, ...``; ``first`` begins a nested group."""
    scale = nested_code.index_select(0, absmax[first : first + count].int())
    nested = nested_absmax[first // NESTED_BLOCKSIZE :][: -(-count // NESTED_BLOCKSIZE)]
    return scale.mul_(nested.repeat_interleave(NESTED_BLOCKSIZE)[:count]).add_(offset)


def _scale_into(target: Tensor, values: Tensor, scale: Tensor) -> None:
    """``target = values · scale`` of (groups, size), rounded once more if the target is narrower; spoils ``values``."""
    if target.dtype == values.dtype:
        torch.mul(values, scale.unsqueeze(1), out=target)
    else:
        target.copy_(values.mul_(scale.unsqueeze(1)))


def decoded(parts: tuple[Nf4Weight, ...], dtype: torch.dtype) -> Tensor:
    """The decoded parts below each other: (sum of N_i, K)."""
    rows = [part.shape[0] for part in parts]
    weight = torch.empty(sum(rows), parts[0].shape[1], dtype=dtype, device=parts[0].packed.device)
    for part, place in zip(parts, weight.split(rows), strict=True):
        nf4_dequant(*part.buffers, part.offset, place)
    return weight


def nf4_linear(x: Tensor, parts: tuple[Nf4Weight, ...]) -> Tensor:
    """``x Wᵀ`` (M, N) of x (M, K), W the decoded parts below each other."""
    return x @ decoded(parts, x.dtype).T


def nf4_linear_dgrad(dy: Tensor, parts: tuple[Nf4Weight, ...]) -> Tensor:
    """``dy W`` (M, K) of dy (M, N)."""
    return dy @ decoded(parts, dy.dtype)
