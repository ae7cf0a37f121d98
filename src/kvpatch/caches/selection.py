"""Which slots, layers and KV heads a patch means in a given cache."""

from __future__ import annotations

import functools
import json
import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kvpatch.caches.devices import sent
from kvpatch.caches.kvcache import KVCache, Segment
from kvpatch.errors import CacheError, EmptySelection
from kvpatch.specs.arguments import shown
from kvpatch.specs.patch import Patch
from kvpatch.specs.regexes import Pattern
from kvpatch.specs.selectors import LayerAt, LayerBand, SlotQuery
from kvpatch.specs.spans import Span

SINKS = 4
"""First slots that models use as attention sinks whatever they hold (Xiao et al. 2023, StreamingLLM)."""


@dataclass(frozen=True)
class Touched:
    """How much of each row of a batch a change touches, whatever its strength.

    Attributes:
        slots: one number a row, slots of the result whose keys or values were put in, added to or computed anew.
        layers: layers in which they were.
        kv_heads: KV heads in each of these layers.
    """

    slots: tuple[int, ...]
    layers: int
    kv_heads: int

    @classmethod
    def none(cls, rows: int) -> Touched:
        """Of rows that are natural caches."""
        return cls((0,) * rows, 0, 0)

    def of_row(self, row: int) -> tuple[int, int, int]:
        """Slots, layers and KV heads of one row: all 0 where one of them is."""
        found = self.slots[row], self.layers, self.kv_heads
        return found if all(found) else (0, 0, 0)


def told(slots: str | SlotQuery | Span | Sequence[int]) -> str:
    """A slot selection as it reads in a sentence."""
    if isinstance(slots, SlotQuery):
        return f"slots {json.dumps(slots.model_dump(mode='json', exclude_defaults=True), ensure_ascii=False)}"
    return f"slots {slots!r}" if isinstance(slots, str | Span) else f"slots {list(slots)}"


def chosen_layers(
    layers: Sequence[int] | LayerBand | LayerAt | Span | None, count: int, *, may_be_empty: bool = False
) -> list[int]:
    """`layer_indices` of a selection that is to change something; it may find no layer only where that is allowed.

    Raises:
        CacheError: for a layer the model does not have.
        EmptySelection: where no layer is found.
    """
    try:
        found = layer_indices(layers, count)
    except EmptySelection:
        if not may_be_empty:
            raise
        found = []
    if not found and not may_be_empty:
        what = (
            f"the inverse of band {list(layers.band)}" if isinstance(layers, LayerBand) else _none_of("layers", layers)
        )
        raise EmptySelection(f"{what} holds no layer of a model with {count} layers, so nothing would change")
    return found


def chosen_heads(kv_heads: Sequence[int] | Span | None, count: int, *, may_be_empty: bool = False) -> list[int]:
    """`head_indices` of a selection that is to change something; it may find no head only where that is allowed.

    Raises:
        CacheError: for a head the layer does not have.
        EmptySelection: where no head is found.
    """
    found = head_indices(kv_heads, count)
    if not found and not may_be_empty:
        raise EmptySelection(
            f"{_none_of('kv_heads', kv_heads)} holds none of a layer's {count} KV heads, so nothing would change"
        )
    return found


def refuse_empty(
    slots: str | SlotQuery | Span | Sequence[int],
    counts: Sequence[int],
    side: str,
    so: str = "nothing would change there",
) -> None:
    """Refuse a slot selection that finds nothing in one of the rows.

    Args:
        counts: slots that it finds in each row.
        side: whose rows they are, such as "target".
        so: what would come of it.
    Raises:
        EmptySelection: naming the selection and the first such row.
    """
    for row, count in enumerate(counts):
        if not count:
            found, end = f"{told(slots)} find no slot in", f"the {side}, so {so}; choose slots that it has"
            raise EmptySelection(f"{found} row {row} of {end}", f"{found} {end}")


def layer_indices(layers: Sequence[int] | LayerBand | LayerAt | Span | None, count: int) -> list[int]:
    """Layer indices that a selection means in a model of `count` layers; a band is rounded to whole layers.

    Raises:
        CacheError: for a layer the model does not have, or a band too narrow for it.
    """
    if layers is None:
        return list(range(count))
    if isinstance(layers, LayerAt):
        return [layers.index(count)]
    if isinstance(layers, LayerBand):
        inside = layers.within(count)
        if not inside:
            raise EmptySelection(f"band {list(layers.band)} holds no layer of a model with {count} layers")
        return [layer for layer in range(count) if (layer in inside) != layers.inverse]
    return indices_within("layer", layers, count)


def head_indices(kv_heads: Sequence[int] | Span | None, count: int) -> list[int]:
    """KV-head indices in a layer of `count` KV heads.

    Raises:
        CacheError: for a head the layer does not have.
    """
    return list(range(count)) if kv_heads is None else indices_within("KV head", kv_heads, count)


def slot_indices(
    cache: KVCache, row: int, slots: Patch | str | SlotQuery | Span | Sequence[int], seed: int = 0
) -> list[int]:
    """Slots of one row that a selection means, as ascending indices into the cache tensor (padding counted).

    Args:
        cache: any batch.
        row: the row.
        slots: a named selection, a `SlotQuery`, indices that count the row's real slots, or a patch that has one.
        seed: what random selections draw from.
    Raises:
        CacheError: for an index the row does not have, or a query that asks for more slots than there are.
    """
    chosen = slots.slots if isinstance(slots, Patch) else slots
    length = cache.row_lengths[row]
    if isinstance(chosen, str):
        own = _named(cache, row, chosen)
    elif isinstance(chosen, SlotQuery):
        own = _query(cache, row, chosen, seed)
    else:
        own = indices_within("slot", chosen, length)
    padding = cache.slots - length
    return sorted(slot + padding for slot in own)


def mirrored_slots(source: KVCache, target: KVCache, row: int, of: str, chosen: Sequence[int]) -> list[int]:
    """Slots of the target at the same relative places of a stretch as `chosen` has in the source's, one for each.

    Args:
        of: the named stretch that places are relative to.
        chosen: ascending slots of the source's row, each within the stretch.
    Raises:
        CacheError: where nothing was chosen, or the target's stretch has fewer slots.
    """
    there, here = slot_indices(source, row, of), slot_indices(target, row, of)
    if not chosen:
        raise CacheError(f"the selection finds no slot in the source's {of}")
    if len(chosen) > len(here):
        raise CacheError(f"{len(chosen)} slots are chosen in the source, and the target's {of} has {len(here)}")
    scale = (len(here) - 1) / max(1, len(there) - 1)
    places = [round(there.index(slot) * scale) for slot in chosen]
    for i in range(1, len(places)):  # two slots may not land on one
        places[i] = max(places[i], places[i - 1] + 1)
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], len(here) - len(places) + i)
    return [here[place] for place in places]


def slot_mask(cache: KVCache, slots: Patch | str | SlotQuery | Span | Sequence[int]) -> Tensor:
    """[batch, slots], True for the slots of every row that a selection means; see `slot_indices`."""
    return _mask(cache, [slot_indices(cache, row, slots) for row in range(cache.batch)])


def _mask(cache: KVCache, slots: Sequence[Sequence[int]]) -> Tensor:
    """[batch, slots], True for these slots of every row, where the cache is."""
    mask = np.zeros((cache.batch, cache.slots), dtype=bool)
    for row, chosen in enumerate(slots):
        mask[row, chosen] = True
    return sent(mask, cache.positions.device)


def beside_mask(cache: KVCache, marked: str | SlotQuery | Span | Sequence[int]) -> Tensor:
    """[batch, slots], True for the slots that marked ones are compared with: as many others of the user's words, as
    frequent and at like places. None in a row that has too few others. Sinks are neither marked nor compared.

    Args:
        marked: the slots that are marked; a query keeps its own stretch, anything else is compared within the body.
    """
    stretch = marked.of if isinstance(marked, SlotQuery) else "body"
    beside: list[list[int]] = []
    for row in range(cache.batch):
        padding = cache.slots - cache.row_lengths[row]
        sinks = set(_named(cache, row, "sinks"))
        own = _named(cache, row, stretch)
        like = [slot - padding for slot in slot_indices(cache, row, marked)]
        like, pool = [s for s in like if s not in sinks], [s for s in own if s not in sinks]
        has_others = like and len(pool) - len(set(like) & set(pool)) >= len(like)
        others = _like_ones(pool, like, own, cache.row_tokens[row]) if has_others else []
        beside.append([slot + padding for slot in others])
    return _mask(cache, beside)


def chosen_mask(
    cache: KVCache, slots: str | SlotQuery | Span | Sequence[int], side: str = "target", *, may_be_empty: bool = False
) -> Tensor:
    """`slot_mask` of a selection that is to change something; a row may be without only where that is allowed.

    Args:
        side: whose cache it is, as an error says.
    Raises:
        EmptySelection: naming the selection and the first row in which it finds nothing.
    """
    mask = slot_mask(cache, slots)
    if not may_be_empty:
        refuse_empty(slots, mask.sum(dim=1).tolist(), side)
    return mask


def _none_of(name: str, chosen: object) -> str:
    """A selection of layers or heads that is empty in a model."""
    return f"{name} {chosen if isinstance(chosen, Span) else []}"


def indices_within(what: str, indices: Sequence[int] | Span, count: int) -> list[int]:
    """Indices of `count` things, each once, ascending; negative ones count from the end.

    Raises:
        CacheError: for one that there is not.
    """
    if isinstance(indices, Span):
        return list(indices.within(count))
    bad = [i for i in indices if not -count <= i < count]
    if bad:
        raise CacheError(f"{what} {shown(bad[0])} does not exist: there are {count} (0 to {count - 1})")
    return sorted({i % count for i in indices})


def _named(cache: KVCache, row: int, name: str) -> list[int]:
    segments = cache.row_segments[row]
    if name == "all":
        return list(range(len(segments)))
    if name == "last":
        return [len(segments) - 1] if segments else []
    if name == "sinks":
        return list(range(min(SINKS, len(segments))))
    if name not in Segment.__members__:
        raise CacheError(f"slots {name!r} is not a selection; use all, {', '.join(Segment.__members__)}, last or sinks")
    return [slot for slot, segment in enumerate(segments) if segment == Segment[name]]


def _query(cache: KVCache, row: int, query: SlotQuery, seed: int) -> list[int]:
    pool = _named(cache, row, query.of)
    if query.without is not None:
        out = set(_named(cache, row, query.without))
        pool = [slot for slot in pool if slot not in out]
    if query.fraction is not None:
        low, high = (round(share * len(pool)) for share in query.fraction)
        pool = pool[low:high]
    if query.keywords is not None:
        matches = _keyword_slots(tuple(cache.pieces[row]), tuple(query.keywords))
        pool = [slot for slot in pool if slot in matches]
    if query.matched_to is not None:
        like = _query(cache, row, query.matched_to, seed)
        stretch = _named(cache, row, query.of)
        if query.equally_frequent:
            pool = _like_ones(pool, like, stretch, cache.row_tokens[row])
        else:
            pool = _matched(pool, like, stretch, seed)
    if query.at_most is not None and len(pool) > query.at_most:
        rng = np.random.Generator(np.random.Philox(key=seed % 2**64))
        pool = sorted(pool[i] for i in rng.permutation(len(pool))[: query.at_most])
    return pool


@functools.lru_cache(maxsize=256)
def _compiled(keyword: str) -> Pattern:
    return Pattern(keyword, re.IGNORECASE)


@functools.lru_cache(maxsize=4096)
def _keyword_slots(pieces: tuple[str, ...], keywords: tuple[str, ...]) -> frozenset[int]:
    """Slots whose piece of text overlaps a match of one of the patterns in the text of the row, case ignored."""
    text = "".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])
    hit: set[int] = set()
    for pattern in keywords:
        for match in _compiled(pattern).finditer(text):
            first = int(np.searchsorted(ends, match.start(), side="right"))
            last = int(np.searchsorted(ends, match.end() - 1, side="right"))
            if match.end() > match.start():
                hit.update(range(first, last + 1))
    return frozenset(hit)


def _free(pool: Sequence[int], like: Sequence[int]) -> list[int]:
    """Slots of `pool` that are not in `like`; at least as many as that has."""
    free = [slot for slot in pool if slot not in set(like)]
    if len(free) < len(like):
        raise CacheError(f"matched_to wants {len(like)} other slots, and only {len(free)} are free")
    return free


def _like_ones(pool: Sequence[int], like: Sequence[int], stretch: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """As many slots of `pool` as `like` has, none of them in it, as near in depth and as like in frequency as can be
    had for all together.

    How frequent a token is, its rank in the vocabulary tells: tokenizers by byte pairs number their tokens in the order
    in which they were merged, the most frequent first. A tenth of the stretch weighs as much as a doubled rank.
    """
    free = _free(pool, like)
    place = {slot: bisect_left(stretch, slot) / max(1, len(stretch)) for slot in {*pool, *like}}

    def traits(slots: Sequence[int]) -> np.ndarray:
        """[slots, 2]: depth in tenths, and log2 of the rank."""
        return np.array([(10 * place[slot], math.log2(1 + max(0, tokens[slot]))) for slot in slots]).reshape(-1, 2)

    apart = np.abs(traits(like)[:, None] - traits(free)[None]).sum(axis=-1)
    _, chosen = linear_sum_assignment(apart)
    return sorted(free[i] for i in chosen)


def _matched(pool: Sequence[int], like: Sequence[int], stretch: Sequence[int], seed: int) -> list[int]:
    """As many slots of `pool` as `like` has, none of them in it, at like depths (tenths of the stretch)."""
    free = _free(pool, like)
    depth = {slot: min(9, 10 * bisect_left(stretch, slot) // max(1, len(stretch))) for slot in {*pool, *like}}
    rng = np.random.Generator(np.random.Philox(key=seed % 2**64))
    chosen: list[int] = []
    for slot in like:
        nearest = min(abs(depth[other] - depth[slot]) for other in free)
        candidates = [other for other in free if abs(depth[other] - depth[slot]) == nearest]
        pick = candidates[int(rng.integers(len(candidates)))]
        chosen.append(pick)
        free.remove(pick)
    return sorted(chosen)
