"""The aggregator as a whole, without sockets: what it promises, through refusals, restarts and late comers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedblocks.aggregator.intake as intake_module
from fedblocks.aggregator.endpoint import PeerRejected
from fedblocks.aggregator.ledger import Ledger
from fedblocks.aggregator.replay import replay, state_at
from fedblocks.aggregator.run_folder import RunFolder, RunFolderError
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Assignment,
    AttemptId,
    ClientKey,
    Evaluate,
    Fetch,
    Goodbye,
    HeartbeatReply,
    Ready,
    Refused,
    Resource,
)

THREE_ROUNDS = ("run.max_rounds=3", "server.keep_updates=true")


def final(world: Any) -> dict[str, Any]:
    return json.loads((world.path / "state" / "final.json").read_text())


def metrics(world: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world.path / "metrics.jsonl").read_text().splitlines()]


def test_three_rounds_of_two_clients_end_in_a_final_state_that_a_replay_confirms(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    world.join()
    world.finish()
    assert [m["round"] for m in metrics(world)] == [1, 2, 3]
    assert [m["num_accepted"] for m in metrics(world)] == [2, 2, 2]
    assert final(world)["stop_reason"] == "max_rounds"
    assert final(world)["version"] == 3
    assert all(site.goodbye is not None and site.goodbye.finished for site in world.sites.values())
    replayed = replay(world.path)
    assert [r.num_updates for r in replayed] == [2, 2, 2]
    assert all(r.equal for r in replayed)
    assert replayed[-1].state_sha256 == final(world)["state_sha256"]


@pytest.mark.parametrize("optimizer", ["avgm", "adam"])
def test_the_servers_optimizer_goes_on_after_a_kill_and_a_replay_confirms_it(
    make_world: Callable[..., Any], optimizer: str
) -> None:
    overrides = (*THREE_ROUNDS, f"training.server_optimizer={optimizer}")
    hashes = {final_of_three_rounds(make_world("ann", "bob", folder="undisturbed", overrides=THREE_ROUNDS), kill=False)}
    for kill in (False, True):
        world = make_world("ann", "bob", folder=f"{optimizer}-{kill}", overrides=overrides)
        hashes.add(final_of_three_rounds(world, kill=kill))
        assert all(r.equal for r in replay(world.path))
    assert len(hashes) == 2  # avg's, and this one's twice


def final_of_three_rounds(world: Any, *, kill: bool) -> str:
    world.join()
    world.round("ann", "bob")
    if kill:
        world.kill()
        world.start()
        world.join()
    world.finish()
    return final(world)["state_sha256"]


def test_the_published_steps_alone_lead_to_the_final_state(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    world.join()
    world.finish()
    assert state_at(world.folder, 3).sha256 == final(world)["state_sha256"]
    assert all(s.held_version == 3 for s in world.sites.values())


def test_payloads_are_deleted_with_the_next_version_and_at_the_end_unless_they_are_to_be_kept(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=2",))
    world.join()
    world.round()
    world.sites["ann"].work()
    world.step()
    assert sorted(p.parent.name for p in world.path.rglob("*.delta")) == ["00001", "00001", "00002"]
    world.receive()
    world.sites["bob"].work()
    world.step()
    world.receive()
    assert sorted(p.parent.name for p in world.path.rglob("*.delta")) == ["00002", "00002"]
    world.finish()
    assert list((world.path / "updates").rglob("*.delta")) == []
    with pytest.raises(RunFolderError, match="keep_updates=true"):
        replay(world.path)


def test_the_order_of_arrival_does_not_change_a_bit(make_world: Callable[..., Any]) -> None:
    names = ("ann", "bob", "cid", "dan")
    hashes: set[str] = set()
    for number, order in enumerate((names, names[::-1], ("cid", "ann", "dan", "bob"))):
        world = make_world(*names, folder=f"run-{number}", overrides=THREE_ROUNDS)
        world.join(*order)
        for _ in range(3):
            world.round(*order)
        world.finish()
        hashes.add(final(world)["state_sha256"])
    assert len(hashes) == 1


def test_ten_resends_in_any_order_count_once_and_each_is_acknowledged(
    make_world: Callable[..., Any], undisturbed_sha256: str
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    world.join()
    ann = world.sites["ann"]
    task = ann.tasks[-1]
    delta, payload = ann.train(task)
    for _ in range(10):
        world.endpoint.announce(ann.key, delta, payload)
    world.step()
    ann.receive()
    assert ann.acked == [task.attempt_id] * 10
    assert world.ledger.num_updates() == 1
    world.finish()
    assert final(world)["state_sha256"] == undisturbed_sha256
    assert world.ledger.refusals() == {}


def test_the_same_attempt_with_other_content_is_a_conflict(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    world.join()
    ann = world.sites["ann"]
    delta, payload = ann.train(ann.tasks[-1])
    world.endpoint.announce(ann.key, delta, payload)
    world.step()
    world.endpoint.announce(ann.key, replace(delta, payload_sha256="0" * 64), payload)
    world.step()
    ann.receive()
    assert [r.code for r in ann.refused] == ["conflict"]
    assert world.ledger.num_updates() == 1


def test_an_update_that_comes_again_is_acknowledged_before_its_transfer_is_ended_and_nobody_is_told(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob")
    world.join()
    ann = world.sites["ann"]
    delta, payload = ann.train(ann.tasks[-1])
    world.endpoint.announce(ann.key, delta, payload)
    world.step()
    ann.receive()
    told = len(world.lines)
    world.endpoint.announce(ann.key, delta, payload)
    world.step()
    answers = [m for k, m, _ in world.endpoint.sent if k == ann.key]
    assert [type(m) for m in answers] == [Ack, Refused]
    assert {m.attempt_id for m in answers} == {delta.attempt_id}
    assert len(world.lines) == told
    assert world.ledger.refusals() == {}


def test_an_attempt_of_another_client_is_unknown_and_closes_nothing(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    world.join()
    ann, bob = world.sites["ann"], world.sites["bob"]
    delta, payload = ann.train(ann.tasks[-1])
    world.endpoint.announce(bob.key, delta, payload)
    world.step()
    bob.receive()
    assert [r.code for r in bob.refused] == ["unknown_attempt"]
    assert world.aggregator.state.tasks[ann.key].outcome == "open"


def bad(kind: str, site: Any) -> tuple[Any, bytes]:
    """An update with one thing wrong."""
    delta, payload = site.train(site.tasks[-1])
    match kind:
        case "non_finite":
            # The first tensor is a vector: its scale is the first fp32 of the payload.
            payload = np.float32(np.nan).tobytes() + payload[4:]
        case "over_norm":
            payload = np.float32(1e6).tobytes() + payload[4:]
        case "bad_weight":
            return replace(delta, num_examples=10**12), payload
        case "bad_steps":
            return replace(delta, steps=delta.steps + 1), payload
        case "not_assigned":
            first = replace(delta.tensors[0], block=7)
            return replace(delta, tensors=(*delta.tensors[1:], first)), payload
        case "incomplete":
            return replace(delta, tensors=delta.tensors[1:]), payload
        case "checksum_mismatch":
            return delta, payload[:-1] + bytes([payload[-1] ^ 1])
        case _:
            raise AssertionError(kind)
    return replace(delta, payload_sha256=hashlib.sha256(payload).hexdigest()), payload


@pytest.mark.parametrize(
    "kind",
    ["non_finite", "over_norm", "bad_weight", "bad_steps", "not_assigned", "incomplete", "checksum_mismatch"],
)
def test_a_bad_update_is_refused_by_its_code_and_the_round_folds_as_if_it_were_absent(
    make_world: Callable[..., Any], kind: str
) -> None:
    absent = make_world("ann", "bob", "eve", folder="absent", overrides=THREE_ROUNDS)
    absent.join()
    absent.sites["eve"].fail("internal")
    absent.round("ann", "bob")
    world = make_world("ann", "bob", "eve", overrides=THREE_ROUNDS)
    world.join()
    eve = world.sites["eve"]
    world.endpoint.announce(eve.key, *bad(kind, eve))
    world.round("ann", "bob")
    assert [r.code for r in eve.refused] == [kind]
    assert world.ledger.refusals() == {eve.key: {kind: 1}}
    assert metrics(world)[0]["num_accepted"] == 2
    assert metrics(world)[0]["state_sha256"] == metrics(absent)[0]["state_sha256"]


def test_after_three_bad_updates_a_client_gets_no_task_until_it_is_released(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "eve")
    world.join()
    eve = world.sites["eve"]
    for _ in range(3):
        world.endpoint.announce(eve.key, *bad("non_finite", eve))
        world.round("ann")
    assert len(eve.tasks) == 3
    assert any("eve gets no task any more" in line for line in world.lines)
    world.round("ann")
    assert len(eve.tasks) == 3
    world.ledger.release(eve.key)
    world.round("ann")
    assert len(eve.tasks) == 4


def test_a_client_that_slows_down_is_noticed_after_two_rounds_and_planned_for_at_its_new_speed(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", overrides=("run.max_rounds=9", "allocation.deadline_s=1000.0"))
    world.join()
    world.step(11.0)
    world.receive()
    ann = world.sites["ann"]

    def predicted_step_s() -> float:
        [choice] = world.ledger.last_round().plan["choices"]
        return choice["predicted"]["step_s"]

    predicted = []
    for step_s in (0.05, 0.05, 0.05, 0.2, 0.2):
        if len(predicted) == 2:
            world.kill()  # what was learnt is in the ledger
            world.start()
            world.join()
            world.step(11.0)
            world.receive()
        predicted.append(predicted_step_s())
        task = ann.tasks[-1]
        delta, payload = ann.train(task)
        report = replace(delta.train, step_s=step_s, mode=_mode_of(world))
        world.endpoint.announce(ann.key, replace(delta, train=report), payload)
        world.step()
        world.receive()
    assert predicted[1:] == pytest.approx([0.05] * 4)
    assert predicted_step_s() == pytest.approx(0.2)
    notes = [text for _, text in world.ledger.notes() if "predicted" in text]
    assert len(notes) == 1
    assert notes[0].startswith("ann takes 4.0 times what was predicted, twice in a row: planned for at its new speed")


def _mode_of(world: Any) -> ExecutionMode:
    [choice] = world.ledger.last_round().plan["choices"]
    return ExecutionMode(**choice["mode"])


def test_a_full_disk_refuses_updates_for_now_and_the_client_delivers_when_there_is_room(
    make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world("ann", "bob")
    world.join()
    ann = world.sites["ann"]

    def full(part: Path, final: Path) -> None:
        raise OSError(28, "No space left on device", str(final))

    with monkeypatch.context() as patched:
        patched.setattr(intake_module, "commit_file", full)
        ann.work()
        world.step()
        ann.receive()
    assert [r.code for r in ann.refused] == ["no_space"]
    assert world.aggregator.state.tasks[ann.key].outcome == "open"
    assert list((world.path / "incoming").iterdir()) == []
    world.round()
    assert metrics(world)[0]["num_accepted"] == 2


def test_what_a_peer_says_cannot_drive_the_operators_terminal(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    world.join()
    world.sites["ann"].say(Refused(code="malformed", text="\x1b[2J\nround 99/99", attempt_id=AttemptId("x")))
    world.step(11.0)
    world.receive()
    world.sites["ann"].say(
        Refused(code="malformed", text="\x1b[2J\nround 99/99", attempt_id=world.sites["ann"].tasks[-1].attempt_id)
    )
    world.step()
    assert any("refused by the client" in line for line in world.lines)
    assert all(line.isprintable() for line in world.lines)
    assert all(text.isprintable() for _, text in world.ledger.notes())


def test_keys_that_were_never_let_in_share_one_line_in_the_books(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    world.join()
    for number in range(5):
        key = ClientKey(f"{number:040d}")
        world.endpoint.inbox.append(PeerRejected(key=key, address="", code="not_enrolled", text=f"key {key}"))
    world.step()
    world.step(1.5)
    assert world.ledger.refusals() == {ClientKey(""): {"not_enrolled": 5}}


def test_a_revoked_client_does_not_hold_the_round(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    world.join()
    bob = world.sites["bob"]
    world.sites["ann"].work()
    world.endpoint.inbox.append(PeerRejected(key=bob.key, address="", code="revoked", text="key revoked"))
    world.step()
    assert metrics(world)[0]["num_failed"] == 1
    assert world.aggregator.state.round == 2


def test_a_refused_attempt_cannot_be_mended_under_the_same_id(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "eve")
    world.join()
    eve = world.sites["eve"]
    good = eve.train(eve.tasks[-1])
    world.endpoint.announce(eve.key, *bad("non_finite", eve))
    world.step()
    world.endpoint.announce(eve.key, *good)
    world.step()
    eve.receive()
    assert [r.code for r in eve.refused] == ["non_finite", "conflict"]
    assert world.ledger.num_updates() == 0


@pytest.mark.parametrize(
    ("changes", "code", "both"),
    [
        ({"base_hash": "ff" * 32}, "model_mismatch", ("ff" * 32, "ab" * 32)),
        ({"run_id": "other-run"}, "model_mismatch", ("other-run", "tiny-run")),
        ({"protocol_version": 99}, "version_skew", ("99", str(PROTOCOL_VERSION))),
    ],
)
def test_a_client_of_another_base_run_or_version_is_refused_with_both_values(
    make_world: Callable[..., Any], changes: dict[str, Any], code: str, both: tuple[str, str]
) -> None:
    world = make_world("ann")
    ann = world.sites["ann"]
    ann.hello(**changes)
    world.step(20.0)
    ann.receive()
    assert ann.welcome is None
    assert ann.tasks == []
    assert [r.code for r in ann.refused] == [code]
    assert all(value in ann.refused[0].text for value in both)


def test_a_client_whose_model_is_still_loading_is_not_planned_for(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    world.join("ann")
    bob = world.sites["bob"]
    bob.hello()
    world.step(11.0)
    for _ in range(3):
        bob.heartbeat(phase="loading")
        world.step(1.0)
    assert not any(isinstance(m, Assignment) for k, m, _ in world.endpoint.sent if k == bob.key)

    bob.say(Ready())
    world.sites["ann"].receive()
    world.round("ann")
    world.step(11.0)
    bob.receive()

    assert bob.tasks


def test_a_client_that_rests_is_not_planned_for_and_comes_back_when_it_is_ready(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=9",))
    world.join()
    bob = world.sites["bob"]
    world.round()
    bob.work()
    bob.say(Goodbye(reason="rests: outside its hours"))
    bob.hello()
    world.sites["ann"].work()
    world.step()
    world.sites["ann"].receive()
    assert "bob left: rests: outside its hours" in world.lines
    bob.heartbeat()
    world.step(5.0)
    assert world.aggregator.state.round == 3
    assert set(world.aggregator.state.tasks) == {world.sites["ann"].key}
    bob.say(Ready())
    world.sites["ann"].work()
    world.step()
    assert world.aggregator.state.round == 4
    assert set(world.aggregator.state.tasks) == {world.sites["ann"].key, bob.key}


def test_the_first_round_does_not_wait_for_a_site_that_says_it_rests(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    bob = world.sites["bob"]
    bob.hello()
    for _ in range(2):
        bob.say(Goodbye(reason="rests: outside its hours"))
    world.step()
    world.join("ann")
    world.step(0.5)
    assert (world.aggregator.state.phase, len(world.aggregator.state.tasks)) == ("open", 1)
    assert world.lines.count("bob left: rests: outside its hours") == 1


def test_a_client_that_loads_or_rests_is_told_that_the_run_is_finished(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=1",))
    world.join("ann")
    world.sites["bob"].hello()
    world.step(11.0)
    world.sites["ann"].receive()
    for _ in range(3):
        world.sites["ann"].work()
        world.step(11.0)
        world.sites["ann"].receive()
    assert world.aggregator.finished
    told = [m for k, m, _ in world.endpoint.sent if k == world.sites["bob"].key]
    assert Goodbye(reason="the run is finished: max_rounds", finished=True) in told


def test_nothing_is_believed_of_a_key_that_never_said_hello(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    world.sites["ann"].heartbeat()
    world.step()
    world.receive()
    assert "say Hello first" in world.sites["ann"].refused[0].text


def test_a_client_fetches_the_files_of_the_run_and_no_other(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    ann = world.sites["ann"]
    world.join()
    ann.say(Fetch(name="anchor.bin"))
    ann.say(Fetch(name="../server.key.json"))
    world.step()
    answers = [(m, p) for _, m, p in world.endpoint.sent if isinstance(m, (Resource, Refused))]
    assert isinstance(answers[0][0], Resource)
    assert answers[0][1] == b"anchor texts"
    assert isinstance(answers[1][0], Refused)


def test_a_heartbeat_is_answered_with_what_the_run_waits_for(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    world.join("ann")
    world.sites["ann"].heartbeat()
    world.step(1.0)
    reply = next(m for _, m, _ in world.endpoint.sent if isinstance(m, HeartbeatReply))
    assert reply.round == 1
    assert "bob" in reply.waiting_for


def test_a_task_that_was_lost_on_the_way_is_sent_again_to_an_idle_client(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    world.sites["ann"].hello()
    world.step()
    world.receive()
    world.step(11.0)
    world.endpoint.sent.clear()  # the connection broke before anything arrived
    for _ in range(12):
        world.sites["ann"].heartbeat()
        world.step(5.0)
    sent = [m for _, m, _ in world.endpoint.sent if isinstance(m, Assignment)]
    assert len(sent) == 1
    assert sent[0].deadline_s < 30.0


def test_a_busy_client_is_not_sent_its_task_again(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    world.join()
    for _ in range(11):
        world.sites["ann"].heartbeat(world.sites["ann"].tasks[-1].attempt_id, "training")
        world.step(5.0)
    assert not [m for _, m, _ in world.endpoint.sent if isinstance(m, Assignment)]


def test_a_client_that_reconnects_in_mid_round_gets_the_same_attempt_with_the_time_that_is_left(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob")
    world.join()
    first = world.sites["ann"].tasks[-1]
    world.step(20.0)
    world.sites["ann"].tasks.clear()
    world.join("ann")
    again = world.sites["ann"].tasks[-1]
    assert again.attempt_id == first.attempt_id
    assert again.deadline_s == pytest.approx(40.0)


def test_a_late_update_counts_in_the_next_round_at_a_lower_weight(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", "cid", "dan", overrides=("run.max_rounds=9", "server.keep_updates=true"))
    world.join()
    world.round("ann", "bob", "cid")
    for name in ("ann", "bob", "cid"):
        world.sites[name].heartbeat()
    dan = world.sites["dan"]
    late = dan.tasks[-1]
    dan.heartbeat(late.attempt_id, "training")
    world.step(60.0)
    world.receive()
    assert metrics(world)[0]["late"] == ["dan"]
    assert world.aggregator.state.round == 2
    assert dan.tasks[-1] is late  # left in peace
    dan.work()
    world.round("ann", "bob", "cid")
    assert dan.acked == [late.attempt_id]
    assert metrics(world)[1]["num_accepted"] == 4
    assert metrics(world)[1]["num_stale"] == 1
    assert all(r.equal for r in replay(world.path))


def test_an_upload_that_outlasts_its_round_counts_in_the_next(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", "cid", "dan", overrides=("run.max_rounds=9", "server.keep_updates=true"))
    world.join()
    dan = world.sites["dan"]
    slow = dan.tasks[-1]
    dan.work()
    world.aggregator.step(0.0)  # let in
    (arrived,) = world.endpoint.inbox
    world.endpoint.inbox.clear()  # and still on its way
    world.round("ann", "bob", "cid")
    dan.heartbeat(slow.attempt_id, "uploading")
    world.step(60.0)
    assert world.aggregator.state.round == 2
    world.endpoint.inbox.append(arrived)
    world.step()
    world.receive()
    assert dan.acked == [slow.attempt_id]
    assert [u.delta.attempt_id for u in world.ledger.updates_of(2)] == [slow.attempt_id]


def test_an_update_that_is_two_versions_late_is_refused(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", "cid", "dan")
    world.join()
    dan = world.sites["dan"]
    late = dan.train(dan.tasks[-1])
    for _ in range(2):
        world.round("ann", "bob", "cid")
        for name in ("ann", "bob", "cid"):
            world.sites[name].heartbeat()
        world.step(60.0)
        world.receive()
    world.endpoint.announce(dan.key, *late)
    world.step()
    dan.receive()
    assert [r.code for r in dan.refused] == ["stale_round"]


def test_a_client_that_never_answered_a_task_gets_the_whole_state_with_the_next(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", "cid", "dan")
    world.join()
    world.round()
    assert {s.held_version for s in world.sites.values()} == {1}
    # dan takes version 1 in with round 2, and says nothing; then it is planned for round 4 at version 3.
    for _ in range(2):
        world.round("ann", "bob", "cid")
        for name in ("ann", "bob", "cid"):
            world.sites[name].heartbeat()
        world.step(60.0)
        world.receive()
    dan = world.sites["dan"]
    dan.heartbeat()
    world.step()
    world.round("ann", "bob", "cid")
    assert dan.tasks[-1].round == 5
    assert dan.tasks[-1].state.encoding == "snapshot"
    assert dan.held_version == world.aggregator.state.version


def test_an_empty_round_leaves_the_state_and_the_version_unchanged_and_the_next_one_opens(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob")
    world.join()
    before = world.aggregator.published_sha256
    for site in world.sites.values():
        site.fail("internal")
    world.step()
    world.receive()
    (record,) = metrics(world)
    assert (record["num_accepted"], record["num_failed"], record["version"]) == (0, 2, 0)
    assert record["coverage"] == {"0": 0, "1": 0, "2": 0}
    assert world.aggregator.published_sha256 == before
    assert world.aggregator.state.round == 2
    world.round()
    assert metrics(world)[1]["version"] == 1


def test_a_client_that_ran_out_of_memory_gets_a_smaller_task_in_the_same_round(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    ann = world.sites["ann"]
    world.join()
    first = ann.tasks[-1]
    # A device on which the first task just fits: a quarter more memory is too much for it.
    usable = int(first.predicted_peak_bytes / 0.9) + 2
    other = make_world("ann", "bob", folder="tight")
    ann = other.sites["ann"]
    ann.memory_bytes = usable
    other.join()
    first = ann.tasks[-1]
    ann.fail("oom")
    other.step()
    other.receive()
    second = ann.tasks[-1]
    assert second.attempt_id != first.attempt_id
    assert (len(second.blocks), second.micro_batch_size) < (len(first.blocks), first.micro_batch_size)
    assert second.round == first.round
    ann.fail("oom")
    other.round("bob")
    assert metrics(other)[0]["num_accepted"] == 1
    assert metrics(other)[0]["num_failed"] == 2


def test_the_run_stops_when_the_mean_of_three_scores_reaches_the_target(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=("run.target_score=0.79",))
    for site in world.sites.values():
        site.accuracy = lambda version: min(1.0, 0.2 * version)
    world.join()
    world.finish()
    assert final(world)["stop_reason"] == "target_score"
    # Scores 0, .2, .4, .6, .8, 1.0: the mean of the last three first reaches 0.79 in round 6.
    assert final(world)["rounds"] == 6


def test_a_run_that_diverges_falls_back_to_its_best_version(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=("forgetting.max_kl=0.01",))
    for site in world.sites.values():
        site.accuracy = lambda version: 0.1 * version
        site.kl = lambda version: 0.005 * version if version < 3 else 1.0
    world.join()
    world.finish()
    assert final(world)["stop_reason"] == "diverged"
    assert final(world)["version"] == 2
    assert final(world)["state_sha256"] == state_at(world.folder, 2).sha256
    assert all(site.held_version == 2 for site in world.sites.values())


def test_the_last_version_is_dense_so_that_no_residual_waits(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    world.join()
    world.finish()
    assert world.folder.load_version(2)[1] != {}
    assert world.folder.load_version(3)[1] == {}


def test_a_lone_client_in_fp32_gives_its_delta_exactly(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", overrides=("delta.format=fp32", "run.max_rounds=5"))
    world.join()
    world.step(11.0)
    world.receive()
    ann = world.sites["ann"]
    task = ann.tasks[-1]
    _, payload = ann.train(task)
    world.round()
    published, _, _ = world.folder.load_version(1)
    shape = world.plan.shape
    flat = np.concatenate([published[b][s.name].ravel() for b in task.blocks for s in shape.block_tensors()])
    assert flat.tobytes() == payload


def test_the_final_measurement_covers_everything_and_is_kept(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=2",))
    world.sites["bob"].can_evaluate_general = True
    world.join()
    world.finish()
    assert isinstance(world.sites["ann"].tasks[-1], Evaluate)
    assert world.sites["bob"].tasks[-1].measure == ("anchor", "validation", "general")
    record = final(world)
    assert record["num_clients_measured"] == 2
    assert record["kl"] == pytest.approx(0.002)
    assert record["retention"] == pytest.approx(88 / 90)


def test_the_books_keep_until_when_a_round_was_open_and_that_it_was_extended(make_world: Callable[..., Any]) -> None:
    overrides = ("run.max_rounds=2", "allocation.deadline_s=60", "allocation.rejoin_grace_s=30", "allocation.quorum=1")
    world = make_world("ann", "bob", overrides=overrides)
    world.join()
    world.round("ann")
    world.step(61.0)
    assert world.aggregator.state.extended
    world.kill()
    world.start()
    world.join("ann")
    world.step(31.0)
    world.join()
    world.round()
    kept = [(m["deadline_s"], m["extended"]) for m in metrics(world)]
    assert kept == [(90.0, True), (60.0, False)]
    assert [(r.deadline_s, r.extended) for r in world.ledger.rounds()][:2] == kept
    world.receive()
    # Each strength has twice the time of the last round.
    final_task = world.sites["ann"].tasks[-1]
    assert isinstance(final_task, Evaluate)
    assert final_task.deadline_s == 11 * 2 * 60.0


def test_a_run_over_its_budget_is_exported_at_the_strength_that_keeps_it(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=2", "forgetting.max_kl=0.01"))
    for site in world.sites.values():
        site.kl = lambda version: 0.013 if version else 0.0
    world.join()
    world.finish()
    record = final(world)
    assert world.sites["ann"].tasks[-1].strengths == tuple(i / 10 for i in range(11))
    assert (record["strength"], record["kl"]) == (0.7, pytest.approx(0.7 * 0.013))
    assert record["accuracy"] == pytest.approx(0.35)
    refused = {point["strength"]: point["refused"] for point in record["strengths"]}
    assert [strength for strength in refused if refused[strength]] == [0.8, 0.9, 1.0]


def test_a_run_that_cannot_keep_its_budget_says_that_nothing_was_learnt(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", overrides=("run.max_rounds=1", "forgetting.max_kl=0.01"))
    world.sites["ann"].kl = lambda version: 1.0 if version else 0.0
    world.join()
    world.step(11.0)
    world.receive()
    world.finish()
    assert final(world)["strength"] == 0.0
    assert "nothing could be learnt within the forgetting budget" in world.lines[-1]


def test_a_finished_run_says_goodbye_to_whoever_comes_back(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", overrides=("run.max_rounds=1",))
    world.join()
    world.step(11.0)
    world.receive()
    world.finish()
    world.kill()
    world.start()
    assert world.aggregator.finished
    world.sites["ann"].goodbye = None
    world.join()
    assert world.sites["ann"].goodbye == Goodbye(reason="the run is finished", finished=True)


class Killed(BaseException):
    """kill -9, as far as this process can act it."""


def before(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, *, nth: int) -> None:
    """Kill before the nth call."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def after(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, *, nth: int) -> None:
    """Kill after the nth call."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls[0] += 1
        if calls[0] == nth:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, wrapped)


def join_and_finish(world: Any) -> None:
    world.join()
    world.finish()


JOURNAL = [
    ("before an upload is let in", before, RunFolder, "part_path", 4),
    ("before the payload is durable", before, intake_module, "commit_file", 3),
    ("after the payload is durable", after, intake_module, "commit_file", 3),
    ("before the row of the update", before, Ledger, "add_update", 4),
    ("in the transaction of the update", after, Ledger, "add_update", 4),
    ("before the round is closing", before, Ledger, "start_closing", 2),
    ("after the round is closing", after, Ledger, "start_closing", 2),
    ("before the state files", before, RunFolder, "save_version", 2),
    ("after the state files", after, RunFolder, "save_version", 2),
    ("before the row of the round", before, Ledger, "commit_round", 2),
    ("after the row of the round", after, Ledger, "commit_round", 2),
    ("before the next assignments are durable", before, Ledger, "open_round", 3),
    ("after the next assignments are durable", after, Ledger, "open_round", 3),
    ("before the last state files", before, RunFolder, "save_version", 3),
    ("before the result", before, RunFolder, "save_final", 1),
    ("after the result", after, RunFolder, "save_final", 1),
    ("before the run's last row", before, Ledger, "commit_round", 4),
]


@pytest.mark.parametrize(
    ("cut", "owner", "name", "nth"), [j[1:] for j in JOURNAL], ids=[j[0].replace(" ", "-") for j in JOURNAL]
)
def test_killed_at_any_point_of_the_journal_the_run_ends_in_the_same_bits(
    make_world: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    undisturbed_sha256: str,
    cut: Any,
    owner: Any,
    name: str,
    nth: int,
) -> None:
    world = make_world("ann", "bob", overrides=THREE_ROUNDS)
    with monkeypatch.context() as patched:
        cut(owner, name, patched, nth=nth)
        with pytest.raises(Killed):
            join_and_finish(world)
    round_then = world.aggregator.state.round
    world.kill()
    world.start()
    assert world.aggregator.state.round in (round_then, round_then + 1)
    world.join()
    world.finish()
    assert [m["num_accepted"] for m in metrics(world)] == [2, 2, 2]
    assert world.ledger.num_updates() == 6
    assert final(world)["state_sha256"] == undisturbed_sha256
    assert all(r.equal for r in replay(world.path))


def test_killed_between_commit_and_ack_the_resent_update_is_acknowledged_and_not_counted_twice(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob")
    world.join()
    ann = world.sites["ann"]
    task = ann.tasks[-1]

    def kill_at_ack(message: Any) -> None:
        if isinstance(message, Ack):
            raise Killed

    world.endpoint.before_send = kill_at_ack
    ann.work()
    with pytest.raises(Killed):
        world.step()
    world.kill()
    world.start()
    assert world.ledger.num_updates() == 1
    world.join()
    assert [t.attempt_id for t in ann.tasks] == [task.attempt_id]
    world.endpoint.announce(ann.key, *ann.train(task))
    world.step()
    ann.receive()
    assert ann.acked == [task.attempt_id]
    assert world.ledger.num_updates() == 1


def test_after_a_restart_the_same_round_goes_on_with_the_same_attempts_and_the_rest_of_its_deadline(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob")
    world.join()
    attempts = {site.tasks[-1].attempt_id for site in world.sites.values()}
    world.step(25.0)
    world.step(1.5)
    world.kill()
    world.now_s -= 86_400.0  # another boot: the monotonic clock starts anywhere
    world.start()
    state = world.aggregator.state
    assert (state.phase, state.round) == ("open", 1)
    assert {t.attempt_id for t in state.tasks.values()} == attempts
    assert state.elapsed_s == pytest.approx(26.5)
    world.step(33.0)
    assert world.aggregator.state.phase == "open"
    world.step(1.0)
    assert world.aggregator.state.extended


def test_a_client_that_never_noticed_the_restart_delivers_without_a_new_hello(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    world.join()
    world.kill()
    world.start()
    for site in world.sites.values():
        site.heartbeat(site.tasks[-1].attempt_id, "training")
    world.round()
    assert metrics(world)[0]["num_accepted"] == 2


def test_metrics_lost_by_a_kill_are_written_again_from_the_ledger(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    world.join()
    world.round()
    (world.path / "metrics.jsonl").write_text('{"round": 1, "ver')
    world.kill()
    world.start()
    assert [m["round"] for m in metrics(world)] == [1]


def test_a_state_file_that_is_not_what_the_ledger_names_is_not_served(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    world.join()
    world.round()
    world.kill()
    world.folder.save_version(1, step=b"", published={}, residual={})
    shutil.rmtree(world.path / "updates")  # else it is made again
    with pytest.raises(RunFolderError, match="restore the folder from a backup"):
        world.start()


def test_the_same_run_gives_the_same_attempt_ids_and_seeds(make_world: Callable[..., Any]) -> None:
    ids: list[list[tuple[AttemptId, int]]] = []
    for folder in ("one", "two"):
        world = make_world("ann", "bob", folder=folder)
        world.join()
        ids.append([(s.tasks[-1].attempt_id, s.tasks[-1].seed) for s in world.sites.values()])
    assert ids[0] == ids[1]


def test_bytes_are_counted_per_client_and_round(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob")
    world.join()
    world.round()
    (record,) = metrics(world)
    assert record["bytes_up"] == sum(c["bytes_up"] for c in record["clients"]) > 0
    assert record["bytes_down"] == sum(c["bytes_down"] for c in record["clients"]) > 0


def test_the_folder_tells_no_names_outside_its_owner(make_world: Callable[..., Any]) -> None:
    world = make_world("ann")
    assert world.path.stat().st_mode & 0o777 == 0o700
    assert Path(world.folder.ledger_path).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("after", "tasks"), [(1, 1), (2, 2), (0, 4)])
def test_the_operator_says_after_how_many_refusals_a_client_is_quarantined(
    make_world: Callable[..., Any], after: int, tasks: int
) -> None:
    world = make_world("ann", "eve", overrides=(f"server.quarantine_after={after}",))
    world.join()
    eve = world.sites["eve"]
    for _ in range(3):
        if len(eve.tasks) > len(eve.refused):
            world.endpoint.announce(eve.key, *bad("non_finite", eve))
        world.round("ann")
    assert len(eve.tasks) == tasks
    told = [line for line in world.lines if "fedblocks keys release RUN eve" in line]
    assert len(told) == (1 if after else 0)


def test_malformed_messages_on_the_wire_count_towards_the_quarantine(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "eve")
    world.join()
    eve = world.sites["eve"]
    for _ in range(5):
        world.endpoint.inbox.append(PeerRejected(key=eve.key, address="", code="malformed", text="no message"))
    world.step(2.0)
    assert world.ledger.quarantined(3) == {eve.key}
    assert any("eve gets no task any more after 5 refusals" in line for line in world.lines)
