"""What does ``fedblocks init`` plan for each method?"""

from __future__ import annotations

from typing import Any

import pytest

from fedblocks.profiles.units import BaseTensors, ExpandedBlocks, LowRankPairs
from fedblocks.protocol import run_config
from fedblocks.protocol.expansion import ExpansionError, ExpansionPlan
from fedblocks.protocol.method_plan import plan_of
from fedblocks.protocol.run_config import ConfigError

CONFIG = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def plan(method: str, *overrides: str, **fields: Any) -> ExpansionPlan:
    config = run_config.from_mapping({}, [f"run.method={method}", *overrides])
    return plan_of(config, base_hash="a" * 64, model_config={**CONFIG, **fields})


def test_each_method_trains_what_its_paper_trains() -> None:
    everything = BaseTensors(layers=(0, 1, 2, 3), tables=True)
    assert plan("fedavg").trainable == plan("fedprox").trainable == everything
    assert plan("topn", "trainable.top_layers=2").trainable == BaseTensors(layers=(2, 3), tables=False)
    assert plan("fedit", "run.seed=7").trainable == LowRankPairs(rank=16, scaling=2.0, targets="all", seed=7)
    for method in ("hetlora", "flexlora"):
        assert plan(method).trainable == LowRankPairs(rank=32)
    assert plan("flora").trainable == LowRankPairs(rank=32, merged=True)
    assert plan("fedit", "trainable.targets=qv", "trainable.rank=8").unit_ids == (0, 1, 2, 3)
    for method in ("fedbe", "llamapro"):
        assert isinstance(plan(method, "expansion.blocks=2").trainable, ExpandedBlocks)
    assert plan("llamapro", "expansion.blocks=2").placement == "interleaved"


def test_the_layout_says_where_it_stands_and_what_stands_beside() -> None:
    full, pairs, top = plan("fedavg").layout, plan("fedit").layout, plan("topn").layout
    assert (full.num_entries, full.base_cut, full.num_held, full.teacher_layers) == (4, 0, 4, 4)
    assert full.trains_tables
    assert full.beside == {4: 2 * 128 * 64 + 64}
    assert (pairs.num_entries, pairs.base_cut, pairs.num_held, pairs.teacher_layers) == (4, 0, 0, 4)
    assert not pairs.beside
    assert (top.base_cut, top.num_held, top.teacher_layers) == (3, 1, 1)


def test_an_encoder_takes_blocks_and_nothing_else() -> None:
    bert = {"model_type": "bert", "intermediate_size": 256, "max_position_embeddings": 64, "type_vocab_size": 2}
    assert plan("fedbe", "expansion.blocks=1", **bert).blocks
    for method in ("fedavg", "fedit", "flora", "topn"):
        with pytest.raises(ConfigError, match=rf"run.method is '{method}', which trains decoders only"):
            plan(method, **bert)


def test_a_model_of_no_known_family_is_refused_as_ever() -> None:
    with pytest.raises(ExpansionError, match="E_EXPAND_MOE"):
        plan("fedit", num_local_experts=8)
