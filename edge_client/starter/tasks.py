"""What do the clients learn together? The two frozen downstream tasks and their skewed split over clients.

`rule`         "code k a t : pink ;"          a new rule over known tokens: the last letter of 3 to 5 decides the
                                             colour. 20 letters, 5 colours, 4 letters each.
`association`  "group dog plum hat : tool ;"  a new association of known words: the 40 words of the skill `kind`
                                             get a new partition under the same five labels; three words of one
                                             new class, repeats allowed.

Both maps are drawn from MAP_SEED. Every token is known to the base (the command words from copy, first and last only),
and the answers are single known tokens, so the base is at chance (one in five) or below it before training.
Prompts are split 60 : 20 : 20 by a hash of their text, so train, validation and test share none.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedblocks.edge_client.starter import frozen_task_file
from fedblocks.edge_client.starter.skills import (
    ATTRIBUTES,
    KINDS,
    LETTERS,
    SPLITS,
    WORDS,
    Example,
    below,
    make_example,
    pick,
    seeded,
    shuffled,
    split_of,
)

TASKS = ("rule", "association")
MAP_SEED = 8117
SHARES = (60, 20, 20)
"""Percent of the prompts in train, validation, test."""


def _draw_colour_of() -> dict[str, str]:
    rng = seeded(MAP_SEED, "rule")
    colours = shuffled(rng, ATTRIBUTES["colour"])[:5]
    return {letter: colours[i // 4] for i, letter in enumerate(shuffled(rng, LETTERS))}


def _draw_group_of() -> dict[str, str]:
    """The first shuffle in which no new class holds more than two of eight words of any one old kind.

    Two of eight is one above even (8/5): the old kinds then say next to nothing about the new classes.
    """
    rng = seeded(MAP_SEED, "association")
    labels = tuple(KINDS)
    while True:
        group_of = {word: labels[i // 8] for i, word in enumerate(shuffled(rng, WORDS))}
        shared = [sum(group_of[word] == label for word in words) for words in KINDS.values() for label in labels]
        if max(shared) <= 2:
            return group_of


COLOUR_OF = _draw_colour_of()
GROUP_OF = _draw_group_of()
LABELS = {"rule": tuple(sorted(set(COLOUR_OF.values()))), "association": tuple(KINDS)}
_MEMBERS = {label: tuple(word for word in WORDS if GROUP_OF[word] == label) for label in KINDS}


def _rule(rng: random.Random) -> Example:
    letters = [pick(rng, LETTERS) for _ in range(3 + below(rng, 3))]
    colour = COLOUR_OF[letters[-1]]
    return make_example("rule", ["code", *letters], [colour], colour)


def _association(rng: random.Random) -> Example:
    label = pick(rng, LABELS["association"])
    return make_example("association", ["group", *(pick(rng, _MEMBERS[label]) for _ in range(3))], [label], label)


_MAKERS = {"rule": _rule, "association": _association}


def task_examples(task: str, split: str, n: int, seed: int) -> list[Example]:
    """`n` different examples of `task` from `split`; labels come about equally often (drawn, not dealt).

    `association` has 2560 prompts in all, of which about 1500 train, 500 validation and 500 test.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = seeded(seed, task, split)
    found: dict[str, Example] = {}
    for _ in range(100 * n):
        drawn = _MAKERS[task](rng)
        if split_of(drawn.prompt, SHARES) == split:
            found.setdefault(drawn.prompt, drawn)
        if len(found) == n:
            return list(found.values())
    raise ValueError(f"{task} {split} holds about {len(found)} different prompts, asked for {n}: ask for fewer")


def dirichlet_split(
    examples: Sequence[Example], clients: int, alpha: float, seed: int, min_per_client: int = 8
) -> list[list[Example]]:
    """Deals every example to exactly one client, skewed by label; redrawn until each has `min_per_client`.

    For each label the clients' shares come from Dirichlet(alpha) (Hsu et al., 1909.06335). RandomState, whose stream
    NumPy keeps fixed (NEP 19), gives the same split in every version.
    """
    if clients * min_per_client > len(examples):
        raise ValueError(f"{len(examples)} examples cannot give {clients} clients {min_per_client} each")
    rng = np.random.RandomState(seed)
    by_label: dict[str | None, list[Example]] = {}
    for item in examples:
        by_label.setdefault(item.label, []).append(item)
    for _ in range(10_000):
        parts: list[list[Example]] = [[] for _ in range(clients)]
        for items in by_label.values():
            bounds = np.rint(np.cumsum(rng.dirichlet([alpha] * clients)) * len(items)).astype(int)
            bounds[-1] = len(items)
            for part, start, stop in zip(parts, [0, *bounds[:-1]], bounds, strict=True):
                part.extend(items[start:stop])
        if min(map(len, parts)) >= min_per_client:
            return parts
    raise ValueError(
        f"no split of {len(examples)} examples over {clients} clients at alpha {alpha} gave each {min_per_client} "
        "in 10000 draws: use more examples, fewer clients or a larger alpha"
    )


def frozen_federation(task: str, setting: str) -> list[list[Example]]:
    """The clients' training examples of the frozen file; `setting` is "evidence" (8 clients) or "demo" (4)."""
    frozen = json.loads(frozen_task_file().read_text())["federation"]
    chosen = frozen["settings"][setting]
    examples = task_examples(task, "train", chosen["examples"], frozen["examples_seed"])
    return dirichlet_split(examples, chosen["clients"], frozen["alpha"], chosen["split_seed"], frozen["min_per_client"])


def frozen_evaluation(task: str, split: str) -> list[Example]:
    """The frozen validation or test examples of `task`."""
    frozen = json.loads(frozen_task_file().read_text())["evaluation"]
    return task_examples(task, split, frozen[split]["examples_per_task"], frozen[split]["seed"])


def write_jsonl(examples: Sequence[Example], path: Path) -> None:
    """One line {"prompt", "completion", "label"} per example: what the client's data reader takes."""
    lines = [
        json.dumps({"prompt": item.prompt, "completion": item.completion, "label": item.label}) for item in examples
    ]
    Path(path).write_text("\n".join(lines) + "\n")
