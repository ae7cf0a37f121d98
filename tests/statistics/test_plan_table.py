"""The plan's table: a row's verdict follows from its hypotheses by a stated rule, and its sentence from the data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from kvpatch.protocols.schema import Protocol
from kvpatch.verdicts.decide import verdicts, verdicts_json
from kvpatch.verdicts.plan_table import AnsweredRow, plan_table, row_verdict

Make = Callable[..., Any]
N = 30
FLAT = [0.0] * N
NEAR = [(-1) ** i / 1000 for i in range(N)]
UP = [1 + i / 100 for i in range(N)]
DOWN = [-value for value in UP]
NOISE = [9.0 * (-1) ** i for i in range(N)]
MODELS = {None: "first-model", "other": "second-model"}
HYPOTHESES = {
    "up": {"contrast": "B - A", "test": "greater", "needs": []},
    "part": {"contrast": "X - N1", "test": "greater", "needs": ["up"]},
    "below": {"contrast": "X - N1", "test": "greater", "needs": ["part"]},
    "same": {"contrast": "N1 - A", "test": "equivalent", "margin": {"value": 0.5}, "needs": []},
    "rival": {"contrast": "N2 - A", "test": "greater", "needs": []},
    "swap": {"contrast": "C - A", "test": "greater", "needs": []},
    "elsewhere": {"contrast": "X - A", "test": "greater", "needs": [], "phase": "2"},
}


@pytest.fixture
def answer(make_protocol: Make, make_trials: Make) -> Callable[..., AnsweredRow]:
    """The answer to one row of a plan. scores: condition -> values; those that are not given are flat."""

    def answered(row: dict[str, Any], scores: dict[str, list[float]]) -> AnsweredRow:
        protocol: Protocol = make_protocol(
            *({"id": name, "claim": f"{name} holds", "readout": "recursive_score", "family": name, **h}
              for name, h in HYPOTHESES.items()),
            plan=[{"kind": "prediction", "claim": "it holds", **row}],
            models={"other": "another"},
            phases={
                "1": {"question": "?", "n": N, "conditions": ["A", "B", "C", "D", "N1", "N2", "X"]},
                "2": {"question": "?", "n": N, "conditions": ["A", "X"], "model": "other"},
            },
        )  # fmt: skip
        flat = dict.fromkeys(("A", "B", "C", "N1", "N2", "X"), FLAT)
        trials = make_trials({**flat, **scores}).rename(columns={"score": "recursive_score"})
        found = plan_table(protocol, json.loads(verdicts_json(verdicts(protocol, trials))), MODELS)
        return found[0]

    return answered


def test_one_supported_hypothesis_supports_its_row_with_its_numbers(answer: Make):
    row = answer({"hypotheses": ["up"], "expected": "+3.6, n = 100"}, {"B": UP})
    assert (row.verdict, row.expected) == ("supported", "+3.6, n = 100")
    (f,) = row.findings
    assert (f.estimate, f.unit, f.n, f.model) == (pytest.approx(1.145), "hits per 100 words", N, "first-model")
    assert f.ci_low is not None and f.ci_high is not None and f.ci_low < 1.145 < f.ci_high
    assert row.answer == (
        f"It holds: B - A in recursive_score is 1.15 hits per 100 words on average "
        f"(95% interval {f.ci_low:.3g} to {f.ci_high:.3g}, n = 30, first-model)."
    )


def test_an_effect_on_the_other_side_contradicts_the_row(answer: Make):
    row = answer({"hypotheses": ["up"]}, {"B": DOWN})
    assert row.verdict == "contradicted" and row.answer.startswith("The data speak against it: B - A in")


def test_noise_leaves_the_row_inconclusive(answer: Make):
    row = answer({"hypotheses": ["up"]}, {"B": NOISE})
    assert row.verdict == "inconclusive" and row.answer.startswith("The data decide neither way: ")


def test_an_equivalence_that_was_claimed_is_equivalent(answer: Make):
    row = answer({"hypotheses": ["same"]}, {"N1": NEAR})
    assert row.verdict == "equivalent" and "90% interval" in row.answer


def test_a_row_that_cannot_be_read_names_the_prerequisite_at_the_bottom_and_its_numbers(answer: Make):
    row = answer({"hypotheses": ["below"]}, {"B": NOISE, "X": UP})
    assert row.verdict == "not interpretable"
    assert row.findings[0].lacks == "the prerequisite up is inconclusive"
    assert row.answer.startswith(
        "It can't be interpreted, since the prerequisite up is inconclusive; measured all the same"
    )
    assert "1.15 hits per 100 words" in row.answer and "n = 30" in row.answer


def test_what_several_hypotheses_lack_alike_is_said_once(answer: Make):
    row = answer({"hypotheses": ["part", "below"]}, {"B": NOISE, "X": UP})
    assert row.answer.count("since the prerequisite up is inconclusive") == 1
    assert row.answer.startswith("Not interpretable, since the prerequisite up is inconclusive: part (1.15 hits")


def test_a_row_without_a_number_says_which_one_is_missing(answer: Make):
    row = answer({"hypotheses": ["elsewhere"]}, {})
    assert (row.verdict, row.findings[0].estimate) == ("not measured", None)
    assert row.answer == "It was not measured: no pair was measured for X - A in recursive_score (phase 2)."
    assert answer({"hypotheses": []}, {}).answer == "This protocol has no hypothesis on it."


def test_a_row_that_holds_by_construction_is_tautological_only_where_it_stands_alone(answer: Make):
    assert answer({"hypotheses": ["swap"]}, {"C": UP}).verdict == "tautological"
    beside = answer({"hypotheses": ["swap", "part"]}, {"B": UP, "C": UP, "X": UP})
    assert beside.verdict == "supported" and "true by construction, so no evidence: swap" in beside.answer


def test_a_supported_rival_contradicts_and_another_one_does_not(answer: Make):
    row = {"hypotheses": ["up"], "rivals": ["rival"]}
    lost = answer(row, {"B": UP, "N2": UP})
    assert lost.verdict == "contradicted" and "the data bear out the rival rival" in lost.answer
    assert answer(row, {"B": UP, "N2": DOWN}).verdict == "supported"


def test_what_one_of_several_lacks_leaves_the_row_partly_supported_and_is_named(answer: Make):
    row = answer({"hypotheses": ["up", "elsewhere"]}, {"B": UP})
    assert row.verdict == "partly supported"
    assert "not measured: elsewhere (no pair was measured for X - A in recursive_score (phase 2))" in row.answer


def test_a_question_is_answered_as_far_as_its_hypotheses_are_decided(answer: Make):
    question = {"kind": "question", "hypotheses": ["up", "part"], "unknown": "why"}
    found = answer(question, {"B": UP, "X": DOWN})
    assert (found.verdict, found.unknown) == ("answered", "why")
    assert "The data speak against \u201cpart holds\u201d" in found.answer
    assert "the data bear out \u201cup holds\u201d" in found.answer
    assert answer(question, {"B": UP, "X": NOISE}).verdict == "partly answered"
    assert answer(question, {"B": NOISE}).verdict == "not answered"


STATUSES = ("passed", "contradicted", "undecided", "unreadable", "unmeasured", "circular")
WEAKER = {
    "passed": "supported", "undecided": "inconclusive", "unreadable": "not interpretable",
    "unmeasured": "not measured", "circular": "tautological",
}  # fmt: skip


def test_the_rule_holds_of_every_pair_of_hypotheses(answer: Make):
    one = answer({"hypotheses": ["up"]}, {"B": UP}).findings[0]
    for pair in itertools.product(STATUSES, repeat=2):
        word = row_verdict("criterion", [one.model_copy(update={"status": status}) for status in pair])
        decide = set(pair) - {"circular"}
        if "contradicted" in decide:
            assert word == "contradicted", pair
        elif len(decide) < 2:
            assert word == WEAKER[decide.pop() if decide else "circular"], pair
        elif "passed" in decide:
            assert word == "partly supported", pair
        else:
            assert word == WEAKER[min(decide, key=STATUSES.index)], pair


def test_an_effect_shown_to_be_none_contradicts_a_claim_of_one(answer: Make, make_protocol: Make):
    protocol: Protocol = make_protocol({"id": "up", "contrast": "B - A", "test": "greater", "needs": []}, plan=[
        {"kind": "criterion", "claim": "B >> A", "hypotheses": ["up"]}
    ])  # fmt: skip
    for word, verdict in (
        ("equivalent", "contradicted"),
        ("contradicted", "contradicted"),
        ("a new word", "inconclusive"),
    ):
        (row,) = plan_table(protocol, [{"id": "up", "verdict": word, "n": 9, "estimate": 0.01}], {})
        assert row.verdict == verdict


@pytest.mark.parametrize(
    "entry",
    [{}, {"verdict": 3, "n": "many"}, {"verdict": "supported", "n": 8, "estimate": "<b>", "ci_low": float("nan")}],
)
def test_an_entry_that_lacks_numbers_makes_a_row_without_them(make_protocol: Make, entry: dict[str, Any]):
    protocol: Protocol = make_protocol(
        {"id": "up", "contrast": "B - A", "test": "greater", "needs": [], "criterion": "B >> A"}
    )
    (row,) = plan_table(protocol, [{"id": "up", **entry}], {})
    assert row.findings[0].estimate is None and row.findings[0].measured is None


def test_what_the_plan_expected_stands_in_every_verdict(make_protocol: Make, make_trials: Make):
    given = [{"id": name, "contrast": "B - A", "test": "greater", "needs": [], "family": name} for name in ("a", "b")]
    plan = [{"kind": "premise", "claim": "it rises", "expected": "a rise", "hypotheses": ["b"]}]
    trials = make_trials({"A": FLAT, "B": UP})
    with_plan, without = make_protocol(*given, plan=plan), make_protocol(*given)
    told = json.loads(verdicts_json(verdicts(with_plan, trials)))
    assert [entry["expected"] for entry in told] == [None, "a rise"]
    plain = json.loads(verdicts_json(verdicts(without, trials)))
    assert [{**entry, "expected": None} for entry in told] == plain
