"""What does a kernel of the catalog compile to, for a GPU that is not here? Build time only; needs Triton, no driver.

A *form* is one variant compiled under one assumption about its arguments: ``aligned`` (every pointer, and every integer
that the catalog marks, is divisible by 16) or ``general`` (nothing is). A *target* is a compute capability as one
number, 87 for 8.7.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, Literal

from fedblocks.kernels.catalog import KERNELS, Kernel, Variant

Form = Literal["aligned", "general"]

HIDDEN_POINTERS: Final = 2
"""Parameters that Triton appends to every kernel: global scratch and profile scratch, both unused here."""
BYTES: Final = {"i32": 4, "i64": 8, "fp32": 4}
"""Of parameters that are passed by value."""
FUSED: Final = frozenset({"cross_entropy_", "kl_topk_"})
"""Kernels whose logarithm is a polynomial of fused multiply-adds. No other may contain one: their sums and products are
rounded one by one, as those of the reference."""
SHARED_LIMITS: Final = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 110: 227, 120: 99}
"""KiB of shared memory that one program may have (NVIDIA's tables)."""

_SOURCES: Final = Path(__file__).parent / "sources"
_RESOURCES: Final = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_TENSOR_CORE: Final = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_FMA: Final = re.compile(r"\bfma\.r[nzmp](?:\.\w+)*\.f(?:16|32|64)")


class CompileError(RuntimeError):
    """A kernel compiled to something that cannot be launched, or not at all; the message names kernel and target."""


@dataclass(frozen=True, slots=True)
class Job:
    """One form of one variant for one target."""

    kernel: str
    variant: Variant
    form: Form
    capability: int

    @property
    def name(self) -> str:
        """``swiglu bf16-BLOCK_1024-w4 aligned``: without the target."""
        return f"{self.kernel} {self.variant.name} {self.form}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What a job gave.

    Args:
        symbol: name of the entry in the cubin and in the PTX.
        shared: dynamic shared memory of a program, bytes.
        registers: of one thread.
        stack: bytes of stack of one thread; spilt registers are part of it.
        local: bytes of local memory of one thread.
        tensor_core: instructions of the PTX that multiply matrices, by their name without shapes and types.
        fused: fused multiply-adds of floating-point numbers in the PTX.
        ptx_version: ``8.5``.
        elf_abi: version of the cubin's ABI, 7 or 8.
        triton: version of Triton.
        ptxas: version of the assembler, as it names itself: ``12.8.93``.
    """

    job: Job
    cubin: bytes = field(repr=False)
    ptx: str = field(repr=False)
    symbol: str
    shared: int
    registers: int
    stack: int
    local: int
    tensor_core: tuple[tuple[str, int], ...]
    fused: int
    ptx_version: str
    elf_abi: int
    triton: str
    ptxas: str


def forms(kernel: Kernel) -> tuple[Form, ...]:
    """The forms in which packs carry the variants of a kernel."""
    return ("aligned", "general") if kernel.general else ("aligned",)


def jobs(capabilities: Iterable[int], kernels: Iterable[str] | None = None) -> Iterator[Job]:
    """Every form of every variant of the kernels (all of the catalog unless named), in the order of the catalog."""
    named = list(KERNELS if kernels is None else kernels)
    for capability in capabilities:
        for name in named:
            for variant in KERNELS[name].variants:
                for form in forms(KERNELS[name]):
                    yield Job(name, variant, form, capability)


def source_hash(kernel: str) -> str:
    """sha256 (hexadecimal) of the file of ``sources/`` that holds the kernel, comments and blank lines left out."""
    text = (_SOURCES / f"{KERNELS[kernel].module}.py").read_text(encoding="utf-8")
    digest = hashlib.sha256()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            digest.update(f"{token.string}\n".encode())
    return digest.hexdigest()


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if importlib.util.find_spec("triton") else "there is no triton to compile with; install triton 3.7.1"


def compile_all(work: Iterable[Job], processes: int = 1) -> Iterator[Compiled]:
    """Compiles in processes of their own, where Triton's interpreter is off and its cache is empty; keeps the order.

    Raises:
        CompileError: a job failed, or its result cannot be launched by a pack.
    """
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare)
    with tempfile.TemporaryDirectory(prefix="fedblocks-compile-") as folder, pool:
        yield from pool.map(_compile_in, work, _forever(folder), chunksize=4)


def _forever(folder: str) -> Iterator[str]:
    while True:
        yield folder


def _prepare() -> None:
    """Before Triton is imported: the variable decides at decoration, line tables would put paths into the result."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


def _compile_in(job: Job, folder: str) -> Compiled:
    os.environ["TRITON_CACHE_DIR"] = folder
    return compile_one(job)


def compile_one(job: Job) -> Compiled:
    """Compiles in this process, with its Triton settings.

    Raises:
        CompileError: it does not compile, needs scratch memory, or has other parameters than a pack passes.
    """
    from triton import __version__ as version
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedblocks.kernels import jit

    kernel, variant = KERNELS[job.kernel], job.variant
    function = jit.function(job.kernel)
    types = kernel.signature(variant.dtype) | {name: "constexpr" for name, _ in variant.constexprs}
    if set(types) != set(function.arg_names):
        raise CompileError(
            f"{job.name}: the catalog names the arguments {sorted(types)}, the source {sorted(function.arg_names)}"
        )
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, param in enumerate(kernel.params)
        if job.form == "aligned" and (param.is_pointer or param.by_16)
    }
    source = ASTSource(function, {n: types[n] for n in function.arg_names}, dict(variant.constexprs), divisible)
    options = {"num_warps": variant.num_warps, "enable_fp_fusion": False}
    try:
        result = triton_compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)
    except Exception as error:  # those of Triton share no class
        raise CompileError(f"{job.name} for sm_{job.capability}: {type(error).__name__}: {error}") from error
    metadata, cubin, ptx = result.metadata, result.asm["cubin"], result.asm["ptx"]
    return _judged(
        Compiled(
            job=job,
            cubin=cubin,
            ptx=ptx,
            symbol=metadata.name,
            shared=metadata.shared,
            **_resources(cubin, job),
            tensor_core=_counted(ptx),
            fused=len(_FMA.findall(ptx)),
            ptx_version=_first(r"^\.version (\d+\.\d+)$", ptx, job),
            elf_abi=cubin[8],
            triton=version,
            ptxas=_ptxas_version(job.capability),
        ),
        scratch=(metadata.global_scratch_size or 0, metadata.profile_scratch_size or 0),
        num_warps=metadata.num_warps,
    )


@cache
def _ptxas_version(capability: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    text = subprocess.run([get_ptxas(capability).path, "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    if release is None:
        raise CompileError(f"ptxas for capability {capability} names no version: {text!r}")
    return release[1]


def _judged(compiled: Compiled, scratch: tuple[int, int], num_warps: int) -> Compiled:
    job = compiled.job
    where = f"{job.name} for sm_{job.capability}"
    if any(scratch):
        raise CompileError(f"{where}: needs {scratch[0]} bytes of global and {scratch[1]} of profile scratch, not 0")
    if num_warps != job.variant.num_warps:
        raise CompileError(f"{where}: runs with {num_warps} warps, not {job.variant.num_warps}")
    entry = _first(r"\.entry\s+\w+\s*\(([^)]*)\)", compiled.ptx, job)
    found = tuple(int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry))
    types = KERNELS[job.kernel].signature(job.variant.dtype).values()
    expected = (*(8 if kind.startswith("*") else BYTES[kind] for kind in types), *[8] * HIDDEN_POINTERS)
    if found != expected:
        raise CompileError(f"{where}: the entry has parameters of {found} bytes, expected {expected}")
    if compiled.fused and job.kernel not in FUSED:
        raise CompileError(f"{where}: {compiled.fused} fused multiply-adds, expected none")
    return compiled


def _first(pattern: str, text: str, job: Job) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise CompileError(f"{job.name} for sm_{job.capability}: no {pattern!r} in the PTX")
    return match[1]


def _counted(ptx: str) -> tuple[tuple[str, int], ...]:
    found = _TENSOR_CORE.findall(ptx)
    return tuple((name, found.count(name)) for name in sorted(set(found)))


def _resources(cubin: bytes, job: Job) -> dict[str, int]:
    """registers, stack and local of a cubin, read by the cuobjdump that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=False, capture_output=True, text=True
        )
    match = _RESOURCES.search(done.stdout)
    if done.returncode or match is None:
        raise CompileError(f"{job.name} for sm_{job.capability}: cuobjdump says {(done.stdout + done.stderr)!r}")
    registers, stack, _, local = map(int, match.groups())
    return {"registers": registers, "stack": stack, "local": local}
