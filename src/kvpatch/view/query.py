"""Filters and search over trials, as SQL with every value bound: nothing a visitor writes becomes part of a query."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpatch.specs.readouts import Place, Readout, shown, sparse
from kvpatch.view.runs import LiveRun

PAGE = 50
CHOICES = ("phase", "condition", "model", "split", "stopped")
"""Columns filtered by one of their values."""
SHOWN = ("trial_id", "phase", "condition", "pair_id", "sample")
PLACES: tuple[Place, ...] = ("trials", "newest")
"""Where the view shows readouts."""
TEXTS = ("text", "source_text", "target_text", "error")


@dataclass(frozen=True)
class Filter:
    """Conditions in SQL, and the values bound to them."""

    where: str
    values: list[Any]


def numbers_of(run: LiveRun) -> list[str]:
    """Columns of a run that are filtered by a range, and sorted by."""
    kinds = ("double", "int32", "int64")
    return [name for name, kind in run.columns.items() if str(kind) in kinds and name not in ("seed", "sample")]


def shown_in(place: Place, run: LiveRun) -> list[Readout]:
    """Readouts that a page of a run shows in a place, sparse ones only where a trial holds a number of them."""
    names = [readout.name for readout in sparse() if readout.name in run.columns]
    counts = ", ".join(f'count("{name}") as "{name}"' for name in names)
    (held,) = run.ask(f"select {counts} from trials") if names else [{}]
    return shown(place, [name for name in names if held[name]])


def filter_of(asked: Mapping[str, str], numbers: Sequence[str]) -> Filter:
    """Read a filter from a query string: what it does not know, or can't read as a number, is left out.

    numbers: columns that may be filtered by a range.

    `q`: words that must all occur in the output, the prompts or the error, in any case; a stretch in double quotes is
    taken as it stands. `failed` and `coherent`: yes or no. `pair_id`: a part of it. `min_X` and `max_X` for a number X.
    """
    parts: list[str] = []
    values: list[Any] = []

    def also(sql: str, *bound: Any) -> None:
        parts.append(sql)
        values.extend(bound)

    for name in CHOICES:
        if asked.get(name):
            also(f"{name} = ?", asked[name])
    if asked.get("pair_id"):
        also("contains(pair_id, ?)", asked["pair_id"])
    if asked.get("failed") in ("yes", "no"):
        also(f"(coalesce(trim(error), '') <> '') = {asked['failed'] == 'yes'}")
    if asked.get("coherent") in ("yes", "no"):
        also("coherent = ?", asked["coherent"] == "yes")
    for name in numbers:
        for edge, sign in (("min", ">="), ("max", "<=")):
            number = _number(asked.get(f"{edge}_{name}"))
            if number is not None:
                also(f'"{name}" {sign} ?', number)
    for word in words_of(asked.get("q", "")):
        found = " or ".join(f"contains(lower({name}), ?)" for name in TEXTS)
        also(f"({found})", *[word] * len(TEXTS))
    return Filter(" and ".join(parts) or "true", values)


def words_of(text: str) -> list[str]:
    """Words and quoted stretches of a search, in lower case.

    >>> words_of('Itself "turns back"')
    ['turns back', 'itself']
    """
    quoted = [part for i, part in enumerate(text.split('"')) if i % 2]
    plain = " ".join(part for i, part in enumerate(text.split('"')) if not i % 2).split()
    return [word.lower() for word in (*quoted, *plain) if word.strip()]


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def trials(run: LiveRun, asked: Mapping[str, str]) -> dict[str, Any]:
    """Return one page of the trials that pass a filter: `total`, `page`, `pages`, `rows`. Newest first unless sorted.

    `sort`: a number's column, with "-" in front for descending. `page`: from 1.
    """
    numbers = numbers_of(run)
    chosen = filter_of(asked, numbers)
    total = run.ask(f"select count(*) as n from trials where {chosen.where}", chosen.values)[0]["n"]
    pages = max(1, math.ceil(total / PAGE))
    page = min(max(1, int(_number(asked.get("page")) or 1)), pages)
    wanted = asked.get("sort", "")
    column = wanted.lstrip("-")
    order = "place desc"
    if column in (*numbers, "pair_id", "condition", "phase"):
        order = f'"{column}" {"desc" if wanted.startswith("-") else "asc"} nulls last, place'
    pages_show = {readout.name for place in PLACES for readout in shown_in(place, run)}
    readouts = [f'"{name}"' for name in run.columns if name in pages_show]
    rows = run.ask(
        f"select {', '.join([*SHOWN, *readouts])}, text, error, coherent from trials where {chosen.where} "
        f"order by {order} limit {PAGE} offset {(page - 1) * PAGE}",
        chosen.values,
    )
    return {"total": total, "page": page, "pages": pages, "rows": rows}


def choices(run: LiveRun) -> dict[str, list[str]]:
    """Return the values that each column of CHOICES takes, in the order in which they first came."""
    return {
        name: [
            row[name] for row in run.ask(f"select {name} from trials group by {name} order by min(place)") if row[name]
        ]
        for name in CHOICES
    }
