"""Does a client that trains with the kernels follow the one that trains without them? Two blocks and a head."""

import os
from dataclasses import replace

import pytest
import torch

from fedblocks.edge_client.decoder_block import BlockSpec, BlockWeights, block_forward
from fedblocks.edge_client.expanded_model import ParamGroup
from fedblocks.edge_client.optimizer import AdamW
from fedblocks.edge_client.rotary import Rotary
from fedblocks.kernels import ops
from fedblocks.kernels.ops import DISPATCHER
from fedblocks.profiles.model_shape import ModelShape

RUNG = os.environ["FEDBLOCKS_TEST_RUNG"]
DEVICE = torch.device("cpu" if RUNG == "interpreter" else "cuda")
SHAPE = ModelShape(
    family="qwen2",
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=48,
    tied_embeddings=True,
    qkv_bias=True,
)
STEPS = 12 if RUNG == "interpreter" else 40


def random(*shape, seed, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) * spread).float()


def losses(backend, fused, dtype, mode):
    """The loss of every step, of a model that begins with zero output projections, as an expanded block does."""
    rotary = Rotary({"rope_theta": 10000.0, "max_position_embeddings": 64}, SHAPE.head_dim, dtype, DEVICE)
    spec = BlockSpec(shape=SHAPE, eps=1e-6, fused=fused)
    groups, blocks = [], []
    for index in range(2):
        values = BlockWeights.empty(SHAPE, torch.float32)
        for number, (name, tensor) in enumerate(values.tensors().items()):
            if name in ("o", "down"):
                tensor.zero_()
            else:
                tensor.copy_(random(*tensor.shape, seed=10 * index + number, spread=1.0 if tensor.dim() == 1 else 0.1))
        lows = None
        if mode == "fp32":
            leaves = BlockWeights(**{n: t.to(DEVICE) for n, t in values.tensors().items()}).as_leaves()
        else:
            halves = {name: ops.split_fp32(tensor) for name, tensor in values.tensors().items()}
            leaves = BlockWeights(**{name: high.to(DEVICE) for name, (high, _) in halves.items()}).as_leaves()
            lows = tuple(low.to(DEVICE) for _, low in halves.values())
        blocks.append(leaves)
        groups.append(
            ParamGroup(
                name=f"block {index}",
                tensors=tuple(leaves.tensors().values()),
                lows=lows or (),
                decayed=leaves.out_tensors(),
                named={},
            )
        )
    x = random(4, 11, 64, seed=1).to(DEVICE, dtype)
    head, norm = random(48, 64, seed=2, spread=0.3).to(DEVICE, dtype), torch.ones(64, device=DEVICE, dtype=dtype)
    rows = torch.tensor([i for i in range(44) if i % 11 > 5], device=DEVICE)
    target = torch.randint(48, (len(rows),), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    record = ops.top_k(random(len(rows), 64, seed=4).to(DEVICE, dtype), head, 8)
    optimizer = AdamW(groups, mode=mode)
    optimizer.begin()
    found = []
    with DISPATCHER.demanding(backend):
        for _ in range(STEPS):
            h = block_forward(x, blocks[0], spec, rotary)
            h = ops.rms_norm(block_forward(h, blocks[1], spec, rotary, rows), norm, 1e-6)
            loss = ops.linear_cross_entropy(h, head, target, 1 / len(rows))
            loss = loss + ops.linear_kl_topk(h, head, *record, 0.1 / len(rows))
            loss.backward()
            optimizer.clip_norm(1.0)
            optimizer.step(1e-2)
            optimizer.zero_grad()
            found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("dtype", "mode", "tolerance"),
    [
        (torch.float32, "fp32", 1e-4),
        pytest.param(
            torch.bfloat16,
            "split",
            2e-2,
            marks=pytest.mark.skipif(RUNG == "interpreter", reason="the interpreter's bf16 is cut off, not rounded"),
        ),
        pytest.param(
            torch.bfloat16,
            "split_8bit",
            2e-2,
            marks=pytest.mark.skipif(RUNG == "interpreter", reason="the interpreter's bf16 is cut off, not rounded"),
        ),
    ],
)
def test_the_client_with_kernels_follows_the_loss_curve_of_the_client_without(dtype, mode, tolerance):
    plain = losses("torch", False, dtype, mode)
    fused = losses("pack" if RUNG == "pack" else "triton", True, dtype, mode)
    assert plain[-1] < 0.6 * plain[0]  # it learns, so that there is a curve to follow
    assert max(abs(a - b) / a for a, b in zip(plain, fused, strict=True)) < tolerance


def test_frozen_blocks_pass_the_same_gradient_down_with_kernels_as_without():
    values = BlockWeights.empty(SHAPE, torch.float32)
    for number, tensor in enumerate(values.tensors().values()):
        tensor.copy_(random(*tensor.shape, seed=number, spread=0.2))
    stored = {
        name: ops.quantize_nf4(t).to(DEVICE) if t.dim() == 2 else t.to(DEVICE)
        for name, t in values.named(SHAPE).items()
    }
    packed = BlockWeights.packed(SHAPE, stored, torch.float32)
    rotary = Rotary({"rope_theta": 10000.0, "max_position_embeddings": 64}, SHAPE.head_dim, torch.float32, DEVICE)
    spec = BlockSpec(shape=SHAPE, eps=1e-6)
    results = []
    for backend, fused in (("torch", False), ("pack" if RUNG == "pack" else "triton", True)):
        x = random(2, 9, 64, seed=1).to(DEVICE).requires_grad_()
        with DISPATCHER.demanding(backend):
            y = block_forward(x, packed, replace(spec, fused=fused), rotary)
            (y * random(*y.shape, seed=2).to(DEVICE)).sum().backward()
        results.append((y.detach(), x.grad))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
