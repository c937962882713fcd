"""The aggregator process over real encrypted sockets, with clients that encode but do not train."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import zmq

from fedblocks.aggregator.auth import Registry, load_or_create_server_keys
from fedblocks.aggregator.ledger import LedgerError, open_read_only
from fedblocks.aggregator.replay import replay
from fedblocks.aggregator.run_folder import read_run_folder
from fedblocks.aggregator.status import run_status
from fedblocks.edge_client import transport as t
from fedblocks.edge_client.transport import Transport
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.profiles.device import DeviceProfile
from fedblocks.protocol.keys import KeyPair
from fedblocks.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Assignment,
    AttemptId,
    ClientKey,
    DataStatistics,
    Delta,
    Evaluate,
    Goodbye,
    Hello,
    Measurement,
    Ready,
    Report,
    TrainReport,
    Welcome,
)
from fedblocks.protocol.state import apply_update
from fedblocks.protocol.tensors import encode_delta

SERVE = """
import resource
import sys
from pathlib import Path
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
from fedblocks.aggregator.server import serve
code = serve(Path(sys.argv[1]), on_event=lambda line: print(line, flush=True))
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.exit(code)
"""


class PayloadClient(threading.Thread):
    """One site: greets, answers every task after ``work_s``, announces again what was not acknowledged."""

    def __init__(self, name: str, run: Path, address: str, *, work_s: float) -> None:
        super().__init__(name=name, daemon=True)
        self.folder = read_run_folder(run)
        public, secret = zmq.curve_keypair()
        self.keys = KeyPair(public=ClientKey(public.decode()), secret=secret.decode())
        self.run_path, self.address, self.work_s = run, address, work_s
        self.work_until = time.monotonic() + 120.0
        self.held: dict = {}
        self.held_version = 0
        self.outbox: tuple[Delta, bytes] | None = None
        self.done: set[AttemptId] = set()
        self.resends = 0
        self.finished = False
        self.error: BaseException | None = None
        Registry(run).enrol(self.keys.public, name, now_unix_s=time.time())

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - told by the test that joins
            self.error = error

    def _run(self) -> None:
        server_key = load_or_create_server_keys(self.run_path).public
        transport = Transport(
            self.address,
            server_key=server_key,
            key_pair=self.keys,
            heartbeat_interval_s=0.3,
            connect_timeout_s=60.0,
            backoff_s=(0.1, 0.3),
            seed=1,
        )
        try:
            while not self.finished and time.monotonic() < self.work_until:
                event = transport.get(0.1)
                match event:
                    case t.Connected():
                        transport.send(self._hello())
                    case t.Received(message=Welcome()):
                        transport.send(Ready())
                        if self.outbox is not None:
                            self.resends += 1
                            transport.send(*self.outbox)
                    case t.Received(message=(Assignment() | Evaluate()) as task, payload=payload):
                        self._work(transport, task, payload or b"")
                    case t.Received(message=Ack(attempt_id=attempt_id)):
                        self.done.add(attempt_id)
                        if self.outbox is not None and self.outbox[0].attempt_id == attempt_id:
                            self.outbox = None
                    case t.Received(message=Goodbye(finished=True)):
                        self.finished = True
                    case t.Problem(fatal=True, text=text):
                        raise AssertionError(text)
                    case _:
                        pass
        finally:
            transport.close()

    def _hello(self) -> Hello:
        profile = DeviceProfile(
            device="payload-only", source="catalog", accelerator="cpu", compute_dtype="float32", cpu_cores=1,
            memory_usable_bytes=2**32, runtime_memory_bytes=0, gemm_flops_per_s=1e12, memory_bytes_per_s=1e12,
            step_overhead_s=0.0, uplink_bytes_per_s=1e8, downlink_bytes_per_s=1e8, disk_read_bytes_per_s=1e9,
            disk_free_bytes=2**33, four_bit="ok",
        )  # fmt: skip
        return Hello(
            protocol_version=PROTOCOL_VERSION,
            run_id=self.folder.info.run_id,
            base_hash=self.folder.info.base_hash,
            client_name=self.name,
            software="test",
            profile=profile,
            statistics=DataStatistics(num_examples=50, num_target_tokens=100, mean_tokens=8.0, max_tokens=8),
            held_version=self.held_version,
            can_evaluate_general=False,
        )

    def _work(self, transport: Transport, task: Assignment | Evaluate, payload: bytes) -> None:
        if task.attempt_id in self.done or (self.outbox and self.outbox[0].attempt_id == task.attempt_id):
            return
        plan = self.folder.plan
        held = self.held if task.state.from_version == self.held_version else {}
        self.held = apply_update(held, task.state, payload, shape=plan.shape, blocks=plan.block_ids)
        self.held_version = task.state.to_version
        version = self.held_version
        anchor = Measurement(measure="anchor", version=version, num_tokens=100, kl_sum=0.01 * version)
        if isinstance(task, Evaluate):
            transport.send(Report(attempt_id=task.attempt_id, round=task.round, measurements=(anchor,)))
            return
        transport.set_status(attempt_id=task.attempt_id, phase="training", steps_done=0)
        time.sleep(self.work_s)
        transport.set_status(attempt_id=None, phase="idle", steps_done=0)
        rng = np.random.default_rng([version, *self.name.encode()])
        deltas = {
            b: {
                s.name: rng.normal(0, task.learning_rate, s.shape).astype(np.float32)
                for s in plan.shape.block_tensors()
            }
            for b in task.blocks
        }
        encoded = encode_delta(
            plan.shape, task.blocks, deltas, {}, format=task.delta_format, density=task.delta_density
        )
        data = b"".join(encoded.parts)
        report = TrainReport(
            num_target_tokens=100, loss_first=2.0, loss_last=1.0, anchor_kl=0.0, prefix_s=0.0, train_s=self.work_s,
            measure_s=0.0, encode_s=0.0, step_s=self.work_s / task.steps, peak_memory_bytes=1, predicted_peak_bytes=1,
            mode=ExecutionMode(),
            gradient_energy=(1.0,) * len(task.blocks),
        )  # fmt: skip
        delta = Delta(
            attempt_id=task.attempt_id, round=task.round, version=version, num_examples=50, steps=task.steps,
            format=task.delta_format, density=task.delta_density, tensors=encoded.headers, payload_bytes=len(data),
            payload_sha256=hashlib.sha256(data).hexdigest(), train=report, measurements=(anchor,),
        )  # fmt: skip
        self.outbox = (delta, data)
        transport.send(delta, data)


@contextmanager
def serving(run: Path, *limit: str) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(run), *limit],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prepared(make_run: Callable[..., tuple[Path, Path]], *overrides: str) -> tuple[Path, str]:
    address = f"tcp://127.0.0.1:{free_port()}"
    run, _ = make_run(
        f"server.bind={address}",
        "server.heartbeat_interval_s=0.3",
        "server.keep_updates=true",
        "allocation.deadline_s=30.0",
        "allocation.min_cohort=3",
        *overrides,
    )
    load_or_create_server_keys(run)
    return run, address


def joined(clients: list[PayloadClient], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    for client in clients:
        client.join(max(0.1, until - time.monotonic()))
        if client.error is not None:
            raise client.error
        assert client.finished, f"{client.name} was not told that the run is finished"


def test_three_clients_federate_over_curve_and_a_replay_of_the_ledger_gives_the_same_bits(make_run) -> None:
    run, address = prepared(make_run, "run.max_rounds=3")
    clients = [PayloadClient(name, run, address, work_s=0.05) for name in ("ann", "bob", "cid")]
    with serving(run) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving ")
        at_rest_bytes = psutil.Process(process.pid).memory_info().rss
        for client in clients:
            client.start()
        joined(clients)
        assert process.wait(timeout=20) == 0, process.stdout.read()
    assert at_rest_bytes < 80e6
    replayed = replay(run)
    assert [r.num_updates for r in replayed] == [3, 3, 3]
    assert all(r.equal for r in replayed)
    final = json.loads((run / "state" / "final.json").read_text())
    assert final["state_sha256"] == replayed[-1].state_sha256
    assert final["kl"] == pytest.approx(0.0003)
    status = run_status(run)
    assert status["phase"] == "finished"
    assert all(c["bytes_up"] > 0 and c["bytes_down"] > 0 for c in status["clients"])


def test_the_aggregator_is_killed_again_and_again_in_mid_round_and_every_update_counts_once(make_run) -> None:
    run, address = prepared(make_run, "run.max_rounds=6")
    clients = [PayloadClient(name, run, address, work_s=w) for name, w in (("ann", 0.1), ("bob", 0.25), ("cid", 0.4))]
    kills = 0
    for client in clients:
        client.start()
    while True:
        with serving(run) as process:
            if kills < 4:
                wait_for_updates(run, process, at_least=1 + 3 * kills)
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                continue
            joined(clients)
            assert process.wait(timeout=20) == 0
            break
    replayed = replay(run)
    assert [r.round for r in replayed] == [1, 2, 3, 4, 5, 6]
    assert all(r.equal for r in replayed)
    ledger = open_read_only(run / "ledger.sqlite")
    assert ledger.num_updates() == sum(r.num_updates for r in replayed) == 18
    final = json.loads((run / "state" / "final.json").read_text())
    assert final["state_sha256"] == replayed[-1].state_sha256


def wait_for_updates(run: Path, process: subprocess.Popen[str], *, at_least: int) -> None:
    """Until so many updates are durable."""
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        assert process.poll() is None
        if (run / "ledger.sqlite").exists():
            # Its tables are not there in the first moment.
            with (
                contextlib.suppress(LedgerError, sqlite3.OperationalError),
                contextlib.closing(open_read_only(run / "ledger.sqlite")) as ledger,
            ):
                if ledger.num_updates() >= at_least:
                    return
        time.sleep(0.02)
    raise AssertionError(f"{at_least} updates did not arrive")


def test_ctrl_c_stops_the_aggregator_resumably_and_tells_the_clients(make_run) -> None:
    run, address = prepared(make_run, "run.max_rounds=3")
    clients = [PayloadClient(name, run, address, work_s=0.3) for name in ("ann", "bob", "cid")]
    for client in clients:
        client.start()
    with serving(run) as process:
        wait_for_updates(run, process, at_least=2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 7
    assert run_status(run)["phase"] == "stopped"
    with serving(run) as process:
        joined(clients)
        assert process.wait(timeout=20) == 0
    assert all(r.equal for r in replay(run))


def test_the_stop_verb_stops_the_aggregator_resumably_and_the_status_page_shows_the_run(make_run) -> None:
    port = free_port()
    run, address = prepared(make_run, "run.max_rounds=10", f"server.metrics_address=127.0.0.1:{port}")
    fedblocks = str(Path(sys.executable).parent / "fedblocks")
    nobody = subprocess.run([fedblocks, "stop", str(run)], capture_output=True, text=True)
    assert nobody.returncode == 2
    assert "is not being served" in nobody.stderr
    clients = [PayloadClient(name, run, address, work_s=0.3) for name in ("ann", "bob", "cid")]
    for client in clients:
        client.start()
    with serving(run) as process:
        wait_for_updates(run, process, at_least=2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b'fedblocks_phase{phase="running"} 1' in answer.read()
        done = subprocess.run([fedblocks, "stop", str(run)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert process.wait(timeout=5) == 7
    assert not (run / "stop.request").exists()
    (run / "stop.request").touch()  # left by a stop that was killed: serving anew forgets it
    with serving(run) as process:
        joined(clients)
        assert process.wait(timeout=20) == 0
    assert all(r.equal for r in replay(run))


@pytest.mark.parametrize(("blocks", "file"), [(1, "ledger.sqlite"), (3, "state/v00001")])
def test_a_full_disk_ends_with_exit_code_7_one_line_that_names_the_file_and_nothing_lost(
    make_run, blocks: int, file: str
) -> None:
    run, address = prepared(make_run, "run.max_rounds=4", f"expansion.blocks={blocks}")
    # No file may become larger: the state of three blocks is, that of one is not and the ledger's log soon is.
    limit = 250_000 if blocks == 1 else 12 * read_run_folder(run).plan.shape.block_parameters
    clients = [PayloadClient(name, run, address, work_s=0.05) for name in ("ann", "bob", "cid")]
    for client in clients:
        client.start()
    with serving(run, str(limit)) as process:
        assert process.wait(timeout=60) == 7
        assert process.stdout is not None
        said = process.stdout.read()
    last = said.splitlines()[-1]
    assert last.startswith(str(run / file)), said
    assert last.endswith("nothing that was acknowledged is lost, serve again to go on")
    assert "Traceback" not in said
    with contextlib.closing(open_read_only(run / "ledger.sqlite")) as ledger:
        promised = ledger.num_updates()
    with serving(run) as process:
        joined(clients)
        assert process.wait(timeout=20) == 0
    replayed = replay(run)
    assert all(r.equal for r in replayed)
    assert sum(r.num_updates for r in replayed) == 12 >= promised


def test_a_disk_that_is_full_from_the_start_is_one_line_and_exit_code_7(make_run) -> None:
    run, _ = prepared(make_run)
    with serving(run, "1000") as process:
        assert process.wait(timeout=60) == 7
        assert process.stdout is not None
        said = process.stdout.read().splitlines()
    assert len(said) == 1
    assert said[0].startswith(str(run))
