"""A client whose machine has torch alone: no bitsandbytes, no triton, no NVML. Each test is a process of its own.

The packages are hidden from Python's finder of files, as if they were not installed, in child processes as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HIDDEN = ("bitsandbytes", "triton", "pynvml", "liger_kernel", "peft", "transformers")
HIDE = f"""
import importlib.machinery as machinery
found = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {HIDDEN!r} else found(name, path, target)
machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
TRAIN = """
import importlib.util, json, sys, time
from pathlib import Path
for name in {hidden!r}:
    assert importlib.util.find_spec(name) is None, name
import numpy as np
import torch
torch.set_num_threads(1)
from fedblocks.edge_client import client, session, work
from fedblocks.edge_client.backbone import Backbone
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore
from fedblocks.edge_client.train import Hyper, run_steps, stack_losses, task_batch
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.kernels.ops import DISPATCHER
from fedblocks.protocol.expansion import plan_expansion
folder, cache, device = Path(sys.argv[1]), Path(sys.argv[2]), torch.device(sys.argv[3])
checkpoint = Checkpoint.open(folder)
plan = plan_expansion(base_hash="0" * 64, config=checkpoint.config, placement="thirds", num_blocks=2)
backbone = Backbone.open(checkpoint, cache, base_hash="0" * 64, device=device)
model = ExpandedModel(backbone=backbone, checkpoint=checkpoint, plan=plan, dtype=torch.bfloat16)
model.hold(residency="suffix", frozen="nf4")
sample = TokenisedSample(ids=np.arange(4, 24, dtype=np.int32), label_mask=np.arange(20) >= 10)
prefix = PrefixStates(model, RecordStore(cache / "prefix", warn=print))
prefix.fill([sample.ids])
def windows():
    while True:
        yield [task_batch([sample], prefix.padded([sample.ids]))]
result = run_steps(
    groups=model.train_blocks(plan.block_ids, "split"), optimizer_mode="split", losses=stack_losses(model, prefix.cut),
    task=windows(), anchor=(), hyper=Hyper(steps=3, learning_rate=3e-3), now=time.monotonic, status=lambda *_: None,
)
print(json.dumps({{
    "losses": result.task_loss, "quantiser": backbone.quantiser, "falls": [str(event) for event in DISPATCHER.counts],
    "loaded": sorted(set({hidden!r}) & set(sys.modules)),
}}))
"""
PROBE = """
import sys
from pathlib import Path
from fedblocks.profiles.probe import probe, to_json
print(to_json(probe(budget_s=4.0, folder=Path(sys.argv[1]), threads=1)))
"""


@pytest.fixture
def lean(tmp_path):
    """``lean(script, *arguments)``: what the script printed, in JSON, without those packages and without nvidia-smi."""
    site, bin_folder = tmp_path / "site", tmp_path / "bin"
    site.mkdir()
    bin_folder.mkdir()
    (site / "sitecustomize.py").write_text(HIDE)
    spy = bin_folder / "nvidia-smi"
    spy.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nexit 9\n")
    spy.chmod(0o755)

    def run(script, *arguments):
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(site),
                "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
            },
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert not (tmp_path / "asked").exists(), "nvidia-smi was called"
        return json.loads(done.stdout[done.stdout.index("{") :])

    return run


def test_a_client_trains_with_torch_alone(device, lean, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(tmp_path, layers=3)
    found = lean(TRAIN.format(hidden=HIDDEN), folder, tmp_path / "cache", device.type)
    assert found["quantiser"] == "fedblocks reference"
    assert found["losses"][-1] < found["losses"][0]
    assert found["loaded"] == []
    if device.type == "cpu":
        assert found["falls"] == []


def test_the_probe_needs_neither_nvml_nor_nvidia_smi(device, lean, tmp_path):
    found = lean(PROBE, tmp_path)
    values = {item["name"]: item for item in found["items"]}
    assert values["gemm_float32_flops_per_s"]["value"] > 0
    assert values["memory_usable_bytes"]["value"] > 0
    assert "bitsandbytes is not installed" in found["profile"]["four_bit"]
    if device.type == "cuda":
        assert found["profile"]["accelerator"] == "cuda"
        assert "sm_" in found["profile"]["device"]
