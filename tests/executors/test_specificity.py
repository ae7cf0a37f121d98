"""The calibration of likelihood readouts: before any trial, the same each time, kept in run.json, applied to trials."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from kvpatch.cli import main as command_line
from kvpatch.executors import specificity
from kvpatch.executors.batch import run_batch
from kvpatch.executors.specificity import calibrate_readouts, rule_of
from kvpatch.protocols.load import load_protocol
from kvpatch.protocols.schema import Calibration
from kvpatch.readouts.specific_mode import SpecificMode
from kvpatch.run import run
from kvpatch.store.directory import Store
from small import write_protocol

pytestmark = pytest.mark.model
CALIBRATION = {"pairs": 3, "conditions": ["A", "B"], "neutral": ["N2"], "destroyed": ["E1", "F2"]}
ASKED = Calibration.model_validate(CALIBRATION)


def test_neutral_and_destroyed_caches_are_forced_on_the_held_out_pairs_and_write_nothing(small_plan):
    plan = small_plan(calibration=CALIBRATION, n=2)
    (forced,) = plan.forced
    assert list(forced.conditions) == ["A", "B", "N2", "E1", "F2"]
    assert len(forced.trials) == 3 * 5
    calibration = {pair.pair_id for batch in plan.batches if batch.split == "calibration" for pair in batch.pairs}
    assert {pair.pair_id for pair in forced.pairs} == calibration
    assert {condition for batch in plan.batches if batch.split == "calibration" for condition in batch.conditions} == {
        "A",
        "B",
    }
    assert small_plan(n=2).forced == []


def test_the_calibration_is_the_same_each_time_and_a_stored_one_is_kept(model, small_plan, monkeypatch):
    plan = small_plan(calibration=CALIBRATION, n=2)
    found = calibrate_readouts({None: model}, plan, ASKED)
    again = calibrate_readouts({None: model}, plan, ASKED)
    assert found[None].sha256 == again[None].sha256
    assert set(found[None].readouts["mode_llr"].shares) == {"N2", "E1", "F2"}
    assert len(found[None].readouts["mode_llr"].by_position["B"]) == 6
    monkeypatch.setattr(specificity, "calibration_of_model", lambda *_: pytest.fail("it was measured again"))
    assert calibrate_readouts({None: model}, plan, ASKED, found) == found


def test_a_trial_holds_the_readout_with_and_without_the_rule_and_what_lies_between(model, small_plan):
    batch = small_plan(calibration=CALIBRATION, n=2).batches[-1]
    rule = SpecificMode(-5.0, (0.1, 0.0, 0.2, 0.3, 0.0), (0.5, 0.0, 0.1, -0.2, 0.05))
    for row in run_batch(model, batch, rule=rule):
        taken = np.dot(row["mode_llr_damage"], rule.coefficients)
        assert row["mode_llr"] == pytest.approx(row["mode_llr_unweighted"] - taken, abs=1e-6)
        assert abs(taken) > 1e-3
    for row in run_batch(model, batch):
        assert row["mode_llr"] == row["mode_llr_unweighted"]
        assert row["mode_llr_damage"] is None


def test_what_the_mode_readout_is_fitted_on_is_part_of_a_trial(small_plan):
    plain, asked = small_plan(n=2), small_plan(n=2, calibration=CALIBRATION)
    other = small_plan(n=2, calibration=CALIBRATION | {"destroyed": ["E1"]})
    assert len({tuple(plan.trial_ids) for plan in (plain, asked, other)}) == 3


def test_a_resumed_run_keeps_the_rule_that_its_first_trials_were_measured_by(
    model, tmp_path: Path, monkeypatch, capsys
):
    protocol = load_protocol(str(write_protocol(tmp_path, calibration=CALIBRATION)))
    first = run(protocol, {None: model}, tmp_path / "run", n=2).record.readout_calibration
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["readout_calibration"]
    assert first is not None and stored == json.loads(first.model_dump_json())
    monkeypatch.setattr(specificity, "calibration_of_model", lambda *_: pytest.fail("it was measured again"))
    assert run(protocol, {None: model}, tmp_path / "run", n=2).record.readout_calibration == first
    rule = rule_of(first)
    assert rule is not None
    for row in Store(tmp_path / "run").read().to_pylist():
        taken = np.dot(row["mode_llr_damage"], rule.coefficients)
        assert row["mode_llr"] == pytest.approx(row["mode_llr_unweighted"] - taken, abs=1e-5)
    monkeypatch.setattr(sys, "argv", ["kvpatch", "verdicts", str(tmp_path / "run"), "--all"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert not ended.value.code
    assert "Specificity of mode_llr on" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Specific readouts" in page and "mode-by-position-own" in page
    assert page.count("Specificity of mode_llr on") == 2  # among the instruments, and beside its chart
