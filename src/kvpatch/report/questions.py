"""The four questions the whole must answer: what bears on each, and what stays unknown whatever the run says."""

from __future__ import annotations

from collections.abc import Callable

from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.report.judgements import MISSING
from kvpatch.report.maps import place_of
from kvpatch.specs.readouts import shown
from kvpatch.verdicts.prerequisites import nulls as controls_of


def four_questions(rows: list[dict], protocol: Protocol, ran: set[str], models: list[str], has_attention: bool) -> list:
    """Return each question with the rows that bear on it, a sentence that sums them up, and what stays unknown.

    rows: verdict rows. ran: conditions that have trials. models: architectures of the run.
    """
    mode = f"{protocol.mode_name} mode"
    known = {row["id"]: row for row in rows}
    others = set(protocol.pairing.also)
    by_hand = [name for name, c in protocol.conditions.items() if c.change and c.change.sets_r_v and name in ran]

    def about(holds: Callable[[Hypothesis], bool]) -> list[dict]:
        return [known[h.id] for h in protocol.hypotheses if holds(h)]

    def some(h: Hypothesis, holds: Callable[[Condition], bool]) -> bool:
        return any(holds(protocol.conditions[name]) for name in h.conditions)

    asked = [
        (
            "Is R_V causal or correlational?",
            about(lambda h: _reads_geometry(h) or some(h, lambda c: c.change is not None and c.change.sets_r_v)),
            _unknown_geometry(by_hand),
        ),
        (
            f"Where is {mode} computed: in which layers, at which tokens?",
            about(lambda h: some(h, lambda c: place_of(c) is not None)),
            [
                "Slots and layers that suffice to read the mode are where it can be read, not where it was computed.",
                "Parts put into a foreign cache may fail because they do not fit each other; absence is weak evidence.",
            ],
        ),
        (
            f"What makes a prompt evoke {mode} at circuit level: which tokens, which heads?",
            about(lambda h: some(h, lambda c: _selects_within(c) or c.from_ in others)),
            _unknown_circuit(has_attention),
        ),
        ("Is it special to one architecture?", about(lambda h: h.of is not None), _unknown_models(models)),
    ]
    return [
        {"question": question, "rows": evidence, "says": summed_up(evidence), "unknown": unknown}
        for question, evidence, unknown in asked
    ]


def summed_up(rows: list[dict]) -> str:
    """Return one sentence on what the rows together say."""
    decided = [row for row in rows if row["badge"] is not MISSING]
    if not decided:
        return "Nothing in this run bears on it."
    words = [row["badge"].word for row in decided]
    told = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    return f"Of {len(decided)} {'hypothesis' if len(decided) == 1 else 'hypotheses'} that bear on it: {told}."


def _reads_geometry(h: Hypothesis) -> bool:
    bearing = {readout.name for readout in shown("r_v")}
    return h.readout in bearing or (h.against is not None and h.against.readout in bearing)


def _selects_within(c: Condition) -> bool:
    """Whether a condition picks tokens by meaning, heads, or keys or values alone."""
    if c.patch is None:
        return False
    by_meaning = getattr(c.patch.slots, "keywords", None) or getattr(c.patch.slots, "matched_to", None)
    return bool(by_meaning) or c.patch.kv_heads is not None or c.patch.parts != "kv"


def _unknown_geometry(by_hand: list[str]) -> list[str]:
    if by_hand:
        return [
            f"R_V was set by hand ({', '.join(by_hand)}). That changes more than one number; the random rotations of "
            "equal size beside it say how much of what follows is damage.",
            "Where the mode does not follow, R_V is a shadow at that layer and window; another layer is not tested.",
        ]
    return [
        "R_V was not set by hand in this run (no condition of that kind ran): it can show that R_V goes with the mode, "
        "never that R_V brings it about.",
    ]


def _unknown_circuit(has_attention: bool) -> list[str]:
    out = ["Heads of the cache are shared by several query heads; a KV head that carries the mode names no circuit."]
    if not has_attention:
        out.insert(0, "No trial holds attention readouts, so this run says nothing about which heads look where.")
    return out


def _unknown_models(models: list[str]) -> list[str]:
    kinds = ", ".join(dict.fromkeys(models)) or "one model"
    return [f"This run used {kinds}. Any other architecture or size, and any larger model of these, is untested."]


def attacks(rows: list[dict], strip: list[dict], protocol: Protocol, pairs: int, is_unchanged: bool) -> list[dict]:
    """Return the objections a reader should raise first, each with what the run has against it and where it stands.

    rows: verdict rows. strip: the instruments' states. pairs: of the phase that has most. is_unchanged: whether the
    protocol is the one that was stored before the first trial.
    """
    circular = [row for row in rows if row["badge"].word == "tautological"]
    controls = {h.id for h in controls_of(protocol.hypotheses)}
    nulls = [row for row in rows if row["id"] in controls]
    inert = [row for row in nulls if row["badge"].word == row["passes"]]
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
            f"{len(inert)} of {_count(nulls, 'control')} shown to leave the target as it is." if nulls else NO_TEST,
            "verdicts",
        ),
        _attack("It copied the source's words.", summed_up(copied) if copied else NO_TEST, "texts"),
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


NO_TEST = "This protocol does not test it."


def _attack(claim: str, answer: str, where: str) -> dict:
    return {"claim": claim, "answer": answer, "where": where}


def _count(rows: list[dict], noun: str) -> str:
    return f"{len(rows)} {noun}{'' if len(rows) == 1 else 's'}"
