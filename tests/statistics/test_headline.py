"""The one-sentence answer never says more than the verdicts do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from kvpatch.protocols.schema import Protocol
from kvpatch.verdicts.decide import headline, verdicts
from kvpatch.verdicts.headline import few_pairs

Make = Callable[..., Any]
N = 30
FLAT = [0.0] * N
NEAR = [(-1) ** i / 1000 for i in range(N)]
UP = [1 + i / 100 for i in range(N)]
DOWN = [-value for value in UP]
NOISE = [9.0 * (-1) ** i for i in range(N)]
STRONGEST = "Information sufficient for recursive-style output can be read from these cache slots"
SLOTS = "(n = 30; the body's slots, all layers)"
RESTS = f". It rests on X - N1 in recursive_score {SLOTS}, and on X - N2 in recursive_score {SLOTS}."


@pytest.fixture
def make_trials(make_trials: Make) -> Make:
    """Trials whose score is a readout of the mode, on which the strongest sentence may rest."""

    def trials(*args: Any, **kwargs: Any) -> pd.DataFrame:
        made = make_trials(*args, **kwargs)
        return made.assign(recursive_score=made["score"])

    return trials


@pytest.fixture
def protocol(make_protocol: Make) -> Protocol:
    return make_protocol(
        {
            "id": "exists",
            "contrast": "B - A",
            "test": "greater",
            "readout": "recursive_score",
            "is_gatekeeper": True,
            "family": "a",
        },
        {
            "id": "moves",
            "contrast": "X - N1",
            "test": "greater",
            "readout": "recursive_score",
            "gate": 2,
            "is_gatekeeper": True,
            "family": "b",
        },
        {
            "id": "also",
            "contrast": "X - N2",
            "test": "greater",
            "readout": "recursive_score",
            "gate": 2,
            "is_gatekeeper": True,
            "family": "b",
        },
        {
            "id": "null",
            "contrast": "N1 - A",
            "test": "equivalent",
            "readout": "recursive_score",
            "margin": {"value": 0.3},
            "gate": 3,
        },
    )


@pytest.fixture
def say(protocol: Protocol, make_trials: Make) -> Callable[..., str]:
    def sentence(instrument_ok: bool | None = None, incoherent: Any = None, **scores: Any) -> str:
        given = {"A": FLAT, "B": UP, "X": UP, "N1": NEAR, "N2": FLAT, **scores}
        given = {name: values for name, values in given.items() if values is not None}
        trials = make_trials(given, incoherent=incoherent)
        return headline(protocol, verdicts(protocol, trials, instrument_ok=instrument_ok))

    return sentence


def test_the_strongest_sentence(say: Make):
    assert say() == STRONGEST + RESTS


def test_controls_that_are_not_inert_stand_beside_it(say: Make):
    lifted = [0.5 + i / 1000 for i in range(N)]
    assert say(X=[2 + v for v in UP], N1=lifted) == (
        STRONGEST + RESTS + " 1 of 1 control caches was not shown to leave the target as it is."
    )


def test_a_model_whose_data_speak_against_the_mode_is_told_plainly(say: Make):
    sentence = say(B=DOWN)
    assert sentence.startswith("This model does not show recursive mode under these prompts (exists: not supported)")
    assert sentence.endswith("So nothing about transfer was or could be shown.")


@pytest.mark.parametrize("b", [FLAT, NOISE], ids=["flat", "noise"])
def test_a_mode_that_data_decide_neither_way_is_not_called_absent(say: Make, b: list[float]):
    sentence = say(B=b)
    assert sentence.startswith("This run did not establish that the model shows recursive mode under these prompts")
    assert sentence.endswith("So nothing about transfer was or could be shown.")


def test_a_mode_that_was_seen_in_too_few_pairs_is_not_called_absent(protocol: Protocol, make_trials: Make):
    few = {name: UP[:4] if name in "BX" else FLAT[:4] for name in ("A", "B", "X", "N1", "N2")}
    sentence = headline(protocol, verdicts(protocol, make_trials(few)))
    assert sentence.startswith("This run saw recursive mode under these prompts but could not establish it")


def test_a_mode_that_was_not_measured_is_not_called_absent(say: Make):
    assert say(B=None).startswith("Whether this model shows recursive mode was not measured")


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({"X": DOWN}, "was not seen to move with the cache. The data speak against it"),
        ({"X": NOISE}, "can't tell whether recursive mode moves with the cache"),
        ({"N2": NOISE}, "is incomplete, so it is not shown (moves: supported, also: inconclusive)"),
        ({"X": NOISE, "N2": [99.0] * N}, "is not shown. Part of the data speak against it"),
    ],
)
def test_anything_less_than_every_primary_hypothesis_is_less_than_the_strongest(
    say: Make, scores: dict[str, list[float]], says: str
):
    sentence = say(**scores)
    assert says in sentence
    assert "can be read from these cache slots" not in sentence


def test_incoherent_outputs_are_said_to_be_so(say: Make):
    assert "are not coherent" in say(incoherent={"X": 0.5})


def test_a_failed_instrument_says_nothing_about_the_mode(say: Make):
    assert say(instrument_ok=False).startswith("The instrument check failed")


def test_the_mode_is_the_protocols_own(make_protocol: Make, make_trials: Make):
    protocol = make_protocol(
        {"id": "exists", "contrast": "B - A", "test": "greater", "readout": "recursive_score", "is_gatekeeper": True},
        {"id": "moves", "contrast": "X - N1", "test": "greater", "readout": "recursive_score", "gate": 2},
        pairing={"sources": "legal_english", "targets": "plain"},
    )
    trials = make_trials({"A": FLAT, "B": UP, "X": UP, "N1": FLAT})
    assert headline(protocol, verdicts(protocol, trials)).startswith(
        "Information sufficient for legal english-style output"
    )
    trials = make_trials({"A": FLAT, "B": FLAT, "X": UP, "N1": FLAT})
    assert "recursive" not in headline(protocol, verdicts(protocol, trials))


def test_a_protocol_of_tautologies_is_no_evidence(make_protocol: Make, make_trials: Make):
    protocol = make_protocol(
        {"id": "seed", "contrast": "C - A", "test": "greater", "readout": "recursive_score", "gate": 2}
    )
    sentence = headline(protocol, verdicts(protocol, make_trials({"A": FLAT, "C": UP})))
    assert "true by construction" in sentence and protocol.title in sentence


def test_a_protocol_without_a_primary_gate_counts_what_held(make_protocol: Make, make_trials: Make):
    protocol = make_protocol({"id": "exists", "contrast": "B - A", "test": "greater"})
    sentence = headline(protocol, verdicts(protocol, make_trials({"A": FLAT, "B": UP})))
    assert sentence == 'Of the 1 hypotheses of "A small protocol", 1 held (exists: supported).'


def test_nothing_decided_is_said_so(protocol: Protocol):
    assert headline(protocol, []) == 'Nothing has been decided yet on "A small protocol".'


@pytest.mark.parametrize(
    ("strict", "mild", "says"),
    [
        (1, 0, "the only verdict: 1 of 1 hypothesis had fewer pairs than its alpha needs at all, and 1 is open."),
        (3, 0, "all verdicts: 3 of 3 hypotheses had fewer pairs than their alpha needs at all, and 3 are open."),
        (3, 2, "most verdicts: 3 of 5 hypotheses had fewer pairs than their alpha needs at all, and 3 are open."),
        (1, 1, "half of the verdicts: 1 of 2 hypotheses had fewer pairs than its alpha needs at all, and 1 is open."),
        (2, 3, "some verdicts: 2 of 5 hypotheses had fewer pairs than their alpha needs at all, and 2 are open."),
        (2, 6, "a few verdicts: 2 of 8 hypotheses had fewer pairs than their alpha needs at all, and 2 are open."),
        (1, 43, "one verdict: 1 of 44 hypotheses had fewer pairs than its alpha needs at all, and 1 is open."),
    ],
)
def test_words_on_too_few_pairs_follow_their_number(
    make_protocol: Make, make_trials: Make, strict: int, mild: int, says: str
):
    alphas = {f"h{i}": 0.001 if i < strict else 0.05 for i in range(strict + mild)}
    protocol = make_protocol(
        *(
            {
                "id": name,
                "contrast": "C - N1",
                "test": "greater",
                "readout": "recursive_score",
                "alpha": alpha,
                "family": name,
            }
            for name, alpha in alphas.items()
        )
    )
    few = verdicts(protocol, make_trials({"C": UP[:6], "N1": FLAT[:6]}))
    assert few_pairs(few) == f"n is too small for {says} kvpatch power says how many pairs see what."


def test_enough_pairs_are_not_told_to_be_few(make_protocol: Make, make_trials: Make):
    protocol = make_protocol(
        {"id": "strict", "contrast": "C - N1", "test": "greater", "readout": "recursive_score", "alpha": 0.001}
    )
    assert few_pairs(verdicts(protocol, make_trials({"C": UP[:12], "N1": FLAT[:12]}))) is None
