"""Does a finding repeat? Two studies are held against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvpatch.statistics.intervals import Interval


@dataclass(frozen=True)
class Study:
    """An estimate, its interval, and how far from 0 it must lie to count (0 or more), in the claim's direction.

    shared: the interval on a scale that both studies have, such as dz; the same one where their unit is shared.
    """

    estimate: float
    interval: Interval
    bound: float
    shared: Interval | None = None


@dataclass(frozen=True)
class Replication:
    """Whether a finding repeats; `reason` is what it lacks, or what it has, as a clause."""

    holds: bool
    speaks_against: bool
    reason: str


def replicates(first: Study, second: Study, sign: int) -> Replication:
    """Hold a second study against a first one.

    sign: +1 or -1, the claim's direction; intervals are turned so that the claim's side is positive. A finding repeats
    where both estimates have the claim's sign, both intervals lie beyond their own bound, and the intervals on the
    shared scale overlap.
    The second study speaks against it where its interval lies wholly on the other side of 0, or within its bound.
    """
    (low1, high1), (low2, high2) = (_turned(s.interval, sign) for s in (first, second))
    if not all(map(math.isfinite, (low1, high1, low2, high2))):
        return Replication(False, False, "one of the two has no interval")
    if high2 < 0 or (second.bound > 0 and high2 <= second.bound):
        return Replication(False, True, "the second lies short of what would count")
    if low1 <= first.bound:
        return Replication(False, False, "the first is not beyond its own margin")
    if low2 <= second.bound:
        return Replication(False, False, "the second is not beyond its own margin")
    (low1, high1), (low2, high2) = (_turned(s.shared or s.interval, sign) for s in (first, second))
    if not all(map(math.isfinite, (low1, high1, low2, high2))):
        return Replication(False, False, "both are beyond their margins, but one of them does not vary, so has no dz")
    if low2 > high1 or low1 > high2:
        return Replication(False, False, "both are beyond their margins, but their intervals do not overlap")
    return Replication(True, False, "both have the claim's sign, lie beyond their margins, and overlap")


def _turned(interval: Interval, sign: int) -> tuple[float, float]:
    low, high = sorted((sign * interval.low, sign * interval.high))
    return low, high
