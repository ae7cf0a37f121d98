"""A run is followed as it grows: rows come in, states change, nothing is lost or counted twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpatch.store.directory import Store
from kvpatch.view.runs import LiveRun, Runs, is_held
from synthetic import dec7, record_of, run_parts


@pytest.fixture
def parts() -> list[tuple[str, list[dict]]]:
    return list(run_parts(dec7(), 3, 1, 2, phases=["4"]))


def begun(directory: Path, planned: int) -> Store:
    store = Store(directory)
    with store.locked():
        store.write_record(record_of(dec7(), {"4": planned}, finished=None))
    return store


def test_new_parts_come_in_once(tmp_path: Path, parts: list[tuple[str, list[dict]]]) -> None:
    store, run = begun(tmp_path / "run", 100), LiveRun("run", tmp_path / "run")
    assert run.refresh() and run.progress().done == 0
    done = 0
    for name, rows in parts:
        store.append(name, rows)
        done += len(rows)
        assert run.refresh() and not run.refresh()
        assert run.progress().done == done


def test_a_part_written_again_replaces_its_rows(tmp_path: Path, parts: list[tuple[str, list[dict]]]) -> None:
    store, run = begun(tmp_path / "run", 100), LiveRun("run", tmp_path / "run")
    name, rows = parts[-1]
    store.append(name, rows)
    run.refresh()
    store.append(name, [{**row, "text": "written again"} for row in rows[:2]])
    run.refresh()
    assert run.ask("select distinct text from trials") == [{"text": "written again"}]
    assert run.progress().done == 2


def test_states_follow_the_lock_and_the_record(tmp_path: Path, parts: list[tuple[str, list[dict]]]) -> None:
    run = LiveRun("run", tmp_path / "run")
    assert run.progress().state == "not begun"
    rows = parts[-1][1]
    store = begun(tmp_path / "run", len(rows))
    with store.locked():
        run.refresh()
        assert run.progress().state == "running"
    assert run.progress().state == "interrupted"
    store.append(parts[-1][0], rows)
    store.write_record(record_of(dec7(), {"4": len(rows)}))
    run.refresh()
    assert run.progress().state == "finished"


def test_looking_at_the_lock_does_not_take_it(tmp_path: Path) -> None:
    store = begun(tmp_path / "run", 1)
    for _ in range(50):
        assert not is_held(tmp_path / "run" / ".lock")
        with store.locked():
            assert is_held(tmp_path / "run" / ".lock")


def test_throughput_and_time_left_come_from_the_parts_of_a_run_that_goes_on(
    tmp_path: Path, parts: list[tuple[str, list[dict]]]
) -> None:
    rows = parts[-1][1]
    store, run = begun(tmp_path / "run", len(rows) * 5), LiveRun("run", tmp_path / "run")
    for i in range(3):
        store.append(f"part-{i}", [{**row, "trial_id": f"{i}-{row['trial_id']}"} for row in rows])
        os.utime(store.trials / f"part-{i}.parquet", (1e9 + 10 * i, 1e9 + 10 * i))
    with store.locked():
        run.refresh()
        found = run.progress()
    assert found.trials_per_second == pytest.approx(2 * len(rows) / 20)
    assert found.left == pytest.approx(2 * len(rows) / (2 * len(rows) / 20))


def test_rates_of_a_copied_run_are_those_that_it_recorded(tmp_path: Path, parts: list[tuple[str, list[dict]]]) -> None:
    rows = parts[-1][1]
    store, run = begun(tmp_path / "run", len(rows)), LiveRun("run", tmp_path / "run")
    for i in range(2):
        store.append(f"part-{i}", rows[i::2])
        os.utime(store.trials / f"part-{i}.parquet", (1e9 + i / 1000, 1e9 + i / 1000))  # as a copy has it
    run.refresh()
    assert (run.progress().state, run.progress().trials_per_second) == ("interrupted", None)
    finished = {"finished": "2026-01-02T03:04:05+00:00", "seconds": 20.0, "tokens": 400}
    store.write_record(record_of(dec7(), {"4": len(rows)}).model_copy(update=finished))
    run.refresh()
    found = run.progress()
    assert (found.state, found.tokens_per_second) == ("finished", 20.0)
    assert found.trials_per_second == pytest.approx(len(rows) / 20)
    assert found.newest == pytest.approx(1767323045)


def test_a_part_named_outside_the_run_is_left_out(tmp_path: Path, parts: list[tuple[str, list[dict]]]) -> None:
    store, run = begun(tmp_path / "run", 10), LiveRun("run", tmp_path / "run")
    other = begun(tmp_path / "other", 10)
    other.append("elsewhere", parts[-1][1])
    line = other.index.read_text().replace("elsewhere", "../../other/trials/elsewhere")
    store.index.write_text(line)
    run.refresh()
    assert run.progress().done == 0


def test_runs_are_found_as_they_come(tmp_path: Path) -> None:
    begun(tmp_path / "one", 1)
    runs = Runs([tmp_path])
    runs.refresh()
    assert list(runs.by_key) == ["one"]
    begun(tmp_path / "two <b>", 1)
    runs.refresh()
    assert list(runs.by_key) == ["one", "two--b-"]
