"""Two outputs token by token: where they part, and how far the caches differ up to there."""

from __future__ import annotations

from pathlib import Path

import pytest

from chromium import NEEDED, chromium, expect, opened
from kvpatch.report.build import report_page, write_report
from kvpatch.report.packing import opened as unfolded
from kvpatch.report.token_pairs import TOKEN_TEXTS, strip_html, token_pair
from kvpatch.verdicts.outcome import outcome_of
from synthetic import write_run

A = {"output_token_ids": [5, 6, 7, 8], "output_logprobs": [-1.0, -2.0, -0.5, -0.1]}
C = {"output_token_ids": [5, 6, 9], "output_logprobs": [-0.4, -2.05, -3.0]}
TEXTS = {5: "One", 6: " <b>", 7: " seven", 8: ".", 9: " nine"}


def with_texts(row: dict) -> dict:
    return row | {TOKEN_TEXTS: [TEXTS[i] for i in row["output_token_ids"]]}


def test_tokens_before_the_parting_have_a_difference_and_those_behind_it_none() -> None:
    found = token_pair(C, A, ("C", "A"))
    assert found is not None and found.shared == 2 and not found.is_text
    assert [token.text for token in found.one] == ["5", "6", "9"]
    assert found.one[0].difference == pytest.approx(0.6) and found.other[0].difference == pytest.approx(-0.6)
    assert [token.difference is None for token in found.one] == [False, False, True]
    assert [token.step for token in found.one] == [3, 0, 0] and [token.step for token in found.other] == [-3, 0, 0, 0]


def test_where_they_part_is_told_with_both_tokens() -> None:
    found = token_pair(with_texts(C), with_texts(A), ("C", "A"))
    assert found is not None and found.is_text
    assert found.told == (
        "The first 2 tokens are the same; then C goes on with “ nine” (log-probability −3), "
        "and A goes on with “ seven” (log-probability −0.5)."
    )


def test_equal_texts_and_a_text_that_ends_are_told_as_such() -> None:
    same = token_pair(A, A, ("S0", "A"))
    assert same is not None and same.told == "S0 and A wrote the same 4 tokens."
    short = {name: values[:2] for name, values in A.items()}
    cut = token_pair(short, A, ("E", "A"))
    assert cut is not None and "then E ends, and A goes on with" in cut.told
    none = token_pair({"output_token_ids": [1], "output_logprobs": [-1.0]}, A, ("X", "A"))
    assert none is not None and none.told.startswith("Not even the first token is the same")


@pytest.mark.parametrize("row", [{}, {"output_token_ids": None}, {"output_token_ids": []}])
def test_a_trial_without_tokens_stands_beside_nothing(row: dict) -> None:
    assert token_pair(row, A, ("C", "A")) is None


def test_a_trial_without_log_probabilities_is_not_coloured() -> None:
    found = token_pair({"output_token_ids": [5, 6]}, A, ("C", "A"))
    assert found is not None and {token.step for token in (*found.one, *found.other)} == {0}


def test_the_strip_escapes_its_tokens_and_marks_the_parting() -> None:
    found = token_pair(with_texts(C), with_texts(A), ("C", "A"))
    assert found is not None
    html = strip_html(found.one, found.shared, True)
    assert "<b>" not in html and "&lt;b&gt;" in html
    assert html.count("token up3") == 1 and html.index(" parts") > html.index("&lt;b&gt;")


def test_the_report_shows_each_condition_beside_the_natural_target(tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", n=4, phases=["1"])
    page = unfolded(report_page(store, outcome_of(store)))
    assert page.count("Token by token, beside the natural target") == page.count('<article class="pair"') == 4
    assert page.count(' <p class="told">') + page.count('><p class="told">') >= 4 * 4
    assert "Not even the first token is the same: C begins with" in page


@pytest.mark.browser
@NEEDED[1]
def test_a_search_shows_the_pairs_whose_prompts_or_texts_hold_it(tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", n=4, phases=["1"])
    path = write_report(store, outcome_of(store))
    with chromium() as browser, opened(browser) as (page, said):
        page.goto(Path(str(path)).as_uri())
        expect(page.locator("html")).to_have_attribute("data-opened", "yes")
        search, shown = page.locator("#text-search"), page.locator(".pair:visible")
        expect(shown).to_have_count(1)
        words = page.locator(".pair:visible .prompt .text").first.inner_text().split()
        search.fill(" ".join(words[:8]))
        expect(page.locator("#choose [role=status]")).to_have_text("1 with this text")
        expect(shown).to_have_count(1)
        search.fill("no text says this")
        expect(shown).to_have_count(0)
        search.fill("")
        expect(shown).to_have_count(1)
        assert said == []
