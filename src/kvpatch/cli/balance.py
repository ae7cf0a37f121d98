"""What `kvpatch bank --balance` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from kvpatch.cli.console import PlainConsole, styled
from kvpatch.planning.balance import MOST, SHARES, Balance

HEADINGS = {
    "you": "you", "I": "I", "write": "write", "describe": "descr.", "question": "ask", "words": "words",
    "tokens": "tokens", "zipf": "Zipf", "hits": "hits",
}  # fmt: skip
"""Column -> its heading, in the order shown."""


def balance_summary(found: Sequence[Balance]) -> list[dict[str, Any]]:
    """The comparisons as plain data."""
    return [
        {
            "compared": one.title,
            "groups": one.groups.reset_index().to_dict("records"),
            "apart": one.apart,
            "over": one.over,
        }
        for one in found
    ]


def print_balance(found: Sequence[Balance]) -> None:
    """One table per comparison, a row per group, and how far the groups lie apart."""
    console = PlainConsole()
    for one in found:
        columns = [name for name in HEADINGS if name in one.groups]
        table = Table(title=one.title, padding=(0, 0, 0, 1), show_edge=False, box=box.SIMPLE_HEAD)
        table.add_column("group", no_wrap=True)
        for heading in ("n", *(HEADINGS[name] for name in columns)):
            table.add_column(heading, justify="right", no_wrap=True)
        for group, row in one.groups.iterrows():
            table.add_row(str(group), str(int(row["n"])), *(_shown(name, float(row[name])) for name in columns))
        table.add_section()
        table.add_row(styled("apart", "bold"), "", *(f"{100 * one.apart[name]:.1f}" for name in columns))
        console.print(table)
    over = [f"{HEADINGS[name]} ({one.title})" for one in found for name in one.over]
    console.print(
        "Shares: prompts that say you or I, that ask to write or to describe, that ask a question. Means: words, "
        "tokens, log10 of how often a word stands in a billion words, hits of the lexicon per 100 words. Apart: "
        f"percentage points of a share, or per cent of the larger mean; at most {100 * MOST:.0f} is balanced."
    )
    console.print(f"not balanced: {'; '.join(over)}" if over else "balanced")


def _shown(column: str, value: float) -> str:
    return f"{100 * value:.0f}" if column in SHARES else f"{value:.2f}"
