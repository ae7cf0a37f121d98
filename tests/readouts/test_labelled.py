"""The labelled sentences keep their format, their balance and their counts, and the two halves share no text."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

LABELLED = Path(__file__).parent / "labelled"
HALVES = {"dev": "d", "held_out": "h"}  # name of the half, and the letter with which its ids begin
FIRST_PERSON = re.compile(r"\b(i|me|my|mine|myself)\b", re.IGNORECASE)
TRUE_KINDS = {
    "own_writing": 34,
    "thinking_about_thinking": 34,
    "text_of_itself": 34,
    "own_choosing": 34,
    "attention_loop": 34,
    "process_doubt": 35,
    "own_course": 35,
}
FALSE_KINDS = dict.fromkeys(
    """first_person obvious_words about_writing writing_instructions mindfulness_advice subject_statement self_help
    mirror_reflexive technical recipe boilerplate repeated garbled nature_poem fiction everyday""".split(),
    15,
)


def entries(half: str) -> list[dict[str, Any]]:
    return yaml.safe_load((LABELLED / f"{half}.yaml").read_text(encoding="utf-8"))


def normalised(text: str) -> str:
    """The words alone, so that two texts which differ in case or punctuation count as one."""
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("half", HALVES)
def test_every_entry_has_an_id_a_text_a_mode_and_a_kind(half: str):
    for at, entry in enumerate(entries(half), start=1):
        assert list(entry) == ["id", "text", "mode", "kind"]
        assert entry["id"] == f"{HALVES[half]}{at:03d}"
        assert isinstance(entry["mode"], bool)
        assert entry["text"] == entry["text"].strip()
        assert 12 <= len(entry["text"].split()) <= 60, entry["id"]


@pytest.mark.parametrize("half", HALVES)
def test_half_of_the_texts_are_true_and_half_of_those_in_first_person(half: str):
    true = [entry["text"] for entry in entries(half) if entry["mode"]]
    assert (len(true), len(entries(half))) == (120, 240)
    assert sum(bool(FIRST_PERSON.search(text)) for text in true) == 60


@pytest.mark.parametrize("half", HALVES)
def test_a_kind_is_true_or_false_throughout(half: str):
    for entry in entries(half):
        assert entry["kind"] in (TRUE_KINDS if entry["mode"] else FALSE_KINDS), entry["id"]


def test_no_text_stands_twice_within_or_across_the_halves():
    counts = Counter(normalised(entry["text"]) for half in HALVES for entry in entries(half))
    assert not [text for text, n in counts.items() if n > 1]


def test_each_kind_has_its_count_and_splits_evenly():
    dev, held_out = (Counter(entry["kind"] for entry in entries(half)) for half in HALVES)
    assert dev + held_out == TRUE_KINDS | FALSE_KINDS
    assert all(abs(dev[kind] - held_out[kind]) <= 2 for kind in dev)
