"""The report in a real browser: from the disk, with no network."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from chromium import HOSTILE, NEEDED, chromium, opened, serious
from kvpatch.outcome import outcome_of, write_report
from kvpatch.protocols.schema import Protocol
from kvpatch.report.page import render
from synthetic import write_run

pytestmark = NEEDED
UNFOLD = "document.querySelectorAll('details:not(.data)').forEach(d => d.open = true)"
NOT_DRAWN = ".chart:not([data-drawn=yes])"
MARKS = """id => {
    const found = {};
    for (const group of document.querySelectorAll(`[id="${id}"] [class*="_marks"]`)) {
        const name = group.getAttribute('class').match(/(\\S+)_marks/)[1];
        found[name] = (found[name] ?? 0) + group.querySelectorAll('path').length;
    }
    return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened_one:
        yield opened_one


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run of every phase."""
    store = write_run(tmp_path_factory.mktemp("whole"), n=5)
    return write_report(store, outcome_of(store))


@pytest.fixture
def hostile(
    tmp_path: Path,
    run: dict,
    protocol: Protocol,
    trials: pd.DataFrame,
    verdicts: list[dict],
    marker: Callable[..., list[tuple[int, int, str]]],
) -> Path:
    trials["text"] = [t if i % 3 else HOSTILE for i, t in enumerate(trials["text"])]
    trials["source_text"] = trials["target_text"] = HOSTILE
    trials["pair_id"] = [f"{p} {HOSTILE[:76]}" if p == "pair-001" else p for p in trials["pair_id"]]
    path = tmp_path / "report.html"
    html = render(run, protocol, trials, verdicts, f"The answer. {HOSTILE[:40]}", marker)
    path.write_text(html, encoding="utf-8")
    return path


def drawn(page: Any, path: Path) -> None:
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-charts=done]")


def charts_of(page: Any) -> dict[str, dict[str, list[dict]]]:
    """Chart -> name of a data set -> its rows, as they stand in the page."""
    specs = page.eval_on_selector_all("script.spec", "all => all.map(s => [s.dataset.for, s.textContent])")
    out = {}
    for chart, content in specs:
        sets = json.loads(content)["datasets"].values()
        out[chart] = {s["name"]: [dict(zip(s["columns"], row, strict=True)) for row in s["rows"]] for s in sets}
    return out


def marks_wanted(chart: str, name: str, rows: list[dict]) -> int:
    """One mark a row; dose curves have one line a pair and series, trajectories one a condition."""
    if chart.startswith("dose-") and name == "points":
        return len({(row["pair"], row["series"]) for row in rows})
    if chart.startswith("rv_") and name == "lines":
        return len({row["condition"] for row in rows})
    return len(rows)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_every_chart_is_drawn_with_a_mark_for_every_datum(browser: Any, whole: Path, width: int, scheme: str) -> None:
    assert whole.stat().st_size < 8_000_000
    asked: list[str] = []
    with opened(browser, width, scheme) as (page, said):
        page.on("request", lambda request: asked.append(request.url))
        drawn(page, whole)
        page.evaluate(UNFOLD)
        page.wait_for_selector(NOT_DRAWN, state="detached")
        charts = charts_of(page)
        assert len(charts) == page.locator(".chart").count() > 100
        for chart, sets in charts.items():
            found = page.evaluate(MARKS, chart)
            for name, rows in sets.items():
                if not name.startswith("_"):
                    assert found.get(name) == marks_wanted(chart, name, rows), (chart, name)
        assert said == []
        assert asked == [whole.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        too_wide = """boxes => boxes.filter(
            b => b.querySelector('svg').getBoundingClientRect().width > b.clientWidth + 1).map(b => b.id)"""
        assert page.eval_on_selector_all(".chart", too_wide) == []


def test_a_chart_gives_its_table_csv_svg_and_png(browser: Any, whole: Path) -> None:
    with opened(browser) as (page, said):
        drawn(page, whole)
        rows = charts_of(page)["readout-1-mode_llr"]["points"]
        figure = page.locator("figure:has(#readout-1-mode_llr)")

        def saved(label: str) -> bytes:
            with page.expect_download() as waiting:
                figure.get_by_role("button", name=label).click()
            return Path(waiting.value.path()).read_bytes()

        table = list(csv.DictReader(io.StringIO(saved("CSV of points").decode())))
        assert [(r["condition"], r["pair"], float(r["value"])) for r in table] == [
            (r["condition"], r["pair"], r["value"]) for r in rows
        ]
        assert b"<svg" in saved("SVG")[:200]
        assert saved("PNG").startswith(b"\x89PNG")
        figure.locator("details.data > summary").click()
        assert figure.locator("details.data tbody tr").count() == len(rows) + 17
        assert said == []


def test_hostile_texts_run_nothing(browser: Any, hostile: Path) -> None:
    with opened(browser) as (page, said):
        drawn(page, hostile)
        page.evaluate(UNFOLD)
        page.wait_for_selector(NOT_DRAWN, state="detached")
        dots = page.locator("#readout-1-mode_llr .points_marks path")
        shown = []
        for i in range(0, dots.count(), 6):
            dots.nth(i).dispatch_event("pointermove")
            dots.nth(i).hover(force=True)
            shown.append(page.locator("#vg-tooltip-element").inner_text())
        assert any("pair-" in text for text in shown)
        figure = page.locator("figure:has(#readout-1-mode_llr)")
        figure.locator("details.data > summary").click()
        assert "onerror" in page.locator(".outputs").first.inner_text()
        assert page.evaluate("window.ran") is None
        assert page.locator("main img, main svg[onload], #vg-tooltip-element img").count() == 0
        assert said == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_print_opens_what_is_folded_and_drawn(browser: Any, whole: Path) -> None:
    with opened(browser) as (page, _):
        drawn(page, whole)
        closed = page.locator("details:not([open]):not(.data)").count()
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open]):not(.data):not(:has(.chart))").count() == 0
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("details:not([open]):not(.data)").count() == closed


def test_texts_are_leafed_through_by_keyboard(browser: Any, whole: Path) -> None:
    with opened(browser) as (page, said):
        drawn(page, whole)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.locator(".pair:visible").count() == 1
        first = page.locator(".pair:visible").get_attribute("data-pair")
        page.get_by_role("button", name="Next pair").focus()
        page.keyboard.press("Enter")
        assert page.locator(".pair:visible").get_attribute("data-pair") != first
        page.get_by_label("Phase", exact=False).first.select_option(index=1)
        assert page.locator(".sample-phase:visible h3").inner_text().startswith("Phase 2")
        names = page.locator(".pair:visible .outputs").first.locator("h5 b").all_inner_texts()
        assert names[:2] == ["A", "B"]
        assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, whole: Path, scheme: str) -> None:
    with opened(browser, scheme=scheme) as (page, _):
        drawn(page, whole)
        assert serious(page) == []
