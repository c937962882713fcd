"""Factories for the numeric core: tiny models over tiny checkpoints, samples, assignments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

BASE_HASH = "0" * 64


@pytest.fixture
def make_model(tiny_checkpoint, tmp_path) -> Callable[..., Any]:
    """A factory: ``make_model(blocks=2, placement="thirds", nf4=True, state=None, **checkpoint)``."""
    import torch

    from fedblocks.edge_client.backbone import Backbone, DenseBackbone
    from fedblocks.edge_client.checkpoint import Checkpoint
    from fedblocks.edge_client.expanded_model import ExpandedModel
    from fedblocks.protocol.expansion import plan_expansion

    torch.set_num_threads(1)
    made: dict[str, Checkpoint] = {}

    def make(*, blocks=2, placement="thirds", nf4=True, state=None, dtype=torch.float32, **checkpoint):
        key = repr(sorted(checkpoint.items()))
        if key not in made:
            made[key] = Checkpoint.open(tiny_checkpoint(tmp_path, **checkpoint))
        base = made[key]
        plan = None
        if blocks:
            plan = plan_expansion(base_hash=BASE_HASH, config=base.config, placement=placement, num_blocks=blocks)
        backbone = (
            Backbone.open(base, tmp_path / f"cache-{base.folder.name}", base_hash=BASE_HASH)
            if nf4
            else DenseBackbone(base, BASE_HASH)
        )
        return ExpandedModel(backbone=backbone, checkpoint=base, plan=plan, state=state, dtype=dtype)

    return make


@pytest.fixture
def make_samples() -> Callable[..., list[Any]]:
    """A factory of samples whose last tokens are targets."""
    from fedblocks.edge_client.samples import TokenisedSample

    def make(count=24, vocab=128, shortest=6, longest=12, targets=3, seed=0):
        rng = np.random.default_rng(seed)
        samples = []
        for _ in range(count):
            n = int(rng.integers(shortest, longest + 1))
            mask = np.zeros(n, dtype=bool)
            mask[-targets:] = True
            samples.append(TokenisedSample(ids=rng.integers(4, vocab, n).astype(np.int32), label_mask=mask))
        return samples

    return make


@pytest.fixture
def random_state() -> Callable[..., dict[int, dict[str, np.ndarray]]]:
    """A factory of accumulated deltas that touch every tensor of every block."""

    def make(model, scale=0.05, seed=0):
        rng = np.random.default_rng(seed)
        return {
            block: {
                spec.name: (scale * rng.standard_normal(spec.shape)).astype(np.float32)
                for spec in model.shape.block_tensors()
            }
            for block in model.plan.block_ids
        }

    return make


@pytest.fixture
def make_assignment() -> Callable[..., Any]:
    """A factory of assignments with the defaults of methods.md 14, small."""
    from fedblocks.protocol.messages import Assignment, AttemptId, StateUpdate

    def make(**fields):
        defaults = {
            "attempt_id": AttemptId("a"),
            "round": 0,
            "state": StateUpdate(encoding="none", from_version=0, to_version=0, state_sha256=""),
            "payload_bytes": 0,
            "payload_sha256": "",
            "blocks": (0, 1),
            "steps": 6,
            "batch_size": 4,
            "anchor_batch_size": 2,
            "anchor_every": 1,
            "anchor_weight": 0.0,
            "learning_rate": 3e-3,
            "warmup_steps": 3,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.99,
            "adam_eps": 1e-8,
            "optimizer_mode": "fp32",
            "micro_batch_size": 4,
            "checkpoint_activations": False,
            "delta_format": "int8",
            "delta_density": 0.25,
            "seed": 3,
            "deadline_s": 100.0,
            "memory_budget_bytes": 0,
            "predicted_peak_bytes": 0,
            "predicted_seconds": 0.0,
            "measure": (),
        }
        return Assignment(**{**defaults, **fields})

    return make
