"""Folders for temporary files of clusters: those of ended processes go, and no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kvpatch.executors import temporary
from kvpatch.executors.temporary import OWNER, clear_left, temporary_folder

SCRIPT = """
import os, signal, sys
from kvpatch.executors.temporary import temporary_folder
folder = temporary_folder(sys.argv[1])
os.makedirs(os.path.join(folder.inner, "session"))
print(folder.path, flush=True)
{}
"""


def left(parent: Path, then: str = "os.kill(os.getpid(), signal.SIGKILL)") -> Path:
    """The folder of another process, which is ended."""
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(then), str(parent)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return Path(done.stdout.strip())


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path):
    path = left(tmp_path)
    assert (path / "r" / "session").is_dir() and path.stat().st_mode & 0o77 == 0
    own = temporary_folder(str(tmp_path))
    assert list(tmp_path.iterdir()) == [own.path]
    clear_left(tmp_path)
    assert list(tmp_path.iterdir()) == [own.path]  # whose owner lives
    own.remove()
    assert list(tmp_path.iterdir()) == []


def test_folder_of_another_process_that_lives_stays(tmp_path):
    words = [sys.executable, "-c", SCRIPT.format("sys.stdin.read()"), str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        path = Path(other.stdout.readline().strip())
        clear_left(tmp_path)
        assert path.is_dir()
        # Of a process of another container, which shares the folder: its number means nothing here, its lock does.
        said = json.loads((path / OWNER).read_text())
        (path / OWNER).write_text(json.dumps({**said, "process": 2**22 + 1}))
        clear_left(tmp_path)
        assert path.is_dir()
        # And where there are no locks, its number does.
        (path / OWNER).unlink()
        (path / OWNER).write_text(json.dumps(said))
        clear_left(tmp_path)
        assert path.is_dir()
        other.kill()
    clear_left(tmp_path)
    assert not path.exists()


def test_number_that_another_process_has_by_now_does_not_keep_a_folder(tmp_path):
    path = left(tmp_path)
    (path / OWNER).write_text(json.dumps({"process": os.getpid(), "began": psutil.Process().create_time() - 1000}))
    clear_left(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"process": "x"}', "[" * 900, '{"process": 1}'])
def test_folder_that_does_not_say_whose_it_is_stays(tmp_path, content):
    path = left(tmp_path)
    (path / OWNER).unlink()
    if content is not None:
        (path / OWNER).write_text(content)
    clear_left(tmp_path)
    assert path.is_dir()


def test_folder_of_another_user_or_behind_a_link_stays(tmp_path, monkeypatch):
    path = left(tmp_path)
    elsewhere = path.rename(tmp_path / "elsewhere")
    (tmp_path / "kvp-link").symlink_to(elsewhere)
    clear_left(tmp_path)
    assert elsewhere.is_dir() and (tmp_path / "kvp-link").is_symlink()
    path = elsewhere.rename(path)
    monkeypatch.setattr(temporary.os, "getuid", lambda: path.stat().st_uid + 1)
    clear_left(tmp_path)
    assert path.is_dir()
