"""Does the extra ``client`` install on a Jetson beside the torch that is there? Resolved for aarch64, not installed.

pip evaluates the conditions of a requirement (``python_version < ...``) for the Python that runs it, not for the one
that is asked for: what only an older Python needs is named here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PLATFORMS = tuple(f"{tag}_aarch64" for tag in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014"))
"""JetPack 6 is Ubuntu 22.04 (glibc 2.35), JetPack 7 is Ubuntu 24.04; both take all of these."""
ONLY_OLD = {"3.10": ("tomli>=2",), "3.12": ()}
FORBIDDEN = re.compile(r"(torch|torchvision|bitsandbytes|triton.*|pytorch-triton.*|nvidia-.*|cuda-.*|pynvml)")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def pip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The project's wheel, built from a copy."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    rooms = ("fedblocks", "profiles", "protocol", "kernels", "edge_client", "aggregator")
    for name in ("pyproject.toml", "README.md", "LICENSE", *rooms):
        subprocess.run(["cp", "-r", str(REPO / name), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> None:
    """A package index that answers."""
    asked = pip("download", "--no-deps", "--dest", str(tmp_path_factory.mktemp("asked")), "typing_extensions")
    if asked.returncode:
        pytest.skip(f"no package index is reachable: {asked.stderr.strip().splitlines()[-1][:200]}")


def resolved(requirement: str, python: str, folder: Path, *also: str) -> dict[str, str]:
    """Normalised name -> file name of everything that pip would install there."""
    report = folder / "report.json"
    platforms = [word for tag in PLATFORMS for word in ("--platform", tag)]
    done = pip(
        *("install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)),
        *("--python-version", python, "--implementation", "cp", *platforms, "--only-binary=:all:"),
        *("--target", str(folder / "nowhere"), requirement, *ONLY_OLD[python], *also),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    entries = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {
        re.sub(r"[-_.]+", "-", entry["metadata"]["name"]).lower(): entry["download_info"]["url"].rpartition("/")[2]
        for entry in entries
    }


@pytest.mark.parametrize("python", ["3.10", "3.12"])
@pytest.mark.parametrize("extras", ["client", "client,test", "client,onnx"])
def test_the_client_installs_on_aarch64_without_torch_bitsandbytes_triton_or_any_cuda_library(
    wheel, index, python, extras, tmp_path
):
    found = resolved(f"{wheel}[{extras}]", python, tmp_path)
    assert {"fedblocks", "numpy", "safetensors", "tokenizers", "transformers", "pyzmq"} <= found.keys()
    assert not [name for name in found if FORBIDDEN.fullmatch(name)]
    foreign = [file for file in found.values() if not file.endswith(("_aarch64.whl", "-none-any.whl"))]
    assert not foreign  # compiled for aarch64, or not compiled
    assert not (tmp_path / "nowhere").exists()


def test_it_installs_with_the_numpy_that_nvidias_torch_of_jetpack_6_was_built_for(wheel, index, tmp_path):
    found = resolved(f"{wheel}[client]", "3.10", tmp_path, "numpy<2")
    assert found["numpy"].startswith("numpy-1.26.")


@pytest.mark.parametrize("python", ["3.10", "3.12"])
def test_the_aggregator_installs_on_aarch64_without_any_of_them(wheel, index, python, tmp_path):
    found = resolved(f"{wheel}[aggregator]", python, tmp_path)
    assert not [name for name in found if FORBIDDEN.fullmatch(name)]
    assert "transformers" not in found


def test_the_names_that_are_forbidden_would_be_recognised():
    for name in ("torch", "bitsandbytes", "triton", "triton-windows", "nvidia-cublas-cu12", "cuda-bindings"):
        assert FORBIDDEN.fullmatch(name), name
    for name in ("transformers", "safetensors", "httpcore2"):
        assert not FORBIDDEN.fullmatch(name), name
