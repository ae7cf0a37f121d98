"""Tests and effect sizes on pair differences, one function each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import integrate, stats

from kvpatch.statistics.grid import Floats, grid_step, on_grid
from kvpatch.statistics.intervals import SEED, Interval, bca_interval
from kvpatch.statistics.resampling import dz_above, mean_above

Alternative = Literal["greater", "less", "two-sided"]
RESAMPLES = 50_000
MAX_DZ_OF_BAYES_FACTOR = 20.0
_BATCH = 5_000


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: `p` is the larger of the two, `interval` the 90% interval that goes with alpha
    .05."""

    p: float
    p_lower: float
    p_upper: float
    interval: Interval


def sign_flip(
    differences: Floats,
    alternative: Alternative = "two-sided",
    *,
    null: float = 0.0,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> float:
    """p-value of the mean by flipping the signs of the pair differences.

    differences: [n]; null: the mean under the null hypothesis, same unit. All 2**n flips if they are no more
    than `resamples`, else that many random ones, where the observed one is counted in ((b + 1) / (m + 1)), so
    p is never 0. Two-sided is twice the smaller side. Fewer than 2 values give NaN.
    Source: Fisher 1935, The Design of Experiments, section 21; Phipson & Smyth 2010 (SAGMB 9:39) for the + 1.
    The same as `scipy.stats.permutation_test(permutation_type="samples")`, the reference in the tests, which
    takes 0.4 s for what takes 0.02 s here, and a protocol has dozens of them.
    """
    n = len(differences)
    if n < 2:
        return math.nan
    shifted = np.sort(differences) - null
    values = on_grid(shifted)
    observed = float(values.sum())
    tolerance = n * grid_step(shifted)  # sums that differ by rounding alone are ties
    at_least = at_most = 0
    exact = 2**n <= resamples
    total = 2**n if exact else resamples
    rng = np.random.default_rng(seed)
    for start in range(0, total, _BATCH):
        rows = min(_BATCH, total - start)
        flips = _all_flips(start, rows, n) if exact else _random_flips(rng, rows, n)
        sums = observed - 2.0 * (flips.astype(np.float64) @ values)  # [rows]; exact, see on_grid
        at_least += int(np.count_nonzero(sums >= observed - tolerance))
        at_most += int(np.count_nonzero(sums <= observed + tolerance))
    extra = 0 if exact else 1
    greater, less = (at_least + extra) / (total + extra), (at_most + extra) / (total + extra)
    return {"greater": greater, "less": less, "two-sided": min(1.0, 2 * min(greater, less))}[alternative]


def _all_flips(start: int, rows: int, n: int) -> np.ndarray:
    return (np.arange(start, start + rows)[:, None] >> np.arange(n)) & 1  # [rows, n], 1 flips


def _random_flips(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    width = -(-n // 8)
    drawn = np.frombuffer(rng.bytes(rows * width), dtype=np.uint8).reshape(rows, width)
    return np.unpackbits(drawn, axis=1)[:, :n]  # [rows, n], 1 flips


def against_bound(differences: Floats, alternative: Literal["greater", "less"], null: float) -> float:
    """p-value of the mean against a bound other than 0: the larger of a sign-flip test and a studentised bootstrap.

    differences: [n]; null: same unit. Without an effect the conditions of a pair could be exchanged, so differences are
    symmetric about 0 and flips are exact. At a bound nothing makes them symmetric, and the bootstrap must agree.
    """
    turn = 1 if alternative == "greater" else -1
    return float(
        np.maximum(sign_flip(differences, alternative, null=null), mean_above(turn * differences, turn * null))
    )


def past_margin(differences: Floats, sign: int, fixed: float | None, dz: float | None) -> float:
    """p-value that the mean lies beyond every part of a margin, to be compared with .025, as a 95% interval is.

    differences: [n]. sign: the claim's side, 1 or -1. fixed: the part in the readout's unit, None without one. dz: the
    part in true standard deviations. p counts twice: over zero-inflated and exponential differences of 10 to 100 pairs
    it was measured to err up to 1.7 times as often as it says (benchmarks/false_positives.py).
    """
    parts = [0.0]
    if fixed is not None:
        parts.append(against_bound(differences, "greater" if sign > 0 else "less", sign * fixed))
    if dz is not None:
        parts.append(dz_above(sign * differences, dz))
    return float(np.minimum(1.0, 2 * np.max(parts)))


def smallest_n(alpha: float) -> int:
    """The smallest number of pairs at which a sign-flip test can give p < alpha: 2**-n < alpha."""
    n = 1
    while 2.0**-n >= alpha:
        n += 1
    return n


def smallest_p(n: int, resamples: int = RESAMPLES) -> float:
    """The smallest p that a one-sided sign-flip test of n pairs can give, whatever the data say.

    >>> smallest_p(8)
    0.00390625
    """
    return 2.0**-n if 2**n <= resamples else 1 / (resamples + 1)


def equivalence(differences: Floats, margin: float, level: float = 0.90) -> Equivalence:
    """Two one-sided tests (`against_bound`) that the mean lies within (-margin, +margin), with the BCa interval.

    differences: [n]; margin: same unit, above 0.
    Source: Schuirmann 1987 (J Pharmacokinet Biopharm 15:657).
    Raises:
        ValueError: if margin is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"an equivalence margin must be above 0, got {margin}")
    lower = against_bound(differences, "greater", -margin)
    upper = against_bound(differences, "less", margin)
    return Equivalence(float(np.maximum(lower, upper)), lower, upper, bca_interval(differences, level))


def cohens_dz(differences: Floats) -> float:
    """Mean of the pair differences over their standard deviation (n - 1); NaN if that is 0 or n < 2.

    Source: Lakens 2013 (Front Psychol 4:863), equation 6.
    """
    sd = sd_of(differences)
    return float(on_grid(differences).mean()) / sd if sd > 0 else math.nan


def dz_interval(differences: Floats, level: float = 0.95) -> Interval:
    """Two-sided interval of dz, which holds both the mean and the standard deviation for estimates; NaN without a dz.

    Source: Hedges & Olkin 1985, chapter 5: standard error sqrt(1/n + dz^2 / 2n), Student's t with n - 1 degrees of
    freedom; the same to 1e-9 as `pingouin.compute_esci` of paired samples.
    """
    dz, n = cohens_dz(differences), len(differences)
    if math.isnan(dz):
        return Interval(math.nan, math.nan, level)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * math.sqrt((1 + dz * dz / 2) / n)
    return Interval(dz - half, dz + half, level)


def sd_of(differences: Floats) -> float:
    """Standard deviation (n - 1) of the pair differences, in their unit; NaN if n < 2."""
    return float(np.std(np.sort(on_grid(differences)), ddof=1)) if len(differences) > 1 else math.nan


def rank_biserial(differences: Floats) -> float:
    """Matched-pairs rank-biserial correlation: (favourable - unfavourable rank sum) / total, zeros left out.

    From -1 to 1; NaN if all differences are 0.
    Source: Kerby 2014 (Comprehensive Psychology 3:1), the simple difference formula on Wilcoxon's ranks.
    """
    values = on_grid(differences)
    values = values[values != 0]
    if len(values) == 0:
        return math.nan
    ranks = stats.rankdata(np.abs(values))
    return float((ranks[values > 0].sum() - ranks[values < 0].sum()) / ranks.sum())


def jzs_bayes_factor(differences: Floats, scale: float = math.sqrt(2) / 2) -> float:
    """Bayes factor of a mean effect over none (BF10), Cauchy prior on the standardised effect.

    Rounded to 6 significant digits, which its numerical integral is good for; infinite where it is more than a float
    holds. NaN if n < 2, if the differences do not vary, or beyond |dz| = 20, where the integral is no longer right (and
    nobody needs it).
    Source: Rouder et al. 2009 (Psychon Bull Rev 16:225), equation 1.
    The tests hold numbers of `pingouin.bayesfactor_ttest`.
    """
    dz = cohens_dz(differences)
    if not abs(dz) <= MAX_DZ_OF_BAYES_FACTOR:
        return math.nan
    n = len(differences)
    # A float of numpy's: a likelihood that underflows then gives infinity, where Python's would raise.
    t = np.float64(dz * math.sqrt(n))
    under_effect = integrate.quad(_weighted_likelihood, 0, np.inf, args=(t, n, scale))[0]
    with np.errstate(divide="ignore"):
        value = 1 / ((1 + t**2 / (n - 1)) ** (-n / 2) / under_effect)
    return float(f"{value:.6g}")


def _weighted_likelihood(g: float, t: float, n: int, scale: float) -> float:
    """Likelihood of `t` where the effect's variance is `g` times the prior's, times the density of that `g`."""
    spread = 1 + n * g * scale**2
    likelihood = spread ** (-0.5) * (1 + t**2 / (spread * (n - 1))) ** (-n / 2)
    return likelihood * (2 * math.pi) ** (-0.5) * g ** (-3.0 / 2) * math.exp(-1 / (2 * g))
