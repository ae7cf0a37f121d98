"""The tests of `procedures` on many simulated data sets at once, by the id of their kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.statistics import batches
from kvpatch.statistics.grid import Floats
from kvpatch.statistics.intervals import Interval
from kvpatch.verdicts.margins import Bound
from kvpatch.verdicts.procedures import Figures, Sample, carry_out


@dataclass(frozen=True, eq=False)
class Samples:
    """As `procedures.Sample`, of many data sets. differences: [sets, n]. table: [sets, n, columns]. margin: the whole
    margin, and fixed its part that is fixed before the test, one a set; None where there is none."""

    hypothesis: Hypothesis
    differences: Floats
    table: Floats
    margin: list[float | None]
    fixed: list[float | None]


def carry_out_all(samples: Samples) -> list[Figures]:
    """`procedures.carry_out` of each data set. A kind of test that is not known here is carried out set by set."""
    h, n = samples.hypothesis, samples.differences.shape[1]
    at_once = _AT_ONCE.get(h.test)
    if at_once is not None and n > 1:
        return at_once(samples)
    parts = zip(samples.differences, samples.table, samples.margin, samples.fixed, strict=True)
    return [carry_out(Sample(h, d, table, Bound(margin), fixed)) for d, table, margin, fixed in parts]


def _figures(p: Floats, ends: tuple[Floats, Floats], level: float, p_margin: Floats | None = None) -> list[Figures]:
    past = np.full(len(p), math.nan) if p_margin is None else p_margin
    rows = zip(p.tolist(), ends[0].tolist(), ends[1].tolist(), past.tolist(), strict=True)
    return [Figures(p, Interval(low, high, level), p_margin) for p, low, high, p_margin in rows]


def _numbers(values: list[float | None]) -> Floats:
    return np.array([math.nan if value is None else value for value in values])


def _directional(s: Samples) -> list[Figures]:
    greater, less = batches.sign_flips(s.differences)
    p = less if s.hypothesis.sign == -1 else greater
    return _figures(p, batches.intervals(s.differences, 0.95), 0.95)


def _past_margin(s: Samples) -> list[Figures]:
    h = s.hypothesis
    greater, less = batches.sign_flips(s.differences)
    fixed = None if all(value is None for value in s.fixed) else _numbers(s.fixed)
    past = batches.past_margins(s.differences, h.claimed_side, fixed, h.margin.dz if h.margin else None)
    past = np.where(np.isnan(_numbers(s.margin)), math.nan, past)
    return _figures(less if h.sign == -1 else greater, batches.intervals(s.differences, 0.95), 0.95, past)


def _equivalent(s: Samples) -> list[Figures]:
    p = batches.equivalences(s.differences, np.nan_to_num(_numbers(s.margin), nan=1.0))
    p = np.where(np.isnan(_numbers(s.margin)), math.nan, p)
    return _figures(p, batches.intervals(s.differences, 0.90), 0.90)


def _ordered(s: Samples) -> list[Figures]:
    _, peak = s.hypothesis.order()
    return _figures(batches.ordered_trends(s.table, peak), batches.intervals(s.differences, 0.95), 0.95)


def _correlated(s: Samples) -> list[Figures]:
    r, greater, low, high = batches.partial_correlations(s.table)
    p = greater if s.hypothesis.claimed_side == 1 else 1 - greater
    rows = zip(p.tolist(), low.tolist(), high.tolist(), r.tolist(), strict=True)
    return [Figures(p, Interval(low, high, 0.95), estimate=r, effect_size=r) for p, low, high, r in rows]


_AT_ONCE: dict[str, Callable[[Samples], list[Figures]]] = {
    "greater": _directional,
    "less": _directional,
    "much_greater": _past_margin,
    "much_less": _past_margin,
    "equivalent": _equivalent,
    "trend": _ordered,
    "umbrella": _ordered,
    "correlates": _correlated,
    "replicates": _directional,
}
