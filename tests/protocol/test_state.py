"""The published state of methods.md 7.2: all followers hold the same bits, by whatever path (D4, D7)."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedblocks.profiles.model_shape import ModelShape
from fedblocks.protocol.errors import LocalProtocolError, RemoteProtocolError
from fedblocks.protocol.state import apply_step, apply_update, make_update, publish, publish_dense, state_sha256
from fedblocks.protocol.tensors import cut, pad

BLOCKS = (0, 1, 3)


def model_shape(hidden=8):
    return ModelShape(
        family="llama",
        num_layers=2,
        hidden_size=hidden,
        intermediate_size=12,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=16,
        tied_embeddings=True,
    )


def random_state(blocks, seed=0, shape=None, scale=1e-3):
    rng = np.random.default_rng(seed)
    return {
        b: {
            s.name: (rng.standard_normal(s.shape) * scale).astype(np.float32)
            for s in (shape or model_shape()).block_tensors()
        }
        for b in blocks
    }


def same_bits(first, second):
    return first.keys() == second.keys() and all(
        first[b][name].tobytes() == second[b][name].tobytes() for b in first for name in first[b]
    )


class Run:
    """An aggregator's side of the story: steps and states by version."""

    def __init__(self, rounds, shape=None, density=0.25):
        self.shape = shape or model_shape()
        self.states, self.steps, residual = [{}], [], {}
        for number, (blocks, format) in enumerate(rounds):
            aggregate = random_state(blocks, seed=number, shape=self.shape)
            publication = publish(
                self.states[-1], aggregate, residual, shape=self.shape, format=format, density=density
            )
            self.states.append(publication.published)
            self.steps.append(publication.step)
            residual = publication.residual
        self.residual = residual

    def update(self, from_version, to_version=None):
        to_version = len(self.steps) if to_version is None else to_version
        published = self.states[to_version]
        return make_update(
            self.steps.__getitem__,
            shape=self.shape,
            from_version=from_version,
            to_version=to_version,
            published=published,
            sha256=state_sha256(self.shape, published),
        )

    def follow(self, from_version, to_version=None):
        update, payload = self.update(from_version, to_version)
        state = apply_update(self.states[from_version], update, payload, shape=self.shape, blocks=BLOCKS)
        return update.encoding, state


rounds = st.lists(
    st.tuples(
        st.lists(st.sampled_from(BLOCKS), unique=True).map(sorted), st.sampled_from(["int8", "int8", "bf16", "fp32"])
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(rounds=rounds, data=st.data())
def test_every_path_to_a_version_gives_the_same_bits(rounds, data):
    run = Run(rounds, density=data.draw(st.sampled_from([0.1, 0.25, 1.0])))
    last = len(rounds)
    start = data.draw(st.integers(0, last))
    step_by_step = {}
    for version in range(last):
        _, step_by_step = run.follow(version, version + 1)
    _, at_once = run.follow(start)

    assert state_sha256(run.shape, at_once) == state_sha256(run.shape, step_by_step)
    assert state_sha256(run.shape, at_once) == state_sha256(run.shape, run.states[-1])


@settings(max_examples=40, deadline=None)
@given(rounds=rounds)
def test_an_update_is_never_longer_than_replay_or_a_snapshot(rounds):
    run = Run(rounds)
    update, payload = run.update(0)
    replay = sum(map(len, run.steps))
    nonzero = sum(any(t.any() for t in tensors.values()) for tensors in run.states[-1].values())

    assert len(payload) <= replay
    assert len(payload) <= 4 * nonzero * run.shape.block_parameters + 300
    assert update.encoding in ("replay", "difference", "snapshot")


def test_each_encoding_is_chosen_where_it_is_the_shortest_and_all_give_the_same_bits():
    run = Run([((0,), "bf16"), *[((0,), "int8")] * 4, ((1,), "int8")], shape=model_shape(hidden=64), density=1.0)
    encodings = {}
    for start in (0, 1, 5, 6):
        encodings[start], state = run.follow(start)
        assert same_bits(state, run.states[-1])

    # From the fourth sending on a row is shorter whole than as its codes.
    assert encodings == {6: "none", 5: "replay", 1: "difference", 0: "difference"}


@pytest.mark.parametrize("times", [1, 2, 3, 4, 5])
def test_a_difference_carries_rows_sent_once_to_many_times(times):
    shape = model_shape(hidden=64)
    # Block 0 once in bf16 and often in int8: its dense rows travel whole; block 1 stays as codes.
    run = Run([((0,), "bf16"), *[((0, 1), "int8")] * times, ((3,), "int8")], shape=shape, density=1.0)
    encoding, state = run.follow(0)

    assert encoding == ("replay" if times == 1 else "difference")
    assert same_bits(state, run.states[-1])


def test_a_fresh_client_at_version_0_downloads_nothing():
    run = Run([])
    update, payload = run.update(0)

    assert (update.encoding, payload) == ("none", b"")
    assert apply_update({}, update, payload, shape=run.shape, blocks=BLOCKS) == {}


def test_a_follower_with_a_version_from_elsewhere_gets_a_snapshot():
    run = Run([((0, 1), "int8")] * 2)
    for version in (7, -1):
        update, payload = run.update(version)
        state = apply_update(random_state((3,)), update, payload, shape=run.shape, blocks=BLOCKS)

        assert update.encoding == "snapshot"
        assert same_bits(state, run.states[-1])


def test_a_block_that_nobody_trained_keeps_its_bits_and_its_residual():
    run = Run([((0, 1), "int8")])
    publication = publish(
        run.states[-1], random_state((1,), seed=9), run.residual, shape=run.shape, format="int8", density=0.25
    )

    assert same_bits({0: publication.published[0]}, {0: run.states[-1][0]})
    assert same_bits({0: publication.residual[0]}, {0: run.residual[0]})


def test_a_round_without_updates_makes_a_step_that_changes_nothing():
    run = Run([((0,), "int8"), ((), "int8")])

    assert same_bits(run.states[2], run.states[1])
    assert len(run.steps[1]) < 100


def test_what_is_published_and_what_waits_add_up_to_all_aggregates():
    run = Run([((0,), "int8")] * 6)
    total = sum(random_state((0,), seed=n)[0]["mlp.up_proj.weight"].astype(np.float64) for n in range(6))
    found = run.states[-1][0]["mlp.up_proj.weight"] + run.residual[0]["mlp.up_proj.weight"].astype(np.float64)

    np.testing.assert_allclose(found, total, atol=1e-8)


def test_the_last_version_is_dense_and_leaves_nothing_waiting():
    run = Run([((0, 1), "int8")] * 3)
    aggregate = random_state((0,), seed=9)
    publication = publish_dense(run.states[-1], aggregate, run.residual, shape=run.shape)

    assert publication.residual == {}
    for block in (0, 1):
        for name, before in run.states[-1][block].items():
            change = run.residual[block][name] + aggregate.get(block, {}).get(name, np.float32(0))
            assert np.array_equal(publication.published[block][name], before + change)


@pytest.mark.parametrize("format", ["int8", "bf16", "fp32"])
def test_the_arguments_of_publish_keep_their_values(format):
    states = [random_state((0, 1), seed=n) for n in range(3)]
    copies = [random_state((0, 1), seed=n) for n in range(3)]
    publish(*states, shape=model_shape(), format=format, density=0.25)

    assert all(same_bits(a, b) for a, b in zip(states, copies, strict=True))


def test_the_first_fp32_version_is_the_aggregate_itself():
    aggregate = random_state((0,))
    publication = publish({}, aggregate, {}, shape=model_shape(), format="fp32", density=0.25)

    assert same_bits(publication.published, aggregate)


def test_the_hash_is_the_same_for_a_missing_and_a_zero_block_and_differs_for_any_changed_bit():
    shape = model_shape()
    state = random_state((1,))
    zeros = {0: {s.name: np.zeros(s.shape, np.float32) for s in shape.block_tensors()}}
    changed = {1: {name: t.copy() for name, t in state[1].items()}}
    changed[1]["input_layernorm.weight"].view(np.uint32)[3] ^= 1

    assert state_sha256(shape, {**state, **zeros}) == state_sha256(shape, state)
    assert state_sha256(shape, changed) != state_sha256(shape, state)
    assert state_sha256(shape, {2: state[1]}) != state_sha256(shape, state)
    assert state_sha256(shape, {}) == hashlib.sha256(b"fedblocks state 1").hexdigest()


def test_a_state_of_another_shape_is_our_own_bug():
    with pytest.raises(LocalProtocolError, match="expected float32"):
        state_sha256(model_shape(), {0: {"input_layernorm.weight": np.zeros(3, np.float32)}})


# Hostile and faulty bytes.


def updates_of_each_encoding():
    shape = model_shape(hidden=64)
    run = Run([((0,), "bf16"), *[((0, 1), "int8")] * 3], shape=shape, density=1.0)
    snapshot = run.update(9)
    replay = (dataclasses.replace(snapshot[0], encoding="replay", from_version=0), b"".join(run.steps))
    difference = run.update(0)
    assert (snapshot[0].encoding, difference[0].encoding) == ("snapshot", "difference")
    return run, {"snapshot": snapshot, "replay": replay, "difference": difference}


@pytest.mark.parametrize("encoding", ["snapshot", "replay", "difference"])
def test_a_damaged_update_is_refused_and_leaves_the_state_as_it_was(encoding):
    run, updates = updates_of_each_encoding()
    update, payload = updates[encoding]
    assert same_bits(apply_update({}, update, payload, shape=run.shape, blocks=BLOCKS), run.states[-1])
    rng = np.random.default_rng(0)
    held = {} if encoding != "snapshot" else random_state((0,), shape=run.shape)
    before = {block: {name: t.copy() for name, t in tensors.items()} for block, tensors in held.items()}

    for number in range(120):
        damaged = bytearray(payload)
        match number % 4:
            case 0:
                damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
            case 1:
                del damaged[int(rng.integers(len(damaged))) :]
            case 2:
                damaged += b"\x00"
            case 3:
                damaged[int(rng.integers(120))] ^= 1 << int(rng.integers(8))
        # A change that changes nothing (the density of a dense format) may pass; another state may not.
        try:
            state = apply_update(held, update, bytes(damaged), shape=run.shape, blocks=BLOCKS)
        except RemoteProtocolError:
            continue
        assert state_sha256(run.shape, state) == update.state_sha256

    assert same_bits(held, before)


def test_a_wrong_hash_is_a_checksum_mismatch_and_the_held_state_is_untouched():
    run = Run([((0,), "int8")] * 2)
    update, payload = run.update(1)
    held = run.states[1]

    with pytest.raises(RemoteProtocolError, match="ask for it from version 0") as caught:
        apply_update(held, dataclasses.replace(update, state_sha256="0" * 64), payload, shape=run.shape, blocks=BLOCKS)

    assert caught.value.code == "checksum_mismatch"
    assert same_bits(held, Run([((0,), "int8")]).states[1])


def test_an_update_from_a_state_that_the_client_does_not_hold_is_a_checksum_mismatch():
    run = Run([((0,), "int8")] * 3)
    update, payload = run.update(2)

    with pytest.raises(RemoteProtocolError) as caught:
        apply_update(run.states[1], update, payload, shape=run.shape, blocks=BLOCKS)

    assert caught.value.code == "checksum_mismatch"


def test_a_block_outside_the_plan_is_refused():
    run = Run([((3,), "int8")])

    with pytest.raises(RemoteProtocolError, match="block 3 is not in the plan"):
        apply_step({}, run.steps[0], shape=run.shape, blocks=(0, 1))


@settings(max_examples=300, deadline=None)
@given(payload=st.binary(max_size=300), encoding=st.sampled_from(["none", "replay", "difference", "snapshot"]))
def test_random_bytes_are_refused_with_a_remote_protocol_error(payload, encoding):
    run = Run([])
    update = dataclasses.replace(run.update(0)[0], encoding=encoding, to_version=2, state_sha256="0" * 64)

    with pytest.raises(RemoteProtocolError):
        apply_update({}, update, payload, shape=run.shape, blocks=BLOCKS)


def slim_aggregate(shape, width, seed):
    """Zero beyond the width, as a fold of slim updates is."""
    whole = random_state((0,), seed=seed, shape=shape)[0]
    slices = {s.name: cut(whole[s.name], s.shape) for s in shape.block_tensors(width)}
    return {0: {s.name: pad(slices[s.name], s.shape) for s in shape.block_tensors()}}


def beyond(values, spec):
    """What of a whole tensor lies outside this slice of it, flat."""
    outside = np.ones(values.shape, dtype=bool)
    cut(outside, spec.shape)[...] = False
    return values[outside]


@pytest.mark.parametrize("format", ["int8", "bf16", "fp32"])
def test_what_nobody_trained_keeps_its_value_and_what_waits_for_it_waits(format):
    shape, width = model_shape(), 0.25
    run = Run([((0,), "int8")])
    publication = publish(
        run.states[-1], slim_aggregate(shape, width, 7), run.residual, shape=shape, format=format, density=0.5,
        widths={0: width},
    )  # fmt: skip

    for spec in shape.block_tensors(width):
        before, after = run.states[-1][0][spec.name], publication.published[0][spec.name]
        assert beyond(after, spec).tobytes() == beyond(before, spec).tobytes()
        waited, waits = run.residual[0][spec.name], publication.residual.get(0, {}).get(spec.name)
        if len(beyond(waited, spec)):
            np.testing.assert_array_equal(beyond(waits, spec), beyond(waited, spec))
        assert not np.array_equal(cut(after, spec.shape), cut(before, spec.shape))


def test_over_rounds_of_all_widths_what_is_published_and_what_waits_add_up_to_all_aggregates():
    shape, state, residual = model_shape(), {}, {}
    total = {s.name: np.zeros(s.shape) for s in shape.block_tensors()}
    for number, width in enumerate((0.5, 0.125, 1.0, 0.25, 0.125, 0.5)):
        aggregate = slim_aggregate(shape, width, number)
        publication = publish(state, aggregate, residual, shape=shape, format="int8", density=0.25, widths={0: width})
        state, residual = publication.published, publication.residual
        for name, values in aggregate[0].items():
            total[name] += values

    for name, values in total.items():
        np.testing.assert_allclose(state[0][name] + residual[0][name], values, atol=1e-8)


def test_the_last_version_holds_also_what_waited_beyond_the_width():
    shape = model_shape()
    run = Run([((0,), "int8"), ((0,), "int8")])
    aggregate = slim_aggregate(shape, 0.125, 9)
    publication = publish_dense(run.states[-1], aggregate, run.residual, shape=shape)

    assert publication.residual == {}
    for name, change in aggregate[0].items():
        expected = run.states[-1][0][name] + (change + run.residual[0][name])
        np.testing.assert_array_equal(publication.published[0][name], expected)
