"""Verdicts, gates and prerequisites, as the report's tables show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvpatch.protocols.hypotheses import Hypothesis, Margin
from kvpatch.protocols.schema import Protocol
from kvpatch.report.text import DASH, as_float, number
from kvpatch.specs.test_kinds import find
from kvpatch.verdicts import prerequisites as passing
from kvpatch.verdicts.margins import claimed_side
from kvpatch.verdicts.wording import p_value, pairs_text


@dataclass(frozen=True)
class Badge:
    """A verdict's word with the icon and the colour class that go with it."""

    word: str
    icon: str
    style: str
    means: str


BADGES = {
    badge.word: badge
    for badge in (
        Badge("supported", "✓", "yes", "the test passed, and so did what it waits for"),
        Badge("contradicted", "✕", "no", "the interval lies on the other side, or shows that there is no such effect"),
        Badge("not supported", "✕", "no", "the test did not pass, and its interval speaks against the claim"),
        Badge("equivalent", "≈", "same", "the difference lies inside the margin, shown by two one-sided tests"),
        Badge("inconclusive", "?", "open", "the data decide neither way; more pairs may"),
        Badge(
            "not interpretable",
            "⊘",
            "void",
            "what it needs, or a gate before it, did not pass; or a condition's outputs are not coherent",
        ),
        Badge("tautological", "↻", "loop", "true by construction of the conditions; it is no evidence"),
    )
}
MISSING = Badge("no verdict", DASH, "void", "no verdict of this hypothesis is recorded")
DIFFERS = Badge("differs", "≠", "open", "numerical noise in bf16 can do this to a few; see the noise floor")
PASSED, FAILED, UNKNOWN = (
    Badge("holds", "✓", "yes", ""),
    Badge("fails", "✕", "no", ""),
    Badge("not recorded", DASH, "void", ""),
)
STATES: dict[passing.GateState, Badge] = {
    "open": Badge("open", "✓", "yes", ""),
    "closed": Badge("closed", "✕", "no", ""),
    "undecided": UNKNOWN,
    "no gatekeeper": Badge("no gatekeeper", DASH, "void", ""),
}

GATES = {
    0: "Are the instruments right?",
    1: "Is there a mode to move?",
    2: "Does it move with the cache?",
    3: "Do the nulls stay null?",
    4: "What carries it, and how much?",
    5: "Does it hold elsewhere?",
}


def badge(word: Any) -> Badge:
    """Return the badge of a verdict's word; an unknown word gets a neutral one, none "no verdict"."""
    if not isinstance(word, str) or not word.strip():
        return MISSING
    known = word.strip().lower().replace("_", " ")
    return BADGES.get(known, Badge(known, "·", "void", "a verdict this report does not know"))


def verdict_rows(verdicts: list[dict], protocol: Protocol) -> list[dict]:
    """Return a row a verdict, hypotheses first in the protocol's order, with what the protocol adds to it."""
    given = {str(v.get("id")): v for v in verdicts}
    known = {h.id: h for h in protocol.hypotheses}
    keepers = {h.id for h in passing.gatekeepers(protocol)}
    ids = [*known, *(i for i in given if i not in known)]
    rows = [_row(name, given.get(name), known.get(name)) for name in ids]
    for row in rows:
        row["is_gatekeeper"] = row["id"] in keepers and not row["is_tautological"]
        row["missing"] = [
            n for n in row["needs"] or () if not passing.has_passed(str((given.get(n) or {}).get("verdict")))
        ]
        row["side"] = claimed_side(protocol, known[row["id"]]) if row["id"] in known else None
    return rows


def _row(name: str, verdict: dict | None, hypothesis: Hypothesis | None) -> dict:
    entry = dict(verdict or {})

    def told(key: str) -> Any:
        recorded = entry.get(key)
        return recorded if recorded is not None else getattr(hypothesis, key, None)

    test = told("test")
    kind = find(test)
    confirmatory = told("confirmatory")
    needs = hypothesis.needs if hypothesis else entry.get("needs") or None
    return {
        "id": name,
        "badge": badge(entry.get("verdict")),
        "claim": told("claim") or name,
        "phase": told("phase"),
        "contrast": told("contrast") or "",
        "readout": told("readout") or "",
        "passes": kind.passes if kind else None,
        "certifies_absence": kind is not None and kind.certifies_absence,
        "has_margin_on_both_sides": kind is not None and kind.has_margin_on_both_sides,
        "test": kind.words.claim if kind else test or "",
        "gate": told("gate") if needs is None else None,
        "needs": needs,
        "family": told("family"),
        "alpha": as_float(told("alpha")),
        "is_exploratory": confirmatory is False,
        "compares_texts": entry.get("evidence") == "text" and entry.get("verdict") != "tautological",
        "is_tautological": entry.get("verdict") == "tautological",
        "blocked_by": entry.get("blocked_by"),
        "because": entry.get("because") or ("" if verdict else "The run's verdicts do not name this hypothesis."),
        "margin": margin_text(told("margin")),
        "margin_size": as_float(entry.get("margin")),
        "counted": _counted(entry),
        "clustered": _clustered(entry),
        "bayes_factor": as_float(entry.get("bayes_factor")),
        "ci_level": as_float(entry.get("ci_level")) or (kind.level if kind else 0.95),
        **{key: as_float(entry.get(key)) for key in ("estimate", "ci_low", "ci_high", "effect_size", "n")},
        **{key: as_float(entry.get(key)) for key in ("p", "p_adjusted")},
    }


def _clustered(entry: dict) -> str:
    """Return the error that allows for shared topics and continuations; empty where there is none."""
    error, p, clusters = as_float(entry.get("se_clustered")), as_float(entry.get("p_clustered")), entry.get("clusters")
    if error is None or p is None or not isinstance(clusters, dict):
        return ""
    domains = f"{clusters.get('sources')} domains of sources and {clusters.get('targets')} of targets"
    return f"Clustered by {domains}: standard error {number(error)}, p {p_value(p)}."


def _counted(entry: dict) -> str:
    """Return what a verdict rests on, as its sentence tells it."""
    n = as_float(entry.get("n"))
    n_pairs = as_float(entry.get("n_pairs"))
    return "" if n is None else pairs_text(int(n), int(n if n_pairs is None else n_pairs))


def margin_text(margin: Any) -> str:
    """Return a margin as text: a number in the readout's unit, or the parts the protocol gives."""
    if isinstance(margin, Margin):
        margin = margin.model_dump()
    if isinstance(margin, dict):
        named = {"dz": "dz {}", "natural_gap": "{} of natural gap", "value": "{}"}
        parts = [str(named.get(k, f"{k} {{}}")).format(number(v)) for k, v in margin.items() if as_float(v) is not None]
        return ", ".join(parts) or DASH
    return number(margin)


def gates(rows: list[dict], instruments: Badge, protocol: Protocol) -> list[dict]:
    """Return the gates in order, each with its question, its state and the rows it holds.

    The states are those that decided what could be read (`statistics.gates.gate_states`).
    """
    words = {row["id"]: row["badge"].word for row in rows if row["badge"] is not MISSING}
    states = passing.gate_states(protocol, words)
    out = [{"gate": 0, "asks": GATES[0], "state": instruments, "rows": []}]
    for gate in sorted({row["gate"] for row in rows if isinstance(row["gate"], int)}):
        members = [row for row in rows if row["gate"] == gate]
        state = STATES[states.get(gate, "no gatekeeper")]
        out.append({"gate": gate, "asks": GATES.get(gate, ""), "state": state, "rows": members})
    return out


def prerequisites(rows: list[dict], protocol: Protocol) -> list[dict]:
    """Return each hypothesis that others need, with its row, whether it holds, and the rows of those that need it."""
    by_id = {row["id"]: row for row in rows}
    needed = passing.prerequisites(protocol)
    return [
        {"row": by_id[name], "state": _holds(by_id[name]["badge"]), "rows": [by_id[i] for i in needed_by]}
        for name, needed_by in needed.items()
    ]


def _holds(of: Badge) -> Badge:
    return UNKNOWN if of is MISSING else PASSED if passing.has_passed(of.word) else FAILED


def rests_on(rows: list[dict], protocol: Protocol) -> list[dict]:
    """Return the rows that the answer rests on: those of gates 1 and 2; with `needs`, the primary ones and what they
    need."""
    asked = protocol.hypotheses
    names = {h.id for h in (*passing.manipulation_checks(asked), *passing.primary(asked)) if h.needs is not None}
    return [row for row in rows if (row["gate"] or 9) <= 2 or row["id"] in names]


def instruments_badge(checks: list[dict], validation: Any) -> Badge:
    """Return whether gate 0 holds: every identity of the check, and the validation if it says so itself."""
    passed = validation_passed(validation)
    holds = passing.instrument_holds(checks)
    if holds is False or passed is False:
        return FAILED
    if holds is None or passed is None:
        return UNKNOWN
    return PASSED


def validation_passed(validation: Any) -> bool | None:
    """Return what a validation record says of itself; None where it says nothing."""
    if isinstance(validation, dict):
        for key in ("passed", "holds", "ok"):
            if isinstance(validation.get(key), bool):
                return validation[key]
    if isinstance(validation, list) and validation:
        said = [validation_passed(part) for part in validation]
        return False if False in said else (True if all(said) else None)
    return None
