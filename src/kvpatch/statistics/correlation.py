"""Correlation over pairs, with other variables held constant."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from kvpatch.statistics.grid import Floats, on_grid
from kvpatch.statistics.intervals import Interval


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of what the covariates leave of two variables; all NaN where there is none.

    p_greater, p_less: one-sided, against r = 0. interval: two-sided, at its level.
    """

    r: float
    p_greater: float
    p_less: float
    interval: Interval
    n: int


def partial_correlation(x: Floats, y: Floats, covariates: Floats, level: float = 0.95) -> Correlation:
    """Pearson correlation of x and y given covariates.

    x, y: [n]; covariates: [n, k], k may be 0. p by Student's t with n - 2 - k degrees of freedom, interval by Fisher's
    z with standard error 1 / sqrt(n - 3 - k). Fewer than k + 4 units, or a variable that does not vary beyond the
    covariates, gives NaN.
    Source: Fisher 1924 (Metron 3:329), the partial correlation by residuals; the same to 1e-9 as
    `pingouin.partial_corr`, which sums in the order of the rows, where ours is the same in any order.
    """
    n, k = covariates.shape
    nothing = Correlation(math.nan, math.nan, math.nan, Interval(math.nan, math.nan, level), n)
    if n < k + 4:
        return nothing
    columns = np.column_stack([on_grid(x), on_grid(y), *(on_grid(c) for c in covariates.T)])
    columns = columns[np.lexsort(columns.T)]
    centred = columns - columns.mean(axis=0)
    size = np.abs(centred).max(axis=0)
    if not (size[:2] > 0).all():
        return nothing
    scaled = centred / np.where(size > 0, size, 1.0)
    own, others = scaled[:, :2], scaled[:, 2:]
    left = own - others @ np.linalg.lstsq(others, own, rcond=None)[0] if k else own
    norms = np.sqrt((left**2).sum(axis=0))
    if not (norms > 1e-9 * np.sqrt((own**2).sum(axis=0))).all():
        return nothing
    r = float(np.clip(left[:, 0] @ left[:, 1] / (norms[0] * norms[1]), -1.0, 1.0))
    freedom = n - 2 - k
    t = math.inf * r if abs(r) == 1 else r * math.sqrt(freedom / (1 - r * r))
    z, half = math.atanh(min(max(r, -1 + 1e-15), 1 - 1e-15)), stats.norm.ppf(0.5 + level / 2) / math.sqrt(n - 3 - k)
    interval = Interval(float(np.tanh(z - half)), float(np.tanh(z + half)), level)
    return Correlation(r, float(stats.t.sf(t, freedom)), float(stats.t.cdf(t, freedom)), interval, n)
