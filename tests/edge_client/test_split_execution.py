"""Does training from cached states do the same as training the whole model? Against transformers' own class."""

from __future__ import annotations

import copy
from itertools import islice

import numpy as np
import pytest
import torch

from fedblocks.edge_client.checkpoint import initial_block
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore
from fedblocks.edge_client.train import Hyper, data_order, run_steps, stack_losses, task_batch
from fedblocks.protocol.expansion import expand_config

STEPS = 50


def monolithic(model):
    """transformers' class at the grown depth over the decoded 4-bit layers; only expanded blocks want a gradient."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = expand_config(model.checkpoint.config, model.plan)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).float()
    values = {name: model.checkpoint.tensor(name) for name in ("model.embed_tokens.weight", "model.norm.weight")}
    values["lm_head.weight"] = values["model.embed_tokens.weight"]
    for position, entry in enumerate(model.stack):
        if entry.kind == "base":
            tensors = model.backbone.block(entry.index, torch.float32).named(model.shape)
        else:
            tensors = initial_block(model.checkpoint, model.plan, entry.index)
        values |= {f"model.layers.{position}.{name}": tensor for name, tensor in tensors.items()}
    hf.load_state_dict(copy.deepcopy(values))
    positions = {model.plan.position(block) for block in model.plan.block_ids}
    for name, parameter in hf.named_parameters():
        parameter.requires_grad_(any(name.startswith(f"model.layers.{p}.") for p in positions))
    return hf


def hf_loss(hf, samples):
    ids = torch.zeros(len(samples), max(len(s.ids) for s in samples), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for i, sample in enumerate(samples):
        ids[i, : len(sample.ids)] = torch.from_numpy(sample.ids.astype(np.int64))
        at = np.flatnonzero(sample.label_mask)
        labels[i, at] = ids[i, at]
    return hf(input_ids=ids, labels=labels).loss


@pytest.mark.parametrize("placement", ["top", "thirds", "interleaved"])
def test_loss_and_every_gradient_from_cached_states_equal_those_of_the_whole_model(
    make_model, make_samples, placement, tmp_path
):
    model, samples = make_model(blocks=2, placement=placement, layers=6), make_samples(count=5)
    hf = monolithic(model)
    for parameter in hf.parameters():  # away from the start, where most gradients are zero
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    groups = model.train_blocks(model.plan.block_ids)
    for group, block in zip(groups, model.plan.block_ids, strict=True):
        position = model.plan.position(block)
        for name, view in group.named.items():
            view.data.copy_(hf.state_dict()[f"model.layers.{position}.{name}"])
    expected = hf_loss(hf, samples)
    expected.backward()
    prefix = PrefixStates(model, RecordStore(tmp_path / "cache", warn=pytest.fail))
    prefix.fill([sample.ids for sample in samples])
    batch = task_batch(samples, prefix.padded([sample.ids for sample in samples]))
    loss = stack_losses(model, model.base_cut).task(batch, 1 / len(batch.targets))
    loss.backward()
    assert prefix.read == len(samples)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    named = dict(hf.named_parameters())
    for group, block in zip(groups, model.plan.block_ids, strict=True):
        weights = model.weights(model.plan.position(block))
        for name, gradient in weights.gradients(model.shape).items():
            wanted = named[f"model.layers.{model.plan.position(block)}.{name}"].grad
            assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), f"{group.name} {name}"


def test_fifty_steps_follow_the_whole_model(make_model, make_samples, tmp_path):
    model, samples = make_model(blocks=2, layers=6), make_samples(count=12)
    hf = monolithic(model)
    windows = list(islice(data_order(len(samples), 4, seed=5), STEPS))
    hyper = Hyper(steps=STEPS, learning_rate=3e-3, warmup_steps=4, weight_decay=0.0)
    prefix = PrefixStates(model, RecordStore(tmp_path / "cache", warn=pytest.fail))
    result = run_steps(
        groups=model.train_blocks((0, 1)),
        losses=stack_losses(model, model.base_cut),
        task=([task_batch([samples[i] for i in w], prefix.padded([samples[i].ids for i in w]))] for w in windows),
        anchor=(),
        hyper=hyper,
        now=lambda: 0.0,
        status=lambda _phase, _steps: None,
    )
    parameters = [p for p in hf.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=hyper.betas, eps=hyper.eps, weight_decay=0.0)
    losses = []
    for step, window in enumerate(windows):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 4)
        loss = hf_loss(hf, [samples[i] for i in window])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]  # there was something to follow
    np.testing.assert_allclose(result.task_loss, losses, rtol=2e-3)


def test_bf16_states_change_the_loss_by_little(make_model, make_samples, tmp_path):
    """The whole bf16 path (cache, suffix, head) against fp32 over the same 4-bit layers: within bf16's own rounding."""
    losses = {}
    samples = make_samples(count=8)
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(blocks=2, layers=6, dtype=dtype)
        prefix = PrefixStates(model, RecordStore(tmp_path / str(dtype), warn=pytest.fail))
        prefix.fill([sample.ids for sample in samples])
        batch = task_batch(samples, prefix.padded([sample.ids for sample in samples]))
        assert batch.inputs.dtype == dtype
        losses[dtype] = stack_losses(model, model.base_cut).task(batch, 1 / len(batch.targets)).item()
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=5e-3)


@pytest.mark.parametrize("cut", [0, 2, 6])
def test_every_cut_gives_the_same_hidden_states(make_model, make_samples, cut):
    model, samples = make_model(blocks=2, placement="top", layers=6), make_samples(count=3)
    states = PrefixStates(model, None, cut=cut).padded([sample.ids for sample in samples])
    rest = model.forward(states, cut)
    for i, sample in enumerate(samples):
        alone = model.forward(torch.from_numpy(sample.ids.astype(np.int64)).unsqueeze(0))[0]
        torch.testing.assert_close(rest[i, : len(sample.ids)], alone, rtol=1e-5, atol=1e-6)


def test_states_at_the_assignment_s_cut_come_from_those_at_the_base_cut(
    make_model, make_samples, random_state, tmp_path
):
    """A second level, for a client that trains only the top block: the blocks between the cuts run once a sample."""
    model = make_model(blocks=2, placement="thirds", layers=6)
    model.load_state(random_state(model))
    samples = make_samples(count=4)
    low = max(model.plan.position(0), model.plan.position(1))
    base = PrefixStates(model, None)
    second = PrefixStates(
        model, RecordStore(tmp_path / "round", location="ram", warn=pytest.fail), cut=low, source=base
    )
    ids = [sample.ids for sample in samples]
    second.fill(ids)
    direct = model.forward(base.padded(ids), model.base_cut, low)
    found = second.padded(ids)
    assert second.computed == len(samples)
    assert second.read == len(samples)
    for i, sample in enumerate(samples):
        n = len(sample.ids)
        torch.testing.assert_close(found[i, :n], direct[i, :n], rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "round").exists()  # nothing of it on disk
