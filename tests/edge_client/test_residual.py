"""The residual's life on disk, each row of the table in methods.md 7.3 (D5), and the sums of D2 across rounds."""

from __future__ import annotations

import numpy as np
import pytest

from fedblocks.edge_client.residual import ResidualStore
from fedblocks.profiles.model_shape import WIDTHS
from fedblocks.protocol.expansion import plan_expansion
from fedblocks.protocol.tensors import cut, decode_tensor, delta_layout, encode_delta


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


def owed_slices(blocks, value, width):
    specs = plan_of().shape.block_tensors(width)
    return {b: {spec.name: np.full(spec.shape, value, np.float32) for spec in specs} for b in blocks}


def accept_slices(store, attempt, blocks, value, width, *, round):
    store.stage(attempt, owed_slices(blocks, value, width), round=round, width=width)
    store.commit(attempt)


def of_width(tensors, width):
    """Value in the part of up_proj that this width has and the next smaller one has not; rows 0-2, 3-5 and 6-11."""
    rows = {0.25: slice(0, 3), 0.5: slice(3, 6), 1.0: slice(6, 12)}[width]
    (found,) = np.unique(tensors["mlp.up_proj.weight"][rows])
    return pytest.approx(float(found))


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


def test_an_update_of_slim_blocks_replaces_its_slice_and_leaves_the_rest(tmp_path, store):
    accept_slices(store, "a", (0, 1), 1.0, 1.0, round=0)
    accept_slices(store, "b", (0,), 2.0, 0.5, round=0)
    accept_slices(store, "c", (0,), 3.0, 0.25, round=0)

    for opened in (store, open_store(tmp_path)):
        found = opened.load((0, 1), round=1)
        assert [of_width(found[0], w) for w in (0.25, 0.5, 1.0)] == [3.0, 2.0, 1.0]
        assert [of_width(found[1], w) for w in (0.25, 0.5, 1.0)] == [1.0, 1.0, 1.0]
        for spec in plan_of().shape.block_tensors():
            assert found[0][spec.name].shape == spec.shape


def test_the_rest_of_a_slim_block_decays_by_its_own_rounds_and_drops_at_the_tenth(store):
    accept_slices(store, "a", (0,), 1.0, 1.0, round=0)
    accept_slices(store, "b", (0,), 1.0, 0.25, round=4)

    assert [of_width(store.load((0,), round=5)[0], w) for w in (0.25, 0.5, 1.0)] == [1.0, 0.9**4, 0.9**4]
    assert [of_width(store.load((0,), round=7)[0], w) for w in (0.25, 1.0)] == [0.9**2, 0.9**6]
    assert [of_width(store.load((0,), round=11)[0], w) for w in (0.25, 1.0)] == [0.9**6, 0.0]
    assert store.load((0,), round=15) == {}


def test_a_slice_that_no_wider_update_came_before_owes_nothing_beyond_itself(store):
    accept_slices(store, "a", (0,), 1.0, 0.25, round=0)

    assert [of_width(store.load((0,), round=1)[0], w) for w in (0.25, 0.5, 1.0)] == [1.0, 0.0, 0.0]


def test_a_refused_update_of_slim_blocks_leaves_what_was_owed(store):
    accept_slices(store, "a", (0,), 1.0, 1.0, round=0)
    store.stage("b", owed_slices((0,), 9.0, 0.25), round=0, width=0.25)
    store.discard("b")

    assert [of_width(store.load((0,), round=1)[0], w) for w in (0.25, 1.0)] == [1.0, 1.0]


def test_a_wider_update_deletes_the_files_of_the_slices_in_it_and_a_slimmer_one_does_not(tmp_path, store):
    def files():
        return len(list((tmp_path / "residual").iterdir()))

    accept_slices(store, "a", (0,), 1.0, 1.0, round=0)
    accept_slices(store, "b", (0,), 2.0, 0.25, round=1)
    accept_slices(store, "c", (0,), 3.0, 0.25, round=2)
    assert files() == 2
    accept_slices(store, "d", (0,), 4.0, 0.5, round=3)
    assert files() == 2
    accept_slices(store, "e", (0,), 5.0, 1.0, round=4)
    assert files() == 1
    assert [of_width(store.load((0,), round=5)[0], w) for w in (0.25, 1.0)] == [5.0, 5.0]


def test_a_file_of_an_older_version_holds_whole_blocks(store, monkeypatch):
    import fedblocks.edge_client.residual as module

    write = module.write_tensors
    monkeypatch.setattr(
        module, "write_tensors", lambda p, t, meta: write(p, t, {k: v for k, v in meta.items() if k != "width"})
    )
    accept(store, "a", (0,), 1.0, round=0)

    assert values(store.load((0,), round=1)) == {0: 1.0}


def test_over_rounds_of_all_widths_what_was_accepted_and_what_is_owed_add_up_to_all_changes(tmp_path):
    """D2 with the width drawn anew each round; all in one round, so that nothing decays."""
    shape, store = plan_of().shape, open_store(tmp_path)
    rng = np.random.default_rng(0)
    sums = {kind: {s.name: np.zeros(s.shape) for s in shape.block_tensors()} for kind in ("changed", "accepted")}
    for number in range(24):
        width = WIDTHS[rng.integers(len(WIDTHS))]
        change = {0: {s.name: rng.standard_normal(s.shape).astype(np.float32) for s in shape.block_tensors(width)}}
        encoded = encode_delta(
            shape, (0,), change, store.load((0,), round=1), format="int8", density=0.25, cap=1e9, width=width
        )
        store.stage(f"a{number}", encoded.residuals, round=0, width=width)
        if number % 5 == 3:  # refused: as if it had not happened
            store.discard(f"a{number}")
            continue
        store.commit(f"a{number}")
        payload = memoryview(b"".join(encoded.parts))
        layout = delta_layout(encoded.headers, shape=shape, blocks=(0,), format="int8", density=0.25, width=width)
        for slot in layout.slots:
            name, size = slot.spec.name, slot.spec.shape
            xhat = decode_tensor(slot.spec, slot.rows_sent, slot.of(payload), format="int8", density=0.25)
            cut(sums["accepted"][name], size)[...] += xhat.reshape(size)
            cut(sums["changed"][name], size)[...] += change[0][name]

    found = store.load((0,), round=1)[0]
    for name, total in sums["changed"].items():
        np.testing.assert_allclose(sums["accepted"][name] + found[name], total, atol=1e-5)


def test_a_slim_update_of_unknown_outcome_survives_a_kill_and_is_committed_over_the_rest(tmp_path, store):
    accept_slices(store, "a", (0,), 1.0, 1.0, round=0)
    store.stage("b", owed_slices((0,), 9.0, 0.25), round=0, width=0.25)
    again = open_store(tmp_path)
    before = of_width(again.load((0,), round=1)[0], 0.25)
    again.commit("b")

    assert before == 1.0
    for opened in (again, open_store(tmp_path)):
        assert [of_width(opened.load((0,), round=1)[0], w) for w in (0.25, 0.5, 1.0)] == [9.0, 1.0, 1.0]
