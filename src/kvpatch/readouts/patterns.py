"""Words of a text, and how a lexicon writes a pattern over them.

A pattern is a regular expression for lowered text in which a space stands for any run of whitespace, `{name}` for one
of the lexicon's word lists, and ` {..4} ` for a gap of at most four words within a sentence.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from kvpatch.errors import ProtocolError
from kvpatch.specs.regexes import Pattern, PatternError
from kvpatch.specs.scripts import WORD

# One character for one, so that offsets stay: four apostrophes and two hyphens.
_PLAIN_PUNCTUATION = tuple(zip("\u2019\u2018\u02bc\uff07\u2010\u2011", "''''--", strict=True))


def normalise(text: str) -> str:
    """The text that offsets index: Unicode NFC, with one apostrophe and one hyphen.

    For text already in NFC, as nearly all generated text is, offsets are those of the text itself.
    """
    text = unicodedata.normalize("NFC", text)
    for of_print, plain in _PLAIN_PUNCTUATION:  # a tenth of what `str.translate` takes
        text = text.replace(of_print, plain)
    return text


def words(text: str) -> list[str]:
    """The words of the text, case-folded, in order."""
    return list(known_words(text))


@functools.lru_cache(maxsize=64)
def known_words(text: str) -> tuple[str, ...]:
    """`words`, remembered of the last texts: a text's two scores and its overlap with the source each ask for them."""
    return tuple(map(str.casefold, WORD.findall(normalise(text))))


def lowered(normalised: str) -> str:
    """Lower case with the same offsets: the dotted capital I is the one letter that would grow."""
    return normalised.replace("\u0130", "i").lower()


# Between two words of one sentence. Possessive, and with no character in common with the words of a gap, so that a
# gap can be read in one way only and a search over it ends after as many steps as it has words.
_BETWEEN = r"[^\w.?!|'\-]{1,8}+"
_GAP = re.compile(r" \{\.\.(\d)\} ")
_LIST = re.compile(r"\{([a-z_]+)\}")


AnyPattern = re.Pattern[str] | Pattern


def compiled(pattern: str, is_timed: bool) -> AnyPattern:
    """A pattern, ready to be matched.

    Raises:
        PatternError: where it is no regular expression.
    """
    if is_timed:
        return Pattern(pattern)
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PatternError(str(error)) from error


def read_lists(lists: Any, origin: str) -> dict[str, list[str]]:
    """The word lists of a lexicon's file; a list may name those that stand before it.

    Raises `ProtocolError` when they have another form.
    """
    read: dict[str, list[str]] = {}
    for name, listed in lists.items() if isinstance(lists, dict) else [(lists, None)]:
        is_named = isinstance(name, str) and re.fullmatch("[a-z_]+", name)
        if not is_named or not isinstance(listed, list) or not all(isinstance(word, str) and word for word in listed):
            raise ProtocolError(
                f"lexicon {origin!r}: lists must map names of small letters to lists of texts (on, off, yes, no and "
                f"numbers need quotes); not {name!r:.80}"
            )
        read[name] = [with_lists(word, read, f"lexicon {origin!r}: list {name!r}") for word in listed]
    return read


def with_lists(pattern: str, lists: Mapping[str, Sequence[str]], where: str) -> str:
    """The pattern with each `{name}` replaced by the words of that list, any of which may stand there.

    Raises `ProtocolError`, which begins with `where`, when there is no such list.
    """

    def listed(part: re.Match[str]) -> str:
        if part[1] not in lists:
            known = ", ".join(lists) or "none"
            raise ProtocolError(f"{where}: there is no word list {part[1]!r}; the lexicon has {known}")
        return f"(?:{'|'.join(lists[part[1]])})"

    return _LIST.sub(listed, pattern)


def quantifies_a_space(pattern: str) -> bool:
    """Whether a quantifier stands straight after a space that is no gap."""
    return re.search(r" [?*+{]", _GAP.sub(" ", pattern)) is not None


def as_regex(pattern: str) -> str:
    """A pattern without list names as a regex for lowered text; a space outside [] becomes any run of whitespace."""
    pieces = _GAP.split(normalise(pattern))
    regex = _spaced(pieces[0])
    for most, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        regex += rf"{_BETWEEN}(?:[\w'\-]++{_BETWEEN}){{0,{most}}}?{_spaced(piece)}"
    return regex


def _spaced(pattern: str) -> str:
    spaced = re.sub(r"(\\.|\[[^\]]*\])| ", lambda part: part[1] or r"\s+", pattern)
    return re.sub(r"(\\.|\(\?P)|[^\\]", lambda part: part[1] or lowered(part[0]), spaced)
