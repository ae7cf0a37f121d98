"""Ordered conditions: Page's test against R and a slow count, umbrellas, slopes."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvpatch.statistics import trend
from kvpatch.statistics.trend import order_scores, ordered_trend, slopes


def slow_p(table: np.ndarray, peak: int) -> float:
    """Exact p by every order of the ranks within every pair."""
    ranks = stats.rankdata(table, axis=1)
    scores = [-abs(level - peak) for level in range(table.shape[1])]
    observed = sum(float(r @ scores) for r in ranks)
    totals = [
        sum(float(np.dot(row, scores)) for row in rows)
        for rows in product(*(list(permutations(r)) for r in ranks.tolist()))
    ]
    return float(np.mean([total >= observed - 1e-9 for total in totals]))


def test_page_on_the_wine_tasting_table():
    # R: crank::page.trend.test and Page 1963; scipy's documentation works the same table (three teaching formats
    # ranked by ten pupils), L = 133.5, exact p = 0.0012693433690751756.
    table = np.array(
        [[3, 4, 3], [2, 2, 4], [3, 3, 5], [1, 3, 2], [2, 3, 2], [2, 4, 5], [1, 2, 4], [3, 4, 4], [2, 4, 5], [1, 3, 4]]
    )
    assert ordered_trend(table.astype(float), 2) == pytest.approx(0.00127, abs=6e-4)


@pytest.mark.parametrize("peak", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_p_is_the_share_of_orders_within_pairs(peak: int, seed: int):
    table = np.random.default_rng(seed).normal(size=(4, 3)).round(1)
    assert ordered_trend(table, peak) == pytest.approx(slow_p(table, peak), abs=0.012)


def test_small_tables_without_ties_are_exact():
    table = np.array([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]])
    assert ordered_trend(table, 2) == pytest.approx(slow_p(table, 2))


def test_an_umbrella_is_seen_as_one_and_not_as_a_trend():
    rng = np.random.default_rng(0)
    table = np.array([0.0, 1.0, 2.0, 1.0, 0.0]) + rng.normal(0, 0.5, size=(15, 5))
    assert ordered_trend(table, 2) < 0.001
    assert ordered_trend(table, 4) > 0.05


def test_slopes_are_least_squares_a_step():
    table = np.random.default_rng(1).normal(size=(6, 5))
    fitted = [np.polyfit(range(5), row, 1)[0] for row in table]
    assert slopes(table, 4) == pytest.approx(fitted)
    assert slopes(np.array([[0.0, 2.0, 4.0, 2.0]]), 2) == pytest.approx([2.0])


def test_scores_sum_to_nothing():
    for peak in range(5):
        assert order_scores(5, peak).sum() == pytest.approx(0)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(9)), st.integers(0, 3))
def test_the_order_of_the_pairs_changes_nothing(order: list[int], seed: int):
    table = np.random.default_rng(seed).normal(size=(9, 6))
    assert ordered_trend(table[order], 5) == ordered_trend(table, 5)


def test_one_pair_says_nothing():
    assert math.isnan(ordered_trend(np.zeros((1, 3)), 2))
    assert ordered_trend(np.zeros((5, 3)), 2) == 1


@pytest.mark.parametrize("seed", range(4))
def test_an_order_that_equals_the_observed_one_counts_as_equal(seed: int):
    """Sums of scores that are not whole numbers would part ties by rounding, and differently on each processor."""
    table = np.random.default_rng(seed).poisson(0.4, (12, 5)).astype(np.float64)
    ranks = np.array(sorted(stats.rankdata(row).tolist() for row in table)) * 2
    scores = np.array([-16, -6, 4, 14, 4])
    in_whole_numbers = ranks.astype(np.int64)
    drawn = np.take_along_axis(in_whole_numbers[None], trend._orders(12, 5).astype(np.int64), axis=2) @ scores
    observed = (in_whole_numbers @ scores).sum()
    at_least = np.count_nonzero(drawn.sum(axis=1) >= observed)
    assert ordered_trend(table, 3) == (at_least + 1) / (trend.DRAWS + 1)
