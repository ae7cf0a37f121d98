"""A margin that is a share of a gap counts by the gap's lower bound, and one of a gap that may be 0 decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kvpatch.verdicts.decide import verdicts
from kvpatch.verdicts.margins import natural_gap
from kvpatch.verdicts.pairs import prepare

Make = Callable[..., Any]
N = 30


@pytest.mark.parametrize("sign", [1, -1])
def test_the_end_of_the_gaps_interval_nearer_to_zero_counts(make_trials: Make, spread_out: Make, sign: int):
    gap = sign * spread_out(1.0, 0.9, N)
    found = natural_gap(prepare(make_trials({"A": [0.0]}, {"A": [0.0] * N, "B": gap})), "score", "none")
    ends = stats.ttest_1samp(gap, 0).confidence_interval(0.95)
    assert found.value == pytest.approx(min(abs(ends.low), abs(ends.high)))


def test_a_gap_whose_interval_holds_zero_decides_nothing(make_protocol: Make, make_trials: Make, spread_out: Make):
    x, margin = spread_out(0.0, 0.001, N), {"margin": {"natural_gap": 0.2}}
    much = {"id": "much", "contrast": "X - A", "test": "much_greater", "margin": {"natural_gap": 0.25}}
    equal = {"id": "equal", "contrast": "X - A", "test": "equivalent", **margin}
    calibration = {"A": [0.0] * N, "B": spread_out(0.3, 1.0, N)}
    for v in verdicts(make_protocol(much, equal), make_trials({"A": [0.0] * N, "X": x}, calibration)):
        assert (v.verdict, v.margin) == ("inconclusive", None)
        assert "the natural gap of score is 0.3 over 30 calibration pairs" in v.because
        assert "-0.0734 to 0.673 that includes 0" in v.because


def test_the_region_of_too_small_effects_rests_on_the_lower_bound_too(make_protocol: Make, make_trials: Make):
    rng = np.random.default_rng(2)
    h = {"id": "h", "contrast": "X - A", "test": "greater"}
    calibration = {"A": [0.0] * N, "B": rng.normal(0, 1, N)}
    v = verdicts(make_protocol(h), make_trials({"A": [0.0] * N, "X": rng.normal(0, 1e-4, N)}, calibration))[0]
    assert "ruled out" not in v.because
