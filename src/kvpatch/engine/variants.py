"""Many variants of one cache, each changed in a few layers, in one pass: what a sweep over layers and slots runs.

A variant that is first changed in layer 12 is its original up to there. So a pass begins with one row, the original,
and a variant joins where it is first changed. Below, all share what is computed once; above, each has the keys and
values of the original in every layer but those that are changed. No cache is copied whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpatch.caches.kvcache import KVCache
from kvpatch.engine.decode import refuse_foreign
from kvpatch.engine.residual import growing_rows
from kvpatch.engine.token_budget import run_in_passes
from kvpatch.errors import ModelError, ProtocolError
from kvpatch.models.backbone import Backbone
from kvpatch.models.hf import GrowingCache, RowChange, Step

Changed = Callable[[int, Sequence[int]], tuple[Tensor, Tensor]]
"""For a layer and n variants that are changed there, their keys and values, [n, kv_heads, slots, head_dim]."""


@dataclass(frozen=True)
class Variants:
    """Variants of a cache of one row.

    Attributes:
        cache: the original.
        layers: for every variant the layers in which it is changed, ascending.
        changed: what stands in a layer for some of the variants.
    """

    cache: KVCache
    layers: Sequence[Sequence[int]]
    changed: Changed


@torch.no_grad()
def run_variants(
    backbone: Backbone,
    variants: Variants,
    fed: Sequence[int],
    read: Callable[[Tensor], Tensor],
    on_rows: Callable[[int], object] = lambda count: None,
) -> tuple[Tensor, Tensor]:
    """Feed every variant its pending token and the same tokens behind it, and read a number off each.

    Args:
        fed: tokens behind the pending one.
        read: from hidden states [rows, 1 + fed, width], after the final norm, to [rows].
        on_rows: told how many variants have been read since the last call.
    Returns:
        [variants], and the number of the original, a tensor of no dimension.
    Raises:
        CacheError: where another model made the cache.
        ProtocolError: where the context has no room.
        ModelError: where a layer of the model does not let rows join.
    """
    cache, geometry = variants.cache, backbone.geometry
    backbone.catch_up()
    refuse_foreign(backbone, cache)
    last = int(cache.pending_position[0]) + 1 + len(fed)
    if last > geometry.context:
        raise ProtocolError(f"{last} positions are needed; {geometry.limit}")
    order = sorted(range(len(variants.layers)), key=lambda i: variants.layers[i][0])
    found: list[Tensor | None] = [None] * len(order)
    original: list[Tensor] = []
    # A row's copies of keys and values count as so many tokens more.
    slots = (cache.slots + 1 + len(fed)) * 2 * geometry.kv_heads * geometry.head_dim
    length = 1 + len(fed) + slots // (8 * backbone.config.hidden_size)

    def run(low: int, high: int) -> None:
        chosen = order[low:high]
        values = read(_run_some(backbone, variants, chosen, fed))
        for place, variant in enumerate(chosen):
            found[variant] = values[1 + place]
        original[:] = [values[0]]
        on_rows(high - low)

    run_in_passes(backbone, [length] * len(order), run)
    if not order:
        run(0, 0)
    values = [value for value in found if value is not None]
    return torch.stack(values) if values else original[0].new_zeros(0), original[0]


def _run_some(backbone: Backbone, variants: Variants, chosen: Sequence[int], fed: Sequence[int]) -> Tensor:
    """Hidden states [1 + chosen, 1 + fed, width]: the original first, then the chosen variants in their order, which is
    that of the first layers in which they are changed."""
    cache, device = variants.cache, backbone.device
    tokens = torch.tensor([[int(cache.pending[0]), *fed]], device=device)
    positions = cache.pending_position[:1, None] + torch.arange(tokens.shape[1], device=device)
    of_layer: dict[int, list[int]] = {}
    for place, variant in enumerate(chosen):
        for layer in variants.layers[variant]:
            of_layer.setdefault(layer, []).append(place)

    def change_of(places: Sequence[int], layer: int) -> RowChange:
        rows = torch.tensor([1 + place for place in places], device=device)
        return lambda: (rows, *variants.changed(layer, [chosen[place] for place in places]))

    changes = {layer: change_of(places, layer) for layer, places in of_layer.items()}
    slab = GrowingCache(cache.keys, cache.values, tokens.shape[1], changes)
    shape = backbone.geometry
    slots = torch.cat([cache.positions[:1], positions], dim=1)
    step = Step(slots, positions, backbone.dtype, windows=shape.windows, chunks=shape.chunks)
    joining = Counter(variants.layers[variant][0] for variant in chosen)
    with growing_rows(backbone, joining) as firings:
        hidden = backbone.run(tokens, positions, slab, step)
    if firings.fired != firings.planned or len(hidden) != 1 + len(chosen):
        raise ModelError(f"{backbone.name} does not let rows join a pass between layers; splice the caches one by one")
    return hidden
