"""Behavior of a generated text: how much of it is in the mode a lexicon describes, how much was copied.

Every function reads the generated text alone, and the source text only to see what was copied from it: a
score over prompt and output would score the prompt. The mode is whatever the lexicon holds (`recursion` is
the first of `lexicons/*.yaml`), so another protocol brings another file; or a function, which `scorer.py` runs.
Scores count every occurrence, so a text that collapsed into repeating one mode word scores high; that is told
by `fluency.repetition`, stored beside the score, and is not corrected here.

A *word* is a run of letters and digits of any script, with the combining marks on them, and with apostrophes
and hyphens inside; in scripts that are written without spaces between words (Chinese, Japanese, Thai) it is a
character (`specs.scripts`, after Unicode Standard Annex #29). So scores per 100 words compare only within a script.
Whether such a text was copied is told by pairs of neighbouring characters, since single ones stand in nearly every
text: the bigrams that retrieval has used for Chinese (Nie, Gao, Zhang & Zhou 2000; Lucene's `CJKBigramFilter`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from kvpatch.errors import MOST_MISTAKES, ProtocolError, ProtocolMistakes
from kvpatch.files import NotYaml, read_yaml
from kvpatch.readouts.cues import Cues, read_cues
from kvpatch.readouts.function_words import STOPWORDS
from kvpatch.readouts.lexicon_files import is_shipped, lexicon_bytes
from kvpatch.readouts.patterns import (
    AnyPattern,
    as_regex,
    compiled,
    known_words,
    lowered,
    normalise,
    quantifies_a_space,
    read_lists,
    with_lists,
    words,
)
from kvpatch.specs.regexes import PatternError
from kvpatch.specs.scripts import WORD, WORD_END, is_single


@dataclass(frozen=True)
class Hit:
    """One stretch of text that is in the mode; it covers whole words."""

    start: int
    """First character, as an index into `normalise(text)`."""
    end: int
    """One past the last character."""
    entry: str
    """Id of the lexicon entry that claimed the stretch."""
    text: str
    """The stretch, normalised."""


@dataclass(frozen=True)
class Entry:
    """One word family of a lexicon: what it matches, and the examples that it is held to when the lexicon is read."""

    id: str
    pattern: str
    """As in the file, with its word lists written out; a space stands for any run of whitespace."""
    matches: tuple[str, ...] = ()
    """Texts with exactly one hit, this entry's."""
    rejects: tuple[str, ...] = ()
    """Texts with no hit of any entry."""
    not_after: tuple[str, ...] = ()
    """Words that may not stand directly before a match."""
    not_before: tuple[str, ...] = ()
    """Patterns of words that may not stand directly after a match."""
    is_timed: bool = field(default=True, repr=False, compare=False)
    """Whether the pattern runs with a time limit; those of shipped lexicons are known to be quick."""
    core: str = field(init=False, repr=False, compare=False)
    """The pattern as a regex for lowered text."""
    regex: AnyPattern = field(init=False, repr=False, compare=False)
    """The whole entry; to be matched at the start of a word of lowered text."""

    def __post_init__(self) -> None:
        if re.search(r"\\[1-9]", self.pattern) or quantifies_a_space(self.pattern):
            raise ProtocolError(
                f"lexicon entry {self.id!r}: a repeated word must be a named group, and a space can't be "
                f"quantified, in {self.pattern!r}"
            )
        core = as_regex(self.pattern)
        before = "".join(rf"(?<!\b{re.escape(lowered(word))}\s)" for word in self.not_after)
        following = "|".join(map(as_regex, self.not_before))
        after = rf"(?!\s+(?:{following}){WORD_END})" if following else ""
        try:
            regex = compiled(f"{before}(?:{core})(?:'s)?{WORD_END}{after}", self.is_timed)
        except PatternError as error:
            message = f"lexicon entry {self.id!r}: {self.pattern!r} is no regex: {error}"
            raise ProtocolError(message) from error
        if regex.match(""):
            raise ProtocolError(f"lexicon entry {self.id!r}: {self.pattern!r} matches the empty text")
        object.__setattr__(self, "core", core)
        object.__setattr__(self, "regex", regex)


@dataclass(frozen=True)
class Lexicon:
    """A frozen, versioned list of word families that mark a mode; it can be hashed and pickled."""

    name: str
    version: int
    sha256: str
    """Of the bytes of the file; name, version and this identify the lexicon a stored score was made with."""
    entries: tuple[Entry, ...]
    cues: Cues = field(default_factory=Cues)
    _gate: AnyPattern = field(init=False, repr=False, compare=False)  # matches wherever some entry might

    @classmethod
    def load(cls, name_or_path: str | Path) -> Lexicon:
        """Read a shipped lexicon by its name ("recursion") or any other by the path of its YAML file.

        Raises `ProtocolError` when there is no such lexicon, the file does not have the form of
        `lexicons/recursion.yaml`, or an entry does not hold to its examples.
        """
        return cls.parse(lexicon_bytes(name_or_path), str(name_or_path))

    @classmethod
    def parse(cls, content: bytes, origin: str) -> Lexicon:
        """Read a lexicon from the bytes of its file; `origin` is what errors call it."""
        try:
            parsed = read_yaml(content)
        except NotYaml as error:
            raise ProtocolError(f"lexicon {origin!r} is not YAML in UTF-8: {error}") from error
        return cls._from_parsed(parsed, hashlib.sha256(content).hexdigest(), origin)

    @classmethod
    def _from_parsed(cls, parsed: Any, sha256: str, origin: str) -> Lexicon:
        required, more = {"name", "version", "entries"}, {"lists", "cues", "threshold", "examples"}
        if not isinstance(parsed, dict) or not required <= set(parsed) <= required | more:
            raise ProtocolError(
                f"lexicon {origin!r} must have the keys name, version and entries, may have {', '.join(sorted(more))}, "
                "and no other"
            )
        name, version, rows = parsed["name"], parsed["version"], parsed["entries"]
        if (
            not isinstance(name, str)
            or type(version) is not int
            or not isinstance(rows, list)
            or not (rows or parsed.get("cues"))
        ):
            raise ProtocolError(
                f"lexicon {origin!r}: name must be text, version an integer, entries a list of at least one"
            )
        lists, is_timed = read_lists(parsed.get("lists", {}), origin), not is_shipped(sha256)
        entries, wrong = [], []
        for row in rows:
            try:
                entries.append(_entry_from_parsed(row, lists, origin, is_timed))
            except ProtocolError as error:
                wrong.append(str(error))
        if wrong:
            raise ProtocolMistakes(wrong)
        cues = read_cues(parsed, lists, origin, is_timed)
        ids = [part.id for part in (*entries, *cues.cues)]
        if len(set(ids)) < len(ids):
            repeated = ", ".join(sorted({name for name in ids if ids.count(name) > 1}))
            raise ProtocolError(f"lexicon {origin!r}: ids of entries must differ; these repeat: {repeated}")
        lexicon = cls(name, version, sha256, tuple(entries), cues)
        if broken := list(islice(lexicon._broken_examples(), MOST_MISTAKES)):
            raise ProtocolMistakes([f"lexicon {origin!r}, {told}" for told in broken])
        return lexicon

    def _broken_examples(self) -> Iterator[str]:
        """What each example shows that does not hold: entry, example, and what was found in it."""
        yield from self.cues.broken_examples()
        for text in self.cues.hits:
            if not self.hits(text):
                yield f"examples: {text!r} must have a hit, and the weights of its cues do not pass the threshold"
        for text in self.cues.none:
            if found := self.hits(text):
                yield f"examples: {text!r} must have no hit, and it has {_told(found)}"
        for entry in self.entries:
            for text in entry.matches:
                found = self.hits(text)
                if [hit.entry for hit in found] != [entry.id]:
                    told = "its pattern finds nothing in it" if not found else f"it has {_told(found)}"
                    yield f"entry {entry.id!r}: example {text!r} must have exactly one hit, of this entry, and {told}"
            for text in entry.rejects:
                if found := self.hits(text):
                    yield f"entry {entry.id!r}: counter-example {text!r} must have no hit, and it has {_told(found)}"

    def __post_init__(self) -> None:
        try:
            is_timed = any(entry.is_timed for entry in self.entries)
            gate = compiled("|".join(f"(?:{entry.core})" for entry in self.entries), is_timed)
        except PatternError as error:
            message = f"lexicon {self.name!r}: named groups must differ between entries: {error}"
            raise ProtocolError(message) from error
        object.__setattr__(self, "_gate", gate)

    def __hash__(self) -> int:
        return hash(self.sha256)

    def hits(self, text: str) -> list[Hit]:
        """The stretches of the text that are in the mode, in order, disjoint.

        The leftmost match wins; of those that start at one place the longest, then the entry listed first.
        """
        return list(_hits(text, self))

    def _found(self, text: str) -> Iterator[Hit]:
        found = list(self._matches(text))
        cues = self.cues.cues
        found += [(one.start, [(cues[one.cue].id, one.end)]) for one in self.cues.for_the_mode(lowered(text))]
        last = 0
        for start, together in itertools.groupby(sorted(found, key=lambda one: one[0]), key=lambda one: one[0]):
            entry, end = max((match for _, matches in together for match in matches), key=lambda match: match[1])
            if start >= last and not (entry in self.cues.ids and _is_function_words(text[start:end])):
                yield Hit(start, end, entry, text[start:end])
                last = end

    def families(self, text: str) -> frozenset[str]:
        """Ids of the entries that match anywhere, also within what another entry claims or a compound.

        "self-observation" is of the family of "observe", although it is a hit of another entry. A word of a cue has its
        first letters as family.
        """
        whole = normalise(text)
        apart = whole.replace("-", " ")
        both = (*self._matches(whole), *self._matches(apart))
        beginnings = (*self.cues.beginnings(lowered(whole)), *self.cues.beginnings(lowered(apart)))
        return frozenset((*(entry for _, matches in both for entry, _ in matches), *beginnings))

    def _matches(self, normalised: str) -> Iterator[tuple[int, list[tuple[str, int]]]]:
        """For each start of a word at which entries match: the start, and each entry's id and end."""
        if not self.entries:
            return
        low = lowered(normalised)
        for word in WORD.finditer(low):
            start = word.start()
            if self._gate.match(low, start):
                found = [(entry.id, entry.regex.match(low, start)) for entry in self.entries]
                if matches := [(entry, match.end()) for entry, match in found if match]:
                    yield start, matches


def _told(hits: Iterable[Hit]) -> str:
    return ", ".join(f"{hit.text!r} of entry {hit.entry!r}" for hit in hits)


def _entry_from_parsed(row: Any, word_lists: dict[str, list[str]], origin: str, is_timed: bool) -> Entry:
    lists = ("matches", "rejects", "not_after", "not_before")
    if not isinstance(row, dict) or not {"id", "pattern"} <= set(row) <= {"id", "pattern", *lists}:
        keys = f"id and pattern, and may have {', '.join(lists)}"
        raise ProtocolError(f"lexicon {origin!r}: an entry must have {keys}; not {row!r:.80}")
    for key, value in row.items():
        texts = value if key in lists else [value]
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            kind = "a list of texts (on, off, yes, no and numbers need quotes)" if key in lists else "text"
            raise ProtocolError(f"lexicon {origin!r}: {key} of {row['id']!r} must be {kind}, not {value!r:.80}")
    examples_and_limits = {key: tuple(row.get(key, ())) for key in lists}
    pattern = with_lists(row["pattern"], word_lists, f"lexicon {origin!r}: entry {row['id']!r}")
    return Entry(id=row["id"], pattern=pattern, is_timed=is_timed, **examples_and_limits)


def _forms(word: str) -> Iterator[str]:
    """What a case-folded word is compared by: itself and the parts of a compound, without a final 's."""
    yield word.removesuffix("'s")
    if "-" in word:
        yield from (part.removesuffix("'s") for part in word.split("-"))


def content_words(text: str) -> set[str]:
    """The words of the text that are not function words, case-folded, without a final 's.

    A hyphenated word counts as itself and as each of its parts ("self-observation", "self", "observation"). Of a
    script without spaces between words each two neighbouring characters are one ("自我观察": 自我, 我观, 观察), and a
    character only where it stands alone; there are no function words among them.
    Two texts are lexically disjoint when these sets are. Inflections are different words.
    """
    return {form for _, _, forms in _compared(normalise(text)) for form in forms}


def _compared(normalised: str) -> Iterator[tuple[int, int, set[str]]]:
    """Where the text's words stand, and what each is compared by with other texts."""
    found = list(WORD.finditer(normalised))
    pairs = [
        is_single(one[0]) and is_single(other[0]) and one.end() == other.start()
        for one, other in itertools.pairwise(found)
    ]
    for match, with_last, with_next in zip(found, [False, *pairs], [*pairs, False], strict=False):
        start, end = match.span()
        if with_next:
            end = WORD.match(normalised, end).end()  # pyright: ignore[reportOptionalMemberAccess]
        if with_next or not with_last:
            yield start, end, set(_forms(normalised[start:end].casefold())) - STOPWORDS


@functools.lru_cache(maxsize=64)
def _hits(text: str, lexicon: Lexicon) -> tuple[Hit, ...]:
    """The hits of a text, which its score, its masked score and the marks of a report each ask for."""
    return tuple(lexicon._found(normalise(text)))


@functools.lru_cache(maxsize=1 << 14)
def _families(stretch: str, lexicon: Lexicon) -> frozenset[str]:
    return lexicon.families(stretch)


@functools.lru_cache(maxsize=1 << 14)
def _is_function_words(stretch: str) -> bool:
    return not content_words(stretch)


def recursive_score(text: str, lexicon: Lexicon) -> float:
    """Lexicon hits per 100 words of the generated text; in [0, 100], 0.0 for a text without words.

    The name is that of the stored column, whatever the lexicon's mode is.
    `text` is the generated text alone: prompt words in it would be scored. Each occurrence counts, so a text
    that repeats one mode word scores up to 100; repetition is a readout of its own (`fluency.repetition`).
    """
    return per_100_words(len(lexicon.hits(text)), text)


def recursive_score_masked(text: str, source_text: str, lexicon: Lexicon) -> float:
    """`recursive_score` without the hits that were copied from the source (`uncopied_hits`); never above it.

    The words of copied hits still count as words. In a contrast of two conditions, mask both by the same text
    (say, their sources joined by a newline): masking each by its own source lowers the score of the
    condition whose source is in the mode, even where the outputs are equal.
    """
    return per_100_words(len(uncopied_hits(text, source_text, lexicon)), text)


def per_100_words(hits: int, text: str) -> float:
    """Hits per 100 words of the text; 0.0 for a text without words."""
    return 100 * hits / total if (total := len(known_words(text))) else 0.0


def uncopied_hits(text: str, source_text: str, lexicon: Lexicon) -> list[Hit]:
    """The hits of the text that the source does not explain.

    A hit counts as copied when the source holds one of its content words, in upper or lower case, or a match
    of an entry that matches within the hit. The second stands for inflection: "observing" is copied from a
    source with "observer". Function words are no evidence: "my" does not mask "my own thoughts".
    """
    source_words, source_families = _content_of(source_text, lexicon)

    @functools.cache
    def is_copied(stretch: str, entry: str) -> bool:
        families = _families(stretch, lexicon) | {entry}
        return not (content_words(stretch).isdisjoint(source_words) and families.isdisjoint(source_families))

    return [hit for hit in lexicon.hits(text) if not is_copied(hit.text, hit.entry)]


@functools.lru_cache(maxsize=4096)
def _content_of(source_text: str, lexicon: Lexicon) -> tuple[set[str], frozenset[str]]:
    """Content words and families of a source, which many trials share."""
    return content_words(source_text), lexicon.families(source_text)


def copied_words(text: str, source_text: str) -> list[tuple[int, int]]:
    """Where the text holds content words of the source: [(start, end)] in `normalise(text)`.

    Words are compared case-folded; a compound counts as copied when any of its parts does. Characters of a
    script without spaces between words count where two that stand together do.
    """
    source_words = content_words(source_text)
    spans: list[tuple[int, int]] = []
    for start, end, forms in _compared(normalise(text)):
        if not source_words.isdisjoint(forms):
            joins = spans and start < spans[-1][1]  # pairs of characters overlap
            spans.append((spans.pop()[0], end) if joins else (start, end))
    return spans


@functools.lru_cache(maxsize=4096)
def _source_ngrams(source_text: str, n: int) -> frozenset[tuple[str, ...]]:
    return frozenset(_ngrams(words(source_text), n))


def ngram_overlap(text: str, source_text: str, n: int = 4) -> float:
    """Share of the text's word n-grams that occur in the source, in [0, 1].

    NaN when the text has fewer than n words. Words are compared case-folded, punctuation is ignored, and each
    occurrence in the text counts.
    Raises `ValueError` when n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    ngrams, in_source = _ngrams(known_words(text), n), _source_ngrams(source_text, n)
    return sum(ngram in in_source for ngram in ngrams) / len(ngrams) if ngrams else float("nan")


def _ngrams(items: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(items[offset:] for offset in range(n)), strict=False))
