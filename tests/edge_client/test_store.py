"""What lies on the client's disk survives a kill, or reads as absent."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from fedblocks.edge_client.store import ClientStore
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.messages import AttemptId, Delta, ResourceInfo, TrainReport


@pytest.fixture
def store(tmp_path) -> ClientStore:
    return ClientStore(tmp_path / "run")


def state(value: float = 1.0) -> dict[int, dict[str, np.ndarray]]:
    return {0: {"mlp.up_proj.weight": np.full((3, 2), value, dtype=np.float32)}}


def update(body: bytes = b"payload") -> Delta:
    train = TrainReport(
        num_target_tokens=1, loss_first=1.0, loss_last=1.0, anchor_kl=0.0, prefix_s=0.0, train_s=0.0, measure_s=0.0,
        encode_s=0.0, step_s=0.0, peak_memory_bytes=0, predicted_peak_bytes=0, mode=ExecutionMode(), gradient_energy=(),
    )  # fmt: skip
    return Delta(
        attempt_id=AttemptId("a1"), round=1, version=0, num_examples=1, steps=1, format="fp32", density=1.0, tensors=(),
        payload_bytes=len(body), payload_sha256=hashlib.sha256(body).hexdigest(), train=train, measurements=(),
    )  # fmt: skip


def test_the_folder_is_private(store):
    assert store.folder.stat().st_mode & 0o777 == 0o700


def test_the_held_state_reads_back_with_its_version(store):
    store.put_held_state(4, state())

    version, found = store.held_state()

    assert version == 4
    assert np.array_equal(found[0]["mlp.up_proj.weight"], state()[0]["mlp.up_proj.weight"])


def test_a_flipped_bit_or_a_kill_between_the_two_files_reads_as_version_0(store):
    store.put_held_state(4, state())
    meta = (store.folder / "held.json").read_bytes()
    store.put_held_state(5, state(2.0))
    (store.folder / "held.json").write_bytes(meta)
    assert store.held_state() == (0, {})

    store.put_held_state(5, state(2.0))
    path = store.folder / "held.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert store.held_state() == (0, {})


def test_an_update_stays_in_the_outbox_until_it_is_dropped(store):
    store.put_update(update(), b"payload")

    again = ClientStore(store.folder)
    delta, path = again.update()
    assert delta == update()
    assert path.read_bytes() == b"payload"
    assert again.pending_attempt() == "a1"

    again.drop_update()
    assert again.update() is None


def test_an_update_whose_bytes_are_damaged_is_not_announced(store):
    store.put_update(update(), b"payload")
    (store.folder / "outbox" / "payload.bin").write_bytes(b"pay")

    assert store.update() is None


def test_a_half_written_update_is_not_seen(store):
    (store.folder / "outbox.tmp").mkdir()
    (store.folder / "outbox.tmp" / "payload.bin").write_bytes(b"pay")

    assert store.update() is None
    store.put_update(update(), b"payload")
    assert store.pending_attempt() == "a1"


@pytest.mark.parametrize("name", ["../x", "/etc/x", ".hidden", "a/b", ""])
def test_a_file_of_the_run_cannot_leave_its_folder(store, name):
    info = ResourceInfo(name=name, num_bytes=1, sha256=hashlib.sha256(b"x").hexdigest())

    with pytest.raises(RemoteProtocolError, match="plain file name"):
        store.put_resource(info, b"x")


def test_a_file_of_the_run_is_kept_only_with_the_announced_bytes(store):
    info = ResourceInfo(name="plan.json", num_bytes=1, sha256=hashlib.sha256(b"x").hexdigest())
    with pytest.raises(RemoteProtocolError, match="plan"):
        store.put_resource(dataclasses.replace(info, num_bytes=2), b"x")

    store.put_resource(info, b"x")

    assert store.resource_hashes() == {info.sha256}
