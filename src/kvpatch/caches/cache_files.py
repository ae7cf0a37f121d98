"""A cache in a file: safetensors, with what each slot stands for and which model made it.

Tensors are named `keys.N`, `values.N` (a layer each) and as the labels of `KVCache`; the metadata hold, as JSON, the
format's version, the model's identity, the layers' rotations and the rows' pieces of text.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.rope import LayerRope
from kvpatch.errors import CacheError
from kvpatch.files import write_whole

FORMAT = "kvpatch-cache-1"
LABELS = ("positions", "token_ids", "segments", "origins", "pending", "pending_position")


def save_cache(cache: KVCache, path: str | os.PathLike[str]) -> Path:
    """Write a cache to a file, whole or not at all; returns its path.

    Raises:
        CacheError: where the file can't be written.
    """
    tensors = {name: getattr(cache, name) for name in LABELS}
    for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
        tensors |= {f"keys.{layer}": k, f"values.{layer}": v}
    note = {
        "format": FORMAT,
        "model": cache.model,
        "layers": cache.layers,
        "rope": [[rope.layout, rope.inv_freq] for rope in cache.rope],
        "pieces": cache.pieces,
    }
    # A copy of each: safetensors takes no tensors that share memory.
    held = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    where = Path(path).expanduser()
    try:
        write_whole(where, save(held, {"kvpatch": json.dumps(note)}))
    except OSError as error:
        raise CacheError(f"{where} can't be written: {error.strerror or error}") from error
    return where


def load_cache(path: str | os.PathLike[str], model: Any = None) -> KVCache:
    """Read a cache that `save_cache` wrote.

    Args:
        model: the `Model` that is to go on from it; the cache then lies on its device. None reads it for a look alone.
    Raises:
        CacheError: where the file is none of kvpatch's caches, is damaged, or holds a cache of another model.
    """
    where = Path(path).expanduser()
    if model is not None and not hasattr(model, "backbone"):
        raise CacheError(f"model must be a kvpatch Model, got a {type(model).__name__}; kv.load(model=...) makes one")
    if not where.is_file():
        raise CacheError(f"there is no file {where}" if not where.exists() else f"{where} is no file")
    try:
        with safe_open(where, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("kvpatch", "null"))
            if not isinstance(note, dict) or note.get("format") != FORMAT:
                raise CacheError(f"{where} holds no cache that kvpatch saved; KVCache.save writes one")
            if model is not None:
                _refuse_other_model(where, note["model"], model)
            tensors = {name: file.get_tensor(name) for name in LABELS}
            keys, values = (
                tuple(file.get_tensor(f"{part}.{layer}") for layer in range(note["layers"]))
                for part in ("keys", "values")
            )
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        if isinstance(error, CacheError):
            raise
        said = " ".join(str(error).split())
        raise CacheError(f"{where} is damaged, or no safetensors file ({said}); save the cache again") from error
    cache = KVCache(
        keys=keys,
        values=values,
        **tensors,
        pieces=tuple(tuple(row) for row in note["pieces"]),
        rope=tuple(LayerRope(layout, tuple(frequencies)) for layout, frequencies in note["rope"]),
        model=note["model"],
    )
    return cache if model is None else cache.to(model.backbone.device, model.backbone.layer_devices)


def _refuse_other_model(where: Path, identity: str, model: Any) -> None:
    own = model.backbone.identity
    if identity != own:
        raise CacheError(
            f"{where} holds a cache of another model ({identity or 'unknown'}; {model.loaded.name} is {own}); prefill "
            "its prompts with this one"
        )
