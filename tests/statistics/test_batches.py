"""Tests on many data sets at once find what the tests on one find, within what resampling moves."""

from __future__ import annotations

import numpy as np
import pytest

from kvpatch.statistics import batches
from kvpatch.statistics import paired_tests as tests
from kvpatch.statistics.correlation import partial_correlation
from kvpatch.statistics.intervals import bca_interval
from kvpatch.statistics.resampling import dz_above, mean_above
from kvpatch.statistics.trend import ordered_trend


@pytest.fixture(scope="module", params=[8, 30])
def differences(request: pytest.FixtureRequest) -> np.ndarray:
    rng = np.random.default_rng(5)
    values = rng.normal(0.35, 1, (8, request.param))
    values[::3] = np.where(rng.random(values[::3].shape) < 0.6, 0, values[::3])
    return values


def test_flips(differences: np.ndarray):
    for null in (0.0, 0.3):
        greater, less = batches.sign_flips(differences, null)
        for p, q, values in zip(greater, less, differences, strict=True):
            assert p == pytest.approx(tests.sign_flip(values, "greater", null=null), abs=0.015)
            assert q == pytest.approx(tests.sign_flip(values, "less", null=null), abs=0.015)


def test_bounds_and_equivalence(differences: np.ndarray):
    margin = np.full(len(differences), 0.5)
    found = batches.means_above(differences, margin), batches.equivalences(differences, margin)
    for p, q, values in zip(*found, differences, strict=True):
        assert p == pytest.approx(mean_above(values, 0.5), abs=0.04)
        assert q == pytest.approx(tests.equivalence(values, 0.5).p, abs=0.04)


def test_the_part_of_a_margin_in_standard_deviations_passes_alike():
    values = np.random.default_rng(2).normal(0.9, 1, (12, 40))
    passed = batches.past_margins(values, 1, None, 0.5) < 0.025
    ps = np.array([2 * dz_above(of, 0.5) for of in values])
    assert (passed == (ps < 0.025))[np.abs(ps - 0.025) > 0.01].all() and 0 < passed.sum() < 12


def test_intervals(differences: np.ndarray):
    low, high = batches.intervals(differences, 0.95)
    for a, b, values in zip(low, high, differences, strict=True):
        own = bca_interval(values)
        assert (a, b) == pytest.approx((own.low, own.high), abs=0.12)
    constant = np.ones((1, 5))
    assert [end.tolist() for end in batches.intervals(constant, 0.95)] == [[1.0], [1.0]]


@pytest.mark.parametrize("peak", [4, 3])
def test_orderings(peak: int):
    table = np.random.default_rng(3).normal(0, 1, (6, 30, 5)) + 0.15 * np.arange(5)
    for values in (table, np.round(table)):
        for p, of in zip(batches.ordered_trends(values, peak), values, strict=True):
            assert p == pytest.approx(ordered_trend(of, peak), abs=0.012)


@pytest.mark.parametrize("held", [0, 1])
def test_correlations(held: int):
    table = np.random.default_rng(4).normal(0, 1, (6, 20, 2 + held))
    for r, p, low, high, of in zip(*batches.partial_correlations(table), table, strict=True):
        own = partial_correlation(of[:, 0], of[:, 1], of[:, 2:])
        assert (r, p, low, high) == pytest.approx((own.r, own.p_greater, own.interval.low, own.interval.high))
