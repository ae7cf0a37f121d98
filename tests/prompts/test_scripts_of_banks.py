"""Prompts in scripts without spaces between words: shuffled, compared and measured by their characters."""

from __future__ import annotations

import pytest

from kvpatch.planning.balance import _WORD
from kvpatch.prompts.bank import shuffled_words
from kvpatch.readouts.semantic import windows
from kvpatch.report.samples import changed_words
from kvpatch.specs.scripts import joined, pieces


def test_shuffled_words_of_chinese_and_thai_are_other_texts_of_the_same_characters():
    for text in ("面包为什么会发酵。因为酵母", "ขนมปังขึ้นฟูเพราะยีสต์"):
        shuffled = shuffled_words(text, seed=3)
        assert shuffled != text and " " not in shuffled
        assert sorted(pieces(shuffled)) == sorted(pieces(text))


def test_shuffled_words_of_english_are_what_stands_between_its_spaces():
    text = "Bread rises, isn't it\nself-made? (3.5 hours)  «да»"
    assert pieces(text) == text.split()
    assert sorted(shuffled_words(text, seed=3).split()) == sorted(text.split())


def test_pieces_keep_marks_and_punctuation_and_are_joined_as_they_were():
    assert pieces("ขึ้นฟู。用 GPU 跑。") == ["ขึ้", "น", "ฟู。", "用", "GPU", "跑。"]
    assert joined(["用", "面", "Bread", "rises."]) == "用面Bread rises."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("self-made Don't 3 cakes", ["self", "made", "Don't", "cakes"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("приве\u0301т мир", ["приве\u0301т", "мир"]),
        ("面包 コーヒー", ["面", "包", "コーヒー"]),
    ],
)
def test_words_of_a_bank_s_balance_are_not_split_at_marks(text: str, words: list[str]):
    assert _WORD.findall(text) == words


def test_a_changed_character_marks_that_character_and_not_the_whole_text():
    text, other = "面包会发酵了", "面包会发霉了"
    assert [text[start:end] for start, end, _ in changed_words(text, other)] == ["酵"]


def test_windows_of_a_text_count_characters_and_end_with_its_sentences():
    sentence = "我看见自己正在写这句话而且慢慢地一遍又一遍读着它。"
    found = windows(sentence * 3)
    assert [window.text for window in found] == [sentence] * 3
    assert [window.words for window in found] == [24] * 3
    assert [window.fresh for window in found] == [24, 3, 0]
