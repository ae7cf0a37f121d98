"""Run a plan with workers on a Ray cluster: the same groups of batches, the same rows, in whatever order they end.

groups in the plan's order -> measured by whoever is free -> written by the same worker, once the limits of coherence
and the rows that it copies are stored -> named in parts.jsonl by this process alone

A part that no line names does not count. So what a worker wrote and did not tell is written over by whoever gets the
group next, and no trial is stored twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvpatch.errors import StoreError
from kvpatch.executors.batch import OnTokens
from kvpatch.executors.crew import Crew, Event, Seat, raised
from kvpatch.executors.dispatch import Dispatcher, Work
from kvpatch.executors.groups import groups, phases_of
from kvpatch.executors.host import How, OnChange
from kvpatch.executors.local import Executor, OnBatch, natural_target, stored_limits
from kvpatch.executors.repeats import Repeats
from kvpatch.executors.rows import failed_rows
from kvpatch.executors.worker import Failure, Number, Settings, rows_of_phases
from kvpatch.planning.listener import ProgressListener
from kvpatch.planning.plan import Batch, Plan
from kvpatch.readouts.fluency import CoherenceLimits
from kvpatch.store.directory import Store
from kvpatch.store.growing import GrowingIndex
from kvpatch.store.objects import ObjectPath
from kvpatch.store.parts import Part

MOST_HELD = 4
"""Groups that a worker has measured and not written; what they gave takes memory."""
MOST_IN_VAIN = 3
"""Batches that failed, with none that did not, after which a run is given up: then the fault is not theirs."""
TO_FINISH = 10.0
"""Seconds that workers have to end what they write when a run is broken off."""


class WithWorkers:
    """The host whose models are with the workers of a crew."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew

    @property
    def keys(self) -> Sequence[str | None]:
        """The models' keys."""
        return self.crew.keys

    def ask(self, function: Callable[..., Any], *args: Any, listener: ProgressListener) -> Any:
        """`function(models, listener, *args)`, by a worker."""
        return self.crew.ask(function, *args, listener=listener)

    def executor(self, how: How, on_change: OnChange) -> Executor:
        """What carries out a plan with these workers."""
        return RayExecutor(self.crew, how, on_change)


class RayExecutor:
    """Carries out plans with the workers of a crew; each has threads of its own.

    on_change: told of the session as it is, whenever a worker ended or a batch was tried again.
    """

    def __init__(self, crew: Crew, how: How, on_change: OnChange) -> None:
        self.crew, self.rows, self.rules, self.on_change = crew, how.rows, how.rules, on_change
        self.noise: dict[str | None, Mapping[str, Any]] = dict(how.noise)

    def run(self, plan: Plan, store: Store, *, on_tokens: OnTokens, on_batch: OnBatch) -> dict[str, CoherenceLimits]:
        """Run what is left of a plan; see `LocalExecutor.run`. `on_batch` is told of batches as they are stored.

        Raises:
            StoreError: where rows can't be written.
            KvpatchError: where a calibration fails, or every batch does.
        """
        return _Run(self, plan, store, on_tokens, on_batch).carried_out()


@dataclass
class _OfSeat:
    """What one worker has: the group that it measures; groups that wait to be written, or are."""

    measuring: list[Work] = field(default_factory=list[Work])
    held: dict[Number, Work] = field(default_factory=dict[Number, Work])
    writing: dict[Number, Work] = field(default_factory=dict[Number, Work])


class _Run:
    """One plan, carried out."""

    def __init__(self, executor: RayExecutor, plan: Plan, store: Store, on_tokens: OnTokens, on_batch: OnBatch) -> None:
        self.executor, self.crew, self.plan, self.store, self.on_batch = executor, executor.crew, plan, store, on_batch
        self.crew.on_tokens, self.crew.on_stage = on_tokens, lambda stage: None
        self.index = GrowingIndex(store)
        self.repeats = Repeats(plan, store)
        place = store.directory
        address = str(place if isinstance(place, ObjectPath) else place.absolute())
        self.settings = Settings(address, executor.rows, executor.rules)
        self.limits: dict[str, CoherenceLimits] = {}
        self.seats: dict[Seat, _OfSeat] = {}
        self.parts: dict[str, Part] = {}  # of batches whose rows are copied
        self.retried = self.failed = self.stored = 0
        self.repeating: set[str | None] = set()

    def carried_out(self) -> dict[str, CoherenceLimits]:
        done = self.store.done()
        self.parts = {part.batch: part for part in self.store.parts()} if done else {}
        self.dispatcher = Dispatcher(
            groups(self.plan.batches, self._most()), done, self.repeats, lambda batch: self.on_batch(batch, 0)
        )
        self._tell()
        try:
            while self._hand_out():
                self._take(self.crew.wait(1.0))
        except (KeyboardInterrupt, SystemExit):
            self._finish_writing()
            raise
        self._tell()
        for batch in self.plan.batches:
            if batch.split == "test" and batch.calibration not in self.limits:
                try:
                    self._limits_of(batch)
                except StoreError:
                    continue  # nothing of it was left to judge
        return self.limits

    def _most(self) -> Callable[[Sequence[Batch]], int]:
        """Most trials of a phase to run together: what an earlier session took, one batch on processors, and on GPUs
        what fits on the first worker's."""
        rows, records = self.executor.rows, self.crew.records or {}
        is_on_gpu = any(record.device == "cuda" for record in records.values())
        if not is_on_gpu:
            return lambda batches: rows.get(batches[0].model) or 1
        phases = list(phases_of(self.plan.batches))
        fitting = self.crew.ask(rows_of_phases, phases, listener=ProgressListener())
        known = {batches[0].batch_id: most for batches, most in zip(phases, fitting, strict=True)}
        return lambda batches: rows.get(batches[0].model) or known[batches[0].batch_id]

    def _hand_out(self) -> bool:
        """Give every worker what it can take; whether anything is still to be waited for."""
        for seat in self.crew.ready():
            if seat not in self.seats:
                self.seats[seat] = _OfSeat()
                self.crew.call(seat, "begin", self.settings, tag=(self, None))
        for seat, of in self.seats.items():
            if not of.measuring:  # none is given ahead, so that no group waits for one worker while another is idle
                self._give(seat, of)
        for seat, of in self.seats.items():
            for work in [work for work in of.held.values() if self.dispatcher.is_ready(work)]:
                self._write(seat, of, of.held.pop(work.number))
        return self.dispatcher.is_more or any(of.measuring or of.held or of.writing for of in self.seats.values())

    def _give(self, seat: Seat, of: _OfSeat) -> bool:
        """Give a worker another group. One that holds many that wait gets only what they may wait for."""
        is_full = len(of.held) + len(of.writing) >= MOST_HELD
        work = self.dispatcher.next(min([*of.held, *of.writing]) if is_full else None)
        if work is None:
            return False
        first = work.batches[0]
        key = first.model
        is_repeated = first.split == "test" and key not in self.executor.noise and key not in self.repeating
        if is_repeated:
            self.repeating.add(key)
        of.measuring.append(work)
        self.crew.call(seat, "measure", work.task(is_repeated=is_repeated), tag=(self, work))
        return True

    def _write(self, seat: Seat, of: _OfSeat, work: Work) -> None:
        first = work.batches[0]
        limits = self._limits_of(first) if first.split == "test" else None
        of.writing[work.number] = work
        sources = {name: self.parts[name] for name in work.sources}
        self.crew.call(seat, "write", work.number, limits, sources, tag=(self, work))

    def _limits_of(self, batch: Batch) -> CoherenceLimits:
        calibration = batch.calibration
        if calibration not in self.limits:
            condition = natural_target(self.plan, calibration)
            self.limits[calibration] = stored_limits(self.store, calibration, condition)
        return self.limits[calibration]

    def _take(self, events: Iterable[Event]) -> None:
        """What the workers answered; all parts of a round are named together."""
        written: list[tuple[Seat, Work, list[tuple[Part, int]]]] = []
        for event in events:
            of = self.seats.get(event.seat)
            if event.method == "died":
                if of is not None:
                    self._take_back(self.seats.pop(event.seat), event)
                self._tell()
            elif of is None or event.tag[0] is not self:
                continue  # of an earlier plan that was broken off
            elif isinstance(event.value, Failure):
                self._take_failure(event, of, event.value)
            elif event.method == "measure":
                work: Work = event.tag[1]
                of.measuring.remove(work)
                of.held[work.number] = work
                if event.value is not None:
                    self.executor.noise[work.batches[0].model] = event.value
            elif event.method == "write":
                written.append((event.seat, of.writing.pop(event.tag[1].number), event.value))
        if written:
            self._store([pair for _, _, parts in written for pair in parts], [work for _, work, _ in written])

    def _store(self, parts: Sequence[tuple[Part, int]], works: Sequence[Work]) -> None:
        self.index.name([part for part, _ in parts])
        tokens = {part.batch: count for part, count in parts}
        for work in works:
            for batch in work.batches:
                if batch.batch_id in work.left:
                    self._note(batch, next(part for part, _ in parts if part.batch == batch.batch_id))
                    self.stored += 1
                    self.on_batch(batch, tokens[batch.batch_id])

    def _note(self, batch: Batch, part: Part) -> None:
        self.dispatcher.stored(batch)
        if self.repeats.is_copied(batch):
            self.parts[batch.batch_id] = part

    def _take_back(self, of: _OfSeat, event: Event) -> None:
        """A worker ended: what it had goes to others. What it was measuring then may be at fault, the rest is not."""
        running, waiting = of.measuring[:1], of.measuring[1:]
        lost = [*of.held.values(), *of.writing.values()]
        for work in (*waiting, *lost):
            self.dispatcher.give_back(work)
        for work in running:
            self._fails(self.dispatcher.died(work), f"the worker that ran it ended ({event.value})")
        self.retried += sum(len(work.left) for work in (*running, *lost))
        self._forget_noise([*of.measuring, *lost])

    def _forget_noise(self, works: Iterable[Work]) -> None:
        """Groups that are measured again are asked again how noisy they are, where nobody told yet."""
        self.repeating -= {work.batches[0].model for work in works} - set(self.executor.noise)

    def _take_failure(self, event: Event, of: _OfSeat, failure: Failure) -> None:
        if event.method == "begin" or isinstance(failure.own, StoreError):
            raise raised(failure)
        work: Work = event.tag[1]
        for known in (of.held, of.writing):
            known.pop(work.number, None)
        if work in of.measuring:
            of.measuring.remove(work)
        self.retried += len(work.left)
        self._forget_noise([work])
        self._fails(self.dispatcher.erred(work), failure.told, failure)
        if failure.is_lasting:
            self.crew.replace(event.seat, failure.told)
            gone = self.seats.pop(event.seat)
            for other in (*gone.measuring, *gone.held.values(), *gone.writing.values()):
                self.dispatcher.give_back(other)
        self._tell()

    def _fails(self, batch: Batch | None, told: str, failure: Failure | None = None) -> None:
        """Store a batch as failed, if there is one.

        Raises:
            KvpatchError: where nothing can be judged without it, or every batch fails.
        """
        if batch is None:
            return
        self.retried -= 1  # the last time was no new beginning
        self.failed += 1
        if batch.split == "calibration" or (self.failed >= MOST_IN_VAIN and not self.stored):
            raise raised(failure or Failure("WorkerError", told, ""))
        rows = failed_rows(batch, told, self.crew.records)
        part = self.store.write_part(batch.batch_id, rows)
        self.index.name([part])
        self._note(batch, part)
        self.on_batch(batch, 0)

    def _finish_writing(self) -> None:
        """The run is broken off: let workers end what they write now."""
        end = time.monotonic() + TO_FINISH
        while any(of.writing for of in self.seats.values()) and time.monotonic() < end:
            self._take(self.crew.wait(0.5))
        self._tell()

    def _tell(self) -> None:
        session = self.crew.session()
        self.executor.on_change(session.model_copy(update={"retried": self.retried, "failed": self.failed}))
