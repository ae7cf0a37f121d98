"""Errors meant for a person: one line that says what was wrong and what would be right (exit code 2)."""

from __future__ import annotations

from collections.abc import Sequence


class KvpatchError(ValueError):
    """Something the user gave can't be used; the message is one line and says what would be right."""


class ModelError(KvpatchError):
    """A model can't be found, read, trusted or patched."""


class ProtocolError(KvpatchError):
    """A protocol file, a prompt bank or a request on them is wrong."""


class ProtocolMistakes(ProtocolError):
    """All that is wrong with a protocol file, one line each in `lines`."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


class StoreError(KvpatchError):
    """A run directory can't be written, belongs to something else, or holds a damaged file."""


class CacheError(KvpatchError):
    """A selection, alignment or cache operation does not fit the caches it was given."""


class EmptySelection(CacheError):
    """A selection finds nothing, so that what was asked for would change nothing.

    Attributes:
        without_row: the message as it reads where the row is known otherwise.
    """

    def __init__(self, message: str, without_row: str | None = None) -> None:
        super().__init__(message)
        self.without_row = message if without_row is None else without_row
