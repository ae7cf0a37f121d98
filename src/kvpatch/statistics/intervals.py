"""Intervals: BCa for a mean of pair differences, Fieller for a ratio of two paired means."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from scipy import stats

from kvpatch.statistics.grid import Floats, grid_step, on_grid

SEED = 20251207
RESAMPLES = 9_999
MIN_DENOMINATOR_SES = 5.0


@dataclass(frozen=True)
class Interval:
    """Two-sided interval, in the unit of the values; both ends NaN where there is none."""

    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Ratio:
    """A ratio of means with its interval; `value` is None, and `reason` says why, where it can't be
    trusted."""

    value: float | None
    low: float | None
    high: float | None
    level: float
    reason: str | None = None


def bca_interval(differences: Floats, level: float = 0.95, *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of the mean.

    differences: [n], in any unit. Fewer than 3 give NaN; all equal give an interval of width zero.
    Source: Efron 1987 (JASA 82:171), by `scipy.stats.bootstrap`; where BCa is undefined, the percentile
    interval.
    """
    if len(differences) < 3:
        return Interval(math.nan, math.nan, level)
    values = np.sort(on_grid(differences))
    if values[0] == values[-1]:
        return Interval(float(values[0]), float(values[0]), level)
    unit = grid_step(values)  # whole multiples of it neither overflow nor vanish when cubed
    values = values / unit
    ends = _bootstrap(values, level, resamples, seed, "BCa")
    if not all(map(math.isfinite, ends)):
        ends = _bootstrap(values, level, resamples, seed, "percentile")
    return Interval(ends[0] * unit, ends[1] * unit, level)


def _bootstrap(values: Floats, level: float, resamples: int, seed: int, method: str) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=resamples,
            confidence_level=level,
            method=method,
            rng=np.random.default_rng(seed),
        )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def fieller_interval(numerator: Floats, denominator: Floats, level: float = 0.95) -> Ratio:
    """Interval of mean(numerator) / mean(denominator) over the same units.

    numerator, denominator: [n], the same units in the same order. Where the denominator is fewer than 5
    standard errors from 0 (or n < 3) there is no ratio, and the reason is given.
    Source: Fieller 1954 (JRSS B 16:175): all r for which mean(numerator - r * denominator) is within t
    standard errors of 0, t with n - 1 degrees of freedom.
    Raises:
        ValueError: if the lengths differ.
    """
    n = len(numerator)
    if n != len(denominator):
        raise ValueError(f"numerator has {n} units, denominator {len(denominator)}; a paired ratio needs the same")
    if n < 3:
        return Ratio(None, None, None, level, f"a ratio needs at least 3 units, there are {n}")
    x, y = on_grid(denominator), on_grid(numerator)
    mean_x, mean_y = float(x.mean()), float(y.mean())
    dx, dy = x - mean_x, y - mean_y
    scale = n * (n - 1)
    v_xx, v_yy, v_xy = (
        float((dx * dx).sum() / scale),
        float((dy * dy).sum() / scale),
        float((dx * dy).sum() / scale),
    )
    se = math.sqrt(v_xx)
    if mean_x == 0 or abs(mean_x) < MIN_DENOMINATOR_SES * se:
        away = 0.0 if mean_x == 0 else abs(mean_x) / se
        return Ratio(None, None, None, level, f"the denominator is {away:.3g} standard errors from 0, 5 are needed")
    t2 = float(stats.t.ppf(0.5 + level / 2, n - 1)) ** 2
    a, b, c = mean_x**2 - t2 * v_xx, mean_x * mean_y - t2 * v_xy, mean_y**2 - t2 * v_yy
    half = math.sqrt(max(b * b - a * c, 0.0))
    return Ratio(mean_y / mean_x, (b - half) / a, (b + half) / a, level)
