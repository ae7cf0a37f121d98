"""Trials of a batch that are one computation: equal caches, to the bit, that go on with the same noise.

The conditions of a pair draw the same noise. So the natural source and a swap of all its slots into the target give the
same tokens and the same readouts; each such computation is made once. Whether caches are equal is read off their
numbers (`KVCache.checksums`) and never off how they were made.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from kvpatch.caches.kvcache import PAD
from kvpatch.executors.conditions import Built
from kvpatch.interventions.steering import RowSteering
from kvpatch.planning.plan import Batch


@dataclass(frozen=True)
class Distinct:
    """What of a batch is computed.

    batch, built: the first trial of each computation. of: for every trial of the whole batch its place there.
    """

    batch: Batch
    built: Built
    of: list[int]


def distinct(batch: Batch, built: Built, checksums: Sequence[str]) -> Distinct:
    """The computations that a batch's trials come to.

    Trials of integrity conditions are computed each by itself, since they are there to show that equal caches give
    equal texts. So are trials that are steered while they write, and all of a phase that watches attention, since what
    is captured depends on which slots a condition touched.

    Args:
        checksums: of the rows of the built cache.
    """
    count = len(batch.trials)
    keys = list[Hashable](range(count)) if batch.watched is not None else _keys(batch, built, checksums)
    places: dict[Hashable, int] = {}
    of = [places.setdefault(key, len(places)) for key in keys]
    if len(places) == count:
        return Distinct(batch, built, of)
    firsts = [of.index(place) for place in range(len(places))]
    steering = built.steering
    return Distinct(
        batch.model_copy(update={"trials": [batch.trials[i] for i in firsts]}),
        replace(
            built,
            cache=built.cache[firsts],
            errors=[built.errors[i] for i in firsts],
            planned=[built.planned[i] for i in firsts],
            fired=[built.fired[i] for i in firsts],
            touched=[built.touched[i] for i in firsts],
            steering=steering and RowSteering({layer: step[firsts] for layer, step in steering.steps.items()}),
        ),
        of,
    )


def _keys(batch: Batch, built: Built, checksums: Sequence[str]) -> list[Hashable]:
    """Equal for trials that are one computation."""
    cache, count = built.cache, len(batch.trials)
    is_steered = torch.zeros(count, dtype=torch.bool, device=cache.positions.device)
    for step in () if built.steering is None else built.steering.steps.values():
        is_steered |= step.flatten(1).any(dim=1).to(is_steered.device)
    is_alone = [
        steered or batch.roles[trial.condition] == "integrity"
        for trial, steered in zip(batch.trials, is_steered.tolist(), strict=True)
    ]
    pending, starts = cache.row_pending, cache.row_pending_position
    positions = [tuple(at for at in row if at != PAD) for row in cache.positions.tolist()]
    return [
        i if alone else (trial.pair, trial.seed, checksums[i], pending[i], starts[i], positions[i])
        for i, (trial, alone) in enumerate(zip(batch.trials, is_alone, strict=True))
    ]
