"""What installed packages add to kvpatch, found by entry points: entries to register, or functions that register."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from kvpatch.errors import ExtensionError

Entry = TypeVar("Entry")
_CALLED: set[tuple[str, str, str]] = set()
"""(group, name, value) of the entry points whose function was called."""


def load(group: str) -> None:
    """Call, once each, the functions that entry points of a group name. They take no argument, and register something.

    Entry points are looked up each time, so that a package installed while a notebook is open is found.

    Raises:
        ExtensionError: naming the entry point that can't be used; the next call tries it again.
    """
    for entry in entry_points(group=group):
        key = (group, entry.name, entry.value)
        if key in _CALLED:
            continue
        _CALLED.add(key)  # before the call, since what it calls may ask for what is registered
        try:
            entry.load()()
        except Exception as error:
            _CALLED.discard(key)
            said = " ".join(str(error).split())
            why = f"{type(error).__name__}: {said}" if said else type(error).__name__
            raise ExtensionError(f"{_named(entry, group)} can't be used ({why}); mend or uninstall it") from error


def _named(entry: EntryPoint, group: str) -> str:
    of = f" of package {entry.dist.name}" if entry.dist is not None else ""
    return f"the entry point {group}: {entry.name} = {entry.value}{of}"


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
