"""What travels in a turn, and what a turn may not hold."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedblocks.protocol import codec, turns
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.messages import Ack, AttemptId, Fetch, Ready, Resource
from fedblocks.protocol.payloads import FileSink, MemorySink
from fedblocks.protocol.transfer import FROM_AGGREGATOR, FROM_CLIENT

HEAD = turns.Head(session="ab12", key="k")
ACK = Ack(attempt_id=AttemptId("a"), payload_sha256="0" * 64)


def resource(payload: bytes) -> Resource:
    return Resource(name="plan.json", payload_bytes=len(payload), payload_sha256=hashlib.sha256(payload).hexdigest())


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_what_was_said_arrives_in_order_with_its_payloads(payloads: list[bytes]) -> None:
    said = [(resource(p), p) for p in payloads] + [(ACK, b"")]
    assert turns.decode(turns.encode(HEAD, said), FROM_AGGREGATOR) == (HEAD, said)


def test_a_turn_in_which_nothing_is_said_is_its_head() -> None:
    frames = turns.encode(HEAD, [])
    assert len(frames) == 1
    assert turns.decode(frames, FROM_CLIENT) == (HEAD, [])


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([], "malformed"),
        ([b"\xc1"], "malformed"),
        ([codec.pack({"session": "a", "key": "b", "more": 1})], "unknown_field"),
        (turns.encode(HEAD, [(Ready(), b"")])[:-1], "malformed"),
        ([*turns.encode(HEAD, [(Ready(), b"")])[:-1], b"x"], "malformed"),  # Ready has no payload
        (turns.encode(HEAD, [(Ready(), b"")] * 65), "malformed"),
        (turns.encode(HEAD, [(ACK, b"")]), "malformed"),  # no client says that
        ([turns.encode(HEAD, [])[0], codec.pack({"protocol": 1, "kind": "ready"}), b"", b""], "version_skew"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_its_code(frames: list[bytes], code: str) -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        turns.decode(frames, FROM_CLIENT)
    assert refused.value.code == code


@given(st.data())
def test_mutated_frames_raise_that_error_and_no_other(data: st.DataObject) -> None:
    frames = turns.encode(HEAD, [(Fetch(name="plan.json"), b""), (Ready(), b"")])
    i = data.draw(st.integers(0, len(frames) - 1))
    frames[i] = data.draw(st.binary(max_size=80))
    with contextlib.suppress(RemoteProtocolError):
        turns.decode(frames, FROM_CLIENT)


@pytest.mark.parametrize("payload", [b"", b"some bytes"])
def test_a_payload_is_kept_if_it_is_what_was_announced(payload: bytes) -> None:
    sink = MemorySink()
    turns.keep(resource(payload), payload, sink)
    assert sink.payload() == payload


@pytest.mark.parametrize(
    ("announced", "came", "code"),
    [
        (b"some bytes", b"some byte", "length_mismatch"),
        (b"some bytes", b"some bytes!", "length_mismatch"),
        (b"some bytes", b"", "length_mismatch"),
        (b"", b"x", "length_mismatch"),
        (b"some bytes", b"same bytes", "checksum_mismatch"),
    ],
)
def test_any_other_payload_is_refused_and_leaves_no_file(
    tmp_path: Path, announced: bytes, came: bytes, code: str
) -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        turns.keep(resource(announced), came, FileSink(tmp_path / "part"))
    assert refused.value.code == code
    assert not list(tmp_path.iterdir())
