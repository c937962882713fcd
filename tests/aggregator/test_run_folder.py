"""The files of a run: identity, durability, one process at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedblocks.aggregator.run_folder import KEPT_STATES, RunFolderError, open_run_folder, read_run_folder
from fedblocks.protocol import run_config
from fedblocks.protocol.messages import AttemptId
from fedblocks.protocol.run_config import ConfigError


def state(value: float) -> dict[int, dict[str, Any]]:
    return {0: {"a.weight": np.full((2, 3), value, dtype=np.float32)}, 2: {"b": np.zeros(3, dtype=np.float32)}}


def test_a_version_comes_back_bit_for_bit_and_version_0_is_nothing(make_world: Callable[..., Any]) -> None:
    folder = make_world("ann").folder
    assert folder.load_version(0) == ({}, {}, {})
    folder.save_version(1, step=b"step", published=state(1.5), residual=state(-0.25))
    published, residual, moments = folder.load_version(1)
    assert moments == {}
    assert published[0]["a.weight"].tobytes() == state(1.5)[0]["a.weight"].tobytes()
    assert residual[0]["a.weight"].tobytes() == state(-0.25)[0]["a.weight"].tobytes()
    assert sorted(published) == [0, 2]
    assert folder.read_step(0) == b"step"


def test_old_states_are_dropped_and_steps_never(make_world: Callable[..., Any]) -> None:
    folder = make_world("ann").folder
    for version in range(1, 6):
        folder.save_version(version, step=b"%d" % version, published=state(version), residual={})
        folder.drop_old_states(version)
    kept = sorted(p.name for p in (folder.path / "state").glob("v*[0-9].safetensors"))
    assert kept == [f"v{v:05d}.safetensors" for v in (4, 5)]
    assert len(kept) == KEPT_STATES
    assert [folder.read_step(v) for v in range(5)] == [b"1", b"2", b"3", b"4", b"5"]


def test_a_missing_step_and_a_damaged_state_name_the_file(make_world: Callable[..., Any]) -> None:
    folder = make_world("ann").folder
    with pytest.raises(RunFolderError, match=r"v00001\.qdown is missing"):
        folder.read_step(0)
    folder.save_version(1, step=b"s", published=state(1), residual={})
    path = folder.path / "state" / "v00001.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(RunFolderError, match=r"v00001\.safetensors"):
        folder.load_version(1)


def test_a_resource_that_was_changed_is_not_served(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    (world.path / "resources" / "anchor.bin").write_bytes(b"another text")
    with pytest.raises(RunFolderError, match=r"anchor\.bin"):
        open_run_folder(world.path)


def test_a_folder_without_run_json_says_how_to_make_one(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    (world.path / "run.json").unlink()
    with pytest.raises(RunFolderError, match="fedblocks init"):
        read_run_folder(world.path)


def test_a_plan_of_another_base_is_refused(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    text = (world.path / "run.json").read_text()
    (world.path / "run.json").write_text(text.replace("ab" * 32, "ef" * 32))
    with pytest.raises(RunFolderError, match="of base"):
        read_run_folder(world.path)


def test_overrides_take_part_in_the_effective_configuration(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    folder = open_run_folder(world.path, ("run.max_rounds=7",))
    folder.save_effective_config()
    assert run_config.load(world.path / "effective.toml").run.max_rounds == 7
    with pytest.raises(ConfigError, match="nearest key"):
        open_run_folder(world.path, ("run.max_round=7",))


def test_a_floor_of_retention_needs_the_file_that_it_is_measured_on(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    with pytest.raises(ConfigError, match=r"min_retention is 0\.97, but the run has no general\.jsonl .* --general"):
        open_run_folder(world.path, ("forgetting.min_retention=0.97",))
    assert read_run_folder(world.path, ("forgetting.min_retention=0.97",)).config.forgetting.min_retention == 0.97


def test_only_one_process_serves_a_folder(make_world: Callable[..., Any]) -> None:
    folder = make_world("ann").folder
    held = folder.lock()
    with pytest.raises(RunFolderError, match="served by another process"):
        folder.lock()
    os.close(held)
    os.close(folder.lock())


@pytest.mark.parametrize("attempt", ["../evil", "a/b", "", "x" * 65, "a b"])
def test_an_attempt_id_that_is_no_file_name_never_becomes_a_path(make_world: Callable[..., Any], attempt: str) -> None:
    folder = make_world("ann").folder
    with pytest.raises(ValueError, match="no file name"):
        folder.update_path(1, AttemptId(attempt))
    with pytest.raises(ValueError, match="no file name"):
        folder.part_path(AttemptId(attempt), 1)


def test_half_finished_uploads_of_a_killed_process_are_removed(make_world: Callable[..., Any]) -> None:
    folder = make_world("ann").folder
    part = folder.part_path(AttemptId("r1-x"), 7)
    part.write_bytes(b"half")
    final = folder.update_path(3, AttemptId("r1-y"))
    folder.make_room_for(final)
    final.write_bytes(b"whole")
    folder.drop_parts()
    assert not part.exists()
    assert final.exists()
