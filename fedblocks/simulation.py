"""What would a run do on a fleet that nobody has here? The real aggregator, real sessions, sockets and training, on a
clock that the cost model moves.

Everything happens in the order of virtual time; between two moments all messages under way are delivered, and the tasks
that begin at one moment, which do not depend on each other, are carried out. So the same seed gives the same run, to
the bit, in however many processes. Every client has a session, a socket and a folder of its own; base layers, hidden
states and teacher records, which are the same for all, are held once in each process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import zmq

from fedblocks.fleet_file import SHAPES, Event, Fleet, Group
from fedblocks.profiles.device import DeviceProfile
from fedblocks.protocol.expansion import ExpansionError, ExpansionPlan
from fedblocks.protocol.keys import KeyPair
from fedblocks.protocol.messages import ClientKey
from fedblocks.protocol.method_plan import plan_of
from fedblocks.protocol.run_config import ConfigError, RunConfig

if TYPE_CHECKING:
    from fedblocks.virtual_client import Costs, Span, Task, VirtualClient

MARKER: Final = ".fedblocks-simulation"
SUBFOLDERS: Final = ("run", "sites", "data")
START_UNIX_S: Final = 1_800_000_000.0
"""Wall clock of the books at virtual time 0."""
QUIET_TIMEOUT_S: Final = 60.0
"""Real seconds after which messages that do not arrive are an error."""
SETTLE_S: Final = 0.0002
R_BYTES: Final = 1 << 20
FREE_BYTES: Final = 1 << 40
"""Memory of the arithmetic where the costs, and so the limits, are those of another model."""
SHARED_FOLDER: Final = ".shared"
"""Of the 4-bit base layers, which are the same for all clients; no group's name begins so."""
MAX_WORKERS: Final = 64


class SimulationError(RuntimeError):
    """The simulation cannot go on; a bug, not a matter of the fleet."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Model and rows of a simulated run.

    Args:
        train: JSONL that is dealt to the clients.
        general: JSONL that measures general ability, or None.
        labels, anchor_texts: of an encoder, as ``fedblocks init`` takes them.
    """

    model: Path
    train: Path
    general: Path | None
    overrides: tuple[str, ...] = ()
    anchor_sequences: int = 128
    anchor_tokens: int = 128
    labels: Path | None = None
    anchor_texts: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientResult:
    """What became of one client."""

    name: str
    device: str
    tasks: int
    updates: int
    train_s: float
    """Virtual seconds of training tasks."""
    lost: int
    """Tasks whose result never arrived."""
    bytes_up: int
    """Counted at the socket; of another model's costs: predicted payloads."""
    bytes_down: int
    peak_memory_bytes: int
    """Largest of its training tasks, as predicted, above the imports."""
    energy_j: float | None
    """Virtual training time times the board's power; None where the catalog does not know it."""
    accuracy_first: float | None
    """Of the published state on its own held-out rows, when they were first measured."""
    accuracy: float | None
    """The same at the last measurement."""
    spans: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClass:
    """What the clients with one device did together."""

    device: str
    clients: int
    updates: int
    lost: int
    share_of_clients: float
    share_of_updates: float
    """Of all; fair is what its clients are of all clients."""
    busy_share: float
    """Of their time they trained or measured."""
    bytes_up: int
    bytes_down: int
    peak_memory_bytes: int
    """Largest of any of them."""
    energy_j: float | None
    accuracy: float | None
    """Mean over its clients of the last accuracy on their own held-out rows."""
    accuracy_worst: float | None
    """Of the client with the lowest one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """The whole run."""

    run: Path
    costs_of: str
    """The model whose time, bytes and memory these are; empty: the one that was trained."""
    rounds: tuple[dict[str, Any], ...]
    """The rows of metrics.jsonl, each with ``virtual_s``, when it was closed, the ``deadline_s`` that was planned, and
    the ``energy_j`` of its tasks (null where the catalog does not know a board's power)."""
    clients: tuple[ClientResult, ...]
    coverage: Mapping[str, Mapping[int, int]]
    """Device -> block -> accepted updates."""
    virtual_s: float
    wall_s: float
    state_sha256: str
    finished: bool

    def device_classes(self) -> tuple[DeviceClass, ...]:
        """A row for each device, in the order of the file."""
        total = max(1, sum(client.updates for client in self.clients))
        made: list[DeviceClass] = []
        for device in dict.fromkeys(client.device for client in self.clients):
            members = [client for client in self.clients if client.device == device]
            energies = [client.energy_j for client in members]
            accuracies = [client.accuracy for client in members if client.accuracy is not None]
            busy_s = sum(span["end_s"] - span["start_s"] for c in members for span in c.spans if span["kind"] != "away")
            updates = sum(client.updates for client in members)
            made.append(
                DeviceClass(
                    device=device,
                    clients=len(members),
                    updates=updates,
                    lost=sum(client.lost for client in members),
                    share_of_clients=len(members) / len(self.clients),
                    share_of_updates=updates / total,
                    busy_share=busy_s / max(1e-9, len(members) * self.virtual_s),
                    bytes_up=sum(client.bytes_up for client in members),
                    bytes_down=sum(client.bytes_down for client in members),
                    peak_memory_bytes=max(client.peak_memory_bytes for client in members),
                    energy_j=None if None in energies else sum(e for e in energies if e is not None),
                    accuracy=sum(accuracies) / len(accuracies) if accuracies else None,
                    accuracy_worst=min(accuracies, default=None),
                )
            )
        return tuple(made)

    @property
    def jain_index_of_updates(self) -> float:
        """How evenly updates were accepted: 1 if all clients gave as many, 1/N if one gave them all.

        Source: Jain, Chiu and Hawe 1984.
        """
        counts = [client.updates for client in self.clients]
        squares = sum(count * count for count in counts)
        return sum(counts) ** 2 / (len(counts) * squares) if squares else 0.0

    def to_plain(self) -> dict[str, Any]:
        """For JSON; a time that never ended is null."""
        plain = asdict(self)
        plain["run"] = str(self.run)
        plain["jain_index_of_updates"] = self.jain_index_of_updates
        plain["device_classes"] = [asdict(row) for row in self.device_classes()]
        for client in plain["clients"]:
            for span in client["spans"]:
                span["end_s"] = span["end_s"] if math.isfinite(span["end_s"]) else None
        return plain


def inputs_of(
    model: Path | None,
    train: Path | None,
    general: Path | None,
    out: Path,
    *,
    labels: Path | None = None,
    anchor_texts: Path | None = None,
) -> Inputs:
    """The user's model and rows, or the bundled model with its frozen task.

    Args:
        labels, anchor_texts: of an encoder.

    Raises:
        ConfigError: a model without rows, or rows without a model.
    """
    if model is not None:
        if train is None:
            raise ConfigError("simulate --model DIR needs --train FILE: the rows to deal to the clients")
        return Inputs(model=model, train=train, general=general, labels=labels, anchor_texts=anchor_texts)
    if any(file is not None for file in (train, general, labels, anchor_texts)):
        raise ConfigError("simulate --train and --general need --model DIR: the bundled model has a task of its own")
    from fedblocks.demo import STARTER_OVERRIDES
    from fedblocks.edge_client.starter import starter_folder
    from fedblocks.edge_client.starter.skills import general_items
    from fedblocks.edge_client.starter.tasks import frozen_federation, write_jsonl

    clear(out, ("data",))
    data = out / "data"
    write_jsonl([row for part in frozen_federation("rule", "evidence") for row in part], data / "train.jsonl")
    write_jsonl(general_items(11, 20, "validation"), data / "general.jsonl")
    overrides = tuple(o for o in STARTER_OVERRIDES if not o.startswith(("server.", "allocation.deadline")))
    return Inputs(
        model=starter_folder(), train=data / "train.jsonl", general=data / "general.jsonl", overrides=overrides
    )


def simulate(
    fleet: Fleet, inputs: Inputs, out: Path, *, workers: int = 1, say: Callable[[str], None] = lambda _line: None
) -> SimulationResult:
    """Runs the fleet to the end of its run, or of its hours.

    Args:
        out: folder of the run and of the clients; what an earlier simulation left there is removed.
        workers: processes that do the arithmetic; more than one are forked from this one. The result is the same.
        say: takes lines about the rounds.

    Raises:
        ConfigError: the fleet, the rows or the folder cannot be used.
        SimulationError: messages got lost, which is a bug.
    """
    import torch

    if not 1 <= workers <= MAX_WORKERS:
        raise ConfigError(f"simulate: workers is {workers}, expected 1 to {MAX_WORKERS}")

    torch.set_num_threads(
        1
    )  # the matrices of models that are simulated are small; more threads cost more than they give
    began = time.monotonic()
    clear(out, ("sites",))
    shutil.rmtree(out / "run", ignore_errors=True)  # made by whoever makes runs
    rows = Rows.read(inputs.train)
    make_run(fleet, inputs, out)
    with contextlib.ExitStack() as cleanup:
        simulation = _Simulation(fleet, inputs, out, rows, workers, cleanup, say)
        simulation.go()
        return simulation.result(time.monotonic() - began)


def clear(out: Path, names: Sequence[str]) -> None:
    """Removes what an earlier simulation made in ``out`` under these names, and nothing else; makes them empty.

    Raises:
        ConfigError: the folder holds something of one of our names that no simulation made.
    """
    out.mkdir(parents=True, exist_ok=True)
    marker = out / MARKER
    found = [name for name in SUBFOLDERS if (out / name).exists()]
    if found and not marker.is_file():
        raise ConfigError(f"{out} holds {', '.join(found)}, which no simulation made; give --out a folder of its own")
    marker.write_text("made by fedblocks simulate; the next simulation in this folder removes what this one made\n")
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir()


def make_run(fleet: Fleet, inputs: Inputs, out: Path) -> None:
    """The run folder, as ``fedblocks init`` makes it."""
    from fedblocks.edge_client.init_run import init_run

    named = {"run.method": fleet.method} if fleet.method else {}
    settings = tuple(f"{key}={_text(value)}" for key, value in {**fleet.run, **named}.items())
    init_run(
        model=inputs.model,
        out=out / "run",
        general=inputs.general,
        overrides=(*inputs.overrides, *settings, "server.bind=tcp://127.0.0.1:*"),
        anchor_sequences=inputs.anchor_sequences,
        anchor_tokens=inputs.anchor_tokens,
        labels=inputs.labels,
        anchor_texts=inputs.anchor_texts,
    )


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "inf" if value == math.inf else json.dumps(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The lines that are dealt, and what each is about; empty where it does not say."""

    lines: Sequence[str]
    topics: Sequence[str]

    @classmethod
    def read(cls, path: Path) -> Rows:
        """Those of a file.

        Raises:
            DataError: as :func:`fedblocks.edge_client.data.read_rows`.
        """
        from fedblocks.edge_client.data import read_rows

        topics = [row.topic for row in read_rows(path)]
        return cls(lines=[line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()], topics=topics)


def assumed_profile(group: Group, default_scale: float) -> DeviceProfile:
    """The catalog's device, scaled, with the arithmetic of this machine's kind: fp32 on a CPU."""
    return _scaled(group, default_scale, accelerator="cpu", compute_dtype="float32", runtime_memory_bytes=R_BYTES)


def _scaled(group: Group, default_scale: float, **of_host: Any) -> DeviceProfile:
    from fedblocks.profiles import catalog_files

    device = catalog_files.load(group.device)
    host = replace(
        device, gemm_flops_per_s=1e15, memory_bytes_per_s=1e15, disk_read_bytes_per_s=1e15, memory_usable_bytes=1 << 60
    )
    found = catalog_files.scaled(device, group.scale or default_scale, host=replace(host, **of_host))
    return replace(
        found,
        measured_unix_s=START_UNIX_S,
        uplink_bytes_per_s=found.uplink_bytes_per_s * group.link,
        downlink_bytes_per_s=found.downlink_bytes_per_s * group.link,
    )


def priced_plan(name: str, plan: ExpansionPlan, run: RunConfig) -> ExpansionPlan:
    """The same run over the model whose costs are meant.

    Args:
        name: of :data:`fedblocks.fleet_file.SHAPES`, or the path of a config.json.
        run: says what trains.

    Raises:
        ConfigError: the file is no config.json of a model that can be expanded.
    """
    if name in SHAPES:
        shape = SHAPES[name]
        config: dict[str, Any] = {
            "model_type": shape.family,
            "num_hidden_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab_size,
            "tie_word_embeddings": shape.tied_embeddings,
        }
    else:
        try:
            config = json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"costs_of: {name} cannot be read ({error}), expected a config.json") from error
    try:
        return replace(plan_of(run, base_hash=plan.base_hash, model_config=config), extra=plan.extra)
    except (ConfigError, ExpansionError) as error:
        raise ConfigError(f"costs_of: {name}: {error}") from error


def dealt(rows: Rows, count: int, alpha: float, rng: np.random.Generator) -> list[str]:
    """One client's rows: at random, or with shares of the topics from a Dirichlet distribution; in file order.

    Where a topic has fewer rows than the client's share, the rest comes from all other rows.

    Raises:
        ConfigError: a row has no topic to deal by.
    """
    order: list[int] = rng.permutation(len(rows.lines)).tolist()
    if alpha == 0:
        return [rows.lines[i] for i in sorted(order[:count])]
    if "" in rows.topics:
        raise ConfigError(
            f"alpha is {alpha}, but row {rows.topics.index('') + 1} has no topic to deal by: no key topic, nor a "
            "completion that is short enough for a label; set it to 0"
        )
    names = sorted(set(rows.topics))
    wanted = rng.multinomial(count, rng.dirichlet([alpha] * len(names)))
    chosen: list[int] = []
    for name, number in zip(names, wanted.tolist(), strict=True):
        chosen += [i for i in order if rows.topics[i] == name][:number]
    taken = set(chosen)
    chosen += [i for i in order if i not in taken][: count - len(chosen)]
    return [rows.lines[i] for i in sorted(chosen)]


def key_of(seed: int, name: str) -> KeyPair:
    """The client's key, the same for the same seed: keys break ties when a round is planned."""
    secret = zmq.utils.z85.encode(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=32).digest())
    public = zmq.curve_public(secret)
    return KeyPair(public=ClientKey(public.decode("ascii")), secret=secret.decode("ascii"))


class _Simulation:
    def __init__(
        self,
        fleet: Fleet,
        inputs: Inputs,
        out: Path,
        rows: Rows,
        workers: int,
        cleanup: contextlib.ExitStack,
        say: Callable[[str], None],
    ) -> None:
        from fedblocks.aggregator.auth import Registry, load_or_create_server_keys
        from fedblocks.aggregator.endpoint import RouterEndpoint
        from fedblocks.aggregator.ledger import open_ledger
        from fedblocks.aggregator.run_folder import open_run_folder
        from fedblocks.aggregator.server import Aggregator
        from fedblocks.edge_client.backbone import Backbone
        from fedblocks.edge_client.checkpoint import Checkpoint
        from fedblocks.edge_client.work import Shared
        from fedblocks.virtual_client import VirtualClock
        from fedblocks.virtual_workers import Forked, InThisProcess, Job, Workers

        self._fleet, self._out, self._say = fleet, out, say
        self._clock = VirtualClock()
        self._folder = open_run_folder(out / "run", ())
        cleanup.callback(os.close, self._folder.lock())
        self._server_keys = load_or_create_server_keys(out / "run")
        registry = Registry(out / "run")
        for name in fleet.client_names():
            registry.enrol(key_of(fleet.seed, name).public, name, now_unix_s=START_UNIX_S)
        plan, self._priced = self._folder.plan, self._folder.plan
        if fleet.costs_of:
            self._priced = priced_plan(fleet.costs_of, plan, self._folder.config)
        self._shared = Shared(
            backbone=Backbone.open(
                Checkpoint.open(inputs.model), out / "sites" / SHARED_FOLDER, base_hash=plan.base_hash
            )
        )
        self._links: dict[ClientKey, Any] = {}
        self._gone_bytes: dict[ClientKey, list[int]] = defaultdict(lambda: [0, 0])
        """Of links that were closed: sent and received."""
        self._encoder: Any = None
        """Made from the first invitation; the same for all."""
        self._closed_s: list[float] = []
        self._planned: dict[int, Any] = {}
        """What each round's plan said; the ledger forgets those of long ago."""
        self._metrics_size = self._rounds_written = 0
        self._jobs: list[Job] = []
        """Tasks that have begun at this moment and are not carried out yet."""
        self._clients = {}
        for number, (group, name) in enumerate((g, n) for g in fleet.groups for n in _names(g)):
            self._clients[name] = self._make_client(group, name, number, inputs, rows)
        self._workers: Workers = InThisProcess()
        if workers > 1:  # before there is a socket, a database or a thread that a fork could not copy
            self._workers = Forked(list(self._clients.values()), workers)
        cleanup.callback(self._workers.close)
        self._ledger = open_ledger(self._folder.ledger_path, self._folder.identity())
        cleanup.callback(self._ledger.close)
        self._context: zmq.Context[Any] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 2 * len(fleet.client_names()) + 64)
        cleanup.callback(self._context.destroy, linger=0)
        self._endpoint = RouterEndpoint(
            self._folder.config.server.bind,
            keys=self._server_keys,
            registry=registry,
            expected_clients=2 * len(fleet.client_names()) + 64,
            clock=self._clock,
        )
        cleanup.callback(self._endpoint.close)

        class Priced(Aggregator):
            """Plans by the costs that the clients have."""

            def __init__(self, priced: ExpansionPlan, *of_run: Any, **more: Any) -> None:
                super().__init__(*of_run, **more)
                of_tasks = () if priced.blocks else self._run.plan.unit_ids  # its layers are not the model's
                self._run = replace(self._run, plan=priced, units_of_tasks=of_tasks)

        self._aggregator = Priced(
            self._priced,
            self._folder,
            self._ledger,
            self._endpoint,
            roster=[(e.key, e.name) for e in registry.list()],
            clock=self._clock,
            wall_clock=lambda: START_UNIX_S + self._clock.now_s,
            on_event=say,
        )
        for client in self._clients.values():
            self._clock.at(client.joins_s, client.join)
        for event in fleet.events:
            self._clock.at(event.at_s, lambda event=event: self._happens(event))

    def _make_client(self, group: Group, name: str, number: int, inputs: Inputs, rows: Rows) -> VirtualClient:
        from fedblocks.aggregator.invitation import write_invitation
        from fedblocks.edge_client.client import JoinOptions
        from fedblocks.edge_client.data import TextEncoder, load_site_data
        from fedblocks.edge_client.store import ClientStore
        from fedblocks.edge_client.summary import Summary, SummaryFile, held_out_sha256
        from fedblocks.virtual_client import AssumedSite, VirtualClient

        home = self._out / "sites" / name
        home.mkdir()
        rng = np.random.Generator(np.random.Philox(key=[self._fleet.seed, 1_000_000 + number]))
        own_rows = dealt(rows, group.examples, self._fleet.alpha, rng)
        (home / "data.jsonl").write_text("\n".join(own_rows) + "\n", encoding="utf-8")
        site = write_invitation(self._out / "run", name=name, out=home / "site.toml")
        site = replace(
            site,
            join=replace(site.join, share_topics=self._fleet.share_topics),
            limits=replace(site.limits, allow_base_training=True),
        )
        self._encoder = self._encoder or TextEncoder(inputs.model, site.data)
        data = load_site_data(home / "data.jsonl", self._encoder)
        costs, profile = self._costs(group)
        options = JoinOptions(
            site=replace(site, runtime=replace(site.runtime, memory_gb=profile.memory_usable_bytes / 1e9)),
            data=home / "data.jsonl",
            model=inputs.model,
            home=home,
            evaluate_general=number == 0,
        )
        store = ClientStore(home / site.run_id)
        summary = Summary(
            run_id=site.run_id,
            base_name=site.base_name,
            client_name=name,
            num_train=len(data.train),
            num_held_out=len(data.validation),
            held_out_sha256=held_out_sha256(data.validation),
        )
        return VirtualClient(
            number=number,
            site=AssumedSite(
                assumed=costs.profile,
                options=options,
                site=site,
                encoder=self._encoder,
                data=data,
                identity=key_of(self._fleet.seed, name),
                store=store,
                summary=SummaryFile(store.folder, summary),
                profile=profile,
                say=lambda line, name=name: self._say_of(name, line),
            ),
            group=group.prefix,
            device=group.device,
            joins_s=group.joins_s,
            clock=self._clock,
            begin=self._begin,
            connect=self._connect,
            disconnect=self._disconnect,
            chance=self._fleet.chance,
            seed=(self._fleet.seed << 20) + number,
            heartbeat_s=self._folder.config.server.heartbeat_interval_s,
            shared=self._shared,
            costs=costs,
        )

    def _costs(self, group: Group) -> tuple[Costs, DeviceProfile]:
        """Whose costs a client has, and the device that its arithmetic is planned for."""
        from fedblocks.profiles.catalog_files import scale_factor
        from fedblocks.virtual_client import Costs

        profile = assumed_profile(group, scale_factor(self._folder.plan.shape))
        delta, priced = self._folder.config.delta, self._priced
        costs = Costs(
            profile=_scaled(group, 1.0) if self._fleet.costs_of else profile,
            plan=priced,
            delta_format=delta.format,
            down_density=delta.down_density,
            of_another_model=bool(self._fleet.costs_of),
        )
        return costs, replace(profile, memory_usable_bytes=FREE_BYTES) if self._fleet.costs_of else profile

    # tasks

    def _begin(self, client: VirtualClient, task: Task, payload: bytes) -> None:
        from fedblocks.virtual_workers import Job

        self._jobs.append(Job(client=client, task=task, payload=payload))

    def _carry_out(self) -> None:
        """The tasks that have begun; their ends are planned in the order of their beginnings."""
        jobs, self._jobs = self._jobs, []
        for job, outcome in zip(jobs, self._workers.carry_out(jobs), strict=True):
            job.client.finish(job.task, job.payload, outcome)

    def _say_of(self, name: str, line: str) -> None:
        if any(word in line for word in ("failed", "refused", "cannot take part")):
            self._say(f"{name}: {line}")

    # sockets

    def _connect(self, keys: KeyPair) -> Any:
        from fedblocks.virtual_client import VirtualLink

        link = VirtualLink(self._context, self._endpoint.address, self._server_keys.public, keys)
        self._links[keys.public] = link
        return link

    def _disconnect(self, link: Any) -> None:
        key = next(key for key, known in self._links.items() if known is link)
        self._settle()
        del self._links[key]
        self._gone_bytes[key][0] += link.bytes_sent
        self._gone_bytes[key][1] += link.bytes_received
        link.close()

    def _is_quiet(self) -> bool:
        """Has everything that was sent arrived, both ways?"""
        for key, link in self._links.items():
            count = self._endpoint.bytes_by_key.get(key)
            sent, received = (0, 0) if count is None else (count.sent, count.received)
            gone_sent, gone_received = self._gone_bytes.get(key, (0, 0))
            if received - gone_sent != link.bytes_sent or sent - gone_received != link.bytes_received:
                return False
        return True

    def _settle(self) -> None:
        """Delivers all messages under way, and what they cause at this moment."""
        until_s = time.monotonic() + QUIET_TIMEOUT_S
        while True:
            self._aggregator.step(0.0)
            moved = [client.pump() for client in self._clients.values()]
            if not any(moved) and self._is_quiet():
                if not self._jobs:
                    return
                self._carry_out()
                until_s = time.monotonic() + QUIET_TIMEOUT_S
            if not any(moved):
                if time.monotonic() > until_s:
                    raise SimulationError(f"messages are under way for {QUIET_TIMEOUT_S:.0f} s; {self._unsettled()}")
                time.sleep(SETTLE_S)

    def _unsettled(self) -> str:
        found = []
        for key, link in self._links.items():
            count = self._endpoint.bytes_by_key.get(key)
            found.append(f"{key}: client {link.bytes_sent}/{link.bytes_received}, aggregator {count}")
        return "; ".join(found[:5])

    # the run

    def go(self) -> None:
        """To the end of the run, or of the fleet's hours."""
        end_s = 3600 * self._fleet.max_hours
        while not self._aggregator.finished and self._clock.now_s < end_s:
            for action in self._clock.advance(self._clock.now_s + self._fleet.tick_s):
                action()
            self._settle()
            while len(self._closed_s) < self._num_rounds():
                self._closed_s.append(self._clock.now_s)
                self._note_plans()
        self._settle()
        self._note_plans()

    def _note_plans(self) -> None:
        while (stored := self._ledger.get_round(len(self._planned) + 1)) is not None:
            self._planned[stored.round] = stored.plan

    def _num_rounds(self) -> int:
        """Rounds whose row stands in metrics.jsonl."""
        path = self._folder.metrics_path
        size = path.stat().st_size if path.is_file() else 0
        if size != self._metrics_size:
            self._metrics_size, self._rounds_written = size, path.read_bytes().count(b"\n")
        return self._rounds_written

    def _happens(self, event: Event) -> None:
        for name, client in self._clients.items():
            if event.clients not in (name, client.group):
                continue
            if event.kind == "leave":
                client.leave()
            elif event.kind == "join":
                client.join()
            elif event.kind == "slow":
                client.now.slow = event.factor
            else:
                client.now.link = event.factor

    def result(self, wall_s: float) -> SimulationResult:
        """What has become of everything."""
        metrics = self._folder.metrics_path
        rounds = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        spans = [(client, span) for client in self._clients.values() for span in client.spans if span.kind != "away"]
        coverage: dict[str, dict[int, int]] = {}
        updates: dict[str, int] = defaultdict(int)
        group_of = {name: client.group for name, client in self._clients.items()}
        for index, row in enumerate(rounds):
            row["virtual_s"] = self._closed_s[index] if index < len(self._closed_s) else self._clock.now_s
            row["deadline_s"] = self._planned[row["round"]]["deadline"]["seconds"]
            of_round = [(client, span) for client, span in spans if span.round == row["round"]]
            energies = [self._energy_j(client, [span]) for client, span in of_round]
            row["energy_j"] = None if None in energies else sum(e for e in energies if e is not None)
            if self._fleet.costs_of:
                row["bytes_up"] = sum(span.bytes_up for _, span in of_round)
                row["bytes_down"] = sum(span.bytes_down for _, span in of_round)
            for client in row["clients"]:
                if client["outcome"] == "stored":
                    updates[client["name"]] += 1
                    blocks = coverage.setdefault(group_of[client["name"]], defaultdict(int))
                    for block in client["blocks"]:
                        blocks[block] += 1
        return SimulationResult(
            run=self._out / "run",
            costs_of=self._fleet.costs_of,
            rounds=tuple(rounds),
            clients=tuple(self._client_result(name, client, updates[name]) for name, client in self._clients.items()),
            coverage={device: dict(sorted(blocks.items())) for device, blocks in coverage.items()},
            virtual_s=self._clock.now_s,
            wall_s=wall_s,
            state_sha256=self._aggregator.published_sha256,
            finished=self._aggregator.finished,
        )

    def _energy_j(self, client: VirtualClient, spans: Sequence[Span]) -> float | None:
        """Training time times the board's power; None where the catalog does not know it."""
        from fedblocks.profiles import catalog_files

        power = catalog_files.entry(client.device).facts.get("board_power_w")
        trained_s = sum(span.end_s - span.start_s for span in spans if span.kind == "train")
        return None if power is None else trained_s * power.value

    def _client_result(self, name: str, client: VirtualClient, updates: int) -> ClientResult:
        count = self._endpoint.bytes_by_key.get(client.site.identity.public)
        up, down = (0, 0) if count is None else (count.received, count.sent)
        if self._fleet.costs_of:
            up, down = (sum(getattr(span, key) for span in client.spans) for key in ("bytes_up", "bytes_down"))
        summary = client.site.summary.summary
        return ClientResult(
            name=name,
            device=client.device,
            tasks=sum(span.kind in ("train", "evaluate", "lost") for span in client.spans),
            updates=updates,
            train_s=sum(span.end_s - span.start_s for span in client.spans if span.kind == "train"),
            lost=sum(span.kind == "lost" for span in client.spans),
            bytes_up=up,
            bytes_down=down,
            peak_memory_bytes=max((span.peak_memory_bytes for span in client.spans), default=0),
            energy_j=self._energy_j(client, client.spans),
            accuracy_first=None if summary.first is None else summary.first.accuracy,
            accuracy=None if summary.last is None else summary.last.accuracy,
            spans=tuple(asdict(span) for span in client.spans),
        )


def _names(group: Group) -> list[str]:
    return [f"{group.prefix}-{i + 1}" for i in range(group.count)]
