"""Does the topmost block give the same rows, whether all of them are computed or only those that are wanted?"""

from __future__ import annotations

import pytest
import torch

from fedblocks.edge_client.decoder_block import BlockWeights, block_forward
from fedblocks.edge_client.train import stack_losses, task_batch

SIZE, LENGTH = 3, 12


def rows_of(kind: str) -> torch.Tensor:
    """Flat indices into SIZE·LENGTH."""
    rows = {
        "all": list(range(SIZE * LENGTH)),
        "one": [LENGTH + 5],
        "trailing": [i * LENGTH + t for i in range(SIZE) for t in range(8, LENGTH)],
        "ragged": [0, 3, 7, LENGTH + 11, 2 * LENGTH + 1, 2 * LENGTH + 2, 2 * LENGTH + 9, 2 * LENGTH + 11],
        "first": [0],
    }
    return torch.tensor(rows[kind])


@pytest.fixture(
    params=[
        {},
        {"family": "qwen2"},
        {"family": "qwen3"},
        {"kv_heads": 1},
        {"family": "mistral", "config": {"sliding_window": 4}},
    ],
    ids=["llama", "qwen2", "qwen3", "one-kv-head", "window"],
)
def model(request, make_model):
    return make_model(blocks=2, placement="top", nf4=False, dtype=torch.float64, **request.param)


@pytest.mark.parametrize("kind", ["all", "one", "trailing", "ragged", "first"])
def test_rows_and_gradients_equal_those_of_the_whole_block(model, kind):
    position = model.num_positions - 1
    generator = torch.Generator().manual_seed(1)
    shape = model.shape
    value = BlockWeights.of(
        shape,
        {t.name: torch.randn(t.shape, generator=generator) * 0.2 for t in shape.block_tensors()},
        torch.float64,
    )
    rows, x = rows_of(kind), torch.randn(SIZE, LENGTH, shape.hidden_size, generator=generator).double()
    upstream = torch.randn(len(rows), shape.hidden_size, generator=generator).double()
    found = []
    for apart in (False, True):
        leaves = value.as_leaves()
        h = x.clone().requires_grad_()
        spec, rotary = model._specs[position], model._rotary
        if apart:
            y = block_forward(h, leaves, spec, rotary, rows)
        else:
            y = block_forward(h, leaves, spec, rotary).flatten(0, 1)[rows]
        tensors = leaves.tensors()
        gradients = torch.autograd.grad((y * upstream).sum(), [h, *tensors.values()])
        found.append([y, *gradients])
        for tensor in tensors.values():
            tensor.grad = None
    for name, whole, part in zip(["y", "x", *value.tensors()], *found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_the_step_computes_only_label_rows_in_the_topmost_block(make_model, make_samples, monkeypatch):
    """The MLP of the topmost block sees as many rows as there are labels, the block below sees all."""
    from fedblocks.edge_client import decoder_block

    model, samples = make_model(blocks=2, placement="top"), make_samples(count=4, targets=2)
    seen = []
    real = decoder_block.swiglu
    monkeypatch.setattr(decoder_block, "swiglu", lambda x: seen.append(x.numel() // x.shape[-1]) or real(x))
    model.train_blocks((0, 1))
    longest = max(len(s.ids) for s in samples)
    hidden = torch.randn(4, longest, model.shape.hidden_size)
    loss = stack_losses(model, model.base_cut).task(task_batch(samples, hidden), 1.0)
    loss.backward()
    assert seen == [4 * longest, 8]


def test_a_micro_batch_without_a_label_has_loss_0_and_gradients_0(make_model, make_samples):
    model, samples = make_model(blocks=1, placement="top"), make_samples(count=2, targets=2)
    for sample in samples:
        sample.label_mask[:] = False
    (group,) = model.train_blocks((0,))
    hidden = torch.randn(2, max(len(s.ids) for s in samples), model.shape.hidden_size)
    loss = stack_losses(model, model.base_cut).task(task_batch(samples, hidden), 1.0)
    loss.backward()
    assert loss.item() == 0
    assert all(t.grad is None or not t.grad.any() for t in group.tensors)
