"""What the ledger forgets of a long run, and that nothing which anybody can still ask for is among it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from fedblocks.aggregator import ledger as ledger_module
from fedblocks.aggregator import privacy, run_rules
from fedblocks.aggregator.replay import replay
from fedblocks.aggregator.run_folder import read_run_folder
from fedblocks.aggregator.status import run_status

ROUNDS = 14
DETAILED, CURVES = 4, 8
LONG = (f"run.max_rounds={ROUNDS}", "run.target_score=0.0")


@pytest.fixture(autouse=True)
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "DETAILED_ROUNDS", DETAILED)
    monkeypatch.setattr(ledger_module, "CURVE_ROUNDS", CURVES)
    monkeypatch.setattr(run_rules, "PATIENCE_ROUNDS", 10**6)  # the sites' scores are always the same


def count(world: Any, table: str) -> int:
    found: tuple[int] = sqlite3.connect(world.folder.ledger_path).execute(f"SELECT count(*) FROM {table}").fetchone()
    return found[0]


def lines(world: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in world.folder.metrics_path.read_text().splitlines()]


def final_sha256(world: Any) -> str:
    found: str = json.loads((world.path / "state" / "final.json").read_text())["state_sha256"]
    return found


def served(world: Any) -> Any:
    world.join()
    world.finish()
    return world


def test_tasks_updates_and_measurements_of_long_ago_are_gone_and_what_a_round_led_to_is_not(
    make_world: Callable[..., Any],
) -> None:
    world = served(make_world("ann", "bob", overrides=LONG))
    kept = make_world("ann", "bob", folder="kept", overrides=(*LONG, "server.keep_updates=true"))
    served(kept)
    assert final_sha256(world) == final_sha256(kept)
    assert count(kept, "updates") == 2 * ROUNDS
    assert count(world, "updates") == 2 * DETAILED
    assert count(world, "assignments") == 2 * DETAILED + 2  # and those of the measurement at the end
    assert count(world, "measurements") < count(kept, "measurements")
    stored = world.ledger.rounds()
    assert [r.round for r in stored] == list(range(1, ROUNDS + 2))
    assert [r.state_sha256 for r in stored] == [r.state_sha256 for r in kept.ledger.rounds()]
    old = stored[: ROUNDS - DETAILED]
    assert all(r.plan is None and r.method_state is None for r in old)
    assert all(r.plan is not None and r.method_state is not None for r in stored[ROUNDS - DETAILED : ROUNDS])
    assert [set(r.metrics) == {"num_accepted"} for r in stored[:ROUNDS]] == [True] * 6 + [False] * 8
    assert all("clients" not in r.metrics for r in old)
    assert [r.metrics["num_accepted"] for r in stored[:ROUNDS]] == [2] * ROUNDS
    assert len(replay(kept.path)) == ROUNDS


def test_the_file_stops_growing(make_world: Callable[..., Any]) -> None:
    """Pages that were freed are used again; what stays of a round is a small part of what it took."""

    def used_bytes(world: Any) -> int:
        db = sqlite3.connect(world.folder.ledger_path)
        pages, free, size = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def grown_bytes(*overrides: str, folder: str) -> int:
        world = make_world(
            "ann", "bob", folder=folder, overrides=("run.max_rounds=60", "run.target_score=0.0", *overrides)
        )
        world.join()
        found = []
        for rounds in (20, 20):
            for _ in range(rounds):
                world.round()
            found.append(used_bytes(world))
        return found[1] - found[0]

    thinned = grown_bytes(folder="thinned")
    assert thinned < 20 * 1000
    assert thinned < grown_bytes("server.keep_updates=true", folder="kept") / 10


def test_status_and_its_page_show_the_rounds_that_are_kept(make_world: Callable[..., Any]) -> None:
    world = served(make_world("ann", "bob", overrides=LONG))
    status = run_status(world.path)
    assert [row["round"] for row in status["rounds"]] == list(range(ROUNDS - CURVES + 1, ROUNDS + 1))
    assert "clients" in status["rounds"][-1]
    assert len(run_status(world.path, newest_rounds=3)["rounds"]) == 3


def test_the_file_of_all_rounds_keeps_its_old_lines_over_a_restart_and_gets_back_the_last_one(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob", overrides=LONG)
    world.join()
    for _ in range(ROUNDS - 2):
        world.round()
    before = world.folder.metrics_path.read_text()
    torn = before[: before.rindex("\n", 0, len(before) - 1) + 40]
    world.kill()
    world.folder.metrics_path.write_text(torn)
    world.start()
    assert world.folder.metrics_path.read_text() == before
    served(world)
    assert [row["round"] for row in lines(world)] == list(range(1, ROUNDS + 1))
    assert all("clients" in row for row in lines(world))


@pytest.mark.parametrize("kill_after", [1, 4, 5, 9, 13])
def test_killed_and_started_again_it_ends_in_the_same_bits(make_world: Callable[..., Any], kill_after: int) -> None:
    undisturbed = served(make_world("ann", "bob", folder="undisturbed", overrides=LONG))
    world = make_world("ann", "bob", overrides=LONG)
    world.join()
    for _ in range(kill_after):
        world.round()
    world.kill()
    world.start()
    served(world)
    assert final_sha256(world) == final_sha256(undisturbed)
    assert [row["num_accepted"] for row in lines(world)] == [2] * ROUNDS


@pytest.mark.parametrize("name", ["v{:05d}.safetensors", "v{:05d}.qdown"])
def test_a_damaged_file_is_made_again_from_what_is_kept(make_world: Callable[..., Any], name: str) -> None:
    undisturbed = served(make_world("ann", "bob", folder="undisturbed", overrides=LONG))
    world = make_world("ann", "bob", overrides=LONG)
    world.join()
    for _ in range(10):
        world.round()
    path = world.path / "state" / name.format(world.aggregator.state.version)
    data = path.read_bytes()
    world.kill()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    world.start()
    assert path.read_bytes() == data
    served(world)
    assert final_sha256(world) == final_sha256(undisturbed)


def test_an_update_of_a_forgotten_round_is_not_counted(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=LONG)
    world.join()
    ann = world.sites["ann"]
    old = ann.train(ann.tasks[-1])
    for _ in range(8):
        world.round()
    before = world.aggregator.state.version, count(world, "updates")
    world.endpoint.announce(ann.key, *old)
    world.step()
    ann.receive()
    assert ann.refused[-1].code == "unknown_attempt"
    assert (world.aggregator.state.version, count(world, "updates")) == before


def test_rounds_in_which_nobody_sends_do_not_push_out_what_the_newest_version_came_from(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob", overrides=(*LONG, "allocation.deadline_s=5.0"))
    world.join()
    for _ in range(4):
        world.round()
    version, number = world.aggregator.state.version, world.aggregator.state.round
    for _ in range(200):
        if world.aggregator.state.round >= number + 6:
            break
        world.step(10.0)
        world.receive()
        for site in world.sites.values():
            site.heartbeat()
    assert world.aggregator.state.version == version
    assert world.aggregator.state.round >= number + 6
    path = world.path / "state" / f"v{version:05d}.safetensors"
    data = path.read_bytes()
    world.kill()
    path.write_bytes(b"")
    world.start()
    assert path.read_bytes() == data


def test_the_accountant_counts_noise_of_rounds_that_are_forgotten(make_world: Callable[..., Any]) -> None:
    pytest.importorskip("dp_accounting")
    private = (
        "privacy.noise_multiplier=2.0",
        "privacy.clip_norm=1.0",
        "privacy.max_epsilon=1000.0",
        "delta.format=fp32",
    )
    world = served(make_world("ann", "bob", overrides=(*LONG, *private)))
    books = privacy.open_books(read_run_folder(world.path).config, world.ledger)
    assert books is not None
    assert len(books.noise_multipliers) == ROUNDS


def test_a_ledger_of_an_earlier_release_is_thinned_at_its_next_round(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=(*LONG, "server.keep_updates=true"))
    world.join()
    for _ in range(9):
        world.round()
    world.kill()
    db = sqlite3.connect(world.folder.ledger_path)
    db.execute("DROP INDEX updates_by_attempt")
    db.execute("PRAGMA user_version = 16")
    db.commit()
    db.close()
    text = (world.path / "run.toml").read_text()
    (world.path / "run.toml").write_text(text.replace("keep_updates = true", "keep_updates = false"))
    world.start()
    assert count(world, "updates") == 18
    world.join()
    world.round()
    assert count(world, "updates") == 2 * DETAILED
