"""The residual's life on disk, each row of the table in methods.md 7.3 (D5), and the sums of D2 across rounds."""

from __future__ import annotations

import numpy as np
import pytest

from fedblocks.edge_client.residual import ResidualStore
from fedblocks.protocol.expansion import plan_expansion
from fedblocks.protocol.tensors import decode_tensor, delta_layout, encode_delta


def plan_of(base_hash="0" * 64, num_blocks=3):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 16,
        "tie_word_embeddings": True,
    }
    return plan_expansion(base_hash=base_hash, config=config, placement="interleaved", num_blocks=num_blocks)


def open_store(folder, plan=None):
    return ResidualStore(folder / "residual", plan=plan or plan_of())


def owed(blocks, value):
    return {b: {"mlp.up_proj.weight": np.full((12, 8), value, np.float32)} for b in blocks}


def values(state):
    return {block: float(tensors["mlp.up_proj.weight"][0, 0]) for block, tensors in state.items()}


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path)


def accept(store, attempt, blocks, value, *, round):
    store.stage(attempt, owed(blocks, value), round=round)
    store.commit(attempt)


def test_nothing_is_owed_at_the_start(store):
    assert store.load((0, 1), round=0) == {}


def test_an_accepted_update_replaces_what_its_blocks_owed(store):
    accept(store, "a", (0, 1), 1.0, round=0)
    accept(store, "b", (1,), 2.0, round=1)

    assert values(store.load((1,), round=2)) == {1: 2.0}


@pytest.mark.parametrize("fate", ["discarded", "never answered"])
def test_an_update_that_did_not_count_leaves_what_was_owed(store, fate):
    accept(store, "a", (0,), 1.0, round=3)
    store.stage("b", owed((0,), 9.0), round=4)
    if fate == "discarded":
        store.discard("b")

    assert values(store.load((0,), round=4)) == {0: 1.0}


def test_an_unknown_outcome_survives_a_kill_and_is_committed_when_the_answer_is_yes(tmp_path, store):
    store.stage("a", owed((0,), 1.0), round=0)
    again = open_store(tmp_path)
    before = again.load((0,), round=1)
    again.commit("a")

    assert before == {}
    assert values(again.load((0,), round=1)) == {0: 1.0}


def test_an_unknown_outcome_survives_a_kill_and_is_discarded_when_the_answer_is_no(tmp_path, store):
    store.stage("a", owed((0,), 1.0), round=0)
    again = open_store(tmp_path)
    again.discard("a")
    again.commit("a")

    assert again.load((0,), round=1) == {}


def test_a_commit_that_is_repeated_after_a_kill_changes_nothing(tmp_path, store):
    accept(store, "a", (0,), 1.0, round=0)
    accept(store, "b", (0,), 2.0, round=1)
    again = open_store(tmp_path)
    again.commit("b")
    again.commit("a")

    assert values(again.load((0,), round=2)) == {0: 2.0}


def test_an_update_accepted_late_is_committed_as_any_other(store):
    store.stage("a", owed((0,), 1.0), round=4)
    store.commit("a")  # the answer came while round 5 was open

    assert values(store.load((0,), round=6)) == {0: pytest.approx(0.9)}


def test_blocks_outside_the_new_assignment_stay_on_disk_untouched(tmp_path, store):
    accept(store, "a", (0, 1), 1.0, round=0)
    accept(store, "b", (1,), 2.0, round=1)
    again = open_store(tmp_path)

    assert values(again.load((1,), round=2)) == {1: 2.0}
    assert values(again.load((0, 1), round=1)) == {0: 1.0, 1: 2.0}


@pytest.mark.parametrize(
    ("round", "expected"),
    [(1, 1.0), (2, 0.9), (3, 0.81), (10, 0.9**9), (11, None), (12, None), (1000, None)],
)
def test_each_round_without_an_accepted_update_decays_and_the_tenth_drops(store, round, expected):
    accept(store, "a", (0,), 1.0, round=0)
    found = values(store.load((0,), round=round))

    assert found == ({} if expected is None else {0: pytest.approx(expected)})


def test_another_plan_drops_everything_committed_and_staged(tmp_path, store):
    accept(store, "a", (0,), 1.0, round=0)
    store.stage("b", owed((0,), 2.0), round=1)
    for other in (plan_of(base_hash="1" * 64), plan_of(num_blocks=2)):
        changed = open_store(tmp_path, other)
        changed.commit("b")

        assert changed.load((0,), round=1) == {}
    assert list((tmp_path / "residual").iterdir()) == []


def test_an_accepted_update_in_a_dense_format_drops_everything(tmp_path, store):
    accept(store, "a", (0, 1), 1.0, round=0)
    store.stage("b", {}, round=1)

    assert values(store.load((0,), round=1)) == {0: 1.0}
    store.commit("b")
    assert store.load((0, 1), round=2) == {}
    assert open_store(tmp_path).load((0, 1), round=2) == {}


def test_a_kill_right_after_the_rename_of_a_commit_gives_the_committed_residual(tmp_path, store, monkeypatch):
    accept(store, "a", (0,), 1.0, round=0)
    store.stage("b", {}, round=1)
    monkeypatch.setattr(store, "_drop_superseded", lambda: None)
    store.commit("b")

    assert open_store(tmp_path).load((0,), round=2) == {}


def test_files_that_no_block_needs_any_more_are_deleted(tmp_path, store):
    for number in range(12):
        accept(store, f"a{number}", (number % 3,), float(number), round=number)

    assert len(list((tmp_path / "residual").iterdir())) == 3


def test_staging_an_update_discards_what_was_staged_for_an_earlier_one(store):
    store.stage("a", owed((0,), 1.0), round=0)
    store.stage("b", owed((0,), 2.0), round=1)
    store.commit("a")

    assert store.load((0,), round=2) == {}


def test_an_attempt_id_from_the_wire_cannot_leave_the_folder(tmp_path, store):
    for attempt in ("../../evil", "/etc/evil", "a" * 5000, "\x00"):
        accept(store, attempt, (0,), 1.0, round=0)

    assert {p.name for p in tmp_path.iterdir()} == {"residual"}


def test_a_damaged_file_counts_as_nothing_owed(tmp_path, store, caplog):
    accept(store, "a", (0,), 1.0, round=0)
    (path,) = (tmp_path / "residual").iterdir()
    path.write_bytes(path.read_bytes()[:50])

    assert open_store(tmp_path).load((0,), round=1) == {}
    assert "dropped the residual file" in caplog.text


def test_a_kill_while_staging_leaves_no_litter(tmp_path, store):
    (tmp_path / "residual" / "staged-x.safetensors.tmp").write_bytes(b"half")
    open_store(tmp_path)

    assert list((tmp_path / "residual").iterdir()) == []


def test_over_many_rounds_what_was_accepted_and_what_is_owed_add_up_to_all_changes(tmp_path):
    shape, store = plan_of().shape, open_store(tmp_path)
    rng = np.random.default_rng(0)
    total, accepted = {}, {}
    for round in range(15):
        changes = {0: {s.name: rng.standard_normal(s.shape).astype(np.float32) for s in shape.block_tensors()}}
        encoded = encode_delta(
            shape, (0,), changes, store.load((0,), round=round), format="int8", density=0.25, cap=1e9
        )
        store.stage(f"a{round}", encoded.residuals, round=round)
        store.commit(f"a{round}")
        payload = memoryview(b"".join(encoded.parts))
        layout = delta_layout(encoded.headers, shape=shape, blocks=(0,), format="int8", density=0.25)
        for slot in layout.slots:
            name = slot.spec.name
            xhat = decode_tensor(slot.spec, slot.rows_sent, slot.of(payload), format="int8", density=0.25)
            accepted[name] = accepted.get(name, 0.0) + xhat.reshape(slot.spec.shape).astype(np.float64)
            total[name] = total.get(name, 0.0) + changes[0][name].astype(np.float64)

    for name, rest in store.load((0,), round=15)[0].items():
        np.testing.assert_allclose(accepted[name] + rest, total[name], atol=1e-5)
