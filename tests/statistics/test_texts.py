"""Whether a contrast compares texts or caches is decided from what the caches equal, and not from their spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from kvpatch.verdicts.decide import Verdict, headline, verdicts

Make = Callable[..., Any]
N = 30
EQUALS = {"A": "target", "B": "source", "C": "source", "D": "target", "N1": "foreign", "N2": "neutral", "X": None}


def trials_of(make_trials: Make, equals: dict[str, str | None], n: int = N) -> pd.DataFrame:
    scores = {name: [i / 100 + (name in "BCX") for i in range(n)] for name in equals}
    trials = make_trials(scores)
    trials["equals_text"] = trials["condition"].map(equals).astype(object)
    return trials.assign(recursive_score=trials["score"], n_tokens=trials["score"])


def verdict_of(make_protocol: Make, make_trials: Make, contrast: str, **equals: str | None) -> Verdict:
    protocol = make_protocol({"id": "h", "contrast": contrast, "test": "greater"})
    return verdicts(protocol, trials_of(make_trials, EQUALS | equals))[0]


@pytest.mark.parametrize(
    ("contrast", "evidence", "word"),
    [
        ("B - A", "text", "supported"),
        ("C - N1", "text", "supported"),
        ("C - A", "text", "tautological"),
        ("C - B", "text", "tautological"),
        ("X - N1", "cache", "supported"),
        ("X - A", "cache", "supported"),
        ("N1 - X", "cache", "not supported"),
    ],
)
def test_a_contrast_is_of_texts_where_every_condition_equals_one(
    make_protocol: Make, make_trials: Make, contrast: str, evidence: str, word: str
):
    v = verdict_of(make_protocol, make_trials, contrast)
    assert (v.evidence, v.evidence_from, v.verdict) == (evidence, "caches", word)


@pytest.mark.parametrize(("contrast", "word"), [("X - A", "tautological"), ("X - N1", "supported")])
def test_an_equivalent_spelling_of_a_full_swap_is_a_text(
    make_protocol: Make, make_trials: Make, contrast: str, word: str
):
    """X is spelled as a patch of the body; the trials say that its cache is the source's."""
    v = verdict_of(make_protocol, make_trials, contrast, X="source")
    assert (v.evidence, v.verdict) == ("text", word)
    assert "X is the source's text" in v.because
    assert ("manipulation check" in v.because) == (word == "supported")


def test_two_spellings_of_one_foreign_text_are_the_same_text(make_protocol: Make, make_trials: Make):
    v = verdict_of(make_protocol, make_trials, "X - N1", X="foreign")
    assert v.verdict == "tautological"
    assert "compares a text with itself" in v.because
    assert "X is the foreign prompt's text and N1 is the foreign prompt's text" in v.because


def test_what_is_spelled_as_a_full_swap_and_equals_no_text_is_evidence(make_protocol: Make, make_trials: Make):
    v = verdict_of(make_protocol, make_trials, "C - A", C=None)
    assert (v.evidence, v.verdict) == ("cache", "supported")


@pytest.mark.parametrize(("unlike", "evidence"), [(3, "text"), (4, "cache")])
def test_nearly_all_trials_must_equal_the_text(make_protocol: Make, make_trials: Make, unlike: int, evidence: str):
    trials = trials_of(make_trials, EQUALS)
    of_swap = trials.index[trials["condition"] == "N1"][:unlike]
    trials.loc[of_swap, "equals_text"] = None
    v = verdicts(make_protocol({"id": "h", "contrast": "C - N1", "test": "greater"}), trials)[0]
    assert v.evidence == evidence


def test_trials_that_failed_say_nothing(make_protocol: Make, make_trials: Make):
    trials = trials_of(make_trials, EQUALS)
    failed = trials.index[trials["condition"] == "N1"][:10]
    trials.loc[failed, "equals_text"] = None
    trials.loc[failed, "error"] = "boom"
    v = verdicts(make_protocol({"id": "h", "contrast": "C - N1", "test": "greater"}), trials)[0]
    assert v.evidence == "text"


@pytest.mark.parametrize("is_stored", [True, False], ids=["all null", "no column"])
def test_runs_that_did_not_store_it_are_decided_by_the_spelling_and_say_so(
    make_protocol: Make, make_trials: Make, is_stored: bool
):
    trials = trials_of(make_trials, dict.fromkeys(EQUALS))
    trials = trials if is_stored else trials.drop(columns="equals_text")
    protocol = make_protocol(
        {"id": "h", "contrast": "C - N1", "test": "greater"}, {"id": "x", "contrast": "X - N1", "test": "greater"}
    )
    found = [(v.evidence, v.evidence_from) for v in verdicts(protocol, trials)]
    assert found == [("text", "spelling"), ("cache", "spelling")]


@pytest.mark.parametrize(
    ("primary", "n", "is_strongest"),
    [
        ({"contrast": "X - N1", "readout": "recursive_score", "test": "greater"}, N, True),
        ({"contrast": "X - N1", "readout": "recursive_score", "test": "greater"}, 5, False),
        ({"contrast": "C - N1", "readout": "recursive_score", "test": "greater"}, N, False),
        ({"contrast": "X - N1", "readout": "n_tokens", "test": "greater"}, N, False),
        (
            {"contrast": "N1 - N2", "readout": "recursive_score", "test": "equivalent", "margin": {"value": 0.5}},
            N,
            False,
        ),
        (
            {"contrast": "X - C", "readout": "recursive_score", "test": "equivalent", "margin": {"value": 0.5}},
            N,
            False,
        ),
    ],
    ids=["a cache", "five pairs", "texts", "length", "an equivalence of texts", "an equivalence"],
)
def test_the_strongest_sentence_never_rests_on_less(
    make_protocol: Make, make_trials: Make, primary: dict[str, Any], n: int, is_strongest: bool
):
    protocol = make_protocol(
        {"id": "exists", "contrast": "B - A", "test": "greater", "is_gatekeeper": True, "readout": "recursive_score"},
        {"id": "moves", "gate": 2, "is_gatekeeper": True, "family": "b", **primary},
    )
    found = verdicts(protocol, trials_of(make_trials, EQUALS, n))
    assert found[1].verdict in ("supported", "equivalent")
    sentence = headline(protocol, found)
    assert ("can be read from these cache slots" in sentence) == is_strongest
    assert is_strongest or "does not show that recursive mode can be read from the cache" in sentence
