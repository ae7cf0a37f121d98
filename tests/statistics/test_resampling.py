"""The studentised bootstrap: against itself in loops, and against the t tests that it becomes for normal data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kvpatch.statistics import paired_tests as tests
from kvpatch.statistics.resampling import dz_above, mean_above

RNG = np.random.default_rng(11)


def slow_mean_above(values: np.ndarray, null: float, draws: int) -> float:
    """The algorithm in loops, with random numbers of its own."""
    rng = np.random.default_rng(99)
    n, mean, sd = len(values), values.mean(), values.std(ddof=1)
    observed = (mean - null) / (sd / math.sqrt(n))
    count = 0
    for _ in range(draws):
        drawn = rng.choice(values, n)
        spread = max(drawn.std(ddof=1), sd / math.sqrt(n))
        count += (drawn.mean() - mean) / (spread / math.sqrt(n)) >= observed
    return (count + 1) / (draws + 1)


@pytest.mark.parametrize("null", [0.0, 0.4])
def test_p_is_that_of_the_algorithm_in_loops(null):
    values = RNG.exponential(size=25) - 0.4
    assert mean_above(values, null) == pytest.approx(slow_mean_above(values, null, 4_000), abs=0.025)


def test_resamples_of_zeros_alone_are_not_infinitely_precise():
    values = np.zeros(13)
    values[3] = -6.25  # a third of the resamples leave it out
    assert mean_above(values, -8) < 0.001
    assert mean_above(values, -8) == pytest.approx(slow_mean_above(values, -8, 4_000), abs=0.002)
    assert mean_above(values, -0.5) > 0.3  # a margin that the one value could pass by itself


def test_p_of_many_normal_values_is_that_of_the_t_test():
    values = RNG.normal(0.1, 1, 400)
    assert mean_above(values) == pytest.approx(stats.ttest_1samp(values, 0, alternative="greater").pvalue, abs=0.01)


def test_a_long_tail_on_the_other_side_makes_p_larger_than_flips_do():
    values = 1.3 - RNG.exponential(size=60)
    assert mean_above(values) > 1.5 * tests.sign_flip(values, "greater")


def test_p_of_dz_is_that_of_the_noncentral_t_or_larger():
    values = RNG.normal(0.8, 1, 200)
    t = values.mean() / values.std(ddof=1) * math.sqrt(200)
    exact = stats.nct.sf(t, 199, 0.6 * math.sqrt(200))
    assert exact - 1e-9 <= dz_above(values, 0.6) == pytest.approx(exact, abs=0.02)


def test_p_of_dz_0_is_that_of_the_mean():
    values = RNG.normal(0.1, 1, 100)
    assert dz_above(values, 1e-9) == pytest.approx(mean_above(values), abs=0.02)


@pytest.mark.parametrize("p", [mean_above, lambda x: dz_above(x, 0.3)])
def test_p_depends_on_neither_scale_nor_order(p):
    values = RNG.normal(0.3, 1, 30)
    assert p(values) == p(values[::-1]) == p(values * 1024)


def test_too_few_or_equal_values():
    assert math.isnan(mean_above(np.array([1.0])))
    assert math.isnan(dz_above(np.ones(3), 0.5))
    assert dz_above(np.ones(20), 0.5) == 1.0
    assert mean_above(np.ones(20)) < 0.001
    assert mean_above(np.zeros(20)) == 1.0


@pytest.mark.parametrize("sign", [1, -1])
def test_every_part_of_a_margin_must_be_passed(sign):
    values = sign * RNG.normal(1, 1, 60)
    assert tests.past_margin(values, sign, 0.2, 0.3) < 0.025
    assert tests.past_margin(values, sign, 1.5, 0.3) > 0.9
    assert tests.past_margin(values, sign, 0.2, 1.5) > 0.9
    assert tests.past_margin(values, -sign, 0.2, 0.3) > 0.9
    assert math.isnan(tests.past_margin(values[:1], sign, 0.2, None))
