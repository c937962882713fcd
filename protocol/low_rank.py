"""How are matrices that are sums of low-rank pairs kept, mixed and cut to a rank? As factors, for as long as that pays.

A matrix G is held as ``left @ right.T``. Pairs are added by stacking their factors. Once the stacked rank reaches
min(out, in), the smaller factor becomes the identity and the other one G itself: lossless, half the memory of any other
pair of that rank, and a row that no pair touches keeps its bits from there on.
The best approximation of a mixture of such matrices by a given rank is the SVD of the stacked factors by QR
(methods.md 10.2); it never forms the matrix while QR makes the problem smaller.

Everything is computed in fp64 and rounded once to fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedblocks.protocol.tensors import FloatArray

Float64s = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factored:
    """The matrix ``left @ right.T``, fp32."""

    left: FloatArray
    """(out, R)"""
    right: FloatArray
    """(in, R)"""

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[1]:
            raise ValueError(
                f"factors of shapes {self.left.shape} and {self.right.shape} do not multiply, expected (out, R) and "
                "(in, R): hand over the right factor transposed"
            )

    @classmethod
    def zero(cls, num_out: int, num_in: int) -> Factored:
        """The zero matrix, of rank 0."""
        return cls(left=np.zeros((num_out, 0), dtype=np.float32), right=np.zeros((num_in, 0), dtype=np.float32))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        """Columns of the factors; the matrix's rank is at most that."""
        return self.left.shape[1]

    @classmethod
    def of(cls, matrix: FloatArray) -> Factored:
        """A whole matrix, (out, in)."""
        return _whole(matrix)

    def dense(self) -> Float64s:
        """The matrix, (out, in), fp64."""
        return np.matmul(self.left.astype(np.float64), np.transpose(self.right.astype(np.float64)))


def add(base: Factored, pairs: Sequence[tuple[Float64s, Float64s]]) -> Factored:
    """``base`` plus the sum of ``left @ right.T`` over the pairs, in their order.

    Args:
        pairs: factors (out, r) and (in, r).
    """
    rank = base.rank + sum(left.shape[1] for left, _ in pairs)
    if rank < min(base.shape):
        return Factored(
            left=np.hstack([base.left, *(left.astype(np.float32) for left, _ in pairs)]),
            right=np.hstack([base.right, *(right.astype(np.float32) for _, right in pairs)]),
        )
    total = base.dense()
    for left, right in pairs:
        total = np.add(total, np.matmul(left, np.transpose(right)))
    return _whole(total.astype(np.float32))


def mixed(parts: Sequence[Factored], weights: Sequence[float]) -> Factored:
    """The sum of weight times matrix; parts of weight 0 are left out."""
    chosen = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight != 0.0 and part.rank > 0]
    if not chosen:
        return Factored.zero(*parts[0].shape)
    if len(chosen) == 1 and chosen[0][1] == 1.0:
        return chosen[0][0]
    if sum(part.rank for part, _ in chosen) < min(parts[0].shape):
        return Factored(
            left=np.hstack([(part.left.astype(np.float64) * weight).astype(np.float32) for part, weight in chosen]),
            right=np.hstack([part.right for part, _ in chosen]),
        )
    total = np.zeros(parts[0].shape, dtype=np.float64)
    for part, weight in chosen:
        total += weight * part.dense()
    return _whole(total.astype(np.float32))


def _whole(matrix: FloatArray) -> Factored:
    """A matrix of full rank as factors, one of which is the identity."""
    num_out, num_in = matrix.shape
    if num_in <= num_out:
        return Factored(left=matrix, right=np.eye(num_in, dtype=np.float32))
    return Factored(left=np.eye(num_out, dtype=np.float32), right=np.ascontiguousarray(np.transpose(matrix)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Truncated:
    """The best approximation ``left @ right`` of a matrix by a given rank, and what it leaves out."""

    left: FloatArray
    """(out, rank), singular values shared evenly between both sides; the largest entry of each column is positive."""
    right: FloatArray
    """(rank, in)"""
    error: float
    """|matrix - approximation|_F / |matrix|_F; 0 for the zero matrix."""


def truncate(matrix: Factored, rank: int) -> Truncated:
    """The truncated singular value decomposition, from the factors (methods.md 10.2).

    Its rank is less than ``rank`` only where the matrix has fewer rows or columns: what lies beyond the matrix's own
    rank is 0, so that the shapes of a run do not change from round to round.
    """
    num_out, num_in = matrix.shape
    rank = min(rank, num_out, num_in)
    left = np.zeros((num_out, rank), dtype=np.float64)
    right = np.zeros((rank, num_in), dtype=np.float64)
    if matrix.rank == 0:
        return Truncated(left=left.astype(np.float32), right=right.astype(np.float32), error=0.0)
    u, singular, vt = _decompose(matrix)
    kept = min(rank, len(singular))
    strongest = np.abs(u[:, :kept]).argmax(axis=0)
    scale = np.where(u[strongest, np.arange(kept)] < 0, -1.0, 1.0) * np.sqrt(singular[:kept])
    left[:, :kept] = u[:, :kept] * scale
    right[:kept] = vt[:kept] * scale[:, None]
    norm = float(np.sqrt(np.sum(singular**2)))
    error = float(np.sqrt(np.sum(singular[kept:] ** 2))) / norm if norm > 0 else 0.0
    return Truncated(left=left.astype(np.float32), right=right.astype(np.float32), error=error)


def _decompose(matrix: Factored) -> tuple[Float64s, Float64s, Float64s]:
    if matrix.rank >= min(matrix.shape):
        return np.linalg.svd(matrix.dense(), full_matrices=False)
    left_basis, left_triangle = np.linalg.qr(matrix.left.astype(np.float64))
    right_basis, right_triangle = np.linalg.qr(matrix.right.astype(np.float64))
    u, singular, vt = np.linalg.svd(np.matmul(left_triangle, np.transpose(right_triangle)))
    return np.matmul(left_basis, u), singular, np.matmul(vt, np.transpose(right_basis))


def pair_norm(left: Float64s, right: Float64s) -> float:
    """|left @ right.T|_F without forming the product.

    Args:
        left, right: (out, r) and (in, r).
    """
    gram = np.matmul(np.transpose(left), left), np.matmul(np.transpose(right), right)
    squared = float(np.sum(np.multiply(*gram)))
    return max(0.0, squared) ** 0.5
