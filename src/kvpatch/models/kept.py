"""What the engine keeps with a model from call to call, in one place that says who writes what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Kept:
    """Found out or allocated once per model, and used by later calls.

    Attributes:
        backend: how the model's decoding step runs, an `engine.backend.Fast`; None until `fast_of` has found out.
        runner: decoding slots and graphs on a GPU, of `engine.batching`; None where none are held.
        most_rows: the most rows that were decoded at once when memory ran out; None where it never did.
        tokens_at_once: tokens of one pass after memory ran out; None where it never did (`engine.token_budget`).
    """

    backend: Any = None
    runner: Any = None
    most_rows: int | None = None
    tokens_at_once: int | None = None

    def clear(self) -> None:
        """Forget what depends on the model's weights, since they were changed."""
        self.backend = None
        self.runner = None
