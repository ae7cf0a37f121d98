"""Models that are made rather than found: whose names they have, and who writes their directories."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

Maker = Callable[[str, Path], Path]
"""Takes a model's name, without its prefix, and the user's cache directory; returns the model's directory."""
_MAKERS: dict[str, tuple[Collection[str], Maker]] = {}


def register_maker(prefix: str, names: Collection[str], make: Maker) -> None:
    """Let `kvpatch.load` take `prefix + name` for each of the names."""
    _MAKERS[prefix] = (names, make)


def made_model(name: str, cache: Path) -> Path | None:
    """The directory of a model that a maker makes, made where it is not there yet; None for any other name."""
    for prefix, (names, make) in _MAKERS.items():
        if name.startswith(prefix) and name.removeprefix(prefix) in names:
            return make(name.removeprefix(prefix), cache)
    return None
