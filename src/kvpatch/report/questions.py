"""The objections that a reader should raise first, and what the run has against each."""

from __future__ import annotations

from kvpatch.protocols.schema import Protocol
from kvpatch.report.judgements import MISSING
from kvpatch.specs.readouts import shown
from kvpatch.verdicts.prerequisites import nulls as controls_of


def attacks(rows: list[dict], strip: list[dict], protocol: Protocol, pairs: int, is_unchanged: bool) -> list[dict]:
    """Return the objections a reader should raise first, each with what the run has against it and where it stands.

    rows: verdict rows. strip: the instruments' states. pairs: of the phase that has most. is_unchanged: whether the
    protocol is the one that was stored before the first trial.
    """
    circular = [row for row in rows if row["badge"].word == "tautological"]
    controls = {h.id for h in controls_of(protocol.hypotheses)}
    nulls = [row for row in rows if row["id"] in controls]
    inert = [row for row in nulls if row["badge"].word == row["passes"]]
    foreign = [row for row in rows if _is_against_a_foreign_cache(protocol, row["id"])]
    without_copies = {readout.name for readout in shown("copying")}
    copied = [row for row in rows if row["readout"] in without_copies]
    late = [row for row in rows if row["is_exploratory"]]
    told = ", ".join(f"{part['name'].lower()}: {part['badge'].word}" for part in strip)
    return [
        _attack("The instrument is broken.", f"{told}.", "instruments"),
        _attack(
            "It is text substitution.",
            f"{_count(circular, 'claim')} true by construction, set apart as tautological; the evidence is the rest.",
            "not-shown",
        ),
        _attack(
            "Any foreign cache would do it.",
            f"{len(inert)} of {_count(nulls, 'control')} shown to leave the target as it is."
            if nulls
            else _tested(foreign),
            "verdicts",
        ),
        _attack("It copied the source's words.", _tested(copied), "texts"),
        _attack(
            "There are too few pairs.",
            f"{pairs} pairs at most. What an n can see is in the last section; `kvpatch power` says it for every test.",
            "not-shown",
        ),
        _attack(
            "The hypotheses came after the data.",
            f"The protocol's hash {'is' if is_unchanged else 'is NOT'} the one stored before the first trial; "
            f"{_count(late, 'claim')} marked exploratory.",
            "how",
        ),
    ]


def summed_up(rows: list[dict]) -> str:
    """Return one sentence on what the rows together say."""
    decided = [row for row in rows if row["badge"] is not MISSING]
    if not decided:
        return "Nothing in this run bears on it."
    words = [row["badge"].word for row in decided]
    told = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    return f"Of {len(decided)} {'hypothesis' if len(decided) == 1 else 'hypotheses'} that bear on it: {told}."


NO_TEST = "This protocol does not test it."


def _tested(rows: list[dict]) -> str:
    return summed_up(rows) if rows else NO_TEST


def _is_against_a_foreign_cache(protocol: Protocol, name: str) -> bool:
    """Whether a hypothesis holds what the source gives against what a prompt of another group gives."""
    asked = [h for h in protocol.hypotheses if h.id == name]  # verdicts may be of another protocol
    givers = [protocol.conditions[condition].giver for h in asked for condition in h.conditions]
    return "source" in givers and any(giver not in ("source", "target") for giver in givers)


def _attack(claim: str, answer: str, where: str) -> dict:
    return {"claim": claim, "answer": answer, "where": where}


def _count(rows: list[dict], noun: str) -> str:
    return f"{len(rows)} {noun}{'' if len(rows) == 1 else 's'}"
