"""A real browser: Chromium, driven by Playwright, and what the tests of pages ask of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
PATIENCE = 180_000
"""Milliseconds that anything on a page may take: a busy machine is slow, and no fault of the page."""
expect = playwright.expect
"""Asks until the answer is right. Whatever a page draws or loads is read through it, or through `settled`."""
expect.set_options(timeout=PATIENCE)
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
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS, timeout=PATIENCE)
        yield opened
        opened.close()


@contextmanager
def opened(browser: Any, width: int = 1280, scheme: str = "light", offline: bool = True) -> Iterator[tuple[Any, list]]:
    """(a page, what it complained of): errors and warnings of its console, and exceptions, as they come."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=offline, accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page, said
    context.close()


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """Where `kvpatch view` serves a directory, token included."""
    command = [sys.executable, "-m", "kvpatch", "view", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            said = server.stdout.readline()  # comes when it answers, however long that takes
            assert said.startswith("view: http://127.0.0.1:")
            yield said.removeprefix("view: ").strip().rstrip("/")
        finally:
            server.terminate()


def settled(page: Any, expression: str, wanted: Any, argument: Any = None) -> Any:
    """What a JavaScript function gives: asked again and again until it is what is wanted, or patience ends.

    The page itself asks. Playwright's `wait_for_function` would evaluate text, which the pages' policy forbids.
    """
    asking = """async ({argument, wanted, patience}) => {
        const read = %s;
        const end = performance.now() + patience;
        for (;;) {
            const found = read(argument);
            if (JSON.stringify(found ?? null) === wanted || performance.now() > end) return found;
            await new Promise((next) => setTimeout(next, 50));
        }
    }"""
    compact = json.dumps(wanted, separators=(",", ":"), ensure_ascii=False)
    return page.evaluate(asking % expression, {"argument": argument, "wanted": compact, "patience": PATIENCE})


def eventually(page: Any, holds: Callable[[], bool]) -> bool:
    """Whether something that is not on the page comes to hold while the page goes on."""
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end:
        if holds():
            return True
        page.wait_for_timeout(50)
    return False


def assert_fits(page: Any, width: int) -> None:
    """Nothing on the page makes it wider than its window."""
    too_wide = "width => Math.max(0, document.documentElement.scrollWidth - width)"
    assert settled(page, too_wide, 0, width) == 0


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
