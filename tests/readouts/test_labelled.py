"""The labelled texts keep their format and counts, no text stands twice, and no two words tell the modes apart."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml

LABELLED = Path(__file__).parent / "labelled"
HALVES = {"dev": "d", "held_out": "h"}  # name of the half, and the letter with which its ids begin
FEW = 34  # see best_rule: a pair of words that both stand in fewer texts than this cannot pass the bound
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


def test_no_text_stands_twice_within_or_across_the_files():
    counts = Counter(normalised(entry["text"]) for name in (*HALVES, "outputs") for entry in entries(name))
    assert not [text for text, n in counts.items() if n > 1]


def test_each_kind_has_its_count_and_splits_evenly():
    dev, held_out = (Counter(entry["kind"] for entry in entries(half)) for half in HALVES)
    assert dev + held_out == TRUE_KINDS | FALSE_KINDS
    assert all(abs(dev[kind] - held_out[kind]) <= 2 for kind in dev)


def texts(half: str, mode: bool) -> list[str]:
    return [entry["text"] for entry in entries(half) if entry["mode"] is mode]


def gap(half: str, measure: Callable[[str], float]) -> float:
    """How much more of the measure a false text has than a true one, on average."""
    return mean(map(measure, texts(half, False))) - mean(map(measure, texts(half, True)))


@pytest.mark.parametrize("half", HALVES)
def test_true_and_false_texts_are_alike_in_length_person_and_question_marks(half: str):
    true_length = mean(len(text.split()) for text in texts(half, True))
    assert abs(gap(half, lambda text: len(text.split()))) < 0.05 * true_length
    assert abs(gap(half, lambda text: bool(FIRST_PERSON.search(text)))) < 0.05
    assert abs(gap(half, lambda text: "?" in text)) < 0.05


def best_rule(half: str) -> tuple[float, str, str]:
    """The rule of one word or of two that reaches most, where a rule reaches the lower of its precision and its recall.

    A rule asks for a word to be there or not, and for a second one, joined by "and" or "or", and predicts either mode.
    A set of texts is an integer with one bit for each text. To reach 0.7 a rule must pick 84 to 171 of the 240 texts
    and leave out 69 or more. Two words that both stand in fewer than 34 texts can do neither.
    """
    labelled = entries(half)
    every, true = (1 << len(labelled)) - 1, sum(entry["mode"] << at for at, entry in enumerate(labelled))
    holders: Counter[str] = Counter()
    for at, entry in enumerate(labelled):
        for word in set(re.findall(r"[a-z]+(?:'[a-z]+)?", entry["text"].lower())):
            holders[word] += 1 << at
    best = (0.0, "", "")
    for first, second in product((word for word in holders if holders[word].bit_count() >= FEW), holders):
        a, b = holders[first], holders[second]
        for joint in (a & b, a & ~b, b & ~a, every & ~(a | b)):
            # The two rules of each round pick the texts of one mode, or the remaining texts for the other mode.
            for picked, wanted in product((joint, every & ~joint), (true, every & ~true)):
                hits = (picked & wanted).bit_count()
                reach = hits / max(picked.bit_count(), wanted.bit_count())
                best = max(best, (reach, first, second))
    return best


@pytest.mark.parametrize("half", HALVES)
def test_no_word_and_no_pair_of_words_tells_the_modes_apart(half: str):
    reach, first, second = best_rule(half)
    assert reach < 0.7, (first, second)


def test_every_output_has_an_id_its_model_a_text_a_mode_and_perhaps_a_doubt():
    outputs = entries("outputs")
    assert [entry["id"] for entry in outputs] == [f"output-{at:03d}" for at in range(200)]
    for entry in outputs:
        assert list(entry) in (keys := ["id", "model", "text", "mode", "kind"], [*keys, "unsure"]), entry["id"]
        assert entry["model"] in ("smollm2-135m", "gemma3-270m")
        assert entry["text"].strip()
        assert isinstance(entry["mode"], bool)
        assert entry["kind"] == "output"
        assert entry.get("unsure", True) is True  # a label without doubt has no such key


def test_the_outputs_have_the_counts_that_the_readme_states():
    outputs = entries("outputs")
    counts = sum(entry["mode"] for entry in outputs), sum("unsure" in entry for entry in outputs)
    stated = re.search(
        r"(\d+) outputs.*?(\d+) are true.*?(\d+) are marked", (LABELLED / "README.md").read_text(), re.DOTALL
    )
    assert stated is not None
    assert tuple(map(int, stated.groups())) == (len(outputs), *counts)
