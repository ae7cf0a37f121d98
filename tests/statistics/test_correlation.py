"""Partial correlation against numbers of pingouin, least squares of statsmodels, R, and a known structure."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.linear_model import OLS

from kvpatch.statistics.correlation import partial_correlation

NONE = np.empty((0, 0))


def data(seed: int, n: int = 30, k: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    held = rng.normal(size=(n, k))
    x = held.sum(axis=1) + rng.normal(size=n)
    return x, 0.5 * x - held.sum(axis=1) + rng.normal(size=n), held


# pingouin 0.7.0: partial_corr(frame, "x", "y", covar=names), and corr(x, y) without covariates: r and two-sided p of
# data(seed).
OF_PINGOUIN = {
    (0, 0): (-0.0400844766909151, 0.8334281488734864),
    (0, 1): (0.43139877521426584, 0.019459815222637768),
    (0, 2): (0.6744864314114662, 8.282116065937529e-05),
    (1, 0): (-0.2866801807726728, 0.1245543555629257),
    (1, 1): (-0.018974718591024363, 0.9221738106255393),
    (1, 2): (0.6012445576274175, 0.0007147426118646258),
    (2, 0): (-0.1714528508771025, 0.36498005676455847),
    (2, 1): (-0.021254607595618112, 0.9128559523029914),
    (2, 2): (0.3554846452116394, 0.06338933886061741),
    (3, 0): (-0.32214210000880594, 0.08254745271038956),
    (3, 1): (-0.19722000548681032, 0.3051456748260213),
    (3, 2): (0.5877642985715388, 0.0010055707359329202),
    (4, 0): (0.004015528506836577, 0.9831982453075059),
    (4, 1): (0.18017186968630425, 0.34965369743254143),
    (4, 2): (0.6564368193206382, 0.0001485352548484801),
}


@pytest.mark.parametrize(("seed", "k"), OF_PINGOUIN)
def test_agrees_with_numbers_of_pingouin(seed: int, k: int):
    x, y, held = data(seed)
    found = partial_correlation(x, y, held[:, :k])
    r, p = OF_PINGOUIN[seed, k]
    assert found.r == pytest.approx(r, rel=1e-9, abs=1e-12)
    assert 2 * min(found.p_greater, found.p_less) == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize(("seed", "k"), OF_PINGOUIN)
def test_agrees_with_the_coefficient_of_least_squares(seed: int, k: int):
    """t and p of x in y ~ x + covariates are those of the partial correlation; statsmodels is other code."""
    x, y, held = data(seed)
    fit = OLS(y, np.column_stack([np.ones(len(x)), x, held[:, :k]])).fit()
    found = partial_correlation(x, y, held[:, :k])
    t = float(fit.tvalues[1])
    assert found.r == pytest.approx(t / np.sqrt(t * t + fit.df_resid), rel=1e-9)
    assert 2 * min(found.p_greater, found.p_less) == pytest.approx(float(fit.pvalues[1]), rel=1e-9)
    z, half = np.arctanh(found.r), stats.norm.ppf(0.975) / np.sqrt(len(x) - 3 - k)
    assert [found.interval.low, found.interval.high] == pytest.approx([np.tanh(z - half), np.tanh(z + half)])


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
