"""The plan's table, answered: what the plan expected of each row, what was measured, a verdict, and one sentence.

How the verdict of a row follows from its hypotheses (`row_verdict`):

1. A hypothesis that is true by construction decides nothing, unless all of the row's are: then the row is
   "tautological".
2. One contradicted hypothesis, or one supported rival, contradicts the row.
3. Where all passed the row is "supported", or "equivalent" where all claim an equivalence. Where some passed and others
   are open it is "partly supported".
4. Where none passed it is "inconclusive" if one of them could be read, "not interpretable" if one was measured,
   "not measured" otherwise.

A question claims nothing. It is "answered" where each of its hypotheses passed or is contradicted, "partly answered"
where some are, "not answered" where none is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.plan_rows import PlanRow, RowKind
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.base import Frozen
from kvpatch.specs.readouts import readouts
from kvpatch.specs.test_kinds import AGAINST
from kvpatch.verdicts.prerequisites import failed_gatekeeper, gatekeepers, has_passed
from kvpatch.verdicts.rounding import number
from kvpatch.verdicts.wording import NAMED, finding_text

Entry = Mapping[str, Any]
"""One entry of verdicts.json."""
Status = Literal["passed", "contradicted", "undecided", "unreadable", "unmeasured", "circular"]
RowWord = Literal[
    "supported", "equivalent", "partly supported", "contradicted", "inconclusive", "not interpretable", "not measured",
    "tautological", "answered", "partly answered", "not answered",
]  # fmt: skip
_BLOCKED = {
    "instrument": "the check of the model failed",
    "coherence": "the outputs of a condition are not coherent",
    "specificity": "destroyed caches move the readout too",
    "missing": "too many rows are missing",
}


class Finding(Frozen):
    """What a run says of one hypothesis of a row.

    `measured` says it in words, with its unit. `lacks` says which prerequisite or number is missing, where one is.
    """

    id: str
    claim: str
    is_rival: bool
    contrast: str
    readout: str
    phase: str
    model: str | None
    verdict: str
    status: Status
    estimate: float | None
    unit: str
    ci_low: float | None
    ci_high: float | None
    ci_level: float | None
    n: int
    p_adjusted: float | None
    measured: str | None
    lacks: str | None


class AnsweredRow(Frozen):
    """One row of the plan's table, with what was measured, its verdict and its answer in one sentence."""

    kind: RowKind
    claim: str
    expected: str | None
    findings: list[Finding]
    verdict: RowWord
    answer: str
    unknown: str | None

    @property
    def telling(self) -> Finding | None:
        """The finding whose number stands for the row: the first that makes its verdict what it is, else the first
        that was measured; None where nothing was."""
        measured = [f for f in self.findings if f.estimate is not None]
        deciding: dict[str, Status] = {"contradicted": "contradicted", "supported": "passed", "equivalent": "passed"}
        wanted = deciding.get(self.verdict)
        speaking = [f for f in measured if not f.is_rival and f.status == wanted]
        if self.verdict == "contradicted":
            speaking += [f for f in measured if f.is_rival and f.status == "passed"]
        return next(iter([*speaking, *measured]), None)


def plan_table(protocol: Protocol, entries: Iterable[Entry], models: Mapping[str | None, str]) -> list[AnsweredRow]:
    """Answer every row of the protocol's plan from the entries of verdicts.json.

    models: key of a model in the protocol, None for the run's own -> its name. A row's phase says which model it is.
    """
    by_id = {str(entry.get("id")): entry for entry in entries}
    return [_answered(row, protocol, by_id, models) for row in protocol.plan_rows]


def _answered(
    row: PlanRow, protocol: Protocol, by_id: Mapping[str, Entry], models: Mapping[str | None, str]
) -> AnsweredRow:
    findings = [
        _finding(protocol, name, by_id, models, is_rival)
        for names, is_rival in ((row.hypotheses, False), (row.rivals, True))
        for name in names
    ]
    word = row_verdict(row.kind, findings)
    return AnsweredRow(
        kind=row.kind,
        claim=row.claim,
        expected=row.expected,
        findings=findings,
        verdict=word,
        answer=_answer(row, findings),
        unknown=row.unknown,
    )


def row_verdict(kind: RowKind, findings: Sequence[Finding]) -> RowWord:
    """Return the verdict of a row by the rule that stands at the top of this file."""
    own = [f for f in findings if not f.is_rival]
    found = {f.status for f in own if f.status != "circular"}
    decided = found & {"passed", "contradicted"}
    if kind == "question":
        return "not answered" if not decided else "answered" if decided == found else "partly answered"
    if own and not found:
        return "tautological"
    if "contradicted" in found or any(f.is_rival and f.status == "passed" for f in findings):
        return "contradicted"
    if found == {"passed"}:
        is_equal = all(f.verdict == "equivalent" for f in own if f.status == "passed")
        return "equivalent" if is_equal else "supported"
    if "passed" in found:
        return "partly supported"
    if "undecided" in found:
        return "inconclusive"
    return "not interpretable" if "unreadable" in found else "not measured"


def _finding(
    protocol: Protocol, name: str, by_id: Mapping[str, Entry], models: Mapping[str | None, str], is_rival: bool
) -> Finding:
    h, entry = protocol.hypothesis(name), by_id.get(name, {})
    estimate, n = _known(entry.get("estimate")), int(_known(entry.get("n")) or 0)
    low, high, level = (_known(entry.get(key)) for key in ("ci_low", "ci_high", "ci_level"))
    model, carried_out = models.get(protocol.phases[h.phase].model), _carried_out(protocol, h)
    word = _word(entry)
    status = _status(h, word, n)
    sure = ""
    if low is not None and high is not None:
        sure = f"{level or h.kind.level:.0%} interval {number(low)} to {number(high)}, "
    measured = None
    if n and estimate is not None:
        on = "" if model is None else f", {model}"
        measured = f"{finding_text(estimate, h, carried_out.kind)} ({sure}n = {n}{on})"
    return Finding(
        id=name,
        claim=h.claim,
        is_rival=is_rival,
        contrast=h.contrast,
        readout=h.readout,
        phase=h.phase,
        model=model,
        verdict=word,
        status=status,
        estimate=estimate if n else None,
        unit=_unit(carried_out),
        ci_low=low if n else None,
        ci_high=high if n else None,
        ci_level=level,
        n=n,
        p_adjusted=_known(entry.get("p_adjusted")),
        measured=measured,
        lacks=_lacks(protocol, h, by_id, status),
    )


def _known(value: Any) -> float | None:
    """A finite number, None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _word(entry: Entry) -> str:
    word = entry.get("verdict")
    return word.strip().lower().replace("_", " ") if isinstance(word, str) and word.strip() else "no verdict"


def _carried_out(protocol: Protocol, h: Hypothesis) -> Hypothesis:
    """The hypothesis whose test was carried out: of a repetition the one that it repeats."""
    while h.of is not None:
        h = protocol.hypothesis(h.of)
    return h


def _status(h: Hypothesis, word: str, n: int) -> Status:
    if word == "tautological":
        return "circular"
    if n == 0 or word == "no verdict":
        return "unmeasured"
    if word == "not interpretable":
        return "unreadable"
    if word == h.kind.passes:
        return "passed"
    # To be equivalent to none is against a claim that there is an effect.
    return "contradicted" if word in (*AGAINST, "equivalent") else "undecided"


def _unit(h: Hypothesis) -> str:
    """The unit of an estimate; "" where it has none, as a correlation."""
    if not h.kind.is_in_unit:
        return ""
    readout = readouts().get(h.readout)
    unit = "log units" if h.transform == "log" else "" if readout is None else readout.unit or ""
    return f"{unit} a step".strip() if h.is_ordering else unit


def _lacks(protocol: Protocol, h: Hypothesis, by_id: Mapping[str, Entry], status: Status) -> str | None:
    """Which number or prerequisite is missing, as the end of a sentence; None where none is."""
    if status == "unmeasured":
        if h.id not in by_id:
            return f"this run has no verdict on {h.id}"
        return f"no pair was measured for {h.contrast} in {h.readout} (phase {h.phase})"
    if status != "unreadable":
        return None
    by = by_id[h.id].get("blocked_by")
    if by == "prerequisite":
        roots = _roots(protocol, h.id, by_id)
        told = [f"the prerequisite {name} is {_word(by_id.get(name, {}))}" for name in roots]
        return " and ".join(told) or "a prerequisite did not pass"
    if by == "gate":
        words = {name: _word(entry) for name, entry in by_id.items()}
        keeper = failed_gatekeeper(gatekeepers(protocol), words, h.gate)
        named = "" if keeper is None else f", since {keeper.id} is {words[keeper.id]}"
        return f"an earlier gate is closed{named}"
    return _BLOCKED.get(str(by), "something that it needs did not pass")


def _roots(protocol: Protocol, name: str, by_id: Mapping[str, Entry]) -> list[str]:
    """Prerequisites that did not pass and wait for no other one, at the bottom of what stops a hypothesis."""
    reached, at = [name], 0
    while at < len(reached):
        reached += [one for one in _missing(protocol, reached[at], by_id) if one not in reached]
        at += 1
    return [one for one in reached[1:] if not _missing(protocol, one, by_id)]


def _missing(protocol: Protocol, name: str, by_id: Mapping[str, Entry]) -> list[str]:
    """Those that a hypothesis needs and that did not pass, where that is what stops it."""
    if by_id.get(name, {}).get("blocked_by") != "prerequisite":
        return []
    return [one for one in protocol.hypothesis(name).needs or () if not has_passed(_word(by_id.get(one, {})))]


def _answer(row: PlanRow, findings: Sequence[Finding]) -> str:
    """One sentence with the numbers, or with what is missing."""
    if not findings:
        return "This protocol has no hypothesis on it."
    if len(findings) == 1 and row.kind != "question":
        return _of_one(findings[0])
    measured = [f for f in findings if f.measured is not None]
    common = {_where(f) for f in measured}
    parts: list[str] = []
    groups: dict[tuple[Status, bool, str | None], list[Finding]] = {}
    for f in sorted(findings, key=lambda f: list(_OF_SEVERAL).index(f.status)):
        why = f.lacks if f.status == "unreadable" else None
        groups.setdefault((f.status, f.is_rival, why), []).append(f)
    for (status, is_rival, why), those in groups.items():
        said = [_item(f, by_claim=row.kind == "question", everywhere=len(common) == 1) for f in those[:NAMED]]
        more = [f"{len(those) - NAMED} more"] if len(those) > NAMED else []
        told = _OF_SEVERAL[status].format(since="" if why is None else f", since {why}")
        parts.append(f"{told} {'the rival ' * is_rival}{', '.join([*said, *more])}")
    alike = f"; throughout, {common.pop()}" if len(common) == 1 else ""
    return _sentence("; ".join(parts) + alike)


_OF_SEVERAL: dict[Status, str] = {
    "contradicted": "the data speak against",
    "passed": "the data bear out",
    "undecided": "undecided:",
    "unreadable": "not interpretable{since}:",
    "unmeasured": "not measured:",
    "circular": "true by construction, so no evidence:",
}


def _of_one(f: Finding) -> str:
    measured = f.measured or f"no estimate of {f.contrast} in {f.readout} could be had"
    told: dict[Status, str] = {
        "passed": f"it holds: {measured}",
        "contradicted": f"the data speak against it: {measured}",
        "undecided": f"the data decide neither way: {measured}",
        "unreadable": f"it can't be interpreted, since {f.lacks}; measured all the same: {measured}",
        "unmeasured": f"it was not measured: {f.lacks}",
        "circular": f"it is true by construction of the conditions, so it is no evidence: {measured}",
    }
    return _sentence(told[f.status])


def _where(f: Finding) -> str:
    return f"n = {f.n}" + ("" if f.model is None else f", {f.model}")


def _item(f: Finding, *, by_claim: bool, everywhere: bool) -> str:
    """One hypothesis among several: its claim or id, its figure, or why it has none. everywhere: n and model are those
    of all, and are said once."""
    value = ""
    if f.measured is not None and f.estimate is not None:
        value = f"{number(f.estimate)} {f.unit}".strip()
        if f.ci_low is not None and f.ci_high is not None:
            value += f", {number(f.ci_low)} to {number(f.ci_high)}"
        value += "" if everywhere else f", {_where(f)}"
    lacks = f.lacks if f.status == "unmeasured" else None
    told = "; ".join(part for part in (value, lacks) if part)
    return (f"\u201c{f.claim}\u201d" if by_claim else f.id) + (f" ({told})" if told else "")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
