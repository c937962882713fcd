"""Is a grown encoder the base to 1e-5 until its blocks are trained, and the base's bits without them? (E1-E5, bert)"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedblocks.edge_client.backbone import Backbone, DenseBackbone
from fedblocks.edge_client.checkpoint import Checkpoint, CheckpointError, base_hash, initial_block
from fedblocks.edge_client.encoder_model import EncoderModel, pooled
from fedblocks.edge_client.expanded_model import open_model
from fedblocks.edge_client.export import (
    BASE_NORMS,
    EXPORT_RECORD,
    Head,
    base_of_export,
    build_base_hf,
    build_expanded_hf,
    export_hf,
    read_head,
    verify_identity,
)
from fedblocks.protocol.expansion import ExpansionError, ExpansionPlan, expand_config, grow, plan_expansion

Factory = Callable[..., Path]
TOLERANCE = 1e-5


@pytest.fixture
def base(tmp_path: Path, tiny_checkpoint: Factory) -> Checkpoint:
    torch.set_num_threads(1)
    return Checkpoint.open(tiny_checkpoint(tmp_path, "bert"))


def make_plan(checkpoint: Checkpoint, placement: Any = "thirds", num_blocks: int = 3) -> ExpansionPlan:
    return plan_expansion(
        base_hash=base_hash(checkpoint.folder), config=checkpoint.config, placement=placement, num_blocks=num_blocks
    )


def random_state(plan: ExpansionPlan, scale: float = 0.1) -> dict[int, dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    return {
        block_id: {
            spec.name: rng.normal(scale=scale, size=spec.shape).astype(np.float32)
            for spec in plan.shape.block_tensors()
        }
        for block_id in plan.block_ids
    }


def batches() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    tokens = torch.randint(4, 128, (3, 17), generator=torch.Generator().manual_seed(3))
    whole, left, right = torch.ones_like(tokens), torch.ones_like(tokens), torch.ones_like(tokens)
    left[1, :5] = left[2, :11] = 0
    right[1, -5:] = right[2, -11:] = 0
    return {"plain": (tokens, whole), "left padded": (tokens, left), "right padded": (tokens, right)}


def embeddings(model: Any) -> dict[str, torch.Tensor]:
    """Of a transformers model: hidden states of the real tokens, and the mean embedding."""
    found = {}
    with torch.no_grad():
        for name, (tokens, mask) in batches().items():
            h = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
            found[name] = h[mask.bool()]
            weights = mask.unsqueeze(2)
            mean = (h * weights).sum(1) / weights.sum(1)
            found[f"{name}, embedding"] = torch.nn.functional.normalize(mean, dim=1)
    return found


def differences(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[float]:
    return [(one[name] - two[name]).abs().max().item() for name in one]


@pytest.mark.parametrize(
    ("placement", "num_blocks"), [("thirds", 1), ("thirds", 3), ("top", 1), ("top", 3), ("interleaved", 4)]
)
def test_an_untrained_grown_encoder_is_the_base_to_rounding(base: Checkpoint, placement: str, num_blocks: int) -> None:
    plan = make_plan(base, placement, num_blocks)
    expected = embeddings(build_base_hf(base, torch.float32))
    found = embeddings(build_expanded_hf(base, plan, {}, 1.0, torch.float32))
    assert max(differences(expected, found)) <= TOLERANCE
    verify_identity(base, plan)


def test_in_bf16_it_is_the_base_to_the_rounding_of_bf16(tmp_path: Path, tiny_checkpoint: Factory) -> None:
    base = Checkpoint.open(tiny_checkpoint(tmp_path, "bert", dtype="bfloat16"))
    plan = make_plan(base)
    expected = embeddings(build_base_hf(base, torch.bfloat16))
    found = embeddings(build_expanded_hf(base, plan, {}, 1.0, torch.bfloat16))
    assert max(differences(expected, found)) <= 0.1  # hidden states of up to 4, in steps of 2^-6, through ten norms
    verify_identity(base, plan)


def test_strength_0_is_the_base_to_rounding_and_strength_1_is_not(base: Checkpoint) -> None:
    plan = make_plan(base, "top", 2)
    state = random_state(plan)
    expected = embeddings(build_base_hf(base, torch.float32))
    assert max(differences(expected, embeddings(build_expanded_hf(base, plan, state, 0.0, torch.float32)))) <= TOLERANCE
    assert min(differences(expected, embeddings(build_expanded_hf(base, plan, state, 1.0, torch.float32)))) > 1e-3


def test_strength_moves_norms_from_their_initial_value(base: Checkpoint) -> None:
    from fedblocks.edge_client.export import block_values

    plan = make_plan(base)
    state = random_state(plan)
    initial = initial_block(base, plan, 0)
    half, whole = (block_values(base, plan, state, 0, g) for g in (0.5, 1.0))
    for spec in plan.shape.block_tensors():
        delta = torch.from_numpy(state[0][spec.name])
        torch.testing.assert_close(whole[spec.name], initial[spec.name] + delta)
        share = 0.5 if spec.is_out or spec.is_norm else 1.0
        torch.testing.assert_close(half[spec.name], initial[spec.name] + share * delta)


def test_the_grown_configuration_has_the_depth_and_else_the_bases_fields(base: Checkpoint) -> None:
    plan = make_plan(base)
    grown = expand_config(base.config, plan)
    assert grown == {**base.config, "num_hidden_layers": 7}
    assert len(build_expanded_hf(base, plan, {}, 1.0, torch.float32).encoder.layer) == 7


def test_initial_values_are_the_same_bits_for_any_number_of_threads(base: Checkpoint) -> None:
    plan = make_plan(base)
    torch.set_num_threads(3)
    try:
        three = initial_block(Checkpoint.open(base.folder), plan, 0)
    finally:
        torch.set_num_threads(1)
    one = initial_block(base, plan, 0)
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_a_plan_that_would_put_a_trained_norm_below_a_new_block_does_not_grow(base: Checkpoint) -> None:
    assert len(grow(make_plan(base, "thirds", 2)).blocks) == 3
    with pytest.raises(ExpansionError, match="does not grow into a slot"):
        grow(make_plan(base, "top", 1))


def test_growth_into_a_free_slot_leaves_a_trained_model_as_it_is(base: Checkpoint) -> None:
    plan = make_plan(base, "thirds", 2)
    state = random_state(plan)
    before = embeddings(build_expanded_hf(base, plan, state, 1.0, torch.float32))
    after = embeddings(build_expanded_hf(base, grow(plan), state, 1.0, torch.float32))
    assert max(differences(before, after)) <= TOLERANCE


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "expected 'absolute'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"num_attention_heads": 5}, "no multiple of num_attention_heads"),
    ],
)
def test_a_bert_that_computes_otherwise_is_refused(base: Checkpoint, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ExpansionError, match=match) as e:
        plan_expansion(base_hash="0" * 64, config=base.config | fields, placement="top", num_blocks=1)
    assert e.value.code == "E_EXPAND_CONFIG"


def test_a_bert_with_a_head_of_its_own_is_told_how_to_save_the_encoder(base: Checkpoint) -> None:
    tensors = {f"bert.{name}": tensor for name, tensor in load_file(base.files[0]).items()}
    save_file(tensors, base.files[0])
    with pytest.raises(CheckpointError, match=r"AutoModel\.from_pretrained"):
        Checkpoint.open(base.folder)


def test_counted_positions_of_old_checkpoints_are_no_part_of_the_base(base: Checkpoint) -> None:
    before = base_hash(base.folder)
    tensors = load_file(base.files[0])
    save_file({**tensors, "embeddings.position_ids": torch.arange(512).unsqueeze(0)}, base.files[0])
    assert base_hash(base.folder) == before


# The client's stack


@pytest.fixture
def make_stack(tmp_path: Path) -> Callable[..., EncoderModel]:
    def make(base: Checkpoint, plan: ExpansionPlan | None, *, nf4: bool = False, **fields: Any) -> EncoderModel:
        content = base_hash(base.folder)
        backbone = Backbone.open(base, tmp_path / "nf4", base_hash=content) if nf4 else DenseBackbone(base, content)
        model = open_model(backbone=backbone, checkpoint=base, plan=plan, **fields)
        assert isinstance(model, EncoderModel)
        return model

    return make


def stack_outputs(model: EncoderModel, *, of_base: bool = False) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("plain", "right padded"):
        tokens, mask = batches()[name]
        lengths = mask.sum(1)
        with torch.no_grad():
            h = (model.forward_base if of_base else model.forward)(tokens, lengths=lengths)
        found[name] = h[mask.bool()]
        found[f"{name}, embedding"] = pooled(h, lengths)
    return found


@pytest.mark.parametrize("placement", ["thirds", "top"])
def test_the_stack_computes_what_transformers_computes(base: Checkpoint, make_stack: Any, placement: str) -> None:
    plan = make_plan(base, placement, 3)
    state = random_state(plan)
    for strength in (1.0, 0.4):
        model = make_stack(base, plan, state=state)
        model.set_strength(strength)
        expected = embeddings(build_expanded_hf(base, plan, state, strength, torch.float32))
        found = stack_outputs(model)
        assert max((found[n] - expected[n]).abs().max().item() for n in found) <= 2e-5
        expected = embeddings(build_base_hf(base, torch.float32))
        found = stack_outputs(model, of_base=True)
        assert max((found[n] - expected[n]).abs().max().item() for n in found) <= TOLERANCE


def test_the_teacher_from_the_base_cut_is_the_base(base: Checkpoint, make_stack: Any) -> None:
    model = make_stack(base, make_plan(base), state=random_state(make_plan(base)))
    tokens, mask = batches()["right padded"]
    with torch.no_grad():
        cut = model.forward(tokens, 0, model.base_cut, lengths=mask.sum(1))
        found = model.forward_base(cut, model.base_cut, lengths=mask.sum(1))
        expected = model.forward_base(tokens, lengths=mask.sum(1))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=TOLERANCE, rtol=0)


def test_what_stands_at_pads_is_never_read(base: Checkpoint, make_stack: Any) -> None:
    model = make_stack(base, make_plan(base), state=random_state(make_plan(base)))
    tokens, mask = batches()["right padded"]
    with torch.no_grad():
        one, two = (
            pooled(model.forward(ids, lengths=mask.sum(1)), mask.sum(1))
            for ids in (tokens, tokens.where(mask.bool(), 5))
        )
    assert torch.equal(one, two)


def test_on_four_bit_layers_untrained_blocks_are_the_four_bit_base(base: Checkpoint, make_stack: Any) -> None:
    model = make_stack(base, make_plan(base), nf4=True)
    found, expected = stack_outputs(model), stack_outputs(model, of_base=True)
    assert max((found[n] - expected[n]).abs().max().item() for n in found) <= TOLERANCE
    model.hold(residency="suffix", frozen="nf4")
    packed = stack_outputs(model)
    assert max((found[n] - packed[n]).abs().max().item() for n in found) <= TOLERANCE


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_at_step_1_only_zero_set_and_norms_have_a_gradient_and_after_two_steps_all_have_moved(
    base: Checkpoint, make_stack: Any, width: float
) -> None:
    plan = make_plan(base)
    model = make_stack(base, plan)
    groups = model.train_blocks(plan.block_ids, width=width)
    tokens, mask = batches()["right padded"]
    goal = torch.nn.functional.normalize(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    # A post-norm block's norms stand in the residual stream: they have a gradient from the start, like the zero set.
    awake = {spec.name for spec in plan.shape.block_tensors() if spec.is_out or spec.is_norm}
    shares = []
    for step in range(3):
        h = model.forward(tokens, lengths=mask.sum(1))
        (pooled(h, mask.sum(1)) - goal).square().sum().backward()
        for group in groups:
            for tensor in group.tensors:
                assert tensor.grad is not None
        if step == 0:
            for group in groups:
                for name, view in group.named.items():
                    owner = next(t for t in group.tensors if t.data_ptr() <= view.data_ptr() < t.data_ptr() + t.nbytes)
                    start = (view.data_ptr() - owner.data_ptr()) // view.element_size()
                    gradient = owner.grad.flatten()[start : start + view.numel()]
                    shares.append((name, gradient.abs().max().item()))
        with torch.no_grad():
            for group in groups:
                for tensor in group.tensors:
                    tensor -= 0.05 * tensor.grad
                    tensor.grad = None
                group.after_step()
    assert all((value > 0) == (name in awake) for name, value in shares)
    for block in model.deltas(groups).values():
        for name in block:
            # Softmax ignores what all keys share: a key's bias never has a gradient but by rounding.
            assert np.abs(block[name]).max() > 0 or name == "attention.self.key.bias", name


# Export


@pytest.mark.parametrize(("placement", "blocks", "shards"), [("thirds", 3, 1), ("top", 2, 2)])
def test_an_export_reloads_as_the_same_class_and_is_the_tuned_model(
    tmp_path: Path, tiny_checkpoint: Factory, placement: str, blocks: int, shards: int
) -> None:
    from transformers import AutoModel

    base = Checkpoint.open(tiny_checkpoint(tmp_path, "bert", shards=shards))
    plan = make_plan(base, placement, blocks)
    state = random_state(plan)
    head = Head(weight=np.ones((2, 64), np.float32), bias=np.zeros(2, np.float32), labels=("no", "yes"))
    out = tmp_path / "out"
    summary = export_hf(checkpoint=base, plan=plan, state=state, strength=0.7, out=out, head=head)
    assert summary.num_layers == 4 + blocks
    loaded = AutoModel.from_pretrained(out).eval()
    assert type(loaded).__name__ == "BertModel"
    expected = embeddings(build_expanded_hf(base, plan, state, 0.7, torch.float32))
    assert max(differences(expected, embeddings(loaded))) == 0
    read = read_head(out)
    assert read is not None
    assert read.labels == ("no", "yes")
    assert np.array_equal(read.weight, head.weight)
    assert "AutoModel.from_pretrained" in (out / "MODEL_CARD.md").read_text()


def test_every_base_tensor_but_the_slot_norms_keeps_its_bytes_and_the_base_comes_back(
    base: Checkpoint, tmp_path: Path
) -> None:
    plan = make_plan(base)
    out = tmp_path / "out"
    export_hf(checkpoint=base, plan=plan, state=random_state(plan), strength=1.0, out=out)
    restored = base_of_export(out)
    assert set(restored) == set(base.names())
    assert all(torch.equal(restored[name], base.tensor(name)) for name in base.names())
    grown = Checkpoint.open(out)
    index = {entry.index: i for i, entry in enumerate(plan.stack()) if entry.kind == "base"}
    for layer in range(4):
        for name, tensor in base.layer_tensors(layer).items():
            now = grown.tensor(grown.layer_name(index[layer], name))
            if name.startswith("output.LayerNorm") and layer in plan.slots():
                assert torch.equal(now, torch.ones(64) if name.endswith("weight") else torch.zeros(64))
            else:
                assert torch.equal(now, tensor)
    assert set(load_file(out / BASE_NORMS)) == {
        f"encoder.layer.{layer}.output.LayerNorm.{kind}" for layer in plan.slots() for kind in ("weight", "bias")
    }


def test_an_export_at_strength_0_is_the_base_without_blocks(base: Checkpoint, tmp_path: Path) -> None:
    plan = make_plan(base)
    out = tmp_path / "out"
    summary = export_hf(checkpoint=base, plan=plan, state=random_state(plan), strength=0.0, out=out)
    assert (summary.num_layers, summary.num_blocks, summary.left_out) == (4, 0, plan.block_ids)
    assert base_hash(out) == base_hash(base.folder)
    assert (out / "model.safetensors").read_bytes() == base.files[0].read_bytes()
    restored = base_of_export(out)
    assert all(torch.equal(restored[name], base.tensor(name)) for name in base.names())


def test_an_encoder_whose_blocks_do_not_drop_out_is_not_written(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedblocks.edge_client import export

    def spoilt(folder: Path, grown: Checkpoint, plan: ExpansionPlan) -> dict[str, torch.Tensor]:
        tensors = right(folder, grown, plan)
        tensors["embeddings.LayerNorm.bias"] = tensors["embeddings.LayerNorm.bias"] + 1e-3
        return tensors

    right = export._without_blocks
    monkeypatch.setattr(export, "_without_blocks", spoilt)
    plan = make_plan(base)
    with pytest.raises(ExpansionError, match="E_IDENTITY"):
        export_hf(checkpoint=base, plan=plan, state=random_state(plan), strength=1.0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_export_keeps_the_files_of_sentence_transformers(base: Checkpoint, tmp_path: Path) -> None:
    (base.folder / "1_Pooling").mkdir()
    (base.folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (base.folder / "modules.json").write_text("[]")
    plan = make_plan(base)
    export_hf(checkpoint=base, plan=plan, state={}, strength=1.0, out=tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert (tmp_path / "out" / "modules.json").is_file()
    assert json.loads((tmp_path / "out" / EXPORT_RECORD).read_text())["strength"] == 1.0


def test_another_pooling_than_the_mean_is_refused(base: Checkpoint, make_stack: Any) -> None:
    (base.folder / "1_Pooling").mkdir()
    (base.folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(CheckpointError, match="expected pooling_mode_mean_tokens"):
        make_stack(base, make_plan(base))


def test_untrained_blocks_are_left_out_slot_by_slot(base: Checkpoint) -> None:
    from fedblocks.edge_client.export import trained_part

    plan = make_plan(base, "thirds", 3)
    state = {0: random_state(plan)[0]}
    assert trained_part(plan, state).block_ids == (0,)
    plan = make_plan(base, "top", 3)
    state = {0: random_state(plan)[0]}
    assert trained_part(plan, state) == plan  # the uppermost of them holds the norm that ends them all
