"""Two-way clustered standard errors, for pairs that share prompts, topics or continuations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from kvpatch.statistics.grid import Floats

Labels = Sequence[str] | NDArray[Any]


@dataclass(frozen=True)
class Clustered:
    """The mean of pair differences with errors clustered by source and by target; `p` is two-sided, `se` the standard
    error, `sources` and `targets` count the clusters."""

    low: float
    high: float
    p: float
    sources: int
    targets: int
    se: float = math.nan


def two_way_clustered(differences: Floats, sources: Labels, targets: Labels) -> Clustered | None:
    """95% interval and p-value of the mean where pairs share something on either side: a prompt, or a domain, with it
    the continuations, which are a sample too (Clark 1973, J Verb Learn Verb Behav 12:335).

    differences: [pairs]. sources, targets: [pairs], what they share. None for fewer than 3 sources or targets, or where
    the estimated variance is not above 0, as can happen with few. Student's t has one degree of freedom less than the
    fewer of the two.
    Source: Cameron, Gelbach & Miller 2011 (J Bus Econ Stat 29:238), by `statsmodels`; their section 4 finds it too sure
    with few clusters, so it decides nothing here.
    """
    counts = len(set(sources)), len(set(targets))
    if min(counts) < 3:
        return None
    from statsmodels.regression.linear_model import OLS  # takes a second to import, and most commands never get here

    groups = np.stack([np.unique(list(names), return_inverse=True)[1] for names in (sources, targets)], axis=1)
    fitted = OLS(differences, np.ones((len(differences), 1))).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": True}
    )
    mean, error = float(fitted.params[0]), float(fitted.bse[0])
    if not (math.isfinite(error) and error > 0):
        return None
    freedom = min(counts) - 1
    half = float(stats.t.ppf(0.975, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Clustered(low=mean - half, high=mean + half, p=p, sources=counts[0], targets=counts[1], se=error)
