"""Each test and effect size against a published figure, a slow loop or a second library."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from kvpatch.statistics import paired_tests as tests
from kvpatch.statistics.multiplicity import adjusted
from kvpatch.statistics.resampling import DRAWS, mean_above
from kvpatch.verdicts.families import adjusted_by_family
from kvpatch.verdicts.pairs import contrast_differences, independent_units, prepare

# Darwin's maize, cross- minus self-fertilised, eighths of an inch. Fisher 1935, The Design of Experiments,
# section 21: of the 2**15 sign patterns 863 have a sum as large as that observed.
MAIZE = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], dtype=float)
# R's `sleep`: with(sleep, extra[group == 2] - extra[group == 1])
SLEEP = np.array([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])


def slow_sign_flip(values: np.ndarray, null: float) -> tuple[float, float]:
    shifted = values - null
    observed = shifted.sum()
    sums = [float((np.array(s) * shifted).sum()) for s in itertools.product([1, -1], repeat=len(shifted))]
    tie = 1e-9 * np.abs(shifted).sum()
    return (
        sum(s >= observed - tie for s in sums) / len(sums),
        sum(s <= observed + tie for s in sums) / len(sums),
    )


def test_sign_flip_gives_fishers_count_for_darwins_maize():
    assert tests.sign_flip(MAIZE, "greater") == 863 / 2**15
    assert tests.sign_flip(MAIZE, "two-sided") == 2 * 863 / 2**15


@pytest.mark.parametrize("null", [0.0, 0.35, -1.0])
def test_exact_sign_flip_agrees_with_enumeration_in_loops(null: float):
    for seed in range(5):
        values = np.random.default_rng(seed).normal(0.2, 1, 8)
        greater, less = slow_sign_flip(values, null)
        assert tests.sign_flip(values, "greater", null=null) == greater
        assert tests.sign_flip(values, "less", null=null) == less
        assert tests.sign_flip(values, null=null) == min(1.0, 2 * min(greater, less))


def test_sums_equal_but_for_rounding_are_ties():
    whole = np.array([6.0, -5, -7, -4, -2, 6, -1, -8, -3])
    assert tests.sign_flip(whole / 10, "greater") == tests.sign_flip(whole, "greater") == 453 / 2**9
    assert slow_sign_flip(whole, 0)[0] == 453 / 2**9


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_sign_flip_agrees_with_scipy_exact_and_random(alternative: tests.Alternative):
    rng = np.random.default_rng(4)
    for n, within in ((9, 0.0), (30, 0.012)):
        values = rng.normal(0.2, 1, n)
        there = stats.permutation_test(
            (values,), np.sum, permutation_type="samples", alternative=alternative, n_resamples=20_000, rng=1
        )
        assert tests.sign_flip(values, alternative) == pytest.approx(there.pvalue, abs=within + 1e-15)


def test_random_flips_agree_with_all_flips():
    for alternative in ("greater", "less", "two-sided"):
        exact = tests.sign_flip(MAIZE, alternative)
        assert tests.sign_flip(MAIZE, alternative, resamples=20_000) == pytest.approx(exact, abs=0.007)


def test_random_p_counts_the_observed_one_and_is_never_zero():
    assert tests.sign_flip(np.full(60, 1.0), "greater", resamples=20_000) == 1 / 20_001


def test_exact_p_is_never_below_two_to_the_minus_n():
    assert tests.sign_flip(np.arange(1.0, 9.0), "greater") == 2.0**-8


def test_differences_of_zero_are_no_evidence():
    assert tests.sign_flip(np.zeros(12), "greater") == tests.sign_flip(np.zeros(40), "two-sided") == 1.0


def test_fewer_than_two_values_have_no_p():
    assert math.isnan(tests.sign_flip(np.array([1.0])))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=10), st.floats(0.01, 100))
def test_sign_flip_depends_on_neither_scale_nor_order_and_mirrors(values: list[float], factor: float):
    x = np.array(values)
    p = tests.sign_flip(x, "greater")
    assert tests.sign_flip(x[::-1], "greater") == p
    assert tests.sign_flip(-x, "less") == p
    assert tests.sign_flip(x * 2.0 ** round(math.log2(factor)), "greater") == p
    assert 2.0 ** -len(x) <= p <= 1


def test_smallest_n_is_the_first_that_can_pass():
    for alpha, n in ((0.05, 5), (0.01, 7), (0.001, 10), (0.5, 2)):
        assert tests.smallest_n(alpha) == n
        assert tests.sign_flip(np.ones(max(n, 2)), "greater") < alpha
        assert 2.0 ** -(n - 1) >= alpha


def test_equivalence_is_the_larger_of_the_two_shifted_tests():
    values = np.random.default_rng(1).normal(0.1, 1, 10)
    found = tests.equivalence(values, 0.8)
    lower = max(slow_sign_flip(values, -0.8)[0], mean_above(values, -0.8))
    upper = max(slow_sign_flip(values, 0.8)[1], mean_above(-values, -0.8))
    assert (found.p_lower, found.p_upper, found.p) == (lower, upper, max(lower, upper))
    assert found.interval.level == 0.90


def test_equivalence_agrees_with_the_t_based_tests_of_statsmodels_at_large_n():
    values = np.random.default_rng(2).normal(0.1, 1, 120)
    p, lower, upper = ttost_paired(values, np.zeros(120), -0.25, 0.25)
    found = tests.equivalence(values, 0.25)
    assert found.p == pytest.approx(float(p), abs=0.006)
    assert (found.p_lower, found.p_upper) == pytest.approx((float(lower[1]), float(upper[1])), abs=0.006)


def test_all_zero_differences_are_equivalent_to_zero():
    assert tests.equivalence(np.zeros(20), 0.1).p == pytest.approx(1 / (DRAWS + 1))


def test_equivalence_needs_a_margin():
    with pytest.raises(ValueError, match="above 0"):
        tests.equivalence(SLEEP, 0.0)


def test_dz_of_rs_sleep():
    # R: d <- with(sleep, extra[group == 2] - extra[group == 1]); t.test(d)$statistic is 4.0621
    assert tests.cohens_dz(SLEEP) * math.sqrt(10) == pytest.approx(4.0621, abs=5e-5)
    assert tests.cohens_dz(SLEEP) == pytest.approx(1.58 / np.std(SLEEP, ddof=1))
    assert math.isnan(tests.cohens_dz(np.full(5, 2.0)))


def test_jzs_bayes_factor_of_rs_sleep():
    # R, BayesFactor: ttestBF(x = sleep$extra[1:10], y = sleep$extra[11:20], paired = TRUE) gives 17.25888
    assert tests.jzs_bayes_factor(SLEEP) == pytest.approx(17.25888, rel=1e-5)


def test_jzs_bayes_factor_is_left_out_where_its_integral_fails():
    assert tests.jzs_bayes_factor(np.array([4.0, 5.0, 6.0])) > 1
    assert math.isnan(tests.jzs_bayes_factor(100 + np.array([4.0, 5.0, 6.0])))
    assert math.isnan(tests.jzs_bayes_factor(np.full(6, 1.0)))


def test_jzs_bayes_factor_of_an_effect_seen_in_thousands_of_pairs_is_past_any_float():
    values = np.random.default_rng(0).normal(0.8, 1.0, 3200)
    assert tests.jzs_bayes_factor(values) == math.inf
    assert 1e10 < tests.jzs_bayes_factor(values[:320]) < math.inf


# pingouin 0.7.0: bayesfactor_ttest(dz * sqrt(n), n, paired=True, r=scale).
OF_PINGOUIN = {
    (2, -1.5, 0.2): 1.057608731616251,
    (2, -1.5, 0.7071067811865476): 1.077340178230763,
    (2, -1.5, 1.5): 0.9727814813693897,
    (2, 0.0, 0.2): 0.8090195199015446,
    (2, 0.0, 0.7071067811865476): 0.5231565837302072,
    (2, 0.0, 1.5): 0.3215854164542788,
    (2, 0.3, 0.2): 0.8353981291528598,
    (2, 0.3, 0.7071067811865476): 0.5696241357602375,
    (2, 0.3, 1.5): 0.36424739725786015,
    (2, 2.0, 0.2): 1.1216151523324913,
    (2, 2.0, 0.7071067811865476): 1.2591433281776672,
    (2, 2.0, 1.5): 1.2472274301051773,
    (5, -1.5, 0.2): 2.0831801390463043,
    (5, -1.5, 0.7071067811865476): 3.3186468482616927,
    (5, -1.5, 1.5): 3.4222316860308566,
    (5, 0.0, 0.2): 0.7235784384775759,
    (5, 0.0, 0.7071067811865476): 0.39736262448060183,
    (5, 0.0, 1.5): 0.2207725548013824,
    (5, 0.3, 0.2): 0.7823976676152522,
    (5, 0.3, 0.7071067811865476): 0.475148331088135,
    (5, 0.3, 1.5): 0.2782325675272018,
    (5, 2.0, 0.2): 3.217929328203323,
    (5, 2.0, 0.7071067811865476): 6.555401859417247,
    (5, 2.0, 1.5): 7.998242817255489,
    (20, -1.5, 0.2): 3352.4818764673932,
    (20, -1.5, 0.7071067811865476): 9248.02179268139,
    (20, -1.5, 1.5): 11286.126835905969,
    (20, 0.0, 0.2): 0.553606253784839,
    (20, 0.0, 0.7071067811865476): 0.2323262943764278,
    (20, 0.0, 1.5): 0.11645764468661965,
    (20, 0.3, 0.2): 0.8771341769208604,
    (20, 0.3, 0.7071067811865476): 0.5064856245943616,
    (20, 0.3, 1.5): 0.27736682929033646,
    (20, 2.0, 0.2): 143725.01189648092,
    (20, 2.0, 0.7071067811865476): 442268.1364193496,
    (20, 2.0, 1.5): 644404.5024279734,
    (60, -1.5, 0.2): 30168791747862.996,
    (60, -1.5, 0.7071067811865476): 87376572124398.56,
    (60, -1.5, 1.5): 111109377175635.08,
    (60, 0.0, 0.2): 0.402847218039633,
    (60, 0.0, 0.7071067811865476): 0.1412366879315886,
    (60, 0.0, 1.5): 0.06817320097275402,
    (60, 0.3, 0.2): 2.6205578079844036,
    (60, 0.3, 0.7071067811865476): 1.684981730969614,
    (60, 0.3, 1.5): 0.9076393011642239,
    (60, 2.0, 0.2): 7.327340935808253e18,
    (60, 2.0, 0.7071067811865476): 2.3069097855827907e19,
    (60, 2.0, 1.5): 3.4729136200159478e19,
    (200, -1.5, 0.2): 1.0881619157178007e49,
    (200, -1.5, 0.7071067811865476): 3.189168504450978e49,
    (200, -1.5, 1.5): 4.1109306429666277e49,
    (200, 0.0, 0.2): 0.2553956763104679,
    (200, 0.0, 0.7071067811865476): 0.07901338820275025,
    (200, 0.0, 1.5): 0.03752960638849489,
    (200, 0.3, 0.2): 534.8760606072848,
    (200, 0.3, 0.7071067811865476): 388.16642901341254,
    (200, 0.3, 1.5): 208.02083062137294,
    (200, 2.0, 0.2): 3.319394324525648e67,
    (200, 2.0, 0.7071067811865476): 1.0512146007987847e68,
    (200, 2.0, 1.5): 1.5988339491464596e68,
}


@pytest.mark.parametrize(("n", "dz", "scale"), OF_PINGOUIN)
def test_jzs_bayes_factor_is_pingouins_to_six_digits(n: int, dz: float, scale: float):
    spread = np.linspace(-1, 1, n)
    values = spread / spread.std(ddof=1) + dz
    assert tests.jzs_bayes_factor(values, scale) == float(f"{OF_PINGOUIN[n, dz, scale]:.6g}")


def test_jzs_bayes_factor_agrees_with_the_integral_over_effect_sizes():
    for seed in range(3):
        values = np.random.default_rng(seed).normal(0.2 * seed, 1, 20)
        t, scale = tests.cohens_dz(values) * math.sqrt(20), math.sqrt(2) / 2

        def weighted(delta: float, t: float = t, scale: float = scale) -> float:
            return float(stats.nct.pdf(t, 19, delta * math.sqrt(20)) * stats.cauchy.pdf(delta, scale=scale))

        alternative = integrate.quad(weighted, -4, 4, limit=200, points=[0])[0]
        assert tests.jzs_bayes_factor(values) == pytest.approx(alternative / stats.t.pdf(t, 19), rel=2e-3)


def test_rank_biserial_agrees_with_counting_ranks_and_with_scipy():
    values = np.array([3.0, -1.0, 2.0, 2.0, -2.0, 0.0, 5.0])  # |.| ranks without 0: 5, 1, 3, 3, 3, 6
    assert tests.rank_biserial(values) == pytest.approx((5 + 3 + 3 + 6 - 1 - 3) / 21)
    above = float(stats.wilcoxon(MAIZE, alternative="greater").statistic)  # the sum of the positive ranks, of 120
    assert tests.rank_biserial(MAIZE) == pytest.approx((2 * above - 120) / 120, abs=1e-12)
    assert math.isnan(tests.rank_biserial(np.zeros(4)))


def test_holm_agrees_with_r():
    # R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") gives 0.05 0.08 0.09 0.09 0.09
    assert adjusted([0.03, 0.01, 0.05, 0.02, 0.04]) == pytest.approx([0.09, 0.05, 0.09, 0.08, 0.09])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_both_corrections_are_those_of_statsmodels_to_the_bit(p: list[float]):
    for ours, theirs in (("holm", "holm"), ("benjamini_hochberg", "fdr_bh")):
        assert adjusted(p, ours) == multipletests(p, method=theirs)[1].tolist()


def test_benjamini_hochberg_on_the_paper_s_fifteen_p_values():
    # Benjamini & Hochberg 1995, section 4: at .05 the first four are rejected, where Bonferroni rejects three.
    p = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.324,
        0.4262,
        0.5719,
        0.6528,
        0.759,
        1,
    ]
    found = adjusted(p, "benjamini_hochberg")
    assert [i for i, a in enumerate(found) if a <= 0.05] == [0, 1, 2, 3]
    assert found[3] == pytest.approx(0.0095 * 15 / 4)


def test_a_family_has_the_correction_it_names():
    p = {"a": 0.01, "b": 0.04, "c": 0.01, "d": 0.04}
    found = adjusted_by_family(p, {"a": "f", "b": "f", "c": "g", "d": "g"}, {"g": "benjamini_hochberg"})
    assert found == pytest.approx({"a": 0.02, "b": 0.04, "c": 0.02, "d": 0.04})


def test_holm_counts_a_test_without_a_p_and_leaves_other_families_alone():
    p = {"a": 0.01, "b": math.nan, "c": 0.02, "d": 0.04}
    found = adjusted_by_family(p, {"a": "f", "b": "f", "c": "f", "d": "g"}, {})
    assert found["a"] == pytest.approx(0.03) and found["c"] == pytest.approx(0.04)
    assert math.isnan(found["b"]) and found["d"] == pytest.approx(0.04)
    assert adjusted([]) == []


def rejections(five_samples: np.ndarray, as_pairs: bool) -> bool:
    values = five_samples.mean(axis=1) if as_pairs else five_samples.ravel()
    return tests.sign_flip(values, resamples=1_000) < 0.05


def test_pair_means_keep_the_false_positive_rate_where_samples_as_independent_do_not():
    rng = np.random.default_rng(21)
    runs = [rng.normal(0, 1, (20, 1)) + rng.normal(0, 1.0, (20, 5)) for _ in range(400)]
    by_pair = sum(rejections(run, True) for run in runs) / len(runs)
    by_sample = sum(rejections(run, False) for run in runs) / len(runs)
    assert by_pair <= 0.075
    assert by_sample >= 0.15


def test_sources_used_again_are_one_unit_and_keep_the_false_positive_rate():
    rng = np.random.default_rng(22)
    pair = [f"p{i:02d}" for i in range(50)]
    source = [f"s{i % 10}" for i in range(50)]
    hits = {True: 0, False: 0}
    for _ in range(200):
        shared = np.repeat(rng.normal(0, 1, 10)[None], 5, axis=0).ravel()
        frame = pd.DataFrame({"pair_id": pair * 2, "condition": ["A"] * 50 + ["B"] * 50, "source_id": source * 2})
        scores = np.concatenate([np.zeros(50), shared + rng.normal(0, 1, 50)])
        rows = prepare(frame.assign(score=scores, phase="1"))
        for grouped in hits:
            units = independent_units(rows) if grouped else None
            values = contrast_differences(rows, {"B": 1, "A": -1}, "score", units=units).values
            hits[grouped] += tests.sign_flip(values, resamples=2_000) < 0.05
    assert hits[True] / 200 <= 0.08
    assert hits[False] / 200 >= 0.15


def test_holm_keeps_the_familywise_rate_over_five_null_hypotheses():
    rng = np.random.default_rng(23)
    runs = [[tests.sign_flip(rng.normal(0, 1, 15), resamples=2_000) for _ in range(5)] for _ in range(400)]
    uncorrected = [p for p in runs if min(p) < 0.05]  # Holm rejects in no others
    false = sum(min(adjusted(p)) < 0.05 for p in uncorrected)
    assert false / len(runs) <= 0.08
    assert len(uncorrected) / len(runs) >= 0.15
