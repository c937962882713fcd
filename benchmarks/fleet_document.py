"""Writes the fleets' part of docs/results.md from fleet.json: ``python benchmarks/fleet_document.py``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any, Final

from demos_document import PAGE, replace_part
from starter_runs import RESULTS

MARK: Final = "benchmarks/fleet_document.py"
SETS: Final = {
    "ladder_default": "Who gets what: ours as it comes, each arm with the deadline that it computes itself",
    "ladder": "The same with one deadline for all, and whole blocks only",
    "slim": "Slim blocks",
    "data_term": "The data term",
}
ARMS: Final = {
    "fitted": "fitted: by hardware and need (ours)",
    "uniform": "uniform: all blocks for everybody",
    "weakest": "weakest: everybody what the weakest can",
    "slim": "slim blocks allowed (the default)",
    "whole": "whole blocks only",
    "weighed": "rare topics weighed, gamma 0.5",
    "unweighed": "not weighed (the default)",
    "random": "random: any option that fits",
}
MIB: Final = 1 << 20


def comparison(name: str, found: Mapping[str, Any]) -> str:
    """One set of arms: time to the target, and the ratios to the first arm."""
    rows = [_arm(ARMS.get(arm, arm), figures) for arm, figures in found["arms"].items()]
    ratios = "\n".join(_ratio(ARMS.get(arm, arm), one) for arm, one in found["speedups"].items())
    return f"""### {SETS[name]}

| arm | reached | virtual s to the target, by seed | rounds | score, mean of the last three rounds | MB up and down |
|---|---|---|---|---|---|
{chr(10).join(rows)}

{ratios}"""


def _arm(label: str, figures: Mapping[str, Any]) -> str:
    seeds = len(figures["virtual_s_to_target"])
    times = ", ".join("-" if t is None else f"{t:.0f}" for t in figures["virtual_s_to_target"])
    rounds = ", ".join("-" if r is None else str(r) for r in figures["rounds_to_target"])
    scores = ", ".join(f"{s:.3f}" for s in figures["score_mean_of_last_3"])
    megabytes = statistics.fmean(figures["bytes_up_and_down"]) / 1e6
    return f"| {label} | {figures['reached']} of {seeds} | {times} | {rounds} | {scores} | {megabytes:.0f} |"


def _ratio(label: str, one: Mapping[str, Any]) -> str:
    if one["mean"] is None:
        return f"* {label}: no ratio ({one['why']})."
    low, high = one["interval_95"]
    bound = (
        f"; a lower bound, since seeds {one['lower_bounds_at_seeds']} never got there"
        if one["lower_bounds_at_seeds"]
        else ""
    )
    return (
        f"* {label}: {one['mean']:.2f} times as long as the first row (seeds {one['low']:.2f} to {one['high']:.2f}, 95 % "
        f"interval of the mean over resampled seeds {low:.2f} to {high:.2f}{bound})."
    )


def robust(found: Mapping[str, Any]) -> str:
    """Dropouts and stragglers."""
    blocks = found["blocks_covered"]
    shares = ", ".join(f"{share:.0%}" for share in found["updates_accepted_share"])
    return f"""### Dropouts and stragglers

30 % of all tasks end because the client vanishes, 20 % take ten times as long, against the same fleet undisturbed (seeds
{found["seeds"]}, 16 rounds). Finished: {"every run" if found["finished"] else "NOT every run"}. Score lost: {found["score_loss_points"]:+.1f} points in the mean,
{found["score_loss_points_worst"]:+.1f} at worst. Updates accepted of those assigned: {shares}; tasks lost {found["tasks_lost"]}.
Blocks that were trained: {", ".join(map(str, blocks))}."""


def many(found: Mapping[str, Any]) -> str:
    """What a large fleet takes of this machine."""
    rows = [
        f"| {name.removeprefix('clients_')} | {one['rounds']} | {one['wall_s']:.0f} | {one['cpu_s']:.0f} | "
        f"{one['peak_own_bytes'] / MIB:.0f} |"
        for name, one in found.items()
        if name.startswith("clients_")
    ]
    return f"""### What a simulation takes

`fedblocks simulate`, {found["workers"]} worker processes, {found["device"]}, other work on the machine (so the wall time is an
upper bound). Memory is that of all its processes that they share with nobody: {found["own_bytes_per_client"] / MIB:.1f} MiB a client.

| clients | rounds | wall s | CPU s | peak memory, MiB |
|---|---|---|---|---|
{chr(10).join(rows)}"""


def cost_model(found: Mapping[str, Any]) -> str:
    """Predicted against measured steps."""
    return f"""### Predicted and measured steps

{found["configurations"]} configurations of three models on this machine (process CPU time, one thread); the factors of the cost model are fitted
on {found["configurations"] - found["configurations_not_used_for_fitting"]} of them and held against the other {found["configurations_not_used_for_fitting"]}: median error {found["step_time_median_error"]:.1%}, worst {found["step_time_worst_error"]:.0%}.
One factor for the whole device: {found["step_time_median_error_one_scale"]:.0%}; the probe alone: {found["step_time_median_error_probe_only"]:.0%}.
A second draw was predicted less well; [allocation.md](allocation.md) says how both came about."""


def parts_of(content: Mapping[str, Any]) -> list[str]:
    """The sections, of what has been measured."""
    parts = [
        """## Fleets: allocation, robustness, size

`python benchmarks/bench_ladder.py`, `bench_cost_model.py` and `bench_fleet.py`; every number in benchmarks/results/fleet.json. Twenty
clients on the four tiers of the ladder (docs/simulate.md), 40 % of them in each round, non-IID rows (Dirichlet 0.5; 0.1 for the
data term), the bundled model's frozen task; all arms of a seed have the same cohorts and straggler rule. Times are
virtual: the learning curve is the small model's, seconds and bytes are those of Qwen2.5-0.5B on those devices. The target is a
mean over three rounds of the pooled accuracy on held-out rows; not reaching it is said, never imputed."""
    ]
    parts += [comparison(name, content[name]) for name in SETS if name in content]
    parts += [
        writer(content[name])
        for name, writer in (("robust", robust), ("many200", many), ("cost_model", cost_model))
        if name in content
    ]
    return parts


def main() -> None:
    """Replaces the part of docs/results.md."""
    content: Mapping[str, Any] = json.loads((RESULTS / "fleet.json").read_text(encoding="utf-8"))
    replace_part(PAGE, MARK, parts_of(content))


if __name__ == "__main__":
    main()
