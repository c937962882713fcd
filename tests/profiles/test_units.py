"""Which tensors does each kind of unit have, and what of them does a width train?"""

from __future__ import annotations

from itertools import pairwise

import pytest

from fedblocks.profiles.model_shape import WIDTHS, ModelShape, TensorSpec
from fedblocks.profiles.units import (
    EXTRA_UNIT,
    BaseTensors,
    LowRankPairs,
    NamedTensors,
    TrainedUnits,
    trained_unit_ids,
    unit_parameters,
    unit_tensors,
    unit_width,
)

SHAPE = ModelShape(
    family="llama",
    num_layers=3,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=100,
    tied_embeddings=True,
)
HEAD = NamedTensors(
    name="head", tensors=(TensorSpec(name="weight", shape=(7, 64)), TensorSpec(name="bias", shape=(7,)))
)


def pairs(**changes: object) -> TrainedUnits:
    return TrainedUnits(shape=SHAPE, trainable=LowRankPairs(**{"rank": 32, **changes}))  # type: ignore[arg-type]


def test_expanded_blocks_are_what_the_model_shape_says_for_any_number() -> None:
    units = TrainedUnits(shape=SHAPE)
    for of in (SHAPE, units):
        assert unit_tensors(of, 17, 0.5) == SHAPE.block_tensors(0.5)
        assert unit_parameters(of, 17, 0.5) == SHAPE.slice_parameters(0.5)
        assert unit_width(of, 17, 0.5) == 0.5
    assert trained_unit_ids(units, (0, 4)) == (0, 4)


def test_a_pair_stands_over_every_projection_and_a_width_is_its_first_components() -> None:
    units = pairs()
    assert trained_unit_ids(units, ()) == (0, 1, 2)
    whole = {spec.name: spec for spec in unit_tensors(units, 1)}
    assert len(whole) == 14
    assert whole["mlp.down_proj.lora_A"].shape == (32, 128)
    assert whole["mlp.down_proj.lora_B"].shape == (64, 32)
    assert {name for name, spec in whole.items() if spec.is_out} == {n for n in whole if n.endswith("lora_B")}
    ranks = [unit_tensors(units, 1, width)[0].shape[0] for width in WIDTHS]
    assert ranks == [4, 8, 16, 32]  # the tier ranks of methods.md 11
    for inner, outer in pairwise(WIDTHS):
        for small, large in zip(unit_tensors(units, 1, inner), unit_tensors(units, 1, outer), strict=True):
            assert small.name == large.name
            assert all(a <= b for a, b in zip(small.shape, large.shape, strict=True))
    assert unit_parameters(units, 1, 0.25) * 4 == unit_parameters(units, 1)


def test_the_smallest_rank_is_one() -> None:
    assert unit_tensors(pairs(rank=4), 0, 0.125)[0].shape == (1, 64)


def test_queries_and_values_alone_can_be_the_targets() -> None:
    names = [spec.name for spec in unit_tensors(pairs(targets="qv"), 0)]
    assert names == [f"self_attn.{x}_proj.lora_{ab}" for x in "qv" for ab in "AB"]


def test_merged_pairs_change_the_weights_themselves() -> None:
    published = pairs(merged=True).published()
    assert unit_tensors(published, 2) == tuple(spec for spec in SHAPE.block_tensors() if len(spec.shape) == 2)
    assert unit_width(published, 2, 0.25) == 1.0
    assert pairs().published() == pairs()


def test_base_tensors_are_layers_and_one_unit_for_the_tables() -> None:
    units = TrainedUnits(shape=SHAPE, trainable=BaseTensors(layers=(0, 1, 2), tables=True))
    assert trained_unit_ids(units, ()) == (0, 1, 2, 3)
    assert unit_tensors(units, 0) == SHAPE.block_tensors()
    assert [spec.name for spec in unit_tensors(units, 3)] == ["model.embed_tokens.weight", "model.norm.weight"]
    assert sum(unit_parameters(units, u) for u in range(4)) == SHAPE.total_parameters
    assert unit_width(units, 0, 0.25) == 1.0
    top = TrainedUnits(shape=SHAPE, trainable=BaseTensors(layers=(2,), tables=False))
    assert trained_unit_ids(top, ()) == (2,)
    with pytest.raises(KeyError, match="no unit 1"):
        unit_tensors(top, 1)


def test_an_extra_tensor_set_stands_beside_the_units_and_has_no_width() -> None:
    units = TrainedUnits(shape=SHAPE, extra=HEAD)
    assert trained_unit_ids(units, (0, 1)) == (0, 1, EXTRA_UNIT)
    assert unit_tensors(units, EXTRA_UNIT, 0.25) == HEAD.tensors
    assert unit_parameters(units, EXTRA_UNIT, 0.25) == 7 * 64 + 7
    assert unit_width(units, EXTRA_UNIT, 0.25) == 1.0
    assert unit_width(units, 0, 0.25) == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0, expected a whole number of at least 1"),
        ({"rank": 33}, "rank is 33, expected at most 32, the smallest dimension"),
        ({"scaling": 0.0}, "scaling is 0.0, expected a positive number"),
        ({"targets": "mlp"}, "targets are 'mlp', expected all or qv"),
    ],
)
def test_impossible_pairs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs(**changes)


def test_layers_beyond_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers are \(3,\), the model has 3"):
        TrainedUnits(shape=SHAPE, trainable=BaseTensors(layers=(3,), tables=False))
