"""Does growth pay, and does the rollout probe find a better place for a block? On the starter model's frozen task.

    PYTHONPATH=benchmarks python benchmarks/growth.py                runs what is missing, for at most --minutes
    PYTHONPATH=benchmarks python benchmarks/growth.py --report       only the summary, from the rows that are there

In process, with the deployed functions: the client's model over 4-bit layers, step loop, anchor and delta encoding; the
aggregator's fold, published steps, controller, growth rule (``aggregator/growth.py``) and choice of a slot
(``aggregator/placement.py``, ``edge_client/rollout.py``). Half of the sites train in each round, all active blocks.
A tenth of each site's examples is held out and gives the score that the growth rule looks at; what is reported is the
test split. A run without growth is the same run to the bit up to the round in which the other one grows.

Rows: runs/bench/growth/rows.jsonl, one a finished run. Summary: ``growth`` and ``rollout_probe`` in
benchmarks/results/methods.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from experiments import FILE
from starter_runs import RowBook, Starter, frozen, machine, put_entries, share_right

from fedblocks.aggregator import growth, run_rules
from fedblocks.aggregator.aggregation import AcceptedUpdate, NormHistory, fold
from fedblocks.aggregator.cohort import choose_cohort
from fedblocks.aggregator.placement import (
    PROBE_ANCHORS,
    PROBE_CLIENTS,
    PROBE_EXAMPLES,
    PROBE_STEPS,
    PROBE_STRENGTHS,
    PROBE_WARMUP,
)
from fedblocks.aggregator.probing import place
from fedblocks.aggregator.registry import KnownClient
from fedblocks.edge_client.anchor import Teacher
from fedblocks.edge_client.backbone import DenseBackbone
from fedblocks.edge_client.evaluate import evaluate_examples, kl_full, measure_anchor
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore
from fedblocks.edge_client.rollout import Bench, rollout
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.train import (
    AnchorBatch,
    Hyper,
    TaskBatch,
    anchor_batch,
    data_order,
    run_steps,
    stack_losses,
    task_batch,
)
from fedblocks.fleet_file import Group
from fedblocks.profiles.catalog_files import scale_factor
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol.expansion import ExpansionPlan, Placement, plan_expansion
from fedblocks.protocol.messages import AttemptId, ClientKey, DataStatistics, Measurement, Probe, ProbeRow, StateUpdate
from fedblocks.protocol.run_config import RunConfig, from_mapping
from fedblocks.protocol.state import publish
from fedblocks.protocol.tensors import State, encode_delta
from fedblocks.simulation import assumed_profile

ROWS: Final = Path("runs/bench/growth/rows.jsonl")
COMMAND: Final = "PYTHONPATH=benchmarks python benchmarks/growth.py"
TASK: Final = "association"
SEEDS: Final = (1, 2, 3)
STEPS, BATCH, ANCHOR_BATCH, ANCHOR_EVERY = 8, 16, 1, 2
TRAIN_ANCHORS: Final = 64
"""Anchor sequences that train, of 224: what the base says of them is computed once."""
RATE: Final = 1e-2
MAX_KL: Final = 0.03
COHORT: Final = 0.5
"""Share of the sites that train in a round."""
KL_VAL_SEQUENCES: Final = 8
KL_TEST_SEQUENCES: Final = 32
DEVICE: Final = "jetson-orin-nx-16gb"
"""Whose step times the choice of a slot goes by, scaled to the starter model as ``simulate`` scales it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One kind of run."""

    name: str
    placement: Placement
    start: tuple[int, ...]
    """Active blocks at the start."""
    most: int
    """Blocks that it may come to have; 0: that of the start."""
    rounds: int = 36
    decay: Literal["linear", "constant"] = "linear"
    """Of the learning rate over the rounds."""
    without: str = ""
    """Name of the line that goes on without growth from where this one first grows."""


LONG: Final[dict[str, Any]] = {"placement": "top", "rounds": 60, "decay": "constant"}
LINES: Final = {
    line.name: line
    for line in (
        Line(name="top: 1 -> 2 -> 3", start=(0,), most=3, without="top: 1", **LONG),
        Line(name="top: 3", start=(0, 1, 2), most=0, **LONG),
        Line(name="top: 2 -> 3", start=(0, 1), most=3, without="top: 2", **LONG),
        Line(name="thirds: 1 -> 2 -> 3", placement="thirds", start=(0,), most=3, without="1, thirds"),
        Line(name="1, top", placement="top", start=(0,), most=0),
        Line(name="thirds: 2 -> 3", placement="thirds", start=(0, 1), most=3, without="thirds: 2"),
        Line(name="thirds: 3", placement="thirds", start=(0, 1, 2), most=0),
    )
}
"""Blocks on top have the least to work with, and soon stand still; those of ``thirds`` learn for longer."""


def config_of(line: Line, seed: int) -> RunConfig:
    """The run.toml of such a run."""
    return from_mapping(
        {
            "run": {"max_rounds": line.rounds, "seed": seed},
            "expansion": {"placement": line.placement, "blocks": len(line.start), "max_blocks": line.most},
            "training": {
                "learning_rate": RATE,
                "round_decay": line.decay,
                "steps": STEPS,
                "batch_size": BATCH,
                "anchor_batch_size": ANCHOR_BATCH,
                "anchor_every": ANCHOR_EVERY,
            },
            "forgetting": {"max_kl": MAX_KL},
            "delta": {"density": 1.0, "down_density": 1.0},
        }
    )


@dataclass(slots=True, kw_only=True, eq=False)
class Sites:
    """What all runs share: sites with their held-out tenth, hidden states by cut, the teacher's records."""

    starter: Starter
    train: list[tuple[TokenisedSample, ...]]
    held_out: list[tuple[TokenisedSample, ...]]
    states: dict[int, RecordStore] = field(default_factory=dict)
    records: RecordStore = field(
        default_factory=lambda: RecordStore(Path(), location="ram", max_bytes=1 << 32, warn=print)
    )

    @classmethod
    def of(cls, starter: Starter) -> Sites:
        """Every tenth example of a site is held out."""
        sites = starter.federation.sites
        return cls(
            starter=starter,
            train=[tuple(s for i, s in enumerate(site) if i % 10) for site in sites],
            held_out=[site[::10] for site in sites],
        )

    def model(self, plan: ExpansionPlan, dtype: torch.dtype = torch.float32) -> ExpandedModel:
        """The client's, over 4-bit layers."""
        federation = self.starter.federation
        return ExpandedModel(
            backbone=federation.nf4_backbone(), checkpoint=federation.checkpoint, plan=plan, dtype=dtype
        )

    def prefix(self, model: ExpandedModel) -> PrefixStates:
        """Cached for all runs with this cut."""
        if model.base_cut not in self.states:
            self.states[model.base_cut] = RecordStore(Path(), location="ram", max_bytes=1 << 32, warn=print)
        return PrefixStates(model, self.states[model.base_cut])

    def teacher(self, model: ExpandedModel, prefix: PrefixStates) -> Teacher:
        return Teacher(anchors=self.starter.federation.anchors, model=model, prefix=prefix, store=self.records)


class Run:
    """A federation that may grow, round by round."""

    def __init__(self, sites: Sites, line: Line, seed: int) -> None:
        federation = sites.starter.federation
        self.sites, self.line, self.seed = sites, line, seed
        self.config = config_of(line, seed)
        self.plan = plan_expansion(
            base_hash=federation.base_hash,
            config=federation.checkpoint.config,
            placement=line.placement,
            num_blocks=self.config.most_blocks if line.most else max(line.start) + 1,
        )
        self.state = run_rules.initial_state(self.config)
        self.state = replace(self.state, growth=growth.GrowthState(active=line.start))
        self.published: State = {}
        self.owed: State = {}
        self.residuals: dict[int, State] = {}
        self.history: NormHistory = {}
        self.round = 0
        self.last_chosen = dict.fromkeys(map(_key, range(len(sites.train))), 0)
        self.curve: list[dict[str, Any]] = []
        self.grown: list[dict[str, Any]] = []
        self._use(line.start)

    def _use(self, active: tuple[int, ...]) -> None:
        self.active = active
        self.model = self.sites.model(self.plan.reduced(active))
        self.model.hold(residency="resident", frozen="decoded")
        self.prefix = self.sites.prefix(self.model)
        self.teacher = self.sites.teacher(self.model, self.prefix)
        for samples in (*self.sites.train, *self.sites.held_out):
            self.prefix.fill([sample.ids for sample in samples])

    def fork(self, line: Line) -> Run:
        """The same run from here on under another line; values are replaced in a run, never written into."""
        other = copy.copy(self)
        other.line, other.config = line, config_of(line, self.seed)
        other.residuals, other.curve, other.grown = dict(self.residuals), list(self.curve), []
        return other

    def step(self) -> bool:
        """One round; True if the rule asks for a block at its end."""
        self.round += 1
        self.model.load_state(self.published)
        held = [sample for samples in self.sites.held_out for sample in samples]
        scores = evaluate_examples(self.model, held, self.prefix)
        sequences = list(self.teacher.anchors.kl_val_indices)[:KL_VAL_SEQUENCES]
        kl = measure_anchor(self.model, self.teacher, sequences, self.prefix)
        pooled = run_rules.pool(
            [
                (ClientKey("all"), Measurement(measure="validation", version=self.round, **asdict(scores))),
                (
                    ClientKey("all"),
                    Measurement(
                        measure="anchor",
                        version=self.round,
                        num_items=len(sequences),
                        kl_sum=kl.kl_sum,
                        num_tokens=kl.num_tokens,
                        kl_square_sum=kl.square_sum,
                    ),
                ),
            ],
            version=self.round,
        )
        weight = self.state.anchor_weight
        self.state = run_rules.observe(self.state, pooled, self.config)
        cohort = choose_cohort(self.last_chosen, fraction=COHORT, round=self.round, seed=self.seed)
        self.last_chosen = {**self.last_chosen, **dict.fromkeys(cohort, self.round)}
        updates = [self._update(client, weight) for client in range(len(self.sites.train)) if _key(client) in cohort]
        folded = fold(updates, shape=self.plan.units, history=self.history)
        self.history = folded.history
        self.state = run_rules.after_fold(self.state, updates, folded, None, self.active)
        made = publish(
            self.published, folded.aggregate, self.owed, shape=self.plan.units.published(), format="int8", density=1.0
        )
        self.published, self.owed = made.published, made.residual
        self.curve.append(
            {
                "round": self.round,
                "active": list(self.active),
                "accuracy": pooled.accuracy,
                "nll": pooled.nll,
                "kl": pooled.kl,
                "anchor_weight": weight,
            }
        )
        block = growth.next_block(self.plan, self.active, self.config.most_blocks)
        wants = growth.wants_block(self.state.growth, round=self.round, kl=pooled.kl, max_kl=MAX_KL)
        return block is not None and wants and self.round < self.line.rounds

    def _update(self, client: int, anchor_weight: float) -> AcceptedUpdate:
        """One site's round, as the client does it."""
        self.model.load_state(self.published)
        groups = self.model.train_blocks(self.active)
        seed = run_rules.draw(self.seed, self.round, client)
        rate = run_rules.learning_rate(self.config, self.round)
        run_steps(
            groups=groups,
            losses=stack_losses(self.model, self.prefix.cut),
            task=self._windows(self.sites.train[client], seed),
            anchor=self._anchors(seed + 1),
            hyper=Hyper(
                steps=STEPS,
                learning_rate=rate,
                warmup_steps=run_rules.warmup_steps(STEPS, self.active, self.state.seen),
                anchor_weight=anchor_weight,
                anchor_every=ANCHOR_EVERY,
            ),
            now=time.monotonic,
            status=lambda *_: None,
        )
        encoded = encode_delta(
            self.plan.units,
            self.active,
            self.model.deltas(groups),
            self.residuals.get(client, {}),
            format="int8",
            density=1.0,
            cap=3 * rate * STEPS,
        )
        self.residuals[client] = encoded.residuals
        payload = memoryview(b"".join(encoded.parts))
        return AcceptedUpdate(
            client=_key(client),
            attempt_id=AttemptId(f"{self.round}-{client}"),
            num_examples=len(self.sites.train[client]),
            steps=STEPS,
            staleness=0,
            format="int8",
            density=1.0,
            tensors=encoded.headers,
            read_payload=lambda: payload,
        )

    def _windows(self, samples: Sequence[TokenisedSample], seed: int) -> Iterator[list[TaskBatch]]:
        for window in data_order(len(samples), BATCH, seed):
            chosen = [samples[i] for i in window]
            yield [task_batch(chosen, self.prefix.padded([sample.ids for sample in chosen]))]

    def _anchors(self, seed: int) -> Iterator[list[AnchorBatch]]:
        part, sequences = self.teacher.anchors.train_indices[:TRAIN_ANCHORS], self.teacher.anchors.sequences
        for window in data_order(len(part), ANCHOR_BATCH, seed):
            chosen = [part[i] for i in window]
            self.teacher.fill(chosen)
            yield [anchor_batch(self.teacher.records(chosen), self.prefix.padded([sequences[i] for i in chosen]))]

    def grow(self) -> None:
        """The next block of the placement; the logits before and after are compared bit by bit, fp32 and bf16."""
        block = growth.next_block(self.plan, self.active, self.config.most_blocks)
        assert block is not None
        after = growth.with_block(self.state.growth, self.active, block, round=self.round)
        equal = {name: self._same_logits(after.active, dtype) for name, dtype in DTYPES.items()}
        self.grown.append(
            {
                "round": self.round,
                "block": block,
                "after_layer": self.plan.block(block).after_layer,
                "logits_bit_equal": equal,
                "test_downstream": self.downstream(),
            }
        )
        self.state = replace(self.state, growth=after, rounds_since_best=0)
        self._use(after.active)

    @torch.no_grad()
    def _same_logits(self, active: tuple[int, ...], dtype: torch.dtype) -> bool:
        ids = torch.zeros(16, 48, dtype=torch.int64)
        for row, text in zip(ids, self.sites.starter.test.texts, strict=False):
            row[: min(48, len(text))] = torch.from_numpy(text[:48].astype("int64"))
        found: list[torch.Tensor] = []
        for blocks in (self.active, active):
            model = self.sites.model(self.plan.reduced(blocks), dtype)
            model.load_state(self.published)
            found.append(model.rows_logits(model.forward(ids).flatten(0, 1)))
        return torch.equal(*found)

    def dense(self) -> ExpandedModel:
        """The published blocks over the unquantised base, as an export has them but for its rounding."""
        federation = self.sites.starter.federation
        backbone = DenseBackbone(federation.checkpoint, federation.base_hash)
        model = ExpandedModel(backbone=backbone, checkpoint=federation.checkpoint, plan=self.plan.reduced(self.active))
        model.load_state(self.published)
        return model

    def downstream(self) -> float:
        return share_right(self.dense(), self.sites.starter.test.task)

    def row(self, seconds: float) -> dict[str, Any]:
        """The figures at the end: at strength 1, and at the largest strength of the grid within the budget."""
        starter, model = self.sites.starter, self.dense()
        strength, kl = 1.0, self._kl(model)
        figures = {"downstream": share_right(model, starter.test.task), "kl": kl}
        while strength > 0.05 and kl > MAX_KL:
            strength = round(strength - 0.1, 1)
            model.set_strength(strength)
            kl = self._kl(model)
        skills = starter.test.skills(model)
        return {
            "task": TASK,
            "line": self.line.name,
            "seed": self.seed,
            "rounds": self.round,
            "decay": self.line.decay,
            "active": [self.plan.block(b).after_layer for b in self.active],
            "grown": self.grown,
            **figures,
            "within_budget": {
                "strength": strength,
                "kl": kl,
                "downstream": share_right(model, starter.test.task),
                "retention": statistics.fmean(skills.values()) / statistics.fmean(starter.base_test.values()),
            },
            "curve": self.curve,
            "seconds": seconds,
        }

    def _kl(self, model: ExpandedModel) -> float:
        starter = self.sites.starter
        sums = kl_full(starter.base, model, starter.test.texts[:KL_TEST_SEQUENCES])
        return sums.kl_sum / sums.num_tokens


def _key(client: int) -> ClientKey:
    return ClientKey(f"{client:03d}")


DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run_line(sites: Sites, line: Line, seed: int) -> list[dict[str, Any]]:
    """A run to its end, and its twin that does not grow."""
    began = time.monotonic()
    run, twin = Run(sites, line, seed), None
    while run.round < line.rounds:
        if not run.step():
            continue
        if twin is None and line.without:
            twin = run.fork(replace(line, name=line.without, most=0, without=""))
        run.grow()
    rows = [run.row(time.monotonic() - began)]
    if line.without:
        began = time.monotonic()
        if twin is None:  # it never grew: it is its own twin
            twin = run.fork(replace(line, name=line.without, most=0, without=""))
        while twin.round < line.rounds:
            twin.step()
        rows.append(twin.row(time.monotonic() - began))
    return rows


def probe_row(sites: Sites, seed: int) -> dict[str, Any]:
    """What the three largest sites find, and where the first block goes."""
    began = time.monotonic()
    line = Line(name="probe", placement="adaptive", start=(0,), most=1)
    config = config_of(line, seed)
    federation = sites.starter.federation
    plan = plan_expansion(
        base_hash=federation.base_hash, config=federation.checkpoint.config, placement="adaptive", num_blocks=1
    )
    profile = assumed_profile(Group(device=DEVICE, count=1, examples=1), scale_factor(plan.shape))
    sizes = sorted(range(len(sites.train)), key=lambda k: -len(sites.train[k]))[:PROBE_CLIENTS]
    tables: list[tuple[ClientKey, tuple[ProbeRow, ...]]] = []
    clients: dict[ClientKey, KnownClient] = {}
    for k in sizes:
        key, samples = ClientKey(f"{k:03d}"), sites.train[k]
        tokens = [len(sample.ids) for sample in samples]
        clients[key] = KnownClient(
            key=key,
            name=f"site {k}",
            software="",
            profile=profile,
            statistics=DataStatistics(
                num_examples=len(samples),
                num_target_tokens=sum(int(sample.label_mask.sum()) for sample in samples),
                mean_tokens=statistics.fmean(tokens),
                max_tokens=max(tokens),
            ),
            can_evaluate_general=False,
            held_version=0,
        )
        task = Probe(
            attempt_id=AttemptId("probe"),
            round=1,
            state=StateUpdate(encoding="none", from_version=0, to_version=0, state_sha256=""),
            payload_bytes=0,
            payload_sha256="",
            candidates=plan.block_ids,
            strengths=PROBE_STRENGTHS,
            num_examples=PROBE_EXAMPLES,
            num_anchor_sequences=PROBE_ANCHORS,
            steps=PROBE_STEPS,
            batch_size=BATCH,
            anchor_batch_size=ANCHOR_BATCH,
            anchor_weight=1.0,
            learning_rate=RATE,
            warmup_steps=PROBE_WARMUP,
            weight_decay=config.training.weight_decay,
            clip_norm=config.training.clip_norm,
            adam_beta1=config.training.adam_beta1,
            adam_beta2=config.training.adam_beta2,
            adam_eps=config.training.adam_eps,
            seed=run_rules.draw(seed, 1, "probe"),
            deadline_s=600.0,
            memory_budget_bytes=0,
        )

        def bench(block: int) -> Bench:
            model = sites.model(plan.reduced((block,)))
            prefix = sites.prefix(model)
            mode = ExecutionMode(micro_batch_size=BATCH)
            return Bench(model=model, prefix=prefix, teacher=sites.teacher(model, prefix), mode=mode)

        rows = rollout(
            task,
            bench_with=bench,
            state={},
            data=samples,
            held_out=sites.held_out[k],
            now=time.monotonic,
            status=lambda *_: None,
        )
        tables.append((key, rows))
    run = run_rules.Run(
        run_id="growth",
        config=config,
        plan=plan,
        anchor_sequences=len(federation.anchors.sequences),
        anchor_tokens=max(map(len, federation.anchors.sequences)),
    )
    placed = place(run, run_rules.initial_state(config), tables, clients, round=1)
    return {
        "task": TASK,
        "line": "probe",
        "seed": seed,
        "record": placed.record,
        "held_out": [len(sites.held_out[k]) for k in sizes],
        "seconds": time.monotonic() - began,
    }


def jobs() -> Iterator[tuple[str, int]]:
    """In the order of what matters: every seed of a line before the next line."""
    first, *rest = LINES
    for name in ("probe", first, "1, probe", *rest):
        for seed in SEEDS:
            yield name, seed


def carry_out(sites: Sites, name: str, seed: int, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one job."""
    if name == "probe":
        return [probe_row(sites, seed)]
    if name in LINES:
        return run_line(sites, LINES[name], seed)
    found = next(row for row in rows if row["line"] == "probe" and row["seed"] == seed)
    block = found["record"]["choices"][0]["block"]
    return run_line(sites, Line(name=name, placement="adaptive", start=(block,), most=0), seed)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and spread over the seeds of each line, growth by growth, and the probe's tables."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["line"], []).append(row)
    probes = lines.pop("probe", [])
    settings = {
        "task": TASK,
        "steps": STEPS,
        "batch_size": BATCH,
        "anchor_batch_size": ANCHOR_BATCH,
        "anchor_every": ANCHOR_EVERY,
        "train_anchors": TRAIN_ANCHORS,
        "learning_rate": RATE,
        "max_kl": MAX_KL,
        "density": 1.0,
        "seeds": list(SEEDS),
        "clients": 8,
        "cohort_fraction": COHORT,
    }

    def of(line: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        def spread(values: Sequence[float]) -> dict[str, float]:
            return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}

        return {
            "seeds": [row["seed"] for row in line],
            "downstream": spread([row["downstream"] for row in line]),
            "kl": spread([row["kl"] for row in line]),
            "within_budget": {
                key: spread([row["within_budget"][key] for row in line])
                for key in ("strength", "kl", "downstream", "retention")
            },
            "downstream_by_seed": [row["downstream"] for row in line],
            "rounds": line[0]["rounds"],
            "round_decay": line[0].get("decay", "linear"),
            "blocks_after_layers": [row["active"] for row in line],
            "grown": [row["grown"] for row in line],
            "held_out_accuracy_by_seed": [[point["accuracy"] for point in row["curve"]] for row in line],
        }

    of_growth = {name: of(line) for name, line in lines.items() if name != "1, probe"}
    arms = {name: of(line) for name, line in lines.items() if name.startswith("1, ")}
    events = [event for row in rows for event in row.get("grown", ())]
    return {
        "growth": {
            "command": COMMAND,
            "settings": settings,
            "events": len(events),
            "logits_bit_equal_at_every_event": bool(events)
            and all(all(event["logits_bit_equal"].values()) for event in events),
            "lines": of_growth,
            **machine(),
        },
        "rollout_probe": {
            "command": COMMAND,
            "settings": {**settings, "device_of_step_times": DEVICE},
            "tables": [{"seed": row["seed"], "held_out_examples": row["held_out"], **row["record"]} for row in probes],
            "one_block": arms,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only the summary, from the rows that are there")
    parser.add_argument("--minutes", type=float, default=20.0, help="begin no further run after so many minutes")
    options = parser.parse_args()
    book = RowBook(ROWS)
    if not options.report:
        assert TASK in frozen()["tasks"]
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as cache:
            sites = Sites.of(Starter(TASK, cache=Path(cache)))
            for name, seed in jobs():
                if any(row["line"] == name and row["seed"] == seed for row in book.rows):
                    continue
                if time.monotonic() - began > 60 * options.minutes:
                    print("the time is up; start again to go on", flush=True)
                    break
                for row in carry_out(sites, name, seed, book.rows):
                    book.add(row)
                    print(json.dumps({k: v for k, v in row.items() if k not in ("curve", "record")}), flush=True)
    put_entries(FILE, summary(book.rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
