"""A pre-registration holds all that a run will be held against, and a run is held against it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import kvpatch.cli.main as cli
from finished import small_protocol, small_run
from kvpatch.errors import ProtocolError
from kvpatch.protocols.load import load_protocol
from kvpatch.verdicts.outcome import light_rows
from kvpatch.verdicts.preregistration import (
    Circumstances,
    calibration_figures,
    held_against,
    preregistration,
    read_preregistration,
)

BEFORE, AFTER = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"


def written(path: Path, protocol: Any, **more: Any) -> dict[str, Any]:
    """Write a pre-registration and read it back."""
    given = {"created": BEFORE, "version": "0.1.0", "model": "m", "bank_sha256": "ba" * 32, **more}
    path.write_text(preregistration(protocol, Circumstances(**given)), "utf-8")
    return read_preregistration(path)


def test_the_block_holds_the_protocol_and_what_is_asked_of_it(tmp_path: Path):
    dec7 = load_protocol("dec7")
    block = written(tmp_path / "dec7.md", dec7, n=20, phases=["1", "4"])
    assert block["protocol_sha256"] == dec7.sha256
    assert block["phases"] == {"1": 20, "4": 20}
    assert (block["created"], block["model"], block["bank"]["sha256"]) == (BEFORE, "m", "ba" * 32)
    asked = {h.id: h for h in dec7.hypotheses if h.phase in ("1", "4")}
    assert [h["id"] for h in block["hypotheses"]] == list(asked)
    for h in block["hypotheses"]:
        assert (h["alpha"], h["family"], h["test"], h["n"]) == (
            asked[h["id"]].alpha,
            asked[h["id"]].family,
            h["test"],
            20,
        )
        assert h.get("margin") == (asked[h["id"]].margin and asked[h["id"]].margin.model_dump(exclude_none=True))
    assert set(block["families"]) == {h.family for h in asked.values()}
    assert block["families"]["nulls"] == {"alphas": [0.05], "hypotheses": 2, "correction": "holm", "passes_to": {}}
    assert any("further apart" in told or "differ in tokens" in told for told in block["exclusions"])
    assert block["error_statement"].startswith("Over ") and block["calibration"] is None
    text = (tmp_path / "dec7.md").read_text("utf-8")
    for h in asked.values():
        assert f"| {h.id} | {h.claim.replace('|', chr(92) + '|')} |" in text


def test_a_run_of_the_same_protocol_is_the_registered_one_and_its_differences_are_told(tmp_path: Path):
    store = small_run(tmp_path / "run")
    record = store.read_record()
    holds, told = held_against(written(tmp_path / "a.md", small_protocol()), record)
    assert holds and len(told) == 1 and told[0].startswith("The run's protocol is the pre-registered one")
    late = written(tmp_path / "b.md", small_protocol(), created=AFTER, bank_sha256="cc" * 32, n=12)
    holds, told = held_against(late, record)
    assert holds and [sentence.split(" ")[0:2] for sentence in told[1:]] == [
        ["The", "pre-registration"], ["The", "prompt"], ["Phase", "1"], ["Phase", "2"],
    ]  # fmt: skip
    assert "Phase 1 was run with n=40; pre-registered: 12." in told


def test_a_run_of_another_protocol_is_not_the_registered_one(tmp_path: Path):
    changed = small_protocol().model_copy(update={"title": "Another"})
    holds, told = held_against(written(tmp_path / "a.md", changed), small_run(tmp_path / "run").read_record())
    assert not holds and "no verdict of it is pre-registered" in told[0]


def test_calibration_figures_are_those_of_the_run(tmp_path: Path):
    store = small_run(tmp_path / "run")
    protocol, record = small_protocol(), store.read_record()
    found = calibration_figures(protocol, record, light_rows(store))
    block = written(tmp_path / "a.md", protocol, calibration=found)
    assert block["calibration"] == json.loads(json.dumps(found))
    gaps = {(gap["readout"], gap["transform"]): gap for gap in found["natural_gaps"]}
    assert gaps["mode_llr", "none"]["at_least"] > 0.5
    assert found["coherence_limits"]["own"] == record.coherence_limits
    assert found["test_trials"] == 40 * 16
    other = protocol.model_copy(update={"title": "Another"})
    with pytest.raises(ProtocolError, match="give a run of the same protocol"):
        calibration_figures(other, record, light_rows(store))


def test_a_file_that_was_changed_or_is_none_is_refused(tmp_path: Path):
    path = tmp_path / "a.md"
    written(path, small_protocol())
    text = path.read_text("utf-8")
    path.write_text(text.replace("test: much_less", "test: less"), "utf-8")
    with pytest.raises(ProtocolError, match="was changed after it was written"):
        read_preregistration(path)
    for wrong in (
        "# nothing",
        "```yaml\n[1\n```",
        "x\n```yaml\n[1\n```\n",
        f"x\n```yaml\n{yaml.safe_dump({'a': 1})}```\n",
    ):
        path.write_text(wrong, "utf-8")
        with pytest.raises(ProtocolError, match=r"is no pre-registration|is no YAML"):
            read_preregistration(path)
    with pytest.raises(ProtocolError, match="can't be read: No such file"):
        read_preregistration(tmp_path / "none.md")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["kvpatch", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_commands_write_one_and_hold_a_run_against_it(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "dec7.md"
    assert call(monkeypatch, "preregister", "dec7", "--model", "smollm2-135m", "-o", path) == 0
    assert load_protocol("dec7").sha256 in capsys.readouterr().out
    assert call(monkeypatch, "preregister", "dec7", "--model", "smollm2-135m", "-o", path) == 2
    assert "is there already" in capsys.readouterr().err
    store = small_run(tmp_path / "run")
    assert call(monkeypatch, "verdicts", store.directory, "--registered", path, "--json") == 1
    said = capsys.readouterr()
    assert "is not the pre-registered one" in said.err and json.loads(said.out)
    written(path, small_protocol())
    assert call(monkeypatch, "verdicts", store.directory, "--registered", path) == 0
    assert "is the pre-registered one" in capsys.readouterr().err
