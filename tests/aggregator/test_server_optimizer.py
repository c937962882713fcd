"""The server's own optimizer (methods.md 8.3)."""

from __future__ import annotations

import numpy as np
import pytest

from fedblocks.aggregator.server_optimizer import FIRST, SECOND, ServerRule, server_step
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.protocol.tensors import State, cut

SHAPE = ModelShape(
    family="llama",
    num_layers=2,
    hidden_size=16,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=32,
    tied_embeddings=True,
)
NAME = "mlp.up_proj.weight"


def update(seed: int, width: float = 1.0) -> State:
    rng = np.random.default_rng(seed)
    tensors = {spec.name: np.zeros(spec.shape, dtype=np.float32) for spec in SHAPE.block_tensors()}
    for spec in SHAPE.block_tensors(width):
        cut(tensors[spec.name], spec.shape)[...] = 0.01 * rng.standard_normal(spec.shape)
    return {0: tensors}


def after(rule: ServerRule, *updates: State, width: float = 1.0) -> tuple[list[State], State]:
    changes, moments = [], {}
    for aggregate in updates:
        change, moments = server_step(aggregate, moments, rule, shape=SHAPE, widths={0: width})
        changes.append(change)
    return changes, moments


def test_avg_adds_the_mean_update_itself_and_remembers_nothing() -> None:
    one = update(1)
    change, moments = server_step(one, {}, ServerRule(), shape=SHAPE, widths={})
    assert change is one
    assert moments == {}


def test_avgm_adds_a_share_of_what_has_gathered() -> None:
    first, second = update(1), update(2)
    changes, moments = after(ServerRule(optimizer="avgm"), first, second)
    a, b = (u[0][NAME].astype(np.float64) for u in (first, second))
    np.testing.assert_array_equal(changes[0][0][NAME], (0.3 * a).astype(np.float32))
    np.testing.assert_allclose(changes[1][0][NAME], 0.3 * (0.9 * a + b), rtol=1e-6)
    np.testing.assert_allclose(moments[0][FIRST + NAME], 0.9 * a + b, rtol=1e-6)
    assert not any(name.startswith(SECOND) for name in moments[0])


def test_adam_divides_by_the_size_of_the_updates_so_far() -> None:
    rule = ServerRule(optimizer="adam", learning_rate=1e-3, steps=16)
    first, second = update(1), update(2)
    changes, _ = after(rule, first, second)
    a, b = (u[0][NAME].astype(np.float64) for u in (first, second))
    np.testing.assert_allclose(changes[0][0][NAME], 1e-3 * 0.1 * a / (np.sqrt(0.01 * a**2) + 1e-3 * 1.6e-2), rtol=1e-5)
    m, v = 0.09 * a + 0.1 * b, 0.0099 * a**2 + 0.01 * b**2
    np.testing.assert_allclose(changes[1][0][NAME], 1e-3 * m / (np.sqrt(v) + 1.6e-5), rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["avgm", "adam"])
def test_what_nobody_trained_keeps_its_value_and_its_moments(optimizer: str) -> None:
    rule = ServerRule(optimizer=optimizer, learning_rate=1e-3, steps=4)  # type: ignore[arg-type]
    _, moments = server_step(update(1), {}, rule, shape=SHAPE, widths={})
    before = {name: value.copy() for name, value in moments[0].items()}
    change, later = server_step(update(2, 0.25), moments, rule, shape=SHAPE, widths={0: 0.25})
    for whole, part in zip(SHAPE.block_tensors(), SHAPE.block_tensors(0.25), strict=True):
        beyond = np.ones(whole.shape, dtype=bool)
        cut(beyond, part.shape)[...] = False
        assert not change[0][whole.name][beyond].any()
        np.testing.assert_array_equal(later[0][FIRST + whole.name][beyond], before[FIRST + whole.name][beyond])
        assert np.array_equal(moments[0][FIRST + whole.name], before[FIRST + whole.name])  # arguments are not changed
    other = server_step({}, later, rule, shape=SHAPE, widths={})
    assert other[0] == {}
    assert all(np.array_equal(other[1][0][name], later[0][name]) for name in later[0])


@pytest.mark.parametrize("optimizer", ["avgm", "adam"])
def test_the_same_updates_give_the_same_bits(optimizer: str) -> None:
    rule = ServerRule(optimizer=optimizer, learning_rate=1e-3, steps=4)  # type: ignore[arg-type]
    runs = [after(rule, update(1), update(2), update(3)) for _ in range(2)]
    for name, value in runs[0][0][2][0].items():
        assert value.dtype == np.float32
        assert np.array_equal(value, runs[1][0][2][0][name])
