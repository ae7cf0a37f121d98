"""The noise floor of a run's own trials: some of them computed once more, in other company.

trials of the first group of a model -> a share of their pairs, measured again in smaller batches -> what changed

In bfloat16, where the model is not batch-invariant, a trial depends on the shape of the batch that it is computed in.
How much differs between conditions: prompts that are read behind another (M1) and destroyed caches change more than
natural ones. So a second run, resumed or with another number of pairs, gives other texts for some trials. What is
stored here says for how many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from scipy.stats import binomtest

from kvpatch.engine.backend import fast_of
from kvpatch.engine.model import Model
from kvpatch.executors.groups import part_of
from kvpatch.executors.rows import Measured, forced_readouts
from kvpatch.planning.plan import Batch
from kvpatch.readouts.specific_mode import SpecificMode

SHARES = ((0, 1 / 8), (1 / 8, 1 / 2))
"""Shares of the pairs that are measured again, each as a batch of its own."""
INVARIANT_SHARES = ((0, 1 / 16),)
"""The same where rows are made not to depend on their company (decision 020), which a few show as well."""
Measure = Callable[[Model, Batch], list[Measured]]


def is_worth_repeating(model: Model) -> bool:
    """Whether a trial may depend on its company by more than rounding: not in float32 on a processor."""
    backbone = model.backbone
    return not backbone.is_exact or backbone.device.type == "cuda"


def repeated_trials(
    model: Model, batch: Batch, first: Sequence[Measured], rule: SpecificMode | None, measure: Measure
) -> dict[str, Any]:
    """Measure half of a batch's pairs again, in two smaller batches, and compare; few of them in one batch where the
    model is batch-invariant.

    Args:
        first: what the batch gave, in the order of its trials.
        measure: how the run measures a batch.
    Returns:
        How many trials were repeated, of a batch of how many; the share whose text stayed the same, and that share by
        condition where it is below 1; the lower end of the exact 95% interval of each share, of every condition's too,
        since few repeats that all stay the same show little; and over all conditions the largest change of each readout
        that does not depend on the text that a trial wrote.
    """
    pairs = len(batch.pairs)
    same: dict[str, list[bool]] = {}
    largest: dict[str, float] = {}
    for low, high in INVARIANT_SHARES if fast_of(model.backbone).is_batch_invariant else SHARES:
        chosen = range(math.floor(low * pairs), math.ceil(high * pairs))
        part = part_of(batch, chosen)
        if not part.trials:
            continue
        before = [of for trial, of in zip(batch.trials, first, strict=True) if trial.pair in chosen]
        again = measure(model, part)
        for trial, one, two in zip(part.trials, before, again, strict=True):
            same.setdefault(trial.condition, []).append(one.output_token_ids == two.output_token_ids)
            numbers = forced_readouts(part, two, rule)
            for name, number in forced_readouts(part, one, rule).items():
                if not isinstance(number, list):  # what is stored by position or covariate is part of a number here
                    largest[name] = max(largest.get(name, 0.0), _change(number, numbers[name]))
    every = [equal for of in same.values() for equal in of]
    return {
        "repeated": len(every),
        "of_batch": len(batch.trials),
        "texts_equal": sum(every) / len(every) if every else None,
        "texts_equal_at_least": _at_least(every) if every else None,
        "texts_equal_by_condition": {name: sum(of) / len(of) for name, of in same.items() if not all(of)},
        "texts_equal_by_condition_at_least": {name: _at_least(of) for name, of in same.items()},
        "largest_change": largest,
    }


def _at_least(equal: Sequence[bool]) -> float:
    """Lower end of the 95% interval of a share (Clopper and Pearson 1934)."""
    return float(binomtest(sum(equal), len(equal)).proportion_ci(0.95, method="exact").low)


def _change(one: float | None, two: float | None) -> float:
    """How far a number moved; infinite where it is known in one of both alone."""
    known = [number is not None and math.isfinite(number) for number in (one, two)]
    if one is None or two is None or not all(known):
        return math.inf if any(known) else 0.0
    return abs(one - two)
