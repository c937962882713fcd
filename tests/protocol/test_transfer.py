"""Payloads in chunks under credit, without sockets."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedblocks.protocol import codec
from fedblocks.protocol.errors import LocalProtocolError, RemoteProtocolError
from fedblocks.protocol.messages import KINDS, Fetch, Goodbye, Refused, Resource
from fedblocks.protocol.payloads import FileSink, FileSource, MemorySink, MemorySource, commit_file, open_source
from fedblocks.protocol.transfer import (
    ANNOUNCING,
    FROM_AGGREGATOR,
    FROM_CLIENT,
    MAX_CREDIT_CHUNKS,
    MAX_OUTBOX,
    Chunk,
    Connection,
    Credit,
    IncomingTransfer,
    MessageArrived,
    OutgoingTransfer,
    PayloadAnnounced,
    PayloadArrived,
    PayloadFailed,
    PayloadRefused,
    num_chunks,
)


def resource(data: bytes, *, name="anchor.bin", num_bytes=None, sha256=None) -> Resource:
    return Resource(
        name=name,
        payload_bytes=len(data) if num_bytes is None else num_bytes,
        payload_sha256=sha256 or hashlib.sha256(data).hexdigest(),
    )


def pair(chunk_bytes=8, window=3, max_incoming=4) -> tuple[Connection, Connection]:
    """Aggregator side, client side."""
    shape = {"chunk_bytes": chunk_bytes, "window": window, "max_incoming": max_incoming}
    return Connection(receives=FROM_CLIENT, **shape), Connection(receives=FROM_AGGREGATOR, **shape)


def deliver(sender: Connection, receiver: Connection, *, count=10**9) -> list:
    events = []
    for _ in range(count):
        outbound = sender.next_outbound()
        if outbound is None:
            break
        events += receiver.receive(outbound.frames)
    return events


def announce(server: Connection, client: Connection, data: bytes, **fields) -> PayloadAnnounced:
    server.send(resource(data, **fields), open_source(data))
    (event,) = deliver(server, client)
    assert isinstance(event, PayloadAnnounced)
    return event


def chunk_frames(transfer=1, index=0, data=b"12345678", crc32=None):
    chunk = Chunk(transfer=transfer, index=index, crc32=zlib.crc32(data) if crc32 is None else crc32)
    return codec.encode_header(codec.Header(kind="chunk")), codec.pack(codec.to_plain(chunk)), data


def credit_frames(transfer=1, chunks=1):
    credit = Credit(transfer=transfer, chunks=chunks)
    return codec.encode_header(codec.Header(kind="credit")), codec.pack(codec.to_plain(credit))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), chunk_bytes=st.integers(1, 50), window=st.integers(1, MAX_CREDIT_CHUNKS))
def test_any_payload_in_any_chunk_size_arrives_as_it_was(data, chunk_bytes, window):
    server, client = pair(chunk_bytes, window)
    sink = MemorySink()
    events = client.accept(announce(server, client, data).transfer, sink)
    for _ in range(len(data) + 1):
        client.grant()
        assert client.in_flight <= window
        deliver(client, server)
        events += deliver(server, client)
    assert [type(e) for e in events] == [PayloadArrived]
    assert sink.payload() == data
    assert not server.open_outgoing
    assert not client.open_incoming


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), sizes=st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_payloads_both_ways_in_a_random_schedule_arrive_once_each(seed, sizes):
    draw = random.Random(seed)
    server, client = pair(max_incoming=8)
    payloads = {f"r{i}": draw.randbytes(size) for i, size in enumerate(sizes)}
    arrived: dict[str, bytes] = {}
    for name, data in payloads.items():
        server.send(resource(data, name=name), MemorySource(data))
    server.send(Goodbye(reason="end"))
    for _ in range(400):
        sender, receiver = draw.choice([(server, client), (client, server)])
        events = deliver(sender, receiver, count=1)
        while events:
            event = events.pop()
            if isinstance(event, PayloadAnnounced):
                events += receiver.accept(event.transfer, MemorySink())
            elif isinstance(event, PayloadArrived):
                assert event.message.name not in arrived
                arrived[event.message.name] = event.sink.payload()
        client.grant(draw.choice([None, 1]))
        assert client.in_flight <= 3
    assert arrived == payloads


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(min_size=9, max_size=64),
    fault=st.sampled_from(["duplicate", "skip", "oversized", "short", "flipped", "uncredited"]),
    at=st.integers(0, 7),
)
def test_a_chunk_that_is_duplicated_reordered_resized_or_changed_is_refused(data, fault, at):
    total = num_chunks(len(data), 8)
    at = min(at, total - 1)
    incoming = IncomingTransfer(
        transfer=1,
        payload_bytes=len(data),
        payload_sha256=hashlib.sha256(data).hexdigest(),
        sink=MemorySink(),
        chunk_bytes=8,
    )
    outgoing = OutgoingTransfer(transfer=1, message=resource(data), source=MemorySource(data), chunk_bytes=8)

    def next_chunk():
        outgoing.grant(1)
        _, body, raw = outgoing.next_chunk()
        return codec.from_plain(Chunk, codec.unpack(body, max_bytes=200), where="chunk"), bytes(raw)

    for _ in range(at):
        incoming.grant(1)
        incoming.receive(*next_chunk())
    chunk, raw = next_chunk()
    if fault != "uncredited":
        incoming.grant(2)
    if fault == "duplicate":
        incoming.receive(chunk, raw)
        if at + 1 == total:
            return
    elif fault == "skip":
        if at + 1 == total:
            return
        chunk, raw = next_chunk()
    elif fault == "oversized":
        raw += b"x"
    elif fault == "short":
        raw = raw[:-1]
    elif fault == "flipped":
        raw = bytes([raw[0] ^ 1]) + raw[1:]
    with pytest.raises(RemoteProtocolError) as caught:
        incoming.receive(chunk, raw)
    codes = {"oversized": "length_mismatch", "short": "length_mismatch", "flipped": "checksum_mismatch"}
    assert caught.value.code == codes.get(fault, "malformed")


@settings(max_examples=200, deadline=None)
@given(
    frames=st.lists(st.binary(max_size=60), max_size=5)
    | st.tuples(
        st.sampled_from(["chunk", "credit", "resource", "refused", "fetch", "nonsense", ""]),
        st.integers(-1, 3) | st.none(),
        st.dictionaries(st.sampled_from(["transfer", "index", "crc32", "chunks", "name", "code"]), st.integers(-2, 9)),
        st.lists(st.binary(max_size=10), max_size=2),
    ).map(lambda t: (codec.encode_header(codec.Header(kind=t[0], transfer=t[1])), codec.pack(t[2]), *t[3]))
)
def test_whatever_arrives_raises_a_remote_protocol_error_or_is_an_event(frames):
    server, client = pair()
    client.accept(announce(server, client, b"0123456789").transfer, MemorySink())
    client.send(Fetch(name="x"))
    for side in (server, client):
        with contextlib.suppress(RemoteProtocolError):
            assert isinstance(side.receive(frames), list)


def test_nothing_of_a_payload_is_sent_before_the_owner_accepted_it():
    server, client = pair()
    announce(server, client, b"x" * 100)
    assert not client.wants_credit
    assert client.grant() == 0
    assert server.next_outbound() is None


def test_credit_limits_the_chunks_in_flight():
    server, client = pair(window=3)
    client.accept(announce(server, client, b"x" * 100).transfer, MemorySink())
    assert client.grant() == 3
    assert client.grant() == 0
    deliver(client, server)
    sent = [server.next_outbound() for _ in range(4)]
    assert [o is not None for o in sent] == [True, True, True, False]
    client.receive(sent[0].frames)
    assert client.grant() == 1


def test_the_window_holds_over_all_payloads_of_a_connection():
    server, client = pair(window=3)
    for _ in range(3):
        client.accept(announce(server, client, b"x" * 16).transfer, MemorySink())
    assert client.grant() == 3
    assert client.in_flight == 3
    assert client.grant(window=1) == 0


def test_a_refused_payload_is_dropped_by_its_sender_without_a_byte():
    server, client = pair()
    event = announce(server, client, b"x" * 100)
    client.refuse(event.transfer, Refused(code="too_large", text="100 bytes, at most 50"))
    refused, arrived = deliver(client, server)
    assert isinstance(refused, PayloadRefused)
    assert refused.sent_bytes == 0
    assert isinstance(arrived, MessageArrived)
    assert arrived.message.code == "too_large"
    assert not server.open_outgoing


def test_chunks_under_way_when_a_payload_is_refused_are_ignored():
    server, client = pair()
    event = announce(server, client, b"x" * 100)
    client.accept(event.transfer, MemorySink())
    client.grant()
    deliver(client, server)
    client.refuse(event.transfer, Refused(code="over_quota", text="enough"))
    assert deliver(server, client) == []
    deliver(client, server)
    assert server.next_outbound() is None


def test_a_wrong_hash_of_the_whole_fails_with_checksum_mismatch_and_tells_the_sender():
    server, client = pair()
    event = announce(server, client, b"x" * 10, sha256="0" * 64)
    client.accept(event.transfer, sink := MemorySink())
    client.grant()
    deliver(client, server)
    (failed,) = deliver(server, client)
    assert isinstance(failed, PayloadFailed)
    assert failed.code == "checksum_mismatch"
    assert sink.payload() == b""
    (arrived,) = deliver(client, server)
    assert arrived.message.code == "checksum_mismatch"


def test_a_sink_without_room_fails_with_no_space():
    class FullSink(MemorySink):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    server, client = pair()
    client.accept(announce(server, client, b"x" * 10).transfer, FullSink())
    client.grant()
    deliver(client, server)
    (failed, *rest) = deliver(server, client)
    assert failed.code == "no_space"
    assert rest == []


def test_more_open_payloads_than_allowed_are_refused_with_over_quota():
    server, client = pair(max_incoming=1)
    announce(server, client, b"x")
    server.send(resource(b"y"), MemorySource(b"y"))
    (failed,) = deliver(server, client)
    assert failed.code == "over_quota"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"num_bytes": -1}, "malformed"),
        ({"sha256": "A" * 64}, "malformed"),
        ({"sha256": "ab"}, "malformed"),
    ],
)
def test_an_announcement_that_cannot_be_is_refused(fields, code):
    _, client = pair()
    with pytest.raises(RemoteProtocolError) as caught:
        client.receive(codec.encode(resource(b"x", **fields), transfer=1))
    assert caught.value.code == code


def test_two_to_the_forty_first_bytes_announced_are_too_large_and_allocate_nothing():
    _, client = pair()
    (failed,) = client.receive(codec.encode(resource(b"x", num_bytes=2**41), transfer=1))
    assert failed.code == "too_large"


@pytest.mark.parametrize(
    "frames",
    [
        codec.encode(resource(b"x")),  # no transfer id
        codec.encode(resource(b"x"), transfer=0),
        codec.encode(Goodbye(reason="x"), transfer=1),
        codec.encode(Fetch(name="x")),  # a client's kind, sent to a client
        chunk_frames(transfer=9),
        chunk_frames(transfer=0),
        chunk_frames()[:2],
        (*codec.encode(Goodbye(reason="x")), b"more"),
        (codec.encode_header(codec.Header(kind="chunk", transfer=1)), *chunk_frames()[1:]),
        (codec.encode_header(codec.Header(kind="credit", transfer=1)), credit_frames()[1]),
        credit_frames(transfer=1),
        credit_frames(transfer=-1),
        (),
    ],
)
def test_frames_that_fit_nowhere_raise_and_change_nothing(frames):
    _, client = pair()
    with pytest.raises(RemoteProtocolError):
        client.receive(frames)
    assert client.next_outbound() is None
    assert not client.open_incoming


def test_transfer_ids_ascend():
    _, client = pair()
    client.receive(codec.encode(resource(b"x"), transfer=5))
    with pytest.raises(RemoteProtocolError, match="above 5"):
        client.receive(codec.encode(resource(b"x"), transfer=5))


def test_a_chunk_before_acceptance_fails_the_payload():
    server, client = pair()
    announce(server, client, b"x" * 8)
    (failed,) = client.receive(chunk_frames(data=b"x" * 8))
    assert failed.code == "malformed"


@pytest.mark.parametrize("chunks", [0, -1, MAX_CREDIT_CHUNKS + 1, 10**9])
def test_credit_beyond_what_a_sender_lets_itself_queue_is_refused(chunks):
    server, client = pair()
    announce(server, client, b"x" * 8 * 100)
    with pytest.raises(RemoteProtocolError, match="credit for"):
        server.receive(credit_frames(chunks=chunks))


def test_credit_beyond_the_end_of_a_payload_is_refused():
    server, client = pair()
    announce(server, client, b"x" * 17)
    server.receive(credit_frames(chunks=3))
    with pytest.raises(RemoteProtocolError, match="3 granted before"):
        server.receive(credit_frames(chunks=1))


def test_a_peer_that_does_not_read_is_over_quota():
    server, _ = pair()
    for _ in range(MAX_OUTBOX):
        server.send(Goodbye(reason="x"))
    with pytest.raises(RemoteProtocolError) as caught:
        server.send(Goodbye(reason="x"))
    assert caught.value.code == "over_quota"


def test_a_payload_of_another_length_than_announced_is_our_own_bug():
    server, _ = pair()
    with pytest.raises(LocalProtocolError, match="payload_bytes says 3"):
        server.send(resource(b"abc"), MemorySource(b"ab"))
    with pytest.raises(LocalProtocolError, match="payload given: False"):
        server.send(resource(b"abc"))
    with pytest.raises(LocalProtocolError, match="payload given: True"):
        server.send(Goodbye(reason="x"), MemorySource(b"ab"))


def test_small_messages_overtake_a_payload():
    server, client = pair()
    client.accept(announce(server, client, b"x" * 100).transfer, MemorySink())
    client.grant()
    deliver(client, server)
    server.send(Goodbye(reason="now"))
    assert server.next_outbound().kind == "goodbye"


def test_bytes_reported_for_a_payload_are_those_of_its_chunks_with_headers():
    server, client = pair()
    client.accept(announce(server, client, b"x" * 20).transfer, MemorySink())
    client.grant()
    deliver(client, server)
    outbounds = [server.next_outbound() for _ in range(3)]
    assert [o.payload_bytes_sent is None for o in outbounds] == [True, True, False]
    assert outbounds[-1].payload_bytes_sent == sum(o.num_bytes for o in outbounds)


def test_a_file_is_read_on_demand_and_written_to_a_private_part_file(tmp_path):
    data = random.Random(0).randbytes(1000)
    (tmp_path / "in").write_bytes(data)
    server, client = pair(chunk_bytes=64)
    server.send(resource(data), open_source(tmp_path / "in"))
    (event,) = deliver(server, client)
    part = tmp_path / "out.part"
    client.accept(event.transfer, FileSink(part))
    arrived = []
    while not arrived:
        client.grant()
        deliver(client, server)
        arrived = deliver(server, client)
    assert part.stat().st_mode & 0o777 == 0o600
    commit_file(part, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    assert not part.exists()


def test_a_file_that_shrinks_while_it_is_sent_is_noticed(tmp_path):
    (tmp_path / "in").write_bytes(b"x" * 16)
    source = FileSource(tmp_path / "in")
    (tmp_path / "in").write_bytes(b"x" * 8)
    with pytest.raises(LocalProtocolError, match="shorter than the 16 bytes"):
        source.read(8, 8)


def test_closing_discards_what_was_half_received(tmp_path):
    server, client = pair()
    client.accept(announce(server, client, b"x" * 100).transfer, FileSink(tmp_path / "a.part"))
    client.grant()
    deliver(client, server)
    deliver(server, client)
    client.close()
    server.close()
    assert not (tmp_path / "a.part").exists()
    assert server.next_outbound() is None
    assert not server.open_outgoing


def test_every_kind_has_a_direction_and_those_with_payload_bytes_announce():
    assert set(KINDS) == FROM_CLIENT | FROM_AGGREGATOR
    assert {kind for kind, cls in KINDS.items() if "payload_bytes" in cls.__dataclass_fields__} == ANNOUNCING
