"""Does a model cache keys and values?

Everything kvpatch says of a patch rests on that. Multi-head latent attention (DeepSeek V2 and V3, MiniCPM3, Youtu)
caches a latent and a rotary part and makes keys and values of them at every step; those two may even have the shape of
keys and values. So the contents are compared: what a layer caches of one token, and what its attention then gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpatch.errors import ModelError


def refuse_other_caches(
    name: str, layers: Sequence[CacheLayerMixin], attended: Mapping[int, tuple[Tensor, Tensor, Tensor]]
) -> None:
    """Stop where a layer caches anything but the keys and values that its attention uses. Heads may be repeated between
    the two, but each must be one that is cached.

    Args:
        name: the architecture.
        layers: what each layer has cached of one token.
        attended: by layer, the queries, keys and values that attention got in the same pass, [1, heads, 1, dim].
    Raises:
        ModelError: naming the architecture, the layer and what it caches.
    """
    for number, layer in enumerate(layers):
        if not layer.is_initialized or number not in attended:
            raise ModelError(f"{name} keeps no key-value cache of its own in layer {number}, so it can't be patched")
        held: Any = layer
        keys, values = held.keys.shape, held.values.shape  # [1, heads, 1, dim]
        if not all(_are_heads_of(u, c) for u, c in zip(attended[number][1:], (held.keys, held.values), strict=True)):
            raise ModelError(
                f"{name} caches other things than the keys and values that it attends to, such as the latent and the "
                f"rotary part of multi-head latent attention (layer {number} caches {keys[1]} x {keys[3]} and "
                f"{values[1]} x {values[3]} numbers a token); kvpatch can't patch that"
            )
        if keys != values:
            raise ModelError(
                f"{name} caches keys of {keys[1]} heads of {keys[3]} numbers, but values of {values[1]} heads of "
                f"{values[3]}, in layer {number}; kvpatch wants the two of one shape"
            )


def _are_heads_of(used: Tensor, cached: Tensor) -> bool:
    """Whether each head of [1, heads, 1, dim] is one of the cached heads."""
    if used.shape[3] != cached.shape[3]:
        return False
    return bool((used[0, :, None] == cached[0, None]).all(dim=(2, 3)).any(dim=1).all())
