"""A cache in a file: safetensors, with what each slot stands for and which model made it.

Tensors are named `keys.N`, `values.N` (a layer each) and as the labels of `KVCache`; the metadata hold, as JSON, the
format's version, the model's identity, the layers' rotations, the rows' pieces of text, and a SHA-256 of all of it, by
which damage shows. The hash is no signature.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.rope import LayerRope, Layout
from kvpatch.errors import CacheError
from kvpatch.files import is_file, write_whole
from kvpatch.specs.arguments import shown

LABELS = ("positions", "token_ids", "segments", "origins", "pending", "pending_position")


class _Note(BaseModel):
    """What the metadata say. sha256: None in files of early versions, in which damage does not show."""

    model_config = ConfigDict(strict=True)

    format: Literal["kvpatch-cache-1"] = "kvpatch-cache-1"
    model: str
    layers: Annotated[int, Field(ge=0, le=100_000)]
    rope: list[tuple[Layout, list[float]]]
    pieces: list[list[str]]
    sha256: str | None = None

    def hashed(self, tensors: Mapping[str, Tensor]) -> str:
        """The hash of everything else that it says, and of the tensors, [...] each."""
        total = hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode())
        for name in sorted(tensors):
            tensor = tensors[name]
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            total.update(tensor.flatten().view(torch.uint8).numpy().data)
        return total.hexdigest()


def save_cache(cache: KVCache, path: str | os.PathLike[str]) -> Path:
    """Write a cache to a file, whole or not at all; returns its path.

    Raises:
        CacheError: where the file can't be written.
    """
    where = _place(path)
    tensors = {name: getattr(cache, name) for name in LABELS}
    for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
        tensors |= {f"keys.{layer}": k, f"values.{layer}": v}
    # A copy of each: safetensors takes no tensors that share memory.
    held = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    try:
        note = _Note(
            model=cache.model,
            layers=cache.layers,
            rope=[(rope.layout, list(rope.inv_freq)) for rope in cache.rope],
            pieces=[list(row) for row in cache.pieces],
        )
        note.sha256 = note.hashed(held)
        write_whole(where, save(held, {"kvpatch": note.model_dump_json()}))
    except (OSError, ValueError) as error:
        raise CacheError(f"{where} can't be written: {getattr(error, 'strerror', None) or error}") from error
    return where


def load_cache(path: str | os.PathLike[str], model: Any = None) -> KVCache:
    """Read a cache that `save_cache` wrote.

    Args:
        model: the `Model` that is to go on from it; the cache then lies on its device. None reads it for a look alone.
    Raises:
        CacheError: where the file is none of kvpatch's caches, is damaged, or holds a cache of another model.
    """
    where = _place(path)
    if model is not None and not hasattr(model, "backbone"):
        raise CacheError(f"model must be a kvpatch Model, got a {type(model).__name__}; kv.load(model=...) makes one")
    if not is_file(where):
        raise CacheError(f"there is no file {where}" if not os.path.lexists(where) else f"{where} is no file")
    try:
        with safe_open(where, framework="pt") as file:
            note = _noted(where, (file.metadata() or {}).get("kvpatch"))
            if model is not None:
                _refuse_other_model(where, note.model, model)
            names = [*LABELS, *(f"{part}.{layer}" for layer in range(note.layers) for part in ("keys", "values"))]
            tensors = {name: file.get_tensor(name) for name in names}
        if note.sha256 not in (None, note.hashed(tensors)):
            raise ValueError("its SHA-256 is not the one that was noted")
        cache = KVCache(
            keys=tuple(tensors[f"keys.{layer}"] for layer in range(note.layers)),
            values=tuple(tensors[f"values.{layer}"] for layer in range(note.layers)),
            **{name: tensors[name] for name in LABELS},
            pieces=tuple(tuple(row) for row in note.pieces),
            rope=tuple(LayerRope(layout, tuple(frequencies)) for layout, frequencies in note.rope),
            model=note.model,
        )
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, LookupError, MemoryError) as error:
        if isinstance(error, _Told):
            raise
        said = " ".join(str(error).split())[:200]
        raise CacheError(f"{where} is damaged, or no safetensors file ({said}); save the cache again") from error
    return cache if model is None else cache.to(model.backbone.device, model.backbone.layer_devices)


class _Told(CacheError):
    """What is wrong with a file, told to its end."""


def _place(path: object) -> Path:
    """A path that a caller gave."""
    try:
        return Path(path).expanduser()  # pyright: ignore[reportArgumentType]
    except (TypeError, RuntimeError) as error:
        raise CacheError(f"a cache's path must be text or a Path, got {shown(path)}") from error


def _noted(where: Path, text: str | None) -> _Note:
    """What the metadata of a file say."""
    try:
        return _Note.model_validate_json(text or "")
    except ValidationError as error:
        first = error.errors()[0]
        if text is None or first["loc"][:1] in ((), ("format",)):
            raise _Told(f"{where} holds no cache that kvpatch saved; KVCache.save writes one") from error
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _refuse_other_model(where: Path, identity: str, model: Any) -> None:
    own = model.backbone.identity
    if identity != own:
        raise _Told(
            f"{where} holds a cache of another model ({identity or 'unknown'}; {model.loaded.name} is {own}); prefill "
            "its prompts with this one"
        )
