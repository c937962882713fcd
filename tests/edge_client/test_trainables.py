"""Do low-rank pairs, base tensors and merged pairs train on a client, start at the base and go back to it?"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from fedblocks.edge_client.anchor import AnchorSet, Teacher
from fedblocks.edge_client.backbone import Backbone, DenseBackbone
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.decoder_block import LoraPair, linear
from fedblocks.edge_client.evaluate import kl_full, measure_anchor
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.masked_low_rank import FrozenPrior, MaskedLowRank
from fedblocks.edge_client.optimizer import AdamW
from fedblocks.edge_client.prefix_cache import PrefixStates, TokenInputs
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.train import stack_losses, task_batch
from fedblocks.profiles.cost import FrozenForm
from fedblocks.profiles.units import (
    BaseTensors,
    LowRankPairs,
    PersonalPairs,
    Trainable,
    unit_parameters,
    unit_tensors,
)
from fedblocks.protocol.expansion import ExpansionPlan, plan_trainable

IDS = torch.tensor([[5, 9, 40, 7, 3, 60], [8, 8, 90, 1, 2, 77]])
ALL = BaseTensors(layers=(0, 1, 2), tables=True)
TOP = BaseTensors(layers=(2,), tables=False)
PAIRS = LowRankPairs(rank=8, scaling=2.0, seed=4)
PERSONAL = PersonalPairs(rank=4, scaling=1.0, targets="qv", prior_rank=6)
TRAINABLES: list[Trainable] = [
    PAIRS,
    LowRankPairs(rank=4, targets="qv"),
    LowRankPairs(rank=4, merged=True),
    PERSONAL,
    ALL,
    TOP,
]


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_checkpoint) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path, layers=3, family="qwen2", tied=False))


def model_of(checkpoint: Checkpoint, trainable: Trainable, dtype: torch.dtype = torch.float32) -> ExpandedModel:
    plan = plan_trainable(base_hash=base_hash(checkpoint.folder), config=checkpoint.config, trainable=trainable)
    return ExpandedModel(backbone=DenseBackbone(checkpoint), checkpoint=checkpoint, plan=plan, dtype=dtype)


def plan_of(model: ExpandedModel) -> ExpansionPlan:
    assert model.plan is not None
    return model.plan


def some_state(model: ExpandedModel, seed: int = 0, scale: float = 0.02) -> dict[int, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    plan = plan_of(model)
    return {
        unit: {
            spec.name: (scale * rng.standard_normal(spec.shape)).astype(np.float32)
            for spec in unit_tensors(plan.units.held(), unit)
        }
        for unit in plan.unit_ids
    }


def logits(model: ExpandedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.rows_logits(model.forward(IDS).flatten(0, 1))


@pytest.mark.parametrize("trainable", TRAINABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_and_strength_0_are_the_base_to_the_bit(
    checkpoint: Checkpoint, trainable: Trainable, dtype: torch.dtype
) -> None:
    model = model_of(checkpoint, trainable, dtype)
    base = logits(ExpandedModel(backbone=DenseBackbone(checkpoint), checkpoint=checkpoint, dtype=dtype))
    assert torch.equal(logits(model), base)
    model.load_state(some_state(model))
    learnt = logits(model)
    assert not torch.allclose(learnt, base, atol=1e-3)
    with model.base_only():  # the teacher, whatever the state
        assert torch.equal(logits(model), base)
    model.set_strength(0.0)
    assert torch.equal(logits(model), base)
    model.set_strength(1.0)
    assert torch.equal(logits(model), learnt)


def test_strength_is_the_way_from_the_base_to_what_was_learnt(checkpoint: Checkpoint) -> None:
    for trainable in (PAIRS, ALL):
        model = model_of(checkpoint, trainable)
        state = some_state(model)
        if trainable is PAIRS:  # a pair is scaled, not its factors
            halved = {u: {n: d * (0.5 if n.endswith("lora_B") else 1) for n, d in t.items()} for u, t in state.items()}
        else:
            halved = {u: {n: d * 0.5 for n, d in t.items()} for u, t in state.items()}
        model.load_state(state)
        model.set_strength(0.5)
        at_half = logits(model)
        model.set_strength(1.0)
        model.load_state(halved)
        torch.testing.assert_close(at_half, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable", TRAINABLES)
def test_a_step_moves_every_trained_tensor_and_its_delta_is_the_change(
    checkpoint: Checkpoint, trainable: Trainable
) -> None:
    model = model_of(checkpoint, trainable)
    plan = plan_of(model)
    state = some_state(model)
    model.load_state(state, version=3)
    before = logits(model)
    groups = model.train_units(plan.unit_ids)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert [int(group.name.split()[-1]) for group in groups] == list(plan.unit_ids)
    optimizer = AdamW(groups)
    optimizer.begin()
    for _ in range(2):  # B is zero where pairs start: A has no gradient in the first step
        sample = TokenisedSample(ids=IDS[0].numpy().astype(np.int32), label_mask=np.arange(6) > 2)
        inputs = IDS[:1] if model.takes_tokens else model.embed(IDS[:1]).detach()
        cut = 0
        if not model.takes_tokens and model.base_cut:
            cut = model.base_cut
            with torch.no_grad():
                inputs = model.forward(IDS[:1], to_position=cut)
        stack_losses(model, cut).task(task_batch([sample], inputs), 1.0).backward()
        optimizer.step(1e-2)
        optimizer.zero_grad()
    optimizer.close()
    deltas = model.deltas(groups)
    for unit in plan.unit_ids:
        for spec in unit_tensors(plan.units, unit):
            delta = deltas[unit][spec.name]
            assert delta.shape == spec.shape
            if spec.name == "self_attn.k_proj.bias":  # a constant on all keys shifts no attention
                continue
            assert np.abs(delta).max() > 1e-4, (unit, spec.name)
    trained = logits(model)
    if isinstance(trainable, PersonalPairs) or (isinstance(trainable, LowRankPairs) and trainable.merged):
        return
    moved = copy.deepcopy(state)
    for unit, tensors in moved.items():
        for name in tensors:
            tensors[name] = tensors[name] + deltas[unit][name]
    model.load_state(moved, version=4)
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)


def test_a_narrow_width_trains_the_first_components_alone(checkpoint: Checkpoint) -> None:
    model = model_of(checkpoint, PAIRS)
    plan = plan_of(model)
    groups = model.train_units((0, 2), width=0.25)
    shapes = {name: tuple(tensor.shape) for name, tensor in groups[0].named.items()}
    assert shapes == {spec.name: spec.shape for spec in unit_tensors(plan.units, 0, 0.25)}
    assert shapes["mlp.up_proj.lora_A"][0] == 2
    assert [group.name for group in groups] == ["layer 0", "layer 2"]


def test_chosen_rows_over_a_prior_compute_as_the_masked_layer_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, a = (torch.randn(*size, generator=generator) for size in ((5, 16), (12, 16), (3, 16)))
    prior = FrozenPrior(left=np.ones((12, 2), np.float32), right=np.full((2, 16), 0.1, np.float32))
    mask = np.arange(12) % 3 == 1
    base = torch.nn.Linear(16, 12, bias=False)
    base.weight.data = weight
    reference = MaskedLowRank(base, num_out=12, a=a, prior=prior, scale=0.5)
    reference.train_rows(mask)
    b = torch.randn(4, 3, generator=generator)
    assert reference.b is not None
    reference.b.data.copy_(b)
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    beneath = LoraPair(torch.from_numpy(prior.right), torch.from_numpy(prior.left), 1.0)
    rows = torch.from_numpy(np.flatnonzero(mask))
    pair = LoraPair(*leaves, 0.5, rows=rows, num_out=12, prior=beneath)
    found, wanted = linear(x, weight, None, {"q": pair}, ("q",)), reference(x)
    torch.testing.assert_close(found, wanted)
    out = torch.randn(5, 12, generator=generator)
    (found * out).sum().backward()
    (wanted * out).sum().backward()
    torch.testing.assert_close(leaves[0].grad, reference.a.grad)
    torch.testing.assert_close(leaves[1].grad, reference.b.grad)


def test_of_personal_pairs_only_the_chosen_rows_are_there(checkpoint: Checkpoint) -> None:
    model = model_of(checkpoint, PERSONAL)
    plan = plan_of(model)
    model.load_state(some_state(model), version=2)
    before = logits(model)
    scored = model.score_units(plan.unit_ids)
    assert torch.equal(logits(model), before)  # B is zero
    assert all(name.endswith("lora_B") for group in scored for name in group.named)
    chosen = {
        unit: {name: np.arange(len(leaf)) % 4 == 1 for name, leaf in group.named.items()}
        for unit, group in zip(plan.unit_ids, scored, strict=True)
    }
    groups = model.train_units(plan.unit_ids, width=0.25, chosen=chosen)
    assert torch.equal(logits(model), before)
    for unit, group in zip(plan.unit_ids, groups, strict=True):
        assert sum(t.numel() for t in group.tensors) == unit_parameters(plan.units, unit, 0.25)
        assert {n: tuple(t.shape) for n, t in group.named.items()} == {
            s.name: s.shape for s in unit_tensors(plan.units, unit, 0.25)
        }
    inputs = model.embed(IDS[:1]).detach()
    sample = TokenisedSample(ids=IDS[0].numpy().astype(np.int32), label_mask=np.arange(6) > 2)
    stack_losses(model, 0).task(task_batch([sample], inputs), 1.0).backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for g in groups for n, t in g.named.items() if "_B" in n)
    with pytest.raises(ValueError, match=r"q_proj.lora_B trains 16 rows at width 0.25, and 0 are chosen"):
        model.train_units((0,), width=0.25)


def test_merged_pairs_train_over_the_merged_weights_and_start_in_other_directions(checkpoint: Checkpoint) -> None:
    model = model_of(checkpoint, LowRankPairs(rank=4, merged=True))
    state = some_state(model)
    starts = []
    for version in (1, 2):
        model.load_state(state, version=version)
        learnt = logits(model)
        [group] = model.train_units((1,))
        assert torch.equal(logits(model), learnt)  # B is zero
        starts.append(group.named["mlp.up_proj.lora_A"].detach().clone())
    assert not torch.equal(*starts)


@pytest.mark.parametrize("trainable", [PAIRS, ALL, TOP])
def test_the_teacher_is_the_base_and_its_distance_is_measured(checkpoint: Checkpoint, trainable: Trainable) -> None:
    model = model_of(checkpoint, trainable)
    anchors = AnchorSet(sequences=tuple(row.numpy().astype(np.int32) for row in IDS), seed=0)
    prefix = TokenInputs(model) if model.takes_tokens else PrefixStates(model, None)
    teacher = Teacher(anchors=anchors, model=model, prefix=prefix, store=None)
    assert abs(measure_anchor(model, teacher, [0, 1], prefix).kl_sum) < 1e-5
    model.load_state(some_state(model))
    learnt = measure_anchor(model, teacher, [0, 1], prefix)
    assert learnt.kl_sum > 1e-3
    whole = kl_full(model, model, anchors.sequences, p_is_base=True)
    assert learnt.kl_sum <= whole.kl_sum + 1e-5
    # Records that are made while something trains are the same: the teacher is not what trains.
    groups = model.train_units(plan_of(model).unit_ids)
    with torch.no_grad():
        for group in groups:
            for tensor in group.tensors:
                tensor.add_(0.1)
    fresh = Teacher(anchors=anchors, model=model, prefix=prefix, store=None)
    for one, other in zip(teacher.records([0, 1]), fresh.records([0, 1]), strict=True):
        assert torch.equal(one.logp, other.logp)


def test_the_proximal_term_pulls_to_the_start() -> None:
    start = torch.tensor([1.0, -2.0, 3.0])
    leaf = start.clone().requires_grad_()
    from fedblocks.edge_client.expanded_model import ParamGroup

    optimizer = AdamW([ParamGroup(name="layer 0", tensors=(leaf,), named={"x": leaf})])
    optimizer.begin(proximal_weight=0.5)
    with torch.no_grad():
        leaf.add_(torch.tensor([0.2, 0.0, -0.4]))
    (leaf * torch.tensor([1.0, 1.0, 1.0])).sum().backward()
    optimizer.pull_to_start()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 1.0 + 0.5 * torch.tensor([0.2, 0.0, -0.4]))
    optimizer.zero_grad()
    optimizer.begin()
    leaf.sum().backward()
    optimizer.pull_to_start()  # without a weight it does nothing
    assert torch.equal(leaf.grad, torch.ones(3))


@pytest.mark.parametrize("trainable", [PAIRS, LowRankPairs(rank=4, targets="qv")])
def test_pairs_over_packed_layers_and_recomputed_passes_have_the_same_gradients(
    checkpoint: Checkpoint, tmp_path: Path, trainable: Trainable
) -> None:
    plan = plan_trainable(base_hash=base_hash(checkpoint.folder), config=checkpoint.config, trainable=trainable)
    backbone = Backbone.open(checkpoint, tmp_path / "nf4", base_hash=plan.base_hash)
    model = ExpandedModel(backbone=backbone, checkpoint=checkpoint, plan=plan)
    state = some_state(model)
    sample = TokenisedSample(ids=IDS[0].numpy().astype(np.int32), label_mask=np.arange(6) > 2)
    found = []
    forms: list[FrozenForm] = ["decoded", "nf4"]
    for frozen in forms:
        for recompute in (False, True):
            model.load_state(state)
            model.hold(residency="suffix", frozen=frozen)
            model.recompute = recompute
            groups = model.train_units(plan.unit_ids)
            inputs = model.embed(IDS[:1]).detach()
            loss = stack_losses(model, 0).task(task_batch([sample], inputs), 1.0)
            loss.backward()
            gradients = [tensor.grad for group in groups for tensor in group.tensors]
            assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
            found.append((loss.item(), gradients))
            model.recompute = False
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for one, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
