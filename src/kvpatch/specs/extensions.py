"""What installed packages add to kvpatch: functions named by entry points, each called once."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from kvpatch.errors import ExtensionError

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
