"""The table of an experiment's plan: what was claimed and expected, and the hypotheses that answer each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from pydantic import Field

from kvpatch.protocols.hypotheses import Hypothesis, Misplaced
from kvpatch.specs.base import Frozen, is_empty, is_none
from kvpatch.specs.nearest import instead

RowKind = Literal["intervention", "premise", "criterion", "prediction", "question"]
"""What a row of the plan is, in the order in which the table shows them."""


class PlanRow(Frozen):
    """One row of the plan's table.

    The hypotheses that answer it are those that it names, and those whose `criterion` is its claim.
    """

    kind: RowKind = Field(
        description="an earlier 'intervention' to repeat, a 'premise' to test, a success 'criterion', a 'prediction', "
        "or a 'question' that the whole must answer"
    )
    claim: str = Field(min_length=1, description="the row in the plan's own words")
    expected: str | None = Field(
        default=None, exclude_if=is_none, description="what the plan said: a figure with its n and p, or a direction"
    )
    hypotheses: list[str] = Field(
        default=[], exclude_if=is_empty, description="ids of the hypotheses that say, where they pass, that it holds"
    )
    rivals: list[str] = Field(
        default=[], exclude_if=is_empty, description="ids of the hypotheses that contradict it where they pass"
    )
    unknown: str | None = Field(
        default=None, exclude_if=is_none, description="what stays unknown whatever the run says"
    )


def completed(plan: Sequence[PlanRow], hypotheses: Sequence[Hypothesis]) -> list[PlanRow]:
    """Return all rows, kind by kind, each with every hypothesis that answers it, first those that name it themselves.

    A `criterion` of hypotheses that is no row of the plan is a row of its own.
    """
    naming: dict[str, list[str]] = {}
    for h in hypotheses:
        if h.criterion:
            naming.setdefault(h.criterion, []).append(h.id)
    rows = [
        row.model_copy(update={"hypotheses": _each_once(naming.get(row.claim, []), row.hypotheses)}) for row in plan
    ]
    claims = {row.claim for row in plan}
    rows += [PlanRow(kind="criterion", claim=c, hypotheses=ids) for c, ids in naming.items() if c not in claims]
    return sorted(rows, key=lambda row: get_args(RowKind).index(row.kind))


def _each_once(*lists: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))


def said_of(hypothesis: Hypothesis, rows: Sequence[PlanRow]) -> str | None:
    """Return what the plan expected of a hypothesis: its own `expected`, or that of the first row that it answers.

    rows: as `completed` gives them.
    """
    own = [hypothesis.expected, *(row.expected for row in rows if hypothesis.id in row.hypotheses)]
    return next((said for said in own if said), None)


def wrong_rows(plan: Sequence[PlanRow], hypotheses: Sequence[Hypothesis]) -> Iterator[Misplaced]:
    """Yield what is wrong with the rows: a hypothesis that there is not, one that is named twice, a repeated claim."""
    known = [h.id for h in hypotheses]
    claims: set[str] = set()
    for place, row in enumerate(plan):
        if row.claim in claims:
            yield Misplaced(f"the plan has two rows with the claim {row.claim!r}", "plan", place, "claim")
        claims.add(row.claim)
        seen: set[str] = set()
        for key in ("hypotheses", "rivals"):
            for index, name in enumerate(getattr(row, key)):
                at = ("plan", place, key, index)
                if name not in known:
                    yield Misplaced(f"no hypothesis {name!r}; {instead(name, known)}", *at)
                elif name in seen:
                    yield Misplaced(f"the row {row.claim!r} names hypothesis {name!r} twice", *at)
                seen.add(name)
