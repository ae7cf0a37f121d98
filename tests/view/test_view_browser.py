"""The view in a real browser, on a server of its own, while a run goes on beside it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import HOSTILE, NEEDED, assert_fits, eventually, expect, opened, serious, served
from kvpatch.store.directory import Store
from synthetic import dec7, record_of, run_parts, write_run

pytestmark = NEEDED


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
    with served(home) as where:
        yield where


def test_runs_stand_side_by_side(browser: Any, address: str) -> None:
    with opened(browser, offline=False) as (page, said):
        page.goto(f"{address}/")
        expect(page.locator("#beside")).to_have_attribute("data-drawn", "yes")
        expect(page.locator("#beside tbody tr", has_text="dose_trend").first).to_be_visible()
        expect(page.locator(".card")).to_have_count(2)
        expect(page.locator("#beside thead th")).to_have_text(["Hypothesis", "hostile", "whole"])
        expect(page.locator("#beside tbody tr:has-text('transfer_llr') td:nth-child(3) .under").first).to_be_visible()
        assert said == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    "where",
    ["", "run/whole/", "run/whole/trials", "run/whole/trial/1-C-0-0", "run/whole/trial/1-C-0-0?beside=1-A-0-0"],
)
def test_pages_fit_complain_of_nothing_and_pass_axe(browser: Any, address: str, where: str, width: int) -> None:
    for scheme in ("light", "dark"):
        with opened(browser, width, scheme, offline=False) as (page, said):
            page.goto(f"{address}/{where}")
            if where in ("", "run/whole/"):
                expect(page.locator("#estimates, #beside")).to_have_attribute("data-drawn", "yes")
            assert_fits(page, width)
            assert serious(page) == []
            assert said == []


def test_filters_and_a_trial_are_reached_by_keyboard(browser: Any, address: str) -> None:
    with opened(browser, offline=False) as (page, said):
        page.goto(f"{address}/run/whole/trials")
        page.get_by_label("Words, all of which").focus()
        page.keyboard.type("awareness")
        page.keyboard.press("Enter")
        page.wait_for_url("**q=awareness**")
        expect(page.locator("table.trials tbody tr").nth(5)).to_be_visible()
        page.locator("table.trials tbody a").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/trial/**")
        expect(page.locator(".tokens .token").nth(30)).to_be_attached()
        assert said == []


@pytest.mark.parametrize("where", ["", "run/hostile/", "run/hostile/trials", "run/hostile/trials?q=<script>", "report"])
def test_hostile_texts_run_nothing(browser: Any, address: str, where: str) -> None:
    with opened(browser, offline=False) as (page, said):
        page.goto(f"{address}/{'run/hostile/report' if where == 'report' else where}")
        if where == "run/hostile/":
            expect(page.locator("body")).to_have_attribute("data-live", "yes")
            expect(page.locator("#newest tbody tr").first).to_be_visible()
            expect(page.locator("#estimates")).to_have_attribute("data-drawn", "yes")
        if where == "":
            expect(page.locator("#beside")).to_have_attribute("data-drawn", "yes")
        if where == "report":
            expect(page.locator("html")).to_have_attribute("data-charts", "done")
        if where.endswith("trials"):
            expect(page.locator("table.trials tbody")).to_contain_text("<script>window.ran")
            page.locator("table.trials tbody a").first.click()
            expect(page.locator("text=Every number").first).to_be_visible()
            expect(page.locator(".output-text")).to_contain_text("\u27e8RLO\u27e9")
        expect(page.locator("main img, main svg[onload]")).to_have_count(0)
        assert_fits(page, 1280)
        assert page.evaluate("window.ran") is None
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
            here = f"{address}/run/growing/"
            assert eventually(page, lambda: page.request.get(here).status == 200)  # the view has found the directory
            page.goto(here)
            expect(page.locator(".state.running")).to_be_visible()
            expect(page.locator("#estimates figure svg").first).to_be_visible()
            expect(page.locator(".not-final")).to_be_visible()
            for _ in range(3):
                expect(page.locator(f'#newest tr[data-trial="{stored()}"]')).to_be_visible()
            going.kill()
            expect(page.locator(".state.interrupted")).to_be_visible()
            assert said == []
