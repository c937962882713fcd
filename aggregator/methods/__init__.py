"""One file per method: plan, aggregate, publish (numpy only). :func:`of` finds the one that a run names.

A method of the user's own is a file or module with an ``aggregate`` (``run.rule``, docs/tutorial-method.md).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Final, cast

from fedblocks.aggregator.methods import (
    fedavg,
    fedbe,
    fedhft_served,
    fedit,
    fedprox,
    flexlora,
    flora,
    hetlora,
    llamapro,
    topn,
)
from fedblocks.aggregator.run_rules import Method
from fedblocks.protocol.run_config import ConfigError, MethodName

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
    "fedhft": fedhft_served,
}


def of(name: MethodName, rule: str = "") -> Method:
    """The method of this name; ``run.method`` allows no other.

    Args:
        rule: ``run.rule``: a file ``*.py`` or a module whose ``aggregate`` takes the place of the method's; so do
            ``plan`` and ``publish`` where it has them.

    Raises:
        ConfigError: the rule cannot be imported, or has no ``aggregate``.
    """
    method = METHODS[name]
    if not rule:
        return method
    found = _imported(rule)
    if not callable(getattr(found, "aggregate", None)):
        raise ConfigError(f"run.rule is {rule!r}, which has no function aggregate; docs/tutorial-method.md shows one")
    parts = {part: getattr(found, part, getattr(method, part)) for part in ("plan", "aggregate", "publish")}
    return cast("Method", SimpleNamespace(**parts))


def _imported(rule: str) -> ModuleType:
    path = Path(rule)
    try:
        if path.suffix != ".py":
            return importlib.import_module(rule)
        spec = importlib.util.spec_from_file_location(f"fedblocks_rule_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"run.rule is {rule!r}, which cannot be imported ({type(error).__name__}: {error}); expected a file that "
            "ends in .py, or a module on Python's path"
        ) from error
    return module
