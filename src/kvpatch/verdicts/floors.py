"""Where a contrast's readout hardly scored, or not at all: what may still be said of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kvpatch.specs.readout import Transform
from kvpatch.statistics.floors import rare_contrast_bounds, zeros_dominate
from kvpatch.statistics.grid import Floats, on_grid
from kvpatch.statistics.intervals import Interval
from kvpatch.verdicts.pairs import contrast_table, pair_means, rows_of
from kvpatch.verdicts.rounding import number


@dataclass(frozen=True)
class Floor:
    """What a contrast can say where its readout hardly scored.

    constant: the one value that every pair has under every condition, None where values vary.
    bounds: exact bounds of the contrast where its hits are rare (`statistics.floors`), else None.
    hits: condition -> units with a hit, of `units`.
    """

    constant: float | None = None
    bounds: Interval | None = None
    hits: Mapping[str, int] | None = None
    units: int = 0

    @property
    def told(self) -> str:
        """How rare hits are, and the bounds that follow, for the middle of a sentence."""
        assert self.bounds is not None and self.hits is not None
        counts = " and ".join(f"{count} of {self.units} values of {name}" for name, count in self.hits.items())
        ends = f"{number(self.bounds.low)} to {number(self.bounds.high)}"
        return f"only {counts} have a hit, and the exact bounds for so few hits, {ends},"

    def within(self, low: float, high: float) -> bool:
        """Whether what the hits allow lies between two limits; True where hits are not rare."""
        return self.bounds is None or (low < self.bounds.low and self.bounds.high < high)


def floor_of(
    trials: pd.DataFrame,
    phase: str,
    weights: Mapping[str, int],
    readout: str,
    transform: Transform = "none",
    units: Mapping[str, str] | None = None,
) -> Floor:
    """Look whether a contrast's readout scored at all, and whether its hits are rare.

    trials: prepared rows of every split and phase; the calibration pairs' hits say how large one can be. weights:
    condition -> +1 or -1. Without a unit that has every condition there is nothing to say.

    Raises:
        StoreError: if the readout is not a column.
    """
    means = pair_means(rows_of(trials, split="test", phase=phase), weights, readout, transform)
    table = contrast_table(means, {name: {name: 1} for name in weights}, units)
    values = on_grid(table.to_numpy(dtype=float).reshape(len(table), len(weights)))
    return floor_of_values(values, weights, transform, lambda: _hits(rows_of(trials, split="calibration"), readout))


def floor_of_values(
    values: Floats, weights: Mapping[str, int], transform: Transform, known: Callable[[], Floats]
) -> Floor:
    """The same from values [units, conditions], in the order of `weights`. known: hits among the calibration pairs'
    means, asked for only where hits are rare."""
    if values.size > 1 and bool((values == values.flat[0]).all()):
        return Floor(constant=float(values.flat[0]))
    if transform != "none" or not zeros_dominate(values):
        return Floor()
    columns = dict(zip(weights, values.T, strict=True))
    return Floor(
        bounds=rare_contrast_bounds([(weights[name], column) for name, column in columns.items()], known()),
        hits={name: int(np.count_nonzero(column)) for name, column in columns.items()},
        units=len(values),
    )


def _hits(rows: pd.DataFrame, readout: str) -> Floats:
    """The hits among the pairs' means of the calibration, [hits]."""
    if readout not in rows.columns:
        return np.empty(0)
    values = pair_means(rows, sorted(rows["condition"].unique()), readout).to_numpy(dtype=float)
    return values[np.isfinite(values) & (values > 0)]


def nothing_scored(floor: Floor, readout: str, contrast: str, phase: str) -> str | None:
    """The sentence for a readout that has one value throughout; None where its values vary."""
    if floor.constant is None or not math.isfinite(floor.constant):
        return None
    return (
        f"nothing scored: {readout} is {number(floor.constant)} in every pair and condition of {contrast} in phase "
        f"{phase}, so it can tell neither an effect nor its absence."
    )
