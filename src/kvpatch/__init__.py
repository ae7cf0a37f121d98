"""kvpatch: causal experiments on the KV cache of language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import kvpatch.organisms  # noqa: F401 (so that `load` takes the organisms' names)
from kvpatch.errors import CacheError, KvpatchError, MissingExtra, ModelError, ProtocolError, StoreError, missing_extra
from kvpatch.specs.interventions import CacheSteering, InPrefill, Joined, Reshape, ValueSteering
from kvpatch.specs.patch import Patch
from kvpatch.specs.selectors import LayerAt, LayerBand, SlotQuery
from kvpatch.specs.spans import Span

if TYPE_CHECKING:
    from kvpatch.caches.kvcache import KVCache, Segment
    from kvpatch.engine.attention import Attention, Maps
    from kvpatch.engine.decode import DecodingStep
    from kvpatch.engine.loading import load
    from kvpatch.engine.model import Model
    from kvpatch.notebook import Run
    from kvpatch.readouts.geometry import cache_ratios, participation_ratio, principal_angles, r_v
    from kvpatch.run import run_in_notebook as run
    from kvpatch.sweeps.grid import Sweep
    from kvpatch.sweeps.metrics import (
        Metric,
        kl_to_source,
        kl_to_target,
        log_likelihood,
        logit_difference,
        mode_likelihood_ratio,
        probability,
    )

__version__ = "0.1.0"

# Imported when they are asked for: most need torch, without which statistics, reports and `Run` work.
_LAZY = {
    "Attention": "kvpatch.engine.attention",
    "Maps": "kvpatch.engine.attention",
    "DecodingStep": "kvpatch.engine.decode",
    "KVCache": "kvpatch.caches.kvcache",
    "Segment": "kvpatch.caches.kvcache",
    "Model": "kvpatch.engine.model",
    "Run": "kvpatch.notebook",
    "load": "kvpatch.engine.loading",
    "run": "kvpatch.run",
    "Metric": "kvpatch.sweeps.metrics",
    "Sweep": "kvpatch.sweeps.grid",
    "kl_to_source": "kvpatch.sweeps.metrics",
    "kl_to_target": "kvpatch.sweeps.metrics",
    "log_likelihood": "kvpatch.sweeps.metrics",
    "logit_difference": "kvpatch.sweeps.metrics",
    "mode_likelihood_ratio": "kvpatch.sweeps.metrics",
    "probability": "kvpatch.sweeps.metrics",
    "cache_ratios": "kvpatch.readouts.geometry",
    "participation_ratio": "kvpatch.readouts.geometry",
    "principal_angles": "kvpatch.readouts.geometry",
    "r_v": "kvpatch.readouts.geometry",
}

__all__ = [
    "Attention",
    "CacheError",
    "CacheSteering",
    "DecodingStep",
    "InPrefill",
    "Joined",
    "KVCache",
    "KvpatchError",
    "LayerAt",
    "LayerBand",
    "Maps",
    "Metric",
    "MissingExtra",
    "Model",
    "ModelError",
    "Patch",
    "ProtocolError",
    "Reshape",
    "Run",
    "Segment",
    "SlotQuery",
    "Span",
    "StoreError",
    "Sweep",
    "ValueSteering",
    "cache_ratios",
    "kl_to_source",
    "kl_to_target",
    "load",
    "log_likelihood",
    "logit_difference",
    "mode_likelihood_ratio",
    "participation_ratio",
    "principal_angles",
    "probability",
    "r_v",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvpatch' has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
        return module if _LAZY[name] == f"kvpatch.{name}" else getattr(module, name)
    except ImportError as error:
        raise (missing_extra(error) or error) from error


def __dir__() -> list[str]:
    """Every public name, also those that are imported only when they are asked for."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
