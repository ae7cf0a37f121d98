"""A hypothesis that names what it needs waits for that alone, and no ladder of gates applies to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from kvpatch.protocols.load import load_protocol
from kvpatch.protocols.schema import Protocol
from kvpatch.verdicts.decide import Verdict, headline, verdicts, verdicts_json
from kvpatch.verdicts.prerequisites import all_needed, decision_order, gate_states, prerequisites

Make = Callable[..., Any]
SLOTS = "(n = 30; the body's slots, all layers)"
N = 30
FLAT = [0.0] * N
UP = [1 + i / 100 for i in range(N)]
DOWN = [-value for value in UP]
NEAR = [(-1) ** i / 1000 for i in range(N)]
NOISE = [9.0 * (-1) ** i for i in range(N)]
SCORE, LLR = "recursive_score", "mode_llr"


def asked(name: str, contrast: str, readout: str, needs: list[str] | None, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "contrast": contrast,
        "test": "greater",
        "readout": readout,
        "family": name,
        "needs": needs,
    } | more


TWO_READOUTS = (
    # The part stands first: what it waits for is decided before it all the same.
    asked("part_score", "X - N2", SCORE, ["exists_score", "moves_score"]),
    asked("moves_score", "X - N1", SCORE, ["exists_score"], family="primary"),
    asked("exists_score", "B - A", SCORE, []),
    asked("part_llr", "X - N2", LLR, ["exists_llr", "moves_llr"]),
    asked("moves_llr", "X - N1", LLR, ["exists_llr"], family="primary"),
    asked("exists_llr", "B - A", LLR, []),
)
RUNS_WELL = {"A": FLAT, "B": UP, "X": UP, "N1": NEAR, "N2": FLAT}


@pytest.fixture
def decide(make_protocol: Make, make_trials: Make) -> Callable[..., tuple[Protocol, dict[str, Verdict]]]:
    """Verdicts of two readouts whose scores differ: those of the likelihood are `RUNS_WELL` where not given."""

    def decided(score: dict[str, list[float]], llr: dict[str, list[float]] | None = None, **options: Any):
        protocol = make_protocol(*options.pop("hypotheses", TWO_READOUTS))
        trials = make_trials(RUNS_WELL | score).rename(columns={"score": SCORE})
        trials = trials.assign(mode_llr=make_trials(RUNS_WELL | (llr or {}))["score"])
        return protocol, {v.id: v for v in verdicts(protocol, trials, **options)}

    return decided


def words(found: dict[str, Verdict]) -> dict[str, str]:
    return {name: v.verdict for name, v in found.items()}


def test_a_mode_that_one_readout_does_not_show_does_not_stop_the_other(decide: Make):
    _, found = decide({"B": NOISE})
    assert words(found) == {
        "part_score": "not interpretable",
        "moves_score": "not interpretable",
        "exists_score": "inconclusive",
        "part_llr": "supported",
        "moves_llr": "supported",
        "exists_llr": "supported",
    }


def test_what_is_missing_is_named_with_its_verdict_and_the_numbers_are_told_all_the_same(decide: Make):
    _, found = decide({"B": NOISE})
    v = found["moves_score"]
    assert (v.blocked_by, v.needs, v.missing) == ("prerequisite", ["exists_score"], "exists_score")
    assert (v.n, v.estimate) == (N, pytest.approx(1.145, abs=0.01))
    assert v.ci_low is not None and v.ci_high is not None and v.p is not None
    assert "exists_score is inconclusive (B - A in recursive_score is 0" in v.because
    assert v.because.startswith("X - N1 in recursive_score is 1.1") and "over 30 pairs (95% interval" in v.because
    part = found["part_score"]
    assert part.missing == "exists_score" and "moves_score is not interpretable" in part.because
    assert "and moves_score is not interpretable for want of exists_score." in part.because


def test_the_new_keys_stand_in_verdicts_json_of_every_hypothesis(decide: Make, make_protocol: Make, make_trials: Make):
    _, found = decide({})
    told = {entry["id"]: entry for entry in json.loads(verdicts_json(list(found.values())))}
    assert told["part_llr"]["needs"] == ["exists_llr", "moves_llr"] and told["part_llr"]["missing"] is None
    with_gates = make_protocol({"id": "h", "contrast": "B - A", "test": "greater"})
    entry = json.loads(verdicts_json(verdicts(with_gates, make_trials({"A": FLAT, "B": UP}))))[0]
    assert (entry["needs"], entry["missing"]) == ([], None)


def test_an_equivalent_and_a_tautological_prerequisite_have_passed(decide: Make):
    hypotheses = (
        asked("inert", "N1 - A", SCORE, [], test="equivalent", margin={"value": 0.5}),
        asked("swap", "C - A", SCORE, []),
        asked("after", "X - N1", SCORE, ["inert", "swap"]),
    )
    _, found = decide({"C": UP}, {"C": UP}, hypotheses=hypotheses)
    assert words(found) == {"inert": "equivalent", "swap": "tautological", "after": "supported"}


def test_a_prerequisite_that_was_not_run_has_not_passed(decide: Make):
    _, found = decide({}, hypotheses=(asked("never", "D - N1", SCORE, []), asked("after", "X - N1", SCORE, ["never"])))
    assert words(found) == {"never": "inconclusive", "after": "not interpretable"}
    assert "never is inconclusive (Nothing was measured for D - N1" in found["after"].because


def test_gates_do_not_apply_to_what_names_its_needs_and_still_do_to_the_rest(decide: Make):
    hypotheses = (
        {"id": "keeper", "contrast": "B - A", "test": "greater", "readout": SCORE, "is_gatekeeper": True},
        {"id": "behind", "contrast": "X - N1", "test": "greater", "readout": SCORE, "gate": 4, "family": "b"},
        asked("free", "X - N1", SCORE, [], gate=4),
        asked("waits", "X - N1", SCORE, ["behind"], gate=1),
    )
    protocol, found = decide({"B": DOWN}, hypotheses=hypotheses)
    assert {name: (v.verdict, v.blocked_by) for name, v in found.items()} == {
        "keeper": ("not supported", None),
        "behind": ("not interpretable", "gate"),
        "free": ("supported", None),
        "waits": ("not interpretable", "prerequisite"),
    }
    assert gate_states(protocol, words(found)) == {1: "closed", 4: "no gatekeeper"}


def test_an_instrument_that_failed_comes_before_what_is_needed(decide: Make):
    _, found = decide({"B": NOISE}, instrument_ok=False)
    assert {v.blocked_by for v in found.values()} == {"instrument"}


def test_each_is_decided_after_all_that_it_needs(make_protocol: Make):
    for protocol in (make_protocol(*TWO_READOUTS), load_protocol("dec7"), load_protocol("validate")):
        order = [h.id for h in decision_order(protocol)]
        assert sorted(order) == sorted(h.id for h in protocol.hypotheses)
        for h in protocol.hypotheses:
            assert all(order.index(name) < order.index(h.id) for name in h.needs or ())


def test_a_protocol_of_gates_is_decided_by_gate(make_protocol: Make):
    gates = {"late": 3, "first": 1, "between": 2, "also_first": 1}
    protocol = make_protocol(*({"id": i, "contrast": "B - A", "test": "greater", "gate": g} for i, g in gates.items()))
    assert [h.id for h in decision_order(protocol)] == ["first", "also_first", "between", "late"]


def test_what_others_need_is_listed_with_those_that_need_it(make_protocol: Make):
    protocol = make_protocol(*TWO_READOUTS)
    assert prerequisites(protocol) == {
        "moves_score": ["part_score"],
        "exists_score": ["part_score", "moves_score"],
        "moves_llr": ["part_llr"],
        "exists_llr": ["part_llr", "moves_llr"],
    }
    assert all_needed(protocol.hypotheses, ["part_llr"]) == {"exists_llr", "moves_llr"}


# dec7


READOUTS = {"likelihood": {LLR}, "score": {SCORE, "recursive_score_masked"}}


def test_no_hypothesis_of_dec7_waits_for_another_readout():
    """Of those that read one readout; a correlation of two may wait for either."""
    dec7 = load_protocol("dec7")
    kind_of = {name: kind for kind, names in READOUTS.items() for name in names}
    for h in dec7.hypotheses:
        own = {kind_of.get(x, x) for x in (h.readout, *(v.readout for v, _ in h.others()))}
        for name in all_needed(dec7.hypotheses, [h.id]):
            needed = dec7.hypothesis(name).readout
            assert kind_of.get(needed, needed) in own, (h.id, name)


def test_every_hypothesis_of_dec7_names_what_it_needs():
    dec7 = load_protocol("dec7")
    assert all(h.needs is not None and not h.is_gatekeeper for h in dec7.hypotheses)
    for h in dec7.hypotheses:
        is_first = "mode_exists" in h.id
        if h.readout == LLR and not is_first:
            wanted = "second_mode_exists" if h.phase == "7" else "mode_exists_llr"
            assert wanted in all_needed(dec7.hypotheses, [h.id]), h.id
        if h.readout in READOUTS["score"] and not is_first:
            wanted = "second_mode_exists_score" if h.phase == "7" else "mode_exists_score"
            assert wanted in all_needed(dec7.hypotheses, [h.id]), h.id


# The one-sentence answer


def test_every_primary_hypothesis_that_passed_gives_the_strongest_sentence(decide: Make):
    protocol, found = decide({})
    assert headline(protocol, list(found.values())) == (
        "Information sufficient for recursive-style output can be read from these cache slots. "
        f"It rests on X - N1 in recursive_score {SLOTS}, and on X - N1 in mode_llr {SLOTS}."
    )


@pytest.mark.parametrize("one", [SCORE, LLR])
def test_what_passed_in_one_readout_is_told_where_the_mode_is_not_seen_in_the_other(decide: Make, one: str):
    protocol, found = decide({"B": NOISE}) if one == LLR else decide({}, {"B": NOISE})
    other = "score" if one == LLR else "llr"
    assert headline(protocol, list(found.values())) == (
        f"In {one} alone, recursive mode was seen to move with the cache. It rests on X - N1 {SLOTS}. "
        f"moves_{other} can't be read (exists_{other}: inconclusive)."
    )


def test_what_did_not_pass_is_not_told_to_have_passed_for_want_of_the_other(decide: Make):
    protocol, found = decide({"B": NOISE}, {"X": DOWN})
    assert headline(protocol, list(found.values())) == (
        "In this model recursive mode was not seen to move with the cache. The data speak against it "
        "(moves_llr: not supported). moves_score can't be read (exists_score: inconclusive)."
    )


def test_a_mode_that_no_readout_shows_leaves_nothing_to_tell_of_transfer(decide: Make):
    protocol, found = decide({"B": DOWN}, {"B": DOWN})
    assert headline(protocol, list(found.values())) == (
        "This model does not show recursive mode under these prompts (exists_score: not supported, exists_llr: "
        "not supported). So nothing about transfer was or could be shown."
    )


def test_outputs_that_are_not_coherent_stop_the_readouts_of_text_alone(make_protocol: Make, make_trials: Make):
    protocol = make_protocol(*TWO_READOUTS)
    trials = make_trials(RUNS_WELL, incoherent={"X": 0.5}).rename(columns={"score": SCORE})
    found = verdicts(protocol, trials.assign(mode_llr=trials[SCORE]))
    assert headline(protocol, found) == (
        f"In mode_llr alone, recursive mode was seen to move with the cache. It rests on X - N1 {SLOTS}. "
        "moves_score can't be read (outputs that are not coherent)."
    )


def test_controls_of_a_protocol_with_needs_are_the_family_of_nulls(decide: Make):
    null = asked("null", "N1 - A", SCORE, ["exists_score"], test="equivalent", margin={"value": 0.3}, family="nulls")
    lifted = {"N1": [0.5 + i / 1000 for i in range(N)], "X": [2 + v for v in UP]}
    protocol, found = decide(lifted, hypotheses=(*TWO_READOUTS, null))
    assert headline(protocol, list(found.values())).endswith(
        " 1 of 1 control caches was not shown to leave the target as it is."
    )


def test_the_order_of_the_hypotheses_changes_no_verdict(decide: Make):
    _, found = decide({"B": NOISE})
    _, turned = decide({"B": NOISE}, hypotheses=TWO_READOUTS[::-1])
    # Deviations name the hypotheses that they concern in the order of the protocol.
    blank = {"deviations": []}
    assert {name: v.model_copy(update=blank) for name, v in found.items()} == {
        name: turned[name].model_copy(update=blank) for name in found
    }
