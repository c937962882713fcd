"""Do the methods of other papers aggregate as their equations say? B1 to B5 of methods.md 11, in numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from fedblocks.aggregator import methods
from fedblocks.aggregator.aggregation import AcceptedUpdate
from fedblocks.aggregator.run_rules import GlobalState, MethodState, PublishSettings
from fedblocks.profiles.model_shape import ModelShape, TensorSpec
from fedblocks.profiles.units import (
    EXTRA_UNIT,
    BaseTensors,
    LowRankPairs,
    NamedTensors,
    TrainedUnits,
    trained_unit_ids,
    unit_tensors,
)
from fedblocks.protocol.initial_pairs import initial_pair_tensor
from fedblocks.protocol.messages import AttemptId, ClientKey
from fedblocks.protocol.run_config import MethodName
from fedblocks.protocol.state import apply_step, apply_update, make_update, state_sha256
from fedblocks.protocol.tensors import FloatArray, State, encode_delta

SHAPE = ModelShape(
    family="llama",
    num_layers=2,
    hidden_size=24,
    intermediate_size=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=32,
    tied_embeddings=True,
)
RANK = 16
FP32 = PublishSettings(dense=False, format="fp32", density=1.0)
Deltas = Mapping[int, Mapping[str, FloatArray]]


def pairs(rank: int = RANK, *, merged: bool = False) -> TrainedUnits:
    return TrainedUnits(shape=SHAPE, trainable=LowRankPairs(rank=rank, scaling=2.0, seed=3, merged=merged))


def full() -> TrainedUnits:
    return TrainedUnits(shape=SHAPE, trainable=BaseTensors(layers=(0, 1), tables=True))


def changes(units: TrainedUnits, seed: int, *, width: float = 1.0, scale: float = 0.05) -> Deltas:
    """What a client may have learnt: every tensor of every unit moves."""
    rng = np.random.default_rng(seed)
    return {
        unit: {
            spec.name: (scale * rng.standard_normal(spec.shape)).astype(np.float32)
            for spec in unit_tensors(units, unit, width)
        }
        for unit in trained_unit_ids(units, (0, 1))
    }


def update(
    units: TrainedUnits, deltas: Deltas, name: str, *, examples: int = 10, width: float = 1.0, staleness: int = 0
) -> AcceptedUpdate:
    encoded = encode_delta(units, sorted(deltas), deltas, {}, format="fp32", density=1.0, width=width)
    payload = memoryview(b"".join(encoded.parts))
    return AcceptedUpdate(
        client=ClientKey(name),
        attempt_id=AttemptId(f"attempt-{name}"),
        num_examples=examples,
        steps=4,
        staleness=staleness,
        format="fp32",
        density=1.0,
        width=width,
        tensors=encoded.headers,
        read_payload=lambda: payload,
    )


def next_model(
    name: MethodName, units: TrainedUnits, updates: Sequence[AcceptedUpdate], model: GlobalState | None = None
) -> GlobalState:
    """The version after a round with these updates."""
    before = model or GlobalState.zero(units.published())
    method = methods.of(name)
    folded = method.aggregate(updates, shape=units, state=MethodState(anchor_weight=0.0), model=before)
    made = method.publish(before, folded, shape=units, settings=FP32)
    assert made is not None
    after, step = made
    again = apply_step(
        before.published, step, shape=units.published(), blocks=trained_unit_ids(units.published(), (0, 1))
    )
    assert state_sha256(units.published(), again) == after.sha256  # a follower holds the same bits
    return after


def value(units: TrainedUnits, published: State, unit: int, spec: TensorSpec, version: int = 0) -> np.ndarray:
    assert isinstance(units.trainable, LowRankPairs)
    start = initial_pair_tensor(units.trainable, unit, spec, version=version).astype(np.float64)
    change = published.get(unit, {}).get(spec.name)
    return start if change is None else start + change


def linear_specs(units: TrainedUnits, unit: int) -> list[tuple[TensorSpec, TensorSpec]]:
    specs = unit_tensors(units, unit)
    return list(zip(specs[::2], specs[1::2], strict=True))


def products(units: TrainedUnits, published: State) -> list[np.ndarray]:
    """B A of every linear."""
    return [
        value(units, published, unit, b) @ value(units, published, unit, a)
        for unit in (0, 1)
        for a, b in linear_specs(units, unit)
    ]


def dense_sum(
    units: TrainedUnits, clients: Sequence[tuple[Deltas, float, float]], version: int = 0
) -> list[np.ndarray]:
    """sum of w_k B_k A_k, written out over (changes, weight, width)."""
    found = []
    for unit in (0, 1):
        for a, b in linear_specs(units, unit):
            total = 0.0
            for deltas, weight, _ in clients:
                da, db = deltas[unit][a.name], deltas[unit][b.name]
                start_a = value(units, {}, unit, a, version)[: da.shape[0]]
                start_b = value(units, {}, unit, b, version)[:, : db.shape[1]]
                total = total + weight * ((start_b + db) @ (start_a + da))
            found.append(total)
    return found


def assert_close(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], atol: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def test_b1_flora_equals_the_dense_sum_of_products_of_any_ranks() -> None:
    units = pairs(merged=True)
    clients = [
        (changes(units, 1, width=0.25), 0.2, 0.25),
        (changes(units, 2), 0.3, 1.0),
        (changes(units, 3, width=0.5), 0.5, 0.5),
    ]
    updates = [
        update(units, deltas, f"k{i}", examples=round(100 * weight), width=width)
        for i, (deltas, weight, width) in enumerate(clients)
    ]
    model = next_model("flora", units, updates)
    weights = [
        model.published[unit][spec.name].astype(np.float64) / 2.0  # the scaling
        for unit in (0, 1)
        for spec in unit_tensors(units.published(), unit)
    ]
    assert_close(weights, dense_sum(units, clients), 1e-6)


def test_b2_flexlora_of_full_rank_equals_the_dense_sum_too() -> None:
    units = pairs(rank=16)  # the smallest dimension, that of keys and values
    clients = [(changes(units, 1), 0.25, 1.0), (changes(units, 2), 0.75, 1.0)]
    updates = [update(units, d, f"k{i}", examples=round(100 * w)) for i, (d, w, _) in enumerate(clients)]
    found = products(units, next_model("flexlora", units, updates).published)
    wanted = dense_sum(units, clients)
    of_full_rank = [i for i, w in enumerate(wanted) if min(w.shape) == 16]
    assert len(of_full_rank) == 4
    assert_close([found[i] for i in of_full_rank], [wanted[i] for i in of_full_rank], 1e-6)


def test_flexlora_of_a_lower_rank_is_the_best_there_is() -> None:
    units = pairs(rank=4)
    clients = [(changes(units, 1), 0.5, 1.0), (changes(units, 2), 0.5, 1.0)]
    updates = [update(units, deltas, f"k{i}") for i, (deltas, _, _) in enumerate(clients)]
    model = next_model("flexlora", units, updates)
    for found, wanted in zip(products(units, model.published), dense_sum(units, clients), strict=True):
        left_out = math.sqrt(float(np.sum(np.linalg.svd(wanted, compute_uv=False)[4:] ** 2)))
        assert np.linalg.norm(found - wanted) == pytest.approx(left_out, rel=1e-3)
        assert left_out > 0.01
    # Ordered by strength: what a client of rank 1 takes is the best of rank 1.
    a, b = linear_specs(units, 0)[0]
    best = value(units, model.published, 0, b)[:, :1] @ value(units, model.published, 0, a)[:1]
    wanted = dense_sum(units, clients)[0]
    left_out = math.sqrt(float(np.sum(np.linalg.svd(wanted, compute_uv=False)[1:] ** 2)))
    assert np.linalg.norm(best - wanted) == pytest.approx(left_out, rel=1e-3)


def test_flexlora_components_beyond_the_rank_of_the_sum_start_anew() -> None:
    units = pairs(rank=16)
    model = next_model("flexlora", units, [update(units, changes(units, 1, width=0.25), "k", width=0.25)])
    assert isinstance(units.trainable, LowRankPairs)
    for a, b in linear_specs(units, 1):
        assert not value(units, model.published, 1, b)[:, 4:].any()
        fresh = initial_pair_tensor(units.trainable, 1, a)[4:]
        np.testing.assert_allclose(value(units, model.published, 1, a)[4:], fresh, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["fedit", "hetlora", "flexlora", "flora"])
def test_b3_a_lone_client_over_pairs_gets_its_own_product_back(name: MethodName) -> None:
    units = pairs(merged=name == "flora")
    deltas = changes(units, 5)
    model = next_model(name, units, [update(units, deltas, "k")])
    if name == "flora":
        found = [
            model.published[unit][spec.name].astype(np.float64) / 2.0
            for unit in (0, 1)
            for spec in unit_tensors(units.published(), unit)
        ]
    else:
        found = products(units, model.published)
    assert_close(found, dense_sum(units, [(deltas, 1.0, 1.0)]), 1e-5)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "topn"])
def test_b3_a_lone_client_over_base_tensors_gets_its_own_change_back(name: MethodName) -> None:
    units = full()
    deltas = changes(units, 6)
    model = next_model(name, units, [update(units, deltas, "k")])
    for unit, tensors in deltas.items():
        for tensor, change in tensors.items():
            assert np.array_equal(model.published[unit][tensor], change)


def test_b3_a_lone_client_over_blocks_gets_its_own_change_back() -> None:
    units = TrainedUnits(shape=SHAPE)
    deltas = changes(units, 6)
    model = next_model("llamapro", units, [update(units, deltas, "k")])
    assert all(np.array_equal(model.published[u][n], d) for u, t in deltas.items() for n, d in t.items())


def test_fedavg_weighs_by_examples_and_corrects_for_nothing_else() -> None:
    units = full()
    first, second = changes(units, 1), changes(units, 2, scale=50.0)  # the house's fold would clip this one
    updates = [update(units, first, "a", examples=30), update(units, second, "b", examples=10)]
    model = next_model("fedavg", units, updates)
    for unit, tensors in first.items():
        for name, change in tensors.items():
            wanted = 0.75 * change.astype(np.float64) + 0.25 * second[unit][name].astype(np.float64)
            np.testing.assert_allclose(model.published[unit][name], wanted, rtol=1e-6, atol=1e-7)


def test_b4_fedits_mean_of_factors_is_not_the_mean_of_products() -> None:
    units = pairs()
    clients = [(changes(units, 1, scale=0.5), 0.5, 1.0), (changes(units, 2, scale=0.5), 0.5, 1.0)]
    updates = [update(units, deltas, f"k{i}") for i, (deltas, _, _) in enumerate(clients)]
    found = products(units, next_model("fedit", units, updates).published)
    gaps = [
        float(np.linalg.norm(f - w) / np.linalg.norm(w)) for f, w in zip(found, dense_sum(units, clients), strict=True)
    ]
    assert min(gaps) > 0.2


def test_b5_hetlora_with_equal_ranks_norms_and_examples_equals_fedit() -> None:
    units = pairs()
    deltas = changes(units, 4)
    flipped = {  # another product with the same norm
        unit: {
            spec.name: -deltas[unit][spec.name] if spec.is_out else deltas[unit][spec.name]
            for spec in unit_tensors(units, unit)
        }
        for unit in deltas
    }
    updates = [update(units, deltas, "a"), update(units, flipped, "b")]
    one, other = (next_model(name, units, updates) for name in ("hetlora", "fedit"))
    for unit in (0, 1):
        for spec in unit_tensors(units, unit):
            np.testing.assert_allclose(
                one.published[unit][spec.name], other.published[unit][spec.name], rtol=0, atol=1e-7
            )


def test_hetlora_pads_with_zeros_and_weighs_by_the_norm_of_the_product() -> None:
    units = pairs()
    narrow, whole = changes(units, 1, width=0.25), changes(units, 2, scale=0.2)
    updates = [update(units, narrow, "a", width=0.25), update(units, whole, "b")]
    model = next_model("hetlora", units, updates)
    a, b = linear_specs(units, 1)[3]
    start = value(units, {}, 1, a)
    values = [(start[:4] + narrow[1][a.name], narrow[1][b.name]), (start + whole[1][a.name], whole[1][b.name])]
    norms = [float(np.linalg.norm(vb @ va)) for va, vb in values]
    weights = [n / sum(norms) for n in norms]
    wanted = weights[1] * values[1][0]
    wanted[:4] += weights[0] * values[0][0]
    np.testing.assert_allclose(value(units, model.published, 1, a), wanted, rtol=0, atol=1e-6)
    wanted = weights[1] * values[1][1]
    wanted[:, :4] += weights[0] * values[0][1]
    np.testing.assert_allclose(value(units, model.published, 1, b), wanted, rtol=0, atol=1e-6)


def test_flora_starts_every_round_in_other_directions_and_adds_up() -> None:
    units = pairs(merged=True)
    first, second = changes(units, 1), changes(units, 2)
    one = next_model("flora", units, [update(units, first, "k")])
    two = next_model("flora", units, [update(units, second, "k")], one)
    wanted = [
        x + y
        for x, y in zip(
            dense_sum(units, [(first, 1.0, 1.0)]), dense_sum(units, [(second, 1.0, 1.0)], version=1), strict=True
        )
    ]
    found = [
        two.published[unit][spec.name].astype(np.float64) / 2.0
        for unit in (0, 1)
        for spec in unit_tensors(units.published(), unit)
    ]
    assert_close(found, wanted, 1e-6)


def test_a_late_flora_update_is_read_with_the_pairs_that_it_started_from() -> None:
    units = pairs(merged=True)
    one = next_model("flora", units, [update(units, changes(units, 1), "k")])
    late = changes(units, 2)
    two = next_model("flora", units, [update(units, late, "late", staleness=1)], one)
    wanted = dense_sum(units, [(late, 1.0, 1.0)], version=0)
    found = [
        (two.published[unit][spec.name].astype(np.float64) - one.published[unit][spec.name]) / 2.0
        for unit in (0, 1)
        for spec in unit_tensors(units.published(), unit)
    ]
    assert_close(found, wanted, 1e-6)


def test_a_client_that_comes_back_gets_the_stacks_or_the_weights_whichever_is_shorter() -> None:
    units = pairs(rank=4, merged=True)
    published = units.published()
    model = GlobalState.zero(published)
    steps: list[bytes] = []
    states = [model]
    for version in range(6):
        folded = methods.of("flora").aggregate(
            [update(units, changes(units, version), "k")],
            shape=units,
            state=MethodState(anchor_weight=0.0),
            model=model,
        )
        made = methods.of("flora").publish(model, folded, shape=units, settings=FP32)
        assert made is not None
        model, step = made
        steps.append(step)
        states.append(model)
    ids = trained_unit_ids(published, ())
    encodings = []
    for held in range(7):
        how, payload = make_update(
            lambda v: steps[v],
            shape=published,
            from_version=held,
            to_version=6,
            published=model.published,
            sha256=model.sha256,
        )
        encodings.append(how.encoding)
        after = apply_update(states[held].published, how, payload, shape=published, blocks=ids)
        assert state_sha256(published, after) == model.sha256
    assert encodings[-1] == "none"
    assert encodings[-2] == "replay"
    assert encodings[0] == "snapshot"


@pytest.mark.parametrize("name", ["fedavg", "fedit", "hetlora", "flexlora", "flora"])
def test_the_order_of_arrival_changes_no_bit(name: MethodName) -> None:
    units = full() if name == "fedavg" else pairs(merged=name == "flora")
    updates = [update(units, changes(units, i), f"k{i}", examples=3 + i) for i in range(3)]
    assert len({next_model(name, units, list(order)).sha256 for order in itertools.permutations(updates)}) == 1


@pytest.mark.parametrize("name", ["fedit", "hetlora", "flexlora"])
def test_an_extra_tensor_set_is_averaged_by_every_method_over_pairs(name: MethodName) -> None:
    head = NamedTensors(name="head", tensors=(TensorSpec(name="weight", shape=(3, 24)),))
    units = TrainedUnits(shape=SHAPE, trainable=LowRankPairs(rank=4), extra=head)
    one, two = changes(units, 1), changes(units, 2)
    model = next_model(name, units, [update(units, one, "a", examples=1), update(units, two, "b", examples=3)])
    wanted = 0.25 * one[EXTRA_UNIT]["weight"] + 0.75 * two[EXTRA_UNIT]["weight"]
    np.testing.assert_allclose(model.published[EXTRA_UNIT]["weight"], wanted, rtol=0, atol=1e-7)
