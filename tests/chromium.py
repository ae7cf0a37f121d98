"""A real browser: Chromium, driven by Playwright, and what the tests of pages ask of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDED = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"),
]
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text("utf-8")
HOSTILE = (
    "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    "<svg onload='window.ran = 1'></svg> \u202eabc\u200f \x00 " + "w" * 10_000
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        yield opened
        opened.close()


@contextmanager
def opened(browser: Any, width: int = 1280, scheme: str = "light", offline: bool = True) -> Iterator[tuple[Any, list]]:
    """(a page, what it complained of): errors and warnings of its console, and exceptions, as they come."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=offline, accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page, said
    context.close()


def serious(page: Any) -> list[str]:
    """What axe-core finds on the page that it calls serious or critical: rule and first place."""
    # Added through the debugger, so that the page's policy does not stop it.
    session = page.context.new_cdp_session(page)
    session.send("Runtime.evaluate", {"expression": AXE})
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)")
    return [
        f"{v['id']} at {v['nodes'][0]['target']}: {v['nodes'][0]['failureSummary']} ({len(v['nodes'])} places)"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
