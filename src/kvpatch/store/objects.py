"""Places on object stores: `s3://bucket/run`, `gs://bucket/run` and `az://container/run`, and `hf://` to read.

`place_of` turns what a user gave into a place: a `pathlib.Path`, or an `ObjectPath`, which answers to the same names as
far as a run directory needs them. Its bucket's writes can be made conditional: only where there is no such object, or
only over the very version that was read. What holds a run against a second process rests on that (`lease.py`).
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from kvpatch.errors import StoreError
from kvpatch.files import bytes_within
from kvpatch.specs.arguments import path
from kvpatch.store.buckets import Bucket, Found, bucket

_URL = re.compile(r"(s3|gs|az|hf):/{1,2}(?=[^/])")  # a pathlib.Path has one slash left of the two
LISTED_FOR = 1.0
"""Seconds for which the listing of a folder answers for its objects."""


class ObjectPath:
    """An object, or a folder of them, which is there once an object's name begins with it.

    It has those names of `pathlib.Path` that a run directory is asked for.
    """

    _listings: ClassVar[dict[str, tuple[float, dict[str, Found]]]] = {}
    _lock = threading.Lock()

    def __init__(self, scheme: str, bucket_name: str, key: str) -> None:
        self.scheme, self.bucket_name = scheme, bucket_name
        self.key = "/".join(part for part in key.split("/") if part and part != ".")

    @property
    def bucket(self) -> Bucket:
        return bucket(self.scheme, self.bucket_name)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket_name}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: ObjectPath) -> bool:
        return str(self) < str(other)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectPath, (self.scheme, self.bucket_name, self.key)

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.scheme, self.bucket_name, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.bucket_name

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.scheme, self.bucket_name, self.key.rpartition("/")[0])

    @property
    def parents(self) -> tuple[ObjectPath, ...]:
        found = [self.parent]
        while found[-1].key:
            found.append(found[-1].parent)
        return tuple(found)

    def resolve(self) -> ObjectPath:
        return self

    absolute = resolve

    def is_symlink(self) -> bool:
        return False

    def mkdir(self, **_: bool) -> None:
        """Nothing: a folder is made by what is put into it."""

    def read_bytes(self) -> bytes:
        return self.bucket.get(self.key)[0]

    def stat(self) -> Found:
        """The object's version. That of a part comes from a listing, which costs one request for a thousand of them.

        Raises:
            FileNotFoundError: where there is no such object.
        """
        if self.parent.name not in ("trials", "attention"):
            return self.bucket.head(self.key)
        found = self.parent.listing().get(self.key)
        if found is None:
            raise FileNotFoundError(f"there is no object {self}")
        return found

    def listing(self) -> dict[str, Found]:
        """The objects in this folder, as they were at most a second ago."""
        with self._lock:
            at, found = self._listings.get(str(self), (0.0, {}))
        if time.monotonic() - at > LISTED_FOR or not at:
            at, found = time.monotonic(), self.bucket.list(f"{self.key}/")
            with self._lock:
                self._listings[str(self)] = at, found
        return found

    def forget(self) -> None:
        """Forget the listing that this object stands in."""
        with self._lock:
            self._listings.pop(str(self.parent), None)

    def is_file(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    exists = is_file

    def is_dir(self) -> bool:
        return any(self._inside())

    def _inside(self) -> tuple[list[str], list[str]]:
        return self.bucket.inside(f"{self.key}/" if self.key else "")

    def iterdir(self) -> Iterator[ObjectPath]:
        """What is in this folder: objects and folders."""
        folders, objects = self._inside()
        return (ObjectPath(self.scheme, self.bucket_name, key) for key in sorted([*folders, *objects]))

    def folders(self) -> list[ObjectPath]:
        """The folders in this one."""
        return [ObjectPath(self.scheme, self.bucket_name, key) for key in self._inside()[0]]

    def delete(self) -> None:
        """Delete the object."""
        self.bucket.delete(self.key)
        self.forget()


def content_of(path: Place, most: int) -> bytes:
    """The content of a file or an object, or as much of it as shows that it is too long for its reader.

    Raises:
        OSError: where it can't be read.
    """
    return path.read_bytes() if isinstance(path, ObjectPath) else bytes_within(path, most)


def refuse_whole_bucket(place: Place) -> None:
    """Refuse the address of an object store that names no folder in a bucket.

    Raises:
        StoreError: with an address that would do.
    """
    if isinstance(place, ObjectPath) and not place.key and place.scheme != "hf":
        raise StoreError(f"{place} names a bucket and no run directory in it; give {place}/NAME")


def is_there(path: Place) -> bool:
    """Whether there is such a file or object; also where the name is none that the system can look up."""
    return path.is_file() if isinstance(path, ObjectPath) else os.path.exists(path)


def move(place: Place, to: Place) -> None:
    """Give a file another name, or copy an object to another name and delete it here."""
    if isinstance(place, Path) and isinstance(to, Path):
        os.replace(place, to)
    elif isinstance(place, ObjectPath) and isinstance(to, ObjectPath):
        to.bucket.put(to.key, place.read_bytes())
        place.delete()


Place = Path | ObjectPath
"""Where a run, or a file of it, is."""


def place_of(given: str | os.PathLike[str] | ObjectPath) -> Place:
    """A place, from what a user gave."""
    if isinstance(given, ObjectPath):
        return given
    text = path("a run directory", given, error=StoreError)
    if not (found := _URL.match(text)):
        return Path(given)
    name, _, key = text[found.end() :].partition("/")
    if found[1] == "hf":  # an address of the hub begins with the kind and the repository's two names
        kind = [name] if name in ("datasets", "spaces", "buckets") else []
        words = [*([] if kind else [name]), *key.split("/")]
        name, key = "/".join([*kind, *words[:2]]), "/".join(words[2:])
    return ObjectPath(found[1], name, key)
