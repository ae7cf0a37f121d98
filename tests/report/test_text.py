"""Nothing hidden, nothing that runs."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from kvpatch.report import text
from kvpatch.verdicts import wording


class Shown(HTMLParser):
    text = ""

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(html: str) -> str:
    """The text a browser would show."""
    parser = Shown(convert_charrefs=True)
    parser.feed(str(html))
    parser.close()
    return parser.text


def test_controls_become_visible_symbols() -> None:
    assert text.visible("a\x00b\x1bc\x7fd\x85e\rf") == "a\u2400b\u241bc\u2421d\u2426e\u240df"
    assert text.visible("line\n\ttab") == "line\n\ttab"


def test_bidirectional_overrides_are_named_and_lone_surrogates_replaced() -> None:
    assert text.visible("\u202eabc\u2069") == "\u27e8RLO\u27e9abc\u27e8PDI\u27e9"
    assert text.visible("\ud800").encode() == "\ufffd".encode()


def test_marked_text_is_escaped_and_keeps_every_character() -> None:
    raw = "<script>x</script> & \"q\" 'r' itself"
    html = text.marked(raw, [(0, 8, "hit"), (4, 12, "copied"), (30, 999, "hit"), (-5, 2, "copied")])
    assert "<script" not in html
    assert shown(html) == raw


def test_overlapping_spans_give_a_stretch_of_both_kinds() -> None:
    html = text.marked("abcdef", [(0, 4, "hit"), (2, 6, "copied")])
    assert html.count("<mark") == 3
    assert '<mark class="hit copied" title="hit of the mode and copied from the source">cd</mark>' in html


@pytest.mark.parametrize("span", [(3, 3, "hit"), (5, 2, "hit"), (9, 12, "hit"), (0, 2, 'x" onclick="y')])
def test_spans_that_mean_nothing_are_left_out(span: tuple[int, int, str]) -> None:
    assert text.marked("abcdef", [span]) == "abcdef"


def test_json_can_not_leave_its_script_element() -> None:
    value = {"a": "</script><script>alert(1)</script><!--", "b": "\u2028\u2029&\ud800"}
    raw = text.script_json(value)
    assert not set("<>&\u2028\u2029") & set(raw)
    assert "\\u003c/script" in raw
    assert json.loads(raw) == {"a": value["a"], "b": "␤␤&\ufffd"}  # what would not be seen is named


def test_numbers_keep_their_sign_and_missing_ones_show_a_dash() -> None:
    assert text.number(-1.234) == "\u22121.23"
    assert [text.number(v) for v in (None, float("nan"), float("inf"), "x")] == [text.DASH] * 4
    assert [text.number(v) for v in (0, 3.0, 0.00001, 123.45, 98765.4)] == [
        "0",
        "3",
        "1.00e-05",
        "123",
        "98,765",
    ]


@pytest.mark.parametrize("value", [0, 7, -3, 1234567, 0.04213, -0.5, 12.345, 123.45, 999.7, -98765.4, 1.2e-7, 3.4e8])
def test_numbers_are_rounded_as_the_verdicts_sentences_round_them(value: float) -> None:
    assert text.number(value).replace(text.MINUS, "-") == wording.number(value)


@pytest.mark.parametrize(("p", "told"), [(0.0412, "0.0412"), (0.00049, "0.00049"), (0.00005, "< 0.0001"), (1.0, "1")])
def test_a_p_value_is_told_as_in_the_verdicts_sentences(p: float, told: str) -> None:
    assert text.p_value(p) == told
    assert told in wording.chance(p)


def test_a_share_below_one_never_reads_100_percent() -> None:
    assert (text.percent(0.9999), text.percent(1.0), text.percent(0.29)) == ("99%", "100%", "29%")
    assert text.percent(0.8999) == wording.percent(0.8999) == "89%"


def test_facts_flatten_a_nested_record() -> None:
    assert text.facts({"a_b": {"c": 1}, "d": [], "e": [{"f": True}]}) == [
        ("a b c", "1"),
        ("d", "not recorded"),
        ("e 1 f", "yes"),
    ]
