"""Writing a run on an object store, so that nothing counts twice whoever else writes there.

A part's files are written before the index names it, as on a disk. They are written where there is none of that name;
one that is there and that the index does not name was left by a process that ended in between, and is replaced, if it
is still the version that was seen. The index, parts.jsonl, is replaced whole, and only over the version that this
session wrote last. A session that took the lease over begins by adding an empty line to it, which readers pass over:
from then on the version that the former holder knows is gone, and nothing that it writes can be named.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvpatch.errors import StoreError
from kvpatch.store.buckets import Changed, Found
from kvpatch.store.lease import Lease
from kvpatch.store.objects import ObjectPath
from kvpatch.store.parts import Part, entries

PARTS = ("trials", "attention")
"""Folders whose objects the index names."""
_held: dict[str, Session] = {}
"""Run directory -> the session by which this process holds it."""


class Session:
    """A run directory on an object store that this process holds."""

    def __init__(self, folder: ObjectPath) -> None:
        self.folder, self.lease = folder, Lease(folder)
        self.place = folder / "parts.jsonl"
        self._index, self._names = b"", set[str]()
        self._known: Found | None = None

    def begin(self) -> None:
        """Take the lease, and the index with it."""
        self.lease.acquire()
        try:
            for _ in range(5):
                self._read_index()
                if not self.lease.took_over:
                    return
                try:
                    return self._write_index(self._index + b"\n")
                except Changed:
                    continue  # the former holder's last write, which was under way
            raise StoreError(f"{self.place} is written by another process that holds no lease; stop that process")
        except BaseException:
            self.lease.release()
            raise

    def _read_index(self) -> None:
        try:
            self._index, self._known = self.place.bucket.get(self.place.key)
        except FileNotFoundError:
            self._index, self._known = b"", None
        self._names = {part.part for part in entries(self._index)[0]}

    def _write_index(self, content: bytes) -> None:
        bucket, key = self.place.bucket, self.place.key
        self._known = (
            bucket.put_new(key, content) if self._known is None else bucket.put_over(key, content, self._known)
        )
        self._index = content

    def replace_index(self, content: bytes) -> None:
        """Write the index anew.

        Raises:
            StoreError: where the lease was lost.
        """
        self.lease.require()
        try:
            self._write_index(content)
        except Changed:
            self.lease.require(is_certain=True)
            raise StoreError(
                f"{self.place} was changed by another process that holds no lease; the same command goes on from it"
            ) from None

    def name_parts(self, parts: Sequence[Part]) -> None:
        """Add parts to the index.

        Raises:
            StoreError: where the lease was lost.
        """
        new, before = {part.part for part in parts}, self._index
        if new & self._names:
            before = b"".join(other.line() for other in entries(before)[0] if other.part not in new)
        elif before and not before.endswith(b"\n"):
            before += b"\n"
        self.replace_index(before + b"".join(part.line() for part in parts))
        self._names |= new


@contextmanager
def session(folder: ObjectPath) -> Iterator[Session]:
    """Hold a run directory while the block runs.

    Raises:
        StoreError: where another process holds it.
    """
    if str(folder) in _held:
        raise StoreError(f"{folder} is in use by this process")
    own = Session(folder)
    own.begin()
    _held[str(folder)] = own
    try:
        yield own
    finally:
        del _held[str(folder)]
        own.lease.release()


def session_of(place: ObjectPath) -> Session | None:
    """The session by which this process holds the run that an object belongs to."""
    return next((found for each in (place, *place.parents) if (found := _held.get(str(each)))), None)


def held_session(place: ObjectPath) -> Session:
    """The same, where only the process that holds the run may write.

    Raises:
        StoreError: where this process does not hold it.
    """
    own = session_of(place)
    if own is None:
        raise StoreError(f"{place.parent} is not held, and its index is written by the process that holds it alone")
    return own


def write_object(place: ObjectPath, data: bytes) -> None:
    """Write an object of a run.

    Raises:
        StoreError: where the lease of this process was lost, or the object may not be replaced.
        OSError: where it can't be written.
    """
    own = session_of(place)
    if own is not None:
        own.lease.require()
    if place.name == "parts.jsonl":
        held_session(place).replace_index(data)
    elif place.parent.name in PARTS:
        _write_part_file(place, data, own)
        place.forget()
    else:
        place.bucket.put(place.key, data)


def refuse_unwritable_objects(folder: ObjectPath) -> None:
    """Write a small object on trial, and take it away again.

    Raises:
        StoreError: where it can't be written, or the store has no conditional writes.
    """
    probe = folder / f".probe-{secrets.token_hex(4)}.tmp"
    try:
        probe.bucket.put_new(probe.key, b"kvpatch")
        probe.bucket.delete(probe.key)
    except OSError as error:
        raise StoreError(f"{folder} can't be written: {error}") from error


def _write_part_file(place: ObjectPath, data: bytes, own: Session | None) -> None:
    """Write a part's file where there is none, or over one that the index does not name."""
    for _ in range(3):
        try:
            place.bucket.put_new(place.key, data)
            return
        except Changed:
            pass
        try:
            seen = place.bucket.head(place.key)
        except FileNotFoundError:
            continue
        if own is not None:
            own.lease.require(is_certain=True)
        try:
            named = entries((place.parent.parent / "parts.jsonl").read_bytes())[0]
        except FileNotFoundError:
            named = []
        if any(part.part == place.name for part in named):
            raise StoreError(f"{place} is stored already, by another process")
        try:
            place.bucket.put_over(place.key, data, seen)
            return
        except Changed:
            continue
    raise StoreError(f"{place} is written by several processes at once")
