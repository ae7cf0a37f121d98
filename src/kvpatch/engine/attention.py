"""Attention capture: statistics of every head, reduced while a forward pass runs, a block of queries at a time.

    layer's queries and keys -> scores of a block -> probabilities -> one number a query -> added to the sums

A whole attention map is never held, but for the layers, heads and queries that are asked for by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpatch.caches.kvcache import PAD, KVCache, Origin, Segment
from kvpatch.caches.selection import SINKS
from kvpatch.engine.head_statistics import CLASSES, Block, block_statistics
from kvpatch.errors import CacheError, missing_extra
from kvpatch.specs.arguments import whole
from kvpatch.specs.attention import STATISTICS

if TYPE_CHECKING:
    import xarray as xr

    from kvpatch.models.hf import AttentionInputs

BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Most bytes of the scores of one block: on a CPU so few that the passes over it stay in its cache, on a GPU so many
that launching them is not what takes the time."""


@dataclass(frozen=True)
class Maps:
    """Whole attention maps to keep: of these layers, query heads, and queries. Heads or queries that are None mean all;
    the first token fed is query 0, in prefill as in decoding. A call of a model takes one number for a list of one."""

    layers: Sequence[int] | int
    heads: Sequence[int] | int | None = None
    queries: Sequence[int] | None = None

    @property
    def layers_named(self) -> list[int]:
        """The layers as a list."""
        return [self.layers] if isinstance(self.layers, int) else list(self.layers)

    def heads_of(self, count: int) -> list[int]:
        """The query heads asked for, from 0 to `count`."""
        asked = range(count) if self.heads is None else [self.heads] if isinstance(self.heads, int) else self.heads
        return [head % count for head in asked]


@dataclass(frozen=True)
class AttentionRequest:
    """What of attention is to be captured. `marked` is [batch, slots] of a cache or of prompts: the slots whose mass
    is `mass_marked`; `beside` the same of the slots they are compared with, for `mass_beside_each`. `spread` is
    [batch], the rows whose attention on every slot of the prompt is kept; it is about caches, not about prompts."""

    marked: Tensor | None = None
    maps: Maps | None = None
    beside: Tensor | None = None
    spread: Tensor | None = None

    def of_rows(self, rows: slice | Sequence[int], slots: int) -> AttentionRequest:
        """The same for some rows of the cache, cut on the left to their slots."""
        marked, beside = (
            None if mask is None else mask[rows][:, mask.shape[1] - slots :] for mask in (self.marked, self.beside)
        )
        return AttentionRequest(marked, self.maps, beside, None if self.spread is None else self.spread[rows])


@dataclass(frozen=True)
class Attention:
    """Statistics of every head.

    Attributes:
        values: [batch, layers, query_heads, statistics], float32, in the order of
            `specs.attention.STATISTICS`: the mean over the queries that have one, NaN where none has.
        queries: [batch], queries that were counted.
        maps: layer -> [batch, heads, queries, slots] of the maps asked for, zero past a query's own slot.
        tokens: per row, the text of each of its own slots (padding left out), where a model's call gave it.
        fed: tokens fed to every row, which stand in the last slots; `Maps.queries` counts them from 0.
        asked: the maps asked for.
        by_slot: per row, [layers, query_heads, slots]: the mean over the queries of the attention on each of the
            row's own slots of the prompt, the pending token last; None for a row that it was not asked of. Empty where
            it was asked of none.
    """

    values: Tensor
    queries: Tensor
    maps: dict[int, Tensor]
    tokens: tuple[tuple[str, ...], ...] = ()
    fed: int = 0
    asked: Maps | None = None
    by_slot: tuple[Tensor | None, ...] = ()

    def __getitem__(self, statistic: str) -> Tensor:
        """One statistic, [batch, layers, query_heads]."""
        return self.values[..., list(STATISTICS).index(statistic)]

    def map(self, layer: int, row: int = 0) -> xr.DataArray:
        """The attention of one layer in one row, with its tokens.

        Args:
            layer: one that `Maps` asked for; row: of the batch.
        Returns:
            `xarray.DataArray` (head, query, key). Queries and keys are numbered by slot of the row, padding left out;
            the coordinates `query_token` and `key_token` are their texts.
        Raises:
            CacheError: for a layer without a map, or a row that there is not.
        """
        return labelled_map(self, layer, row)

    @classmethod
    def concat(cls, parts: Sequence[Attention]) -> Attention:
        """Rows of several, in one. Maps must be of equal size."""
        layers = parts[0].maps
        return cls(
            torch.cat([part.values for part in parts]),
            torch.cat([part.queries for part in parts]),
            {layer: torch.cat([part.maps[layer] for part in parts]) for layer in layers},
            tuple(row for part in parts for row in part.tokens),
            parts[0].fed,
            parts[0].asked,
            tuple(row for part in parts for row in part.by_slot),
        )


def labelled_map(attention: Attention, layer: int, row: int) -> xr.DataArray:
    """One layer's map of one row as a labelled array; see `Attention.map`."""
    try:
        import xarray as xr
    except ImportError as error:
        raise (missing_extra(error) or error) from error
    asked = attention.asked
    if asked is None or layer not in attention.maps:
        have = f"there are maps of layers {sorted(attention.maps)}" if attention.maps else "no map was asked for"
        raise CacheError(f"layer {layer} has no map: {have}; ask with maps=kv.Maps(layers=[{layer}], heads=[0])")
    count = len(attention.queries)
    if not -count <= whole("row", row) < count:
        raise CacheError(f"row {row} is not in a batch of {count}")
    values = attention.maps[layer][row]  # [heads, queries, slots]
    slots, tokens = values.shape[2], list(attention.tokens[row]) if attention.tokens else []
    padding = slots - len(tokens) if tokens else 0
    fed = [q for q in range(attention.fed) if asked.queries is None or q in asked.queries]
    own = [(place, slots - attention.fed + q - padding) for place, q in enumerate(fed)]
    own = [(place, slot) for place, slot in own if slot >= 0]  # a shorter row has no query at its padding
    coords: dict[str, Any] = {
        "head": asked.heads_of(attention.values.shape[2]),
        "query": [slot for _, slot in own],
        "key": range(slots - padding),
        "layer": layer,
    }
    if tokens:
        coords |= {"query_token": ("query", [tokens[slot] for _, slot in own]), "key_token": ("key", tokens)}
    kept = values[:, [place for place, _ in own], padding:].float().cpu().numpy()
    return xr.DataArray(kept, dims=["head", "query", "key"], coords=coords, name="attention")


class AttentionCapture:
    """Watches forward passes over one slab and sums up what every head does. A `models.hf.AttentionObserver`.

    Args:
        segments, origins: [batch, slots] of what the slab will hold, as in `KVCache`; slots past them are generated.
        token_ids: [batch, slots] of what it holds already.
        to_capture: what to capture.
    """

    def __init__(
        self, segments: Tensor, origins: Tensor, token_ids: Tensor, positions: Tensor, to_capture: AttentionRequest
    ) -> None:
        self.maps = to_capture.maps
        self._prompt = _classes(segments, origins, to_capture)  # [batch, classes, slots]
        self._token_ids, self._positions = token_ids, positions
        self._only: Tensor | None = None
        self._counted = torch.zeros(0)
        self._sums: dict[int, Tensor] = {}  # layer -> [batch, query_heads, statistics]
        self._counts: dict[int, Tensor] = {}  # as the sums
        self._queries = torch.zeros(len(segments), dtype=torch.int64, device=segments.device)
        self._kept: dict[int, list[Tensor]] = {}
        self._seen = 0
        spread = to_capture.spread
        self._spread = [] if spread is None else spread.nonzero().flatten().tolist()
        self._by_slot: dict[int, Tensor] = {}  # layer -> [rows of `_spread`, query_heads, prompt slots], sums
        self._is_prompt = segments != PAD

    @classmethod
    def after(cls, cache: KVCache, to_capture: AttentionRequest) -> AttentionCapture:
        """For what goes on from a cache. The pending token is of the last slot's segment, and the prompt's own."""
        last = cache.segments[:, -1:] if cache.slots else torch.full_like(cache.pending[:, None], Segment.trailer)
        pending = torch.where(last == PAD, int(Segment.trailer), last)
        segments = torch.cat([cache.segments, pending], dim=1)
        origins = torch.cat([cache.origins, torch.full_like(pending, Origin.own)], dim=1)
        marked, beside = (
            None if mask is None else torch.nn.functional.pad(mask, (0, 1))
            for mask in (to_capture.marked, to_capture.beside)
        )
        to_capture = AttentionRequest(marked, to_capture.maps, beside, to_capture.spread)
        return cls(segments, origins, cache.token_ids, cache.positions, to_capture)

    def only(self, counted: Tensor) -> None:
        """Count only these queries of the next pass: [batch, queries], or [batch, 1] for all alike; a later one is
        not looked at."""
        self._only = counted

    def begin(self, token_ids: Tensor, positions: Tensor) -> None:
        self._counted = positions != PAD
        if self._only is not None:
            self._counted &= self._only
            self._only = None
        asked = self._counted.any(dim=0).nonzero()
        self._last = int(asked[-1]) + 1 if len(asked) else 0
        self._queries += self._counted.sum(dim=1)
        self._token_ids = torch.cat([self._token_ids, torch.where(positions == PAD, PAD, token_ids)], dim=1)
        self._positions = torch.cat([self._positions, positions], dim=1)
        slots = self._positions.shape[1]
        new = self._prompt.new_zeros(len(positions), len(CLASSES), max(0, slots - self._prompt.shape[2]))
        new[:, CLASSES.index("mass_generated")] = 1
        self._classes = torch.cat([self._prompt, new], dim=2)[..., :slots]
        self._seen += positions.shape[1]

    def observe(self, layer: int, inputs: AttentionInputs) -> None:
        batch, heads, queries, dim = inputs.query.shape
        kv_heads, slots = inputs.key.shape[1], inputs.key.shape[2]
        if layer not in self._sums:
            shape = (batch, heads, len(STATISTICS))
            self._sums[layer] = torch.zeros(shape, dtype=torch.float64, device=inputs.query.device)
            self._counts[layer] = torch.zeros_like(self._sums[layer])
        entries = BLOCK_BYTES.get(inputs.query.device.type, BLOCK_BYTES["cpu"]) // (4 * batch * heads)
        high = 0
        while high < self._last:
            low, before = high, slots - queries + high
            high = min(low + _queries_of_a_block(before, entries), self._last)
            end = slots - queries + high  # no later slot is seen
            query = inputs.query[:, :, low:high].float().reshape(batch, kv_heads, -1, dim) * inputs.scaling
            scores = (query @ inputs.key[:, :, :end].float().mT).reshape(batch, heads, high - low, end)
            if inputs.softcap is not None:
                scores = torch.tanh(scores / inputs.softcap) * inputs.softcap
            block = Block(
                scores,
                inputs.bias[:, :, low:high, :end].float(),
                self._classes[..., :end].to(scores.device),
                self._positions[:, :end].to(scores.device),
                self._token_ids[:, :end].to(scores.device),
                inputs.sinks,
            )
            found, p = block_statistics(block)
            self._add(layer, torch.stack(list(found.values()), dim=-1), self._counted[:, low:high])
            if self._spread:
                self._add_by_slot(layer, p, self._counted[:, low:high])
            self._keep(layer, p, range(self._seen - queries + low, self._seen - queries + high))

    def _add(self, layer: int, values: Tensor, counted: Tensor) -> None:
        """values: [batch, query_heads, queries, statistics]; counted: [batch, queries]."""
        is_there = counted[:, None, :, None].to(values.device) & ~values.isnan()
        self._sums[layer] += torch.where(is_there, values, 0).sum(dim=2, dtype=torch.float64)
        self._counts[layer] += is_there.sum(dim=2)

    def _add_by_slot(self, layer: int, p: Tensor, counted: Tensor) -> None:
        """p: [batch, query_heads, queries, slots]; counted: [batch, queries]."""
        slots = min(p.shape[3], self._is_prompt.shape[1])
        own, weights = p[self._spread][..., :slots].double(), counted[self._spread].to(p.device).double()
        if layer not in self._by_slot:
            self._by_slot[layer] = own.new_zeros(len(self._spread), p.shape[1], self._is_prompt.shape[1])
        self._by_slot[layer][..., :slots] += torch.einsum("rhqs,rq->rhs", own, weights)

    def _keep(self, layer: int, p: Tensor, queries: range) -> None:
        """p: [batch, query_heads, queries, slots]."""
        if self.maps is None or layer not in self.maps.layers_named:
            return
        wanted = self.maps.queries
        chosen = [i for i, query in enumerate(queries) if wanted is None or query in wanted]
        kept = p[:, self.maps.heads_of(p.shape[1])][:, :, chosen]
        self._kept.setdefault(layer, []).extend(kept.unbind(dim=2))

    def result(self) -> Attention:
        """What was seen so far.

        Raises:
            CacheError: where maps were asked for of queries that there were none of.
        """
        if any(not rows for rows in self._kept.values()):
            assert self.maps is not None
            raise CacheError(
                f"none of the queries {list(self.maps.queries or ())} of the maps was fed; {self._seen} were, from 0"
            )
        layers, device = range(len(self._sums)), self._queries.device
        sums, counts = (
            torch.stack([of[layer].to(device) for layer in layers], dim=1) for of in (self._sums, self._counts)
        )
        slots = self._positions.shape[1]
        maps = {
            layer: torch.stack([torch.nn.functional.pad(p, (0, slots - p.shape[2])) for p in rows], dim=2).to(device)
            for layer, rows in self._kept.items()
        }
        return Attention(
            (sums / counts).float(),
            self._queries,
            maps,
            fed=self._seen,
            asked=self.maps,
            by_slot=self._spread_of_rows(),
        )

    def _spread_of_rows(self) -> tuple[Tensor | None, ...]:
        """What `Attention.by_slot` holds."""
        if not self._spread:
            return (None,) * len(self._queries)
        sums = torch.stack([self._by_slot[layer] for layer in range(len(self._by_slot))], dim=1)
        found: list[Tensor | None] = [None] * len(self._queries)
        for place, row in enumerate(self._spread):
            own = sums[place][..., self._is_prompt[row].to(sums.device)]
            found[row] = (own / self._queries[row].to(sums.device)).float()
        return tuple(found)


def _queries_of_a_block(before: int, entries: int) -> int:
    """The most queries q that see `before` slots and each other with q * (before + q) <= entries; at least one.
    Blocks of one size leave no holes in memory."""
    return max(1, int((math.sqrt(before**2 + 4 * entries) - before) / 2))


def _classes(segments: Tensor, origins: Tensor, to_capture: AttentionRequest) -> Tensor:
    """[batch, classes, slots] of prompt slots; none for padding."""

    def asked(mask: Tensor | None) -> Tensor:
        return torch.zeros_like(is_real) if mask is None else rest & mask

    is_real = segments != PAD
    is_sink = is_real & (is_real.cumsum(dim=1) <= SINKS)
    rest = is_real & ~is_sink
    of = {
        "mass_sinks": is_sink,
        "mass_template": rest & (segments <= Segment.template),
        "mass_body": rest & (segments == Segment.body),
        "mass_trailer": rest & (segments == Segment.trailer),
        "mass_generated": torch.zeros_like(is_real),
        "mass_own": rest & (origins == Origin.own),
        "mass_patched": rest & (origins == Origin.patched),
        "mass_marked": asked(to_capture.marked),
    }
    weights = {name: is_of.float() for name, is_of in of.items()}
    for name, is_of in (("marked", asked(to_capture.marked)), ("beside", asked(to_capture.beside))):
        weights[f"mass_{name}_each"] = is_of / is_of.sum(dim=1, keepdim=True)  # not a number where there is none
    return torch.stack([weights[name] for name in CLASSES], dim=1)
