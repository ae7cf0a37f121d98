"""A disk that is full or read-only, and a file system without locks, are told of before anything is computed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpatch.cli import app
from kvpatch.cli.main import main
from kvpatch.errors import ProtocolError, StoreError
from kvpatch.files import is_held
from kvpatch.protocols.load import load_protocol
from kvpatch.store import directory as store_module
from kvpatch.store.directory import Store
from synthetic import write_run

FAULTS = {
    "ENOSPC": errno.ENOSPC,
    "EDQUOT": errno.EDQUOT,
    "EROFS": errno.EROFS,
    "EIO": errno.EIO,
    "EACCES": errno.EACCES,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_disk_is_found_on_trial_and_nothing_is_left(tmp_path, monkeypatch, fault):
    def broken(*_: object) -> None:
        raise OSError(FAULTS[fault], os.strerror(FAULTS[fault]))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreError, match="can't be written") as raised:
        Store(tmp_path / "new" / "run").refuse_unwritable()
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_can_be_written_is_left_as_it_was(tmp_path):
    Store(tmp_path / "run").refuse_unwritable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_file_system_without_locks_is_told_of_as_such(tmp_path, monkeypatch, code):
    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.raises(StoreError, match=r"no file locks .* give a directory on a local disk"),
        Store(tmp_path).locked(),
    ):
        pass
    (tmp_path / ".lock").touch()
    assert not is_held(tmp_path / ".lock")


def test_every_write_of_a_batch_that_fails_is_one_error_and_the_next_try_goes_on(tmp_path, monkeypatch):
    store = write_run(tmp_path / "run", n=2, calibration=2, phases=["6"], heads=(1, 1))
    rows, replace, fsync = store.read_part(store.parts()[0].batch), os.replace, os.fsync
    rows = [row | {"trial_id": f"{row['trial_id']}x"} for row in rows]
    before = store.parts()
    for name, real in (("replace", replace), ("fsync", fsync)):
        for at in range(4):
            calls = [0]

            def failing(*given: object, real=real, at=at, calls=calls) -> object:
                calls[0] += 1
                if calls[0] == at + 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*given)

            monkeypatch.setattr(store_module.os, name, failing)
            with contextlib.ExitStack() as stack:
                if at == 0:
                    stack.enter_context(
                        pytest.raises(StoreError, match="No space left on device; what was stored is kept")
                    )
                else:  # the last of them may not be reached
                    stack.enter_context(contextlib.suppress(StoreError))
                store.append("more", rows)
            monkeypatch.undo()
            assert [part for part in store.parts() if part.batch != "more"] == before
    store.append("more", rows)
    assert store.read_part("more") == rows


# Advice


def test_advice_that_fails_stops_no_run(monkeypatch, capsys):
    from kvpatch.verdicts import deviations, smallest

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(smallest, "warnings_before", broken)
    monkeypatch.setattr(deviations, "deviations", broken)
    protocol = load_protocol("dec7")
    app.warn_of_too_few(protocol, 1001, ["1"])
    app.warn_of_deviations(protocol)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("warning: ") and "planted" in line for line in said)
    with pytest.raises(ProtocolError, match="no phase"):  # a wrong request is no advice
        app.warn_of_too_few(protocol, 1001, ["nowhere"])


@pytest.mark.parametrize("phases", [["1"], ["4"], ["interventions"]])
def test_more_than_a_thousand_pairs_are_no_reason_to_refuse(phases, capsys):
    app.warn_of_too_few(load_protocol("dec7"), 1001, phases)
    assert "not known" not in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_status_is_shown_on_a_terminal_and_in_a_locale_that_nobody_knows(tmp_path, encoding):
    directory = write_run(tmp_path / "run", n=2, calibration=2, phases=["1"]).directory
    settings = {"TERM": "no-such-terminal", "LC_ALL": "xx_YY.nowhere", "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    kept = {name: os.environ[name] for name in ("PYTHONPATH", "PATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "kvpatch", "status", str(directory)],
        env=kept | settings, capture_output=True, cwd=Path(__file__).parent, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"trials done" in done.stdout


@pytest.mark.parametrize("words", [["status"], ["repair"], ["verdicts"], ["report"], ["effects"], ["view"]])
@pytest.mark.parametrize("name", ["x" * 5_000, "a" * 300, "b/" * 3_000])
def test_name_that_is_too_long_for_the_system_is_one_line(words, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kvpatch", *words, name])
    monkeypatch.setenv("KVPATCH_DEBUG", "")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(StoreError, match="can't be written"), Store(name).locked():
        pass
