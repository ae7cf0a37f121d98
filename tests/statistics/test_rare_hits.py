"""Few hits, or none, certify nothing; plenty of hits still do."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kvpatch.statistics.floors import clopper_pearson, mean_hit_bounds, rare_contrast_bounds, zeros_dominate
from kvpatch.verdicts.decide import verdicts

Make = Callable[..., Any]
PATH = Path(__file__).parents[2] / "benchmarks" / "rare_hits.py"
SPEC = importlib.util.spec_from_file_location("rare_hits", PATH)
assert SPEC is not None and SPEC.loader is not None
rare = importlib.util.module_from_spec(SPEC)
sys.modules["rare_hits"] = rare
SPEC.loader.exec_module(rare)


@pytest.mark.parametrize(("hits", "n"), [(0, 12), (1, 12), (3, 100), (50, 100), (12, 12)])
def test_the_share_has_the_exact_interval(hits: int, n: int):
    wanted = stats.binomtest(hits, n).proportion_ci(0.90, method="exact")
    assert clopper_pearson(hits, n, 0.90) == pytest.approx((wanted.low, wanted.high))


@pytest.mark.parametrize("count", [1, 2, 5, 19, 20, 60])
def test_the_mean_hit_lies_below_its_upper_bound_in_95_percent_of_draws(count: int):
    rng = np.random.default_rng(count)
    highs = [mean_hit_bounds(rng.exponential(2.0, count))[1] for _ in range(600)]
    assert np.mean(np.array(highs) < 2.0) < 0.09


def test_a_side_without_hits_borrows_the_hits_of_the_other():
    found = rare_contrast_bounds([(1, np.zeros(50)), (-1, np.array([2.0, *[0.0] * 49]))], np.empty(0))
    assert found.low < -0.04 and found.high > 0.04


def test_the_readouts_that_count_as_rare():
    assert zeros_dominate(np.array([0, 0, 1.0]))
    assert not zeros_dominate(np.array([0, 1.0]))
    assert not zeros_dominate(np.array([0, 0, -1.0]))
    assert not zeros_dominate(np.empty(0))


@pytest.mark.parametrize("rates", ["equal", "exponential"])
@pytest.mark.parametrize("n", rare.N)
def test_rare_hits_and_an_effect_of_twice_the_margin_are_seldom_called_equivalent(rates: str, n: int):
    for case in rare.rare_cases(rates):
        assert rare.rate(case, n, 100) <= 0.05, case


def test_the_quick_look_says_what_the_verdict_says():
    rng = np.random.default_rng(3)
    for case in (rare.Case(0.1, 0.0, "equal", 0.1), rare.Case(0.3, 0.3, "exponential", 1.5)):
        for n in (20, 100):
            values = rare.draw(case, n, rng)
            found = verdicts(rare.protocol(case.margin), rare.trials_of(values))[0]
            assert rare.is_equivalent(rare.protocol(case.margin), values, case.margin) == (
                found.verdict == "equivalent"
            )


def test_plenty_of_hits_keep_their_power():
    assert rare.rate(rare.Case(0.95, 0.95, "exponential", 1.5), 100, 10) == 1.0


@pytest.mark.parametrize("value", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("test", ["equivalent", "greater", "much_greater"])
def test_a_constant_scorer_reads_nothing_scored(make_protocol: Make, make_trials: Make, value: float, test: str):
    margin = {} if test == "greater" else {"margin": {"value": 0.2}}
    protocol = make_protocol({"id": "h", "contrast": "X - A", "test": test, **margin})
    v = verdicts(protocol, make_trials({"A": [value] * 50, "X": [value] * 50}))[0]
    assert v.verdict == "inconclusive"
    assert v.because.startswith("nothing scored: score is ") and v.because.endswith(".")


def test_equal_caches_whose_readout_varies_are_equivalent_still(make_protocol: Make, make_trials: Make):
    values = [i / 10 for i in range(50)]
    protocol = make_protocol({"id": "h", "contrast": "X - A", "test": "equivalent", "margin": {"value": 0.2}})
    assert verdicts(protocol, make_trials({"A": values, "X": values}))[0].verdict == "equivalent"


def test_few_hits_are_named_where_they_keep_a_verdict_open(make_protocol: Make, make_trials: Make):
    protocol = make_protocol({"id": "h", "contrast": "X - A", "test": "equivalent", "margin": {"value": 0.5}})
    v = verdicts(protocol, make_trials({"A": [0.0] * 50, "X": [2.0] + [0.0] * 49}))[0]
    assert v.verdict == "inconclusive"
    assert "only 1 of 50 values of X and 0 of 50 values of A have a hit" in v.because


def test_few_hits_do_not_rule_an_effect_out_either(make_protocol: Make, make_trials: Make):
    protocol = make_protocol({"id": "h", "contrast": "X - A", "test": "much_greater", "margin": {"value": 0.5}})
    v = verdicts(protocol, make_trials({"A": [0.0] * 50, "X": [2.0] + [0.0] * 49}))[0]
    assert v.verdict == "inconclusive"
