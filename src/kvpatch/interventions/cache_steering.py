"""Steering a cache: a direction added to the keys and values that are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.rope import Turns
from kvpatch.caches.selection import Touched, chosen_layers, chosen_mask
from kvpatch.interventions.directions import place_of_values, refuse_foreign_directions, rows_of
from kvpatch.interventions.kinds import Kind, Made, Trials, refuse_missing_layers
from kvpatch.interventions.steering import refuse_missing_slots
from kvpatch.specs.interventions import CacheSteering


def steer_cache(
    cache: KVCache,
    spec: CacheSteering,
    directions: tuple[dict[int, Tensor], dict[int, Tensor]],
    which: Sequence[int],
) -> KVCache:
    """Add strength times a direction to some slots.

    Args:
        directions: keys (before RoPE) and values, layer -> [kv_heads, head_dim]; see `directions.mean_difference`.
        which: a row's number of its random direction, used where the spec asks for random ones.
    Returns:
        A new cache; strength 0 gives the same bits.
    Raises:
        EmptySelection: where the selection finds no slot in a row, or no layer.
    """
    return counted_steering(cache, spec, directions, which)[0]


def counted_steering(
    cache: KVCache,
    spec: CacheSteering,
    directions: tuple[dict[int, Tensor], dict[int, Tensor]],
    which: Sequence[int],
    *,
    may_be_empty: bool = False,
) -> tuple[KVCache, Touched]:
    """`steer_cache`, and how much of every row it touched; `may_be_empty` allows that to be nothing."""
    is_put = chosen_mask(cache, spec.slots, may_be_empty=may_be_empty)
    layers = chosen_layers(spec.layers, cache.layers, may_be_empty=may_be_empty)
    touched = Touched(tuple(is_put.sum(dim=1).tolist()), len(layers), cache.keys[0].shape[1])
    for known in directions:
        refuse_foreign_directions(known, cache.model)
    if spec.strength == 0:
        return cache, touched
    to_places = Turns(torch.where(is_put, cache.positions, 0))
    keys, values = list(cache.keys), list(cache.values)
    for layer in layers:
        for part, tensors, known in (("k", keys, directions[0]), ("v", values, directions[1])):
            if part not in spec.parts:
                continue
            place = place_of_values(layer) - (part == "k")
            step = rows_of(known[layer], which, place, spec.random_directions)  # [batch, kv_heads, head_dim]
            added = step[:, :, None].expand(-1, -1, cache.slots, -1)
            if part == "k" and not cache.rope[layer].keeps_its_place:
                added = to_places.turn(added, cache.rope[layer])
            moved = (tensors[layer].float() + spec.strength * added).to(tensors[layer].dtype)
            tensors[layer] = torch.where(is_put[:, None, :, None].to(moved.device), moved, tensors[layer])
    return replace(cache, keys=tuple(keys), values=tuple(values)), touched


def _build(spec: CacheSteering, trials: Trials) -> Made:
    directions, numbers = trials.directions(), trials.pair_numbers
    return Made(*counted_steering(trials.own, spec, directions, numbers, may_be_empty=trials.may_be_empty))


CACHE_STEERING = Kind(CacheSteering, _build, refuse_model=refuse_missing_layers, refuse_prompts=refuse_missing_slots)
