"""Tests of edge_client/prefix_cache.py; what happens when disks and processes fail is in test_cache_faults.py."""

import json
import stat
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedblocks.edge_client import prefix_cache
from fedblocks.edge_client.prefix_cache import (
    GIB,
    PrefixStates,
    RecordStore,
    blocks_below,
    cut_fields,
    cut_key,
    default_max_bytes,
    evict_others,
    sample_key,
)
from fedblocks.edge_client.train import stack_losses, task_batch


def key(i):
    return bytes([i]) * 16


def records(count, size=100):
    return [(key(i), bytes([i]) * size) for i in range(count)]


@pytest.fixture
def open_store(tmp_path):
    stores = []

    def open_(folder="store", **kwargs):
        for store in stores:
            store.close()
        stores.append(RecordStore(tmp_path / folder, **{"warn": pytest.fail, **kwargs}))
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


@pytest.mark.parametrize(("limit", "kept"), [(299, 2), (300, 3), (301, 3)])
@pytest.mark.parametrize("location", ["disk", "ram"])
def test_what_does_not_fit_the_limit_is_left_out_highest_keys_first(open_store, limit, kept, location):
    store = open_store(max_bytes=limit, location=location)
    assert store.admitted({k: len(d) for k, d in reversed(records(5))}) == [key(i) for i in range(kept)]
    store.put(reversed(records(5)))
    assert [k in store for k, _ in records(5)] == [i < kept for i in range(5)]
    assert store.num_bytes == 100 * kept <= limit
    assert store.admitted({key(9): 100}) == []
    assert store.usable


def test_the_limit_holds_over_restarts(open_store):
    open_store(max_bytes=350).put(records(2))
    store = open_store(max_bytes=350)
    store.put(records(5))
    assert len(store) == 3
    assert len(open_store(max_bytes=100)) == 3  # a lower limit deletes nothing
    open_store(max_bytes=100).put(records(5))
    assert len(open_store(max_bytes=100)) == 3


def test_the_default_limit_is_a_fifth_of_the_free_disk_and_does_not_shrink_by_filling(tmp_path, monkeypatch):
    free = 50 * GIB
    monkeypatch.setattr(prefix_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert default_max_bytes(tmp_path / "not" / "there") == 10 * GIB
    free = 45 * GIB
    assert default_max_bytes(tmp_path, 5 * GIB) == 10 * GIB
    free = 100 * GIB
    assert default_max_bytes(tmp_path) == 16 * GIB


def test_records_in_memory_touch_no_disk_and_end_with_the_store(open_store, tmp_path):
    store = open_store(location="ram", meta={"a": 1})
    assert store.location == "ram"
    assert store.usable
    store.put(records(3))
    assert (len(store), store.num_bytes) == (3, 300)
    assert key(1) in store
    assert key(7) not in store
    assert store.get(key(1)) == records(3)[1][1]
    assert store.get(key(7)) is None
    store.wipe()
    assert not (tmp_path / "store").exists()
    assert not store.usable
    assert store.get(key(1)) is None
    assert len(open_store(location="ram")) == 0


def test_a_record_in_memory_is_a_copy(open_store):
    store = open_store(location="ram")
    data = bytearray(b"abc")
    store.put([(key(0), data)])
    data[:] = b"xyz"
    assert store.get(key(0)) == b"abc"


AVAILABLE = 4000


@pytest.mark.parametrize(
    ("max_bytes", "expected_bytes", "location"),
    [
        (999, None, "ram"),
        (1000, None, "ram"),
        (1001, None, "disk"),
        (10_000, 1000, "ram"),
        (10_000, 1001, "disk"),
        (1000, 99_999, "ram"),
        (None, None, "disk"),  # the default of the disk is more
        (None, 1000, "ram"),
    ],
)
def test_auto_takes_memory_where_it_fits_a_quarter_of_what_is_available(
    open_store, monkeypatch, max_bytes, expected_bytes, location
):
    monkeypatch.setattr(prefix_cache.psutil, "virtual_memory", lambda: SimpleNamespace(available=AVAILABLE))
    store = open_store(location="auto", max_bytes=max_bytes, expected_bytes=expected_bytes)
    assert store.location == location
    store.put(records(30))
    assert store.num_bytes == 100 * min(30, (max_bytes or (3000 if location == "disk" else 1000)) // 100)


def test_auto_stays_with_the_records_that_are_on_the_disk(open_store):
    open_store().put(records(2))
    store = open_store(location="auto", max_bytes=300)
    assert store.location == "disk"
    assert len(store) == 2


def test_a_record_is_read_into_memory_of_its_length(open_store):
    for location in ("disk", "ram"):
        store = open_store(location=location)
        store.put(records(3))
        place = np.zeros((10, 10), dtype=np.uint8)
        assert store.read_into(key(2), place)
        assert (place == 2).all()
        assert not store.read_into(key(7), place)
        with pytest.raises(ValueError, match="the record has 100 bytes, the buffer 99"):
            store.read_into(key(2), bytearray(99))


def test_the_meta_file_says_what_the_key_is_made_of(open_store, tmp_path):
    path = tmp_path / "store" / "meta.json"
    open_store().put(records(1))
    assert not path.exists()
    open_store(meta={"cut": 3, "model": {"rope": [1, 2]}})
    assert json.loads(path.read_text()) == {"cut": 3, "model": {"rope": [1, 2]}}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.stat().st_mtime_ns
    open_store(meta={"cut": 3, "model": {"rope": [1, 2]}})
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"\xff\x00")
    assert len(open_store(meta={"cut": 3})) == 1  # it is for people: records do not depend on it
    assert json.loads(path.read_text()) == {"cut": 3}


def test_wiping_leaves_nothing(open_store, tmp_path):
    store = open_store()
    store.put(records(2))
    store.wipe()
    assert not (tmp_path / "store").exists()
    assert store.get(key(0)) is None


def test_caches_that_no_plan_names_are_evicted_and_the_log_says_why(tmp_path):
    for name, cut in (("a", 4), ("b", 6), ("c", 5)):
        store = RecordStore(tmp_path / name, meta={"cut": cut, "base": "x" * 64, "new": cut}, warn=pytest.fail)
        store.put([(key(1), bytes(300_000))])
        store.close()
    (tmp_path / "file").write_text("")
    said = []
    now = {"cut": 6, "base": "y" * 64, "other": 1}
    assert evict_others(tmp_path, ["b"], said.append, now=now) == ["a", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "file"]
    assert said == [
        f"evicted the cache {tmp_path / name}, 0.3 MB: no plan names its key any more "
        f"(base changed; cut was {cut}, is 6)"
        for name, cut in (("a", 4), ("c", 5))
    ]
    assert evict_others(tmp_path / "absent", [], pytest.fail) == []


def test_a_folder_without_a_meta_file_is_evicted_too(tmp_path):
    (tmp_path / "old").mkdir()
    said = []
    assert evict_others(tmp_path, [], said.append, now={"cut": 1}) == ["old"]
    assert said[0].endswith("no plan names its key any more")


def test_the_sample_key_knows_the_tokens_and_not_the_labels_or_their_type():
    ids = np.array([5, 6, 7], dtype=np.int32)
    assert sample_key(ids) == sample_key(ids.astype(np.int64))
    assert len({sample_key(ids), sample_key(ids[:2]), sample_key(ids[::-1])}) == 3


def test_the_cut_key_changes_with_everything_below_the_cut_and_with_nothing_above(
    make_model, random_state, monkeypatch
):
    model = make_model(blocks=2, layers=6)
    keys = [
        cut_key(model, "0" * 64, cut=4),
        cut_key(model, "1" * 64, cut=4),
        cut_key(model, "0" * 64, cut=5),
        cut_key(model, "0" * 64, cut=4, below=[(0, "aa")]),
        cut_key(model, "0" * 64, cut=4, below=[(0, "ab")]),
        cut_key(model, "0" * 64, cut=4, below=[(1, "aa")]),
        cut_key(make_model(blocks=2, layers=6, nf4=False), "0" * 64, cut=4),
        cut_key(make_model(blocks=2, layers=6, dtype=torch.bfloat16), "0" * 64, cut=4),
        cut_key(make_model(blocks=2, layers=6, config={"rope_theta": 5.0}), "0" * 64, cut=4),
        cut_key(make_model(blocks=2, layers=6, config={"rms_norm_eps": 1e-3}), "0" * 64, cut=4),
        cut_key(
            make_model(blocks=2, layers=6, config={"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
            "0" * 64,
            cut=4,
        ),
        cut_key(make_model(blocks=2, layers=6, family="mistral", config={"sliding_window": 4}), "0" * 64, cut=4),
        cut_key(make_model(blocks=2, layers=6, family="mistral", config={"sliding_window": 5}), "0" * 64, cut=4),
    ]
    monkeypatch.setattr(prefix_cache, "NUMERICS_CLASS", 99)
    keys.append(cut_key(model, "0" * 64, cut=4))
    monkeypatch.undo()
    assert len(set(keys)) == len(keys)
    model.load_state(random_state(model))  # the blocks lie at and above the base cut
    assert cut_key(model, "0" * 64, cut=4) == keys[0]
    fields = cut_fields(model, "0" * 64, cut=4)
    assert json.loads(json.dumps(fields)).keys() == fields.keys()
    assert (fields["compute"], fields["store"]) == ("float32", "float32")
    half = cut_fields(make_model(blocks=2, layers=6, dtype=torch.bfloat16), "0" * 64, cut=4)
    assert (half["compute"], half["store"]) == ("bfloat16", "bfloat16")


def test_a_block_that_changed_below_the_cut_changes_the_key_and_one_above_does_not(make_model, random_state):
    model = make_model(blocks=3, placement="interleaved", layers=6)
    positions = sorted(model.plan.position(block) for block in model.plan.block_ids)
    cut = positions[1] + 1

    def at(state):
        model.load_state(state)
        return cut_key(model, "0" * 64, cut=cut, below=blocks_below(model, cut))

    state = random_state(model)
    before = at(state)
    assert [block for block, _ in blocks_below(model, cut)] == [model.stack[p].index for p in positions[:2]]
    changed = set()
    for position in positions:
        block = model.stack[position].index
        name = "mlp.down_proj.weight"
        other = state[block][name].copy()
        other[3, 5] += 0.01
        key_then = at({**state, block: {**state[block], name: other}})
        assert (key_then != before) == (position < cut)
        changed.add(key_then)
    assert len(changed) == 3
    assert at(state) == before
    assert blocks_below(model, model.base_cut) == []


# Prefix states


def states_one_by_one(model, samples):
    """The specification: one sample at a time through whole layers."""
    with torch.no_grad():
        return [model.forward(torch.from_numpy(ids.astype(np.int64))[None], 0, model.base_cut)[0] for ids in samples]


def assert_near(batch, samples, expected, dtype=torch.float32):
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for row, ids, state in zip(batch, samples, expected, strict=True):
        error = (row[: len(ids)].float() - state.float()).norm() / state.float().norm()
        assert error <= tolerance
        assert not row[len(ids) :].any()


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
    # the same samples in one wave: the same batches, so the same bits
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # and the same as one pass from the embedding, to rounding
    ids = torch.zeros(6, 12, dtype=torch.int64)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample.ids)] = torch.from_numpy(sample.ids)
    groups = model.train_blocks(model.plan.block_ids)
    whole = stack_losses(model, 0).task(task_batch(samples, ids), 0.1)
    whole.backward()
    assert whole.item() == pytest.approx(found[0][0].item(), rel=1e-6)
    for mine, theirs in zip(found[0][1:], (t.grad for group in groups for t in group.tensors), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nf4", [True, False])
def test_states_are_those_of_each_sample_by_itself(make_model, make_samples, tmp_path, dtype, nf4):
    samples = [sample.ids for sample in make_samples(20)]
    model = make_model(dtype=dtype, nf4=nf4)
    expected = states_one_by_one(model, samples)
    store = RecordStore(tmp_path / "p", warn=pytest.fail)
    prefix = PrefixStates(model, store)
    assert_near(prefix.padded(samples), samples, expected, dtype)
    prefix.fill(samples)
    batch = prefix.padded(samples)
    assert batch.dtype == dtype
    assert not batch.requires_grad
    assert_near(batch, samples, expected, dtype)
    assert (prefix.computed, prefix.read) == (40, 20)
    assert store.num_bytes == dtype.itemsize * 64 * sum(map(len, samples))
    assert torch.equal(PrefixStates(model, store).padded(samples[::-1]), batch.flip(0))
    store.close()


def test_order_waves_and_batches_change_a_record_only_within_rounding(make_model, make_samples, tmp_path, monkeypatch):
    samples = [sample.ids for sample in make_samples(12)]
    model = make_model(layers=6)
    expected = states_one_by_one(model, samples)
    for i, (wave, batch) in enumerate([(1, 1), (25, 7), (60, 24), (10_000, 24), (10_000, 10_000)]):
        monkeypatch.setattr(prefix_cache, "WAVE_TOKENS", wave)
        monkeypatch.setattr(prefix_cache, "BATCH_TOKENS", batch)
        for order in (samples, samples[::-1], [samples[3], *samples]):
            with_store = RecordStore(tmp_path / f"{i}-{len(order)}-{order[0][0]}", location="ram", warn=pytest.fail)
            prefix = PrefixStates(model, with_store)
            prefix.fill(iter(order))
            assert prefix.computed == len(with_store) == 12
            assert_near(prefix.padded(samples), samples, expected)


def test_what_is_missing_makes_the_same_waves_in_any_order(make_samples):
    samples = [sample.ids for sample in make_samples(20)]
    waves = [[ids.tolist() for ids in wave] for wave in prefix_cache._waves(samples, 30)]
    assert waves == [[ids.tolist() for ids in wave] for wave in prefix_cache._waves(samples[::-1], 30)]
    assert sorted(ids for wave in waves for ids in wave) == sorted(ids.tolist() for ids in samples)
    assert all(sum(map(len, wave)) <= 30 for wave in waves)
    rest = [np.array(ids) for wave in waves[2:] for ids in wave]  # after a crash behind the second wave
    assert [[ids.tolist() for ids in wave] for wave in prefix_cache._waves(rest, 30)] == waves[2:]


@pytest.mark.parametrize("limit", [1, 24, 60, 10_000])
def test_samples_padded_together_as_on_a_gpu_get_the_same_states_within_rounding(
    limit, make_model, make_samples, tmp_path, monkeypatch
):
    monkeypatch.setattr(PrefixStates, "_on_gpu", True)
    monkeypatch.setattr(prefix_cache, "BATCH_TOKENS_ON_GPU", limit)
    samples = [sample.ids for sample in make_samples(12)]
    model = make_model(layers=6)
    run, sizes = model.run, []
    monkeypatch.setattr(model, "run", lambda h, *args, **kw: sizes.append(tuple(h.shape[:2])) or run(h, *args, **kw))
    prefix = PrefixStates(model, RecordStore(tmp_path, location="ram", warn=pytest.fail))
    prefix.fill(iter(samples))
    assert all(count == 1 or count * longest <= limit for count, longest in sizes)
    assert (max(count for count, _ in sizes) > 1) == (limit > 20)
    assert_near(prefix.padded(samples), samples, states_one_by_one(make_model(layers=6), samples))


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([3], [(0, 3, 3)]),
        ([3, 3, 3, 4], [(0, 9, 3), (9, 13, 4)]),
        ([3, 3, 3, 3], [(0, 9, 3), (9, 12, 3)]),
        ([5, 5, 11, 11], [(0, 10, 5), (10, 21, 11), (21, 32, 11)]),
    ],
)
def test_neighbours_of_equal_length_go_together_up_to_ten_tokens(lengths, expected, monkeypatch):
    monkeypatch.setattr(prefix_cache, "BATCH_TOKENS", 10)
    assert [(tokens.start, tokens.stop, length) for tokens, length in prefix_cache._batches(lengths)] == expected


def test_a_wave_decodes_each_layer_once_and_lives_in_one_tensor(make_model, make_samples, tmp_path, monkeypatch):
    samples = [sample.ids for sample in make_samples(24, shortest=6, longest=9)]
    model = make_model(layers=6)
    run, stream, calls, streamed = model.run, model.backbone.stream, [], []

    def noted(h, position, weights=None):
        calls.append((position, tuple(h.shape), h.untyped_storage().data_ptr(), h.untyped_storage().nbytes()))
        return run(h, position, weights)

    def streaming(layers, dtype):
        streamed.append((tuple(layers), dtype))
        return stream(layers, dtype)

    monkeypatch.setattr(model, "run", noted)
    monkeypatch.setattr(model.backbone, "stream", streaming)
    PrefixStates(model, RecordStore(tmp_path / "p", location="ram", warn=pytest.fail)).fill(samples)
    assert streamed == [((0, 1, 2, 3), torch.float32)]
    assert [position for position, *_ in calls] == [p for p in range(4) for _ in range(4)]
    assert sum(shape[0] for position, shape, *_ in calls if position == 2) == 24
    assert {shape[1] for _, shape, *_ in calls} == {6, 7, 8, 9}
    (_, num_bytes) = {call[2:] for call in calls}.pop()
    assert len({call[2:] for call in calls}) == 1
    assert num_bytes == 4 * 64 * sum(map(len, samples))


def test_nothing_is_computed_for_which_there_is_no_room(make_model, make_samples, tmp_path):
    samples = [sample.ids for sample in make_samples(8, shortest=10, longest=10)]
    model = make_model()
    store = RecordStore(tmp_path / "p", max_bytes=3 * 10 * 64 * 4 + 5, warn=pytest.fail)
    prefix = PrefixStates(model, store)
    for _ in range(2):
        prefix.fill(samples)
        assert prefix.computed == len(store) == 3
    kept = sorted(map(sample_key, samples))[:3]
    assert all(k in store for k in kept)
    assert_near(prefix.padded(samples), samples, states_one_by_one(model, samples))
    assert (prefix.computed, prefix.read) == (8, 3)
    store.close()


def test_repeated_samples_of_a_batch_are_computed_once(make_model, make_samples):
    samples = [sample.ids for sample in make_samples(3)]
    prefix = PrefixStates(make_model(), None)
    batch = prefix.padded([samples[0], samples[1], samples[0]])
    assert prefix.computed == 2
    assert torch.equal(batch[0], batch[2])


def test_a_pass_that_fails_leaves_no_reading_thread(make_model, make_samples, monkeypatch):
    model = make_model(layers=6)

    def fails(h, position, weights=None):
        raise MemoryError("no room")

    monkeypatch.setattr(model, "run", fails)
    with pytest.raises(MemoryError):
        PrefixStates(model, None).padded([sample.ids for sample in make_samples(2)])
    assert not any(thread.name == "backbone-reader" for thread in threading.enumerate())


# Above the base cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_at_a_higher_cut_begin_at_those_of_a_lower_one(make_model, make_samples, random_state, tmp_path, dtype):
    samples = [sample.ids for sample in make_samples(9)]
    model = make_model(blocks=3, placement="interleaved", layers=6, dtype=dtype)
    model.load_state(random_state(model))
    cut = model.base_cut + 3
    store = RecordStore(tmp_path / "base", warn=pytest.fail)
    base = PrefixStates(model, store)
    base.fill(samples[:5])
    upper = PrefixStates(
        model, RecordStore(tmp_path / "x", location="ram", max_bytes=1 << 20, warn=pytest.fail), cut=cut, source=base
    )
    assert (base.cut, upper.cut) == (model.base_cut, cut)
    upper.fill(samples)
    assert (upper.computed, base.read, base.computed) == (9, 5, 9)
    batch = upper.padded(samples)
    assert upper.read == 9
    with torch.no_grad():
        expected = [model.forward(torch.from_numpy(ids.astype(np.int64))[None], 0, cut)[0] for ids in samples]
    assert_near(batch, samples, expected, dtype)
    whole = PrefixStates(model, None, cut=cut)  # from the tokens, through the blocks
    assert_near(whole.padded(samples), samples, expected, dtype)
    store.close()


def test_a_cut_below_the_base_cut_or_at_zero_is_possible(make_model, make_samples):
    samples = [sample.ids for sample in make_samples(4)]
    model = make_model(layers=6)
    for cut in (0, 2):
        with torch.no_grad():
            expected = [model.forward(torch.from_numpy(ids.astype(np.int64))[None], 0, cut)[0] for ids in samples]
        assert_near(PrefixStates(model, None, cut=cut).padded(samples), samples, expected)


def test_a_source_above_the_cut_is_refused(make_model):
    model = make_model(layers=6)
    with pytest.raises(ValueError, match="at cut 2 cannot begin at cut 4"):
        PrefixStates(model, None, cut=2, source=PrefixStates(model, None))


def test_held_layers_and_streamed_ones_give_the_same_bits(make_model, make_samples):
    samples = [sample.ids for sample in make_samples(7)]
    model = make_model(layers=6)
    streamed = PrefixStates(model, None).padded(samples)
    for held in ({"decoded": range(4)}, {"packed": range(4)}, {"decoded": [1], "packed": [2]}):
        model.backbone.hold(**held, dtype=torch.float32)
        assert torch.equal(PrefixStates(model, None).padded(samples), streamed)
