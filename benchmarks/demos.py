"""What does the demo itself show? Runs it and keeps its headline, on the bundled model or on one that is not ours.

python benchmarks/demos.py starter    the bundled model: benchmarks/results/demo.json
python benchmarks/demos.py stories    stories260K learns GSM8K text and keeps telling stories:
                                      benchmarks/results/stories_demo.json; needs ../shared/data beside the checkout
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

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
DROPPED: Final = ("history", "export_dir")


def main(which: str) -> int:
    """Run one of the two and keep its headline."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if which == "starter":
            keep("demo.json", which, run(folder, []))
        elif which == "stories" and not (DATA / "models" / "stories260K").is_dir():
            print("skipped: stories260K, GSM8K and TinyStories are not here (expected ../shared/data)")
        elif which == "stories":
            keep("stories_demo.json", which, run(folder, stories_arguments(folder)))
        else:
            print(f"{which!r} is no demo, expected starter or stories")
            return 2
    return 0


def run(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The result of ``fedblocks demo`` with these arguments."""
    file = folder / "demo" / "result.json"
    program = Path(sys.executable).parent / "fedblocks"
    # The demo sets its own number of threads, before it imports torch.
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    subprocess.run([str(program), "demo", "--json", str(file), *arguments], check=True, env=env)
    return json.loads(file.read_text(encoding="utf-8"))


def stories_arguments(folder: Path) -> list[str]:
    """Writes the rows in the client's format; the arguments that name them."""
    gsm8k = (DATA / "downstream/gsm8k/train.jsonl").read_text(encoding="utf-8").split("\n")[:NUM_TRAIN]
    stories = (DATA / "general/tinystories/sample1000.jsonl").read_text(encoding="utf-8").split("\n")[:NUM_GENERAL]
    rows = [{"prompt": r["question"], "completion": r["answer"]} for r in map(json.loads, gsm8k)]
    files = {"train": rows, "general": [{"text": json.loads(line)["text"]} for line in stories]}
    arguments = ["--model", str(DATA / "models" / "stories260K")]
    for option, content in files.items():
        path = folder / f"{option}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        arguments += [f"--{option}", str(path)]
    return arguments + [part for override in OVERRIDES for part in ("--set", override)]


def keep(file: str, which: str, result: dict[str, Any]) -> None:
    """The headline, without the history and without paths."""
    row = {key: value for key, value in result.items() if key not in DROPPED}
    write_results(RESULTS / file, f"python benchmarks/demos.py {which}", [row], **machine())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "starter"))
