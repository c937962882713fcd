"""Folds that withstand hostile updates: the median and the trimmed mean of each value over those who trained it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedblocks.aggregator import robust
from fedblocks.aggregator.aggregation import FULL_COVERAGE, AcceptedUpdate, fold
from fedblocks.aggregator.replay import replay
from fedblocks.profiles.model_shape import WIDTHS, ModelShape
from fedblocks.protocol import run_config
from fedblocks.protocol.messages import AttemptId, ClientKey
from fedblocks.protocol.run_config import ConfigError
from fedblocks.protocol.state import state_sha256
from fedblocks.protocol.tensors import encode_delta, pad

SHAPE = ModelShape(
    family="llama", num_layers=2, hidden_size=8, intermediate_size=16, num_heads=8, num_kv_heads=8, head_dim=4,
    vocab_size=16, tied_embeddings=True,
)  # fmt: skip


def changes(seed: int, blocks=(0,), width=1.0, scale=1e-3) -> dict[int, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        b: {s.name: (rng.standard_normal(s.shape) * scale).astype(np.float32) for s in SHAPE.block_tensors(width)}
        for b in blocks
    }


def accepted(client: str, deltas: Any, *, num_examples=100, width=1.0, format="fp32") -> AcceptedUpdate:
    encoded = encode_delta(SHAPE, sorted(deltas), deltas, {}, format=format, density=1.0, width=width)
    payload = b"".join(encoded.parts)
    return AcceptedUpdate(
        client=ClientKey(client),
        attempt_id=AttemptId(client),
        num_examples=num_examples,
        steps=16,
        staleness=0,
        format=format,
        density=1.0,
        width=width,
        tensors=encoded.headers,
        read_payload=lambda: memoryview(payload),
    )


def folded(updates: list[AcceptedUpdate], kind: str) -> Any:
    return fold(updates, shape=SHAPE, combine=robust.combine_of(kind))


def mixed() -> list[AcceptedUpdate]:
    return [
        accepted(f"k{i}", changes(i, blocks, width), num_examples=10 + 50 * i, width=width, format=format)
        for i, (blocks, width, format) in enumerate(
            [
                ((0,), 1.0, "fp32"),
                ((0, 1), 0.5, "int8"),
                ((0,), 0.25, "bf16"),
                ((0, 1), 1.0, "int8"),
                ((0,), 0.125, "fp32"),
                ((0,), 1.0, "bf16"),
            ]
        )
    ]


@pytest.mark.parametrize("kind", ["median", "trimmed_mean"])
def test_every_order_of_arrival_gives_the_same_bits(kind):
    updates = mixed()
    hashes = {state_sha256(SHAPE, folded(list(order), kind).aggregate) for order in itertools.permutations(updates[:5])}
    rng = random.Random(3)
    for _ in range(20):
        rng.shuffle(updates)
        hashes.add(state_sha256(SHAPE, folded(updates[:6], kind).aggregate))

    assert len(hashes) == 2  # of the five, and of all six


@pytest.mark.parametrize("kind", ["median", "trimmed_mean"])
def test_every_value_is_that_of_the_formula_over_those_who_trained_it(kind):
    deltas = [changes(i, (0,), width) for i, width in enumerate((1.0, 0.5, 0.5, 0.125, 1.0, 1.0, 0.25, 1.0, 1.0))]
    widths = (1.0, 0.5, 0.5, 0.125, 1.0, 1.0, 0.25, 1.0, 1.0)
    updates = [accepted(f"k{i}", d, width=w) for i, (d, w) in enumerate(zip(deltas, widths, strict=True))]
    found = folded(updates, kind).aggregate[0]
    for spec in SHAPE.block_tensors():
        values = np.full((len(widths), *spec.shape), np.nan)
        for i, (delta, width) in enumerate(zip(deltas, widths, strict=True)):
            small = next(s for s in SHAPE.block_tensors(width) if s.name == spec.name)
            mask = pad(np.ones(small.shape, dtype=np.float32), spec.shape) > 0
            values[i][mask] = pad(delta[0][spec.name], spec.shape)[mask]
        for place in np.ndindex(spec.shape):
            have = sorted(v for v in values[(slice(None), *place)] if not np.isnan(v))
            n = len(have)
            if kind == "median":
                expected = (have[(n - 1) // 2] + have[n // 2]) / 2
            else:
                left_out = n // 4
                expected = sum(have[left_out : n - left_out]) / (n - 2 * left_out)
            damping = min(1.0, n / len(widths) / FULL_COVERAGE)
            assert found[spec.name][place] == pytest.approx(damping * expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", ["median", "trimmed_mean"])
def test_a_few_rows_at_a_time_give_the_same_bits_as_all_at_once(kind, monkeypatch):
    at_once = state_sha256(SHAPE, folded(mixed(), kind).aggregate)
    monkeypatch.setattr(robust, "HELD_VALUES", 1)

    assert state_sha256(SHAPE, folded(mixed(), kind).aggregate) == at_once


def test_the_weight_that_a_client_claims_has_no_say():
    small = [accepted(f"k{i}", changes(i), num_examples=10) for i in range(5)]
    large = [accepted(f"k{i}", changes(i), num_examples=10 if i else 100) for i in range(5)]
    found = {kind: [folded(u, kind).aggregate for u in (small, large)] for kind in ("mean", "median")}

    for name, values in found["median"][0][0].items():
        np.testing.assert_allclose(values, found["median"][1][0][name], rtol=1e-6)
    assert state_sha256(SHAPE, found["mean"][0]) != state_sha256(SHAPE, found["mean"][1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_of_three_or_fewer_nothing_is_trimmed(count):
    updates = [accepted(f"k{i}", changes(i)) for i in range(count)]
    mean, trimmed = folded(updates, "mean").aggregate[0], folded(updates, "trimmed_mean").aggregate[0]

    for name, values in mean.items():
        np.testing.assert_allclose(values, trimmed[name], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", ["median", "trimmed_mean"])
def test_two_of_eight_with_their_signs_flipped_move_no_value_beyond_what_the_others_span(kind):
    direction = changes(99, scale=1e-3)[0]
    honest = [{0: {n: v + changes(i, scale=2e-4)[0][n] for n, v in direction.items()}} for i in range(6)]
    flipped = [{0: {n: -v for n, v in changes_of[0].items()}} for changes_of in honest[:2]]
    # As heavy as the weight cap lets them be.
    updates = [accepted(f"k{i}", d) for i, d in enumerate(honest)]
    updates += [accepted(f"x{i}", d, num_examples=1000) for i, d in enumerate(flipped)]

    def distance(kind: str) -> float:
        found = folded(updates, kind).aggregate[0]
        wanted = folded(updates[:6], "mean").aggregate[0]
        off = sum(float(((found[n] - wanted[n]) ** 2).sum()) for n in wanted)
        return (off / sum(float((wanted[n] ** 2).sum()) for n in wanted)) ** 0.5

    found = folded(updates, kind).aggregate[0]
    for name, values in found.items():
        low = np.min([d[0][name] for d in honest], axis=0)
        high = np.max([d[0][name] for d in honest], axis=0)
        assert np.all(values >= low - 1e-9)
        assert np.all(values <= high + 1e-9)
    assert distance("mean") > 1.0  # the plain mean is turned round
    assert distance(kind) < 0.2


@pytest.mark.parametrize("kind", ["median", "trimmed_mean"])
def test_a_run_goes_on_by_its_rule_after_a_kill_and_a_replay_confirms_it(
    make_world: Callable[..., Any], kind: str
) -> None:
    overrides = (f"training.fold={kind}", "delta.density=1.0", "run.max_rounds=3", "server.keep_updates=true")
    names = ("ann", "bob", "cid", "dan", "eve")
    hashes = set()
    for kill in (False, True):
        world = make_world(*names, folder=f"run-{kill}", overrides=overrides)
        world.join()
        world.round(*(names if kill else names[::-1]))
        if kill:
            world.kill()
            world.start()
            world.join()
        world.finish()
        hashes.add(world.aggregator.published_sha256)
        assert all(r.equal for r in replay(world.path))
    assert len(hashes) == 1


@pytest.mark.parametrize("kind", ["median", "trimmed_mean"])
def test_updates_that_send_a_part_of_their_rows_are_no_match_for_a_robust_fold(kind):
    with pytest.raises(ConfigError, match=r"training\.fold .* set delta\.density to 1"):
        run_config.from_mapping({}, (f"training.fold={kind}",))
    for rest in (("delta.density=1.0",), ("delta.format=bf16",), ("delta.format=fp32",)):
        assert run_config.from_mapping({}, (f"training.fold={kind}", *rest)).training.fold == kind


def test_there_is_no_width_that_a_robust_fold_forgets():
    updates = [accepted(f"k{i}", changes(i, (0,), width), width=width) for i, width in enumerate(WIDTHS)]
    found = folded(updates, "median").aggregate[0]

    assert all(np.count_nonzero(values) == values.size for values in found.values())
