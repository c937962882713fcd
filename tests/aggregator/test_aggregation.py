"""The fold of methods.md 8.2, rule by rule (G1 to G4, G6, G8; G5 together with admission)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedblocks.aggregator.aggregation import AcceptedUpdate, fold, map_payload
from fedblocks.profiles.model_shape import WIDTHS, ModelShape
from fedblocks.protocol.messages import AttemptId, ClientKey
from fedblocks.protocol.state import publish, state_sha256
from fedblocks.protocol.tensors import cut, decode_tensor, delta_layout, encode_delta, pad


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


def random_deltas(blocks, seed=0, scale=1e-3, shape=None, width=1.0):
    rng = np.random.default_rng(seed)
    return {
        b: {
            s.name: (rng.standard_normal(s.shape) * scale).astype(np.float32)
            for s in (shape or model_shape()).block_tensors(width)
        }
        for b in blocks
    }


def accepted(
    client,
    deltas,
    *,
    num_examples=100,
    steps=16,
    staleness=0,
    format="int8",
    density=0.5,
    shape=None,
    attempt="a",
    width=1.0,
):
    encoded = encode_delta(
        shape or model_shape(), sorted(deltas), deltas, {}, format=format, density=density, width=width
    )
    payload = b"".join(encoded.parts)
    return AcceptedUpdate(
        client=ClientKey(client),
        attempt_id=AttemptId(f"{client}-{attempt}"),
        num_examples=num_examples,
        steps=steps,
        staleness=staleness,
        format=format,
        density=density,
        width=width,
        tensors=encoded.headers,
        read_payload=lambda: memoryview(payload),
    )


def decoded(update, shape=None):
    """xhat of an update in fp64, block -> name -> tensor of the shape that was sent."""
    layout = delta_layout(
        update.tensors,
        shape=shape or model_shape(),
        blocks=update.blocks,
        format=update.format,
        density=update.density,
        width=update.width,
    )
    found = {}
    for slot in layout.slots:
        values = decode_tensor(
            slot.spec, slot.rows_sent, slot.of(update.read_payload()), format=update.format, density=update.density
        )
        found.setdefault(slot.block, {})[slot.spec.name] = values.reshape(slot.spec.shape).astype(np.float64)
    return found


def fold_hash(updates, shape=None, history=None):
    result = fold(updates, shape=shape or model_shape(), history=history)
    digest = hashlib.sha256(state_sha256(shape or model_shape(), result.aggregate).encode())
    digest.update(repr((result.coverage, sorted(result.history.items()), result.weights, result.clipped)).encode())
    return digest.hexdigest()


def four_uneven_updates():
    return [
        accepted("k1", random_deltas((0,), 1), num_examples=7, steps=16),
        accepted("k2", random_deltas((0, 1), 2), num_examples=400, steps=5, staleness=1),
        accepted("k3", random_deltas((1, 2), 3, scale=0.3), num_examples=33, steps=16, format="bf16"),
        accepted("k4", random_deltas((0, 2), 4), num_examples=90, steps=11, format="fp32"),
    ]


def exact_updates():
    """Changes made of whole numbers alone: the same bits on every machine."""
    rng = np.random.default_rng(8)
    return [
        accepted(
            f"k{number}",
            {
                b: {
                    s.name: rng.integers(-999, 1000, s.shape).astype(np.float32) / np.float32(1 << 18)
                    for s in model_shape().block_tensors()
                }
                for b in blocks
            },
            num_examples=10 + 37 * number,
            steps=16 - 5 * number,
            staleness=number % 2,
            format=format,
        )
        for number, (blocks, format) in enumerate([((0,), "int8"), ((0, 1), "fp32"), ((0, 1, 2), "int8")])
    ]


def test_a_fold_of_whole_blocks_has_the_bits_that_it_had_before_there_were_slim_ones():
    before = "d40608277120a9dd82f812ac6fb7b6b25c21c88b5880c0ae2810d8e6a6589fed"

    assert fold_hash(exact_updates()) == before


def test_every_order_of_arrival_gives_the_same_bits():
    hashes = {fold_hash(order) for order in itertools.permutations(four_uneven_updates())}

    assert len(hashes) == 1


def test_every_order_of_five_and_many_of_fifty_give_the_same_bits():
    rng = np.random.default_rng(5)
    many = [
        accepted(
            f"k{number}",
            random_deltas(sorted(rng.choice(4, size=rng.integers(1, 4), replace=False).tolist()), number),
            num_examples=int(rng.integers(1, 500)),
            steps=int(rng.integers(1, 17)),
            staleness=int(rng.integers(2)),
        )
        for number in range(50)
    ]

    assert len({fold_hash(order) for order in itertools.permutations(many[:5])}) == 1
    assert len({fold_hash([many[i] for i in rng.permutation(50)]) for _ in range(10)}) == 1


def test_equal_changes_from_all_give_that_change():
    change = random_deltas((0, 1))
    updates = [accepted(f"k{n}", change, num_examples=10 + n, format="fp32") for n in range(4)]
    result = fold(updates, shape=model_shape())

    for block, name in [(b, s.name) for b in (0, 1) for s in model_shape().block_tensors()]:
        np.testing.assert_array_almost_equal_nulp(result.aggregate[block][name], change[block][name], nulp=1)


def test_equal_coded_changes_from_all_give_the_decoded_change():
    updates = [accepted(f"k{n}", random_deltas((0,)), num_examples=1 + n) for n in range(5)]
    xhat = decoded(updates[0])[0]
    result = fold(updates, shape=model_shape())

    for name, values in xhat.items():
        np.testing.assert_array_almost_equal_nulp(result.aggregate[0][name], values.astype(np.float32), nulp=1)


def test_the_first_round_of_a_lone_client_in_fp32_is_its_change_exactly():
    change = random_deltas((0, 1))
    result = fold([accepted("k", change, num_examples=37, steps=3, format="fp32")], shape=model_shape())
    published = publish({}, result.aggregate, {}, shape=model_shape(), format="fp32", density=1.0).published

    for block, tensors in change.items():
        for name, values in tensors.items():
            assert np.array_equal(result.aggregate[block][name], values)
            assert np.array_equal(published[block][name], values)


@settings(max_examples=25, deadline=None)
@given(factor=st.integers(2, 1000))
def test_scaling_all_numbers_of_examples_changes_nothing(factor):
    updates = four_uneven_updates()
    scaled = [dataclasses.replace(u, num_examples=u.num_examples * factor) for u in updates]
    first, second = (fold(u, shape=model_shape()).aggregate for u in (updates, scaled))

    for block, tensors in first.items():
        for name, values in tensors.items():
            np.testing.assert_allclose(second[block][name], values, rtol=1e-6, atol=1e-30)


def test_a_block_that_nobody_trained_is_not_in_the_aggregate():
    result = fold([accepted("k", random_deltas((1,)))], shape=model_shape())

    assert set(result.aggregate) == set(result.coverage) == {1}


def test_no_update_at_all_gives_an_empty_aggregate():
    result = fold([], shape=model_shape(), history={0: ((1.0,),)})

    assert result.aggregate == {}
    assert result.coverage == {}
    assert result.history == {0: ((1.0,),)}


def test_a_repeated_update_counts_once():
    updates = four_uneven_updates()

    assert fold_hash(updates + updates[::-1]) == fold_hash(updates)


def test_the_fold_equals_the_formula_written_out():
    updates = four_uneven_updates()
    result = fold(updates, shape=model_shape())
    values = [decoded(u) for u in updates]
    median = (33 + 90) / 2
    w = [min(u.num_examples, 10 * median) * (0.6 if u.staleness else 1.0) for u in updates]
    for block in (0, 1, 2):
        members = [i for i, u in enumerate(updates) if block in u.blocks]
        tbar = sum(w[i] * updates[i].steps for i in members) / sum(w[i] for i in members)
        nova = {i: min(2.0, max(0.5, tbar / updates[i].steps)) for i in members}
        norms = {
            i: math.sqrt(sum((v**2).sum() for v in values[i][block].values()))
            * nova[i]
            / math.sqrt(model_shape().block_parameters)
            for i in members
        }
        med = np.median(list(norms.values())) if len(members) >= 3 else math.inf
        clip = {i: min(1.0, 3 * med / norms[i]) for i in members}
        den = sum(w[i] for i in members)
        cov = den / sum(w)
        assert result.coverage[block] == pytest.approx(cov, rel=1e-12)
        assert result.history[block][-1] == pytest.approx(tuple(norms[i] for i in members), rel=1e-6)
        for spec in model_shape().block_tensors():
            num = sum(w[i] * nova[i] * clip[i] * values[i][block][spec.name] for i in members)
            np.testing.assert_allclose(
                result.aggregate[block][spec.name], min(1.0, cov / 0.25) * num / den, rtol=1e-5, atol=1e-10
            )


def test_rows_that_a_client_trained_but_did_not_send_count_as_zero():
    one = random_deltas((0,), 1)
    sparse = accepted("k1", one, density=0.1)
    dense = accepted("k2", one, density=1.0)
    result = fold([sparse, dense], shape=model_shape())
    first, second = decoded(sparse)[0], decoded(dense)[0]

    for name in first:
        np.testing.assert_allclose(result.aggregate[0][name], (first[name] + second[name]) / 2, rtol=1e-6)


def test_a_block_trained_by_little_weight_moves_less_than_its_mean_update():
    change = random_deltas((0, 1))
    updates = [
        accepted("k1", change, num_examples=10, format="fp32"),
        *(accepted(f"k{n}", {0: change[0]}, num_examples=10, format="fp32") for n in range(2, 11)),
    ]
    result = fold(updates, shape=model_shape())

    assert result.coverage[1] == pytest.approx(0.1)
    np.testing.assert_allclose(
        result.aggregate[1]["mlp.up_proj.weight"], change[1]["mlp.up_proj.weight"] * 0.4, rtol=1e-6
    )


def test_no_client_counts_for_more_than_ten_times_the_median():
    updates = [
        accepted("k1", random_deltas((0,), 1), num_examples=10),
        accepted("k2", random_deltas((0,), 2), num_examples=10),
        accepted("k3", random_deltas((0,), 3), num_examples=10**9),
    ]

    assert fold(updates, shape=model_shape()).weights == {"k1": 10, "k2": 10, "k3": 100}


def test_one_update_a_hundred_times_as_large_is_scaled_down_to_three_medians():
    updates = [accepted(f"k{n}", random_deltas((0,), n), format="fp32") for n in range(4)]
    updates.append(accepted("k9", random_deltas((0,), 9, scale=0.1), format="fp32"))
    result = fold(updates, shape=model_shape())
    norms = result.history[0][-1]

    assert [c.client for c in result.clipped] == ["k9"]
    assert result.clipped[0].factor * norms[-1] == pytest.approx(3 * float(np.median(norms)))


def test_with_fewer_than_three_updates_the_norms_of_earlier_rounds_are_the_yardstick():
    history = None
    for number in range(7):
        usual = [accepted(f"k{n}", random_deltas((0,), 10 * number + n)) for n in range(3)]
        history = fold(usual, shape=model_shape(), history=history).history
    large = [accepted("k1", random_deltas((0,), 99, scale=0.1))]

    assert len(history[0]) == 5
    assert fold(large, shape=model_shape()).clipped == ()
    assert fold(large, shape=model_shape(), history=history).clipped[0].factor < 0.1


def test_idle_clients_do_not_silence_the_one_that_learnt():
    zeros = {0: {s.name: np.zeros(s.shape, np.float32) for s in model_shape().block_tensors()}}
    updates = [accepted("k1", zeros), accepted("k2", zeros), accepted("k3", random_deltas((0,)))]
    result = fold(updates, shape=model_shape())

    assert result.clipped == ()
    assert result.aggregate[0]["mlp.up_proj.weight"].any()


def test_a_client_that_did_fewer_steps_counts_for_more_per_step_within_bounds():
    change = random_deltas((0,))
    slow = {0: {name: v / 16 for name, v in change[0].items()}}
    both = fold(
        [accepted("k1", change, steps=16, format="fp32"), accepted("k2", slow, steps=1, format="fp32")],
        shape=model_shape(),
    )
    # tbar 8.5: nova is 0.53125 for the first and 2 (not 8.5) for the second.
    expected = change[0]["mlp.up_proj.weight"] * (0.53125 + 2 / 16) / 2

    np.testing.assert_allclose(both.aggregate[0]["mlp.up_proj.weight"], expected, rtol=1e-6)


def test_a_late_update_counts_six_tenths():
    late = accepted("k1", random_deltas((0,), 1), num_examples=50, staleness=1)
    other = accepted("k2", random_deltas((0,), 2), num_examples=50)

    assert fold([late, other], shape=model_shape()).weights == {"k1": 30.0, "k2": 50.0}


def test_two_updates_of_one_client_from_two_rounds_both_count():
    late = accepted("k1", random_deltas((0,), 1), staleness=1, attempt="old")
    current = accepted("k1", random_deltas((0,), 2), attempt="new")
    result = fold([late, current], shape=model_shape())

    assert result.weights == {"k1": 160.0}
    assert len(result.history[0][-1]) == 2


def test_an_all_zero_update_folds():
    zeros = {0: {s.name: np.zeros(s.shape, np.float32) for s in model_shape().block_tensors()}}
    result = fold([accepted("k1", zeros)], shape=model_shape())

    assert not any(t.any() for t in result.aggregate[0].values())


def spooled(folder, number, shape):
    update = accepted(f"k{number}", random_deltas((0,), number, shape=shape), shape=shape, density=1.0)
    path = folder / f"{number}.delta"
    path.write_bytes(update.read_payload())
    return dataclasses.replace(update, read_payload=lambda: map_payload(path))


def test_folding_from_spooled_files_equals_folding_from_memory(tmp_path):
    in_memory = four_uneven_updates()
    on_disk = []
    for update in in_memory:
        (tmp_path / update.client).write_bytes(update.read_payload())
        on_disk.append(
            dataclasses.replace(update, read_payload=lambda path=tmp_path / update.client: map_payload(path))
        )

    assert fold_hash(on_disk) == fold_hash(in_memory)


def test_the_memory_of_a_fold_does_not_grow_with_the_number_of_updates(tmp_path):
    shape = model_shape(hidden=1024)
    updates = [spooled(tmp_path, number, shape) for number in range(24)]

    def peak_bytes(cohort):
        tracemalloc.start()
        try:
            fold(cohort, shape=shape)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak_bytes(updates[:3]), peak_bytes(updates)
    payload = len(updates[0].read_payload())
    assert many < few + payload


def test_an_empty_spooled_payload_maps_to_no_bytes(tmp_path):
    path = tmp_path / "empty.delta"
    path.touch()

    assert bytes(map_payload(path)) == b""


def wide_shape():
    """All four widths are different slices: 1, 2, 4 and 8 heads, 8 to 64 neurons."""
    return ModelShape(
        family="qwen2",
        num_layers=2,
        hidden_size=16,
        intermediate_size=64,
        num_heads=8,
        num_kv_heads=4,
        head_dim=4,
        vocab_size=16,
        tied_embeddings=True,
        qkv_bias=True,
    )


def slim(client, blocks, width, seed, **fields):
    deltas = random_deltas(blocks, seed, shape=wide_shape(), width=width)
    return accepted(client, deltas, width=width, shape=wide_shape(), **fields)


def four_slim_updates():
    return [
        slim("k1", (0,), 0.125, 1, num_examples=7),
        slim("k2", (0, 1), 0.5, 2, num_examples=400, steps=5, staleness=1),
        slim("k3", (1, 2), 1.0, 3, num_examples=33, format="bf16"),
        slim("k4", (0, 2), 0.25, 4, num_examples=90, steps=11, format="fp32"),
    ]


def test_every_order_of_arrival_of_mixed_widths_gives_the_same_bits():
    hashes = {fold_hash(order, shape=wide_shape()) for order in itertools.permutations(four_slim_updates())}

    assert len(hashes) == 1


def test_the_fold_of_mixed_widths_equals_the_formula_written_out_for_every_value():
    shape = wide_shape()
    updates = [
        slim("k1", (0,), 0.125, 1, num_examples=10, steps=16),
        slim("k2", (0,), 0.5, 2, num_examples=20, steps=8, staleness=1),
        slim("k3", (0,), 0.5, 3, num_examples=40, steps=16, format="fp32"),
        slim("k4", (0,), 1.0, 4, num_examples=5, steps=16),
        slim("k5", (1,), 0.25, 5, num_examples=60, steps=16),
    ]
    result = fold(updates, shape=shape)
    w = [10, 20 * 0.6, 40, 5, 60]
    values = [decoded(u, shape) for u in updates]
    for block, members in ((0, (0, 1, 2, 3)), (1, (4,))):
        tbar = sum(w[i] * updates[i].steps for i in members) / sum(w[i] for i in members)
        nova = {i: min(2.0, max(0.5, tbar / updates[i].steps)) for i in members}
        norms = {
            i: math.sqrt(sum((v**2).sum() for v in values[i][block].values()))
            * nova[i]
            / math.sqrt(sum(v.size for v in values[i][block].values()))
            for i in members
        }
        clip = {i: min(1.0, 3 * np.median(list(norms.values())) / norms[i]) for i in members}
        assert result.history[block][-1] == pytest.approx(tuple(norms.values()), rel=1e-6)
        for spec in shape.block_tensors():
            num, den = np.zeros(spec.shape), np.zeros(spec.shape)
            for i in members:
                sent = values[i][block][spec.name]
                cut(num, sent.shape)[...] += w[i] * nova[i] * clip[i] * sent
                cut(den, sent.shape)[...] += w[i]
            damp = np.minimum(1.0, den / sum(w) / 0.25)
            expected = np.divide(damp * num, den, out=np.zeros(spec.shape), where=den > 0)
            np.testing.assert_allclose(result.aggregate[block][spec.name], expected, rtol=1e-5, atol=1e-10)
    assert result.segment_coverage[0] == pytest.approx((67 / 127, 57 / 127, 57 / 127, 5 / 127))
    assert result.segment_coverage[1] == pytest.approx((60 / 127, 60 / 127, 0, 0))
    assert result.coverage == {block: shares[0] for block, shares in result.segment_coverage.items()}
    assert result.widths == {0: 1.0, 1: 0.25}


def test_two_updates_by_hand_a_value_only_one_trained_is_the_mean_of_that_one():
    """Weights 10 and 30: up_proj rows below 8 are (10·1 + 30·3)/40, rows 8 to 31 are 3, those beyond are untouched."""
    shape = wide_shape()
    one, three = (
        {0: {s.name: np.full(s.shape, value, np.float32) for s in shape.block_tensors(width)}}
        for value, width in ((1.0, 0.125), (3.0, 0.5))
    )
    updates = [
        accepted("k1", one, width=0.125, num_examples=10, format="fp32", shape=shape),
        accepted("k2", three, width=0.5, num_examples=30, format="fp32", shape=shape),
    ]
    block = fold(updates, shape=shape).aggregate[0]

    for name, axis in (("mlp.up_proj.weight", 0), ("mlp.down_proj.weight", 1)):
        rows = np.moveaxis(block[name], axis, 0)
        assert [float(v) for v in np.unique(rows[:8])] == [2.5]
        assert [float(v) for v in np.unique(rows[8:32])] == [3.0]
        assert not rows[32:].any()
    bias = block["self_attn.q_proj.bias"]  # 1, 4 and 8 heads of 4
    assert bias.tolist() == [2.5] * 4 + [3.0] * 12 + [0.0] * 16
    assert np.unique(block["input_layernorm.weight"]).tolist() == [2.5]


def test_a_segment_trained_by_little_weight_is_damped_and_the_others_are_not():
    shape, ones = wide_shape(), {}
    for width in (0.25, 1.0):
        ones[width] = {0: {s.name: np.ones(s.shape, np.float32) for s in shape.block_tensors(width)}}
    updates = [
        accepted(f"k{n}", ones[width], width=width, num_examples=10, format="fp32", shape=shape)
        for n, width in enumerate([1.0] + [0.25] * 9)
    ]
    up = fold(updates, shape=shape).aggregate[0]["mlp.up_proj.weight"]

    assert np.unique(up[:16]).tolist() == [1.0]
    assert np.unique(up[16:]).tolist() == pytest.approx([0.4])


def test_values_that_no_width_reached_keep_their_bits_from_version_to_version():
    shape, published, residual = wide_shape(), {}, {}
    for number, widths in enumerate(((1.0, 0.5), (0.25, 0.125), (0.125, 0.125))):
        updates = [slim(f"k{n}", (0,), width, 10 * number + n) for n, width in enumerate(widths)]
        result = fold(updates, shape=shape)
        before, waited = published, residual
        made = publish(
            published, result.aggregate, residual, shape=shape, format="int8", density=0.5, widths=result.widths
        )
        published, residual = made.published, made.residual
        for spec in shape.block_tensors(max(widths)) if before else ():
            outside = np.ones(published[0][spec.name].shape, dtype=bool)
            cut(outside, spec.shape)[...] = False
            for old, new in ((before, published), (waited, residual)):
                assert old[0][spec.name][outside].tobytes() == new[0][spec.name][outside].tobytes()
            assert not np.array_equal(before[0][spec.name], published[0][spec.name])


@pytest.mark.parametrize("width", WIDTHS)
def test_a_lone_slim_client_in_fp32_changes_its_slice_by_its_change_exactly(width):
    shape = wide_shape()
    change = random_deltas((0,), shape=shape, width=width)
    result = fold([accepted("k", change, width=width, format="fp32", shape=shape)], shape=shape)

    for spec in shape.block_tensors():
        assert result.aggregate[0][spec.name].tobytes() == pad(change[0][spec.name], spec.shape).tobytes()
    assert result.widths == {0: width}


def test_slices_of_one_change_fold_to_that_change_wherever_a_quarter_of_the_weight_trained():
    shape, whole = wide_shape(), random_deltas((0,), shape=wide_shape())[0]
    updates = []
    for number, width in enumerate((1.0, 0.5, 0.25, 0.125)):
        slices = {s.name: np.ascontiguousarray(cut(whole[s.name], s.shape)) for s in shape.block_tensors(width)}
        updates.append(accepted(f"k{number}", {0: slices}, width=width, num_examples=25, format="fp32", shape=shape))
    result = fold(updates, shape=shape)

    assert result.segment_coverage[0] == (1.0, 0.75, 0.5, 0.25)
    # The norms differ a little from slice to slice; none is scaled down.
    assert result.clipped == ()
    for name, values in whole.items():
        np.testing.assert_array_almost_equal_nulp(result.aggregate[0][name], values, nulp=1)


def test_scaling_all_numbers_of_examples_changes_nothing_for_mixed_widths_and_a_repeated_update_counts_once():
    updates = four_slim_updates()
    scaled = [dataclasses.replace(u, num_examples=u.num_examples * 64) for u in updates]
    first, second = (fold(u, shape=wide_shape()) for u in (updates, scaled))

    assert fold_hash([*updates, updates[2], updates[0]], shape=wide_shape()) == fold_hash(updates, shape=wide_shape())
    for block, tensors in first.aggregate.items():
        for name, values in tensors.items():
            np.testing.assert_allclose(second.aggregate[block][name], values, rtol=1e-6, atol=1e-30)


def test_a_slim_update_a_hundred_times_as_large_is_scaled_down_by_the_norm_of_its_own_slice():
    updates = [slim(f"k{n}", (0,), width, n, format="fp32") for n, width in enumerate((1.0, 0.5, 0.25, 1.0))]
    deltas = random_deltas((0,), 9, scale=0.1, shape=wide_shape(), width=0.125)
    updates.append(accepted("k9", deltas, width=0.125, shape=wide_shape(), format="fp32"))
    result = fold(updates, shape=wide_shape())
    norms = result.history[0][-1]

    assert [c.client for c in result.clipped] == ["k9"]
    assert max(norms[:4]) < 1.3 * min(norms[:4])  # a root mean square over the slice: widths compare
    assert result.clipped[0].factor * norms[-1] == pytest.approx(3 * float(np.median(norms)))
