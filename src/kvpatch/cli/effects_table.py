"""The table of `kvpatch effects`: every condition against its natural run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from kvpatch.cli.console import PlainConsole, styled
from kvpatch.specs.readouts import readouts
from kvpatch.verdicts.prerequisites import COHERENT_SHARE
from kvpatch.verdicts.wording import number, percent

if TYPE_CHECKING:
    from kvpatch.verdicts.effects import Effect

INTERVAL = 16
"""Characters of an interval such as "-0.102 to +0.302"."""


def print_effects(effects: Sequence[Effect]) -> None:
    """A row a condition, a column a readout; as many tables a phase as its readouts need, so that no heading is cut."""
    console = PlainConsole()
    for phase in dict.fromkeys(effect.phase for effect in effects):
        rows = [effect for effect in effects if effect.phase == phase]
        measured = list(dict.fromkeys(effect.readout for effect in rows))
        conditions = list(dict.fromkeys(effect.condition for effect in rows))
        console.print(styled(f"phase {phase}: difference from the natural run", "bold"))
        console.print("Mean over pairs, and under it the 95% interval.")
        if any(effect.is_incoherent for effect in rows):
            limit = percent(COHERENT_SHARE)
            console.print(
                f"* Fewer than {limit} of the outputs are coherent: readouts of sampled text can't be read there."
            )
        left = console.width - max(map(len, (*conditions, "condition"))) - len("coherent") - 16
        for shown in _that_fit(measured, left):
            console.print(_effects_table(rows, conditions, shown, says_about=console.width >= 140))


def _that_fit(measured: Sequence[str], width: int) -> list[list[str]]:
    """Readouts in groups whose columns are together no wider than that; at least one each."""
    groups: list[list[str]] = []
    left = 0
    for name in measured:
        needed = max(INTERVAL, *map(len, _heading(name).split())) + 3
        if needed > left:
            groups.append([])
            left = width
        groups[-1].append(name)
        left -= needed
    return groups


def _effects_table(
    rows: Sequence[Effect], conditions: Sequence[str], shown: Sequence[str], *, says_about: bool
) -> Table:
    table = Table()
    for column in ("condition", "n", "coherent", *(_heading(name) for name in shown)):
        table.add_column(column, no_wrap=column == "condition")
    if says_about:
        table.add_column("about")
    for condition in conditions:
        own = {effect.readout: effect for effect in rows if effect.condition == condition}
        first = next(iter(own.values()))
        share = "-" if first.coherent is None else percent(first.coherent)
        share += " *" if first.is_incoherent else ""
        n = str(max(effect.n for effect in own.values()))
        about = [first.about] if says_about else []
        table.add_row(condition, n, share, *(_interval(own[name]) for name in shown), *about)
    return table


def _heading(readout: str) -> str:
    known = readouts()
    return known[readout].heading("effects") if readout in known else readout


def _interval(effect: Effect) -> str | Text:
    if effect.estimate is None:
        return "-"
    if effect.ci_low is None or effect.ci_high is None:
        return _signed(effect.estimate)
    interval = styled(f"{_signed(effect.ci_low)} to {_signed(effect.ci_high)}", "dim")
    return Text(f"{_signed(effect.estimate)}\n") + interval


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"
