"""The method ``topn``: the base's highest layers train, nothing else; ``fedavg`` over them.

No paper's: the reference for what added blocks are worth, with as many parameters (``trainable.top_layers``).
"""

from __future__ import annotations

from fedblocks.aggregator.methods.fedavg import aggregate
from fedblocks.aggregator.run_rules import plan, publish

__all__ = ["aggregate", "plan", "publish"]
