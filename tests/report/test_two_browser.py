"""Any two conditions of a pair, token by token, in a real browser: chosen by keys, as `token_pair` has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from chromium import NEEDED, assert_fits, expect, opened, serious, settled
from kvpatch.report.build import write_report
from kvpatch.report.token_pairs import TOKEN_TEXTS, any_two, token_pair
from kvpatch.verdicts.outcome import outcome_of
from synthetic import write_run

pytestmark = NEEDED
SHARED = 12
IDS = list(range(500, 540))
SHOWN = """() => [...document.querySelectorAll('.pair:not([hidden]) .any-two .tokens')].map((strip) =>
    [...strip.querySelectorAll('.token')].map((e) => [e.textContent.trim(), e.className]))"""


def change(row: dict[str, Any]) -> dict[str, Any]:
    """C and N1 begin alike, and N1's tokens are the likelier the later they come."""
    if row["condition"] not in ("C", "N1"):
        return {}
    ids = IDS if row["condition"] == "C" else [*IDS[:SHARED], *range(700, 720)]
    step = 0.2 if row["condition"] == "N1" else 0.0
    return {"output_token_ids": ids, "output_logprobs": [-6.0 + step * place for place in range(len(ids))]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, dict[str, Any]]]]:
    """A report, and its trials by pair and condition."""
    store = write_run(tmp_path_factory.mktemp("two"), n=4, phases=["1"], change=change)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in store.read().to_pylist():
        rows.setdefault(row["pair_id"], {})[row["condition"]] = row
    return write_report(store, outcome_of(store)), rows


def expected(rows: dict[str, dict[str, Any]], one: str, other: str) -> list[list[list[str]]]:
    found = token_pair(rows[one], rows[other], (one, other))
    assert found is not None
    strips = []
    for side in (found.one, found.other):
        kinds = [f" {'up' if t.step > 0 else 'down'}{abs(t.step)}" if t.step else "" for t in side]
        parts = [" parts" if place == found.shared else "" for place in range(len(side))]
        strips.append([[t.text, f"token{k}{p}"] for t, k, p in zip(side, kinds, parts, strict=True)])
    return strips


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_two_conditions_are_chosen_by_keys_and_shown_as_token_pairs(
    browser: Any, run: tuple[Path, dict], width: int, scheme: str
) -> None:
    report, rows = run
    with opened(browser, width, scheme) as (page, said):
        page.goto(report.as_uri())
        expect(page.locator("html")).to_have_attribute("data-opened", "yes")
        pair = page.locator(".pair:not([hidden])")
        own = rows[pair.get_attribute("data-pair")]
        details = pair.locator(".any-two")
        details.locator("summary").focus()
        page.keyboard.press("Enter")
        lists = details.get_by_role("combobox")
        expect(lists).to_have_count(2)
        assert [each.input_value() for each in lists.all()] == ["M1", "M1n"]  # what the first primary test compares
        lists.nth(0).select_option("C")
        lists.nth(1).select_option("N1")
        wanted = expected(own, "C", "N1")
        assert settled(page, SHOWN, wanted) == wanted
        assert any("down" in kind for _, kind in wanted[0])
        expect(details.get_by_role("status")).to_contain_text(f"The first {SHARED} tokens are the same; then C goes on")
        lists.nth(1).focus()
        page.keyboard.press("Home")
        chosen = lists.nth(1).input_value()
        assert chosen not in ("C", "N1")
        wanted = expected(own, "C", chosen)
        assert settled(page, SHOWN, wanted) == wanted
        expect(details.get_by_role("status")).to_contain_text(re.compile("Not even the first token|The first"))
        assert_fits(page, width)
        assert serious(page) == []
        assert said == []


def test_tokens_of_one_id_stand_once_and_what_is_missing_is_told() -> None:
    one = {"output_token_ids": [5, 6, 5], "output_logprobs": [-1.0, float("nan"), None]}
    other = {"output_token_ids": [5, 7], "output_logprobs": [-0.5]}
    found = any_two({"A": one, "B": other, "C": {"output_token_ids": None}}, ["C", "B", "A"])
    assert found == {
        "texts": ["5", "6", "7"],
        "outputs": {
            "A": {"ids": [0, 1, 0], "logprobs": [-1.0, None, None]},
            "B": {"ids": [0, 2], "logprobs": [-0.5, None]},
        },
        "first": ["B", "A"],
        "isText": False,
    }
    assert any_two({"A": one}, []) is None
    alike = {
        name: {"output_token_ids": [i], "output_logprobs": [-1.0], TOKEN_TEXTS: ["a"]} for i, name in enumerate("AB")
    }
    found = any_two(alike, [])
    assert found is not None and found["texts"] == ["a", "a"]  # two tokens that read alike are not the same
    assert [found["outputs"][name]["ids"] for name in "AB"] == [[0], [1]]
