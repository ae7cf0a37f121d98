"""What `kvpatch power` shows of the whole rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.progress import Progress
from rich.table import Table

from kvpatch.cli.console import PlainConsole
from kvpatch.errors import ProtocolError
from kvpatch.protocols.schema import Protocol
from kvpatch.verdicts.power_of_rule import (
    OTHER_N,
    RulePower,
    assumptions_of,
    assumptions_of_pilot,
    every_claim_holds,
    power_of_rule,
    read_assumptions,
)
from kvpatch.verdicts.simulated_rule import refuse_uncountable


def simulated(
    protocol: Protocol,
    pilot: pd.DataFrame | None,
    assume: Path | None,
    n: int | None,
    effect: float,
    draws: int,
    seed: int,
) -> list[RulePower]:
    """Power of the whole rule at n pairs (None for the phases' own) and at a few others, with a bar of how far it is.

    Raises:
        ProtocolError: for both a pilot and assumptions, or assumptions that the protocol can't have.
    """
    if pilot is not None and assume is not None:
        raise ProtocolError("--assume and --pilot both say what is true; give one of them")
    if assume is not None:
        assumptions = assumptions_of(protocol, read_assumptions(assume))
    elif pilot is not None:
        assumptions = assumptions_of_pilot(protocol, pilot)
    else:
        assumptions = every_claim_holds(protocol, effect)
    refuse_uncountable(protocol, n, draws)
    pairs = [n, *(other for other in OTHER_N if other != n)]
    with Progress(console=PlainConsole(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating the whole rule", total=2 * draws * len(pairs))
        return power_of_rule(
            protocol, assumptions, pairs, draws, seed, lambda count: progress.update(task, advance=count)
        )


def print_rule(protocol: Protocol, found: Sequence[RulePower], draws: int) -> None:
    """A row per hypothesis that is not true by construction: power of its test alone and of the whole rule, at each
    number of pairs."""
    if not found:
        return
    console = PlainConsole()
    columns = list(dict.fromkeys((p.is_planned, None if p.is_planned else p.n) for p in found))
    table = Table(title="the whole rule: share of simulated runs that pass, by the test alone / by the whole rule")
    table.add_column("hypothesis", no_wrap=True)
    for is_planned, n in columns:
        table.add_column("as planned, n" if is_planned else f"n={n}", no_wrap=True)
    cells = {(p.id, p.is_planned, None if p.is_planned else p.n): p for p in found}
    for name in dict.fromkeys(p.id for p in found):
        own = [cells[name, *column] for column in columns]
        if protocol.is_tautological(protocol.hypothesis(name)):
            continue
        shown = [f"{p.alone:.0%} / {p.whole:.0%}" + (f", {p.n}" if p.is_planned else "") for p in own]
        table.add_row(name if own[0].is_true else f"{name} *", *shown)
    console.print(table)
    for column in columns:
        first = next(p for p in found if (p.is_planned, None if p.is_planned else p.n) == column)
        at = "their own n" if column[0] else f"n={column[1]}"
        console.print(
            f"At {at} {first.any_false:.0%} of the runs made a false confirmatory claim; {first.strongest:.0%} had the "
            "strongest headline."
        )
    console.print(
        f"{draws} simulated runs for each n, so that a share has a standard error of at most {0.5 / draws**0.5:.1%}; "
        "--draws takes more. A name with a star: the claim is false under what is assumed, so its shares are errors."
    )
