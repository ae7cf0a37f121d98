"""The view in a real browser, on a server of its own, while a run goes on beside it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import HOSTILE, NEEDED, chromium, opened, serious
from kvpatch.store import Store
from synthetic import dec7, record_of, run_parts, write_run

pytestmark = NEEDED


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened_one:
        yield opened_one


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of runs: a finished one, and one whose every text is hostile."""
    home = tmp_path_factory.mktemp("runs")
    write_run(home / "whole", n=4, phases=["1", "4"])
    store, parts = Store(home / "hostile"), list(run_parts(dec7(), 2, 1, 2, phases=["4"]))
    record = record_of(dec7(), {"4": 1}, hardware={"processor": HOSTILE}, git={"commit": HOSTILE})
    with store.locked():
        store.write_record(record)
        for name, rows in parts:
            texts = dict.fromkeys(("text", "source_text", "target_text", "pair_id", "error", "stopped"), HOSTILE)
            store.append(name, [{**row, **texts, "trial_id": f"{row['trial_id']}<b>/..?#%2f"} for row in rows])
    return home


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """Where `kvpatch view` serves it, token included."""
    command = [sys.executable, "-m", "kvpatch.cli", "view", str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        assert said.startswith("view: http://127.0.0.1:")
        yield said.removeprefix("view: ").strip().rstrip("/")
        server.terminate()


def test_runs_stand_side_by_side(browser: Any, address: str) -> None:
    with opened(browser, offline=False) as (page, said):
        page.goto(f"{address}/")
        row = page.locator("#beside tbody tr", has_text="dose_trend").first
        row.wait_for()
        assert page.locator(".card").count() == 2
        assert page.locator("#beside thead th").all_inner_texts()[1:] == ["hostile", "whole"]
        page.locator("#beside tbody tr:has-text('transfer_llr') td:nth-child(3) .under").wait_for()
        assert said == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("where", ["", "run/whole/", "run/whole/trials", "run/whole/trial/1-C-0-0"])
def test_pages_fit_complain_of_nothing_and_pass_axe(browser: Any, address: str, where: str, width: int) -> None:
    for scheme in ("light", "dark"):
        with opened(browser, width, scheme, offline=False) as (page, said):
            page.goto(f"{address}/{where}")
            if where == "run/whole/":
                page.wait_for_selector("#estimates figure:last-child svg")
            if where == "":
                page.wait_for_selector("#beside tbody tr")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert serious(page) == []
            assert said == []


def test_filters_and_a_trial_are_reached_by_keyboard(browser: Any, address: str) -> None:
    with opened(browser, offline=False) as (page, said):
        page.goto(f"{address}/run/whole/trials")
        page.get_by_label("Words, all of which").focus()
        page.keyboard.type("awareness")
        page.keyboard.press("Enter")
        page.wait_for_url("**q=awareness**")
        assert page.locator("table.trials tbody tr").count() > 5
        page.locator("table.trials tbody a").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/trial/**")
        assert page.locator(".tokens .token").count() > 30
        assert said == []


@pytest.mark.parametrize("where", ["", "run/hostile/", "run/hostile/trials", "run/hostile/trials?q=<script>", "report"])
def test_hostile_texts_run_nothing(browser: Any, address: str, where: str) -> None:
    with opened(browser, offline=False) as (page, said):
        page.goto(f"{address}/{'run/hostile/report' if where == 'report' else where}")
        if where == "run/hostile/":
            page.wait_for_selector("body[data-live=yes]")
            page.wait_for_selector("#newest tbody tr")
        if where == "report":
            page.wait_for_selector("html[data-charts=done]")
        if where.endswith("trials"):
            assert "<script>window.ran" in page.locator("table.trials tbody").inner_text()
            page.locator("table.trials tbody a").first.click()
            page.wait_for_selector("text=Every number")
            assert "\u27e8RLO\u27e9" in page.locator(".output-text").inner_text()
        assert page.evaluate("window.ran") is None
        assert page.locator("main img, main svg[onload]").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        assert said == []


def test_new_rows_show_while_a_run_goes_on_and_its_end_is_seen(browser: Any, address: str, home: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "growing.py"), str(home / "growing")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as going:
        assert going.stdin is not None and going.stdout is not None

        def stored() -> str:
            print(file=going.stdin, flush=True)
            return going.stdout.readline().strip()

        for _ in range(8):
            stored()
        with opened(browser, offline=False) as (page, said):
            for _ in range(60):  # until the view has found the new directory
                if page.request.get(f"{address}/run/growing/").status == 200:
                    break
                page.wait_for_timeout(500)
            page.goto(f"{address}/run/growing/")
            page.wait_for_selector(".state.running")
            page.wait_for_selector("#estimates figure svg")
            assert page.locator(".not-final").is_visible()
            for _ in range(3):
                page.wait_for_selector(f'#newest tr[data-trial="{stored()}"]', timeout=20_000)
            going.kill()
            page.wait_for_selector(".state.interrupted", timeout=20_000)
            assert said == []
