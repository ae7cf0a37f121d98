"""kvpatch: causal experiments on the KV cache of language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvpatch.errors import CacheError, KvpatchError, ModelError, ProtocolError, StoreError
from kvpatch.patch import LayerBand, Patch, SlotQuery

if TYPE_CHECKING:
    from kvpatch.cache import KVCache, Segment
    from kvpatch.engine.attention import Attention, Maps
    from kvpatch.model import Model, load
    from kvpatch.notebook import Run
    from kvpatch.readouts.geometry import cache_ratios, participation_ratio, principal_angles, r_v

__version__ = "0.1.0"

# Imported when they are asked for: most need torch, without which statistics, reports and `Run` work.
_LAZY = {
    "Attention": "kvpatch.engine.attention",
    "Maps": "kvpatch.engine.attention",
    "KVCache": "kvpatch.cache",
    "Segment": "kvpatch.cache",
    "Model": "kvpatch.model",
    "Run": "kvpatch.notebook",
    "load": "kvpatch.model",
    "cache_ratios": "kvpatch.readouts.geometry",
    "participation_ratio": "kvpatch.readouts.geometry",
    "principal_angles": "kvpatch.readouts.geometry",
    "r_v": "kvpatch.readouts.geometry",
}

__all__ = [
    "Attention",
    "CacheError",
    "KVCache",
    "KvpatchError",
    "LayerBand",
    "Maps",
    "Model",
    "ModelError",
    "Patch",
    "ProtocolError",
    "Run",
    "Segment",
    "SlotQuery",
    "StoreError",
    "cache_ratios",
    "load",
    "participation_ratio",
    "principal_angles",
    "r_v",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvpatch' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
