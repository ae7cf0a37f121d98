"""The view without a mouse: everything on its pages is reached, shown and worked by keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from chromium import NEEDED, expect, opened, served
from keyboard import assert_keyboard_reaches_everything, remember, walk
from synthetic import write_run

pytestmark = NEEDED
DRAWN = {"": "#beside", "run/first/": "#estimates"}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("runs")
    write_run(home / "first", n=4, phases=["1", "6"])
    write_run(home / "second", n=4, phases=["1"])
    with served(home) as where:
        yield where


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("where", ["", "run/first/", "run/first/trials", "run/first/trial/6-C-0-0"])
def test_tab_reaches_everything_and_only_this_server_is_asked(
    browser: Any, address: str, where: str, width: int
) -> None:
    with opened(browser, width, offline=False) as (page, said):
        asked: list[str] = []
        page.on("request", lambda sent: asked.append(sent.url))
        remember(page)
        page.goto(f"{address}/{where}")
        if where in DRAWN:
            expect(page.locator(DRAWN[where])).to_have_attribute("data-drawn", "yes")
        met = assert_keyboard_reaches_everything(page, unfolds=True)
        assert met[0]["kind"] == "a" and "Skip" in met[0]["name"]
        assert said == []
        assert [url for url in asked if not url.startswith((f"{address}/", "data:"))] == []


def test_a_trial_is_found_and_opened_by_keys_alone(browser: Any, address: str) -> None:
    with opened(browser, offline=False) as (page, said):
        remember(page)
        page.goto(f"{address}/run/first/trials")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # the skip link
        page.keyboard.press("Tab")
        expect(page.get_by_label("Words, all of which")).to_be_focused()
        page.keyboard.type("awareness")
        page.keyboard.press("Enter")
        page.wait_for_url("**q=awareness**")
        first = page.locator("table.trials tbody a").first
        expect(first).to_be_visible()
        names = [here["name"] for here in walk(page)]
        assert any(first.inner_text() in name for name in names)
        first.focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/trial/**")
        page.locator("nav.beside a").nth(1).focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/trial/**")
        assert said == []


def test_keys_open_the_numbers_of_every_estimate_s_chart(browser: Any, address: str) -> None:
    with opened(browser, offline=False) as (page, said):
        page.goto(f"{address}/run/second/")
        expect(page.locator("#estimates")).to_have_attribute("data-drawn", "yes")
        figures = page.locator("#estimates figure:has(svg)").all()
        assert len(figures) > 3
        shapes = page.locator("#estimates svg").evaluate_all(
            "all => all.map((e) => [e.viewBox.baseVal.width, Math.round(e.getBoundingClientRect().width)].join())"
        )
        assert len(set(shapes)) == 1  # none was drawn while the others had no place yet, and squeezed into its own
        for figure in figures:
            figure.locator("details.data > summary").focus()
            page.keyboard.press("Enter")
            expect(figure.locator("details.data")).to_have_attribute("open", "")
            heading = figure.locator("thead th").all_inner_texts()
            assert heading == ["n", "estimate", "low", "high"]
            last = dict(zip(heading, figure.locator("tbody tr").last.locator("td").all_inner_texts(), strict=True))
            now = figure.locator(".estimate-now").inner_text()
            told = [float(number.replace("\u2212", "-")) for number in re.findall(r"[-\u2212]?\d+(?:\.\d+)?", now)[:3]]
            assert told == pytest.approx([float(last[name]) for name in ("estimate", "low", "high")], abs=0.006)
        assert said == []
