"""How is the decoding of 4-bit weights measured? On the weights and with the operation that training uses.

For :func:`fedblocks.profiles.probe.probe`, which knows no kernels. Imports torch when it is called.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fedblocks.profiles.device import Accelerator, ComputeDtype
from fedblocks.profiles.probe import DecodeRun

#: Shape of what is quantised; its codes are repeated, since decoding is as fast whatever they say.
ROWS: Final = 256
COLUMNS: Final = 1024
#: As many weights as an MLP matrix of a small model (1 M), and on a GPU enough to fill it (64 M).
REPEATS: Final[dict[Accelerator, int]] = {"cpu": 4, "cuda": 256}


def nf4_decode_run(accelerator: Accelerator, dtype: ComputeDtype) -> DecodeRun:
    """A matrix of random NF4 weights, decoded into one buffer again and again.

    Raises:
        ImportError: torch is not installed.
        RuntimeError: the kernels do not run here.
    """
    import torch

    from fedblocks.edge_client.kernel_choice import training_device
    from fedblocks.kernels.ops import DISPATCHER, nf4_dequant, quantize_nf4

    repeats = REPEATS[accelerator]
    small = quantize_nf4(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)))
    weight = replace(
        small,
        packed=small.packed.repeat(repeats),
        absmax=small.absmax.repeat(repeats),
        nested_absmax=small.nested_absmax.repeat(repeats),
        shape=(repeats * ROWS, COLUMNS),
    ).to(training_device(accelerator))
    into = torch.float32 if dtype == "float32" else torch.bfloat16
    out = torch.empty(weight.shape, dtype=into, device=weight.packed.device)
    who, _ = DISPATCHER.explain("nf4_dequant", "uint8", "large", out.device)
    return DecodeRun(
        num_weights=weight.num_elements,
        run=lambda: nf4_dequant(weight, into, out),
        note=f"{weight.shape[0]} x {weight.shape[1]} into {dtype} by {who}, {torch.get_num_threads()} threads",
    )
