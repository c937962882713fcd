"""How does one post-norm encoder block compute? As transformers' BERT does, in evaluation mode.

Every token looks at every real token of its sample, so a padded batch needs the samples' lengths.

    x → q|k|v (one matrix) → attention → o → + x → norm → dense → GELU → dense → + → norm →

Source: Devlin et al., 1810.04805. Dropout is off in training too: cached hidden states stay valid (methods.md 5.4).
"""

from __future__ import annotations

from typing import Final

from torch import Tensor, arange
from torch.nn import functional

from fedblocks.edge_client.decoder_block import BlockSpec, BlockWeights, linear

LINEARS: Final = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
"""Module paths of the linears in the order in which they are applied."""


def encoder_forward(x: Tensor, weights: BlockWeights, spec: BlockSpec, lengths: Tensor | None = None) -> Tensor:
    """One block: x (B, T, H) -> (B, T, H).

    Args:
        lengths: (B,) int64, real tokens of each row; None where all are. What stands behind them is never read.
    """
    w = weights.cast(x.dtype)
    assert w.output_norm is not None
    shape = spec.shape
    size, length = x.shape[:2]
    joined = linear(x, w.qkv, w.qkv_bias, w.lora, LINEARS[:3]).view(size, length, 3 * shape.num_heads, shape.head_dim)
    q, k, v = joined.transpose(1, 2).chunk(3, dim=1)  # (B, nh, T, hd) each
    mask = None if lengths is None else (arange(length, device=x.device) < lengths.unsqueeze(1))[:, None, None]
    attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    hidden = (shape.hidden_size,)
    x = x + linear(attended, w.o, w.o_bias, w.lora, LINEARS[3:4])
    x = functional.layer_norm(x, hidden, w.post_norm, w.post_norm_bias, spec.eps)
    inner = functional.gelu(linear(x, w.gate_up, w.gate_up_bias, w.lora, LINEARS[4:5]))
    y = x + linear(inner, w.down, w.down_bias, w.lora, LINEARS[5:])
    return functional.layer_norm(y, hidden, w.output_norm, w.output_norm_bias, spec.eps)
