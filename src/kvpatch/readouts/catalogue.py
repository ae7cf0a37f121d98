"""The readouts that a hypothesis may name, and what each asks of the phase that measures it.

They are the columns of a trial that measure an outcome, derived from `store.TRIAL_COLUMNS`: every number with a
fraction, and the count of tokens written. Ids, seeds, counts of hooks and lists are columns, and no readouts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from kvpatch.store import TRIAL_COLUMNS

COUNTS = ("n_tokens",)
"""Whole numbers that measure an outcome."""
DERIVED = ("source_tokens",)
"""Readouts that are made of another column: the length of `source_token_ids`."""
POSITIVE = ("rv_", "pr_", "n_tokens", "source_tokens", "attention_marked_lift")
"""Readouts, by the beginning of their names, that are above 0 by their definition, so that they have a logarithm."""
MARKED = ("attention_marked", "attention_marked_lift")


@dataclass(frozen=True)
class Readout:
    """One readout.

    asks: what a phase must say for it to be measured; None where every phase measures it. is_positive: whether it is
    always above 0.
    """

    name: str
    asks: Literal["attention", "attention.marked", "geometry"] | None
    is_positive: bool


@functools.cache
def readouts() -> dict[str, Readout]:
    """Every readout by its name."""
    measures = [name for name, (kind, _) in TRIAL_COLUMNS.items() if pa.types.is_floating(kind)]
    names = [*measures, *COUNTS, *DERIVED]
    return {name: Readout(name, _asks(name), name.startswith(POSITIVE)) for name in names}


def _asks(name: str) -> Literal["attention", "attention.marked", "geometry"] | None:
    if name in MARKED:
        return "attention.marked"
    if name.startswith("attention_"):
        return "attention"
    return "geometry" if name.startswith(("pr_", "angle_")) else None
