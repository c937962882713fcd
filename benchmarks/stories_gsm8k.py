"""What does a real (tiny) model forget while it learns another domain? stories260K on GSM8K, TinyStories as the memory.

    python benchmarks/stories_gsm8k.py     runs what is missing -> benchmarks/results/stories_gsm8k.json

Methods are compared at the same GSM8K perplexity (of the answers' tokens, held-out questions).
Each run leaves two curves: its rounds, and the strength g of its last round (expanded blocks: out-projections times g;
LoRA: B times g; full fine-tuning: theta_0 + g·(theta - theta_0)).
The matched point is where a curve first crosses the given perplexity, linear in log perplexity between neighbours;
TinyStories log perplexity and KL are interpolated with the same weight.
Needs ../shared/data beside the checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's folder off the path

from federation import Federation, Learner, Method, Settings, federate, make_learner
from starter_runs import DEFAULT_DENSITY, RESULTS, machine, results_rows, write_results

from fedblocks.edge_client.anchor import sample_anchor
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.data import Row, TextEncoder
from fedblocks.edge_client.evaluate import evaluate_examples, kl_full
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.protocol.messages import DataFormat

FILE = RESULTS / "stories_gsm8k.json"
COMMAND = "python benchmarks/stories_gsm8k.py"
DATA = Path(__file__).parents[2] / "shared" / "data"
CLIENTS, TRAIN_ROWS, VALIDATION_ROWS, STORIES = 8, 400, 100, 50
MAX_TOKENS: Final = 256
ANCHOR_SEQUENCES, KL_SEQUENCES = 128, 32
ANCHOR_SEED, KL_SEED, SEED = 1, 9001, 42
ROUNDS, STEPS, BATCH_SIZE, ANCHOR_BATCH_SIZE = 10, 8, 4, 2
MAX_KL: Final = 0.3
"""Above what is met here, so that lambda stays 1 for ours as for the anchored baselines."""
STRENGTHS = (0.25, 0.5, 0.75)
RATES = {"full": (1e-3, 3e-4), "lora": (5e-3, 2e-3), "blocks": (3e-3, 6e-3)}
"""Around those of methods.md 12.8 for this model."""
LINES: Final[dict[str, tuple[Method, bool, float]]] = {
    "full fine-tuning": ("full", False, DEFAULT_DENSITY),
    "LoRA r=8": ("lora", False, DEFAULT_DENSITY),
    "3 blocks + anchor, all rows (ours)": ("blocks", True, 1.0),
    "full fine-tuning + anchor": ("full", True, DEFAULT_DENSITY),
    "LoRA r=8 + anchor": ("lora", True, DEFAULT_DENSITY),
    "3 blocks + anchor, rho 0.25 (ours, default)": ("blocks", True, DEFAULT_DENSITY),
    "3 blocks, no anchor, all rows": ("blocks", False, 1.0),
}
"""Name -> method, anchor, share of rows sent up and down."""
SHARES = (0.5, 0.75, 0.9)
"""Matched points: shares of the gain in log perplexity that LoRA without anchor has at its best rate."""


def plan() -> Iterator[Settings]:
    """All runs; the first rate of every line first."""
    for place in (0, 1):
        for method, anchor, density in LINES.values():
            yield Settings(
                method=method,
                anchor=anchor,
                density=density,
                down_density=density,
                blocks=3 if method == "blocks" else 0,
                learning_rate=RATES[method][place],
                seed=SEED,
                rounds=ROUNDS,
                steps=STEPS,
                batch_size=BATCH_SIZE,
                anchor_batch_size=ANCHOR_BATCH_SIZE,
                max_kl=MAX_KL,
            )


class Stories:
    """Model, sites and yardsticks."""

    def __init__(self, cache: Path) -> None:
        model = DATA / "models" / "stories260K"
        encoder = TextEncoder(model, DataFormat(max_tokens=MAX_TOKENS, append_eos=True, join=" "))
        checkpoint = Checkpoint.open(model)
        gsm8k = _jsonl(DATA / "downstream" / "gsm8k" / "train.jsonl")[: TRAIN_ROWS + VALIDATION_ROWS]
        rows = [Row(line=i, prompt=r["question"], completion=r["answer"]) for i, r in enumerate(gsm8k)]
        train, self.validation = _samples(encoder, rows[:TRAIN_ROWS]), _samples(encoder, rows[TRAIN_ROWS:])
        stories = _jsonl(DATA / "general" / "tinystories" / "sample1000.jsonl")[:STORIES]
        self.stories = _samples(encoder, [Row(line=i, text=r["text"]) for i, r in enumerate(stories)])
        self.federation = Federation.of(
            model,
            [train[i::CLIENTS] for i in range(CLIENTS)],
            sample_anchor(checkpoint, ANCHOR_SEQUENCES, MAX_TOKENS, ANCHOR_SEED),
            cache,
        )
        self.base = self.federation.dense_base()
        self.texts = sample_anchor(checkpoint, KL_SEQUENCES, MAX_TOKENS, KL_SEED).sequences
        self.base_figures = self.figures(self.base)

    def figures(self, model: ExpandedModel) -> dict[str, float]:
        """Log perplexities (nats per token) and KL to the base."""
        task, stories = evaluate_examples(model, self.validation), evaluate_examples(model, self.stories)
        kl = kl_full(self.base, model, self.texts)
        return {
            "gsm8k_nll": task.nll_sum / task.num_tokens,
            "stories_nll": stories.nll_sum / stories.num_tokens,
            "kl": kl.kl_sum / kl.num_tokens,
            "agree1": kl.num_agree / kl.num_tokens,
        }

    def run(self, settings: Settings, label: str) -> dict[str, Any]:
        """One run; the row of the results file."""
        began = time.monotonic()
        learner: Learner = make_learner(self.federation, settings)
        rounds: list[dict[str, Any]] = [{"round": 0, **self.base_figures}]
        uploaded: list[float] = []
        for end in federate(self.federation, settings, learner):
            rounds.append({"round": end.round, **self.figures(learner.evaluation_model())})
            uploaded.append(end.upload_bytes)
            print(
                label,
                json.dumps(rounds[-1]),
                f"lambda {end.anchor_weight:.2f} {time.monotonic() - began:.0f} s",
                flush=True,
            )
        strengths = [{"strength": g, **self.figures(learner.evaluation_model(g))} for g in STRENGTHS]
        stack = learner.stack_model()
        return {
            "config_hash": _name(settings),
            **asdict(settings),
            "base_hash": self.federation.base_hash,
            "rounds_log": rounds,
            "strengths": [
                {"strength": 0.0, **self.base_figures},
                *strengths,
                {"strength": 1.0, **{k: v for k, v in rounds[-1].items() if k != "round"}},
            ],
            "stack": None if stack is None else self.figures(stack),
            "upload_bytes": sum(uploaded) / len(uploaded),
            "wall_s": time.monotonic() - began,
            **machine(),
        }


def matched(curve: Sequence[Mapping[str, float]], gsm8k_nll: float) -> dict[str, float] | None:
    """Where the curve first comes down to that log perplexity; None if it never does."""
    for before, after in pairwise(curve):
        if after["gsm8k_nll"] <= gsm8k_nll < before["gsm8k_nll"]:
            share = (before["gsm8k_nll"] - gsm8k_nll) / (before["gsm8k_nll"] - after["gsm8k_nll"])
            return {key: before[key] + share * (after[key] - before[key]) for key in ("stories_nll", "kl")}
    return None


def line_name(row: Mapping[str, Any]) -> str:
    """Name of the line that the row belongs to."""
    found = (row["method"], row["anchor"], row["density"])
    return next(name for name, line in LINES.items() if line == found)


def matched_points(rows: Sequence[Mapping[str, Any]], base: Mapping[str, float]) -> list[dict[str, Any]]:
    """Per share of LoRA's gain and line: the least KL of its rates, by rounds and by strength; None: not reached."""
    lora = [row for row in rows if line_name(row) == "LoRA r=8"]
    if not lora:
        return []
    gain = base["gsm8k_nll"] - min(entry["gsm8k_nll"] for row in lora for entry in row["rounds_log"])
    points: list[dict[str, Any]] = []
    for share in SHARES:
        level = base["gsm8k_nll"] - share * gain
        for name in LINES:
            chosen = [row for row in rows if line_name(row) == name]
            if not chosen:
                continue
            for way, key in (("rounds", "rounds_log"), ("strength", "strengths")):
                found = [(row["learning_rate"], point) for row in chosen if (point := matched(row[key], level))]
                best = min(found, key=lambda pair: pair[1]["kl"]) if found else None
                points.append(
                    {
                        "share": share,
                        "gsm8k_perplexity": math.exp(level),
                        "line": name,
                        "by": way,
                        "learning_rate": best[0] if best else None,
                        "perplexity_ratio": math.exp(best[1]["stories_nll"] - base["stories_nll"]) if best else None,
                        "kl": best[1]["kl"] if best else None,
                    }
                )
    return points


def run() -> None:
    """Runs the missing rows; writes after each."""
    if not DATA.is_dir():
        print("skipped: stories260K, GSM8K and TinyStories are not here (expected ../shared/data beside the checkout)")
        return
    rows = results_rows(FILE)
    with tempfile.TemporaryDirectory() as cache:
        stories = Stories(Path(cache))
        print("base", stories.base_figures, flush=True)
        for settings in plan():
            if any(row["config_hash"] == _name(settings) for row in rows):
                continue
            label = f"{line_name(asdict(settings))} {settings.learning_rate:g}"
            rows.append(stories.run(settings, label))
            write_results(
                FILE, COMMAND, rows, base=stories.base_figures, nf4=stories.figures(stories.federation.nf4_base())
            )


def _name(settings: Settings) -> str:
    sizes = [CLIENTS, TRAIN_ROWS, VALIDATION_ROWS, STORIES, MAX_TOKENS, ANCHOR_SEQUENCES, KL_SEQUENCES]
    return hashlib.sha256(json.dumps([asdict(settings), sizes], sort_keys=True).encode()).hexdigest()[:16]


def _jsonl(path: Path) -> list[dict[str, str]]:
    # Not splitlines(): it also splits at line separators inside the strings.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _samples(encoder: TextEncoder, rows: Sequence[Row]) -> list[TokenisedSample]:
    """Cut to MAX_TOKENS; rows without a target token left are dropped."""
    samples: list[TokenisedSample] = []
    for row in rows:
        ids, mask = (part[:MAX_TOKENS] for part in encoder.encode(row, where=f"row {row.line}"))
        if any(mask):
            samples.append(
                TokenisedSample(ids=np.asarray(ids, dtype=np.int32), label_mask=np.asarray(mask, dtype=bool))
            )
    return samples


if __name__ == "__main__":
    torch.set_num_threads(1)
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    run()
