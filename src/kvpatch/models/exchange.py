"""Caches handed to transformers and taken from it: keys and values as they are, with kvpatch's labels beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvpatch.caches.kvcache import PAD, KVCache, Origin, Segment
from kvpatch.caches.rope import LayerRope
from kvpatch.errors import CacheError
from kvpatch.models.hf import dynamic_cache, tensors_of_dynamic
from kvpatch.specs.arguments import plain, shown, whole_numbers

if TYPE_CHECKING:
    from transformers import DynamicCache

_ORIGINS: WeakKeyDictionary[Any, tuple[KVCache, tuple[LayerRope, ...]]] = WeakKeyDictionary()
"""Labels and rotations of what `to_dynamic` made each cache of, so that it comes back with its model."""


def to_dynamic(cache: KVCache) -> DynamicCache:
    """A `transformers.DynamicCache` with a copy of these keys and values; see `KVCache.to_dynamic`."""
    made = dynamic_cache(cache.keys, cache.values)
    _ORIGINS[made] = replace(cache, keys=(), values=(), rope=()), cache.rope
    return made


def from_dynamic(
    dynamic: object, positions: Any, token_ids: Any, pending: Any, segments: Any = None, model: Any = None
) -> KVCache:
    """A `KVCache` of transformers' cache and the labels of its slots; see `KVCache.from_dynamic`."""
    keys, values = tensors_of_dynamic(dynamic)
    batch, slots = keys[0].shape[0], keys[0].shape[2]
    short = next((i for i, k in enumerate(keys) if (k.shape[0], k.shape[2]) != (batch, slots)), None)
    if short is not None:
        raise CacheError(
            f"layer {short} holds {keys[short].shape[2]} slots and layer 0 holds {slots}; kvpatch wants all slots of "
            "every layer: run the model with a DynamicCache() made without a configuration"
        )
    origin, rope = _ORIGINS.get(dynamic, (None, (LayerRope("unknown"),) * len(keys)))
    device = keys[0].device if origin is None else origin.positions.device
    device = device if model is None else model.backbone.device
    table = {
        "positions": _table("positions", positions, (batch, slots), device),
        "token_ids": _table("token_ids", token_ids, (batch, slots), device),
    }
    is_real = table["positions"] != PAD
    _refuse_gaps(is_real)
    table["token_ids"] = torch.where(is_real, table["token_ids"], PAD)
    is_as_it_was = origin is not None and torch.equal(origin.token_ids.to(device), table["token_ids"])
    known = origin if is_as_it_was else None
    if segments is not None:
        table["segments"] = torch.where(is_real, _table("segments", segments, (batch, slots), device), PAD)
        _refuse_other_codes(table["segments"])
    elif known is not None:
        table["segments"] = known.segments.to(device)
    else:
        table["segments"] = torch.where(is_real, int(Segment.body), PAD)
    next_ones = whole_numbers("pending", pending)
    if len(next_ones) != batch:
        raise CacheError(f"pending has {len(next_ones)} tokens, the batch is {batch}")
    own = torch.where(is_real, table["positions"], PAD)
    last = own.amax(dim=1) if slots else own.new_full((batch,), PAD)
    identity = "" if origin is None else origin.model
    if model is not None:
        rope, identity = model.geometry.rope, model.backbone.identity
    if len(rope) != len(keys):
        raise CacheError(f"the DynamicCache has {len(keys)} layers and the model {len(rope)}")
    return KVCache(
        keys=keys,
        values=values,
        **table,
        origins=torch.where(is_real, int(Origin.own), PAD) if known is None else known.origins.to(device),
        pending=torch.tensor(next_ones, device=device),
        pending_position=last + 1,
        pieces=_pieces(table["token_ids"], is_real, model) if known is None else known.pieces,
        rope=rope,
        model=identity,
    )


def _table(name: str, given: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Labels of slots, [batch, slots]; one row may come without its batch."""
    listed = plain(given)
    rows = listed if isinstance(listed, (list, tuple)) else [listed]
    if not rows or not isinstance(plain(rows[0]), (list, tuple, range)):
        rows = [rows]
    found = [whole_numbers(name, row) for row in rows]
    if (len(found), *{len(row) for row in found}) != shape:
        told = f"{len(found)} rows of {sorted({len(row) for row in found})}"
        raise CacheError(f"{name} must be [batch, slots] = {list(shape)}, got {told}")
    return torch.tensor(found, dtype=torch.int64, device=device).reshape(shape)


def _refuse_gaps(is_real: Tensor) -> None:
    """Rows of a `KVCache` are padded on the left alone."""
    if bool((is_real[:, :-1] & ~is_real[:, 1:]).any()):
        raise CacheError("positions are -1 behind a slot that is real; pad rows on the left")


def _refuse_other_codes(segments: Tensor) -> None:
    known = {PAD, *(int(segment) for segment in Segment)}
    if bad := [code for code in segments.flatten().tolist() if code not in known]:
        raise CacheError(f"segments hold {shown(bad[0])}; a segment is 0 (bos), 1 (template), 2 (body) or 3 (trailer)")


def _pieces(token_ids: Tensor, is_real: Tensor, model: Any) -> tuple[tuple[str, ...], ...]:
    """The text of every slot's token, or its number where no tokenizer is known."""

    def text(token: int) -> str:
        return f"[{token}]" if model is None else model.tokenizer.decode([token])

    rows = zip(token_ids.tolist(), is_real.tolist(), strict=True)
    return tuple(tuple(text(t) for t, real in zip(ids, reals, strict=True) if real) for ids, reals in rows)
