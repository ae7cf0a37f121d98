"""Spearman's rho over the levels of a pair, where pairs are the unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.statistics.trend import mean_rho_p, ordered_trend, rho_of_each
from kvpatch.verdicts.decide import verdicts

Make = Callable[..., Any]
PAIRS, LEVELS = 20, 5
NAMES = ("A", "N1", "N2", "X", "C")


def levels(pairs: int = PAIRS) -> np.ndarray:
    return np.broadcast_to(np.arange(LEVELS, dtype=float), (pairs, LEVELS))


@pytest.mark.parametrize("digits", [6, 0])  # with hardly a tie, and with many
def test_each_pair_s_rho_is_scipy_s(digits: int):
    rng = np.random.default_rng(3)
    x, y = rng.normal(0, 2, (2, PAIRS, LEVELS)).round(digits)
    own = [stats.spearmanr(a, b).statistic if np.ptp(a) and np.ptp(b) else 0.0 for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(rho_of_each(x, y), own, atol=1e-12)


def test_a_pair_that_does_not_vary_shows_no_order():
    x = np.array([[0.0, 1, 2], [0, 1, 2], [5, 5, 5]])
    y = np.array([[0.0, 1, 2], [4, 4, 4], [0, 1, 2]])
    assert rho_of_each(x, y).tolist() == [pytest.approx(1), 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_p_of_a_level_is_page_s(seed: int):
    table = np.random.default_rng(seed).normal(0, 1, (PAIRS, LEVELS)) + 0.15 * np.arange(LEVELS)
    # Each is a share of 19,999 drawn orders, so that a p of .3 is known to .003.
    assert mean_rho_p(levels(), table, 1) == pytest.approx(ordered_trend(table, LEVELS - 1), abs=0.015)


def test_either_side_may_be_claimed_and_p_is_never_0():
    table = np.random.default_rng(1).normal(0, 0.1, (PAIRS, LEVELS)) - np.arange(LEVELS)
    assert mean_rho_p(levels(), table, -1) == 1 / 20_000
    assert mean_rho_p(levels(), table, 1) == 1.0
    assert np.isnan(mean_rho_p(levels(1), table[:1], 1))


def test_levels_of_a_pair_are_no_independent_observations():
    """Pairs differ in both numbers together, and within a pair nothing goes together: a pooled rho finds it all the
    same, in each of 40 data sets, and ours in about a twentieth."""
    rng, pooled, ours = np.random.default_rng(5), 0, 0
    for _ in range(40):
        of_pair = rng.normal(0, 2, (PAIRS, 1))
        x, y = of_pair + rng.normal(0, 1, (2, PAIRS, LEVELS))
        pooled += stats.spearmanr(x.ravel(), y.ravel()).pvalue < 0.05
        ours += mean_rho_p(x, y, 1) < 0.05
    assert pooled == 40
    assert ours <= 5


def asked(**more: Any) -> dict[str, Any]:
    ordered = {"id": "rho", "contrast": " < ".join(NAMES), "test": "rank_correlates", "direction": "negative"}
    return ordered | {"gate": 1, "family": "f"} | more


def test_a_verdict_gives_the_mean_rho_with_its_sign_and_its_interval(make_protocol: Make, make_trials: Make):
    rng = np.random.default_rng(2)
    table = rng.normal(0, 2, (PAIRS, LEVELS)) - np.arange(LEVELS)
    trials = make_trials({name: table[:, i].tolist() for i, name in enumerate(NAMES)})
    (found,) = verdicts(make_protocol(asked()), trials)
    own = [stats.spearmanr(np.arange(LEVELS), row).statistic for row in table]
    assert found.verdict == "supported" and found.n == PAIRS
    assert found.estimate == found.effect_size == pytest.approx(np.mean(own))
    assert found.ci_low < found.estimate < found.ci_high < 0
    told = found.because.split(" is ")[0]
    assert told == "Spearman's rho of the level with score over A < N1 < N2 < X < C"
    (other,) = verdicts(make_protocol(asked(direction="positive")), trials)
    assert (other.estimate, other.verdict) == (found.estimate, "not supported")


def test_another_readout_is_ranked_over_the_same_levels(make_protocol: Make, make_trials: Make):
    rng = np.random.default_rng(4)
    table = rng.normal(0, 1, (PAIRS, LEVELS))
    beside = make_trials({name: table[:, i].tolist() for i, name in enumerate(NAMES)})["score"]
    scores = rng.normal(0, 1, (PAIRS, LEVELS)) - table
    trials = make_trials({name: scores[:, i].tolist() for i, name in enumerate(NAMES)}).assign(rv_prompt=beside)
    (found,) = verdicts(make_protocol(asked(ranked_with="rv_prompt")), trials)
    own = [stats.spearmanr(a, b).statistic for a, b in zip(table, scores, strict=True)]
    assert found.estimate == pytest.approx(np.mean(own))
    assert "Spearman's rho of rv_prompt with score" in found.because and found.verdict == "supported"


def test_the_order_of_the_rows_changes_nothing(make_protocol: Make, make_trials: Make):
    table = np.random.default_rng(6).normal(0, 1, (PAIRS, LEVELS))
    trials = make_trials({name: table[:, i].tolist() for i, name in enumerate(NAMES)})
    one, other = (verdicts(make_protocol(asked()), t)[0] for t in (trials, trials.sample(frac=1, random_state=1)))
    assert one == other


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"contrast": "A > N1 > N2"}, "levels are ranked from the first to the last"),
        ({"contrast": "A < N1 > N2"}, "a trend goes one way"),
        ({"direction": None}, "'direction' goes with tests 'correlates' and 'rank_correlates'"),
        ({"test": "trend", "direction": None, "ranked_with": "rv_prompt"}, "'ranked_with' goes with test 'rank_corr"),
    ],
)
def test_what_does_not_fit_is_told(given: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        Hypothesis.model_validate(asked(**given) | {"claim": "c", "phase": "1", "readout": "score"})
