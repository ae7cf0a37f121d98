"""BCa against a slow second implementation and Student's t; Fieller against the test it inverts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from kvpatch.statistics.intervals import bca_interval, fieller_interval

SKEWED = np.random.default_rng(3).exponential(2.0, 25)


def slow_bca(values: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    """Efron & Tibshirani 1993, equations 14.9 to 14.15, in loops."""
    rng, n = np.random.default_rng(seed), len(values)
    boot = np.array([np.mean(values[rng.integers(0, n, n)]) for _ in range(resamples)])
    z0 = stats.norm.ppf(np.mean(boot < values.mean()))
    leave_one_out = np.array([np.delete(values, i).mean() for i in range(n)])
    away = leave_one_out.mean() - leave_one_out
    acceleration = np.sum(away**3) / (6 * np.sum(away**2) ** 1.5)
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = z0 + stats.norm.ppf(tail)
        ends.append(float(np.quantile(boot, stats.norm.cdf(z0 + z / (1 - acceleration * z)))))
    return ends[0], ends[1]


@pytest.mark.parametrize("level", [0.90, 0.95])
def test_bca_agrees_with_a_slow_implementation_on_skewed_values(level: float):
    found, slow = bca_interval(SKEWED, level), slow_bca(SKEWED, level, 20_000, 1)
    assert (found.low, found.high) == pytest.approx(slow, abs=0.03 * SKEWED.std())


def test_bca_of_many_normal_values_is_student_t():
    values = np.random.default_rng(5).normal(1.0, 2.0, 400)
    t = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = bca_interval(values)
    assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=0.02)


def test_bca_leans_to_the_long_tail_where_t_does_not():
    found = bca_interval(SKEWED)
    assert found.high - SKEWED.mean() > 1.1 * (SKEWED.mean() - found.low)


def test_bca_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(300):
        found = bca_interval(rng.normal(0.3, 1.0, 40), resamples=999)
        hits += found.low <= 0.3 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_all_equal_differences_give_a_width_of_zero():
    found = bca_interval(np.full(10, 0.7))
    assert found.low == found.high == pytest.approx(0.7, rel=1e-11)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_give_no_interval(n: int):
    found = bca_interval(np.arange(n, dtype=float))
    assert math.isnan(found.low) and math.isnan(found.high)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=3, max_size=30))
def test_bca_lies_within_the_values_and_is_the_same_again_and_in_any_order(values: list[float]):
    x = np.array(values)
    found = bca_interval(x, resamples=299)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert bca_interval(x[::-1], resamples=299) == found


def paired(n: int = 40, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(8)
    gap = rng.normal(3.0, 1.0, n)
    return 0.6 * gap + rng.normal(0, noise, n), gap


def test_fieller_ends_are_where_the_paired_t_test_of_the_ratio_has_its_p_at_five_percent():
    moved, gap = paired()
    found = fieller_interval(moved, gap)
    assert found.value is not None and found.low is not None and found.high is not None

    def p_minus_alpha(r: float) -> float:
        left = moved - r * gap
        t = left.mean() / (left.std(ddof=1) / math.sqrt(len(left)))
        return float(2 * stats.t.sf(abs(t), len(left) - 1)) - 0.05

    assert found.low == pytest.approx(optimize.brentq(p_minus_alpha, found.value - 1, found.value), rel=1e-6)
    assert found.high == pytest.approx(optimize.brentq(p_minus_alpha, found.value, found.value + 1), rel=1e-6)
    assert found.value == pytest.approx(moved.mean() / gap.mean())


def test_fieller_of_a_denominator_that_does_not_vary_is_student_t_scaled():
    moved = paired()[0]
    found = fieller_interval(moved, np.full(len(moved), 2.0))
    t = stats.ttest_1samp(moved, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((t.low / 2, t.high / 2))


def test_fieller_refuses_a_denominator_near_zero_and_says_how_near():
    gap = np.array([1.0, -1.0, 2.0, -2.0, 0.3, 0.4])
    away = abs(gap.mean()) / (gap.std(ddof=1) / math.sqrt(6))
    found = fieller_interval(gap * 0.5, gap)
    assert found.value is None and found.low is None
    assert found.reason == f"the denominator is {away:.3g} standard errors from 0, 5 are needed"


def test_fieller_limit_is_five_standard_errors():
    z = stats.norm.ppf((np.arange(25) + 0.5) / 25)
    z = z / z.std(ddof=1)  # mean 0, sd 1: a mean of m is 5 m standard errors
    assert fieller_interval(z, z + 0.99).value is None
    assert fieller_interval(z, z + 1.01).value is not None


def test_fieller_needs_the_same_units():
    with pytest.raises(ValueError, match="same"):
        fieller_interval(np.ones(4), np.ones(5))


def test_fieller_covers_the_ratio_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = tried = 0
    for _ in range(500):
        gap = rng.normal(3.0, 1.5, 30)
        found = fieller_interval(0.4 * gap + rng.normal(0, 1, 30), gap)
        if found.low is not None and found.high is not None:
            tried, hits = tried + 1, hits + (found.low <= 0.4 <= found.high)
    assert tried > 450 and 0.92 <= hits / tried <= 0.98
