"""The codec: every message comes back as it was, and nothing else comes in (field.md 3.3, F3)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import tracemalloc
import types
import typing

import msgpack
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.model_shape import WIDTHS
from fedblocks.protocol import codec
from fedblocks.protocol.errors import LocalProtocolError, RemoteProtocolError
from fedblocks.protocol.messages import (
    KINDS,
    PROTOCOL_VERSION,
    Ack,
    Assignment,
    DataFormat,
    DataStatistics,
    Delta,
    Evaluate,
    Goodbye,
    Heartbeat,
    Hello,
    Measurement,
    Probe,
    Refused,
    TensorHeader,
    TrainReport,
    Welcome,
)

# Strategies from the dataclasses' type hints; a field that has a rule of its own gets its strategy here.
text = st.text(max_size=40)
positive = st.integers(2, 2**31)
positive_real = st.floats(min_value=1e-300, allow_infinity=False)
share = st.floats(min_value=1e-6, max_value=1.0)
ids = st.sets(st.integers(0, 99), max_size=5).map(lambda s: tuple(sorted(s)))
OWN_RULES = {
    Assignment: {
        "active_blocks": st.sampled_from([(), tuple(range(100))]),
        "blocks": st.sets(st.integers(0, 99), min_size=1, max_size=5).map(lambda s: tuple(sorted(s))),
        "delta_density": share,
        "width": st.sampled_from(WIDTHS),
    },
    Welcome: {"active_blocks": ids, "least_width": st.sampled_from(WIDTHS)},
    Evaluate: {
        "active_blocks": ids,
        "strengths": st.sets(st.floats(0, 1).map(abs), min_size=1, max_size=11).map(lambda s: tuple(sorted(s))),
    },
    Probe: {
        "active_blocks": st.sampled_from([(), (1, 3)]),
        "candidates": st.permutations([0, 2, 4]).map(tuple),
        "strengths": st.just((0.0, 0.5, 1.0)),
    },
    Measurement: {
        "num_items": st.integers(1000, 2000),
        "num_correct": st.integers(0, 1000),
        "strength": st.floats(0, 1),
    },
    DataFormat: {"labels": st.sets(st.text(min_size=1, max_size=40), max_size=4).map(tuple)},
    DataStatistics: {
        "num_examples": st.integers(1000, 2**31),
        "topics": st.lists(st.integers(0, 15), max_size=64).map(tuple),
    },
}


def strategy(hint):
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(st.none() if o is type(None) else strategy(o) for o in options)
    if origin is typing.Literal:
        return st.sampled_from(options)
    if origin is tuple:
        return st.lists(strategy(options[0]), max_size=4).map(tuple)
    if dataclasses.is_dataclass(hint):
        return messages(hint)
    return {int: positive, float: positive_real, str: text, bool: st.booleans()}[hint]


def messages(cls):
    hints = typing.get_type_hints(cls)
    fields = {f.name: strategy(hints[f.name]) for f in dataclasses.fields(cls)}
    return st.builds(cls, **{**fields, **OWN_RULES.get(cls, {})})


def make(cls, **changes):
    """A fixed message of this type."""
    plain = {
        int: 3,
        float: 0.5,
        str: "text",
        bool: True,
    }

    def value(hint):
        while hasattr(hint, "__supertype__"):
            hint = hint.__supertype__
        origin, options = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return value(options[0])
        if origin is typing.Literal:
            return options[0]
        if origin is tuple:
            return (value(options[0]),)
        return make(hint) if dataclasses.is_dataclass(hint) else plain[hint]

    hints = typing.get_type_hints(cls)
    own = {"candidates": (0, 1), "strengths": (0.0, 0.5)} if cls is Probe else {}
    return cls(**{**{f.name: value(hints[f.name]) for f in dataclasses.fields(cls)}, **own, **changes})


def plain_of(message):
    return codec.to_plain(message)


def refused(kind, plain):
    with pytest.raises(RemoteProtocolError) as caught:
        codec.decode_body(kind, msgpack.packb(plain))
    return caught.value.code


@settings(max_examples=400, deadline=None)
@given(message=st.one_of([messages(cls) for cls in KINDS.values()]))
def test_every_message_comes_back_as_it_was(message):
    header, body = codec.encode(message)
    back = codec.decode(header, memoryview(body))

    assert back == message
    assert type(back) is type(message)


@pytest.mark.parametrize("cls", KINDS.values(), ids=KINDS)
def test_every_kind_of_message_has_a_wire_form(cls):
    message = make(cls)

    assert codec.decode(*codec.encode(message)) == message


@settings(max_examples=50)
@given(transfer=st.none() | st.integers(0, 2**63))
def test_the_header_keeps_its_transfer(transfer):
    header, _ = codec.encode(Goodbye(reason="done"), transfer=transfer)

    assert codec.decode_header(header) == codec.Header(kind="goodbye", transfer=transfer)


# Nothing else comes in.


def test_a_hundred_thousand_damaged_frames_are_messages_or_remote_protocol_errors_and_fast():
    rng = np.random.default_rng(20240607)
    corpus = [codec.encode(make(cls)) for cls in KINDS.values()]
    process = psutil.Process()
    before_bytes = process.memory_info().rss
    slow = 0
    for count in range(100_000):
        header, body = corpus[count % len(corpus)]
        frame = bytearray(body)
        match count % 5:
            case 0:  # mutated
                for place in rng.integers(len(frame), size=1 + count % 3):
                    frame[place] = rng.integers(256)
            case 1:  # truncated
                del frame[rng.integers(len(frame)) :]
            case 2:  # spliced
                other = corpus[rng.integers(len(corpus))][1]
                frame = frame[: rng.integers(len(frame))] + other[rng.integers(len(other)) :]
            case 3:  # random
                frame = bytearray(rng.bytes(int(rng.integers(200))))
            case 4:  # a damaged header
                header = bytearray(header)
                header[rng.integers(len(header))] = rng.integers(256)
        began = time.thread_time()
        with contextlib.suppress(RemoteProtocolError):
            codec.decode(bytes(header), bytes(frame))
        slow += time.thread_time() - began > 0.01

    # This thread's own processor time: a garbage collection may fall into a frame, the codec itself never takes 10 ms.
    assert slow < 20
    assert process.memory_info().rss - before_bytes < 4e6


def array16(length):
    return b"\xdc" + length.to_bytes(2, "big")


HOSTILE = {
    "nested maps of depth 512": b"\x81\xa1a" * 512 + b"\xc0",
    "nested lists that each announce 4096 items": array16(4096) * 511,
    "the same, padded to the largest body": (array16(4096) * 511).ljust(codec.MAX_BODY_BYTES, b"\x01"),
    "nested maps that each announce 4096 pairs": b"\xde\x10\x00\xa1a" * 511,
    "2^32 - 1 announced items": b"\xdd\xff\xff\xff\xff",
    "2^32 - 1 announced pairs": b"\xdf\xff\xff\xff\xff",
    "2^32 - 1 announced bytes": b"\xc6\xff\xff\xff\xff",
    "2^32 - 1 announced characters": b"\xdb\xff\xff\xff\xff",
    "a quarter of a million empty lists": array16(4096) + (array16(63) + b"\x90" * 63) * 4000,
    "a million announced tensors": b"\xdd" + (10**6).to_bytes(4, "big") + b"\x80" * 10_000,
    "a body above the limit": b"\xc4" + b"\x00" * (codec.MAX_BODY_BYTES + 1),
    "an extension type": b"\xc7\x04\x01abcd",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "the byte that msgpack never uses": b"\xc1",
    "nothing": b"",
    "two values": b"\x80\x80",
    "text that is not UTF-8": b"\x81\xa1a\xa2\xff\xfe",
    "bytes as a key": b"\x81\xc4\x01a\x01",
    "a number as a key": b"\x81\x01\x01",
    "a list as a key": b"\x81\x90\x01",
    "a duplicate key": b"\x82\xa1a\x01\xa1a\x02",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_quickly_and_cost_no_memory(name):
    body = HOSTILE[name]
    began = time.process_time()
    for kind in ("hello", "delta"):
        with pytest.raises(RemoteProtocolError):
            codec.decode_body(kind, memoryview(body))
    took_s = time.process_time() - began
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            codec.decode_body("hello", body)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < 1e6
    assert took_s < 2 * 0.02


@settings(max_examples=300)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
        max_leaves=30,
    )
)
def test_the_walk_over_the_bytes_agrees_with_msgpack_on_every_value(value):
    def depth(v):
        children = v.values() if isinstance(v, dict) else v if isinstance(v, list) else ()
        return (
            1 + max(map(depth, children))
            if isinstance(v, (dict, list)) and children
            else int(isinstance(v, (dict, list)))
        )

    packed = msgpack.packb(value)
    if depth(value) > codec.MAX_DEPTH:
        with pytest.raises(RemoteProtocolError, match="nested deeper"):
            codec.unpack(packed, max_bytes=10**6)
    else:
        assert msgpack.packb(codec.unpack(packed, max_bytes=10**6)) == packed


@pytest.mark.parametrize(
    "value", [2**64 - 1, 2**32, 2**16, 2**8, 127, -1, -33, -129, -(2**15) - 1, -(2**31) - 1, -(2**63), 1.5, "a" * 31]
)
def test_the_walk_knows_every_width_of_number_and_text(value):
    assert codec.unpack(msgpack.packb([value]), max_bytes=100) == [value]
    for size in (0, 31, 32, 255, 256, 16_000):
        assert codec.unpack(msgpack.packb("a" * size), max_bytes=20_000) == "a" * size
        assert codec.unpack(msgpack.packb(b"a" * size), max_bytes=20_000) == b"a" * size
    for size in (0, 15, 16, 4096):
        assert codec.unpack(msgpack.packb([1] * size), max_bytes=20_000) == [1] * size
        assert len(codec.unpack(msgpack.packb({str(i): 1 for i in range(size)}), max_bytes=50_000)) == size
    assert codec.unpack(msgpack.packb(0.25, use_single_float=True), max_bytes=9) == 0.25


def test_depth_fits_exactly_and_does_not_fit_with_one_more():
    def nested(depth):
        value = 0
        for _ in range(depth):
            value = [value]
        return msgpack.packb(value)

    codec.unpack(nested(codec.MAX_DEPTH), max_bytes=1000)
    with pytest.raises(RemoteProtocolError, match="nested deeper than 8 levels"):
        codec.unpack(nested(codec.MAX_DEPTH + 1), max_bytes=1000)


def test_an_unknown_field_has_its_own_code():
    plain = {**plain_of(make(Ack)), "extra": 1}

    assert refused("ack", plain) == "unknown_field"


@pytest.mark.parametrize("cls", KINDS.values(), ids=KINDS)
def test_a_missing_field_is_refused_even_if_it_has_a_default(cls):
    kind = next(k for k, c in KINDS.items() if c is cls)
    whole = plain_of(make(cls))
    for name in whole:
        assert refused(kind, {k: v for k, v in whole.items() if k != name}) == "malformed"


@pytest.mark.parametrize("value", [True, 1.0, "3", None, b"3", [3], {}, math.nan])
def test_where_a_whole_number_is_meant_nothing_else_serves(value):
    plain = {**plain_of(make(Heartbeat)), "steps_done": value}

    assert refused("heartbeat", plain) == "malformed"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_has_its_own_code(value):
    plain = plain_of(make(DataStatistics))
    hello = {**plain_of(make(Hello)), "statistics": {**plain, "mean_tokens": value}}

    assert refused("hello", hello) == "non_finite"


@pytest.mark.parametrize("topics", [[-1], [0] * 65, [2, 2], [1.0], [[1]], None, "abc", b"abc"])
def test_a_topic_histogram_is_a_few_counts_of_the_examples(topics):
    plain = {**plain_of(make(DataStatistics)), "topics": topics}

    assert refused("hello", {**plain_of(make(Hello)), "statistics": plain}) == "malformed"


def test_a_site_that_shares_no_topics_says_so_with_an_empty_histogram():
    statistics = DataStatistics(num_examples=3, num_target_tokens=9, mean_tokens=5.0, max_tokens=8)
    hello = make(Hello, statistics=statistics)

    assert codec.decode(*codec.encode(hello)) == hello
    assert plain_of(hello)["statistics"]["topics"] == []


@pytest.mark.parametrize("value", [True, "0.5", None, [], b""])
def test_where_a_real_number_is_meant_nothing_else_serves(value):
    plain = {**plain_of(make(Delta)), "density": value}

    assert refused("delta", plain) == "malformed"


def test_a_whole_number_serves_where_a_real_one_is_meant():
    plain = {**plain_of(make(Delta)), "density": 1}
    back = codec.decode_body("delta", msgpack.packb(plain))

    assert back.density == 1.0
    assert type(back.density) is float


@pytest.mark.parametrize("value", [math.nan, 1.5, True, "3", None])
def test_a_number_of_examples_of_the_wrong_kind_is_a_bad_weight(value):
    plain = {**plain_of(make(Delta)), "num_examples": value}

    assert refused("delta", plain) == "bad_weight"


@pytest.mark.parametrize("value", [math.nan, 1.5, True, "3", None])
def test_a_number_of_steps_of_the_wrong_kind_is_bad_steps(value):
    assert refused("delta", {**plain_of(make(Delta)), "steps": value}) == "bad_steps"


@pytest.mark.parametrize("value", ["int4", b"int8", None, ["int8"], True, "x" * 10_000])
def test_a_word_outside_its_closed_list_is_refused(value):
    assert refused("delta", {**plain_of(make(Delta)), "format": value}) == "malformed"


@pytest.mark.parametrize("value", [{}, "text", None, 3])
def test_where_a_list_is_meant_nothing_else_serves(value):
    assert refused("delta", {**plain_of(make(Delta)), "tensors": value}) == "malformed"


def test_values_that_a_message_forbids_are_refused_and_named():
    plain = {**plain_of(make(Assignment)), "blocks": [2, 1]}

    with pytest.raises(RemoteProtocolError, match="expected ascending ids"):
        codec.decode_body("assignment", msgpack.packb(plain))
    profile = {**plain_of(make(DeviceProfile)), "gemm_flops_per_s": -1.0}
    assert refused("hello", {**plain_of(make(Hello)), "profile": profile}) == "malformed"
    measured = {**plain_of(make(Measurement)), "num_items": 3, "num_correct": 4}
    assert refused("delta", {**plain_of(make(Delta)), "measurements": [measured]}) == "malformed"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"optimizer": "bf16"}, "malformed"),
        ({"optimizer": "split\x1b[2J"}, "malformed"),
        ({"optimizer": None}, "malformed"),
        ({"residency": "cloud"}, "malformed"),
        ({"frozen": ["nf4"]}, "malformed"),
        ({"micro_batch_size": 0}, "malformed"),
        ({"micro_batch_size": -1}, "malformed"),
        ({"micro_batch_size": 1.5}, "malformed"),
        ({"micro_batch_size": True}, "malformed"),
        ({"checkpoint": 1}, "malformed"),
        ({"speed": "fast"}, "unknown_field"),
    ],
)
def test_a_mode_is_one_of_those_that_exist(changes, code):
    plain = plain_of(make(Delta))
    assert codec.decode_body("delta", msgpack.packb(plain)).train.mode.micro_batch_size >= 1
    plain["train"]["mode"] |= changes
    assert refused("delta", plain) == code


@pytest.mark.parametrize("mode", [None, "split, suffix, nf4", [], {}])
def test_a_mode_that_is_no_map_of_its_fields_is_malformed(mode):
    plain = plain_of(make(Delta))
    plain["train"]["mode"] = mode
    assert refused("delta", plain) == "malformed"
    del plain["train"]["mode"]
    assert refused("delta", plain) == "malformed"


# The header.


@pytest.mark.parametrize(
    "version",
    [0, 1, PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1, str(PROTOCOL_VERSION), float(PROTOCOL_VERSION), True, None],
)
def test_another_protocol_version_is_named_beside_ours(version):
    header = msgpack.packb({"protocol": version, "kind": "ack"})

    with pytest.raises(RemoteProtocolError, match=f"speaks {PROTOCOL_VERSION}; install the same") as caught:
        codec.decode_header(header)
    assert caught.value.code == "version_skew"


@pytest.mark.parametrize(
    "header",
    [
        {"protocol": PROTOCOL_VERSION},
        {"kind": "ack"},
        {"protocol": PROTOCOL_VERSION, "kind": "ack", "more": 1},
        {"protocol": PROTOCOL_VERSION, "kind": 3},
        {"protocol": PROTOCOL_VERSION, "kind": "ack", "transfer": -1},
        {"protocol": PROTOCOL_VERSION, "kind": "ack", "transfer": True},
        {"protocol": PROTOCOL_VERSION, "kind": "ack", "transfer": None},
        [],
        None,
    ],
)
def test_any_other_header_is_refused(header):
    with pytest.raises(RemoteProtocolError):
        codec.decode_header(msgpack.packb(header))


def test_an_unknown_kind_is_refused():
    with pytest.raises(RemoteProtocolError, match="unknown message kind"):
        codec.decode_body("surprise", b"\x80")


# What this side may send.


@pytest.mark.parametrize(
    "message",
    [
        make(Heartbeat, steps_done=1.5),
        make(Heartbeat, steps_done=np.int64(3)),
        make(Heartbeat, steps_done=2**64),
        make(Heartbeat, phase="x" * (codec.MAX_TEXT_BYTES + 1)),
        make(Heartbeat, phase="\ud800"),
        make(Refused, code="because"),
        make(TrainReport),
        make(Delta, density=math.nan),
        make(Delta, density=np.float64(0.5)),
        make(Delta, tensors=tuple(make(TensorHeader) for _ in range(codec.MAX_ITEMS + 1))),
        make(Delta, tensors=({"block": 1},)),
    ],
    ids=str,
)
def test_a_message_that_its_own_decoder_would_refuse_is_never_sent(message):
    with pytest.raises(LocalProtocolError):
        codec.encode(message)


def test_an_update_of_a_hundred_blocks_fits_into_one_body():
    tensors = tuple(
        TensorHeader(block=block, name="post_attention_layernorm.weight", rows_sent=100_000)
        for block in range(100)
        for _ in range(12)
    )

    assert len(codec.encode(make(Delta, tensors=tensors))[1]) < codec.MAX_BODY_BYTES


@pytest.mark.parametrize("falls", [["x"] * 9, ["x" * 201], ["x", 3], "kernel", None])
def test_lines_about_kernels_are_few_and_short(falls):
    plain = plain_of(make(Delta))
    plain["train"]["kernel_falls"] = ["kernel swiglu: torch instead of triton: odd shape"] * 8
    assert len(codec.decode_body("delta", msgpack.packb(plain)).train.kernel_falls) == 8
    plain["train"]["kernel_falls"] = falls
    assert refused("delta", plain) == "malformed"
