"""Packed tokens: every query's tile says how many keys of its row come before it. Needs no GPU."""

from __future__ import annotations

import numpy as np
import torch

from kvpatch.engine.pack import Held, pack_rows
from kvpatch.engine.score import _pack, _packed


def numbers_of(tiles: np.ndarray, tokens: int) -> list[int]:
    """For every packed token the number of its row's keys before it, as the tiles tell; -1 where no tile has it."""
    found = [-1] * tokens
    for _, _, _, _, _, query, index, count in tiles.tolist():
        for step in range(count):
            assert found[query + step] == -1
            found[query + step] = index + step
    return found


def test_every_token_of_a_row_follows_those_before_it_however_tiles_are_cut():
    rows = [[(5, i) for i in range(length)] for length in (1, 7, 16, 33)]
    for queries in (1, 4, 16, 64):
        pack = pack_rows(rows)
        assert numbers_of(pack.segments.tiles(queries), 57) == [i for length in (1, 7, 16, 33) for i in range(length)]


def test_rows_behind_a_cache_are_counted_from_its_first_slot():
    held = Held([], [], torch.zeros(2, 12, dtype=torch.int64))
    pack = pack_rows([[(5, 3), (6, 4)], [(7, 9)]], [3, 9], held)
    assert numbers_of(pack.segments.tiles(16), 3) == [3, 4, 9]
    assert pack.segments.first.tolist() == [9, 3]


def test_every_continuation_is_counted_as_if_it_stood_alone_behind_the_pending_token():
    made = _pack([50, 51], [[[1, 2, 3], [4, 5]], [[6, 7, 8, 9]]], [0, 1], (2, 2, 4), False)
    pack, packed_at = _packed(made, [10, 20], [1, 0], [8, 12], 12)
    # The pending token and all but the last of each continuation are fed: 1 + 2 + 1, and 1 + 3.
    assert pack.token_ids.tolist() == [50, 1, 2, 4, 51, 6, 7, 8]
    assert numbers_of(pack.segments.tiles(2), 8) == [8, 9, 10, 9, 12, 13, 14, 15]
    assert pack.segments.pending.tolist() == [-1, 0, 0, -1, 4]
    assert pack.segments.cache_row.tolist() == [1, 1, 1, 0, 0]
    assert pack.positions.tolist() == [10, 11, 12, 11, 20, 21, 22, 23]
    assert [int(packed_at[at]) for at in made.read_at] == [0, 1, 2, 0, 3, 4, 5, 6, 7]
