"""A phase on another model: its own pairs, calibration, check and margins; and its replication verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvpatch.cli.app import app
from kvpatch.store.directory import Store
from small import CONDITIONS, protocol_content, write_bank, write_protocol

pytestmark = pytest.mark.model
NAMES = ("A", "B", "C", "N1", "S0", "S1")


def two_models(first: str, bank: Path) -> dict[str, Any]:
    """Changes that add phase 7 on a second model, with a replication of the transfer."""
    content = protocol_content(bank)
    replication = {
        "id": "again", "claim": "it repeats", "phase": "7", "contrast": "C - N1", "readout": "mode_llr",
        "test": "replicates", "of": "transfer", "family": "again", "gate": 5,
    }  # fmt: skip
    return {
        "bank": bank,
        "models": {"second": first},
        "conditions": {name: CONDITIONS[name] for name in NAMES},
        "phases": {
            "1": {"question": "?", "n": 5, "conditions": ["A", "B", "C"], "controls": ["N1", "S0", "S1"]},
            "7": {"question": "?", "n": 4, "model": "second", "conditions": ["A", "B", "C"], "controls": ["N1"]},
        },
        "hypotheses": [*content["hypotheses"], replication],
    }


@pytest.fixture(scope="module")
def protocol(tmp_path_factory, tiny_dirs) -> Path:
    folder = tmp_path_factory.mktemp("two")
    return write_protocol(folder, **two_models(str(tiny_dirs("gemma3")), write_bank(folder / "bank")))


@pytest.fixture(scope="module")
def finished(protocol: Path, tiny_dirs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    done = CliRunner().invoke(app, ["run", str(protocol), "--model", str(tiny_dirs("llama")), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_each_phase_runs_on_its_model_and_is_judged_by_its_calibration(finished, tiny_dirs):
    rows = Store(finished).read().to_pandas()
    models = rows.groupby("phase")["model"].unique().map(list).to_dict()
    # Of a path on this machine its last part is stored; the record's hashes say which model it is.
    first, second = [tiny_dirs("llama").name], [tiny_dirs("gemma3").name]
    assert first != second
    assert models == {"calibration": first, "1": first, "calibration-second": second, "7": second}
    record = Store(finished).read_record()
    assert record.other_models["second"].check is not None
    assert record.other_models["second"].coherence_limits != record.coherence_limits
    assert set(rows.loc[rows["phase"] == "7", "condition_role"]) == {"experiment", "control"}


def test_replication_has_a_verdict_that_names_what_it_repeats(finished):
    found = {v["id"]: v for v in json.loads((finished / "verdicts.json").read_text())}
    assert found["again"]["n"] == 4
    assert found["again"]["verdict"] in ("inconclusive", "not interpretable", "not supported")


def test_running_one_phase_loads_its_model_alone(protocol, tiny_dirs, tmp_path):
    arguments = [str(protocol), "--model", str(tiny_dirs("llama")), "--other-model", "second=/nowhere"]
    done = CliRunner().invoke(app, ["plan", *arguments, "--phases", "1", "--no-timing", "--json"])
    assert done.exit_code == 0
    assert set(json.loads(done.stdout)["phases"]) == {"calibration", "1"}
    failed = CliRunner().invoke(app, ["plan", *arguments, "--phases", "7", "--no-timing"])
    assert "/nowhere" in str(failed.exception)


def test_other_model_must_be_one_the_protocol_names(protocol, tiny_dirs):
    arguments = ["plan", str(protocol), "--model", str(tiny_dirs("llama")), "--other-model", "third=x"]
    failed = CliRunner().invoke(app, arguments)
    assert "must read KEY=MODEL; the protocol's keys: second" in str(failed.exception)


def test_another_second_model_in_the_same_directory_is_refused(protocol, finished, tiny_dirs):
    arguments = [str(protocol), "--model", str(tiny_dirs("llama")), "--out", str(finished)]
    failed = CliRunner().invoke(app, ["run", *arguments, "--other-model", f"second={tiny_dirs('qwen3')}"])
    assert "belongs to another run" in str(failed.exception)


def test_plan_estimates_time_and_memory_from_a_calibration(protocol, tiny_dirs):
    done = CliRunner().invoke(app, ["plan", str(protocol), "--model", str(tiny_dirs("llama")), "--json"])
    summary = json.loads(done.stdout)
    assert summary["seconds"] == pytest.approx(sum(p["seconds"] for p in summary["phases"].values()), abs=0.5)
    assert summary["peak_memory_bytes"] > 10**7
    assert summary["prefill_tokens"] > summary["distinct_prefills"] > 0
