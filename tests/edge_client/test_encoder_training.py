"""Does an encoder learn labels, and is it held to where its base puts texts? On its 4-bit layers, through the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedblocks.edge_client.anchor import AnchorSet
from fedblocks.edge_client.backbone import Backbone
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.encoder_model import HEAD_BIAS, HEAD_WEIGHT, EncoderModel, classification_head
from fedblocks.edge_client.encoder_objective import EmbeddingTeacher, embed_texts, open_teacher, text_losses
from fedblocks.edge_client.evaluate import evaluate_examples, measure_anchor
from fedblocks.edge_client.expanded_model import open_model
from fedblocks.edge_client.objective import objective_of
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.train import train
from fedblocks.profiles.cost import ExecutionMode, SavedBytes
from fedblocks.profiles.units import EXTRA_UNIT
from fedblocks.protocol.expansion import plan_expansion

LABELS = 3


@pytest.fixture
def base(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    torch.set_num_threads(1)
    return Checkpoint.open(tiny_checkpoint(tmp_path, "bert"))


@pytest.fixture
def make_model(base: Checkpoint, tmp_path: Path) -> Callable[..., EncoderModel]:
    def make(placement: Any = "thirds", blocks: int = 2, **fields: Any) -> EncoderModel:
        plan = plan_expansion(base_hash="0" * 64, config=base.config, placement=placement, num_blocks=blocks)
        plan = replace(plan, extra=classification_head(64, LABELS))
        backbone = Backbone.open(base, tmp_path / "nf4", base_hash="0" * 64)
        model = open_model(backbone=backbone, checkpoint=base, plan=plan, **fields)
        assert isinstance(model, EncoderModel)
        return model

    return make


def texts(count: int = 24, seed: int = 0) -> list[TokenisedSample]:
    """Texts of three kinds, each with characters of its own."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        label, n = i % LABELS, int(rng.integers(5, 12))
        ids = np.concatenate([[1], rng.integers(4 + 8 * label, 14 + 8 * label, n), [2]]).astype(np.int32)
        samples.append(TokenisedSample(ids=ids, label_mask=np.ones(n + 2, dtype=bool), label=label))
    return samples


def anchors(count: int = 16) -> AnchorSet:
    return AnchorSet(sequences=tuple(sample.ids for sample in texts(count, seed=5)), seed=0)


def teacher_of(model: EncoderModel, prefix: PrefixStates, store: RecordStore | None = None) -> EmbeddingTeacher:
    teacher = open_teacher(anchors=anchors(), model=model, prefix=prefix, store=store)
    assert isinstance(teacher, EmbeddingTeacher)
    return teacher


def run(model: EncoderModel, task: Any, *, mode: ExecutionMode | None = None, store: RecordStore | None = None) -> Any:
    prefix = PrefixStates(model, store)
    return train(
        model=model,
        task=task,
        data=texts(),
        teacher=teacher_of(model, prefix),
        prefix=prefix,
        mode=mode,
        now=lambda: 0.0,
        status=lambda _phase, _steps: None,
    )


def test_drift_is_0_at_the_start_and_at_most_4(make_model: Any) -> None:
    model = make_model()
    prefix = PrefixStates(model, None)
    sums = measure_anchor(model, teacher_of(model, prefix), range(16), prefix)
    assert 0 <= sums.kl_sum < 1e-9
    assert sums.num_tokens == 16
    rng = np.random.default_rng(0)
    shape = model.shape
    model.load_state(
        {0: {s.name: rng.standard_normal(s.shape).astype(np.float32) for s in shape.block_tensors() if s.is_out}}
    )
    sums = measure_anchor(model, teacher_of(model, prefix), range(16), prefix)
    assert 1e-3 < sums.kl_sum / 16 <= 4


def test_drift_is_the_mean_squared_distance_of_normalised_embeddings(make_model: Any) -> None:
    model = make_model()
    rng = np.random.default_rng(0)
    state = {
        1: {s.name: 0.1 * rng.standard_normal(s.shape).astype(np.float32) for s in model.shape.block_tensors()},
    }
    model.load_state(state)
    prefix = PrefixStates(model, None)
    sums = measure_anchor(model, teacher_of(model, prefix), range(16), prefix)
    sequences, batches = anchors().sequences, [[i] for i in range(16)]
    one, two = embed_texts(model, sequences, batches), embed_texts(model, sequences, batches, of_base=True)
    assert torch.allclose(one.norm(dim=1), torch.ones(16), atol=1e-6)
    assert sums.kl_sum == pytest.approx((one - two).square().sum().item(), rel=1e-4)
    squares = (one - two).square().sum(1).square().sum().item()
    assert sums.square_sum == pytest.approx(squares, rel=1e-4)


def test_training_lowers_the_loss_and_moves_blocks_and_head(make_model: Any, make_assignment: Any) -> None:
    model = make_model()
    task = make_assignment(blocks=(0, 1, EXTRA_UNIT), steps=40, batch_size=8, learning_rate=3e-3)
    result = run(model, task)
    assert result.loss_first > result.loss_last
    assert result.loss_last < 0.5 * np.log(LABELS)
    assert set(result.deltas) == {0, 1, EXTRA_UNIT}
    assert {name: values.shape for name, values in result.deltas[EXTRA_UNIT].items()} == {
        HEAD_WEIGHT: (LABELS, 64),
        HEAD_BIAS: (LABELS,),
    }
    assert np.abs(result.deltas[EXTRA_UNIT][HEAD_WEIGHT]).max() > 0
    assert len(result.gradient_energy) == 3
    assert result.gradient_energy[0] > 0
    state = {block: dict(tensors) for block, tensors in result.deltas.items()}
    model.load_state(state)
    scores = evaluate_examples(model, texts(seed=9), PrefixStates(model, None))
    assert scores.num_correct > 0.8 * scores.num_items
    assert scores.num_tokens == scores.num_items
    assert scores.nll_sum / scores.num_items < np.log(LABELS)


def test_an_untrained_head_finds_all_labels_alike(make_model: Any) -> None:
    scores = evaluate_examples(make_model(), texts())
    assert scores.nll_sum / scores.num_items == pytest.approx(np.log(LABELS))
    assert scores.num_correct == 8  # of equal logits the first label counts


def test_the_anchor_holds_the_embedding(make_model: Any, make_assignment: Any) -> None:
    drifts = []
    for weight in (0.0, 20.0):
        model = make_model()
        task = make_assignment(blocks=(0, 1, EXTRA_UNIT), steps=16, anchor_weight=weight)
        result = run(model, task)
        model.load_state({block: dict(tensors) for block, tensors in result.deltas.items()})
        prefix = PrefixStates(model, None)
        drifts.append(measure_anchor(model, teacher_of(model, prefix), range(16), prefix).kl_sum)
    assert drifts[1] < 0.5 * drifts[0]


def test_the_cut_into_micro_batches_changes_neither_loss_nor_gradient(make_model: Any) -> None:
    samples = texts(8)
    gradients = []
    for size in (8, 2):
        model = make_model()
        groups = model.train_blocks((0, 1, EXTRA_UNIT))
        objective = objective_of(model)
        losses = text_losses(model, model.base_cut)
        prefix = PrefixStates(model, None)
        for start in range(0, 8, size):
            part = samples[start : start + size]
            batch = objective.task_batch(part, prefix.padded([sample.ids for sample in part]))
            losses.task(batch, 1 / 8).backward()
        gradients.append([tensor.grad for group in groups for tensor in group.tensors])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "mode", [ExecutionMode(micro_batch_size=2), ExecutionMode(micro_batch_size=4, checkpoint=True)]
)
def test_recomputing_and_small_passes_give_the_same_update(
    make_model: Any, make_assignment: Any, mode: ExecutionMode
) -> None:
    task = make_assignment(blocks=(0, 1, EXTRA_UNIT), anchor_weight=1.0, steps=3)
    plain, other = run(make_model(), task), run(make_model(), task, mode=mode)
    for block, tensors in plain.deltas.items():
        for name in tensors:
            np.testing.assert_allclose(tensors[name], other.deltas[block][name], atol=2e-4)


def test_cached_states_and_records_give_the_same_bits(make_model: Any, make_assignment: Any, tmp_path: Path) -> None:
    task = make_assignment(blocks=(1, EXTRA_UNIT), anchor_weight=1.0, steps=4)
    plain = run(make_model(), task)
    store = RecordStore(tmp_path / "cache", max_bytes=1 << 24, warn=lambda _line: None)
    for _ in range(2):  # filled, then read
        cached = run(make_model(), task, store=store)
        for block, tensors in plain.deltas.items():
            assert all(np.array_equal(tensors[name], cached.deltas[block][name]) for name in tensors)
    model = make_model()
    records = RecordStore(tmp_path / "teacher", max_bytes=1 << 24, warn=lambda _line: None)
    teacher = teacher_of(model, PrefixStates(model, None), records)
    teacher.fill(range(16))
    again = teacher_of(model, PrefixStates(model, None), records)
    fresh = teacher_of(model, PrefixStates(model, None))
    for one, two in zip(again.records(range(16)), fresh.records(range(16)), strict=True):
        assert torch.equal(one.embedding, two.embedding)
    assert len(records) == 16


def test_states_padded_together_as_on_a_gpu_are_those_of_each_text_alone(make_model: Any) -> None:
    model = make_model()
    prefix = PrefixStates(model, None)
    samples = [sample.ids for sample in texts(9)]
    alone = prefix.padded(samples)
    prefix._run_equal = prefix._run_padded  # type: ignore[method-assign]
    torch.testing.assert_close(prefix.padded(samples), alone, atol=1e-5, rtol=1e-5)


def test_a_slim_block_trains_its_slice_alone(make_model: Any, make_assignment: Any) -> None:
    task = make_assignment(blocks=(0, EXTRA_UNIT), width=0.25, steps=4)
    result = run(make_model(), task)
    shapes = {name: values.shape for name, values in result.deltas[0].items()}
    assert shapes["attention.self.query.weight"] == (16, 64)
    assert shapes["attention.output.dense.weight"] == (64, 16)
    assert shapes["intermediate.dense.weight"] == (48, 64)
    assert shapes["output.dense.weight"] == (64, 48)
    assert shapes["output.LayerNorm.bias"] == (64,)
    assert result.deltas[EXTRA_UNIT][HEAD_WEIGHT].shape == (LABELS, 64)


def test_the_same_seed_gives_the_same_update(make_model: Any, make_assignment: Any) -> None:
    task = make_assignment(blocks=(0, 1, EXTRA_UNIT), anchor_weight=1.0, steps=3)
    one, two = run(make_model(), task), run(make_model(), task)
    for block, tensors in one.deltas.items():
        assert all(np.array_equal(tensors[name], two.deltas[block][name]) for name in tensors)


def test_a_text_longer_than_the_positions_is_told_what_to_lower(make_model: Any) -> None:
    with pytest.raises(ValueError, match=r"513 tokens, this model has 512 positions; lower data\.max_tokens"):
        make_model().embed_samples([np.full(513, 5, dtype=np.int32)])


def test_texts_without_labels_are_refused(make_model: Any) -> None:
    with pytest.raises(ValueError, match="has no label"):
        evaluate_examples(make_model(), [replace(texts(1)[0], label=None)])


@pytest.mark.parametrize("trained", [True, False])
def test_a_block_keeps_for_its_backward_pass_what_the_cost_model_says(make_model: Any, trained: bool) -> None:
    model = make_model("top", 1)
    position = model.base_cut
    if trained:
        model.train_blocks((0,))
    weights = model.weights(position)
    own = {tensor.untyped_storage().data_ptr() for tensor in weights.tensors().values()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    h = torch.randn(4, 32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model.run(h, position)
    expected = SavedBytes.of(model.shape, 4, trained=trained).total(4, 32)
    assert sum(kept.values()) == pytest.approx(expected, rel=0.1)
    del y
