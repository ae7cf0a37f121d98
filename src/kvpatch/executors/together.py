"""Measure a group of batches on a model: all rows together where they fit, and once a noise floor of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvpatch.engine.batching import release
from kvpatch.engine.model import Model
from kvpatch.executors.batch import OnTokens, measure
from kvpatch.executors.groups import merged
from kvpatch.executors.noise import is_worth_repeating, repeated_trials
from kvpatch.executors.rows import Measured
from kvpatch.planning.plan import Batch
from kvpatch.readouts.specific_mode import SpecificMode


def measure_together(
    model: Model, batches: Sequence[Batch], *, on_tokens: OnTokens | None = None, places: int | None = None
) -> list[list[Measured]]:
    """Measure batches of one phase together; half of them at a time where memory runs out.

    Returns:
        For each batch what its trials gave, in their order.
    Raises:
        torch.OutOfMemoryError: where one batch by itself does not fit.
    """
    whole = merged([batch for batch in batches if batch.trials] or batches[:1])
    try:
        found = iter(measure(model, whole, on_tokens=on_tokens, places=places) if whole.trials else [])
    except torch.OutOfMemoryError:
        if len(batches) == 1:
            raise
    else:
        return [[next(found) for _ in batch.trials] for batch in batches]
    release(model.backbone)
    middle = len(batches) // 2
    parts = (batches[:middle], batches[middle:])
    return [of for part in parts for of in measure_together(model, part, on_tokens=on_tokens, places=places)]


def noise_of(
    model: Model,
    batches: Sequence[Batch],
    measured: Sequence[Sequence[Measured]],
    rule: SpecificMode | None,
    places: int | None,
) -> dict[str, Any] | None:
    """What changes where some trials of a group are measured again in other company; None where nothing can."""
    whole = merged([batch for batch in batches if batch.trials] or batches[:1])
    if not whole.trials or not is_worth_repeating(model):
        return None
    found = [of_trial for of_batch in measured for of_trial in of_batch]
    return repeated_trials(model, whole, found, rule, lambda model, batch: measure(model, batch, places=places))
