"""What does ``fedblocks evaluate`` say of an encoder? Rank correlation, drift, retention, the task through its head."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedblocks import cli
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.data import DataError, TextEncoder
from fedblocks.edge_client.encoder_evaluation import describe_encoder, read_pairs, spearman
from fedblocks.edge_client.encoder_model import classification_head
from fedblocks.edge_client.evaluation import evaluate_target
from fedblocks.edge_client.export import Head, export_hf
from fedblocks.protocol.expansion import ExpansionPlan, plan_expansion
from fedblocks.protocol.messages import DataFormat
from fedblocks.protocol.run_config import ConfigError

PAIRS = [{"sentence1": f"ab{i}", "sentence2": f"ab{i}"[::-1] + "x" * i, "score": float(i % 5)} for i in range(12)]


@pytest.fixture
def base(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    torch.set_num_threads(1)
    return Checkpoint.open(tiny_checkpoint(tmp_path, "bert"))


@pytest.fixture
def general(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


def exported(base: Checkpoint, out: Path, *, scale: float, head: Head | None = None) -> Path:
    plan = plan_expansion(base_hash=base_hash(base.folder), config=base.config, placement="thirds", num_blocks=2)
    plan = replace(plan, extra=classification_head(64, 2))
    rng = np.random.default_rng(0)
    state = {
        block: {s.name: scale * rng.standard_normal(s.shape).astype(np.float32) for s in plan.shape.block_tensors()}
        for block in plan.block_ids
    }
    export_hf(checkpoint=base, plan=plan, state=state, strength=1.0, out=out, head=head)
    assert isinstance(plan, ExpansionPlan)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_correlation_is_scipys(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 6, 40), rng.standard_normal(40)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_the_rank_correlation_of_an_order_is_1_and_of_its_reverse_minus_1() -> None:
    values = np.array([3.0, 1.0, 2.0, 2.0])
    assert spearman(values, values**3) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
    assert np.isnan(spearman(values, np.zeros(4)))


def test_an_export_without_training_keeps_everything(base: Checkpoint, general: Path, tmp_path: Path) -> None:
    found = evaluate_target(
        exported(base, tmp_path / "out", scale=0.0), base=base.folder, downstream=None, general=general
    )
    assert found["model"]["drift"] < 1e-9
    assert found["model"]["retention"] == pytest.approx(1)
    assert found["model"]["spearman"] == found["base"]["spearman"]
    assert found["base"]["drift"] == 0


def test_a_changed_embedding_drifts_and_the_head_answers(base: Checkpoint, general: Path, tmp_path: Path) -> None:
    head = Head(weight=np.zeros((2, 64), np.float32), bias=np.array([0, 1], np.float32), labels=("no", "yes"))
    out = exported(base, tmp_path / "out", scale=0.1, head=head)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"t{i}", "label": ["yes", "no"][i == 0]}) + "\n" for i in range(4)))
    found = evaluate_target(out, base=base.folder, downstream=rows, general=general)
    assert found["model"]["drift"] > 1e-4
    assert found["model"]["drift_standard_error"] > 0
    assert found["model"]["downstream_accuracy"] == 0.75
    expected = 0.75 * np.log1p(np.exp(-1)) + 0.25 * np.log1p(np.exp(1))
    assert found["model"]["downstream_nll"] == pytest.approx(expected, abs=1e-6)
    assert "drift from the base" in describe_encoder(found)
    told = CliRunner().invoke(cli.app, ["evaluate", str(out), "--base", str(base.folder), "--general", str(general)])
    assert "Spearman of the general pairs" in told.stdout


def test_a_task_without_a_head_and_a_suite_are_refused(base: Checkpoint, general: Path, tmp_path: Path) -> None:
    out = exported(base, tmp_path / "out", scale=0.0)
    with pytest.raises(ConfigError, match="has no classification head"):
        evaluate_target(out, base=base.folder, downstream=general, general=None)
    told = CliRunner().invoke(cli.app, ["evaluate", str(out), "--base", str(base.folder), "--suite", str(tmp_path)])
    assert told.exit_code != 0
    assert "is an encoder" in str(told.exception) + told.output


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (['{"sentence1": "a", "score": 1}'], "row 1: 'sentence2'"),
        (['{"sentence1": "a", "sentence2": "b", "score": "x"}'], "row 1: .*could not convert"),
        (['{"sentence1": "a", "sentence2": " ", "score": 1}'], "row 1: a sentence is empty"),
        (['{"sentence1": "a", "sentence2": "b", "score": NaN}'], "row 1: score is nan"),
        (["no json"], "row 1: "),
        (['{"sentence1": "a", "sentence2": "b", "score": 1}'] * 3, "not all of the same score"),
        ([""], "0 pairs"),
    ],
)
def test_pairs_that_cannot_be_ranked_are_named(base: Checkpoint, tmp_path: Path, lines: list[str], match: str) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text("\n".join(lines))
    encoder: Any = TextEncoder(base.folder, DataFormat(max_tokens=32, append_eos=False, join=" "))
    with pytest.raises(DataError, match=match):
        read_pairs(path, encoder)
