"""The script that draws charts is bundled once, and what was damaged on the disk is not taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import vl_convert

from kvpatch.report import library


@pytest.fixture
def bundled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was bundled so far, with a cache directory of its own."""
    made: list[str] = []

    def bundle() -> str:
        made.append("const naïve = 1;\n")
        return made[-1]

    monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vl_convert, "javascript_bundle", bundle)
    return made


def again() -> str:
    """What another process would get."""
    return library.chart_library.__wrapped__()


def test_the_script_is_bundled_once_for_all_processes(bundled: list[str]) -> None:
    assert [again(), again()] == ["const naïve = 1;\n"] * 2
    assert len(bundled) == 1


def test_a_damaged_script_is_bundled_anew(bundled: list[str], tmp_path: Path) -> None:
    again()
    (kept,) = (tmp_path / "cache" / "scripts").iterdir()
    kept.write_bytes(kept.read_bytes()[:-3])
    assert again() == "const naïve = 1;\n"
    assert len(bundled) == 2
    assert again() == "const naïve = 1;\n"
    assert len(bundled) == 2


def test_a_cache_that_cant_be_written_costs_time_only(bundled: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory would be")
    assert [again(), again()] == ["const naïve = 1;\n"] * 2
    assert len(bundled) == 2
