"""Which caches of a batch equal a prompt's natural run, decided from their numbers and never from how they were made.

A full swap of any prompt is a run of that prompt's text, however it is spelled: by `align: replace`, by bands that
together are all layers, by the residual stream at every position. What such a condition shows is a text's effect.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvpatch.caches.kvcache import PAD, KVCache
from kvpatch.caches.rope import Turns
from kvpatch.caches.stacks import over_layers
from kvpatch.executors.conditions import Natural
from kvpatch.planning.plan import Batch
from kvpatch.protocols.conditions import ROLES

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest difference, as a share of the largest number of the layer, that rounding alone explains."""
COARSE = 5e-2
"""The same in half precision, where a key that was turned is rounded again."""


def equal_texts(batch: Batch, natural: Natural, cache: KVCache) -> list[str | None]:
    """For every trial the role of the prompt whose natural run its cache equals, None where no text of its pair does.

    A cache equals a run where it has as many slots, the same values in every slot and layer, and the same keys, up to
    a shift of all positions and of the pending token's by one number, which changes nothing the model computes.

    Args:
        natural: the natural caches of the batch's prompts.
        cache: one row per trial.
    """
    found: list[str | None] = [None] * len(batch.trials)
    generator = torch.Generator().manual_seed(1)
    of_slots = torch.randn(max(cache.slots, natural.cache.slots), generator=generator)
    marks, of_natural = _marks(cache, of_slots), _marks(natural.cache, of_slots)
    lengths, natural_lengths = cache.row_lengths, natural.cache.row_lengths
    tolerance = TOLERANCE.get(cache.values[0].dtype, COARSE)
    of_like_length: list[tuple[int, int, str]] = []
    for i, trial in enumerate(batch.trials):
        pair = batch.pairs[trial.pair]
        for role in sorted(pair.texts, key=lambda name: ROLES.index(name) if name in ROLES else len(ROLES)):
            row = natural.row.get((trial.pair, role))
            if row is not None and lengths[i] == natural_lengths[row]:
                of_like_length.append((i, row, role))
    rows, natural_rows = [i for i, _, _ in of_like_length], [row for _, row, _ in of_like_length]
    apart = np.abs(marks[rows] - of_natural[natural_rows]).max(axis=1)  # [pairs of rows]
    candidates = [pair for pair, is_near in zip(of_like_length, apart <= 10 * tolerance, strict=True) if is_near]
    holds = _are_equal(cache, natural.cache, [c[:2] for c in candidates], tolerance)
    for (i, _, role), is_equal in zip(candidates, holds, strict=True):
        if is_equal and found[i] is None:
            found[i] = role
    return found


def _marks(cache: KVCache, of_slots: Tensor) -> np.ndarray:
    """A number per row and layer, [rows, layers]: a random sum of the row's values over their size.

    The sum is aligned with the last slot, so that rows of unlike padding compare. Rows whose values differ in any one
    slot have different sums but by rare chance.

    of_slots: a weight for each slot, those of the last slots last; at least as many as the cache has.
    """
    slot_weights = of_slots[len(of_slots) - cache.slots :].reshape(1, 1, -1, 1)
    is_real = (cache.positions != PAD)[:, None, :, None]

    def marked(values: Tensor) -> Tensor:
        *_, heads, _, dim = values.shape
        weights = torch.randn(1, heads, 1, dim, generator=torch.Generator().manual_seed(0))
        real = torch.where(is_real.to(values.device), values, 0).float()
        weighted = real * weights.to(real.device) * slot_weights.to(real.device)
        return weighted.sum((-3, -2, -1)) / real.square().sum((-3, -2, -1)).sqrt().clamp(min=1e-20)

    layers = over_layers(marked, cache.values)
    # One transfer per device.
    return torch.stack([marks.to(cache.positions.device) for marks in layers], dim=1).cpu().numpy()


def _are_equal(cache: KVCache, natural: KVCache, rows: Sequence[tuple[int, int]], tolerance: float) -> list[bool]:
    """Whether each pair of rows, of `cache` and of `natural`, has the same values, and the same keys up to a shift."""
    if not rows:
        return []
    mine, theirs = cache[[i for i, _ in rows]], natural[[j for _, j in rows]]
    is_real = mine.positions != PAD
    delta = torch.where(is_real, mine.positions - theirs.positions, 0)  # [rows, slots]
    shift = mine.pending_position - theirs.pending_position
    holds = ((delta == shift[:, None]) | ~is_real).all(dim=1)
    if any(rope.keeps_its_place for rope in mine.rope):
        holds &= shift == 0
        delta = torch.zeros_like(delta)
    in_row = is_real[:, None, :, None]
    turns = Turns(delta)

    def same(one: Tensor, other: Tensor) -> Tensor:
        here = in_row.to(one.device)
        apart = torch.where(here, (one - other).abs(), 0).amax(dim=(-3, -2, -1))
        return apart <= tolerance * torch.where(here, other.abs(), 0).amax(dim=(-3, -2, -1))

    turned = over_layers(lambda rope, keys: turns.turn(keys, rope), theirs.keys, of=mine.rope)
    layers = (*over_layers(same, mine.values, theirs.values), *over_layers(same, mine.keys, turned))
    return (holds & torch.stack([of_layer.to(holds.device) for of_layer in layers]).all(dim=0)).tolist()
