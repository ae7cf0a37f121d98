"""The numbers of one hypothesis, before anything is decided: one function for each thing that tests measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from kvpatch.protocols.hypotheses import Hypothesis, Variable
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.test_kinds import Measures, TestKind
from kvpatch.statistics import paired_tests as tests
from kvpatch.statistics.grid import Floats
from kvpatch.statistics.intervals import Interval, Ratio, fieller_interval
from kvpatch.statistics.trend import rho_of_each, slopes
from kvpatch.verdicts.chosen_heads import chosen_heads
from kvpatch.verdicts.floors import Floor, floor_of
from kvpatch.verdicts.margins import (
    NATURAL_SOURCE,
    NATURAL_TARGET,
    Bound,
    calibration_rows,
    fixed_margin,
    margin_by_value,
    margin_of,
    natural_gap,
    too_small_to_matter,
)
from kvpatch.verdicts.pairs import (
    PairDifferences,
    contrast_differences,
    contrast_table,
    count_of,
    independent_units,
    pair_means,
    rows_of,
)
from kvpatch.verdicts.procedures import Sample, carry_out


@dataclass(frozen=True, eq=False)
class Measured:
    """What the test pairs say on one hypothesis; NaN where there is no number.

    differences: what is averaged, one number a unit: the contrast, or for an ordering each pair's slope. estimate:
    their mean, or a correlation. interval: 95%, or 90% for an equivalence test. p: one-sided against 0, or the larger
    of the two for equivalence. p_margin: one-sided against the margin, of a "much" test. dz: for a correlation r.
    small: up to where an effect is too small to matter; no_small: why that is not known. absent: conditions of
    the hypothesis without any trial. kind: of the test that was carried out; for a repetition that of what it repeats.
    floor: what the readout can say where it hardly scored, or not at all. told: what else a sentence says of how it was
    measured.
    """

    hypothesis: Hypothesis
    kind: TestKind
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
    floor: Floor = field(default_factory=Floor)
    no_small: str | None = None
    told: str = ""


def measure(
    protocol: Protocol, trials: pd.DataFrame, hypothesis: Hypothesis, units: Mapping[str, str] | None = None
) -> Measured:
    """Measure one hypothesis on the test pairs of its phase; margins come from the calibration pairs of its model.

    trials: prepared rows of every split and phase. units: `units_of` the test rows of the hypothesis's phase, where the
    caller has it already.

    Raises:
        StoreError: if the readout is not a column.
    """
    rows = rows_of(trials, split="test", phase=hypothesis.phase)
    units = units_of(protocol, rows) if units is None else units
    asked = measured_as(protocol, hypothesis)
    found = replace(_MEASURES[asked.kind.measures](protocol, trials, rows, asked, units), hypothesis=hypothesis)
    present = set(rows["condition"].unique())
    return replace(found, absent=tuple(name for name in hypothesis.conditions if name not in present))


def measured_as(protocol: Protocol, hypothesis: Hypothesis) -> Hypothesis:
    """The hypothesis as it is measured: a repetition by the test, and against the margin, of what it repeats."""
    if hypothesis.of is None:
        return hypothesis
    first = protocol.hypothesis(hypothesis.of)
    return hypothesis.model_copy(update={"test": first.test, "margin": first.margin, "of": None})


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
    gap = _gap(protocol, trials, hypothesis) if hypothesis.kind.is_in_unit else Bound(None, _OTHER_SCALE)
    floor = floor_of(trials, hypothesis.phase, hypothesis.weights(), hypothesis.readout, hypothesis.transform, units)
    m = _measured(hypothesis, found, found.values[:, None], gap)
    return replace(m, floor=floor, transfer=_transfer_fraction(rows, hypothesis, units))


_OTHER_SCALE = "its estimate is not in the readout's unit"


def _gap(protocol: Protocol, trials: pd.DataFrame, hypothesis: Hypothesis) -> Bound:
    rows = calibration_rows(protocol, trials, hypothesis.phase)
    return natural_gap(rows, hypothesis.readout, hypothesis.transform)


@dataclass(frozen=True)
class Bounds:
    """What an effect is held against. margin: the whole margin. fixed: its part that is fixed before the test. small:
    up to where an effect is too small to matter."""

    margin: Bound
    fixed: float | None
    small: Bound


def bounds_of(hypothesis: Hypothesis, found: PairDifferences, gap: Bound) -> Bounds:
    """The bounds of a hypothesis. gap: the natural gap, of which some are shares."""
    if not hypothesis.kind.is_in_unit:
        margin = margin_by_value(hypothesis)
        return Bounds(margin, margin.value, margin)
    small = too_small_to_matter(hypothesis, found, gap, _steps(hypothesis))
    return Bounds(margin_of(hypothesis, found, gap), fixed_margin(hypothesis, gap), small)


def _steps(hypothesis: Hypothesis) -> int:
    """Over how many steps an ordering rises, or falls, at most; 1 for what is no ordering."""
    if not hypothesis.is_ordering:
        return 1
    names, peak = hypothesis.order()
    return max(peak, len(names) - 1 - peak)


def _measured(hypothesis: Hypothesis, found: PairDifferences, table: Floats, gap: Bound) -> Measured:
    """The numbers of a sample. table: as `Sample` has it."""
    bounds = bounds_of(hypothesis, found, gap)
    tested = carry_out(Sample(hypothesis, found.values, table, bounds.margin, bounds.fixed))
    is_correlation = hypothesis.kind.measures == "correlation"
    mean = float(found.values.mean()) if found.n else math.nan
    return Measured(
        hypothesis=hypothesis,
        kind=hypothesis.kind,
        differences=found,
        estimate=mean if tested.estimate is None else tested.estimate,
        interval=tested.interval,
        dz=tests.cohens_dz(found.values) if tested.effect_size is None else tested.effect_size,
        rank_biserial=math.nan if is_correlation else tests.rank_biserial(found.values),
        bayes_factor=math.nan if is_correlation else tests.jzs_bayes_factor(found.values),
        p=tested.p,
        p_margin=tested.p_margin,
        margin=bounds.margin,
        small=math.nan if bounds.small.value is None else bounds.small.value,
        no_small=bounds.small.reason,
        transfer=None,
        absent=(),
    )


def _ordering(
    protocol: Protocol, trials: pd.DataFrame, rows: pd.DataFrame, hypothesis: Hypothesis, units: Mapping[str, str]
) -> Measured:
    """A readout over ordered conditions: each pair's slope per step."""
    names, peak = hypothesis.order()
    means = pair_means(rows, names, hypothesis.readout, hypothesis.transform)
    table = contrast_table(means, {name: {name: 1} for name in names}, units)
    values = table[names].to_numpy(dtype=float).reshape(len(table), len(names))
    found = count_of(rows, names, means, table.index, slopes(values, peak))
    # A protocol without families is decided as it always was: its slopes know no bound that the gap gives.
    gap = _gap(protocol, trials, hypothesis) if protocol.families else Bound(None, "an ordering has no natural gap")
    return _measured(hypothesis, found, values, gap)


def _correlation(
    protocol: Protocol, trials: pd.DataFrame, rows: pd.DataFrame, hypothesis: Hypothesis, units: Mapping[str, str]
) -> Measured:
    """The contrast beside another variable, over pairs."""
    assert hypothesis.against is not None
    own = Variable(contrast=hypothesis.contrast, readout=hypothesis.readout, transform=hypothesis.transform)
    wanted = [own, hypothesis.against, *hypothesis.controlling]
    columns = {}
    for place, variable in enumerate(wanted):
        means = pair_means(rows, variable.weights(), variable.readout, variable.transform)
        columns[place] = contrast_table(means, {"value": variable.weights()})["value"]
    means = pd.DataFrame(columns)
    table = contrast_table(means.set_axis([str(c) for c in means], axis="columns"), _each(len(wanted)), units)
    values: Floats = table.to_numpy(dtype=float).reshape(len(table), len(wanted))
    found = count_of(rows, hypothesis.conditions, means, table.index, values[:, 0])
    return _measured(hypothesis, found, values, Bound(None, _OTHER_SCALE))


def _ranks(
    protocol: Protocol, trials: pd.DataFrame, rows: pd.DataFrame, hypothesis: Hypothesis, units: Mapping[str, str]
) -> Measured:
    """A readout over ordered conditions, beside their order or another readout: each pair's Spearman's rho."""
    names, beside = hypothesis.order()[0], hypothesis.ranked_with
    means = pair_means(rows, names, hypothesis.readout, hypothesis.transform)
    if beside is not None:
        others = pair_means(rows, names, beside)
        means = means.join(others.set_axis([f"{name} beside" for name in names], axis="columns"))
    table = contrast_table(means, {name: {name: 1} for name in means.columns}, units)
    values: Floats = table[list(means.columns)].to_numpy(dtype=float).reshape(len(table), means.shape[1])
    own, levels = values[:, : len(names)], np.arange(len(names), dtype=float)
    ranked = np.broadcast_to(levels, own.shape) if beside is None else values[:, len(names) :]
    found = count_of(rows, names, means, table.index, rho_of_each(ranked, own))
    return _measured(hypothesis, found, np.hstack([ranked, own]), Bound(None, _OTHER_SCALE))


def _heads(
    protocol: Protocol, trials: pd.DataFrame, rows: pd.DataFrame, hypothesis: Hypothesis, units: Mapping[str, str]
) -> Measured:
    """A contrast in heads that half of the units chose, on the other half."""
    chosen = chosen_heads(rows, hypothesis, units)
    gap = Bound(None, "the calibration pairs are not watched")
    return replace(_measured(hypothesis, chosen.found, chosen.found.values[:, None], gap), told=chosen.told)


_MEASURES: dict[Measures, Callable[[Protocol, pd.DataFrame, pd.DataFrame, Hypothesis, Mapping[str, str]], Measured]] = {
    "difference": _contrast,
    "slope": _ordering,
    "correlation": _correlation,
    "ranks": _ranks,
    "heads": _heads,
}


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
