"""parts.jsonl while one process names many parts: lines are added at its end, and the file is not written anew."""

from __future__ import annotations

import os
from collections.abc import Sequence

from kvpatch.errors import StoreError
from kvpatch.files import open_flags
from kvpatch.store.directory import Store, explained
from kvpatch.store.objects import ObjectPath
from kvpatch.store.parts import Part
from kvpatch.store.session import held_session


class GrowingIndex:
    """Names parts in the parts.jsonl of a directory that this process holds; nobody else may write there meanwhile.

    What a process left that was killed while it wrote a line is taken away before the first line is added.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._size: int | None = None  # of the file, once it is known to end with a whole line

    def name(self, parts: Sequence[Part]) -> None:
        """Name parts whose files are written. They count from when this returns, also after a loss of power.

        Raises:
            StoreError: where it can't be written; what was named before stays named.
        """
        path = self.store.index
        with explained(self.store.directory):
            if isinstance(path, ObjectPath):
                return held_session(path).name_parts(parts)
            if path.is_symlink():
                raise StoreError(f"{path} is a symbolic link, and a run is not written through one; delete the link")
            if self._size is None or not path.exists() or path.stat().st_size != self._size:
                named = {part.part for part in parts}
                kept = [part for part in self.store.parts() if part.part not in named]
                self.store.write_index([*kept, *parts])
                self._size = path.stat().st_size
                return
            lines = b"".join(part.line() for part in parts)
            self._size = None  # until all of it is written
            with open(os.open(path, os.O_APPEND | open_flags(is_new=False), 0o666), "ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
                self._size = file.tell()
