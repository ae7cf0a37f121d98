"""A head over the tokens of one pair, in a real browser: by keys, by a click in the chart, and its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chromium import NEEDED, assert_fits, expect, opened, serious
from kvpatch.report.packing import unpacked

pytestmark = NEEDED


def ranking(page: Any, report: Path) -> tuple[Any, dict[str, Any]]:
    """The first ranking's figure, unfolded and drawn, and the data that its heads are shown from."""
    page.goto(report.as_uri())
    packed = page.locator("#attention .heads-data").first.text_content()
    page.evaluate("document.querySelector('#attention > details').open = true")
    figure = page.locator("#attention figure:has(.heads)").first
    expect(figure.locator(".heads button")).to_have_count(10)
    return figure, json.loads(unpacked(packed))


def cells(figure: Any) -> list[list[str]]:
    return figure.locator(".head-shown tbody tr").evaluate_all(
        "rows => rows.map((row) => [...row.children].map((cell) => cell.textContent))"
    )


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_keys_show_a_head_with_its_numbers_and_hide_it_again(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    with opened(browser, width, scheme) as (page, said):
        figure, data = ranking(page, report)
        buttons, shown = figure.locator(".heads button"), figure.locator(".head-shown > *")
        for place, key in ((0, "Enter"), (3, "Space")):
            buttons.nth(place).focus()
            page.keyboard.press(key)
            expect(buttons.nth(place)).to_have_attribute("aria-pressed", "true")
            expect(figure.locator(".heads button[aria-pressed=true]")).to_have_count(1)
            head = data["heads"][place]
            expect(figure.locator(".head-shown caption")).to_contain_text(head["name"])
            (_, first), (_, second) = head["sides"]
            tokens = [side["tokens"] for side in data["sides"]]
            assert cells(figure) == [
                [str(i), tokens[0][i], "–", f"{first[i]:.3f}", tokens[1][i], "–", f"{second[i]:.3f}"]
                for i in range(len(first))
            ]
            strips = figure.locator(".head-shown .tokens")
            expect(strips).to_have_count(2)
            limits = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
            for strip, shares in zip(strips.all(), (first, second), strict=True):
                steps = strip.locator(".token").evaluate_all(
                    "all => all.map((e) => Number(e.className.slice(-1)) || 0)"
                )
                assert steps == [sum(value >= limit for limit in limits) for value in shares]
        assert_fits(page, width)
        assert serious(page) == []
        page.keyboard.press("Space")
        expect(shown).to_have_count(0)
        assert said == []


def test_a_click_on_a_mark_of_the_chart_shows_that_head(browser: Any, report: Path) -> None:
    with opened(browser) as (page, said):
        figure, data = ranking(page, report)
        marks = figure.locator(".chart .heads_marks path")
        expect(marks).to_have_count(10)
        marks.nth(2).click(force=True)
        expect(figure.locator(".head-shown caption")).to_contain_text(data["heads"][2]["name"])
        expect(figure.locator(".heads button[aria-pressed=true]")).to_have_text(data["heads"][2]["name"])
        assert said == []
