"""What is installed: the wheel's content, the clean installation, and an aggregator without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the tracked folders."""
    source = tmp_path_factory.mktemp("source")
    for name in (
        *("pyproject.toml", "README.md", "LICENSE", "fedblocks"),
        *("profiles", "protocol", "kernels", "edge_client", "aggregator"),
    ):  # fmt: skip
        subprocess.run(["cp", "-r", str(REPO / name), str(source)], check=True)
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean_venv(wheel, tmp_path_factory) -> Path:
    """A venv that holds the wheel with the aggregator extra and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    install = [sys.executable, "-m", "pip", "--python", str(folder), "install", "-q", f"{wheel}[aggregator]"]
    subprocess.run(install, check=True, capture_output=True)
    return folder


def run(venv: Path, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(venv / "bin" / args[0]), *args[1:]], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
    )


def test_the_listed_packages_are_the_folders():
    listed = set(tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"fedblocks"}
    for room in ("profiles", "protocol", "kernels", "edge_client", "aggregator"):
        for init in (REPO / room).rglob("__init__.py"):
            found.add("fedblocks." + ".".join(init.parent.relative_to(REPO).parts))
    found.add("fedblocks.flower")

    assert listed == found


def test_the_wheel_holds_nothing_at_its_top_level_but_fedblocks(wheel):
    names = zipfile.ZipFile(wheel).namelist()

    tops = {n.split("/")[0] for n in names}
    assert tops == {"fedblocks", next(t for t in tops if t.endswith(".dist-info"))}
    assert "fedblocks/edge_client/starter/model/model.safetensors" in names
    assert "fedblocks/aggregator/status_page.html" in names
    assert {"fedblocks/flower/app/pyproject.toml", "fedblocks/flower/app/LICENSE"} <= set(names)
    assert any(n.startswith("fedblocks/profiles/catalog/") and n.endswith(".toml") for n in names)
    assert not any("/tests/" in n or "/benchmarks/" in n for n in names)


def test_it_answers_help_in_a_clean_venv_where_torch_is_not_installed(clean_venv, tmp_path):
    answer = run(clean_venv, "fedblocks", "--help", cwd=tmp_path)

    assert answer.returncode == 0, answer.stderr
    assert "Exit codes" in answer.stdout
    assert run(clean_venv, "python", "-c", "import torch", cwd=tmp_path).returncode == 1


def test_a_user_s_mistake_is_one_line_and_exit_code_2(clean_venv, tmp_path):
    answer = run(clean_venv, "fedblocks", "serve", "no-such-folder", cwd=tmp_path)

    assert answer.returncode == 2
    assert "no-such-folder" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_serve_starts_from_a_run_folder_with_only_the_aggregator_extra(clean_venv, tmp_path, tiny_run_folder):
    process = subprocess.Popen(
        [str(clean_venv / "bin/fedblocks"), "serve", str(tiny_run_folder), "--set", "server.bind=tcp://127.0.0.1:*"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert "tcp://127.0.0.1:" in first, first + process.stdout.read()
    finally:
        process.terminate()
        process.wait(timeout=20)
