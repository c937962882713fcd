"""How are the packs made, and the table of what every kernel may take? ``make packs``, ``make budgets``.

Packs are assembled by pinned versions of ptxas, so that drivers older than Triton's own ptxas load them; budgets are
of Triton's own, so that whoever has Triton can compare.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from fedblocks.kernels import compile as ahead
from fedblocks.kernels.catalog import COMPILED_ONLY, KERNELS, TARGETS
from fedblocks.kernels.packs import pack_file

BUDGETS: Final = Path(__file__).parent / "budgets.json"
COLUMNS: Final = ("registers", "stack", "local", "shared", "cubin")
"""What a budget says of one form for one target: of a thread, of a thread, of a thread, of a program, of the file."""
TRITON: Final = "3.7.1"
PTXAS: Final = {80: "12.6.85", 86: "12.6.85", 87: "12.6.85", 89: "12.6.85", 90: "12.6.85", 120: "12.9.86"}
"""ptxas that assembles a pack: one that JetPack 6 loads, and one that knows capability 120; as in the Makefile."""
MIN_DRIVERS: Final = {"12.6.85": 12000, "12.9.86": 12080}
"""Oldest driver for the machine code of a ptxas: any of the same major version that knows the GPU."""
MIN_DRIVERS_PTX: Final = {"8.5": 12050, "8.8": 12090}
"""Oldest driver for a version of PTX: that of the toolkit which brought the version."""
WITH_PTX: Final = frozenset({80})
"""Packs that carry PTX too, for GPUs that no pack was built for."""


def build_pack(capability: int, results: Sequence[ahead.Compiled]) -> bytes:
    """The file of a pack.

    Raises:
        CompileError: the images were not all made by one toolchain, or by one whose drivers are not known.
    """
    found = {(result.triton, result.ptxas, result.ptx_version, result.elf_abi) for result in results}
    if len(found) != 1 or not all(tool[1] in MIN_DRIVERS and tool[2] in MIN_DRIVERS_PTX for tool in found):
        raise ahead.CompileError(
            f"sm_{capability}: made by triton, ptxas, PTX, ABI {sorted(found)}, expected one toolchain with a ptxas of "
            f"{', '.join(MIN_DRIVERS)} and PTX of {', '.join(MIN_DRIVERS_PTX)}"
        )
    ((triton, ptxas, ptx_version, elf_abi),) = found
    return pack_file.encode(
        capability,
        pack_file.Toolchain(
            triton=triton,
            ptxas=ptxas,
            ptx=ptx_version,
            elf_abi=elf_abi,
            min_driver=MIN_DRIVERS[ptxas],
            min_driver_ptx=MIN_DRIVERS_PTX[ptx_version],
        ),
        [(_fields(result), result.cubin, _plain(result.ptx) if capability in WITH_PTX else None) for result in results],
    )


def _plain(ptx: str) -> bytes:
    """PTX without comments and indentation, closed by the zero that the driver looks for."""
    lines = (re.sub(r"//.*", "", line).strip() for line in ptx.splitlines())
    return "\n".join(line for line in lines if line).encode("ascii") + b"\n\0"


def _fields(result: ahead.Compiled) -> dict[str, Any]:
    job, kernel = result.job, KERNELS[result.job.kernel]
    divisible = [param.name for param in kernel.params if param.is_pointer or param.by_16]
    return {
        "kernel": job.kernel,
        "variant": job.variant,
        "form": job.form,
        "params": tuple(kernel.signature(job.variant.dtype).items()),
        "divisible_by_16": tuple(divisible if job.form == "aligned" else ()),
        "symbol": result.symbol,
        "shared": result.shared,
        "registers": result.registers,
        "spilled": result.stack + result.local,
        "source": ahead.source_hash(job.kernel),
    }


def budget_toolchain(results: Iterable[ahead.Compiled]) -> dict[str, str]:
    """What compiled, as the budgets name it: Triton, and its ptxas for capabilities below 100 and from there on."""
    tools: dict[str, str] = {}
    for result in results:
        tools["triton"] = result.triton
        tools["ptxas below 100" if result.job.capability < 100 else "ptxas from 100"] = result.ptxas
    return tools


def budget_lines(results: Iterable[ahead.Compiled]) -> dict[str, dict[str, list[int]]]:
    """Name of a form -> capability -> the numbers of :data:`COLUMNS`."""
    lines: dict[str, dict[str, list[int]]] = {}
    for result in results:
        numbers = [result.registers, result.stack, result.local, result.shared, len(result.cubin)]
        lines.setdefault(result.job.name, {})[str(result.job.capability)] = numbers
    return lines


def spill_allowed(budgets: dict[str, Any], form: str, capability: int) -> int:
    """Bytes of stack and local memory that a form may take for a target: 0 unless the file says why."""
    return max(
        (
            spill["bytes"]
            for spill in budgets["spills_allowed"]
            if spill["form"] == form and capability in spill["targets"]
        ),
        default=0,
    )


def budget_text(toolchain: dict[str, str], spills: list[Any], lines: dict[str, dict[str, list[int]]]) -> str:
    """The file: JSON with one line for each form, so that a change is one line of a diff."""
    allowed = ",\n".join(f"  {json.dumps(spill)}" for spill in spills)
    rows = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(dict(sorted(row.items(), key=lambda item: int(item[0]))))}"
        for name, row in sorted(lines.items())
    )
    return (
        f'{{\n "toolchain": {json.dumps(toolchain)},\n "columns": {json.dumps(COLUMNS)},\n'
        f' "spills_allowed": [\n{allowed}\n ],\n "forms": {{\n{rows}\n }}\n}}\n'
    )


def _budgets(processes: int) -> None:
    known = json.loads(BUDGETS.read_text(encoding="utf-8")) if BUDGETS.exists() else {"spills_allowed": []}
    results = list(ahead.compile_all(ahead.jobs((*TARGETS, *COMPILED_ONLY)), processes))
    for result in results:
        if (result.stack or result.local) and f"{result.job.name} {result.job.capability}" not in known[
            "spills_allowed"
        ]:
            print(f"{result.job.name} {result.job.capability}: {result.stack} bytes of stack, {result.local} local")
    BUDGETS.write_text(
        budget_text(budget_toolchain(results), known["spills_allowed"], budget_lines(results)), encoding="utf-8"
    )
    print(f"{len(results)} forms in {BUDGETS.name}")


def _packs(assemblers: Path, folder: Path, capabilities: Sequence[int], processes: int) -> None:
    started = time.monotonic()
    paths = {
        version: assemblers / version / "nvidia" / "cuda_nvcc" / "bin" / "ptxas" for version in set(PTXAS.values())
    }
    for version, path in paths.items():
        if not path.is_file():
            raise SystemExit(f"ptxas {version} is not at {path}: run `make packs`, which fetches it")
    # Triton asks the one variable for capabilities below 100 and the other from there on.
    os.environ["TRITON_PTXAS_PATH"] = str(paths[PTXAS[80]].resolve())
    os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = str(paths[PTXAS[120]].resolve())
    made: dict[int, list[ahead.Compiled]] = {capability: [] for capability in capabilities}
    for result in ahead.compile_all(ahead.jobs(capabilities), processes):
        made[result.job.capability].append(result)
    total = 0
    print(f"{'pack':<14}{'entries':>8}{'bytes':>10}{'images':>10}  ptxas    most registers, spilled")
    for capability, results in made.items():
        tools = results[0].triton, results[0].ptxas
        if tools != (TRITON, PTXAS[capability]):
            raise SystemExit(f"sm_{capability}: made by {tools}, expected triton {TRITON}, ptxas {PTXAS[capability]}")
        data = build_pack(capability, results)
        pack_file.decode(data)
        (folder / pack_file.file_name(capability)).write_bytes(data)
        total += len(data)
        images = sum(len(result.cubin) for result in results)
        registers = max(result.registers for result in results)
        spilled = [f"{r.job.name}: {r.stack + r.local}" for r in results if r.stack or r.local]
        print(
            f"{pack_file.file_name(capability):<14}{len(results):>8}{len(data):>10}{images:>10}  {tools[1]:<9}"
            f"{registers}; {', '.join(spilled) or 'none'}"
        )
    print(f"{total} bytes in all, {time.monotonic() - started:.0f} s")


def main(arguments: Sequence[str] | None = None) -> None:
    """``packs`` or ``budgets``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["packs", "budgets"])
    parser.add_argument("--tools", type=Path, default=Path(".packtools"), help="folder with a ptxas of each version")
    parser.add_argument("--out", type=Path, default=pack_file.FOLDER)
    parser.add_argument(
        "--capability", type=int, action="append", choices=TARGETS, help="may be repeated; default: all"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    if (reason := ahead.missing()) is not None:
        raise SystemExit(reason)
    if given.what == "budgets":
        _budgets(given.processes)
    else:
        _packs(given.tools, given.out, given.capability or TARGETS, given.processes)


if __name__ == "__main__":
    main(sys.argv[1:])
