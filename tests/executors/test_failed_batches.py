"""A batch that is stored as failed: everything that reads a run bears its rows, and says how many there are."""

from __future__ import annotations

import pytest

import kvpatch as kv
from kvpatch.cli.tables import status_summary
from kvpatch.executors.rows import failed_rows
from kvpatch.planned import plan_for
from kvpatch.planning import plan as planner
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.report.build import write_report
from kvpatch.store.directory import Store
from kvpatch.store.growing import GrowingIndex
from kvpatch.store.record import Session
from kvpatch.verdicts.outcome import outcome_of, write_verdicts
from small import CONDITIONS, write_protocol

pytestmark = pytest.mark.model


@pytest.fixture
def run_with_a_failed_batch(model, tmp_path, monkeypatch):
    """Where one test batch of several has no numbers; and how many trials that are."""
    monkeypatch.setattr(planner, "ROWS_PER_BATCH", 5)
    phases = {"1": {"question": "?", "n": 4, "conditions": list(CONDITIONS), "attention": True, "geometry": True}}
    path = write_protocol(tmp_path, phases=phases, generation={"max_new_tokens": 5, "temperature": 0.7})
    store = Store(tmp_path / "run")
    kv.run(path, model, store.directory)
    protocol = load_protocol(str(path))
    plan, records = plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)
    batch = [batch for batch in plan.batches if batch.split == "test"][1]
    part = store.write_part(batch.batch_id, failed_rows(batch, "ArithmeticError: bad", records))
    GrowingIndex(store).name([part])
    session = Session(executor="ray", workers=2, deaths=1, retried=2, failed=1)
    store.write_record(store.read_record().model_copy(update={"sessions": [session]}))
    return store, len(batch.trials)


def test_verdicts_status_and_report_bear_a_failed_batch(run_with_a_failed_batch):
    store, count = run_with_a_failed_batch
    outcome = outcome_of(store)
    write_verdicts(store, outcome)
    assert all(verdict.n <= 3 for verdict in outcome.verdicts)  # its pair counts nowhere
    summary = status_summary(store)
    assert summary["failed"] == count
    assert summary["workers"] == (
        "Carried out by 2 Ray workers: 1 worker ended early and was replaced, 2 batches were measured again, 1 batch "
        "is stored as failed."
    )
    page = write_report(store, outcome).read_text("utf-8")
    assert summary["workers"] in page and "ArithmeticError: bad" in page


def test_failed_rows_name_their_trials_and_have_no_numbers(run_with_a_failed_batch):
    store, count = run_with_a_failed_batch
    table = store.read().to_pandas()
    failed = table[table["error"] == "ArithmeticError: bad"]
    assert len(failed) == count and failed["trial_id"].is_unique and len(table) == store.read_record().planned
    assert failed[["phase", "condition", "pair_id", "model", "seed"]].notna().all().all()
    assert failed[["mode_llr", "recursive_score", "rv_prompt", "coherent"]].isna().all().all()
