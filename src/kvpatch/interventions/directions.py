"""Directions between caches, and what interventions take from the calibration prompts.

The caches and directions of the calibration prompts are the same for all batches of a run, so those that were read last
are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvpatch.caches.devices import sent
from kvpatch.caches.kvcache import PAD, KVCache, refuse_unlike
from kvpatch.caches.rope import rotate
from kvpatch.caches.selection import slot_mask
from kvpatch.engine.model import Model
from kvpatch.engine.prefill import prefill
from kvpatch.errors import CacheError


class Directions(dict[int, Tensor]):
    """Directions that were read off caches: layer -> [kv_heads, head_dim], and the identity of their `model`."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model


def refuse_foreign_directions(directions: dict[int, Tensor], model: str) -> None:
    """Refuse directions that were read off another model's caches; a plain dict holds the user's own numbers.

    Raises:
        CacheError: where the models differ.
    """
    if isinstance(directions, Directions) and directions.model != model:
        raise CacheError(
            f"these directions were read off another model ({directions.model or 'unknown'}, this one is "
            f"{model or 'unknown'}); take them from caches of this model"
        )


def mean_difference(sources: KVCache, targets: KVCache) -> tuple[Directions, Directions]:
    """Mean over prompts of the body's mean key (before RoPE) and value, sources less targets.

    Returns:
        Two `Directions`, layer -> [kv_heads, head_dim], float32: keys and values.
    Raises:
        CacheError: where the caches are of different models.
    """
    refuse_unlike(sources, targets, "sources and targets")
    keys, values = Directions(sources.model), Directions(sources.model)
    for layer in range(sources.layers):
        key_means, value_means = zip(*(_body_means(cache, layer) for cache in (sources, targets)), strict=True)
        keys[layer] = key_means[0] - key_means[1]
        values[layer] = value_means[0] - value_means[1]
    return keys, values


def rows_of(direction: Tensor, which: Sequence[int], place: int, random_directions: int | None) -> Tensor:
    """The direction of every row: the known one, or the row's random one with each head's norm.

    Args:
        direction: [kv_heads, head_dim].
        which: a row's number of its random direction, taken modulo their count.
        place: of the direction among all of the model, so that no two draw alike.
        random_directions: how many there are; None for the known direction.
    Returns:
        [rows, kv_heads, head_dim].
    """
    if random_directions is None:
        return direction.expand(len(which), -1, -1)
    numbers, of = np.unique(np.array(which) % random_directions, return_inverse=True)
    drawn = [
        np.random.Generator(np.random.Philox(key=number * 65_537 + place)).standard_normal(
            tuple(direction.shape), dtype=np.float32
        )
        for number in numbers.tolist()
    ]
    noise = sent(np.stack(drawn), direction.device)
    return (noise / noise.norm(dim=-1, keepdim=True) * direction.norm(dim=-1, keepdim=True))[sent(of, noise.device)]


def place_of_values(layer: int) -> int:
    """Place of a layer's values among all directions of a model, for `rows_of`; that of its keys is one less."""
    return 2 * layer + 1


def _body_means(cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
    is_body = slot_mask(cache, "body")
    share = (is_body / is_body.sum(dim=1, keepdim=True))[:, None, :, None]
    back = -torch.where(cache.positions != PAD, cache.positions, 0)
    rope = cache.rope[layer]
    unturned = cache.keys[layer] if rope.keeps_its_place else rotate(cache.keys[layer], back, rope)

    def mean(part: Tensor) -> Tensor:
        return (part.float() * share.to(part.device)).sum(dim=2).mean(dim=0)

    return mean(unturned), mean(cache.values[layer])


@functools.lru_cache(maxsize=2)
def reference_caches(model: Model, texts: tuple[str, ...]) -> KVCache:
    """Natural caches of the prompts of these texts, one row per text."""
    return prefill(model.backbone, [model.encode(text) for text in texts])


@functools.lru_cache(maxsize=2)
@torch.no_grad()
def mean_directions(
    model: Model, sources: tuple[str, ...], targets: tuple[str, ...]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """`mean_difference` of the caches of these texts."""
    return mean_difference(reference_caches(model, sources), reference_caches(model, targets))
