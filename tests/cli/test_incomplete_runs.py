"""Numbers of a run whose trials are not all stored say so, wherever they are printed or written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import kvpatch as kv
from kvpatch.cli import main as cli
from kvpatch.errors import StoreError
from kvpatch.store.directory import Store
from synthetic import write_run

COMMANDS = (
    ["verdicts"],
    ["verdicts", "--json"],
    ["effects"],
    ["effects", "--json"],
    ["report"],
    ["export"],
    ["figures"],
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("KVPATCH_DEBUG", "")
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "run", n=3, calibration=3, phases=["6"])


@pytest.fixture
def read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def call(command: list[str], store: Store) -> tuple[int, str, str]:
        more = ["--only", "nothing"] if command == ["figures"] else []
        monkeypatch.setattr(sys, "argv", ["kvpatch", command[0], str(store.directory), *command[1:], *more])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return call


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_lost_lines_of_the_index_are_told_beside_the_numbers(store, read, command):
    _, _, before = read(command, store)
    assert "planned trials" not in before
    parts = store.parts()
    lost = parts[-1].rows
    store.index.write_bytes(b"".join(part.line() for part in parts[:-1]))
    _, out, err = read(command, store)
    planned = store.read_record().planned
    assert f"warning: {planned - lost} of {planned} planned trials are stored" in err
    if "--json" in command:
        json.loads(out)


def test_report_of_a_run_without_all_its_trials_says_so(store, read):
    read(["report"], store)
    page = store.directory / "report.html"
    assert "planned trials are stored" not in page.read_text("utf-8")
    store.index.write_bytes(b"".join(part.line() for part in store.parts()[:-1]))
    read(["report"], store)
    assert "planned trials are stored</b>" in page.read_text("utf-8")


def test_notebook_shows_how_many_trials_are_stored(store):
    store.index.write_bytes(b"".join(part.line() for part in store.parts()[:-1]))
    run = kv.Run(store.directory)
    done, planned = len(run.trials()), store.read_record().planned
    assert done < planned and f"{done} of {planned}" in repr(run)
    assert "planned trials are stored" in run._repr_html_()


def test_index_that_is_a_link_to_nowhere_is_no_run_without_trials(store, read):
    store.index.unlink()
    store.index.symlink_to("/nowhere/at/all")
    with pytest.raises(StoreError, match="symbolic link that leads nowhere"):
        store.parts()
    code, _, err = read(["status"], store)
    assert code == 2 and err.count("\n") == 1 and "parts.jsonl" in err
