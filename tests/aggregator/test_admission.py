"""Which updates are let in, and under which code the others are refused (methods.md 8.1, G5; field.md F1 and F2)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedblocks.aggregator.admission import Limits, check_announcement, check_payload, largest_payload_bytes
from fedblocks.aggregator.aggregation import AcceptedUpdate, fold, map_payload
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.profiles.model_shape import WIDTHS, ModelShape
from fedblocks.protocol.errors import REFUSAL_CODES
from fedblocks.protocol.messages import Assignment, Delta, StateUpdate, TensorHeader, TrainReport
from fedblocks.protocol.state import state_sha256
from fedblocks.protocol.tensors import encode_delta

LEARNING_RATE, STEPS = 1e-3, 16
LIMIT = 8 * LEARNING_RATE * STEPS
LIMITS = Limits(max_payload_bytes=10**6, max_num_examples=10_000, max_learning_rate=LEARNING_RATE)


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


def assignment(blocks=(0, 2), **changes):
    values = {
        "attempt_id": "attempt",
        "round": 5,
        "state": StateUpdate(encoding="none", from_version=4, to_version=4, state_sha256=""),
        "payload_bytes": 0,
        "payload_sha256": "",
        "blocks": blocks,
        "steps": STEPS,
        "batch_size": 8,
        "anchor_batch_size": 4,
        "anchor_every": 1,
        "anchor_weight": 1.0,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "adam_eps": 1e-8,
        "optimizer_mode": "fp32",
        "micro_batch_size": 8,
        "checkpoint_activations": False,
        "delta_format": "int8",
        "delta_density": 0.25,
        "seed": 1,
        "deadline_s": 60.0,
        "memory_budget_bytes": 0,
        "predicted_peak_bytes": 1,
        "predicted_seconds": 1.0,
        "measure": (),
    }
    return Assignment(**{**values, **changes})


def random_deltas(blocks, seed=0, scale=1e-3, shape=None, width=1.0):
    rng = np.random.default_rng(seed)
    return {
        b: {
            s.name: np.clip(rng.standard_normal(s.shape) * scale, -4 * scale, 4 * scale).astype(np.float32)
            for s in (shape or model_shape()).block_tensors(width)
        }
        for b in blocks
    }


def update(blocks=(0, 2), *, deltas=None, format="int8", density=0.25, shape=None, width=1.0, **changes):
    """A valid update as (Delta, payload)."""
    encoded = encode_delta(
        shape or model_shape(),
        blocks,
        deltas or random_deltas(blocks, shape=shape, width=width),
        {},
        format=format,
        density=density,
        width=width,
    )
    changes = {"width": width, **changes}
    return announced(b"".join(encoded.parts), encoded.headers, blocks, format, density, **changes)


def announced(payload, headers, blocks=(0, 2), format="int8", density=0.25, **changes):
    train = TrainReport(
        num_target_tokens=100,
        loss_first=2.0,
        loss_last=1.0,
        anchor_kl=0.0,
        prefix_s=0.0,
        train_s=1.0,
        measure_s=0.0,
        encode_s=0.0,
        step_s=0.1,
        peak_memory_bytes=1,
        predicted_peak_bytes=1,
        mode=ExecutionMode(),
        gradient_energy=(1.0,) * len(blocks),
    )
    values = {
        "attempt_id": "attempt",
        "round": 5,
        "version": 4,
        "num_examples": 50,
        "steps": STEPS,
        "format": format,
        "density": density,
        "tensors": headers,
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "train": train,
        "measurements": (),
    }
    return Delta(**{**values, **changes}), payload


def announcement(delta, **changes):
    """The code that answers this announcement; None if it is accepted."""
    values = {
        "assignment": assignment(),
        "shape": model_shape(),
        "limits": LIMITS,
        "quota_bytes": 10**6,
        "declared_num_examples": 50,
        "version": 4,
        "accepted_sha256": None,
    }
    refused = check_announcement(delta, **{**values, **changes})
    assert refused is None or refused.attempt_id == delta.attempt_id
    return refused.code if refused else None


def payload_check(delta, payload, task=None):
    refused = check_payload(delta, task or assignment(), memoryview(payload), shape=model_shape(), limits=LIMITS)
    return refused.code if refused else None


@pytest.mark.parametrize(("format", "density"), [("int8", 0.25), ("int8", 1.0), ("bf16", 1.0), ("fp32", 1.0)])
def test_an_honest_update_is_accepted(format, density):
    delta, payload = update(format=format, density=density)
    task = assignment(delta_format=format, delta_density=density)

    assert announcement(delta, assignment=task) is None
    assert payload_check(delta, payload, task) is None


def test_an_update_that_changes_nothing_is_accepted():
    zeros = random_deltas((0, 2), scale=0.0)
    delta, payload = update(deltas=zeros)

    assert announcement(delta) is None
    assert payload_check(delta, payload) is None


# The announcement.


@pytest.mark.parametrize(
    ("code", "changes", "context"),
    [
        ("malformed", {"payload_bytes": -1}, {}),
        ("too_large", {"payload_bytes": 2**40}, {}),
        ("over_quota", {}, {"quota_bytes": 100}),
        ("over_quota", {}, {"quota_bytes": -1}),
        ("unknown_attempt", {}, {"assignment": None}),
        ("unknown_attempt", {"round": 6}, {}),
        ("stale_round", {"version": 3}, {}),
        ("stale_round", {}, {"version": 6}),
        ("conflict", {}, {"accepted_sha256": "0" * 64}),
        ("not_assigned", {}, {"assignment": assignment((0, 1))}),
        ("incomplete", {}, {"assignment": assignment((0, 1, 2))}),
        ("dtype_mismatch", {}, {"assignment": assignment(delta_format="bf16")}),
        ("dtype_mismatch", {}, {"assignment": assignment(delta_density=0.5)}),
        ("length_mismatch", {"payload_bytes": 1000}, {}),
        ("bad_weight", {"num_examples": 51}, {}),
        ("bad_weight", {"num_examples": 10**12}, {"declared_num_examples": 10**12}),
        ("bad_weight", {"num_examples": 0}, {}),
        ("bad_weight", {"num_examples": -1}, {}),
        ("bad_steps", {"steps": 0}, {}),
        ("bad_steps", {"steps": -3}, {}),
        ("bad_steps", {"steps": STEPS + 1}, {}),
    ],
)
def test_an_announcement_is_refused_by_code(code, changes, context):
    delta, _ = update()
    if code == "incomplete":
        delta = dataclasses.replace(delta, train=dataclasses.replace(delta.train, gradient_energy=(1.0,) * 3))

    assert announcement(dataclasses.replace(delta, **changes), **context) == code


def test_a_tensor_of_another_shape_is_a_shape_mismatch():
    delta, _ = update()
    headers = delta.tensors
    vector_of_two_rows = (dataclasses.replace(headers[0], rows_sent=2), *headers[1:])
    rows_of_another_model = tuple(dataclasses.replace(h, rows_sent=h.rows_sent * 9) for h in headers)
    unknown_tensor = (*headers[:-1], dataclasses.replace(headers[-1], name="mlp.down_proj.bias"), headers[-1])

    assert announcement(dataclasses.replace(delta, tensors=vector_of_two_rows)) == "shape_mismatch"
    assert announcement(dataclasses.replace(delta, tensors=rows_of_another_model)) == "shape_mismatch"
    assert announcement(dataclasses.replace(delta, tensors=unknown_tensor)) == "shape_mismatch"


def test_a_missing_tensor_is_incomplete_and_a_repeated_one_malformed():
    delta, _ = update()

    assert announcement(dataclasses.replace(delta, tensors=delta.tensors[:-1])) == "incomplete"
    assert announcement(dataclasses.replace(delta, tensors=(*delta.tensors, delta.tensors[-1]))) == "malformed"


def test_a_report_about_other_blocks_than_the_assigned_ones_is_malformed():
    delta, _ = update()
    train = dataclasses.replace(delta.train, gradient_energy=(1.0,))

    assert announcement(dataclasses.replace(delta, train=train)) == "malformed"


whole = st.integers(-(2**63), 2**64 - 1) | st.integers(-1, 20)
real = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -1.0, 0.25, 1.0, 1e308])


@settings(max_examples=300, deadline=None)
@given(
    numbers=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("round", "version", "num_examples", "steps", "payload_bytes"), whole)
    ),
    format=st.sampled_from(["int8", "bf16", "fp32"]),
    density=real,
    changes=st.lists(st.tuples(st.integers(0, 17), whole, st.text(max_size=5) | st.none(), whole | st.none())),
)
def test_whatever_a_client_announces_is_answered(numbers, format, density, changes):
    delta, _ = update()
    tensors = list(delta.tensors)
    for place, rows_sent, name, block in changes:
        old = tensors[place]
        tensors[place] = TensorHeader(
            block=old.block if block is None else block, name=old.name if name is None else name, rows_sent=rows_sent
        )
    claimed = dataclasses.replace(delta, **numbers, format=format, density=density, tensors=tuple(tensors))

    assert announcement(claimed) in (None, *REFUSAL_CODES)


@pytest.mark.parametrize(("version", "code"), [(4, None), (5, None), (6, "stale_round")])
def test_an_update_counts_in_time_and_one_version_late_but_not_two(version, code):
    assert announcement(update()[0], version=version) == code


def test_more_sequences_at_a_time_than_the_assigned_batch_has_are_malformed():
    delta, _ = update()
    for size, code in ((1, None), (8, None), (9, "malformed"), (2**62, "malformed")):
        mode = ExecutionMode(micro_batch_size=size)
        changed = dataclasses.replace(delta, train=dataclasses.replace(delta.train, mode=mode))
        assert announcement(changed) == code


def test_the_first_fault_in_the_documented_order_is_the_answer():
    faults = [
        ("bad_steps", {"steps": 0}),
        ("bad_weight", {"num_examples": 0}),
        ("length_mismatch", {"payload_bytes": 7}),
        ("dtype_mismatch", {"density": 0.5}),
        ("incomplete", {"tensors": update()[0].tensors[:-1]}),
        ("stale_round", {"version": 2}),
        ("unknown_attempt", {"round": 9}),
        ("too_large", {"payload_bytes": 2**50}),
    ]
    order = [REFUSAL_CODES.index(code) for code, _ in faults]
    assert order == sorted(order, reverse=True)

    delta = update()[0]
    for code, change in faults:
        delta = dataclasses.replace(delta, **change)
        assert announcement(delta) == code


def test_every_refusal_says_what_it_got_and_what_it_expected():
    delta = dataclasses.replace(update()[0], num_examples=10**12)
    refused = check_announcement(
        delta,
        assignment=assignment(),
        shape=model_shape(),
        limits=LIMITS,
        quota_bytes=10**6,
        declared_num_examples=50,
        version=4,
        accepted_sha256=None,
    )

    assert refused.text == (
        "num_examples is 1000000000000, expected 1 to 50 (declared at join: 50, the operator's cap: 10000)"
    )


# The payload.


def with_tensor(name, value, format="int8"):
    """An update of block 0 and 2 in which one value of one tensor was overwritten after encoding."""
    density = 1.0
    deltas = random_deltas((0, 2))
    deltas[2][name].flat[0] = LIMIT / 2  # found again by its bytes
    mark = {"fp32": np.float32(LIMIT / 2), "int8": np.float32(LIMIT / 2) / np.float32(127)}[format].tobytes()
    delta, payload = update(deltas=deltas, format=format, density=density)
    assert payload.count(mark) == 1
    damaged = payload.replace(mark, np.float32(value).tobytes())
    task = assignment(delta_format=format, delta_density=density)
    delta = dataclasses.replace(delta, payload_sha256=hashlib.sha256(damaged).hexdigest())
    assert announcement(delta, assignment=task) is None
    return payload_check(delta, damaged, task)


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attn.k_proj.weight", "mlp.down_proj.weight"])
@pytest.mark.parametrize("format", ["fp32", "int8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_or_scale_that_is_not_finite_is_found_in_any_tensor(name, format, value):
    assert with_tensor(name, value, format) == "non_finite"


@pytest.mark.parametrize(
    ("format", "value", "code"),
    [
        ("fp32", LIMIT * 0.999, None),
        ("fp32", LIMIT * 1.001, "over_norm"),
        ("fp32", -LIMIT * 1.001, "over_norm"),
        ("fp32", 1e6, "over_norm"),
        ("int8", LIMIT / 127 * 0.999, None),
        ("int8", LIMIT / 127 * 1.001, "over_norm"),
        ("int8", 0.0, "malformed"),
    ],
)
def test_the_norm_limit_is_eight_learning_rates_times_steps(format, value, code):
    assert with_tensor("mlp.up_proj.weight", value, format) == code


def test_a_payload_of_another_length_or_hash_is_refused():
    delta, payload = update()

    assert payload_check(delta, payload[:-1]) == "length_mismatch"
    assert payload_check(delta, payload + b"\0") == "length_mismatch"
    assert payload_check(dataclasses.replace(delta, payload_sha256="0" * 64), payload) == "checksum_mismatch"


def test_of_several_faults_in_a_payload_the_first_in_the_documented_order_is_the_answer():
    deltas = random_deltas((0, 2))
    deltas[0]["input_layernorm.weight"][0] = 1e6  # over_norm in the first tensor
    delta, payload = update(deltas=deltas, format="fp32", density=1.0)
    task = assignment(delta_format="fp32", delta_density=1.0)
    damaged = payload[:-4] + np.float32(math.nan).tobytes()  # non_finite in the last one
    fitting = dataclasses.replace(delta, payload_sha256=hashlib.sha256(damaged).hexdigest())

    assert payload_check(delta, payload, task) == "over_norm"
    assert payload_check(fitting, damaged, task) == "non_finite"
    assert payload_check(delta, damaged, task) == "checksum_mismatch"


def test_a_row_mask_whose_count_is_not_the_rows_sent_is_a_length_mismatch():
    delta, payload = update()
    first_matrix = 8 + 4  # behind the vector input_layernorm: 8 codes and a scale
    damaged = bytearray(payload)
    damaged[first_matrix] ^= 1
    delta = dataclasses.replace(delta, payload_sha256=hashlib.sha256(damaged).hexdigest())

    assert payload_check(delta, damaged) == "length_mismatch"


def test_a_payload_is_checked_in_constant_memory(tmp_path):
    shape = model_shape(hidden=1024)
    blocks = tuple(range(6))
    delta, payload = update(blocks, shape=shape, density=1.0)
    path = tmp_path / "update"
    path.write_bytes(payload)
    size = len(payload)
    del payload
    tracemalloc.start()
    try:
        refused = check_payload(
            delta,
            assignment(blocks, delta_density=1.0),
            map_payload(path),
            shape=shape,
            limits=LIMITS,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert refused is None
    assert peak < size / 4


def test_no_assignment_asks_for_more_than_all_blocks_in_fp32():
    delta, _ = update((0, 1, 2), format="fp32", density=1.0)

    assert delta.payload_bytes == largest_payload_bytes(model_shape(), (0, 1, 2))


# A round with bad members (G5).


def test_a_round_with_bad_uploads_is_the_round_without_them():
    task = assignment(delta_format="fp32", delta_density=1.0)
    bad = {}
    nan_deltas = random_deltas((0, 2), 5)
    delta, payload = update(deltas=nan_deltas, format="fp32", density=1.0)
    damaged = payload[:-4] + np.float32(math.nan).tobytes()
    bad["k5"] = dataclasses.replace(delta, payload_sha256=hashlib.sha256(damaged).hexdigest()), damaged, "non_finite"
    delta, payload = update(deltas=random_deltas((0, 2), 6, scale=0.1), format="fp32", density=1.0)
    bad["k6"] = delta, payload, "over_norm"
    delta, payload = update(deltas=random_deltas((0, 2), 7), format="fp32", density=1.0)
    short = (*delta.tensors[:-1], dataclasses.replace(delta.tensors[-1], rows_sent=3))
    bad["k7"] = dataclasses.replace(delta, tensors=short), payload, "shape_mismatch"
    good = {f"k{n}": update(deltas=random_deltas((0, 2), n), format="fp32", density=1.0) for n in range(5)}

    admitted, answers = [], {}
    for client, (delta, payload, *_) in {**bad, **good}.items():
        code = announcement(delta, assignment=task) or payload_check(delta, payload, task)
        if code is None:
            admitted.append(
                AcceptedUpdate.of(client, delta, version=4, read_payload=lambda data=payload: memoryview(data))
            )
        else:
            answers[client] = code
    only_good = [
        AcceptedUpdate.of(client, delta, version=4, read_payload=lambda data=payload: memoryview(data))
        for client, (delta, payload) in good.items()
    ]

    assert answers == {client: code for client, (_, _, code) in bad.items()}
    first, second = (state_sha256(model_shape(), fold(u, shape=model_shape()).aggregate) for u in (admitted, only_good))
    assert first == second


SLIM_WIDTHS = (0.125, 0.5)  # of the tiny shape: half of it, and less


@pytest.mark.parametrize("width", SLIM_WIDTHS)
@pytest.mark.parametrize(("format", "density"), [("int8", 0.25), ("int8", 1.0), ("bf16", 1.0), ("fp32", 1.0)])
def test_an_honest_update_of_slim_blocks_is_accepted(width, format, density):
    task = assignment(width=width, delta_format=format, delta_density=density)
    delta, payload = update(format=format, density=density, width=width)

    assert announcement(delta, assignment=task) is None
    assert payload_check(delta, payload, task) is None


@pytest.mark.parametrize(("trained", "assigned"), [(0.125, 1.0), (1.0, 0.125), (0.5, 0.125), (0.3, 0.5)])
def test_an_update_of_another_width_than_the_assigned_one_is_not_assigned(trained, assigned):
    delta, _ = update(width=trained if trained in WIDTHS else 1.0)
    refused = check_announcement(
        dataclasses.replace(delta, width=trained),
        assignment=assignment(width=assigned),
        shape=model_shape(),
        limits=LIMITS,
        quota_bytes=10**6,
        declared_num_examples=50,
        version=4,
        accepted_sha256=None,
    )

    assert refused.code == "not_assigned"
    assert refused.text == f"width is {trained}, expected {assigned} as assigned"


def test_a_wrong_width_has_its_place_among_the_other_faults():
    delta, _ = update(width=0.5)
    task = assignment(width=0.125)
    repeated = dataclasses.replace(delta, tensors=(*delta.tensors, delta.tensors[-1]))
    short = dataclasses.replace(delta, tensors=delta.tensors[:-1])

    assert announcement(repeated, assignment=task) == "malformed"
    assert announcement(short, assignment=task) == "not_assigned"
    assert announcement(delta, assignment=task, accepted_sha256="0" * 64) == "conflict"


def test_the_slices_of_another_width_under_the_assigned_one_do_not_fit():
    delta, payload = update(format="fp32", density=1.0, width=0.5)
    task = assignment(width=0.125, delta_format="fp32", delta_density=1.0)

    assert announcement(dataclasses.replace(delta, width=0.125), assignment=task) == "shape_mismatch"
    columns = update(format="fp32", density=1.0, width=0.5, payload_bytes=len(payload) - 4)[0]
    task = assignment(width=0.5, delta_format="fp32", delta_density=1.0)
    assert announcement(columns, assignment=task) == "length_mismatch"


@pytest.mark.parametrize(("value", "code"), [(0.99 * LIMIT, None), (1.02 * LIMIT, "over_norm")])
@pytest.mark.parametrize("format", ["int8", "fp32"])
def test_the_norm_limit_of_a_slice_is_that_of_the_whole_block(value, code, format):
    deltas = random_deltas((0, 2), width=0.125)
    deltas[2]["mlp.down_proj.weight"][-1, -1] = value
    density = 1.0
    delta, payload = update(deltas=deltas, format=format, density=density, width=0.125)
    task = assignment(width=0.125, delta_format=format, delta_density=density)

    assert announcement(delta, assignment=task) is None
    assert payload_check(delta, payload, task) == code
