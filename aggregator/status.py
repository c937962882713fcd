"""Where does a run stand? Read from the ledger, beside a running aggregator or without one; nothing is written.

``run_status`` gives the JSON of ``fedblocks status --json`` (keys: docs/cli.md):

``run_id, base_name, base_hash, method``; ``phase`` (never_served, running, stopped, finished), ``round``,
``max_rounds, version, state_sha256, stop_reason, waiting_for``; the newest round's ``score, accuracy, nll_per_token,
retention, kl, kl_budget, kl_over_budget, anchor_weight, next_active_blocks, growth_refused, spent, coverage,
coverage_weight, eta_s``; ``clients`` (one record each, see :func:`_client`), ``rounds`` (the records of
metrics.jsonl), ``notes`` (``unix_s, text``), ``final`` (null or the record of final.json), ``probe`` (null or the
newest table of an adaptive run) and ``strangers`` (refusals
of keys that never were members, by code).
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fedblocks.aggregator.ledger import Ledger, StoredClient, StoredRound, is_made, naming_damage, open_read_only
from fedblocks.aggregator.progress import forgetting_text
from fedblocks.aggregator.registry import client_from_record
from fedblocks.aggregator.run_folder import RunFolder, read_run_folder
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol.messages import Assignment, ClientKey

FOLLOW_INTERVAL_S: Final = 2.0
_SECONDS: Final = re.compile(r"\b\d+ s\b")
_OF_LAST_ROUND: Final = (
    "score",
    "accuracy",
    "nll_per_token",
    "retention",
    "kl",
    "kl_over_budget",
    "epsilon",
    "anchor_weight",
    "next_active_blocks",
    "growth_refused",
    "spent",
    "coverage",
    "coverage_weight",
    "eta_s",
)


def run_status(run: Path, *, newest_rounds: int | None = None) -> dict[str, Any]:
    """The state of the run as JSON values.

    Args:
        newest_rounds: so many of ``rounds``; default: all.

    Raises:
        RunFolderError, ConfigError: ``run`` is no run folder.
        LedgerError: the ledger was written by another release, or is damaged.
    """
    folder = read_run_folder(run)
    status: dict[str, Any] = {
        "run_id": folder.info.run_id,
        "base_name": folder.info.base_name,
        "base_hash": folder.info.base_hash,
        "method": folder.config.run.method,
        "max_rounds": folder.config.run.max_rounds,
        "kl_budget": folder.config.forgetting.budget,
        "forgetting": folder.config.forgetting.name,
        "max_epsilon": folder.config.privacy.max_epsilon if folder.config.privacy.noise_multiplier > 0 else None,
    }
    if not is_made(folder.ledger_path):
        nothing = dict.fromkeys(_OF_LAST_ROUND)
        never = {"phase": "never_served", "round": 0, "version": 0, "state_sha256": None, "stop_reason": None}
        rest: dict[str, Any] = {
            "waiting_for": "",
            "clients": [],
            "rounds": [],
            "notes": [],
            "probe": None,
            "final": None,
            "strangers": {},
        }
        return {**status, **never, **nothing, **rest}
    ledger = open_read_only(folder.ledger_path)
    try:
        with naming_damage(folder.ledger_path):
            return {**status, **_served(folder, ledger, newest_rounds)}
    finally:
        ledger.close()


def follow(
    run: Path,
    render: Callable[[dict[str, Any]], str],
    *,
    interval_s: float = FOLLOW_INTERVAL_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """What ``render`` makes of the state of the run now, and again at each change, until the run is finished.

    A number of seconds (left of a wait, silent for) is no change.

    Raises:
        RunFolderError, ConfigError, LedgerError: as :func:`run_status`.
    """
    before = None
    while True:
        status = run_status(run)
        text = render(status)
        gist = _SECONDS.sub("", text)
        if gist != before:
            yield text
            before = gist
        if status["phase"] == "finished":
            return
        sleep(interval_s)


def _served(folder: RunFolder, ledger: Ledger, newest_rounds: int | None) -> dict[str, Any]:
    last = ledger.last_round()
    folded = ledger.folded_metrics(newest=newest_rounds)
    final = ledger.get_run("final")
    newest: dict[str, Any] = folded[-1] if folded else {}
    refusals = ledger.refusals()
    said = ledger.last_refusals()
    # As served: an override of the command line does not stand in run.toml.
    after = ledger.get_run("quarantine_after")
    quarantined = ledger.quarantined(folder.config.server.quarantine_after if after is None else after)
    if final is not None:
        phase = "finished"
    else:
        phase = "running" if is_served(folder.path) else "stopped"
    return {
        "phase": phase,
        "round": last.round if last is not None and last.kind != "final" else newest.get("round", 0),
        "version": final["version"] if final is not None else newest.get("version", 0),
        "state_sha256": final["state_sha256"] if final is not None else newest.get("state_sha256"),
        "stop_reason": newest.get("stop_reason"),
        "waiting_for": (ledger.get_run("waiting_for") or "") if phase == "running" else "",
        **{name: newest.get(name) for name in _OF_LAST_ROUND},
        "clients": [
            _client(
                client,
                last,
                ledger,
                newest,
                refusals.get(client.client_key, {}),
                said.get(client.client_key),
                quarantined,
            )
            for client in ledger.clients()
        ],
        "rounds": folded,
        "notes": [{"unix_s": unix_s, "text": text} for unix_s, text in ledger.notes()],
        "probe": ledger.get_run("probe"),
        "final": final,
        "strangers": refusals.get(ClientKey(""), {}),
    }


def _client(
    client: StoredClient,
    last: StoredRound | None,
    ledger: Ledger,
    newest: Mapping[str, Any],
    refusals: Mapping[str, int],
    last_refusal: str | None,
    quarantined: frozenset[ClientKey],
) -> dict[str, Any]:
    """One client: who it is, its task in the newest round, how its last finished round went, its refusals."""
    record = client.record
    tasks = [] if last is None else [a for a in ledger.assignments(last.round) if a.client_key == client.client_key]
    task = tasks[-1] if tasks else None
    train = task.message if task is not None and isinstance(task.message, Assignment) else None
    planned: list[dict[str, Any]] = last.plan["choices"] if last is not None and last.plan is not None else []
    choice = next((c for c in planned if c["client"] == client.client_key), None)
    finished = next((c for c in newest.get("clients", []) if c["key"] == client.client_key), None)
    known = client_from_record(record).calibration
    return {
        "name": client.name,
        "key": client.client_key,
        "device": record["profile"]["device"],
        "num_examples": record["statistics"]["num_examples"],
        "joined_unix_s": client.joined_unix_s,
        "held_version": record["held_version"],
        "time_scale": known.level if known is not None else None,
        "step_time_error": known.error if known is not None else None,
        "memory_scale": record["memory_scale"],
        "role": choice["role"] if choice is not None else None,
        "attempt_id": task.message.attempt_id if task is not None else None,
        "outcome": task.outcome if task is not None else None,
        "detail": task.detail if task is not None else "",
        "blocks": list(train.blocks) if train is not None else [],
        "steps": train.steps if train is not None else 0,
        "predicted_seconds": train.predicted_seconds if train is not None else None,
        "predicted_peak_bytes": train.predicted_peak_bytes if train is not None else None,
        "binding": choice["binding"] if choice is not None else None,
        "reason": choice["reason"] if choice is not None else "not in this round's cohort",
        "last_round": finished,
        "bytes_up": record["received_bytes"],
        "bytes_down": record["sent_bytes"],
        "refusals": dict(refusals),
        "last_refusal": last_refusal,
        "quarantined": client.client_key in quarantined,
    }


def _places(probe: Mapping[str, Any]) -> Iterator[str]:
    """The newest probe's slots, the chosen ones marked."""
    for choice in probe["choices"]:
        slots = [
            f"{'*' if slot['block'] == choice['block'] else ''}after layer {slot['after_layer']} {slot['score']:.4f}"
            for slot in choice["slots"]
        ]
        yield f"block {choice['block']} (round {probe['round']}; scores: {', '.join(slots)})"


def is_served(run: Path) -> bool:
    """True while a process serves the folder."""
    try:
        descriptor = os.open(run / "serve.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def describe(status: Mapping[str, Any]) -> str:
    """The status as lines for people."""
    lines = [f"run {status['run_id']} on {status['base_name']}: {status['phase'].replace('_', ' ')}"]
    if status["phase"] == "never_served":
        return "\n".join([*lines, "start it with: fedblocks serve RUN"])
    values = [f"round {status['round']}/{status['max_rounds']}", f"version {status['version']}"]
    for name, form in (("accuracy", ".3f"), ("nll_per_token", ".3f"), ("retention", ".3f")):
        if status[name] is not None:
            values.append(f"{name.replace('_', ' ')} {status[name]:{form}}")
    if status["kl"] is not None:
        values.append(forgetting_text(status))
    if status["epsilon"] is not None:
        values.append(f"epsilon {status['epsilon']:.2f}")
    lines.append("  ".join(values))
    for row in status["rounds"]:
        after = row.get("next_active_blocks", ())  # rows of older releases have none
        if row.get("active_blocks", after) != after:
            new = ", ".join(str(block) for block in after if block not in row["active_blocks"])
            lines.append(f"grew after round {row['round']}: block {new}; active blocks are {list(after)}")
    if status["probe"] is not None:
        lines += [f"placed by probe: {line}" for line in _places(status["probe"])]
    if status["growth_refused"]:
        lines.append(f"not grown: {status['growth_refused']}")
    for client in status["clients"]:
        what = f"trains {client['blocks']} for {client['steps']} steps" if client["steps"] else client["role"] or "-"
        parts = [f"  {client['name']:20} {client['device']:24} {what}"]
        if client["outcome"] is not None:
            parts.append(client["outcome"])
        done = client["last_round"]
        if done is not None and done.get("mode") is not None:  # rows of older releases have none
            parts.append(f"last {done['step_s']:.3g} s a step, {ExecutionMode(**done['mode']).text()}")
            if client["step_time_error"] is not None:
                parts.append(f"predictions of its steps are off by {client['step_time_error']:.0%}")
            parts += done.get("kernel_falls", ())[:1]
        if client["refusals"]:
            counts = ", ".join(f"{code} {count}" for code, count in client["refusals"].items())
            parts.append(f"refused: {counts}")
        if client["quarantined"]:
            parts.append(f"in quarantine until: fedblocks keys release RUN {client['name']}")
        lines.append("  ".join(parts))
    if status["stop_reason"] is not None:
        lines.append(f"stop reason: {status['stop_reason']}")
    if status["waiting_for"]:
        lines.append(f"waiting for {status['waiting_for']}")
    return "\n".join(lines)
