"""One test a rule, each on trials whose differences are set by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kvpatch.verdicts.decide import Verdict, verdicts
from kvpatch.verdicts.measure import measure
from kvpatch.verdicts.pairs import prepare
from kvpatch.verdicts.rules import decide as decide_rule

Make = Callable[..., Any]
N = 30
FLAT = [0.0] * N
NEAR = [(-1) ** i / 1000 for i in range(N)]
"""As good as no difference, from a readout that scored."""


@pytest.fixture
def decide(make_protocol: Make, make_trials: Make) -> Callable[..., Verdict]:
    """Decide one hypothesis on X - A, where A is 0 and X is given; 10 calibration pairs have B - A = 1."""

    def one(x: Sequence[float], calibration_gap: float = 1.0, pairs: int = 10, **hypothesis: Any) -> Verdict:
        protocol = make_protocol({"id": "h", "contrast": "X - A", **hypothesis})
        calibration = {"A": [0.0] * pairs, "B": [calibration_gap] * pairs}
        return verdicts(protocol, make_trials({"A": [0.0] * len(x), "X": x}, calibration))[0]

    return one


# Directional tests


def test_greater_is_supported_by_a_clear_effect(decide: Make, spread_out: Make):
    v = decide(spread_out(1.0, 1.0, N), test="greater", alpha=0.001)
    assert v.verdict == "supported"
    assert v.estimate == pytest.approx(1.0) and v.effect_size == pytest.approx(1.0)
    assert v.ci_low is not None and v.ci_low > 0 and v.p_adjusted is not None and v.p_adjusted < 0.001
    assert (v.n, v.ci_level, v.margin) == (N, 0.95, None)


def test_less_is_supported_by_a_clear_effect_below_zero(decide: Make, spread_out: Make):
    assert decide(spread_out(-1.0, 1.0, N), test="less").verdict == "supported"
    assert decide(spread_out(1.0, 1.0, N), test="less").verdict == "not supported"


def test_p_above_alpha_is_inconclusive_though_the_interval_excludes_zero(decide: Make, spread_out: Make):
    x = spread_out(0.45, 1.0, N)
    assert decide(x, test="greater", alpha=0.05).verdict == "supported"
    v = decide(x, test="greater", alpha=0.001)
    assert v.verdict == "inconclusive"
    assert v.ci_low is not None and v.ci_low > 0
    assert "is not below 0.001" in v.because


def test_the_two_sided_interval_must_exclude_zero_though_the_one_sided_p_is_below_alpha(decide: Make, spread_out: Make):
    v = decide(spread_out(0.33, 1.0, N), test="greater", alpha=0.05)
    assert v.p_adjusted is not None and v.p_adjusted < 0.05 and v.ci_low is not None and v.ci_low < 0
    assert v.verdict == "inconclusive"


def test_wholly_on_the_other_side_is_not_supported(decide: Make, spread_out: Make):
    v = decide(spread_out(-1.0, 1.0, N), test="greater")
    assert v.verdict == "not supported"
    assert "other side" in v.because


def test_too_small_to_matter_is_not_supported_and_the_region_is_a_fifth_of_the_natural_gap(
    decide: Make, spread_out: Make
):
    x = spread_out(0.0, 0.2, N)  # 95% interval about -0.07 to 0.07
    assert decide(x, calibration_gap=0.5, test="greater").verdict == "not supported"  # 0.2 * 0.5 = 0.1
    assert decide(x, calibration_gap=0.25, test="greater").verdict == "inconclusive"  # 0.2 * 0.25 = 0.05


def test_a_margin_takes_the_place_of_the_fifth(decide: Make, spread_out: Make):
    x = spread_out(0.0, 0.2, N)
    assert decide(x, calibration_gap=0.25, test="greater", margin={"value": 0.1}).verdict == "not supported"


def test_a_wide_interval_around_zero_is_inconclusive_never_not_supported(decide: Make, spread_out: Make):
    v = decide(spread_out(0.0, 3.0, N), test="greater")
    assert v.verdict == "inconclusive"
    assert "decide neither way" in v.because


def test_without_calibration_pairs_a_directional_test_still_decides_by_side(decide: Make, spread_out: Make):
    assert decide(spread_out(1.0, 1.0, N), pairs=0, test="greater").verdict == "supported"
    assert decide(spread_out(-1.0, 1.0, N), pairs=0, test="greater").verdict == "not supported"
    assert decide(spread_out(0.0, 0.01, N), pairs=0, test="greater").verdict == "inconclusive"


# Margins


@pytest.mark.parametrize(("test", "sign"), [("much_greater", 1), ("much_less", -1)], ids=["much_greater", "much_less"])
def test_much_needs_the_whole_interval_past_the_margin(decide: Make, spread_out: Make, test: str, sign: int):
    margin = {"natural_gap": 0.5}
    x = sign * spread_out(1.0, 0.5, N)  # interval about 0.82 to 1.18
    assert decide(x, calibration_gap=1.5, test=test, margin=margin).verdict == "supported"  # 0.75
    between = decide(x, calibration_gap=2.0, test=test, margin=margin)  # 1.0
    assert between.verdict == "inconclusive"
    assert "margin" in between.because
    assert decide(x, calibration_gap=2.5, test=test, margin=margin).verdict == "not supported"  # 1.25


def test_the_largest_part_of_a_margin_counts(decide: Make, spread_out: Make):
    x = spread_out(5.0, 1.0, N)
    parts = {"natural_gap": 0.25, "dz": 0.5, "value": 0.1}
    assert decide(x, calibration_gap=4, test="much_greater", margin=parts).margin == pytest.approx(1.0)
    assert decide(x, calibration_gap=1, test="much_greater", margin=parts).margin == pytest.approx(0.5)
    assert decide(x, test="much_greater", margin={**parts, "value": 2.0}).margin == pytest.approx(2.0)


def test_the_natural_gap_comes_from_the_calibration_pairs_and_never_from_the_test_pairs(
    make_protocol: Make, make_trials: Make
):
    protocol = make_protocol({"id": "h", "contrast": "X - A", "test": "equivalent", "margin": {"natural_gap": 0.2}})
    calibration = {"A": [0.0] * 10, "B": [-2.0] * 10}
    for b in (3.0, 300.0):
        trials = make_trials({"A": FLAT, "X": FLAT, "B": [b] * N}, calibration)
        assert verdicts(protocol, trials)[0].margin == pytest.approx(0.4)


def test_the_natural_gap_is_of_the_same_transform(make_protocol: Make, make_trials: Make):
    h = {
        "id": "h",
        "contrast": "X - A",
        "test": "equivalent",
        "margin": {"natural_gap": 0.5},
        "transform": "log",
    }
    calibration = {"A": [1.0] * 5, "B": [np.e**2] * 5}
    trials = make_trials({"A": [1.0] * N, "X": [np.e**0.1] * N}, calibration)
    v = verdicts(make_protocol(h), trials)[0]
    assert (v.margin, v.estimate, v.verdict) == (pytest.approx(1.0), pytest.approx(0.1), "equivalent")
    assert "0.1 log units (a factor of 1.11)" in v.because


@pytest.mark.parametrize("pairs", [0, 2])
def test_fewer_than_three_calibration_pairs_fix_no_margin(decide: Make, pairs: int):
    v = decide(NEAR, pairs=pairs, test="equivalent", margin={"natural_gap": 0.2})
    assert (v.verdict, v.margin) == ("inconclusive", None)
    assert f"at least 3 calibration pairs with both A and B, there are {pairs}" in v.because
    assert decide(NEAR, pairs=3, test="equivalent", margin={"natural_gap": 0.2}).verdict == "equivalent"
    assert decide(NEAR, pairs=pairs, test="equivalent", margin={"value": 0.2}).verdict == "equivalent"


def test_a_natural_gap_of_zero_fixes_no_margin(decide: Make):
    v = decide(NEAR, calibration_gap=0, test="equivalent", margin={"natural_gap": 0.2})
    assert v.verdict == "inconclusive"
    assert "natural gap of score is 0 over 10 calibration pairs" in v.because


# Equivalence


def test_equivalent_inside_the_bounds_with_the_ninety_percent_interval(decide: Make, spread_out: Make):
    v = decide(spread_out(0.02, 0.3, N), test="equivalent", margin={"natural_gap": 0.2})
    assert (v.verdict, v.ci_level) == ("equivalent", 0.90)


def test_a_difference_wholly_outside_the_bounds_is_not_supported(decide: Make, spread_out: Make):
    for mean in (0.6, -0.6):
        v = decide(spread_out(mean, 0.3, N), test="equivalent", margin={"natural_gap": 0.2})
        assert v.verdict == "not supported"
        assert "wholly outside" in v.because


def test_an_interval_across_a_bound_is_inconclusive_although_it_holds_zero(decide: Make, spread_out: Make):
    v = decide(spread_out(0.0, 1.0, N), test="equivalent", margin={"natural_gap": 0.2})
    assert v.verdict == "inconclusive"
    v = decide(spread_out(0.2, 0.3, N), test="equivalent", margin={"natural_gap": 0.2})
    assert v.verdict == "inconclusive"


def test_equivalence_needs_the_interval_inside_the_bounds_beside_the_p(
    make_protocol: Make, make_trials: Make, spread_out: Make
):
    h = {"id": "h", "contrast": "X - A", "test": "equivalent", "margin": {"value": 0.2}}
    protocol = make_protocol(h)
    for mean, word in ((0.05, "equivalent"), (0.15, "inconclusive")):
        rows = prepare(make_trials({"A": FLAT, "X": spread_out(mean, 0.3, N)}))
        assert decide_rule(measure(protocol, rows, protocol.hypotheses[0]), p_adjusted=0.001).word == word
    rows = prepare(make_trials({"A": FLAT, "X": spread_out(0.05, 0.3, N)}))
    assert decide_rule(measure(protocol, rows, protocol.hypotheses[0]), p_adjusted=0.06).word == "inconclusive"


# Numbers of pairs


@pytest.mark.parametrize(("alpha", "needed"), [(0.05, 5), (0.001, 10)])
def test_too_few_pairs_for_alpha_are_inconclusive_and_the_smallest_n_is_named(decide: Make, alpha: float, needed: int):
    v = decide([5.0 + i / 100 for i in range(needed - 1)], test="greater", alpha=alpha)
    assert v.verdict == "inconclusive"
    assert f"needs at least {needed} pairs" in v.because
    assert decide([5.0 + i / 100 for i in range(needed)], test="greater", alpha=alpha).verdict == "supported"


def test_a_condition_without_trials_is_named(make_protocol: Make, make_trials: Make):
    protocol = make_protocol({"id": "h", "contrast": "N1 - A", "test": "greater"})
    v = verdicts(protocol, make_trials({"A": FLAT}))[0]
    assert (v.verdict, v.n, v.estimate, v.p) == ("inconclusive", 0, None, None)
    assert "no trials of N1 are stored" in v.because


def test_trials_of_another_phase_do_not_count(make_protocol: Make, make_trials: Make):
    protocol = make_protocol({"id": "h", "contrast": "X - A", "test": "greater"})
    trials = make_trials({"A": FLAT, "X": [1.0] * N}).assign(phase="2")
    assert verdicts(protocol, trials)[0].n == 0


# Holm


def test_holm_counts_every_hypothesis_of_the_family_and_none_of_another(
    make_protocol: Make, make_trials: Make, spread_out: Make
):
    strong, weak = spread_out(0.55, 1.0, N), spread_out(0.1, 1.0, N)
    trials = make_trials({"A": FLAT, "X": strong, "N1": weak, "N2": weak})
    hypotheses = [
        {"id": "h", "contrast": "X - A", "test": "greater"},
        {"id": "n1", "contrast": "N1 - A", "test": "greater"},
        {"id": "n2", "contrast": "N2 - A", "test": "greater"},
    ]
    together = verdicts(make_protocol(*hypotheses), trials)[0]
    alone = verdicts(make_protocol(hypotheses[0], *({**h, "family": "g"} for h in hypotheses[1:])), trials)[0]
    assert together.p is not None and together.p_adjusted == pytest.approx(3 * together.p)
    assert alone.p_adjusted == alone.p == together.p


def test_a_hypothesis_that_can_not_be_read_still_counts_in_its_family(make_protocol: Make, make_trials: Make):
    trials = make_trials({"A": FLAT, "X": [0.1 * (i % 7 - 2) for i in range(N)], "N1": FLAT}, incoherent={"N1": 1})
    protocol = make_protocol(
        {"id": "h", "contrast": "X - A", "test": "greater"},
        {"id": "n", "contrast": "N1 - A", "test": "greater"},
    )
    h, n = verdicts(protocol, trials)
    assert n.verdict == "not interpretable"
    assert h.p is not None and h.p_adjusted == pytest.approx(2 * h.p)


# Transfer fraction, shared prompts


def test_the_transfer_fraction_is_the_share_of_the_natural_gap_on_the_same_pairs(
    make_protocol: Make, make_trials: Make, spread_out: Make
):
    gap = spread_out(4.0, 1.0, N)
    x = 0.5 * gap + np.tile([0.1, -0.1], N // 2)
    protocol = make_protocol(
        {"id": "x", "contrast": "X - A", "test": "greater"},
        {"id": "n", "contrast": "X - N1", "test": "greater"},
        {"id": "b", "contrast": "B - A", "test": "greater"},
    )
    found = {v.id: v for v in verdicts(protocol, make_trials({"A": FLAT, "B": gap, "X": x, "N1": FLAT}))}
    low, high = found["x"].transfer_fraction_low, found["x"].transfer_fraction_high
    assert found["x"].transfer_fraction == pytest.approx(0.5)
    assert low is not None and high is not None and 0.45 < low < 0.5 < high < 0.55
    assert found["n"].transfer_fraction is None and found["b"].transfer_fraction is None


def test_no_transfer_fraction_over_a_gap_near_zero(make_protocol: Make, make_trials: Make, spread_out: Make):
    protocol = make_protocol({"id": "x", "contrast": "X - A", "test": "greater"})
    trials = make_trials({"A": FLAT, "B": spread_out(0.1, 1.0, N), "X": spread_out(1.0, 1.0, N)})
    v = verdicts(protocol, trials)[0]
    assert v.transfer_fraction is None
    assert v.transfer_fraction_note is not None and "standard errors from 0" in v.transfer_fraction_note


def test_pairs_with_a_shared_source_are_one_unit_unless_the_shared_prompt_is_no_part_of_the_pair(
    make_protocol: Make, make_trials: Make
):
    protocol = make_protocol({"id": "h", "contrast": "N2 - A", "test": "greater"})
    trials = make_trials({"A": FLAT, "N2": [1.0 + i / 100 for i in range(N)]})
    scaffold = trials.assign(source_id=np.where(trials["condition"] == "N2", "scaffold", trials["source_id"]))
    assert verdicts(protocol, scaffold)[0].n == N
    number = trials["pair_id"].str[-3:].astype(int)
    shared = trials.assign(source_id=[f"s{i % 6}" for i in number])
    v = verdicts(protocol, shared)[0]
    assert (v.n, v.n_pairs, v.verdict) == (6, N, "supported")
    assert "6 groups of pairs that share no prompt (30 pairs)" in v.because
