"""Why did this client get this assignment? A record for machines and a sentence for people, from the same choice."""

from __future__ import annotations

import dataclasses
from typing import Any

from fedblocks.aggregator.allocation import Choice, RunnerUp, blocks_text
from fedblocks.profiles.cost import with_special


def record(choice: Choice) -> dict[str, Any]:
    """The explanation record of docs/methods.md 6.6 as plain JSON values."""
    predicted, runner_up = choice.predicted, choice.runner_up
    return {
        "client": choice.client,
        "name": choice.name,
        "round": choice.round,
        "role": choice.role,
        "blocks": list(choice.blocks),
        "width": choice.width,
        "tau": choice.steps,
        "batch_size": choice.batch_size,
        "micro_batch_size": choice.micro_batch_size,
        "mode": None if choice.mode is None else dataclasses.asdict(choice.mode),
        "predicted": None
        if predicted is None
        else {
            "seconds": predicted.seconds,
            "step_s": predicted.step_s,
            "upload_bytes": predicted.upload_bytes,
            "download_bytes": predicted.download_bytes,
            "memory_bytes": predicted.memory_bytes,
            "largest_memory": predicted.largest_memory,
        },
        "limits": {"deadline_s": choice.limits.deadline_s, "memory_bytes": choice.limits.memory_bytes},
        "value": choice.value,
        "parts": {"gain": choice.parts.gain, "debt": choice.parts.debt, "rarity": choice.parts.rarity},
        "binding": choice.binding,
        "runner_up": None
        if runner_up is None
        else {
            "blocks": list(runner_up.blocks),
            "width": runner_up.width,
            "tau": runner_up.steps,
            "micro_batch_size": runner_up.mode.micro_batch_size,
            "mode": dataclasses.asdict(runner_up.mode),
            "value": runner_up.value,
            "why_not": runner_up.why_not,
        },
        "refused": [
            {"option": {"blocks": list(r.blocks), "width": r.width, "tau": r.steps}, "reason": r.reason, "by": r.excess}
            for r in choice.refused
        ],
        "reason": choice.reason,
        "sentence": sentence(choice),
    }


def sentence(choice: Choice) -> str:
    """One sentence, e.g. ``site-b trains blocks 0 and 1 for 16 steps: 2.1 s of 4.0 s, 11.2 MiB of 12.9 MiB; ...``."""
    if choice.role == "rest":
        return f"{choice.name} rests: {choice.reason}."
    if choice.role == "evaluate":
        return f"{choice.name} only measures: {choice.reason}."
    predicted, limits = choice.predicted, choice.limits
    assert predicted is not None
    size = predicted.mode.micro_batch_size
    passes = f", {size} of {choice.batch_size} sequences at a time" if size < choice.batch_size else ""
    text = (
        f"{choice.name} trains {blocks_text(choice.blocks, choice.width, choice.what)} for {choice.steps} steps{passes}"
        f"{with_special(predicted.mode)}: predicted "
        f"{predicted.seconds:.1f} s of {limits.deadline_s:.1f} s and {_mib(predicted.memory_bytes)} of "
        f"{_mib(limits.memory_bytes)}"
    )
    if choice.parts.rarity > 0:
        text += f"; {choice.parts.rarity:.2f} of the value {choice.value:.2f} is for topics that are rare there"
    return f"{text}; {_why(choice, choice.runner_up)}."


def _why(choice: Choice, runner_up: RunnerUp | None) -> str:
    if runner_up is None:
        return "nothing else was possible"
    what = blocks_text(runner_up.blocks, runner_up.width, choice.what)
    if runner_up.limit == "none":
        return f"no limit binds; {what} would do, but {runner_up.why_not}"
    same = (runner_up.blocks, runner_up.width) == (choice.blocks, choice.width)
    if same and runner_up.steps == choice.steps:
        what = runner_up.mode.text()
    elif runner_up.steps != choice.steps:
        what += f" for {runner_up.steps} steps"
    return f"{'memory' if runner_up.limit == 'memory' else 'the deadline'} binds: {what} would be {runner_up.why_not}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
