"""What a run tells whoever watches it. Needs no torch, so that the command line can show other work too without it."""

from __future__ import annotations

from collections.abc import Callable

from kvpatch.planning.plan import Batch, Plan

Report = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much; of 0 where that is not known."""


class ProgressListener:
    """What a run tells whoever watches; every method may be replaced."""

    def stage(self, what: str) -> None:
        """A new stage has begun."""

    def planned(self, plan: Plan) -> None:
        """The plan is made."""

    def tokens(self, rows_going: int) -> None:
        """A decoding step wrote this many tokens."""

    def batch(self, batch: Batch, tokens: int) -> None:
        """A batch is stored, or found stored; it wrote this many tokens now."""


def unreported(what: str, done: int, total: int) -> None:
    """Tell nobody."""
