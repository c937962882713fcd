"""The client's session as a pure state machine: events in, actions out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedblocks.edge_client import session as s
from fedblocks.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    AttemptId,
    DataFormat,
    Evaluate,
    Goodbye,
    Refused,
    Resource,
    ResourceInfo,
    StateUpdate,
    Welcome,
)

FILE = ResourceInfo(name="plan.json", num_bytes=4, sha256="aa")


def welcome(*resources: ResourceInfo) -> Welcome:
    return Welcome(
        protocol_version=PROTOCOL_VERSION,
        run_id="r",
        method="fedbe",
        round=1,
        version=0,
        heartbeat_interval_s=5.0,
        data=DataFormat(max_tokens=64, append_eos=False, join=" "),
        resources=resources,
    )


def task(attempt: str) -> Evaluate:
    state = StateUpdate(encoding="none", from_version=0, to_version=0, state_sha256="")
    return Evaluate(
        attempt_id=AttemptId(attempt),
        round=1,
        state=state,
        payload_bytes=0,
        payload_sha256="",
        measure=("anchor",),
        deadline_s=10.0,
    )


def run(state: s.SessionState, *events: s.Event, now_s: float = 0.0) -> tuple[s.SessionState, list[s.Action]]:
    """The state after all events, and the actions of the last one."""
    actions: list[s.Action] = []
    for event in events:
        state, actions = s.handle(state, event, now_s=now_s)
    return state, actions


def ready(**changes: object) -> s.SessionState:
    state, _ = run(s.SessionState(), s.Connected(), s.Received(message=welcome()))
    return replace(state, **changes)


def received(message: object, payload: bytes | None = None) -> s.Received:
    return s.Received(message=message, payload=payload)


def test_a_connection_is_greeted():
    _, actions = run(s.SessionState(), s.Connected())

    assert actions == [s.SendHello()]


def test_missing_files_are_fetched_one_by_one_before_the_first_task():
    other = replace(FILE, name="anchor.bin", sha256="bb")
    state, actions = run(s.SessionState(), s.Connected(), received(welcome(FILE, other)))
    assert actions == [s.SendFetch(name="plan.json")]

    state, actions = run(state, received(Resource(name="plan.json", payload_bytes=4, payload_sha256="aa"), b"1234"))
    assert actions == [s.StoreResource(info=FILE, payload=b"1234"), s.SendFetch(name="anchor.bin")]

    state, actions = run(state, received(Resource(name="anchor.bin", payload_bytes=4, payload_sha256="bb"), b"1234"))
    assert [type(a) for a in actions] == [s.StoreResource, s.Prepare, s.SendReady]
    assert state.phase is s.Phase.READY


def test_files_that_are_on_disk_are_not_fetched():
    _, actions = run(s.SessionState(have=frozenset({"aa"})), s.Connected(), received(welcome(FILE)))

    assert [type(a) for a in actions] == [s.Prepare, s.SendReady]


def test_a_file_with_another_hash_than_welcomed_is_not_stored():
    state, _ = run(s.SessionState(), s.Connected(), received(welcome(FILE)))

    _, actions = run(state, received(Resource(name="plan.json", payload_bytes=4, payload_sha256="cc"), b"1234"))

    assert [type(a) for a in actions] == [s.Say]


def test_a_task_starts_at_once_when_nothing_waits():
    _, actions = run(ready(), received(task("a"), b"state"))

    assert actions == [s.StartTask(task=task("a"), payload=b"state")]


def test_a_finished_update_is_announced_and_its_ack_commits_it_once():
    state, actions = run(ready(), received(task("a")), s.TaskDone(attempt_id=AttemptId("a"), has_update=True))
    assert actions == [s.AnnounceUpdate(attempt_id=AttemptId("a"))]

    ack = received(Ack(attempt_id=AttemptId("a"), payload_sha256="x"))
    state, actions = run(state, ack)
    assert actions == [s.CommitUpdate(attempt_id=AttemptId("a"))]

    _, actions = run(state, ack)
    assert actions == []


def test_an_unanswered_update_is_announced_again_after_every_reconnection():
    state, _ = run(ready(), received(task("a")), s.TaskDone(attempt_id=AttemptId("a"), has_update=True))

    _, actions = run(state, s.Disconnected(), s.Connected(), received(welcome()))

    assert actions == [s.SendReady(), s.AnnounceUpdate(attempt_id=AttemptId("a"))]


def test_an_update_left_by_a_killed_process_is_announced_before_any_task():
    state, actions = run(s.SessionState(outbox=AttemptId("old")), s.Connected(), received(welcome()))
    assert [type(a) for a in actions] == [s.Prepare, s.SendReady, s.AnnounceUpdate]

    state, actions = run(state, received(task("new")))
    assert actions == []

    _, actions = run(state, received(Ack(attempt_id=AttemptId("old"), payload_sha256="x")))
    assert [type(a) for a in actions] == [s.CommitUpdate, s.StartTask]


@pytest.mark.parametrize(
    "answer",
    [
        Ack(attempt_id=AttemptId("old"), payload_sha256="x"),
        Refused(code="over_norm", text="too large", attempt_id=AttemptId("old")),
    ],
)
def test_an_answer_for_the_process_before_this_one_waits_until_the_residual_can_be_committed(answer):
    state, actions = run(s.SessionState(outbox=AttemptId("old")), s.Connected(), received(answer))
    assert actions == []

    _, actions = run(state, received(welcome()))
    assert [type(a) for a in actions] == [s.Prepare, s.SendReady, s.AnnounceUpdate]


def test_the_assignment_of_the_update_in_the_outbox_is_answered_and_not_trained_again():
    state = ready(outbox=AttemptId("a"), announced_s=0.0)

    _, actions = run(state, received(task("a")), now_s=1.0)

    assert actions == [s.AnnounceUpdate(attempt_id=AttemptId("a"))]


def test_the_same_assignment_sent_twice_while_training_starts_once():
    state, _ = run(ready(), received(task("a")))

    _, actions = run(state, received(task("a")))

    assert actions == []


@pytest.mark.parametrize("code", ["over_quota", "no_space"])
def test_retry_later_keeps_the_update_and_announces_it_again(code):
    state = ready(outbox=AttemptId("a"), announced_s=0.0)
    state, actions = run(state, received(Refused(code=code, text="full", attempt_id=AttemptId("a"))), now_s=1.0)
    assert [type(a) for a in actions] == [s.Say]
    assert state.outbox == "a"

    _, actions = run(state, s.Tick(), now_s=1.0 + s.RETRY_LATER_S)
    assert actions == [s.AnnounceUpdate(attempt_id=AttemptId("a"))]


def test_a_final_refusal_discards_the_update_and_frees_the_way_for_the_next_task():
    state = ready(outbox=AttemptId("a"), announced_s=0.0)
    state, _ = run(state, received(task("b")))

    state, actions = run(state, received(Refused(code="stale_round", text="closed", attempt_id=AttemptId("a"))))

    assert [type(a) for a in actions] == [s.DiscardUpdate, s.StartTask]
    assert state.outbox is None


def test_the_refusal_that_follows_the_ack_of_a_resent_update_is_quiet():
    state, _ = run(ready(outbox=AttemptId("a")), received(Ack(attempt_id=AttemptId("a"), payload_sha256="x")))

    state, actions = run(state, received(Refused(code="conflict", text="counted before", attempt_id=AttemptId("a"))))

    assert actions == []
    assert state.outbox is None


@pytest.mark.parametrize("attempt", ["b", None])
def test_a_conflict_of_anything_but_the_acknowledged_update_is_said(attempt):
    state, _ = run(ready(outbox=AttemptId("a")), received(Ack(attempt_id=AttemptId("a"), payload_sha256="x")))

    _, actions = run(state, received(Refused(code="conflict", text="other content", attempt_id=attempt)))

    assert actions == [s.Say(text="refused (conflict): other content")]


def test_a_conflict_of_the_update_in_the_outbox_is_said_and_discards_it():
    state = ready(outbox=AttemptId("a"), acked=AttemptId("z"), announced_s=0.0)

    _, actions = run(state, received(Refused(code="conflict", text="other content", attempt_id=AttemptId("a"))))

    assert actions == [s.DiscardUpdate(attempt_id=AttemptId("a"), text="refused (conflict): other content")]


@pytest.mark.parametrize("code", ["version_skew", "model_mismatch", "not_enrolled", "revoked"])
def test_a_refusal_of_the_client_itself_ends_the_session_with_exit_code_4(code):
    state, actions = run(ready(), received(Refused(code=code, text="why")))

    assert actions == [s.Stop(exit_code=4, text=f"refused ({code}): why")]
    assert run(state, s.Connected())[1] == []


def test_a_silent_aggregator_is_asked_again_but_not_while_chunks_are_still_on_their_way():
    state = ready(outbox=AttemptId("a"), announced_s=0.0)

    state, actions = run(state, s.Tick(uploading=True), now_s=s.ANSWER_TIMEOUT_S + 1)
    assert actions == []
    _, actions = run(state, s.Tick(), now_s=2 * s.ANSWER_TIMEOUT_S + 1)
    assert actions == [s.AnnounceUpdate(attempt_id=AttemptId("a"))]


def test_the_end_of_the_run_is_exit_code_0():
    _, actions = run(ready(), received(Goodbye(reason="finished", finished=True)))

    assert actions == [s.Stop(exit_code=0, text="finished")]


def test_outside_its_hours_a_client_leaves_and_greets_again_without_becoming_ready():
    state, actions = run(ready(), s.Tick(resting=True))
    assert actions == [s.Rest(), s.SendHello()]

    state, actions = run(state, received(welcome()))
    assert [type(a) for a in actions] == [s.Say, s.Rest]

    _, actions = run(state, s.Tick(resting=True))
    assert actions == []


def test_when_its_hours_begin_a_resting_client_is_ready_again():
    state, _ = run(ready(), s.Tick(resting=True), received(welcome()))

    state, actions = run(state, s.Tick(resting=False))
    assert actions == [s.SendReady()]

    _, actions = run(state, received(task("a")))
    assert [type(a) for a in actions] == [s.StartTask]


def test_a_client_that_starts_outside_its_hours_is_not_ready_until_they_begin():
    state, actions = run(s.SessionState(resting=True), s.Connected(), received(welcome()))
    assert [type(a) for a in actions] == [s.Prepare, s.Say, s.Rest]

    _, actions = run(state, s.Tick())
    assert actions == [s.SendReady()]


def test_a_task_that_was_sent_before_the_aggregator_knew_of_the_rest_is_not_started():
    state, _ = run(ready(), s.Tick(resting=True))

    state, actions = run(state, received(task("a")))

    assert (actions, state.pending) == ([], None)


@pytest.mark.parametrize("opened", [{"outbox": AttemptId("a")}, {"busy": AttemptId("a")}])
def test_what_is_open_is_answered_before_the_rest(opened):
    state = ready(announced_s=0.0, **opened)

    state, actions = run(state, s.Tick(resting=True), now_s=s.ANSWER_TIMEOUT_S + 1)

    assert not state.resting
    assert s.Rest() not in actions
    assert [type(a) for a in actions] == [s.AnnounceUpdate] * ("outbox" in opened)


def test_an_update_that_was_left_open_is_delivered_outside_the_hours_too():
    state = s.SessionState(outbox=AttemptId("old"), resting=True)

    state, actions = run(state, s.Connected(), received(welcome()))
    assert [type(a) for a in actions] == [s.Prepare, s.Say, s.Rest, s.AnnounceUpdate]

    _, actions = run(state, received(Ack(attempt_id=AttemptId("old"), payload_sha256="x")))
    assert actions == [s.CommitUpdate(attempt_id=AttemptId("old"))]


def test_a_client_that_is_not_connected_when_its_hours_end_tells_nobody():
    state, actions = run(ready(), s.Disconnected(), s.Tick(resting=True))
    assert (actions, state.resting) == ([], True)

    _, actions = run(state, s.Connected(), received(welcome()))
    assert [type(a) for a in actions] == [s.Say, s.Rest]
