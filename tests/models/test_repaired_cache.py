"""What the cache keeps repairs itself: nothing of a killed process is in the way, and what is damaged is made again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kvpatch.errors import ModelError
from kvpatch.models import named
from kvpatch.models.load import pull
from kvpatch.models.named import part_of
from kvpatch.models.note import refuse_changed, write_note
from kvpatch.organisms.directories import organism_directory

NAME = "smollm2-135m"


@pytest.fixture
def fetched(tmp_path, monkeypatch) -> list[str]:
    """The cache is empty, and a GGUF is fetched as a few bytes; lists the models that were."""
    monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path / "cache"))
    found: list[str] = []

    def fetch(name: str, into: Path, progress: object) -> Path:
        found.append(name)
        (into / f"{name}.gguf").write_bytes(b"GGUF of " + name.encode())
        return into / f"{name}.gguf"

    monkeypatch.setattr(named, "fetch_gguf", fetch)
    return found


def quiet(what: str, done: int, total: int) -> None:
    """No progress is shown."""


DAMAGES = {
    "truncated": lambda path: path.write_bytes(b"GGUF"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "without its hash": lambda path: path.with_suffix(".sha256").unlink(),
    "with a torn hash": lambda path: path.with_suffix(".sha256").write_text("12"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_fetched_file_that_is_damaged_is_fetched_again(fetched, damage):
    path = named.pull_unconverted(NAME, quiet)
    content = path.read_bytes()
    assert named.pull_unconverted(NAME, quiet) == path and fetched == [NAME]
    DAMAGES[damage](path)
    assert named.pull_unconverted(NAME, quiet).read_bytes() == content
    assert fetched == [NAME, NAME] and named.kept_gguf(NAME) == path


def test_folder_of_a_killed_process_is_taken_away_and_that_of_another_model_stays(tmp_path):
    home = tmp_path / "model-v1"
    own, other = tmp_path / ".part-model-v1-abc", tmp_path / ".part-model-v10-abc"
    for left in (own, other):
        left.mkdir()
        (left / "weights").write_bytes(b"half")
    with part_of(home) as folder:
        assert folder.is_dir() and not own.exists()
    assert not folder.exists() and other.exists()


@pytest.mark.parametrize("damage", ["truncated", "a file gone", "no note"])
def test_damaged_organism_is_written_again(tmp_path, damage):
    home = organism_directory(_some(), tmp_path)
    before = (home / "config.json").read_bytes()
    weights = home / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        (home / ("config.json" if damage == "a file gone" else "kvpatch.json")).unlink()
    assert organism_directory(_some(), tmp_path) == home
    assert (home / "config.json").read_bytes() == before
    refuse_changed(home)
    assert [path.name for path in home.parent.iterdir() if path.name.startswith(".part-")] == []


def _some() -> str:
    from kvpatch.specs.organisms import ORGANISMS

    return next(name for name, organism in ORGANISMS.items() if organism.weights is None)


def test_damaged_named_model_is_refused_with_the_command_that_replaces_it(tmp_path, fetched, monkeypatch):
    from kvpatch.models import load

    def convert(gguf: Path, out: Path, report: object) -> None:
        out.mkdir()
        (out / "model.safetensors").write_bytes(gguf.read_bytes())
        write_note(out, {})

    monkeypatch.setattr(load, "_convert", convert)
    monkeypatch.setattr(load, "fetch_gguf", named.fetch_gguf)
    where = pull(NAME)
    whole = (where / "model.safetensors").read_bytes()
    (where / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=f"kvpatch pull {NAME} --again"):
        load.load_model(NAME, device="cpu")
    assert pull(NAME, again=True) == where
    assert (where / "model.safetensors").read_bytes() == whole
    refuse_changed(where)


PARENT = """
import sys
from kvpatch.models.named import _ended
_ended([sys.executable, "-c", "import os, time; print(os.getpid(), file=open(os.sys.argv[1], 'w')); time.sleep(600)",
        sys.argv[1]], {})
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_downloads_ends_with_the_process_that_wants_it(tmp_path, how):
    told = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", PARENT, str(told)], stderr=subprocess.DEVNULL) as parent:
        deadline = time.monotonic() + 60
        while not told.exists() or not told.read_text().strip():
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.02)
        child = psutil.Process(int(told.read_text()))
        parent.send_signal(how)
    child.wait(timeout=60)


def test_what_is_left_while_a_model_is_made_is_taken_away_after_it(tmp_path):
    home = tmp_path / "model-v1"
    with part_of(home):
        (tmp_path / ".part-model-v1-late").mkdir()
    assert list(tmp_path.iterdir()) == []


def test_what_a_download_says_and_how_it_ends_is_told():
    assert named._ended([sys.executable, "-c", "print('said')"], {}) == (0, "said\n")
    assert named._ended([sys.executable, "-c", "import os; os._exit(int(os.environ['CODE']))"], {"CODE": "7"}) == (
        7,
        "",
    )
