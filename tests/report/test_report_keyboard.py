"""The report without a mouse: everything is reached, shown and worked by keys, in a window of either width."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import NEEDED, expect, opened, settled
from keyboard import assert_keyboard_reaches_everything, clicks_of, remember, wanted
from kvpatch.report.packing import unpacked

pytestmark = NEEDED
SPEC = re.compile(r'<script type="application/gzip" class="spec" data-for="([^"]*)">([^<]*)</script>')


@pytest.fixture
def shown(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Any, list[str], list[str]]]:
    """(the page, what it complained of, the addresses it asked for)"""
    with opened(browser, getattr(request, "param", 1280)) as (page, said):
        asked: list[str] = []
        page.on("request", lambda sent: asked.append(sent.url))
        remember(page)
        page.goto(report.as_uri())
        expect(page.locator("html")).to_have_attribute("data-opened", "yes")
        yield page, said, asked


@pytest.mark.parametrize("shown", [1280, 390], indirect=True)
def test_tab_and_shift_tab_reach_everything_as_the_report_opens(shown: tuple[Any, list, list]) -> None:
    page, said, _ = shown
    assert len(assert_keyboard_reaches_everything(page)) > 50
    assert said == []


def test_enter_and_space_unfold_everything_and_tab_reaches_all_of_it(
    shown: tuple[Any, list, list], report: Path
) -> None:
    page, said, asked = shown
    met = assert_keyboard_reaches_everything(page, unfolds=True)
    kinds = {here["kind"] for here in met}
    assert {"a", "button", "select", "input", "summary", "div"} <= kinds
    assert page.locator("main details:not([open]) > summary:visible").count() == 0
    assert len(wanted(page)) > 150
    assert said == [] and asked == [report.as_uri()]


def test_arrows_choose_in_lists_of_every_kind_and_scroll_a_box(shown: tuple[Any, list, list]) -> None:
    page, said, _ = shown
    page.evaluate("document.querySelectorAll('#attention details').forEach((fold) => (fold.open = true))")
    for where in ("#choose select", "#attention select"):
        for chosen in page.locator(where).all():
            if chosen.locator("option").count() < 2:
                continue
            before = chosen.evaluate("e => e.selectedIndex")
            chosen.focus()
            page.keyboard.press("ArrowUp" if before else "ArrowDown")
            assert chosen.evaluate("e => e.selectedIndex") != before
            expect(page.locator("html")).to_have_attribute("data-charts", "done")
    page.evaluate("document.querySelectorAll('#how details').forEach((fold) => (fold.open = true))")
    page.locator("#how pre").focus()
    page.keyboard.press("ArrowDown")
    assert settled(page, "() => document.activeElement.scrollTop > 0", True)
    assert said == []


def test_enter_and_space_press_every_kind_of_button_and_enter_follows_links(shown: tuple[Any, list, list]) -> None:
    page, said, _ = shown
    for key in ("Enter", "Space"):
        for button in (page.locator("#chips button").first, page.get_by_role("button", name="Next pair")):
            button.focus()
            assert clicks_of(page, key) == 1
        with page.expect_download():
            page.get_by_role("button", name="SVG").first.focus()
            page.keyboard.press(key)
    link = page.locator(".contents a[href='#instruments']")
    link.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#instruments > details")).to_have_attribute("open", "")
    assert said == []


def test_every_link_within_the_page_leads_somewhere(shown: tuple[Any, list, list]) -> None:
    page, _, _ = shown
    lost = "all => all.map(a => a.getAttribute('href').slice(1)).filter(id => !document.getElementById(id))"
    assert page.eval_on_selector_all("a[href^='#']", lost) == []


def test_what_the_headings_of_a_table_mean_is_shown_to_who_reaches_them_by_tab(shown: tuple[Any, list, list]) -> None:
    page, _, _ = shown
    heading = page.locator("table.planned thead th[title]").first
    heading.focus()
    says = heading.evaluate("e => getComputedStyle(e, '::after').content")
    assert str(heading.get_attribute("title")) in says


ROWS = """ids => ids.map((id) => {
    const table = document.querySelector(`[id="${id}"] + .tools details.data`);
    return [id, table.open, table.querySelectorAll('tbody tr').length];
})"""


def test_enter_opens_the_table_of_every_chart_with_all_rows_that_it_draws(
    shown: tuple[Any, list, list], report: Path
) -> None:
    page, said, _ = shown
    specs = {name: json.loads(unpacked(content)) for name, content in SPEC.findall(report.read_text("utf-8"))}
    page.evaluate("document.dispatchEvent(new Event('unfold-all'))")
    expect(page.locator(".chart:not([data-drawn=yes])")).to_have_count(0)
    expect(page.locator("html")).to_have_attribute("data-charts", "done")
    for name in specs:
        assert page.evaluate(
            'id => { const at = document.querySelector(`[id="${id}"] + .tools details.data > summary`);'
            " at.focus(); return document.activeElement === at; }",
            name,
        )
        page.keyboard.press("Enter")
    wanted = [
        [name, True, sum(min(500, len(s["rows"])) for s in spec["datasets"].values() if not s["name"].startswith("_"))]
        for name, spec in specs.items()
    ]
    assert settled(page, ROWS, wanted, list(specs)) == wanted
    assert said == []
