"""Words in any script, also in those that are written without spaces between words.

Where words end is said by Unicode Standard Annex #29, "Unicode Text Segmentation", section 4, of which this is the
default without a dictionary. In Chinese (Han), Japanese (Hiragana) and the scripts of South East Asia whose
line-breaking class is Complex_Context (Thai, Lao, Khmer, Myanmar, Tai) it breaks before and behind every letter, so
that there the unit is a *character*, with the combining marks on it. A run of Katakana is one word. It differs from the
annex in that a hyphen holds a compound together, and that a full stop, a comma and an underscore hold nothing together.

No dictionary is asked on purpose: its words would depend on its version, and nothing that is counted here may.
"""

from __future__ import annotations

import itertools
import re
import unicodedata


def _combining_marks() -> str:
    """Every combining mark (Unicode category M*), as the inside of a regex character class.

    `re` has no class for them, and `\\w` leaves out the vowel signs of Indic scripts.
    """
    # No mark lies beyond this range, but for the variation selectors added at the end.
    is_mark = [unicodedata.category(chr(code)).startswith("M") for code in range(0x300, 0x20000)]
    ranges, start = [], None
    for code, marked in enumerate([*is_mark, False], start=0x300):
        if marked and start is None:
            start = code
        elif not marked and start is not None:
            ranges.append(f"{chr(start)}-{chr(code - 1)}")
            start = None
    return "".join(ranges) + "\U000e0100-\U000e01ef"


def _ranges(listed: str) -> str:
    return "".join("-".join(chr(int(end, 16)) for end in part.split("-")) for part in listed.split())


MARKS = _combining_marks()
_SINGLE = _ranges(
    "3005-3007 3021-3029 3038-303b 3400-4dbf 4e00-9fff f900-faff 16fe3-16fe3 16ff2-16ff6 20000-3ffff "  # Han
    "3041-3098 309d-309f 1b001-1b11f 1b132-1b132 1b150-1b152 "  # Hiragana
    "0e01-0e4e 0e81-0ece 0edc-0edf "  # Thai, Lao
    "1000-103f 1050-108f 109a-109f a9e0-a9ef a9fa-a9fe aa60-aa7f 1780-17dd "  # Myanmar, Khmer
    "1950-19cf 19de-19df 1a20-1a7c 1aa0-1aad aa80-aadf 11700-1172b 1173a-1173b 11740-11746"  # Tai
)
"""Letters that are units by themselves; the marks and signs that stand among them are told apart by `\\w`."""
_KATAKANA = _ranges("3031-3035 30a1-30fa 30fc-30ff 31f0-31ff ff66-ff9f 1b000-1b000")

SINGLE = f"(?:(?=[^\\W_])[{_SINGLE}])"
"""A letter of a script whose characters are units."""
MARK = f"[{MARKS}]"
_LETTER = f"[^\\W_{_SINGLE}{_KATAKANA}]"  # a letter or digit of any other script
_JOINER = "['\\-\u200c\u200d]"  # apostrophe, hyphen, and the invisible joiners of Persian and Indic scripts
WORD = re.compile(
    f"{_LETTER}(?:{_LETTER}+|{MARK}|{_JOINER}(?={_LETTER}))*|{SINGLE}{MARK}*|[{_KATAKANA}](?:[{_KATAKANA}]|{MARK})*"
)
WORD_END = f"(?!{MARK})(?:(?<=[{_SINGLE}{_KATAKANA}])|(?!{_JOINER}?{_LETTER}))(?:(?<![{_KATAKANA}])|(?![{_KATAKANA}]))"
PIECE = re.compile(f"{SINGLE}{MARK}*(?:(?!{SINGLE})[^\\w\\s])*|(?:(?!{SINGLE})\\S)+")
"""What `pieces` splits a text into."""
_SINGLE_AT = re.compile(SINGLE)


def is_single(word: str) -> bool:
    """Whether a word is a character of a script that is written without spaces."""
    return word >= "\u0e01" and _SINGLE_AT.match(word) is not None


def pieces(text: str) -> list[str]:
    """A text's words with the punctuation on them: what stands between spaces, or a character where the script has no
    spaces between words.

    >>> pieces("Bread rises. 面包会发酵。")
    ['Bread', 'rises.', '面', '包', '会', '发', '酵。']
    """
    return PIECE.findall(text)


def joined(parts: list[str]) -> str:
    """Pieces as one text again: a space between them, but for beside characters that have none.

    >>> joined(["酵。", "面", "Bread", "rises."])
    '酵。面Bread rises.'
    """
    alone = [is_single(part) for part in parts]
    between = ["" if one or other else " " for one, other in itertools.pairwise(alone)]
    return "".join(part + space for part, space in zip(parts, [*between, ""], strict=False))
