"""What must hold before a contrast is read: coherence, earlier gates, the instrument, no tautology."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from kvpatch.errors import StoreError
from kvpatch.protocols.schema import Protocol
from kvpatch.verdicts.decide import Verdict, verdicts
from kvpatch.verdicts.pairs import prepare
from kvpatch.verdicts.prerequisites import coherence_shares, gate_states, reads_sampled_text

Make = Callable[..., Any]
N = 30
FLAT = [0.0] * N
NEAR = [(-1) ** i / 1000 for i in range(N)]
"""As good as no difference, from a readout that scored."""


# Coherence


def gated(
    make_protocol: Make, make_trials: Make, condition: str, share: float, against: str = "A", readout: str = "score"
) -> Verdict:
    protocol = make_protocol({"id": "h", "contrast": f"{condition} - {against}", "test": "greater", "readout": readout})
    scores = {against: [0.0] * 100, condition: [1.0 + i / 100 for i in range(100)]}
    trials = make_trials(scores, incoherent={condition: share})
    return verdicts(protocol, trials.rename(columns={"score": readout}))[0]


def test_a_condition_under_ninety_percent_coherent_can_not_be_read(make_protocol: Make, make_trials: Make):
    v = gated(make_protocol, make_trials, "N1", 0.18)
    assert (v.verdict, v.blocked_by) == ("not interpretable", "coherence")
    assert "82% of the outputs of N1" in v.because
    assert v.coherence == {"N1": 0.82, "A": 1.0}
    assert v.estimate == pytest.approx(1.495)  # the numbers are kept


def test_a_condition_at_ninety_percent_passes(make_protocol: Make, make_trials: Make):
    assert gated(make_protocol, make_trials, "N1", 0.10).verdict == "supported"


def test_a_share_that_chance_alone_may_have_put_below_ninety_percent_stops_nothing(
    make_protocol: Make, make_trials: Make
):
    """88 of 100: the upper one-sided 95% Clopper-Pearson bound is 0.929."""
    v = gated(make_protocol, make_trials, "N1", 0.12)
    assert (v.verdict, v.coherence["N1"]) == ("supported", 0.88)


def test_outputs_of_a_pair_count_as_one(make_protocol: Make, make_trials: Make):
    """Ten pairs, of which two are never coherent, tell no more for being sampled ten times."""
    trials = make_trials({"A": [0.0] * 10, "N1": [1.0] * 10}, incoherent={"N1": 0.2})
    trials = pd.concat([trials.assign(sample=i, trial_id=trials["trial_id"] + f"-{i}") for i in range(10)])
    found = coherence_shares(prepare(trials))["1", "N1"]
    assert found.share == pytest.approx(0.8)
    assert found.highest == pytest.approx(stats.binomtest(8, 10).proportion_ci(0.90, "exact").high)
    assert not found.is_too_low


@pytest.mark.parametrize("condition", ["B", "C", "N1"])
def test_natural_runs_and_full_swaps_are_judged_like_all_others(make_protocol: Make, make_trials: Make, condition: str):
    v = gated(make_protocol, make_trials, condition, 0.5, against="N2")
    assert (v.verdict, v.blocked_by) == ("not interpretable", "coherence")


@pytest.mark.parametrize("readout", ["mode_llr", "content_llr", "register_llr", "js_pull", "rv_output", "pr_v_late"])
def test_what_is_read_without_sampling_needs_no_coherent_text(make_protocol: Make, make_trials: Make, readout: str):
    v = gated(make_protocol, make_trials, "N1", 1.0, readout=readout)
    assert (v.verdict, v.coherence["N1"]) == ("supported", 0.0)
    assert not reads_sampled_text(readout)


@pytest.mark.parametrize("readout", ["recursive_score", "recursive_score_masked", "semantic_score", "n_tokens"])
def test_what_is_read_from_sampled_text_needs_it_coherent(make_protocol: Make, make_trials: Make, readout: str):
    assert gated(make_protocol, make_trials, "N1", 1.0, readout=readout).blocked_by == "coherence"


def test_a_correlation_looks_at_the_text_only_on_the_side_that_reads_it(make_protocol: Make, make_trials: Make):
    rises = {name: [i * (1 + j) for i in range(N)] for j, name in enumerate(("A", "N1", "X"))}
    trials = make_trials(rises, incoherent={"N1": 1.0})
    trials = trials.assign(mode_llr=trials["score"], recursive_score=trials["score"])
    for own, other, blocked in (("mode_llr", "recursive_score", None), ("recursive_score", "mode_llr", "coherence")):
        h = {"id": "h", "contrast": "N1 - A", "readout": own, "test": "correlates", "direction": "positive"}
        protocol = make_protocol({**h, "against": {"contrast": "X - A", "readout": other}})
        assert verdicts(protocol, trials)[0].blocked_by == blocked


def test_coherence_is_of_the_test_pairs_of_the_phase_and_without_errors(make_protocol: Make, make_trials: Make):
    protocol = make_protocol({"id": "h", "contrast": "N1 - A", "test": "greater"})
    trials = make_trials({"A": FLAT, "N1": [1.0 + i / 100 for i in range(N)]})
    others = trials[trials["condition"] == "N1"].assign(coherent=False)
    elsewhere = others.assign(phase="2", trial_id=others["trial_id"] + "-2")
    held_out = others.assign(split="calibration", trial_id=others["trial_id"] + "-c")
    failed = others.assign(error="boom", trial_id=others["trial_id"] + "-e")
    v = verdicts(protocol, pd.concat([trials, elsewhere, held_out, failed]))[0]
    assert (v.verdict, v.coherence["N1"], v.n_error_rows) == ("supported", 1.0, N)


def test_trials_that_were_not_judged_are_not_coherent(make_protocol: Make, make_trials: Make):
    protocol = make_protocol({"id": "h", "contrast": "N1 - A", "test": "greater"})
    trials = make_trials({"A": FLAT, "N1": [1.0] * N})
    trials["coherent"] = trials["coherent"].astype(object)
    trials.loc[trials["condition"] == "N1", "coherent"] = None
    assert verdicts(protocol, trials)[0].coherence["N1"] == 0.0


def test_no_column_coherent_is_an_error_for_a_person(make_protocol: Make, make_trials: Make):
    protocol = make_protocol({"id": "h", "contrast": "X - A", "test": "greater"})
    with pytest.raises(StoreError, match="coherent"):
        verdicts(protocol, make_trials({"A": FLAT, "X": FLAT}).drop(columns="coherent"))


# Gates

LADDER = (
    {"id": "exists", "contrast": "B - A", "test": "greater", "gate": 1, "is_gatekeeper": True, "family": "a"},
    {"id": "beside", "contrast": "N2 - A", "test": "greater", "gate": 1, "family": "b"},
    {"id": "moves", "contrast": "X - N1", "test": "greater", "gate": 2, "is_gatekeeper": True, "family": "c"},
    {
        "id": "null",
        "contrast": "N1 - A",
        "test": "equivalent",
        "margin": {"value": 0.5},
        "gate": 3,
        "family": "d",
    },
)


def ladder(make_protocol: Make, make_trials: Make, b: float, x: float, **options: Any) -> dict[str, Verdict]:
    up = [i / 100 for i in range(N)]
    scores = {
        "A": FLAT,
        "B": [b + u for u in up],
        "X": [x + u for u in up],
        "N1": NEAR,
        "N2": [1 + u for u in up],
    }
    return {v.id: v for v in verdicts(make_protocol(*LADDER), make_trials(scores), **options)}


def test_all_gates_open(make_protocol: Make, make_trials: Make):
    found = ladder(make_protocol, make_trials, b=1, x=1)
    assert [v.verdict for v in found.values()] == ["supported"] * 3 + ["equivalent"]
    assert list(found) == ["exists", "beside", "moves", "null"]


def test_a_failed_gate_closes_all_later_ones_and_is_named_with_its_reason(make_protocol: Make, make_trials: Make):
    found = ladder(make_protocol, make_trials, b=-5, x=1)
    assert found["exists"].verdict == "not supported"
    for name in ("moves", "null"):
        assert (found[name].verdict, found[name].blocked_by) == ("not interpretable", "gate")
        assert found[name].because.startswith("Gate 1 did not pass: exists is not supported (B - A in score is -4.8")


def test_a_failed_gate_leaves_its_own_gate_and_earlier_ones_alone(make_protocol: Make, make_trials: Make):
    found = ladder(make_protocol, make_trials, b=1, x=-5)
    assert found["exists"].verdict == found["beside"].verdict == "supported"
    assert found["moves"].verdict == "not supported"
    assert found["null"].because.startswith("Gate 2 did not pass: moves")
    assert ladder(make_protocol, make_trials, b=-5, x=1)["beside"].verdict == "supported"


def test_a_hypothesis_that_is_no_gatekeeper_closes_nothing(make_protocol: Make, make_trials: Make):
    hypotheses = ({**LADDER[0], "is_gatekeeper": False}, LADDER[2])
    trials = make_trials({"A": FLAT, "B": [-5.0] * N, "X": [1.0] * N, "N1": FLAT})
    assert [v.verdict for v in verdicts(make_protocol(*hypotheses), trials)] == ["not supported", "supported"]


def test_a_gatekeeper_that_was_not_run_keeps_its_gate_closed(make_protocol: Make, make_trials: Make):
    trials = make_trials({"A": FLAT, "X": [1.0] * N, "N1": FLAT})
    found = {v.id: v for v in verdicts(make_protocol(*LADDER), trials)}
    assert found["exists"].verdict == "inconclusive"
    assert found["moves"].verdict == "not interpretable"


def test_a_failed_instrument_check_leaves_nothing_to_interpret(make_protocol: Make, make_trials: Make):
    found = ladder(make_protocol, make_trials, b=1, x=1, instrument_ok=False)
    assert {(v.verdict, v.blocked_by) for v in found.values()} == {("not interpretable", "instrument")}
    assert all("Gate 0" in v.because for v in found.values())


@pytest.mark.parametrize("instrument_ok", [None, True])
def test_an_unknown_instrument_check_blocks_nothing(make_protocol: Make, make_trials: Make, instrument_ok: Any):
    found = ladder(make_protocol, make_trials, b=1, x=1, instrument_ok=instrument_ok)
    assert found["moves"].verdict == "supported"
    assert not any("Gate 0" in v.because for v in found.values())


@pytest.mark.parametrize(
    ("words", "states"),
    [
        ({"exists": "supported", "moves": "equivalent"}, {1: "open", 2: "open"}),
        ({"exists": "supported", "moves": "inconclusive"}, {1: "open", 2: "closed"}),
        ({"exists": "supported"}, {1: "open", 2: "undecided"}),
        ({}, {1: "undecided", 2: "undecided"}),
    ],
)
def test_a_gate_is_open_where_all_its_gatekeepers_passed(make_protocol: Make, words: dict, states: dict):
    assert gate_states(make_protocol(*LADDER), words) == {**states, 3: "no gatekeeper"}


def test_a_gate_whose_only_gatekeeper_is_tautological_has_none(make_protocol: Make):
    protocol = make_protocol({"id": "seed", "contrast": "C - A", "test": "greater", "is_gatekeeper": True})
    assert gate_states(protocol, {"seed": "tautological"}) == {1: "no gatekeeper"}


def test_a_share_short_of_ninety_percent_is_not_rounded_up_to_it(make_protocol: Make, make_trials: Make):
    protocol = make_protocol({"id": "h", "contrast": "N1 - A", "test": "greater"})
    trials = make_trials({"A": [0.0] * 39, "N1": [1.0] * 39}, incoherent={"N1": 8 / 39})
    assert verdicts(protocol, trials)[0].because.startswith("Only 79% of the outputs of N1 are coherent")


# Tautologies


def swap_protocol(make_protocol: Make, **seed: Any) -> Protocol:
    return make_protocol(
        {"id": "seed", "contrast": "C - A", "test": "greater", "is_gatekeeper": True, "gate": 1, **seed},
        {"id": "moves", "contrast": "X - N1", "test": "greater", "gate": 2, "family": "g"},
    )


def swap_trials(make_trials: Make, c: float) -> pd.DataFrame:
    up = [i / 100 for i in range(N)]
    scores = {
        "A": FLAT,
        "B": [2.0] * N,
        "C": [c + u for u in up],
        "D": FLAT,
        "X": [1 + u for u in up],
        "N1": FLAT,
    }
    return make_trials(scores, incoherent={"C": 0.5})


def test_a_full_swap_alone_is_tautological_says_why_and_keeps_its_numbers(make_protocol: Make, make_trials: Make):
    v = verdicts(swap_protocol(make_protocol), swap_trials(make_trials, 2.0))[0]
    assert (v.verdict, v.blocked_by, v.estimate) == ("tautological", None, pytest.approx(2.145))
    assert "C is the source's text" in v.because
    assert "re-measures B - A" in v.because
    assert "C - A in score is 2.1" in v.because
    assert "against a foreign cache (N1): moves" in v.because


def test_a_tautological_hypothesis_is_never_a_gatekeeper(make_protocol: Make, make_trials: Make):
    found = verdicts(swap_protocol(make_protocol), swap_trials(make_trials, -2.0))
    assert [v.verdict for v in found] == ["tautological", "supported"]


@pytest.mark.parametrize(
    ("contrast", "says"),
    [
        ("D - B", "D is the target's text), so this re-measures A - B"),
        ("C - B", "C is the source's text), so this compares a text with itself"),
        ("C - D", "C is the source's text and D is the target's text), so this re-measures B - A"),
    ],
)
def test_every_full_swap_is_named_with_the_text_it_equals(
    make_protocol: Make, make_trials: Make, contrast: str, says: str
):
    v = verdicts(swap_protocol(make_protocol, contrast=contrast), swap_trials(make_trials, 2.0))[0]
    assert v.verdict == "tautological"
    assert says in v.because


def test_tautological_comes_before_a_failed_instrument_check_which_it_also_tells(
    make_protocol: Make, make_trials: Make
):
    v = verdicts(swap_protocol(make_protocol), swap_trials(make_trials, 2.0), instrument_ok=False)[0]
    assert v.verdict == "tautological"
    assert "Gate 0 did not pass" in v.because
