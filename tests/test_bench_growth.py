"""benchmarks/growth.py: what its summary says of the rows, and that it leaves other results alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import growth as bench
from methods_document import growth_table, probe_table


def row(line: str, seed: int, downstream: float, grown: list[dict[str, Any]]) -> dict[str, Any]:
    within = {"strength": 1.0, "kl": 0.01, "downstream": downstream, "retention": 0.97}
    return {
        "task": "association", "line": line, "seed": seed, "rounds": 3, "active": [3], "grown": grown,
        "downstream": downstream, "kl": 0.01, "within_budget": within, "curve": [{"accuracy": 0.1}], "seconds": 1.0,
    }  # fmt: skip


ONE = "thirds: 1 -> 2 -> 3"
EVENT = {
    "round": 9, "block": 1, "after_layer": 5, "test_downstream": 0.5,
    "logits_bit_equal": {"float32": True, "bfloat16": True},
}  # fmt: skip
SLOTS = [
    {"after_layer": layer, "block": block, "gain": gain, "cost": 0.0, "score": gain, "num_clients": 3}
    for block, layer, gain in ((0, 3, 0.1), (1, 5, 0.2))
]
PROBE = {
    "task": "association", "line": "probe", "seed": 1, "held_out": [9, 8, 7], "seconds": 1.0,
    "record": {"round": 1, "clients": ["a"], "choices": [{"block": 1, "default": 0, "slots": SLOTS}]},
}  # fmt: skip


def test_the_summary_has_every_line() -> None:
    rows = [row(ONE, 1, 0.8, [EVENT]), row(ONE, 2, 0.9, []), row("1, thirds", 1, 0.6, []), PROBE]
    found = bench.summary(rows)
    line = found["growth"]["lines"][ONE]
    assert line["downstream"]["mean"] == pytest.approx(0.85)
    assert found["growth"]["logits_bit_equal_at_every_event"] is True
    assert set(found["rollout_probe"]["one_block"]) == {"1, thirds"}
    assert found["growth"]["events"] == 1
    text = growth_table(found["growth"]) + probe_table(found["rollout_probe"])
    assert "0.850 ± 0.071" in text
    assert "9, never" in text
    assert "**5: 0.200**" in text


def test_an_event_whose_bits_differ_is_said() -> None:
    bad = {**EVENT, "logits_bit_equal": {"float32": True, "bfloat16": False}}
    found = bench.summary([row(ONE, 1, 0.8, [EVENT, bad])])
    assert found["growth"]["logits_bit_equal_at_every_event"] is False
    assert "NOT bit-equal" in growth_table(found["growth"])
