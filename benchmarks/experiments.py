"""What does each method keep at equal scores, and learn within a budget? One TOML file an experiment, rows as JSON.

    make experiments                                            all files of benchmarks/experiments/, in their order
    python benchmarks/experiments.py 1_quality_association      one of them
    python benchmarks/experiments.py --device cuda              all of it on a GPU -> results/methods-gpu.json
    python benchmarks/experiments.py --report                   only the summary, from the rows that are there

Every finished run is a line of runs/bench/experiments/rows.jsonl and is not made again. Line by line, the reference
first: four learning rates on the pilot seed and a fifth where they point to, then the other seeds at the best of them.
What is chosen (rates, rounds, strengths) is chosen on validation; what is reported is the test split.

Matched points (methods.md 12.2): the reference's best pilot score less half a point, and 75 % and 50 % of its gain.
Of all rounds and strengths of a run that reach a point on validation, the one that keeps most general ability stands
for it (ties: the lower KL). A budget K_b: of the strengths of the last round whose KL plus 1.64 standard errors is
within it, the one with the best score (ties: the smaller). Both rules are the same for every line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from fedblocks.edge_client.evaluate import kl_full, score_examples
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.starter.tasks import dirichlet_split, task_examples
from fedblocks.protocol.messages import BUDGET_ERRORS, STRENGTHS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from federation import CPU, Learner, Settings, federate, make_learner
from starter_runs import RESULTS, RowBook, Split, Starter, device_named, frozen, machine, put_entries, to_samples

FOLDER: Final = Path(__file__).parent / "experiments"
ROWS: Final = Path("runs/bench/experiments/rows.jsonl")
FILE: Final = RESULTS / "methods.json"
COMMAND: Final = "python benchmarks/experiments.py"
POINTS: Final = ("first", "gain_75", "gain_50")
BELOW_REFERENCE: Final = 0.005
SHARES: Final = {"gain_75": 0.75, "gain_50": 0.5}
EDGE_FACTOR: Final = 10**0.5
"""From an outermost rate that is the best to the one beyond it."""
DRAWS: Final = 10_000
NOT_SETTINGS: Final = ("name", "rates", "rates_of")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One method with its hyper-parameters, at four learning rates or at another line's best one."""

    name: str
    settings: Mapping[str, Any]
    """Keys of ``federation.Settings`` other than those of the experiment."""
    rates: tuple[float, ...] = ()
    rates_of: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A file of benchmarks/experiments/."""

    name: str
    task: str
    rounds: int
    steps: int
    batch_size: int
    anchor_batch_size: int
    examples: int
    clients: int
    alpha: float
    cohort_fraction: float
    pilot_seed: int
    seeds: tuple[int, ...]
    strengths: tuple[float, ...]
    """At which every round is measured; the last one at all of the grid."""
    budgets_nats_per_token: tuple[float, ...]
    reference: str
    lines: tuple[Line, ...]

    def __post_init__(self) -> None:
        names = [line.name for line in self.lines]
        if self.reference not in names:
            raise ValueError(f"{self.name}: reference is {self.reference!r}, expected one of {', '.join(names)}")
        if len(set(names)) != len(names):
            raise ValueError(f"{self.name}: two lines have one name: {', '.join(names)}")
        for line in self.lines:
            if bool(line.rates) == bool(line.rates_of) or (line.rates_of and line.rates_of not in names):
                raise ValueError(
                    f"{self.name}: line {line.name!r} needs either rates or the name of a line in rates_of, "
                    f"one of {', '.join(names)}"
                )
        if 1.0 not in self.strengths:
            raise ValueError(f"{self.name}: strengths are {self.strengths}, expected 1 among them")

    def line(self, name: str) -> Line:
        """The line of this name."""
        return next(line for line in self.lines if line.name == name)

    def settings(self, line: Line, rate: float, seed: int) -> Settings:
        """One run."""
        return Settings(
            **line.settings,
            learning_rate=rate,
            seed=seed,
            rounds=self.rounds,
            steps=self.steps,
            batch_size=self.batch_size,
            anchor_batch_size=self.anchor_batch_size,
            cohort_fraction=self.cohort_fraction,
        )


def load(path: Path) -> Experiment:
    """The experiment in a file.

    Raises:
        ValueError: a key is unknown, missing or cannot be used; the text names file and key.
    """
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    lines = content.pop("line", [])
    known = {f.name for f in fields(Experiment)} - {"name", "lines"}
    of_line = {f.name for f in fields(Settings)} | set(NOT_SETTINGS)
    for where, keys, allowed in (
        ("", content, known),
        *((f"line {line.get('name', '?')!r}: ", line, of_line) for line in lines),
    ):
        unknown = sorted(set(keys) - allowed)
        if unknown:
            raise ValueError(
                f"{path}: {where}unknown key {unknown[0]!r}, expected some of {', '.join(sorted(allowed))}"
            )
    missing = sorted(known - set(content))
    if missing or not lines:
        raise ValueError(f"{path}: {missing[0] if missing else '[[line]]'} is missing")
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    made = tuple(
        Line(
            name=line["name"],
            settings={key: value for key, value in line.items() if key not in NOT_SETTINGS},
            rates=tuple(line.get("rates", ())),
            rates_of=line.get("rates_of", ""),
        )
        for line in lines
    )
    return Experiment(name=path.stem, lines=made, **plain)


# What is read off the rows: pure, and the same for every line


Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Downstream scores at which methods are compared."""

    first: float
    gain_75: float
    gain_50: float


def matched_points(reference: Sequence[Row], base_score: float) -> Points:
    """From the best score of the reference's pilot runs at full strength."""
    best = max(_learnt(row) for row in reference)
    gain = best - base_score
    return Points(first=best - BELOW_REFERENCE, **{name: base_score + share * gain for name, share in SHARES.items()})


def _learnt(row: Row) -> float:
    """Mean of the last three rounds' scores at full strength."""
    scores = [m["downstream"] for m in row["validation"] if m["strength"] == 1.0]
    return statistics.fmean(scores[-3:])


def at_score(row: Row, score: float) -> Row | None:
    """The round and strength that stand for a point; None if the run does not reach it."""
    able = [m for m in row["validation"] if m["downstream"] >= score]
    return max(able, key=lambda m: (m["general"], -m["kl"])) if able else None


def first_at_score(row: Row, score: float) -> int | None:
    """The first round that reaches the score at full strength."""
    return next((m["round"] for m in row["validation"] if m["strength"] == 1.0 and m["downstream"] >= score), None)


def within_budget(row: Row, max_kl: float) -> Row:
    """The strength of the last round that holds the budget and scores best; strength 0 always holds it."""
    last = max(m["round"] for m in row["validation"])
    able = [
        m
        for m in row["validation"]
        if m["round"] == last and (m["strength"] == 0 or m["kl"] + BUDGET_ERRORS * m["kl_se"] <= max_kl)
    ]
    return max(able, key=lambda m: (m["downstream"], -m["strength"]))


def merit(row: Row, points: Points | None) -> tuple[bool, float, float]:
    """How good a learning rate is: what it keeps at the first point, or what it learns where it does not reach it.

    Without points, which come from the reference's own pilot runs: what it learns.
    """
    found = at_score(row, points.first) if points is not None else None
    return found is not None, found["general"] if found is not None else _learnt(row), -row["learning_rate"]


def best_rate(rows: Sequence[Row], points: Points | None) -> float:
    """Of a line's pilot runs the best one's."""
    return max(rows, key=lambda row: merit(row, points))["learning_rate"]


def fifth_rate(rates: Sequence[float], best: float, merit: Callable[[float], Any]) -> float:
    """One more rate, which every line gets: beyond the edge where the best is outermost, else halfway (on a log scale)
    to its better neighbour."""
    place = sorted(rates).index(best)
    below, above = sorted(rates)[:place], sorted(rates)[place + 1 :]
    if not above or not below:
        return _rounded(best * EDGE_FACTOR if not above else best / EDGE_FACTOR)
    return _rounded(math.sqrt(best * max((below[-1], above[0]), key=merit)))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


# Runs


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The material of an experiment."""

    experiment: Experiment
    starter: Starter
    base: Mapping[str, Any]
    """The untouched base on both splits."""

    @classmethod
    def of(cls, experiment: Experiment, cache: Path, device: torch.device = CPU) -> World:
        """Loads the starter model with the task."""
        starter = Starter(experiment.task, cache=cache, device=device)
        base = {"validation": _measured(starter.base, starter, starter.validation)}
        base["test"] = _tested(starter.base, starter)
        return cls(experiment=experiment, starter=starter, base=base)

    def sites(self, seed: int) -> tuple[list[list[Any]], str]:
        """The rows of this seed's sites, and the hash of the partition."""
        experiment = self.experiment
        examples = task_examples(experiment.task, "train", experiment.examples, frozen()["federation"]["examples_seed"])
        parts = dirichlet_split(examples, experiment.clients, experiment.alpha, seed)
        text = json.dumps([[item.prompt for item in part] for part in parts])
        return parts, hashlib.sha256(text.encode()).hexdigest()[:16]


def run_id(experiment: Experiment, settings: Settings, base_hash: str) -> str:
    """Names a run: the same material and settings, the same name."""
    material = [experiment.task, experiment.examples, experiment.clients, experiment.alpha, experiment.strengths]
    plain = {f.name: getattr(settings, f.name) for f in fields(Settings) if getattr(settings, f.name) != f.default}
    return hashlib.sha256(json.dumps([material, plain, base_hash], sort_keys=True).encode()).hexdigest()[:16]


def run(world: World, line: Line, settings: Settings, points: Points | None) -> dict[str, Any]:
    """One run and its row.

    Args:
        points: measure the test split at what stands for them; None for a pilot run.
    """
    began = time.monotonic()
    experiment, starter = world.experiment, world.starter
    parts, partition = world.sites(settings.seed)
    encoder = starter.encoder
    federation = replace(starter.federation, sites=tuple(tuple(to_samples(encoder, part)) for part in parts))
    learner = make_learner(federation, settings)
    validation: list[dict[str, Any]] = []
    kept: dict[int, object] = {}
    uploads: list[float] = []
    downloads: list[float] = []
    train_s = 0.0
    for end in federate(federation, settings, learner):
        kept[end.round] = learner.kept()
        uploads.append(end.upload_bytes)
        downloads.append(end.download_bytes)
        train_s += end.train_s
        strengths = STRENGTHS if end.round == settings.rounds else experiment.strengths
        validation += [
            {"round": end.round, "strength": strength}
            | _measured(learner.evaluation_model(strength), starter, starter.validation)
            for strength in strengths
        ]
    row: dict[str, Any] = {
        "id": run_id(experiment, settings, federation.base_hash),
        "experiment": experiment.name,
        "line": line.name,
        "seed": settings.seed,
        "learning_rate": settings.learning_rate,
        "settings": asdict(settings),
        "partition": partition,
        "validation": validation,
        "trained_parameters": sum(t.numel() for group in learner.begin() for t in group.tensors),
        "upload_bytes": statistics.fmean(uploads),
        "download_bytes": statistics.fmean(downloads),
        "train_s": train_s,
    }
    if points is not None:
        row["test"] = _tests(row, points, learner, kept, world)
    return row | {"wall_s": time.monotonic() - began, **machine(federation.device)}


def _tests(
    row: Row, points: Points, learner: Learner, kept: Mapping[int, object], world: World
) -> dict[str, dict[str, Any]]:
    """The test split where validation says that a point or a budget is met, and at the end; each is measured once."""
    last = max(m["round"] for m in row["validation"])
    wanted: dict[str, tuple[int, float]] = {"last": (last, 1.0)}
    for name in POINTS:
        found = at_score(row, getattr(points, name))
        if found is not None:
            wanted[name] = (found["round"], found["strength"])
    for budget in world.experiment.budgets_nats_per_token:
        wanted[f"budget_{budget:g}"] = (last, within_budget(row, budget)["strength"])
    measured: dict[tuple[int, float], dict[str, Any]] = {}
    for round, strength in dict.fromkeys(wanted.values()):
        learner.go_back(kept[round])
        figures = _tested(learner.evaluation_model(strength), world.starter)
        stack = learner.stack_model()
        if stack is not None:
            stack.set_strength(strength)
            figures["stack"] = _measured(stack, world.starter, world.starter.test)
            stack.set_strength(1.0)
        measured[round, strength] = {"round": round, "strength": strength, **figures}
    return {name: measured[place] for name, place in wanted.items()}


def _measured(model: ExpandedModel, starter: Starter, split: Split) -> dict[str, float]:
    skills = split.skills(model)
    right = [ok for ok, _, _ in score_examples(model, split.task)]
    kl = kl_full(starter.base, model, split.texts)
    mean = kl.kl_sum / kl.num_tokens
    sequences, tokens = len(split.texts), kl.num_tokens / len(split.texts)
    spread = max(0.0, kl.square_sum / sequences - (mean * tokens) ** 2)
    return {
        "downstream": sum(right) / len(right),
        "general": statistics.fmean(skills.values()),
        "kl": mean,
        "kl_se": math.sqrt(spread / max(1, sequences - 1)) / tokens,
    }


def _tested(model: ExpandedModel, starter: Starter) -> dict[str, Any]:
    """The test split item by item (packed bits, hexadecimal), for intervals."""
    split = starter.test
    figures: dict[str, Any] = _measured(model, starter, split)
    items = {"downstream": split.task, **split.general}
    figures["right"] = {name: _packed([ok for ok, _, _ in score_examples(model, part)]) for name, part in items.items()}
    return figures


def _packed(right: Sequence[bool]) -> str:
    return np.packbits(np.asarray(right, dtype=np.uint8)).tobytes().hex()


def unpacked(text: str, items: int) -> npt.NDArray[np.uint8]:
    """The bits of :func:`_packed`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:items]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """An experiment on its way: what has been run, and what that says."""

    experiment: Experiment
    book: RowBook
    base_hash: str
    base_score: float
    """Downstream score of the base on validation."""

    @property
    def _reference(self) -> Line:
        return self.experiment.line(self.experiment.reference)

    def _row(self, line: Line, rate: float, seed: int, *, tested: bool) -> dict[str, Any] | None:
        settings = self.experiment.settings(line, rate, seed)
        name = run_id(self.experiment, settings, self.base_hash)
        return next((row for row in self.book.rows if row["id"] == name and (not tested or "test" in row)), None)

    def _pilot(self, line: Line, rates: Sequence[float]) -> list[dict[str, Any]]:
        found = [self._row(line, rate, self.experiment.pilot_seed, tested=False) for rate in rates]
        return [row for row in found if row is not None]

    def rates(self, line: Line) -> tuple[float, ...]:
        """The line's own, and once these have been run the fifth; none for a line that takes another's."""
        if line.rates_of:
            return ()
        rows = self._pilot(line, line.rates)
        points = None if line is self._reference else self.points()
        if len(rows) < len(line.rates) or (points is None and line is not self._reference):
            return line.rates
        by_rate = {row["learning_rate"]: merit(row, points) for row in rows}
        return (*line.rates, fifth_rate(line.rates, best_rate(rows, points), by_rate.__getitem__))

    def pilot_rows(self, line: Line) -> list[dict[str, Any]]:
        """Those of the pilot seed that are there."""
        return self._pilot(line, self.rates(line))

    def points(self) -> Points | None:
        """From the reference's pilot runs; None until all are there."""
        rows = self.pilot_rows(self._reference)
        return matched_points(rows, self.base_score) if len(rows) > len(self._reference.rates) else None

    def rate(self, line: Line) -> float | None:
        """The line's chosen rate; None until its pilot runs are there."""
        if line.rates_of:
            return self.rate(self.experiment.line(line.rates_of))
        rows, points = self.pilot_rows(line), self.points()
        return best_rate(rows, points) if points is not None and len(rows) > len(line.rates) else None

    def missing(self) -> tuple[Line, float, int] | None:
        """What is to be run next, the reference's pilot first; None if all is there."""
        pilot = self.experiment.pilot_seed
        for line in (self._reference, *(line for line in self.experiment.lines if line is not self._reference)):
            for rate in self.rates(line):
                if self._row(line, rate, pilot, tested=False) is None:
                    return line, rate, pilot
            rate = self.rate(line)
            for seed in self.experiment.seeds if rate is not None else ():
                if self._row(line, rate, seed, tested=True) is None:
                    return line, rate, seed
        return None

    def reported(self, line: Line) -> list[dict[str, Any]]:
        """The rows of the reported seeds."""
        rate = self.rate(line)
        if rate is None:
            return []
        found = [self._row(line, rate, seed, tested=True) for seed in self.experiment.seeds]
        return [row for row in found if row is not None]


def carry_out(study: Study, world: World, *, until: Callable[[], bool]) -> None:
    """Makes the missing runs, one after the other."""
    while not until() and (found := study.missing()) is not None:
        line, rate, seed = found
        points = study.points() if seed != study.experiment.pilot_seed else None
        row = study.book.add(run(world, line, study.experiment.settings(line, rate, seed), points))
        last = row["validation"][-1]
        print(
            f"{study.experiment.name} {line.name} {rate:g} seed {seed}: downstream {last['downstream']:.3f} general "
            f"{last['general']:.3f} kl {last['kl']:.4f} {row['wall_s']:.0f} s",
            flush=True,
        )


# The summary


def interval(
    rows: Sequence[Row], key: str, base: Row, items: Mapping[str, int], *, draws: int = DRAWS
) -> dict[str, Any] | None:
    """Retention, score and KL over seeds at one point: mean, standard deviation, and the 95 % interval of retention.

    The interval is of a hierarchical bootstrap: seeds, then items within tasks, the base's items drawn with them
    (methods.md 12.3). None where no seed reaches the point.
    """
    found = [row["test"][key] for row in rows if key in row["test"]]
    if not found:
        return None
    skills = [name for name in items if name != "downstream"]
    ours = [{name: unpacked(test["right"][name], items[name]) for name in skills} for test in found]
    bases = {name: unpacked(base["right"][name], items[name]) for name in skills}
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(found), (draws, len(found)))
    # Of each seed and skill the mean over one draw of items for all draws at once: binomial-like, but paired with base.
    ratios = np.empty((draws, len(found)))
    for place, seed in enumerate(ours):
        tuned, kept = np.zeros(draws), np.zeros(draws)
        for name in skills:
            # Items fall into four kinds (right before or not, right after or not): a draw is a draw of their counts.
            kinds = np.bincount(2 * bases[name] + seed[name], minlength=4) / items[name]
            counts = rng.multinomial(items[name], kinds, draws)
            tuned += (counts[:, 1] + counts[:, 3]) / items[name]
            kept += (counts[:, 2] + counts[:, 3]) / items[name]
        ratios[:, place] = tuned / kept
    means = np.take_along_axis(ratios, chosen, axis=1).mean(axis=1)
    retention = [test["general"] / base["general"] for test in found]
    return {
        "seeds_that_reach_it": len(found),
        "retention": statistics.fmean(retention),
        "retention_sd": statistics.stdev(retention) if len(retention) > 1 else None,
        "retention_interval_95": [float(q) for q in np.quantile(means, (0.025, 0.975))],
        "downstream": statistics.fmean(test["downstream"] for test in found),
        "downstream_by_seed": [test["downstream"] for test in found],
        "kl": statistics.fmean(test["kl"] for test in found),
        "round": statistics.fmean(test["round"] for test in found),
        "strength": statistics.fmean(test["strength"] for test in found),
        **(
            {
                "stack_retention": statistics.fmean(t["stack"]["general"] / base["general"] for t in found),
                "stack_kl": statistics.fmean(t["stack"]["kl"] for t in found),
            }
            if all("stack" in test for test in found)
            else {}
        ),
    }


def summary(study: Study, base: Mapping[str, Any], items: Mapping[str, int]) -> dict[str, Any]:
    """The tables of an experiment, from the rows that are there."""
    points = study.points()
    if points is None:
        return {"complete": False}
    experiment, lines = study.experiment, {}
    for line in experiment.lines:
        rows = study.reported(line)
        if not rows:
            continue
        learnt = [row["test"]["last"]["downstream"] - base["test"]["downstream"] for row in rows]
        lines[line.name] = {
            "learning_rate": study.rate(line),
            "rates_tried": {f"{row['learning_rate']:g}": _learnt(row) for row in study.pilot_rows(line)},
            "seeds": [row["seed"] for row in rows],
            "trained_parameters": rows[0]["trained_parameters"],
            "upload_bytes": statistics.fmean(row["upload_bytes"] for row in rows),
            "download_bytes": statistics.fmean(row["download_bytes"] for row in rows),
            "first_round": {name: [first_at_score(row, getattr(points, name)) for row in rows] for name in POINTS},
            **{name: interval(rows, name, base["test"], items) for name in (*POINTS, "last")},
            "budgets": {
                f"{budget:g}": _budget(rows, budget, base["test"], learnt)
                for budget in experiment.budgets_nats_per_token
            },
        }
    return {
        "complete": study.missing() is None,
        "task": experiment.task,
        "reference": experiment.reference,
        "points": asdict(points),
        "base": {key: base["test"][key] for key in ("downstream", "general")},
        "lines": lines,
    }


def _budget(rows: Sequence[Row], budget: float, base: Row, learnt: Sequence[float]) -> dict[str, Any]:
    """What a line learns within a budget; the share is of its own gain without one."""
    found = [row["test"][f"budget_{budget:g}"] for row in rows]
    gains = [test["downstream"] - base["downstream"] for test in found]
    return {
        "kl_over_budget_worst": max(test["kl"] for test in found) / budget,
        "strength": [test["strength"] for test in found],
        "downstream": statistics.fmean(test["downstream"] for test in found),
        "share_of_gain": statistics.fmean(g / most if most > 0 else 0.0 for g, most in zip(gains, learnt, strict=True)),
        "retention": statistics.fmean(test["general"] / base["general"] for test in found),
    }


def headline(experiments: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The figures of the issue, over all tasks: ours at the reference's score, and our worst budget."""
    ours = {name: found["lines"]["fedbe"] for name, found in experiments.items() if "fedbe" in found.get("lines", {})}
    if not ours:
        return None
    budgets = [
        worst
        for found in experiments.values()
        for name, line in found.get("lines", {}).items()
        if name.startswith("fedbe") and "no anchor" not in name
        for worst in (budget["kl_over_budget_worst"] for budget in line["budgets"].values())
    ]
    reached = {name: line["first"] for name, line in ours.items() if line["first"] is not None}
    return {
        "retention_fedblocks": statistics.fmean(f["retention"] for f in reached.values()) if reached else None,
        "retention_by_experiment": {name: f["retention"] for name, f in reached.items()},
        "not_reached": sorted(set(ours) - set(reached)),
        "downstream_minus_fedit_points": statistics.fmean(
            100 * (line["last"]["downstream"] - experiments[name]["lines"]["fedit"]["last"]["downstream"])
            for name, line in ours.items()
        )
        if all("fedit" in experiments[name]["lines"] for name in ours)
        else None,
        "kl_over_budget_worst": max(budgets),
    }


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    parser.add_argument("experiment", nargs="*", choices=[*names, []], default=names)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--hours", type=float, default=math.inf, help="begin no run after so many hours")
    parser.add_argument("--device", type=device_named, default=CPU, help="cpu (default) or cuda: rows of its own")
    parser.add_argument(
        "--out", type=Path, help="default: methods.json of the results, on another device methods-gpu.json"
    )
    options = parser.parse_args(arguments)
    device: torch.device = options.device
    out = options.out or (FILE if device.type == "cpu" else FILE.with_name("methods-gpu.json"))
    book, began = (
        RowBook(ROWS if device.type == "cpu" else ROWS.with_name(f"rows-{device.type}.jsonl")),
        time.monotonic(),
    )
    found: dict[str, Any] = {}
    for name in options.experiment:
        experiment = load(FOLDER / f"{name}.toml")
        with tempfile.TemporaryDirectory() as cache:
            world = World.of(experiment, Path(cache), device)
            study = Study(
                experiment=experiment,
                book=book,
                base_hash=world.starter.federation.base_hash,
                base_score=world.base["validation"]["downstream"],
            )
            if not options.report:
                carry_out(study, world, until=lambda: time.monotonic() - began > 3600 * options.hours)
            sizes = {"downstream": len(world.starter.test.task)}
            sizes |= {skill: len(part) for skill, part in world.starter.test.general.items()}
            figures = summary(study, world.base, sizes)
            found[name] = {"command": f"{COMMAND} {name}", **figures, **machine(device)}
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    quality = known.get("quality", {}) | found
    entries: dict[str, Any] = {"quality": quality}
    figures = headline(quality)
    if figures is not None:
        entries["headline"] = {"command": COMMAND, **figures}
    put_entries(out, entries)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
