"""Text and numbers as a reader may see them: nothing hidden, nothing that runs, one way to round."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup, escape

from kvpatch.errors import all_visible, visible
from kvpatch.verdicts import wording

Span = tuple[int, int, str]
MARK_KINDS = {
    "hit": "hit of the mode",
    "copied": "copied from the source",
    "changed": "not in the text it is compared with",
}
NOT_RECORDED = "not recorded"
DASH, MINUS = "\u2013", "\u2212"


def marked(text: str, spans: Iterable[Span] = ()) -> Markup:
    """Return the text as HTML, with the spans in `<mark>`; a stretch that two kinds cover carries both.

    Args:
        text: any string; it is escaped.
        spans: (start, end, kind) as character offsets into `text`, in any order; they may overlap. Parts
            outside the text and kinds that are not in `MARK_KINDS` are left out.
    """
    usable = [
        (max(0, start), min(len(text), end), kind)
        for start, end, kind in spans
        if kind in MARK_KINDS and min(len(text), end) > max(0, start)
    ]
    edges = sorted({0, len(text), *(s for s, _, _ in usable), *(e for _, e, _ in usable)})
    out: list[str] = []
    for left, right in itertools.pairwise(edges):
        kinds = [k for k in MARK_KINDS if any(s <= left and right <= e and kind == k for s, e, kind in usable)]
        piece = str(escape(visible(text[left:right])))
        if kinds:
            label = " and ".join(MARK_KINDS[k] for k in kinds)
            piece = f'<mark class="{" ".join(kinds)}" title="{label}">{piece}</mark>'
        out.append(piece)
    return Markup("".join(out))


def script_json(value: Any) -> Markup:
    """Return JSON that may stand inside a script element: it holds no `<`, `>`, `&` or line separator, and names what
    would not be seen."""
    raw = json.dumps(all_visible(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(raw.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def as_float(value: Any) -> float | None:
    """Return the value as a finite float, or None where it is missing or no number."""
    try:
        out = float(value)
    except (TypeError, ValueError):
        return None
    return out if math.isfinite(out) else None


def number(value: Any) -> str:
    """Return a number rounded as the verdicts' sentences round it, with a minus sign; an en dash where there is none.

    >>> number(1234.5), number(0.0421), number(7), number(float("nan")) == DASH
    ('1,234', '0.0421', '7', True)
    """
    x = as_float(value)
    if x is None:
        return DASH
    out = wording.number(x)
    return MINUS + out[1:] if out.startswith("-") else out


def p_value(value: Any) -> str:
    """Return a p-value as the verdicts' sentences tell it; an en dash where there is none.

    >>> p_value(0.0412), p_value(0.00005)
    ('0.0412', '< 0.0001')
    """
    x = as_float(value)
    return DASH if x is None else wording.p_value(x)


def percent(value: Any) -> str:
    """Return a share as a whole percentage, as the verdicts' sentences tell it; an en dash where there is none.

    >>> percent(0.999), percent(1)
    ('99%', '100%')
    """
    x = as_float(value)
    return DASH if x is None else wording.percent(x)


def facts(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested record as flat (name, text) rows; an empty one gives no row."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in facts(inner, f"{prefix} {key}".strip())]
    if isinstance(value, (list, tuple)) and any(isinstance(inner, (dict, list, tuple)) for inner in value):
        return [row for i, inner in enumerate(value, 1) for row in facts(inner, f"{prefix} {i}".strip())]
    return [(prefix.replace("_", " "), plain(value))]


def plain(value: Any) -> str:
    """Return one recorded value as text; "not recorded" for None and for what is empty."""
    if value is None or (isinstance(value, (str, list, tuple, dict)) and len(value) == 0):
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else NOT_RECORDED
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(inner) for inner in value)
    return str(value)
