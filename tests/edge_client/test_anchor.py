"""Tests of edge_client/anchor.py."""

import contextlib
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedblocks.edge_client import anchor
from fedblocks.edge_client.anchor import AnchorError, AnchorSet, Teacher, sample_anchor
from fedblocks.edge_client.evaluate import kl_full, measure_anchor
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore


def an_anchor_set(count=16, vocab=128, length=12, seed=0):
    rng = np.random.default_rng(seed)
    return AnchorSet(sequences=tuple(rng.integers(4, vocab, length).astype(np.int32) for _ in range(count)), seed=seed)


def a_teacher(model, anchors, store=None, prefix_store=None):
    return Teacher(anchors=anchors, model=model, prefix=PrefixStates(model, prefix_store), store=store)


@given(
    st.lists(st.lists(st.integers(0, 200_000), min_size=2, max_size=40), min_size=1, max_size=20),
    st.integers(0, 2**60),
)
def test_an_anchor_set_survives_its_bytes(sequences, seed):
    anchors = AnchorSet(sequences=tuple(np.array(s, dtype=np.int32) for s in sequences), seed=seed)
    read = AnchorSet.from_bytes(anchors.to_bytes())
    assert [s.tolist() for s in read.sequences] == sequences
    assert read.seed == seed
    assert read.digest == anchors.digest == hashlib.sha256(anchors.to_bytes()).hexdigest()


def test_ids_take_two_bytes_where_all_of_them_fit():
    narrow, wide = an_anchor_set(vocab=65536), an_anchor_set(vocab=65536)
    narrow.sequences[0][0], wide.sequences[0][0] = 0xFFFF, 0x10000
    assert len(wide.to_bytes()) - len(narrow.to_bytes()) == 2 * wide.num_tokens


@given(st.data())
def test_changed_or_cut_bytes_raise_an_anchor_error_and_nothing_else(data):
    good = an_anchor_set(count=3).to_bytes()
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        place = data.draw(st.integers(0, len(good) - 1))
        bad = good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]) + good[place + 1 :]
    with pytest.raises(AnchorError):
        AnchorSet.from_bytes(bad)


@given(body=st.binary(max_size=80))
def test_bytes_with_a_right_hash_are_still_checked(body):
    body = b"FBANCHR1" + body
    with pytest.raises(AnchorError):
        AnchorSet.from_bytes(body + hashlib.sha256(body).digest() + b"x")
    with contextlib.suppress(AnchorError):
        AnchorSet.from_bytes(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize(("count", "train"), [(512, 448), (16, 14), (8, 7), (7, 7), (1, 1)])
def test_the_first_seven_eighths_train_and_the_rest_measures(count, train):
    anchors = an_anchor_set(count=count, length=2)
    assert anchors.train_indices == range(train)
    assert anchors.kl_val_indices == range(train, count)


def test_sampled_text_begins_with_bos_has_its_length_and_follows_from_the_seed(make_model):
    checkpoint = make_model(blocks=0, config={"eos_token_id": None}).checkpoint
    anchors = sample_anchor(checkpoint, 10, 24, seed=5)
    assert len(anchors.sequences) == 10
    assert all(len(ids) == 24 and ids[0] == 1 and ids.dtype == np.int32 for ids in anchors.sequences)
    assert sample_anchor(checkpoint, 10, 24, seed=5).digest == anchors.digest
    assert sample_anchor(checkpoint, 10, 24, seed=6).digest != anchors.digest


def test_sampling_follows_the_models_own_distribution(make_model):
    model = make_model(blocks=0, nf4=False, vocab=70, config={"eos_token_id": None})
    anchors = sample_anchor(model.checkpoint, 4000, 2, seed=0)
    counts = np.bincount([ids[1] for ids in anchors.sequences], minlength=70) / 4000
    expected = torch.softmax(model.rows_logits(model.forward(torch.tensor([[1]]))[0]), -1)[0].detach().numpy()
    assert abs(counts - expected).max() < 5 * np.sqrt(0.25 / 4000)
    assert abs(counts - expected).sum() < 0.15


def test_text_ends_after_eos_and_short_ones_are_drawn_again(make_model):
    ends = list(range(2, 12))  # ten end tokens: about one text in three ends early
    checkpoint = make_model(blocks=0, config={"eos_token_id": ends}).checkpoint
    anchors = sample_anchor(checkpoint, 40, 32, seed=1)
    lengths = [len(ids) for ids in anchors.sequences]
    assert min(lengths) >= anchor.MIN_TOKENS
    assert min(lengths) < 32 == max(lengths)
    for ids in anchors.sequences:
        assert not np.isin(ids[1:-1], ends).any()
        assert len(ids) == 32 or ids[-1] in ends


def test_the_length_stops_at_the_bases_positions_and_eos_starts_where_there_is_no_bos(make_model):
    config = {"bos_token_id": None, "eos_token_id": 7, "max_position_embeddings": 9}
    anchors = sample_anchor(make_model(blocks=0, config=config).checkpoint, 3, 256, seed=0)
    assert all(ids[0] == 7 and len(ids) <= 9 for ids in anchors.sequences)


def test_a_base_without_special_tokens_cannot_be_sampled(make_model):
    checkpoint = make_model(blocks=0, config={"bos_token_id": None, "eos_token_id": None}).checkpoint
    with pytest.raises(AnchorError, match="neither bos_token_id nor eos_token_id"):
        sample_anchor(checkpoint, 2, 8)


def test_a_base_that_ends_every_text_at_once_is_refused(make_model):
    checkpoint = make_model(blocks=0, config={"eos_token_id": list(range(128))}).checkpoint
    with pytest.raises(AnchorError, match="cannot serve as its own anchor"):
        sample_anchor(checkpoint, 2, 32)


def test_an_anchor_set_of_another_vocabulary_is_refused(make_model):
    with pytest.raises(AnchorError, match="vocabulary of 128"):
        a_teacher(make_model(), an_anchor_set(vocab=5000))


def test_the_teacher_is_the_base_whatever_the_blocks_hold(make_model, random_state):
    model, anchors = make_model(), an_anchor_set(count=2)
    before = a_teacher(model, anchors).records([1])[0]
    model.load_state(random_state(model))
    after = a_teacher(model, anchors).records([1])[0]
    assert torch.equal(before.logp, after.logp)
    h = model.forward_base(torch.from_numpy(anchors.sequences[1].astype(np.int64))[None])[0, :-1]
    logp = torch.log_softmax(model.rows_logits(h), -1).detach()
    assert after.ids.shape == (11, 32)
    assert torch.allclose(logp.gather(1, after.ids), after.logp, atol=1e-5)
    assert torch.allclose(after.logp.exp().sum(1) + after.log_tail.exp(), torch.ones(11), atol=1e-5)


@pytest.mark.parametrize("vocab", [128, 20, 70_000])
def test_stored_records_are_the_computed_ones_and_are_made_once(make_model, tmp_path, vocab, monkeypatch):
    model = make_model(vocab=vocab, layers=2, blocks=1)
    anchors = an_anchor_set(count=3, vocab=vocab)
    computed = a_teacher(model, anchors).records([0, 2])
    store = RecordStore(tmp_path / "t", warn=pytest.fail)
    a_teacher(model, anchors, store).fill([0, 2])
    store.close()
    store = RecordStore(tmp_path / "t", warn=pytest.fail)
    teacher = a_teacher(model, anchors, store)
    monkeypatch.setattr(Teacher, "_make", lambda *args: pytest.fail("made again"))
    teacher.fill([0, 2])
    for a, b in zip(teacher.records([0, 2]), computed, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.logp, b.logp)
        assert torch.equal(a.log_tail, b.log_tail)
    store.close()


def test_kl_is_zero_at_identity_positive_after_and_at_most_the_full_kl(make_model, random_state):
    model, anchors = make_model(), an_anchor_set(count=8)
    teacher, prefix = a_teacher(model, anchors), PrefixStates(model, None)
    at_start = measure_anchor(model, teacher, range(8), prefix)
    assert at_start.num_tokens == 8 * 11
    assert abs(at_start.kl_sum / at_start.num_tokens) < 1e-6
    for seed in range(3):
        model.load_state(random_state(model, seed=seed))
        part = measure_anchor(model, teacher, range(8), prefix)
        full = kl_full(model, model, anchors.sequences, p_is_base=True)
        assert full.num_tokens == part.num_tokens
        assert 1e-4 < part.kl_sum / part.num_tokens <= full.kl_sum / full.num_tokens + 1e-5
