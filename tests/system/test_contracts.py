"""The walls between the rooms: who may import whom (pyproject.toml, tool.importlinter)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
AGGREGATOR_WITHOUT_TORCH = """
import sys
import fedblocks.aggregator.server, fedblocks.aggregator.plan_view, fedblocks.aggregator.invitation, fedblocks.cli
loaded = {"torch", "transformers", "bitsandbytes"} & set(sys.modules)
assert not loaded, loaded
"""


def test_no_room_imports_what_its_contract_forbids(tmp_path):
    shutil.copytree(REPO / "fedblocks", tmp_path / "fedblocks")
    for room in ("profiles", "protocol", "kernels", "edge_client", "aggregator"):
        shutil.copytree(REPO / room, tmp_path / "fedblocks" / room)
    shutil.copy(REPO / "pyproject.toml", tmp_path)

    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache", "--config", "pyproject.toml"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout
    assert "6 kept, 0 broken" in done.stdout


def test_the_aggregator_and_the_command_line_load_neither_torch_nor_transformers(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AGGREGATOR_WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
