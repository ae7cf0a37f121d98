"""Does a finding repeat, and what several studies say together."""

from __future__ import annotations

import pytest

from kvpatch.statistics.intervals import Interval
from kvpatch.statistics.replication import Study, random_effects, replicates


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


def test_random_effects_agree_with_metafor():
    # R, metafor, dat.bcg: rma(yi, vi, method = "DL") of log risk ratios of 13 trials: estimate -0.7141,
    # tau^2 0.3088, I^2 92.12%.
    yi = [-0.8893, -1.5854, -1.3481, -1.4416, -0.2175, -0.7861, -1.6209, 0.0120, -0.4694, -1.3713, -0.3394, 0.4459,
          -0.0173]  # fmt: skip
    vi = [0.3256, 0.1946, 0.4154, 0.0200, 0.0512, 0.0069, 0.2230, 0.0040, 0.0564, 0.0730, 0.0124, 0.5325, 0.0714]
    found = random_effects(yi, [v**0.5 for v in vi])
    assert found is not None
    assert found.mean == pytest.approx(-0.7141, abs=2e-3)
    assert found.tau2 == pytest.approx(0.3088, abs=2e-3)
    assert found.i2 == pytest.approx(0.9212, abs=2e-3)


def test_three_studies_are_too_few_to_say_how_studies_differ():
    assert random_effects([1, 2, 3], [1, 1, 1]) is None
