"""What ``fedblocks init`` calls a run and its base."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedblocks.edge_client.init_run import name_of
from fedblocks.edge_client.starter import starter_folder


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("models/model", "model"),
        ("models--Qwen--Qwen2.5-0.5B/snapshots/060db6499f32faf8b98477b0a26969ef7d8b9987", "Qwen2.5-0.5B"),
        ("models--gpt2/snapshots/607a30d7", "gpt2"),
        ("snapshots/2026-01-01", "2026-01-01"),
    ],
)
def test_a_base_is_called_by_its_folder_or_by_its_repository(tmp_path: Path, folder: str, name: str) -> None:
    (tmp_path / folder).mkdir(parents=True)

    assert name_of(tmp_path / folder) == name


def test_the_bundled_model_is_called_starter_also_through_a_link(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(starter_folder())

    assert name_of(starter_folder()) == name_of(link) == "starter"


def test_a_run_carries_the_name_of_its_base(tmp_path: Path, tiny_checkpoint) -> None:
    from fedblocks.edge_client.init_run import init_run

    folder = tiny_checkpoint(tmp_path).rename(tmp_path / "clinic-base")
    made = init_run(model=folder, out=tmp_path / "run", general=None, anchor_sequences=8, anchor_tokens=16)

    assert made.base_name == "clinic-base"
    assert made.run_id.startswith("clinic-base-")
