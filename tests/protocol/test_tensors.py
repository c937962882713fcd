"""The delta encoding of methods.md 7.1, rule by rule (D1 to D6)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedblocks.profiles.model_shape import WIDTHS, ChosenRows, ModelShape, TensorSpec
from fedblocks.profiles.units import PersonalPairs, TrainedUnits, unit_tensors
from fedblocks.protocol import row_mask
from fedblocks.protocol.errors import LocalProtocolError, RemoteProtocolError
from fedblocks.protocol.messages import TensorHeader
from fedblocks.protocol.tensors import (
    check_tensor,
    cut,
    decode_tensor,
    delta_layout,
    encode_delta,
    encode_tensor,
    pad,
    payload_length,
    read_rows,
)

FORMATS = ("int8", "bf16", "fp32")

shapes = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 20), st.integers(1, 12)),
)
densities = st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.99, 1.0])


def tensors(limit: float = 1e30):
    limit = float(np.float32(limit))
    values = st.floats(-limit, limit, width=32) | st.sampled_from([0.0, -0.0, 1e-38, 1e-44, 3.0, -3.0])
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=values, fill=st.just(0.0)))


def spec_of(x):
    return TensorSpec(name="t", shape=x.shape)


def decode(x, encoded, *, format="int8", density=0.25):
    return decode_tensor(
        spec_of(x), encoded.rows_sent, memoryview(encoded.payload), format=format, density=density
    ).reshape(x.shape)


def random_matrix(rows, cols, seed=0, scale=1e-3):
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * scale).astype(np.float32)


def model_shape():
    return ModelShape(
        family="qwen3",
        num_layers=2,
        hidden_size=8,
        intermediate_size=12,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=16,
        tied_embeddings=True,
        qkv_bias=True,
        qk_norm=True,
    )


@given(x=tensors(), density=densities)
def test_what_is_sent_and_what_stays_add_up_to_the_change(x, density):
    encoded = encode_tensor(x, None, format="int8", density=density)
    xhat = decode(x, encoded, density=density)

    exact = xhat.astype(np.float64) + encoded.residual.astype(np.float64)
    np.testing.assert_array_less(np.abs(exact - x), np.spacing(np.abs(x)) * 1.0001)


@given(x=tensors(), density=densities)
def test_the_error_on_a_sent_row_is_at_most_half_a_step_of_its_scale(x, density):
    encoded = encode_tensor(x, None, format="int8", density=density)
    rows = read_rows(spec_of(x), encoded.rows_sent, memoryview(encoded.payload), format="int8", density=density)
    matrix = x.reshape(spec_of(x).rows_cols).astype(np.float64)
    error = np.abs(matrix[rows.index] - rows.decoded())
    bound = rows.scales[:, None] / 2 + np.spacing(np.abs(x).max())
    dropped = np.abs(matrix[rows.index]).max(axis=1, keepdims=True) < 127 * 2.0**-126

    assert np.all((error <= bound) | dropped)


@given(x=tensors(), density=densities, format=st.sampled_from(FORMATS))
def test_the_payload_has_exactly_the_length_of_the_formula(x, density, format):
    try:
        encoded = encode_tensor(x, None, format=format, density=density)
    except LocalProtocolError:
        assert format == "bf16"
        return
    spec = spec_of(x)
    rows, cols = spec.rows_cols
    if format == "int8":
        bitmap = math.ceil(rows / 8) if x.ndim == 2 and density < 1 else 0
        formula = encoded.rows_sent * (cols + 4) + bitmap
    else:
        formula = {"bf16": 2, "fp32": 4}[format] * rows * cols

    assert len(encoded.payload) == formula
    assert payload_length(spec, encoded.rows_sent, format=format, density=density) == formula


def test_one_block_of_qwen_takes_the_documented_bytes():
    qwen = ModelShape(
        family="qwen2",
        num_layers=24,
        hidden_size=896,
        intermediate_size=4864,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=151936,
        tied_embeddings=True,
        qkv_bias=True,
    )

    def megabytes(density):
        return (
            sum(
                payload_length(
                    s,
                    1 if len(s.shape) == 1 else math.ceil(density * s.shape[0]),
                    format="int8",
                    density=density,
                )
                for s in qwen.block_tensors()
            )
            / 1e6
        )

    assert qwen.block_parameters == 14_912_384
    assert round(megabytes(1.0), 2) == 14.96
    assert round(megabytes(0.25), 2) == 3.74


def test_the_rows_with_the_largest_sums_of_squares_are_sent_and_ties_go_to_the_lower_index():
    x = np.zeros((8, 4), dtype=np.float32)
    x[[1, 3, 6]] = 1.0
    x[5] = [2, 0, 0, 0]  # the same energy as the rows of ones
    x[7] = 2.0

    encoded = encode_tensor(x, None, format="int8", density=0.25)
    rows = read_rows(spec_of(x), 2, memoryview(encoded.payload), format="int8", density=0.25)

    assert rows.index.tolist() == [1, 7]


@given(x=tensors(), density=densities)
def test_what_is_dropped_is_smaller_than_what_is_sent(x, density):
    encoded = encode_tensor(x, None, format="int8", density=density)
    rows = read_rows(spec_of(x), encoded.rows_sent, memoryview(encoded.payload), format="int8", density=density)
    energy = np.square(x.reshape(spec_of(x).rows_cols).astype(np.float64)).sum(axis=1)
    others = np.delete(energy, rows.index)

    assert not len(rows.index) or not len(others) or energy[rows.index].min() >= others.max()


@pytest.mark.parametrize("density", [0.25, 1.0])
@pytest.mark.parametrize("shape", [(9,), (9, 3)])
def test_an_all_zero_change_sends_no_row_and_is_valid(shape, density):
    x = np.zeros(shape, dtype=np.float32)
    encoded = encode_tensor(x, None, format="int8", density=density)

    assert encoded.rows_sent == 0
    assert len(encoded.payload) == (2 if len(shape) == 2 and density < 1 else 0)
    assert not decode(x, encoded, density=density).any()


def test_a_row_too_small_for_a_normal_scale_is_not_sent_and_waits():
    x = np.zeros((4, 2), dtype=np.float32)
    x[0] = 1.0
    x[2] = 2.0**-126  # its scale would be 127 times smaller: subnormal
    encoded = encode_tensor(x, None, format="int8", density=0.5)

    assert encoded.rows_sent == 1
    assert np.array_equal(encoded.residual[2], x[2])


def test_beside_other_rows_a_dense_matrix_sends_an_empty_row_as_zero_codes():
    x = np.zeros((3, 2), dtype=np.float32)
    x[0] = 1.0
    x[1] = 2.0**-126
    encoded = encode_tensor(x, None, format="int8", density=1.0)
    xhat = decode(x, encoded, density=1.0)

    assert encoded.rows_sent == 3
    assert not xhat[1:].any()
    assert np.array_equal(encoded.residual[1:], x[1:])


def test_codes_are_rounded_half_to_even():
    x = np.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5], dtype=np.float32)  # scale 1
    rows = read_rows(
        spec_of(x),
        1,
        memoryview(encode_tensor(x, None, format="int8", density=1.0).payload),
        format="int8",
        density=1.0,
    )

    assert rows.values.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_the_residual_is_added_no_further_than_the_cap():
    x = np.zeros(4, dtype=np.float32)
    owed = np.array([1.0, -1.0, 0.1, 0.0], dtype=np.float32)
    encoded = encode_tensor(x, owed, format="fp32", density=1.0, cap=0.25)

    assert np.frombuffer(encoded.payload, "<f4").tolist() == [0.25, -0.25, np.float32(0.1), 0.0]
    assert encoded.residual is None


def test_sums_of_what_was_accepted_and_is_owed_equal_the_sum_of_the_changes():
    changes = [random_matrix(12, 6, seed) for seed in range(20)]
    total = np.zeros((12, 6))
    owed = None
    for change in changes:
        encoded = encode_tensor(change, owed, format="int8", density=0.25)
        total += decode(change, encoded)
        owed = encoded.residual

    np.testing.assert_allclose(total + owed, np.sum(changes, axis=0, dtype=np.float64), atol=1e-7)


@given(x=tensors(1e3), density=densities, format=st.sampled_from(FORMATS))
def test_the_bytes_depend_on_the_values_only(x, density, format):
    first = encode_tensor(x, None, format=format, density=density)
    strided = np.zeros((*x.shape, 2), dtype=np.float32)[..., 0]
    strided[...] = x
    second = encode_tensor(strided, None, format=format, density=density)

    assert first.payload == second.payload


@given(x=tensors())
def test_fp32_is_exact(x):
    encoded = encode_tensor(x, None, format="fp32", density=1.0)

    assert np.array_equal(decode(x, encoded, format="fp32", density=1.0), x)


@given(x=tensors(1e3))
def test_bf16_is_within_its_rounding(x):
    encoded = encode_tensor(x, None, format="bf16", density=1.0)
    error = np.abs(decode(x, encoded, format="bf16", density=1.0).astype(np.float64) - x)

    assert np.all(error <= np.abs(x) * 2.0**-8 + 1e-40)


def test_the_arguments_keep_their_values():
    x, owed = random_matrix(8, 4), random_matrix(8, 4, seed=1)
    before = x.copy(), owed.copy()
    encode_tensor(x, owed, format="int8", density=0.5)

    assert np.array_equal(x, before[0])
    assert np.array_equal(owed, before[1])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_change_that_is_not_finite_is_never_encoded(format, value):
    x = random_matrix(4, 4)
    x[2, 1] = value

    with pytest.raises(LocalProtocolError, match="not finite"):
        encode_tensor(x, None, format=format, density=1.0)


@pytest.mark.parametrize("format", ["int8", "bf16"])
def test_a_change_at_the_edge_of_fp32_is_refused_here_or_decodes_to_finite_values(format):
    x = np.full((2, 2), np.finfo(np.float32).max, dtype=np.float32)

    try:
        encoded = encode_tensor(x, None, format=format, density=1.0)
    except LocalProtocolError:
        return
    assert np.isfinite(decode(x, encoded, format=format, density=1.0)).all()


# What a decoder refuses, and under which code.


def int8_parts(rows=10, cols=4, density=0.5):
    """A valid payload as (spec, rows_sent, bitmap, scales, codes)."""
    x = random_matrix(rows, cols)
    encoded = encode_tensor(x, None, format="int8", density=density)
    head = (rows + 7) // 8
    k = encoded.rows_sent
    data = encoded.payload
    return (
        spec_of(x),
        k,
        bytearray(data[:head]),
        np.frombuffer(data[head : head + 4 * k], "<f4").copy(),
        np.frombuffer(data[head + 4 * k :], np.int8).copy(),
    )


def refusal(spec, rows_sent, *parts, density=0.5, format="int8", limit=math.inf):
    payload = b"".join(bytes(p) if isinstance(p, bytearray) else p.tobytes() for p in parts)
    with pytest.raises(RemoteProtocolError) as caught:
        check_tensor(spec, rows_sent, memoryview(payload), format=format, density=density, limit=limit)
    return caught.value.code


def test_any_other_length_is_refused():
    spec, k, bitmap, scales, codes = int8_parts()

    assert refusal(spec, k, bitmap, scales, codes[:-1]) == "length_mismatch"
    assert refusal(spec, k, bitmap, scales, codes, codes[:1]) == "length_mismatch"


def test_a_bitmap_that_names_another_number_of_rows_is_refused():
    spec, k, bitmap, scales, codes = int8_parts()
    bitmap[0] ^= 1

    assert refusal(spec, k, bitmap, scales, codes) == "length_mismatch"


def test_a_bitmap_that_names_a_row_beyond_the_last_is_refused():
    spec, k, bitmap, scales, codes = int8_parts()
    lowest = bitmap[0] & -bitmap[0]
    bitmap[0] ^= lowest
    bitmap[1] |= 0x80

    assert refusal(spec, k, bitmap, scales, codes) == "length_mismatch"


def test_a_code_of_minus_128_is_refused():
    spec, k, bitmap, scales, codes = int8_parts()
    codes[3] = -128

    assert refusal(spec, k, bitmap, scales, codes) == "malformed"


@pytest.mark.parametrize(
    ("scale", "code"),
    [
        (math.nan, "non_finite"),
        (math.inf, "non_finite"),
        (-math.inf, "non_finite"),
        (3e38, "non_finite"),
        (0.0, "malformed"),
        (-1e-3, "malformed"),
        (1e-39, "malformed"),
    ],
)
def test_a_scale_that_no_encoder_makes_is_refused(scale, code):
    spec, k, bitmap, scales, codes = int8_parts()
    scales[1] = scale

    assert refusal(spec, k, bitmap, scales, codes) == code


@pytest.mark.parametrize("rows_sent", [-1, 6, 10, 2**40])
def test_more_rows_than_the_density_allows_are_refused_before_anything_is_read(rows_sent):
    spec, _, bitmap, scales, codes = int8_parts()

    assert refusal(spec, rows_sent, bitmap, scales, codes) == "shape_mismatch"


@pytest.mark.parametrize("format", ["bf16", "fp32"])
def test_a_dense_value_that_is_not_finite_is_refused(format):
    x = random_matrix(3, 5)
    payload = bytearray(encode_tensor(x, None, format=format, density=1.0).payload)
    width = len(payload) // 15
    payload[6 * width : 7 * width] = b"\xff" * width  # NaN in either format

    assert refusal(spec_of(x), 3, payload, format=format, density=1.0) == "non_finite"


@pytest.mark.parametrize("format", FORMATS)
def test_the_norm_limit_is_met_fits_and_is_passed(format):
    x = np.zeros((4, 4), dtype=np.float32)
    x[2, 2] = -127 * 2.0**-10  # exact in every format
    encoded = encode_tensor(x, None, format=format, density=1.0)
    limit = 127 * 2.0**-10

    check_tensor(
        spec_of(x),
        encoded.rows_sent,
        memoryview(encoded.payload),
        format=format,
        density=1.0,
        limit=limit,
    )
    assert (
        refusal(
            spec_of(x),
            encoded.rows_sent,
            bytearray(encoded.payload),
            format=format,
            density=1.0,
            limit=limit * 0.999,
        )
        == "over_norm"
    )


@settings(max_examples=300)
@given(data=st.binary(max_size=200), rows_sent=st.integers(-1, 11), format=st.sampled_from(FORMATS), density=densities)
def test_random_bytes_decode_to_finite_values_or_are_refused(data, rows_sent, format, density):
    spec = TensorSpec(name="t", shape=(10, 4))
    try:
        values = decode_tensor(spec, rows_sent, memoryview(data), format=format, density=density)
    except RemoteProtocolError:
        return
    assert np.isfinite(values).all()


# A whole update.


def random_deltas(blocks, seed=0):
    rng = np.random.default_rng(seed)
    return {
        b: {s.name: rng.standard_normal(s.shape).astype(np.float32) * 1e-3 for s in model_shape().block_tensors()}
        for b in blocks
    }


def test_an_update_lists_its_tensors_in_order_and_its_layout_finds_each_one():
    shape, blocks = model_shape(), (0, 2)
    deltas = random_deltas(blocks)
    encoded = encode_delta(shape, blocks, deltas, {}, format="int8", density=0.25)
    payload = memoryview(b"".join(encoded.parts))
    layout = delta_layout(encoded.headers, shape=shape, blocks=blocks, format="int8", density=0.25)

    assert layout.total_bytes == len(payload)
    assert [(s.block, s.spec) for s in layout.slots] == [(b, s) for b in blocks for s in shape.block_tensors()]
    for slot in layout.slots:
        xhat = decode_tensor(slot.spec, slot.rows_sent, slot.of(payload), format="int8", density=0.25)
        total = xhat.reshape(slot.spec.shape) + encoded.residuals[slot.block][slot.spec.name]
        np.testing.assert_allclose(total, deltas[slot.block][slot.spec.name], rtol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_chosen_rows_come_back_at_their_places_in_the_whole_tensor(format):
    mask = np.arange(21) % 5 == 2
    spec = ChosenRows(name="t", shape=(int(mask.sum()), 6), num_rows=21)
    x = random_matrix(*spec.shape)
    encoded = encode_tensor(x, None, format=format, density=1.0)
    payload = memoryview(row_mask.pack(mask) + encoded.payload)
    assert len(payload) == payload_length(spec, encoded.rows_sent, format=format, density=1.0)

    whole = decode_tensor(spec, encoded.rows_sent, payload, format=format, density=1.0)
    assert whole.shape == (21, 6)
    assert not whole[~mask].any()
    np.testing.assert_allclose(whole[mask], x, atol=1e-2 * np.abs(x).max())

    for wrong in (mask ^ (np.arange(21) == 0), ~mask):
        with pytest.raises(RemoteProtocolError, match="t: a row mask names") as caught:
            read_rows(
                spec, encoded.rows_sent, memoryview(row_mask.pack(wrong) + encoded.payload), format=format, density=1
            )
        assert caught.value.code == "length_mismatch"


def test_rows_that_were_not_chosen_are_our_own_bug():
    pairs = PersonalPairs(rank=2, targets="qv", prior_rank=2)
    units = TrainedUnits(shape=model_shape(), trainable=pairs)
    deltas = {0: {s.name: np.zeros(s.shape, np.float32) for s in unit_tensors(units, 0, 0.5)}}
    with pytest.raises(LocalProtocolError, match=r"has a row mask of \(rows, chosen\) None, expected"):
        encode_delta(units, (0,), deltas, {}, format="fp32", density=1.0, width=0.5)


def layout_refusal(headers, blocks=(0, 2)):
    with pytest.raises(RemoteProtocolError) as caught:
        delta_layout(headers, shape=model_shape(), blocks=blocks, format="int8", density=0.25)
    return caught.value.code


def headers_of(blocks):
    return list(encode_delta(model_shape(), blocks, random_deltas(blocks), {}, format="int8", density=0.25).headers)


def test_a_block_that_is_not_assigned_is_refused():
    assert layout_refusal(headers_of((0, 1, 2))) == "not_assigned"


def test_a_missing_block_or_tensor_is_refused():
    assert layout_refusal(headers_of((0,))) == "incomplete"
    assert layout_refusal(headers_of((0, 2))[:-1]) == "incomplete"
    assert layout_refusal([]) == "incomplete"


def test_a_tensor_listed_twice_or_out_of_order_is_refused():
    headers = headers_of((0, 2))

    assert layout_refusal([*headers, headers[-1]]) == "malformed"
    assert layout_refusal([headers[1], headers[0], *headers[2:]]) == "malformed"


def test_a_tensor_that_the_model_does_not_have_or_with_other_rows_is_refused():
    headers = headers_of((0, 2))

    assert layout_refusal([*headers, TensorHeader(block=2, name="mlp.up_proj.extra", rows_sent=1)]) == "shape_mismatch"
    assert layout_refusal([dataclasses.replace(headers[0], rows_sent=2), *headers[1:]]) == "shape_mismatch"


def test_a_delta_of_another_shape_is_our_own_bug():
    deltas = random_deltas((0,))
    deltas[0]["mlp.up_proj.weight"] = deltas[0]["mlp.up_proj.weight"].T.copy()

    with pytest.raises(LocalProtocolError, match=r"mlp.up_proj.weight has shape \(8, 12\), expected \(12, 8\)"):
        encode_delta(model_shape(), (0,), deltas, {}, format="int8", density=0.25)


SLIM_SHAPES = {
    "qwen3": model_shape(),
    "one key/value head": ModelShape(
        family="qwen2", num_layers=2, hidden_size=24, intermediate_size=40, num_heads=6, num_kv_heads=1, head_dim=4,
        vocab_size=16, tied_embeddings=True, qkv_bias=True,
    ),
    "no groups": ModelShape(
        family="llama", num_layers=2, hidden_size=32, intermediate_size=640, num_heads=8, num_kv_heads=8, head_dim=4,
        vocab_size=16, tied_embeddings=True, qkv_bias=True, o_bias=True, mlp_bias=True,
    ),
}  # fmt: skip


def slim_deltas(shape, blocks, width, seed=0):
    rng = np.random.default_rng(seed)
    return {
        b: {s.name: (rng.standard_normal(s.shape) * 1e-3).astype(np.float32) for s in shape.block_tensors(width)}
        for b in blocks
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", SLIM_SHAPES)
def test_a_slice_that_is_padded_and_cut_again_is_the_same_slice(kind, width):
    shape = SLIM_SHAPES[kind]
    for spec, whole in zip(shape.block_tensors(width), shape.block_tensors(), strict=True):
        values = slim_deltas(shape, (0,), width)[0][spec.name]
        padded = pad(values, whole.shape)

        assert padded.shape == whole.shape
        assert cut(padded, spec.shape).tobytes() == values.tobytes()
        assert np.count_nonzero(padded) == np.count_nonzero(values)
        assert (padded is values) == (spec.shape == whole.shape)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", SLIM_SHAPES)
@pytest.mark.parametrize("density", [0.25, 1.0])
def test_a_slim_update_is_as_long_as_the_formula_says_and_decodes_to_what_was_sent(kind, width, density):
    shape, blocks = SLIM_SHAPES[kind], (0, 2)
    deltas = slim_deltas(shape, blocks, width)
    encoded = encode_delta(shape, blocks, deltas, {}, format="int8", density=density, width=width)
    payload = memoryview(b"".join(encoded.parts))
    layout = delta_layout(encoded.headers, shape=shape, blocks=blocks, format="int8", density=density, width=width)
    formula = 0
    for spec in shape.block_tensors(width):  # methods.md 7.1
        rows, cols = spec.rows_cols
        kept = 1 if len(spec.shape) == 1 else math.ceil(density * rows)
        formula += kept * cols + 4 * kept
        formula += 0 if density == 1 or len(spec.shape) == 1 else math.ceil(rows / 8)

    assert len(payload) == layout.total_bytes == 2 * formula
    assert [(s.block, s.spec) for s in layout.slots] == [(b, s) for b in blocks for s in shape.block_tensors(width)]
    for slot in layout.slots:
        xhat = decode_tensor(slot.spec, slot.rows_sent, slot.of(payload), format="int8", density=density)
        total = xhat.reshape(slot.spec.shape) + encoded.residuals[slot.block][slot.spec.name]
        np.testing.assert_allclose(total, deltas[slot.block][slot.spec.name], rtol=1e-6)


def test_a_slim_update_adds_the_slice_of_what_is_owed_and_no_more():
    shape, width = SLIM_SHAPES["one key/value head"], 0.25
    deltas, owed = slim_deltas(shape, (0,), width), slim_deltas(shape, (0,), 1.0, seed=1)
    slices = {0: {s.name: np.ascontiguousarray(cut(owed[0][s.name], s.shape)) for s in shape.block_tensors(width)}}
    encoded = encode_delta(shape, (0,), deltas, owed, format="int8", density=0.5, width=width)
    same = encode_delta(shape, (0,), deltas, slices, format="int8", density=0.5, width=width)
    without = encode_delta(shape, (0,), deltas, {}, format="int8", density=0.5, width=width)

    assert encoded.parts == same.parts != without.parts
    assert {n: r.shape for n, r in encoded.residuals[0].items()} == {
        s.name: s.shape for s in shape.block_tensors(width)
    }


def test_a_delta_of_another_width_is_our_own_bug():
    shape = SLIM_SHAPES["no groups"]
    with pytest.raises(LocalProtocolError, match=r"q_proj.weight has shape \(16, 32\), expected \(8, 32\)"):
        encode_delta(shape, (0,), slim_deltas(shape, (0,), 0.5), {}, format="int8", density=0.25, width=0.25)


def test_the_headers_of_another_width_are_refused():
    shape = SLIM_SHAPES["no groups"]
    whole = encode_delta(shape, (0,), slim_deltas(shape, (0,), 1.0), {}, format="int8", density=1.0)
    with pytest.raises(RemoteProtocolError, match="rows announced") as caught:
        delta_layout(whole.headers, shape=shape, blocks=(0,), format="int8", density=1.0, width=0.25)

    assert caught.value.code == "shape_mismatch"
