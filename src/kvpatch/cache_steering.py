"""M2: add a direction to a finished cache; and M1 and T: one prompt's words before another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvpatch.activations import refuse_foreign_directions
from kvpatch.cache import KVCache, Segment, refuse_unlike
from kvpatch.errors import CacheError
from kvpatch.interventions import CacheSteering, Joined
from kvpatch.models.template import EncodedPrompt
from kvpatch.rope import rotate
from kvpatch.selection import Touched, chosen_layers, chosen_mask
from kvpatch.splice import take


def steer_cache(
    cache: KVCache,
    spec: CacheSteering,
    directions: tuple[dict[int, Tensor], dict[int, Tensor]],
    which: Sequence[int],
) -> KVCache:
    """Add strength times a direction to some slots.

    Args:
        directions: keys (before RoPE) and values, layer -> [kv_heads, head_dim]; see `activations.mean_difference`.
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
    at = torch.where(is_put, cache.positions, 0)
    keys, values = list(cache.keys), list(cache.values)
    for layer in layers:
        for part, tensors, known in (("k", keys, directions[0]), ("v", values, directions[1])):
            if part not in spec.parts:
                continue
            step = _rows_of(known[layer], spec, which, 2 * layer + (part == "v"))  # [batch, kv_heads, head_dim]
            added = step[:, :, None].expand(-1, -1, cache.slots, -1)
            if part == "k" and cache.rope[layer].layout != "absolute":
                added = rotate(added, at, cache.rope[layer])
            moved = (tensors[layer].float() + spec.strength * added).to(tensors[layer].dtype)
            tensors[layer] = torch.where(is_put[:, None, :, None], moved, tensors[layer])
    return replace(cache, keys=tuple(keys), values=tuple(values)), touched


def _rows_of(direction: Tensor, spec: CacheSteering, which: Sequence[int], place: int) -> Tensor:
    """The direction of every row: the known one, or the row's random one with each head's norm."""
    if spec.random_directions is None:
        return direction.expand(len(which), -1, -1)
    rows = []
    for number in which:
        rng = np.random.Generator(np.random.Philox(key=(number % spec.random_directions) * 65_537 + place))
        noise = torch.from_numpy(rng.standard_normal(tuple(direction.shape), dtype=np.float32)).to(direction.device)
        rows.append(noise / noise.norm(dim=-1, keepdim=True) * direction.norm(dim=-1, keepdim=True))
    return torch.stack(rows)


def join_prompts(giver: EncodedPrompt, receiver: EncodedPrompt, separator: Sequence[int], text: str) -> EncodedPrompt:
    """The giver's words and a separator put before the receiver's words, inside the receiver's own template.

    Joined token by token, so that the receiver's tokens stay exactly those of its own prompt.

    Raises:
        CacheError: where the giver has no words.
    """
    start = receiver.segments.index(Segment.body)
    words = [i for i, segment in enumerate(giver.segments) if segment == Segment.body]
    if not words:
        raise CacheError("the giver has no words to put before the receiver's; give it a prompt that has")
    body = [int(Segment.body)] * (len(words) + len(separator))
    return EncodedPrompt(
        (*receiver.token_ids[:start], *(giver.token_ids[i] for i in words), *separator, *receiver.token_ids[start:]),
        (*receiver.segments[:start], *body, *receiver.segments[start:]),
        (
            *receiver.pieces[:start],
            *(giver.pieces[i] for i in words),
            text,
            *[""] * (len(separator) - 1),
            *receiver.pieces[start:],
        ),
    )


def without_giver(joined: KVCache, natural: KVCache) -> KVCache:
    """Take the giver's slots out of joined caches and turn the rest to the receiver's own positions (M1).

    Args:
        joined: caches of `join_prompts`.
        natural: the receivers' own caches, whose tokens and positions the result has.
    Raises:
        CacheError: where the tokens kept are not the receiver's.
    """
    refuse_unlike(joined, natural, "a joined prompt and the receiver's own")
    index = torch.full(natural.positions.shape, -1)
    for row in range(natural.batch):
        length, whole = natural.row_lengths[row], joined.row_lengths[row]
        start = natural.row_segments[row].index(Segment.body)
        kept = [*range(start), *range(whole - (length - start), whole)]
        index[row, natural.slots - length :] = torch.tensor(kept) + joined.slots - whole
    index = index.to(natural.positions.device)
    came_from = joined.positions.gather(1, index.clamp(min=0))
    tokens = torch.where(index >= 0, joined.token_ids.gather(1, index.clamp(min=0)), -1)
    if not torch.equal(tokens, natural.token_ids):
        raise CacheError("the slots kept of a joined prompt are not those of the receiver's own prompt")
    delta = torch.where(natural.is_real, natural.positions - came_from, 0)
    return replace(
        natural,
        keys=tuple(rotate(take(k, index), delta, rope) for k, rope in zip(joined.keys, joined.rope, strict=True)),
        values=tuple(take(v, index) for v in joined.values),
    )


def joined_cache(spec: Joined, joined: KVCache, natural: KVCache) -> KVCache:
    """The cache a `Joined` asks for."""
    return joined if spec.keep == "all" else without_giver(joined, natural)


def touched_by_joining(cache: KVCache, natural: KVCache) -> Touched:
    """How much of every row the giver's words touched: all slots from where they stand on.

    With them kept (T) those are their own, the separator's and the receiver's behind them; with them taken out (M1) the
    receiver's from its first word on. Each of these was computed with the giver's words before it.

    Args:
        cache: what `joined_cache` gave. natural: the receivers' own caches.
    """
    starts = [segments.index(Segment.body) for segments in natural.row_segments]
    slots = tuple(length - start for length, start in zip(cache.row_lengths, starts, strict=True))
    return Touched(slots, cache.layers, cache.keys[0].shape[1])
