"""What a run tells whoever watches it. Needs no torch, so that the command line can show other work too without it."""

from __future__ import annotations

from kvpatch.planning.plan import Batch, Plan


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
