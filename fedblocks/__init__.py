"""Federated fine-tuning of language models by block expansion, on unequal edge hardware, without forgetting.

For researchers: ``from fedblocks import simulate, evaluate, load_results`` (fedblocks/api.py; docs/evaluation.md).
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_API = ("evaluate", "load_results", "simulate")


def __getattr__(name: str) -> Any:
    """The functions of ``api``, loaded when they are first asked for: the rooms import this package too.

    By name, so that the import contracts between the rooms hold; type checkers read ``__init__.pyi``. PEP 562.
    """
    if name in _API:
        return getattr(importlib.import_module("fedblocks.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
