"""The encoder for changes that lie on a GPU writes the protocol's bytes; here with the kernels' plain specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedblocks.edge_client.device_encoding import device_encoder
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.protocol.errors import LocalProtocolError
from fedblocks.protocol.tensors import encode_delta

SHAPE = ModelShape(
    family="qwen2",
    num_layers=3,
    hidden_size=64,
    intermediate_size=192,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
    tied_embeddings=True,
    qkv_bias=True,
)
BLOCKS = (0, 2)


def values_of(width):
    """End, start and what is owed: some rows that do not change at all, some that change very little."""
    generator = torch.Generator().manual_seed(int(8 * width))
    start, end, owed = {}, {}, {}
    for block in BLOCKS:
        for whole, spec in zip(SHAPE.block_tensors(), SHAPE.block_tensors(width), strict=True):
            key = block, spec.name
            start[key] = torch.randn(spec.shape, generator=generator)
            change = 1e-3 * torch.randn(spec.shape, generator=generator)
            if len(spec.shape) == 2:
                change[::3] = 0
                change[1::7] *= 1e-30
            end[key] = start[key] + change
            owed.setdefault(block, {})[spec.name] = torch.randn(whole.shape, generator=generator).mul_(1e-3).numpy()
    return start, end, owed


@pytest.mark.parametrize("width", [1.0, 0.25])
@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("cap", [1e-4, 1.0])
def test_the_bytes_and_what_is_left_out_are_those_of_the_protocols_own_encoder(width, density, cap):
    start, end, owed = values_of(width)
    deltas = {
        block: {
            spec.name: (end[block, spec.name] - start[block, spec.name]).numpy() for spec in SHAPE.block_tensors(width)
        }
        for block in BLOCKS
    }
    for residuals in ({}, owed):
        usual = {"format": "int8", "density": density, "cap": cap, "width": width}
        expected = encode_delta(SHAPE, BLOCKS, deltas, residuals, **usual)
        encoder = device_encoder(lambda block, name: (end[block, name], start[block, name]), density=density, cap=cap)
        found = encode_delta(SHAPE, BLOCKS, {}, residuals, **usual, encode=encoder)
        assert found.headers == expected.headers
        assert b"".join(found.parts) == b"".join(expected.parts)
        for block in BLOCKS:
            for name, left in expected.residuals[block].items():
                assert np.array_equal(found.residuals[block][name], left)


def test_a_value_that_is_not_finite_is_never_sent():
    start, end, _ = values_of(1.0)
    end[2, "mlp.up_proj.weight"][3, 4] = float("nan")
    encoder = device_encoder(lambda block, name: (end[block, name], start[block, name]), density=1.0, cap=1.0)
    with pytest.raises(LocalProtocolError, match=r"block 2, mlp\.up_proj\.weight: .* 1 values of the change"):
        encode_delta(SHAPE, BLOCKS, {}, {}, format="int8", density=1.0, encode=encoder)
