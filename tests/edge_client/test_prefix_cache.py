"""Tests of edge_client/prefix_cache.py."""

import os
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedblocks.edge_client import prefix_cache
from fedblocks.edge_client.backbone import Backbone
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore, cut_key, evict_others, sample_key
from fedblocks.edge_client.train import stack_losses, task_batch


def key(i):
    return bytes([i]) * 16


def records(count, size=100):
    return [(key(i), bytes([i]) * size) for i in range(count)]


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def open_store(tmp_path, warnings):
    stores = []

    def open_(**kwargs):
        for store in stores:
            store.close()
        stores.append(RecordStore(tmp_path / "store", warn=warnings.append, **kwargs))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


def test_records_are_there_after_reopening(open_store):
    open_store().put(records(5))
    store = open_store()
    assert len(store) == 5
    assert [store.get(k) for k, _ in records(5)] == [d for _, d in records(5)]
    assert store.get(key(77)) is None
    assert store.num_bytes == 500


def test_records_lie_aligned_in_private_files(open_store, tmp_path):
    open_store().put(records(3, size=70))
    assert (tmp_path / "store" / "shard-00000.bin").stat().st_size == 2 * 128 + 70
    for path in (tmp_path / "store").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700


def test_full_shards_are_followed_by_new_ones(open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_cache, "SHARD_BYTES", 250)
    store = open_store()
    store.put(records(2))
    store.put(records(7))
    assert len(list((tmp_path / "store").glob("shard-*.bin"))) == 4
    assert [open_store().get(k) for k, _ in records(7)] == [d for _, d in records(7)]


@given(cut=st.integers(0, 200))
@settings(max_examples=40)
def test_a_journal_torn_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("torn")
    store = RecordStore(folder, warn=print)
    store.put(records(5))
    store.close()
    journal = folder / "index.journal"
    whole = journal.read_bytes()
    line = len(whole) // 5
    cut = min(cut, len(whole))
    journal.write_bytes(whole[:cut])
    store = RecordStore(folder, warn=pytest.fail)
    assert len(store) == cut // line
    store.put(records(6))
    store.close()
    store = RecordStore(folder, warn=pytest.fail)
    assert [store.get(k) for k, _ in records(6)] == [d for _, d in records(6)]
    store.close()


def test_a_garbled_journal_line_ends_the_journal(open_store, tmp_path):
    open_store().put(records(4))
    journal = tmp_path / "store" / "index.journal"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 0xFF
    journal.write_bytes(data)
    assert len(open_store()) == 2


def test_a_journal_that_names_bytes_which_are_not_there_is_cut(open_store, tmp_path):
    open_store().put(records(4))
    os.truncate(tmp_path / "store" / "shard-00000.bin", 300)
    store = open_store()
    assert len(store) == 2
    store.put(records(4))
    assert open_store().get(key(3)) == records(4)[3][1]


def test_a_record_with_a_flipped_bit_is_not_given_out_and_can_be_stored_again(open_store, tmp_path):
    open_store().put(records(3))
    shard = tmp_path / "store" / "shard-00000.bin"
    data = bytearray(shard.read_bytes())
    data[130] ^= 1
    shard.write_bytes(data)
    store = open_store()
    assert store.get(key(1)) is None
    assert store.corrupt == 1
    assert store.get(key(2)) == records(3)[2][1]
    store.put(records(3))
    assert store.get(key(1)) == open_store().get(key(1)) == records(3)[1][1]


def test_a_second_process_does_without_the_cache_and_says_so(open_store, tmp_path, warnings):
    store = open_store()
    second = RecordStore(tmp_path / "store", warn=warnings.append)
    assert not second.usable
    second.put(records(2))
    assert second.get(key(0)) is None
    assert len(warnings) == 1
    assert "another process" in warnings[0]
    store.close()
    assert RecordStore(tmp_path / "store", warn=warnings.append).usable


@pytest.mark.parametrize(("limit", "kept"), [(299, 2), (300, 3), (301, 3)])
def test_what_does_not_fit_the_limit_is_left_out_highest_keys_first(open_store, limit, kept, warnings):
    store = open_store(max_bytes=limit)
    store.put(reversed(records(5)))
    assert [k in store for k, _ in records(5)] == [i < kept for i in range(5)]
    assert warnings == []


@pytest.mark.parametrize("call", ["pwrite", "fsync", "pread", "write"])
def test_a_dying_disk_means_no_cache_and_one_warning(open_store, monkeypatch, warnings, call):
    store = open_store()
    store.put(records(2))

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_cache.os, call, fails)
    for _ in range(2):
        store.put(records(4))
        assert store.get(key(0)) in (None, records(1)[0][1])
    monkeypatch.undo()
    assert len(warnings) == 1
    assert "without a cache" in warnings[0]
    assert open_store().get(key(0)) == records(1)[0][1]  # what was durable before is still good


def test_a_folder_that_cannot_be_made_means_no_cache(tmp_path, warnings):
    (tmp_path / "file").write_text("")
    store = RecordStore(tmp_path / "file" / "store", warn=warnings.append)
    assert not store.usable
    assert len(warnings) == 1


KILLED = """
import sys
from pathlib import Path
from fedblocks.edge_client.prefix_cache import RecordStore
store = RecordStore(Path(sys.argv[1]), warn=print)
for i in range(100_000):
    store.put([(i.to_bytes(16, "big"), i.to_bytes(4, "big") * 1000)])
    print(i, flush=True)
"""


def test_after_a_kill_every_record_that_was_reported_stored_is_there(tmp_path):
    folder = tmp_path / "store"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    last = -1
    deadline = time.monotonic() + 60
    for line in process.stdout:
        last = int(line)
        if last >= 30 or time.monotonic() > deadline:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    process.wait()
    store = RecordStore(folder, warn=pytest.fail)
    assert last >= 30
    for i in range(last + 1):
        assert store.get(i.to_bytes(16, "big")) == i.to_bytes(4, "big") * 1000
    store.close()


def test_wiping_leaves_nothing(open_store, tmp_path):
    store = open_store()
    store.put(records(2))
    store.wipe()
    assert not (tmp_path / "store").exists()


def test_caches_that_no_plan_names_are_evicted(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").write_text("x")
    assert sorted(evict_others(tmp_path, ["b"])) == ["a", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert evict_others(tmp_path / "absent", []) == []


def test_the_sample_key_knows_the_tokens_and_not_the_labels_or_their_type():
    ids = np.array([5, 6, 7], dtype=np.int32)
    assert sample_key(ids) == sample_key(ids.astype(np.int64))
    assert len({sample_key(ids), sample_key(ids[:2]), sample_key(ids[::-1])}) == 3


def test_the_cut_key_changes_with_everything_below_the_cut_and_with_nothing_above(make_model, random_state):
    model = make_model(blocks=2, layers=6)
    keys = {
        cut_key(model, "0" * 64, cut=4),
        cut_key(model, "1" * 64, cut=4),
        cut_key(model, "0" * 64, cut=5),
        cut_key(model, "0" * 64, cut=4, below=[(0, "aa")]),
        cut_key(model, "0" * 64, cut=4, below=[(0, "ab")]),
        cut_key(make_model(blocks=2, layers=6, nf4=False), "0" * 64, cut=4),
        cut_key(make_model(blocks=2, layers=6, dtype=torch.bfloat16), "0" * 64, cut=4),
        cut_key(make_model(blocks=2, layers=6, config={"rope_theta": 5.0}), "0" * 64, cut=4),
    }
    assert len(keys) == 8
    key_before = cut_key(model, "0" * 64, cut=model.base_cut)
    model.load_state(random_state(model))  # the blocks lie at and above the base cut
    assert cut_key(model, "0" * 64, cut=model.base_cut) == key_before


@pytest.mark.parametrize(("placement", "cut"), [("interleaved", 1), ("thirds", 3), ("top", 4)])
def test_cached_loss_and_gradients_are_the_bits_of_uncached_ones(
    make_model, make_samples, random_state, tmp_path, placement, cut
):
    samples = make_samples(6)
    found = []
    for folder in (None, tmp_path / "prefix"):
        model = make_model(blocks=1 if placement != "interleaved" else 4, placement=placement)
        model.load_state(random_state(model))
        assert model.base_cut == cut
        store = None if folder is None else RecordStore(folder, warn=pytest.fail)
        prefix = PrefixStates(model, store)
        prefix.fill(sample.ids for sample in samples)
        assert prefix.computed == (0 if store is None else 6)
        batch = task_batch(samples, prefix.padded([sample.ids for sample in samples]))
        assert prefix.read == (0 if store is None else 6)
        groups = model.train_blocks(model.plan.block_ids)
        loss = stack_losses(model, model.base_cut).task(batch, 0.1)
        loss.backward()
        found.append([loss.detach(), *(t.grad for group in groups for t in group.tensors)])
        if store is not None:
            store.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # and the same as one pass from the embedding, to rounding
    ids = torch.zeros(6, 12, dtype=torch.int64)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample.ids)] = torch.from_numpy(sample.ids)
    whole = stack_losses(model, 0).task(task_batch(samples, ids), 0.1)
    assert whole.item() == pytest.approx(found[0][0].item(), rel=1e-6)


def test_a_record_does_not_depend_on_its_neighbours_or_on_the_order_of_filling(make_model, make_samples, tmp_path):
    samples = [sample.ids for sample in make_samples(5)]
    model = make_model()
    states = []
    for i, order in enumerate((samples, samples[::-1])):
        prefix = PrefixStates(model, RecordStore(tmp_path / str(i), warn=pytest.fail))
        for ids in order:
            prefix.fill([ids])
        states.append(prefix.padded(samples))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], PrefixStates(model, None).padded(samples))


def test_waves_and_streamed_layers_change_no_bit_of_a_record(make_model, make_samples, tmp_path, monkeypatch):
    samples = [sample.ids for sample in make_samples(7)]
    model = make_model(layers=6)
    expected = PrefixStates(model, None).padded(samples)
    model.backbone = Backbone.open(model.checkpoint, tmp_path / "other", base_hash="0" * 64, resident=0)
    for tokens in (1, 25, 10_000):
        monkeypatch.setattr(prefix_cache, "WAVE_TOKENS", tokens)
        store = RecordStore(tmp_path / str(tokens), warn=pytest.fail)
        prefix = PrefixStates(model, store)
        prefix.fill(iter([*samples, samples[0]]))
        assert prefix.computed == len(store) == 7
        assert torch.equal(prefix.padded(samples), expected)
        store.close()


def test_a_flipped_record_is_computed_again(make_model, make_samples, tmp_path):
    samples = [sample.ids for sample in make_samples(3)]
    model = make_model()
    store = RecordStore(tmp_path / "p", warn=pytest.fail)
    PrefixStates(model, store).fill(samples)
    good = PrefixStates(model, store).padded(samples)
    store.close()
    shard = tmp_path / "p" / "shard-00000.bin"
    data = bytearray(shard.read_bytes())
    data[5] ^= 64
    shard.write_bytes(data)
    store = RecordStore(tmp_path / "p", warn=pytest.fail)
    prefix = PrefixStates(model, store)
    assert torch.equal(prefix.padded(samples), good)
    assert (store.corrupt, prefix.computed, prefix.read) == (1, 1, 2)
    store.close()
