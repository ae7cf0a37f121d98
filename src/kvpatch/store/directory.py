"""The run directory: what is in it, how it is written, and how damage shows.

    run.json            one `RunRecord`, written before the first trial
    trials/*.parquet    one row a trial, one part a batch
    attention/*.parquet one row a trial, stage, layer and query head; of the batches whose phase asks for it
    parts.jsonl         one line a part: name, rows, SHA-256 (`Part`); a part counts once its line is there
    verdicts.json       one entry a hypothesis
    report.html
    set-aside/          what `kvpatch repair` took out
    crash.txt           what an unexpected error left for a bug report

A part is written beside its place, flushed, moved there, and only then named in parts.jsonl: data before index. A
killed process leaves at most an unnamed part, which the resumed run writes again. The attention of a batch is part of
its part: both files are there before the line that names both, so that they never disagree. No row of a file is used
before the file is known to be what its line names (see `parts.py`). Nothing is written through a symbolic link that
stands in the directory. A run may lie on an object store instead (`objects.py`), with the same files in it; what is
written there, and who may, is said in `session.py` and `lease.py`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from kvpatch.errors import StoreError
from kvpatch.files import MOST_JSON, Taken, held, is_beside, write_whole
from kvpatch.store.columns import (
    ATTENTION_COLUMNS,
    ATTENTION_SCHEMA,
    NEEDED,
    NEEDED_OF_HEADS,
    TRIAL_COLUMNS,
    trial_schema,
)
from kvpatch.store.kept_parts import fetch
from kvpatch.store.objects import ObjectPath, Place, content_of, is_there, place_of, refuse_whole_bucket
from kvpatch.store.parts import Part, check_file, read_file, read_index, refuse_copies, refuse_trials_twice
from kvpatch.store.record import RunRecord
from kvpatch.store.session import refuse_unwritable_objects, session, session_of, write_object

PROBE = 1 << 20
"""Bytes that are written on trial before a run begins."""
SET_ASIDE = "set-aside"
"""Where `kvpatch repair` puts what is damaged."""
OURS = {
    ".lock",
    "trials",
    "attention",
    "parts.jsonl",
    "verdicts.json",
    "report.html",
    SET_ASIDE,
    "crash.txt",
}
"""What a run directory may hold beside run.json, which a killed process or a repair may have left without it."""


Rows = Iterable[dict[str, Any]] | pa.Table
"""Rows of a part: as they are measured, or as a table of `trial_schema`."""


class Store:
    """One run directory."""

    def __init__(self, directory: str | os.PathLike[str] | ObjectPath) -> None:
        self.directory = place_of(directory)
        refuse_whole_bucket(self.directory)
        self.trials = self.directory / "trials"
        self.attention = self.directory / "attention"
        self.index = self.directory / "parts.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory, made if need be, against other processes.

        Raises:
            StoreError: where another process holds it, or it can't be written.
        """
        with explained(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.directory.is_dir() and not self._is_ours():
                raise StoreError(f"{self.directory} holds other files; give an empty or a new directory")
            self._refuse_links()
            try:
                lock = self._entered()
            except Taken:
                raise StoreError(f"{self.directory} is in use by another kvpatch process") from None
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    def _entered(self) -> AbstractContextManager[object]:
        """The lock of the directory, held."""
        if isinstance(self.directory, ObjectPath):
            lock = session(self.directory)
        else:
            lock = held(self.directory / ".lock", wait=0.2)
        lock.__enter__()
        return lock

    def _is_ours(self) -> bool:
        names = {p.name for p in self.directory.iterdir() if not is_beside(p.name)}
        return "run.json" in names or not names - OURS

    def _refuse_links(self) -> None:
        """Refuse folders of the run that are symbolic links, through which parts would be written elsewhere."""
        for place in (self.trials, self.attention, self.directory / SET_ASIDE, self.directory / ".lock"):
            if place.is_symlink():
                raise StoreError(f"{place} is a symbolic link, and a run is not written through one; delete the link")

    def refuse_unwritable(self) -> None:
        """Write a megabyte on trial where the directory is, or is to be made, and take it away again; so that a disk
        that is full or read-only is seen before anything was computed.

        Raises:
            StoreError: where it can't be written.
        """
        if isinstance(self.directory, ObjectPath):
            return refuse_unwritable_objects(self.directory)
        existing = self.directory
        while not os.path.exists(existing) and existing != existing.parent:  # which a name that is too long does not
            existing = existing.parent
        if not existing.is_dir():
            raise StoreError(f"{self.directory} can't be written: {existing} is a file")
        try:
            # It has no name, so that nothing is left of it, even where this process is killed.
            with tempfile.TemporaryFile(dir=existing, prefix=".kvpatch-", suffix=".tmp") as probe:
                probe.write(bytes(PROBE))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            is_read_only = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            why = f"{existing} is read-only" if is_read_only else error.strerror or str(error)
            raise StoreError(f"{self.directory} can't be written: {why}") from error

    def read_record(self) -> RunRecord:
        """run.json.

        Raises:
            StoreError: where there is none, or it is damaged.
        """
        path = self.directory / "run.json"
        try:
            return RunRecord.model_validate_json(content_of(path, MOST_JSON))
        except FileNotFoundError:
            raise StoreError(f"{self.directory} is not a run directory: it has no run.json") from None
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{path} can't be read: {_first_reason(error)}; restore it, or have `kvpatch repair {self.directory}` "
                "set it aside, after which the same `kvpatch run` command goes on from the stored trials"
            ) from error

    def has_record(self) -> bool:
        """Whether a run was started here."""
        return is_there(self.directory / "run.json")

    def write_record(self, record: RunRecord) -> None:
        """Write run.json."""
        self.write_text("run.json", record.model_dump_json(indent=1) + "\n")

    def write_text(self, name: str, text: str) -> Place:
        """Write a file of the directory atomically.

        Raises:
            StoreError: where it can't be written; what was there before stays.
        """
        path = self.directory / name
        with explained(self.directory):
            _stored(path, text.encode("utf-8"))
        return path

    def append(self, name: str, rows: Rows, attention: pa.Table | None = None) -> None:
        """Store the rows of one batch as a part, data before index; `attention` is of `ATTENTION_SCHEMA`.

        Raises:
            StoreError: where they can't be written; nothing stored before is lost.
        """
        self.name_parts([self.write_part(name, rows, attention)])

    def write_part(self, name: str, rows: Rows, attention: pa.Table | None = None) -> Part:
        """Write the files of one part, as `append` does, and leave it to whoever holds the directory to name it in
        parts.jsonl. Until then it does not count.

        Raises:
            StoreError: where they can't be written.
        """
        table: Any = rows
        if not isinstance(rows, pa.Table):
            table = pa.Table.from_pylist(list(rows), schema=trial_schema())
        data = _parquet(table)
        sha256 = hashlib.sha256(data).hexdigest()
        part = Part(part=f"{name}.parquet", rows=len(table), sha256=sha256)
        with explained(self.directory):
            if attention is not None:
                of_heads = _parquet(attention.cast(ATTENTION_SCHEMA))
                sha256 = hashlib.sha256(of_heads).hexdigest()
                part = part.model_copy(update={"attention_sha256": sha256, "attention_rows": len(attention)})
                self.attention.mkdir(exist_ok=True)
                _stored(self.attention / part.part, of_heads)
            self.trials.mkdir(exist_ok=True)
            _stored(self.trials / part.part, data)
        return part

    def name_parts(self, parts: Sequence[Part]) -> None:
        """Name parts, whose files are written, in parts.jsonl.

        Raises:
            StoreError: where it can't be written; what was there before stays.
        """
        own = session_of(self.index) if isinstance(self.index, ObjectPath) else None
        with explained(self.directory):
            if own is not None:
                return own.name_parts(list(parts))
            new = {part.part for part in parts}
            self.write_index([*(other for other in self.parts() if other.part not in new), *parts])

    def write_index(self, parts: Iterable[Part]) -> None:
        """Write parts.jsonl anew.

        Raises:
            OSError: where it can't be written; what was there before stays.
        """
        _stored(self.index, b"".join(part.line() for part in parts))

    def parts(self) -> list[Part]:
        """What parts.jsonl names; see `parts.read_index`.

        Raises:
            StoreError: naming a line that is no entry.
        """
        return read_index(self.index)

    def done(self) -> set[str]:
        """Names of the batches that are stored, each part checked.

        Raises:
            StoreError: naming a part that is missing or damaged.
        """
        parts = self.each_once()
        self._fetch(parts)
        for part in parts:
            self.check(part)
        return {part.batch for part in parts}

    def each_once(self) -> list[Part]:
        """What parts.jsonl names, where no part stands under two names.

        Raises:
            StoreError: naming a line that is no entry, or a part that stands there twice.
        """
        parts = self.parts()
        refuse_copies(parts)
        return parts

    def check(self, part: Part) -> None:
        """Check that the files of a part are what was stored; costs little where they were checked before.

        Raises:
            StoreError: naming a file that is missing or damaged.
        """
        check_file(self.trials / part.part, part.sha256, part.rows, trial_schema(), NEEDED)
        if part.attention_sha256 is not None:
            place = self.attention / part.part
            check_file(place, part.attention_sha256, part.attention_rows, ATTENTION_SCHEMA, NEEDED_OF_HEADS)

    def rows_of(self, part: Part, columns: Sequence[str] | None) -> pa.Table:
        """The trials of one part: the named columns, or with None all that its file holds, unknown ones too.

        Raises:
            StoreError: where it is missing or damaged.
        """
        return read_file(self.trials / part.part, part.sha256, part.rows, trial_schema(), NEEDED, columns)

    def _fetch(self, parts: Sequence[Part]) -> None:
        """Fetch parts that lie on an object store side by side."""
        if isinstance(self.trials, ObjectPath):
            fetch((self.trials / part.part, part.sha256) for part in parts)

    def part(self, batch: str) -> Part:
        """The part in which a batch is stored.

        Raises:
            StoreError: where parts.jsonl names none.
        """
        found = next((part for part in self.parts() if part.batch == batch), None)
        if found is None:
            raise StoreError(f"{self.index} names no part {batch}.parquet; run again to store its trials")
        return found

    def read_part(self, name: str) -> list[dict[str, Any]]:
        """The rows of one stored batch.

        Raises:
            StoreError: where it is missing or damaged.
        """
        return self.rows_of(self.part(name), tuple(TRIAL_COLUMNS)).to_pylist()

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All stored trials, in the order they were stored; all columns, or those that are named.

        Raises:
            StoreError: where there are none, a part is missing or damaged, or two hold the same trial.
        """
        wanted = list(TRIAL_COLUMNS if columns is None else columns)
        parts = self.each_once()
        tables = list(self._tables_of(parts, list(dict.fromkeys([*wanted, "trial_id"]))))
        if not tables:
            raise StoreError(f"{self.directory} holds no trials yet")
        refuse_trials_twice([part.part for part in parts], [table["trial_id"] for table in tables])
        return pa.concat_tables(tables).select(wanted)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The stored trials part by part, as `read` gives them.

        Raises:
            StoreError: where a part is missing or damaged.
        """
        yield from self._tables_of(self.each_once(), tuple(TRIAL_COLUMNS) if columns is None else columns)

    def _tables_of(self, parts: Sequence[Part], columns: Sequence[str]) -> Iterator[pa.Table]:
        self._fetch(parts)
        for part in parts:
            yield self.rows_of(part, columns)

    def read_attention(
        self, columns: Sequence[str] | None = None, stage: str | None = None, batches: Container[str] | None = None
    ) -> pa.Table:
        """What every head did in every trial that was watched; no rows where none was.

        All columns, stages and batches, or those that are named.

        Raises:
            StoreError: where a part is missing or damaged.
        """
        columns = tuple(ATTENTION_COLUMNS) if columns is None else columns
        tables = [pa.schema([ATTENTION_SCHEMA.field(name) for name in columns]).empty_table()]
        for part in self.each_once():
            if batches is None or part.batch in batches:
                table = self.heads_of(part, columns)
                tables.append(table if stage is None else table.filter(pc.field("stage") == stage))
        return pa.concat_tables(tables)

    def heads_of(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """What the heads did in the trials of one part; no rows where none was watched.

        Raises:
            StoreError: where its file is missing or damaged.
        """
        columns = tuple(ATTENTION_COLUMNS) if columns is None else columns
        if part.attention_sha256 is None:
            return pa.schema([ATTENTION_SCHEMA.field(name) for name in columns]).empty_table()
        stored = (self.attention / part.part, part.attention_sha256, part.attention_rows)
        return read_file(*stored, ATTENTION_SCHEMA, NEEDED_OF_HEADS, columns)


def _parquet(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _stored(path: Place, data: bytes) -> None:
    """Write a file of the run, flushed to the disk; a failure leaves what was there before."""
    if isinstance(path, ObjectPath):
        return write_object(path, data)
    if path.parent.is_symlink():
        raise StoreError(f"{path.parent} is a symbolic link, and a run is not written through one; delete the link")
    write_whole(path, data, is_flushed=True)


def _first_reason(error: Exception) -> str:
    """What is wrong with run.json, in a few words: the key and what was expected there."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join([*map(str, first["loc"]), first["msg"]])
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


@contextmanager
def explained(directory: Place) -> Iterator[None]:
    """Tell of a file that can't be written as a `StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{directory} can't be written: {error.strerror or error}; what was stored is kept") from error
