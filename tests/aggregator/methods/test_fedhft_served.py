"""FedHFT in a served run: the fold is the method's, row by row, each site gets its own prior, and no bit is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedblocks.aggregator import methods
from fedblocks.aggregator.aggregation import AcceptedUpdate
from fedblocks.aggregator.methods import fedhft
from fedblocks.aggregator.pairs import linears
from fedblocks.aggregator.personalisation import Member, Mixture
from fedblocks.aggregator.replay import replay, state_at
from fedblocks.aggregator.run_rules import GlobalState, MethodState, PublishSettings, personal_state
from fedblocks.profiles.model_shape import ChosenRows, ModelShape, TensorSpec
from fedblocks.profiles.units import (
    CLUSTER_STRIDE,
    EXTRA_UNIT,
    NamedTensors,
    PersonalPairs,
    TrainedUnits,
    trained_unit_ids,
    unit_tensors,
)
from fedblocks.protocol import run_config
from fedblocks.protocol.initial_pairs import initial_pair_tensor
from fedblocks.protocol.messages import AttemptId, ClientKey
from fedblocks.protocol.priors import prior_of
from fedblocks.protocol.row_mask import choose_rows
from fedblocks.protocol.run_config import ConfigError
from fedblocks.protocol.state import apply_step, apply_update, make_update, state_sha256
from fedblocks.protocol.tensors import encode_delta

SHAPE = ModelShape(
    family="llama",
    num_layers=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=50,
    tied_embeddings=True,
)
HEAD = NamedTensors(
    name="head", tensors=(TensorSpec(name="head.weight", shape=(3, 16)), TensorSpec(name="head.bias", shape=(3,)))
)
SCALE = 0.5
PAIRS = PersonalPairs(rank=4, scaling=SCALE, targets="qv", seed=3, prior_rank=8)
UNITS = TrainedUnits(shape=SHAPE, trainable=PAIRS)
WITH_HEAD = replace(UNITS, extra=HEAD)
FP32 = PublishSettings(dense=False, format="fp32", density=1.0)
SHARES = (1.0, 0.5, 0.25, 1.0)
EXAMPLES = (10, 30, 20, 40)


def update(units: TrainedUnits, number: int, *, width: float, seed: int = 0, scale: float = 0.1) -> AcceptedUpdate:
    """What one client may have learnt of all units."""
    rng = np.random.default_rng([seed, number])
    ids = trained_unit_ids(units, ())
    specs = {unit: unit_tensors(units, unit, width) for unit in ids}
    deltas = {
        unit: {s.name: (scale * rng.standard_normal(s.shape)).astype(np.float32) for s in specs[unit]} for unit in ids
    }
    chosen = {
        unit: {
            s.name: choose_rows(
                np.zeros(s.num_rows, np.float32), width, client=str(number), round=seed, matrix=f"{unit}/{s.name}"
            )
            for s in specs[unit]
            if isinstance(s, ChosenRows)
        }
        for unit in ids
    }
    encoded = encode_delta(units, ids, deltas, {}, format="fp32", density=1.0, width=width, chosen=chosen)
    payload = memoryview(b"".join(encoded.parts))
    return AcceptedUpdate(
        client=ClientKey(f"c{number}"),
        attempt_id=AttemptId(f"{seed}-{number}"),
        num_examples=EXAMPLES[number],
        steps=4,
        staleness=0,
        format="fp32",
        density=1.0,
        width=width,
        tensors=encoded.headers,
        read_payload=lambda: payload,
    )


def updates_of(units: TrainedUnits, seed: int = 0) -> list[AcceptedUpdate]:
    return [update(units, number, width=width, seed=seed) for number, width in enumerate(SHARES)]


def mixture(*memberships: tuple[float, ...]) -> Mixture:
    members = tuple(
        Member(client=ClientKey(f"c{i}"), num_examples=EXAMPLES[i], memberships=p) for i, p in enumerate(memberships)
    )
    return Mixture(clusters=len(memberships[0]), from_round=1, min_clients=1, seed=0, members=members)


def after(
    units: TrainedUnits, updates: Sequence[AcceptedUpdate], state: MethodState, model: GlobalState | None = None
) -> GlobalState:
    method = methods.of("fedhft")
    before = model or GlobalState.zero(units.published())
    made = method.publish(
        before, method.aggregate(updates, shape=units, state=state, model=before), shape=units, settings=FP32
    )
    assert made is not None
    ids = [c * CLUSTER_STRIDE + u for c in range(4) for u in trained_unit_ids(units, ())]
    again = apply_step(before.published, made[1], shape=units.published(), blocks=ids)
    assert state_sha256(units.published(), again) == made[0].sha256  # the steps alone lead there
    return made[0]


PLAIN = MethodState(anchor_weight=0.0)
TWO = replace(PLAIN, mixture=mixture((1.0, 0.0), (0.5, 0.5), (0.2, 0.8), (0.9, 0.1)))


def in_process(
    units: TrainedUnits, updates: Sequence[AcceptedUpdate], found: Mixture | None
) -> tuple[fedhft.MixtureState, fedhft.Layout]:
    """The same round by the pure method."""
    from fedblocks.aggregator.personal_pairs import trained_pair
    from fedblocks.aggregator.plain_mean import opened

    pairs = {f"{pair.unit}/{pair.b.name}": pair for unit in (0, 1) for pair in linears(units, unit)}
    dense = {s.name: s.shape for s in (units.extra.tensors if units.extra else ())}
    layout = fedhft.Layout(
        matrices={name: (pair.b.shape[0], pair.a.shape[1]) for name, pair in pairs.items()},
        dense=dense,
        signature=tuple(pairs)[-1:],
    )
    clusters = 1 if found is None else found.clusters
    settings = fedhft.Settings(rank=4, scale=SCALE, clusters=clusters, mixture_from_round=99, prior_rank=8)
    state = fedhft.initial_state(layout, settings)
    if found is not None:
        members = {
            m.client: fedhft.Member(num_examples=m.num_examples, memberships=m.memberships) for m in found.members
        }
        state = replace(state, members=members)
    given: list[fedhft.Update] = []
    for one in opened(updates, units):
        trained = {name: trained_pair(one, pair, units) for name, pair in pairs.items()}
        changes = {name: one.change(EXTRA_UNIT, name) for name in dense}
        given.append(
            fedhft.Update(
                client=one.update.client,
                num_examples=one.update.num_examples,
                pairs={name: pair for name, pair in trained.items() if pair is not None},
                dense={name: change for name, change in changes.items() if change is not None},
            )
        )
    return fedhft.aggregate(state, given, layout=layout, settings=settings), layout


@pytest.mark.parametrize("units", [UNITS, WITH_HEAD], ids=["pairs", "head"])
@pytest.mark.parametrize("state", [PLAIN, TWO], ids=["one", "two"])
def test_the_fold_is_that_of_the_method_in_process(units: TrainedUnits, state: MethodState) -> None:
    updates = updates_of(units)
    model = after(units, updates, state)
    expected, layout = in_process(units, updates, state.mixture)
    for j, cluster in enumerate(expected.clusters):
        for name in layout.matrices:
            unit, tensor = name.split("/")
            found = model.published[j * CLUSTER_STRIDE + int(unit)][tensor.replace(".lora_B", ".weight")]
            np.testing.assert_allclose(found, cluster.matrices[name].dense(), atol=1e-6)
            assert np.abs(found).max() > 1e-3
        for name in layout.dense:
            found = model.published[j * CLUSTER_STRIDE + EXTRA_UNIT][name]
            np.testing.assert_allclose(found, cluster.dense[name], atol=1e-6)
    for client in ("c0", "c2", "nobody"):
        own = personal_state(model, state, ClientKey(client), shape=units).published
        prior = fedhft.prior(expected, expected.memberships(ClientKey(client)) if state.mixture else (1.0,))
        for name, cut in prior.matrices.items():
            unit, tensor = name.split("/")
            pair = own[int(unit)]
            product = pair[tensor] @ pair[tensor.replace(".lora_B", ".lora_A")]
            np.testing.assert_allclose(product, cut.left @ cut.right, atol=1e-6)


def test_one_client_of_all_rows_is_its_own_product() -> None:
    one = update(UNITS, 0, width=1.0)
    model = after(UNITS, [one], PLAIN)
    from fedblocks.aggregator.plain_mean import opened

    (opened_one,) = opened([one], UNITS)
    for unit in (0, 1):
        for pair in linears(UNITS, unit):
            change = opened_one.change(unit, pair.a.name)
            b = opened_one.change(unit, pair.b.name)
            assert change is not None
            assert b is not None
            a = initial_pair_tensor(PAIRS, unit, pair.a) + change
            found = model.published[unit][pair.b.name.replace(".lora_B", ".weight")]
            np.testing.assert_allclose(found, SCALE * b @ a, atol=1e-6)


def test_a_row_that_nobody_chose_keeps_its_bits() -> None:
    first = after(UNITS, updates_of(UNITS), PLAIN)
    narrow = [update(UNITS, number, width=0.25, seed=7) for number in (0, 1)]
    second = after(UNITS, narrow, PLAIN, first)
    from fedblocks.aggregator.plain_mean import opened

    kept = moved = 0
    for unit in (0, 1):
        for pair in linears(UNITS, unit):
            name = pair.b.name.replace(".lora_B", ".weight")
            chosen = np.any([one.trained_rows(unit, pair.b.name) for one in opened(narrow, UNITS)], axis=0)
            same = (first.published[unit][name] == second.published[unit][name]).all(axis=1)
            assert same[~chosen].all()
            assert not same[chosen].any()
            kept, moved = kept + int(same.sum()), moved + int(chosen.sum())
    assert min(kept, moved) > 0


def test_every_client_twice_changes_nothing() -> None:
    updates = updates_of(UNITS)
    twins = [
        replace(one, client=ClientKey(one.client + "b"), attempt_id=AttemptId(one.attempt_id + "b")) for one in updates
    ]
    once, twice = after(UNITS, updates, PLAIN), after(UNITS, [*updates, *twins], PLAIN)
    for unit, tensors in once.published.items():
        for name, values in tensors.items():
            np.testing.assert_allclose(twice.published[unit][name], values, atol=1e-6)


def test_the_order_of_the_updates_changes_no_bit() -> None:
    updates = updates_of(WITH_HEAD)
    assert after(WITH_HEAD, updates, TWO).sha256 == after(WITH_HEAD, updates[::-1], TWO).sha256


def test_a_client_gets_its_prior_whole_and_its_error_is_what_the_rank_leaves_out() -> None:
    model = after(UNITS, updates_of(UNITS), TWO)
    own = personal_state(model, TWO, ClientKey("c2"), shape=UNITS)
    way, payload = make_update(
        lambda _: b"", shape=UNITS.held(), from_version=-1, to_version=1, published=own.published, sha256=own.sha256
    )
    assert way.encoding == "snapshot"
    held = apply_update({}, way, payload, shape=UNITS.held(), blocks=(0, 1))
    assert state_sha256(UNITS.held(), held) == own.sha256
    changes = {0: model.published[0]}
    whole, cut = prior_of(changes, UNITS), prior_of(changes, replace(UNITS, trainable=replace(PAIRS, prior_rank=1)))
    assert whole.error < 0.05 < 0.3 < cut.error < 1.0
    assert prior_of({}, UNITS).error == 0.0


# A whole run without sockets

NAMES = tuple("abcdefgh")
OVERRIDES = (
    "run.method=fedhft",
    "run.max_rounds=5",
    "server.keep_updates=true",
    "trainable.rank=2",
    "trainable.prior_rank=4",
    "mixture.clusters=2",
    "mixture.from_round=2",
    "allocation.cohort_fraction=1.0",
    "allocation.policy=random",
)


def two_populations(make_world: Callable[..., Any], **changes: Any) -> Any:
    """Sites whose pairs point where their group's do; what each trains, and at which share of rows, is drawn."""
    world = make_world(*NAMES, **{"overrides": OVERRIDES, **changes})
    for number, site in enumerate(world.sites.values()):
        site.direction, site.scale = number % 2, 4.0
    return world


def test_killed_or_not_sites_end_with_their_own_priors_and_a_replay_confirms_it(make_world: Callable[..., Any]) -> None:
    export = pytest.importorskip("fedblocks.edge_client.export")
    ends: list[Any] = []
    for kill in (False, True):
        world = two_populations(make_world, folder=f"killed-{kill}")
        world.join()
        for _ in range(3):
            world.round(*(NAMES if kill else NAMES[::-1]))
        if kill:
            world.kill()
            world.start()
            world.join()
        world.finish()
        final = json.loads((world.path / "state" / "final.json").read_text())
        ends.append((final["memberships"], final["state_sha256"]))
        replayed = replay(world.path)
        assert len(replayed) == 5
        assert all(version.equal for version in replayed)
        assert state_at(world.folder, 5).sha256 == replayed[-1].state_sha256
    assert ends[0] == ends[1]
    found = np.array([ends[0][0][name] for name in NAMES])
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-12)
    assert list(found.argmax(axis=1)) in ([0, 1] * 4, [1, 0] * 4)
    widths = {task.width for site in world.sites.values() for task in site.tasks if hasattr(task, "width")}
    assert widths == {0.25, 0.5, 1.0}
    for site in world.sites.values():
        _, own = export.load_final(world.path, site.name)
        assert sorted(own) == sorted(site.held)
        for unit, tensors in own.items():
            for name, values in tensors.items():
                np.testing.assert_array_equal(values, site.held[unit][name])
    held = [next(iter(world.sites[name].held.values())) for name in "ab"]
    assert not np.array_equal(*(tensors["self_attn.q_proj.lora_B"] for tensors in held))
    everybodys = load_file(world.path / "state" / "final.safetensors")
    assert everybodys["0/self_attn.q_proj.lora_A"].shape == (4, 8)


@pytest.mark.parametrize("flip", ["one row more", "a row beyond the last", "another row instead"])
def test_a_row_mask_that_is_not_as_assigned_is_refused_and_another_choice_is_the_clients_own(
    make_world: Callable[..., Any], flip: str
) -> None:
    world = make_world("ann", "bob", overrides=(*OVERRIDES, "mixture.clusters=1"))
    world.join()
    site = next(s for s in world.sites.values() if s.tasks[-1].width < 1.0)
    delta, payload = site.train(site.tasks[-1])
    unit = delta.tensors[0].block
    a, b = unit_tensors(world.plan.units, unit, delta.width)[:2]
    at = 4 * a.size
    mask = bytearray(payload[at : at + 1])  # of eight rows, or of four
    if flip == "one row more":
        mask[0] |= mask[0] + 1
    elif flip == "another row instead":
        lowest = mask[0] & -mask[0]
        mask[0] = (mask[0] ^ lowest) | (~mask[0] & (mask[0] + 1) & 0xFF or 0x80)
    else:
        at += 1 + 4 * b.size + 4 * unit_tensors(world.plan.units, unit, delta.width)[2].size
        mask = bytearray(payload[at : at + 1])  # of the values, four rows
        mask[0] = (mask[0] & (mask[0] - 1)) | 0x10
    spoilt = payload[:at] + bytes(mask) + payload[at + 1 :]
    import hashlib

    sha256 = hashlib.sha256(spoilt).hexdigest()
    world.endpoint.announce(site.key, replace(delta, payload_sha256=sha256), spoilt)
    world.step()
    world.receive()
    if flip == "another row instead":
        assert not site.refused
        return
    assert [refused.code for refused in site.refused] == ["length_mismatch"]
    assert "row mask names" in site.refused[0].text


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("delta.density=0.5", "delta.density is 0.5, expected 1: the pairs of the method fedhft are others"),
        ("training.server_optimizer=adam", "server_optimizer is 'adam', expected avg: the method fedhft adds"),
        ("run.rule=mine.py", "run.rule is 'mine.py', expected none"),
        ("trainable.prior_rank=0", "trainable.prior_rank is 0, expected at least 1"),
        ("training.fold=median", "training.fold is 'median', expected mean"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        run_config.from_mapping({}, ("run.method=fedhft", "delta.format=int8", override))
