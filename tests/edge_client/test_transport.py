"""The client's thread against real sockets, a byte proxy and wrong peers.

The aggregator here is a bare ROUTER with the shared ``Connection``: the client's tests do not import the aggregator.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import socket
import threading
import time
import zlib
from pathlib import Path

import pytest
import zmq
import zmq.auth.base

from fedblocks.edge_client.identity import KEY_FILE, load_or_create_identity
from fedblocks.edge_client.transport import (
    Connected,
    Disconnected,
    Problem,
    Received,
    Transport,
    UploadSent,
)
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol import codec
from fedblocks.protocol.errors import LocalProtocolError, RemoteProtocolError
from fedblocks.protocol.keys import KeyFileError, KeyPair
from fedblocks.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    DataFormat,
    Delta,
    Fetch,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Refused,
    Resource,
    TrainReport,
    Welcome,
)
from fedblocks.protocol.payloads import MemorySink, open_source
from fedblocks.protocol.transfer import (
    CHUNK_BYTES,
    FROM_CLIENT,
    Connection,
    MessageArrived,
    PayloadAnnounced,
    PayloadArrived,
)

GOODBYE = Goodbye(reason="test")


def new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public=public.decode(), secret=secret.decode())


def welcome(interval_s: float) -> Welcome:
    return Welcome(
        protocol_version=PROTOCOL_VERSION,
        run_id="r",
        method="fedbe",
        round=1,
        version=1,
        heartbeat_interval_s=interval_s,
        data=DataFormat(max_tokens=128, append_eos=True, join=" "),
        resources=(),
    )


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


class FakeAggregator(threading.Thread):
    """Lets in the keys of ``allowed``, answers heartbeats, takes all uploads into memory."""

    def __init__(self, *, keys=None, allowed=None, bind="tcp://127.0.0.1:*", curve=True, answer=True):
        super().__init__(daemon=True)
        self.keys = keys or new_pair()
        self.allowed = allowed
        self.answer = answer
        self.accept = True
        self.messages: list = []
        self.payloads: list[bytes] = []
        self.inbox: list = []
        self.bytes_received = 0
        self._stop_it = threading.Event()
        self.context = zmq.Context()
        self.auth = zmq.auth.base.Authenticator(self.context)
        self.auth.start()
        self.auth.configure_curve_callback("test", credentials_provider=self)
        self.router = self.context.socket(zmq.ROUTER)
        self.router.linger = 500
        if curve:
            self.router.curve_server = True
            self.router.curve_publickey = self.keys.public.encode()
            self.router.curve_secretkey = self.keys.secret.encode()
            self.router.zap_domain = b"test"
        self.router.bind(bind)
        self.address = self.router.last_endpoint.decode()
        self.connections: dict[bytes, Connection] = {}
        self.start()

    def callback(self, domain, key):
        return self.allowed is None or key.decode() in self.allowed

    def say(self, message, payload=None):
        """To the client that spoke last; raw frames if it is a list."""
        self.inbox.append((message, payload))

    def of(self, kind):
        return [m for m in self.messages if isinstance(m, kind)]

    def run(self):
        last = None
        while not self._stop_it.is_set():
            while self.auth.zap_socket.poll(0):
                with contextlib.suppress(StopIteration):
                    self.auth.handle_zap_message(self.auth.zap_socket.recv_multipart()).send(None)
            if self.router.poll(5):
                last, *frames = self.router.recv_multipart()
                self.bytes_received += sum(map(len, frames))
                connection = self.connections.setdefault(last, Connection(receives=FROM_CLIENT, max_incoming=4))
                with contextlib.suppress(RemoteProtocolError):
                    self.take(connection, connection.receive(frames))
            while self.inbox and last is not None:
                message, payload = self.inbox.pop(0)
                if isinstance(message, list):
                    self.router.send_multipart([last, *message])
                else:
                    source = None if payload is None else open_source(payload)
                    self.connections[last].send(message, source)
            for routing_id, connection in self.connections.items():
                while (outbound := connection.next_outbound()) is not None:
                    self.router.send_multipart([routing_id, *outbound.frames])
        self.auth.stop()
        self.context.destroy(linger=200)

    def take(self, connection, events):
        for event in events:
            if isinstance(event, MessageArrived):
                self.messages.append(event.message)
                if isinstance(event.message, Heartbeat) and self.answer:
                    connection.send(HeartbeatReply(round=1, version=2, waiting_for="you"))
            elif isinstance(event, PayloadAnnounced):
                self.messages.append(event.message)
                if self.accept:
                    self.take(connection, connection.accept(event.transfer, MemorySink()))
                else:
                    refused = Refused(code="stale_round", text="round 1 is closed", attempt_id="a1")
                    connection.refuse(event.transfer, refused)
            elif isinstance(event, PayloadArrived):
                self.payloads.append(event.sink.payload())
        connection.grant()

    def close(self):
        self._stop_it.set()
        self.join()


class Proxy(threading.Thread):
    """A byte proxy that can be cut, stalled, and asked for what passed through it; it can speak SOCKS5 first."""

    def __init__(self, target: str, *, socks=False):
        super().__init__(daemon=True)
        self.target = target.removeprefix("tcp://").split(":")
        self.socks = socks
        self.asked: list[bytes] = []
        self.seen = bytearray()
        self.stalled = False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.start()

    def run(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            try:
                if self.socks:
                    near.recv(near.recv(2)[1])
                    near.sendall(b"\x05\x00")
                    self.asked.append(near.recv(300))
                    near.sendall(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
                far = socket.create_connection((self.target[0], int(self.target[1])))
            except OSError:
                near.close()
                continue
            self.pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self.carry, args=(source, sink), daemon=True).start()

    def carry(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                while self.stalled:
                    time.sleep(0.01)
                self.seen += data
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        for pair in self.pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self.pairs.clear()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut()


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield lambda thing: stack.enter_context(contextlib.closing(thing))


@pytest.fixture
def aggregator(stack):
    return stack(FakeAggregator())


@pytest.fixture
def connect(stack):
    def connect(address, server_key, **options) -> Transport:
        options = {"backoff_s": (0.05, 0.4), "heartbeat_interval_s": 0.2, "seed": 1} | options
        key_pair = options.pop("key_pair", None) or new_pair()
        return stack(Transport(address, server_key=server_key, key_pair=key_pair, **options))

    return connect


def wait_for(transport, kind, timeout_s=8.0):
    end_s = time.monotonic() + timeout_s
    seen = []
    while time.monotonic() < end_s:
        event = transport.get(0.05)
        if isinstance(event, kind):
            return event
        if event is not None:
            seen.append(event)
    raise AssertionError(f"no {kind.__name__} among {seen}")


def until(condition, timeout_s=8.0):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_messages_and_payloads_go_both_ways(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public)
    wait_for(transport, Connected)
    transport.send(Fetch(name="anchor"))
    data = random.Random(0).randbytes(2 * CHUNK_BYTES + 5)
    resource = Resource(name="anchor", payload_bytes=len(data), payload_sha256=hashlib.sha256(data).hexdigest())
    until(lambda: aggregator.of(Fetch))
    aggregator.say(resource, data)
    received = wait_for(transport, Received)
    assert received.message == resource
    assert received.payload == data


def test_the_traffic_of_a_connection_times_the_line(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public, heartbeat_interval_s=0.05)
    wait_for(transport, Connected)
    data = random.Random(0).randbytes(8 * CHUNK_BYTES)
    transport.send(Fetch(name="anchor"))
    until(lambda: aggregator.of(Fetch))
    resource = Resource(name="anchor", payload_bytes=len(data), payload_sha256=hashlib.sha256(data).hexdigest())
    began_s = time.monotonic()
    aggregator.say(resource, data)
    wait_for(transport, Received)
    assert len(data) / (time.monotonic() - began_s) <= transport.meter.record.downlink_bytes_per_s.value

    began_s = time.monotonic()
    transport.send(delta(data), data)
    wait_for(transport, UploadSent)
    until(lambda: aggregator.payloads)
    assert transport.meter.record.uplink_bytes_per_s is None
    aggregator.say(Ack(attempt_id="a1", payload_sha256=""))
    until(lambda: transport.meter.record.uplink_bytes_per_s)
    assert len(data) / (time.monotonic() - began_s) <= transport.meter.record.uplink_bytes_per_s.value

    until(lambda: transport.meter.record.round_trip_s)
    assert 0 < transport.meter.record.round_trip_s.low < 5


def test_a_payload_of_no_bytes_is_received_as_such(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public)
    wait_for(transport, Connected)
    transport.send(Fetch(name="empty"))
    aggregator.say(Resource(name="empty", payload_bytes=0, payload_sha256=hashlib.sha256(b"").hexdigest()), b"")
    assert wait_for(transport, Received).payload == b""


@pytest.mark.parametrize("from_file", [False, True])
def test_an_upload_of_25_mb_arrives_and_every_byte_is_logged(aggregator, connect, tmp_path, from_file):
    log = []
    transport = connect(
        aggregator.address, aggregator.keys.public, on_sent=lambda *entry: log.append(entry), heartbeat_interval_s=5.0
    )
    wait_for(transport, Connected)
    data = random.Random(0).randbytes(25_000_000)
    (tmp_path / "update").write_bytes(data)
    transport.send(delta(data), tmp_path / "update" if from_file else data)
    assert transport.uploading
    sent = wait_for(transport, UploadSent, 30)
    assert sent.attempt_id == "a1"
    assert not transport.uploading
    until(lambda: aggregator.payloads, 30)
    assert aggregator.payloads == [data]
    transport.close()
    assert {kind for kind, _, _ in log} == {"delta", "payload"}
    assert sum(num_bytes for _, num_bytes, _ in log) == transport.bytes_sent == aggregator.bytes_received
    assert transport.bytes_sent < 1.02 * len(data)


def test_a_refused_upload_sends_no_byte_of_its_payload(aggregator, connect):
    aggregator.accept = False
    log = []
    transport = connect(aggregator.address, aggregator.keys.public, on_sent=lambda *entry: log.append(entry))
    wait_for(transport, Connected)
    transport.send(delta(bytes(10 * CHUNK_BYTES)), bytes(10 * CHUNK_BYTES))
    refused = wait_for(transport, Received).message
    assert (refused.code, refused.attempt_id) == ("stale_round", "a1")
    assert not transport.uploading
    assert "payload" not in {kind for kind, _, _ in log}
    assert transport.bytes_sent < 2000


def test_an_upload_that_was_cut_can_be_sent_again_on_the_next_connection(aggregator, connect, stack):
    proxy = stack(Proxy(aggregator.address))
    log = []
    transport = connect(proxy.address, aggregator.keys.public, on_sent=lambda *entry: log.append(entry))
    wait_for(transport, Connected)
    data = random.Random(0).randbytes(20_000_000)
    transport.send(delta(data), data)
    until(lambda: len(proxy.seen) > 3_000_000)
    proxy.cut()
    wait_for(transport, Disconnected)
    assert not transport.uploading
    wait_for(transport, Connected)
    transport.send(delta(data), data)
    wait_for(transport, UploadSent, 30)
    until(lambda: aggregator.payloads, 30)
    assert aggregator.payloads == [data]
    assert transport.connections == 2
    assert [text.rpartition(", ")[2] for kind, _, text in log if kind == "payload"] == ["cut off", "complete"]


def test_messages_meant_for_a_lost_connection_are_dropped(aggregator, connect, stack):
    proxy = stack(Proxy(aggregator.address))
    transport = connect(proxy.address, aggregator.keys.public)
    transport.send(Fetch(name="before Connected was seen"))
    wait_for(transport, Connected)
    proxy.cut()
    until(lambda: transport.connections == 2)
    transport.send(Fetch(name="stale"))
    transport.send(delta(b"x"), b"x")
    until(lambda: not transport.uploading)
    wait_for(transport, Connected)
    transport.send(Fetch(name="fresh"))
    until(lambda: aggregator.of(Fetch))
    assert [m.name for m in aggregator.of(Fetch)] == ["fresh"]


def test_heartbeats_go_on_while_the_caller_computes(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public, heartbeat_interval_s=0.1)
    wait_for(transport, Connected)
    transport.send(Fetch(name="hello"))
    transport.set_status(attempt_id="a7", phase="training", steps_done=3)
    end_s = time.monotonic() + 1.5
    block = bytes(200_000)
    while time.monotonic() < end_s:
        zlib.crc32(b"".join(bytes(reversed(block)) for _ in range(3)))
    beats = aggregator.of(Heartbeat)
    assert len(beats) >= 7
    assert Heartbeat(attempt_id="a7", phase="training", steps_done=3) in beats
    assert transport.last_reply == HeartbeatReply(round=1, version=2, waiting_for="you")
    assert transport.connections == 1


def test_no_heartbeat_goes_out_before_the_caller_has_greeted(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public, heartbeat_interval_s=0.05)
    wait_for(transport, Connected)
    time.sleep(0.1)
    assert aggregator.messages == []


def test_a_welcome_sets_the_interval_of_the_heartbeats(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public, heartbeat_interval_s=30.0)
    wait_for(transport, Connected)
    transport.send(Fetch(name="hello"))
    aggregator.say(welcome(0.05))
    until(lambda: len(aggregator.of(Heartbeat)) > 3)


def test_a_silent_aggregator_is_left_after_three_intervals_and_found_again(aggregator, connect, stack):
    proxy = stack(Proxy(aggregator.address))
    transport = connect(proxy.address, aggregator.keys.public, heartbeat_interval_s=0.1)
    wait_for(transport, Connected)
    transport.send(Fetch(name="hello"))
    until(lambda: transport.last_reply is not None)
    proxy.stalled = True
    begin_s = time.monotonic()
    assert "nothing heard for" in wait_for(transport, Disconnected).text
    assert 0.2 < time.monotonic() - begin_s < 2
    proxy.stalled = False
    wait_for(transport, Connected)


def test_a_short_stall_costs_no_connection(aggregator, connect, stack):
    proxy = stack(Proxy(aggregator.address))
    transport = connect(proxy.address, aggregator.keys.public, heartbeat_interval_s=0.5)
    wait_for(transport, Connected)
    transport.send(Fetch(name="hello"))
    proxy.stalled = True
    time.sleep(0.6)
    proxy.stalled = False
    transport.send(Fetch(name="after"))
    until(lambda: len(aggregator.of(Fetch)) == 2)
    assert transport.connections == 1


def test_an_aggregator_that_is_restarted_at_the_same_address_is_found_again(connect):
    first = FakeAggregator()
    transport = connect(first.address, first.keys.public)
    wait_for(transport, Connected)
    first.close()
    wait_for(transport, Disconnected)
    time.sleep(0.5)
    second = FakeAggregator(keys=first.keys, bind=first.address)
    with contextlib.closing(second):
        wait_for(transport, Connected)
        transport.send(Fetch(name="again"))
        until(lambda: second.of(Fetch))
        transport.close()


def test_pauses_between_attempts_grow_and_are_jittered(connect):
    times = []

    class Listener(threading.Thread):
        def run(self):
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()
                    times.append(time.monotonic())

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        aggregator = FakeAggregator()
        transport = connect(aggregator.address, aggregator.keys.public, backoff_s=(0.1, 0.4))
        wait_for(transport, Connected)
        transport._address = address
        listener = Listener(daemon=True)
        listener.start()
        aggregator.close()
        until(lambda: len(times) >= 6)
        server.shutdown(socket.SHUT_RDWR)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[0] < 0.25
    assert all(0.19 <= gap < 0.6 for gap in gaps[2:5])
    assert len({round(gap, 3) for gap in gaps}) > 1


def test_a_key_that_is_not_enrolled_ends_with_one_clear_line_and_exit_4(stack, connect):
    aggregator = stack(FakeAggregator(allowed=set()))
    key_pair = new_pair()
    begin_s = time.monotonic()
    transport = connect(aggregator.address, aggregator.keys.public, key_pair=key_pair)
    problem = wait_for(transport, Problem)
    assert time.monotonic() - begin_s < 5
    assert (problem.exit_code, problem.reason, problem.fatal) == (4, "key_refused", True)
    assert key_pair.public in problem.text
    assert "is not enrolled at" in problem.text
    assert key_pair.secret not in problem.text
    assert transport.get(0.3) is None
    assert not transport._thread.is_alive()


def test_a_wrong_server_key_ends_after_three_handshakes_with_exit_4(aggregator, connect):
    begin_s = time.monotonic()
    transport = connect(aggregator.address, new_pair().public, backoff_s=(1.0, 32.0))
    problem = wait_for(transport, Problem)
    assert time.monotonic() - begin_s < 5
    assert (problem.exit_code, problem.reason, problem.fatal) == (4, "wrong_server_key", True)
    assert "does not hold the server key in your config" in problem.text


def test_a_peer_without_curve_ends_with_exit_4(stack, connect):
    aggregator = stack(FakeAggregator(curve=False))
    problem = wait_for(connect(aggregator.address, aggregator.keys.public), Problem)
    # Which side notices first is a race; if it is the other one, all that is seen here is a cut handshake.
    assert (problem.exit_code, problem.reason) in ((4, "other_mechanism"), (4, "wrong_server_key"))
    assert "CURVE" in problem.text


def test_nobody_there_ends_with_exit_3_and_other_words_than_a_refused_key(connect):
    transport = connect(f"tcp://127.0.0.1:{free_port()}", new_pair().public, connect_timeout_s=0.6)
    problem = wait_for(transport, Problem)
    assert (problem.exit_code, problem.reason, problem.fatal) == (3, "unreachable", True)
    assert "the port is blocked on the way, or no aggregator listens there" in problem.text
    assert "enrolled" not in problem.text


def test_a_name_that_does_not_resolve_ends_with_exit_3(connect):
    transport = connect("tcp://no-such-host.invalid:5555", new_pair().public, connect_timeout_s=0.6)
    problem = wait_for(transport, Problem)
    assert problem.exit_code == 3


def test_a_server_that_accepts_and_says_nothing_ends_with_exit_3(connect):
    with socket.create_server(("127.0.0.1", 0)) as server:
        transport = connect(f"tcp://127.0.0.1:{server.getsockname()[1]}", new_pair().public, connect_timeout_s=0.6)
        assert wait_for(transport, Problem).exit_code == 3


def test_an_aggregator_that_stays_away_ends_with_exit_3_after_its_time(connect):
    aggregator = FakeAggregator()
    transport = connect(aggregator.address, aggregator.keys.public, lost_timeout_s=0.7)
    wait_for(transport, Connected)
    aggregator.close()
    wait_for(transport, Disconnected)
    problem = wait_for(transport, Problem)
    assert (problem.exit_code, problem.fatal) == (3, True)


def test_another_protocol_version_ends_with_exit_4_naming_both(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public)
    wait_for(transport, Connected)
    transport.send(Fetch(name="hello"))
    aggregator.say([codec.pack({"protocol": 7, "kind": "welcome"}), b"\x80"])
    problem = wait_for(transport, Problem)
    assert (problem.exit_code, problem.reason, problem.fatal) == (4, "version_skew", True)
    assert "version 7" in problem.text
    assert f"speaks {PROTOCOL_VERSION}" in problem.text
    until(lambda: aggregator.of(Refused))
    assert aggregator.of(Refused)[0].code == "version_skew"


def test_an_unknown_field_ends_with_exit_4(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public)
    wait_for(transport, Connected)
    transport.send(Fetch(name="hello"))
    body = codec.pack({"reason": "x", "finished": False, "run_this": "rm"})
    aggregator.say([codec.encode(GOODBYE)[0], body])
    problem = wait_for(transport, Problem)
    assert problem.exit_code == 4
    assert "run_this" in problem.text


def test_malformed_frames_are_refused_and_the_connection_goes_on(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public)
    wait_for(transport, Connected)
    transport.send(Fetch(name="hello"))
    aggregator.say([b"\xc1", b"\xc1"])
    aggregator.say(GOODBYE)
    assert not wait_for(transport, Problem).fatal
    assert wait_for(transport, Received).message == GOODBYE
    until(lambda: aggregator.of(Refused))
    assert aggregator.of(Refused)[0].code == "malformed"


def test_a_payload_above_the_limit_is_refused_before_a_byte_of_it(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public, max_payload_bytes=10)
    wait_for(transport, Connected)
    transport.send(Fetch(name="hello"))
    aggregator.say(
        Resource(name="x", payload_bytes=11, payload_sha256=hashlib.sha256(b"x" * 11).hexdigest()), b"x" * 11
    )
    problem = wait_for(transport, Problem)
    assert (problem.exit_code, problem.reason, problem.fatal) == (5, "too_large", False)
    until(lambda: aggregator.of(Refused))
    assert aggregator.of(Refused)[0].code == "too_large"


def test_the_last_message_before_the_aggregator_leaves_is_not_lost(connect):
    for _ in range(5):
        aggregator = FakeAggregator()
        transport = connect(aggregator.address, aggregator.keys.public)
        wait_for(transport, Connected)
        transport.send(Fetch(name="hello"))
        until(lambda: aggregator.of(Fetch))  # noqa: B023
        aggregator.say(Goodbye(reason="the run is over", finished=True))
        until(lambda: not aggregator.inbox)  # noqa: B023
        aggregator.close()
        assert wait_for(transport, Received).message.finished
        transport.close()


def test_closing_sends_what_was_queued(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public)
    wait_for(transport, Connected)
    transport.send(GOODBYE)
    transport.close()
    transport.close()
    until(lambda: aggregator.of(Goodbye))


def test_nothing_that_crosses_the_wire_can_be_read(aggregator, connect, stack):
    proxy = stack(Proxy(aggregator.address))
    transport = connect(proxy.address, aggregator.keys.public)
    wait_for(transport, Connected)
    data = bytes(range(256)) * 400
    transport.send(delta(data), data)
    until(lambda: aggregator.payloads)
    assert b"protocol" not in proxy.seen
    assert b"payload_sha256" not in proxy.seen
    assert bytes(range(16)) not in proxy.seen


def test_a_socks_proxy_is_used_where_one_is_given(aggregator, connect, stack):
    proxy = stack(Proxy(aggregator.address, socks=True))
    transport = connect(aggregator.address, aggregator.keys.public, socks_proxy=proxy.address.removeprefix("tcp://"))
    wait_for(transport, Connected)
    assert len(proxy.asked) == 1


def test_what_no_client_sends_is_our_own_error(aggregator, connect):
    transport = connect(aggregator.address, aggregator.keys.public)
    with pytest.raises(LocalProtocolError, match="Welcome is no message that a client sends"):
        transport.send(welcome(1.0))
    with pytest.raises(LocalProtocolError, match="payload_bytes says 1"):
        transport.send(delta(b"x"), b"xy")
    with pytest.raises(FileNotFoundError):
        transport.send(delta(b"x"), Path("/nonexistent/update"))
    assert not transport.uploading


@pytest.mark.parametrize("address", ["", "127.0.0.1:5555", "tcp://host", "udp://host:1"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ValueError, match="expected tcp://host:port"):
        Transport(address, server_key=new_pair().public, key_pair=new_pair())


def test_a_server_key_that_is_none_is_refused():
    with pytest.raises(KeyFileError):
        Transport("tcp://127.0.0.1:1", server_key="short", key_pair=new_pair())


def test_the_identity_is_made_once_and_kept_private(tmp_path):
    pair = load_or_create_identity(tmp_path / "state")
    assert load_or_create_identity(tmp_path / "state") == pair
    path = tmp_path / "state" / KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="0640"):
        load_or_create_identity(tmp_path / "state")
