"""Parts of runs on object stores, kept in the user's cache so that none is fetched twice.

A kept part is named by its SHA-256 and by the version of the object that it came from. It is hashed each time that it
is read, as a part on a disk is when a process first reads it. A part whose object has changed has another version, and
is fetched anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from kvpatch.files import cache_directory, write_whole
from kvpatch.store.objects import ObjectPath

MOST_KEPT = 8 << 30
"""Bytes of kept parts; beyond them those go that were read longest ago."""
AT_ONCE = 16
"""Parts that are fetched at the same time."""
_since_looked = 0


def kept_part(path: ObjectPath, sha256: str) -> bytes:
    """The content of a part's object, from the cache where it is kept there.

    Raises:
        OSError: where there is no such object, or it can't be read.
    """
    tag = hashlib.sha256(path.stat().tag.encode()).hexdigest()[:16]
    place = cache_directory() / "parts" / sha256[:2] / f"{sha256}-{tag}"
    with suppress(OSError):
        data = place.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            os.utime(place)
            return data
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() == sha256:
        with suppress(OSError):
            write_whole(place, data)
            _let_go_of_old(cache_directory() / "parts", len(data))
    return data


def fetch(wanted: Iterable[tuple[ObjectPath, str]]) -> None:
    """Fetch parts side by side, so that reading them one after another waits for none. What can't be fetched is told by
    whoever reads it."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="kvpatch-fetch") as threads:
        list(threads.map(_fetched, wanted))


def _fetched(wanted: tuple[ObjectPath, str]) -> None:
    with suppress(OSError):
        kept_part(*wanted)


def _let_go_of_old(folder: Path, more: int) -> None:
    """Look at the cache now and then, and take away what is beyond its size."""
    global _since_looked
    _since_looked += more
    if _since_looked < MOST_KEPT // 16:
        return
    _since_looked = 0
    found = sorted((each.stat().st_mtime, each.stat().st_size, each) for each in folder.glob("*/*"))
    excess = sum(size for _, size, _ in found) - MOST_KEPT
    for _, size, each in found:
        if excess <= 0:
            return
        each.unlink(missing_ok=True)
        excess -= size
