"""The parts of a run directory: what parts.jsonl names, and files that are checked before a row of them is used.

Every reader of stored rows comes through here. A file is what was stored if it has the SHA-256 and the number of rows
that its line records, if every column in it that kvpatch knows has its type, and if it takes no more memory than a part
of its size does (`bounds.py`). A column that the file lacks is null,
since it may have been added later; a column that kvpatch does not know is left unread, since a later version may have
written it.

What is trusted: a file that was checked is not hashed again in the same process while its size, times, inode and device
stay what they were, where those times are older than `YOUNG`. Another process checks it anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvpatch.errors import StoreError
from kvpatch.files import MOST_JSON, bytes_within
from kvpatch.store.bounds import MOST_FILE, TooLarge, refuse_large
from kvpatch.store.buckets import Found
from kvpatch.store.kept_parts import kept_part
from kvpatch.store.objects import Place, content_of

Name = Annotated[str, Field(pattern=r"^[^/\\\x00]+\.parquet$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """One line of parts.jsonl: the part's file, its rows and hash; and those of its attention, where it has some.

    What a later version wrote into the line stays there.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    part: Name
    rows: Count
    sha256: Sha256
    attention_rows: Count | None = None
    attention_sha256: Sha256 | None = None

    @property
    def batch(self) -> str:
        """Name of the batch that is stored in it."""
        return self.part.removesuffix(".parquet")

    @property
    def phase(self) -> str:
        """Phase of its trials, from its name, which ends with the batch's number and its hash."""
        words = self.batch.rsplit("-", 2)
        return words[0]

    def line(self) -> bytes:
        """The part as it stands in parts.jsonl."""
        return json.dumps(self.model_dump(exclude_none=True)).encode() + b"\n"


YOUNG = 1_000_000_000
"""Nanoseconds for which a change to a file may go unseen by its times, on file systems with coarse clocks."""
Stamp = tuple[int, ...]
_checked: dict[str, tuple[Stamp, str, int | None]] = {}
"""Path -> the file's stamp, SHA-256 and rows when it was last found to be what was stored."""


def read_index(path: Place) -> list[Part]:
    """What parts.jsonl names, in its order; nothing where there is no such file.

    A line that stands there twice counts once. A last line that breaks off is passed over: what it was to name does not
    count as stored, so that the next run stores it again.

    Raises:
        StoreError: naming a line that is no entry, or that contradicts another.
    """
    try:
        content = index_content(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{path} can't be read: {error.strerror or error}") from error
    lines = [(number, line.strip()) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    found: dict[str, Part] = {}
    for number, line in lines:
        try:
            part = Part.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            is_torn = first["type"] == "json_invalid" and not line.endswith(b"}")
            if found and is_torn and number == lines[-1][0]:
                break
            why = ": ".join([*map(str, first["loc"]), first["msg"]])
            raise StoreError(
                f"{path} is damaged: line {number} names no stored part ({why}); delete it, or have `kvpatch repair "
                f"{path.parent}` do so, to run its trials again"
            ) from error
        if found.setdefault(part.part, part) != part:
            raise StoreError(
                f"{path} is damaged: line {number} names {part.part} again with another content; delete the wrong "
                f"line, or have `kvpatch repair {path.parent}` do so"
            )
    return list(found.values())


def index_content(path: Place) -> bytes:
    """The content of parts.jsonl.

    Raises:
        OSError: where it can't be read, or is longer than that of any run.
    """
    content = content_of(path, MOST_JSON)
    if len(content) > MOST_JSON:
        raise OSError(errno.EFBIG, f"it has more than {MOST_JSON:,} bytes")
    return content


def entries(content: bytes) -> tuple[list[Part], int]:
    """The entries of a damaged parts.jsonl, each once, and how many of its lines are none."""
    found: dict[Part, None] = {}
    bad = 0
    for line in filter(None, map(bytes.strip, content.split(b"\n"))):
        try:
            found[Part.model_validate_json(line)] = None
        except ValidationError:
            bad += 1
    return list(found), bad


def refuse_copies(parts: Iterable[Part]) -> None:
    """Refuse a part that is stored under two names, whose trials would count twice.

    Raises:
        StoreError: naming both.
    """
    seen: dict[str, str] = {}
    for part in parts:
        first = seen.setdefault(part.sha256, part.part)
        if part.rows and first != part.part:
            raise StoreError(
                f"{part.part} holds the same trials as {first}; delete the line of one of them in parts.jsonl, or have "
                "`kvpatch repair` set both aside"
            )


def check_file(path: Place, sha256: str, rows: int | None, schema: pa.Schema, needed: Sequence[str]) -> None:
    """Check that a file is what was stored.

    Args:
        sha256, rows: what its line records; None for rows that an older line does not count.
        schema: every column that kvpatch knows.
        needed: columns without which the rows mean nothing.
    Raises:
        StoreError: with the file's name, what is wrong with it, and what to do.
    """
    try:
        if _checked.get(str(path)) == (_stamp(path.stat()), sha256, rows):
            return
    except OSError as error:
        raise _damaged(path, _reason(error)) from error
    _opened(path, sha256, rows, schema, needed).close()


def read_file(
    path: Place, sha256: str, rows: int | None, schema: pa.Schema, needed: Sequence[str], columns: Sequence[str] | None
) -> pa.Table:
    """Read a file that is what was stored, as `check_file` says: the named columns, null where it lacks them; or with
    None, all that it holds, those that kvpatch does not know among them.

    Raises:
        StoreError: as `check_file`.
    """
    try:
        with _opened(path, sha256, rows, schema, needed) as file:
            there = file.schema_arrow.names
            wanted_here = [name for name in (there if columns is None else columns) if name in there]
            table = file.read(wanted_here, use_threads=False)  # a part is small, and threads cost more than they save
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, _reason(error)) from error
    if columns is None:
        return table
    wanted = pa.schema([schema.field(name) for name in columns])
    if table.schema.equals(wanted):
        return table
    known = set(table.schema.names)
    arrays = [table[f.name].cast(f.type) if f.name in known else pa.nulls(len(table), f.type) for f in wanted]
    return pa.table(arrays, schema=wanted)


def _opened(path: Place, sha256: str, rows: int | None, schema: pa.Schema, needed: Sequence[str]) -> pq.ParquetFile:
    """A file that is what was stored: the very bytes that were hashed, or the file itself if it was checked before."""
    try:
        stamp = _stamp(path.stat())
        if isinstance(path, Path) and _checked.get(str(path)) == (stamp, sha256, rows):
            return pq.ParquetFile(str(path))
        if (size := path.stat().st_size) > MOST_FILE:
            raise _damaged(path, f"it has {size:,} bytes, and no part has more than {MOST_FILE:,}")
        data = bytes_within(path, size) if isinstance(path, Path) else kept_part(path, sha256)
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise _damaged(path, f"its SHA-256 begins with {found[:12]}, and {sha256[:12]} is recorded")
        file = pq.ParquetFile(pa.BufferReader(data))
        if rows is not None and file.metadata.num_rows != rows:
            raise _damaged(path, f"it holds {file.metadata.num_rows} rows, and {rows} are recorded")
        if wrong := _misfit(file.schema_arrow, schema, needed):
            raise _damaged(path, wrong)
        refuse_large(file, data, len(schema))
        if stamp == _stamp(path.stat()) and time.time_ns() - max(stamp[:2]) > YOUNG:
            _checked[str(path)] = (stamp, sha256, rows)
    except (OSError, pa.ArrowException, TooLarge) as error:
        raise _damaged(path, _reason(error)) from error
    return file


def _stamp(found: os.stat_result | Found) -> Stamp:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev


def _misfit(stored: pa.Schema, known: pa.Schema, needed: Sequence[str]) -> str | None:
    """What keeps the columns of a file from being those of a part, or None."""
    if stored.equals(known):
        return None  # what this version wrote, and much quicker than column by column
    if missing := [name for name in needed if name not in stored.names]:
        return f"it has no column {missing[0]!r}"
    for field in stored:
        if field.name in known.names and not _fits(field.type, known.field(field.name).type):
            return f"its column {field.name!r} is {field.type}, and {known.field(field.name).type} is expected"
    return None


def _fits(stored: pa.DataType, known: pa.DataType) -> bool:
    """Whether values of the one type are values of the other: the same, none at all, or narrower numbers."""
    if stored.equals(known) or pa.types.is_null(stored):
        return True
    both = (stored, known)
    if all(map(pa.types.is_signed_integer, both)) or all(map(pa.types.is_floating, both)):
        return stored.bit_width <= known.bit_width
    if all(map(pa.types.is_list, both)):
        return _fits(stored.value_type, known.value_type)
    return pa.types.is_large_string(stored) and pa.types.is_string(known)


def _damaged(path: Place, why: str) -> StoreError:
    return StoreError(
        f"{path} is missing or damaged; delete its line in parts.jsonl, or have `kvpatch repair {path.parents[1]}` set "
        f"it aside, to run its trials again ({path.name} can't be read as it was stored: {why})"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
