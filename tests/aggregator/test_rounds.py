"""The waiting rules of a run, one sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedblocks.aggregator import rounds
from fedblocks.aggregator.rounds import (
    Action,
    ClientHeard,
    ClientJoined,
    ClientLeft,
    CloseRound,
    Event,
    FinishRun,
    MeasureFinal,
    MeasurePlanned,
    Note,
    Outcome,
    PlanFailed,
    PlanRound,
    ReportReceived,
    RoundFolded,
    RoundPlanned,
    RoundsState,
    Rules,
    SendTask,
    Task,
    TaskFailed,
    TaskReplaced,
    Tick,
    UpdateRefused,
    UpdateStored,
    handle,
    waiting_for,
)
from fedblocks.protocol.messages import AttemptId, ClientKey

RULES = Rules(min_cohort=2, quorum=0.7, rejoin_grace_s=30.0, gather_s=10.0, silent_after_s=15.0)


def key(name: str) -> ClientKey:
    return ClientKey(f"key-of-{name}")


def joined(name: str, now_s: float = 0.0) -> ClientJoined:
    return ClientJoined(key=key(name), name=name, now_s=now_s)


def attempt(name: str, round_number: int = 1) -> AttemptId:
    return AttemptId(f"r{round_number}-{name}")


def train(*names: str, round_number: int = 1) -> dict[ClientKey, Task]:
    return {key(n): Task(attempt_id=attempt(n, round_number), kind="train") for n in names}


def stored(name: str, round_number: int = 1) -> UpdateStored:
    return UpdateStored(key=key(name), attempt_id=attempt(name, round_number))


def start(*expected: str) -> RoundsState:
    return rounds.initial_state(now_s=0.0, expected=[(key(n), n) for n in expected])


def after(state: RoundsState, *events: Event, rules: Rules = RULES) -> tuple[RoundsState, list[Action]]:
    actions: list[Action] = []
    for event in events:
        state, more = handle(state, event, rules)
        actions += more
    return state, actions


def open_round(*names: str, deadline_s: float = 60.0) -> RoundsState:
    state, _ = after(
        start(*names), *(joined(n) for n in names), RoundPlanned(tasks=train(*names), deadline_s=deadline_s)
    )
    assert state.phase == "open"
    return state


def heard(names: Sequence[str], now_s: float) -> list[Event]:
    return [ClientHeard(key=key(n), name=n, now_s=now_s) for n in names]


def test_the_first_round_opens_at_once_when_every_expected_client_is_there() -> None:
    state, actions = after(start("a", "b"), joined("b"), joined("a"))
    assert actions == [PlanRound(round=1, clients=(key("a"), key("b")))]
    assert state.phase == "planning"


@pytest.mark.parametrize(("waited_s", "opens"), [(9.9, False), (10.0, True), (10.1, True)])
def test_the_first_round_waits_for_the_expected_ones_no_longer_than_the_gathering_time(
    waited_s: float, opens: bool
) -> None:
    _, actions = after(start("a", "b", "c"), joined("a"), joined("b"), Tick(now_s=waited_s))
    assert bool(actions) is opens


def test_an_expected_client_that_never_came_is_not_waited_for_again() -> None:
    state, _ = after(
        start("a", "b", "c"),
        joined("a"),
        joined("b"),
        Tick(now_s=10.0),
        RoundPlanned(tasks=train("a", "b"), deadline_s=60.0),
    )
    _, actions = after(state, stored("a"), stored("b"), RoundFolded(version=1, accepted=2, stop_reason=None))
    assert actions[-1] == PlanRound(round=2, clients=(key("a"), key("b")))


def test_the_gathering_time_counts_from_the_moment_at_which_the_smallest_cohort_is_there() -> None:
    state, actions = after(start("a", "b", "c"), joined("a"), Tick(now_s=500.0))
    assert not actions
    state, actions = after(state, joined("b", 500.0), *heard("a", 500.0), Tick(now_s=509.0))
    assert not actions
    _, actions = after(state, Tick(now_s=510.0))
    assert actions == [PlanRound(round=1, clients=(key("a"), key("b")))]


def test_the_wait_for_clients_says_who_is_missing() -> None:
    state, _ = after(start("a", "b"), joined("a"))
    assert waiting_for(state, RULES) == "clients: 1 of at least 2 are here (not here yet: b)"


def test_every_task_is_sent_when_the_round_opens() -> None:
    _, actions = after(start("a", "b"), joined("a"), joined("b"), RoundPlanned(tasks=train("a", "b"), deadline_s=60.0))
    assert actions[1:] == [SendTask(key=key("a")), SendTask(key=key("b"))]


def test_a_client_that_joins_an_open_round_without_a_task_waits_for_the_next() -> None:
    state, actions = after(open_round("a", "b"), joined("c"))
    assert actions == []
    _, actions = after(state, stored("a"), stored("b"), RoundFolded(version=1, accepted=2, stop_reason=None))
    assert actions[-1] == PlanRound(round=2, clients=(key("a"), key("b"), key("c")))


def test_a_client_that_comes_back_to_an_unfinished_task_is_sent_the_same_one() -> None:
    _, actions = after(open_round("a", "b"), joined("a", 20.0))
    assert actions == [SendTask(key=key("a"))]


def test_a_client_that_comes_back_after_its_update_was_stored_is_sent_nothing() -> None:
    _, actions = after(open_round("a", "b"), stored("a"), joined("a", 20.0))
    assert actions == []


@pytest.mark.parametrize(
    "last",
    [
        stored("b"),
        UpdateRefused(key=key("b"), attempt_id=attempt("b")),
        TaskFailed(key=key("b"), attempt_id=attempt("b")),
        ReportReceived(key=key("b"), attempt_id=attempt("b")),
    ],
)
def test_the_round_closes_as_soon_as_every_client_has_answered_whatever_the_answer(last: Event) -> None:
    state, actions = after(open_round("a", "b"), stored("a"), last)
    assert actions == [CloseRound(round=1)]
    assert state.phase == "closing"


def test_an_answer_to_another_attempt_closes_nothing() -> None:
    _, actions = after(open_round("a", "b"), stored("a"), UpdateStored(key=key("b"), attempt_id=AttemptId("other")))
    assert actions == []


@pytest.mark.parametrize(("now_s", "closes"), [(59.9, False), (60.0, True), (60.1, True)])
def test_at_the_deadline_a_round_with_its_quorum_closes(now_s: float, closes: bool) -> None:
    state = open_round("a", "b", "c", "d")
    _, actions = after(state, stored("a"), stored("b"), stored("c"), Tick(now_s=now_s))
    assert (actions == [CloseRound(round=1)]) is closes


@pytest.mark.parametrize(("num_stored", "quorum"), [(6, False), (7, True), (8, True)])
def test_the_quorum_is_seven_of_ten(num_stored: int, quorum: bool) -> None:
    names = "abcdefghij"
    state, actions = after(open_round(*names), *(stored(n) for n in names[:num_stored]), Tick(now_s=60.0))
    assert (actions == [CloseRound(round=1)]) is quorum
    assert state.extended is not quorum


def test_a_round_that_misses_its_quorum_is_extended_once_and_then_closes_with_what_it_has() -> None:
    state, actions = after(open_round("a", "b"), stored("a"), Tick(now_s=60.0))
    assert [type(a) for a in actions] == [Note]
    assert "waiting for b" in actions[0].text  # type: ignore[union-attr]
    state, actions = after(state, Tick(now_s=89.9))
    assert actions == []
    _, actions = after(state, Tick(now_s=90.0))
    assert actions == [CloseRound(round=1)]


def test_a_quorum_reached_during_the_extension_closes_the_round() -> None:
    names = ("a", "b", "c")
    state, _ = after(open_round(*names), stored("a"), Tick(now_s=60.0), stored("b"), Tick(now_s=61.0))
    assert state.phase == "open"  # 2 of 3 is below 0.7
    _, actions = after(state, stored("c"))
    assert actions == [CloseRound(round=1)]


def test_nobody_answers_so_the_round_closes_empty_and_the_next_is_planned() -> None:
    state, actions = after(open_round("a", "b"), Tick(now_s=60.0), *heard("ab", 89.0), Tick(now_s=90.0))
    assert actions[-1] == CloseRound(round=1)
    state, actions = after(state, RoundFolded(version=0, accepted=0, stop_reason=None))
    assert (state.round, state.version, state.empty_rounds) == (2, 0, 1)
    assert actions == [PlanRound(round=2, clients=(key("a"), key("b")))]


def test_three_empty_rounds_in_a_row_give_one_warning_that_names_the_silent_clients() -> None:
    state = open_round("a", "b")
    warnings: list[Note] = []
    for number in range(4):
        state, _ = after(state, Tick(now_s=state.now_s + 60.0), Tick(now_s=state.now_s + 120.0))
        state, actions = after(state, RoundFolded(version=0, accepted=0, stop_reason=None), *heard("ab", state.now_s))
        warnings += [a for a in actions if isinstance(a, Note)]
        state, _ = after(state, RoundPlanned(tasks=train("a", "b", round_number=number + 2), deadline_s=60.0))
    assert [w.text for w in warnings] == ["3 rounds in a row brought no update: no answer from a, b"]


def test_a_silent_client_keeps_its_task_until_the_deadline() -> None:
    state, actions = after(open_round("a", "b"), stored("a"), Tick(now_s=50.0))
    assert actions == []
    assert waiting_for(state, RULES) == "round 1: b (silent for 50 s); at most 10 s more"


def test_a_silent_client_is_not_planned_for() -> None:
    state = open_round("a", "b", "c")
    state, _ = after(state, stored("a"), stored("b"), *heard("ab", 50.0), Tick(now_s=60.0), Tick(now_s=90.0))
    _, actions = after(state, *heard("ab", 90.0), RoundFolded(version=1, accepted=2, stop_reason=None))
    assert actions == [PlanRound(round=2, clients=(key("a"), key("b")))]


def test_with_the_quorum_in_a_round_does_not_wait_for_a_client_that_said_goodbye() -> None:
    names = ("a", "b", "c", "d")
    _, actions = after(open_round(*names), *(stored(n) for n in "abc"), ClientLeft(key=key("d")))
    assert actions == [CloseRound(round=1)]


def test_without_the_quorum_a_round_waits_for_a_client_that_said_goodbye_to_come_back() -> None:
    state, actions = after(open_round("a", "b"), stored("a"), ClientLeft(key=key("b")))
    assert actions == []
    assert waiting_for(state, RULES) == "round 1: b (not connected); at most 60 s more"
    _, actions = after(state, joined("b", 5.0))
    assert actions == [SendTask(key=key("b"))]


def test_a_client_still_at_work_on_the_last_round_is_left_in_peace_while_the_others_suffice() -> None:
    names = ("a", "b", "c", "d")
    state, _ = after(open_round(*names), *(stored(n) for n in "abc"), *heard("abc", 60.0))
    busy = ClientHeard(key=key("d"), name="d", now_s=60.0, busy_with=attempt("d"))
    state, actions = after(state, busy, Tick(now_s=60.0), RoundFolded(version=1, accepted=3, stop_reason=None))
    assert actions[-1] == PlanRound(round=2, clients=(key("a"), key("b"), key("c")))


def test_a_client_whose_late_update_has_arrived_is_planned_for_again() -> None:
    names = ("a", "b", "c", "d")
    state, _ = after(open_round(*names), *(stored(n) for n in "abc"), *heard("abc", 60.0))
    busy = ClientHeard(key=key("d"), name="d", now_s=60.0, busy_with=attempt("d"))
    state, _ = after(state, busy, Tick(now_s=60.0), RoundFolded(version=1, accepted=3, stop_reason=None))
    assert state.late == {key("d"): attempt("d")}
    planned = RoundPlanned(tasks=train("a", "b", "c", round_number=2), deadline_s=60.0)
    state, _ = after(state, planned, stored("d"), *(stored(n, 2) for n in "abc"))
    _, actions = after(state, RoundFolded(version=2, accepted=4, stop_reason=None))
    assert actions == [PlanRound(round=3, clients=tuple(key(n) for n in names))]


def test_a_lone_client_that_is_late_is_given_the_next_task_all_the_same() -> None:
    rules = Rules(min_cohort=1)
    state, _ = after(start("a"), joined("a"), RoundPlanned(tasks=train("a"), deadline_s=10.0), rules=rules)
    busy = ClientHeard(key=key("a"), name="a", now_s=40.0, busy_with=attempt("a"))
    state, _ = after(state, Tick(now_s=10.0), busy, Tick(now_s=40.0), rules=rules)
    _, actions = after(state, RoundFolded(version=0, accepted=0, stop_reason=None), rules=rules)
    assert actions == [PlanRound(round=2, clients=(key("a"),))]


def test_when_no_client_fits_no_round_opens_until_somebody_says_hello() -> None:
    state, actions = after(
        start("a", "b"), joined("a"), joined("b"), PlanFailed(text="a lacks 12 MB for block 2"), Tick(now_s=1.0)
    )
    assert actions[1:] == [Note(text="a lacks 12 MB for block 2")]
    assert "a lacks 12 MB" in waiting_for(state, RULES)
    _, actions = after(state, joined("a", 2.0))
    assert actions == [PlanRound(round=1, clients=(key("a"), key("b")))]


def test_a_task_that_did_not_fit_is_replaced_and_the_round_waits_for_the_replacement() -> None:
    replacement = Task(attempt_id=AttemptId("smaller"), kind="train", reissued=True)
    state, actions = after(open_round("a", "b"), stored("a"), TaskReplaced(key=key("b"), task=replacement))
    assert actions == [SendTask(key=key("b"))]
    _, actions = after(state, UpdateStored(key=key("b"), attempt_id=AttemptId("smaller")))
    assert actions == [CloseRound(round=1)]


def test_after_the_last_round_the_present_clients_measure_the_final_state_and_the_run_ends() -> None:
    state, actions = after(
        open_round("a", "b"), stored("a"), stored("b"), RoundFolded(version=1, accepted=2, stop_reason="max_rounds")
    )
    assert actions[-1] == MeasureFinal(clients=(key("a"), key("b")))
    tasks = {key(n): Task(attempt_id=attempt(n, 2), kind="evaluate") for n in "ab"}
    state, actions = after(state, MeasurePlanned(tasks=tasks, deadline_s=20.0))
    assert actions == [SendTask(key=key("a")), SendTask(key=key("b"))]
    reports = [ReportReceived(key=key(n), attempt_id=attempt(n, 2)) for n in "ab"]
    state, actions = after(state, *reports)
    assert actions == [FinishRun()]
    assert waiting_for(state, RULES) == "nothing: the run is finished"


@pytest.mark.parametrize(("awake", "measuring"), [("ab", "ab"), ("a", "a"), ("", "ab")])
def test_a_silent_client_is_asked_for_the_final_measurement_only_where_all_are_silent(
    awake: str, measuring: str
) -> None:
    state, _ = after(open_round("a", "b"), Tick(now_s=59.0), *heard(awake, 59.0))
    _, actions = after(state, stored("a"), stored("b"), RoundFolded(version=1, accepted=2, stop_reason="max_rounds"))
    assert actions[-1] == MeasureFinal(clients=tuple(key(name) for name in measuring))


def test_the_final_measurement_does_not_wait_beyond_its_deadline() -> None:
    state, _ = after(open_round("a", "b"), stored("a"), stored("b"))
    tasks = {key("a"): Task(attempt_id=attempt("a", 2), kind="evaluate")}
    state, _ = after(
        state,
        RoundFolded(version=1, accepted=2, stop_reason="target_score"),
        MeasurePlanned(tasks=tasks, deadline_s=20.0),
    )
    state, actions = after(state, Tick(now_s=19.0))
    assert actions == []
    _, actions = after(state, Tick(now_s=20.0))
    assert actions == [FinishRun()]


def test_after_a_restart_the_final_measurement_waits_for_the_clients_to_come_back_but_not_long() -> None:
    state = replace(start("a", "b"), phase="concluding")
    state, actions = after(state, joined("a"), Tick(now_s=9.0))
    assert actions == []
    assert waiting_for(state, RULES) == "clients for the final measurement (b); 1 s"
    _, actions = after(state, Tick(now_s=10.0))
    assert actions == [MeasureFinal(clients=(key("a"),))]


def test_with_nobody_left_to_measure_the_run_ends_at_once() -> None:
    state, _ = after(open_round("a", "b"), stored("a"), stored("b"))
    _, actions = after(
        state,
        RoundFolded(version=1, accepted=2, stop_reason="max_rounds"),
        MeasurePlanned(tasks={}, deadline_s=20.0),
    )
    assert actions[-1] == FinishRun()


def test_a_clock_that_stands_or_runs_backwards_does_not_move_the_deadline() -> None:
    state, _ = after(open_round("a", "b"), Tick(now_s=30.0), Tick(now_s=10.0), Tick(now_s=10.0))
    assert state.elapsed_s == 30.0


@given(
    st.permutations(["a", "b", "c", "d"]),
    st.lists(st.sampled_from(["stored", "refused", "failed"]), min_size=4, max_size=4),
)
def test_the_order_of_the_answers_does_not_matter(order: list[str], answers: list[Outcome]) -> None:
    kinds = {"stored": UpdateStored, "refused": UpdateRefused, "failed": TaskFailed}
    answer_of = dict(zip("abcd", answers, strict=True))
    state = open_round(*"abcd")
    state, actions = after(state, *(kinds[answer_of[n]](key=key(n), attempt_id=attempt(n)) for n in order))
    assert actions == [CloseRound(round=1)]
    assert {k: t.outcome for k, t in state.tasks.items()} == {key(n): answer_of[n] for n in "abcd"}


@given(st.lists(st.floats(0.0, 40.0), max_size=12))
def test_every_wait_of_an_open_round_ends_within_deadline_and_grace(steps_s: list[float]) -> None:
    state, now_s = open_round("a", "b"), 0.0
    for step_s in [*steps_s, 60.0, 30.0]:
        now_s += step_s
        state, _ = handle(state, Tick(now_s=now_s), RULES)
    assert state.phase == "closing"
