"""Many clients that train nothing: each has its own socket, key and session, a few processes hold them all.

What they send is made once: an update of the right shape whose values are drawn. The wire is the deployed one: CURVE,
chunks under credit, checksums, acknowledgements, heartbeats (``protocol/transfer.py``). A client that loses the
aggregator connects again, as the real one does, and sends an update that was not acknowledged once more.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import zmq

from fedblocks.aggregator.auth import Registry
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.profiles.device import DeviceProfile
from fedblocks.protocol import run_config
from fedblocks.protocol.codec import to_plain
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.expansion import ExpansionPlan, plan_expansion
from fedblocks.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Assignment,
    DataStatistics,
    Delta,
    Evaluate,
    Goodbye,
    Heartbeat,
    Hello,
    Measurement,
    Message,
    Ready,
    Refused,
    Report,
    ResourceInfo,
    TrainReport,
    Welcome,
)
from fedblocks.protocol.payloads import Bytes, open_source
from fedblocks.protocol.tensors import encode_delta
from fedblocks.protocol.transfer import FROM_AGGREGATOR, Connection, MessageArrived, PayloadAnnounced, PayloadArrived

RUN_ID: Final = "light-run"
BASE_HASH: Final = "ab" * 32
#: One expanded block of 6,310,400 values: 25 MB in fp32.
MB25: Final = {"hidden_size": 640, "intermediate_size": 2432, "num_attention_heads": 10, "num_key_value_heads": 10}
TINY: Final = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
MAX_INCOMING: Final = 4
RECONNECT_S: Final = (0.2, 2.0)
"""Bounds of the pause before a new attempt, drawn."""
SILENT_S: Final = 20.0
"""Without a word from the aggregator for so long a client connects anew."""
HEARTBEAT_S: Final = 5.0


def write_run(path: Path, sizes: Mapping[str, int], *overrides: str) -> ExpansionPlan:
    """What ``fedblocks init`` leaves behind, for a model of these sizes that nobody has."""
    config = run_config.from_mapping(
        {}, ("expansion.blocks=1", f"server.heartbeat_interval_s={HEARTBEAT_S}", *overrides)
    )
    model = {
        "model_type": "llama",
        "vocab_size": 64,
        "num_hidden_layers": 3,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **sizes,
    }
    plan = plan_expansion(base_hash=BASE_HASH, config=model, placement="thirds", num_blocks=1)
    (path / "resources").mkdir(parents=True)
    files = {"plan.json": plan.to_json().encode(), "anchor.bin": b"anchor texts"}
    for name, content in files.items():
        (path / "resources" / name).write_bytes(content)
    (path / "plan.json").write_bytes(files["plan.json"])
    (path / "run.toml").write_text(run_config.to_toml(config), encoding="utf-8")
    infos = [ResourceInfo(name=n, num_bytes=len(c), sha256=hashlib.sha256(c).hexdigest()) for n, c in files.items()]
    described = {
        "run_id": RUN_ID,
        "base_name": "light",
        "base_hash": BASE_HASH,
        "tokenizer_hash": "cd" * 32,
        "created_unix_s": 0.0,
        "resources": to_plain(infos),
    }
    (path / "run.json").write_text(json.dumps(described), encoding="utf-8")
    path.chmod(0o700)
    return plan


def enrol(run: Path, count: int) -> list[tuple[str, str]]:
    """Key pairs of so many clients, all of them enrolled."""
    registry = Registry(run)
    pairs = [(public.decode(), secret.decode()) for public, secret in (zmq.curve_keypair() for _ in range(count))]
    for number, (public, _) in enumerate(pairs):
        registry.enrol(public, f"client-{number:04d}", now_unix_s=1.0)
    return pairs


def profile() -> DeviceProfile:
    """A device that can train anything here."""
    return DeviceProfile(
        device="light",
        source="catalog",
        accelerator="cpu",
        compute_dtype="float32",
        cpu_cores=1,
        memory_usable_bytes=1 << 36,
        runtime_memory_bytes=0,
        gemm_flops_per_s=1e12,
        memory_bytes_per_s=1e11,
        step_overhead_s=1e-4,
        uplink_bytes_per_s=1e8,
        downlink_bytes_per_s=1e8,
        disk_read_bytes_per_s=1e9,
        disk_free_bytes=1 << 40,
        four_bit="ok",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """An update that every client sends in every round; only its names change."""

    delta: Delta
    payload: bytes

    @classmethod
    def of(cls, plan: ExpansionPlan, task: Assignment) -> Update:
        """Drawn values within the aggregator's norm limit, for a task's blocks and format."""
        rng = np.random.default_rng(1)
        deltas = {
            block: {
                spec.name: rng.uniform(-task.learning_rate, task.learning_rate, spec.shape).astype(np.float32)
                for spec in plan.shape.block_tensors(task.width)
            }
            for block in task.blocks
        }
        encoded = encode_delta(
            plan.shape,
            task.blocks,
            deltas,
            {},
            format=task.delta_format,
            density=task.delta_density,
            width=task.width,
        )
        payload = b"".join(encoded.parts)
        report = TrainReport(
            num_target_tokens=1000,
            loss_first=2.0,
            loss_last=1.0,
            anchor_kl=0.01,
            prefix_s=0.0,
            train_s=0.1,
            measure_s=0.0,
            encode_s=0.0,
            step_s=0.01,
            peak_memory_bytes=1 << 20,
            predicted_peak_bytes=1 << 20,
            mode=ExecutionMode(),
            gradient_energy=tuple(1.0 for _ in task.blocks),
        )
        delta = Delta(
            attempt_id=task.attempt_id,
            round=task.round,
            version=task.state.to_version,
            num_examples=100,
            steps=task.steps,
            format=task.delta_format,
            density=task.delta_density,
            width=task.width,
            tensors=encoded.headers,
            payload_bytes=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            train=report,
            measurements=(),
        )
        return cls(delta=delta, payload=payload)

    def answer(self, task: Assignment) -> Delta:
        """The update under the names of a task."""
        return replace(
            self.delta,
            attempt_id=task.attempt_id,
            round=task.round,
            version=task.state.to_version,
            steps=task.steps,
            measurements=measured(task),
        )


def measured(task: Assignment | Evaluate) -> tuple[Measurement, ...]:
    """A score that rises with every version, so that no run stops for want of progress; nothing forgotten."""
    version = task.state.to_version
    strengths = task.strengths if isinstance(task, Evaluate) else (1.0,)
    found: list[Measurement] = []
    for strength in strengths:
        for measure in task.measure:
            right = version if measure == "validation" else 900_000_000
            found.append(
                Measurement(
                    measure=measure,
                    version=version,
                    num_items=1_000_000_000,
                    num_correct=right if measure != "anchor" else 0,
                    num_tokens=1000,
                    kl_sum=0.0,
                    strength=strength,
                )
            )
    return tuple(found)


class _Unkept:
    """Of a payload only length and hash are looked at, by the connection; a light client holds no model."""

    def write(self, data: Bytes) -> None:
        pass

    def finish(self) -> None:
        pass

    def discard(self) -> None:
        pass


@dataclass(slots=True, kw_only=True)
class _Client:
    """One client: its socket and its session."""

    name: str
    pair: tuple[str, str]
    socket: zmq.Socket[bytes] | None = None
    monitor: zmq.Socket[bytes] | None = None
    """Says when the aggregator closes the connection or dies."""
    connection: Connection | None = None
    held_version: int = 0
    unanswered: Assignment | None = None
    """A task whose update was not acknowledged yet."""
    heard_s: float = 0.0
    beat_s: float = 0.0
    retry_s: float = 0.0
    counts: dict[str, int] = field(
        default_factory=lambda: {"welcomed": 0, "accepted": 0, "refused": 0, "connections": 0}
    )
    finished: bool = False


class Clients:
    """All clients of one process, in one loop."""

    def __init__(self, address: str, server_key: str, pairs: Sequence[tuple[str, str]], plan: ExpansionPlan) -> None:
        self._address, self._server_key, self._plan = address, server_key, plan
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._poller = zmq.Poller()
        self._by_socket: dict[zmq.Socket[bytes], _Client] = {}
        self._update: Update | None = None
        self._random = random.Random(os.getpid())
        self.clients = [_Client(name=pair[0][:8], pair=pair) for pair in pairs]

    def run(self) -> list[dict[str, int]]:
        """Until the run is over for all."""
        for client in self.clients:
            self._connect(client)
        while not all(client.finished for client in self.clients):
            for socket, _ in self._poller.poll(200):
                client = self._by_socket.get(socket)  # none: it was left in this turn
                if client is None:
                    continue
                self._receive(client)
                if self._is_lost(client):
                    self._leave(client)
                    client.heard_s = 0.0
            self._keep_alive()
        self._context.destroy(linger=1000)
        return [client.counts for client in self.clients]

    @staticmethod
    def _is_lost(client: _Client) -> bool:
        """libzmq connects again by itself, but what comes then is of a session that this end does not have."""
        return client.monitor is not None and bool(client.monitor.poll(0))

    def _leave(self, client: _Client) -> None:
        if client.socket is None or client.monitor is None:
            return
        for socket in (client.socket, client.monitor):
            self._poller.unregister(socket)
            del self._by_socket[socket]
        client.socket.disable_monitor()
        client.monitor.close(linger=0)
        client.socket.close(linger=0)
        client.socket = client.monitor = None

    def _connect(self, client: _Client) -> None:
        self._leave(client)
        socket = self._context.socket(zmq.DEALER)
        socket.curve_publickey, socket.curve_secretkey = (part.encode() for part in client.pair)
        socket.curve_serverkey = self._server_key.encode()
        socket.set(zmq.RECONNECT_IVL, 500)
        socket.set(zmq.RECONNECT_IVL_MAX, 4000)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.HANDSHAKE_IVL, 60_000)
        client.monitor = socket.get_monitor_socket(zmq.Event.DISCONNECTED)
        socket.connect(self._address)
        client.socket, client.connection = socket, Connection(receives=FROM_AGGREGATOR, max_incoming=MAX_INCOMING)
        client.counts["connections"] += 1
        for one in (socket, client.monitor):
            self._poller.register(one, zmq.POLLIN)
            self._by_socket[one] = client
        now_s = time.monotonic()
        client.heard_s, client.beat_s = now_s, now_s + HEARTBEAT_S * self._random.random()
        self._say(client, self._hello(client))

    def _hello(self, client: _Client) -> Hello:
        return Hello(
            protocol_version=PROTOCOL_VERSION,
            run_id=RUN_ID,
            base_hash=BASE_HASH,
            client_name=client.name,
            software="light",
            profile=profile(),
            statistics=DataStatistics(num_examples=100, num_target_tokens=1000, mean_tokens=10.0, max_tokens=16),
            held_version=client.held_version,
            can_evaluate_general=False,
        )

    def _keep_alive(self) -> None:
        now_s = time.monotonic()
        for client in self.clients:
            if client.finished:
                continue
            if now_s - client.heard_s > SILENT_S:
                if client.retry_s == 0.0:
                    client.retry_s = now_s + self._random.uniform(*RECONNECT_S)
                elif now_s >= client.retry_s:
                    client.retry_s = 0.0
                    self._connect(client)
            elif now_s >= client.beat_s:
                client.beat_s = now_s + HEARTBEAT_S
                attempt = client.unanswered.attempt_id if client.unanswered is not None else None
                self._say(client, Heartbeat(attempt_id=attempt, phase="training", steps_done=0))

    def _say(self, client: _Client, message: Message, payload: bytes | None = None) -> None:
        assert client.connection is not None
        client.connection.send(message, None if payload is None else open_source(payload))
        self._flush(client)

    def _flush(self, client: _Client) -> None:
        assert client.connection is not None
        assert client.socket is not None
        client.connection.grant()
        while (outbound := client.connection.next_outbound()) is not None:
            client.socket.send_multipart(list(outbound.frames), copy=False)

    def _receive(self, client: _Client) -> None:
        socket, connection = client.socket, client.connection
        assert socket is not None
        assert connection is not None
        while not client.finished and socket.poll(0):
            frames = [frame.buffer for frame in socket.recv_multipart(copy=False)]
            client.heard_s = time.monotonic()
            try:
                events = connection.receive(frames)
            except RemoteProtocolError:
                if not self._is_lost(client):
                    raise
                return
            for event in events:
                match event:
                    case MessageArrived(message=message):
                        self._heard(client, message)
                    case PayloadAnnounced(transfer=transfer):
                        for done in connection.accept(transfer, _Unkept()):
                            if isinstance(done, PayloadArrived):
                                self._heard(client, done.message)
                    case PayloadArrived(message=message):
                        self._heard(client, message)
                    case _ if self._is_lost(client):
                        return
                    case _:
                        raise RuntimeError(f"{client.name}: {event}")
            self._flush(client)

    def _heard(self, client: _Client, message: Message) -> None:
        match message:
            case Welcome():
                client.counts["welcomed"] += 1
                self._say(client, Ready())
                if client.unanswered is not None:
                    self._send_update(client, client.unanswered)
            case Assignment():
                client.held_version, client.unanswered = message.state.to_version, message
                self._send_update(client, message)
            case Evaluate():
                client.held_version = message.state.to_version
                report = Report(attempt_id=message.attempt_id, round=message.round, measurements=measured(message))
                self._say(client, report)
            case Ack():
                client.counts["accepted"] += 1
                client.unanswered = None
            case Refused():
                client.counts["refused"] += 1
                client.unanswered = None
            case Goodbye(finished=True):
                client.finished = True
            case Goodbye():
                client.heard_s = 0.0  # the aggregator goes: connect again
            case _:
                pass

    def _send_update(self, client: _Client, task: Assignment) -> None:
        if self._update is None:
            self._update = Update.of(self._plan, task)
        self._say(client, self._update.answer(task), self._update.payload)


class Fleet:
    """Processes of light clients."""

    def __init__(
        self, address: str, server_key: str, pairs: Sequence[tuple[str, str]], plan: ExpansionPlan, processes: int
    ) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        for number in range(processes):
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONSAFEPATH": "1"},
                text=True,
            )
            assert process.stdin is not None
            spec = {"address": address, "key": server_key, "pairs": pairs[number::processes], "plan": plan.to_json()}
            process.stdin.write(json.dumps(spec) + "\n")
            process.stdin.flush()
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [process.pid for process in self._processes]

    def wait(self) -> dict[str, Any]:
        """What all clients counted, when the run is over; and what their processes took."""
        found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in self._processes]
        clients = [client for one in found for client in one["clients"]]
        return {
            "clients": len(clients),
            "welcomed": sum(client["welcomed"] > 0 for client in clients),
            "accepted_by_client": [client["accepted"] for client in clients],
            "refused": sum(client["refused"] for client in clients),
            "connections": sum(client["connections"] for client in clients),
            "processes": len(found),
            "peak_rss_bytes": [one["peak_rss_bytes"] for one in found],
            "descriptors": [one["descriptors"] for one in found],
        }

    def kill(self) -> None:
        """Ends what is still there."""
        for process in self._processes:
            process.kill()
            process.wait()


def main() -> None:
    """A process of clients: reads its part from stdin, prints what it counted."""
    spec = json.loads(sys.stdin.readline())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    pairs = [(public, secret) for public, secret in spec["pairs"]]
    clients = Clients(spec["address"], spec["key"], pairs, ExpansionPlan.from_json(spec["plan"].encode()))
    counts = clients.run()
    found = {
        "clients": counts,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "descriptors": psutil.Process().num_fds(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
