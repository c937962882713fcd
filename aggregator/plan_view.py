"""Who trains what, and why? The last planned round of a run, or a plan for devices that nobody has connected yet."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedblocks.aggregator import explain, run_rules
from fedblocks.aggregator.allocation import AllocationClient, plan_round
from fedblocks.aggregator.coverage import Coverage
from fedblocks.aggregator.ledger import is_made, open_read_only
from fedblocks.aggregator.run_folder import read_run_folder
from fedblocks.profiles import catalog_files
from fedblocks.protocol.codec import to_plain
from fedblocks.protocol.messages import ClientKey, DataStatistics
from fedblocks.protocol.run_config import ConfigError


def last_plan(run: Path) -> dict[str, Any]:
    """``{"round", "deadline", "choices": [explanation records]}`` of the newest round in the ledger.

    Raises:
        RunFolderError, ConfigError: ``run`` is no run folder.
        ConfigError: no round has been planned yet.
    """
    folder = read_run_folder(run)
    nothing = ConfigError(
        f"{run} has not planned a round yet; name devices to plan for, e.g. --device {catalog_files.names()[0]}"
    )
    if not is_made(folder.ledger_path):
        raise nothing
    try:
        ledger = open_read_only(folder.ledger_path)
    except sqlite3.Error as error:
        raise ConfigError(f"{folder.ledger_path}: {error}") from error
    try:
        for stored in reversed(ledger.rounds()):
            if stored.kind == "train":
                return {"round": stored.round, **stored.plan}
    finally:
        ledger.close()
    raise nothing


def plan_for_devices(
    run: Path, devices: Sequence[str], *, num_examples: int, tokens: int, overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The first round as it would be planned for these catalog devices, each with the same amount of data.

    Args:
        num_examples: training examples per device.
        tokens: tokens per example; half of them are taken to be targets.

    Raises:
        CatalogError: a device is not in the catalog.
        RunFolderError, ConfigError: ``run`` is no run folder, or an override cannot be used.
    """
    folder = read_run_folder(run, overrides)
    whole = run_rules.Run(
        run_id=folder.info.run_id,
        config=folder.config,
        plan=folder.plan,
        anchor_sequences=folder.info.anchor_sequences,
        anchor_tokens=folder.info.anchor_tokens,
    )
    of_run = run_rules.grown(whole, run_rules.initial_state(folder.config))
    statistics = DataStatistics(
        num_examples=num_examples,
        num_target_tokens=num_examples * tokens // 2,
        mean_tokens=float(tokens),
        max_tokens=tokens,
    )
    clients = [
        AllocationClient(
            key=ClientKey(f"{i:03d}"),
            name=name,
            profile=catalog_files.load(name),
            statistics=statistics,
            versions_behind=0,
        )
        for i, name in enumerate(devices)
    ]
    planned = plan_round(
        clients,
        layout=of_run.layout,
        shape=of_run.plan.shape,
        settings=of_run.allocation_settings(),
        coverage=Coverage.of(of_run.plan.unit_ids),
        round=0,
    )
    return {
        "round": 0,
        "active_blocks": list(of_run.plan.block_ids),
        "deadline": to_plain(planned.deadline),
        "choices": [explain.record(choice) for choice in planned.choices],
    }
