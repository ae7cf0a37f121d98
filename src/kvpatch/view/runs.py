"""One run as the view sees it: what is stored, how fast it grows, whether a process is still at it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from kvpatch.errors import ProtocolError, StoreError
from kvpatch.files import is_held
from kvpatch.protocols.schema import Protocol
from kvpatch.protocols.stored import stored_protocol
from kvpatch.store.columns import TRIAL_COLUMNS
from kvpatch.store.directory import Store
from kvpatch.store.lease import is_leased
from kvpatch.store.objects import ObjectPath, Place
from kvpatch.store.parts import Part, told_twice, twice
from kvpatch.store.record import RunRecord

State = Literal["running", "interrupted", "finished", "not begun"]
RECENT_PARTS = 12
"""Throughput is taken over the last so many parts."""
AT_ONCE = 200
"""Parts whose rows are taken in together."""
PAUSE = 600.0
"""A gap between two parts of more seconds than this is a pause between two sessions, not slow work."""


@dataclass(frozen=True)
class Progress:
    """How far a run is. Rates are None where fewer than two parts tell of them; `left` is in seconds."""

    state: State
    done: int
    planned: int
    failed: int
    by_phase: list[dict[str, Any]]
    trials_per_second: float | None
    tokens_per_second: float | None
    left: float | None
    newest: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dict(vars(self))


@dataclass
class _Known:
    parts: dict[str, Part] = field(default_factory=dict)
    trouble: tuple[str, ...] = ()
    of_record: tuple[str, ...] = ()
    protocol: Protocol | None = None
    named: list[Part] = field(default_factory=list)
    index: tuple[int, int] = (0, 0)
    record: RunRecord | None = None
    record_key: tuple[int, int] = (0, 0)


class LiveRun:
    """A run directory, followed. `refresh` takes in what is new, and lets go of a part whose file is no longer what was
    stored; everything else answers from memory.

    The trials are in a DuckDB table `trials` in memory: every column that is not a list (`columns`, with their types;
    those that are named, where some are), `part` (the file that holds the row) and `place` (the order in which rows
    were stored).
    """

    def __init__(self, key: str, directory: Place, columns: Sequence[str] | None = None) -> None:
        self.key, self.store = key, Store(directory)
        self._known = _Known()
        self._lock = threading.Lock()
        self._database = duckdb.connect(":memory:", config={"enable_external_access": "false"})
        # A readout that is registered later has no column here, so the columns are those of this moment.
        self.columns = {
            name: kind
            for name, (kind, _) in TRIAL_COLUMNS.items()
            if not pa.types.is_list(kind) and (columns is None or name in columns)
        }
        empty = pa.table({name: pa.array([], kind) for name, kind in self.columns.items()})
        self._put("create table trials as select 0::bigint as place, '' as part, * from arriving limit 0", empty)
        self.version = 0
        self._counted = (0, 1)

    @property
    def record(self) -> RunRecord | None:
        """run.json as it was last read; None before a run has begun."""
        return self._known.record

    @property
    def protocol(self) -> Protocol | None:
        """The protocol of the run, as it was stored; None before a run has begun, and where it was changed since."""
        return self._known.protocol

    @property
    def parts(self) -> dict[str, Part]:
        """The parts that were taken in, by name."""
        return self._known.parts

    @property
    def trouble(self) -> str | None:
        """Why trials are not shown, in one line; None where all that are stored are shown."""
        first, *more = (*self._known.of_record, *self._known.trouble) or ("",)
        return f"{first} (and {len(more)} more)" if more else first or None

    @property
    def directory(self) -> Place:
        """Where the run is."""
        return self.store.directory

    def refresh(self) -> bool:
        """Take in new parts, and run.json where it changed; whether anything was new."""
        with self._lock:
            changed = self._read_record() | self._read_parts()
            self.version += changed
            return bool(changed)

    def _read_record(self) -> bool:
        key = _stamp(self.directory / "run.json")
        if key == self._known.record_key:
            return False
        try:
            self._known.record = record = self.store.read_record()
        except StoreError:
            return False  # being written, or not there yet: the next look will tell
        self._known.record_key = key
        try:
            self._known.protocol, self._known.of_record = stored_protocol(record), ()
        except ProtocolError as error:
            self._known.protocol, self._known.of_record = None, (str(error),)
        return True

    def _read_parts(self) -> bool:
        """Take in parts that are new. Rows of a part that can't be trusted are let go, and `trouble` says why."""
        before, shown, trouble = dict(self._known.parts), {}, []
        arrived: dict[str, pa.Table] = {}
        try:
            named = self._named()
        except StoreError as error:
            named, trouble = [], [str(error)]
        for part in named:
            try:
                if before.get(part.part) != part:
                    arrived[part.part] = self.store.rows_of(part, list(self.columns))
                self.store.check(part)
            except StoreError as error:
                trouble.append(str(error))
                arrived.pop(part.part, None)
            else:
                shown[part.part] = part
            if len(arrived) >= AT_ONCE:
                trouble += self._take_in(arrived, before, shown)
                arrived = {}
        trouble += self._take_in(arrived, before, shown)
        self._let_go([name for name in before if name not in shown])
        is_new = shown != before or tuple(trouble) != self._known.trouble
        self._known.parts, self._known.trouble = shown, tuple(trouble)
        return is_new

    def _named(self) -> list[Part]:
        """What parts.jsonl names; read anew only where it changed."""
        key = _stamp(self.store.index)
        if key != self._known.index:
            self._known.named, self._known.index = self.store.parts(), key
        return self._known.named

    def _let_go(self, parts: list[str]) -> None:
        if parts:
            self.ask("delete from trials where part in (select unnest(?))", [parts])

    def _take_in(self, arrived: dict[str, pa.Table], before: Container[str], shown: dict[str, Part]) -> list[str]:
        """Take in the rows of parts, many in one insertion, which costs more than the rows do. Returns what is wrong
        with those that hold a trial which another part holds; they are not shown."""
        self._let_go([name for name in arrived if name in before])
        doubled = self._doubled(arrived)
        for name in doubled:
            del arrived[name], shown[name]
        if arrived:
            self._insert(arrived)
        return [told_twice(later, first) for later, first in doubled.items()]

    def _doubled(self, arrived: dict[str, pa.Table]) -> dict[str, str]:
        """Parts of which another that came before has a trial, too, each with that one."""
        ids = [rows["trial_id"] for rows in arrived.values()]
        known = self.ask(
            "select distinct part, trial_id from trials where trial_id in (select unnest(?))",
            [[trial for each in ids for trial in each.to_pylist()]],
        )
        taken: dict[str, list[str]] = {}
        for row in known:
            taken.setdefault(row["part"], []).append(row["trial_id"])
        before = [pa.chunked_array([trials], pa.string()) for trials in taken.values()]
        return twice([*taken, *arrived], [*before, *ids])

    def _insert(self, arrived: dict[str, pa.Table]) -> None:
        start = self.ask("select coalesce(max(place), -1) + 1 as place from trials")[0]["place"]
        table = _known_numbers(pa.concat_tables(arrived.values()))
        names = [name for name, rows in arrived.items() for _ in range(len(rows))]
        table = table.add_column(0, "part", pa.array(names, pa.string()))
        table = table.add_column(0, "place", pa.array(range(start, start + len(table)), pa.int64()))
        self._put("insert into trials select * from arriving", table)

    def _put(self, sql: str, arriving: pa.Table) -> None:
        """Carry out an insertion; the table `arriving` holds the rows."""
        cursor = self._database.cursor()
        try:
            cursor.register("arriving", arriving)
            cursor.execute(sql).fetchall()
        finally:
            cursor.close()

    def ask(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Rows that a query of the table `trials` gives. Safe from any thread."""
        cursor = self._database.cursor()
        try:
            found = cursor.execute(sql, list(values))
            names = [column[0] for column in found.description or []]
            return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        finally:
            cursor.close()

    def progress(self) -> Progress:
        """How far the run is, and how fast it goes."""
        counts = self.ask(
            "select phase, count(*) as done, count(*) filter (where coalesce(trim(error), '') <> '') as failed "
            "from trials group by phase"
        )
        done = {row["phase"]: row for row in counts}
        planned = {} if self.record is None else self.record.planned_by_phase
        phases = [
            {
                "phase": name,
                "done": done.get(name, {}).get("done", 0),
                "planned": planned.get(name, 0),
                "failed": done.get(name, {}).get("failed", 0),
            }
            for name in dict.fromkeys([*planned, *done])
        ]
        total, stored = sum(planned.values()), sum(row["done"] for row in counts)
        state = self._state(stored, total)
        self._counted = stored, total
        trials, tokens, newest = self._speed(state, stored)
        is_going = state == "running" and trials
        return Progress(
            state=state,
            done=stored,
            planned=total,
            failed=sum(row["failed"] for row in counts),
            by_phase=phases,
            trials_per_second=trials,
            tokens_per_second=tokens,
            left=(total - stored) / trials if is_going and trials else None,
            newest=newest,
        )

    def state(self) -> State:
        """Whether a process is at the run, as `progress` last counted its trials; costs no query."""
        return self._state(*self._counted)

    def _state(self, done: int, planned: int) -> State:
        if self.record is None:
            return "not begun"
        if _is_held(self.directory / ".lock"):
            return "running"
        return "finished" if self.record.finished and done >= planned else "interrupted"

    def _speed(self, state: State, stored: int) -> tuple[float | None, float | None, float | None]:
        """(trials a second, tokens a second, when the newest part came): over the last parts of one session while the
        run goes on, and as run.json says once it is finished.

        The times of files tell it of a run that is being written alone, since they change when a run is copied.
        """
        if state != "running":
            record = self.record
            if state != "finished" or record is None or not record.seconds:
                return None, None, self._finished()
            return stored / record.seconds, record.tokens / record.seconds, self._finished()
        recent = list(self._known.parts)[-RECENT_PARTS:]
        times = []
        for name in recent:
            try:
                times.append(((self.store.trials / name).stat().st_mtime, name))
            except OSError:
                continue
        times.sort()
        start = max((i for i in range(1, len(times)) if times[i][0] - times[i - 1][0] > PAUSE), default=0)
        session = times[start:]
        newest = times[-1][0] if times else None
        if len(session) < 2 or session[-1][0] <= session[0][0]:
            return None, None, newest
        counted = self.ask(
            "select count(*) as trials, sum(n_tokens) as tokens from trials where part in (select unnest(?))",
            [[name for _, name in session[1:]]],
        )[0]
        passed = session[-1][0] - session[0][0]
        return counted["trials"] / passed, (counted["tokens"] or 0) / passed, newest

    def _finished(self) -> float | None:
        """When the run was finished, in seconds since 1970."""
        try:
            return datetime.fromisoformat((self.record and self.record.finished) or "").timestamp()
        except ValueError:
            return None


def _known_numbers(table: pa.Table) -> pa.Table:
    """The table with null for every number that is not finite: DuckDB would sort and filter NaN as the largest number,
    and JSON has no word for it."""
    for place, column in enumerate(table.schema):
        if pa.types.is_floating(column.type):
            found = table[column.name]
            known = pc.if_else(pc.is_finite(found), found, None)  # pyright: ignore[reportAttributeAccessIssue]
            table = table.set_column(place, column, known)
    return table


def _is_held(place: Place) -> bool:
    return is_leased(place) if isinstance(place, ObjectPath) else is_held(place)


def _stamp(path: Place) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_ino)


class Runs:
    """The runs that a view shows: directories that hold one, or whose subdirectories do. New ones are found as they
    come."""

    def __init__(self, directories: Sequence[Place]) -> None:
        self._given = [directory.resolve() for directory in directories]
        self._lock = threading.Lock()
        self.by_key: dict[str, LiveRun] = {}

    def refresh(self) -> list[LiveRun]:
        """Look for new runs, refresh every one; returns those in which something was new."""
        with self._lock:
            for directory in self._found():
                if all(run.directory != directory for run in self.by_key.values()):
                    key = self._key(directory)
                    self.by_key[key] = LiveRun(key, directory)
            return [run for run in self.by_key.values() if run.refresh()]

    def _found(self) -> list[Place]:
        out: list[Place] = []
        for given in self._given:
            out += ([] if (given / "run.json").exists() else _runs_in(given)) or [given]
        return out

    def _key(self, directory: Place) -> str:
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in directory.name).strip(".")
        key, count = plain or "run", 2
        while key in self.by_key:
            key, count = f"{plain or 'run'}-{count}", count + 1
        return key


def _runs_in(folder: Place) -> list[Place]:
    """The folders in this one that hold a run."""
    if isinstance(folder, Path):
        return sorted(place.parent for place in folder.glob("*/run.json"))
    return sorted(inner for inner in folder.folders() if (inner / "run.json").is_file())


def now() -> float:
    """Seconds since the epoch."""
    return time.time()


def dumps(value: Any) -> str:
    """JSON with no NaN in it."""
    return json.dumps(value, allow_nan=False, default=str)
