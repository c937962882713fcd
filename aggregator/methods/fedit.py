"""The method ``fedit``: low-rank pairs of one rank over all projections (Zhang et al., 2305.05644, section 3).

    A <- sum_k (n_k / n) A_k,   B <- sum_k (n_k / n) B_k

The mean of the products is not the product of the means, so this is inexact (FLoRA, Wang et al., 2409.05976, eq. 2).
"""

from __future__ import annotations

from fedblocks.aggregator.methods.fedavg import aggregate
from fedblocks.aggregator.run_rules import plan, publish

__all__ = ["aggregate", "plan", "publish"]
