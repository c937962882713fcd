"""The rules of methods.md 10: H1 to H6 and H8, priors, clusters, and the same over expanded blocks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fedblocks.aggregator import mixture
from fedblocks.aggregator.methods import fedhft
from fedblocks.aggregator.methods.fedhft import Layout, Member, PairUpdate, Settings, Update
from fedblocks.protocol import low_rank
from fedblocks.protocol.messages import ClientKey

OUT, IN, RANK = 24, 16, 4
LAYOUT = Layout(matrices={"q": (OUT, IN), "v": (OUT, IN)}, dense={"head": (5, 8)}, signature=("head",))
PLAIN = Settings(rank=RANK, scale=0.5, prior_rank=8, choose_clusters=False)
TWO = replace(PLAIN, clusters=2, min_cohort=4, mixture_from_round=1)


def key(index: int) -> ClientKey:
    return ClientKey(f"client-{index:02d}")


def mask(rng: np.random.Generator, share: float) -> np.ndarray:
    rows = np.zeros(OUT, dtype=np.bool_)
    rows[rng.permutation(OUT)[: int(share * OUT)]] = True
    return rows


def update(
    index: int, seed: int, *, share: float = 1.0, num_examples: int = 10, direction: int | None = None
) -> Update:
    """Random, or near to the direction that its group shares."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for name in LAYOUT.matrices:
        rows = mask(rng, share)
        b, a = rng.standard_normal((OUT, RANK)), rng.standard_normal((RANK, IN))
        pairs[name] = PairUpdate(rows=rows, b=b[rows].astype(np.float32), a=a.astype(np.float32))
    head = rng.standard_normal((5, 8))
    if direction is not None:
        head = 0.3 * head + 3.0 * np.random.default_rng(1000 + direction).standard_normal((5, 8))
    return Update(client=key(index), num_examples=num_examples, pairs=pairs, dense={"head": head.astype(np.float32)})


def product(one: Update, name: str) -> np.ndarray:
    pair = one.pairs[name]
    full = np.zeros((OUT, RANK))
    full[pair.rows] = pair.b
    return PLAIN.scale * full @ pair.a.astype(np.float64)


def rounds(settings: Settings, *cohorts: list[Update]) -> fedhft.MixtureState:
    state = fedhft.initial_state(LAYOUT, settings)
    for cohort in cohorts:
        state = fedhft.aggregate(state, cohort, layout=LAYOUT, settings=settings)
    return state


def groups(count: int, round: int, *, per_group: int = 4) -> list[Update]:
    """A cohort of all clients; client i belongs to group i % count."""
    return [update(i, 97 * round + i, direction=i % count) for i in range(count * per_group)]


def adjusted_rand(found: np.ndarray, planted: np.ndarray) -> float:
    table = np.array([[np.sum((found == a) & (planted == b)) for b in set(planted)] for a in set(found)])

    def pairs(counts: np.ndarray) -> float:
        return float(np.sum(counts * (counts - 1) / 2))

    both, rows, columns = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected = rows * columns / pairs(np.array([len(found)]))
    return (both - expected) / ((rows + columns) / 2 - expected)


def test_h1_one_cluster_moves_by_the_mean_of_the_products():
    cohort = [update(i, i) for i in range(3)]
    state = rounds(PLAIN, cohort)
    for name in LAYOUT.matrices:
        expected = np.mean([product(one, name) for one in cohort], axis=0)
        np.testing.assert_allclose(state.clusters[0].matrices[name].dense(), expected, atol=1e-6)
    expected = np.mean([one.dense["head"] for one in cohort], axis=0)
    np.testing.assert_allclose(state.clusters[0].dense["head"], expected, atol=1e-6)


@pytest.mark.parametrize("settings", [PLAIN, TWO, replace(TWO, clusters=4)])
def test_h2_duplicating_all_clients_changes_nothing(settings):
    cohort = [update(i, i, share=0.5, num_examples=3 + 7 * i) for i in range(3)]
    members = {key(i): Member(num_examples=5, memberships=_some_memberships(i, settings.clusters)) for i in range(6)}
    members |= {key(i + 3): members[key(i)] for i in range(3)}
    start = replace(fedhft.initial_state(LAYOUT, settings), members=members)
    rare = replace(settings, min_cohort=99)
    once = fedhft.aggregate(start, cohort, layout=LAYOUT, settings=rare)
    again = [replace(one, client=key(i + 3)) for i, one in enumerate(cohort)]
    twice = fedhft.aggregate(start, [*cohort, *again], layout=LAYOUT, settings=rare)
    for one, other in zip(once.clusters, twice.clusters, strict=True):
        for name in LAYOUT.matrices:
            np.testing.assert_allclose(one.matrices[name].dense(), other.matrices[name].dense(), atol=1e-6)
        np.testing.assert_allclose(one.dense["head"], other.dense["head"], atol=1e-6)


def _some_memberships(index: int, clusters: int) -> tuple[float, ...]:
    raw = np.random.default_rng(index).random(clusters) + 0.1
    return tuple((raw / raw.sum()).tolist())


def test_a_row_that_some_left_out_is_the_mean_of_those_who_trained_it():
    one, other = update(0, 0, share=0.25), update(1, 1, share=0.25)
    moved = rounds(PLAIN, [one, other]).clusters[0].matrices["q"].dense()
    trained = one.pairs["q"].rows, other.pairs["q"].rows
    for row in range(OUT):
        who = [product(u, "q")[row] for u, rows in zip((one, other), trained, strict=True) if rows[row]]
        np.testing.assert_allclose(moved[row], np.mean(who, axis=0) if who else 0.0, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_h3_planted_groups_are_found_and_their_personal_models_differ(count):
    settings = replace(TWO, clusters=count)
    state = rounds(settings, *(groups(count, t) for t in range(1, 6)))
    planted = np.arange(4 * count) % count
    table = fedhft.memberships_table(state)
    assert adjusted_rand(table.argmax(axis=1), planted) == 1.0
    assert table.max(axis=1).min() > 0.9
    own = [fedhft.prior(state, state.memberships(key(i))).dense["head"] for i in range(2 * count)]
    for i, j in itertools.combinations(range(2 * count), 2):
        distance = np.linalg.norm(own[i] - own[j]) / np.linalg.norm(own[i])
        assert (distance < 0.3) == (i % count == j % count), (i, j, distance)


def test_h3_groups_stay_apart_once_their_clients_start_from_what_they_have_learnt():
    """Updates are the way from a client's own prior to what its group wants: soon nothing but noise."""
    wanted = np.random.default_rng(3).standard_normal((2, 5, 8))
    state = fedhft.initial_state(LAYOUT, TWO)
    for t in range(1, 13):
        cohort = []
        for i in range(8):
            rng = np.random.default_rng([t, i])
            own = fedhft.prior(state, state.memberships(key(i))).dense["head"]
            noise = 0.5 * rng.standard_normal((5, 8))
            cohort.append(
                Update(
                    client=key(i),
                    num_examples=10,
                    dense={"head": (0.5 * (wanted[i % 2] - own) + noise).astype(np.float32)},
                )
            )
        state = fedhft.aggregate(state, cohort, layout=LAYOUT, settings=TWO)
        assert adjusted_rand(fedhft.memberships_table(state).argmax(axis=1), np.arange(8) % 2) == 1.0, t


def test_h3_the_number_of_groups_is_found_by_two_tests_that_agree():
    settings = replace(PLAIN, choose_clusters=True, mixture_from_round=2, test_rounds=2)
    state = fedhft.initial_state(LAYOUT, settings)
    numbers = []
    for t in range(1, 9):
        state = fedhft.aggregate(state, groups(2, t), layout=LAYOUT, settings=settings)
        numbers.append(len(state.clusters))
    assert numbers == [1, 1, 1, 2, 2, 2, 2, 2]
    assert adjusted_rand(fedhft.memberships_table(state).argmax(axis=1), np.arange(8) % 2) == 1.0


def test_one_population_stays_one_cluster():
    settings = replace(PLAIN, choose_clusters=True, mixture_from_round=1, test_rounds=1)
    state = rounds(settings, *(groups(1, t, per_group=12) for t in range(1, 7)))
    assert len(state.clusters) == 1


def test_h4_permuted_components_leave_every_prior_as_it_is(monkeypatch):
    cohorts = [groups(3, t) for t in range(1, 5)]
    settings = replace(TWO, clusters=3)
    expected = rounds(settings, *cohorts)
    fit = mixture.fit
    turns = itertools.cycle(itertools.permutations(range(3)))

    def shuffled(points, number):
        found = fit(points, number)
        return replace(found, memberships=found.memberships[:, list(next(turns))])

    start = rounds(settings, cohorts[0])
    monkeypatch.setattr(mixture, "fit", shuffled)
    for cohort in cohorts[1:]:
        start = fedhft.aggregate(start, cohort, layout=LAYOUT, settings=settings)
    for i in range(12):
        one, other = (fedhft.prior(s, s.memberships(key(i))) for s in (expected, start))
        np.testing.assert_array_equal(one.dense["head"], other.dense["head"])
        for name in LAYOUT.matrices:
            np.testing.assert_array_equal(one.matrices[name].left, other.matrices[name].left)


@pytest.mark.parametrize("many", [1, 12])
def test_h5_rows_that_nobody_trained_keep_their_bits(many):
    """From the start of the dense form on; before it, and for rows never trained, always."""
    state = rounds(PLAIN, *([update(i, 10 * t + i, share=0.5) for i in range(3)] for t in range(many)))
    before = state.clusters[0].matrices["q"].dense()
    one = update(0, 777, share=0.25)
    after = fedhft.aggregate(state, [one], layout=LAYOUT, settings=PLAIN).clusters[0].matrices["q"].dense()
    untouched = ~one.pairs["q"].rows
    if many > 1:
        np.testing.assert_array_equal(after[untouched], before[untouched])
    rarely = np.zeros(OUT, dtype=np.bool_)
    rarely[:6] = True
    few = replace(
        one, pairs={"q": PairUpdate(rows=rarely, b=np.ones((6, RANK), np.float32), a=one.pairs["q"].a)}, dense={}
    )
    only = rounds(PLAIN, *([few] for _ in range(many)))
    assert not only.clusters[0].matrices["q"].dense()[6:].any()
    assert only.clusters[0].matrices["v"].rank == 0


def test_h6_no_two_clusters_share_an_array():
    settings = replace(TWO, clusters=1, choose_clusters=True, test_rounds=1)
    state = fedhft.initial_state(LAYOUT, replace(TWO, clusters=4))
    _assert_distinct(state)
    grown = fedhft.initial_state(LAYOUT, settings)
    for t in range(1, 6):
        grown = fedhft.aggregate(grown, groups(2, t), layout=LAYOUT, settings=settings)
        _assert_distinct(grown)
    assert len(grown.clusters) == 2


def _assert_distinct(state: fedhft.MixtureState) -> None:
    for one, other in itertools.combinations(state.clusters, 2):
        for name in LAYOUT.matrices:
            assert not np.shares_memory(one.matrices[name].left, other.matrices[name].left)
            assert one.matrices[name] is not other.matrices[name]
        assert not np.shares_memory(one.dense["head"], other.dense["head"])


def test_h7_trained_values_and_bytes_fall_with_the_share_of_rows():
    by_share = {share: fedhft.trained_values(LAYOUT, PLAIN, share) for share in (1.0, 0.5, 0.25)}
    assert by_share == {1.0: 2 * 4 * (24 + 16) + 40, 0.5: 2 * 4 * (12 + 16) + 40, 0.25: 2 * 4 * (6 + 16) + 40}
    memory = [fedhft.trained_bytes(LAYOUT, PLAIN, share) for share in (0.25, 0.5, 1.0)]
    assert memory == [16 * by_share[share] for share in (0.25, 0.5, 1.0)]
    assert fedhft.update_bytes(LAYOUT, PLAIN, 0.5) == 4 * by_share[0.5] + 2 * 3
    assert fedhft.update_bytes(LAYOUT, PLAIN, 0.5, int8=True) == by_share[0.5] + 2 * 3 + 2 * 4 * (12 + 4) + 4 * 5


def test_h8_memberships_and_transitions_sum_to_one_whatever_happens():
    settings = replace(TWO, clusters=1, choose_clusters=True, test_rounds=1)
    state = fedhft.initial_state(LAYOUT, settings)
    seen = set()
    for t in range(1, 16):
        cohort = groups(3 if t < 8 else 2, t)[:: 1 if t % 4 else 2]
        state = fedhft.aggregate(state, cohort, layout=LAYOUT, settings=settings)
        table = fedhft.memberships_table(state)
        np.testing.assert_allclose(table.sum(axis=1), 1.0, atol=1e-12)
        assert table.shape[1] == len(state.clusters)
        assert sum(state.population()) == pytest.approx(1.0, abs=1e-12)
        seen.add(len(state.clusters))
    assert len(seen) > 1


def test_the_order_of_the_updates_changes_no_bit():
    cohort = [update(i, i, share=0.5, num_examples=3 + i) for i in range(5)]
    one, other = rounds(TWO, cohort), rounds(TWO, cohort[::-1])
    for a, b in zip(one.clusters, other.clusters, strict=True):
        np.testing.assert_array_equal(a.matrices["q"].left, b.matrices["q"].left)
        np.testing.assert_array_equal(a.matrices["q"].right, b.matrices["q"].right)
    np.testing.assert_array_equal(fedhft.memberships_table(one), fedhft.memberships_table(other))


def test_a_cluster_without_members_in_the_cohort_hardly_moves():
    """Dividing by the membership alone would give it the others' update in full."""
    start = fedhft.initial_state(LAYOUT, TWO)
    members = {key(0): Member(num_examples=10, memberships=(0.99, 0.01))}
    after = fedhft.aggregate(replace(start, members=members), [update(0, 0)], layout=LAYOUT, settings=TWO)
    own, other = (np.linalg.norm(c.dense["head"]) for c in after.clusters)
    assert other == pytest.approx(0.04 * own, rel=1e-4)
    np.testing.assert_allclose(after.clusters[0].dense["head"], update(0, 0).dense["head"], rtol=1e-6)


def test_one_update_a_hundred_times_the_others_is_scaled_down():
    cohort = [update(i, i) for i in range(5)]
    loud = replace(cohort[0], dense={"head": 1e4 * cohort[0].dense["head"]})
    norms = sorted(fedhft._norm(one, PLAIN) for one in [loud, *cohort[1:]])
    moved = rounds(PLAIN, [loud, *cohort[1:]]).clusters[0].dense["head"]
    others = np.sum([one.dense["head"] for one in cohort[1:]], axis=0)
    assert np.linalg.norm(5 * moved - others) == pytest.approx(3 * norms[2], rel=1e-3)


def test_a_round_without_updates_leaves_the_state_itself():
    state = fedhft.initial_state(LAYOUT, PLAIN)
    assert fedhft.aggregate(state, [], layout=LAYOUT, settings=PLAIN) is state


def test_a_new_client_starts_from_the_populations_mixture():
    state = rounds(TWO, *(groups(2, t) for t in range(1, 4)))
    population = fedhft.memberships_table(state).mean(axis=0)
    np.testing.assert_allclose(state.memberships(key(99)), population, atol=1e-12)


def test_the_prior_says_what_its_rank_leaves_out_and_a_large_error_doubles_it():
    state = rounds(PLAIN, [update(i, i) for i in range(5)])
    found = fedhft.prior(state, state.population())
    for name, cut in found.matrices.items():
        dense = state.clusters[0].matrices[name].dense()
        measured = np.linalg.norm(dense - cut.left.astype(np.float64) @ cut.right) / np.linalg.norm(dense)
        assert cut.error == pytest.approx(measured, rel=1e-4)
    assert found.error > 0.1
    assert fedhft.after_priors(state, [found.error], PLAIN).prior_rank == 16
    assert fedhft.after_priors(state, [0.1], PLAIN) is state
    assert fedhft.after_priors(state, [1.0], replace(PLAIN, max_prior_rank=8)).prior_rank == 8


def test_expanded_blocks_are_personalised_by_the_same_rules():
    blocks = Layout(matrices={}, dense={"0/down": (12, 8), "1/down": (12, 8)}, signature=("1/down",))
    centers = np.random.default_rng(5).standard_normal((2, 12, 8))
    state = fedhft.initial_state(blocks, TWO)
    for t in range(1, 6):
        noise = np.random.default_rng(t)
        cohort = [
            Update(
                client=key(i),
                num_examples=10,
                dense={
                    name: (centers[i % 2] + 0.2 * noise.standard_normal((12, 8))).astype(np.float32)
                    for name in (["0/down", "1/down"] if i < 6 else ["1/down"])
                },
            )
            for i in range(8)
        ]
        state = fedhft.aggregate(state, cohort, layout=blocks, settings=TWO)
    assert adjusted_rand(fedhft.memberships_table(state).argmax(axis=1), np.arange(8) % 2) == 1.0
    for i in range(2):
        own = fedhft.prior(state, state.memberships(key(i))).dense["1/down"]
        # The first round was everybody's.
        assert np.linalg.norm(own / 5 - centers[i]) < 0.5 * np.linalg.norm(own / 5 - centers[1 - i])


def test_settings_and_layouts_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="clusters is 5, expected 1 to 4"):
        Settings(clusters=5)
    with pytest.raises(ValueError, match="prior_rank is 256"):
        Settings(prior_rank=256)
    with pytest.raises(ValueError, match="signature names ghost"):
        Layout(matrices={"q": (2, 2)}, signature=("ghost",))
    with pytest.raises(ValueError, match=r"expected \(1, 4\) for 1 rows"):
        PairUpdate(rows=np.array([True, False]), b=np.zeros((2, 4), np.float32), a=np.zeros((4, 2), np.float32))


def test_the_two_norms_agree():
    one = update(0, 3, share=0.5)
    pair = one.pairs["q"]
    found = low_rank.pair_norm(pair.left(PLAIN.scale), pair.a.astype(np.float64).T)
    assert found == pytest.approx(float(np.linalg.norm(product(one, "q"))))
