"""The verdicts as a list: grouped by what made each what it is, one line per hypothesis, its interval drawn in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from markupsafe import Markup

from kvpatch.protocols.schema import Protocol
from kvpatch.report.forest import margin_ends, scale_of
from kvpatch.report.judgements import BADGES, MISSING, Badge
from kvpatch.verdicts.answer import WHY

WIDE, HALF, MIDDLE = 120, 56.0, 60.0
"""Units of a drawn line: its width, the reach of its scale to either side, and where 0 stands."""


@dataclass(frozen=True)
class Group:
    """Hypotheses with one verdict for one reason.

    id: unique on the page. cause: why it could not be read, or that nothing was measured; "" where the word says all.
    """

    id: str
    badge: Badge
    cause: str
    rows: list[dict]


def groups(rows: list[dict]) -> list[Group]:
    """Return the verdict rows by word and cause: the words in the badges' order, unmeasured ones after measured."""
    order = [*BADGES, MISSING.word]
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["badge"].word, _cause(row)), []).append(row)
    keys = sorted(found, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), key[1] == NO_PAIR))
    return [Group(f"group-{place}", found[key][0]["badge"], key[1], found[key]) for place, key in enumerate(keys, 1)]


NO_PAIR = "no pair of this run has a number on it"


def _cause(row: dict) -> str:
    if row["badge"] is MISSING or row["badge"].word == "tautological":
        return ""
    if not row["n"]:
        return NO_PAIR
    return WHY.get(row["blocked_by"] or "", "")


def counts(rows: list[dict]) -> list[tuple[Badge, int]]:
    """Return how many rows have each verdict, in the badges' order."""
    badges = {row["badge"].word: row["badge"] for row in rows}
    number = Counter(row["badge"].word for row in rows)
    order = [*BADGES, *(word for word in number if word not in BADGES)]
    return [(badges[word], number[word]) for word in order if word in number]


def drawn(rows: list[dict], protocol: Protocol) -> dict[str, Markup]:
    """Return, by hypothesis, its interval as a small picture; the rows of one readout and kind share a scale.

    A line is 120 wide; 0 stands at 60, and the largest end of an interval or margin on the scale 56 from it.
    """
    known = {h.id: h for h in protocol.hypotheses}
    reach: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["id"] in known and row["estimate"] is not None:
            scale = scale_of(known[row["id"]])
            ends = [row["estimate"], row["ci_low"], row["ci_high"], *margin_ends(row)]
            reach[scale] = max(reach.get(scale, 0.0), *(abs(end) for end in ends if end is not None))
    return {
        row["id"]: _line(row, reach[scale_of(known[row["id"]])])
        for row in rows
        if row["id"] in known and row["estimate"] is not None
    }


def place(value: float, reach: float) -> float:
    """Return where a value stands on a line whose scale reaches so far to either side.

    >>> place(0.0, 2.0), place(2.0, 2.0), place(-1.0, 2.0)
    (60.0, 116.0, 32.0)
    """
    return round(MIDDLE + HALF * (value / reach if reach else 0.0), 1)


def _line(row: dict, reach: float) -> Markup:
    marks = [f'<path class="zero" d="M{MIDDLE:g} 0V14"/>']
    marks += [f'<path class="limit" d="M{place(end, reach):g} 2V12"/>' for end in margin_ends(row) if end is not None]
    if row["ci_low"] is not None and row["ci_high"] is not None:
        marks.append(f'<path class="span" d="M{place(row["ci_low"], reach):g} 7H{place(row["ci_high"], reach):g}"/>')
    style = f"dot{' hollow' if row['badge'].word == 'not interpretable' else ''}"
    marks.append(f'<circle class="{style}" cx="{place(row["estimate"], reach):g}" cy="7" r="3"/>')
    inner = Markup("").join(map(Markup, marks))
    return Markup('<svg class="ci {}" viewBox="0 0 {} 14" aria-hidden="true">{}</svg>').format(
        row["badge"].style, WIDE, inner
    )
