"""The page in a real browser: from the disk, with no network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvpatch.protocols.schema import Protocol
from kvpatch.report.page import render

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = (
    "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    "<svg onload='window.ran = 1'></svg> \u202eabc \x00 " + "w" * 10_000
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def report(
    tmp_path: Path,
    run: dict,
    protocol: Protocol,
    trials: pd.DataFrame,
    verdicts: list[dict],
    marker: Callable[[str, str], list[tuple[int, int, str]]],
) -> Path:
    trials["text"] = [t if i % 3 else HOSTILE for i, t in enumerate(trials["text"])]
    trials["pair_id"] = [f"{p} {HOSTILE[:76]}" if p == "pair-001" else p for p in trials["pair_id"]]
    path = tmp_path / "report.html"
    html = render(run, protocol, trials, verdicts, f"The answer. {HOSTILE[:40]}", marker)
    path.write_text(html, encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_draws_every_chart_and_runs_nothing_else(
    browser: Any, report: Path, width: int, scheme: str, tmp_path: Path
) -> None:
    said: list[str] = []
    asked: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-charts=done]", timeout=30_000)

    assert said == []
    assert asked == [report.as_uri()]
    assert page.evaluate("window.ran") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".chart[data-drawn=yes]").count() == page.locator(".chart").count() == 10
    dots = page.eval_on_selector_all(
        ".figures .chart",
        "boxes => boxes.map(b => b.querySelectorAll('.role-mark.points_marks path').length)",
    )
    drawn = page.eval_on_selector_all(
        ".figures .chart", "boxes => boxes.map(b => b.querySelectorAll('.role-mark.means_marks path').length)"
    )
    assert dots == [178] * 9
    assert drawn == [15] * 9
    too_wide = """boxes => boxes.filter(
        b => b.querySelector('svg').getBoundingClientRect().width > b.clientWidth + 1).length"""
    assert page.eval_on_selector_all(".chart", too_wide) == 0
    shot = tmp_path / f"{width}-{scheme}.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 50_000
    context.close()


def test_a_tooltip_shows_a_hostile_pair_as_text(browser: Any, report: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-charts=done]", timeout=30_000)
    dots = page.locator("#readout-1-mode_llr .points_marks path")
    shown = []
    for i in range(0, dots.count(), 4):
        dots.nth(i).dispatch_event("pointermove")
        dots.nth(i).hover(force=True)
        shown.append(page.locator("#vg-tooltip-element").inner_text())
    assert any("pair-" in text for text in shown)
    assert page.evaluate("window.ran") is None
    assert page.locator("#vg-tooltip-element img, #vg-tooltip-element script").count() == 0
    context.close()


def test_print_opens_what_is_folded(browser: Any, report: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-charts=done]", timeout=30_000)
    closed = page.locator("details:not([open])").count()
    assert closed > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == closed
    context.close()
