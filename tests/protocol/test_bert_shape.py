"""What does a block of an encoder consist of, at every width, and what does its plan say?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedblocks.profiles import cost
from fedblocks.profiles.model_shape import WIDTHS, ModelShape
from fedblocks.profiles.units import EXTRA_UNIT, NamedTensors, TensorSpec, TrainedUnits, block_units, unit_tensors
from fedblocks.protocol.expansion import FAMILIES, ExpansionPlan, base_fields, plan_expansion, shape_from_config

MINILM: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}


def shape() -> ModelShape:
    return shape_from_config(MINILM)


def test_a_block_of_minilm_has_the_sixteen_tensors_of_a_bert_layer() -> None:
    tensors = {spec.name: spec.shape for spec in shape().block_tensors()}
    assert len(tensors) == 16
    assert tensors["attention.self.key.bias"] == (384,)
    assert tensors["intermediate.dense.weight"] == (1536, 384)
    assert shape().block_parameters == 1_774_464  # 12·384² + 13·384
    assert shape().linear_parameters == 12 * 384 * 384
    assert shape().head_rows == 0
    out = {spec.name for spec in shape().block_tensors() if spec.is_out}
    assert out == {f"{m}.{kind}" for m in FAMILIES["bert"].out_modules for kind in ("weight", "bias")}
    norms = {spec.name for spec in shape().block_tensors() if spec.is_norm}
    assert norms == {f"{m}.LayerNorm.{kind}" for m in ("attention.output", "output") for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("width", "heads", "neurons"), [(0.125, 1, 192), (0.25, 3, 384), (0.5, 6, 768), (1.0, 12, 1536)]
)
def test_a_slim_block_is_the_first_heads_and_neurons_and_all_of_the_norms(
    width: float, heads: int, neurons: int
) -> None:
    tensors = {spec.name: spec.shape for spec in shape().block_tensors(width)}
    for part in ("query", "key", "value"):
        assert tensors[f"attention.self.{part}.weight"] == (heads * 32, 384)
        assert tensors[f"attention.self.{part}.bias"] == (heads * 32,)
    assert tensors["attention.output.dense.weight"] == (384, heads * 32)
    assert tensors["attention.output.dense.bias"] == (384,)
    assert tensors["intermediate.dense.weight"] == (neurons, 384)
    assert tensors["intermediate.dense.bias"] == (neurons,)
    assert tensors["output.dense.weight"] == (384, neurons)
    assert tensors["output.dense.bias"] == tensors["output.LayerNorm.weight"] == (384,)


def test_stray_fields_of_decoders_change_nothing() -> None:
    assert (
        shape_from_config({**MINILM, "num_key_value_heads": 2, "head_dim": 7, "tie_word_embeddings": False}) == shape()
    )


def test_what_the_base_hash_covers_of_an_encoder() -> None:
    fields = base_fields(MINILM)
    assert fields["encoder"] is True
    assert fields["layer_norm_eps"] == 1e-12
    assert base_fields({**MINILM, "layer_norm_eps": 1e-5}) != fields
    assert base_fields({**MINILM, "hidden_dropout_prob": 0.3}) == fields


def test_a_plan_with_a_head_survives_and_a_decoders_plan_says_nothing_of_encoders() -> None:
    head = NamedTensors(name="classification head", tensors=(TensorSpec(name="head.weight", shape=(77, 384)),))
    plan = plan_expansion(base_hash="0" * 64, config=MINILM, placement="thirds", num_blocks=3)
    plan = replace(plan, extra=head)
    assert ExpansionPlan.from_json(plan.to_json()) == plan
    assert plan.unit_ids == (0, 1, 2, EXTRA_UNIT)
    assert block_units(plan.unit_ids) == (0, 1, 2)
    assert plan.slots() == {1: (2,), 3: (0,), 5: (1,)}
    decoder = plan_expansion(
        base_hash="0" * 64, config={**MINILM, "model_type": "llama"}, placement="thirds", num_blocks=3
    )
    assert "encoder" not in decoder.to_json()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_head_is_whole_at_every_width(width: float) -> None:
    head = NamedTensors(name="classification head", tensors=(TensorSpec(name="head.weight", shape=(77, 384)),))
    assert unit_tensors(TrainedUnits(shape=shape(), extra=head), EXTRA_UNIT, width) == head.tensors


def test_an_encoder_attends_both_ways_and_has_no_output_matrix_to_pay_for() -> None:
    decoder = replace(shape(), encoder=False)
    assert cost.attention_flops(shape(), 100) == 2 * cost.attention_flops(decoder, 100)
    assert cost.head_flops(shape(), 1.0) == 0 < cost.head_flops(decoder, 1.0)
