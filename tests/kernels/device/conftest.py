"""What do the tests of the device kernels share? Poisoned and guarded outputs, one table of tolerances, and a record.

They run the real Triton functions: in Triton's interpreter, which has to be chosen before Triton is imported, or on a
GPU, compiled there or from packs. ``tests/kernels/test_device_kernels.py`` starts them, each way in a process of its
own; ``FEDBLOCKS_TEST_RUNG`` says which.
"""

import os
from collections import defaultdict

import pytest
import torch

torch.set_num_threads(1)

if "FEDBLOCKS_TEST_RUNG" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

# Largest error over the largest magnitude of the result, against float64 on the same operands. The interpreter cuts
# bf16 off where a GPU rounds it, so one unit in the last place (2^-7) is what it can give; where a kernel rounds
# between two steps as the model does, that counts twice.
TOLERANCES = {
    "nf4_dequant": {"fp32": 2e-7, "fp16": 5e-4, "bf16": 8e-3},
    "add_rms_norm": {"fp32": 4e-7, "fp16": 2e-3, "bf16": 2.4e-2},
    "rms_norm_backward": {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2},
    "rope_": {"fp32": 3e-7, "fp16": 1e-3, "bf16": 8e-3},
    "swiglu": {"fp32": 5e-7, "fp16": 1e-3, "bf16": 8e-3},
    "swiglu_backward_": {"fp32": 1e-6, "fp16": 1e-3, "bf16": 8e-3},
    "cross_entropy_": {"fp32": 1e-6, "fp16": 1e-3, "bf16": 8e-3},
    "kl_topk_": {"fp32": 2e-6, "fp16": 1e-3, "bf16": 8e-3},
    "nf4_linear": {"fp32": 2e-6, "fp16": 2e-3, "bf16": 1.6e-2},
    "nf4_linear_dgrad": {"fp32": 2e-6, "fp16": 2e-3, "bf16": 1.6e-2},
    "adamw_": {"fp32": 1e-6},
    "square_norm": {"fp32": 1e-6},
    "delta_rows": {"fp32": 0.0},
    "delta_codes": {"fp32": 0.0},
}

GUARD_ELEMENTS = 64
RECORD = defaultdict(lambda: [0, 0.0])


class Guarded:
    """Memory from torch.empty and its kin: filled with NaN (or a code), between two stretches that nobody may touch."""

    def __init__(self, monkeypatch):
        self._made = []
        plain = torch.empty

        def make(shape, dtype, device):
            shape = torch.Size(shape)
            buffer = plain(shape.numel() + 2 * GUARD_ELEMENTS, dtype=dtype, device=device or torch.get_default_device())
            poison = float("nan") if dtype.is_floating_point else 0x5A
            buffer.fill_(poison)
            self._made.append((buffer, shape.numel()))
            return buffer[GUARD_ELEMENTS : GUARD_ELEMENTS + shape.numel()].view(shape)

        def sizes(args):
            return args[0] if len(args) == 1 and not isinstance(args[0], int) else args

        monkeypatch.setattr(
            torch, "empty", lambda *s, dtype=torch.float32, device=None, **_: make(sizes(s), dtype, device)
        )
        monkeypatch.setattr(torch, "empty_like", lambda t, dtype=None, **_: make(t.shape, dtype or t.dtype, t.device))
        monkeypatch.setattr(
            torch.Tensor,
            "new_empty",
            lambda t, *s, dtype=None, **_: make(sizes(s), dtype or t.dtype, t.device),
        )

    def check(self):
        """Nothing beside an output has been written."""
        for buffer, size in self._made:
            for guard in (buffer[:GUARD_ELEMENTS], buffer[GUARD_ELEMENTS + size :]):
                intact = torch.isnan(guard) if guard.is_floating_point() else guard == 0x5A
                assert bool(intact.all()), "a kernel wrote beside its output"


@pytest.fixture
def guarded(monkeypatch):
    """Poisons what is allocated; checks the guards at the end."""
    memory = Guarded(monkeypatch)
    yield memory
    memory.check()


@pytest.fixture
def compare():
    """``compare(op, dtype, got, expected)``: within the table's tolerance, and into the record."""

    def run(op, dtype, got, expected):
        assert got.shape == expected.shape
        wide, expected = got.double(), expected.double()
        assert bool(torch.isfinite(wide).all()), "an output holds what it was poisoned with, or worse"
        error = 0.0
        if expected.numel():
            error = ((wide - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        assert error <= TOLERANCES[op][dtype], f"{op} in {dtype}: error {error:.2e}"
        entry = RECORD[op, dtype]
        entry[0] += 1
        entry[1] = max(entry[1], error)

    return run


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """A pack has no forms for fp32 and for odd tiles: such a case is skipped, with what the pack says of it."""
    from fedblocks.kernels.dispatch import BackendError

    try:
        return (yield)
    except BackendError as error:
        if os.environ["FEDBLOCKS_TEST_RUNG"] == "pack" and any(
            reason in str(error) for reason in ("has no variant", "not divisible by 16")
        ):
            pytest.skip(str(error))
        raise


def pytest_terminal_summary(terminalreporter):
    """Cases and largest error of each operation and dtype."""
    if RECORD:
        terminalreporter.write_line("operation            dtype  results compared  largest error")
    for (op, dtype), (count, error) in sorted(RECORD.items()):
        terminalreporter.write_line(f"{op:<20} {dtype:<6} {count:>16} {error:>14.1e}")
