"""Analyses beside the verdict: hurdle, Lee bounds, two-way clustering, each against numbers made another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from conftest import build_protocol, build_trials
from kvpatch.statistics.clustering import two_way_clustered
from kvpatch.statistics.hurdle import hurdle
from kvpatch.statistics.lee import lee_bounds
from kvpatch.verdicts.decide import verdicts

RNG = np.random.default_rng(4)


# Hurdle


def test_hurdle_s_first_step_is_mcnemars_exact_test():
    first = np.array([1.0] * 12 + [0.0] * 3 + [2.0] * 4 + [0.0] * 11)
    second = np.array([0.0] * 12 + [1.5] * 3 + [1.0] * 4 + [0.0] * 11)
    found = hurdle(first, second, "two-sided")
    assert found.p_any == pytest.approx(mcnemar([[4, 12], [3, 11]], exact=True).pvalue)
    assert (found.any_first, found.any_second) == pytest.approx((16 / 30, 7 / 30))


def test_hurdle_s_second_step_is_over_pairs_with_hits_on_both_sides():
    first, second = np.array([0, 3.0, 5.0, 4.0, 0]), np.array([0, 1.0, 2.0, 0, 9.0])
    found = hurdle(first, second, "greater")
    assert (found.n_both, found.rate, found.p_rate) == (2, 2.5, 0.25)
    assert found.rate_low is None


def test_hurdle_tells_more_hits_from_higher_rates():
    rate = RNG.gamma(4, 1, (2, 200))
    more = hurdle(rate[0] * (RNG.random(200) < 0.6), rate[1] * (RNG.random(200) < 0.2), "greater")
    higher = hurdle((rate[0] + 3) * (RNG.random(200) < 0.5), rate[1] * (RNG.random(200) < 0.5), "greater")
    assert more.p_any < 1e-6 < 1e-3 < more.p_rate
    assert higher.p_rate < 1e-4 < 1e-3 < higher.p_any


def test_hurdle_without_a_hit_has_no_numbers_but_the_shares():
    found = hurdle(np.zeros(5), np.zeros(5), "greater")
    assert (found.any_first, found.p_any, found.n_both, found.rate) == (0, None, 0, None)
    assert hurdle(np.zeros(0), np.zeros(0), "greater") is None


# Lee bounds


def test_lee_bounds_by_hand():
    """Eight of ten against six of ten: a quarter of the first is trimmed, two of its eight values."""
    first, second = np.arange(1.0, 9.0), np.full(6, 2.0)
    assert lee_bounds(first, 0.8, second, 0.6) == pytest.approx((3.5 - 2, 5.5 - 2))
    assert lee_bounds(second, 0.6, first, 0.8) == pytest.approx((2 - 5.5, 2 - 3.5))


def test_lee_bounds_of_equal_shares_are_the_difference():
    first, second = RNG.random(20), RNG.random(20)
    found = lee_bounds(first, 0.7, second, 0.7)
    assert found == pytest.approx((first.mean() - second.mean(),) * 2)


def test_lee_bounds_hold_the_effect_among_those_coherent_either_way():
    """Low values become incoherent under the second condition, so that the plain difference is wrong."""
    value, effect = RNG.standard_normal(100_000), 0.3
    lost = value < -0.5
    first, second = value[:50_000], (value - effect)[50_000:][~lost[50_000:]]
    share = 1 - lost[50_000:].mean()
    low, high = lee_bounds(first, 1.0, second, share)
    plain = first.mean() - second.mean()
    assert low < effect < high + 0.02
    assert abs(plain - effect) > 0.2
    assert high == pytest.approx(effect, abs=0.03)


def test_lee_bounds_need_a_coherent_output_on_either_side():
    assert all(map(math.isnan, lee_bounds(np.zeros(0), 0.0, np.ones(3), 1.0)))


# Clustering


def test_two_way_variance_is_that_of_sources_and_targets_less_that_of_pairs():
    """Cameron, Gelbach & Miller 2011, equation 2.12, with their correction G / (G - 1) for each term."""
    sources = np.repeat([f"s{i}" for i in range(6)], 8)
    targets = np.tile([f"t{i}" for i in range(8)], 6)
    values = RNG.standard_normal(48) + np.repeat(RNG.standard_normal(6), 8) + np.tile(RNG.standard_normal(8), 6)
    found = two_way_clustered(values, sources, targets)

    def meat(labels):
        sums = [values[labels == name].sum() for name in set(labels)]
        counts = [(labels == name).sum() for name in set(labels)]
        g = len(sums)
        total = sum((s - c * values.mean()) ** 2 for s, c in zip(sums, counts, strict=True))
        return total * g / (g - 1) / 48**2

    both = np.array([f"{s}|{t}" for s, t in zip(sources, targets, strict=True)])
    error = math.sqrt(meat(sources) + meat(targets) - meat(both))
    half = (found.high - found.low) / 2
    assert half == pytest.approx(stats.t.ppf(0.975, 5) * error, rel=1e-6)
    assert (found.sources, found.targets) == (6, 8)


def test_clusters_too_few_give_nothing():
    assert two_way_clustered(RNG.standard_normal(10), ["a", "b"] * 5, [str(i) for i in range(10)]) is None
    assert two_way_clustered(np.zeros(9), list("abcabcabc"), list("aaabbbccc")) is None


# In a verdict


def test_each_analysis_is_there_where_its_data_ask_for_it():
    h = {"id": "h", "contrast": "C - N1", "test": "greater"}
    zeros = {"C": np.r_[np.zeros(14), RNG.random(6)], "N1": np.zeros(20)}
    found = verdicts(build_protocol(h), build_trials({"C": RNG.random(20), "N1": RNG.random(20)}))[0].sensitivity
    assert found.hurdle is None
    assert found.clustered is None
    assert found.lee is None
    found = verdicts(build_protocol(h), build_trials(zeros))[0].sensitivity
    assert found.zeros == 34 / 40
    assert found.hurdle.any_first == 0.3


def test_repeated_sources_bring_clustered_errors():
    h = {"id": "h", "contrast": "C - N1", "test": "greater"}
    trials = build_trials({"C": RNG.random(20), "N1": RNG.random(20)})
    trials["source_id"] = trials["source_id"].map(lambda name: f"s{int(name.rsplit('-s')[-1]) % 5}")
    found = verdicts(build_protocol(h), trials)[0]
    assert found.n == 5
    assert found.sensitivity.clustered.sources == 5


def test_incoherent_outputs_bring_lee_bounds():
    h = {"id": "h", "contrast": "C - N1", "test": "greater"}
    trials = build_trials({"C": RNG.random(20), "N1": RNG.random(20)})
    trials.loc[trials.index[trials["condition"] == "C"][:1], "coherent"] = False
    found = verdicts(build_protocol(h), trials)[0]
    low, high = found.sensitivity.lee
    assert low < high
