"""Starts the tests of the device kernels, each way in a process of its own: interpreted, and on a GPU if there is one.

Triton reads TRITON_INTERPRET when a kernel is decorated, so one process cannot do both.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run_kernel_tests(rung):
    """How many passed; all others must have been skipped."""
    # The folder's conftest is found by its name, which needs the folder as root; the project's options stay outside.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull]
    done = subprocess.run(
        [*command, "--rootdir", str(HERE), str(HERE / "device")],
        env={
            **os.environ,
            "FEDBLOCKS_TEST_RUNG": rung,
            "TRITON_INTERPRET": str(int(rung == "interpreter")),
            "PYTEST_ADDOPTS": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    summary = done.stdout[done.stdout.find("operation   ") :]
    print(summary)  # the table of cases and errors: pytest -s shows it
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None, done.stdout[-500:]
    return int(passed[1])


@pytest.mark.timeout(400)
def test_every_kernel_in_the_interpreter():
    pytest.importorskip("triton", reason="the kernels' own tests need triton, which is there for Linux")
    assert run_kernel_tests("interpreter") > 200


@pytest.mark.gpu
@pytest.mark.parametrize("rung", ["triton", "pack"])
def test_every_kernel_on_the_gpu(rung):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert run_kernel_tests(rung) > 100
