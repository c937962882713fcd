"""The main job on one machine: an aggregator and four unequal client processes learn together, and then the proof.

Nothing here is a shortcut through the product: the run folder, the keys, the invitations, ``serve`` and ``join`` are
those of a real consortium, over encrypted sockets.
Only the speed and memory of the four devices are emulated, and every printed figure is measured or computed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedblocks.demo_report import bytes_ratio, client_rows, plot, print_result, say
from fedblocks.protocol.run_config import ConfigError

#: The virtual consortium: catalog devices, weakest first.
DEVICES = ("laptop-cpu", "jetson-orin-nano-8gb", "jetson-orin-nx-16gb", "jetson-agx-orin-64gb")
QUICK_DEVICES = (DEVICES[0], DEVICES[3])
#: What a demo makes beside its result; the marker says that these folders are its own to remove.
SUBFOLDERS = ("run", "sites", "data", "logs", "export")
MARKER = ".fedblocks-demo"
POLL_S = 0.2
#: ``python -m fedblocks`` without the current folder on the path, which Python 3.10 cannot be told otherwise: in a
#: checkout its folder kernels/ would shadow the package of that name which transformers imports.
LAUNCH = "import sys; sys.path[:] = [p for p in sys.path if p]; from fedblocks.cli import main; main()"
PROBE_S = 10.0
ANCHOR_TOKENS = 128
#: A run that shows no sign of life for so long is broken.
STALL_S = 180.0

#: What the demo sets in run.toml for the bundled model; the rest are the defaults of every run.
STARTER_OVERRIDES = (
    "run.max_rounds=24",
    "run.target_score=0.97",
    "training.learning_rate=3e-3",
    "training.steps=16",
    "data.append_eos=false",
    "delta.density=1.0",
    "delta.down_density=1.0",
    "forgetting.max_kl=0.02",
    "allocation.deadline_s=12",
    "server.heartbeat_interval_s=1.0",
)
QUICK_OVERRIDES = ("run.max_rounds=3", "training.steps=8", "expansion.blocks=2", "allocation.deadline_s=4")


class DemoError(RuntimeError):
    """The demo could not go on; the text names the log to read."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What ``fedblocks demo`` was asked for."""

    json_file: Path
    quick: bool
    model: Path | None
    train: Path | None
    general: Path | None
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """The demo's model and files."""

    model: Path
    sites: tuple[Path, ...]
    """One training file per client."""
    downstream_test: Path
    general_validation: Path | None
    general_test: Path | None
    downstream_target: float | None
    overrides: tuple[str, ...]
    anchor_sequences: int


def run_demo(options: DemoOptions) -> int:
    """Run the demo and write its result; returns the exit code."""
    folder = options.json_file.parent
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    _clear(folder)
    if options.model is None:
        # The bundled model is so small that a second thread costs more than it gives. Set before torch is imported.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    say("preparing the model, the data of each site and the anchor texts")
    material = _custom_material(options, folder) if options.model else _starter_material(options, folder)
    run = _make_run(material, options, folder)
    devices = QUICK_DEVICES if options.quick else DEVICES
    with _processes(run, material, devices, folder) as processes:
        rounds = _watch(run, processes, folder)
    result = _prove(run, material, folder, rounds)
    result["wall_s"] = time.monotonic() - started
    result["clients"] = client_rows(rounds)
    options.json_file.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print_result(result)
    plot(result, folder / "plot.png")
    say(f"result: {options.json_file}; checkpoint: {result['export_dir']}")
    return 0


def _clear(folder: Path) -> None:
    """Remove what an earlier demo made in ``folder``, and nothing else.

    Raises:
        ConfigError: the folder holds something of one of our names that no demo made.
    """
    marker = folder / MARKER
    found = [name for name in SUBFOLDERS if (folder / name).exists()]
    if found and not marker.is_file():
        raise ConfigError(
            f"{folder} holds {', '.join(found)}, which no demo made; give --json a file in a folder of its own, "
            "e.g. --json runs/demo/result.json"
        )
    for name in found:
        shutil.rmtree(folder / name)
    marker.write_text("made by fedblocks demo; the next demo in this folder removes what this one made\n")
    for name in ("sites", "data", "logs"):
        (folder / name).mkdir()


def _starter_material(options: DemoOptions, folder: Path) -> Material:
    from fedblocks.edge_client.starter import starter_folder
    from fedblocks.edge_client.starter.skills import general_items
    from fedblocks.edge_client.starter.tasks import frozen_evaluation, frozen_federation, write_jsonl

    frozen = json.loads((starter_folder().parent / "frozen_task.json").read_text())
    data = folder / "data"
    parts = frozen_federation("rule", "demo")
    if options.quick:
        parts = parts[: len(QUICK_DEVICES)]
    sites = []
    for i, part in enumerate(parts):
        sites.append(data / f"site-{i + 1}.jsonl")
        write_jsonl(part, sites[-1])
    write_jsonl(frozen_evaluation("rule", "test"), data / "downstream_test.jsonl")
    write_jsonl(general_items(11, 20, "validation"), data / "general_validation.jsonl")
    write_jsonl(general_items(12, 20 if options.quick else 100, "test"), data / "general_test.jsonl")
    return Material(
        model=starter_folder(),
        sites=tuple(sites),
        downstream_test=data / "downstream_test.jsonl",
        general_validation=data / "general_validation.jsonl",
        general_test=data / "general_test.jsonl",
        downstream_target=frozen["target"]["rule"],
        overrides=STARTER_OVERRIDES + (QUICK_OVERRIDES if options.quick else ()),
        anchor_sequences=64 if options.quick else 256,
    )


def _custom_material(options: DemoOptions, folder: Path) -> Material:
    """The user's model and rows: dealt to the clients in turn, every tenth kept as the test."""
    from fedblocks.edge_client.data import read_rows

    if options.model is None or options.train is None:
        raise ConfigError("demo --model DIR needs --train FILE: the rows to federate")
    read_rows(options.train)
    lines = [line for line in options.train.read_text(encoding="utf-8").split("\n") if line.strip()]
    num_sites = len(QUICK_DEVICES if options.quick else DEVICES)
    if len(lines) < 10 * num_sites:
        raise ConfigError(f"{options.train} holds {len(lines)} rows, expected at least {10 * num_sites} for the demo")
    data = folder / "data"
    test, rest = lines[::10], [line for i, line in enumerate(lines) if i % 10]
    (data / "downstream_test.jsonl").write_text("\n".join(test) + "\n", encoding="utf-8")
    sites = []
    for i in range(num_sites):
        sites.append(data / f"site-{i + 1}.jsonl")
        sites[-1].write_text("\n".join(rest[i::num_sites]) + "\n", encoding="utf-8")
    general = general_test = None
    if options.general is not None:
        read_rows(options.general)
        rows = [line for line in options.general.read_text(encoding="utf-8").split("\n") if line.strip()]
        general, general_test = data / "general_validation.jsonl", data / "general_test.jsonl"
        general.write_text("\n".join(rows[::4]) + "\n", encoding="utf-8")
        general_test.write_text("\n".join(r for i, r in enumerate(rows) if i % 4) + "\n", encoding="utf-8")
    return Material(
        model=options.model,
        sites=tuple(sites),
        downstream_test=data / "downstream_test.jsonl",
        general_validation=general,
        general_test=general_test,
        downstream_target=None,
        overrides=("server.heartbeat_interval_s=1.0", "run.max_rounds=12", *(QUICK_OVERRIDES if options.quick else ())),
        anchor_sequences=64 if options.quick else 256,
    )


def _make_run(material: Material, options: DemoOptions, folder: Path) -> Path:
    from fedblocks.edge_client.init_run import init_run

    port = _free_port()
    address = (f"server.bind=tcp://127.0.0.1:{port}", f"server.public_address=tcp://127.0.0.1:{port}")
    made = init_run(
        model=material.model,
        out=folder / "run",
        general=material.general_validation,
        overrides=(*material.overrides, f"allocation.min_cohort={len(material.sites)}", *address, *options.overrides),
        anchor_sequences=material.anchor_sequences,
        anchor_tokens=ANCHOR_TOKENS,
    )
    blocks = ", ".join(f"{b.block_id} after layer {b.after_layer}" for b in made.plan.blocks)
    say(f"run {made.run_id}: expanded blocks {blocks}; {made.num_anchor_tokens} anchor tokens sampled from the base")
    return folder / "run"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _processes(
    run: Path, material: Material, devices: Sequence[str], folder: Path
) -> Iterator[Mapping[str, subprocess.Popen[bytes]]]:
    """The aggregator and the clients, each its own process; none is left behind."""
    from fedblocks.aggregator.auth import Registry
    from fedblocks.aggregator.invitation import write_invitation
    from fedblocks.edge_client.client import write_profile
    from fedblocks.edge_client.identity import load_or_create_identity
    from fedblocks.profiles.catalog_files import scale_factor
    from fedblocks.profiles.probe import probe
    from fedblocks.protocol.expansion import ExpansionPlan

    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        started["aggregator"] = _start("aggregator", folder, "serve", str(run))
        registry = Registry(run)
        plan = ExpansionPlan.from_json((run / "plan.json").read_text())
        scale = scale_factor(plan.shape)
        profile = probe(budget_s=PROBE_S, folder=folder, shape=plan.shape, threads=1).profile
        say(
            f"four devices of the catalog at {scale:.5f} of their speed and memory (docs/demo.md): {', '.join(devices)}"
        )
        for i, (data, device) in enumerate(zip(material.sites, devices, strict=True)):
            name = f"site-{i + 1}"
            invitation, home = folder / "sites" / f"{name}.toml", folder / "sites" / name
            write_invitation(run, name=name, out=invitation)
            identity = load_or_create_identity(home)
            write_profile(home, profile)
            registry.enrol(identity.public, name, now_unix_s=time.time())
            evaluate = ["--evaluate"] if i == len(devices) - 1 else []
            started[name] = _start(
                name, folder, "join", str(invitation), "--data", str(data), "--model", str(material.model),
                "--home", str(home), "--emulate", device, "--emulate-scale", repr(scale), *evaluate,
            )  # fmt: skip
        yield started
    finally:
        for process in started.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in started.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def _start(name: str, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """One process with one thread for arithmetic: several clients share this machine's cores."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / "logs" / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *arguments], stdout=log, stderr=subprocess.STDOUT, env=env
        )


def _watch(run: Path, processes: Mapping[str, subprocess.Popen[bytes]], folder: Path) -> list[dict[str, Any]]:
    """Print each round as the aggregator records it, until the aggregator has finished."""
    from fedblocks.aggregator.progress import round_line
    from fedblocks.protocol import run_config

    max_rounds = run_config.load(run / "run.toml").run.max_rounds
    metrics = run / "metrics.jsonl"
    rounds: list[dict[str, Any]] = []
    offset = 0
    last_sign = time.monotonic()
    aggregator = processes["aggregator"]
    while True:
        finished = aggregator.poll() is not None
        if metrics.is_file():
            with metrics.open("rb") as file:
                file.seek(offset)
                complete, newline, _ = file.read().rpartition(b"\n")
            offset += len(complete) + len(newline)
            for line in complete.splitlines():
                last_sign = time.monotonic()
                rounds.append(json.loads(line))
                say(round_line(rounds[-1], max_rounds))
        if finished:
            break
        for name, process in processes.items():
            if name != "aggregator" and process.poll() not in (None, 0):
                raise DemoError(f"{name} ended with exit code {process.returncode}; see {folder / 'logs' / name}.log")
        if time.monotonic() - last_sign > STALL_S:
            raise DemoError(f"no round was completed for {STALL_S:.0f} s; see the logs in {folder / 'logs'}")
        time.sleep(POLL_S)
    if aggregator.returncode != 0:
        raise DemoError(f"the aggregator ended with {aggregator.returncode}; see {folder / 'logs' / 'aggregator.log'}")
    for name, process in processes.items():
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"{name} did not end with the run; see {folder / 'logs' / name}.log") from error
    return rounds


def _prove(run: Path, material: Material, folder: Path, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Export the model and measure it: as any user would load it, and on the clients' 4-bit stack."""
    from fedblocks.edge_client.evaluation import prove_run

    say("exporting, and measuring the exported checkpoint and the 4-bit stack")
    proof = prove_run(
        run, model=material.model, out=folder / "export", downstream=material.downstream_test,
        general=material.general_test,
    )  # fmt: skip
    ratio, mean_bytes = bytes_ratio(rounds, proof["base_parameters"])
    target = material.downstream_target
    after = proof["exported"]["downstream_accuracy"]
    return {
        "retention": proof["exported"]["retention"],
        "retention_4bit": proof["four_bit"]["retention"],
        "kl_nats_per_token": proof["exported"]["kl_nats_per_token"],
        "kl_over_budget": proof["exported"]["kl_nats_per_token"] / proof["max_kl"],
        "kl_over_budget_4bit": proof["four_bit"]["kl_nats_per_token"] / proof["max_kl"],
        "downstream_before": proof["base"]["downstream_accuracy"],
        "downstream_after": after,
        "downstream_after_4bit": proof["four_bit"]["downstream_accuracy"],
        "downstream_target": target,
        "downstream_over_target": after / target if target else None,
        "strength": proof["strength"],
        "rounds": sum(r["num_accepted"] > 0 for r in rounds),
        "bytes_ratio_full_fp32": ratio,
        "bytes_per_client_round": mean_bytes,
        "export_dir": str(folder / "export"),
        "proof": proof,
        "history": rounds,
    }
