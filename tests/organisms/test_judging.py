"""What was found is held against what was planted: places, coverage, false positives, power."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kvpatch.organisms.directories import WEIGHTS
from kvpatch.protocols.load import load_protocol
from kvpatch.specs.organisms import ORGANISMS
from kvpatch.store.validation import Finding
from kvpatch.validation import judging
from kvpatch.validation.jobs import Job, Reading
from kvpatch.validation.pipeline import FULL, QUICK, jobs_of
from kvpatch.validation.recovery import Found, Place
from kvpatch.verdicts.decide import Verdict

JOB = Job("locate", "early", 0, 8, "")


def place(kind: str, index: int, carries: bool, low: float, high: float) -> Place:
    return Place(kind=kind, index=index, carries=carries, fraction=(low + high) / 2, low=low, high=high)


def located(low: float, high: float, truth: float) -> Reading:
    return Reading(JOB, [], {"places": [{**place("layer", 0, True, low, high).model_dump(), "truth": truth}]})


def held(over: judging.OverAll) -> dict[str, bool]:
    return {finding.asked: finding.holds for finding in over.findings}


def test_a_place_too_many_or_too_few_does_not_hold():
    found = Found(places=[place("layer", 1, True, 0.9, 1.1), place("layer", 2, False, -0.1, 0.1)])
    assert judging.place_finding("early", "layer", [1], found, "locate").holds
    assert not judging.place_finding("early", "layer", [1, 2], found, "locate").holds
    assert not judging.place_finding("early", "layer", [], found, "locate").holds


def test_intervals_must_cover_the_truth_as_often_as_they_say():
    protocol = load_protocol("validate")
    good = [located(0.9, 1.1, 1.0)] * 20 + [located(-0.1, 0.1, 0.0)] * 20
    assert all(held(judging.over_all(good, protocol)).values())
    narrow = [located(0.5, 0.7, 1.0)] * 20 + [located(-0.1, 0.1, 0.0)] * 20
    assert held(judging.over_all(narrow, protocol)) == {
        "transfer fraction on the plant": False,
        "transfer fraction off the plant": True,
    }


def null_run(p: float, verdict: str) -> Reading:
    return Reading(Job("null", "null", 0, 20, ""), [], {"transfer_llr": {"verdict": verdict, "p": p}})


@pytest.mark.parametrize(("rate", "holds"), [(0.0, True), (0.05, True), (0.15, False)])
def test_false_positives_beyond_simulation_error_do_not_hold(rate: float, holds: bool):
    wrong = round(200 * rate)
    runs = [null_run(0.01, "supported")] * wrong + [null_run(0.5, "inconclusive")] * (200 - wrong)
    assert all(held(judging.over_all(runs, load_protocol("validate"))).values()) == holds


def weak_runs(verdicts: list[str], n: int = 32) -> list[Reading]:
    rng = np.random.default_rng(0)
    out = []
    for number, verdict in enumerate(verdicts):
        score = rng.normal(0, 10, (2, n)) + np.array([[0.0], [6.4]])
        rows = [
            {"pair_id": f"{number}:{i}", "phase": "1", "split": "test", "condition": c, "recursive_score": score[k, i],
             "mode_llr": score[k, i], "error": None}
            for k, c in enumerate("AB")
            for i in range(n)
        ]  # fmt: skip
        held_out = [{**row, "split": "calibration", "phase": "calibration"} for row in rows]
        figures = {"verdict": verdict, "rows": pd.DataFrame(rows + held_out), "n": n}
        out.append(Reading(Job("weak", "weak", number, n, ""), [], figures))
    return out


def test_power_that_was_not_predicted_does_not_hold():
    protocol = load_protocol("validate")
    likely = judging.over_all(weak_runs(["supported"] * 5 + ["inconclusive"] * 11), protocol)
    assert [f.holds for f in likely.findings] == [True]
    assert 0.1 < likely.figures["power"]["predicted"] < 0.6
    never = judging.over_all(weak_runs(["supported"] * 16), protocol)
    assert [f.holds for f in never.findings] == [False]


@pytest.mark.parametrize(
    ("word", "high", "contrast", "found"),
    [
        ("supported", 1.9, "X - Y", "slight"),
        ("supported", 2.1, "X - Y", "supported"),
        ("supported", 0.6, "J1 < J2 < J3 < J4 < J5", "supported"),  # 4 steps
        ("supported", 0.4, "J1 < J2 < J3 < J4 < J5", "slight"),
        ("not supported", 0.1, "X - Y", "not supported"),
        ("inconclusive", 0.1, "X - Y", "inconclusive"),
    ],
)
def test_slight_is_supported_but_within_a_fifth_of_the_natural_gap(word, high, contrast, found):
    """Of the gap of the calibration pairs: bounds do not come from the pairs that are tested."""
    rows = pd.DataFrame(
        [
            {"phase": phase, "split": split, "pair_id": f"p{i}", "sample": 0, "condition": c, "mode_llr": value,
             "error": None}
            for phase, split, gap in (("calibration", "calibration", 10.0), ("1", "test", 99.0), ("2", "test", 99.0))
            for i in range(4)
            for c, value in (("A", 1.0), ("B", 1.0 + gap), ("C", 500.0))
        ]
    )  # fmt: skip
    verdict = Verdict.model_construct(
        id="window_8", phase="2", verdict=word, ci_high=high, contrast=contrast, readout="mode_llr", because="-"
    )
    accepting, protocol = {"window_8": "not supported or slight or inconclusive"}, load_protocol("validate")
    (finding,) = judging.verdict_findings("early", [verdict], accepting, protocol, rows)
    assert finding.holds is (found != "supported")
    assert finding.found.split(" (")[0] == found
    (strict,) = judging.verdict_findings("early", [verdict], {"window_8": "supported"}, protocol, rows)
    assert strict.holds is (found == "supported")


def test_seeds_are_told_together_and_the_one_that_failed_is_named():
    good = Finding(organism="early", asked="layers", planted="1", found="1", holds=True)
    bad = good.model_copy(update={"found": "1, 2", "holds": False})
    assert judging.merged([good, good])[0].found == "recovered in 2 of 2"
    (told,) = judging.merged([good, bad])
    assert not told.holds
    assert told.found == "recovered in 1 of 2; once 1, 2"


def test_every_expected_verdict_names_a_hypothesis_once_and_an_organism():
    protocol = load_protocol("validate")
    known = {"supported", "contradicted", "equivalent", "inconclusive", "not interpretable", "tautological", "slight"}
    assert set(protocol.expected) <= set(ORGANISMS)
    for organism, verdicts in protocol.expected.items():
        names = [name for listed in verdicts.values() for name in listed]
        assert len(names) == len(set(names)), organism
        assert all(set(words.split(" or ")) <= known for words in verdicts)
        assert "1" in judging.phases_to_run(protocol, judging.expected_verdicts(protocol, organism))


def test_quick_and_full_ask_every_organism():
    for scope, draws, nulls in ((QUICK, 4, 12), (FULL, 50, 200)):
        jobs = jobs_of(scope, 0, list(ORGANISMS), WEIGHTS)
        assert {job.organism for job in jobs} == set(ORGANISMS)
        assert sum(job.kind == "draw" for job in jobs) == draws
        assert sum(job.kind == "null" for job in jobs) == nulls
        assert len({(job.kind, job.organism, job.seed) for job in jobs}) == len(jobs)
