"""Tests of where a model lies and of the fused form of its blocks: every tensor on one device, the same numbers."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from fedblocks.edge_client.anchor import TeacherRecord
from fedblocks.edge_client.decoder_block import BlockSpec, BlockWeights, block_forward
from fedblocks.edge_client.expanded_model import ExpandedModel, ParamGroup
from fedblocks.edge_client.optimizer import AdamW
from fedblocks.edge_client.rotary import Rotary
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.train import anchor_batch, task_batch
from fedblocks.kernels import ops
from fedblocks.protocol.expansion import shape_from_config

torch.set_num_threads(1)

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
FAMILIES = {"llama": {}, "qwen2": {"model_type": "qwen2"}, "qwen3": {"model_type": "qwen3", "head_dim": 16}}


def a_block(family="llama", dtype=torch.float64, device="cpu"):
    config = {**CONFIG, **FAMILIES[family]}
    shape = shape_from_config(config)
    rotary = Rotary(config, shape.head_dim, dtype, torch.device(device))
    weights = BlockWeights.empty(shape, dtype, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    for tensor in weights.tensors().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.2)
    return BlockSpec(shape=shape, eps=1e-5), weights, rotary


def forward_and_gradients(spec, weights, rotary, x, rows):
    leaves = replace(weights, lora={}).as_leaves()
    x = x.detach().clone().requires_grad_()
    y = block_forward(x, leaves, spec, rotary, rows)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: t.grad for name, t in leaves.tensors().items()}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [None, torch.tensor([2, 3, 6, 12])])
def test_the_fused_form_of_a_block_has_the_output_and_every_gradient_of_the_plain_one(family, rows):
    spec, weights, rotary = a_block(family)
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = forward_and_gradients(spec, weights, rotary, x, rows)
    fused = forward_and_gradients(replace(spec, fused=True), weights, rotary, x, rows)
    assert plain.keys() == fused.keys()
    for name, expected in plain.items():
        assert torch.allclose(fused[name], expected, rtol=1e-10, atol=1e-12), name


def test_zero_output_projections_leave_the_fused_block_an_identity_with_gradients_in_them_alone():
    spec, weights, rotary = a_block()
    for tensor in weights.out_tensors():
        tensor.zero_()
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = forward_and_gradients(replace(spec, fused=True), weights, rotary, x, None)
    assert torch.equal(found.pop("y"), x)
    found.pop("x")
    moving = {name for name, gradient in found.items() if gradient.abs().max() > 0}
    assert moving == {"o", "down"}


def test_a_frozen_packed_block_is_fused_without_a_gradient_of_its_weights():
    spec, weights, rotary = a_block(dtype=torch.float32)
    stored = {
        name: ops.quantize_nf4(tensor) if tensor.dim() == 2 else tensor
        for name, tensor in weights.named(spec.shape).items()
    }
    packed = BlockWeights.packed(spec.shape, stored, torch.float32)
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))
    results = []
    for fused in (False, True):
        leaf = x.clone().requires_grad_()
        y = block_forward(leaf, packed, replace(spec, fused=fused), rotary)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_fused_form_keeps_what_the_memory_model_counts_and_no_more():
    """runtime.md 4.3: x_in, x_mid, q, k, v, o, lse, gate, up and two numbers a row; nothing of the norms' results."""
    spec, weights, rotary = a_block(dtype=torch.float32)
    leaves = weights.as_leaves()
    kept = {False: 0, True: 0}
    x = torch.randn(2, 7, 64).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (*leaves.tensors().values(), *rotary.tables(7))}
    for fused in kept:
        storages = {}

        def pack(tensor, storages=storages):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = block_forward(x, leaves, replace(spec, fused=fused), rotary)
        kept[fused] = sum(storages.values())
        del y
    tokens, hidden, q, kv, inner, heads = 14, 64, 64, 32, 128, 4
    counted = tokens * 4 * (2 * hidden + 2 * q + 2 * kv + 2 * inner + heads + 2)
    repeated = tokens * 4 * 2 * (q - kv)  # keys and values of a group, once for each of its queries' heads
    assert kept[True] <= counted + repeated + tokens * 4 * (q + 2 * kv)  # torch's CPU attention keeps a layout's copy
    assert kept[True] < 0.8 * kept[False]


def test_a_training_step_on_an_accelerator_meets_no_tensor_of_another_device():
    """The device "meta" stands in: its tensors have no data, and an operation between it and a CPU is an error."""
    spec, weights, rotary = a_block(dtype=torch.float32, device="meta")
    with pytest.raises(RuntimeError, match=r"not on the expected device|on the same device"):
        block_forward(torch.empty(2, 7, 64, device="meta"), a_block(dtype=torch.float32)[1], spec, rotary)
    for fused in (False, True):
        leaves = weights.as_leaves()
        x = torch.empty(2, 7, 64, device="meta", requires_grad=True)
        y = block_forward(x, leaves, replace(spec, fused=fused, window=3), rotary).flatten(0, 1)
        h = ops.rms_norm(y, torch.empty(64, device="meta"), 1e-5)
        head = torch.empty(96, 64, device="meta")
        loss = ops.linear_cross_entropy(h, head, torch.empty(14, dtype=torch.int64, device="meta"), 0.1)
        loss = loss + ops.linear_kl_topk(h, head, *ops.top_k(h.detach(), head, 8), 0.1)
        loss.backward()
        assert {t.grad.device.type for t in (x, *leaves.tensors().values())} == {"meta"}


def test_batches_lie_where_their_inputs_do():
    record = TeacherRecord(ids=torch.zeros(3, 2, dtype=torch.int64), logp=torch.zeros(3, 2), log_tail=torch.zeros(3))
    sample = TokenisedSample(ids=np.arange(4, dtype=np.int32), label_mask=np.array([False, True, True, False]))
    inputs = torch.empty(1, 4, 64, device="meta")
    for batch in (task_batch([sample], inputs), anchor_batch([record], inputs)):
        assert {getattr(batch, field.name).device.type for field in fields(batch)} == {"meta"}


def test_an_optimizer_of_tensors_on_an_accelerator_keeps_its_state_there():
    high = torch.empty(300, device="meta", dtype=torch.bfloat16).requires_grad_()
    low = torch.empty(300, device="meta", dtype=torch.int16)
    group = ParamGroup(name="block 0", tensors=(high,), lows=(low,), named={})
    for mode in ("split", "split_8bit"):
        optimizer = AdamW([group], mode=mode)
        optimizer.begin()
        (high * 2).sum().backward()
        moments = optimizer._slots[0]._moments
        assert {moments.m.device.type, moments.v.device.type, optimizer._slots[0].gradient.device.type} == {"meta"}
        optimizer.close()


@pytest.mark.parametrize("residency", ["resident", "suffix"])
@pytest.mark.parametrize("frozen", ["decoded", "nf4"])
def test_a_whole_model_on_an_accelerator_runs_with_every_way_of_holding_it(residency, frozen, make_model):
    on_cpu = make_model(dtype=torch.bfloat16)
    on_cpu.backbone.device = torch.device("meta")
    model = ExpandedModel(
        backbone=on_cpu.backbone, checkpoint=on_cpu.checkpoint, plan=on_cpu.plan, dtype=torch.bfloat16
    )
    model.hold(residency=residency, frozen=frozen)
    groups = model.train_blocks(model.plan.block_ids, "split")
    h = model.forward(torch.zeros(2, 8, dtype=torch.int64))
    target = torch.zeros(16, dtype=torch.int64, device="meta")
    ops.linear_cross_entropy(model.final_rows(h.flatten(0, 1)), model.head, target, 1.0).backward()
    assert {t.device.type for group in groups for t in (*group.tensors, *group.lows)} == {"meta"}
    assert {t.grad.device.type for group in groups for t in group.tensors} == {"meta"}
