"""Expanded blocks of one's own: two populations are told apart, each site gets its own state, and no bit is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedblocks.aggregator import personalisation
from fedblocks.aggregator.personalisation import Member, Mixture
from fedblocks.aggregator.replay import replay, state_at
from fedblocks.profiles.units import CLUSTER_STRIDE, EXTRA_UNIT
from fedblocks.protocol import run_config
from fedblocks.protocol.messages import ClientKey
from fedblocks.protocol.run_config import ConfigError

NAMES = tuple("abcdefgh")
OVERRIDES = (
    "run.max_rounds=6",
    "server.keep_updates=true",
    "mixture.clusters=2",
    "mixture.from_round=2",
    "allocation.cohort_fraction=1.0",
    "allocation.slim=false",
    "delta.format=fp32",
    "delta.density=1.0",
)


def two_populations(make_world: Callable[..., Any], **changes: Any) -> Any:
    """Sites whose changes point where their group's do, and a little elsewhere."""
    world = make_world(*NAMES, **{"overrides": OVERRIDES, **changes})
    for number, site in enumerate(world.sites.values()):
        site.direction = number % 2
    return world


def memberships(world: Any) -> np.ndarray:
    final = json.loads((world.path / "state" / "final.json").read_text())
    return np.array([final["memberships"][name] for name in NAMES])


def held(site: Any, name: str = "mlp.down_proj.weight") -> np.ndarray:
    return np.concatenate([site.held[block][name].ravel() for block in sorted(site.held)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_world_at: Callable[..., Any]) -> Any:
    """The run of two populations when nothing goes wrong; only to be read."""
    world = two_populations(partial(make_world_at, tmp_path_factory.mktemp("finished")))
    world.join()
    world.finish()
    return world


def test_each_site_ends_with_its_groups_blocks(finished: Any) -> None:
    world = finished
    found = memberships(world)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-12)
    own = found.argmax(axis=1)
    assert list(own) in ([0, 1] * 4, [1, 0] * 4)
    assert [line for line in world.lines if "by cluster" in line] == [
        "round 2: clients by cluster: 4, 4; each starts from its own mixture"
    ]
    assert found.max(axis=1).min() > 0.9
    states = [held(site) for site in world.sites.values()]
    norm = np.linalg.norm(states[0])
    for i, one in enumerate(states):
        for j, other in enumerate(states):
            distance = np.linalg.norm(one - other) / norm
            assert (distance < 0.2) == (i % 2 == j % 2), (i, j, distance)


def test_groups_stay_apart_when_updates_are_nothing_but_noise(make_world: Callable[..., Any]) -> None:
    """As they are once each site starts from what its own group has learnt."""
    world = two_populations(make_world, overrides=(*OVERRIDES, "run.max_rounds=9"))
    world.join()
    for _ in range(4):
        world.round(*NAMES)
    for site in world.sites.values():
        site.direction = None
    world.finish()
    assert list(memberships(world).argmax(axis=1)) in ([0, 1] * 4, [1, 0] * 4)


def test_the_result_is_the_populations_mixture_and_the_clusters_stand_beside_it(finished: Any) -> None:
    world = finished
    folder = world.path / "state"
    whole = load_file(folder / "final.safetensors")
    clusters = [load_file(folder / f"final.cluster-{j}.safetensors") for j in range(2)]
    assert not (folder / "final.cluster-2.safetensors").exists()
    shares = memberships(world).mean(axis=0)
    for name, value in whole.items():
        expected = shares[0] * clusters[0][name] + shares[1] * clusters[1][name]
        np.testing.assert_allclose(value, expected, atol=1e-7)


def end_of(world: Any) -> tuple[Any, ...]:
    """Memberships and every site's own state; a replay gives the bits that were published."""
    replayed = replay(world.path)
    assert len(replayed) == 6
    assert all(r.equal for r in replayed)
    assert state_at(world.folder, 6).sha256 == replayed[-1].state_sha256
    return memberships(world).tolist(), [held(site).tobytes() for site in world.sites.values()]


@pytest.mark.parametrize("kill_after", [1, 3, 5])
def test_killed_and_started_again_the_run_ends_in_the_same_bits_and_a_replay_confirms_it(
    make_world: Callable[..., Any], finished: Any, kill_after: int
) -> None:
    world = two_populations(make_world)
    world.join()
    for _ in range(kill_after):
        world.round(*NAMES)
    world.kill()
    world.start()
    world.join()
    world.finish()
    assert end_of(world) == end_of(finished)


def test_until_the_given_round_all_start_from_the_same_state(make_world: Callable[..., Any]) -> None:
    world = two_populations(make_world, overrides=(*OVERRIDES, "mixture.from_round=4"))
    world.join()
    hashes = []
    for _ in range(6):
        hashes.append(len({site.tasks[-1].state.state_sha256 for site in world.sites.values()}))
        world.round(*NAMES)
    assert hashes[:5] == [1] * 5  # round 4 says who belongs where, round 5 is the first that tells them apart
    assert hashes[5] > 1


def test_a_run_without_clusters_has_no_memberships_and_no_cluster_files(make_world: Callable[..., Any]) -> None:
    world = two_populations(make_world, overrides=(*OVERRIDES, "mixture.clusters=1", "run.max_rounds=2"))
    world.join()
    world.finish()
    assert "memberships" not in json.loads((world.path / "state" / "final.json").read_text())
    assert not list((world.path / "state").glob("final.cluster-*"))


def mixture(*rows: tuple[float, ...]) -> Mixture:
    members = tuple(
        Member(client=ClientKey(f"c{i}"), num_examples=10 * (i + 1), memberships=row) for i, row in enumerate(rows)
    )
    return Mixture(clusters=2, from_round=1, min_clients=2, seed=1, members=members)


def test_a_state_is_mixed_by_memberships_and_an_unknown_client_gets_the_populations() -> None:
    published = {0: {"w": np.ones(3, np.float32)}, CLUSTER_STRIDE: {"w": np.full(3, 5.0, np.float32)}}
    found = mixture((1.0, 0.0), (0.25, 0.75))
    assert found.sizes == (1, 1)
    for client, expected in (("c0", 1.0), ("c1", 4.0), ("nobody", 3.0)):
        state = personalisation.mixed(published, found.memberships(ClientKey(client)))
        np.testing.assert_allclose(state[0]["w"], expected)
    assert personalisation.mixed({}, (0.5, 0.5)) == {}


def test_the_copies_of_a_head_are_told_from_those_of_a_block() -> None:
    published = {c * CLUSTER_STRIDE + EXTRA_UNIT: {"w": np.full(3, float(c), np.float32)} for c in range(3)}
    assert list(personalisation.mixed(published, (0.0, 0.5, 0.5))) == [EXTRA_UNIT]
    assert personalisation.cluster_state(published, 2)[EXTRA_UNIT]["w"][0] == 2.0


def test_a_block_that_one_cluster_lacks_counts_as_untrained_there() -> None:
    state = personalisation.mixed({CLUSTER_STRIDE + 2: {"w": np.full(3, 4.0, np.float32)}}, (0.5, 0.5))
    np.testing.assert_allclose(state[2]["w"], 2.0)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("mixture.clusters=0", "mixture.clusters is 0, expected 1 to 4"),
        ("mixture.clusters=5", "mixture.clusters is 5, expected 1 to 4"),
        ("mixture.from_round=0", "mixture.from_round is 0"),
        ("run.method=fedit", "run.method is 'fedit', expected fedbe or fedhft where clients have models of their own"),
        ("run.rule=mine.py", "run.rule is 'mine.py', expected none where clients have models of their own"),
        ("training.fold=median", "training.fold is 'median', expected mean where clients have models of their own"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_by_its_key(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        run_config.from_mapping({}, ("mixture.clusters=2", "delta.density=1.0", override))


def test_members_survive_the_ledger() -> None:
    from fedblocks.protocol.codec import from_plain, to_plain

    found = replace(mixture((0.5, 0.5)), rounds=3)
    assert from_plain(Mixture, json.loads(json.dumps(to_plain(found))), where="test") == found


def test_an_export_takes_a_sites_own_state_bit_for_bit(finished: Any) -> None:
    export = pytest.importorskip("fedblocks.edge_client.export")
    world = finished
    for site in world.sites.values():
        _, state = export.load_final(world.path, site.name)
        assert sorted(state) == sorted(site.held)
        for block, tensors in state.items():
            for name, value in tensors.items():
                np.testing.assert_array_equal(value, site.held[block][name])
    with pytest.raises(ConfigError, match=r"'nobody' has no model of its own in .*, expected one of a, b, c"):
        export.load_final(world.path, "nobody")


@pytest.mark.parametrize(
    "overrides",
    [
        ("delta.format=int8", "delta.density=0.25"),
        ("training.server_optimizer=adam",),
        ("allocation.slim=true", "delta.format=bf16"),
        ("expansion.blocks=2", "expansion.max_blocks=3", "run.max_rounds=12"),
        ("mixture.clusters=4",),
    ],
    ids=["int8", "adam", "slim", "growth", "four"],
)
def test_whatever_else_a_run_does_a_replay_leads_to_the_same_bits(
    make_world: Callable[..., Any], overrides: tuple[str, ...]
) -> None:
    world = two_populations(make_world, overrides=(*OVERRIDES, *overrides))
    world.join()
    world.finish()
    replayed = replay(world.path)
    assert all(r.equal for r in replayed)
    assert state_at(world.folder, replayed[-1].version).sha256 == replayed[-1].state_sha256
    found = memberships(world)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-12)
    assert (found[::2].argmax(axis=1) != found[1::2].argmax(axis=1)).all()
