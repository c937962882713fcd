"""What does one run on a frozen task of the starter model give? Materials, yardsticks, and the row that is kept.

Shared by `pilot.py` (baselines only, before anything else ran) and `evidence.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from federation import CPU, LORA_RANK, Federation, Learner, RoundEnd, Settings, federate, make_learner

from fedblocks.edge_client.anchor import sample_anchor
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.data import Row, TextEncoder
from fedblocks.edge_client.evaluate import KlSums, kl_full, score_examples
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.starter import frozen_task_file, starter_folder
from fedblocks.edge_client.starter.skills import Example, general_items
from fedblocks.edge_client.starter.tasks import frozen_evaluation, frozen_federation
from fedblocks.protocol.messages import DataFormat

RESULTS: Final = Path(__file__).parent / "results"
DEFAULT_DENSITY: Final = 0.25
ANCHOR_SEQUENCES: Final = 256
ANCHOR_SEED, KL_VALIDATION_SEED, KL_TEST_SEED = 1, 9001, 9002
KL_VALIDATION_SEQUENCES, KL_TEST_SEQUENCES = 24, 128
SEQUENCE_TOKENS: Final = 256
CHANCE: Final = {"compare": 1 / 2, "agree": 1 / 2, "odd": 1 / 3, "kind": 1 / 5, "fact": 1 / 8, "mod": 1 / 10}
"""Of the skills whose answer is one of a known closed set; the others are taken as 0 (an answer is composed)."""
FORMAT: Final = DataFormat(max_tokens=512, append_eos=False, join=" ")


def frozen() -> dict[str, Any]:
    """The frozen file's content."""
    return json.loads(frozen_task_file().read_text(encoding="utf-8"))


def frozen_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the file's content without its own hash: JSON with sorted keys and no spaces."""
    plain = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def to_samples(encoder: TextEncoder, examples: Sequence[Example]) -> list[TokenisedSample]:
    """The examples as a client's data reader makes them."""
    samples: list[TokenisedSample] = []
    for line, item in enumerate(examples, start=1):
        row = Row(line=line, prompt=item.prompt, completion=item.completion)
        ids, mask = encoder.encode(row, where=f"{item.skill} {line}")
        samples.append(TokenisedSample(ids=np.asarray(ids, dtype=np.int32), label_mask=np.asarray(mask, dtype=bool)))
    return samples


def share_right(model: ExpandedModel, samples: Sequence[TokenisedSample]) -> float:
    """Share of exactly right answers."""
    return sum(right for right, _, _ in score_examples(model, samples)) / len(samples)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """The yardsticks of one split: downstream, general, and base-sampled text."""

    task: tuple[TokenisedSample, ...]
    general: Mapping[str, tuple[TokenisedSample, ...]]
    texts: tuple[npt.NDArray[np.int32], ...]

    def skills(self, model: ExpandedModel) -> dict[str, float]:
        """Share right of each general skill."""
        names = [name for name, samples in self.general.items() for _ in samples]
        flat = [sample for samples in self.general.values() for sample in samples]
        right = [ok for ok, _, _ in score_examples(model, flat)]
        return {
            name: sum(ok for ok, n in zip(right, names, strict=True) if n == name) / len(samples)
            for name, samples in self.general.items()
        }


class Starter:
    """The starter model with one frozen task, ready to be federated and measured."""

    def __init__(self, task: str, *, cache: Path, model: Path | None = None, device: torch.device = CPU) -> None:
        content = frozen()
        folder = model or starter_folder()
        self.task = task
        self.target: float | None = content["target"][task] if content["target"] is not None else None
        self.encoder = encoder = TextEncoder(folder, FORMAT)
        checkpoint = Checkpoint.open(folder)
        parts = frozen_federation(task, "evidence")
        self.partition_hash = content["federation"]["settings"]["evidence"]["partition_sha256"][task]
        self.federation = Federation.of(
            folder,
            [to_samples(encoder, part) for part in parts],
            sample_anchor(checkpoint, ANCHOR_SEQUENCES, SEQUENCE_TOKENS, ANCHOR_SEED),
            cache,
            device,
        )
        self.validation, self.test = (
            Split(
                task=tuple(to_samples(encoder, frozen_evaluation(task, split))),
                general=_by_skill(encoder, split, content["evaluation"][split]),
                texts=sample_anchor(checkpoint, sequences, SEQUENCE_TOKENS, seed).sequences,
            )
            for split, sequences, seed in (
                ("validation", KL_VALIDATION_SEQUENCES, KL_VALIDATION_SEED),
                ("test", KL_TEST_SEQUENCES, KL_TEST_SEED),
            )
        )
        self.base = self.federation.dense_base()
        self.base_validation = self.validation.skills(self.base)
        self.base_test = self.test.skills(self.base)

    def figures(self, model: ExpandedModel) -> dict[str, Any]:
        """The reported figures of a model, on the test split."""
        skills = self.test.skills(model)
        kl = kl_full(self.base, model, self.test.texts)
        return {
            "downstream": share_right(model, self.test.task),
            "general": _mean(skills),
            "retention": _mean(skills) / _mean(self.base_test),
            "ret_above_chance": above_chance(skills, self.base_test, len(next(iter(self.test.general.values())))),
            "kl": kl.kl_sum / kl.num_tokens,
            "agree1": kl.num_agree / kl.num_tokens,
            "skills": skills,
        }

    def base_figures(self) -> dict[str, Any]:
        """The untouched base, unquantised and on the 4-bit stack: the floor of every figure."""
        return {
            "base_hash": self.federation.base_hash,
            "general_validation": _mean(self.base_validation),
            "fp32": self.figures(self.base),
            "nf4": self.figures(self.federation.nf4_base()),
        }

    def run(self, settings: Settings, *, target: float, label: str) -> dict[str, Any]:
        """One run; the row of the results file."""
        began = time.monotonic()
        learner = make_learner(self.federation, settings)
        rounds: list[dict[str, Any]] = []
        at_target: dict[str, Any] | None = None
        last: dict[str, Any] = {}
        for end in federate(self.federation, settings, learner):
            model = learner.evaluation_model()
            rounds.append(self._round(end, model))
            if at_target is None and rounds[-1]["downstream"] >= target:
                at_target = {"round": end.round, **self._reported(learner)}
            if end.round == settings.rounds:
                last = {"round": end.round, **self._reported(learner)}
            print(label, _line(rounds[-1]), f"{time.monotonic() - began:.0f} s", flush=True)
        return {
            "config_hash": config_hash(settings, self.task, self.federation.base_hash, self.partition_hash),
            "task": self.task,
            **asdict(settings),
            "base_hash": self.federation.base_hash,
            "partition_hash": self.partition_hash,
            "target": target,
            "trained_parameters": sum(t.numel() for group in learner.begin() for t in group.tensors),
            "rounds_to_target": at_target["round"] if at_target else None,
            "at_target": at_target,
            "last": last,
            "upload_bytes": sum(r["upload_bytes"] for r in rounds) / len(rounds),
            "download_bytes": sum(r["download_bytes"] for r in rounds) / len(rounds),
            "rounds_log": rounds,
            "wall_s": time.monotonic() - began,
            **machine(),
        }

    def _round(self, end: RoundEnd, model: ExpandedModel) -> dict[str, Any]:
        kl: KlSums = kl_full(self.base, model, self.validation.texts)
        return {
            "round": end.round,
            "downstream": share_right(model, self.validation.task),
            "general": _mean(self.validation.skills(model)),
            "kl": kl.kl_sum / kl.num_tokens,
            "task_loss": end.task_loss,
            "learning_rate": end.learning_rate,
            "anchor_weight": end.anchor_weight,
            "controller_kl": end.controller_kl,
            "upload_bytes": end.upload_bytes,
            "download_bytes": end.download_bytes,
            "train_s": end.train_s,
        }

    def _reported(self, learner: Learner) -> dict[str, Any]:
        """Test figures; for expanded blocks of the exported weights and, under ``stack``, of the 4-bit stack."""
        figures = self.figures(learner.evaluation_model())
        stack = learner.stack_model()
        return figures if stack is None else {**figures, "stack": self.figures(stack)}


def config_hash(settings: Settings, task: str, base_hash: str, partition_hash: str) -> str:
    """Names a row: same hash, same run. An ablation's field joins it only where it is not the default."""
    fields = asdict(settings)
    for name in ("density", "down_density"):
        if fields[name] == DEFAULT_DENSITY:
            del fields[name]
    for name, usual in (("min_lambda", 0), ("rank", LORA_RANK), ("layers", 0), ("cohort_fraction", 1.0)):
        if fields[name] == usual:
            del fields[name]
    plain = [fields, task, base_hash, partition_hash, ANCHOR_SEQUENCES, SEQUENCE_TOKENS]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def above_chance(skills: Mapping[str, float], base: Mapping[str, float], items: int) -> float:
    """Ret of methods.md 12.1 over the skills on which the base is more than three standard errors above chance."""
    chance = {name: CHANCE.get(name, 0.0) for name in base}
    used = [n for n, a in base.items() if a - chance[n] > 3 * (a * (1 - a) / items) ** 0.5]
    return sum(skills[n] - chance[n] for n in used) / sum(base[n] - chance[n] for n in used)


def device_named(text: str) -> torch.device:
    """A device of the command line.

    Raises:
        argparse.ArgumentTypeError: there is no such device here.
    """
    try:
        device = torch.device(text)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({first}); expected cpu or cuda") from error
    return device


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    name = f"cpu, {torch.get_num_threads()} thread, {platform.machine()}, {os.cpu_count()} cores"
    return {
        "device": name if device.type == "cpu" else torch.cuda.get_device_name(device),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "fedblocks")},
        },
    }


def results_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def write_results(path: Path, command: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Writes a results file at once (rename), floats to six places."""
    _write(path, {"command": command, **more, "rows": list(rows)})


def put_entries(path: Path, entries: Mapping[str, Any]) -> None:
    """Puts these into a results file that several benchmarks share, each with its own command; the rest of it stays."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    _write(path, {**held, **entries})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(_rounded(content), indent=1, ensure_ascii=False)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text + "\n")
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


class RowBook:
    """The finished runs of a benchmark, a line of JSON each, from which a new start goes on.

    Args:
        path: made with the first line. A last line that a kill has torn is dropped: its run is made again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Durable before the next run begins."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        return row


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _by_skill(encoder: TextEncoder, split: str, chosen: Mapping[str, int]) -> dict[str, tuple[TokenisedSample, ...]]:
    items = general_items(chosen["seed"], chosen["items_per_skill"], split)
    names = dict.fromkeys(item.skill for item in items)
    return {name: tuple(to_samples(encoder, [i for i in items if i.skill == name])) for name in names}


def _mean(skills: Mapping[str, float]) -> float:
    return sum(skills.values()) / len(skills)


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"round {row['round']}: downstream {row['downstream']:.3f} general {row['general']:.3f} kl {row['kl']:.4f} "
        f"lambda {row['anchor_weight']:.2f} loss {row['task_loss']:.3f}"
    )
