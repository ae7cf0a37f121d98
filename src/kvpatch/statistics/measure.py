"""The numbers of one hypothesis, before anything is decided."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from kvpatch.protocols.schema import Hypothesis, Protocol
from kvpatch.statistics import tests
from kvpatch.statistics.intervals import Interval, Ratio, bca_interval, fieller_interval
from kvpatch.statistics.margins import (
    NATURAL_SOURCE,
    NATURAL_TARGET,
    Bound,
    margin_of,
    natural_gap,
    too_small_to_matter,
)
from kvpatch.statistics.pairs import (
    PairDifferences,
    contrast_differences,
    contrast_table,
    independent_units,
    pair_means,
    rows_of,
)

ALTERNATIVE: dict[str, tests.Alternative] = {
    "greater": "greater",
    "much_greater": "greater",
    "less": "less",
    "much_less": "less",
}


@dataclass(frozen=True, eq=False)
class Measured:
    """What the test pairs say on one hypothesis; NaN where there is no number.

    interval: 95%, or 90% for an equivalence test. p: one-sided against 0, or the larger of the two for
    equivalence. small: up to where an effect is too small to matter. absent: conditions of the contrast
    without any trial.
    """

    hypothesis: Hypothesis
    differences: PairDifferences
    estimate: float
    interval: Interval
    dz: float
    rank_biserial: float
    bayes_factor: float
    p: float
    margin: Bound
    small: float
    transfer: Ratio | None
    absent: tuple[str, ...]


def measure(protocol: Protocol, trials: pd.DataFrame, hypothesis: Hypothesis) -> Measured:
    """Measure one hypothesis on the test pairs of its phase; margins come from the calibration pairs.

    trials: prepared rows of every split and phase.

    Raises:
        StoreError: if the readout is not a column.
    """
    rows = rows_of(trials, split="test", phase=hypothesis.phase)
    units = independent_units(rows.loc[rows["condition"].isin(_of_the_pair_alone(protocol))])
    weights = hypothesis.weights()
    found = contrast_differences(rows, weights, hypothesis.readout, hypothesis.transform, units)
    gap = natural_gap(trials, hypothesis.readout, hypothesis.transform)
    margin = margin_of(hypothesis, found, gap)
    p, interval = _test(hypothesis, found, margin)
    present = set(rows["condition"])
    return Measured(
        hypothesis=hypothesis,
        differences=found,
        estimate=float(found.values.mean()) if found.n else math.nan,
        interval=interval,
        dz=tests.cohens_dz(found.values),
        rank_biserial=tests.rank_biserial(found.values),
        bayes_factor=tests.jzs_bayes_factor(found.values),
        p=p,
        margin=margin,
        small=too_small_to_matter(hypothesis, found, gap),
        transfer=_transfer_fraction(rows, hypothesis, units),
        absent=tuple(name for name in weights if name not in present),
    )


def _of_the_pair_alone(protocol: Protocol) -> list[str]:
    """Conditions that hold no prompt but the pair's own target and source."""
    own = (None, "target", "source")
    return [name for name, c in protocol.conditions.items() if c.from_ in own and c.text_of in own]


def _test(hypothesis: Hypothesis, found: PairDifferences, margin: Bound) -> tuple[float, Interval]:
    if hypothesis.test != "equivalent":
        p = tests.sign_flip(found.values, ALTERNATIVE[hypothesis.test])
        return p, bca_interval(found.values, 0.95)
    if margin.value is None:
        return math.nan, bca_interval(found.values, 0.90)
    result = tests.equivalence(found.values, margin.value)
    return result.p, result.interval


def _transfer_fraction(rows: pd.DataFrame, hypothesis: Hypothesis, units: Mapping[str, str]) -> Ratio | None:
    """Share of the natural gap that a contrast X - A covers, on the pairs that have X, A and B; None for
    others."""
    weights = hypothesis.weights()
    moved = [name for name, weight in weights.items() if weight == 1]
    is_from_natural = len(weights) == 2 and weights.get(NATURAL_TARGET) == -1 and len(moved) == 1
    if not is_from_natural or moved[0] == NATURAL_SOURCE or NATURAL_SOURCE not in set(rows["condition"]):
        return None
    names = [*weights, NATURAL_SOURCE]
    means = pair_means(rows, names, hypothesis.readout, hypothesis.transform)
    gap = {NATURAL_SOURCE: 1, NATURAL_TARGET: -1}
    table = contrast_table(means, {"moved": weights, "gap": gap}, units)
    return fieller_interval(table["moved"].to_numpy(dtype=float), table["gap"].to_numpy(dtype=float))
