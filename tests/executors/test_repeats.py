"""Trials that several phases ask for are computed once, and batches that run together give the rows they give alone."""

from __future__ import annotations

from typing import Any

import pytest

from kvpatch.executors import local
from kvpatch.executors.batch import run_batch
from kvpatch.executors.groups import groups, merged
from kvpatch.executors.local import LocalExecutor
from kvpatch.protocols import plan as planner
from kvpatch.store import Store
from small import CONDITIONS

pytestmark = pytest.mark.model

PHASES = {
    "1": {"question": "?", "n": 3, "conditions": ["A", "B", "C"], "controls": ["N1"]},
    "2": {"question": "?", "n": 2, "conditions": ["A", "C"], "controls": ["E1"]},
    "3": {"question": "?", "n": 3, "conditions": ["A"], "controls": ["C"]},
}
NEW = {"1": 12, "2": 2, "3": 0}
"""Trials of each phase that no earlier one has."""
CHANGES: dict[str, Any] = {
    "conditions": {name: CONDITIONS[name] for name in ("A", "B", "C", "N1", "E1")},
    "phases": PHASES,
    "hypotheses": [],
}


@pytest.fixture
def plan(small_plan, monkeypatch):
    """Three phases of several batches each."""
    monkeypatch.setattr(planner, "ROWS_PER_BATCH", 4)
    return small_plan(**CHANGES)


def run(model, plan, store: Store, **settings) -> list[dict[str, Any]]:
    with store.locked():
        LocalExecutor({None: model}, **settings).run(
            plan, store, on_tokens=lambda rows: None, on_batch=lambda batch, tokens: None
        )
    return store.read().to_pylist()


def own(row: dict[str, Any]) -> dict[str, str]:
    """What of a row is not its phase's."""
    return {key: repr(value) for key, value in row.items() if key not in ("trial_id", "phase", "condition_role")}


def test_a_repeated_trial_is_computed_once_and_its_row_copied(model, plan, tmp_path, monkeypatch):
    computed: dict[str, int] = {}
    measure = local.measure

    def counting(model, batch, **kwargs):
        computed[batch.phase] = computed.get(batch.phase, 0) + len(batch.trials)
        return measure(model, batch, **kwargs)

    monkeypatch.setattr(local, "measure", counting)
    rows = run(model, plan, Store(tmp_path / "run"))
    calibration = computed.pop("calibration")
    assert computed == {phase: count for phase, count in NEW.items() if count}
    assert len(rows) == plan.n_trials == calibration + 12 + 6 + 6
    assert [row["trial_id"] for row in rows] == plan.trial_ids
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        same = first.setdefault(row["content_id"], row)
        assert own(row) == own(same)
    roles = {(row["phase"], row["condition"]): row["condition_role"] for row in rows}
    assert (roles["1", "C"], roles["3", "C"]) == ("experiment", "control")


def test_copies_are_what_computing_them_gives(model, plan, tmp_path):
    rows = run(model, plan, Store(tmp_path / "run"))
    by_id = {row["trial_id"]: row for row in rows}
    for batch in plan.batches:
        if batch.split == "test":
            for row in run_batch(model, batch):
                copied = by_id[row["trial_id"]]
                assert row["output_token_ids"] == copied["output_token_ids"]
                assert row["mode_llr"] == pytest.approx(copied["mode_llr"], abs=1e-4)
                assert row["condition_role"] == copied["condition_role"]


@pytest.mark.parametrize("stored", [1, 3, 5])
def test_a_resumed_run_copies_from_the_store(model, plan, tmp_path, stored):
    undisturbed = run(model, plan, Store(tmp_path / "whole"))
    store = Store(tmp_path / "broken")
    part = plan.model_copy(update={"batches": plan.batches[:stored]})
    run(model, part, store)
    resumed = run(model, plan, store)
    assert [repr(row) for row in resumed] == [repr(row) for row in undisturbed]


def test_batches_that_run_together_give_the_rows_they_give_alone(model, plan, tmp_path):
    alone = run(model, plan, Store(tmp_path / "alone"))
    together = run(model, plan, Store(tmp_path / "together"), rows={None: 9})
    assert [row["trial_id"] for row in together] == [row["trial_id"] for row in alone]
    for a, b in zip(alone, together, strict=True):
        assert a["text"] == b["text"]
        assert a["cache_token_ids"] == b["cache_token_ids"]
        for readout in ("mode_llr", "rv_output", "rv_own", "nll_target", "js_pull"):
            assert a[readout] == pytest.approx(b[readout], abs=1e-4, nan_ok=True)


def test_groups_keep_the_order_and_the_phases_apart(plan):
    found = list(groups(plan.batches, lambda batches: 9))
    assert [batch for group in found for batch in group] == plan.batches
    assert all(len({(batch.phase, batch.split) for batch in group}) == 1 for group in found)
    assert any(len(group) > 1 for group in found)
    assert [len(group) for group in groups(plan.batches, lambda batches: 1)] == [1] * len(plan.batches)


def test_merged_batches_keep_every_trial_with_its_pair(plan):
    phase = [batch for batch in plan.batches if batch.phase == "1"]
    whole = merged(phase)
    assert [t.trial_id for t in whole.trials] == [t.trial_id for batch in phase for t in batch.trials]
    expected = [batch.pairs[t.pair].pair_id for batch in phase for t in batch.trials]
    assert [whole.pairs[t.pair].pair_id for t in whole.trials] == expected


def test_where_memory_runs_out_half_the_batches_run_at_a_time(model, plan, tmp_path, monkeypatch):
    import torch

    alone = run(model, plan, Store(tmp_path / "alone"))
    measure, sizes = local.measure, []

    def scarce(model, batch, **kwargs):
        sizes.append(len(batch.pairs))
        if len(batch.pairs) > 1:
            raise torch.OutOfMemoryError("on purpose")
        return measure(model, batch, **kwargs)

    monkeypatch.setattr(local, "measure", scarce)
    found = run(model, plan, Store(tmp_path / "scarce"), rows={None: 100})
    assert max(sizes) > 1
    assert [row["text"] for row in found] == [row["text"] for row in alone]


def test_rows_that_can_t_be_stored_stop_the_run(model, plan, tmp_path, monkeypatch):
    from kvpatch.errors import StoreError

    store, append = Store(tmp_path / "full"), Store.append

    def full(self, name, rows):
        if name == plan.batches[1].batch_id:
            raise StoreError("no room on purpose")
        append(self, name, rows)

    monkeypatch.setattr(Store, "append", full)
    with pytest.raises(StoreError, match="no room on purpose"):
        run(model, plan, store)
    monkeypatch.undo()
    assert store.read().num_rows < plan.n_trials
