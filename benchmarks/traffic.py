"""How many bytes does a run move, counted at the socket? The shape of Qwen2.5-0.5B, deployed codec and transport.

    python benchmarks/traffic.py              all lines -> benchmarks/results/methods.json, key bytes_qwen05b
    python benchmarks/traffic.py --only "1 block"

Every round some of the clients take part, chosen as the aggregator does. Each gets an Assignment with what leads it
from the version that it holds to the published one, and sends a Delta; both go through the aggregator's endpoint and a
client's transport with CURVE on, and every frame of both directions is counted. The values are drawn: a tensor's change
has rows of very unequal size (log-normal), as trained ones have; nothing is trained. One connection stands for all
clients: what a client holds is a number of the loop.

Pairs of low rank go through the same code: ``fedit`` in fp32, both factors in full up and down; then with the int8
codec, with its row mask as ours and without. Full exchange is arithmetic: eight bytes a parameter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq
from starter_runs import RESULTS, machine, put_entries
from timed_assignment import assignment

from fedblocks.aggregator.aggregation import AcceptedUpdate, NormHistory, fold
from fedblocks.aggregator.auth import Registry, load_or_create_server_keys
from fedblocks.aggregator.cohort import choose_cohort
from fedblocks.aggregator.endpoint import MessageReceived, RouterEndpoint, UploadAnnounced, UploadFinished
from fedblocks.edge_client.transport import Connected, Received, Transport
from fedblocks.profiles.catalog_files import QWEN2_5_0_5B
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.profiles.units import EXPANDED_BLOCKS, LowRankPairs, TrainedUnits, unit_tensors
from fedblocks.protocol.keys import KeyPair
from fedblocks.protocol.messages import (
    Assignment,
    AttemptId,
    ClientKey,
    Delta,
    DeltaFormat,
    Goodbye,
    TrainReport,
)
from fedblocks.protocol.state import Publication, make_update, publish, publish_dense, state_sha256
from fedblocks.protocol.tensors import EncodedDelta, FloatArray, State, encode_delta

SHAPE: Final = QWEN2_5_0_5B
ROUNDS: Final = 20
CLIENTS: Final = 20
COHORT_FRACTION: Final = 0.4
SPREAD: Final = 1.0
"""Standard deviation of the logarithm of a row's size."""
FULL_BYTES: Final = 8 * SHAPE.total_parameters
"""All parameters in fp32, up and down."""
MODE: Final = ExecutionMode(optimizer="fp32", residency="suffix", frozen="nf4", micro_batch_size=1, checkpoint=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What travels in one line."""

    name: str
    units: TrainedUnits
    trained: tuple[int, ...]
    format: DeltaFormat
    density: float


BLOCKS: Final = TrainedUnits(shape=SHAPE, trainable=EXPANDED_BLOCKS)
PAIRS: Final = TrainedUnits(shape=SHAPE, trainable=LowRankPairs(rank=16))
LAYERS: Final = tuple(range(SHAPE.num_layers))
LINES: Final = (
    Traffic(name="1 block", units=BLOCKS, trained=(0,), format="int8", density=0.25),
    Traffic(name="2 blocks", units=BLOCKS, trained=(0, 1), format="int8", density=0.25),
    Traffic(name="3 blocks", units=BLOCKS, trained=(0, 1, 2), format="int8", density=0.25),
    Traffic(name="FedIT r=16, fp32", units=PAIRS, trained=LAYERS, format="fp32", density=1.0),
    Traffic(name="FedIT r=16, our int8 codec", units=PAIRS, trained=LAYERS, format="int8", density=0.25),
    Traffic(name="FedIT r=16, int8, all rows", units=PAIRS, trained=LAYERS, format="int8", density=1.0),
)
RIVALS: Final = {
    "FedIT r=16, fp32": "fedit_fp32",
    "FedIT r=16, our int8 codec": "fedit_int8",
    "FedIT r=16, int8, all rows": "fedit_int8_dense",
}


class Wire:
    """The aggregator's endpoint and one client's transport, connected."""

    def __init__(self, folder: Path) -> None:
        public, secret = zmq.curve_keypair()
        registry, pair = Registry(folder), KeyPair(public=ClientKey(public.decode()), secret=secret.decode())
        self.key = ClientKey(pair.public)
        registry.enrol(pair.public, "site", now_unix_s=1.0)
        server = load_or_create_server_keys(folder)
        self._part = folder / "part"
        self._endpoint = RouterEndpoint("tcp://127.0.0.1:*", keys=server, registry=registry)
        address = self._endpoint.address
        self._transport = Transport(address, server_key=server.public, key_pair=pair, heartbeat_interval_s=300.0)
        while not isinstance(self._transport.get(0.01), Connected):
            self._endpoint.poll(0.01)
        self._transport.send(Goodbye(reason="known"))  # the endpoint serves whom it has heard
        self._until(MessageReceived)

    def _until(self, kind: type) -> Any:
        while True:
            for event in self._endpoint.poll(0.05):
                if isinstance(event, UploadAnnounced):
                    self._endpoint.accept_upload(event.upload_id, self._part)
                if isinstance(event, kind):
                    return event

    def down(self, message: Assignment, payload: bytes) -> int:
        """Bytes of an assignment at the socket, both directions."""
        before = self._counted()
        self._endpoint.send(self.key, message, payload)
        while not isinstance(self._transport.get(0.001), Received):
            self._endpoint.poll(0.001)
        return self._counted() - before

    def up(self, message: Delta, payload: bytes) -> int:
        """Bytes of an update at the socket, both directions."""
        before = self._counted()
        self._transport.send(message, payload)
        self._until(UploadFinished)
        return self._counted() - before

    def _counted(self) -> int:
        count = self._endpoint.bytes_by_key.get(self.key)
        return count.sent + count.received if count is not None else 0

    def close(self) -> None:
        """Ends both."""
        self._transport.close()
        self._endpoint.close()


def drawn(units: TrainedUnits, trained: Sequence[int], rng: np.random.Generator) -> State:
    """A change of every tensor, rows of very unequal size."""
    state: State = {}
    for unit in trained:
        tensors: dict[str, FloatArray] = {}
        for spec in unit_tensors(units, unit):
            rows, cols = spec.rows_cols
            size = np.exp(SPREAD * rng.standard_normal((rows, 1), dtype=np.float32))
            values = 1e-4 * size * rng.standard_normal((rows, cols), dtype=np.float32)
            tensors[spec.name] = values.reshape(spec.shape)
        state[unit] = tensors
    return state


def _message(line: Traffic, encoded: EncodedDelta, payload: bytes, version: int) -> Delta:
    report = TrainReport(
        num_target_tokens=1000,
        loss_first=1.0,
        loss_last=1.0,
        anchor_kl=0.01,
        prefix_s=1.0,
        train_s=1.0,
        measure_s=1.0,
        encode_s=1.0,
        step_s=1.0,
        peak_memory_bytes=1 << 30,
        predicted_peak_bytes=1 << 30,
        mode=MODE,
        gradient_energy=(1.0,) * len(line.trained),
    )
    return Delta(
        attempt_id=AttemptId("traffic"),
        round=version,
        version=version,
        num_examples=100,
        steps=16,
        format=line.format,
        density=line.density,
        tensors=encoded.headers,
        payload_bytes=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        train=report,
        measurements=(),
    )


def measure(line: Traffic) -> dict[str, Any]:
    """One run of this line."""
    units, rng = line.units, np.random.default_rng(1)
    changes = [drawn(units, line.trained, rng) for _ in range(2)]
    steps: list[bytes] = []
    published: State = {}
    server_residual: State = {}
    residuals: dict[int, State] = {}
    history: NormHistory = {}
    held = [0] * CLIENTS
    last_chosen = dict.fromkeys((ClientKey(f"client {i:03d}") for i in range(CLIENTS)), 0)
    up = down = tasks = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wire = Wire(Path(folder))
        for version in range(ROUNDS):
            cohort = choose_cohort(last_chosen, fraction=COHORT_FRACTION, round=version + 1, seed=1)
            last_chosen.update(dict.fromkeys(cohort, version + 1))
            sha256 = state_sha256(units, published)
            updates: list[AcceptedUpdate] = []
            ways: dict[int, tuple[Any, bytes]] = {}
            for client in (int(key.removeprefix("client ")) for key in sorted(cohort)):
                if held[client] not in ways:
                    ways[held[client]] = make_update(
                        steps.__getitem__,
                        shape=units,
                        from_version=held[client],
                        to_version=version,
                        published=published,
                        sha256=sha256,
                    )
                update, way = ways[held[client]]
                plain = assignment(
                    line.trained, mode=MODE, steps=16, batch_size=8, anchor_batch_size=4, learning_rate=1e-4
                )
                task = replace(
                    plain, state=update, payload_bytes=len(way), payload_sha256=hashlib.sha256(way).hexdigest()
                )
                down += wire.down(task, way)
                held[client], tasks = version, tasks + 1
                encoded = encode_delta(
                    units,
                    line.trained,
                    changes[(client + version) % len(changes)],
                    residuals.get(client, {}),
                    format=line.format,
                    density=line.density,
                )
                residuals[client] = encoded.residuals
                payload = b"".join(encoded.parts)
                up += wire.up(_message(line, encoded, payload, version), payload)
                updates.append(_accepted(line, client, encoded, payload))
            folded = fold(updates, shape=units, history=history)
            history = folded.history
            new = _published(line, published, folded.aggregate, server_residual, last=version == ROUNDS - 1)
            published, server_residual = new.published, new.residual
            steps.append(new.step)
        wire.close()
    return {
        "name": line.name,
        "payload_format": line.format,
        "density": line.density,
        "up_bytes_per_update": up / tasks,
        "down_bytes_per_task": down / tasks,
        "bytes_run": up + down,
        "bytes_per_task": (up + down) / tasks,
        "ratio_full_fp32_run": FULL_BYTES * tasks / (up + down),
        "tasks": tasks,
        "wall_s": time.monotonic() - began,
    }


def _accepted(line: Traffic, client: int, encoded: EncodedDelta, payload: bytes) -> AcceptedUpdate:
    view = memoryview(payload)
    return AcceptedUpdate(
        client=ClientKey(f"client {client:03d}"),
        attempt_id=AttemptId(f"client {client}"),
        num_examples=100,
        steps=16,
        staleness=0,
        format=line.format,
        density=line.density,
        tensors=encoded.headers,
        read_payload=lambda: view,
    )


def _published(line: Traffic, published: State, change: State, residual: State, *, last: bool) -> Publication:
    if last:
        return publish_dense(published, change, residual, shape=line.units)
    return publish(published, change, residual, shape=line.units, format=line.format, density=line.density)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of the results file."""
    by_name = {row["name"]: row for row in rows}
    found: dict[str, Any] = {
        "shape": "Qwen2.5-0.5B",
        "rounds": ROUNDS,
        "clients": CLIENTS,
        "cohort_fraction": COHORT_FRACTION,
        "full_fp32_bytes_per_client_and_round": FULL_BYTES,
        "lines": list(rows),
    }
    for count, name in ((1, "1 block"), (2, "2 blocks"), (3, "3 blocks")):
        if name in by_name:
            found[f"ratio_full_fp32_m{count}_run"] = by_name[name]["ratio_full_fp32_run"]
            for rival, key in RIVALS.items():
                if rival in by_name:
                    found[f"ratio_{key}_m{count}_run"] = by_name[rival]["bytes_run"] / by_name[name]["bytes_run"]
    return found


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="bytes at the socket, shape of Qwen2.5-0.5B")
    parser.add_argument("--only", nargs="+", choices=[line.name for line in LINES], default=[])
    parser.add_argument("--out", type=Path, default=RESULTS / "methods.json")
    options = parser.parse_args(arguments)
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    rows = {row["name"]: row for row in known.get("bytes_qwen05b", {}).get("lines", [])}
    for line in LINES:
        if not options.only or line.name in options.only:
            rows[line.name] = measure(line)
            print(json.dumps(rows[line.name]), flush=True)
    ordered = [rows[line.name] for line in LINES if line.name in rows]
    entry = {"command": "python benchmarks/traffic.py", **summary(ordered), **machine()}
    put_entries(options.out, {"bytes_qwen05b": entry})


if __name__ == "__main__":
    main(sys.argv[1:])
