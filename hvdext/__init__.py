"""Horovod for Keras 3 on TensorFlow: `import hvdext as hvd`.

Names are loaded on first use, so that the command line and the engine's builder start without TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DistributedGradientTape": "hvdext.tape",
    "DistributedOptimizer": "hvdext.optimizer",
    "Compression": "hvdext.compression",
    "ProcessSet": "hvdext.process_sets",
    "add_process_set": "hvdext.runtime",
    "barrier": "hvdext.runtime",
    "broadcast_variables": "hvdext.broadcast",
    "cross_rank": "hvdext.runtime",
    "cross_size": "hvdext.runtime",
    "init": "hvdext.runtime",
    "is_initialized": "hvdext.runtime",
    "largest_difference": "hvdext.broadcast",
    "local_rank": "hvdext.runtime",
    "local_size": "hvdext.runtime",
    "rank": "hvdext.runtime",
    "shutdown": "hvdext.runtime",
    "size": "hvdext.runtime",
    "traffic": "hvdext.runtime",
    "verbose": "hvdext.runtime",
}
_OPS = {"Average": "AVERAGE", "Sum": "SUM", "Adasum": "ADASUM"}
_MODULES = ("callbacks", "data", "engine")

__all__ = sorted([*_HOMES, *_OPS, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _OPS:
        value = importlib.import_module("hvdext.exchange").ReduceOp[_OPS[name]]
    elif name in _MODULES:
        value = importlib.import_module(f"hvdext.{name}")
    else:
        raise AttributeError(f"module 'hvdext' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
