"""Do both sides draw the same pairs, and do they start at the base?"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from fedblocks.profiles.model_shape import TensorSpec
from fedblocks.profiles.units import LowRankPairs, PersonalPairs
from fedblocks.protocol.initial_pairs import initial_pair_tensor

PAIRS = LowRankPairs(rank=4, seed=7)
A = TensorSpec(name="mlp.up_proj.lora_A", shape=(4, 64))
B = TensorSpec(name="mlp.up_proj.lora_B", shape=(128, 4), is_out=True)


def test_a_is_uniform_within_its_bound_and_b_is_zero() -> None:
    a = initial_pair_tensor(PAIRS, 0, A)
    assert a.dtype == np.float32
    assert a.shape == A.shape
    assert np.abs(a).max() <= 1 / 8
    assert 0.05 < np.abs(a).mean() < 0.075  # half of the bound
    assert not initial_pair_tensor(PAIRS, 0, B).any()


def test_every_machine_draws_these_bits() -> None:
    found = hashlib.sha256(initial_pair_tensor(PAIRS, 3, A).tobytes()).hexdigest()
    assert found[:16] == "95980ff0a3036cdc"


def test_each_layer_and_seed_has_its_own() -> None:
    draws = [
        initial_pair_tensor(pairs, unit, spec)
        for pairs in (PAIRS, replace(PAIRS, seed=8))
        for unit in (0, 1)
        for spec in (A, replace(A, name="mlp.gate_proj.lora_A"))
    ]
    assert len({draw.tobytes() for draw in draws}) == len(draws)


def test_merged_pairs_start_anew_in_each_version_and_others_do_not() -> None:
    assert np.array_equal(initial_pair_tensor(PAIRS, 0, A), initial_pair_tensor(PAIRS, 0, A, version=5))
    merged = replace(PAIRS, merged=True)
    assert not np.array_equal(initial_pair_tensor(merged, 0, A), initial_pair_tensor(merged, 0, A, version=5))


def test_personal_pairs_have_the_variance_of_the_method_and_start_the_same_in_each_version() -> None:
    personal = PersonalPairs(rank=4, seed=7)
    a = initial_pair_tensor(personal, 0, A)
    assert np.abs(a).max() <= np.sqrt(3 / 4)
    assert 0.8 / 4 < a.var() < 1.2 / 4
    assert np.array_equal(a, initial_pair_tensor(personal, 0, A, version=5))
    assert not initial_pair_tensor(personal, 0, B).any()
