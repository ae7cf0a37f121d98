"""What other installed packages register, read from an entry-point group of Python packaging."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from kvpatch.errors import ExtensionError

Entry = TypeVar("Entry")


def register_installed(group: str, kind: type[Entry], register: Callable[[Entry], object]) -> None:
    """Register what each entry point of a group gives: one entry, or a list or tuple of them.

    Args:
        group: name of the group, such as "kvpatch.readouts".
        kind: class of an entry.
        register: called with each entry, in the order of the entry points' names.
    Raises:
        ExtensionError: for an entry point that can't be imported, gives something else, or whose entry is refused; the
            message names the entry point.
    """
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        where = f"entry point {point.name!r} ({point.value}) of group {group!r}"
        try:
            given = point.load()
        except (Exception, SystemExit) as error:
            why = " ".join(str(error).split())[:200] or "no message"
            raise ExtensionError(f"{where} can't be loaded: {type(error).__name__}: {why}") from error
        found = given if isinstance(given, list | tuple) else [given]
        for entry in found:
            if not isinstance(entry, kind):
                raise ExtensionError(f"{where} must give a {kind.__name__} or a list of them, not {entry!r:.80}")
            try:
                register(entry)
            except ExtensionError as error:
                raise ExtensionError(f"{where}: {error}") from error
