"""A run whose every text is hostile, in report, view and notebook: nothing runs, nothing hides, no page grows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

import kvpatch as kv
from chromium import NEEDED, assert_fits, expect, opened, served
from hostile import HOSTILE, hidden, write_hostile_run
from kvpatch.report.build import write_report
from kvpatch.verdicts.outcome import outcome_of

pytestmark = NEEDED
READ = """() => {
    const out = [];
    const walk = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
        if (node.nodeType === Node.TEXT_NODE) {
            if (!['SCRIPT', 'STYLE'].includes(node.parentElement.tagName)) out.push(node.data);
        } else for (const attribute of node.attributes) out.push(`${attribute.name}=${attribute.value}`);
    }
    return out;
}"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hostile_run(tmp_path_factory.mktemp("hostile") / "run").directory


def assert_harmless(page: Any, said: list[str], width: int) -> None:
    """Nothing ran, was loaded, moved or hid, and the page is no wider than its window."""
    assert page.evaluate("window.ran") is None
    assert page.locator("main img, main iframe, main input[onfocus], main svg[onload], main math").count() == 0
    read = page.evaluate(READ)
    assert hidden(read) == []
    assert [text for text in read if re.match(r"(on\w+=|href=\s*(javascript|data:text))", text, re.IGNORECASE)] == []
    assert_fits(page, width)
    assert said == []


@pytest.mark.parametrize("width", [1280, 390])
def test_report_is_harmless(browser: Any, directory: Path, width: int) -> None:
    store = kv.Run(directory).store
    path = write_report(store, outcome_of(store))
    with opened(browser, width) as (page, said):
        page.goto(path.as_uri())
        expect(page.locator("html")).to_have_attribute("data-charts", "done")
        page.evaluate("document.dispatchEvent(new Event('unfold-all'))")
        expect(page.locator(".chart:not([data-drawn=yes])")).to_have_count(0)
        assert_harmless(page, said, width)


def test_view_is_harmless(browser: Any, directory: Path) -> None:
    with served(directory) as address, opened(browser, offline=False) as (page, said):
        search = "run/run/trials?q=<script>&pair_id=%E2%80%AEx"
        for where in ("", "run/run/", "run/run/trials", search, "run/run/report"):
            page.goto(f"{address}/{where}")
            if where == "run/run/":
                expect(page.locator("#newest tbody tr").first).to_be_visible()
                expect(page.locator("#estimates")).to_have_attribute("data-drawn", "yes")
            if where == "":
                expect(page.locator("#beside")).to_have_attribute("data-drawn", "yes")
            if where == "run/run/report":
                expect(page.locator("html")).to_have_attribute("data-charts", "done")
            assert_harmless(page, said, 1280)
        page.goto(f"{address}/run/run/trials")
        page.locator("table.trials tbody a").first.click()
        expect(page.locator("text=Every number").first).to_be_visible()
        assert_harmless(page, said, 1280)


def test_view_answers_any_search_with_a_page_that_is_harmless(browser: Any, directory: Path) -> None:
    with served(directory) as address, opened(browser, offline=False) as (page, said):
        for text in HOSTILE:
            asked = urlencode({"q": text, "pair_id": text, "phase": text, "sort": text, "min_mode_llr": text})
            answer = page.goto(f"{address}/run/run/trials?{asked[:6_000]}")
            assert answer.status == 200
            assert page.evaluate("window.ran") is None and hidden(page.evaluate(READ)) == []
        assert said == []


def test_what_a_model_shows_in_a_notebook_is_harmless(browser: Any, tiny: Any) -> None:
    model = tiny("llama")
    shown: list[str] = []
    for text in HOSTILE:
        cache = model.prefill([text[:60]], chat=False)
        shown.append(cache._repr_html_())
    source, target = model.prefill([HOSTILE[0], HOSTILE[41][:9]], chat=False), model.prefill(["a"] * 2, chat=False)
    ends = '\\" + (datum.value * 0) + "'  # would end the text of a tooltip where that is an expression
    metrics = [kv.logit_difference(HOSTILE[0], HOSTILE[41]), kv.probability(HOSTILE[49]), kv.probability(ends)]
    for metric in metrics:
        swept = model.sweep(source[0], target[0], {"layers": "each", "slots": "each"}, metric)
        shown += [swept._repr_html_(), swept.plot()._repr_mimebundle_()["image/svg+xml"]]
        assert hidden([repr(swept), repr(metric), repr(swept.plot())]) == []
    with opened(browser) as (page, said):
        page.set_content(f"<main>{''.join(shown)}</main>")
        assert page.evaluate("window.ran") is None and hidden(page.evaluate(READ)) == []
        assert page.locator("main img, main script, main iframe, main a").count() == 0
        labels = page.locator("[aria-label*='datum.value']")
        assert labels.count() > 3 and "+ (datum.value * 0) +" in labels.first.get_attribute("aria-label")
        assert said == []


def test_notebook_is_harmless(browser: Any, directory: Path) -> None:
    run = kv.Run(directory)
    charts = [run.plot.conditions()._repr_mimebundle_()["image/svg+xml"]]
    charts += [chart._repr_mimebundle_()["image/svg+xml"] for chart in (run.plot.forest(), run.plot.effects())]
    assert hidden([repr(run), *map(repr, (run.plot.conditions(), run.plot.forest()))]) == []
    with opened(browser) as (page, said):
        page.set_content(f"<main>{run._repr_html_()}{''.join(charts)}</main>")
        assert page.locator("main svg").count() == len(charts)
        assert page.evaluate("window.ran") is None and hidden(page.evaluate(READ)) == []
        assert page.locator("main img, main script, main iframe, main a[href^=javascript]").count() == 0
        assert said == []
