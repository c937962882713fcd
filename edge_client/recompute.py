"""How is a block's pass repeated instead of remembered? Its saved tensors are dropped and made again when asked for.

As ``torch.utils.checkpoint`` without reentry (same bits, and the second pass ends as soon as all is there again), but
that one imports ``torch._dynamo``, which takes a client two seconds and 75 MiB: just where memory is scarce.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Complete(Exception):  # noqa: N818 - it is no error
    """The second pass has made everything that the first one saved."""


def recomputed(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``run(x)``, keeping x alone for the backward pass, in which ``run`` is called once more.

    Args:
        run: must do the same both times: no random numbers, and the weights unchanged until the backward pass.
        x: its only input that another pass made; leaf tensors may come with ``run``.
    """
    saved: dict[int, Tensor] = {}
    count = 0

    def drop(_: Tensor) -> int:
        nonlocal count
        count += 1
        return count - 1

    def fill() -> None:
        made = 0

        def keep(tensor: Tensor) -> None:
            nonlocal made
            saved[made] = tensor.detach()
            made += 1
            if made == count:
                raise _Complete

        try:
            with torch.enable_grad(), saved_tensors_hooks(keep, _never):
                run(x.detach().requires_grad_(x.requires_grad))
        except _Complete:
            return
        raise RuntimeError(f"a block saved {count} tensors in its first pass and {made} in its second")

    def take(index: int) -> Tensor:
        if index not in saved:
            fill()
        return saved.pop(index)  # each is asked for once: what has been used need not wait for the others

    with saved_tensors_hooks(drop, take):
        return run(x)


def _never(_: object) -> Tensor:
    raise RuntimeError("the second pass is never differentiated")
