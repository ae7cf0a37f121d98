"""Run a plan in this process: every batch that is not stored yet, in the order of the plan.

batches that run together -> measured on the model's device -> a second thread, and on a GPU another process, scores
texts and makes rows, and the thread stores them, while the next ones decode
"""

from __future__ import annotations

import gc
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any
from typing import Protocol as Interface

import pyarrow as pa

from kvpatch.caches.devices import one_host_thread
from kvpatch.engine.model import Model
from kvpatch.errors import ProtocolError, StoreError
from kvpatch.executors.batch import OnTokens
from kvpatch.executors.groups import groups, rows_that_fit
from kvpatch.executors.repeats import Repeats
from kvpatch.executors.row_process import Asked, Made, RowMakers, RowsIn, rows_in
from kvpatch.executors.rows import Measured, attention_of
from kvpatch.executors.together import measure_together, noise_of
from kvpatch.planning.plan import Batch, Plan
from kvpatch.readouts.fluency import CoherenceLimits, coherence_limits
from kvpatch.readouts.specific_mode import SpecificMode
from kvpatch.store.directory import Store
from kvpatch.store.parts import Part

FILES_AT_ONCE = 8
"""Parts that are written at a time; each waits until the disk has it, and a disk takes several together."""
OnBatch = Callable[[Batch, int], None]
"""Called when a batch is stored (or found stored): the batch, and the tokens it wrote now."""


LIMITING = ("phase", "condition", "error", "nll_target", *(limit.name for limit in fields(CoherenceLimits)))
"""Columns that say what the limits of coherence are."""


MOST_OUTSTANDING = 4096
"""Trials that may be measured and not stored yet, beside the group that was measured last; what a trial left takes some
tens of kilobytes. A killed run measures them again."""
COLLECTED_AFTER = 50_000
"""Objects after which Python looks for garbage in cycles, of which a run makes little; at the usual 2,000 the looking
took a twentieth of a run."""
SWITCH_AFTER = 2e-4
"""Seconds for which the writing thread may keep Python from the one that feeds the device. With Python's 5 ms each of
the device's kernels, whose launch lets the other thread in, would wait that long."""


class Executor(Interface):
    """Carries out a plan; what it has stored already is not run again.

    noise: for a model's key what repeating some of its trials changed.
    """

    noise: dict[str | None, Mapping[str, Any]]

    def run(
        self, plan: Plan, store: Store, *, on_tokens: OnTokens, on_batch: OnBatch
    ) -> dict[str, CoherenceLimits]: ...


class LocalExecutor:
    """One process, and a model for each key that batches name (None for the run's own).

    rows: for a model's key how many rows to decode at a time; None for what fits on its device.
    rules: for a model's key its mode readout, fitted on the calibration pairs; without one nothing is subtracted.
    noise: for a model's key what repeating some of its trials changed, as an earlier run found it; what this one finds
    is added.
    made_in: where rows are made; None for what `rows_in` chooses by the models' devices.
    """

    def __init__(
        self,
        models: Mapping[str | None, Model],
        rows: Mapping[str | None, int | None] | None = None,
        rules: Mapping[str | None, SpecificMode | None] | None = None,
        noise: Mapping[str | None, Mapping[str, Any]] | None = None,
        made_in: RowsIn | None = None,
    ) -> None:
        self.models = models
        self.rows = rows or {}
        self.rules = rules or {}
        self.noise: dict[str | None, Mapping[str, Any]] = dict(noise or {})
        self.made_in: RowsIn = made_in or rows_in(model.backbone.device for model in models.values())

    def run(self, plan: Plan, store: Store, *, on_tokens: OnTokens, on_batch: OnBatch) -> dict[str, CoherenceLimits]:
        """Run what is left of a plan, in its order: the calibration of each model comes before what it judges.

        Args:
            store: a run directory this process holds.
            on_tokens, on_batch: told of progress.
        Returns:
            The coherence limits of each calibration, by its phase.
        """
        done = store.done()
        limits: dict[str, CoherenceLimits] = {}
        repeats = Repeats(plan, store)

        def left_of(batches: Iterable[Batch]) -> Counter[str | None]:
            """How many batches that a noise floor can be measured on are not stored, by their model's key."""
            return Counter(b.model for b in batches if b.split == "test" and b.batch_id not in done)

        left = left_of(plan.batches)
        with (
            one_host_thread(model.backbone.device for model in self.models.values()),
            _Writer(store, repeats, self.rules, on_batch, RowMakers(self.made_in)) as writer,
        ):
            for group in groups(plan.batches, self._most):
                calibration = group[0].calibration
                is_left = any(batch.batch_id not in done for batch in group)
                if group[0].split == "test" and calibration not in limits:
                    writer.settle(0)
                    try:
                        limits[calibration] = stored_limits(store, calibration, natural_target(plan, calibration))
                    except StoreError:
                        if is_left:
                            raise  # where nothing is left to judge, a run of before keeps the limits it has
                # A group is run as planned even where some of it is stored: its rows then are the same, to the bit.
                own = [repeats.own(batch) for batch in group] if is_left else []
                measured: list[list[Measured]] = [[] for _ in group]
                if is_left:
                    writer.makers.start()
                    measured = self._measured(own, on_tokens)
                    left -= left_of(group)
                    if not left[group[0].model]:  # a run that ends once these are stored could not measure it any more
                        self._measure_noise(own, measured)
                writer.write(list(zip(group, measured, strict=True)), done, limits.get(calibration))
                if is_left:
                    self._measure_noise(own, measured)  # while rows are made
                writer.settle_all_but(len(group), MOST_OUTSTANDING)
            writer.settle(0)
        return limits

    def _most(self, batches: Sequence[Batch]) -> int:
        """Most trials of a phase to run together."""
        key = batches[0].model
        return self.rows.get(key) or rows_that_fit(self.models[key], batches)

    def _measured(self, own: Sequence[Batch], on_tokens: OnTokens) -> list[list[Measured]]:
        """What the trials of a group gave."""
        key = own[0].model
        return measure_together(self.models[key], own, on_tokens=on_tokens, places=self.rows.get(key))

    def _measure_noise(self, own: Sequence[Batch], measured: Sequence[Sequence[Measured]]) -> None:
        """How noisy the trials of each model's first group are."""
        key = own[0].model
        if own[0].split == "test" and key not in self.noise:
            found = noise_of(self.models[key], own, measured, self.rules.get(key), self.rows.get(key))
            if found is not None:
                self.noise[key] = found


class _Writer:
    """Has rows made of what was measured and stores them, in a thread of its own; tells of stored batches in their
    order.

    Whatever was handed over is stored before the `with` block is left, also on the way out of an error.
    """

    def __init__(
        self,
        store: Store,
        repeats: Repeats,
        rules: Mapping[str | None, SpecificMode | None],
        on_batch: OnBatch,
        makers: RowMakers,
    ) -> None:
        self.store, self.repeats, self.rules, self.on_batch, self.makers = store, repeats, rules, on_batch, makers
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvpatch-rows")
        self._handed: deque[tuple[Batch, Future[dict[str, int]]]] = deque()

    def __enter__(self) -> _Writer:
        self._switched_after, self._collected_after = sys.getswitchinterval(), gc.get_threshold()
        sys.setswitchinterval(SWITCH_AFTER)
        if self._collected_after[0]:  # 0 is for never
            gc.set_threshold(max(COLLECTED_AFTER, self._collected_after[0]), *self._collected_after[1:])
        return self

    def __exit__(self, *error: object) -> None:
        self.makers.hurry.set()  # what is handed over does not wait for a process that starts
        try:
            self._thread.shutdown(wait=True)
        finally:
            self.makers.close()
            sys.setswitchinterval(self._switched_after)
            gc.set_threshold(*self._collected_after)

    def write(
        self,
        group: Sequence[tuple[Batch, Sequence[Measured]]],
        done: Collection[str],
        limits: CoherenceLimits | None,
    ) -> None:
        """Hand the batches of a group over, each with what was measured of the trials it computes itself.

        done: ids of batches that are stored already.
        """
        left = [(batch, measured) for batch, measured in group if batch.batch_id not in done]
        stored = self._thread.submit(self._store, left, limits)
        self._handed += [(batch, stored) for batch, _ in group]

    def settle_all_but(self, group: int, most: int) -> None:
        """Wait until, beside the last `group` batches, no more than `most` trials are outstanding; tell of what is
        stored."""
        outstanding, trials = group, 0
        for batch, stored in list(self._handed)[: len(self._handed) - group][::-1]:
            trials += 0 if stored.done() else len(batch.trials)
            if trials > most:
                break
            outstanding += 1
        self.settle(outstanding)
        while self._handed and self._handed[0][1].done():
            self.settle(len(self._handed) - 1)

    def settle(self, outstanding: int) -> None:
        """Wait until no more than so many batches are outstanding, and tell of the others.

        Raises:
            StoreError: where one could not be stored.
        """
        while len(self._handed) > outstanding:
            batch, stored = self._handed.popleft()
            self.makers.hurry.set()
            try:
                tokens = stored.result().get(batch.batch_id, 0)
            finally:
                self.makers.hurry.clear()
            self.on_batch(batch, tokens)

    def _store(
        self, group: Sequence[tuple[Batch, Sequence[Measured]]], limits: CoherenceLimits | None
    ) -> dict[str, int]:
        """Store the batches of a group; the tokens that each wrote, by its id.

        Rows of several batches are made at a time where there are several makers. Several files are written at a time,
        since each waits until it is on the disk, and the index once for all: a group is run again as a whole in any
        case. Whatever could be written before an error is named in the index.
        """
        tokens: dict[str, int] = {}
        making: deque[tuple[Batch, Sequence[Measured], Future[Made]]] = deque()
        written: list[Future[Part]] = []
        unnamed: set[str] = set()  # batches that no other can copy from yet

        def write(left: int) -> None:
            """Have rows written until no more than so many batches are being made."""
            while len(making) > left:
                batch, measured, rows = making.popleft()
                made = rows.result()
                self.repeats.keep(batch, made.kept)
                heads = self.repeats.completed_attention(batch, attention_of(self.repeats.own(batch), measured))
                written.append(files.submit(self.store.write_part, batch.batch_id, made.table, heads))
                tokens[batch.batch_id] = made.tokens

        def name() -> None:
            parts = [part.result() for part in written if part.exception() is None]
            failed = [error for part in written if (error := part.exception())]
            written.clear()
            if parts:
                self.store.name_parts(parts)
            if failed:
                raise failed[0]

        with (
            ThreadPoolExecutor(max_workers=FILES_AT_ONCE, thread_name_prefix="kvpatch-parts") as files,
            ThreadPoolExecutor(max_workers=self.makers.count, thread_name_prefix="kvpatch-rows-of") as makers,
        ):
            try:
                for batch, measured in group:
                    if unnamed & self.repeats.copies(batch).keys():  # what is copied is read from the store
                        write(0)
                        name()
                        unnamed.clear()
                    asked = self._asked(batch, measured, limits)
                    making.append((batch, measured, makers.submit(self.makers.made, asked)))
                    unnamed.add(batch.batch_id)
                    write(self.makers.count)
                write(0)
            finally:
                name()
        return tokens

    def _asked(self, batch: Batch, measured: Sequence[Measured], limits: CoherenceLimits | None) -> Asked:
        copies, order = self.repeats.rows_for(batch), [trial.trial_id for trial in batch.trials]
        rule = self.rules.get(batch.model)
        return Asked(self.repeats.own(batch), measured, order, copies, self.repeats.kept_of(batch), limits, rule)


def natural_target(plan: Plan, calibration: str) -> str:
    """The condition that is the target's natural run on the held-out pairs of a calibration.

    Raises:
        ProtocolError: where the calibration has none.
    """
    for batch in plan.batches:
        if batch.phase == calibration:
            for name, condition in batch.conditions.items():
                if condition.is_natural and condition.text_of is None and condition.into == "target":
                    return name
    raise ProtocolError(
        "the calibration has no natural run of the target, which sets the limits of coherence; add the condition that "
        "has neither 'patch' nor 'from' and goes into the target, such as A, to the calibration's conditions"
    )


def stored_limits(store: Store, calibration: str, condition: str) -> CoherenceLimits:
    """Coherence limits: the 95th percentiles of what the natural target wrote on the held-out pairs.

    Each output is read under the natural prompt whose words the cache held, here the target's own. The source's runs
    are judged by these limits like all others, under the source's prompt. condition: the natural target's.

    Raises:
        StoreError: where an earlier version stored the calibration, which did not measure this.
    """
    parts = [part for part in store.each_once() if part.phase == calibration]
    tables = [store.rows_of(part, LIMITING) for part in parts]
    if not tables:
        raise StoreError(f"{store.directory} holds no trials of phase {calibration!r} yet")
    table = pa.concat_tables(tables).to_pandas()
    rows = table[(table["phase"] == calibration) & table["error"].isna() & (table["condition"] == condition)]
    if len(rows) and rows["excess_context"].isna().all() and rows["nll_target"].notna().any():
        raise StoreError(
            f"an earlier version of kvpatch stored phase {calibration!r} of this run and did not measure "
            "excess_context, by which coherence is judged; start the run anew with another --out"
        )
    return coherence_limits(rows["excess_context"].to_numpy(), rows["repetition_4"].to_numpy())
