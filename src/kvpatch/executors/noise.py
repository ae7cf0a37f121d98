"""The noise floor of a run's own trials: some of them computed once more, in other company.

trials of the first group of a model -> a share of their pairs, measured again in smaller batches -> what changed

In bfloat16 a trial depends on the shape of the batch that it is computed in, and how much differs between conditions:
prompts that are read behind another (M1) and destroyed caches change more than natural ones. So a second run, resumed
or with another number of pairs, gives other texts for some trials. What is stored here says for how many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import binomtest

from kvpatch.engine.model import Model
from kvpatch.executors.groups import part_of
from kvpatch.executors.rows import Measured, rows_of
from kvpatch.planning.plan import Batch
from kvpatch.readouts.specific_mode import SpecificMode
from kvpatch.specs.readouts import readouts

SHARES = ((0, 1 / 8), (1 / 8, 1 / 2))
"""Shares of the pairs that are measured again, each as a batch of its own."""
Measure = Callable[[Model, Batch], list[Measured]]


def is_worth_repeating(model: Model) -> bool:
    """Whether a trial may depend on its company by more than rounding: not in float32 on a processor."""
    backbone = model.backbone
    return backbone.dtype != torch.float32 or backbone.device.type == "cuda"


def repeated_trials(
    model: Model, batch: Batch, first: Sequence[Measured], rule: SpecificMode | None, measure: Measure
) -> dict[str, Any]:
    """Measure half of a batch's pairs again, in two smaller batches, and compare.

    Args:
        first: what the batch gave, in the order of its trials.
        measure: how the run measures a batch.
    Returns:
        How many trials were repeated, of a batch of how many; the share whose text stayed the same, and that share by
        condition where it is below 1; the lower end of the exact 95% interval of each share, of every condition's too,
        since few repeats that all stay the same show little; and over all conditions the largest change of each readout
        that does not depend on the text that a trial wrote.
    """
    names = [of.name for of in readouts().values() if of.is_stored and not of.is_of_sampled_text and of.asks is None]
    pairs = len(batch.pairs)
    same: dict[str, list[bool]] = {}
    largest = dict.fromkeys(names, 0.0)
    for low, high in SHARES:
        chosen = range(math.floor(low * pairs), math.ceil(high * pairs))
        part = part_of(batch, chosen)
        if not part.trials:
            continue
        before = [of for trial, of in zip(batch.trials, first, strict=True) if trial.pair in chosen]
        again = measure(model, part)
        rows = rows_of(part, before, None, rule), rows_of(part, again, None, rule)
        for one, two, of_one, of_two in zip(*rows, before, again, strict=True):
            same.setdefault(one["condition"], []).append(of_one.output_token_ids == of_two.output_token_ids)
            for name in names:
                largest[name] = max(largest[name], _change(one[name], two[name]))
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
