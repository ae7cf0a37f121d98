"""kvpatch: causal experiments on the KV cache of language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvpatch.errors import CacheError, KvpatchError, ModelError, ProtocolError, StoreError
from kvpatch.patch import LayerBand, Patch, SlotQuery

if TYPE_CHECKING:
    from kvpatch.cache import KVCache, Segment
    from kvpatch.model import Model, load
    from kvpatch.notebook import Run
    from kvpatch.readouts.geometry import participation_ratio, r_v

__version__ = "0.1.0"

# Imported when they are asked for: most need torch, without which statistics, reports and `Run` work.
_LAZY = {
    "KVCache": "kvpatch.cache",
    "Segment": "kvpatch.cache",
    "Model": "kvpatch.model",
    "Run": "kvpatch.notebook",
    "load": "kvpatch.model",
    "participation_ratio": "kvpatch.readouts.geometry",
    "r_v": "kvpatch.readouts.geometry",
}

__all__ = [
    "CacheError",
    "KVCache",
    "KvpatchError",
    "LayerBand",
    "Model",
    "ModelError",
    "Patch",
    "ProtocolError",
    "Run",
    "Segment",
    "SlotQuery",
    "StoreError",
    "load",
    "participation_ratio",
    "r_v",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvpatch' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
