"""What must not count: refused with one clear line on both sides, and the model unchanged bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

from fedblocks import cli
from fedblocks.aggregator.auth import Registry
from fedblocks.aggregator.status import run_status
from fedblocks.edge_client import client
from fedblocks.edge_client.identity import load_or_create_identity
from fedblocks.edge_client.transport import Connected, Problem, Received, Transport
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol import site_file
from fedblocks.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Assignment,
    DataStatistics,
    Delta,
    Hello,
    Ready,
    Refused,
    TensorHeader,
    TrainReport,
)
from fedblocks.protocol.tensors import encode_delta

RULES = ("expansion.blocks=2", "delta.format=fp32", "run.max_rounds=2", "allocation.rejoin_grace_s=2")


class HostileSite:
    """A client of our own making that speaks the protocol well and lies about its update."""

    def __init__(self, c, name: str) -> None:
        self.c = c
        self.site = site_file.load(c.folder / f"{name}.toml")
        self.transport = Transport(
            self.site.address, server_key=self.site.server_key, key_pair=load_or_create_identity(c.home(name))
        )

    def hello(self, **changes) -> Hello:
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            run_id=self.site.run_id,
            base_hash=self.site.base_hash,
            client_name=self.site.client_name,
            software="hostile",
            profile=self.c.profile,
            statistics=DataStatistics(num_examples=30, num_target_tokens=90, mean_tokens=6.0, max_tokens=8),
            held_version=0,
            can_evaluate_general=False,
        )
        return dataclasses.replace(hello, **changes)

    def until(self, kind, timeout_s: float = 30.0):
        """The next message of this kind."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            event = self.transport.get(0.5)
            if isinstance(event, Received) and isinstance(event.message, kind):
                return event.message
            if isinstance(event, Problem) and event.fatal:
                return event
        raise AssertionError(f"no {kind} within {timeout_s} s:\n{self.c.text('aggregator')}")

    def greet(self, **changes) -> None:
        end = time.monotonic() + 30
        while not isinstance(self.transport.get(0.5), Connected):
            assert time.monotonic() < end, self.c.text("aggregator")
        self.transport.send(self.hello(**changes))

    def assignment(self) -> Assignment:
        self.greet()
        self.transport.send(Ready())
        return self.until(Assignment)


def good_update(c, task: Assignment) -> tuple[Delta, bytes]:
    """An honest looking update: small changes of exactly the assigned blocks."""
    from fedblocks.protocol.expansion import ExpansionPlan

    shape = ExpansionPlan.from_json((c.run / "plan.json").read_text()).shape
    generator = np.random.default_rng(0)
    deltas = {
        b: {t.name: (1e-5 * generator.standard_normal(t.shape)).astype(np.float32) for t in shape.block_tensors()}
        for b in task.blocks
    }
    encoded = encode_delta(shape, task.blocks, deltas, {}, format=task.delta_format, density=task.delta_density)
    body = b"".join(encoded.parts)
    report = TrainReport(
        num_target_tokens=90, loss_first=1.0, loss_last=1.0, anchor_kl=0.0, prefix_s=0.1, train_s=0.1, measure_s=0.1,
        encode_s=0.1, step_s=0.01, peak_memory_bytes=1, predicted_peak_bytes=1, mode=ExecutionMode(),
        gradient_energy=(1.0,) * len(task.blocks),
    )  # fmt: skip
    return sealed(
        Delta(
            attempt_id=task.attempt_id, round=task.round, version=task.state.to_version, num_examples=30,
            steps=task.steps, format=task.delta_format, density=task.delta_density, tensors=encoded.headers,
            payload_bytes=0, payload_sha256="", train=report, measurements=(),
        ),
        body,
    )  # fmt: skip


def sealed(delta: Delta, body: bytes) -> tuple[Delta, bytes]:
    digest = hashlib.sha256(body).hexdigest()
    return dataclasses.replace(delta, payload_bytes=len(body), payload_sha256=digest), body


def with_nan(delta: Delta, body: bytes) -> tuple[Delta, bytes]:
    return sealed(delta, body[:400] + struct.pack("<f", float("nan")) + body[404:])


def a_hundred_times_too_large(delta: Delta, body: bytes) -> tuple[Delta, bytes]:
    values = np.frombuffer(body, dtype="<f4") * 1e6
    return sealed(delta, values.astype("<f4").tobytes())


def with_a_wrong_shape(delta: Delta, body: bytes) -> tuple[Delta, bytes]:
    first = delta.tensors[1]
    wrong = TensorHeader(block=first.block, name=first.name, rows_sent=first.rows_sent + 1)
    return sealed(dataclasses.replace(delta, tensors=(delta.tensors[0], wrong, *delta.tensors[2:])), body)


def of_an_unassigned_block(delta: Delta, body: bytes) -> tuple[Delta, bytes]:
    tensors = tuple(dataclasses.replace(t, block=t.block + 7) for t in delta.tensors)
    return sealed(dataclasses.replace(delta, tensors=tensors), body)


def with_a_huge_weight(delta: Delta, body: bytes) -> tuple[Delta, bytes]:
    return sealed(dataclasses.replace(delta, num_examples=10**12), body)


def with_other_bytes(delta: Delta, body: bytes) -> tuple[Delta, bytes]:
    return delta, bytes([body[0] ^ 1]) + body[1:]


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (with_nan, "non_finite"),
        (with_a_wrong_shape, "shape_mismatch"),
        (of_an_unassigned_block, "not_assigned"),
        (a_hundred_times_too_large, "over_norm"),
        (with_a_huge_weight, "bad_weight"),
        (with_other_bytes, "checksum_mismatch"),
    ],
)
def test_a_bad_update_is_refused_with_its_code_and_the_good_one_counts_alone(consortium, spoil, code):
    c = consortium(*RULES, "run.max_rounds=1")
    c.serve()
    bad, good = HostileSite(c, "site-1"), HostileSite(c, "site-2")
    bad.greet()
    good.greet()
    for site in (bad, good):
        site.transport.send(Ready())
    bad_task, good_task = bad.until(Assignment), good.until(Assignment)
    bad.transport.send(*spoil(*good_update(c, bad_task)))

    refused = bad.until(Refused)
    good.transport.send(*good_update(c, good_task))
    good.until(Ack)

    assert refused.code == code
    c.until(lambda: len(c.metrics()) == 1, "the round closes")
    (row,) = c.metrics()
    assert (row["num_accepted"], row["num_refused"]) == (1, 1)
    clients = {x["name"]: x for x in run_status(c.run)["clients"]}
    assert clients["site-1"]["refusals"] == {code: 1}
    assert clients["site-2"]["refusals"] == {}
    assert code in c.text("aggregator")
    for site in (bad, good):
        site.transport.close()


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"protocol_version": PROTOCOL_VERSION + 1}, "version_skew", str(PROTOCOL_VERSION + 1)),
        ({"base_hash": "0" * 64}, "model_mismatch", "0" * 16),
        ({"run_id": "another-run"}, "model_mismatch", "another-run"),
    ],
)
def test_another_version_base_or_run_is_refused_at_the_door_with_both_values(consortium, changes, code, says):
    c = consortium(*RULES, clients=1)
    c.serve()
    site = HostileSite(c, "site-1")
    site.greet(**changes)

    refused = site.until(Refused)

    assert refused.code == code
    assert says in refused.text
    assert run_status(c.run)["clients"] == []
    site.transport.close()


def test_a_key_that_is_not_enrolled_ends_with_exit_code_4_and_its_line_within_seconds(consortium):
    c = consortium(*RULES, clients=1)
    c.serve()
    c.until(lambda: "serving" in c.text("aggregator"), "the aggregator listens")
    registry = json.loads((c.run / "clients.json").read_text())
    (c.run / "clients.json").write_text(json.dumps({**registry, "clients": []}))

    c.join("site-1")

    assert c.wait("site-1", 30) == 4, c.text("site-1")
    assert "not enrolled" in c.text("site-1")
    assert "Traceback" not in c.text("site-1")
    assert run_status(c.run)["clients"] == []


@pytest.mark.slow
def test_a_new_key_waits_until_the_operator_lets_it_in(consortium):
    c = consortium(*RULES, clients=1)
    c.serve()
    key_file = c.home("site-1") / "client.key.json"
    key_file.unlink()
    (c.run / "clients.json").write_text(json.dumps({"clients": []}))
    c.join("site-1")
    c.until(lambda: "waiting for the operator" in c.text("site-1"), "site-1 waits")

    key = load_or_create_identity(c.home("site-1")).public
    assert f"--key='{key}'" in c.text("site-1")
    Registry(c.run).enrol(key, "site-1", now_unix_s=time.time())

    assert c.wait("aggregator") == 0, c.text("aggregator")
    assert c.wait("site-1", 30) == 0, c.text("site-1")


@pytest.mark.slow
def test_a_client_whose_key_is_revoked_in_mid_run_ends_with_exit_code_4(consortium):
    c = consortium(*RULES, "run.max_rounds=50", "training.steps=60", "allocation.min_cohort=1")
    c.serve()
    for name in ("site-1", "site-2"):
        c.join(name)
    c.until(lambda: len(c.metrics()) >= 1, "the first round is over")

    done = subprocess.run(c.command("keys", "revoke", str(c.run), "site-1"), capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert c.wait("site-1", 40) == 4, c.text("site-1")
    assert "revoked" in c.text("site-1")
    version = run_status(c.run)["version"]
    c.until(lambda: run_status(c.run)["version"] > version, "the run goes on without site-1")


def test_a_client_with_another_base_model_ends_with_exit_code_4_and_both_hashes(consortium, tiny_checkpoint, tmp_path):
    c = consortium(*RULES, clients=1)
    c.serve()
    c.model = tiny_checkpoint(tmp_path, seed=5)

    c.join("site-1")

    assert c.wait("site-1", 60) == 4
    assert "another base model" in c.text("site-1")
    assert "Traceback" not in c.text("site-1")


def test_a_wrong_server_key_ends_with_exit_code_4(consortium):
    c = consortium(*RULES, clients=1)
    c.serve()
    c.until(lambda: "serving" in c.text("aggregator"), "the aggregator listens")
    site = c.folder / "site-1.toml"
    other = load_or_create_identity(tmp := c.folder / "other").public
    assert tmp.is_dir()
    text = site.read_text()
    site.write_text(text.replace(site_file.load(site).server_key, other))

    c.join("site-1")

    assert c.wait("site-1", 60) == 4, c.text("site-1")
    assert "server key" in c.text("site-1")


def test_nobody_at_the_address_is_exit_code_3(consortium, monkeypatch, capsys):
    c = consortium(*RULES, clients=1)
    monkeypatch.setattr(client, "Transport", partial(Transport, connect_timeout_s=1.0))
    arguments = ["join", str(c.folder / "site-1.toml"), "--data", str(c.folder / "site-1.jsonl")]
    monkeypatch.setattr(
        sys, "argv", ["fedblocks", *arguments, "--model", str(c.model), "--home", str(c.home("site-1"))]
    )

    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 3
    said = capsys.readouterr()
    assert "no aggregator listens there" in said.out + said.err
    assert "Traceback" not in said.out + said.err
