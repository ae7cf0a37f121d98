"""Does a finding repeat, and what several studies say together."""

from __future__ import annotations

import pytest

from kvpatch.statistics.intervals import Interval
from kvpatch.statistics.replication import Study, replicates


def study(low: float, high: float, bound: float = 0.0) -> Study:
    return Study((low + high) / 2, Interval(low, high, 0.95), bound)


@pytest.mark.parametrize(
    ("first", "second", "sign", "holds", "against"),
    [
        (study(1, 3), study(2, 4), 1, True, False),
        (study(-3, -1), study(-4, -2), -1, True, False),
        (study(1, 2), study(3, 4), 1, False, False),  # no overlap
        (study(1, 3), study(-1, 3), 1, False, False),  # undecided
        (study(1, 3), study(-3, -1), 1, False, True),
        (study(1, 3), study(0.1, 0.4, 0.5), 1, False, True),  # within its margin
        (study(0.1, 3, 0.5), study(1, 3, 0.5), 1, False, False),  # the first does not count
        (study(1, 3, 0.5), study(1, 3, 0.5), 1, True, False),
    ],
)
def test_a_finding_repeats_past_both_margins_with_overlap(first, second, sign, holds, against):
    found = replicates(first, second, sign)
    assert (found.holds, found.speaks_against) == (holds, against)


def test_without_an_interval_nothing_repeats():
    nan = float("nan")
    assert not replicates(study(1, 3), study(nan, nan), 1).holds
