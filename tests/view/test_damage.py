"""The view shows no row of a part that is not what was stored, says why in one line, and shows it again once mended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from kvpatch.store.directory import Store
from kvpatch.store.lease import _holder
from kvpatch.view.runs import LiveRun
from kvpatch.view.server import View
from kvpatch.view.trial import _patch
from synthetic import write_run


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", n=2, calibration=1, phases=["6"], heads=(2, 2)).directory


def flipped(path: Path) -> bytes:
    """Damage a file; returns what it held."""
    data = path.read_bytes()
    path.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    return data


@pytest.mark.parametrize("folder", ["trials", "attention"])
def test_rows_of_a_damaged_part_leave_the_view_and_come_back_once_it_is_mended(directory: Path, folder: str) -> None:
    run = LiveRun("run", directory)
    run.refresh()
    done, part = run.progress().done, Store(directory).parts()[-1]
    assert run.trouble is None
    data = flipped(directory / folder / part.part)
    assert run.refresh() and not run.refresh()
    assert run.progress().done == done - part.rows
    assert run.trouble is not None and f"{folder}/{part.part} is missing or damaged" in run.trouble
    assert "\n" not in run.trouble
    assert run.ask("select count(*) as n from trials where part = ?", [part.part]) == [{"n": 0}]
    (directory / folder / part.part).write_bytes(data)
    assert run.refresh()
    assert (run.progress().done, run.trouble) == (done, None)


def test_nothing_is_shown_under_an_index_that_is_damaged(directory: Path) -> None:
    run = LiveRun("run", directory)
    run.refresh()
    done, index = run.progress().done, directory / "parts.jsonl"
    text = index.read_text()
    index.write_text("[]\n" + text)
    assert run.refresh()
    assert run.progress().done == 0
    assert run.trouble is not None and "line 1 names no stored part" in run.trouble
    index.write_text(text)
    assert run.refresh()
    assert (run.progress().done, run.trouble) == (done, None)


def test_several_damaged_parts_are_counted_in_the_one_line(directory: Path) -> None:
    for part in Store(directory).parts()[-3:]:
        flipped(directory / "trials" / part.part)
    run = LiveRun("run", directory)
    run.refresh()
    assert run.trouble is not None and run.trouble.endswith("(and 2 more)")


def test_parts_are_not_hashed_again_at_every_look(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpatch.store import parts

    monkeypatch.setattr(parts, "YOUNG", 0)
    run = LiveRun("run", directory)
    run.refresh()
    hashed = []
    monkeypatch.setattr(parts.hashlib, "sha256", lambda data: hashed.append(data))
    assert not run.refresh()
    assert hashed == []


def test_pages_say_why_trials_are_not_shown(directory: Path) -> None:
    whole = Store(directory)
    part = whole.parts()[-1]
    (*_, trial) = whole.rows_of(part, ["trial_id"])["trial_id"].to_pylist()
    with TestClient(View([directory]).app(None), base_url="http://127.0.0.1:8000") as asking:
        assert asking.get(f"/run/run/trial/{trial}").status_code == 200
        assert asking.get(f"/run/run/file/trials/{part.part}").status_code == 200
        flipped(directory / "trials" / part.part)
        words = f"{part.part} is missing or damaged"
        for page in (f"trial/{trial}", f"file/trials/{part.part}", "report"):
            answer = asking.get(f"/run/run/{page}")
            assert answer.status_code in (404, 409), page
            assert answer.status_code == 404 or (words in answer.text and "\n" not in answer.text), page
    with TestClient(View([directory]).app(None), base_url="http://127.0.0.1:8000") as asking:
        for page in ("", "run/run/", "run/run/trials"):
            assert f"Not shown: {directory}/trials/{words}" in asking.get(f"/{page}").text, page
        assert asking.get("/run/run/estimates").json() == []
        assert trial not in asking.get("/run/run/trials?as=json").text
        assert asking.get(f"/run/run/file/trials/{part.part}").status_code == 404


def test_attention_that_no_line_names_is_not_shown(directory: Path) -> None:
    """A killed process may have left it."""
    from kvpatch.view import trial

    run = LiveRun("run", directory)
    run.refresh()
    watched, other = (
        next(p for p in Store(directory).parts() if bool(p.attention_sha256) is has) for has in (True, False)
    )
    row = run.ask("select trial_id from trials where part = ? limit 1", [other.part])[0]
    shutil.copy(directory / "attention" / watched.part, directory / "attention" / other.part)
    found = trial.stored_row(run, row["trial_id"])
    assert found is not None and trial.heads(run, found) == []


@pytest.mark.parametrize("stored", ["[" * 100_000, '{"a": ' * 100_000, "{", "", None, 3])
def test_patch_that_is_no_json_is_shown_as_it_stands(stored):
    assert _patch(stored) == (stored if isinstance(stored, str) else None)


def test_lease_that_is_no_json_names_nobody():
    assert [_holder(content) for content in (b"[" * 100_000, b"{", b"", b"[]", b"\xff")] == [None] * 5
