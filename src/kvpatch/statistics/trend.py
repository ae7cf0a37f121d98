"""Ordered conditions: Page's trend test, an umbrella with a known peak, and the slopes that give them a unit; and
Spearman's rho over the levels of a pair, where pairs are the unit.

Pooling every level of every pair into one rho would count the levels of one pair as independent observations.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy import stats

from kvpatch.statistics.grid import Floats, on_grid
from kvpatch.statistics.intervals import SEED

DRAWS = 19_999
MAX_EXACT_PAIRS, MAX_EXACT_LEVELS = 12, 5
_SAME = 1e-9
"""Sums that differ by less are one sum: rounding must not decide a tie."""


def order_scores(levels: int, peak: int) -> Floats:
    """Centred scores that rise by 1 a level up to the peak and fall by 1 after it; peak = levels - 1 is a trend.

    Returns [levels], in steps.
    """
    scores = -np.abs(np.arange(levels, dtype=np.float64) - peak)
    return scores - scores.mean()


def slopes(table: Floats, peak: int) -> Floats:
    """Each pair's least-squares slope on the scores of the order.

    table: [pairs, levels], in the readout's unit. Returns [pairs], the readout's unit a step toward the peak.
    """
    scores = order_scores(table.shape[1], peak)
    return on_grid(table.ravel()).reshape(table.shape) @ scores / float(scores @ scores)


def ordered_trend(table: Floats, peak: int) -> float:
    """One-sided p-value that readouts follow the order, against levels that could be exchanged within each pair.

    table: [pairs, levels]; rows are ranked within themselves, ties by their mean rank. With the peak at the last level
    this is Page's L: exact by `scipy.stats.page_trend_test` where the table is small and has no ties. Else ranks are
    permuted within pairs, 19,999 times, the observed order counted in, so p is never 0. Fewer than 2 pairs give NaN.
    Source: Page 1963 (JASA 58:216); Mack & Wolfe 1981 (JASA 76:175) for umbrellas with a known peak.
    """
    pairs, levels = table.shape
    if pairs < 2:
        return math.nan
    values = on_grid(table.ravel()).reshape(table.shape)
    ranks = np.sort(stats.rankdata(values, axis=1).view([("", np.float64)] * levels), axis=0).view(np.float64)
    has_ties = any(len(set(row)) < levels for row in ranks)
    if peak == levels - 1 and not has_ties and pairs <= MAX_EXACT_PAIRS and levels <= MAX_EXACT_LEVELS:
        return float(stats.page_trend_test(ranks, ranked=True, method="exact").pvalue)
    # Whole numbers, as twice the ranks are, so that sums are exact and ties count as ties on every machine.
    scores = np.rint(2 * levels * order_scores(levels, peak))
    observed = float((2 * ranks @ scores).sum())
    orders = _orders(pairs, levels)  # [draws, pairs, levels]
    at_least = 0
    for some in np.array_split(orders, 20):
        drawn = np.take_along_axis(2 * ranks[None], some, axis=2) @ scores  # [draws, pairs]
        at_least += int(np.count_nonzero(drawn.sum(axis=1) >= observed))
    return (at_least + 1) / (DRAWS + 1)


def rho_of_each(x: Floats, y: Floats) -> Floats:
    """Spearman's rho of each pair; 0 where a pair's x or y does not vary, since such a pair shows no order.

    x, y: [pairs, levels], in any unit; ties have their mean rank. Returns [pairs], from -1 to 1.
    """
    return np.clip((_standard_ranks(x) * _standard_ranks(y)).sum(axis=1), -1.0, 1.0)


def mean_rho_p(x: Floats, y: Floats, side: int) -> float:
    """One-sided p-value of the mean rho, against levels of y that could be exchanged within each pair.

    x, y: [pairs, levels]. side: 1 where the mean is claimed to lie above 0, -1 where below. Ranks of y are permuted
    within pairs, 19,999 times, the observed order counted in, so p is never 0. With x the levels' numbers and no ties
    it is Page's test. Fewer than 2 pairs give NaN.
    Source: Page 1963 (JASA 58:216), whose L is a linear function of the mean rho.
    """
    pairs, levels = x.shape
    if pairs < 2:
        return math.nan
    fixed, moved = side * _standard_ranks(x), _standard_ranks(y)
    observed = float((fixed * moved).sum())
    at_least = 0
    for some in np.array_split(_orders(pairs, levels), 20):
        drawn = (fixed * np.take_along_axis(moved[None], some, axis=2)).sum(axis=(1, 2))  # [draws]
        at_least += int(np.count_nonzero(drawn >= observed - _SAME))
    return (at_least + 1) / (DRAWS + 1)


def _standard_ranks(table: Floats) -> Floats:
    """Ranks within each pair, centred and scaled to length 1; zeros where a pair's values are all one."""
    values = on_grid(table.ravel()).reshape(table.shape)
    ranks = stats.rankdata(values, axis=1) - (table.shape[1] + 1) / 2
    length = np.sqrt((ranks**2).sum(axis=1, keepdims=True))
    return np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 0)


def smallest_p(pairs: int) -> float:
    """No ordering of so many pairs has a smaller p: that of three levels, the fewest, where each pair follows
    the order, or the least that random permutations can give."""
    return 6.0**-pairs if pairs <= MAX_EXACT_PAIRS else 1 / (DRAWS + 1)


@lru_cache(maxsize=4)
def _orders(pairs: int, levels: int) -> np.ndarray:
    rng = np.random.default_rng(SEED)
    return rng.permuted(np.broadcast_to(np.arange(levels, dtype=np.int8), (DRAWS, pairs, levels)), axis=2)
