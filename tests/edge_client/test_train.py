"""Tests of edge_client/train.py: the local training step of methods.md 5."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedblocks.edge_client import train as module
from fedblocks.edge_client.anchor import AnchorSet, Teacher
from fedblocks.edge_client.expanded_model import ParamGroup
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore
from fedblocks.edge_client.train import (
    AnchorBatch,
    Hyper,
    Losses,
    NonFiniteError,
    TaskBatch,
    TrainingError,
    anchor_batch,
    cut_into,
    data_order,
    run_steps,
    stack_losses,
    task_batch,
    train,
)
from fedblocks.protocol.expansion import expand_config


def quiet(phase, steps):
    pass


def a_teacher(model, prefix, count=8, length=10):
    rng = np.random.default_rng(9)
    sequences = tuple(rng.integers(4, 128, length).astype(np.int32) for _ in range(count))
    return Teacher(anchors=AnchorSet(sequences=sequences, seed=9), model=model, prefix=prefix, store=None)


def trained(model, task, data, *, store=None, status=quiet):
    prefix = PrefixStates(model, store)
    teacher = a_teacher(model, prefix) if task.anchor_weight else None
    return train(model=model, task=task, data=data, teacher=teacher, prefix=prefix, now=time.monotonic, status=status)


def flat(deltas):
    return {(block, name): array for block, tensors in deltas.items() for name, array in tensors.items()}


# The step loop on a plain quadratic: loss parts are functions of one tensor.


def one_group(values, decayed=False):
    tensor = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    return ParamGroup(name="x", tensors=(tensor,), decayed=(tensor,) if decayed else (), named={"x": tensor})


def a_task_batch(num_targets):
    return TaskBatch(inputs=torch.zeros(1), rows=torch.arange(num_targets), targets=torch.arange(num_targets))


def an_anchor_batch(num_rows):
    empty = torch.zeros(num_rows, 1)
    return AnchorBatch(
        inputs=torch.zeros(1), rows=torch.arange(num_rows), ids=empty.long(), logp=empty, log_tail=empty[:, 0]
    )


def run(group, hyper, *, task=None, anchor=None, windows=None, anchors=(), now=lambda: 0.0, status=quiet):
    x = group.tensors[0]
    losses = Losses(
        task=task or (lambda batch, scale: (x * len(batch.targets) * scale).sum()),
        anchor=anchor or (lambda batch, scale: (x * len(batch.rows) * scale).sum()),
    )
    return run_steps(
        groups=[group],
        losses=losses,
        task=itertools.repeat([a_task_batch(2)]) if windows is None else windows,
        anchor=anchors,
        hyper=hyper,
        now=now,
        status=status,
    )


def test_the_learning_rate_warms_up_and_then_stays():
    group = one_group([0.0])
    seen = [0.0]
    hyper = Hyper(steps=6, learning_rate=0.1, warmup_steps=4, clip_norm=1e9)
    run(group, hyper, status=lambda phase, steps: seen.append(group.tensors[0].item()))
    moves = [a - b for a, b in itertools.pairwise(seen)]
    assert moves == pytest.approx(
        [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rel=1e-4
    )  # Adam: a constant gradient moves by lr


def test_decay_pulls_the_decayed_tensors_and_no_others():
    for decayed, expected in ((True, 1 - 0.1 * 0.5), (False, 1.0)):
        group = one_group([1.0], decayed=decayed)
        run(
            group,
            Hyper(steps=1, learning_rate=0.1, weight_decay=0.5),
            task=lambda batch, scale, x=group.tensors[0]: (x * 0).sum(),
        )
        assert group.tensors[0].item() == pytest.approx(expected)


def test_the_gradient_is_clipped_by_its_global_norm_but_the_energy_is_that_before_clipping():
    group = one_group([0.0, 0.0], decayed=True)
    gradient = torch.tensor([30.0, 40.0])
    seen = []
    hyper = Hyper(steps=4, learning_rate=1e-9, clip_norm=1.0)
    handle = group.tensors[0].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    result = run(group, hyper, task=lambda batch, scale: (group.tensors[0] * gradient).sum())
    handle.remove()
    assert seen[0].tolist() == pytest.approx([0.6, 0.8])
    assert result.gradient_energy == pytest.approx([2500 / 2])


def test_the_gradient_energy_is_taken_over_the_second_half_of_the_steps():
    for steps, expected in ((1, 1.0), (2, 4.0), (5, (9 + 16 + 25) / 3)):
        group = one_group([0.0], decayed=True)
        step = itertools.count(1)
        result = run(
            group,
            Hyper(steps=steps, learning_rate=1e-9),
            task=lambda batch, scale, x=group.tensors[0], step=step: (x * next(step)).sum(),
        )
        assert result.gradient_energy == pytest.approx([expected])


def test_a_non_finite_gradient_skips_its_step_and_three_in_a_row_stop():
    factors = iter([1.0, math.nan, math.inf, 1.0, math.nan, 1.0])
    group = one_group([0.0])
    seen = []
    result = run(
        group,
        Hyper(steps=6, learning_rate=0.1),
        task=lambda batch, scale: (group.tensors[0] * next(factors)).sum(),
        status=lambda phase, steps: seen.append(group.tensors[0].item()),
    )
    assert result.skipped == 3
    assert seen[0] == seen[1] == seen[2] > seen[3] == seen[4] > seen[5]
    group = one_group([0.0])
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        run(group, Hyper(steps=6, learning_rate=0.1), task=lambda batch, scale: (group.tensors[0] * math.nan).sum())
    assert group.tensors[0].item() == 0


def test_a_window_without_targets_is_no_step_and_endless_ones_are_an_error():
    group = one_group([0.0])
    windows = [[a_task_batch(0)], [a_task_batch(3)], [a_task_batch(0), a_task_batch(2)], [a_task_batch(1)]]
    result = run(group, Hyper(steps=3, learning_rate=0.1), windows=windows)
    assert result.num_target_tokens == 6
    with pytest.raises(TrainingError, match="no target token"):
        run(group, Hyper(steps=1, learning_rate=0.1), windows=itertools.repeat([a_task_batch(0)]))
    with pytest.raises(TrainingError, match="the data ended after 1 of 2 steps"):
        run(group, Hyper(steps=2, learning_rate=0.1), windows=[[a_task_batch(1)]])


def test_anchors_come_every_jth_step_with_j_times_the_weight():
    group = one_group([0.0])
    scales = []

    def anchor(batch, scale):
        scales.append(scale)
        return (group.tensors[0] * 0).sum() + 5 * len(batch.rows) * scale

    windows = iter([[an_anchor_batch(4), an_anchor_batch(6)]] * 2)
    hyper = Hyper(steps=4, learning_rate=0.1, anchor_weight=0.5, anchor_every=3)
    result = run(group, hyper, anchor=anchor, anchors=windows)
    assert scales == pytest.approx([0.15] * 4)  # 3 · 0.5 / 10, two micro-batches at steps 0 and 3
    assert result.anchor_kl == [(0, pytest.approx(5.0)), (3, pytest.approx(5.0))]
    assert run(one_group([0.0]), Hyper(steps=3, learning_rate=0.1)).anchor_kl == []


def test_durations_are_those_of_the_given_clock_and_exclude_the_status_call():
    clock = itertools.count()
    result = run(one_group([0.0]), Hyper(steps=3, learning_rate=0.1), now=lambda: float(next(clock)))
    assert result.step_s == [1.0, 1.0, 1.0]


# Order of data


@given(n=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_each_pass_sees_every_sample_once_in_an_order_that_follows_from_the_seed(n, batch, seed):
    order = data_order(n, batch, seed)
    taken = list(itertools.chain.from_iterable(itertools.islice(order, 40)))
    for start in range(0, len(taken) - n + 1, n):
        assert sorted(taken[start : start + n]) == list(range(n))
    again = itertools.chain.from_iterable(data_order(n, batch, seed))
    assert list(itertools.islice(again, len(taken))) == taken


def test_no_data_is_an_error():
    with pytest.raises(TrainingError, match="no sample"):
        next(data_order(0, 4, 0))


@pytest.mark.parametrize(("size", "parts"), [(1, 5), (2, 3), (4, 2), (5, 1), (9, 1)])
def test_a_window_is_cut_into_parts_of_at_most_the_size(size, parts):
    cut = cut_into(list(range(5)), size)
    assert list(itertools.chain.from_iterable(cut)) == [0, 1, 2, 3, 4]
    assert len(cut) == parts


# The model's losses


def test_the_task_loss_is_the_mean_over_target_tokens_of_transformers(make_model, make_samples):
    from transformers import AutoModelForCausalLM

    model = make_model(nf4=False)
    samples = make_samples(5)
    ids = torch.zeros(5, 12, dtype=torch.int64)
    labels = torch.full((5, 12), -100)
    for i, sample in enumerate(samples):
        ids[i, : len(sample.ids)] = torch.from_numpy(sample.ids)
        positions = np.flatnonzero(sample.label_mask)
        labels[i, positions] = ids[i, positions]
    hf = AutoModelForCausalLM.from_pretrained(model.checkpoint.folder, dtype=torch.float32).eval()
    ours = stack_losses(model, 0).task(task_batch(samples, ids), 1 / 15)
    assert ours.item() == pytest.approx(hf(input_ids=ids, labels=labels).loss.item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_cutting_a_window_into_micro_batches_leaves_loss_and_gradient_equal(
    make_model, make_samples, random_state, size
):
    samples = make_samples(5, targets=2) + make_samples(1, targets=5, seed=4)
    found = []
    for part in (6, size):
        model = make_model()
        model.load_state(random_state(model))
        prefix = PrefixStates(model, None)
        teacher = a_teacher(model, prefix)
        groups = model.train_blocks((0, 1))
        losses = stack_losses(model, model.base_cut)
        loss = 0.0
        for indices in cut_into(range(6), part):
            chosen = [samples[i] for i in indices]
            batch = task_batch(chosen, prefix.padded([sample.ids for sample in chosen]))
            anchors = anchor_batch(
                teacher.records(indices), prefix.padded([teacher.anchors.sequences[i] for i in indices])
            )
            value = losses.task(batch, 1 / 15) + losses.anchor(anchors, 0.7 / (6 * 9))
            value.backward()
            loss += value.item()
        found.append((loss, torch.cat([t.grad.flatten() for group in groups for t in group.tensors])))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert (found[1][1] - found[0][1]).norm() <= 1e-5 * found[0][1].norm()


# Whole assignments


@pytest.mark.parametrize("cached", [True, False])
def test_the_same_assignment_gives_the_same_bytes_cached_or_not(
    make_model, make_samples, make_assignment, tmp_path, cached
):
    task = make_assignment(anchor_weight=1.0, steps=4)
    data = make_samples()
    first = trained(make_model(), task, data)
    store = RecordStore(tmp_path / "p", warn=pytest.fail) if cached else None
    if store is not None:  # a cache that was filled partly, in another order, by another process
        PrefixStates(make_model(), store).fill([sample.ids for sample in data[::-2]])
    second = trained(make_model(), task, data, store=store)
    assert flat(first.deltas).keys() == flat(second.deltas).keys()
    for name, array in flat(first.deltas).items():
        assert array.dtype == np.float32
        assert array.tobytes() == flat(second.deltas)[name].tobytes(), name
    assert first.gradient_energy == second.gradient_energy
    other = trained(make_model(), make_assignment(anchor_weight=1.0, steps=4, seed=4), data)
    assert any(array.tobytes() != flat(other.deltas)[name].tobytes() for name, array in flat(first.deltas).items())


def test_only_the_assigned_blocks_change_and_the_base_stays_bit_for_bit(make_model, make_samples, make_assignment):
    model = make_model(blocks=3, layers=6)
    digest = model.backbone.digest
    before = {p: {n: t.clone() for n, t in model.weights(p).tensors().items()} for p in range(model.num_positions)}
    result = trained(model, make_assignment(blocks=(0, 2), anchor_weight=1.0), make_samples())
    assert set(result.deltas) == {0, 2}
    changed = {
        p
        for p, tensors in before.items()
        for n, t in tensors.items()
        if not torch.equal(model.weights(p).tensors()[n], t)
    }
    assert changed == {model.plan.position(0), model.plan.position(2)}
    assert model.backbone.digest == digest
    assert torch.equal(model.backbone.block(0).qkv, before[0]["qkv"])
    model.load_state({})
    assert all(
        torch.equal(model.weights(p).tensors()[n], t) for p, tensors in before.items() for n, t in tensors.items()
    )


def test_training_lowers_the_loss_and_the_anchor_holds_the_kl_down(make_model, make_samples, make_assignment, tmp_path):
    store = RecordStore(tmp_path / "p", warn=pytest.fail)
    data = make_samples(8)
    fields = {"steps": 40, "learning_rate": 1e-2, "batch_size": 8, "anchor_batch_size": 7}
    kls = []
    for weight in (1e-6, 3.0):
        result = trained(make_model(), make_assignment(anchor_weight=weight, **fields), data, store=store)
        assert result.loss_last < result.loss_first
        kls.append(result.anchor_kl)
    assert 0 < kls[1] < 0.5 * kls[0]


def test_the_report_has_the_figures_of_the_run(make_model, make_samples, make_assignment):
    seen = []
    result = trained(
        make_model(), make_assignment(steps=5), make_samples(), status=lambda phase, steps: seen.append((phase, steps))
    )
    assert seen == [("prefix", 0), *(("training", i) for i in range(1, 6))]
    assert result.steps == 5
    assert result.num_target_tokens == 5 * 4 * 3
    assert len(result.gradient_energy) == 2
    assert all(energy > 0 for energy in result.gradient_energy)
    assert result.anchor_kl == 0
    assert result.step_s > 0
    assert result.train_s >= result.step_s


def test_one_step_trains_the_out_tensors_alone(make_model, make_samples, make_assignment):
    model = make_model()
    outs = {spec.name for spec in model.shape.block_tensors() if spec.is_out}
    for (_, name), delta in flat(trained(model, make_assignment(steps=1), make_samples()).deltas).items():
        assert delta.any() == (name in outs)
        assert np.isfinite(delta).all()


def test_a_status_that_raises_stops_the_training(make_model, make_samples, make_assignment):
    def stop(phase, steps):
        if steps == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(make_model(), make_assignment(), make_samples(), status=stop)


def test_what_cannot_be_carried_out_is_refused_in_words(make_model, make_samples, make_assignment):
    model = make_model()
    with pytest.raises(TrainingError, match="no anchor set"):
        train(
            model=model,
            task=make_assignment(anchor_weight=1.0),
            data=make_samples(),
            teacher=None,
            prefix=PrefixStates(model, None),
            now=time.monotonic,
            status=quiet,
        )
    with pytest.raises(TrainingError, match="no sample"):
        trained(make_model(), make_assignment(), [])


def test_a_learning_rate_that_blows_up_ends_as_non_finite(make_model, make_samples, make_assignment):
    with pytest.raises(NonFiniteError):
        trained(make_model(), make_assignment(steps=20, learning_rate=1e18), make_samples())


def test_fifty_steps_follow_the_loss_curve_of_a_monolithic_model_in_transformers(make_model, make_samples, monkeypatch):
    """Same data order, plain autograd, torch's single-tensor AdamW: the split execution is the same training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    steps, rate = 50, 3e-3
    samples = make_samples(16)
    model = make_model(blocks=2, nf4=False)
    prefix = PrefixStates(model, None)
    order = [list(window) for window in itertools.islice(data_order(16, 4, 7), steps)]
    windows = (
        [task_batch([samples[i] for i in window], prefix.padded([samples[i].ids for i in window]))] for window in order
    )
    result = run_steps(
        groups=model.train_blocks((0, 1)),
        losses=stack_losses(model, model.base_cut),
        task=windows,
        anchor=(),
        hyper=Hyper(steps=steps, learning_rate=rate, warmup_steps=8),
        now=time.monotonic,
        status=quiet,
    )
    model.load_state({})
    config = expand_config(model.checkpoint.config, model.plan)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).float().eval()
    values = {
        f"model.{name}": model.checkpoint.tensor(f"model.{name}") for name in ("embed_tokens.weight", "norm.weight")
    }
    for position in range(model.num_positions):
        values |= {f"model.layers.{position}.{n}": t for n, t in model.weights(position).named(model.shape).items()}
    hf.load_state_dict(values, strict=False)
    prefixes = tuple(f"model.layers.{model.plan.position(block)}." for block in (0, 1))
    outs, others = [], []
    for name, parameter in hf.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
        if name.startswith(prefixes):
            (outs if name.endswith(("o_proj.weight", "down_proj.weight")) else others).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": outs, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
        foreach=False,
    )
    curve = []
    for step, window in enumerate(order):
        ids = torch.zeros(len(window), 12, dtype=torch.int64)
        labels = torch.full((len(window), 12), -100)
        for row, i in enumerate(window):
            ids[row, : len(samples[i].ids)] = torch.from_numpy(samples[i].ids)
            positions = np.flatnonzero(samples[i].label_mask)
            labels[row, positions] = ids[row, positions]
        loss = hf(input_ids=ids, labels=labels).loss
        loss.backward()
        curve.append(loss.item())
        torch.nn.utils.clip_grad_norm_(outs + others, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 8)
        optimizer.step()
        optimizer.zero_grad()
    assert curve[-1] < 0.8 * curve[0]
    assert result.task_loss == pytest.approx(curve, rel=2e-3)
    assert module.MAX_SKIPS == 3
