"""The workers of a run as Ray actors: started, called, watched, and replaced where one ends.

Whoever calls `Crew.wait` gets what the workers answered, and is told of each that ended. Its calls are answered no
more, and another worker is started in its place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from kvpatch.errors import KvpatchError, ModelError
from kvpatch.executors.cluster import Asked, Cluster, Size, opened
from kvpatch.executors.worker import Arrived, Failure, ModelSource, News, Worker
from kvpatch.planning.listener import ProgressListener
from kvpatch.store.record import ModelRecord, Session

MOST_FAILED_STARTS = 4
"""Workers that end one after another while they load the models, before any has loaded them, after which a run gives
up: then nothing says that they can be loaded."""
MOST_LATER_STARTS = 12
"""The same where the models were loaded before and no worker is left. While one is at work, a run does not give up."""
LONGEST_PAUSE = 30.0
"""Seconds before a worker is started in the place of one whose start failed; fewer after the first failures."""
PATIENCE = 60.0
"""Seconds without any worker after which a person is told what is waited for."""
GROUP = {"write": "write", "news": "news"}
"""Methods of a worker that go on beside the one that uses the model."""


class WorkerError(RuntimeError):
    """A worker failed in a way that kvpatch did not expect."""


@dataclass(eq=False)
class Seat:
    """A place for a worker, and the worker that sits there now; one that ended is followed by another seat."""

    number: int
    actor: Any
    arrived: Arrived | None = None
    is_open: bool = True


@dataclass(frozen=True)
class Event:
    """What came of a call: its value, or a `Failure`. method "died": the worker ended, and `value` says why."""

    seat: Seat
    method: str
    tag: Any
    value: Any


@dataclass(frozen=True)
class _Call:
    seat: Seat
    method: str
    tag: Any = None


@dataclass
class Counts:
    """What happened to the workers by now.

    failed_starts: workers that ended while they loaded the models, since the last that loaded them or ended later.
    """

    deaths: int = 0
    failed_starts: int = 0
    last_reason: str = ""


@dataclass
class Crew:
    """The workers of a run, made by `crew_of`.

    on_tokens, on_stage: told of what the workers tell.
    """

    sources: dict[str | None, ModelSource]
    cluster: Cluster
    size: Size
    worker: type = Worker
    on_tokens: Callable[[int], None] = lambda tokens: None
    on_stage: Callable[[str], None] = lambda stage: None
    seats: list[Seat] = field(default_factory=list[Seat])
    counts: Counts = field(default_factory=Counts)
    records: Mapping[str | None, ModelRecord] | None = None
    _first: Arrived | None = None
    _calls: dict[Any, _Call] = field(default_factory=dict[Any, _Call])
    _made: int = 0
    _due: list[float] = field(default_factory=list[float])

    @property
    def keys(self) -> Sequence[str | None]:
        """The models' keys."""
        return list(self.sources)

    def start(self) -> None:
        """Start the workers: the first by itself, since it finds the commit that the others are to read of a model
        from a hub."""
        self._start_one()

    def ready(self) -> list[Seat]:
        """Workers that have loaded their models."""
        return [seat for seat in self.seats if seat.arrived is not None]

    def call(self, seat: Seat, method: str, *args: Any, tag: Any = None) -> None:
        """Call a method of a worker; `wait` gives its answer."""
        bound = getattr(seat.actor, method).options(concurrency_group=GROUP.get(method, "measure"))
        self._calls[bound.remote(*args)] = _Call(seat, method, tag)

    def wait(self, timeout: float) -> list[Event]:
        """What came meanwhile; comes back with the first answer, and with all that are there then.

        Raises:
            KvpatchError: where a worker can't load the models, or they are not those of the others.
        """
        import ray

        self._start_due()
        refs = list(self._calls)
        if not refs:
            time.sleep(timeout)
            return []
        found, _ = ray.wait(refs, num_returns=1, timeout=timeout)
        if found and len(refs) > 1:
            found, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return [event for ref in found if (event := self._event(ref)) is not None]

    def ask(self, function: Callable[..., Any], *args: Any, listener: ProgressListener) -> Any:
        """`function(models, listener, *args)`, by a worker.

        Raises:
            KvpatchError: what the function raises of these.
            WorkerError: where it fails otherwise.
        """
        self.on_stage = listener.stage
        asked, since = None, time.monotonic()
        while True:
            if (asked is None or not asked.is_open) and (ready := self.ready()):
                asked = ready[0]
                self.call(asked, "ask", function, args, tag="asked")
            for event in self.wait(1.0):
                if event.tag == "asked" and event.seat is asked:
                    if isinstance(event.value, Failure):
                        raise raised(event.value)
                    return event.value
            if (asked is None or not asked.is_open) and time.monotonic() - since > PATIENCE:
                since = time.monotonic()
                listener.stage("waiting for a worker")

    def session(self) -> Session:
        """What run.json says of the workers."""
        return Session(
            executor="ray",
            cluster="started here" if self.cluster.started else "joined",
            workers=self.size.workers,
            gpus=self.size.gpus,
            threads=self.size.threads,
            deaths=self.counts.deaths,
        )

    def replace(self, seat: Seat, why: str) -> None:
        """End a worker and start another in its place; nothing is told of it."""
        import ray

        seat.is_open = False
        with suppress(Exception):  # it may be gone already
            ray.kill(seat.actor, no_restart=True)
        self._calls = {ref: call for ref, call in self._calls.items() if call.seat is not seat}
        self.seats.remove(seat)
        self.counts.last_reason = why
        self.counts.failed_starts = self.counts.failed_starts + 1 if seat.arrived is None else 0
        self._refuse_to_go_on(why)
        if (failed := self.counts.failed_starts) < 2:
            self._start_one()
        else:
            self._due.append(time.monotonic() + min(LONGEST_PAUSE, 2.0 ** (failed - 2)))

    def _refuse_to_go_on(self, why: str) -> None:
        """Give up where workers end and end while they load the models.

        A process may end by a person's hand, too, or because others took its machine's memory. Where a worker has
        loaded the models, they can be loaded, and one that is at work is no worse for those that are not.

        Raises:
            ModelError: where it looks as if no worker could load them.
        """
        failed = self.counts.failed_starts
        if self._first is None and failed >= MOST_FAILED_STARTS:
            raise ModelError(f"workers ended {failed} times while they loaded the model: {why}")
        if failed >= MOST_LATER_STARTS and not self.ready():
            raise ModelError(
                f"workers ended {failed} times while they loaded the model, which others had loaded before, and none "
                f"is left: {why}; the same command goes on from what is stored"
            )

    def _start_due(self) -> None:
        """Start workers whose pause is over."""
        over = [due for due in self._due if due <= time.monotonic()]
        self._due = [due for due in self._due if due not in over]
        for _ in over:
            self._start_one()

    def close(self) -> None:
        """End all workers."""
        import ray

        for seat in self.seats:
            seat.is_open = False
            with suppress(Exception):
                ray.kill(seat.actor, no_restart=True)
        self.seats, self._calls, self._due = [], {}, []

    def _start_one(self) -> None:
        import ray

        options: dict[str, Any] = {
            "num_cpus": self.size.cores,
            "num_gpus": self.size.gpus,
            "max_restarts": 0,
            "concurrency_groups": {"measure": 1, "write": 1, "news": 1},
        }
        made: Any = ray.remote(**options)(self.worker)
        seat = Seat(self._made, made.remote(self.sources, os.getcwd(), self.size.threads))
        self._made += 1
        self.seats.append(seat)
        self.call(seat, "load")

    def _event(self, ref: Any) -> Event | None:
        """What came of a call; None where only this object needs to know."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        if ref not in self._calls:  # of a worker that was found ended in the same round
            return None
        call = self._calls.pop(ref)
        value: Any
        try:
            value = ray.get(ref)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            value = Failure(type(cause).__name__, " ".join(str(cause).split())[:400], str(error))
        except RayError as error:
            return self._died(call.seat, error)
        if call.method == "news":
            self._heard(call.seat, value)
            return None
        if call.method == "load":
            self._arrived(call.seat, value)
            return None
        return Event(call.seat, call.method, call.tag, value)

    def _died(self, seat: Seat, error: Exception) -> Event:
        self.counts.deaths += 1
        self.replace(seat, _reason(error))
        return Event(seat, "died", None, _reason(error))

    def _heard(self, seat: Seat, news: News | Failure) -> None:
        if isinstance(news, News):
            if news.tokens:
                self.on_tokens(news.tokens)
            for stage in news.stages:
                self.on_stage(stage)
        self.call(seat, "news")

    def _arrived(self, seat: Seat, arrived: Arrived | Failure) -> None:
        if isinstance(arrived, Failure):
            raise raised(arrived)
        first = self._first
        if first is None:
            self._first, self.records = arrived, arrived.models
            for key, record in arrived.models.items():
                if record.revision is not None:
                    source = self.sources[key]
                    self.sources[key] = replace(source, settings={**source.settings, "revision": record.revision})
            for _ in range(self.size.workers - 1):
                self._start_one()
        elif (arrived.version, arrived.code) != (first.version, first.code):
            raise KvpatchError(
                f"two workers run different code of kvpatch ({first.version} and {arrived.version}); install the same "
                "on every machine of the cluster"
            )
        elif wrong := [key for key, record in arrived.models.items() if record != first.models[key]]:
            raise ModelError(
                f"two workers loaded different models under the name {first.models[wrong[0]].name!r} (weights or "
                "settings differ); give a hub id with --revision, or put the same files on every machine"
            )
        seat.arrived = arrived
        self.counts.failed_starts = 0
        self.call(seat, "news")


def raised(failure: Failure) -> Exception:
    """A worker's failure as an exception of this process."""
    if failure.own is not None:
        return failure.own
    error = WorkerError(f"a worker failed, {failure.told}")
    error.add_note(failure.lines)
    return error


def _reason(error: Exception) -> str:
    """Why a worker ended, in a few words."""
    told = " ".join(str(error).split())
    for words, meaning in (
        ("ModuleNotFoundError", "kvpatch, or what it needs, is not installed on its machine"),
        ("memory", "its machine ran out of memory"),
        ("node", "its machine left the cluster, or its process was killed"),
        ("SIGKILL", "its process was killed"),
    ):
        if words in told:
            return meaning
    return "its process ended"


@contextmanager
def crew_of(sources: Mapping[str | None, ModelSource], asked: Asked, worker: type = Worker) -> Iterator[Crew]:
    """Workers that hold models, on a cluster that is joined or started; gone when the block is left.

    Raises:
        KvpatchError: where there is no such cluster, or it has less than is asked for.
    """
    with opened(asked.address) as cluster:
        crew = Crew(dict(sources), cluster, cluster.size(asked), worker)
        try:
            crew.start()
            yield crew
        finally:
            crew.close()
