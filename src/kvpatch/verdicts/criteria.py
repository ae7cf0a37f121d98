"""The table of success criteria: each row's verdict, from the hypotheses that decide it."""

from __future__ import annotations

from collections.abc import Sequence

from kvpatch.specs.base import Frozen
from kvpatch.verdicts.records import Verdict, Word

WEAKEST: tuple[Word, ...] = (
    "contradicted", "not supported", "not interpretable", "inconclusive", "tautological", "equivalent", "supported",
)  # fmt: skip
"""A criterion that several hypotheses decide holds no more than the first of these that one of them got."""


class Criterion(Frozen):
    """One row: the criterion in the experiment's own words, its verdict, one sentence why, and what decided it."""

    criterion: str
    verdict: Word
    because: str
    decided_by: list[str]


def criteria(verdicts: Sequence[Verdict]) -> list[Criterion]:
    """The success criteria in the protocol's order."""
    rows: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.criterion:
            rows.setdefault(verdict.criterion, []).append(verdict)
    return [_row(name, deciding) for name, deciding in rows.items()]


def _row(name: str, deciding: Sequence[Verdict]) -> Criterion:
    word: Word = next(word for word in WEAKEST if any(v.verdict == word for v in deciding))
    because = next(v.because for v in deciding if v.verdict == word)
    if len(deciding) > 1:
        said = [
            f"{sum(v.verdict == w for v in deciding)} {w}" for w in WEAKEST if any(v.verdict == w for v in deciding)
        ]
        because = f"{', '.join(said)} of {len(deciding)}; the first that is {word}: {because}"
    return Criterion(criterion=name, verdict=word, because=because, decided_by=[v.id for v in deciding])
