"""Tests of edge_client/evaluate.py."""

import numpy as np
import pytest
import torch

from fedblocks.edge_client import evaluate
from fedblocks.edge_client.evaluate import evaluate_examples, kl_full, score_examples
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore
from fedblocks.edge_client.samples import TokenisedSample


def greedy(model, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        hidden = model.forward(torch.tensor([ids]))
        ids.append(int(model.rows_logits(hidden[0, -1:]).argmax()))
    return ids


def answered(model, prompt, length):
    """A sample whose completion is what the model would decode."""
    ids = greedy(model, prompt, length)
    return TokenisedSample(ids=np.array(ids, dtype=np.int32), label_mask=np.arange(len(ids)) >= len(prompt))


def changed(sample, place):
    ids = sample.ids.copy()
    ids[place] = (ids[place] + 1) % 128
    return TokenisedSample(ids=ids, label_mask=sample.label_mask)


def test_an_answer_is_right_exactly_if_greedy_decoding_gives_it(make_model, random_state, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 40)
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 5 * 8 * 128)
    model = make_model()
    model.load_state(random_state(model))
    rng = np.random.default_rng(0)
    samples, expected = [], []
    for i in range(12):
        right = answered(model, rng.integers(4, 128, 2 + i % 5).tolist(), 1 + i % 4)
        samples += [right, changed(right, -1)]
        expected += [True, False]
        if 1 + i % 4 > 1:
            samples.append(changed(right, -(1 + i % 4)))  # the first answer token is wrong
            expected.append(False)
    assert [right for right, _, _ in score_examples(model, samples)] == expected
    sums = evaluate_examples(model, samples)
    assert (sums.num_items, sums.num_correct) == (len(samples), 12)
    assert sums.num_tokens == sum(int(sample.label_mask.sum()) for sample in samples)


def test_the_nll_is_that_of_transformers(make_model, make_samples):
    from transformers import AutoModelForCausalLM

    model = make_model(nf4=False)
    hf = AutoModelForCausalLM.from_pretrained(model.checkpoint.folder, dtype=torch.float32).eval()
    for sample, (_, nll, count) in zip(samples := make_samples(6), score_examples(model, samples), strict=True):
        ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(sample.label_mask)[None], ids, -100)
        assert nll / count == pytest.approx(hf(input_ids=ids, labels=labels).loss.item(), rel=1e-5)


def test_scores_do_not_depend_on_batching_and_cached_prefixes_give_the_same(
    make_model, make_samples, random_state, tmp_path, monkeypatch
):
    model = make_model()
    model.load_state(random_state(model))
    samples = make_samples(9)
    store = RecordStore(tmp_path / "p", warn=pytest.fail)
    prefix = PrefixStates(model, store)
    prefix.fill(sample.ids for sample in samples)
    whole = score_examples(model, samples)
    cached = score_examples(model, samples, prefix)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 1)
    single = score_examples(model, samples)
    for other in (cached, single):
        assert [right for right, _, _ in other] == [right for right, _, _ in whole]
        assert [nll for _, nll, _ in other] == pytest.approx([nll for _, nll, _ in whole], rel=1e-5)
    assert prefix.computed == 9
    store.close()


def test_no_samples_give_empty_sums(make_model):
    assert evaluate_examples(make_model(), []) == evaluate.ExampleSums()
    assert kl_full(make_model(), make_model(), []) == evaluate.KlSums()


def test_full_kl_is_zero_with_itself_and_is_the_formula_otherwise(make_model, random_state):
    base, model = make_model(), make_model()
    model.load_state(random_state(model))
    rng = np.random.default_rng(1)
    sequences = [rng.integers(4, 128, n).astype(np.int32) for n in (9, 4, 7)]
    same = kl_full(base, base, sequences)
    assert (same.kl_sum, same.num_tokens, same.num_agree) == (0.0, 17, 17)
    found = kl_full(base, model, sequences)
    kl, agree = 0.0, 0
    for ids in sequences:
        batch = torch.from_numpy(ids.astype(np.int64))[None]
        p = base.rows_logits(base.forward(batch)[0, :-1])
        q = model.rows_logits(model.forward(batch)[0, :-1])
        log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
    assert found.kl_sum == pytest.approx(kl, rel=1e-4)
    assert found.num_agree == agree < 17
    as_own_base = kl_full(model, model, sequences, p_is_base=True)
    assert as_own_base.kl_sum == pytest.approx(found.kl_sum, rel=1e-9)


def test_strength_leads_from_the_base_to_the_trained_model(make_model, random_state, make_samples):
    model = make_model()
    model.load_state(random_state(model, scale=0.02))
    sequences = [sample.ids for sample in make_samples(4)]
    kls = []
    for strength in (0.0, 0.5, 1.0):
        model.set_strength(strength)
        kls.append(kl_full(model, model, sequences, p_is_base=True).kl_sum)
    assert kls[0] == 0
    assert 0 < kls[1] < kls[2]
