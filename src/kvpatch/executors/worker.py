"""A worker of a run: it holds the models, measures groups of batches, and writes their parts. Knows no cluster.

load -> measure a group, and keep what it gave -> write its parts, once what they need of others is stored

Measuring needs nothing of other batches. Limits of coherence and rows that are copied from earlier batches are needed
when rows are made, so that no worker waits with its model idle.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

import kvpatch
from kvpatch.caches.devices import one_host_thread
from kvpatch.crash import without_private
from kvpatch.engine.batching import release
from kvpatch.engine.loading import load
from kvpatch.engine.model import Model
from kvpatch.errors import KvpatchError, ProtocolError, ProtocolMistakes, StoreError
from kvpatch.executors.groups import rows_that_fit
from kvpatch.executors.host import model_record
from kvpatch.executors.repeats import Copies, Row, copied, copied_attention, own_part
from kvpatch.executors.rows import Measured, attention_of, rows_of
from kvpatch.executors.together import measure_together, noise_of
from kvpatch.planning.listener import ProgressListener
from kvpatch.planning.plan import Batch
from kvpatch.readouts.fluency import CoherenceLimits
from kvpatch.readouts.specific_mode import SpecificMode
from kvpatch.store.columns import ATTENTION_SCHEMA, TRIAL_COLUMNS
from kvpatch.store.directory import Store
from kvpatch.store.parts import Part
from kvpatch.store.record import ModelRecord
from kvpatch.store.validation import code_sha256

Number = tuple[int, int]
"""A group's place in the plan, and behind it the place of a batch that was taken out of it to run alone."""
NEWS_EVERY = 0.5
"""Seconds for which a worker gathers what it tells."""
SEEN_LATE = (0.5, 2.0, 8.0)
"""Seconds to wait for a file of another worker, which network file systems show late."""


@dataclass(frozen=True)
class ModelSource:
    """A model by its name, and how it is read (`kv.load`), so that any process can load the same."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def load(self) -> Model:
        """Load it.

        Raises:
            ModelError: as `kv.load`.
        """
        return load(self.name, **self.settings)


@dataclass(frozen=True)
class Task:
    """A group of batches to measure together.

    copies: for each batch which of its trials an earlier one computes. left: names of the batches that are not stored
    yet; the others are measured so that these are measured in the same company. is_repeated: whether to measure some
    trials again, to see how noisy they are.
    """

    number: Number
    batches: Sequence[Batch]
    copies: Sequence[Copies]
    left: frozenset[str]
    is_repeated: bool = False


@dataclass(frozen=True)
class Settings:
    """How a run's trials are measured and where they are stored; see `LocalExecutor`."""

    directory: str
    rows: Mapping[str | None, int | None]
    rules: Mapping[str | None, SpecificMode | None]


@dataclass(frozen=True)
class Arrived:
    """What a worker says when it has loaded its models."""

    models: Mapping[str | None, ModelRecord]
    version: str
    code: str
    node: str
    process: int


@dataclass(frozen=True)
class Failure:
    """An error of a worker as plain data. own: where it is meant for a person. is_lasting: whether the process can't
    go on, as after an error of a GPU."""

    kind: str
    message: str
    lines: str
    own: KvpatchError | None = None
    is_lasting: bool = False

    @property
    def told(self) -> str:
        """The error in one line."""
        return f"{self.kind}: {self.message}" if self.message else self.kind


@dataclass(frozen=True)
class News:
    """What happened at a worker since it last told: tokens written, stages begun."""

    tokens: int
    stages: Sequence[str]


@dataclass(frozen=True)
class _Held:
    """A group that is measured and not yet written."""

    task: Task
    own: Sequence[Batch]
    measured: Sequence[Sequence[Measured]]


class Worker:
    """Holds the models of a run.

    Methods are called from outside, one at a time those that use a model, beside them one that writes and one that
    tells news. An error is given back as a `Failure`, since not every error can be sent.
    """

    def __init__(self, sources: Mapping[str | None, ModelSource], folder: str, threads: int | None) -> None:
        self.sources, self.threads = sources, threads
        with suppress(OSError):  # relative paths mean what they mean to whoever started the run, where that is there
            os.chdir(folder)
        self.models: dict[str | None, Model] = {}
        self.settings, self.store = Settings("", {}, {}), Store("")  # until `begin`
        self.held: dict[Number, _Held] = {}
        self.parts: dict[str, tuple[dict[str, Row], pa.Table]] = {}
        self._tokens, self._stages, self._telling = 0, list[str](), threading.Lock()

    def load(self) -> Arrived | Failure:
        """Load the models, and say which they are."""
        return self._answered(self._load)

    def ask(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """`function(models, listener, *args)`."""
        return self._answered(lambda: function(self.models, _Telling(self), *args))

    def begin(self, settings: Settings) -> Failure | None:
        """Get ready for the tasks of a run."""

        def begin() -> None:
            self.settings, self.store = settings, Store(settings.directory)
            self.held.clear()

        return self._answered(begin)

    def measure(self, task: Task) -> dict[str, Any] | Failure | None:
        """Measure a group and keep what it gave; returns how noisy its trials are, where that was asked."""
        return self._answered(lambda: self._measure(task))

    def write(
        self, number: Number, limits: CoherenceLimits | None, sources: Mapping[str, Part]
    ) -> list[tuple[Part, int]] | Failure:
        """Make the rows of a group that was measured, and write the parts of it that are left.

        Args:
            limits: coherence limits; None in a calibration.
            sources: the parts that hold rows to copy.
        Returns:
            Each part, still unnamed in parts.jsonl, and the tokens that its trials wrote.
        """
        return self._answered(lambda: self._write(self.held.pop(number), limits, sources))

    def news(self) -> News:
        """What happened since the last call, after a while."""
        time.sleep(NEWS_EVERY)
        with self._telling:
            told = News(self._tokens, self._stages)
            self._tokens, self._stages = 0, []
        return told

    def count(self, tokens: int) -> None:
        """Note tokens that were written."""
        with self._telling:
            self._tokens += tokens

    def say(self, stage: str) -> None:
        """Note a stage that began."""
        with self._telling:
            self._stages.append(stage)

    def _answered(self, act: Callable[[], Any]) -> Any:
        try:
            if self.threads:
                torch.set_num_threads(self.threads)  # counts for the thread that calls it
            with one_host_thread(model.backbone.device for model in self.models.values()):
                return act()
        except Exception as error:
            return _failure(error)

    def _load(self) -> Arrived:
        self.models = {key: source.load() for key, source in self.sources.items()}
        records = {key: model_record(model) for key, model in self.models.items()}
        return Arrived(records, kvpatch.__version__, code_sha256(), platform.node(), os.getpid())

    def _measure(self, task: Task) -> dict[str, Any] | None:
        key = task.batches[0].model
        model, places = self.models[key], self.settings.rows.get(key)
        own = [own_part(batch, copies) for batch, copies in zip(task.batches, task.copies, strict=True)]
        try:
            measured = measure_together(model, own, on_tokens=self.count, places=places)
        except torch.OutOfMemoryError:
            release(model.backbone)
            raise
        self.held[task.number] = _Held(task, own, measured)
        return noise_of(model, own, measured, self.settings.rules.get(key), places) if task.is_repeated else None

    def _write(
        self, held: _Held, limits: CoherenceLimits | None, sources: Mapping[str, Part]
    ) -> list[tuple[Part, int]]:
        written = []
        rule = self.settings.rules.get(held.task.batches[0].model)
        in_group: dict[str, dict[str, Row]] = {}  # batches of the group may copy from each other
        heads: dict[str, pa.Table] = {}
        for batch, own, copies, measured in zip(
            held.task.batches, held.own, held.task.copies, held.measured, strict=True
        ):
            is_needed = any(batch.batch_id in other for other in held.task.copies)
            if batch.batch_id not in held.task.left and not is_needed:
                continue
            computed = rows_of(own, measured, limits, rule)
            rows = {row["trial_id"]: row for row in computed}
            trial_here = {trial.trial_id: trial for trial in batch.trials}
            tables = [attention_of(own, measured)] if batch.watched else []
            for first, ids in copies.items():
                there, of_heads = (in_group[first], heads[first]) if first in in_group else self._part(sources[first])
                rows |= {here: copied(there[trial], batch, trial_here[here]) for trial, here in ids.items()}
                if batch.watched:
                    tables.append(copied_attention(of_heads, ids))
            in_group[batch.batch_id] = rows
            attention = None
            heads[batch.batch_id] = ATTENTION_SCHEMA.empty_table()
            if batch.watched:
                kept = [table for table in tables if table is not None]
                attention = heads[batch.batch_id] = pa.concat_tables([ATTENTION_SCHEMA.empty_table(), *kept])
            if batch.batch_id in held.task.left:
                ordered = [rows[trial.trial_id] for trial in batch.trials]
                part = self.store.write_part(batch.batch_id, ordered, attention)
                written.append((part, sum(row["n_tokens"] for row in computed)))
        return written

    def _part(self, part: Part) -> tuple[dict[str, Row], pa.Table]:
        """Rows of a stored part by their trials, and what their heads did; the last few are kept."""
        if part.sha256 not in self.parts:
            for wait in (*SEEN_LATE, None):
                try:
                    rows = self.store.rows_of(part, tuple(TRIAL_COLUMNS)).to_pylist()
                    found = {row["trial_id"]: row for row in rows}, self.store.heads_of(part)
                    break
                except StoreError:
                    if wait is None:
                        raise
                    time.sleep(wait)
            while len(self.parts) > 7:
                del self.parts[next(iter(self.parts))]
            self.parts[part.sha256] = found  # pyright: ignore[reportPossiblyUnboundVariable]
        return self.parts[part.sha256]


class _Telling(ProgressListener):
    """Keeps stages to be told."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def stage(self, what: str) -> None:
        self.worker.say(what)


def rows_of_phases(
    models: Mapping[str | None, Model], listener: ProgressListener, phases: Sequence[Sequence[Batch]]
) -> list[int]:
    """For the batches of each phase how many of its trials to run together."""
    return [rows_that_fit(models[batches[0].model], batches) for batches in phases]


def _failure(error: Exception) -> Failure:
    message = without_private(" ".join(str(error).split())[:400])
    own = error if isinstance(error, KvpatchError) else None
    if isinstance(own, ProtocolMistakes):
        own = ProtocolError(str(own))  # can be sent
    is_lasting = "CUDA error" in message or type(error).__name__ == "AcceleratorError"
    return Failure(type(error).__name__, message, "".join(traceback.format_exception(error)), own, is_lasting)
