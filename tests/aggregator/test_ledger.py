"""What the ledger keeps, through any restart."""

from __future__ import annotations

import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedblocks.aggregator import run_rules
from fedblocks.aggregator.ledger import (
    MAX_NOTES,
    MIGRATIONS,
    Ledger,
    LedgerError,
    is_made,
    open_ledger,
    open_read_only,
    release,
)
from fedblocks.profiles.calibration import Calibration
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol.codec import from_plain
from fedblocks.protocol.messages import (
    Assignment,
    AttemptId,
    ClientKey,
    Delta,
    Evaluate,
    Measurement,
    StateUpdate,
    TensorHeader,
    TrainReport,
)

IDENTITY = {"run_id": "run-1", "base_hash": "b" * 64}
ANN, BOB = ClientKey("a" * 40), ClientKey("b" * 40)
STATE = StateUpdate(encoding="none", from_version=0, to_version=0, state_sha256="0" * 64)


def assignment(attempt_id: str, *, round_number: int = 0) -> Assignment:
    return Assignment(
        attempt_id=AttemptId(attempt_id),
        round=round_number,
        state=STATE,
        payload_bytes=0,
        payload_sha256="",
        blocks=(0, 2),
        steps=16,
        batch_size=8,
        anchor_batch_size=4,
        anchor_every=1,
        anchor_weight=1.0,
        learning_rate=3e-4,
        warmup_steps=8,
        weight_decay=0.01,
        clip_norm=1.0,
        adam_beta1=0.9,
        adam_beta2=0.99,
        adam_eps=1e-8,
        optimizer_mode="fp32",
        micro_batch_size=8,
        checkpoint_activations=False,
        delta_format="int8",
        delta_density=0.25,
        seed=7,
        deadline_s=60.0,
        memory_budget_bytes=0,
        predicted_peak_bytes=1,
        predicted_seconds=2.0,
        measure=("validation", "anchor"),
    )


def evaluate(attempt_id: str) -> Evaluate:
    return Evaluate(
        attempt_id=AttemptId(attempt_id),
        round=0,
        state=STATE,
        payload_bytes=0,
        payload_sha256="",
        measure=("general",),
        deadline_s=60.0,
    )


def commit_first(ledger: Ledger, **given: Any) -> None:
    """Round 0 is closed, with version 1."""
    usual = {"settings": None, "method_state": None, "stop_reason": None, "metrics": None}
    ledger.commit_round(0, new_version=1, state_sha256="ab", unix_s=3.0, **{**usual, **given})


def delta(attempt_id: str, *, sha256: str = "c" * 64, round_number: int = 0) -> Delta:
    return Delta(
        attempt_id=AttemptId(attempt_id),
        round=round_number,
        version=0,
        num_examples=10,
        steps=16,
        format="int8",
        density=0.25,
        tensors=(TensorHeader(block=0, name="mlp.up_proj.weight", rows_sent=3),),
        payload_bytes=99,
        payload_sha256=sha256,
        train=TrainReport(
            num_target_tokens=1,
            loss_first=2.0,
            loss_last=1.0,
            anchor_kl=0.01,
            prefix_s=0.0,
            train_s=1.0,
            measure_s=0.0,
            encode_s=0.0,
            step_s=0.1,
            peak_memory_bytes=1,
            predicted_peak_bytes=1,
            mode=ExecutionMode(),
            gradient_energy=(1.0, 2.0),
        ),
        measurements=(Measurement(measure="validation", version=0, num_items=4, num_correct=1),),
    )


def opened(folder: Path) -> Ledger:
    return open_ledger(folder / "ledger.sqlite", IDENTITY)


def with_open_round(folder: Path) -> Ledger:
    ledger = opened(folder)
    for key, name in ((ANN, "ann"), (BOB, "bob")):
        ledger.save_client(key, name, {"name": name}, unix_s=1.0)
    ledger.open_round(
        round=0,
        kind="train",
        version=0,
        deadline_s=60.0,
        plan={"why": "test"},
        tasks=[(BOB, evaluate("b0")), (ANN, assignment("a0"))],
        unix_s=2.0,
    )
    return ledger


def test_the_ledger_is_private_and_syncs_fully(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.close()
    path = tmp_path / "ledger.sqlite"
    assert path.stat().st_mode & 0o777 == 0o600
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)


def test_an_open_round_and_its_assignments_come_back_as_they_were_written(tmp_path: Path) -> None:
    with_open_round(tmp_path).close()
    ledger = opened(tmp_path)
    stored = ledger.assignments(0)
    assert [s.message for s in stored] == [assignment("a0"), evaluate("b0")]
    assert [(s.client_key, s.outcome) for s in stored] == [(ANN, "open"), (BOB, "open")]
    last = ledger.last_round()
    assert last is not None
    assert (last.round, last.phase, last.plan, last.elapsed_s) == (0, "open", {"why": "test"}, 0.0)


def test_an_update_counts_once_and_its_measurements_with_it(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    ledger.add_update(ANN, delta("a0"), measurements=delta("a0").measurements, folded_in=0, unix_s=3.0)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.add_update(
            ANN, delta("a0", sha256="d" * 64), measurements=delta("a0").measurements, folded_in=0, unix_s=4.0
        )
    assert ledger.stored_sha256(ANN, 0, AttemptId("a0")) == "c" * 64
    assert ledger.stored_sha256(BOB, 0, AttemptId("a0")) is None
    assert [u.delta for u in ledger.updates_of(0)] == [delta("a0")]
    assert ledger.measurements(0) == [(ANN, delta("a0").measurements[0])]
    assert ledger.assignments(0)[0].outcome == "stored"


def test_the_accepted_set_is_listed_by_client_whatever_the_order_of_arrival(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    ledger.add_assignment(BOB, replace(assignment("b1"), blocks=(1,)), reissued=True)
    for key, attempt_id in ((BOB, "b1"), (ANN, "a0")):
        ledger.add_update(key, delta(attempt_id), measurements=delta("a0").measurements, folded_in=0, unix_s=3.0)
    assert [u.client_key for u in ledger.updates_of(0)] == [ANN, BOB]


def test_closing_a_round_marks_the_missing_as_late(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    ledger.add_update(ANN, delta("a0"), measurements=delta("a0").measurements, folded_in=0, unix_s=3.0)
    ledger.start_closing(0)
    assert [s.outcome for s in ledger.assignments(0)] == ["stored", "late"]


def test_a_failed_transaction_leaves_nothing_behind(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)

    def fail() -> None:
        with ledger.transaction():
            ledger.add_update(ANN, delta("a0"), measurements=delta("a0").measurements, folded_in=0, unix_s=3.0)
            raise OSError("the power went")

    with pytest.raises(OSError, match="power"):
        fail()
    assert ledger.num_updates() == 0
    assert ledger.measurements(0) == []
    assert ledger.assignments(0)[0].outcome == "open"


def test_what_was_not_committed_before_a_kill_is_not_there_after_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ledger = with_open_round(tmp_path / "run")
    with ledger.transaction():
        ledger.add_update(ANN, delta("a0"), measurements=delta("a0").measurements, folded_in=0, unix_s=3.0)
        shutil.copytree(tmp_path / "run", tmp_path / "killed")
    assert opened(tmp_path / "run").num_updates() == 1
    assert opened(tmp_path / "killed").num_updates() == 0


def test_refusals_are_counted_by_client_and_code_and_three_about_content_quarantine_the_client(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    for count in range(1, 4):
        assert ledger.quarantined(3) == frozenset()
        assert ledger.add_refusal(ANN, "non_finite", "a NaN", unix_s=float(count)) == count
    for _ in range(5):
        ledger.add_refusal(BOB, "no_space", "disk full", unix_s=9.0)
    assert ledger.refusals() == {ANN: {"non_finite": 3}, BOB: {"no_space": 5}}
    assert ledger.quarantined(3) == {ANN}
    assert ledger.quarantined(4) == ledger.quarantined(0) == frozenset()
    assert ledger.last_refusals()[ANN] == "non_finite: a NaN"
    ledger.release(ANN)
    assert ledger.quarantined(3) == frozenset()
    assert ledger.refusals()[ANN] == {"non_finite": 3}


def test_a_client_that_says_hello_again_keeps_its_refusals(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    ledger.add_refusal(ANN, "over_norm", "too large", unix_s=1.0)
    ledger.save_client(ANN, "ann", {"name": "ann"}, unix_s=5.0)
    assert [(c.client_key, c.content_refusals) for c in ledger.clients()] == [(ANN, 1), (BOB, 0)]


def test_a_round_record_comes_back(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    ledger.save_elapsed(0, elapsed_s=12.5, deadline_s=90.0, extended=True)
    ledger.commit_round(
        0,
        new_version=1,
        state_sha256="e" * 64,
        settings={"density": 0.25},
        method_state={"anchor_weight": 1.5},
        stop_reason=None,
        metrics={"round": 0},
        unix_s=9.0,
    )
    ledger.close()
    last = opened(tmp_path).last_round()
    assert last is not None
    assert (last.phase, last.new_version, last.elapsed_s, last.deadline_s, last.extended) == (
        "folded",
        1,
        12.5,
        90.0,
        True,
    )
    assert (last.settings, last.method_state, last.metrics) == (
        {"density": 0.25},
        {"anchor_weight": 1.5},
        {"round": 0},
    )


def test_a_ledger_of_another_run_is_refused_with_both_values(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(LedgerError, match=r"run_id is 'run-1' in the ledger and 'run-2'"):
        open_ledger(tmp_path / "ledger.sqlite", {**IDENTITY, "run_id": "run-2"})


def test_a_ledger_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(LedgerError, match="use the release that wrote it"):
        opened(tmp_path)


def test_a_reader_beside_the_maker_of_a_ledger_finds_a_finished_schema_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    seen = []

    class Watched(sqlite3.Connection):
        def executescript(self, script: str, /) -> sqlite3.Cursor:
            cursor = super().executescript(script)
            seen.extend(connect(path).execute("PRAGMA user_version").fetchone())
            return cursor

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **named: connect(*args, **named, factory=Watched))
    opened(tmp_path).close()
    monkeypatch.undo()
    assert seen == [len(MIGRATIONS)]


def test_the_mode_of_an_update_is_kept(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    mode = ExecutionMode(optimizer="split_8bit", frozen="nf4", micro_batch_size=2, checkpoint=True)
    sent = delta("a0")
    sent = replace(sent, train=replace(sent.train, mode=mode))
    ledger.add_update(ANN, sent, measurements=(), folded_in=0, unix_s=3.0)
    ledger.close()
    assert opened(tmp_path).updates_of(0)[0].delta.train.mode == mode


def test_an_update_from_before_modes_were_reported_gets_the_assigned_one(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    ledger.add_update(ANN, delta("a0"), measurements=(), folded_in=0, unix_s=3.0)
    ledger.close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("UPDATE updates SET message = json_remove(message, '$.train.mode', '$.train.kernel_falls')")
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()
    assert opened(tmp_path).updates_of(0)[0].delta == replace(
        delta("a0"), train=replace(delta("a0").train, mode=ExecutionMode(micro_batch_size=8))
    )


def test_a_client_from_before_topics_could_be_shared_has_shared_none(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.save_client(ANN, "ann", {"name": "ann", "statistics": {"num_examples": 3}}, unix_s=1.0)
    ledger.close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("PRAGMA user_version = 3")
    db.commit()
    db.close()
    [known] = opened(tmp_path).clients()
    assert known.record["statistics"] == {"num_examples": 3, "topics": []}


@pytest.mark.parametrize("scale", [None, 2.5])
def test_a_client_from_before_calibration_keeps_its_one_scale(tmp_path: Path, scale: float | None) -> None:
    ledger = opened(tmp_path)
    ledger.save_client(ANN, "ann", {"name": "ann", "time_scale": scale}, unix_s=1.0)
    ledger.close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("PRAGMA user_version = 6")
    db.commit()
    db.close()
    [known] = opened(tmp_path).clients()
    assert set(known.record) == {"name", "calibration"}
    if scale is None:
        assert known.record["calibration"] is None
        return
    migrated = from_plain(Calibration, known.record["calibration"], where="here")
    expected = Calibration.of_scale(scale)
    assert migrated.covariance == pytest.approx(expected.covariance)
    assert replace(migrated, covariance=expected.covariance) == expected


def test_measurements_from_before_strengths_were_of_whole_strength(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    ledger.add_update(ANN, delta("a0"), measurements=delta("a0").measurements, folded_in=0, unix_s=3.0)
    ledger.close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.executescript("""
        CREATE TABLE old AS SELECT attempt_id, client_key, round, measure, version,
            json_remove(sums, '$.strength', '$.kl_square_sum') AS sums FROM measurements;
        DROP TABLE measurements;
        CREATE TABLE measurements (
            attempt_id TEXT NOT NULL REFERENCES assignments(attempt_id), client_key TEXT NOT NULL,
            round INTEGER NOT NULL, measure TEXT NOT NULL, version INTEGER NOT NULL, sums TEXT NOT NULL,
            PRIMARY KEY (attempt_id, measure, version));
        INSERT INTO measurements SELECT * FROM old;
        CREATE INDEX measurements_by_round ON measurements(round);
        UPDATE assignments SET message = json_remove(message, '$.strengths');
        UPDATE updates SET message = json_set(message, '$.measurements', (
            SELECT json_group_array(json(json_remove(value, '$.strength', '$.kl_square_sum')))
            FROM json_each(message, '$.measurements')));
    """)
    db.execute("PRAGMA user_version = 9")
    db.commit()
    db.close()
    migrated = opened(tmp_path)
    assert [m for _, m in migrated.measurements(0)] == list(delta("a0").measurements)
    assert migrated.updates_of(0)[0].delta == delta("a0")
    assert {type(a.message) for a in migrated.assignments(0)} >= {Assignment}


def test_a_run_from_before_cohorts_and_slim_blocks_goes_on(tmp_path: Path) -> None:
    state = run_rules.MethodState(
        anchor_weight=1.0,
        seen=(run_rules.SeenBlock(block=0, weights=(2.5,) * 4), run_rules.SeenBlock(block=2, weights=(0.0,) * 4)),
    )
    ledger = with_open_round(tmp_path)
    ledger.start_closing(0)
    commit_first(ledger, method_state=state)
    ledger.close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    before = json.loads(db.execute("SELECT method_state FROM rounds").fetchone()[0])
    del before["idle"]
    before["seen"] = [{"block": s["block"], "weight": s["weights"][0]} for s in before["seen"]]
    db.execute("UPDATE rounds SET method_state = ?", (json.dumps(before),))
    db.execute("UPDATE clients SET record = json_remove(record, '$.last_chosen_round', '$.last_update_unix_s')")
    db.execute("PRAGMA user_version = 5")
    db.commit()
    db.close()
    migrated = opened(tmp_path)
    [stored] = [r for r in migrated.rounds() if r.round == 0]
    assert from_plain(run_rules.MethodState, stored.method_state, where="here") == state
    assert all(client.record["last_chosen_round"] == 0 for client in migrated.clients())


def test_rounds_from_before_robust_folds_were_folded_by_the_mean(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    ledger.start_closing(0)
    settings = {"dense": False, "format": "int8", "density": 0.25, "rule": {"optimizer": "avg"}}
    commit_first(ledger, settings=settings)
    ledger.close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("PRAGMA user_version = 10")
    db.commit()
    db.close()
    [stored] = [r for r in opened(tmp_path).rounds() if r.round == 0]
    assert stored.settings == {**settings, "fold": {"kind": "mean", "clip_norm": 0.0, "noise_multiplier": 0.0}}


def test_tasks_and_updates_from_before_slim_blocks_are_of_whole_blocks(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    ledger.add_update(ANN, delta("a0"), measurements=(), folded_in=0, unix_s=3.0)
    ledger.close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    for table in ("assignments", "updates"):
        db.execute(f"UPDATE {table} SET message = json_remove(message, '$.width')")
    db.execute("PRAGMA user_version = 4")
    db.commit()
    db.close()
    migrated = opened(tmp_path)
    assert migrated.updates_of(0)[0].delta == delta("a0")
    kinds = [type(a.message) for a in migrated.assignments(0)]
    assert Assignment in kinds
    assert [a.message.width for a in migrated.assignments(0) if isinstance(a.message, Assignment)] == [
        1.0
    ] * kinds.count(Assignment)


def test_a_run_from_before_growth_goes_on_with_all_blocks(tmp_path: Path) -> None:
    state = run_rules.MethodState(anchor_weight=1.0)
    ledger = with_open_round(tmp_path)
    ledger.start_closing(0)
    commit_first(ledger, method_state=state)
    ledger.close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("UPDATE rounds SET method_state = json_remove(method_state, '$.growth', '$.spent')")
    db.execute("UPDATE assignments SET message = json_remove(message, '$.active_blocks')")
    db.execute("PRAGMA user_version = 10")
    db.commit()
    db.close()
    migrated = opened(tmp_path)
    [stored] = [r for r in migrated.rounds() if r.round == 0]
    assert from_plain(run_rules.MethodState, stored.method_state, where="here") == state
    assert all(a.message.active_blocks == () for a in migrated.assignments(0))
    assert migrated.assignments(0)


def test_a_reader_sees_the_state_of_a_ledger_that_is_being_written(tmp_path: Path) -> None:
    writer = with_open_round(tmp_path)
    reader = open_read_only(tmp_path / "ledger.sqlite")
    writer.add_update(ANN, delta("a0"), measurements=delta("a0").measurements, folded_in=0, unix_s=3.0)
    assert reader.num_updates() == 1
    with pytest.raises(sqlite3.OperationalError):
        reader.set_run("status", "changed")


def test_a_run_that_was_never_served_has_no_ledger_to_read(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="never served"):
        open_read_only(tmp_path / "ledger.sqlite")


def test_the_operator_releases_a_client_by_its_name_beside_a_running_aggregator(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    for _ in range(3):
        ledger.add_refusal(ANN, "non_finite", "a NaN", unix_s=1.0)
    release(tmp_path / "ledger.sqlite", "ann")
    assert ledger.quarantined(3) == frozenset()
    with pytest.raises(LedgerError, match="no client called 'zoe'"):
        release(tmp_path / "ledger.sqlite", "zoe")


def test_notes_do_not_grow_without_end(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    with ledger.transaction():
        for number in range(MAX_NOTES + 50):
            ledger.add_note(f"note {number}", unix_s=0.0)
    assert len(ledger.notes(last=10 * MAX_NOTES)) == MAX_NOTES


def test_only_the_newest_notes_are_shown_oldest_first(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for number in range(5):
        ledger.add_note(f"note {number}", unix_s=float(number))
    assert ledger.notes(last=2) == [(3.0, "note 3"), (4.0, "note 4")]


def test_a_ledger_whose_tables_are_still_being_written_counts_as_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    assert not is_made(path)

    sqlite3.connect(path).close()
    path.touch()
    assert not is_made(path)

    open_ledger(path, {"run_id": "r"}).close()
    assert is_made(path)


def test_an_assignment_from_before_the_proximal_term_has_none(tmp_path: Path) -> None:
    with_open_round(tmp_path).close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("UPDATE assignments SET message = json_remove(message, '$.proximal_weight')")
    db.execute("PRAGMA user_version = 13")
    db.commit()
    db.close()
    assert [a.message for a in opened(tmp_path).assignments(0)] == [assignment("a0"), evaluate("b0")]


def test_the_ledger_names_the_files_of_a_version_and_the_round_that_made_it(tmp_path: Path) -> None:
    ledger = with_open_round(tmp_path)
    ledger.start_closing(0)
    commit_first(ledger, files={"v00001.qdown": "cd", "v00001.safetensors": "ef"})
    assert ledger.files_of(1) == {"v00001.qdown": "cd", "v00001.safetensors": "ef"}
    assert ledger.files_of(2) == {}
    made = ledger.round_of_version(1)
    assert made is not None
    assert (made.round, made.state_sha256) == (0, "ab")
    assert ledger.round_of_version(0) is None
    assert ledger.round_of_version(2) is None


def test_a_ledger_from_before_the_files_were_named_gets_the_table_and_names_none(tmp_path: Path) -> None:
    with_open_round(tmp_path).close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("DROP TABLE files")
    db.execute("PRAGMA user_version = 15")
    db.commit()
    db.close()
    assert opened(tmp_path).files_of(1) == {}
