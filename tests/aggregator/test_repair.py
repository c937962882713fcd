"""Files that a disk damages after they were written: found by checksum, set aside, made again with the same bits."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedblocks.aggregator import repair
from fedblocks.aggregator.ledger import LedgerDamagedError, open_read_only
from fedblocks.aggregator.replay import replay
from fedblocks.aggregator.run_folder import RunFolder, RunFolderError, read_state
from fedblocks.aggregator.server import serve
from fedblocks.aggregator.status import run_status
from fedblocks.protocol.state import state_sha256

THREE_ROUNDS = ("run.max_rounds=3",)
KEPT = (*THREE_ROUNDS, "server.keep_updates=true")
FILES = ("v00002.qdown", "v00002.safetensors", "v00002.residual.safetensors")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [flip, truncate, empty, Path.unlink]


def stopped_after(world: Any, rounds: int) -> Path:
    """Its state folder; the clients have answered nothing of the round after."""
    world.join()
    for _ in range(rounds):
        world.round()
    world.kill()
    return world.path / "state"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def goes_on(world: Any) -> str:
    """The final state of the run, served again."""
    world.start()
    world.join()
    world.finish()
    return world.aggregator.published_sha256


@pytest.mark.parametrize(
    ("file", "damage"),
    [*((FILES[1], damage) for damage in DAMAGES), *((FILES[2], damage) for damage in DAMAGES), (FILES[0], flip)],
)
def test_f10_a_damaged_state_file_is_set_aside_and_made_again_from_the_accepted_updates(
    make_world: Callable[..., Any], undisturbed_sha256: str, file: str, damage: Callable[[Path], None]
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    state = stopped_after(world, 2)
    before = bytes_of(state)
    damage(state / file)
    damaged = bytes_of(state).get(file)

    assert goes_on(world) == undisturbed_sha256
    after = bytes_of(state)
    assert after[file] == before[file]
    assert after.get(f"{file}.damaged") == damaged
    [line] = [line for line in world.lines if file in line]
    assert "made again, with the SHA-256 that the ledger names" in line
    assert "\n" not in line


def test_f10_all_files_of_the_newest_version_at_once_and_the_optimizers_moments_are_made_again(
    make_world: Callable[..., Any],
) -> None:
    adam = (*THREE_ROUNDS, "training.server_optimizer=adam")
    undisturbed = make_world("ann", "bob", folder="undisturbed", overrides=adam)
    undisturbed.join()
    undisturbed.finish()
    world = make_world("ann", "bob", overrides=adam)
    state = stopped_after(world, 2)
    before = bytes_of(state)
    for path in state.glob("v00002.*"):
        path.unlink()

    assert goes_on(world) == undisturbed.aggregator.published_sha256
    assert "v00002.moments.safetensors" in before
    after = bytes_of(state)
    assert all(after[name] == data for name, data in before.items() if name.startswith("v00002"))


def test_f10_with_kept_updates_every_version_is_folded_again_from_the_first(
    make_world: Callable[..., Any], undisturbed_sha256: str
) -> None:
    world = make_world("ann", "bob", overrides=KEPT)
    state = stopped_after(world, 2)
    for path in state.iterdir():
        path.unlink()
    assert goes_on(world) == undisturbed_sha256


def test_f10_killed_between_setting_aside_and_writing_the_next_start_makes_it_again(
    make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, undisturbed_sha256: str
) -> None:
    class Killed(BaseException):
        pass

    def killed(path: Path, data: bytes) -> None:
        raise Killed

    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    state = stopped_after(world, 2)
    flip(state / FILES[1])
    with monkeypatch.context() as patched:
        patched.setattr(repair, "write_durably", killed)
        with pytest.raises(Killed):
            world.start()
    world.kill()
    assert not (state / FILES[1]).exists()
    assert goes_on(world) == undisturbed_sha256


def test_f10_without_the_updates_the_published_state_is_made_again_from_the_steps(
    make_world: Callable[..., Any], undisturbed_sha256: str
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    state = stopped_after(world, 2)
    shutil.rmtree(world.path / "updates")
    flip(state / FILES[1])
    assert goes_on(world) == undisturbed_sha256


def test_f10_without_the_updates_one_line_says_which_versions_there_are_and_nothing_is_touched(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    state = stopped_after(world, 2)
    shutil.rmtree(world.path / "updates")
    flip(state / FILES[2])
    before = bytes_of(state)
    with pytest.raises(RunFolderError) as caught:
        world.start()
    text = str(caught.value)
    assert "\n" not in text
    assert str(world.path) in text
    assert "v00002.residual.safetensors is damaged" in text
    assert "of version 2 there is v00002.qdown, v00002.safetensors;" in text
    assert "of version 1 there is v00001.qdown, v00001.safetensors, v00001.residual.safetensors;" in text
    assert text.endswith("restore the folder from a backup")
    assert bytes_of(state) == before


def test_f10_updates_that_do_not_lead_to_the_recorded_hash_are_not_taken_for_it(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    state = stopped_after(world, 2)
    flip(state / FILES[2])
    before = bytes_of(state)
    db = sqlite3.connect(world.path / "ledger.sqlite")
    db.execute("DELETE FROM updates WHERE folded_in = 2 AND client_key LIKE 'ann%'")
    db.commit()
    db.close()
    with pytest.raises(RunFolderError, match=r"version 2 made again is state [0-9a-f]{12}…, the ledger says"):
        world.start()
    assert bytes_of(state) == before


def test_f10_a_state_of_an_older_release_is_checked_by_the_hash_of_its_values(
    make_world: Callable[..., Any], undisturbed_sha256: str
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    state = stopped_after(world, 2)
    db = sqlite3.connect(world.path / "ledger.sqlite")
    db.execute("DELETE FROM files")
    db.commit()
    db.close()
    flip(state / FILES[1])
    truncate(state / FILES[2])
    assert goes_on(world) == undisturbed_sha256


def test_f10_a_damaged_payload_of_an_acknowledged_update_is_not_folded(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=KEPT)
    world.join()
    world.sites["ann"].work()
    world.step()
    world.receive()
    world.kill()
    [payload] = (world.path / "updates").rglob("*.delta")
    flip(payload)
    world.start()
    world.join()
    world.sites["bob"].work()
    with pytest.raises(RunFolderError, match=r"\.delta has SHA-256 .*restore it from a backup"):
        world.step()
    assert world.aggregator.state.version == 0
    flip(payload)  # the backup
    world.kill()
    world.start()
    world.join()
    world.finish()
    assert all(r.equal for r in replay(world.path))


def test_f10_the_newest_step_is_made_again_while_the_run_is_served(
    make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, undisturbed_sha256: str
) -> None:
    save = RunFolder.save_version

    def save_and_damage(folder: RunFolder, version: int, **state: Any) -> dict[str, str]:
        named = save(folder, version, **state)
        if version == 2:
            flip(folder.step_path(version))
        return named

    monkeypatch.setattr(RunFolder, "save_version", save_and_damage)
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    world.join()
    world.finish()
    assert world.aggregator.published_sha256 == undisturbed_sha256
    [line] = [line for line in world.lines if "v00002.qdown" in line]
    assert "set aside as v00002.qdown.damaged and made again" in line


def test_f10_a_client_that_would_need_a_damaged_step_gets_the_whole_state(
    make_world: Callable[..., Any], undisturbed_sha256: str
) -> None:
    world = make_world("ann", "bob", "cid", overrides=THREE_ROUNDS)
    world.join("ann", "bob")
    world.step(11.0)  # cid, who holds version 0, is not waited for
    world.receive()
    for _ in range(2):
        world.round("ann", "bob")
    flip(world.path / "state" / "v00001.qdown")
    world.join("cid")
    world.round("ann", "bob")
    cid = world.sites["cid"]
    assert cid.held_version == 3
    assert state_sha256(world.plan.units.published(), cid.held) == undisturbed_sha256
    [line] = [line for line in world.lines if "v00001.qdown" in line]
    assert "clients that hold an older version get the whole state" in line


@pytest.mark.parametrize(("file", "damage"), [("final.safetensors", flip), ("final.json", truncate)])
def test_f10_the_result_of_a_finished_run_is_written_again(
    make_world: Callable[..., Any], file: str, damage: Callable[[Path], None]
) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=1",))
    world.join()
    world.finish()
    world.kill()
    assert list((world.path / "updates").iterdir()) == []
    path = world.path / "state" / file
    before = path.read_bytes()
    damage(path)
    world.start()
    assert world.aggregator.finished
    assert path.read_bytes() == before


def test_f10_the_result_of_a_run_that_diverged_is_the_best_version_although_a_step_is_damaged(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob", overrides=KEPT)
    world.join()
    for _ in range(3):
        world.round()
    flip(world.path / "state" / "v00001.qdown")
    found = repair.published_at(world.folder, world.ledger, 2)
    stored = read_state(world.path / "state" / "v00002.safetensors")
    assert found.sha256 == state_sha256(world.plan.units.published(), stored)
    assert repair.published_at(world.folder, world.ledger, 1).version == 1  # its file is dropped: from the updates
    shutil.rmtree(world.path / "updates")
    with pytest.raises(RunFolderError, match=r"version 1 cannot be made again: .*restore the folder from a backup"):
        repair.published_at(world.folder, world.ledger, 1)


def zero_page(path: Path) -> None:
    """The second page is read by every start: it holds a table's root."""
    data = path.read_bytes()
    path.write_bytes(data[:4096] + bytes(4096) + data[8192:])


def half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def no_header(path: Path) -> None:
    path.write_bytes(bytes(100) + path.read_bytes()[100:])


@pytest.mark.parametrize("damage", [zero_page, half, no_header, empty, Path.unlink])
def test_f10_a_torn_ledger_is_one_line_and_exit_code_7_and_stays_as_it_was_found(
    make_world: Callable[..., Any], damage: Callable[[Path], None]
) -> None:
    world = make_world("ann", "bob")
    stopped_after(world, 1)
    ledger = world.path / "ledger.sqlite"
    backup = ledger.read_bytes()
    damage(ledger)
    before = bytes_of(world.path)
    with pytest.raises(LedgerDamagedError) as caught:
        serve(world.path)
    assert caught.value.exit_code == 7
    assert "\n" not in str(caught.value)
    assert str(ledger) in str(caught.value)
    found = bytes_of(world.path)
    assert {**found, **before} == found
    assert found.keys() - before.keys() <= {"serve.lock", "effective.toml", "ledger.sqlite-wal", "ledger.sqlite-shm"}
    ledger.write_bytes(backup)
    world.start()
    assert world.aggregator.state.version == 1


def test_f10_a_ledger_that_turns_out_torn_in_mid_read_is_one_line_for_who_only_reads(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob")
    stopped_after(world, 1)
    ledger = world.path / "ledger.sqlite"
    data = ledger.read_bytes()
    ledger.write_bytes(data[:4096] + bytes(len(data) - 4096))
    with pytest.raises(LedgerDamagedError, match="put the copy of your backup in its place"):
        run_status(world.path)
    no_header(ledger)
    with pytest.raises(LedgerDamagedError, match="not a database"):
        open_read_only(ledger)
