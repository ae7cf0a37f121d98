"""Batches that run together: a plan's batches are pieces to store; a GPU wants more rows at a time than one has.

Groups depend on the plan and the machine alone, not on what is done, so that a resumed run repeats them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from kvpatch.engine.batching import LEFT_FREE, bytes_per_place, free_bytes, most_places
from kvpatch.engine.model import Model
from kvpatch.engine.token_budget import pass_bytes
from kvpatch.interventions.build import prompts_in_cache
from kvpatch.planning.plan import Batch


def phases_of(batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Consecutive batches that may run together: of one phase, and not some of before a run grew with some of after."""
    for _, phase in groupby(batches, key=lambda batch: (batch.model, batch.phase, batch.split, batch.segment)):
        yield list(phase)


def groups(batches: Sequence[Batch], most: Callable[[Sequence[Batch]], int]) -> Iterator[list[Batch]]:
    """Consecutive batches of one phase, of up to `most` trials and about equally many. What a run had before it grew
    and what came to it are apart, so that the first is not run again.

    most: most trials to run together, asked of all batches of a phase; 1 runs each batch by itself.
    """
    for of_phase in phases_of(batches):
        total = sum(len(batch.trials) for batch in of_phase)
        even = total / math.ceil(total / max(1, most(of_phase))) if total else 1
        group: list[Batch] = []
        for batch in of_phase:
            if group and sum(len(b.trials) for b in group) + len(batch.trials) / 2 > even:
                yield group
                group = []
            group.append(batch)
        if group:
            yield group


def merged(batches: Sequence[Batch]) -> Batch:
    """One batch of several of one phase; their trials stand one batch behind the other."""
    first = batches[0]
    if len(batches) == 1:
        return first
    pairs, trials = [], []
    for batch in batches:
        trials += [trial.model_copy(update={"pair": trial.pair + len(pairs)}) for trial in batch.trials]
        pairs += batch.pairs
    conditions = {name: condition for batch in batches for name, condition in batch.conditions.items()}
    return first.model_copy(update={"pairs": pairs, "trials": trials, "conditions": conditions})


def part_of(batch: Batch, pairs: range) -> Batch:
    """Some neighbouring pairs of a batch as a batch of their own, with their trials in the same order."""
    trials = [trial for trial in batch.trials if trial.pair in pairs]
    return batch.model_copy(
        update={
            "pairs": [batch.pairs[pair] for pair in pairs],
            "trials": [trial.model_copy(update={"pair": trial.pair - pairs.start}) for trial in trials],
        }
    )


def rows_that_fit(model: Model, batches: Sequence[Batch]) -> int:
    """Trials to run together on a model's device: one batch at a time on a CPU, as many as fit on a GPU."""
    backbone = model.backbone
    if backbone.device.type != "cuda":
        return 1
    texts = {text for batch in batches for pair in batch.pairs for text in pair.texts.values() if text}
    slots = max(len(model.encode(text).token_ids) for text in texts)
    changes = [condition.change for batch in batches for condition in batch.conditions.values()]
    slots *= max(map(prompts_in_cache, changes), default=1)
    geometry = backbone.geometry
    slot = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * backbone.head.weight.element_size()
    # A trial's own cache is there twice while it is built; its prompts' caches are shared.
    per_trial = bytes_per_place(backbone, slots, batches[0].generation.max_new_tokens) + 3 * slots * slot
    free = free_bytes(backbone)
    return max(1, min(most_places(backbone), int(((1 - LEFT_FREE) * free - pass_bytes(backbone)) / per_trial)))
