"""The verdicts of a run in fewer lines than a screen has."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING

from kvpatch.cli.console import MOST_LINES, PlainConsole, say
from kvpatch.verdicts.rounding import number
from kvpatch.verdicts.wording import p_value

if TYPE_CHECKING:
    from kvpatch.verdicts.outcome import Outcome
    from kvpatch.verdicts.records import Verdict


def print_brief_verdicts(outcome: Outcome, all_of_it: str, most: int = MOST_LINES - 2) -> None:
    """Print the answer, then one line for each verdict of the primary hypotheses, each row of the plan, and each other
    verdict, as many as there is room for; last how many there are of each kind.

    Args:
        all_of_it: the command that prints everything.
        most: lines in all.
    """
    width = max(60, PlainConsole().width)
    head = textwrap.wrap(outcome.answer, width)
    counts = Counter(v.verdict for v in outcome.verdicts)
    told = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    many = len(outcome.verdicts)
    foot = textwrap.wrap(
        f"{many} {'verdict' if many == 1 else 'verdicts'}: {told}. All, with reasons: {all_of_it}", width
    )
    first = [v for v in outcome.verdicts if v.family == "primary"]
    rest = [v for v in outcome.verdicts if v.family != "primary"]
    lines = [line for v in first for line in _lines(v, width)]
    lines += [textwrap.shorten(f"{row.verdict}: {row.claim}", width, placeholder="...") for row in outcome.plan_table]
    lines += [line for v in rest for line in _lines(v, width)]
    room = most - len(head) - len(foot)
    for line in [*head, *lines[:room], *foot]:
        say(line)


def _lines(v: Verdict, width: int) -> list[str]:
    """A verdict, its estimate, interval, p and n, whole; the claim comes last, and is cut where the line ends."""
    interval = "" if v.ci_low is None or v.ci_high is None else f" [{number(v.ci_low)}, {number(v.ci_high)}]"
    estimate = "" if v.estimate is None else f" = {number(v.estimate)}{interval}"
    p = "" if v.p_adjusted is None else f", p {p_value(v.p_adjusted)}"
    numbers = f"{v.verdict}: {v.id}, {v.contrast} in {v.readout}{estimate}{p}, n = {v.n}."
    if len(numbers) > width:
        return textwrap.wrap(numbers, width, subsequent_indent="    ")
    claim = textwrap.shorten(v.claim, max(4, width - len(numbers) - 1), placeholder="...")
    return [numbers if len(numbers) + len(claim) >= width or claim == "..." else f"{numbers} {claim}"]
