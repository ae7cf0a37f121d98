"""What never gives the strongest sentence, in a protocol with families whose primary one is evidence about a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from conftest import CONDITIONS
from kvpatch.protocols.schema import Protocol
from kvpatch.verdicts.decide import headline, verdicts

Make = Callable[..., Any]
N = 30
STRONGEST = "Information sufficient for recursive-style output can be read from these cache slots"
LLR, SCORE = "mode_llr", "recursive_score"
JOINED = {
    name: {"about": name, "from": role, "joined": {"keep": "receiver"}}
    for name, role in (("M1", "source"), ("M1n", "foreign"), ("M1y", "foreign_matched"))
}
SWAP = {
    "about": "a full swap, spelled by a query",
    "from": "source",
    "patch": {"slots": {"of": "all"}, "align": "replace"},
}
ALL = {**CONDITIONS, **JOINED, "S": SWAP}
LOW = [0.001 * (-1) ** i for i in range(N)]
HIGH = [1 + 0.01 * i for i in range(N)]
MODE = {"A": LOW, "B": HIGH, "M1": HIGH, "M1n": LOW, "M1y": LOW, "S": HIGH, "N1": LOW}
EQUALS = {"A": "target", "B": "source", "S": "source", "N1": "foreign"}
EXISTS = {"id": "exists", "contrast": "B - A", "test": "greater", "family": "check", "readout": LLR, "needs": []}


def asked(name: str, contrast: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "contrast": contrast, "test": "greater", "family": "primary", "readout": LLR,
            "needs": ["exists"]} | more  # fmt: skip


JOINS = (asked("joined", "M1 - M1n"), asked("matched", "M1 - M1y"))


@pytest.fixture
def protocol_of(make_protocol: Make) -> Callable[..., Protocol]:
    def made(*primary: dict[str, Any], exists: dict[str, Any] = EXISTS) -> Protocol:
        phases = {"1": {"question": "?", "n": N, "conditions": list(ALL)}}
        families = {"primary": {"alpha": 0.001}}
        return make_protocol(exists, *primary, conditions=ALL, phases=phases, families=families, mode="recursive")

    return made


@pytest.fixture
def trials_of(make_trials: Make) -> Callable[..., pd.DataFrame]:
    def made(n: int = N, **values: list[float]) -> pd.DataFrame:
        rows = make_trials({name: of[:n] for name, of in (MODE | values).items()})
        rows = rows.assign(equals_text=[EQUALS.get(name) for name in rows["condition"]])
        return rows.assign(**{name: rows["score"] for name in (LLR, SCORE, "n_tokens")})

    return made


def told(protocol: Protocol, trials: pd.DataFrame) -> tuple[str, dict[str, str]]:
    found = verdicts(protocol, trials, instrument_ok=True)
    return headline(protocol, found), {v.id: v.verdict for v in found}


def test_a_joined_cache_gives_it_and_tells_n_slots_and_layers(protocol_of: Make, trials_of: Make):
    sentence, _ = told(protocol_of(*JOINS), trials_of())
    where = "(n = 30; the target's own slots, read after the other prompt, all layers)"
    assert sentence == f"{STRONGEST}. It rests on M1 - M1n in mode_llr {where}, and on M1 - M1y in mode_llr {where}."


def test_one_readout_does_not_wait_for_another(protocol_of: Make, trials_of: Make):
    """The likelihood passed, and the score, which hardly hit, decides neither way."""
    noise = [9.0 * (-1) ** i for i in range(N)]
    protocol = protocol_of(*JOINS, asked("joined_score", "M1 - M1n", readout=SCORE))
    trials = trials_of()
    trials[SCORE] = noise * (len(trials) // N)
    trials.loc[trials["condition"] == "M1", SCORE] = [value * 1.1 for value in noise]
    sentence, words = told(protocol, trials)
    assert words["joined_score"] == "inconclusive"
    assert sentence.startswith(STRONGEST) and sentence.endswith(" Not passed beside it: joined_score: inconclusive.")


NEVER: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any]]] = {
    "an equivalence": (
        (asked("same", "M1n - M1y", test="equivalent", margin={"value": 0.5}),),
        {},
    ),
    "response length": ((asked("longer", "M1 - M1n", readout="n_tokens"),), {}),
    "five pairs": (JOINS, {"n": 5}),
    "a full swap spelled otherwise": ((asked("swapped", "S - N1"),), {}),
    "sources that merely say you": (JOINS, {"M1y": HIGH}),
    "sources that nearly merely say you": (JOINS, {"M1y": [value - 0.3 * (-1) ** i for i, value in enumerate(HIGH)]}),
    "the matched prompts move the readout more": (JOINS, {"M1y": [2 + value for value in HIGH]}),
}


@pytest.mark.parametrize("case", NEVER)
def test_it_is_never_given_for(case: str, protocol_of: Make, trials_of: Make):
    primary, values = NEVER[case]
    sentence, _ = told(protocol_of(*primary), trials_of(**values))
    assert "can be read from these cache slots" not in sentence


@pytest.mark.parametrize("case", ["an equivalence", "response length", "a full swap spelled otherwise"])
def test_what_passed_and_can_not_carry_it_is_told_as_passed(case: str, protocol_of: Make, trials_of: Make):
    primary, values = NEVER[case]
    sentence, words = told(protocol_of(*primary), trials_of(**values))
    assert words[primary[0]["id"]] in ("supported", "equivalent")
    assert "does not show that recursive mode can be read from the cache" in sentence


@pytest.mark.parametrize("how", ["one side not stored", "both sides not stored", "errors"])
@pytest.mark.parametrize("primary", [JOINS[:1], JOINS], ids=["one", "two"])
def test_it_is_not_given_where_45_percent_of_the_joined_rows_are_missing(
    how: str, primary: tuple[dict[str, Any], ...], protocol_of: Make, trials_of: Make
):
    trials = trials_of()
    lost = [f"test-{i:03d}" for i in range(0, 27, 2)]
    sides = ["M1", "M1n", "M1y"] if how == "both sides not stored" else ["M1"]
    are_lost = trials["pair_id"].isin(lost) & trials["condition"].isin(sides)
    assert are_lost.sum() / len(sides) / N > 0.45
    if how == "errors":
        trials.loc[are_lost, "error"] = "out of memory"
        trials.loc[are_lost, [LLR, SCORE]] = float("nan")
    else:
        trials = trials.loc[~are_lost]
    sentence, _ = told(protocol_of(*primary), trials)
    assert "can be read from these cache slots" not in sentence


@pytest.mark.parametrize("readout", [LLR, SCORE])
@pytest.mark.parametrize("looped", [["M1"], ["M1", "M1n", "M1y"]], ids=["one side", "every side"])
def test_it_is_not_given_where_outputs_are_one_repeated_word(
    readout: str, looped: list[str], protocol_of: Make, trials_of: Make
):
    """A likelihood says nothing of what was written, so that its own test may pass."""
    exists = EXISTS | {"readout": readout}
    primary = [h | {"readout": readout} for h in JOINS]
    trials = trials_of()
    trials.loc[trials["condition"].isin(looped), "coherent"] = False
    sentence, words = told(protocol_of(*primary, exists=exists), trials)
    assert words["joined"] == ("supported" if readout == LLR else "not interpretable")
    assert "can be read from these cache slots" not in sentence


@pytest.mark.parametrize(
    "exists",
    [
        EXISTS | {"contrast": "B - N1"},
        EXISTS | {"readout": "n_tokens"},
        EXISTS | {"contrast": "A - N1", "test": "equivalent", "margin": {"value": 0.5}},
    ],
    ids=["against a foreign prompt", "length", "an equivalence"],
)
def test_it_needs_a_mode_that_was_shown_to_exist(exists: dict[str, Any], protocol_of: Make, trials_of: Make):
    sentence, words = told(protocol_of(*JOINS, exists=exists), trials_of())
    assert words["exists"] in ("supported", "equivalent") and words["joined"] == "supported"
    assert "can be read from these cache slots" not in sentence
    assert "that the mode exists was not shown" in sentence


def test_it_is_not_given_for_a_model_that_was_not_checked(protocol_of: Make, trials_of: Make):
    protocol = protocol_of(*JOINS)
    sentence = headline(protocol, verdicts(protocol, trials_of()), is_checked=False)
    assert "In mode_llr alone" in sentence and "that the model is patched correctly was not checked" in sentence
    failed = verdicts(protocol, trials_of(), instrument_ok=False)
    assert headline(protocol, failed).startswith("The instrument check failed on this model")
