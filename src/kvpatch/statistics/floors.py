"""Exact bounds of means that are mostly 0: how large could a mean be where few outputs, or none, have a hit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from kvpatch.statistics.grid import Floats
from kvpatch.statistics.intervals import Interval

ZEROS_DOMINATE = 0.5
"""Above this share of zeros the mean of a readout is that of a few hits."""
MANY_HITS = 60
"""From so many hits on, Student's interval of their mean holds well enough; at 20 exponential hits it errs twice as
often as it says."""
KNOWN_HITS = 5
"""So many hits elsewhere say how large a hit can be."""


def zeros_dominate(values: Floats) -> bool:
    """Whether a readout counts something rare: no value is below 0, and more than half of them are 0."""
    return values.size > 0 and bool((values >= 0).all()) and float(np.mean(values == 0)) > ZEROS_DOMINATE


def clopper_pearson(hits: int, n: int, level: float = 0.90) -> tuple[float, float]:
    """Exact interval of a share, `hits` of `n`.

    Source: Clopper & Pearson 1934 (Biometrika 26:404), by quantiles of the beta distribution. The same as
    `scipy.stats.binomtest`, the reference in the tests, which searches for each end and takes a hundred times as long.
    """
    tail = (1 - level) / 2
    low = float(special.betaincinv(hits, n - hits + 1, tail)) if hits else 0.0
    return low, float(special.betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0


def mean_hit_bounds(hits: Floats, level: float = 0.90) -> tuple[float, float]:
    """The smallest and the largest plausible mean of hits.

    Many hits have Student's interval. Few have the exact interval of an exponential mean, which supposes that hits vary
    as much as they are large; hits of counts vary less, so it is wide rather than narrow (a single hit may be a
    twentieth of the mean).

    hits: [hits], above 0. Without a hit, 0 and infinity.
    Source: Epstein & Sobel 1953 (JASA 48:486) for the exponential mean.
    """
    count = len(hits)
    if count == 0:
        return 0.0, math.inf
    tails = (1 - level) / 2, (1 + level) / 2
    values = np.sort(hits)
    mean = float(values.mean())
    if count >= MANY_HITS:
        half = float(special.stdtrit(count - 1, tails[1])) * float(np.std(values, ddof=1)) / math.sqrt(count)
        return max(0.0, mean - half), mean + half
    low, high = (count * mean / float(special.gammaincinv(count, tail)) for tail in tails[::-1])
    return low, high


def rare_contrast_bounds(sides: Sequence[tuple[int, Floats]], known: Floats, level: float = 0.90) -> Interval:
    """Bounds of a weighted sum of means of a readout that is mostly 0: each side at its end, as if nothing tied them.

    The mean of a side is the share of its values with a hit, in its Clopper-Pearson interval, times the mean hit. A
    side with few hits borrows those of the others, and no mean hit counts as larger than the largest that was seen,
    where `known` says how large one can be.

    sides: weight (+1 or -1) and values [units], 0 or more, of each condition. known: [hits], of the same readout
    elsewhere. level: of each of the two intervals.
    A bootstrap of zeros alone has no width, whatever the share of hits behind them.
    """
    pooled = np.concatenate([values[values > 0] for _, values in sides])
    largest = max(float(known.max()), float(pooled.max(initial=0.0))) if len(known) >= KNOWN_HITS else math.inf
    low = high = 0.0
    for weight, values in sides:
        hits = values[values > 0]
        shares = clopper_pearson(len(hits), len(values), level)
        least, most = mean_hit_bounds(hits, level)
        if len(hits) < MANY_HITS:
            most = mean_hit_bounds(pooled, level)[1]
        ends = sorted((weight * shares[0] * least, weight * shares[1] * min(most, largest)))
        low, high = low + ends[0], high + ends[1]
    return Interval(low, high, level)
