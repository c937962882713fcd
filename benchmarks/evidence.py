"""What does the federation learn and keep on the frozen tasks, beside tuned baselines that get the same anchor?

    python benchmarks/evidence.py               runs what is missing -> benchmarks/results/evidence.json
    python benchmarks/evidence.py --write-docs  writes docs/results.md from the files in benchmarks/results/

Both tasks, the reported seed of the frozen file, four learning rates for each line; the middle rates come first.
The run is refused unless the frozen file has its target and its hash is right.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's folder off the path

from federation import Method, Settings
from starter_runs import (
    DEFAULT_DENSITY,
    RESULTS,
    Starter,
    config_hash,
    frozen,
    frozen_digest,
    results_rows,
    write_results,
)

FILE = RESULTS / "evidence.json"
COMMAND = "python benchmarks/evidence.py"
BLOCK_RATES = (1e-3, 3e-3, 6e-3, 1e-2)
"""Of expanded blocks, fixed before the first run; those of the baselines stand in the frozen file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table, at four learning rates."""

    name: str
    method: Method
    anchor: bool
    blocks: int = 0
    density: float = DEFAULT_DENSITY
    """Share of rows sent, up and down; the baselines send everything in fp32."""
    max_kl: float = 0.03
    """The forgetting budget, nats per token; moves lambda of expanded blocks only."""

    def matches(self, row: Mapping[str, Any]) -> bool:
        """True if the row belongs to this line."""
        found = (row["method"], row["anchor"], row["blocks"], row.get("density", DEFAULT_DENSITY), row["max_kl"])
        return found == (self.method, self.anchor, self.blocks, self.density, self.max_kl)


LAMBDA_1 = "3 blocks + anchor, all rows, lambda 1"
"""A budget that is never met leaves lambda where it starts: as for the anchored baselines."""
LINES = (
    Line(name="full fine-tuning", method="full", anchor=False),
    Line(name="LoRA r=8", method="lora", anchor=False),
    Line(name="3 blocks + anchor, rho 0.25 (ours, default)", method="blocks", anchor=True, blocks=3),
    Line(name="3 blocks + anchor, all rows (ours)", method="blocks", anchor=True, blocks=3, density=1.0),
    Line(name=LAMBDA_1, method="blocks", anchor=True, blocks=3, density=1.0, max_kl=1.0),
    Line(name="full fine-tuning + anchor", method="full", anchor=True),
    Line(name="LoRA r=8 + anchor", method="lora", anchor=True),
    Line(name="3 blocks, no anchor, all rows", method="blocks", anchor=False, blocks=3, density=1.0),
    Line(name="2 blocks + anchor, all rows", method="blocks", anchor=True, blocks=2, density=1.0),
)


def plan(content: Mapping[str, Any]) -> Iterator[tuple[str, Settings]]:
    """All runs as (task, settings): the second rate of every line first, then the third, the first and the fourth."""
    training = content["training"]
    for lines, places in ((LINES[:8], (1, 2)), (LINES[:8], (0, 3)), (LINES[8:], (1, 2, 0, 3))):
        for place in places:
            for line in lines:
                rates = BLOCK_RATES if line.method == "blocks" else content["learning_rates"][line.method]
                for task in content["tasks"]:
                    yield (
                        task,
                        Settings(
                            method=line.method,
                            blocks=line.blocks,
                            anchor=line.anchor,
                            max_kl=line.max_kl,
                            density=line.density,
                            down_density=line.density,
                            learning_rate=rates[place],
                            seed=content["reported_seeds"][0],
                            rounds=training["rounds"],
                            steps=training["steps_per_round"],
                            batch_size=training["batch_size"],
                            anchor_batch_size=ANCHOR_BATCH_SIZE,
                        ),
                    )


ANCHOR_BATCH_SIZE = 2
"""Anchor texts of 256 tokens in each step, for every anchored line; the product's default is 4 (time of one core)."""


def run() -> None:
    """Runs the missing rows; writes after each."""
    content = frozen()
    if content.get("sha256") != frozen_digest(content):
        raise SystemExit("frozen_task.json is not frozen, or was changed since: its sha256 does not fit its content")
    rows = results_rows(FILE)
    starters: dict[str, Starter] = {}
    base: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for task in content["tasks"]:
            starters[task] = Starter(task, cache=Path(cache))
            base[task] = starters[task].base_figures()
        for task, settings in plan(content):
            starter = starters[task]
            name = config_hash(settings, task, starter.federation.base_hash, starter.partition_hash)
            if any(row["config_hash"] == name for row in rows):
                continue
            line = next(x for x in LINES if x.matches(asdict(settings)))
            label = f"{task} {line.name} {settings.learning_rate:g}"
            rows.append(starter.run(settings, target=content["target"][task], label=label))
            write_results(FILE, COMMAND, rows, base=base, frozen_sha256=content["sha256"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-docs", action="store_true", help="write docs/results.md from the results files")
    if parser.parse_args().write_docs:
        from results_document import write

        write()
    else:
        run()
