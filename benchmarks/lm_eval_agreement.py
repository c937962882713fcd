"""Do our multiple-choice scores agree with lm-evaluation-harness? Three local tasks on stories260K, item by item.

The harness reads the same files (``dataset_path: json``) without a hub. It joins question and answer by a task's
``target_delimiter``; ours by ``data.join``, and not at all after white space. Both put bos in front here, because this
tokenizer does. Where ``lm_eval`` is not installed this says so and writes nothing:

    pip install lm-eval; PYTHONPATH=benchmarks python benchmarks/lm_eval_agreement.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from fedblocks.edge_client.backbone import DenseBackbone
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.data import TextEncoder
from fedblocks.edge_client.evaluation import data_format
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.multiple_choice import ItemScore, Task, fitting, read_tasks, score_items, window_tokens

DATA: Final = Path(__file__).parents[1].parent / "shared/data"
RESULT: Final = Path(__file__).parent / "results" / "lm_eval.json"
TASKS: Final = {"piqa": "", "arc_easy": " ", "copa": " "}
"""Task -> what stands between question and answer; every query of this PIQA ends with a line feed."""
TOLERANCE_NATS: Final = 1e-3
"""Of a log-likelihood, a sum over up to some hundred tokens in fp32."""

YAML: Final = """task: {task}_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: "{delimiter}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def read(model: Path, encoder: TextEncoder, limit: int | None) -> dict[str, Task]:
    """The items that both can measure: the harness stops at an answer of more tokens than the model has positions."""
    window = window_tokens(Checkpoint.open(model))
    return {name: fitting(read_tasks(file_of(name), limit)[0], encoder, window) for name in TASKS}


def file_of(task: str) -> Path:
    return DATA / f"general/{task}/test.jsonl"


def theirs(model: Path, tasks: Mapping[str, Task]) -> dict[str, dict[str, Any]]:
    """What the harness says: accuracies, and log-likelihoods of each item in order."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for task, delimiter in TASKS.items():
            lines = file_of(task).read_text(encoding="utf-8").split("\n")
            file = Path(folder) / f"{task}.jsonl"
            file.write_text("".join(f"{lines[item.line - 1]}\n" for item in tasks[task].items), encoding="utf-8")
            text = YAML.format(task=task, file=file, delimiter=delimiter)
            (Path(folder) / f"{task}.yaml").write_text(text, encoding="utf-8")
        result = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "dtype": "float32"},
            tasks=[f"{task}_local" for task in TASKS],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            device="cpu",
            batch_size=16,
            bootstrap_iters=0,
        )
    assert result is not None
    for task in TASKS:
        samples = sorted(result["samples"][f"{task}_local"], key=lambda sample: sample["doc_id"])
        scores = result["results"][f"{task}_local"]
        found[task] = {
            "acc": scores["acc,none"],
            "acc_norm": scores["acc_norm,none"],
            "loglikelihoods": [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples],
        }
    return found


def ours(model: Path, tasks: Mapping[str, Task], encoder: TextEncoder) -> dict[str, list[ItemScore]]:
    """The same items by this program's own model and evaluator."""
    checkpoint = Checkpoint.open(model)
    expanded = ExpandedModel(backbone=DenseBackbone(checkpoint), checkpoint=checkpoint)
    return {name: score_items(expanded, task, encoder) for name, task in tasks.items()}


def compared(task: Task, scores: list[ItemScore], other: dict[str, Any]) -> dict[str, Any]:
    """One task's row."""
    per_character = [
        int(np.argmax(np.divide(score.loglikelihoods, [len(text) for text in item.completions]))) == item.gold
        for score, item in zip(scores, task.items, strict=True)
    ]
    own = np.array([value for score in scores for value in score.loglikelihoods])
    harness = np.array([value for item in other["loglikelihoods"] for value in item])
    predictions = [int(np.argmax(item)) for item in other["loglikelihoods"]]
    return {
        "num_items": len(scores),
        "num_left_out": task.num_left_out,
        "num_answers": len(own),
        "acc": float(np.mean([score.is_right for score in scores])),
        "acc_lm_eval": other["acc"],
        "acc_norm": float(np.mean([score.is_right_per_byte for score in scores])),
        "acc_norm_per_character": float(np.mean(per_character)),
        "acc_norm_lm_eval": other["acc_norm"],
        "same_predictions": int(sum(s.prediction == p for s, p in zip(scores, predictions, strict=True))),
        "max_abs_loglikelihood_difference_nats": float(np.abs(own - harness).max()),
        "mean_abs_loglikelihood_nats": float(np.abs(harness).mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=None, help="first items of each task only; nothing is written")
    parser.add_argument("--model", type=Path, default=DATA / "models/stories260K")
    arguments = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        print("skipped: lm_eval is not installed (pip install lm-eval)")
        return 0
    if not DATA.is_dir():
        print("skipped: the model and the tasks are not here (expected ../shared/data beside the checkout)")
        return 0
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    encoder = TextEncoder(arguments.model, data_format(None))
    tasks = read(arguments.model, encoder, arguments.limit)
    harness = theirs(arguments.model, tasks)
    rows = {
        name: compared(tasks[name], scores, harness[name])
        for name, scores in ours(arguments.model, tasks, encoder).items()
    }
    result = {
        "command": "python benchmarks/lm_eval_agreement.py",
        "model": arguments.model.name,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "tolerance_nats": TOLERANCE_NATS,
        "tasks": rows,
    }
    print(json.dumps(result, indent=1))
    if arguments.limit is None:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    agree = all(row["max_abs_loglikelihood_difference_nats"] <= TOLERANCE_NATS for row in rows.values())
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
