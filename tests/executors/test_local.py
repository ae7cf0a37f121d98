"""The local executor: calibration first, and a run that was broken off ends as one that was not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from kvpatch.errors import StoreError
from kvpatch.executors import together
from kvpatch.executors.local import LocalExecutor, stored_limits
from kvpatch.planning import plan as planner
from kvpatch.readouts.fluency import CoherenceLimits
from kvpatch.store.directory import Store
from small import with_patch

pytestmark = pytest.mark.model


class Broken(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def plan(small_plan):
    """A plan of several batches: four test pairs, one a batch."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planner, "ROWS_PER_BATCH", 5)
        generation = {"max_new_tokens": 6, "temperature": 0.7}
        return small_plan(n=4, generation=generation, **with_patch({"align": "start"}))


def run(model, plan, store: Store, on_batch=lambda batch, tokens: None):
    return LocalExecutor({None: model}).run(plan, store, on_tokens=lambda rows: None, on_batch=on_batch)


def rows_of(store: Store) -> list[str]:
    return [repr(row) for row in sorted(store.read().to_pylist(), key=lambda row: row["trial_id"])]


class Finished(NamedTuple):
    """The directory of a run, not to be changed, and the coherence limits the executor gave."""

    store: Store
    limits: dict[str, CoherenceLimits]


@pytest.fixture(scope="module")
def finished(model, plan, tmp_path_factory) -> Finished:
    store = Store(tmp_path_factory.mktemp("finished") / "run")
    with store.locked():
        limits = run(model, plan, store)
    store.write_text("run.json", "{}")  # a directory without one is nobody's, and is refused
    return Finished(store, limits)


@pytest.fixture(scope="module")
def undisturbed(finished) -> list[str]:
    return rows_of(finished.store)


def test_plan_has_several_batches(plan):
    assert len(plan.batches) >= 3
    assert plan.batches[0].split == "calibration"


def test_every_trial_is_stored_once(plan, undisturbed):
    assert len(undisturbed) == plan.n_trials == len(set(plan.trial_ids))


@pytest.mark.parametrize("after", [0, 1])
def test_run_broken_off_between_batches_ends_the_same(model, plan, tmp_path, undisturbed, after):
    store, told = Store(tmp_path / "broken"), []

    def stop(batch, tokens):
        told.append(batch.batch_id)
        if len(told) > after:
            raise Broken

    with store.locked():
        with pytest.raises(Broken):
            run(model, plan, store, stop)
        assert store.read().num_rows < plan.n_trials
        run(model, plan, store)
    assert rows_of(store) == undisturbed


@pytest.mark.parametrize("at", [0, 1, 2])
def test_run_broken_off_inside_a_batch_ends_the_same(model, plan, tmp_path, undisturbed, at, monkeypatch):
    store, begun = Store(tmp_path / "broken"), []

    def breaking(model, batch, **kwargs):
        begun.append(batch.batch_id)
        if len(begun) == at + 1:
            raise Broken
        return measure(model, batch, **kwargs)

    measure = together.measure
    monkeypatch.setattr(together, "measure", breaking)
    with store.locked():
        with pytest.raises(Broken):
            run(model, plan, store)
        run(model, plan, store)
    assert rows_of(store) == undisturbed
    assert begun.count(begun[at]) == 2
    assert len(begun) == len(plan.batches) + 1  # what was stored is not run again


def test_finished_run_runs_nothing_again(model, plan, finished, undisturbed):
    told: list[int] = []
    with finished.store.locked():
        again = run(model, plan, finished.store, lambda batch, tokens: told.append(tokens))
    assert told == [0] * len(plan.batches)
    assert again == finished.limits
    assert rows_of(finished.store) == undisturbed


def test_limits_come_from_the_natural_target_of_the_calibration_alone_and_judge_the_rest(finished):
    store, limits = finished.store, finished.limits["calibration"]
    table = store.read().to_pandas()
    held_out = table[table["split"] == "calibration"]
    assert set(held_out["condition"]) == {"A", "B"}
    of_target = held_out[held_out["condition"] == "A"]
    assert limits.excess_context == pytest.approx(np.quantile(of_target["excess_context"], 0.95))
    assert limits.repetition_4 == pytest.approx(np.quantile(of_target["repetition_4"], 0.95))
    assert stored_limits(store, "calibration", "A") == limits
    assert held_out["coherent"].isna().all()
    rest = table[table["split"] == "test"]
    within = (rest["excess_context"] <= limits.excess_context) & (rest["repetition_4"] <= limits.repetition_4)
    assert (rest["coherent"].astype(bool) == within).all()


def test_a_part_that_can_t_be_written_takes_none_of_its_group_along(model, plan, tmp_path, undisturbed, monkeypatch):
    """The other parts of the group are named in the index, the error is told, and the run goes on from there."""
    store, write_part = Store(tmp_path / "run"), Store.write_part
    tested = [batch.batch_id for batch in plan.batches if batch.split == "test"]

    def full(self: Store, name: str, *rows):
        if name == tested[1]:
            raise StoreError("the disk is full")
        return write_part(self, name, *rows)

    def together_with(store: Store) -> None:
        executor = LocalExecutor({None: model}, rows={None: plan.n_trials})
        executor.run(plan, store, on_tokens=lambda rows: None, on_batch=lambda batch, tokens: None)

    with store.locked():
        monkeypatch.setattr(Store, "write_part", full)
        with pytest.raises(StoreError, match="the disk is full"):
            together_with(store)
        monkeypatch.setattr(Store, "write_part", write_part)
        assert {part.batch for part in store.parts()} == {batch.batch_id for batch in plan.batches} - {tested[1]}
        together_with(store)
    store.write_text("run.json", "{}")
    assert len(rows_of(store)) == len(undisturbed) == plan.n_trials
