"""How are launches carried out by Triton's own compiler, or by its interpreter?

Triton is imported at the first launch, not before: a machine without it runs the other rungs of the ladder.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sysconfig
from functools import cache
from typing import Any, Final

import torch

from fedblocks.kernels.catalog import FUNCTIONS, KERNELS, Launch

VERSIONS: Final = ((3, 6), (3, 10))
"""Versions of Triton from the first up to, not including, the second: those that the kernels were compiled with."""


@cache
def interpreting() -> bool:
    """True if Triton was told, before its import, to run kernels in Python on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def function(kernel: str) -> Any:
    """The Triton function of a kernel of the catalog."""
    module = importlib.import_module(f"fedblocks.kernels.sources.{KERNELS[kernel].module}")
    return getattr(module, FUNCTIONS.get(kernel, kernel))


@cache
def missing() -> str | None:
    """Why Triton cannot compile on this machine, or None."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not VERSIONS[0] <= version < VERSIONS[1]:
        span = f"{VERSIONS[0][0]}.{VERSIONS[0][1]} to {VERSIONS[1][0]}.{VERSIONS[1][1] - 1}"
        return f"triton is {triton.__version__}, expected {span}"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no GPU"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or sysconfig.get_config_var("CC")
    if not compiler or shutil.which(compiler.split()[0]) is None:
        return "no C compiler, which triton needs for its launcher (install gcc or clang)"
    return None


def run(launch: Launch) -> None:
    """Launches on the device of the arguments, on torch's current stream."""
    form = launch.variant
    if interpreting() and KERNELS[launch.kernel].dots and form.dtype == "bf16":
        raise ValueError(
            f"{launch.kernel}: Triton's interpreter multiplies bf16 matrices wrongly without a word; use fp32 or fp16"
        )
    function(launch.kernel)[launch.grid](
        *launch.args, **dict(form.constexprs), num_warps=form.num_warps, enable_fp_fusion=False
    )
