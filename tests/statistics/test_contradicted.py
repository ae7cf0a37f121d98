"""Where the data speak against a claim a protocol with families says so; one without keeps its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvpatch.verdicts.decide import Verdict, verdicts

Make = Callable[..., Any]
N = 40
GAP = [0.9 + 0.2 * (i % 2) for i in range(N)]
NONE = [0.05 * (-1) ** i for i in range(N)]
NO_GAP = [4.0 * (-1) ** i for i in range(N)]
FAMILIES = {"f": {"alpha": 0.05}}


@pytest.fixture
def decide(make_protocol: Make, make_trials: Make) -> Callable[..., Verdict]:
    def decided(
        values: list[float], gap: list[float] = GAP, families: dict[str, Any] | None = FAMILIES, **more: Any
    ) -> Verdict:
        extra = {} if families is None else {"families": families}
        asked = {"id": "h", "contrast": "X - N1", "test": "greater", "needs": []} | more
        trials = make_trials({"N1": [0.0] * N, "X": values}, {"A": [0.0] * N, "B": gap})
        return verdicts(make_protocol(asked, **extra), trials)[0]

    return decided


def test_an_interval_on_the_other_side_contradicts(decide: Make):
    v = decide([-value for value in GAP])
    assert v.verdict == "contradicted" and "wholly on the other side of 0" in v.because
    assert decide(GAP, test="less").verdict == "contradicted"


def test_no_effect_within_the_default_margin_contradicts_and_states_the_margin(decide: Make):
    v = decide(NONE)
    assert v.verdict == "contradicted"
    assert "20% of the natural gap, is ruled out" in v.because
    assert v.margin == pytest.approx(0.2 * 0.968, abs=0.01)  # of the lower end of the gap's interval
    assert decide(NONE, test="less").verdict == "contradicted"
    assert decide(NONE, margin={"value": 0.3}).margin == 0.3


def test_without_a_natural_gap_no_effect_can_be_said_to_be_none_and_the_sentence_says_why(decide: Make):
    v = decide(NONE, gap=NO_GAP)
    assert (v.verdict, v.margin) == ("inconclusive", None)
    assert "No bound says when such an effect counts as none: the natural gap of score" in v.because


def test_an_equivalence_that_lies_wholly_outside_is_contradicted(decide: Make):
    assert decide(GAP, test="equivalent", margin={"value": 0.3}).verdict == "contradicted"
    assert decide(NONE, test="equivalent", margin={"value": 0.3}).verdict == "equivalent"


@pytest.mark.parametrize("values", [[-value for value in GAP], NONE], ids=["other side", "none"])
def test_a_protocol_without_families_keeps_its_word_and_its_sentence(decide: Make, values: list[float]):
    old, new = decide(values, families=None), decide(values)
    assert (old.verdict, new.verdict) == ("not supported", "contradicted")
    assert old.because == new.because and old.margin is None


@pytest.mark.parametrize("contrast", ["N1 < N2 < X", "X > N2 > N1"])
def test_a_flat_ordering_is_contradicted_by_a_share_of_the_gap_over_its_steps(
    make_protocol: Make, make_trials: Make, contrast: str
):
    asked = {"id": "h", "contrast": contrast, "test": "trend", "needs": []}
    trials = make_trials({"N1": [0.0] * N, "N2": NONE, "X": [-value for value in NONE]}, {"A": [0.0] * N, "B": GAP})
    v = verdicts(make_protocol(asked, families=FAMILIES), trials)[0]
    assert v.verdict == "contradicted" and v.margin == pytest.approx(0.2 * 0.968 / 2, abs=0.005)
    assert verdicts(make_protocol(asked), trials)[0].verdict == "inconclusive"


def test_a_repetition_that_finds_no_effect_is_contradicted(make_protocol: Make, make_trials: Make):
    first = {"id": "first", "contrast": "X - N1", "test": "greater", "needs": []}
    again = {"id": "again", "contrast": "X - N2", "test": "replicates", "of": "first", "needs": []}
    trials = make_trials({"N1": [0.0] * N, "X": GAP, "N2": [a - b for a, b in zip(GAP, NONE, strict=True)]},
                         {"A": [0.0] * N, "B": GAP})  # fmt: skip
    found = verdicts(make_protocol(first, again, families=FAMILIES), trials)
    assert [v.verdict for v in found] == ["supported", "contradicted"]
    assert [v.verdict for v in verdicts(make_protocol(first, again), trials)] == ["supported", "inconclusive"]


@pytest.mark.parametrize("blocked", ["instrument", "coherence", "missing"])
def test_what_can_not_be_read_tells_estimate_interval_and_n(make_protocol: Make, make_trials: Make, blocked: str):
    asked = {"id": "h", "contrast": "X - N1", "test": "greater", "needs": [], "readout": "recursive_score"}
    trials = make_trials({"N1": [0.0] * N, "X": GAP}, incoherent={"X": 0.6} if blocked == "coherence" else None)
    trials = trials.rename(columns={"score": "recursive_score"})
    if blocked == "missing":
        trials = trials.loc[~((trials["condition"] == "X") & (trials.index % 2 == 0))]
        trials.loc[trials["condition"] == "N1", "recursive_score"] = [3.0] * 10 + [0.0] * (N - 10)
    protocol = make_protocol(asked, families=FAMILIES)
    v = verdicts(protocol, trials, instrument_ok=False if blocked == "instrument" else None)[0]
    assert (v.verdict, v.blocked_by, v.missing) == ("not interpretable", blocked, None)
    assert v.because.startswith("X - N1 in recursive_score is ")
    assert f"over {v.n} pairs (95% interval" in v.because.split("; that is not interpreted. ")[0]
