"""The plan's table in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from kvpatch.cli.console import PlainConsole, styled
from kvpatch.errors import visible
from kvpatch.verdicts.rounding import number
from kvpatch.verdicts.wording import p_value

if TYPE_CHECKING:
    from kvpatch.verdicts.plan_table import AnsweredRow, Finding


def print_plan_table(rows: Sequence[AnsweredRow]) -> None:
    """Print one row per row of the plan, where the protocol has one."""
    if not rows:
        return
    table = Table(title="the plan's table", show_lines=True)
    for column, ratio in (("the plan says", 3), ("it expected", 3), ("measured", 4), ("answer", 5)):
        table.add_column(column, ratio=ratio)
    for row in rows:
        measured = "\n".join(_measured(finding) for finding in row.findings) or "-"
        answer = styled(row.verdict, "bold") + f"\n{visible(row.answer)}"
        if row.unknown:
            answer += styled(f"\nWhat stays unknown: {row.unknown}", "dim")
        claim = styled(row.kind, "dim") + f"\n{visible(row.claim)}"
        table.add_row(claim, row.expected or "-", measured, answer)
    PlainConsole().print(table)


def _measured(f: Finding) -> str:
    """One hypothesis of a row: its estimate with unit and interval, n, the model and its verdict."""
    name = f"{f.id}, a rival" if f.is_rival else f.id
    if f.estimate is None:
        return f"{name}: {f.verdict}, no number"
    value = f"{number(f.estimate)} {f.unit}".strip()
    if f.ci_low is not None and f.ci_high is not None:
        value += f" [{number(f.ci_low)}, {number(f.ci_high)}]"
    p = "" if f.p_adjusted is None else f", p adjusted {p_value(f.p_adjusted)}"
    return f"{name}: {value}, n = {f.n}{p}{'' if f.model is None else f', {f.model}'}; {f.verdict}"
