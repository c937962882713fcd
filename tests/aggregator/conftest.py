"""A whole run without sockets: a run folder, an aggregator on a clock of the test's own, and sites that really encode.

The sites' "training" is a function of seed, client and version, so that two runs with the same accepted updates must
end in the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedblocks.aggregator.endpoint import (
    ByteCount,
    EndpointEvent,
    MessageReceived,
    UploadAnnounced,
    UploadFailed,
    UploadFinished,
    UploadId,
)
from fedblocks.aggregator.ledger import open_ledger
from fedblocks.aggregator.run_folder import open_run_folder
from fedblocks.aggregator.server import Aggregator
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.model_shape import ChosenRows
from fedblocks.profiles.units import personal_pairs, unit_tensors
from fedblocks.protocol import run_config
from fedblocks.protocol.codec import to_plain
from fedblocks.protocol.errors import RefusalCode
from fedblocks.protocol.expansion import ExpansionPlan, Placement, plan_expansion
from fedblocks.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Assignment,
    AttemptId,
    ClientKey,
    DataStatistics,
    Delta,
    Evaluate,
    FailureReason,
    Goodbye,
    Heartbeat,
    Hello,
    Measurement,
    Message,
    Probe,
    ProbeRow,
    Ready,
    Refused,
    Report,
    ResourceInfo,
    TrainReport,
    Welcome,
)
from fedblocks.protocol.method_plan import plan_of
from fedblocks.protocol.row_mask import choose_rows
from fedblocks.protocol.state import apply_update
from fedblocks.protocol.tensors import cut, encode_delta, pad

BASE_HASH = "ab" * 32
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def tiny_plan(blocks: int = 3, placement: Placement = "thirds") -> ExpansionPlan:
    return plan_expansion(base_hash=BASE_HASH, config=CONFIG, placement=placement, num_blocks=blocks)


def write_run_folder(path: Path, *overrides: str) -> Path:
    """What ``fedblocks init`` leaves behind, for a model that nobody has."""
    config = run_config.from_mapping({}, ("allocation.deadline_s=60.0", *overrides))
    (path / "resources").mkdir(parents=True)
    plan = plan_of(config, base_hash=BASE_HASH, model_config=CONFIG).to_json().encode()
    files = {"plan.json": plan, "anchor.bin": b"anchor texts"}
    for name, content in files.items():
        (path / "resources" / name).write_bytes(content)
    (path / "plan.json").write_bytes(plan)
    (path / "run.toml").write_text(run_config.to_toml(config))
    resources = [ResourceInfo(name=n, num_bytes=len(c), sha256=hashlib.sha256(c).hexdigest()) for n, c in files.items()]
    described = {
        "run_id": "tiny-run",
        "base_name": "tiny",
        "base_hash": BASE_HASH,
        "tokenizer_hash": "cd" * 32,
        "created_unix_s": 0.0,
        "resources": to_plain(resources),
    }
    (path / "run.json").write_text(json.dumps(described))
    return path


def profile(device: str = "test-device", memory_bytes: int = 1 << 30) -> DeviceProfile:
    return DeviceProfile(
        device=device,
        source="catalog",
        accelerator="cpu",
        compute_dtype="float32",
        cpu_cores=1,
        memory_usable_bytes=memory_bytes,
        runtime_memory_bytes=0,
        gemm_flops_per_s=1e9,
        memory_bytes_per_s=1e9,
        step_overhead_s=0.001,
        uplink_bytes_per_s=1e6,
        downlink_bytes_per_s=1e6,
        disk_read_bytes_per_s=1e8,
        disk_free_bytes=1 << 30,
        four_bit="ok",
    )


class FakeEndpoint:
    """The endpoint's interface; messages come from the sites at once and in the order in which they are put in."""

    def __init__(self) -> None:
        self.inbox: list[EndpointEvent] = []
        self.sent: list[tuple[ClientKey, Message, bytes]] = []
        self.bytes_by_key: dict[ClientKey, ByteCount] = {}
        self.payloads: dict[UploadId, bytes] = {}
        self.announced: dict[UploadId, tuple[ClientKey, Delta]] = {}
        self.before_send: Callable[[Message], None] = lambda message: None

    def poll(self, timeout_s: float) -> list[EndpointEvent]:
        events, self.inbox = self.inbox, []
        return events

    def send(self, key: ClientKey, message: Message, payload: bytes | Path = b"") -> bool:
        self.before_send(message)
        data = payload.read_bytes() if isinstance(payload, Path) else bytes(payload)
        count = self.bytes_by_key.setdefault(key, ByteCount())
        count.sent += len(data) + 100
        self.sent.append((key, message, data))
        return True

    def announce(self, key: ClientKey, delta: Delta, payload: bytes) -> UploadId:
        upload_id = UploadId(len(self.announced) + 1)
        self.payloads[upload_id] = payload
        self.announced[upload_id] = (key, delta)
        self.inbox.append(UploadAnnounced(key=key, message=delta, upload_id=upload_id))
        return upload_id

    def accept_upload(self, upload_id: UploadId, part_path: Path) -> None:
        key, delta = self.announced[upload_id]
        payload = self.payloads[upload_id]
        self.bytes_by_key.setdefault(key, ByteCount()).received += len(payload)
        code: RefusalCode | None = None
        if len(payload) != delta.payload_bytes:
            code = "length_mismatch"
        elif hashlib.sha256(payload).hexdigest() != delta.payload_sha256:
            code = "checksum_mismatch"
        if code is not None:
            self.inbox.append(UploadFailed(key=key, upload_id=upload_id, code=code, text="other bytes than announced"))
            self.send(key, Refused(code=code, text="other bytes than announced", attempt_id=delta.attempt_id))
            return
        part_path.write_bytes(payload)
        self.inbox.append(UploadFinished(key=key, message=delta, upload_id=upload_id, path=part_path))

    def refuse_upload(self, upload_id: UploadId, refused: Refused) -> None:
        self.send(self.announced[upload_id][0], refused)


@dataclass
class Site:
    """A client that encodes a made-up change and keeps its residual by the rules."""

    name: str
    world: World
    num_examples: int = 100
    memory_bytes: int = 1 << 30
    key: ClientKey = ClientKey("")
    held_version: int = 0
    held: dict[int, dict[str, Any]] = field(default_factory=dict)
    residual: dict[int, dict[str, Any]] = field(default_factory=dict)
    staged: dict[AttemptId, tuple[Delta, bytes, dict[int, dict[str, Any]]]] = field(default_factory=dict)
    acked: list[AttemptId] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    tasks: list[Assignment | Evaluate | Probe] = field(default_factory=list)
    welcome: Welcome | None = None
    goodbye: Goodbye | None = None
    accuracy: Callable[[int], float] = lambda version: 0.5
    kl: Callable[[int], float] = lambda version: 0.001 * version
    can_evaluate_general: bool = False
    scale: float = 1.0
    direction: int | None = None
    """Of its changes; sites of the same direction belong together. None: any."""
    gains: dict[int, float] = field(default_factory=dict)
    """Block -> nats per token that a probe finds at full strength."""

    def tried(self, block: int, strength: float) -> ProbeRow:
        """What a probe finds of a block."""
        nll = 3.0 - strength * self.gains.get(block, 0.1)
        return ProbeRow(
            block=block,
            strength=strength,
            nll_sum=100 * nll,
            num_tokens=100,
            kl_sum=strength * 1.0,
            num_anchor_tokens=100,
        )

    def __post_init__(self) -> None:
        self.key = ClientKey((self.name * 40)[:40])

    def say(self, message: Message) -> None:
        self.world.endpoint.inbox.append(MessageReceived(key=self.key, message=message))

    def hello(self, **changes: Any) -> None:
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            run_id="tiny-run",
            base_hash=BASE_HASH,
            client_name=self.name,
            software="test",
            profile=profile(memory_bytes=self.memory_bytes),
            statistics=DataStatistics(
                num_examples=self.num_examples, num_target_tokens=1000, mean_tokens=10.0, max_tokens=16
            ),
            held_version=self.held_version,
            can_evaluate_general=self.can_evaluate_general,
        )
        self.say(replace(hello, **changes))

    def heartbeat(self, attempt_id: AttemptId | None = None, phase: str = "idle") -> None:
        self.say(Heartbeat(attempt_id=attempt_id, phase=phase, steps_done=0))

    def receive(self) -> None:
        """Take everything that was sent to this site; keep tasks, apply states, commit or discard on the answers."""
        mine = [(m, p) for k, m, p in self.world.endpoint.sent if k == self.key]
        self.world.endpoint.sent = [item for item in self.world.endpoint.sent if item[0] != self.key]
        for message, payload in mine:
            match message:
                case Welcome():
                    self.welcome = message
                    self.say(Ready())
                    for delta, data, _ in self.staged.values():
                        self.world.endpoint.announce(self.key, delta, data)
                case Assignment() | Evaluate() | Probe():
                    self._take(message, payload)
                case Ack(attempt_id=attempt_id):
                    self.acked.append(attempt_id)
                    if attempt_id in self.staged:
                        self._owe(self.staged.pop(attempt_id)[2])
                case Refused(attempt_id=attempt_id):
                    self.refused.append(message)
                    if attempt_id is not None and message.code not in ("no_space", "over_quota"):
                        self.staged.pop(attempt_id, None)
                case Goodbye():
                    self.goodbye = message
                case _:
                    pass

    def _owe(self, residuals: dict[int, dict[str, Any]]) -> None:
        """An accepted update's residual replaces its slices."""
        units = self.world.plan.units
        if personal_pairs(units):
            return
        for block, tensors in residuals.items():
            specs = {spec.name: spec.shape for spec in unit_tensors(units, block)}
            owed = self.residual.setdefault(block, {})
            for name, values in tensors.items():
                whole = np.array(owed[name]) if name in owed else pad(np.zeros_like(values), specs[name])
                cut(whole, values.shape)[...] = values
                owed[name] = whole

    def _take(self, task: Assignment | Evaluate | Probe, payload: bytes) -> None:
        if any(t.attempt_id == task.attempt_id for t in self.tasks):
            return  # at work on it
        assert len(payload) == task.payload_bytes
        assert hashlib.sha256(payload).hexdigest() == task.payload_sha256
        plan = self.world.plan
        held = self.held if task.state.from_version == self.held_version else {}
        self.held = apply_update(held, task.state, payload, shape=plan.units.held(), blocks=plan.unit_ids)
        self.held_version = task.state.to_version
        self.tasks.append(task)

    def measurements(self, task: Assignment | Evaluate) -> tuple[Measurement, ...]:
        """KL and the part of the accuracy that was learnt grow with the strength."""
        strengths = task.strengths if isinstance(task, Evaluate) else (1.0,)
        return tuple(m for g in strengths for m in self._measurements(task, g))

    def _measurements(self, task: Assignment | Evaluate, strength: float) -> tuple[Measurement, ...]:
        version = task.state.to_version
        found: list[Measurement] = []
        for measure in task.measure:
            match measure:
                case "anchor":
                    kl = 1000 * strength * self.kl(version)
                    m = Measurement(
                        measure=measure,
                        version=version,
                        num_items=10,
                        num_tokens=1000,
                        kl_sum=kl,
                        kl_square_sum=kl**2 / 10,
                    )
                case "validation":
                    right = round(1000 * strength * self.accuracy(version))
                    m = Measurement(
                        measure=measure, version=version, num_items=1000, num_correct=right, num_tokens=1000
                    )
                case "general":
                    m = Measurement(
                        measure=measure, version=version, num_items=100, num_correct=90 - round(strength * version)
                    )
            found.append(replace(m, strength=strength))
        return tuple(found)

    def train(self, task: Assignment, **changes: Any) -> tuple[Delta, bytes]:
        """The task's update; staged until it is answered. Trained twice it is the same."""
        if task.attempt_id in self.staged:
            delta, payload, _ = self.staged[task.attempt_id]
            return replace(delta, **changes), payload
        seed = hashlib.sha256(f"{task.seed}/{self.key}/{task.state.to_version}".encode()).digest()
        rng = np.random.default_rng(list(seed))
        step = self.scale * task.learning_rate
        deltas = {
            block: {
                spec.name: rng.uniform(-step, step, spec.shape).astype(np.float32)
                for spec in unit_tensors(self.world.plan.units, block, task.width)
            }
            for block in task.blocks
        }
        units = self.world.plan.units
        if self.direction is not None:
            common = np.random.default_rng(self.direction)
            for spec in unit_tensors(units, task.blocks[0], task.width):
                shared = common.uniform(-step, step, spec.shape).astype(np.float32)
                for tensors in deltas.values():
                    tensors[spec.name] = (0.2 * tensors[spec.name] + 0.8 * shared).astype(np.float32)
        chosen = {
            block: {
                spec.name: choose_rows(
                    np.zeros(spec.num_rows, dtype=np.float32),
                    task.width,
                    client=self.key,
                    round=task.round,
                    matrix=f"{block}/{spec.name}",
                )
                for spec in unit_tensors(units, block, task.width)
                if isinstance(spec, ChosenRows)
            }
            for block in task.blocks
        }
        encoded = encode_delta(
            self.world.plan.units,
            task.blocks,
            deltas,
            {} if personal_pairs(units) else self.residual,
            format=task.delta_format,
            density=task.delta_density,
            cap=3 * task.learning_rate * task.steps,
            width=task.width,
            chosen=chosen,
        )
        payload = b"".join(encoded.parts)
        report = TrainReport(
            num_target_tokens=1000,
            loss_first=2.0,
            loss_last=1.0,
            anchor_kl=0.01,
            prefix_s=0.1,
            train_s=1.0,
            measure_s=0.1,
            encode_s=0.1,
            step_s=0.05,
            peak_memory_bytes=1 << 20,
            predicted_peak_bytes=task.predicted_peak_bytes,
            mode=ExecutionMode(),
            gradient_energy=tuple(1.0 for _ in task.blocks),
        )
        delta = Delta(
            attempt_id=task.attempt_id,
            round=task.round,
            version=task.state.to_version,
            num_examples=self.num_examples,
            steps=task.steps,
            format=task.delta_format,
            density=task.delta_density,
            width=task.width,
            tensors=encoded.headers,
            payload_bytes=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            train=report,
            measurements=self.measurements(task),
        )
        self.staged[task.attempt_id] = (delta, payload, encoded.residuals)
        return replace(delta, **changes), payload

    def work(self) -> None:
        """Answer the newest task: announce the update, or report."""
        task = self.tasks[-1]
        if isinstance(task, Probe):
            rows = [self.tried(block, g) for block in task.candidates for g in task.strengths]
            self.say(Report(attempt_id=task.attempt_id, round=task.round, probed=tuple(rows)))
        elif isinstance(task, Assignment):
            self.world.endpoint.announce(self.key, *self.train(task))
        else:
            self.say(Report(attempt_id=task.attempt_id, round=task.round, measurements=self.measurements(task)))

    def fail(self, reason: FailureReason) -> None:
        task = self.tasks[-1]
        self.say(Report(attempt_id=task.attempt_id, round=task.round, failure=reason, text="as the test wants"))


class World:
    """One run folder, one aggregator at a time, and its sites."""

    def __init__(self, path: Path, *names: str, overrides: Sequence[str] = (), gather_s: float = 10.0) -> None:
        self.path = path if (path / "run.json").exists() else write_run_folder(path, *overrides)
        self.plan = ExpansionPlan.from_json((self.path / "plan.json").read_text())
        self.now_s = 1000.0
        self.wall_s = 5e8
        self.gather_s = gather_s
        self.lines: list[str] = []
        self.sites = {name: Site(name=name, world=self) for name in names}
        self.start()

    def start(self) -> None:
        """A new aggregator process on the folder; the one before was killed."""
        self.endpoint = FakeEndpoint()
        self.folder = open_run_folder(self.path)
        self.ledger = open_ledger(self.folder.ledger_path, self.folder.identity())
        self.aggregator = Aggregator(
            self.folder,
            self.ledger,
            self.endpoint,
            roster=[(site.key, site.name) for site in self.sites.values()],
            clock=lambda: self.now_s,
            wall_clock=lambda: self.wall_s,
            on_event=self.lines.append,
            gather_s=self.gather_s,
        )

    def kill(self) -> None:
        """What has not been committed is lost, and all that was sent and not received."""
        self.ledger.close()

    def step(self, seconds: float = 0.0) -> None:
        """Time passes, and the aggregator deals with all that has come."""
        self.now_s += seconds
        self.aggregator.step(0.0)
        while self.endpoint.inbox:
            self.aggregator.step(0.0)

    def join(self, *names: str) -> None:
        for name in names or self.sites:
            self.sites[name].hello()
        for _ in range(2):  # the second time for the answers to what lay in the outbox
            self.step()
            self.receive()

    def receive(self) -> None:
        for site in self.sites.values():
            site.receive()

    def round(self, *order: str) -> None:
        """Everybody answers the newest task, in this order."""
        for name in order or self.sites:
            self.sites[name].work()
        self.step()
        self.receive()

    def finish(self, limit: int = 50) -> None:
        """Everybody answers whatever task is open, until the run is over."""
        for _ in range(limit):
            if self.aggregator.finished:
                return
            for site in self.sites.values():
                done = {*site.acked, *(r.attempt_id for r in site.refused)}
                if site.tasks and site.tasks[-1].attempt_id not in done:
                    site.work()
            self.step(0.5)
            self.receive()
        raise AssertionError(f"the run does not end; it waits for {self.ledger.get_run('waiting_for')}")


@pytest.fixture
def make_world(tmp_path: Path) -> Callable[..., World]:
    """A factory: ``make_world("ann", "bob", overrides=[...], folder="run")``."""

    def make(*names: str, folder: str = "run", overrides: Sequence[str] = (), gather_s: float = 10.0) -> World:
        return World(tmp_path / folder, *names, overrides=overrides, gather_s=gather_s)

    return make


@pytest.fixture(scope="session")
def make_world_at() -> Callable[..., World]:
    """The same for a folder that outlives a test: ``make_world_at(folder, "ann", overrides=[...])``."""

    def make(folder: Path, *names: str, overrides: Sequence[str] = ()) -> World:
        return World(folder / "run", *names, overrides=overrides)

    return make


@pytest.fixture(scope="session")
def undisturbed_sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Final state of ann's and bob's three rounds when nothing goes wrong."""
    world = World(tmp_path_factory.mktemp("undisturbed") / "run", "ann", "bob", overrides=("run.max_rounds=3",))
    world.join()
    world.finish()
    return world.aggregator.published_sha256


@pytest.fixture(scope="session")
def without_eve_sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    """State after the first round of ann and bob, in which eve had a task and sent nothing."""
    world = World(tmp_path_factory.mktemp("without-eve") / "run", "ann", "bob", "eve")
    world.join()
    world.sites["eve"].fail("internal")
    world.round("ann", "bob")
    return world.aggregator.published_sha256
