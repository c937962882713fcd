"""The method ``llamapro``: interleaved expanded blocks, all of them on every client that can hold them.

The blocks are those of LLaMA Pro (Wu et al., 2401.02415, section 3); the federation is ``fedavg`` over them, with no
anchor and at strength 1.
"""

from __future__ import annotations

from fedblocks.aggregator.methods.fedavg import aggregate
from fedblocks.aggregator.run_rules import plan, publish

__all__ = ["aggregate", "plan", "publish"]
