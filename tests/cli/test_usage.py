"""A command line that is none is told of in one line, with nothing in it that would hide or move."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hostile import HOSTILE, hidden
from kvpatch.cli import main as cli


def said(monkeypatch: Any, capsys: Any, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["kvpatch", *words])
    monkeypatch.setenv("KVPATCH_DEBUG", "")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "no such command 'nowhere'"),
        (["run"], "missing argument 'protocol'; `kvpatch run --help` lists what it takes"),
        (["run", "dec7"], "missing option '--model'"),
        (["run", "dec7", "--model"], "option '--model' requires an argument"),
        (["plan", "dec7", "--modl", "x"], "no such option: --modl (Possible options: --model"),
        (["power", "dec7", "--n", "x"], "invalid value for '--n'"),
        (["status", "a", "b"], "got unexpected extra argument(s) (b)"),
    ],
)
def test_command_line_that_is_none_is_one_line_and_exit_code_2(monkeypatch, capsys, words, told):
    code, out, err = said(monkeypatch, capsys, *words)
    assert (code, out) == (2, "") and err.startswith(f"kvpatch: {told}") and err.count("\n") == 1


@pytest.mark.parametrize("text", [text.replace("\0", "") for text in HOSTILE])
@pytest.mark.parametrize("before", [["validate"], ["power", "dec7", "--n"], [], ["status", "a"]])
def test_words_that_are_none_of_a_command_s_show_symbols(monkeypatch, capsys, before, text):
    code, out, err = said(monkeypatch, capsys, *before, f"x{text}")
    assert code == 2 and hidden([out, err]) == [] and err.count("\n") == 1 and len(err) < 1_000


def test_no_words_show_the_help(monkeypatch, capsys):
    _, out, err = said(monkeypatch, capsys)
    assert "Usage:" in out + err and "preregister" in out + err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_finds_no_room_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvpatch", "schema"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    told = (
        "kvpatch: what this command prints can't be written: No space left on device; make room, or send it elsewhere"
    )
    assert (done.returncode, done.stderr) == (2, f"{told}\n")


def test_command_without_a_standard_error_ends_with_its_exit_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kvpatch", "nowhere"])
    monkeypatch.setenv("KVPATCH_DEBUG", "")
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2


def test_package_that_is_installed_and_broken_is_no_traceback(monkeypatch, capsys, tmp_path):
    def broken() -> None:
        raise ImportError("cannot import name 'x' from 'y'")

    monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(cli, "app", broken)
    code, out, err = said(monkeypatch, capsys, "models")
    assert (code, out) == (70, "") and err.count("\n") == 1 and "ImportError: cannot import name 'x'" in err


def test_assumptions_that_can_t_be_read_are_told_before_anything_is_computed(monkeypatch, capsys):
    from kvpatch.verdicts import power

    monkeypatch.setattr(power, "power", lambda *_, **__: pytest.fail("computed"))
    code, _, err = said(monkeypatch, capsys, "power", "demo", "--assume", "/dev/zero")
    assert code == 2 and "the assumptions /dev/zero can't be read" in err


@pytest.mark.parametrize(("words", "told"), [(["--seed", "-5"], "--seed"), (["--n", "1000000000"], "at most 100,000")])
def test_power_of_what_can_t_be_simulated_is_one_line(monkeypatch, capsys, words, told):
    from kvpatch.verdicts import power

    monkeypatch.setattr(power, "power", lambda *_, **__: [])
    code, _, err = said(monkeypatch, capsys, "power", "demo", "--draws", "1", *words)
    assert code == 2 and err.count("\n") == 1 and told in err
