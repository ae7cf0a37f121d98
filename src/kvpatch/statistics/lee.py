"""Lee bounds: what a contrast can be among the outputs that are coherent under both conditions."""

from __future__ import annotations

import math

import numpy as np

from kvpatch.statistics.grid import Floats


def lee_bounds(first: Floats, first_share: float, second: Floats, second_share: float) -> tuple[float, float]:
    """Lowest and highest mean difference among outputs that are coherent either way.

    first, second: [outputs], readouts of the coherent outputs alone; first_share, second_share: the shares of outputs
    that are coherent, in [0, 1]. The condition with the larger share holds outputs that the other would have lost; they
    can be its highest or its lowest, and are trimmed off at either end. Holds where what makes outputs incoherent works
    one way. NaN where a condition has no coherent output.
    Source: Lee 2009 (Rev Econ Stud 76:1071), proposition 1a. Not every output can be in that group: where both shares
    are small the bounds speak of few.
    """
    if len(first) == 0 or len(second) == 0 or not (first_share > 0 and second_share > 0):
        return math.nan, math.nan
    if first_share >= second_share:
        kept = second_share / first_share
        other = float(np.mean(second))
        return _mean_of_lowest(first, kept) - other, _mean_of_highest(first, kept) - other
    kept = first_share / second_share
    own = float(np.mean(first))
    return own - _mean_of_highest(second, kept), own - _mean_of_lowest(second, kept)


def _mean_of_lowest(values: Floats, share: float) -> float:
    """Mean of the lowest share of the values; the one at the edge counts in part."""
    ordered = np.sort(values)
    weights = np.clip(share * len(ordered) - np.arange(len(ordered)), 0, 1)
    return float((weights * ordered).sum() / weights.sum())


def _mean_of_highest(values: Floats, share: float) -> float:
    return -_mean_of_lowest(-values, share)
