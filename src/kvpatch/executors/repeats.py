"""Trials that a plan asks for more than once: the natural runs and the full swap of one pair stand in many phases.

Such a trial is computed once, in the first batch of the plan that has it, and its row is copied into the others, with
their phase, their trial id and the condition's role there; so is what its heads did, where its phases watch them. The
copies are no further evidence, and none is claimed: every test reads one phase. `content_id` in the rows says which are
one computation: it covers what a phase asks for, so that no phase gets the row of one that asked for less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from kvpatch.planning.plan import Batch, Plan, PlannedTrial
from kvpatch.store.columns import ATTENTION_SCHEMA
from kvpatch.store.directory import Store

Row = dict[str, Any]
Copies = dict[str, dict[str, str]]
"""Earlier batch -> id of a trial there -> id of the trial here that is its copy."""


class Repeats:
    """Which trials of a plan are computed where, and the rows that later batches will copy."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.store = store
        self._first: dict[tuple[str, str], tuple[str, str]] = {}  # content -> the first batch that has it, trial there
        self._left: Counter[tuple[str, str]] = Counter()  # copies still to be made
        for batch in plan.batches:
            for trial, key in zip(batch.trials, _keys(batch), strict=True):
                if key in self._first:
                    self._left[key] += 1
                else:
                    self._first[key] = batch.batch_id, trial.trial_id
        self._first = {key: self._first[key] for key in self._left}  # the others need no memory
        self._rows: dict[tuple[str, str], Row] = {}

    def own(self, batch: Batch) -> Batch:
        """The batch without the trials that an earlier one computes."""
        return own_part(batch, self.copies(batch))

    def copies(self, batch: Batch) -> Copies:
        """Which trials of a batch are copied from where: earlier batch -> trial there -> trial here."""
        found: Copies = {}
        for trial, key in zip(batch.trials, _keys(batch), strict=True):
            first, there = self._first.get(key, (batch.batch_id, trial.trial_id))
            if first != batch.batch_id:
                found.setdefault(first, {})[there] = trial.trial_id
        return found

    def is_copied(self, batch: Batch) -> bool:
        """Whether later batches copy rows of this one."""
        return any(self._first.get(key, ("", ""))[0] == batch.batch_id for key in _keys(batch))

    def rows_for(self, batch: Batch) -> dict[str, Row]:
        """Rows of the batch's trials that an earlier batch computed, by their ids here. To be asked for once."""
        elsewhere = {here for ids in self.copies(batch).values() for here in ids.values()}
        rows = {}
        for trial, key in zip(batch.trials, _keys(batch), strict=True):
            if trial.trial_id in elsewhere:
                rows[trial.trial_id] = copied(self._row(key), batch, trial)
                self._left[key] -= 1
                if not self._left[key]:
                    del self._rows[key]
        return rows

    def kept_of(self, batch: Batch) -> list[str]:
        """Ids of the trials of a batch whose rows later batches copy."""
        each = zip(batch.trials, _keys(batch), strict=True)
        return [trial.trial_id for trial, key in each if self._left[key] and self._first[key][0] == batch.batch_id]

    def keep(self, batch: Batch, rows: Mapping[str, Row]) -> None:
        """Keep rows of a batch, by trial id, for the batches that copy them."""
        for trial, key in zip(batch.trials, _keys(batch), strict=True):
            if trial.trial_id in rows:
                self._rows[key] = rows[trial.trial_id]

    def completed_attention(self, batch: Batch, computed: pa.Table | None) -> pa.Table | None:
        """What the heads of all trials of a batch did, from the table of those it computed itself; the others' comes
        from the store, where the parts before this one are. None where the phase watches nothing."""
        if batch.watched is None:
            return None
        tables = [] if computed is None else [computed]
        for first, ids in self.copies(batch).items():
            tables.append(copied_attention(self.store.read_attention(batches=[first]), ids))
        return pa.concat_tables([ATTENTION_SCHEMA.empty_table(), *tables])

    def _row(self, key: tuple[str, str]) -> Row:
        """A row to copy; after a resume it comes from the store, with all of its part that will be copied."""
        if key not in self._rows:
            for row in self.store.read_part(self._first[key][0]):
                found = (row["split"], row["content_id"])
                if self._left[found]:
                    self._rows[found] = row
        return self._rows[key]


def own_part(batch: Batch, copies: Copies) -> Batch:
    """The batch without the trials that are copied."""
    elsewhere = {here for ids in copies.values() for here in ids.values()}
    trials = [trial for trial in batch.trials if trial.trial_id not in elsewhere]
    return batch if len(trials) == len(batch.trials) else batch.model_copy(update={"trials": trials})


def copied(row: Row, batch: Batch, trial: PlannedTrial) -> Row:
    """The row of the same computation as a trial of this batch."""
    return row | {"trial_id": trial.trial_id, "phase": batch.phase, "condition_role": batch.roles[trial.condition]}


def copied_attention(table: pa.Table, ids: dict[str, str]) -> pa.Table:
    """The heads of the trials that are copied, under their ids here. ids: trial there -> trial here."""
    here = pa.array([ids.get(trial) for trial in table["trial_id"].to_pylist()], pa.string())
    place = table.schema.get_field_index("trial_id")
    return table.set_column(place, table.schema.field(place), here).filter(here.is_valid())


def _keys(batch: Batch) -> list[tuple[str, str]]:
    """What makes trials of a plan the same: their content, in one split (calibration rows are not judged by limits)."""
    return [(batch.split, trial.content_id) for trial in batch.trials]
