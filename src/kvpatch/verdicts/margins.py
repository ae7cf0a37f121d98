"""How large an effect must be, or how small: bounds fixed before the test, from the calibration pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from scipy import special

from kvpatch.protocols.conditions import NATURAL_SOURCE, NATURAL_TARGET
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol, calibration_of
from kvpatch.specs.readout import Transform
from kvpatch.statistics.grid import Floats
from kvpatch.statistics.paired_tests import sd_of
from kvpatch.verdicts.pairs import PairDifferences, contrast_differences, rows_of
from kvpatch.verdicts.rounding import number

MIN_CALIBRATION_PAIRS = 3
SMALL_SHARE = 0.2
GAP_LEVEL = 0.95
PAST_MARGIN = 0.025
"""One-sided level at which an effect must pass its margin: that of the lower end of a 95% interval."""


@dataclass(frozen=True)
class Bound:
    """A bound in the readout's unit, or None and the reason why it can't be fixed."""

    value: float | None
    reason: str | None = None


def calibration_rows(protocol: Protocol, trials: pd.DataFrame, phase: str) -> pd.DataFrame:
    """The trials without the calibration of any model but the one that a phase runs on."""
    own = calibration_of(protocol.phases[phase].model)
    others = {calibration_of(key) for key in (None, *protocol.models)} - {own}
    return trials.loc[~((trials["split"] == "calibration") & trials["phase"].isin(list(others)))]


def natural_gap(trials: pd.DataFrame, readout: str, transform: Transform) -> Bound:
    """How large the natural gap, |mean(B - A)| over the calibration pairs, is at least; never over test pairs.

    A margin that is a share of a gap is only as good as the gap, so the end of its 95% interval that is nearer to 0
    counts. A gap whose interval holds 0 gives no bound: a share of it would be a margin made of noise. The interval is
    Student's, since resampling few pairs makes it too narrow.

    trials: prepared rows of every split. Fewer than 3 calibration pairs give no bound.
    """
    rows = rows_of(trials, split="calibration")
    if readout not in rows.columns:  # what a phase asks for is not read on the calibration pairs
        return Bound(None, f"the calibration pairs have no {readout}")
    gap = contrast_differences(rows, {NATURAL_SOURCE: 1, NATURAL_TARGET: -1}, readout, transform)
    if gap.n < MIN_CALIBRATION_PAIRS:
        return Bound(
            None,
            f"the natural gap needs at least {MIN_CALIBRATION_PAIRS} calibration pairs with both"
            f" {NATURAL_TARGET} and {NATURAL_SOURCE}, there are {gap.n}",
        )
    return gap_of(gap.values, readout)


def gap_of(differences: Floats, readout: str) -> Bound:
    """The natural gap at least, from B - A of 3 or more calibration pairs. differences: [pairs], the readout's unit."""
    n, mean = len(differences), float(differences.mean())
    half = float(special.stdtrit(n - 1, (1 + GAP_LEVEL) / 2)) * sd_of(differences) / math.sqrt(n)
    least = abs(mean) - half
    if least > 0:
        return Bound(least)
    return Bound(
        None,
        f"the natural gap of {readout} is {number(mean)} over {n} calibration pairs, with a {GAP_LEVEL:.0%} "
        f"interval of {number(mean - half)} to {number(mean + half)} that includes 0, and a share of such a gap "
        "decides nothing",
    )


def fixed_margin(hypothesis: Hypothesis, gap: Bound) -> float | None:
    """The part of the margin that is fixed before the test, in the readout's unit; None where it gives none."""
    margin = hypothesis.margin
    if margin is None:
        return None
    parts = [] if margin.value is None else [margin.value]
    if margin.natural_gap is not None and gap.value is not None:
        parts.append(margin.natural_gap * gap.value)
    return max(parts, default=None)


def margin_by_value(hypothesis: Hypothesis) -> Bound:
    """The margin of an estimate that is not in the readout's unit: its `value`, since its other parts are."""
    margin = hypothesis.margin
    if margin is None:
        return Bound(None, "the hypothesis has no margin")
    reason = f"test {hypothesis.test!r} takes a margin by its 'value' alone"
    return Bound(margin.value, reason if margin.value is None else None)


def margin_of(hypothesis: Hypothesis, differences: PairDifferences, gap: Bound) -> Bound:
    """The hypothesis' margin: the largest of the parts it gives.

    The dz part is in standard deviations of the tested pair differences themselves, since the calibration
    pairs run only the natural conditions and have no such contrast. As a bound it is an estimate; what decides is
    `tests.past_margin`, which allows for that.
    """
    margin = hypothesis.margin
    if margin is None:
        return Bound(None, "the hypothesis has no margin")
    if margin.natural_gap is not None and gap.value is None:
        return gap
    fixed = fixed_margin(hypothesis, gap)
    parts = [] if fixed is None else [fixed]
    if margin.dz is not None:
        sd = sd_of(differences.values)
        if math.isnan(sd):
            return Bound(None, f"a margin in standard deviations needs at least 2 pairs, there are {differences.n}")
        parts.append(margin.dz * sd)
    largest = max(parts)
    if largest <= 0:
        return Bound(None, "it comes out as 0, since the natural conditions do not differ on the calibration pairs")
    return Bound(largest)


def claimed_side(protocol: Protocol, hypothesis: Hypothesis) -> int:
    """+1 or -1: the side of 0 on which the hypothesis' margin lies. An equivalence has one on either side, and a
    replication that of what it repeats."""
    first = hypothesis if hypothesis.of is None else protocol.hypothesis(hypothesis.of)
    return first.claimed_side


def too_small_to_matter(hypothesis: Hypothesis, differences: PairDifferences, gap: Bound, steps: int = 1) -> Bound:
    """Up to where an effect is too small to matter: the margin, or 20% of the natural gap without one.

    steps: over how many steps an ordering spreads the gap; its slopes are the readout's unit a step.
    """
    if hypothesis.margin is not None:
        return margin_of(hypothesis, differences, gap)
    return gap if gap.value is None else Bound(SMALL_SHARE * gap.value / steps)
