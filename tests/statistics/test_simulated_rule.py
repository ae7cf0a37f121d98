"""The whole rule on simulated runs: it errs no more often than it says, and more pairs do not blunt it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from test_strongest import ALL, EXISTS, JOINS, asked

from kvpatch.errors import ProtocolError
from kvpatch.protocols.schema import Protocol
from kvpatch.verdicts.families import most_alpha
from kvpatch.verdicts.simulated_rule import Assumptions, simulate_rule, truths

Make = Callable[..., Any]
DRAWS = 200
SCORE = "recursive_score"
TRUE = {"B": 1.5, "M1": 1.5}
HITS = {"B": 0.9, "M1": 0.5}
REST = (
    EXISTS | {"id": "exists_score", "readout": SCORE},
    asked("joined_score", "M1 - M1n", readout=SCORE, needs=["exists_score"]),
    asked("body", "X - N1", family="where"),
    asked("turned", "M1y - M1n", family="where", test="less"),
    asked("null", "N1 - A", family="null", test="equivalent", margin={"natural_gap": 0.2}),
    asked("free", "X - N2", family="free", needs=[]),
)


@pytest.fixture
def protocol(make_protocol: Make) -> Protocol:
    """Four families, of which the primary one passes its alpha on."""
    families = {
        "check": {"alpha": 0.05},
        "primary": {"alpha": 0.05, "passes_to": {"where": 1.0}},
        "where": {"alpha": 0.05},
    }
    phases = {"1": {"question": "?", "n": 20, "conditions": list(ALL)}}
    return make_protocol(EXISTS, *JOINS, *REST, conditions=ALL, phases=phases, families=families, mode="recursive")


def errors_within(protocol: Protocol, assumptions: Assumptions) -> None:
    found = simulate_rule(protocol, assumptions, 20, DRAWS, seed=11)
    for family, alpha in most_alpha(protocol).items():
        most = alpha + 2 * math.sqrt(alpha * (1 - alpha) / DRAWS)
        assert found.false_in[family] / DRAWS <= most, family


@pytest.mark.parametrize(
    "assumptions",
    [
        Assumptions(hits={SCORE: {}}),
        Assumptions(means={"mode_llr": {"B": 1.5}}, hits={SCORE: {"B": 0.9}}),
        Assumptions(means={"mode_llr": TRUE}, hits={SCORE: HITS}),
        Assumptions(means={"mode_llr": {"B": 1.5, "X": 1.5}}),
    ],
    ids=["nothing is true", "the mode exists", "the primary family is true", "a later family is true"],
)
def test_each_family_errs_no_more_often_than_its_alpha(protocol: Protocol, assumptions: Assumptions):
    errors_within(protocol, assumptions)


def test_the_rule_sees_a_strong_transfer_and_more_pairs_do_not_blunt_it(protocol: Protocol):
    assumptions = Assumptions(means={"mode_llr": TRUE}, hits={SCORE: HITS})
    powers = [simulate_rule(protocol, assumptions, n, DRAWS, seed=3).strongest / DRAWS for n in (20, 60)]
    assert powers[0] >= 0.8 and powers[1] >= powers[0]


def test_incoherent_outputs_of_a_condition_stop_the_sentence(protocol: Protocol):
    assumptions = Assumptions(means={"mode_llr": TRUE}, hits={SCORE: HITS}, coherent={"M1": 0.5})
    found = simulate_rule(protocol, assumptions, 20, 40, seed=3)
    assert found.strongest == 0 and found.passed("joined") > 0.8 and found.passed("joined_score") == 0


def test_the_same_seed_gives_the_same_runs_and_chunks_differ(protocol: Protocol):
    assumptions = Assumptions(means={"mode_llr": {"B": 0.6}})
    one, again, other = (simulate_rule(protocol, assumptions, 12, 60, seed=s) for s in (1, 1, 2))
    assert one == again and one.words != other.words
    assert all(sum(of.values()) == 60 for of in one.words.values())


def test_what_is_true_follows_from_the_assumptions(protocol: Protocol):
    found = truths(protocol, Assumptions(means={"mode_llr": TRUE}, hits={SCORE: HITS}))
    true = {"exists", "joined", "matched", "exists_score", "joined_score", "null"}
    assert {name for name, holds in found.items() if holds} == true
    assert not truths(protocol, Assumptions())["null"]  # without a gap no margin is large enough


@pytest.mark.parametrize(
    ("assumptions", "told"),
    [
        (Assumptions(means={"mode_lr": {}}), "no readout 'mode_lr' to assume something of; did you mean 'mode_llr'?"),
        (Assumptions(means={"mode_llr": {"M7": 1.0}}), "no condition 'M7'"),
        (Assumptions(hits={SCORE: {"B": 1.2}}), "a share lies from 0 to 1, got 1.2"),
        (Assumptions(means={"mode_llr": {"B": 1.0, "C": 2.0}}), "B and C are one prompt's text, and can't differ"),
        (Assumptions(means={SCORE: {}}, hits={SCORE: {}}), "is assumed to have means and hits"),
        (Assumptions(correlations={"joined": 1.0}), "a correlation lies between -1 and 1, got 1"),
    ],
)
def test_assumptions_that_can_not_be_are_refused(protocol: Protocol, assumptions: Assumptions, told: str):
    with pytest.raises(ProtocolError, match="^.*" + told.replace("?", r"\?").replace("'", ".")):
        simulate_rule(protocol, assumptions, 10, 4)


def test_a_number_of_draws_below_one_is_refused(protocol: Protocol):
    with pytest.raises(ProtocolError, match="at least 1 pair and 1 draw, got n=0 and draws=5"):
        simulate_rule(protocol, Assumptions(), 0, 5)
