"""The files of lexicons: shipped ones by their names, others by their paths."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import re
from pathlib import Path

from kvpatch.errors import ProtocolError
from kvpatch.files import bytes_within, is_file


def lexicon_bytes(name_or_path: str | Path, folder: Path | None = None) -> bytes:
    """The bytes of a shipped lexicon, by its name, or of any other, by a path relative to the folder.

    Raises `ProtocolError` when there is no such file.
    """
    origin = str(name_or_path)
    shipped = importlib.resources.files("kvpatch.readouts") / "lexicons"
    is_path = isinstance(name_or_path, Path) or re.search(r"[/\\]|\.ya?ml$", origin)
    file = Path(folder or "", origin) if is_path else Path(str(shipped), f"{origin}.yaml")
    if not is_file(file):
        names = ", ".join(sorted(item.name.removesuffix(".yaml") for item in shipped.iterdir()))
        looked = f" in {folder}" if is_path and folder else ""
        raise ProtocolError(f"no lexicon {origin!r}{looked}; give one of {names}, or the path of a .yaml file")
    return bytes_within(file)


def is_shipped(sha256: str) -> bool:
    """Whether a lexicon of this hash comes with kvpatch."""
    return sha256 in _shipped_sha256s()


@functools.cache
def _shipped_sha256s() -> frozenset[str]:
    shipped = importlib.resources.files("kvpatch.readouts") / "lexicons"
    return frozenset(hashlib.sha256(item.read_bytes()).hexdigest() for item in shipped.iterdir())
