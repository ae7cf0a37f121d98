"""A finished run grows: the same directory with a larger n computes what is new, and keeps what it has."""

from __future__ import annotations

import pytest

import kvpatch as kv
from kvpatch.errors import StoreError
from kvpatch.executors import together
from kvpatch.planning import plan as planning
from kvpatch.store.directory import Store
from small import write_protocol

pytestmark = pytest.mark.model


@pytest.fixture
def grow(tiny, tmp_path, monkeypatch):
    """`grow(n)`: run the same protocol in the same directory; the rows after it, and the trials that were computed."""
    monkeypatch.setattr(planning, "ROWS_PER_BATCH", 1)  # several pairs, several batches
    computed: list[str] = []
    measure = together.measure

    def counted(model, batch, **settings):
        computed.extend(trial.trial_id for trial in batch.trials)
        return measure(model, batch, **settings)

    monkeypatch.setattr(together, "measure", counted)
    monkeypatch.setattr(together, "is_worth_repeating", lambda model: False)
    protocol = write_protocol(tmp_path)

    def call(n: int, out: str = "out"):
        computed.clear()
        kv.run(str(protocol), tiny("llama"), tmp_path / out, n=n)
        return Store(tmp_path / out).read().to_pylist(), list(computed)

    return call


def content(rows):
    return sorted((row["trial_id"], tuple(row["output_token_ids"]), row["mode_llr"]) for row in rows)


@pytest.mark.parametrize("rows_per_batch", [1, 120])
def test_a_grown_run_keeps_its_trials_computes_the_new_ones_alone_and_equals_a_run_of_that_size(
    grow, monkeypatch, tmp_path, rows_per_batch
):
    monkeypatch.setattr(planning, "ROWS_PER_BATCH", rows_per_batch)
    first, _ = grow(2)
    grown, computed = grow(4)
    at_once, _ = grow(4, "at-once")
    ids = [row["trial_id"] for row in grown]
    assert len(set(ids)) == len(ids) and {row["trial_id"] for row in first} < set(ids)
    assert set(computed) == set(ids) - {row["trial_id"] for row in first}
    assert [row[:2] for row in content(grown)] == [row[:2] for row in content(at_once)]
    assert [row[2] for row in content(grown)] == pytest.approx([row[2] for row in content(at_once)], abs=1e-5)
    record = Store(tmp_path / "out").read_record()
    assert (record.n, record.grown_from, record.finished is not None) == (4, [2], True)
    assert "The run had n=2 before it grew." in record.deviations[-1]
    again, computed = grow(4)
    assert not computed and len(again) == len(grown)


def test_a_run_does_not_shrink(grow):
    grow(3)
    with pytest.raises(StoreError, match=r"n=3, and a run may grow and not shrink"):
        grow(2)
