"""The method ``fedprox``: all parameters train, pulled to the round's start (Li et al., 1812.06127, algorithm 2).

    each client:  min CE(theta) + (mu/2) |theta - theta_t|²    with mu = ``training.proximal_weight``; on the client
    server:       as ``fedavg``

The same term is there for every other method.
"""

from __future__ import annotations

from fedblocks.aggregator.methods.fedavg import aggregate
from fedblocks.aggregator.run_rules import plan, publish

__all__ = ["aggregate", "plan", "publish"]
