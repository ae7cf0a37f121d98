"""From numbers to a verdict, for a hypothesis that may be interpreted. Every rule of docs/statistics.md is here,
once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvpatch.specs.test_kinds import Claims, Word
from kvpatch.statistics.paired_tests import dz_interval
from kvpatch.statistics.replication import Study, replicates
from kvpatch.verdicts.floors import nothing_scored
from kvpatch.verdicts.margins import PAST_MARGIN
from kvpatch.verdicts.measure import Measured
from kvpatch.verdicts.procedures import procedure_of
from kvpatch.verdicts.wording import chance, figures, limit_text, number


@dataclass(frozen=True)
class Decision:
    """A verdict's word, the sentence that says why, and what blocked it if it can't be interpreted."""

    word: Word
    because: str
    blocked_by: Literal["instrument", "gate", "prerequisite", "coherence", "specificity", "missing"] | None = None


def decide(m: Measured, p_adjusted: float, first: Measured | None = None) -> Decision:
    """Decide one hypothesis. p_adjusted: its p after correction within the family, NaN if it has none. first: what the
    hypothesis replicates.

    "Not supported" is said only where the data speak against the claim; where they decide neither way,
    "inconclusive".
    """
    h, found = m.hypothesis, m.differences
    if found.n == 0:
        lack = f"no trials of {' or '.join(m.absent)} are stored" if m.absent else "no pair has all its conditions"
        return Decision("inconclusive", f"Nothing was measured for {h.contrast} in phase {h.phase}: {lack}.")
    silent = nothing_scored(m.floor, h.readout, h.contrast, h.phase)
    if silent is not None:
        return Decision("inconclusive", silent)
    needed = procedure_of(m.kind.id).needs_pairs(h.alpha)
    if found.n < needed:
        few = f"p below {number(h.alpha)} needs at least {needed} pairs"
        return Decision("inconclusive", f"{figures(m)}, but {few}.")
    if "margin" in h.kind.needs and m.margin.value is None:
        return Decision("inconclusive", f"{figures(m)}, but the margin can't be fixed: {m.margin.reason}.")
    if first is not None:
        return _replicates(m, p_adjusted, first)
    return _RULES[h.kind.claims](m, p_adjusted)


def _directional(m: Measured, p_adjusted: float) -> Decision:
    h = m.hypothesis
    sign = h.claimed_side
    near, far = sorted((sign * m.interval.low, sign * m.interval.high))  # the ends, with the claim's side positive
    is_much = h.kind.beyond_margin
    bound = m.margin.value if is_much and m.margin.value is not None else 0.0
    is_past = not is_much or m.p_margin < PAST_MARGIN
    side = "above" if sign > 0 else "below"
    limit = "0" if bound == 0 else f"the margin of {limit_text(sign * bound, m)}"
    if p_adjusted < h.alpha and near > bound and is_past:
        return Decision("supported", f"{figures(m)}, {side} {limit}; adjusted {chance(p_adjusted)}, {_under(m)}.")
    if far < 0:
        return Decision("not supported", f"{figures(m)}, wholly on the other side of 0 than the claim.")
    if far <= m.small and m.floor.within(*sorted((sign * m.small, -sign * math.inf))):
        return Decision(
            "not supported",
            f"{figures(m)}, so an effect beyond {limit_text(sign * m.small, m)}, {_size(m)}, is ruled out.",
        )
    lacks = []
    if not near > bound:
        lacks.append(f"the interval is not wholly {side} {limit}")
    elif not is_past:
        lacks.append(f"{chance(m.p_margin)} against the margin is not below {number(PAST_MARGIN)}")
    if not p_adjusted < h.alpha:
        lacks.append(f"adjusted {chance(p_adjusted)} is not below {number(h.alpha)}")
    return Decision("inconclusive", f"{figures(m)}, but {' and '.join(lacks)}, so the data decide neither way.")


def _apart(m: Measured, p_adjusted: float) -> Decision:
    """An effect on either side of 0, or beyond the margin on either side."""
    h, low, high = m.hypothesis, m.interval.low, m.interval.high
    bound = m.margin.value if h.kind.beyond_margin and m.margin.value is not None else 0.0
    is_past = not h.kind.beyond_margin or m.p_margin < PAST_MARGIN
    is_apart = low > bound or high < -bound
    limit = "0" if bound == 0 else f"the margin of {limit_text(bound, m)} on either side of 0"
    if p_adjusted < h.alpha and is_apart and is_past:
        side = "above" if low > 0 else "below"
        limit = "0" if bound == 0 else f"the margin of {limit_text(bound if low > 0 else -bound, m)}"
        return Decision("supported", f"{figures(m)}, {side} {limit}; adjusted {chance(p_adjusted)}, {_under(m)}.")
    if -m.small <= low and high <= m.small and m.floor.within(-m.small, m.small):
        told = f"so an effect beyond {limit_text(m.small, m)} on either side, {_size(m)}, is ruled out"
        return Decision("not supported", f"{figures(m)}, {told}.")
    lacks = []
    if not is_apart:
        lacks.append(f"the interval does not lie wholly beyond {limit}")
    elif not is_past:
        lacks.append(f"{chance(m.p_margin)} against the margin is not below {number(PAST_MARGIN)}")
    if not p_adjusted < h.alpha:
        lacks.append(f"adjusted {chance(p_adjusted)} is not below {number(h.alpha)}")
    return Decision("inconclusive", f"{figures(m)}, but {' and '.join(lacks)}, so the data decide neither way.")


def _replicates(m: Measured, p_adjusted: float, first: Measured) -> Decision:
    h, sign = m.hypothesis, first.hypothesis.sign or 1
    one, other = (_study(x, _bound(first, x)) for x in (first, m))
    found = replicates(one, other, sign)
    told = f"{figures(m)}, {_dz_text(m, other)}, where {first.hypothesis.id} has {_dz_text(first, one)}"
    if found.holds and p_adjusted < h.alpha:
        return Decision("supported", f"{told}: {found.reason}; adjusted {chance(p_adjusted)}, {_under(m)}.")
    if found.speaks_against:
        return Decision("not supported", f"{told}: {found.reason}.")
    lack = found.reason if not found.holds else f"adjusted {chance(p_adjusted)} is not below {number(h.alpha)}"
    return Decision("inconclusive", f"{told}, but {lack}.")


def shown_absent(m: Measured, first: Measured) -> Decision | None:
    """The decision on a repetition whose effect is shown to be too small to count; None where it is not. Where the
    first hypothesis has no margin, `_replicates` knows no bound for that."""
    sign = first.hypothesis.claimed_side
    near, far = sorted((sign * m.interval.low, sign * m.interval.high))
    if not far <= m.small or not m.floor.within(*sorted((sign * m.small, -sign * math.inf))):
        return None
    bound = limit_text(sign * m.small, m)
    told = "on the other side of 0" if near <= far < 0 else f"so an effect beyond {bound}, {_size(m)}, is ruled out"
    return Decision("not supported", f"{figures(m)}, {told}.")


def _size(m: Measured) -> str:
    """What the bound is below which an effect counts as none."""
    return "the margin" if m.hypothesis.margin else "20% of the natural gap"


def _study(m: Measured, bound: float) -> Study:
    """What was measured, beside its dz: two models share no unit, so that their effects are compared in dz."""
    return Study(m.estimate, m.interval, bound, dz_interval(m.differences.values, m.interval.level))


def _dz_text(m: Measured, study: Study) -> str:
    shared = study.shared
    if shared is None or math.isnan(shared.low):
        return "no dz"
    return f"dz {number(m.dz)} ({shared.level:.0%} interval {number(shared.low)} to {number(shared.high)})"


def _bound(first: Measured, m: Measured) -> float:
    """How far from 0 an estimate must lie to count: the margin where the first hypothesis has one, else 0."""
    return m.margin.value if first.hypothesis.margin is not None and m.margin.value is not None else 0.0


def _equivalent(m: Measured, p_adjusted: float) -> Decision:
    h, margin = m.hypothesis, m.margin.value or 0.0
    low, high = m.interval.low, m.interval.high
    bounds = f"the bounds of -{number(margin)} to {number(margin)}"
    is_inside = -margin < low and high < margin
    if p_adjusted < h.alpha and is_inside and m.floor.within(-margin, margin):
        return Decision("equivalent", f"{figures(m)}, within {bounds}; adjusted {chance(p_adjusted)}, {_under(m)}.")
    if low > margin or high < -margin:
        return Decision("not supported", f"{figures(m)}, wholly outside {bounds}.")
    if is_inside and not m.floor.within(-margin, margin):
        lack = f"{m.floor.told} are not wholly within {bounds}"
    elif is_inside:
        lack = f"adjusted {chance(p_adjusted)} is not below {number(h.alpha)}"
    else:
        lack = f"the interval is not wholly within {bounds}"
    return Decision("inconclusive", f"{figures(m)}, but {lack}, so the data decide neither way.")


_RULES: dict[Claims, Callable[[Measured, float], Decision]] = {
    "beyond": _directional,
    "apart": _apart,
    "within": _equivalent,
    "repeated": _directional,  # where what it repeats is not known
}


def _under(m: Measured) -> str:
    return f"below {number(m.hypothesis.alpha)}"
