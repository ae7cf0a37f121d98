"""What to say of a name that there is not: the nearest one that there is, or all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

MOST_NAMES, MOST_LETTERS = 500, 100
"""That are compared, since a comparison takes longer the more there are."""
MOST_LISTED = 200


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one is most like, whatever its case; None where none is like it.

    >>> nearest("scoree", ["score", "n_tokens"]), nearest("a", ["A", "B"]), nearest("x", ["A", "B"])
    ('score', 'A', None)
    """
    name = name[:MOST_LETTERS]
    lowered: dict[str, str] = {}
    for right in islice(known, MOST_NAMES):
        lowered.setdefault(right.lower(), right)
    found = difflib.get_close_matches(name.lower(), lowered, n=1)
    return lowered[found[0]] if found else None


def instead(name: str, known: Iterable[str], there_is: str = "there is") -> str:
    """What to write in place of a name, as the end of a sentence.

    >>> instead("scoree", ["score", "n_tokens"]), instead("x", ["A", "B"], "it has"), instead("x", [])
    ("did you mean 'score'?", 'it has A, B', 'there is none')
    """
    names = list(known)
    near = nearest(name, names)
    listed = ", ".join([*names[:MOST_LISTED], *["..."] * (len(names) > MOST_LISTED)])
    return f"did you mean {near!r}?" if near else f"{there_is} {listed or 'none'}"
