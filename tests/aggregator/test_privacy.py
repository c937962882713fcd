"""Differential privacy for whole clients: what one of them can change, the noise, the accountant, and the stop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedblocks.aggregator import privacy
from fedblocks.aggregator.aggregation import FULL_COVERAGE, AcceptedUpdate
from fedblocks.aggregator.fold_rule import FoldRule
from fedblocks.aggregator.replay import replay
from fedblocks.aggregator.status import describe, run_status
from fedblocks.profiles.model_shape import WIDTHS, ModelShape
from fedblocks.protocol import run_config
from fedblocks.protocol.messages import AttemptId, ClientKey
from fedblocks.protocol.run_config import ConfigError
from fedblocks.protocol.state import state_sha256
from fedblocks.protocol.tensors import encode_delta

pytest.importorskip("dp_accounting", reason="the accountant of fedblocks[privacy] is not installed")

SHAPE = ModelShape(
    family="llama", num_layers=2, hidden_size=8, intermediate_size=16, num_heads=8, num_kv_heads=8, head_dim=4,
    vocab_size=16, tied_embeddings=True,
)  # fmt: skip
RULE = FoldRule(clip_norm=0.05, noise_multiplier=1.5)
KEY = bytes(range(32))
PRIVATE = (
    "privacy.noise_multiplier=2.0",
    "privacy.clip_norm=0.01",
    "delta.format=fp32",
    "server.keep_updates=true",
    "run.max_rounds=3",
    "privacy.max_epsilon=50",
)


def changes(seed: int, blocks=(0,), width=1.0, scale=1e-3) -> dict[int, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        b: {s.name: (rng.standard_normal(s.shape) * scale).astype(np.float32) for s in SHAPE.block_tensors(width)}
        for b in blocks
    }


def accepted(client: str, deltas: Any, *, num_examples=100, steps=16, width=1.0, attempt="a") -> AcceptedUpdate:
    encoded = encode_delta(SHAPE, sorted(deltas), deltas, {}, format="fp32", density=1.0, width=width)
    payload = b"".join(encoded.parts)
    return AcceptedUpdate(
        client=ClientKey(client),
        attempt_id=AttemptId(f"{client}-{attempt}"),
        num_examples=num_examples,
        steps=steps,
        staleness=0,
        format="fp32",
        density=1.0,
        width=width,
        tensors=encoded.headers,
        read_payload=lambda: memoryview(payload),
    )


def folded(updates: list[AcceptedUpdate], rule: FoldRule = RULE, round: int = 1) -> Any:
    return privacy.private_fold(updates, shape=SHAPE, rule=rule, key=KEY, round=round)


def noisy_sum(updates: list[AcceptedUpdate]) -> np.ndarray:
    """What the noise was added to: the means times what divided them; here every block is trained whole."""
    result = folded(updates)
    parts = []
    for block in sorted(result.aggregate):
        share = result.coverage[block]
        divided_by = len(updates) * share / min(1.0, share / FULL_COVERAGE)
        parts += [
            result.aggregate[block][s.name].astype(np.float64).ravel() * divided_by for s in SHAPE.block_tensors()
        ]
    return np.concatenate(parts)


@settings(max_examples=25, deadline=None)
@given(
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
    blocks=st.sampled_from([(0,), (1,), (0, 1)]),
    claims=st.tuples(st.integers(1, 10**7), st.integers(1, 1000)),
)
def test_one_client_changes_the_sum_of_a_round_by_at_most_the_clip_norm(scale, blocks, claims):
    others = [accepted(f"k{i}", changes(i, (0, 1))) for i in range(4)]
    sent = changes(77, blocks, scale=scale)
    nothing = {b: {n: np.zeros_like(v) for n, v in tensors.items()} for b, tensors in sent.items()}
    with_it = noisy_sum([*others, accepted("eve", sent, num_examples=claims[0], steps=claims[1])])
    without = noisy_sum([*others, accepted("eve", nothing)])

    assert np.linalg.norm(with_it - without) <= RULE.clip_norm * (1 + 1e-4)
    if scale >= 1:
        assert np.linalg.norm(with_it - without) == pytest.approx(RULE.clip_norm, rel=1e-3)


def test_a_client_with_two_updates_in_a_round_counts_no_more_than_one():
    others = [accepted(f"k{i}", changes(i)) for i in range(3)]
    sent = [accepted("eve", changes(50 + i, scale=10.0), attempt=str(i)) for i in range(2)]
    nothing = [
        accepted("eve", {0: {s.name: np.zeros(s.shape, np.float32) for s in SHAPE.block_tensors()}}, attempt=str(i))
        for i in range(2)
    ]

    assert np.linalg.norm(noisy_sum([*others, *sent]) - noisy_sum([*others, *nothing])) <= RULE.clip_norm * (1 + 1e-4)


def test_the_noise_has_the_deviation_of_the_rule_on_every_value_that_somebody_trained():
    still = {b: {s.name: np.zeros(s.shape, np.float32) for s in SHAPE.block_tensors()} for b in (0, 1)}
    updates = [accepted(f"k{i}", still) for i in range(4)]
    noise = np.concatenate([noisy_sum(updates)])
    sigma = RULE.clip_norm * RULE.noise_multiplier

    assert np.count_nonzero(noise) == noise.size
    assert noise.std() == pytest.approx(sigma, rel=4 / math.sqrt(2 * noise.size))
    assert abs(noise.mean()) < 4 * sigma / math.sqrt(noise.size)


def test_the_noise_is_normal_and_another_one_for_each_tensor_round_and_key():
    from scipy import stats

    values = privacy.standard_normal(KEY, "1/0/a", 200_001)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01
    again = privacy.standard_normal(KEY, "1/0/a", 200_001)
    assert values.tobytes() == again.tobytes()
    for key, purpose in ((KEY, "2/0/a"), (KEY, "1/0/b"), (bytes(32), "1/0/a")):
        other = privacy.standard_normal(key, purpose, 200_001)
        assert abs(np.corrcoef(values, other)[0, 1]) < 0.01


def test_what_nobody_trained_gets_no_noise_and_no_order_changes_a_bit():
    updates = [accepted(f"k{i}", changes(i, (0,), w), width=w) for i, w in enumerate((0.125, 0.25, 0.25))]
    found = folded(updates)
    whole = {s.name: s.shape for s in SHAPE.block_tensors()}
    trained = {s.name: s.shape for s in SHAPE.block_tensors(0.25)}
    for name, values in found.aggregate[0].items():
        inside = values[tuple(slice(n) for n in trained[name])]
        assert np.count_nonzero(inside) == inside.size
        assert np.count_nonzero(values) == inside.size
        assert values.shape == whole[name]
    assert state_sha256(SHAPE, folded(updates[::-1]).aggregate) == state_sha256(SHAPE, found.aggregate)
    assert state_sha256(SHAPE, folded(updates, round=2).aggregate) != state_sha256(SHAPE, found.aggregate)
    assert set(WIDTHS) > {0.125, 0.25}


def by_hand(noise_multipliers: list[float], delta: float) -> float:
    """Renyi divergence alpha/(2z^2) a round, and Canonne, Kamath and Steinke's conversion (2004.00010, prop. 12)."""
    rho = sum(1 / (2 * z**2) for z in noise_multipliers)
    orders = np.concatenate([np.arange(1.01, 20, 0.01), np.arange(20, 600, 0.5)])
    found = rho * orders + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return float(found.min())


def exact(noise_multipliers: list[float], delta: float) -> float:
    """Gaussian mechanisms compose to one of 1/z^2 in sum; its epsilon from Balle and Wang's formula (1805.06530)."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    mu = math.sqrt(sum(1 / z**2 for z in noise_multipliers))

    def excess(epsilon: float) -> float:
        far = norm.logcdf(-epsilon / mu - mu / 2)
        return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon + far) - delta)

    return float(brentq(excess, 0, 500))


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("noise", [[1.0], [4.0], [2.0] * 30, [1.0, 2.0, 4.0] * 5, [20.0] * 400])
def test_the_accountant_agrees_with_a_second_one_and_is_never_below_the_exact_value(noise, delta):
    found = privacy.epsilon(noise, delta)

    assert found == pytest.approx(by_hand(noise, delta), rel=0.01, abs=0.01)
    assert exact(noise, delta) <= found <= 1.2 * exact(noise, delta) + 0.1


def metrics(world: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world.path / "metrics.jsonl").read_text().splitlines()]


def test_a_private_run_goes_on_after_a_kill_and_a_replay_confirms_it(
    make_world: Callable[..., Any],
) -> None:
    world = make_world("ann", "bob", "cid", overrides=PRIVATE)
    world.join()
    world.round()
    key = world.ledger.get_run("noise_key")
    world.kill()
    world.start()
    world.join()
    world.finish()
    assert len(key) == 64
    assert world.ledger.get_run("noise_key") == key
    spent = [row["epsilon"] for row in metrics(world)]
    assert spent == [pytest.approx(privacy.epsilon([2.0] * n, 1e-5)) for n in (1, 2, 3)]
    assert all(r.equal for r in replay(world.path))
    status = run_status(world.path)
    assert (status["epsilon"], status["max_epsilon"]) == (spent[-1], 50)
    assert f"epsilon {spent[-1]:.2f}" in describe(status)
    assert key not in json.dumps(status)


def test_a_round_that_is_folded_again_after_a_kill_gets_the_same_bits_and_no_second_sample(
    make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    world = make_world("ann", "bob", overrides=PRIVATE)
    world.join()
    seen: list[str] = []

    def stopped(number: int, **values: Any) -> None:
        seen.append(values["state_sha256"])
        raise Killed

    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(world.ledger, "commit_round", stopped)
            with pytest.raises(Killed):
                world.round() if not seen else world.step()
        world.kill()
        world.start()
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_the_run_ends_before_it_has_spent_more_than_it_may(make_world: Callable[..., Any]) -> None:
    most = (privacy.epsilon([2.0] * 2, 1e-5) + privacy.epsilon([2.0] * 3, 1e-5)) / 2
    world = make_world("ann", "bob", overrides=(*PRIVATE, f"privacy.max_epsilon={most}", "run.max_rounds=9"))
    world.join()
    world.finish()
    final = json.loads((world.path / "state" / "final.json").read_text())
    assert (final["rounds"], final["stop_reason"]) == (2, "privacy_budget")
    assert metrics(world)[-1]["epsilon"] <= most


def test_an_empty_round_spends_nothing(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=PRIVATE)
    world.join()
    for site in world.sites.values():
        site.fail("internal")
    world.step()
    world.receive()
    world.round()
    assert [row["epsilon"] for row in metrics(world)] == [0.0, pytest.approx(privacy.epsilon([2.0], 1e-5))]


def test_a_private_run_keeps_no_topics_and_no_gradient_energy(make_world: Callable[..., Any]) -> None:
    from dataclasses import replace

    world = make_world("ann", overrides=PRIVATE)
    ann = world.sites["ann"]
    said: list[Any] = []
    monkey = ann.say
    ann.say = said.append
    ann.hello()
    ann.say = monkey
    ann.say(replace(said[0], statistics=replace(said[0].statistics, topics=(3, 4))))
    for _ in range(2):
        world.step()
        world.receive()
    world.step(11.0)
    world.receive()
    world.round()
    [client] = world.ledger.clients()
    assert client.record["statistics"]["topics"] == []
    assert client.record["gradient_energy"] == []
    assert metrics(world)[0]["num_accepted"] == 1


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("delta.format=int8", "delta.format"),
        ("privacy.clip_norm=0.0", "privacy.clip_norm"),
        ("training.fold=median", "training.fold"),
        ("allocation.rarity_weight=0.5", "allocation.rarity_weight"),
        ("privacy.delta=0.0", "privacy.delta"),
        ("privacy.max_epsilon=0.0", "privacy.max_epsilon"),
    ],
)
def test_what_does_not_go_with_privacy_is_named(changed, says):
    with pytest.raises(ConfigError, match=says):
        run_config.from_mapping({}, (*PRIVATE, changed))


def test_a_budget_that_not_even_one_round_fits_is_told_before_the_run_begins(make_world: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"max_epsilon is 1, one round .* takes 2\."):
        make_world("ann", overrides=(*PRIVATE, "privacy.max_epsilon=1"))


def test_privacy_cannot_be_switched_off_in_mid_run(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=PRIVATE)
    world.join()
    world.round()
    world.kill()
    toml = world.path / "run.toml"
    toml.write_text(toml.read_text().replace("noise_multiplier = 2.0", "noise_multiplier = 0.0"))
    with pytest.raises(ConfigError, match="would void what they promised"):
        world.start()


def test_without_the_accountant_the_error_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedblocks\[privacy\]'"):
        privacy.epsilon([1.0], 1e-5)
