"""The comparison with lm-evaluation-harness: what a row says, what is published, what is said without the harness."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import lm_eval_agreement

from fedblocks.edge_client.multiple_choice import Item, ItemScore, Task


def judged(loglikelihoods, completions, gold=0):
    return ItemScore(
        line=1,
        loglikelihoods=loglikelihoods,
        num_bytes=tuple(len(text.encode()) for text in completions),
        is_greedy=(False, False),
        gold=gold,
    )


def test_a_row_compares_accuracies_predictions_and_loglikelihoods():
    answers = [("aaaa", "éé"), ("aa", "bb")]  # per byte -2 and -1, per character -2 and -2: the earlier one
    items = tuple(Item(line=i, context="q", completions=a, gold=1 - i) for i, a in enumerate(answers))
    scores = [judged((-8.0, -4.0), answers[0], 1), judged((-3.0, -2.0), answers[1], 0)]
    harness = {"acc": 0.5, "acc_norm": 0.0, "loglikelihoods": [[-8.0, -4.0], [-3.0, -3.5]]}
    row = lm_eval_agreement.compared(Task(name="t", path=Path("t"), items=items, num_left_out=3), scores, harness)
    assert (row["num_items"], row["num_left_out"], row["num_answers"]) == (2, 3, 4)
    assert (row["acc"], row["acc_norm"], row["acc_norm_per_character"]) == (0.5, 0.5, 0.0)
    assert row["same_predictions"] == 1
    assert row["max_abs_loglikelihood_difference_nats"] == 1.5


def test_without_the_harness_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lm_eval_agreement.py"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert lm_eval_agreement.main() == 0
    assert capsys.readouterr().out.startswith("skipped: lm_eval is not installed")


@pytest.mark.parametrize("task", lm_eval_agreement.TASKS)
def test_what_the_page_says_of_the_agreement_is_what_was_measured(task):
    result = json.loads(lm_eval_agreement.RESULT.read_text())
    row = result["tasks"][task]
    assert row["max_abs_loglikelihood_difference_nats"] <= result["tolerance_nats"]
    assert row["same_predictions"] == row["num_items"]
    assert row["acc"] == pytest.approx(row["acc_lm_eval"])
    assert row["acc_norm_per_character"] == pytest.approx(row["acc_norm_lm_eval"])
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    assert f"| {task} | {row['num_items']} | {row['acc']:.4f} / {row['acc_lm_eval']:.4f} |" in page
