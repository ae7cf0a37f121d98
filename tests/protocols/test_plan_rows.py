"""The rows of an experiment's plan: which hypotheses answer them, and what is told of a wrong one."""

from __future__ import annotations

from typing import Any

import pytest

from kvpatch.errors import ProtocolError
from kvpatch.protocols.load import load_protocol, parse_protocol
from kvpatch.protocols.schema import Protocol

BASE = """
protocol: small
title: Small
question: Does it hold?
conditions:
  A: {about: natural target}
  B: {about: natural source, into: source}
phases:
  "1": {question: "?", n: 10, conditions: [A, B]}
hypotheses:
  - {id: up, claim: it rises, phase: "1", contrast: B - A, readout: mode_llr, test: greater, family: f, needs: [],
     criterion: B >> A}
  - {id: down, claim: it falls, phase: "1", contrast: B - A, readout: mode_llr, test: less, family: f, needs: []}
"""


def parsed(plan: str = "") -> Protocol:
    return parse_protocol(BASE + plan, "small.yaml")


def told(plan: str) -> str:
    with pytest.raises(ProtocolError) as error:
        parsed(plan)
    return str(error.value)


def test_a_row_is_answered_by_what_it_names_and_by_what_names_it():
    plan = 'plan:\n  - {kind: prediction, claim: B >> A, expected: "+3", hypotheses: [down]}\n'
    (row,) = parsed(plan).plan_rows
    assert (row.kind, row.hypotheses) == ("prediction", ["up", "down"])


def test_a_criterion_that_is_no_row_of_the_plan_is_a_row_of_its_own():
    (row,) = parsed().plan_rows
    assert row.model_dump() == {"kind": "criterion", "claim": "B >> A", "hypotheses": ["up"]}
    rows = parsed("plan: [{kind: question, claim: Why?, hypotheses: [up]}, {kind: premise, claim: x}]\n").plan_rows
    assert [(row.kind, row.claim) for row in rows] == [("premise", "x"), ("criterion", "B >> A"), ("question", "Why?")]


def test_what_was_expected_of_a_hypothesis_is_its_own_or_that_of_its_row():
    plan = "plan: [{kind: intervention, claim: a, expected: '+0.40, n = 10', hypotheses: [down], rivals: [up]}]\n"
    protocol = parsed(plan)
    assert [protocol.expected_of(h) for h in protocol.hypotheses] == [None, "+0.40, n = 10"]
    own = parse_protocol((BASE + plan).replace("criterion: B >> A", "expected: a rise"), "small.yaml")
    assert [own.expected_of(h) for h in own.hypotheses] == ["a rise", "+0.40, n = 10"]


@pytest.mark.parametrize("key", ["hypotheses", "rivals"])
def test_a_row_that_names_no_hypothesis_of_the_protocol_is_told_with_its_line(key: str):
    message = told(f"plan:\n  - {{kind: premise, claim: it holds, {key}: [upp]}}\n")
    assert "line 15, plan.0." + key + ".0" in message
    assert "no hypothesis 'upp'" in message and "'up'" in message


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("[{kind: premise, claim: a, hypotheses: [up], rivals: [up]}]", "the row 'a' names hypothesis 'up' twice"),
        ("[{kind: premise, claim: a}, {kind: question, claim: a}]", "the plan has two rows with the claim 'a'"),
        ("[{kind: guess, claim: a}]", "'intervention', 'premise', 'criterion', 'prediction' or 'question'"),
        ("[{kind: premise, claim: ''}]", "plan.0.claim"),
        ("[{kind: premise, claim: a, expects: b}]", "expects"),
    ],
)
def test_other_mistakes_of_a_row_are_told(plan: str, said: str):
    assert said in told(f"plan: {plan}\n")


def test_a_protocol_without_a_plan_keeps_its_hash():
    content: dict[str, Any] = parsed().model_dump(mode="json", by_alias=True)
    assert "plan" not in content
    assert all("expected" not in h for h in content["hypotheses"])


def test_dec7_has_the_plan_and_says_what_stays_unknown_of_each_question():
    rows = load_protocol("dec7").plan_rows
    criteria = [row.claim for row in rows if row.kind == "criterion"]
    assert criteria == [
        "C >> A", "D << B", "L0-8 > L24-32", "first 25% > last 25%", "R_V(C) = R_V(B)",
        "the other architecture repeats it",
    ]  # fmt: skip
    assert {"E = F = A", "L1 weakest .. L5 strongest"} <= {row.claim for row in rows if row.kind == "prediction"}
    questions = [row for row in rows if row.kind == "question"]
    assert len(questions) == 4 and all(row.unknown and row.hypotheses for row in questions)
    assert all(row.expected for row in rows if row.kind != "question")
    assert all(row.hypotheses for row in rows)
