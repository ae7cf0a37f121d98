"""What is written over, and what names a model or quotes a path, is told of as such."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvpatch.cli import main as cli
from kvpatch.errors import ProtocolError
from kvpatch.verdicts.outcome import outcome_of, write_verdicts
from synthetic import model_record, write_run


@pytest.fixture
def store(tmp_path):
    made = write_run(tmp_path / "run", n=3, calibration=2, phases=["1"])
    assert write_verdicts(made, outcome_of(made)) is None
    return made


def test_verdicts_that_said_otherwise_are_named_when_they_are_written_anew(store, monkeypatch, capsys):
    path = store.directory / "verdicts.json"
    whole = path.read_bytes()
    assert write_verdicts(store, outcome_of(store)) is None and path.read_bytes() == whole
    entries = json.loads(whole)
    entries[2]["estimate"] = 99.0
    path.write_text(json.dumps(entries))
    monkeypatch.setattr(sys, "argv", ["kvpatch", "verdicts", str(store.directory), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr()
    assert said.err == (
        f"warning: verdicts.json said otherwise of {entries[2]['id']}; it was written anew from the trials\n"
    )
    assert path.read_bytes() == whole == said.out.encode()


@pytest.mark.parametrize("content", ["", "[", "[1]", "{}", "null", "[" * 100_000])
def test_verdicts_that_can_t_be_read_are_written_anew(store, content):
    (store.directory / "verdicts.json").write_text(content)
    told = write_verdicts(store, outcome_of(store))
    assert told is not None and told.endswith("it was written anew from the trials")
    assert write_verdicts(store, outcome_of(store)) is None


def test_error_of_a_trial_holds_no_path_of_this_machine():
    from kvpatch.executors.rows import _error

    of = SimpleNamespace(error=f"the intervention x failed: FileNotFoundError: {Path.home()}/models/x.bin")
    told = _error(of, 0.0)  # pyright: ignore[reportArgumentType]
    assert told == "the intervention x failed: FileNotFoundError: ~/models/x.bin"


def test_two_models_of_one_name_are_refused_unless_they_are_one():
    from kvpatch.planned import _refuse_one_name_for_two

    first, other = model_record("llama", "A", 4, 2), model_record("llama", "A", 4, 2)
    _refuse_one_name_for_two({None: first, "second": other, "third": model_record("gpt2", "B", 2, 1)})
    other = other.model_copy(update={"weights_sha256": "00" * 32})
    with pytest.raises(ProtocolError, match="two models of this run are called 'llama'") as raised:
        _refuse_one_name_for_two({None: first, "second": other})
    assert "\n" not in str(raised.value)
