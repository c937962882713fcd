"""How are the gradients of trained tensors collected, measured, clipped and applied? In fp32, by AdamW.

A trained tensor has one of two forms: fp32, whose gradient autograd keeps in ``grad``; or bf16 high halves with int16
remainders (``ParamGroup.lows``), whose bf16 gradient is added into an fp32 buffer the moment it is complete and then
dropped. So micro-batches add up in fp32 in both forms, and no step loses anything to the rounding of a weight. m and v
are fp32, or 8 bits each in the mode ``split_8bit``.
Memory is that of runtime.md 4.2, per trained number, plus a few MiB of scratch within :meth:`AdamW.step`:

    weights                     weight   gradient   m and v (fp32 | 8 bits)
    fp32                        4        4          8 | 2.03
    bf16 and remainder          2 + 2    4          8 | 2.03

For fp32 tensors and fp32 moments every step has the bits of ``torch.optim.AdamW(fused=True)`` after
``torch.nn.utils.clip_grad_norm_``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedblocks.kernels.ops import Moments, Moments8Bit, adamw_step_, merge_split, square_norm

if TYPE_CHECKING:
    from fedblocks.edge_client.expanded_model import ParamGroup
    from fedblocks.profiles.cost import OptimizerMode

_NORM_EPS = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to the norm."""
_PIECE = 1 << 20


class AdamW:
    """AdamW over the tensors of ``groups``; weight decay on their ``decayed`` tensors only.

    :meth:`begin` makes the state, :meth:`close` drops it and leaves the tensors as they are. A tensor that has had no
    gradient since the last :meth:`zero_grad` is not stepped.

    Args:
        groups: leaf tensors that train: fp32, or bf16 with ``lows``.
        mode: ``fp32`` and ``split`` keep the moments in fp32, ``split_8bit`` in 8 bits.
        betas, eps, weight_decay: those of methods.md 5.4; the learning rate is an argument of :meth:`step`.

    Raises:
        ValueError: a tensor that is neither fp32 nor bf16 with a remainder.
    """

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        *,
        mode: OptimizerMode = "fp32",
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self._groups = tuple(groups)
        self._betas, self._eps = betas, eps
        self._slots: list[_Slot] = []
        for group in groups:
            decayed = {id(tensor) for tensor in group.decayed}
            for tensor, low in zip(group.tensors, group.lows or [None] * len(group.tensors), strict=True):
                decay = weight_decay if id(tensor) in decayed else 0.0
                self._slots.append(_Slot(tensor, low, decay, eight_bit=mode == "split_8bit", group=group.name))
        self._slot_of = {id(slot.tensor): slot for slot in self._slots}
        self._proximal_weight = 0.0

    def begin(self, proximal_weight: float = 0.0) -> None:
        """Makes m and v, zero, and begins to collect gradients.

        Args:
            proximal_weight: mu of :meth:`pull_to_start`; above 0 the values of this moment are kept, in fp32.
        """
        self._proximal_weight = proximal_weight
        for slot in self._slots:
            slot.begin(keep_start=proximal_weight > 0)

    @torch.no_grad()
    def pull_to_start(self) -> None:
        """Adds mu·(theta - theta_start) to every gradient: that of mu/2·|theta - theta_start|² (FedProx, Li et al.,
        1812.06127). To be called once a step, before :meth:`clip_norm`."""
        if self._proximal_weight > 0:
            for slot in self._slots:
                slot.pull_to_start(self._proximal_weight)

    def close(self) -> None:
        """Drops the state and all gradients; the tensors collect like any others again."""
        for slot in self._slots:
            slot.close()

    def zero_grad(self) -> None:
        """Forgets the gradients collected so far."""
        for slot in self._slots:
            slot.forget()

    def energies(self, groups: Sequence[ParamGroup]) -> list[float]:
        """|gradient|² of the ``decayed`` tensors over their size (u_raw of methods.md 5.5), of each group that has any.

        To be called before :meth:`clip_norm`.
        """
        return [
            sum(_square_sum(self._slot_of[id(t)].gradient) for t in group.decayed)
            / sum(t.numel() for t in group.decayed)
            for group in groups
            if group.decayed
        ]

    def clip_norm(self, max_norm: float) -> float:
        """Scales all gradients so that their common L2 norm is at most ``max_norm``; returns the norm before that.

        A norm that is not finite is returned and nothing is scaled: the caller then takes no step.
        """
        gradients = [slot.gradient for slot in self._slots if slot.gradient is not None]
        if not gradients:
            return 0.0
        total = _common_norm(gradients)
        norm = total.item()
        if math.isfinite(norm):
            factor = max_norm / (total + _NORM_EPS)
            if factor.item() < 1.0:
                for gradient in gradients:
                    gradient.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step from the gradients collected, which stay as they are."""
        for slot in self._slots:
            slot.step(lr, self._betas, self._eps)
        for group in self._groups:
            group.after_step()


def _common_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of all of them together, a scalar on their device; not finite if one of their values is not."""
    if gradients[0].device.type == "cpu":
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    return norm_by_kernel(gradients)


def norm_by_kernel(gradients: Sequence[Tensor]) -> Tensor:
    """The same by ``square_norm``: one pass over each, which adds up what is finite and counts what is not."""
    found = torch.stack([square_norm(gradient.flatten()) for gradient in gradients]).sum(dim=0)
    return torch.where(found[1] > 0, math.nan, found[0]).sqrt()


class _Slot:
    """One trained tensor with its gradient and moments."""

    def __init__(self, tensor: Tensor, low: Tensor | None, decay: float, *, eight_bit: bool, group: str) -> None:
        expected = torch.float32 if low is None else torch.bfloat16
        if tensor.dtype != expected or not tensor.is_contiguous():
            raise ValueError(
                f"a tensor of {group} is {tensor.dtype} {tuple(tensor.shape)} "
                f"{'without' if low is None else 'with'} a remainder, expected a contiguous float32 tensor without or "
                "a bfloat16 tensor with one: steps on bfloat16 alone would vanish in its rounding"
            )
        self.tensor = tensor
        self._low = low
        self._decay = decay
        self._kind = Moments8Bit if eight_bit else Moments
        self._moments: Moments | Moments8Bit | None = None
        self._steps = 0
        self._buffer: Tensor | None = None
        self._collected = False
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._start: Tensor | None = None

    @property
    def gradient(self) -> Tensor | None:
        """The fp32 gradient collected so far; None if there was none."""
        if self._buffer is None:
            return self.tensor.grad
        return self._buffer if self._collected else None

    @property
    def _value(self) -> Tensor:
        """fp32; the tensor itself where that is fp32."""
        value = self.tensor.detach()
        return value if self._low is None else merge_split(value, self._low)

    def pull_to_start(self, weight: float) -> None:
        gradient = self.gradient
        if gradient is not None and self._start is not None:
            gradient.add_(self._value - self._start, alpha=weight)

    def begin(self, *, keep_start: bool = False) -> None:
        self.close()
        self._start = self._value.clone() if keep_start else None
        self._moments = self._kind.zeros(self.tensor.numel(), self.tensor.device)
        self._steps = 0
        if self._low is not None:
            self._buffer = torch.empty(self.tensor.shape, device=self.tensor.device)
            self._hook = self.tensor.register_post_accumulate_grad_hook(self._collect)

    def close(self) -> None:
        self.forget()
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._buffer = self._moments = self._start = None

    def forget(self) -> None:
        self.tensor.grad = None
        self._collected = False

    def _collect(self, tensor: Tensor) -> None:
        assert self._buffer is not None
        assert tensor.grad is not None
        if self._collected:
            self._buffer.add_(tensor.grad)
        else:
            self._buffer.copy_(tensor.grad)
            self._collected = True
        tensor.grad = None

    def step(self, lr: float, betas: tuple[float, float], eps: float) -> None:
        gradient = self.gradient
        if gradient is None:
            return
        assert self._moments is not None, "begin() was not called"
        self._steps += 1
        adamw_step_(
            self.tensor.view(-1),
            None if self._low is None else self._low.view(-1),
            gradient.reshape(-1),
            self._moments,
            step=self._steps,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=self._decay,
        )


def _square_sum(gradient: Tensor | None) -> float:
    """Sum of squares: fp32 within a piece, exact enough beyond; makes nothing of the gradient's size."""
    if gradient is None:
        return 0.0
    return math.fsum(torch.dot(piece, piece).item() for piece in gradient.reshape(-1).split(_PIECE))
