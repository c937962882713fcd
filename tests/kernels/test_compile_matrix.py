"""Tests of kernels/compile.py: what does every kernel become, for GPUs that are not here? (runtime.md 7.1)

The unmarked part takes one form of each kernel for two targets; the slow one takes all of them for all.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

from fedblocks.kernels import build_packs
from fedblocks.kernels import compile as ahead
from fedblocks.kernels.catalog import COMPILED_ONLY, KERNELS, TARGETS, variant
from fedblocks.kernels.packs import pack_file

pytestmark = pytest.mark.skipif(ahead.missing() is not None, reason=str(ahead.missing()))

BUDGETS = json.loads(build_packs.BUDGETS.read_text(encoding="utf-8"))
CUBIN_SLACK = 1.1
"""By how much machine code may outgrow its budget; everything else may not."""
MATRIX_PRODUCT = {90: "wgmma.mma_async", 110: "tcgen05.mma"}
"""The instruction that multiplies matrices where it is not mma.sync."""


def complaints(result):
    """What is wrong with what a kernel became."""
    job, found = result.job, []
    if result.stack + result.local > build_packs.spill_allowed(BUDGETS, job.name, job.capability):
        found.append(f"spills {result.stack} + {result.local} bytes")
    if result.shared > ahead.SHARED_LIMITS[job.capability] << 10:
        found.append(f"takes {result.shared} bytes of shared memory, the device has fewer")
    if KERNELS[job.kernel].dots:
        wanted = MATRIX_PRODUCT.get(job.capability, "mma.sync")
        if wanted not in dict(result.tensor_core):
            found.append(f"multiplies matrices by {result.tensor_core}, not {wanted}")
        if wanted == "mma.sync" and ".m16n8k16." not in result.ptx:
            found.append("multiplies matrices in other tiles than m16n8k16")
    row = BUDGETS["forms"].get(job.name, {}).get(str(job.capability))
    if row is None:
        return [*found, "has no budget: run `make budgets`"]
    budget = dict(zip(BUDGETS["columns"], row, strict=True))
    # Another Triton or ptxas allocates otherwise; the gates above hold for any.
    if build_packs.budget_toolchain([result]).items() <= BUDGETS["toolchain"].items():
        found += [
            f"takes {getattr(result, name)} {name}, its budget is {budget[name]}: improve it, or run `make budgets`"
            for name in ("registers", "shared")
            if getattr(result, name) > budget[name]
        ]
        if len(result.cubin) > CUBIN_SLACK * budget["cubin"]:
            found.append(f"has {len(result.cubin)} bytes of machine code, its budget is {budget['cubin']}")
    return found


def check(jobs, processes=1):
    results = list(ahead.compile_all(jobs, processes))
    wrong = [
        f"{result.job.name} for {result.job.capability}: {text}" for result in results for text in complaints(result)
    ]
    assert not wrong, "\n".join(wrong)
    return results


def one_of_each(capability):
    """The last variant of every kernel, which has the most switches on; general where there is that form."""
    return [
        ahead.Job(kernel.name, kernel.variants[-1], ahead.forms(kernel)[-1], capability) for kernel in KERNELS.values()
    ]


def test_one_form_of_every_kernel_compiles_within_its_budget(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # must not reach the compiler
    results = check([job for capability in (87, 90) for job in one_of_each(capability)])
    assert len(results) == 2 * len(KERNELS)
    assert os.environ["TRITON_INTERPRET"] == "1"
    for result in results:
        assert result.cubin[:4] == b"\x7fELF"
        assert f".target sm_{result.job.capability}" in result.ptx
        assert ".file" not in result.ptx
        assert result.fused == 0 or result.job.kernel in ahead.FUSED


def test_budgets_are_those_of_the_catalog():
    names = {job.name for job in ahead.jobs([87])}
    assert set(BUDGETS["forms"]) == names
    targets = {str(capability) for capability in (*TARGETS, *COMPILED_ONLY)}
    assert all(set(row) == targets for row in BUDGETS["forms"].values())
    assert BUDGETS["columns"] == list(build_packs.COLUMNS)
    for spill in BUDGETS["spills_allowed"]:
        assert spill["form"] in names
        assert spill["reason"]
        assert 0 < spill["bytes"] <= 32
    lines = build_packs.BUDGETS.read_text(encoding="utf-8").splitlines()
    assert all(sum(f'"{name}"' in line for line in lines) >= 1 for name in names)


def test_what_cannot_compile_is_an_error_that_names_it():
    bad = ahead.Job("swiglu", variant("bf16", 4, BLOCK=1000), "aligned", 87)
    with pytest.raises(ahead.CompileError, match=r"(?s)swiglu bf16-BLOCK_1000-w4 aligned for sm_87: .*power of 2"):
        list(ahead.compile_all([bad]))


def test_result_that_no_pack_can_launch_is_refused():
    compiled = ahead.Compiled(
        job=ahead.Job("swiglu", KERNELS["swiglu"].variants[0], "aligned", 87),
        cubin=b"",
        ptx=".visible .entry swiglu(\n.param .u64 a,\n.param .u64 b,\n.param .u32 c,\n.param .u64 d,\n.param .u64 e\n)",
        symbol="swiglu",
        shared=0,
        registers=32,
        stack=0,
        local=0,
        tensor_core=(),
        fused=0,
        ptx_version="8.5",
        elf_abi=7,
        triton="3.7.1",
        ptxas="12.6.85",
    )
    assert ahead._judged(compiled, scratch=(0, 0), num_warps=4) is compiled
    with pytest.raises(ahead.CompileError, match="needs 128 bytes of global and 0 of profile scratch, not 0"):
        ahead._judged(compiled, scratch=(128, 0), num_warps=4)
    with pytest.raises(ahead.CompileError, match="runs with 8 warps, not 4"):
        ahead._judged(compiled, scratch=(0, 0), num_warps=8)
    with pytest.raises(ahead.CompileError, match="2 fused multiply-adds, expected none"):
        ahead._judged(dataclasses.replace(compiled, fused=2), scratch=(0, 0), num_warps=4)
    short, wide = compiled.ptx.replace(",\n.param .u64 e", ""), compiled.ptx.replace(".u32", ".u64")
    for ptx, found in ((short, r"\(8, 8, 4, 8\)"), (wide, r"\(8, 8, 8, 8, 8\)")):
        with pytest.raises(ahead.CompileError, match=rf"of {found} bytes, expected \(8, 8, 4, 8, 8\)"):
            ahead._judged(dataclasses.replace(compiled, ptx=ptx), scratch=(0, 0), num_warps=4)


def test_a_pack_is_built_to_the_same_bytes_twice():
    work = [job for name in ("swiglu", "square_norm") for job in ahead.jobs([87], [name])]
    pinned = {"triton": "3.7.1", "ptxas": "12.6.85", "ptx_version": "8.5"}
    results = [
        [dataclasses.replace(result, **pinned) for result in ahead.compile_all(work, processes)] for processes in (1, 2)
    ]
    first, second = (build_packs.build_pack(87, made) for made in results)
    assert first == second
    with pytest.raises(ahead.CompileError, match=r"sm_87: made by triton, ptxas, PTX, ABI .* expected one toolchain"):
        build_packs.build_pack(87, [results[0][0], dataclasses.replace(results[0][1], elf_abi=8)])


@pytest.mark.parametrize(("capability", "tool"), [(89, "ptxas"), (103, "ptxas-blackwell"), (110, "ptxas-blackwell")])
def test_ptx_of_the_pack_assembles_for_devices_to_come(tmp_path, capability, tool):
    pack = pack_file.read(80)
    assembler = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / tool
    chosen = {entry.kernel: entry for entry in pack.entries if entry.kernel in ("nf4_linear", "kl_topk_", "delta_rows")}
    for entry in chosen.values():
        (tmp_path / "kernel.ptx").write_bytes(pack.image(entry.ptx).removesuffix(b"\0"))
        command = [
            assembler,
            "--fmad=false",
            f"--gpu-name=sm_{capability}",
            tmp_path / "kernel.ptx",
            "-o",
            tmp_path / "out",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", [*TARGETS, *COMPILED_ONLY])
def test_every_form_compiles_within_its_budget(capability):
    results = check(ahead.jobs([capability]), processes=2)
    assert len(results) == len(BUDGETS["forms"])
