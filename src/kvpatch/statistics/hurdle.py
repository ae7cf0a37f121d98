"""The hurdle analysis, for readouts that are mostly 0: whether there is any hit, then how many where there are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from kvpatch.statistics.grid import Floats
from kvpatch.statistics.intervals import bca_interval
from kvpatch.statistics.paired_tests import sign_flip


@dataclass(frozen=True)
class Hurdle:
    """Two conditions over the same pairs. A number that could not be had is None."""

    any_first: float
    any_second: float
    """Shares of pairs with any hit."""
    p_any: float | None
    """Exact McNemar test on the pairs where only one of the two has a hit, one-sided."""
    n_both: int
    """Pairs where both have a hit; the rest of the numbers are over these."""
    rate: float | None
    rate_low: float | None
    rate_high: float | None
    """Mean difference of the readout and its 95% BCa interval."""
    p_rate: float | None


def hurdle(first: Floats, second: Floats, alternative: Literal["greater", "less", "two-sided"]) -> Hurdle | None:
    """Compare two paired conditions in two steps; None without pairs.

    first, second: [pairs], 0 or more, the readout's unit. alternative: of first against second.
    Source: Mullahy 1986 (J Econometrics 33:341) for the two parts; McNemar 1947 (Psychometrika 12:153), exact by
    `scipy.stats.binomtest`.
    """
    if len(first) == 0:
        return None
    has_first, has_second = first > 0, second > 0
    only = int((has_first & ~has_second).sum()), int((~has_first & has_second).sum())
    both = has_first & has_second
    differences = (first - second)[both]
    interval = bca_interval(differences)
    return Hurdle(
        any_first=float(has_first.mean()),
        any_second=float(has_second.mean()),
        p_any=float(stats.binomtest(only[0], sum(only), alternative=alternative).pvalue) if sum(only) else None,
        n_both=int(both.sum()),
        rate=float(differences.mean()) if len(differences) else None,
        rate_low=_known(interval.low),
        rate_high=_known(interval.high),
        p_rate=_known(sign_flip(differences, alternative)),
    )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
