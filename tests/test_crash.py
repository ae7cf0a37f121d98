"""An unexpected error leaves a report with nothing private in it, and a run holds nothing private either."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from pathlib import Path

import pytest

from kvpatch.cli import main as cli
from kvpatch.crash import told_command, without_private, write_crash
from small import write_protocol

SECRET = "s3cr3t-of-mine-123456"


@pytest.fixture
def run_command(monkeypatch, capsys):
    """`run_command(*words)`: exit code and standard error."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["/home/somebody/bin/kvpatch", *map(str, words)])
        monkeypatch.setenv("KVPATCH_DEBUG", "")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    monkeypatch.setenv("HF_TOKEN", SECRET)
    return call


def names_of_this_machine() -> list[str]:
    return [name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4]


def test_secrets_and_paths_are_taken_out_of_a_text(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", SECRET)
    home = str(Path.home())
    text = f"{SECRET} hf_abcdefgh12345678 https://me:pw@host/x {home}/models/x.bin {sys.prefix}/lib/y.py"
    told = without_private(text)
    for private in (SECRET, "hf_abcdefgh12345678", "me:pw", sys.prefix):
        assert private not in told
    assert "https://***@host/x" in told and "<environment>/lib/y.py" in told
    assert without_private("a plain sentence, 3 of 4.") == "a plain sentence, 3 of 4."


@pytest.mark.parametrize(
    "secret",
    [
        *("AKIAIOSFODNN7EXAMPLE", "AIzaSyA1234567890abcdefghijklmnop", "ghs_0123456789abcdef", "glpat-0123456789abcd"),
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    ],
)
def test_tokens_are_known_by_their_form(secret):
    assert without_private(f"401 for {secret}: denied") == "401 for ***: denied"


def test_tokens_are_known_by_what_stands_before_them():
    told = without_private(
        "GET /x?a=1&X-Amz-Signature=ab12cd&b=2 Authorization: Bearer zz.99 --password=hunter2 token=q1"
    )
    assert not {"ab12cd", "zz.99", "hunter2", "q1"} & set(told.replace("=", " ").replace("&", " ").split())
    assert "a=1&X-Amz-Signature=***&b=2" in told


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "PRIVATE_KEY", "PGPASS", "SESSION_COOKIE", "OPENAI_KEY"])
def test_values_of_variables_named_like_secrets_are_taken_out(monkeypatch, name):
    monkeypatch.setenv(name, "v4lue-of-it")
    assert without_private("with v4lue-of-it in it") == "with *** in it"


def test_user_without_a_home_in_a_folder_that_is_gone_is_told_of_errors_all_the_same(monkeypatch):
    def gone(*_: object) -> str:
        raise FileNotFoundError

    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(os, "getcwd", gone)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("HOME")
    assert without_private("3 of 4 in /somewhere/else") == "3 of 4 in /somewhere/else"


def test_command_line_is_stored_without_directories():
    words = ["/opt/me/bin/kvpatch", "run", "/home/me/p.yaml", "--model", "~/m/tiny", "--out=/data/me/run/", "a/b"]
    assert told_command(words) == ["kvpatch", "run", "p.yaml", "--model", "tiny", "--out=run", "a/b"]


def test_crash_report_says_versions_stage_and_place(tmp_path, monkeypatch):
    monkeypatch.setenv("X_TOKEN", SECRET)
    try:
        raise RuntimeError(f"broken with {SECRET} in {tmp_path}")
    except RuntimeError as error:
        place = write_crash(tmp_path, "running", error)
    assert place == tmp_path / "crash.txt"
    text = place.read_text("utf-8")
    for words in ("stage: running", "torch ", "RuntimeError: broken with ***", "test_crash.py", "python "):
        assert words in text
    for private in (SECRET, str(tmp_path), os.getcwd(), *names_of_this_machine()):
        assert private not in text


def test_report_that_can_t_be_written_is_no_second_crash(tmp_path):
    (tmp_path / "file").touch()
    assert write_crash(tmp_path / "file", "running", RuntimeError("x")) is None


@pytest.mark.model
def test_unexpected_error_of_a_run_is_one_line_that_names_the_report(tmp_path, tiny_dirs, run_command, monkeypatch):
    import kvpatch.run

    def broken(*_: object) -> None:
        raise RuntimeError(f"not expected, with {SECRET}")

    monkeypatch.setattr(kvpatch.run, "calibrate_readouts", broken)
    out = tmp_path / "run"
    code, said = run_command("run", write_protocol(tmp_path), "--model", tiny_dirs("llama"), "--out", out)
    *_, last = said.splitlines()
    assert code == 70 and last.startswith("kvpatch: an error that kvpatch did not expect, RuntimeError")
    assert str(out / "crash.txt") in last and "Traceback" not in said and SECRET not in said
    text = (out / "crash.txt").read_text()
    assert "stage: " in text and "calibrate_readouts" in text and SECRET not in text


@pytest.mark.model
def test_finished_run_holds_no_path_user_host_or_token(tmp_path, tiny_dirs, run_command):
    (tmp_path / "private-folder").mkdir()
    out = tmp_path / "private-folder" / "run"
    protocol = write_protocol(tmp_path, bank=None)
    text = protocol.read_text().replace(f"bank: {tmp_path}/bank", "bank: bank")
    protocol.write_text(text)
    code, said = run_command("run", protocol, "--model", tiny_dirs("llama"), "--out", out)
    assert code == 0, said
    private = [
        str(tmp_path),
        "private-folder",
        str(Path.home()) + "/",
        SECRET,
        "/home/somebody",
        *names_of_this_machine(),
    ]
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert [word for word in private if word.encode() in content] == [], path.name
