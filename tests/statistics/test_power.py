"""Power: the simulated rule against the rule itself, and against the closed form of the paired t test."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from conftest import build_protocol, build_trials
from kvpatch.cli import main as cli
from kvpatch.errors import ProtocolError
from kvpatch.protocols.load import load_protocol
from kvpatch.specs.test_kinds import kinds
from kvpatch.statistics import paired_tests as rule
from kvpatch.statistics.intervals import bca_interval
from kvpatch.statistics.simulation import _rank_sums, critical_of
from kvpatch.statistics.trend import order_scores
from kvpatch.verdicts import procedures
from kvpatch.verdicts.power import power
from kvpatch.verdicts.smallest import smallest_effects, warnings_before

GREATER = {"id": "h", "contrast": "C - N1", "test": "greater", "alpha": 0.001}
EQUIVALENT = {"id": "h", "contrast": "C - N1", "test": "equivalent", "margin": {"natural_gap": 0.2}}


def of(hypothesis: dict, n: int, **options):
    return power(build_protocol(hypothesis), n=n, **options)[0]


# The simulation is the rule


@pytest.mark.parametrize("n", [6, 11])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_data_set_passes_the_sign_flip_test_just_beyond_its_critical_effect(n, alpha):
    noise = np.random.default_rng(n).exponential(size=(20, n)) - 1
    if n < rule.smallest_n(alpha):
        assert np.isinf(critical_of(noise, [alpha]).above[alpha]).all()
        return
    found = critical_of(noise, [alpha])
    for values, above, below in zip(noise, found.above[alpha], found.below[alpha], strict=True):
        assert (
            rule.sign_flip(values + above + 1e-5, "greater") < alpha <= rule.sign_flip(values + above - 1e-5, "greater")
        )
        assert rule.sign_flip(values - below - 1e-5, "less") < alpha <= rule.sign_flip(values - below + 1e-5, "less")


def test_random_flips_agree_with_the_sign_flip_test():
    noise = np.random.default_rng(3).standard_normal((40, 30))
    found = critical_of(noise, [0.01])
    p = [rule.sign_flip(values + at, "greater") for values, at in zip(noise, found.above[0.01], strict=True)]
    assert np.mean(p) == pytest.approx(0.01, rel=0.05)
    assert np.std(p) < 0.0015


@pytest.mark.parametrize("draw", ["normal", "skewed"])
def test_bootstrap_ends_agree_with_scipys(draw):
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((30, 25)) if draw == "normal" else rng.exponential(size=(30, 25))
    found = critical_of(noise, [0.05])
    error = noise.std(axis=1, ddof=1) / 5
    for level in (0.95, 0.90):
        ends = np.array([(i.low, i.high) for i in (bca_interval(values, level) for values in noise)])
        off = np.stack([found.low[level] - ends[:, 0], found.high[level] - ends[:, 1]]) / error
        assert np.abs(off).max() < 0.35
        assert np.abs(off.mean(axis=1)).max() < 0.1


def test_differences_that_do_not_vary_have_an_interval_of_width_zero():
    found = critical_of(np.full((2, 8), 3.0), [0.05])
    assert found.low[0.95] == pytest.approx(3.0) == found.high[0.95]


@pytest.mark.parametrize(("levels", "peak"), [(3, 2), (3, 1), (5, 4), (5, 2), (6, 2)])
def test_compared_levels_give_the_rank_sums_of_sorted_ones(levels, peak):
    noise, steps = np.random.default_rng(levels).standard_normal((9, 20, levels)), np.linspace(0, 2, 9)
    scores = order_scores(levels, peak)
    ranks = stats.rankdata(noise + steps[:, None, None] * scores, axis=2) - 1
    found = _rank_sums(np.moveaxis(noise, 2, 0), steps, scores)
    assert found == pytest.approx((ranks @ scores).sum(axis=1), abs=1e-9)


# Closed form


@pytest.mark.parametrize("n", [20, 50, 100])
def test_smallest_effect_is_that_of_the_one_sided_paired_t_test(n):
    """At alpha .001 the p-value decides. Two-sided at 90% these would be dz 1.20, 0.69 and 0.47."""
    found = of(GREATER, n).plain
    for share, dz in ((0.8, found.dz_80), (0.9, found.dz_90)):
        exact = TTestPower().solve_power(nobs=n, alpha=0.001, power=share, alternative="larger")
        assert dz == pytest.approx(exact, rel=0.03)


def test_at_alpha_05_the_interval_decides():
    """The 95% interval has 2.5% below it, so it asks for more than a one-sided p < .05."""
    found = of({**GREATER, "alpha": 0.05}, 100).plain
    exact = TTestPower().solve_power(nobs=100, alpha=0.025, power=0.8, alternative="larger")
    assert found.dz_80 == pytest.approx(exact, rel=0.03)


def test_pairs_for_a_wanted_effect_are_those_of_the_t_test():
    found = of(GREATER, 20).plain
    for share, n in ((0.8, found.n_80), (0.9, found.n_90)):
        exact = TTestPower().solve_power(effect_size=0.5, alpha=0.001, power=share, alternative="larger")
        assert n == pytest.approx(exact, rel=0.06)


def test_power_at_an_effect_is_that_of_the_t_test():
    found = of(GREATER, 50, wanted_dz=0.6).plain
    exact = TTestPower().power(effect_size=0.6, nobs=50, alpha=0.001, alternative="larger")
    assert found.power_at_wanted == pytest.approx(exact, abs=0.03)


def test_certified_margin_is_that_of_two_one_sided_t_tests():
    n = 100
    rng = np.random.default_rng(0)
    mean, sd = rng.standard_normal(200_000) / 10, np.sqrt(rng.chisquare(n - 1, 200_000) / (n - 1))
    needed = np.abs(mean) + stats.t.ppf(0.95, n - 1) * sd / math.sqrt(n)
    found = of(EQUIVALENT, n).plain
    assert found.dz_80 == pytest.approx(np.quantile(needed, 0.8), rel=0.03)
    assert found.dz_90 == pytest.approx(np.quantile(needed, 0.9), rel=0.03)


def test_much_greater_needs_the_margin_and_what_the_interval_asks_beyond_it():
    n = 100
    found = of({**GREATER, "test": "much_greater", "margin": {"dz": 0.5}}, n).plain
    # The t of the mean has to be too large for a true dz of 0.5, at half of .025.
    needed = stats.nct.isf(0.0125, n - 1, 0.5 * math.sqrt(n))
    for share, dz in ((0.8, found.dz_80), (0.9, found.dz_90)):
        assert stats.nct.sf(needed, n - 1, dz * math.sqrt(n)) == pytest.approx(share, abs=0.04)


# What holds of it


OF_KIND = {
    "greater": {},
    "less": {},
    "much_greater": {"margin": {"dz": 0.3}},
    "much_less": {"margin": {"dz": 0.3}},
    "equivalent": {"margin": {"natural_gap": 0.3}},
    "trend": {"contrast": "A < N1 < C"},
    "umbrella": {"contrast": "A < C > N1"},
    "correlates": {"against": {"contrast": "B - A", "readout": "score"}, "direction": "positive"},
    "rank_correlates": {"contrast": "A < N1 < C", "direction": "positive"},
    "chosen_heads": {},
}


def test_every_kind_of_test_is_simulated():
    assert set(kinds()) == {*OF_KIND, "replicates"}
    assert all(procedures.procedure_of(name).simulate is not None for name in kinds())


@pytest.mark.parametrize("test", sorted(OF_KIND))
def test_more_pairs_see_smaller_effects(test):
    seen = [of({**GREATER, "test": test, **OF_KIND[test]}, n, sets=1000).plain.dz_80 for n in (20, 28, 48, 96)]
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) == 4


def test_less_mirrors_greater():
    greater, less = (of({**GREATER, "test": test}, 30).plain for test in ("greater", "less"))
    assert less.dz_80 == pytest.approx(greater.dz_80, rel=0.03)


def test_family_of_one_has_the_same_figures_twice_and_a_larger_one_sees_less():
    alone = of(GREATER, 30)
    assert alone.plain == alone.worst
    both = power(build_protocol(GREATER, {**GREATER, "id": "other"}), n=30)[0]
    assert both.family_size == 2
    assert both.worst.alpha == both.plain.alpha / 2
    assert both.worst.dz_80 > both.plain.dz_80
    assert both.worst.n_80 > both.plain.n_80


@pytest.mark.parametrize("n", [1, 2, 9])
def test_n_too_small_for_the_alpha_says_how_many_pairs_are_needed(n):
    found = of(GREATER, n)
    assert found.plain.dz_80 is None
    assert found.plain.power_at_wanted == 0
    assert found.plain.needs_pairs == 10
    assert f"n={n} can't reach p < 0.001 at all: it needs 10 pairs" in found.notes
    assert of(GREATER, 10).plain.dz_80 is not None


def test_no_n_shows_an_effect_of_the_margin_itself():
    found = of({**GREATER, "test": "much_greater", "margin": {"dz": 0.5}}, 50)
    assert (found.plain.n_80, found.plain.n_90) == (None, None)
    assert any("the margin itself is dz 0.5" in note for note in found.notes)


def test_kind_that_has_no_simulation_says_so(monkeypatch):
    without = replace(procedures.procedure_of("greater"), simulate=None)
    monkeypatch.setitem(procedures._OWN, "greater", without)
    found = of(GREATER, 30)
    assert found.plain is None
    assert found.notes == ["test 'greater' is not simulated"]
    assert smallest_effects(build_protocol(GREATER), 30) == []


@pytest.mark.parametrize(
    ("n", "effect", "words"), [(0, 0.5, "n=0"), (-3, 0.5, "n=-3"), (20, 0.0, "0.0"), (20, math.nan, "nan")]
)
def test_values_out_of_range_are_refused(n, effect, words):
    with pytest.raises(ProtocolError, match=words):
        of(GREATER, n, wanted_dz=effect)


def test_unknown_phase_is_refused():
    with pytest.raises(ProtocolError, match="no phase '9'"):
        power(build_protocol(GREATER), phases=["9"])


# A pilot


def pilot(values: np.ndarray, gap: float = 1.0):
    n = len(values)
    return build_trials(
        {"C": list(values), "N1": [0.0] * n}, {"A": [0.0, 0.1, 0.2, 0.0], "B": [gap, gap + 0.1, gap + 0.2, gap]}
    )


def test_pilot_gives_effects_in_the_readouts_unit():
    rng = np.random.default_rng(1)
    found = of(GREATER, 50, pilot=pilot(7 + 3 * rng.standard_normal(60)))
    assert found.noise == "pilot, 60 pairs"
    assert found.sd == pytest.approx(3, rel=0.2)
    assert found.plain.unit_80 == pytest.approx(found.plain.dz_80 * found.sd)
    assert found.plain.dz_80 == pytest.approx(of(GREATER, 50).plain.dz_80, rel=0.05)


def test_pilot_fixes_the_margin_of_an_equivalence_test():
    rng = np.random.default_rng(2)
    values = rng.standard_normal(60)
    found = of(EQUIVALENT, 50, pilot=pilot(values, gap=2.0))
    assert found.margin_dz == pytest.approx(0.4 / found.sd)
    assert found.wanted_dz == found.margin_dz


@pytest.mark.parametrize("values", [np.zeros(12), np.array([1.0, 2.0])])
def test_pilot_that_does_not_vary_or_is_too_short_is_left_aside_with_the_reason(values):
    found = of(GREATER, 20, pilot=pilot(values))
    assert found.noise == "normal"
    assert "the pilot can't be used" in found.notes[0]


def test_pilot_with_mostly_zeros_is_called_too_rosy():
    found = of(GREATER, 20, pilot=pilot(np.array([0.0] * 15 + [1.0, 2.0, 3.0])), sets=500)
    assert any("83% of the pilot's differences are 0" in note for note in found.notes)


# Before a run


def test_warnings_say_what_a_small_run_can_not_see():
    protocol = load_protocol("dec7")
    few = warnings_before(protocol, 9, ["1"])
    assert few[0] == (
        "n=9: mode_exists_score and mode_exists_llr can't pass, whatever the data say: the smallest p of 9 pairs is "
        "0.00195, 0.00391 corrected for the 2 hypotheses of family manipulation, and alpha is 0.001; 11 pairs are "
        "needed."
    )
    twelve = warnings_before(protocol, 12, ["1"])
    assert any("(alpha 0.0005) can see only effects of dz >= 1." in line for line in twelve)
    assert any("can certify only margins of dz >=" in line for line in twelve)
    assert not any("can't pass" in line for line in twelve)


def test_alpha_is_shared_within_a_family_before_a_run_is_told_what_it_can_see():
    """Eight pairs pass alpha .01 alone, and not as one of four: the smallest p times 4 is .0156."""
    four = [{**GREATER, "id": f"h{i}", "alpha": 0.01} for i in range(4)]
    assert not any("can't pass" in line for line in warnings_before(build_protocol(four[0]), 8))
    told = warnings_before(build_protocol(*four), 8)
    assert len(told) == 1
    assert (
        "h0, h1, h2 and h3 can't pass, whatever the data say: the smallest p of 8 pairs is 0.00391, 0.0156" in told[0]
    )
    assert told[0].endswith("alpha is 0.01; 9 pairs are needed.")


def test_no_warning_where_the_run_sees_what_it_asks():
    assert warnings_before(load_protocol("dec7"), 100, ["1"]) == []
    assert warnings_before(load_protocol("dec7"), 100, ["interventions"]) == []


def test_many_warnings_are_cut():
    protocol = build_protocol(
        *({**GREATER, "id": f"h{i}", "alpha": 0.001 / (i + 1), "family": f"f{i}"} for i in range(7))
    )
    lines = warnings_before(protocol, 15)
    assert len(lines) == 5
    assert lines[-1] == "and 3 more: see kvpatch power small"


def test_hypotheses_true_by_construction_are_not_warned_of():
    found = {s.id for s in smallest_effects(load_protocol("dec7"), 12)}
    assert "transfer_llr" in found
    assert not {"seed_memory", "seed_necessity", "seed_geometry"} & found


# The command


def call(capsys, monkeypatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["kvpatch", "power", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


def test_command_prints_json_and_a_table(capsys, monkeypatch):
    found = json.loads(call(capsys, monkeypatch, "dec7", "--n", 20, "--phases", "1", "--draws", 0, "--json"))
    assert [entry["id"] for entry in found] == [h.id for h in load_protocol("dec7").hypotheses if h.phase == "1"]
    assert found[0]["plain"]["dz_90"] == pytest.approx(1.13, abs=0.04)
    table = call(capsys, monkeypatch, "dec7", "--n", 20, "--draws", 0, "--all")
    assert "transfer_llr" in table
    assert "true by construction" in table
