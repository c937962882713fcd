"""Where do the client's tests of an accelerator run? On a GPU where there is one; on the CPU to try the same code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

BASE_HASH = "0" * 64


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> Any:
    """The device under test. On the CPU the blocks take the fused form, as on a GPU."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False here")
    return torch.device(request.param)


@pytest.fixture
def make_model(tiny_checkpoint, tmp_path) -> Callable[..., Any]:
    """A factory: ``make_model(device, dtype=..., fused=True, **checkpoint)``; all models of a test share one base."""
    import torch

    from fedblocks.edge_client.backbone import Backbone
    from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
    from fedblocks.edge_client.expanded_model import ExpandedModel
    from fedblocks.protocol.expansion import plan_expansion

    torch.set_num_threads(1)
    made: dict[str, Checkpoint] = {}

    def make(device, *, dtype=torch.float32, fused=True, blocks=2, placement="thirds", state=None, **checkpoint):
        key = repr(sorted(checkpoint.items()))
        if key not in made:
            made[key] = Checkpoint.open(tiny_checkpoint(tmp_path, **{"layers": 6, **checkpoint}))
        base = made[key]
        content = base_hash(base.folder)
        plan = plan_expansion(base_hash=content, config=base.config, placement=placement, num_blocks=blocks)
        backbone = Backbone.open(base, tmp_path / f"cache-{base.folder.name}", base_hash=content, device=device)
        model = ExpandedModel(backbone=backbone, checkpoint=base, plan=plan, state=state, dtype=dtype)
        if device.type == "cpu":
            model._specs = [replace(spec, fused=fused) for spec in model._specs]
        return model

    return make


@pytest.fixture
def samples() -> list[Any]:
    """Twelve samples of unequal length whose last tokens are targets."""
    from fedblocks.edge_client.samples import TokenisedSample

    rng = np.random.default_rng(0)
    found = []
    for _ in range(12):
        n = int(rng.integers(6, 20))
        mask = np.zeros(n, dtype=bool)
        mask[-4:] = True
        found.append(TokenisedSample(ids=rng.integers(4, 128, n).astype(np.int32), label_mask=mask))
    return found
