"""Partial correlation against pingouin, R, and a known structure."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pingouin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpatch.statistics.correlation import partial_correlation

NONE = np.empty((0, 0))


def data(seed: int, n: int = 30, k: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    held = rng.normal(size=(n, k))
    x = held.sum(axis=1) + rng.normal(size=n)
    return x, 0.5 * x - held.sum(axis=1) + rng.normal(size=n), held


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [0, 1, 2])
def test_agrees_with_pingouin(seed: int, k: int):
    x, y, held = data(seed)
    frame = pd.DataFrame({"x": x, "y": y, **{f"c{i}": held[:, i] for i in range(k)}})
    names = [f"c{i}" for i in range(k)]
    expected = pingouin.partial_corr(frame, "x", "y", covar=names or None) if k else pingouin.corr(x, y)
    found = partial_correlation(x, y, held[:, :k])
    row = expected.iloc[0]
    assert found.r == pytest.approx(row["r"])
    assert 2 * min(found.p_greater, found.p_less) == pytest.approx(row.filter(like="p").iloc[0])
    ends = row["CI95"] if "CI95" in row else row["CI95%"]
    assert [found.interval.low, found.interval.high] == pytest.approx(list(ends), abs=0.006)


def test_agrees_with_r():
    # R, ppcor manual, y.data: pcor.test(y.data$hl, y.data$disp, y.data[, c("deg", "BC")])
    # estimate -0.6720863, p.value 0.06789202, n 10.
    hl = [7, 15, 19, 15, 21, 22, 57, 15, 20, 18]
    disp = [0.000, 0.964, 0.000, 0.000, 0.921, 0.000, 0.000, 1.006, 0.000, 1.011]
    deg = [9, 2, 3, 4, 1, 3, 1, 3, 6, 1]
    bc = [1.78e-2, 1.05e-6, 1.37e-5, 7.18e-3, 0.0, 0.0, 0.0, 4.48e-3, 2.1e-6, 0.0]
    found = partial_correlation(np.array(hl, float), np.array(disp), np.array([deg, bc], float).T)
    assert found.r == pytest.approx(-0.6720863, abs=1e-6)
    assert 2 * found.p_less == pytest.approx(0.06789202, abs=1e-6)


def test_what_both_follow_is_taken_out():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=400)
    x, y = shared + rng.normal(0, 0.5, 400), shared + rng.normal(0, 0.5, 400)
    assert partial_correlation(x, y, np.empty((400, 0))).r > 0.7
    assert abs(partial_correlation(x, y, shared[:, None]).r) < 0.1


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(12)))
def test_the_order_of_the_pairs_changes_no_bit(order: list[int]):
    x, y, held = data(1, n=12)
    assert partial_correlation(x[order], y[order], held[order]) == partial_correlation(x, y, held)


@pytest.mark.parametrize(
    ("x", "y", "held"),
    [
        (np.arange(3.0), np.arange(3.0), np.empty((3, 0))),
        (np.zeros(9), np.arange(9.0), np.empty((9, 0))),
        (np.arange(9.0), np.arange(9.0) ** 2, np.arange(9.0)[:, None]),
    ],
    ids=["too few", "constant", "wholly explained"],
)
def test_no_number_where_there_is_none(x: np.ndarray, y: np.ndarray, held: np.ndarray):
    assert math.isnan(partial_correlation(x, y, held).r)
