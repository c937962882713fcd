"""The aggregator's socket against raw peers: enrolled, unenrolled, revoked, malformed, greedy."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import time
import zlib
from collections import Counter
from types import SimpleNamespace

import msgpack
import psutil
import pytest
import zmq

from fedblocks.aggregator.auth import Registry, load_or_create_server_keys
from fedblocks.aggregator.endpoint import (
    MESSAGE_BURST,
    EndpointError,
    MessageReceived,
    PeerGone,
    PeerRejected,
    RouterEndpoint,
    SecondSession,
    UploadAnnounced,
    UploadFailed,
    UploadFinished,
)
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol import codec
from fedblocks.protocol.errors import LocalProtocolError
from fedblocks.protocol.messages import (
    PROTOCOL_VERSION,
    Delta,
    Fetch,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Refused,
    Resource,
    TrainReport,
)
from fedblocks.protocol.payloads import MemorySink, open_source
from fedblocks.protocol.transfer import CHUNK_BYTES, FROM_AGGREGATOR, Chunk, Connection

HEARTBEAT = Heartbeat(attempt_id=None, phase="idle", steps_done=0)


def delta(payload: bytes, **fields) -> Delta:
    report = TrainReport(
        num_target_tokens=1,
        loss_first=1.0,
        loss_last=1.0,
        anchor_kl=0.0,
        prefix_s=0.0,
        train_s=0.0,
        measure_s=0.0,
        encode_s=0.0,
        step_s=0.0,
        peak_memory_bytes=0,
        predicted_peak_bytes=0,
        mode=ExecutionMode(),
        gradient_energy=(),
    )
    values = {
        "attempt_id": "a1",
        "round": 1,
        "version": 0,
        "num_examples": 8,
        "steps": 1,
        "format": "fp32",
        "density": 1.0,
        "tensors": (),
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "train": report,
        "measurements": (),
    }
    return Delta(**(values | fields))


class RawPeer:
    """A DEALER that says whatever the test wants, in the test's own thread."""

    def __init__(self, house, key_pair=None, *, routing_id=None, server_key=None, curve=True):
        self.house = house
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.key = None
        if curve:
            public, secret = key_pair or zmq.curve_keypair()
            self.key = public.decode()
            self.socket.curve_publickey, self.socket.curve_secretkey = public, secret
            self.socket.curve_serverkey = (server_key or house.keys.public).encode()
        if routing_id:
            self.socket.routing_id = routing_id
        self.socket.linger = 0
        self.socket.reconnect_ivl = -1
        self.socket.connect(house.endpoint.address)
        self.connection = Connection(receives=FROM_AGGREGATOR, max_incoming=8)

    def say(self, message, **header):
        self.socket.send_multipart(list(codec.encode(message, **header)))

    def hear(self, timeout_s=2.0):
        """The next message for this peer (credit left out), while the endpoint runs; None if there is none."""
        self.house.pump(lambda: self.socket.poll(0), timeout_s)
        if not self.socket.poll(0):
            return None
        frames = self.socket.recv_multipart()
        return self.hear(timeout_s) if b"credit" in frames[0] else codec.decode(*frames)

    def flush(self):
        """Sends what the peer's own Connection has to send."""
        while (outbound := self.connection.next_outbound()) is not None:
            self.socket.send_multipart(list(outbound.frames))

    def close(self):
        self.context.destroy(linger=0)


class House:
    """An endpoint with its registry, and everything that happened."""

    def __init__(self, folder, **options):
        self.folder = folder
        self.keys = load_or_create_server_keys(folder)
        self.registry = Registry(folder)
        self.endpoint = RouterEndpoint("tcp://127.0.0.1:*", keys=self.keys, registry=self.registry, **options)
        self.events = []
        self.peers = []

    def peer(self, name=None, **options) -> RawPeer:
        key_pair = options.pop("key_pair", None) or zmq.curve_keypair()
        if name:
            self.registry.enrol(key_pair[0].decode(), name, now_unix_s=1.0)
        self.peers.append(RawPeer(self, key_pair, **options))
        self.peers[-1].key_pair = key_pair
        return self.peers[-1]

    def pump(self, until=lambda: False, timeout_s=2.0):
        end_s = time.monotonic() + timeout_s
        while not until() and time.monotonic() < end_s:
            self.events += self.endpoint.poll(0.01)
        return until()

    def wait_for(self, kind, timeout_s=3.0, count=1):
        assert self.pump(lambda: len(self.of(kind)) >= count, timeout_s), f"no {kind.__name__} among {self.events}"
        return self.of(kind)[count - 1]

    def of(self, kind):
        return [e for e in self.events if isinstance(e, kind)]

    def close(self):
        for peer in self.peers:
            peer.close()
        self.endpoint.close()


@pytest.fixture
def house(tmp_path):
    with contextlib.closing(House(tmp_path)) as house:
        yield house


def start_upload(house, peer, data, **fields) -> UploadAnnounced:
    peer.connection.send(delta(data, **fields), open_source(data))
    peer.flush()
    return house.wait_for(UploadAnnounced, count=len(house.of(UploadAnnounced)) + 1)


def carry_on(house, peer, until, timeout_s=20.0):
    """Lets the endpoint and the peer exchange frames."""
    end_s = time.monotonic() + timeout_s
    heard = []
    while not until() and time.monotonic() < end_s:
        house.events += house.endpoint.poll(0.005)
        while peer.socket.poll(0):
            heard += peer.connection.receive(peer.socket.recv_multipart())
        peer.flush()
    assert until(), house.events
    return heard


def test_a_message_is_attributed_to_the_key_that_sent_it(house):
    one, two = house.peer("one"), house.peer("two")
    one.say(HEARTBEAT)
    two.say(Fetch(name="anchor"))
    house.wait_for(MessageReceived, count=2)
    assert {e.key: e.message for e in house.of(MessageReceived)} == {one.key: HEARTBEAT, two.key: Fetch(name="anchor")}


def test_an_answer_reaches_the_one_it_is_for(house):
    one, two = house.peer("one"), house.peer("two")
    one.say(HEARTBEAT)
    two.say(HEARTBEAT)
    house.wait_for(MessageReceived, count=2)
    reply = HeartbeatReply(round=3, version=2, waiting_for="nobody")
    assert house.endpoint.send(two.key, reply)
    assert two.hear() == reply
    assert one.hear(timeout_s=0.1) is None


def test_sending_to_somebody_who_is_not_there_says_so(house):
    assert not house.endpoint.send("x" * 40, Goodbye(reason="x"))


def test_an_upload_of_25_mb_arrives_whole_and_is_counted(house, tmp_path):
    data = random.Random(0).randbytes(25_000_000)
    peer = house.peer("one")
    announced = start_upload(house, peer, data)
    part = tmp_path / "u.part"
    house.endpoint.accept_upload(announced.upload_id, part)
    carry_on(house, peer, lambda: house.of(UploadFinished))
    finished = house.of(UploadFinished)[0]
    assert finished.upload_id == announced.upload_id
    assert finished.path == part
    assert part.read_bytes() == data
    received = house.endpoint.bytes_by_key[peer.key].received
    assert len(data) < received < 1.02 * len(data)
    assert not house.of(UploadFailed)


def test_no_more_chunks_come_than_were_credited(house, tmp_path):
    peer = house.peer("one")
    data = bytes(20 * CHUNK_BYTES)
    announced = start_upload(house, peer, data)
    assert peer.hear(timeout_s=0.1) is None
    house.endpoint.accept_upload(announced.upload_id, tmp_path / "u.part")
    house.pump(lambda: peer.socket.poll(0))
    while peer.socket.poll(50):
        peer.connection.receive(peer.socket.recv_multipart())
    sent = 0
    while peer.connection.next_outbound() is not None:
        sent += 1
    assert sent == 4


def test_a_chunk_without_credit_ends_the_upload(house, tmp_path):
    peer = house.peer("one")
    data = bytes(20 * CHUNK_BYTES)
    announced = start_upload(house, peer, data)
    house.endpoint.accept_upload(announced.upload_id, tmp_path / "u.part")
    raw = bytes(CHUNK_BYTES)
    for index in range(8):
        chunk = Chunk(transfer=1, index=index, crc32=zlib.crc32(raw))
        header = codec.encode_header(codec.Header(kind="chunk"))
        peer.socket.send_multipart([header, codec.pack(codec.to_plain(chunk)), raw])
    time.sleep(0.3)  # until all of them are there, so that no credit is given between two of them
    failed = house.wait_for(UploadFailed)
    assert failed.code == "malformed"
    assert "chunk 4 came without credit" in failed.text


def test_a_refused_upload_never_sends_a_byte(house):
    peer = house.peer("one")
    announced = start_upload(house, peer, bytes(10 * CHUNK_BYTES))
    before = house.endpoint.bytes_by_key[peer.key].received
    house.endpoint.refuse_upload(announced.upload_id, Refused(code="stale_round", text="round 1 is closed"))
    carry_on(house, peer, lambda: not peer.connection.open_outgoing)
    house.pump(timeout_s=0.1)
    assert house.endpoint.bytes_by_key[peer.key].received == before
    house.endpoint.refuse_upload(announced.upload_id, Refused(code="stale_round", text="again"))


def test_an_upload_can_be_ended_while_it_runs_and_the_next_one_works(house, tmp_path):
    peer = house.peer("one")
    announced = start_upload(house, peer, bytes(200 * CHUNK_BYTES))
    part = tmp_path / "u.part"
    house.endpoint.accept_upload(announced.upload_id, part)
    carry_on(house, peer, lambda: part.stat().st_size > 5 * CHUNK_BYTES)
    house.endpoint.refuse_upload(announced.upload_id, Refused(code="over_quota", text="the deadline is over"))
    assert not part.exists()
    carry_on(house, peer, lambda: not peer.connection.open_outgoing)
    again = start_upload(house, peer, b"small", attempt_id="a2")
    house.endpoint.accept_upload(again.upload_id, part)
    carry_on(house, peer, lambda: house.of(UploadFinished))
    assert part.read_bytes() == b"small"
    assert not house.of(PeerRejected)


def test_a_corrupted_chunk_is_answered_with_checksum_mismatch(house, tmp_path):
    peer = house.peer("one")
    announced = start_upload(house, peer, b"x" * 100)
    house.endpoint.accept_upload(announced.upload_id, tmp_path / "u.part")
    chunk = Chunk(transfer=1, index=0, crc32=7)
    header = codec.encode_header(codec.Header(kind="chunk"))
    peer.socket.send_multipart([header, codec.pack(codec.to_plain(chunk)), b"x" * 100])
    failed = house.wait_for(UploadFailed)
    assert failed.code == "checksum_mismatch"
    refused = peer.hear()
    assert (refused.code, refused.attempt_id) == ("checksum_mismatch", "a1")
    assert not (tmp_path / "u.part").exists()
    assert house.endpoint.refused_by_key[peer.key]["checksum_mismatch"] == 1


def test_an_empty_upload_is_finished_once_it_is_accepted(house, tmp_path):
    peer = house.peer("one")
    announced = start_upload(house, peer, b"")
    house.endpoint.accept_upload(announced.upload_id, tmp_path / "u.part")
    house.wait_for(UploadFinished)
    assert (tmp_path / "u.part").read_bytes() == b""


def test_a_third_upload_at_once_is_over_quota(house):
    peer = house.peer("one")
    for number in (1, 2):
        start_upload(house, peer, b"x", attempt_id=f"a{number}")
    peer.connection.send(delta(b"x", attempt_id="a3"), open_source(b"x"))
    peer.flush()
    assert house.wait_for(PeerRejected).code == "over_quota"
    assert peer.hear().attempt_id == "a3"
    assert len(house.of(UploadAnnounced)) == 2


def test_a_resource_goes_out_in_chunks_from_a_file(house, tmp_path):
    data = random.Random(1).randbytes(3 * CHUNK_BYTES + 17)
    (tmp_path / "anchor").write_bytes(data)
    peer = house.peer("one")
    peer.say(Fetch(name="anchor"))
    house.wait_for(MessageReceived)
    resource = Resource(name="anchor", payload_bytes=len(data), payload_sha256=hashlib.sha256(data).hexdigest())
    assert house.endpoint.send(peer.key, resource, tmp_path / "anchor")
    sink, arrived = MemorySink(), []

    def done():
        peer.connection.grant()
        return arrived

    end_s = time.monotonic() + 10
    while not done() and time.monotonic() < end_s:
        peer.flush()
        house.endpoint.poll(0.005)
        while peer.socket.poll(0):
            for event in peer.connection.receive(peer.socket.recv_multipart()):
                if type(event).__name__ == "PayloadAnnounced":
                    arrived += peer.connection.accept(event.transfer, sink)
                else:
                    arrived.append(event)
    assert sink.payload() == data


def test_a_payload_of_another_length_than_announced_is_our_own_error(house):
    peer = house.peer("one")
    peer.say(HEARTBEAT)
    house.wait_for(MessageReceived)
    with pytest.raises(LocalProtocolError):
        house.endpoint.send(peer.key, Resource(name="x", payload_bytes=3, payload_sha256="0" * 64), b"four")


def test_an_unenrolled_key_gets_nothing_processed_and_is_reported(house):
    stranger = house.peer()
    stranger.say(HEARTBEAT)
    rejected = house.wait_for(PeerRejected)
    assert (rejected.key, rejected.code) == (stranger.key, "not_enrolled")
    assert not house.pump(lambda: house.of(MessageReceived), 0.3)
    assert house.endpoint.failed_handshakes == 1
    assert not house.endpoint.connected


@pytest.mark.parametrize("options", [{"curve": False}, {"server_key": zmq.curve_keypair()[0].decode()}])
def test_a_peer_without_curve_or_with_another_server_key_gets_nothing_processed(house, options):
    peer = house.peer("one", **options)
    peer.say(HEARTBEAT)
    house.pump(lambda: house.endpoint.failed_handshakes, 3)
    assert house.endpoint.failed_handshakes >= 1
    assert not house.pump(lambda: house.of(MessageReceived), 0.3)


def test_a_plain_peer_gets_nothing_processed(house):
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.plain_username, socket.plain_password = b"admin", b"admin"
    socket.linger = 0
    socket.connect(house.endpoint.address)
    socket.send_multipart(list(codec.encode(HEARTBEAT)))
    assert not house.pump(lambda: house.of(MessageReceived), 0.5)
    context.destroy(linger=0)
    assert house.endpoint.failed_handshakes >= 1


def test_a_revoked_client_is_told_once_on_its_live_connection_and_heard_no_more(house, tmp_path):
    peer = house.peer("one")
    announced = start_upload(house, peer, bytes(10 * CHUNK_BYTES))
    house.endpoint.accept_upload(announced.upload_id, tmp_path / "u.part")
    Registry(house.folder).revoke("one", now_unix_s=2.0)
    for _ in range(5):
        peer.say(Fetch(name="secret"))
    assert house.wait_for(UploadFailed).code == "revoked"
    house.pump(timeout_s=0.2)
    assert not house.of(MessageReceived)
    assert [e.code for e in house.of(PeerRejected)] == ["revoked"]
    heard = []
    while (message := peer.hear(timeout_s=0.1)) is not None:
        heard.append(message)
    assert [m.code for m in heard if isinstance(m, Refused)] == ["revoked"]
    assert not house.endpoint.send(peer.key, Goodbye(reason="x"))
    assert not (tmp_path / "u.part").exists()


def test_a_revoked_client_is_told_even_if_it_is_silent(house):
    peer = house.peer("one")
    peer.say(HEARTBEAT)
    house.wait_for(MessageReceived)
    Registry(house.folder).revoke("one", now_unix_s=2.0)
    assert peer.hear().code == "revoked"


def test_a_thief_of_a_routing_id_receives_nothing_of_the_victim(house):
    victim = house.peer("victim")
    victim.say(HEARTBEAT)
    house.wait_for(MessageReceived)
    (session,) = house.endpoint._sessions.values()
    thief = house.peer("thief", routing_id=session.routing_id)
    thief.say(HEARTBEAT)
    house.pump(timeout_s=0.3)
    reply = HeartbeatReply(round=1, version=1, waiting_for="")
    house.endpoint.send(victim.key, reply)
    assert victim.hear() == reply
    assert thief.hear(timeout_s=0.2) is None


def valid_frames():
    return codec.encode(HEARTBEAT)


def packed(value):
    return msgpack.packb(value)


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b""], "malformed"),
        ([b"", b""], "malformed"),
        ([b"\xc1", b"\x80"], "malformed"),
        ([valid_frames()[0]], "malformed"),
        ([*valid_frames(), b"more"], "malformed"),
        ([*valid_frames(), b"a", b"b"], "malformed"),
        ([valid_frames()[0], b"\x81\xa1a"], "malformed"),
        ([valid_frames()[0], packed({"attempt_id": None, "phase": "x", "steps_done": 1, "new": 1})], "unknown_field"),
        ([packed({"protocol": 99, "kind": "hello"}), b"\x80"], "version_skew"),
        ([packed({"protocol": PROTOCOL_VERSION, "kind": "welcome"}), b"\x80"], "malformed"),
        ([packed({"protocol": PROTOCOL_VERSION, "kind": "nonsense"}), b"\x80"], "malformed"),
        ([b"x" * 300, b""], "too_large"),
        ([valid_frames()[0], b"x" * CHUNK_BYTES], "malformed"),
        (
            [
                packed({"protocol": PROTOCOL_VERSION, "kind": "chunk"}),
                packed({"transfer": 1, "index": 0, "crc32": 0}),
                b"",
            ],
            "malformed",
        ),
        (
            [packed({"protocol": PROTOCOL_VERSION, "kind": "credit"}), packed({"transfer": 1, "chunks": 2**60})],
            "malformed",
        ),
        (list(codec.encode(delta(b"x", payload_bytes=2**41), transfer=1)), "too_large"),
        (list(codec.encode(delta(b"x"))), "malformed"),
    ],
)
def test_malformed_frames_are_answered_with_their_code_and_nothing_else(house, frames, code):
    peer = house.peer("one")
    peer.socket.send_multipart(frames)
    assert peer.hear().code == code
    assert house.of(PeerRejected)[0].code == code
    assert house.endpoint.refused_by_key[peer.key][code] == 1
    peer.say(HEARTBEAT)
    house.wait_for(MessageReceived)
    assert len(house.events) == 2


def test_a_flood_is_answered_up_to_the_burst_and_the_others_are_served(house):
    greedy, modest = house.peer("greedy"), house.peer("modest")
    greedy.say(HEARTBEAT)
    house.wait_for(MessageReceived)
    house.endpoint._sessions[greedy.key].quota._per_s = 0.0  # so that the speed of this machine does not matter
    for _ in range(3 * MESSAGE_BURST):
        greedy.socket.send_multipart([b"", b""])
    modest.say(HEARTBEAT)
    counts = house.endpoint.refused_by_key
    assert house.pump(lambda: counts.get(greedy.key, Counter()).total() == 3 * MESSAGE_BURST, 20)
    assert house.pump(lambda: len(house.of(MessageReceived)) == 2, 20)
    assert len(house.of(PeerRejected)) == MESSAGE_BURST
    heard = 0
    while greedy.hear(timeout_s=0.5) is not None:
        heard += 1
    assert heard == MESSAGE_BURST


def test_a_peer_of_another_version_is_told_once_and_no_loop_of_refusals_begins(house):
    peer = house.peer("one")
    for _ in range(10):
        peer.socket.send_multipart([packed({"protocol": PROTOCOL_VERSION + 1, "kind": "refused"}), b"\x80"])
    refused = peer.hear()
    assert refused.code == "version_skew"
    assert str(PROTOCOL_VERSION) in refused.text
    assert peer.hear(timeout_s=0.3) is None


def test_a_frame_above_the_limit_ends_the_connection_before_it_is_held(house):
    peer = house.peer("one")
    peer.say(HEARTBEAT)
    house.wait_for(MessageReceived)
    peer.socket.send_multipart([*valid_frames(), bytes(50_000_000)])
    house.pump(timeout_s=0.5)
    assert house.endpoint.bytes_by_key[peer.key].received < 1000


def test_a_client_that_reads_nothing_is_dropped_and_never_blocks_the_loop(house):
    peer = house.peer("one")
    peer.socket.rcvhwm = 1
    peer.say(HEARTBEAT)
    house.wait_for(MessageReceived)
    sent = 0
    begin_s = time.monotonic()
    big = Refused(code="malformed", text="x" * 16_000)
    while house.endpoint.send(peer.key, big):
        sent += 1
        assert sent < 20_000
    assert time.monotonic() - begin_s < 10
    house.pump(lambda: house.of(PeerRejected))
    assert house.of(PeerRejected)[0].code == "over_quota"
    assert not house.endpoint.connected


def test_a_new_connection_of_a_key_replaces_the_old_one_and_its_upload(house, tmp_path):
    first = house.peer("one")
    announced = start_upload(house, first, bytes(10 * CHUNK_BYTES))
    house.endpoint.accept_upload(announced.upload_id, tmp_path / "u.part")
    second = house.peer(key_pair=first.key_pair)
    second.say(HEARTBEAT)
    failed = house.wait_for(UploadFailed)
    assert (failed.upload_id, failed.code) == (announced.upload_id, "disconnected")
    assert not (tmp_path / "u.part").exists()
    house.endpoint.accept_upload(announced.upload_id, tmp_path / "u.part")
    house.endpoint.send(second.key, Goodbye(reason="x"))
    assert second.hear() == Goodbye(reason="x")


def test_a_second_live_session_of_one_key_is_reported(tmp_path):
    clock = SimpleNamespace(offset=0.0)
    house = House(tmp_path, clock=lambda: time.monotonic() + clock.offset)
    with contextlib.closing(house):
        owner = house.peer("one")
        owner.say(HEARTBEAT)
        house.wait_for(MessageReceived)
        thief = house.peer(key_pair=owner.key_pair)
        thief.say(HEARTBEAT)
        house.wait_for(MessageReceived, count=2)
        owner.say(HEARTBEAT)
        house.pump(timeout_s=0.2)
        assert not house.of(SecondSession)
        clock.offset = 10.0
        for _ in range(3):
            owner.say(HEARTBEAT)
        second = house.wait_for(SecondSession)
        house.pump(timeout_s=0.1)
        assert (second.key, second.served_address, second.ignored_address) == (owner.key, "127.0.0.1", "127.0.0.1")
        assert len(house.of(SecondSession)) == 1
        assert len(house.of(MessageReceived)) == 2


def test_a_client_that_left_is_noticed_when_it_is_spoken_to(house):
    peer = house.peer("one")
    peer.say(HEARTBEAT)
    house.wait_for(MessageReceived)
    peer.close()
    house.pump(timeout_s=0.2)
    assert not house.endpoint.send(peer.key, Goodbye(reason="x"))
    house.wait_for(PeerGone)
    assert not house.endpoint.connected


def test_a_disconnected_client_is_heard_again_on_a_new_connection(house):
    peer = house.peer("one")
    peer.say(HEARTBEAT)
    house.wait_for(MessageReceived)
    house.endpoint.disconnect(peer.key)
    peer.say(HEARTBEAT)
    house.pump(timeout_s=0.2)
    assert len(house.of(MessageReceived)) == 1
    house.peer(key_pair=peer.key_pair).say(HEARTBEAT)
    house.wait_for(MessageReceived, count=2)


def test_an_address_that_is_taken_is_a_clear_error(house):
    with pytest.raises(EndpointError, match="cannot listen at"):
        RouterEndpoint(house.endpoint.address, keys=house.keys, registry=house.registry)


def test_more_clients_than_the_system_allows_open_files_are_a_clear_error(tmp_path):
    with pytest.raises(EndpointError, match="open files"):
        House(tmp_path, expected_clients=10**9)


def test_one_upload_does_not_grow_the_memory_with_its_size(house, tmp_path):
    process = psutil.Process()
    source = tmp_path / "big"
    with source.open("wb") as file:
        file.truncate(200_000_000)
    digest = hashlib.sha256()
    for _ in range(200):
        digest.update(bytes(1_000_000))
    peer = house.peer("one")
    message = delta(b"", payload_bytes=200_000_000, payload_sha256=digest.hexdigest())
    peer.connection.send(message, open_source(source))
    peer.flush()
    announced = house.wait_for(UploadAnnounced)
    before = process.memory_info().rss
    peak = before

    def finished():
        nonlocal peak
        peak = max(peak, process.memory_info().rss)
        return house.of(UploadFinished)

    house.endpoint.accept_upload(announced.upload_id, tmp_path / "u.part")
    carry_on(house, peer, finished, timeout_s=60)
    assert peak - before < 40_000_000


def test_f7_a_thousand_silent_and_trickling_sockets_cost_little_and_their_descriptors_come_back(tmp_path):
    process = psutil.Process()
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(54, b"\x00")  # of ZMTP 3.1, as a real peer begins
    with contextlib.closing(House(tmp_path, expected_clients=1200)) as house:
        peer = house.peer("one")
        peer.say(HEARTBEAT)
        house.wait_for(MessageReceived)
        host, port = house.endpoint.address.removeprefix("tcp://").split(":")

        def accepted() -> int:  # by this endpoint alone: sockets of earlier tests may still be closing
            found = process.net_connections("tcp4")
            return sum(c.laddr.port == int(port) and c.status == psutil.CONN_ESTABLISHED for c in found)

        before, descriptors, own = process.memory_info().rss, process.num_fds(), accepted()
        strangers = [socket.create_connection((host, int(port))) for _ in range(1000)]
        try:
            assert house.pump(lambda: accepted() == own + 1000, 10.0), "not all of them are connected"
            for count in range(40):
                if count < len(greeting):
                    for stranger in strangers[:50]:
                        stranger.send(greeting[count : count + 1])
                peer.say(HEARTBEAT)
                house.wait_for(MessageReceived, count=count + 2)
            grown_bytes = process.memory_info().rss - before
        finally:
            for stranger in strangers:
                stranger.close()
        assert house.pump(lambda: process.num_fds() <= descriptors, 10.0), process.num_fds() - descriptors
        assert accepted() == own
    assert grown_bytes < 50e6
    assert house.of(PeerRejected) == []


def test_f7_an_upload_that_trickles_holds_nobody_up(house, tmp_path):
    slow, other = house.peer("slow"), house.peer("other")
    data = bytes(3 * CHUNK_BYTES)
    announced = start_upload(house, slow, data)
    house.endpoint.accept_upload(announced.upload_id, tmp_path / "slow.part")
    began_s = time.monotonic()
    for count in range(20):
        other.say(HEARTBEAT)
        house.wait_for(MessageReceived, count=count + 1)
    assert time.monotonic() - began_s < 2.0
    assert house.of(UploadFinished) == []  # still under way, and nothing of it is held in memory
    carry_on(house, slow, lambda: house.of(UploadFinished))


def test_f17_a_hundred_clients_that_come_back_at_once_after_a_restart_are_all_served(tmp_path):
    with contextlib.closing(House(tmp_path, expected_clients=256)) as house:
        peers = [house.peer(f"site-{i}") for i in range(100)]
        for peer in peers:
            peer.say(HEARTBEAT)
        house.wait_for(MessageReceived, timeout_s=20.0, count=100)
        house.endpoint.close()
        house.events.clear()
        house.endpoint = RouterEndpoint(
            "tcp://127.0.0.1:*", keys=house.keys, registry=house.registry, expected_clients=256
        )
        again = [house.peer(key_pair=peer.key_pair) for peer in peers]
        for peer in again:
            peer.say(HEARTBEAT)
        house.wait_for(MessageReceived, timeout_s=20.0, count=100)
        assert {event.key for event in house.of(MessageReceived)} == {peer.key for peer in peers}
        assert house.of(PeerRejected) == []


def test_a_key_is_rotated_while_the_endpoint_serves_and_only_its_holder_notices(house):
    site, other = house.peer("site"), house.peer("other")
    for count, peer in enumerate((site, other)):
        peer.say(HEARTBEAT)
        house.wait_for(MessageReceived, count=count + 1)
    new = zmq.curve_keypair()
    Registry(house.folder).rotate("site", new[0].decode(), now_unix_s=2.0)
    assert site.hear().code == "revoked"
    renewed = house.peer(key_pair=new)
    for count, peer in enumerate((site, other, renewed)):
        peer.say(HEARTBEAT)
        house.pump(lambda wanted=count: len(house.of(MessageReceived)) > 2 + wanted, 0.3)
    assert [e.key for e in house.of(MessageReceived)] == [site.key, other.key, other.key, renewed.key]
