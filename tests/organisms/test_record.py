"""Gate 0: the newest validation of this version and this code is found, and what it says is told in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpatch.errors import StoreError
from kvpatch.store import validation as record
from kvpatch.store.validation import (
    Finding,
    Validation,
    code_sha256,
    gate_zero,
    newest_validation,
    place_in,
    write_validation,
)


def validation(created: str, *, holds: bool = True, **changes) -> Validation:
    finding = Finding(organism="early", asked="layers", planted="1", found="1" if holds else "2", holds=holds)
    content = {"version": "0.1.0", "code_sha256": code_sha256(), "scope": "quick", "seed": 0, "seconds": 1.0}
    content |= {"created": created, "findings": [finding], "measured": {}}
    return Validation(**{**content, **changes})


def keep(cache: Path, *validations: Validation) -> None:
    for one in validations:
        write_validation(one, place_in(cache, one))


def test_the_newest_of_this_version_and_code_counts(tmp_path: Path):
    assert newest_validation(tmp_path, "0.1.0") is None
    old, new = validation("2026-01-01T00:00:00+00:00"), validation("2026-01-02T00:00:00+00:00", holds=False)
    keep(tmp_path, old, new)
    keep(tmp_path, validation("2026-01-03T00:00:00+00:00", code_sha256="other"))
    keep(tmp_path, validation("2026-01-04T00:00:00+00:00", version="0.0.9"))
    found = newest_validation(tmp_path, "0.1.0")
    assert found == new
    assert found.summary()["failed"] == ["early: layers"]


def test_a_damaged_record_is_as_if_it_were_not_there(tmp_path: Path):
    keep(tmp_path, validation("2026-01-01T00:00:00+00:00"))
    path = next(tmp_path.glob("validations/*/validation.json"))
    path.write_text(path.read_text()[:40])
    assert newest_validation(tmp_path, "0.1.0") is None


def test_gate_zero_tells_success_failure_and_absence():
    passed = validation("2026-01-01T00:00:00+00:00").summary()
    failed = validation("2026-01-01T00:00:00+00:00", holds=False).summary()
    assert "recovered everything planted, 1 findings" in gate_zero(passed)
    assert "FAILED (early: layers)" in gate_zero(failed)
    assert "was not validated" in gate_zero(None)


def test_a_place_that_cant_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be written"):
        write_validation(validation("2026-01-01T00:00:00+00:00"), tmp_path / "file")


def test_code_that_only_shows_results_and_comments_leave_a_validation_what_it_was(tmp_path: Path, monkeypatch):
    def hash_of(**files: str) -> str:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".py").write_text(text)
        code_sha256.cache_clear()
        return code_sha256()

    monkeypatch.setattr(record, "PACKAGE", tmp_path)
    try:
        first = hash_of(engine__step="x = 1\n", view__guard="y = 1\n", cli__main="z = 1\n")
        assert hash_of(view__guard="y = 2\n", cli__main="z = 2\n") == first
        assert hash_of(engine__step="x = 1  # one\n") == first
        assert hash_of(engine__step="x = 2\n") != first
    finally:
        code_sha256.cache_clear()
