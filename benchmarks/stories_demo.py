"""Does the demo run on a model and data that are not ours? stories260K learns GSM8K text and keeps telling stories.

Writes the rows in the client's format, runs ``fedblocks demo --model --train --general`` and keeps the headline.
Needs ../shared/data beside the checkout. Command: ``python benchmarks/stories_demo.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from starter_runs import RESULTS, machine, write_results

DATA: Final = Path(__file__).parents[2] / "shared" / "data"
NUM_TRAIN, NUM_GENERAL = 800, 120
OVERRIDES: Final = (
    "run.max_rounds=4",
    "training.learning_rate=3e-3",
    "data.max_tokens=256",
    "delta.density=1.0",
    "delta.down_density=1.0",
)


def main() -> int:
    """Run, and write ``benchmarks/results/stories_demo.json``."""
    model = DATA / "models" / "stories260K"
    if not model.is_dir():
        print("skipped: stories260K, GSM8K and TinyStories are not here (expected ../shared/data beside the checkout)")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gsm8k = (DATA / "downstream/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_TRAIN]
        rows = [{"prompt": r["question"], "completion": r["answer"]} for r in map(json.loads, gsm8k)]
        stories = (DATA / "general/tinystories/sample1000.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_GENERAL]
        _write(folder / "train.jsonl", rows)
        _write(folder / "general.jsonl", [{"text": json.loads(line)["text"]} for line in stories])
        command = [sys.executable, "-m", "fedblocks", "demo", "--model", str(model)]
        command += ["--train", str(folder / "train.jsonl"), "--general", str(folder / "general.jsonl")]
        command += ["--json", str(folder / "demo" / "result.json")]
        command += [part for override in OVERRIDES for part in ("--set", override)]
        subprocess.run(command, check=True)
        result = json.loads((folder / "demo" / "result.json").read_text(encoding="utf-8"))
    keys = ("rounds", "wall_s", "strength", "kl_over_budget", "kl_over_budget_4bit", "bytes_ratio_full_fp32", "proof")
    write_results(
        RESULTS / "stories_demo.json",
        "python benchmarks/stories_demo.py",
        [{key: result[key] for key in keys}],
        overrides=list(OVERRIDES),
        **machine(),
    )
    return 0


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
