"""Which group of batches is handed out next, when its rows can be made, and what becomes of it where it fails.

Groups are handed out in the plan's order, and what comes back goes to the front. So the earliest group that is not
stored waits for nothing that is not handed out, and no order of deaths leaves workers waiting for each other.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvpatch.executors.repeats import Copies, Repeats
from kvpatch.executors.worker import Number, Task
from kvpatch.planning.plan import Batch

MOST_ERRORS = 3
"""A batch that fails so often by itself is stored as failed."""
MOST_DEATHS = 6
"""So is one whose workers ended so often while they measured it. More, since a process ends for many reasons."""
MOST_ERRORS_TOGETHER = 2
"""A group that fails so often is taken apart, so that the batch at fault fails alone."""


@dataclass(frozen=True)
class Work:
    """A group to be measured, or a batch that was taken out of one.

    left: batches of it that are not stored. copies: for each batch which of its trials an earlier one computes.
    """

    number: Number
    batches: tuple[Batch, ...]
    left: frozenset[str]
    copies: tuple[Copies, ...]
    errors: int = 0
    deaths: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether it is one batch."""
        return len(self.batches) == 1

    @property
    def sources(self) -> set[str]:
        """Batches outside the group that hold rows which it copies."""
        return {first for copies in self.copies for first in copies} - {batch.batch_id for batch in self.batches}

    def task(self, *, is_repeated: bool) -> Task:
        """What a worker is to measure."""
        return Task(self.number, self.batches, self.copies, self.left, is_repeated)


class Dispatcher:
    """Hands out the groups of a plan.

    groups: the batches of a plan that run together, in its order. done: names of the batches that are stored already.
    on_found: told of each of them.
    """

    def __init__(
        self, groups: Iterable[list[Batch]], done: Container[str], repeats: Repeats, on_found: Callable[[Batch], None]
    ) -> None:
        self.done, self.repeats, self.on_found = done, repeats, on_found
        self._groups: Iterator[tuple[int, list[Batch]]] = enumerate(groups)
        self._back: list[tuple[Number, Work]] = []
        self._is_read = False
        self._unfinished: set[str] = set()
        self._calibrating: Counter[str] = Counter()

    def next(self, before: Number | None = None) -> Work | None:
        """The next group with something left, or None. before: only one that came back and is earlier than this."""
        if self._back and (before is None or self._back[0][0] < before):
            return heapq.heappop(self._back)[1]
        if before is not None:
            return None
        for place, batches in self._groups:
            for batch in batches:
                if batch.batch_id in self.done:
                    self.on_found(batch)
            left = frozenset(batch.batch_id for batch in batches if batch.batch_id not in self.done)
            if left:
                self._unfinished |= left
                self._calibrating.update(b.phase for b in batches if b.batch_id in left and b.split == "calibration")
                return self._work((place, 0), batches, left)
        self._is_read = True
        return None

    @property
    def is_more(self) -> bool:
        """Whether a group may still be handed out."""
        return bool(self._back) or not self._is_read

    def _work(self, number: Number, batches: Sequence[Batch], left: frozenset[str]) -> Work:
        return Work(number, tuple(batches), left, tuple(self.repeats.copies(batch) for batch in batches))

    def is_ready(self, work: Work) -> bool:
        """Whether everything that the group's rows rest on is stored."""
        first = work.batches[0]
        if first.split != "calibration" and self._calibrating[first.calibration]:
            return False
        return not work.sources & self._unfinished

    def stored(self, batch: Batch) -> None:
        """A batch is stored."""
        self._unfinished.remove(batch.batch_id)
        if batch.split == "calibration":
            self._calibrating[batch.phase] -= 1

    def give_back(self, work: Work) -> None:
        """Hand a group out again that nobody has any more; it was not at fault."""
        heapq.heappush(self._back, (work.number, work))

    def died(self, work: Work) -> Batch | None:
        """A worker ended while it measured a group; returns the batch to be stored as failed, if it is one."""
        return self._failed(replace(work, deaths=work.deaths + 1))

    def erred(self, work: Work) -> Batch | None:
        """A group failed; returns the batch to be stored as failed, if it is one."""
        return self._failed(replace(work, errors=work.errors + 1))

    def _failed(self, work: Work) -> Batch | None:
        if work.is_alone and (work.errors >= MOST_ERRORS or work.deaths >= MOST_DEATHS):
            return work.batches[0]
        if not work.is_alone and (work.errors >= MOST_ERRORS_TOGETHER or work.deaths >= MOST_ERRORS):
            for place, batch in enumerate(work.batches, 1):
                if batch.batch_id in work.left:
                    self.give_back(self._work((work.number[0], place), [batch], frozenset([batch.batch_id])))
        else:
            self.give_back(work)
        return None
