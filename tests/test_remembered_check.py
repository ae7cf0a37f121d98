"""A run takes what a check of the same model found before, and measures anew where anything may have changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvpatch as kv
from kvpatch import readiness
from kvpatch.errors import ModelError
from kvpatch.executors.host import model_record
from kvpatch.files import cache_directory
from kvpatch.planning.listener import ProgressListener

HARDWARE: dict[str, object] = {"machine": "m", "processor": "p", "threads": 1}
Dirs = Callable[..., Path]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the models that were really checked."""
    monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KVPATCH_CHECK_AGAIN", raising=False)
    seen: list[str] = []
    measure = readiness.check

    def check(model: kv.Model) -> object:
        seen.append(model.loaded.name)
        return measure(model)

    monkeypatch.setattr(readiness, "check", check)
    return seen


def checked(model: kv.Model, hardware: dict[str, object] = HARDWARE) -> tuple[Any, dict[str, Any]]:
    return readiness.checked(model, model_record(model), hardware, ProgressListener())


def test_the_same_model_is_checked_once_and_says_when(tiny_dirs: Dirs, counted: list[str]):
    first = checked(kv.load(str(tiny_dirs("llama"))))
    assert checked(kv.load(str(tiny_dirs("llama")))) == first
    assert len(counted) == 1
    assert first[1]["measured"].endswith("+00:00")


def test_other_settings_hardware_and_weights_are_checked_anew(tiny_dirs: Dirs, counted: list[str]):
    model = kv.load(str(tiny_dirs("llama")))
    checked(model)
    checked(model, HARDWARE | {"processor": "q"})
    checked(model, HARDWARE | {"threads": 2})
    other = kv.load(str(tiny_dirs("llama")))
    other.loaded.hf.config.rms_norm_eps = 0.5  # the same weights, another model
    checked(other)
    assert len(counted) == 4
    checked(kv.load(str(tiny_dirs("qwen2"))))
    assert len(counted) == 5


def test_changed_code_is_checked_anew(tiny_dirs: Dirs, counted: list[str], monkeypatch: pytest.MonkeyPatch):
    model = kv.load(str(tiny_dirs("llama")))
    checked(model)
    monkeypatch.setattr(readiness, "code_sha256", lambda: "of other code")
    checked(model)
    assert len(counted) == 2


def test_a_damaged_file_and_a_request_measure_anew(
    tiny_dirs: Dirs, counted: list[str], monkeypatch: pytest.MonkeyPatch
):
    model = kv.load(str(tiny_dirs("llama")))
    found = checked(model)
    (kept,) = (cache_directory() / "checks").iterdir()
    kept.write_text(kept.read_text()[:-9])
    assert checked(model)[0] == found[0] and len(counted) == 2
    monkeypatch.setenv("KVPATCH_CHECK_AGAIN", "1")
    checked(model)
    assert len(counted) == 3


def test_a_model_in_memory_is_always_checked(tiny_dirs: Dirs, counted: list[str]):
    held = kv.load(str(tiny_dirs("llama")))
    model = kv.load(model=held.loaded.hf, tokenizer=held.tokenizer)
    checked(model)
    checked(model)
    assert len(counted) == 2
    assert not (cache_directory() / "checks").exists()


def test_what_is_asked_for_again_is_not_kept(tiny_dirs: Dirs, counted: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVPATCH_CHECK_AGAIN", "1")
    checked(kv.load(str(tiny_dirs("llama"))))
    assert len(counted) == 1 and not (cache_directory() / "checks").exists()


def test_a_failed_check_is_not_kept(tiny_dirs: Dirs, counted: list[str], monkeypatch: pytest.MonkeyPatch):
    model = kv.load(str(tiny_dirs("llama")))
    whole = readiness.check

    def failing(model: kv.Model) -> object:
        return [i.model_copy(update={"holds": False}) for i in whole(model)]

    monkeypatch.setattr(readiness, "check", failing)
    with pytest.raises(ModelError, match="fails"):
        checked(model)
    assert not (cache_directory() / "checks").exists()
    monkeypatch.setattr(readiness, "check", whole)
    checked(model)
    assert len(counted) == 2
