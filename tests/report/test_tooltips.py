"""What a tooltip says is reached without a mouse: the table of every chart holds the same numbers.

That keys open each of these tables, with all its rows, is seen in test_report_keyboard.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpatch.report.build import write_report
from kvpatch.report.packing import unpacked
from kvpatch.verdicts.outcome import outcome_of
from synthetic import write_run

SPEC = re.compile(r'<script type="application/gzip" class="spec" data-for="([^"]*)">([^<]*)</script>')
NOT_IN_TABLES = {"offset", "order", "row"}  # as in report.js


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run of every phase, with every kind of chart."""
    store = write_run(tmp_path_factory.mktemp("whole"), n=4)
    return write_report(store, outcome_of(store))


def tips(view: dict[str, Any], data: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """(data set, fields) of every tooltip in a specification."""
    found = view.get("data")
    data = found["name"] if isinstance(found, dict) and "name" in found else data
    shown = view.get("encoding", {}).get("tooltip", [])
    fields = [tip["field"] for tip in (shown if isinstance(shown, list) else [shown]) if "field" in tip]
    if fields:
        assert data is not None
        yield data, fields
    for part in ("layer", "hconcat", "vconcat", "concat"):
        for inner in view.get(part, []):
            yield from tips(inner, data)
    if "spec" in view:
        yield from tips(view["spec"], data)


def missing(spec: dict[str, Any]) -> list[str]:
    """Tooltips of a chart whose numbers stand in none of its tables."""
    sets = spec["datasets"]
    out = []
    for key, fields in tips(spec):
        own = sets[key]
        places = [own["columns"].index(field) for field in fields if field in own["columns"]]
        wanted = {tuple(json.dumps(row[place]) for place in places) for row in own["rows"]}
        names = [own["columns"][place] for place in places]
        if any(
            wanted <= {tuple(json.dumps(row[table["columns"].index(name)]) for name in names) for row in table["rows"]}
            for table in sets.values()
            if not table["name"].startswith("_")
            and set(names) <= set(table["columns"])
            and not set(names) & NOT_IN_TABLES
        ):
            continue
        out.append(f"{own['name']}: {fields}")
    return out


def test_every_tooltip_of_every_chart_says_what_stands_in_a_table_of_that_chart(report: Path) -> None:
    specs = {name: json.loads(unpacked(content)) for name, content in SPEC.findall(report.read_text("utf-8"))}
    assert len(specs) > 40
    assert sum(bool(list(tips(spec))) for spec in specs.values()) > 30
    assert {name: found for name, spec in specs.items() if (found := missing(spec))} == {}
