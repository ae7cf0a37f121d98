"""The report in a real browser: from the disk, with no network."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest

from chromium import HOSTILE, NEEDED, assert_fits, expect, opened, serious, settled
from kvpatch.protocols.schema import Protocol
from kvpatch.report.build import write_report
from kvpatch.report.packing import unpacked
from kvpatch.report.page import render
from kvpatch.verdicts.outcome import outcome_of
from synthetic import write_run

pytestmark = NEEDED
UNFOLD = "document.dispatchEvent(new Event('unfold-all'))"
NOT_DRAWN = ".chart:not([data-drawn=yes])"
MARKS = """charts => charts.map(([id, names]) => names.map((name) => {
    const groups = [...document.querySelectorAll(`[id="${id}"] [class*="_marks"]`)].filter(
        (group) => group.getAttribute('class').match(/(\\S+)_marks/)[1] === name);
    return [id, name, groups.map((group) => group.querySelectorAll('path').length).reduce((a, b) => a + b, 0)];
})).flat()"""
TOO_WIDE = """() => [...document.querySelectorAll('.chart')].filter(
    (box) => box.querySelector('svg').getBoundingClientRect().width > box.clientWidth + 1).map((box) => box.id)"""


class Seen(NamedTuple):
    """A page, how wide it is, what it complained of, and the addresses it asked for."""

    page: Any
    width: int
    said: list[str]
    asked: list[str]


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
    """Every chart that is not folded away is drawn. A test that needs none, or one, waits for that alone."""
    page.goto(path.as_uri())
    expect(page.locator("html")).to_have_attribute("data-charts", "done")


@pytest.fixture(scope="module", params=[(1280, "light"), (390, "dark")], ids=lambda shape: f"{shape[0]}-{shape[1]}")
def seen(request: pytest.FixtureRequest, browser: Any, whole: Path) -> Iterator[Seen]:
    """The whole report in one window, drawn. Tests share it, since drawing takes most of their time."""
    width, scheme = request.param
    asked: list[str] = []
    with opened(browser, width, scheme) as (page, said):
        page.on("request", lambda request: asked.append(request.url))
        drawn(page, whole)
        yield Seen(page, width, said, asked)


def unfolded(page: Any) -> None:
    """Everything is unfolded but the tables of charts, and every chart is drawn."""
    page.evaluate(UNFOLD)
    expect(page.locator(NOT_DRAWN)).to_have_count(0)
    expect(page.locator("html")).to_have_attribute("data-charts", "done")


def charts_of(page: Any) -> dict[str, dict[str, list[dict]]]:
    """Chart -> name of a data set -> its rows, as they stand in the page."""
    specs = page.eval_on_selector_all("script.spec", "all => all.map(s => [s.dataset.for, s.textContent])")
    out = {}
    for chart, content in specs:
        sets = json.loads(unpacked(content))["datasets"].values()
        out[chart] = {s["name"]: [dict(zip(s["columns"], row, strict=True)) for row in s["rows"]] for s in sets}
    return out


def marks_wanted(chart: str, name: str, rows: list[dict]) -> int:
    """One mark a row; trajectories have a line a condition."""
    if chart.startswith("rv_") and name == "lines":
        return len({row["condition"] for row in rows})
    return len(rows)


def test_axe_finds_nothing_serious(seen: Seen) -> None:
    assert serious(seen.page) == []


def test_print_opens_what_is_folded_and_drawn(seen: Seen) -> None:
    page = seen.page
    closed = page.locator("details:not([open]):not(.data)")
    before = closed.count()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    expect(page.locator("details:not([open]):not(.data):not(:has(.chart))")).to_have_count(0)
    expect(page.locator(".chart[data-drawn=begun]")).to_have_count(0)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    expect(closed).to_have_count(before)


def test_every_chart_is_drawn_with_a_mark_for_every_datum(seen: Seen, whole: Path) -> None:
    page = seen.page
    assert whole.stat().st_size < 3_000_000
    unfolded(page)
    charts = charts_of(page)
    assert len(charts) > 100
    expect(page.locator(".chart")).to_have_count(len(charts))
    names = {chart: [name for name in sets if not name.startswith("_")] for chart, sets in charts.items()}
    wanted = [[c, name, marks_wanted(c, name, charts[c][name])] for c, shown in names.items() for name in shown]
    assert settled(page, MARKS, wanted, list(names.items())) == wanted
    assert_fits(page, seen.width)
    assert settled(page, TOO_WIDE, []) == []
    assert seen.said == []
    assert seen.asked == [whole.as_uri()]


def test_a_chart_gives_its_table_csv_svg_and_png(browser: Any, whole: Path) -> None:
    with opened(browser) as (page, said):
        drawn(page, whole)
        unfolded(page)
        sets = charts_of(page)["readout-1-mode_llr"]
        rows = sets["means"]
        figure = page.locator("figure:has(#readout-1-mode_llr)")

        def saved(label: str) -> bytes:
            with page.expect_download() as waiting:
                figure.get_by_role("button", name=label).click()
            return Path(waiting.value.path()).read_bytes()

        table = list(csv.DictReader(io.StringIO(saved("CSV").decode())))
        assert [(r["condition"], float(r["mean"]), float(r["p90"])) for r in table] == [
            (r["condition"], r["mean"], r["p90"]) for r in rows
        ]
        assert all(r["about"] for r in table)
        assert b"<svg" in saved("SVG")[:200]
        assert saved("PNG").startswith(b"\x89PNG")
        figure.locator("details.data > summary").click()
        expect(figure.locator("details.data tbody tr")).to_have_count(len(rows))
        assert said == []


def test_hostile_texts_run_nothing(browser: Any, hostile: Path) -> None:
    with opened(browser) as (page, said):
        drawn(page, hostile)
        unfolded(page)
        dots = page.locator("#readout-1-mode_llr .means_marks path")
        expect(dots).to_have_count(len(charts_of(page)["readout-1-mode_llr"]["means"]))
        tip, is_shown = page.locator("#vg-tooltip-element"), re.compile(r"\bvisible\b")
        shown = []
        for dot in dots.all()[::6]:
            page.mouse.move(0, 0)
            expect(page.locator("#vg-tooltip-element.visible")).to_have_count(0)
            dot.hover(force=True)
            expect(tip).to_have_class(is_shown)
            shown.append(tip.inner_text())
        assert any("natural target" in text for text in shown)
        figure = page.locator("figure:has(#readout-1-mode_llr)")
        figure.locator("details.data > summary").click()
        expect(figure.locator("details.data")).to_have_attribute("data-drawn", "yes")
        expect(page.locator(".outputs").first).to_contain_text("onerror")
        expect(page.locator("main img, main svg[onload], #vg-tooltip-element img")).to_have_count(0)
        assert_fits(page, 1280)
        assert page.evaluate("window.ran") is None
        assert said == []


def test_texts_are_leafed_through_by_keyboard(browser: Any, whole: Path) -> None:
    with opened(browser) as (page, said):
        page.goto(whole.as_uri())
        page.keyboard.press("Tab")
        expect(page.locator("a.skip")).to_be_focused()
        pair = page.locator(".pair:visible")
        expect(pair).to_have_count(1)
        first = pair.get_attribute("data-pair")
        page.get_by_role("button", name="Next pair").focus()
        page.keyboard.press("Enter")
        expect(pair).not_to_have_attribute("data-pair", str(first))
        page.get_by_label("Phase", exact=False).first.select_option(index=1)
        expect(page.locator(".sample-phase:visible h3")).to_have_text(re.compile(r"^\s*Phase 2"))
        names = page.locator(".pair:visible .outputs").first.locator("h5 b")
        for place, name in enumerate("AB"):
            expect(names.nth(place)).to_have_text(name)
        assert said == []


def test_the_report_with_its_folds_closed_is_at_most_eight_thousand_pixels_tall(browser: Any, whole: Path) -> None:
    with opened(browser) as (page, _):
        drawn(page, whole)
        page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = false))")
        assert page.evaluate("document.documentElement.scrollHeight") <= 8000


def test_chips_and_search_show_the_verdicts_that_are_asked_for(browser: Any, whole: Path) -> None:
    with opened(browser) as (page, said):
        drawn(page, whole)
        chip = page.locator("#chips button[data-word]:not([data-word=''])").first
        word = chip.get_attribute("data-word")
        chip.focus()
        page.keyboard.press("Enter")
        expect(chip).to_have_attribute("aria-pressed", "true")
        expect(page.locator(f".group:not([data-word='{word}']):not([hidden])")).to_have_count(0)
        expect(page.locator(".group:not([hidden]):not([open])")).to_have_count(0)
        page.locator("#claim-search").fill("no claim says this")
        expect(page.locator(".group:not([hidden])")).to_have_count(0)
        assert said == []
