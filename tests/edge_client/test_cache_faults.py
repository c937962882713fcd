"""What happens to the cache of hidden states when processes are killed, bytes flip and disks fill up?

Each test shows two things: the result is right, and the log says what happened.
"""

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import signal
import struct
import traceback

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedblocks.edge_client import prefix_cache
from fedblocks.edge_client.prefix_cache import (
    PrefixStates,
    RecordStore,
    blocks_below,
    cut_key,
    evict_others,
    sample_key,
)

HEADER_BYTES = 64
COUNT = 10
HEAD_LOST = "the journal is another cache's or its head is damaged; everything is made again"
NO_MORE = "records stay in use and nothing more is stored, which costs time but changes no result"
NO_CACHE = "going on without a cache, which costs time but changes no result"


def key(i):
    return bytes([i]) * 16


def records(count, size=100):
    return [(key(i), bytes([i]) * size) for i in range(count)]


def stored(folder, count=5):
    """A closed store of ``count`` records, put one by one."""
    store = RecordStore(folder, warn=pytest.fail)
    for record in records(count):
        store.put([record])
    store.close()
    return folder


def flip(path, offset, mask=1):
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


@pytest.fixture
def said():
    return []


@contextlib.contextmanager
def opened(folder, said, **kwargs):
    store = RecordStore(folder, warn=said.append, **kwargs)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def several(make_model, make_samples, monkeypatch):
    """A model and samples that take a few waves, and a function that gives all records of a store."""
    monkeypatch.setattr(prefix_cache, "WAVE_TOKENS", 40)
    samples = [sample.ids for sample in make_samples(COUNT)]

    def contents(store):
        return {k: store.get(k) for k in map(sample_key, samples)}

    return make_model(), samples, contents


def clean_run(model, samples, contents, folder):
    with opened(folder, []) as store:
        PrefixStates(model, store).fill(samples)
        return contents(store)


# Processes that die


def in_child(body):
    """Forks; the child runs ``body`` and leaves with 0, or 1 after an exception."""
    process = multiprocessing.get_context("fork").Process(target=_guarded, args=(body,))
    process.start()
    return process


def _guarded(body):
    try:
        body()
    except BaseException:  # noqa: BLE001 - the child must not go on as a second test run
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def test_a_filling_process_killed_at_any_moment_leaves_a_cache_that_is_filled_up_to_the_same_bits(
    several, tmp_path, said
):
    model, samples, contents = several
    expected = clean_run(model, samples, contents, tmp_path / "clean" / "store")
    folder, rng = tmp_path / "killed" / "store", random.Random(5)
    kills = 0
    for _ in range(20):
        seen, tell = os.pipe()

        def fill(tell=tell):
            real = os.pwrite

            def noted(*arguments):
                os.write(tell, b".")
                return real(*arguments)

            prefix_cache.os.pwrite = noted
            PrefixStates(model, RecordStore(folder, warn=print)).fill(samples)

        child = in_child(fill)
        os.close(tell)
        writes = rng.randint(1, 8)
        while writes and os.read(seen, 1):  # ends by itself where the child has ended
            writes -= 1
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        os.close(seen)
        kills += child.exitcode == -signal.SIGKILL
    assert kills >= 3
    with opened(folder, said) as store:
        PrefixStates(model, store).fill(samples)
        assert contents(store) == expected
    torn, said[:] = said[:], []
    assert all("the journal is torn" in line for line in torn)
    with opened(folder, said) as store:
        assert contents(store) == expected
    assert said == []
    assert store.corrupt == 0


def test_a_kill_at_every_single_write_and_in_its_middle_changes_no_bit_of_the_final_records(several, tmp_path):
    model, samples, contents = several
    expected = clean_run(model, samples, contents, tmp_path / "clean" / "store")
    lines = []
    for moment in range(100):
        folder = tmp_path / str(moment) / "store"
        calls = iter(range(1000))

        def dying(descriptor, data, offset, moment=moment, calls=calls, real=os.pwrite):
            if next(calls) == moment:
                real(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(descriptor, data, offset)

        def fill(folder=folder, dying=dying):
            prefix_cache.os.pwrite = dying
            PrefixStates(model, RecordStore(folder, warn=print)).fill(samples)

        child = in_child(fill)
        child.join()
        if child.exitcode == 0:
            break  # there are no more writes than this
        assert child.exitcode == -signal.SIGKILL
        said = []
        with opened(folder, said) as store:
            PrefixStates(model, store).fill(samples)
            assert contents(store) == expected
        assert len(said) <= 1
        lines += said
    assert 3 <= moment < 99
    assert any("the journal is torn, its last" in line for line in lines)
    assert any("its head is damaged; everything is made again" in line for line in lines)


def test_the_bytes_of_all_shards_are_on_the_disk_before_the_journal_names_them(tmp_path, said, monkeypatch):
    monkeypatch.setattr(prefix_cache, "SHARD_BYTES", 250)
    calls = []

    def noted(name):
        real = getattr(os, name)

        def call(descriptor, *arguments):
            calls.append((name, os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
            return real(descriptor, *arguments)

        return call

    with opened(tmp_path / "store", said) as store:
        for name in ("pwrite", "fsync"):
            monkeypatch.setattr(prefix_cache.os, name, noted(name))
        store.put(records(3))
    files = [call for call in calls if call[1] != "store"]  # the folder itself is synced when a shard is new
    shards = {"shard-00000.bin", "shard-00001.bin"}
    assert {file for name, file in files[:-2] if name == "fsync"} == shards
    assert {name for name, _ in files[:3]} == {"pwrite"}
    assert {name for name, _ in files[3:-2]} == {"fsync"}
    assert files[-2:] == [("pwrite", "index.journal"), ("fsync", "index.journal")]
    assert ("fsync", "store") in calls


# Bytes that change


@given(cut=st.integers(0, 400))
@settings(max_examples=40)
def test_a_journal_torn_anywhere_keeps_what_was_stored_whole_and_goes_on(tmp_path_factory, cut):
    folder = stored(tmp_path_factory.mktemp("torn") / "store")
    journal = folder / "index.journal"
    whole = journal.read_bytes()
    line = (len(whole) - HEADER_BYTES) // 5
    cut = min(cut, len(whole))
    journal.write_bytes(whole[:cut])
    said = []
    with opened(folder, said) as store:
        kept = max(0, cut - HEADER_BYTES) // line
        assert len(store) == kept
        assert [store.get(k) for k, _ in records(kept)] == [d for _, d in records(kept)]
        store.put(records(6))
    if cut >= HEADER_BYTES and (cut - HEADER_BYTES) % line == 0:
        assert said == []
    elif cut > HEADER_BYTES:
        torn = (cut - HEADER_BYTES) % line
        assert len(said) == 1
        assert f"{folder}: the journal is torn, its last {torn} bytes are cut off; {kept} records are left" in said[0]
    elif cut:
        assert said == [f"{folder}: {HEAD_LOST}"]
    with opened(folder, said) as store:
        assert [store.get(k) for k, _ in records(6)] == [d for _, d in records(6)]


def test_records_stored_together_count_together(tmp_path, said):
    folder = tmp_path / "store"
    with opened(folder, said) as store:
        store.put(records(2))
        store.put(records(5))
    os.truncate(folder / "index.journal", (folder / "index.journal").stat().st_size - 1)
    with opened(folder, said) as store:
        assert len(store) == 2
        assert (folder / "shard-00000.bin").stat().st_size == 128 + 100  # nothing is kept that has no name
    assert len(said) == 1


@pytest.mark.parametrize("line", range(5))
@pytest.mark.parametrize("byte", [0, 1, 7, 20, 33, -1])
def test_a_flipped_byte_in_the_journal_ends_it_there(tmp_path, said, line, byte):
    folder = stored(tmp_path / "store")
    journal = folder / "index.journal"
    size = (journal.stat().st_size - HEADER_BYTES) // 5
    flip(journal, HEADER_BYTES + line * size + byte % size, 0xFF)
    with opened(folder, said) as store:
        assert [k in store for k, _ in records(5)] == [i < line for i in range(5)]
        assert len(said) == 1
        assert f"its last {(5 - line) * size} bytes are cut off; {line} records are left" in said[0]
        store.put(records(5))
        assert [store.get(k) for k, _ in records(5)] == [d for _, d in records(5)]
    with opened(folder, said) as store:
        assert [store.get(k) for k, _ in records(5)] == [d for _, d in records(5)]
    assert len(said) == 1


@pytest.mark.parametrize("byte", [0, 17, 40, 63])
def test_a_flipped_byte_in_the_head_of_the_journal_voids_the_cache(tmp_path, said, byte):
    folder = stored(tmp_path / "store")
    flip(folder / "index.journal", byte)
    with opened(folder, said) as store:
        assert len(store) == 0
    assert said == [f"{folder}: {HEAD_LOST}"]
    assert (folder / "shard-00000.bin").stat().st_size == 0


def test_a_journal_that_names_bytes_which_are_not_there_is_cut(tmp_path, said):
    folder = stored(tmp_path / "store", 4)
    os.truncate(folder / "shard-00000.bin", 300)
    with opened(folder, said) as store:
        assert len(store) == 2
        store.put(records(4))
    with opened(folder, said) as store:
        assert store.get(key(3)) == records(4)[3][1]
    assert len(said) == 1
    assert "2 records are left" in said[0]


def test_a_record_with_a_flipped_bit_is_not_given_out_and_can_be_stored_again(tmp_path, said):
    folder = stored(tmp_path / "store", 3)
    flip(folder / "shard-00000.bin", 130)
    with opened(folder, said) as store:
        assert store.get(key(1)) is None
        assert store.corrupt == 1
        assert said == [
            f"{folder}: a record failed its checksum and is computed again (1 so far); the disk may be failing"
        ]
        assert store.get(key(2)) == records(3)[2][1]
        store.put(records(3))
        assert store.get(key(1)) == records(3)[1][1]
        assert store.num_bytes == 400  # the damaged one still takes its place
    with opened(folder, said) as store:
        assert store.get(key(1)) == records(3)[1][1]
        assert store.num_bytes == 400
    assert len(said) == 1


def test_many_damaged_records_do_not_fill_the_log(tmp_path, said):
    folder = stored(tmp_path / "store", 20)
    (folder / "shard-00000.bin").write_bytes(bytes(20 * 128))
    with opened(folder, said) as store:
        assert [store.get(k) is None for k, _ in records(20)] == [i > 0 for i in range(20)]
    assert [line.split("(")[1].split(" ")[0] for line in said] == ["1", "2", "4", "8", "16"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_data_behind_a_flipped_record_is_computed_again(make_model, make_samples, tmp_path, said, dtype):
    samples = [sample.ids for sample in make_samples(5)]
    model = make_model(dtype=dtype)
    folder = tmp_path / "store"
    with opened(folder, said) as store:
        prefix = PrefixStates(model, store)
        prefix.fill(samples)
        good = prefix.padded(samples)
    flip(folder / "shard-00000.bin", 5, 64)
    assert said == []
    with opened(folder, said) as store:
        prefix = PrefixStates(model, store)
        again = prefix.padded(samples)
        assert (store.corrupt, prefix.computed, prefix.read) == (1, 1, 4)
        prefix.fill(samples)
        assert len(store) == 5
    assert (again.float() - good.float()).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * good.float().norm()
    assert len(said) == 1
    assert "failed its checksum" in said[0]


# Disks that fill up or die


def test_a_full_disk_keeps_what_is_stored_and_computes_the_rest(several, tmp_path):
    """The limit is the kernel's own: writes become short, then fail, as on a full disk."""
    model, samples, contents = several
    expected = clean_run(model, samples, contents, tmp_path / "clean" / "store")
    states = PrefixStates(model, None).padded(samples)
    folder = tmp_path / "full" / "store"
    total = sum(map(len, samples)) * 64 * 4

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (total // 2 + 17, resource.RLIM_INFINITY))
        said = []
        store = RecordStore(folder, warn=said.append)
        prefix = PrefixStates(model, store)
        prefix.fill(samples)
        assert not store.usable
        assert 0 < len(store) < COUNT
        assert said == [f"cannot write {folder}: {os.strerror(errno.EFBIG)}; {len(store)} {NO_MORE}"]
        computed = prefix.computed
        prefix.fill(samples)
        assert prefix.computed == computed  # nothing is computed to be thrown away
        batch = prefix.padded(samples)
        assert (batch - states).norm() <= 1e-6 * states.norm()
        assert prefix.read == len(store)
        assert len(said) == 1

    child = in_child(fill)
    child.join()
    assert child.exitcode == 0
    said = []
    with opened(folder, said) as store:  # and with room again the rest is filled in
        assert 0 < len(store) < COUNT
        PrefixStates(model, store).fill(samples)
        assert contents(store) == expected
    assert said == []


@pytest.mark.parametrize("room", [0, 1, 99, 100, 228, 500, 520, 600])
def test_no_space_left_in_any_byte_of_a_put_leaves_a_store_that_opens_without_a_word(tmp_path, said, monkeypatch, room):
    folder = stored(tmp_path / "store", 2)
    real, left = os.pwrite, [room]

    def short_of_room(descriptor, data, offset):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, data[: left[0]], offset)
        left[0] -= written
        return written

    with opened(folder, said) as store:
        with monkeypatch.context() as full:
            full.setattr(prefix_cache.os, "pwrite", short_of_room)
            for _ in range(2):
                store.put(records(6))
        fits = room >= 600
        assert len(store) == (6 if fits else 2)
        assert store.usable == fits
        assert store.get(key(1)) == records(2)[1][1]
        assert len(said) == (0 if fits else 1)
        assert fits or "No space left on device; 2 records stay in use" in said[0]
    with opened(folder, said) as store:
        assert len(store) == (6 if fits else 2)
        store.put(records(6))
        assert [store.get(k) for k, _ in records(6)] == [d for _, d in records(6)]
    assert len(said) == (0 if fits else 1)


@pytest.mark.parametrize(("room", "kept"), [(-1, 0), (299, 2), (300, 3), (301, 3)])
def test_the_last_quarter_gibibyte_of_a_disk_is_left_free(tmp_path, said, monkeypatch, room, kept):
    folder = tmp_path / "store"
    with opened(folder, said, max_bytes=10_000) as store:
        monkeypatch.setattr(prefix_cache, "_free_bytes", lambda folder: (256 << 20) + room - store.num_bytes)
        for _ in range(2):
            store.put(records(5))
        assert len(store) == kept
        assert store.usable  # room may come
        assert store.get(key(0)) == (records(1)[0][1] if kept else None)
    assert len(said) == 1
    assert said[0].startswith(f"{folder}: the disk is nearly full; the cache leaves its last 256 MiB free")


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_cannot_write_any_more_still_reads(tmp_path, said, monkeypatch, call):
    folder = stored(tmp_path / "store", 2)

    def fails(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    with opened(folder, said) as store:
        with monkeypatch.context() as dead:
            dead.setattr(prefix_cache.os, call, fails)
            for _ in range(2):
                store.put(records(4))
                assert store.get(key(0)) == records(1)[0][1]
        assert said == [f"cannot write {folder}: Input/output error; 2 {NO_MORE}"]
    with opened(folder, said) as store:
        assert len(store) == 2
    assert len(said) == 1


def test_a_read_error_means_no_cache_one_line_and_the_right_states(several, tmp_path, said, monkeypatch):
    model, samples, contents = several
    folder = tmp_path / "store"
    expected = clean_run(model, samples, contents, folder)
    states = PrefixStates(model, None).padded(samples)

    def bad_sector(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    with opened(folder, said) as store:
        prefix = PrefixStates(model, store)
        monkeypatch.setattr(prefix_cache, "_read_at", bad_sector)
        for _ in range(2):
            batch = prefix.padded(samples)
            assert (batch - states).norm() <= 1e-6 * states.norm()
        assert prefix.read == 0
        assert (store.usable, len(store)) == (False, 0)
        prefix.fill(samples)
    monkeypatch.undo()
    assert said == [f"cannot read {folder}: Input/output error; {NO_CACHE}"]
    with opened(folder, said) as store:
        assert contents(store) == expected
    assert len(said) == 1


def test_short_reads_and_writes_are_continued(tmp_path, said, monkeypatch):
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(prefix_cache.os, "preadv", lambda fd, buffers, at: read(fd, [buffers[0][:7]], at))
    monkeypatch.setattr(prefix_cache.os, "pwrite", lambda fd, data, at: write(fd, data[:7], at))
    folder = tmp_path / "store"
    for _ in range(2):
        with opened(folder, said) as store:
            store.put(records(4))
            assert [store.get(k) for k, _ in records(4)] == [d for _, d in records(4)]
    assert said == []


def test_a_folder_that_cannot_be_made_means_no_cache(tmp_path, said):
    (tmp_path / "file").write_text("")
    with opened(tmp_path / "file" / "store", said) as store:
        assert not store.usable
        store.put(records(1))
        assert store.get(key(0)) is None
    assert len(said) == 1
    assert said[0].startswith(f"cannot use {tmp_path / 'file' / 'store'}: ")
    assert said[0].endswith(f"; {NO_CACHE}")


# Others


def test_a_folder_that_another_process_holds_is_left_alone(make_model, make_samples, tmp_path, said):
    samples = [sample.ids for sample in make_samples(4)]
    model = make_model()
    folder = tmp_path / "prefix" / "store"
    holding, held = os.pipe()
    release, done = os.pipe()

    def hold():
        store = RecordStore(folder, warn=print)
        store.put(records(2))
        os.write(held, b"x")
        os.read(release, 1)
        assert [store.get(k) for k, _ in records(2)] == [d for _, d in records(2)]

    child = in_child(hold)
    os.read(holding, 1)
    with opened(folder, said) as store:
        prefix = PrefixStates(model, store)
        prefix.fill(samples)
        assert torch.equal(prefix.padded(samples), PrefixStates(model, None).padded(samples))
        assert (prefix.computed, prefix.read) == (4, 0)
        store.wipe()
    assert said == [f"cannot use {folder}: another process uses {folder}; {NO_CACHE}"]
    assert evict_others(folder.parent, [], said.append) == []
    os.write(done, b"x")
    child.join()
    assert child.exitcode == 0
    with opened(folder, said) as store:
        assert len(store) == 2
    assert len(said) == 1
    for descriptor in (holding, held, release, done):
        os.close(descriptor)


def test_records_of_another_key_are_never_used(make_model, make_samples, tmp_path, said):
    samples = [sample.ids for sample in make_samples(4)]
    mine, other = make_model(), make_model(config={"rope_theta": 5.0})
    keys = [cut_key(model, "0" * 64, cut=model.base_cut) for model in (mine, other)]
    assert keys[0] != keys[1]
    with opened(tmp_path / keys[1], said) as store:
        PrefixStates(other, store).fill(samples)
    (tmp_path / keys[1]).rename(tmp_path / keys[0])
    with opened(tmp_path / keys[0], said) as store:
        assert len(store) == 0
        prefix = PrefixStates(mine, store)
        prefix.fill(samples)
        assert prefix.computed == 4
        assert torch.equal(prefix.padded(samples), PrefixStates(mine, None).padded(samples))
    assert said == [f"{tmp_path / keys[0]}: {HEAD_LOST}"]


def test_a_foreign_shard_under_our_journal_is_not_believed(tmp_path, said):
    ours, theirs = stored(tmp_path / "ours"), tmp_path / "theirs"
    with opened(theirs, said) as store:
        for k, data in records(5):
            store.put([(k, data[::-1][:-1] + b"\xff")])
    (theirs / "shard-00000.bin").replace(ours / "shard-00000.bin")
    with opened(ours, said) as store:
        assert [store.get(k) for k, _ in records(5)] == [None] * 5
        assert store.corrupt == 5
    assert len(said) == 3


def test_a_cache_of_an_older_format_is_made_again(tmp_path, said):
    folder = tmp_path / "store"
    folder.mkdir()
    line = struct.Struct("<H16sIQII")
    (folder / "index.journal").write_bytes(line.pack(line.size + 2, key(0), 0, 0, 100, 0) + bytes(4))
    (folder / "shard-00000.bin").write_bytes(bytes(100))
    with opened(folder, said) as store:
        assert len(store) == 0
    assert len(said) == 1


def test_a_changed_block_below_a_cut_voids_its_cache_and_one_above_does_not(
    make_model, make_samples, random_state, tmp_path, said
):
    samples = [sample.ids for sample in make_samples(5)]
    model = make_model(blocks=3, placement="interleaved", layers=6)
    positions = sorted(model.plan.position(block) for block in model.plan.block_ids)
    low, middle, high = (model.stack[position].index for position in positions)
    cut = positions[1]
    first = random_state(model)
    changes = {
        "nothing": first,
        "above": {**first, high: random_state(model, seed=1)[high], middle: random_state(model, seed=2)[middle]},
        "below": {**first, low: random_state(model, seed=1)[low]},
    }
    found = {}
    for what, state in changes.items():
        model.load_state(state)
        name = cut_key(model, "0" * 64, cut=cut, below=blocks_below(model, cut))
        evicted = evict_others(tmp_path / "prefix", [name], said.append, now={})
        with opened(tmp_path / "prefix" / name, said) as store:
            prefix = PrefixStates(model, store, cut=cut)
            prefix.fill(samples)
            found[what] = (len(evicted), prefix.computed, prefix.padded(samples))
        expected = PrefixStates(model, None, cut=cut).padded(samples)
        assert torch.equal(found[what][2], expected)
    assert [found[what][:2] for what in changes] == [(0, 5), (0, 0), (1, 5)]
    assert torch.equal(found["nothing"][2], found["above"][2])
    assert not torch.equal(found["nothing"][2], found["below"][2])
    assert len(said) == 1
    assert "no plan names its key any more" in said[0]


def test_what_a_process_that_was_killed_had_reported_stored_is_there(tmp_path):
    folder = tmp_path / "store"
    seen, tell = os.pipe()

    def fill():
        store = RecordStore(folder, warn=print)
        for i in range(100_000):
            store.put([(i.to_bytes(16, "big"), i.to_bytes(4, "big") * 1000)])
            os.write(tell, np.int32(i).tobytes())

    child = in_child(fill)
    os.close(tell)
    last = -1
    while last < 30:
        last = int(np.frombuffer(os.read(seen, 4), dtype=np.int32)[0])
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    while report := os.read(seen, 4):
        last = int(np.frombuffer(report, dtype=np.int32)[0])
    os.close(seen)
    with opened(folder, []) as store:
        for i in range(last + 1):
            assert store.get(i.to_bytes(16, "big")) == i.to_bytes(4, "big") * 1000
