"""A protocol that buys significance says so: where, in whose verdicts, and how often the whole may err."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from kvpatch.verdicts.attainable import planned_pairs, smallest_adjusted_p
from kvpatch.verdicts.decide import verdicts, verdicts_json
from kvpatch.verdicts.deviations import deviations, error_statement, experiment_error

Make = Callable[..., Any]
MODE = {"readout": "mode_llr", "family": "primary", "needs": [], "margin": {"value": 0.1}}
CLAIM = {"id": "h", "contrast": "C - N1", "test": "much_greater", **MODE}


def kinds(protocol: Any, n: int | None = None) -> dict[str, list[str]]:
    """Kind of deviation -> the hypotheses that it concerns."""
    found: dict[str, list[str]] = {}
    for d in deviations(protocol, planned_pairs(protocol, n)):
        found.setdefault(d.kind, []).extend(d.hypotheses)
    return found


def without_gate(make_protocol: Make, *hypotheses: dict[str, Any], **fields: Any) -> Any:
    return make_protocol(*({"gate": 1, **h} for h in hypotheses), **fields)


def test_a_protocol_that_keeps_to_the_rules_has_none(make_protocol: Make):
    assert kinds(without_gate(make_protocol, CLAIM), 20) == {}


@pytest.mark.parametrize(
    "again",
    [
        {"contrast": "C - N1", "test": "greater"},
        {"contrast": "N1 - C", "test": "less"},
        {"contrast": "C - N1", "test": "less"},
        {"contrast": "-N1 + C", "test": "much_less"},
    ],
)
def test_one_contrast_and_readout_in_several_families(make_protocol: Make, again: dict[str, str]):
    protocol = without_gate(make_protocol, CLAIM, {**CLAIM, "id": "again", "family": "other", **again})
    assert kinds(protocol, 20) == {"several families": ["h", "again"]}
    told = deviations(protocol, {})[0].told
    assert told.startswith("C - N1 in mode_llr is tested by h and again in the families primary and other;")


@pytest.mark.parametrize(
    "other",
    [
        {"family": "primary"},
        {"family": "other", "readout": "recursive_score"},
        {"family": "other", "contrast": "C - A"},
        {"family": "other", "test": "equivalent"},
        {"family": "other", "confirmatory": False},
    ],
)
def test_what_is_no_second_chance_of_the_same_claim_is_not_told(make_protocol: Make, other: dict[str, Any]):
    assert "several families" not in kinds(without_gate(make_protocol, CLAIM, {**CLAIM, "id": "other", **other}), 20)


def test_alphas_corrections_readouts_and_margins(make_protocol: Make):
    protocol = without_gate(
        make_protocol,
        {**CLAIM, "id": "loose", "alpha": 0.1, "family": "a"},
        {**CLAIM, "id": "shares", "contrast": "C - A", "family": "b"},
        {**CLAIM, "id": "looks", "contrast": "B - A", "family": "b", "confirmatory": False},
        {**CLAIM, "id": "long", "contrast": "C - N1", "readout": "n_tokens"},
        {**CLAIM, "id": "any", "contrast": "N1 - A", "test": "greater", "margin": None},
        {**CLAIM, "id": "rises", "contrast": "A < N1 < C", "test": "trend", "margin": None, "family": "dose"},
        corrections={"b": "benjamini_hochberg"},
    )
    assert kinds(protocol, 20) == {
        "alpha": ["loose"],
        "correction": ["shares"],
        "readout": ["long"],
        "margin": ["any"],
        "bound": ["rises"],
    }


@pytest.mark.parametrize(
    ("n", "size", "correction", "passes"),
    [
        (8, 1, "holm", True),
        (8, 2, "holm", True),
        (8, 3, "holm", False),
        (8, 9, "benjamini_hochberg", True),
        (6, 1, "holm", False),
    ],
)
def test_a_hypothesis_that_no_data_of_so_many_pairs_pass(
    make_protocol: Make, n: int, size: int, correction: str, passes: bool
):
    """Two to the power of minus n, times the size of the family where Holm corrects it, against alpha .01."""
    own = {**CLAIM, "alpha": 0.01, "confirmatory": False}
    protocol = without_gate(
        make_protocol, *({**own, "id": f"h{i}"} for i in range(size)), corrections={"primary": correction}
    )
    assert ("pairs" not in kinds(protocol, n)) == passes
    times = size if correction == "holm" else 1
    assert smallest_adjusted_p(protocol, planned_pairs(protocol, n))["h0"] == pytest.approx(2.0**-n * times)


def test_the_smallest_p_is_reached_by_data_that_could_not_be_clearer(make_protocol: Make, make_trials: Make):
    """No measured p may lie below what is called the smallest."""
    asked = [
        {**CLAIM, "id": f"h{i}", "contrast": c, "alpha": 0.01} for i, c in enumerate(("C - N1", "B - N1", "B - A"))
    ]
    protocol = without_gate(make_protocol, *({**h, "readout": "score"} for h in asked))
    high, low = [5.0 + 0.1 * i for i in range(8)], [0.01 * i for i in range(8)]
    found = verdicts(protocol, make_trials({"A": low, "N1": low, "B": high, "C": high}))
    for v in found:
        assert v.p_adjusted == v.smallest_p_adjusted == pytest.approx(3 * 2.0**-8)
        assert v.verdict == "inconclusive"
        assert v.deviations[-1].startswith("n=8: h0, h1 and h2 can't pass, whatever the data say")


def test_the_experiments_error_is_the_sum_over_families_that_claim_something(make_protocol: Make):
    protocol = without_gate(
        make_protocol,
        {**CLAIM, "alpha": 0.001},
        {**CLAIM, "id": "b", "contrast": "C - A", "family": "b", "alpha": 0.01},
        {**CLAIM, "id": "c", "contrast": "B - A", "family": "c", "confirmatory": False},
    )
    assert experiment_error(protocol) == pytest.approx(0.011)
    assert error_statement(protocol) == (
        "Over 2 confirmatory hypotheses in 2 families, the chance of any false claim is at most 0.011, the sum of the "
        "families' alphas (0.001 and 0.01); within a family it is at most its alpha. 1 exploratory hypothesis is no "
        "part of that."
    )


def test_what_bounds_no_false_claim_is_said_to_bound_none(make_protocol: Make):
    many = [{**CLAIM, "id": f"h{i}", "family": f"f{i}"} for i in range(20)]
    assert experiment_error(without_gate(make_protocol, *many)) is None
    assert "nothing bounds the chance of a false claim below 1: the families' alphas sum to 1" in error_statement(
        without_gate(make_protocol, *many)
    )
    shares = without_gate(make_protocol, CLAIM, corrections={"primary": "benjamini_hochberg"})
    assert experiment_error(shares) is None
    assert "Benjamini-Hochberg gives primary no bound on it" in error_statement(shares)
    looks = without_gate(make_protocol, {**CLAIM, "confirmatory": False})
    assert error_statement(looks).startswith("Every hypothesis is exploratory")


def test_verdicts_json_stays_one_entry_per_hypothesis(make_protocol: Make, make_trials: Make):
    protocol = without_gate(make_protocol, {**CLAIM, "readout": "score", "alpha": 0.2})
    found = json.loads(verdicts_json(verdicts(protocol, make_trials({"C": [1.0, 2.0, 1.5], "N1": [0.0, 0.1, 0.2]}))))
    assert [entry["id"] for entry in found] == ["h"]
    assert found[0]["deviations"] == ["h has an alpha of 0.2, above 0.05."]
    assert (found[0]["family_error"], found[0]["experiment_error"]) == (0.2, 0.2)
    assert found[0]["smallest_p_adjusted"] == 0.125
