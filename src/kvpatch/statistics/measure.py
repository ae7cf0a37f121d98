"""The numbers of one hypothesis, before anything is decided: one function a kind of test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd

from kvpatch.protocols.schema import Hypothesis, Protocol, Variable
from kvpatch.statistics import tests
from kvpatch.statistics.correlation import partial_correlation
from kvpatch.statistics.intervals import Interval, Ratio, bca_interval, fieller_interval
from kvpatch.statistics.margins import (
    NATURAL_SOURCE,
    NATURAL_TARGET,
    Bound,
    calibration_rows,
    fixed_margin,
    margin_of,
    natural_gap,
    too_small_to_matter,
)
from kvpatch.statistics.pairs import (
    PairDifferences,
    contrast_differences,
    contrast_table,
    count_of,
    independent_units,
    pair_means,
    rows_of,
)
from kvpatch.statistics.trend import ordered_trend, slopes


@dataclass(frozen=True, eq=False)
class Measured:
    """What the test pairs say on one hypothesis; NaN where there is no number.

    differences: what is averaged, one number a unit: the contrast, or for an ordering each pair's slope. estimate:
    their mean, or a correlation. interval: 95%, or 90% for an equivalence test. p: one-sided against 0, or the larger
    of the two for equivalence. p_margin: one-sided against the margin, of a "much" test. dz: for a correlation r.
    small: up to where an effect is too small to matter. absent: conditions of the hypothesis without any trial.
    """

    hypothesis: Hypothesis
    differences: PairDifferences
    estimate: float
    interval: Interval
    dz: float
    rank_biserial: float
    bayes_factor: float
    p: float
    p_margin: float
    margin: Bound
    small: float
    transfer: Ratio | None
    absent: tuple[str, ...]


def measure(protocol: Protocol, trials: pd.DataFrame, hypothesis: Hypothesis) -> Measured:
    """Measure one hypothesis on the test pairs of its phase; margins come from the calibration pairs of its model.

    trials: prepared rows of every split and phase.

    Raises:
        StoreError: if the readout is not a column.
    """
    rows = rows_of(trials, split="test", phase=hypothesis.phase)
    units = units_of(protocol, rows)
    if hypothesis.is_ordering:
        found = _ordering(rows, hypothesis, units)
    elif hypothesis.test == "correlates":
        found = _correlation(rows, hypothesis, units)
    elif hypothesis.of is not None:
        first = protocol.hypothesis(hypothesis.of)
        asked = hypothesis.model_copy(update={"test": first.test, "margin": first.margin, "of": None})
        found = replace(_contrast(protocol, trials, rows, asked, units), hypothesis=hypothesis)
    else:
        found = _contrast(protocol, trials, rows, hypothesis, units)
    present = set(rows["condition"].unique())
    return replace(found, absent=tuple(name for name in hypothesis.conditions if name not in present))


def units_of(protocol: Protocol, rows: pd.DataFrame) -> dict[str, str]:
    """Pair -> the unit it counts in, for the test rows of one phase (`independent_units`).

    Prompts are shared where conditions that hold no prompt but the pair's own target and source share them.
    """
    own = (None, "target", "source")
    alone = [name for name, c in protocol.conditions.items() if c.from_ in own and c.text_of in own]
    return independent_units(rows.loc[rows["condition"].isin(alone)])


def _contrast(
    protocol: Protocol, trials: pd.DataFrame, rows: pd.DataFrame, hypothesis: Hypothesis, units: Mapping[str, str]
) -> Measured:
    found = contrast_differences(rows, hypothesis.weights(), hypothesis.readout, hypothesis.transform, units)
    own = calibration_rows(protocol, trials, hypothesis.phase)
    gap = natural_gap(own, hypothesis.readout, hypothesis.transform)
    margin = margin_of(hypothesis, found, gap)
    p, interval = _test(hypothesis, found, margin)
    small = too_small_to_matter(hypothesis, found, gap)
    transfer = _transfer_fraction(rows, hypothesis, units)
    whole = _measured(hypothesis, found, p, interval, margin, small, transfer=transfer)
    if hypothesis.test not in ("much_greater", "much_less") or hypothesis.margin is None or margin.value is None:
        return whole
    sign = -1 if hypothesis.sign == -1 else 1
    past = tests.past_margin(found.values, sign, fixed_margin(hypothesis, gap), hypothesis.margin.dz)
    return replace(whole, p_margin=past)


def _measured(
    hypothesis: Hypothesis,
    found: PairDifferences,
    p: float,
    interval: Interval,
    margin: Bound,
    small: float,
    *,
    transfer: Ratio | None = None,
) -> Measured:
    return Measured(
        hypothesis=hypothesis,
        differences=found,
        estimate=float(found.values.mean()) if found.n else math.nan,
        interval=interval,
        dz=tests.cohens_dz(found.values),
        rank_biserial=tests.rank_biserial(found.values),
        bayes_factor=tests.jzs_bayes_factor(found.values),
        p=p,
        p_margin=math.nan,
        margin=margin,
        small=small,
        transfer=transfer,
        absent=(),
    )


def _test(hypothesis: Hypothesis, found: PairDifferences, margin: Bound) -> tuple[float, Interval]:
    if hypothesis.test != "equivalent":
        p = tests.sign_flip(found.values, "less" if hypothesis.sign == -1 else "greater")
        return p, bca_interval(found.values, 0.95)
    if margin.value is None:
        return math.nan, bca_interval(found.values, 0.90)
    result = tests.equivalence(found.values, margin.value)
    return result.p, result.interval


def _ordering(rows: pd.DataFrame, hypothesis: Hypothesis, units: Mapping[str, str]) -> Measured:
    """A trend or an umbrella: p by ranks within pairs, the estimate by each pair's slope a step."""
    names, peak = hypothesis.order()
    means = pair_means(rows, names, hypothesis.readout, hypothesis.transform)
    table = contrast_table(means, {name: {name: 1} for name in names}, units)
    values = table[names].to_numpy(dtype=float).reshape(len(table), len(names))
    found = count_of(rows, names, means, table.index, slopes(values, peak))
    p, interval = ordered_trend(values, peak), bca_interval(found.values, 0.95)
    margin = margin_of(hypothesis, found, Bound(None, "an ordering has no natural gap"))
    return _measured(hypothesis, found, p, interval, margin, margin.value if margin.value is not None else math.nan)


def _correlation(rows: pd.DataFrame, hypothesis: Hypothesis, units: Mapping[str, str]) -> Measured:
    """A partial correlation over pairs of the contrast with another variable."""
    assert hypothesis.against is not None
    own = Variable(contrast=hypothesis.contrast, readout=hypothesis.readout, transform=hypothesis.transform)
    wanted = [own, hypothesis.against, *hypothesis.controlling]
    columns = {}
    for place, variable in enumerate(wanted):
        means = pair_means(rows, variable.weights(), variable.readout, variable.transform)
        columns[place] = contrast_table(means, {"value": variable.weights()})["value"]
    means = pd.DataFrame(columns)
    table = contrast_table(means.set_axis([str(c) for c in means], axis="columns"), _each(len(wanted)), units)
    values = table.to_numpy(dtype=float).reshape(len(table), len(wanted))
    found = count_of(rows, hypothesis.conditions, means, table.index, values[:, 0])
    r = partial_correlation(values[:, 0], values[:, 1], values[:, 2:])
    p = r.p_greater if hypothesis.direction == "positive" else r.p_less
    margin = (
        Bound(None, "the hypothesis has no margin") if hypothesis.margin is None else Bound(hypothesis.margin.value)
    )
    small = math.nan if margin.value is None else margin.value
    whole = _measured(hypothesis, found, p, r.interval, margin, small)
    return replace(whole, estimate=r.r, dz=r.r, rank_biserial=math.nan, bayes_factor=math.nan)


def _each(count: int) -> dict[str, dict[str, int]]:
    return {str(i): {str(i): 1} for i in range(count)}


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
