"""Regular expressions that come with a protocol or a lexicon: they run with a time limit.

Python's own module can't be stopped: `(a+)+b` on thirty letters takes it longer than a run. The package `regex` can.
It takes more than Python's module and differs from it for combining marks, which it counts as letters; what Python's
module refuses is refused here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from re import _parser  # pyright: ignore[reportAttributeAccessIssue] (it has no public name that is not deprecated)
from typing import Any

import regex

from kvpatch.errors import ProtocolError

SECONDS = 1.0
"""For one search in one text. An ordinary pattern needs less than a millisecond."""
LONGEST = 200_000
"""Characters of a pattern, or of the patterns of a lexicon that are tried at once."""


class PatternError(ValueError):
    """A text is no regular expression; the message says why."""


def _size(parsed: Any) -> int:
    """Places of a pattern with every repetition written out as often as it may be at least: `(a{9}){9}` has 81. The
    package writes them out when it compiles, so that `(a{65535}){65535}` takes it minutes and all memory."""
    total = 0
    for kind, held in parsed:
        if kind in (_parser.MAX_REPEAT, _parser.MIN_REPEAT, _parser.POSSESSIVE_REPEAT):
            least, most, inner = held
            times = least if most is _parser.MAXREPEAT else most
            total += max(1, int(times)) * _size(inner)
        else:
            inside = held if isinstance(held, tuple) else (held,)
            lists = [part for each in inside for part in (each if isinstance(each, list) else (each,))]
            total += 1 + sum(_size(part) for part in lists if isinstance(part, _parser.SubPattern))
    return total


class Pattern:
    """A regular expression that runs with a time limit; the methods are those of `re.Pattern`.

    Raises:
        PatternError: where it is none.
        ProtocolError: from its methods, where a search takes more than `SECONDS`.
    """

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self.pattern, self.flags = pattern, flags
        if len(pattern) > LONGEST:
            raise PatternError(f"it has {len(pattern):,} characters, and may have {LONGEST:,}")
        try:
            re.compile(pattern, flags)
            if (size := _size(_parser.parse(pattern, flags))) > LONGEST:
                raise PatternError(f"its repetitions written out have {size:,} places, and may have {LONGEST:,}")
            self._compiled = regex.compile(pattern, flags | regex.VERSION0)
        except (re.error, regex.error) as error:
            raise PatternError(str(error)) from error
        except (OverflowError, RecursionError, MemoryError) as error:
            raise PatternError("it is too large or too deeply nested") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Pattern, (self.pattern, self.flags)

    @property
    def groupindex(self) -> dict[str, int]:
        """Name of a group -> its number."""
        return dict(self._compiled.groupindex)

    def match(self, text: str, pos: int = 0) -> Any:
        """The match that begins at a place, or None."""
        try:
            return self._compiled.match(text, pos, timeout=SECONDS)
        except TimeoutError:
            raise self._too_slow(text) from None

    def finditer(self, text: str) -> Iterator[Any]:
        """Every match, in order."""
        try:
            yield from self._compiled.finditer(text, timeout=SECONDS)
        except TimeoutError:
            raise self._too_slow(text) from None

    def _too_slow(self, text: str) -> ProtocolError:
        return ProtocolError(
            f"the pattern {self.pattern!r} took more than {SECONDS:g} s on the text {text[:60]!r}: a repetition of "
            "repetitions, such as (a+)+, tries too many ways; write it without"
        )
