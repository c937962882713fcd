"""Run folders for the system tests: a tiny random base, made as ``fedblocks init`` makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def make_run(tmp_path, tiny_checkpoint) -> Callable[..., tuple[Path, Path]]:
    """A factory of (run folder, base model folder)."""

    def make(*overrides: str, layers: int = 4, name: str = "run") -> tuple[Path, Path]:
        from fedblocks.edge_client.init_run import init_run

        model = tiny_checkpoint(tmp_path, layers=layers)
        general = tmp_path / "general.jsonl"
        general.write_text("".join(json.dumps({"prompt": f"g{i}", "completion": "ab"}) + "\n" for i in range(8)))
        made = init_run(
            model=model,
            out=tmp_path / name,
            general=general,
            overrides=overrides,
            anchor_sequences=16,
            anchor_tokens=32,
        )
        return made.folder, model

    return make


@pytest.fixture
def tiny_run_folder(make_run) -> Path:
    """A run folder that can be served."""
    return make_run()[0]
