"""The tests of `paired_tests`, `trend` and `correlation` on many data sets at once, for simulations.

Each is held to the one it stands for by a test. Fewer resamples are drawn than for a run's own verdicts, and the same
ones for all data sets, so that a thousand data sets take a second and not a minute.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from kvpatch.statistics.grid import Floats
from kvpatch.statistics.paired_tests import RESAMPLES
from kvpatch.statistics.resampling import least_spread
from kvpatch.statistics.simulation import bca_ends, flips_of, passes_dz, resample_weights
from kvpatch.statistics.trend import order_scores

_BATCH = 250
_TIE = 1e-6


def sign_flips(differences: Floats, null: Floats | float = 0.0) -> tuple[Floats, Floats]:
    """One-sided p-values of `paired_tests.sign_flip`, "greater" and "less", [sets] each.

    differences: [sets, n]. null: the mean under the null hypothesis, one for all or [sets].
    """
    sets, n = differences.shape
    flips, taken = flips_of(n)
    nothing, extra = taken - flips.shape[1], 0 if 2**n <= RESAMPLES else 1
    greater, less = np.empty(sets), np.empty(sets)
    shifted = differences - np.broadcast_to(np.asarray(null, dtype=float), (sets,))[:, None]
    for start in range(0, sets, _BATCH):
        rows = slice(start, start + _BATCH)
        # A flip turns the signs of some; their mean says whether the flipped sum reaches the observed one.
        means = shifted[rows].astype(np.float32) @ flips
        tie = _TIE * np.abs(shifted[rows]).max(axis=1, keepdims=True)
        greater[rows] = (np.count_nonzero(means <= tie, axis=1) + nothing + extra) / (taken + extra)
        less[rows] = (np.count_nonzero(means >= -tie, axis=1) + nothing + extra) / (taken + extra)
    return greater, less


def means_above(differences: Floats, null: Floats) -> Floats:
    """p-values of `resampling.mean_above`, [sets]. differences: [sets, n]; null: [sets]."""
    sets, n = differences.shape
    weights = resample_weights(n)
    out = np.empty(sets)
    for start in range(0, sets, _BATCH):
        rows = slice(start, start + _BATCH)
        mean, sd = differences[rows].mean(axis=1), differences[rows].std(axis=1, ddof=1)
        scale = np.where(sd > 0, sd, 1)[:, None]
        centred = (differences[rows] - mean[:, None]) / scale
        means, squares = centred.astype(np.float32) @ weights, (centred**2).astype(np.float32) @ weights
        spread = np.sqrt(np.maximum(squares - means**2, 0) * n / (n - 1))
        observed = ((mean - null[rows])[:, None]) / scale
        at_least = np.count_nonzero(means / np.maximum(spread, least_spread(n)) >= observed - _TIE, axis=1)
        by_draws = (at_least + 1) / (weights.shape[1] + 1)
        constant = np.where(mean > null[rows], 1 / (weights.shape[1] + 1), 1.0)
        out[rows] = np.where(sd > 0, by_draws, constant)
    return out


def against_bounds(differences: Floats, side: int, null: Floats) -> Floats:
    """p-values of `paired_tests.against_bound`, [sets]. side: 1 for "greater", -1 for "less". null: [sets]."""
    by_flips = sign_flips(differences, null)[0 if side > 0 else 1]
    return np.maximum(by_flips, means_above(side * differences, side * null))


def past_margins(differences: Floats, side: int, fixed: Floats | None, dz: float | None) -> Floats:
    """p-values of `paired_tests.past_margin`, [sets], of the part in standard deviations only whether it lies below
    .025: 0 or 1. fixed: [sets], NaN where there is none."""
    found = np.zeros(len(differences))
    if fixed is not None:
        found = np.maximum(found, against_bounds(differences, side, side * fixed))
    if dz is not None:
        found = np.maximum(found, np.where(passes_dz(side * differences, dz), 0.0, 1.0))
    return np.minimum(1.0, 2 * found)


def equivalences(differences: Floats, margin: Floats) -> Floats:
    """p-values of `paired_tests.equivalence`, [sets]. margin: [sets]."""
    return np.maximum(against_bounds(differences, 1, -margin), against_bounds(differences, -1, margin))


def intervals(differences: Floats, level: float) -> tuple[Floats, Floats]:
    """Ends of `intervals.bca_interval`, [sets] each; NaN for fewer than 3 values, without width where all are equal."""
    if differences.shape[1] < 3:
        nothing = np.full(len(differences), math.nan)
        return nothing, nothing
    low, high = bca_ends(differences, (level,))
    first = differences[:, 0]
    is_constant = (differences == first[:, None]).all(axis=1)
    return np.where(is_constant, first, low[level]), np.where(is_constant, first, high[level])


def ordered_trends(table: Floats, peak: int) -> Floats:
    """p-values of `trend.ordered_trend`, [sets], by the normal approximation of the permutation distribution of ranks
    (Page 1963). table: [sets, pairs, levels]."""
    _, pairs, levels = table.shape
    scores = order_scores(levels, peak)
    ranks = stats.rankdata(table, axis=2)
    total = (ranks @ scores).sum(axis=1)
    # Given the ranks, ties and all, the sum of each pair has mean 0 and this variance under permutation.
    spread = np.sqrt((ranks.var(axis=2).sum(axis=1)) * float(scores @ scores) * levels / (levels - 1))
    return (
        special.ndtr(-np.where(spread > 0, total / np.where(spread > 0, spread, 1), 0.0))
        if pairs > 1
        else total * math.nan
    )


def partial_correlations(table: Floats) -> tuple[Floats, NDArray[np.float64], Floats, Floats]:
    """r of `correlation.partial_correlation`, its one-sided p-values "greater", and the ends of its 95% interval, each
    [sets]. table: [sets, n, 2 + held], of which the first two columns correlate given the others; all NaN for fewer
    pairs than held + 4."""
    sets, n, columns = table.shape
    held = columns - 2
    if n < held + 4:
        nothing = np.full(sets, math.nan)
        return nothing, nothing, nothing, nothing
    centred = table - table.mean(axis=1, keepdims=True)
    own, others = centred[:, :, :2], centred[:, :, 2:]
    if held:
        turned = np.swapaxes(others, 1, 2)
        own = own - others @ (np.linalg.pinv(turned @ others) @ (turned @ own))
    x, y = own[:, :, 0], own[:, :, 1]
    size = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    r = np.clip((x * y).sum(axis=1) / np.where(size > 0, size, math.nan), -1 + 1e-15, 1 - 1e-15)
    freedom = n - 2 - held
    p = special.stdtr(freedom, -r * np.sqrt(freedom / (1 - r**2)))
    half = float(special.ndtri(0.975)) / math.sqrt(n - 3 - held)
    return r, p, np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half)
