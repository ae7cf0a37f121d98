"""Many data sets at once through the project's own tests: what each would have needed to be decided.

A sign-flip test and a bootstrap interval both move with the data: adding an effect to every pair difference changes
which flips reach the observed mean, and shifts the interval, in a way that is known in closed form. So a data set of
pure noise is simulated once, and the *critical effect*, the smallest that would have passed, is read off it. Power at
an effect is the share of data sets whose critical effect lies below it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from kvpatch.statistics.grid import Floats
from kvpatch.statistics.intervals import SEED
from kvpatch.statistics.paired_tests import RESAMPLES
from kvpatch.statistics.resampling import least_spread, mean_less_sds
from kvpatch.statistics.trend import order_scores

FLIPS = 20_000
"""Random flips, where there are too many for all; `sign_flip` draws more, which matters only for the last few flips."""
WEIGHTS = 2_000
"""Bootstrap samples; `bca_interval` draws 9,999, which moves an end by less than a tenth of a standard error."""
LEVELS = (0.95, 0.90)
_BATCH = 250
_Matrix = NDArray[np.float32]


class Critical:
    """What each simulated data set needs, by the rules of `tests.sign_flip` and `intervals.bca_interval`.

    Each part is worked out when it is first read: most kinds of test read only some of them.

    above: alpha -> [sets]; the flips of "greater" give p < alpha once more than this is added to every difference.
    below: alpha -> [sets]; the same for the data set with its signs turned, so for the test "less".
    above_t, below_t: the same for the studentised bootstrap.
    low, high: level -> [sets], ends of the BCa interval of the mean as it is.
    sd: [sets], standard deviations (n - 1).
    """

    def __init__(self, differences: Floats, alphas: tuple[float, ...], levels: tuple[float, ...]) -> None:
        self._differences, self._alphas, self._levels = differences, alphas, levels

    @cached_property
    def _flips(self) -> tuple[dict[float, Floats], dict[float, Floats]]:
        return _by_flips(self._differences, self._alphas)

    @cached_property
    def _studentised(self) -> tuple[dict[float, Floats], dict[float, Floats]]:
        return _by_studentised(self._differences, self._alphas)

    @cached_property
    def _bootstrap(self) -> tuple[dict[float, Floats], dict[float, Floats]]:
        return bca_ends(self._differences, self._levels)

    @property
    def above(self) -> dict[float, Floats]:
        return self._flips[0]

    @property
    def below(self) -> dict[float, Floats]:
        return self._flips[1]

    @property
    def above_t(self) -> dict[float, Floats]:
        return self._studentised[0]

    @property
    def below_t(self) -> dict[float, Floats]:
        return self._studentised[1]

    @property
    def low(self) -> dict[float, Floats]:
        return self._bootstrap[0]

    @property
    def high(self) -> dict[float, Floats]:
        return self._bootstrap[1]

    @cached_property
    def sd(self) -> Floats:
        return np.std(self._differences, axis=1, ddof=1)


@lru_cache(maxsize=256)
def noise_sets(n: int, sets: int, pilot: tuple[float, ...] | None = None) -> Floats:
    """Simulated differences without an effect, [sets, n], with standard deviation 1.

    Normal, or drawn with replacement from `pilot`, which has mean 0 and standard deviation (n - 1) 1.
    """
    rng = np.random.default_rng([SEED, n])
    if pilot is None:
        return rng.standard_normal((sets, n))
    return rng.choice(np.asarray(pilot), size=(sets, n))


@lru_cache(maxsize=256)
def critical(n: int, sets: int, alphas: tuple[float, ...], pilot: tuple[float, ...] | None = None) -> Critical:
    """`critical_of` simulated noise (`noise_sets`); remembered."""
    return critical_of(noise_sets(n, sets, pilot), alphas)


def critical_of(differences: Floats, alphas: Iterable[float], levels: Iterable[float] = LEVELS) -> Critical:
    """What each data set needs to be decided.

    differences: [sets, n], n at least 3. An alpha that n pairs can't reach gives infinity.
    """
    return Critical(differences, tuple(dict.fromkeys(alphas)), tuple(levels))


def _by_flips(differences: Floats, alphas: tuple[float, ...]) -> tuple[dict[float, Floats], dict[float, Floats]]:
    """A flip of some signs reaches the observed sum where the flipped differences do not sum to more than 0, that is,
    where the effect is at most minus the mean of the flipped noise. The critical effect is the k-th largest such."""
    sets, n = differences.shape
    flips, taken = flips_of(n)
    allowed = {alpha: _flips_allowed(alpha, taken, exact=2**n <= RESAMPLES) for alpha in alphas}
    ranks = sorted({k for k in allowed.values() if k >= 0})
    out: tuple[dict[float, Floats], dict[float, Floats]] = (
        {alpha: np.full(sets, np.inf) for alpha in alphas},
        {alpha: np.full(sets, np.inf) for alpha in alphas},
    )
    if not ranks:
        return out
    for start in range(0, sets, _BATCH):
        rows = slice(start, start + _BATCH)
        means = differences[rows].astype(np.float32) @ flips  # [batch, flips that flip something]
        size = means.shape[1]
        # Of the many flips only the two tails are ever read, so only those are put in order.
        most = min(ranks[-1], size - 1)
        parted = np.partition(means, sorted({most, size - 1 - most}), axis=1)
        least, largest = np.sort(parted[:, : most + 1], axis=1), np.sort(parted[:, size - 1 - most :], axis=1)
        for alpha, k in allowed.items():
            if k >= 0:
                out[0][alpha][rows] = -least[:, min(k, most)]
                out[1][alpha][rows] = largest[:, most - min(k, most)]
    return out


@lru_cache(maxsize=4)
def flips_of(n: int) -> tuple[_Matrix, int]:
    """[n, flips]: each column averages the differences that one flip turns; and how many flips that is with those that
    turn none, which always reach the observed sum and so are left out."""
    if 2**n <= RESAMPLES:
        turned = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    else:
        turned = np.random.default_rng([SEED, n, 1]).integers(0, 2, (FLIPS, n), dtype=np.int8)
    taken = len(turned)
    turned = turned[turned.any(axis=1)].astype(np.float32)
    return np.ascontiguousarray((turned / turned.sum(axis=1, keepdims=True)).T), taken


def _flips_allowed(alpha: float, taken: int, *, exact: bool) -> int:
    """How many flips that turn something may reach the observed sum with p < alpha still; below 0 if none may."""
    total = taken if exact else taken + 1
    return math.ceil(alpha * total * (1 - 1e-12)) - 2  # the observed one counts, and p must be below alpha


def _by_studentised(differences: Floats, alphas: tuple[float, ...]) -> tuple[dict[float, Floats], dict[float, Floats]]:
    """An effect moves the observed t and not the resampled ones, so it must carry the one past their upper tail."""
    sets, n = differences.shape
    weights = resample_weights(n)
    above = {alpha: np.empty(sets) for alpha in alphas}
    below = {alpha: np.empty(sets) for alpha in alphas}
    for start in range(0, sets, _BATCH):
        rows = slice(start, start + _BATCH)
        mean = differences[rows].mean(axis=1)
        sd = differences[rows].std(axis=1, ddof=1)
        centred = (differences[rows] - mean[:, None]) / np.where(sd > 0, sd, 1)[:, None]
        means = centred.astype(np.float32) @ weights
        squares = (centred**2).astype(np.float32) @ weights
        spread = np.sqrt(np.maximum(squares - means**2, 0) * n / (n - 1))
        t = np.sort(means / np.maximum(spread, least_spread(n)), axis=1)
        for alpha in alphas:
            above[alpha][rows] = _quantile(t, np.full(len(mean), 1 - alpha)) * sd - mean
            below[alpha][rows] = -_quantile(t, np.full(len(mean), alpha)) * sd + mean
    return above, below


@lru_cache(maxsize=256)
def critical_dz(n: int, sets: int, dz: float, pilot: tuple[float, ...] | None = None) -> tuple[Floats, Floats]:
    """The smallest effect at which simulated noise passes the dz part of a margin, above and below, [sets] each."""
    noise = noise_sets(n, sets, pilot)
    return _dz_needs(noise, dz), _dz_needs(-noise, dz)


def passes_dz(differences: Floats, dz: float) -> NDArray[np.bool_]:
    """Whether each data set [sets, n] passes the dz part of a margin."""
    return _dz_needs(differences, dz) < 0


def _dz_needs(differences: Floats, dz: float) -> Floats:
    """What must be added for a mean more than dz standard deviations above 0, [sets]; infinite for fewer than 4 pairs.

    As in `tests.past_margin`, whose p for this part counts twice and is compared with .025.
    """
    sets, n = differences.shape
    needed = np.full(sets, np.inf)
    if n < 4:
        return needed
    tail = 0.0125
    by_t = float(stats.nct.isf(tail, n - 1, dz * math.sqrt(n))) / math.sqrt(n)
    weights = resample_weights(n)
    for start in range(0, sets, _BATCH):
        rows = slice(start, start + _BATCH)
        mean, sd = differences[rows].mean(axis=1), differences[rows].std(axis=1, ddof=1)
        centred = (differences[rows] - mean[:, None]) / np.where(sd > 0, sd, 1)[:, None]
        powers = [centred**k for k in range(1, 5)]
        own, error = mean_less_sds(np.stack([p.mean(axis=1) for p in powers]), dz, n)
        drawn = np.stack([p.astype(np.float32) @ weights for p in powers]).astype(np.float64)
        shifted, errors = mean_less_sds(drawn, dz, n)
        t = np.sort((shifted - own[:, None]) / errors, axis=1).astype(np.float32)
        least = _quantile(t, np.full(len(mean), 1 - tail)) * error - own
        needed[rows] = np.where(sd > 0, np.maximum(least, by_t) * sd - mean, np.inf)
    return needed


def bca_ends(differences: Floats, levels: tuple[float, ...]) -> tuple[dict[float, Floats], dict[float, Floats]]:
    """BCa ends of the mean: bias from the share of bootstrap means below it, acceleration from the jackknife."""
    sets, n = differences.shape
    weights = resample_weights(n)
    low = {level: np.empty(sets) for level in levels}
    high = {level: np.empty(sets) for level in levels}
    for start in range(0, sets, _BATCH):
        rows = slice(start, start + _BATCH)
        values = differences[rows]
        mean = values.mean(axis=1, keepdims=True)
        centred = values - mean
        means = np.sort(centred.astype(np.float32) @ weights, axis=1)  # [batch, WEIGHTS]
        tie = 1e-6 * np.abs(centred).max(axis=1, keepdims=True)
        share = ((means < -tie).mean(axis=1) + (means <= tie).mean(axis=1)) / 2
        squares = (centred**2).sum(axis=1)
        skew = (centred**3).sum(axis=1) / np.where(squares > 0, 6 * squares**1.5, 1)
        bias = special.ndtri(np.clip(share, 1e-9, 1 - 1e-9))
        for level in levels:
            for ends, tail in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
                z = bias + special.ndtri(tail)
                at = special.ndtr(bias + z / (1 - skew * z))
                ends[level][rows] = mean[:, 0] + _quantile(means, at)
    return low, high


def _quantile(ordered: _Matrix, at: Floats) -> Floats:
    """The quantile `at` [rows] of each row of ordered [rows, columns], interpolated."""
    place = at * (ordered.shape[1] - 1)
    under = np.minimum(place.astype(int), ordered.shape[1] - 2)
    row = np.arange(len(ordered))
    left, right = ordered[row, under], ordered[row, under + 1]
    return left + (place - under) * (right - left)


@lru_cache(maxsize=4)
def resample_weights(n: int) -> _Matrix:
    """[n, WEIGHTS]: how often each difference is drawn, over n; shared by all data sets."""
    counts = np.random.default_rng([SEED, n, 2]).multinomial(n, np.full(n, 1 / n), size=WEIGHTS)
    return np.ascontiguousarray((counts / n).T, dtype=np.float32)


@lru_cache(maxsize=256)
def critical_slopes(n: int, levels: int, peak: int, alpha: float, sets: int) -> Floats:
    """The smallest mean slope, in standard deviations of the pairs' slopes, at which an ordering is decided, [sets].

    Normal noise of equal size at every level. A set is decided once ranks within pairs give p < alpha (by the normal
    approximation of the permutation distribution, mean 0 and variance n (levels + 1) levels / 12 times the squared
    scores: Page 1963) and the slopes' 95% interval lies above 0. More slope never undoes that, so it is bisected for.
    """
    scores = order_scores(levels, peak)
    squares = float(scores @ scores)
    sets = max(200, min(sets, 400_000 // n))
    noise = np.random.default_rng([SEED, n, 3]).standard_normal((sets, n, levels))
    spread = math.sqrt(n * levels * (levels + 1) / 12 * squares)
    z = special.ndtri(1 - alpha)
    low, high = np.zeros(sets), np.full(sets, 8.0 / math.sqrt(n) + 4.0)
    levels_first = np.ascontiguousarray(np.moveaxis(noise, 2, 0))
    for _ in range(14):
        middle = (low + high) / 2
        passes = _rank_sums(levels_first, middle / math.sqrt(squares), scores) > z * spread
        low, high = np.where(passes, low, middle), np.where(passes, middle, high)
    ends = bca_ends(noise @ scores / math.sqrt(squares), (0.95,))[0][0.95]
    return np.maximum(high, -ends)


def _rank_sums(noise: Floats, steps: Floats, scores: Floats) -> Floats:
    """Sum of scores times ranks within pairs, [sets], where each level is moved by its score times `steps` [sets].

    noise: [levels, sets, n]. Of two levels the higher one gains a rank, so pairs of levels are compared and nothing
    is sorted; ranks count from 0.
    """
    levels, _, n = noise.shape
    total = np.zeros(len(steps))
    for first in range(levels):
        for second in range(first + 1, levels):
            gap = scores[second] - scores[first]
            second_is_higher = noise[second] - noise[first] > -(gap * steps)[:, None]
            total += scores[first] * n + gap * np.count_nonzero(second_is_higher, axis=1)
    return total


@lru_cache(maxsize=256)
def critical_correlations(n: int, held: int, alpha: float, sets: int) -> Floats:
    """The smallest partial correlation at which one is decided, [sets]; infinite for fewer than held + 4 pairs.

    The sampling error of Fisher's z is drawn from the exact distribution of r without a correlation, which hardly
    changes with the correlation itself (Fisher 1921, Metron 1:3). A set is decided once p < alpha by t and the 95%
    interval lies above 0.
    """
    if n < held + 4:
        return np.full(sets, np.inf)
    freedom, wide = n - 2 - held, 1 / math.sqrt(n - 3 - held)
    t = np.random.default_rng([SEED, n, 4]).standard_t(freedom, sets)
    error = np.arctanh(t / np.sqrt(t**2 + freedom))
    least_t = special.stdtrit(freedom, 1 - alpha)
    least = max(math.atanh(least_t / math.sqrt(least_t**2 + freedom)), float(special.ndtri(0.975)) * wide)
    return np.tanh(least - error)
