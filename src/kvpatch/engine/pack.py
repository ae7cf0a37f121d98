"""Tokens of many rows, one behind the other without padding, and what each may look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Held:
    """Keys and values that a reading goes on from; a `KVCache` has these fields too.

    Attributes:
        keys, values: a tensor per layer, [rows, kv_heads, slots, head_dim], keys after RoPE; rows are right-aligned.
        positions: [rows, slots], -1 where padded.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    positions: Tensor


@dataclass(frozen=True)
class Segments:
    """Stretches of tokens, each of one row: one number per stretch in every field.

    A stretch's tokens see the `cached` slots of row `cache_row` of the cache from slot `first` on, then the token at
    `pending` of the pack where that is not -1, then the stretch itself from its beginning on. `start` and `count` are
    its place in the pack.
    """

    cache_row: np.ndarray
    first: np.ndarray
    cached: np.ndarray
    pending: np.ndarray
    start: np.ndarray
    count: np.ndarray

    def tiles(self, queries: int) -> np.ndarray:
        """[tiles, 8]: stretches cut into tiles of at most so many queries."""
        pieces = -(-self.count // queries)
        of = np.repeat(np.arange(len(self.count)), pieces)
        piece = np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        seen = self.cached + (self.pending >= 0)
        return np.stack(
            [
                self.cache_row[of],
                self.first[of],
                self.cached[of],
                self.pending[of],
                self.start[of],
                self.start[of] + piece * queries,
                seen[of] + piece * queries,
                np.minimum(self.count[of] - piece * queries, queries),
            ],
            axis=1,
        ).astype(np.int32)


@dataclass(frozen=True)
class Pack:
    """Tokens to read: ids and positions [tokens], the stretches they form, and where each stands in the padded table
    [rows, columns] that edits are made in."""

    token_ids: np.ndarray
    positions: np.ndarray
    segments: Segments
    row: np.ndarray
    column: np.ndarray
    shape: tuple[int, int]


def pack_rows(
    rows: Sequence[Sequence[tuple[int, int]]], cached: Sequence[int] | None = None, cache: Held | None = None
) -> Pack:
    """Rows of (token id, position) pairs, each a stretch of its own.

    Args:
        cached: for every row the tokens of the cache's row of the same number, right-aligned there, that come before.
    """
    count = np.array([len(row) for row in rows])
    slots = 0 if cache is None else cache.positions.shape[1]
    held = np.zeros_like(count) if cached is None else np.array(cached)
    number = np.arange(len(rows))
    flat = np.array([pair for row in rows for pair in row], dtype=np.int64).reshape(-1, 2)
    start = np.cumsum(count) - count
    segments = Segments(number, slots - held, held, np.full_like(count, -1), start, count)
    row = np.repeat(number, count)
    column = np.arange(len(flat)) - np.repeat(start, count) + (count.max(initial=0) - count)[row]
    return Pack(flat[:, 0], flat[:, 1], segments, row, column, (len(rows), int(count.max(initial=0))))
