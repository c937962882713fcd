"""One file per method: plan, aggregate, publish (numpy only). :func:`of` finds the one that a run names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedblocks.aggregator.methods import (
    fedavg,
    fedbe,
    fedit,
    fedprox,
    flexlora,
    flora,
    hetlora,
    llamapro,
    topn,
)
from fedblocks.aggregator.run_rules import Method
from fedblocks.protocol.run_config import MethodName

METHODS: Final[Mapping[MethodName, Method]] = {
    "fedbe": fedbe,
    "fedavg": fedavg,
    "fedprox": fedprox,
    "fedit": fedit,
    "hetlora": hetlora,
    "flexlora": flexlora,
    "flora": flora,
    "topn": topn,
    "llamapro": llamapro,
}


def of(name: MethodName) -> Method:
    """The method of this name; ``run.method`` allows no other."""
    return METHODS[name]
