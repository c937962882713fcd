"""F10 and F13 of field.md: unsynced writes are torn, zero or lost, or the disk is full; nothing that was promised is.

A power cut is acted by a copy of the folder at that instant: a kill would let SQLite tidy up behind itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedblocks.aggregator import intake as intake_module
from fedblocks.aggregator import run_folder as run_folder_module
from fedblocks.aggregator.ledger import Ledger

THREE_ROUNDS = ("run.max_rounds=3", "server.keep_updates=true")


class PowerCut(BaseException):
    """The machine is off from here on."""


def torn(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zero_filled(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def never_written(data: bytes) -> bytes:
    return b""


DAMAGES = [torn, zero_filled, never_written]


def cut_before(
    world: Any, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, nth: int, after: bool = False
) -> Path:
    """Run until the nth call and pull the plug; the folder as the next boot finds it."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth and not after:
            raise PowerCut
        result = original(*args, **kwargs)
        if calls[0] == nth:
            raise PowerCut
        return result

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, wrapped)
        with pytest.raises(PowerCut):
            run_to_the_end(world)
    found = world.path.with_name("after-the-cut")
    shutil.copytree(world.path, found)
    world.kill()
    shutil.rmtree(world.path)
    found.rename(world.path)
    return world.path


def run_to_the_end(world: Any) -> None:
    world.join()
    world.finish()


def goes_on_to(world: Any, sha256: str) -> None:
    world.start()
    run_to_the_end(world)
    assert world.aggregator.published_sha256 == sha256
    assert world.ledger.num_updates() == 6


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["v00002.qdown", "v00002.safetensors", "v00002.residual.safetensors"])
def test_f10_a_torn_state_that_no_row_names_yet_is_made_again(
    make_world: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    undisturbed_sha256: str,
    file: str,
    damage: Callable[[bytes], bytes],
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    path = cut_before(world, monkeypatch, Ledger, "commit_round", nth=2) / "state" / file
    path.write_bytes(damage(path.read_bytes()))
    goes_on_to(world, undisturbed_sha256)


@pytest.mark.parametrize("damage", DAMAGES)
def test_f10_a_torn_payload_that_was_never_acknowledged_is_sent_again(
    make_world: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    undisturbed_sha256: str,
    damage: Callable[[bytes], bytes],
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    run = cut_before(world, monkeypatch, intake_module, "commit_file", nth=3, after=True)
    (payload,) = (run / "updates" / "00002").iterdir()
    payload.write_bytes(damage(payload.read_bytes()))
    goes_on_to(world, undisturbed_sha256)


def test_f10_half_written_temporary_files_and_uploads_are_no_obstacle(
    make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, undisturbed_sha256: str
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    run = cut_before(world, monkeypatch, Ledger, "commit_round", nth=2)
    for name in ("state/v00002.safetensors.tmp", "state/final.json.tmp", "incoming/gone.7.part", "metrics.jsonl.tmp"):
        (run / name).write_bytes(b"\x00" * 100)
    goes_on_to(world, undisturbed_sha256)
    assert list((run / "incoming").iterdir()) == []


@pytest.mark.parametrize("tail", [b"\x00" * 5000, b"\xff" * 5000, b"torn"], ids=["zeros", "ones", "four-bytes"])
def test_f10_an_unsynced_tail_of_the_ledgers_log_is_ignored_and_what_was_committed_stands(
    make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, undisturbed_sha256: str, tail: bytes
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    run = cut_before(world, monkeypatch, Ledger, "start_closing", nth=2)
    log = run / "ledger.sqlite-wal"
    assert log.stat().st_size > 0
    log.write_bytes(log.read_bytes() + tail)
    (run / "ledger.sqlite-shm").unlink(missing_ok=True)
    goes_on_to(world, undisturbed_sha256)


@pytest.mark.parametrize("nth", range(1, 8))
def test_f13_a_full_disk_under_any_file_of_a_version_ends_the_process_and_loses_nothing(
    make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, undisturbed_sha256: str, nth: int
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    original, calls = run_folder_module.write_durably, [0]

    def full(path: Path, *pieces: bytes) -> None:
        calls[0] += 1
        if calls[0] == nth:
            data = b"".join(pieces)
            path.with_name(path.name + ".tmp").write_bytes(data[: len(data) // 2])
            raise OSError(28, "No space left on device", str(path))
        original(path, *pieces)

    with monkeypatch.context() as patched:
        patched.setattr(run_folder_module, "write_durably", full)
        with pytest.raises(OSError, match="No space left"):  # `serve` says the line and ends with exit code 7
            run_to_the_end(world)
    world.kill()
    goes_on_to(world, undisturbed_sha256)
