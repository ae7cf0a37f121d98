"""Numbers of docs/statistics.md, written once more from that page alone: numpy and scipy, nothing of kvpatch.

Plain rather than quick. What is stated under "To the last digit" there (grid, seeds, order of draws) stands here in the
same order.
"""

from __future__ import annotations

import math
import warnings
from itertools import product

import numpy as np
from scipy import stats

SEED = 20251207
NOTHING = (math.nan, math.nan)


def step_of(values):
    """The step of the grid: 2**-40 of the largest magnitude, taken up to a power of two."""
    largest = max((abs(v) for v in values), default=0.0)
    if largest < 2.0**-960:
        return 0.0
    part, power = math.frexp(largest)
    return 2.0 ** (power - (part == 0.5) - 40)


def on_grid(values):
    """Values rounded to the grid, sorted."""
    values, step = np.sort(np.asarray(values, dtype=float)), step_of(values)
    return values * 0 if step == 0 else np.rint(values / step) * step


def sd(values):
    return float(np.std(on_grid(values), ddof=1)) if len(values) > 1 else math.nan


def bca(values, level):
    """Ends of the BCa interval of the mean."""
    if len(values) < 3:
        return NOTHING
    x, step = on_grid(values), step_of(values)
    if x[0] == x[-1]:
        return float(x[0]), float(x[0])
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                (x / step,), np.mean, n_resamples=9999, confidence_level=level, method=method,
                rng=np.random.default_rng(SEED),
            ).confidence_interval  # fmt: skip
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return float(found.low * step), float(found.high * step)


def sign_flips(values, side, null=0.0):
    """One-sided p of the mean. side: 1 that it lies above `null`, -1 that it lies below."""
    n = len(values)
    if n < 2:
        return math.nan
    shifted = np.sort(np.asarray(values, dtype=float)) - null
    x = on_grid(shifted)
    if 2**n <= 50_000:
        flips, counted_in = np.array(list(product((0, 1), repeat=n))), 0
    else:
        width = -(-n // 8)
        drawn = np.frombuffer(np.random.default_rng(SEED).bytes(50_000 * width), dtype=np.uint8)
        flips, counted_in = np.unpackbits(drawn.reshape(50_000, width), axis=1)[:, :n], 1
    sums = x.sum() - 2 * (flips @ x)
    tie = n * step_of(shifted)
    reached = (sums >= x.sum() - tie) if side > 0 else (sums <= x.sum() + tie)
    return (int(reached.sum()) + counted_in) / (len(sums) + counted_in)


def resamples(n):
    """How often each of n values is drawn, [19999, n]."""
    drawn = np.random.default_rng([SEED, n]).integers(0, n, (19_999, n))
    return np.stack([(drawn == i).sum(axis=1) for i in range(n)], axis=1).astype(float)


def mean_above(values, null):
    """One-sided p by the studentised bootstrap that the mean lies above `null`."""
    n, x = len(values), on_grid(values)
    if n < 2:
        return math.nan
    mean, spread = x.mean(), x.std(ddof=1)
    if spread == 0:
        return 1 / 20_000 if mean > null else 1.0
    z, counts = (x - mean) / spread, resamples(n)
    means, squares = counts @ z / n, counts @ z**2 / n
    of_resample = np.sqrt(np.maximum(squares - means**2, 0) * n / (n - 1))
    t = means / np.maximum(of_resample, 1 / math.sqrt(n))
    return (int((t >= (mean - null) / spread - 1e-9).sum()) + 1) / 20_000


def against(values, side, null):
    """p against a bound other than 0: the larger of flips and bootstrap."""
    return float(np.maximum(sign_flips(values, side, null), mean_above(side * np.asarray(values), side * null)))


def mean_less_sds(moments, dz, n):
    m1, m2, m3, m4 = moments
    variance = np.maximum(m2 - m1**2, 1e-12)
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    of_both = variance - dz * third / np.sqrt(variance) + dz**2 * (fourth - variance**2) / (4 * variance)
    return m1 - dz * np.sqrt(variance * n / (n - 1)), np.sqrt(np.maximum(of_both, 0.02 * variance) / n)


def dz_above(values, dz):
    """p that the mean lies more than dz true standard deviations above 0."""
    n, x = len(values), on_grid(values)
    if n < 4:
        return math.nan
    mean, spread = x.mean(), x.std(ddof=1)
    if spread == 0:
        return 1.0
    by_t = float(stats.nct.sf(mean / spread * math.sqrt(n), n - 1, dz * math.sqrt(n)))
    z = (x - mean) / spread
    powers = np.stack([z**k for k in (1, 2, 3, 4)], axis=1)
    own, error = mean_less_sds(powers.mean(axis=0), dz, n)
    drawn, errors = mean_less_sds((resamples(n) @ powers / n).T, dz, n)
    reached = int(((drawn - own) / errors >= (mean / spread + own) / error - 1e-9).sum())
    return max((reached + 1) / 20_000, by_t if math.isfinite(by_t) else 0.0)


def past_margin(values, side, fixed, dz):
    parts = [] if fixed is None else [against(values, side, side * fixed)]
    parts += [] if dz is None else [dz_above(side * np.asarray(values), dz)]
    return float(np.minimum(1.0, 2 * np.max(parts)))


def equivalence(values, margin):
    return float(np.maximum(against(values, 1, -margin), against(values, -1, margin)))


def scores(levels, peak):
    """Centred scores that rise by 1 a level up to the peak and fall by 1 after it."""
    raw = -np.abs(np.arange(levels) - float(peak))
    return raw - raw.mean()


def grid_of_table(table):
    step = step_of(np.ravel(table))
    return np.zeros_like(table) if step == 0 else np.rint(table / step) * step


def slopes(table, peak):
    s = scores(table.shape[1], peak)
    return grid_of_table(table) @ s / float(s @ s)


def ordered(table, peak):
    """One-sided p of the order, by ranks within pairs."""
    pairs, levels = table.shape
    if pairs < 2:
        return math.nan
    ranks = np.array(sorted(map(tuple, stats.rankdata(grid_of_table(table), axis=1))))
    has_ties = any(len(set(row)) < levels for row in ranks)
    if peak == levels - 1 and not has_ties and pairs <= 12 and levels <= 5:
        return float(stats.page_trend_test(ranks, ranked=True, method="exact").pvalue)
    s = np.rint(2 * levels * scores(levels, peak))
    start = np.broadcast_to(np.arange(levels, dtype=np.int8), (19_999, pairs, levels))
    drawn = np.random.default_rng(SEED).permuted(start, axis=2)
    observed, at_least = (2 * ranks @ s).sum(), 0
    for orders in np.array_split(drawn, 20):
        at_least += int(((np.take_along_axis(2 * ranks[None], orders, axis=2) @ s).sum(axis=1) >= observed).sum())
    return (at_least + 1) / 20_000


def standard_ranks(table):
    """Ranks within each row, centred and of length 1; zeros where a row's values are all one."""
    ranks = stats.rankdata(grid_of_table(table), axis=1) - (table.shape[1] + 1) / 2
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    return ranks / np.where(length > 0, length, 1)


def rhos(x, y):
    """Spearman's rho of each pair. x, y: [units, levels]."""
    return on_grid(np.clip((standard_ranks(x) * standard_ranks(y)).sum(axis=1), -1, 1))


def mean_rho(x, y, side):
    """One-sided p of the mean rho: y's ranks are permuted within pairs."""
    pairs, levels = x.shape
    if pairs < 2:
        return math.nan
    own, other = side * standard_ranks(x), standard_ranks(y)
    start = np.broadcast_to(np.arange(levels, dtype=np.int8), (19_999, pairs, levels))
    drawn = np.random.default_rng(SEED).permuted(start, axis=2)
    observed, at_least = (own * other).sum(), 0
    for orders in np.array_split(drawn, 20):
        sums = (own * np.take_along_axis(other[None], orders, axis=2)).sum(axis=(1, 2))
        at_least += int((sums >= observed - 1e-9).sum())
    return (at_least + 1) / 20_000


def partial_correlation(x, y, held):
    """r of what `held` [n, k] leaves of x and y, p that it is above 0, p that it is below, and the 95% interval."""
    n, k = held.shape
    columns = np.column_stack([grid_of_table(c) for c in (x, y, *held.T)]) if n else np.empty((0, 2 + k))
    if n < k + 4 or (np.ptp(columns[:, :2], axis=0) == 0).any():
        return math.nan, math.nan, math.nan, NOTHING
    centred = columns - columns.mean(axis=0)
    size = np.abs(centred).max(axis=0)
    scaled = centred / np.where(size > 0, size, 1)
    own, others = scaled[:, :2], scaled[:, 2:]
    left = own - others @ np.linalg.lstsq(others, own, rcond=None)[0] if k else own
    norms = np.linalg.norm(left, axis=0)
    if (norms <= 1e-9 * np.linalg.norm(own, axis=0)).any():
        return math.nan, math.nan, math.nan, NOTHING
    r = float(np.clip(left[:, 0] @ left[:, 1] / norms.prod(), -1, 1))
    freedom = n - 2 - k
    t = math.inf * r if abs(r) == 1 else r * math.sqrt(freedom / (1 - r * r))
    z = math.atanh(min(max(r, -1 + 1e-15), 1 - 1e-15))
    half = stats.norm.ppf(0.975) / math.sqrt(n - 3 - k)
    ends = float(np.tanh(z - half)), float(np.tanh(z + half))
    return r, float(stats.t.sf(t, freedom)), float(stats.t.cdf(t, freedom)), ends


def clopper_pearson(hits, n):
    """The 90% interval of a share."""
    found = stats.binomtest(hits, n).proportion_ci(0.90, method="exact")
    return found.low, found.high


def mean_hit(hits):
    """The smallest and the largest plausible mean of hits, at 90%."""
    count = len(hits)
    if count == 0:
        return 0.0, math.inf
    mean = float(np.mean(hits))
    if count >= 60:
        half = float(stats.t.ppf(0.95, count - 1)) * float(np.std(hits, ddof=1)) / math.sqrt(count)
        return max(0.0, mean - half), mean + half
    return tuple(count * mean / float(stats.gamma.ppf(tail, count)) for tail in (0.95, 0.05))


def rare_bounds(sides, known):
    """Bounds of a contrast whose readout is mostly 0. sides: (weight, values) of each condition. known: hits of the
    calibration pairs."""
    pooled = np.concatenate([v[v > 0] for _, v in sides])
    largest = max(known.max(), pooled.max(initial=0.0)) if len(known) >= 5 else math.inf
    low = high = 0.0
    for weight, values in sides:
        hits = values[values > 0]
        least_share, most_share = clopper_pearson(len(hits), len(values))
        least, most = mean_hit(hits)
        most = mean_hit(pooled)[1] if len(hits) < 60 else most
        ends = sorted((weight * least_share * least, weight * most_share * min(most, largest)))
        low, high = low + ends[0], high + ends[1]
    return low, high


def passed_on(families, alphas, shares):
    """At what part of all alphas each hypothesis is rejected. families: p-values of each. shares: [from][to], of the
    alpha of a family of which all are rejected. Holm within a family (Bretz et al. 2009, algorithms 1 and 2)."""
    left = [sorted((1.0 if math.isnan(p) else p, i) for i, p in enumerate(ps)) for ps in families]
    out = [[math.inf] * len(ps) for ps in families]
    alphas, shares, factor = list(alphas), np.array(shares, dtype=float), 0.0
    while any(left[f] and alphas[f] > 0 for f in range(len(left))):
        open_ones = [f for f in range(len(left)) if left[f] and alphas[f] > 0]
        at = {f: len(left[f]) * left[f][0][0] / alphas[f] for f in open_ones}
        gone = min(open_ones, key=lambda f: at[f])
        factor = max(factor, at[gone])
        out[gone][left[gone].pop(0)[1]] = factor
        if left[gone]:
            continue
        alphas = [a + alphas[gone] * shares[gone, f] for f, a in enumerate(alphas)]
        alphas[gone], old = 0.0, shares.copy()
        for f in range(len(left)):
            back = old[f, gone] * old[gone, f]
            shares[f] = (old[f] + old[f, gone] * old[gone]) / (1 - back) if back < 1 else 0.0
            shares[f, f] = 0.0
        shares[gone], shares[:, gone] = 0.0, 0.0
    return out


def adjusted(p_values, correction):
    """Holm's or Benjamini and Hochberg's p. What has no p counts as 1 and stays without one."""
    p = [1.0 if math.isnan(value) else value for value in p_values]
    m, order = len(p), sorted(range(len(p)), key=lambda i: p[i])
    found, running = [0.0] * m, 0.0 if correction == "holm" else 1.0
    for place in range(m) if correction == "holm" else reversed(range(m)):
        i = order[place]
        if correction == "holm":
            running = max(running, p[i] * (m - place))
        else:
            running = min(running, p[i] * m / (place + 1))
        found[i] = min(1.0, running)
    return [math.nan if math.isnan(value) else f for value, f in zip(p_values, found, strict=True)]
