"""What ``fedblocks status`` reads from a run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedblocks.aggregator.status as status_module
from fedblocks.aggregator.run_folder import RunFolderError
from fedblocks.aggregator.status import FOLLOW_INTERVAL_S, describe, follow, is_served, run_status
from fedblocks.cli import app


def test_a_run_that_was_never_served_says_how_to_start_it(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    world.kill()
    for file in world.path.glob("ledger.sqlite*"):
        file.unlink()
    status = run_status(world.path)
    assert status["phase"] == "never_served"
    assert "fedblocks serve" in describe(status)


def test_every_phase_has_the_same_keys(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=2",))
    keys = [set(run_status(world.path))]
    world.join()
    keys.append(set(run_status(world.path)))
    world.finish()
    keys.append(set(run_status(world.path)))
    world.kill()
    for file in world.path.glob("ledger.sqlite*"):
        file.unlink()
    keys.append(set(run_status(world.path)))
    assert all(k == keys[0] for k in keys)


def test_an_open_round_shows_each_clients_task_and_why(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    world.join()
    world.step(1.5)
    status = run_status(world.path)
    assert (status["round"], status["version"], status["phase"]) == (1, 0, "stopped")
    ann = next(c for c in status["clients"] if c["name"] == "ann")
    assert (ann["role"], ann["outcome"], ann["device"]) == ("train", "open", "test-device")
    assert ann["blocks"] == [0, 1, 2]
    assert ann["predicted_peak_bytes"] > 0
    assert json.loads(json.dumps(status)) == status


def test_a_served_folder_shows_what_is_waited_for(make_world: Callable[..., Any]) -> None:
    import os

    world = make_world("ann", "bob")
    descriptor = world.folder.lock()
    world.join()
    world.step(1.5)
    assert is_served(world.path)
    status = run_status(world.path)
    assert status["phase"] == "running"
    assert "ann, bob" in status["waiting_for"]
    assert "waiting for round 1: ann, bob" in describe(status)
    os.close(descriptor)
    assert not is_served(world.path)


def test_refusals_and_quarantined_clients_are_shown(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    world.join()
    ann = world.sites["ann"]
    for _ in range(3):
        world.ledger.add_refusal(ann.key, "non_finite", "a NaN", unix_s=1.0)
    shown = next(c for c in run_status(world.path)["clients"] if c["name"] == "ann")
    assert shown["refusals"] == {"non_finite": 3}
    assert shown["quarantined"] is True
    assert shown["last_refusal"] == "non_finite: a NaN"
    assert "fedblocks keys release RUN ann" in describe(run_status(world.path))
    world.ledger.set_run("quarantine_after", 0)  # served with --set server.quarantine_after=0
    assert not any(c["quarantined"] for c in run_status(world.path)["clients"])


def test_a_finished_run_shows_its_result_and_all_rounds(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=2",))
    world.join()
    world.finish()
    status = run_status(world.path)
    assert status["phase"] == "finished"
    assert status["final"]["stop_reason"] == "max_rounds"
    assert [r["round"] for r in status["rounds"]] == [1, 2]
    assert status["state_sha256"] == status["final"]["state_sha256"]
    assert all(c["last_round"]["outcome"] == "stored" for c in status["clients"])


def test_the_step_time_stands_beside_the_mode_that_the_update_names(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=2",))
    world.join()
    world.finish()
    status = run_status(world.path)
    mode = status["clients"][0]["last_round"]["mode"]
    assert set(mode) == {"optimizer", "residency", "frozen", "micro_batch_size", "checkpoint"}
    assert status["rounds"][0]["clients"][0]["mode"] == mode
    assert "s a step, 1 sequence at a time" in describe(status)
    shown = status["clients"][0]
    assert 0 < shown["step_time_error"] < 1
    assert f"predictions of its steps are off by {shown['step_time_error']:.0%}" in describe(status)
    assert shown["time_scale"] > 0
    assert status["rounds"][-1]["clients"][0]["step_time_error"] == shown["step_time_error"]
    del status["clients"][0]["last_round"]["mode"]  # a row of an older release
    assert describe(status).count("s a step") == 1


def test_following_a_run_tells_each_change_once_and_ends_with_the_run(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=2",))
    steps: list[Callable[[], Any]] = [lambda: None, world.join, lambda: None, world.round, world.round, world.finish]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        steps.pop(0)()

    texts = list(follow(world.path, describe, sleep=sleep))

    assert set(slept) == {FOLLOW_INTERVAL_S}
    assert len(slept) == 6
    assert len(texts) == len(set(texts)) == 5  # twice nothing had changed
    assert "finished" in texts[-1]
    assert "finished" not in texts[-2]


def test_a_countdown_alone_is_no_change(make_world: Callable[..., Any]) -> None:
    import os

    world = make_world("ann", "bob")
    descriptor = world.folder.lock()
    world.join()
    world.step(1.5)
    first = world.aggregator.state.elapsed_s
    steps: list[Callable[[], Any]] = [lambda: world.step(2.0), lambda: world.step(2.0), world.finish]
    try:
        texts = list(follow(world.path, json.dumps, sleep=lambda seconds: steps.pop(0)()))
    finally:
        os.close(descriptor)
    assert world.aggregator.state.elapsed_s != first
    assert [json.loads(text)["phase"] for text in texts] == ["running", "finished"]


def test_a_finished_run_is_told_once_without_waiting(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=2",))
    world.join()
    world.finish()

    assert len(list(follow(world.path, describe, sleep=lambda seconds: pytest.fail("it waited")))) == 1


def test_status_follow_prints_json_lines_or_texts_and_ctrl_c_is_no_error(
    make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Path, render: Callable[[dict[str, Any]], str]) -> Iterator[str]:
        for round in (1, 2):
            yield render({**run_status(run), "round": round})
        raise KeyboardInterrupt

    world = make_world("ann")
    monkeypatch.setattr(status_module, "follow", interrupted)
    lines, texts = (
        CliRunner().invoke(app, ["status", str(world.path), "--follow", *more]) for more in (["--json"], [])
    )
    assert (lines.exit_code, texts.exit_code) == (0, 0)
    assert [json.loads(line)["round"] for line in lines.output.splitlines()] == [1, 2]
    first, second = texts.output.split("\n\n")
    assert "round 1/" in first
    assert "round 2/" in second


def test_a_folder_that_is_no_run_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises((RunFolderError, ValueError), match="fedblocks init"):
        run_status(tmp_path)
