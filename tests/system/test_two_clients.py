"""One aggregator and two clients, each its own process, over CURVE: the whole chain on a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LOAD_WITHOUT_FEDBLOCKS = """
import sys
sys.modules["fedblocks"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
logits = model(torch.tensor([[1, 5, 9, 11]])).logits
assert torch.isfinite(logits).all()
print(model.config.num_hidden_layers)
"""


@pytest.fixture
def finished(consortium):
    """A run of two rounds in format fp32, to its end."""
    c = consortium("run.max_rounds=2", "training.steps=4", "delta.format=fp32", "expansion.blocks=1")
    c.serve()
    c.join("site-1")
    c.join("site-2", "--evaluate")
    assert c.wait("aggregator") == 0, c.text("aggregator")
    assert c.wait("site-1", 30) == 0, c.text("site-1")
    assert c.wait("site-2", 30) == 0, c.text("site-2")
    return c


@pytest.mark.slow
def test_two_client_processes_train_and_the_export_loads_without_fedblocks(finished, tmp_path):
    c = finished
    rounds = c.metrics()
    assert [r["num_accepted"] for r in rounds] == [2, 2]
    assert all(r["general_nll_per_token"] is not None for r in rounds[1:])

    out = tmp_path / "export"
    done = subprocess.run(
        c.command("export", str(c.run), "--model", str(c.model), "--out", str(out)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = subprocess.run([sys.executable, "-c", LOAD_WITHOUT_FEDBLOCKS, str(out)], capture_output=True, text=True)
    assert loaded.stdout.strip() == "5", loaded.stderr

    sent = [json.loads(line) for line in next(c.home("site-1").glob("*/sent.jsonl")).read_text().splitlines()]
    kinds = {line["kind"] for line in sent}
    assert {"hello", "fetch", "delta", "heartbeat"} <= kinds
    assert not any("xx" in line["what"] or "yy" in line["what"] for line in sent)

    status = subprocess.run(c.command("status", str(c.run), "--json"), capture_output=True, text=True)
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["phase"] == "finished"
