"""Cues: wording that speaks for or against a mode, weighed together over a passage of a text.

An entry of a lexicon counts wherever it stands. A cue counts only in company: the weights of the cues that a passage
holds are added up, and where the sum passes the lexicon's threshold, what spoke for the mode becomes its hits. This
tells "this paragraph knows that it is a paragraph" from "this paragraph is about trains", which share most words.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvpatch.errors import ProtocolError
from kvpatch.readouts.patterns import (
    AnyPattern,
    as_regex,
    compiled,
    lowered,
    normalise,
    quantifies_a_space,
    with_lists,
)
from kvpatch.specs.regexes import PatternError
from kvpatch.specs.scripts import WORD, WORD_END

PASSAGE = 30
"""A passage ends with the first sentence that brings it to so many words, or at twice as many without one."""
MOST = 2
"""A cue is weighed at most so often in a passage, so that a repeated word is not a mode."""

_ENDS = re.compile(r"[.!?…؟۔][\"')\]»”]*\s|[。！？｡।॥]|\n|\|")


@dataclass(frozen=True)
class Cue:
    """Words, or a pattern over words, with the weight that each occurrence adds to a passage."""

    id: str
    weight: float
    words: frozenset[str] = frozenset()
    """In lower case; empty for a cue with a pattern."""
    pattern: str = ""
    """As an entry's, with its word lists written out; empty for a cue with words."""
    matches: tuple[str, ...] = ()
    """Texts in which the pattern is found."""
    rejects: tuple[str, ...] = ()
    """Texts in which it is not."""
    is_timed: bool = field(default=True, repr=False, compare=False)
    """Whether the pattern runs with a time limit."""
    regex: AnyPattern | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if bool(self.words) is bool(self.pattern):
            raise ProtocolError(f"cue {self.id!r} must have either words or a pattern")
        regex = None
        if self.pattern:
            if re.search(r"\\[1-9]", self.pattern) or quantifies_a_space(self.pattern):
                raise ProtocolError(
                    f"cue {self.id!r}: a repeated word must be a named group, and a space can't be quantified, in "
                    f"{self.pattern!r}"
                )
            try:
                regex = compiled(rf"(?:{as_regex(self.pattern)}){WORD_END}", self.is_timed)
            except PatternError as error:
                raise ProtocolError(f"cue {self.id!r}: {self.pattern!r} is no regex: {error}") from error
            if regex.match(""):
                raise ProtocolError(f"cue {self.id!r}: {self.pattern!r} matches the empty text")
        object.__setattr__(self, "regex", regex)


class Found(NamedTuple):
    """An occurrence of a cue in a text."""

    start: int
    end: int
    cue: int
    """Its place in the lexicon."""


_AtOnce = tuple[AnyPattern, tuple[tuple[int, int], ...]]
"""Patterns in one regex, and for each the number of its group and the place of its cue."""


@dataclass(frozen=True)
class Cues:
    """The cues of a lexicon, and the sum that a passage must pass."""

    cues: tuple[Cue, ...] = ()
    threshold: float = 0.0
    hits: tuple[str, ...] = ()
    """Example texts that must have a hit."""
    none: tuple[str, ...] = ()
    """Example texts that must have none."""
    ids: frozenset[str] = field(init=False, repr=False, compare=False)
    _by_word: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    _literal: _AtOnce = field(init=False, repr=False, compare=False)  # patterns of letters, groups and optional letters
    _other: _AtOnce = field(init=False, repr=False, compare=False)
    _beginnings: tuple[str, ...] = field(init=False, repr=False, compare=False)  # one of them begins a literal match
    _begun: dict[str, bool] = field(init=False, repr=False, compare=False, default_factory=dict)  # words seen

    def __post_init__(self) -> None:
        by_word: dict[str, tuple[int, ...]] = {}
        for at, cue in enumerate(self.cues):
            for word in cue.words:
                by_word[word] = (*by_word.get(word, ()), at)
        object.__setattr__(self, "_by_word", by_word)
        with_pattern = [at for at, cue in enumerate(self.cues) if cue.regex]
        literal = [at for at in with_pattern if not re.search(r"[\[\\]", self.cues[at].pattern)]
        object.__setattr__(self, "_literal", self._at_once(literal))
        object.__setattr__(self, "_other", self._at_once([at for at in with_pattern if at not in literal]))
        object.__setattr__(self, "_beginnings", self._beginnings_of(literal))
        object.__setattr__(self, "ids", frozenset(cue.id for cue in self.cues))

    def _at_once(self, which: list[int]) -> _AtOnce:
        """Cues whose patterns are tried at a word in one call: as each only looks ahead, none hides another."""
        each = [(at, regex.pattern) for at in which if (regex := self.cues[at].regex)]
        try:
            is_timed = any(self.cues[at].is_timed for at in which)
            together = compiled("".join(f"(?=(?P<cue{at}>{pattern})?)" for at, pattern in each), is_timed)
        except PatternError as error:
            raise ProtocolError(f"named groups must differ between cues: {error}") from error
        return together, tuple((together.groupindex[f"cue{at}"], at) for at, _ in each)

    def _beginnings_of(self, literal: list[int]) -> tuple[str, ...]:
        runs = (run for at in literal for run in re.findall(r"[^\W_'][\w']*\??", lowered(self.cues[at].pattern)))
        sure = {run[:-2] if run.endswith("?") else run for run in runs}
        return tuple({word[0] if (word := WORD.match(run)) else run for run in sure})  # a run may be several words

    def _may_begin(self, word: str) -> bool:
        may = self._begun.get(word)
        if may is None:
            if len(self._begun) >= 1 << 14:
                self._begun.clear()
            may = self._begun[word] = word.startswith(self._beginnings)
        return may

    def find(self, low: str) -> list[Found]:
        """Every occurrence of every cue in a lowered text, in order of its start."""
        found: list[Found] = []
        for match in WORD.finditer(low):
            start, word = match.start(), match[0]
            for at in self._by_word.get(word.removesuffix("'s"), ()):
                found.append(Found(start, match.end(), at))
            for regex, groups in (self._literal, self._other) if self._may_begin(word) else (self._other,):
                tried = regex.match(low, start)
                if tried is not None and tried.lastindex:
                    spans = tried.regs
                    found += [
                        Found(spans[group][0], spans[group][1], at) for group, at in groups if spans[group][0] >= 0
                    ]
        return found

    def for_the_mode(self, low: str) -> Iterator[Found]:
        """What speaks for the mode in the passages of a lowered text whose sum passes the threshold."""
        if not self.cues:
            return
        found, at = self.find(low), 0
        for _, end in passages(low):
            inside = []
            while at < len(found) and found[at].start < end:
                inside.append(found[at])
                at += 1
            if self.weigh(inside) > self.threshold:
                yield from (one for one in inside if self.cues[one.cue].weight > 0)

    def beginnings(self, low: str) -> Iterator[str]:
        """The first letters of each word that speaks for the mode: "observe" and "observing" share them."""
        for word in WORD.finditer(low):
            for at in self._by_word.get(word[0].removesuffix("'s"), ()):
                if self.cues[at].weight > 0:
                    yield f"{word[0][:4]}-"

    def broken_examples(self) -> Iterator[str]:
        """What each example of a pattern shows that does not hold."""
        for cue in self.cues:
            for text in (*cue.matches, *cue.rejects):
                low = lowered(normalise(text))
                is_found = any(cue.regex and cue.regex.match(low, word.start()) for word in WORD.finditer(low))
                if is_found is not (text in cue.matches):
                    kind, told = ("counter-example", "finds") if is_found else ("example", "does not find")
                    yield f"cue {cue.id!r}: {kind} {text!r} does not hold: its pattern {told} something in it"

    def weigh(self, found: list[Found]) -> float:
        """The sum of the weights, each cue at most `MOST` times."""
        counts: dict[int, int] = {}
        for one in found:
            counts[one.cue] = counts.get(one.cue, 0) + 1
        return sum(self.cues[cue].weight * min(count, MOST) for cue, count in counts.items())


def passages(low: str) -> list[tuple[int, int]]:
    """Where the text's passages begin and end; a short rest belongs to the passage before, and "|" ends any."""
    found: list[tuple[int, int]] = []
    block = 0
    for part in low.split("|"):
        found += _passages_within(part, block)
        block += len(part) + 1
    return found


def _passages_within(part: str, offset: int) -> list[tuple[int, int]]:
    cuts = [0]
    if len(part) >= 2 * PASSAGE:  # a word may be one character
        starts = [word.start() for word in WORD.finditer(part)]
        ends = [end.end() for end in _ENDS.finditer(part)]
        first = at = 0
        while len(starts) - first >= 2 * PASSAGE:
            least, most = starts[first + PASSAGE], starts[first + 2 * PASSAGE - 1]
            at = bisect_left(ends, least, at)
            cuts.append(ends[at] if at < len(ends) and ends[at] <= most else most)
            first = bisect_left(starts, cuts[-1], first)
    return [(offset + a, offset + b) for a, b in zip(cuts, [*cuts[1:], len(part)], strict=True)]


def read_cues(parsed: dict[str, Any], lists: dict[str, list[str]], origin: str, is_timed: bool) -> Cues:
    """The cues of a lexicon's file, its threshold and its examples; none where the file has none.

    Raises `ProtocolError` when they have another form.
    """
    rows, threshold, examples = parsed.get("cues", []), parsed.get("threshold", 0.0), parsed.get("examples", {})
    if not isinstance(rows, list) or isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise ProtocolError(f"lexicon {origin!r}: cues must be a list, and threshold a number, not {threshold!r:.80}")
    if not isinstance(examples, dict) or not set(examples) <= {"hits", "none"}:
        raise ProtocolError(f"lexicon {origin!r}: examples may have hits and none, not {examples!r:.80}")
    tried = {key: _texts(listed, f"lexicon {origin!r}: examples: {key}") for key, listed in examples.items()}
    return Cues(tuple(_cue_from_parsed(row, lists, origin, is_timed) for row in rows), float(threshold), **tried)


def _cue_from_parsed(row: Any, lists: dict[str, list[str]], origin: str, is_timed: bool) -> Cue:
    keys = {"id", "weight", "words", "pattern", "matches", "rejects"}
    if not isinstance(row, dict) or not {"id", "weight"} <= set(row) <= keys:
        raise ProtocolError(
            f"lexicon {origin!r}: a cue must have id, weight, and words or a pattern, and may have matches and "
            f"rejects; not {row!r:.80}"
        )
    name, weight, pattern = row["id"], row["weight"], row.get("pattern", "")
    where = f"lexicon {origin!r}: cue {name!r}"
    if not isinstance(name, str) or isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ProtocolError(f"{where}: id must be text, and weight a number, not {weight!r:.80}")
    if not isinstance(pattern, str):
        raise ProtocolError(f"{where}: pattern must be text, not {pattern!r:.80}")
    texts = {key: _texts(row.get(key, []), f"{where}: {key}") for key in ("words", "matches", "rejects")}
    words = [word for text in texts["words"] for word in with_lists(text, lists, where).strip("(?:)").split("|")]
    if broken := next((word for word in words if not WORD.fullmatch(word)), None):
        raise ProtocolError(
            f"{where}: words must be single words or names of lists of them, not {broken!r:.80}; in a script without "
            "spaces between words each character is one, and more of them are written as a pattern"
        )
    return Cue(
        id=name,
        weight=float(weight),
        words=frozenset(map(lowered, words)),
        pattern=with_lists(pattern, lists, where),
        is_timed=is_timed,
        matches=texts["matches"],
        rejects=texts["rejects"],
    )


def _texts(listed: Any, where: str) -> tuple[str, ...]:
    if not isinstance(listed, list) or not all(isinstance(text, str) and text for text in listed):
        raise ProtocolError(f"{where} must be a list of texts (on, off, yes, no and numbers need quotes)")
    return tuple(listed)
