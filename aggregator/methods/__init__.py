"""One file per method: plan, aggregate, publish (numpy only). :func:`of` finds the one that a run names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedblocks.aggregator.methods import fedbe
from fedblocks.aggregator.run_rules import Method
from fedblocks.protocol.run_config import MethodName

METHODS: Final[Mapping[MethodName, Method]] = {"fedbe": fedbe}


def of(name: MethodName) -> Method:
    """The method of this name; ``run.method`` allows no other."""
    return METHODS[name]
