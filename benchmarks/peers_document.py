"""Writes the measured part of docs/peers.md from peers.json: ``python benchmarks/peers_document.py``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from demos_document import replace_part
from starter_runs import RESULTS

PAGE: Final = Path(__file__).parents[1] / "docs" / "peers.md"
MARK: Final = "benchmarks/peers_document.py"
NAMES: Final = {
    "bare_curve": "bare ZeroMQ with CURVE",
    "bare_plain": "bare ZeroMQ, not encrypted",
    "ours_fp32": "ours, fp32",
    "ours_int8": "ours, int8, all rows",
    "nvflare": "NVFlare, simulator",
    "flower": "Flower",
}
TARGETS: Final = {
    "fp32_over_bare_curve": ("ours, fp32, over bare ZeroMQ with CURVE", 1.5),
    "fp32_over_flower": ("ours, fp32, over Flower", 1 / 2),
    "int8_over_flower": ("ours, int8, over Flower", 1 / 6),
    "int8_over_nvflare": ("ours, int8, over NVFlare's simulator", 1.0),
    "fp32_over_nvflare": ("ours, fp32, over NVFlare's simulator", None),
}
"""Ratio -> what it is, and what was promised."""
DEATHS: Final = {
    "dead_client": "a client dies in mid-round, for good",
    "dead_client_min_nodes_1": "the same, where one node is enough (Flower: `min_available_nodes=1`)",
    "server_killed": "the server's process alone, started again after 2 s",
    "box_killed": "everything on the server's machine, started again after 2 s",
}
SYSTEMS: Final = {"ours": "ours", "flower": "Flower", "nvflare": "NVFlare"}
MB: Final = 1e6


def rounds(found: Mapping[str, Any], title: str) -> str:
    """One size: a line per system."""
    lines = "\n".join(_line(name, found) for name in NAMES if name in found["legs"])
    return f"""## {title}

{found["clients"]} clients, {found["rounds"]} counted rounds in a pass, passes: {found["passes"]}; all systems take turns in each. Seconds of a round:
median of all counted ones, then every one. CPU: seconds of all processes of a leg, start and end included, and of the
server's side. Memory: highest sum of the proportional set sizes seen, two looks a second; of ours it
counts the updates' files while they are mapped.

| system | encrypted | round, s | all rounds, s | CPU, s | server's CPU, s | server, MB | all clients, MB | processes | load average at the start |
|---|---|---|---|---|---|---|---|---|---|
{lines}"""


def _line(name: str, found: Mapping[str, Any]) -> str:
    legs: Sequence[Mapping[str, Any]] = found["legs"][name]
    if not all(leg["result_ok"] for leg in legs):
        raise ValueError(f"{name}: a result was wrong; a round that gives a wrong result has no time")
    every = "; ".join(" ".join(f"{seconds:.3g}" for seconds in leg["round_s"][1:]) for leg in legs)
    cells = [
        NAMES[name],
        "yes" if legs[0]["encrypted"] else "no",
        f"{found['median_round_s'][name]:.3g}",
        every,
        f"{_median(legs, 'cpu_s'):.0f}",
        f"{_median(legs, 'server_cpu_s'):.1f}",
        f"{_median(legs, 'server_peak_pss_bytes') / MB:.0f}",
        f"{_median(legs, 'clients_peak_pss_bytes') / MB:.0f}",
        str(max(leg["most_processes"] for leg in legs)),
        " ".join(f"{leg['load_average']:.1f}" for leg in legs),
    ]
    return "| " + " | ".join(cells) + " |"


def _median(legs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.median(leg[key] for leg in legs)


def targets(found: Mapping[str, Any]) -> str:
    """What was promised for a round of 25 MB, and what was measured."""
    lines = [f"| {label} | {_target(limit, found[key])} |" for key, (label, limit) in TARGETS.items() if key in found]
    return f"""| ratio of median rounds of 25 MB | at most | measured | |
|---|---|---|---|
{chr(10).join(lines)}"""


def _target(limit: float | None, measured: float) -> str:
    if limit is None:
        return f"- | {measured:.3g} | no target"
    return f"{limit:.3g} | {measured:.3g} | {'met' if measured <= limit else 'not met'}"


def bad_inputs(found: Mapping[str, Mapping[str, str]]) -> str:
    """Case by system."""
    lines = [f"| {case} | {_ours(one['ours'])} | {one['flower']} | {one['nvflare']} |" for case, one in found.items()]
    return f"""## A bad update, stock averaging

Three clients send x = [1, 1] with weight 1, a fourth what the line says (values of 9 where it says nothing of them). A right
mean without the fourth is [1, 1].

| the fourth client's update | ours | Flower, `FedAvg` | NVFlare, `WeightedAggregationHelper` behind its `FedAvg`'s weights |
|---|---|---|---|
{chr(10).join(lines)}"""


def _ours(code: str) -> str:
    return code if code == "accepted" else f"refused, `{code}`"


def crashes(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per death and system."""
    lines = [
        f"| {label} | {SYSTEMS[name]} | {_end(one)} | {_counts(one['accepted_by_round'])} | {max(one['round_s']):.0f} | {one['observed_s']:.0f} |"
        for key, label in DEATHS.items()
        for name in SYSTEMS
        if (one := found.get(f"{key}:{name}")) is not None
    ]
    return f"""## Deaths in the middle of a run

Two clients, 2 MB, no training. "Watched" is the time from the death to the end of the run, or to the end of our patience.

| who dies | system | what came of the run | updates counted in each round | longest finished round, s | watched, s |
|---|---|---|---|---|---|
{chr(10).join(lines)}"""


def _counts(accepted: Sequence[int]) -> str:
    return " ".join(str(one) for one in accepted)


def _end(one: Mapping[str, Any]) -> str:
    done = f"{one['rounds_done']} of {one['rounds']} rounds"
    if one["ended"]:
        bits = {True: ", same bits as undisturbed", False: ", other bits than undisturbed"}
        return f"ended well, {done}" + bits.get(one.get("same_bits_as_undisturbed"), "")
    if "status" in one:
        done += f", it says `{one['status']}`"
    if one.get("exit_code") is not None:
        done += f", exit code {one['exit_code']}"
    return f"had not ended well when we stopped watching, {done}"


def parts_of(content: Mapping[str, Any]) -> list[str]:
    """The measured part of the page."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    parts = [f"`{content['command']}`; {content['device']}; {versions}."]
    if "rounds" in content:
        parts += [rounds(content["rounds"], "A round of 25 MB, down and up"), targets(content["rounds"])]
    if "tiny" in content:
        parts.append(rounds(content["tiny"], "A round of 9 kB: what a round costs by itself"))
    if "bad_inputs" in content:
        parts.append(bad_inputs(content["bad_inputs"]))
    if "crashes" in content:
        parts.append(crashes(content["crashes"]))
    return parts


def main() -> None:
    """Replaces the measured part of docs/peers.md."""
    replace_part(PAGE, MARK, parts_of(json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
