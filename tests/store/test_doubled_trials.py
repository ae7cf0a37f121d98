"""A run in which two files hold a trial is refused, whoever wrote their hashes; and one whose record was changed."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kvpatch as kv
from kvpatch.cli import main as cli
from kvpatch.errors import StoreError
from kvpatch.store.directory import Store
from kvpatch.store.repair import repair
from kvpatch.view.runs import LiveRun
from synthetic import write_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_run(tmp_path / "run", n=3, calibration=3, phases=["1"])


def doubled(store: Store, name: str = "1-0099-aaaaaaaaaaaa.parquet", rows: int = 2) -> tuple[str, str]:
    """Some of the last part's trials in a file of their own, with another number and a hash that fits."""
    first = store.parts()[-1].part
    table = pq.read_table(store.trials / first).slice(0, rows)
    place = table.schema.get_field_index("mode_llr")
    pq.write_table(table.set_column(place, "mode_llr", pa.array([9.0] * len(table))), store.trials / name)
    sha256 = hashlib.sha256((store.trials / name).read_bytes()).hexdigest()
    with open(store.index, "a") as index:
        index.write(json.dumps({"part": name, "rows": len(table), "sha256": sha256}) + "\n")
    return first, name


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["kvpatch", *map(str, words)])
    monkeypatch.setenv("KVPATCH_DEBUG", "")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("reader", ["status", "verdicts", "effects", "report"])
def test_trial_that_two_parts_hold_is_refused_by_both_names(store, reader, capsys, monkeypatch):
    names = doubled(store)
    code, err = said(capsys, monkeypatch, reader, store.directory)
    assert code == 2 and err.count("\n") == 1 and all(name in err for name in names), err


def test_notebook_and_view_refuse_it_too(store):
    names = doubled(store)
    with pytest.raises(StoreError, match=names[1]):
        kv.Run(store.directory).trials()
    live = LiveRun("run", store.directory)
    live.refresh()
    assert all(name in (live.trouble or "") for name in names)
    assert live.progress().done == sum(part.rows for part in store.parts()) - 2


def test_view_refuses_a_part_that_comes_later_with_a_trial_that_it_shows(store):
    live = LiveRun("run", store.directory)
    live.refresh()
    before = live.progress().done
    assert live.trouble is None
    names = doubled(store)
    live.refresh()
    assert names[1] in (live.trouble or "") and live.progress().done == before


def test_repair_sets_both_aside(store):
    names = doubled(store)
    found = repair(store)
    assert found.parts_again == sorted(names)
    assert {part.part for part in store.parts()}.isdisjoint(names)
    store.read()


def test_trial_that_stands_twice_in_one_part_is_refused(store):
    part = store.parts()[-1]
    path = store.trials / part.part
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(0, len(table) - 1), table.slice(0, 1)]), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    store.index.write_text(store.index.read_text().replace(part.sha256, sha256))
    with pytest.raises(StoreError, match=part.part):
        store.read()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(protocol={}),
        lambda record: record["protocol"].pop("protocol"),
        lambda record: record["protocol"].update(title="another"),
        lambda record: record.update(planned_by_phase={"1": -1}),
        lambda record: record["protocol"].update(phases=None),
    ],
)
def test_run_whose_record_was_changed_is_told_in_one_line(store, change, capsys, monkeypatch):
    path = store.directory / "run.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    for reader in ("status", "verdicts", "effects", "report"):
        code, err = said(capsys, monkeypatch, reader, store.directory)
        assert code == 2 and err.count("\n") == 1 and "run.json" in err, (reader, err)
    live = LiveRun("run", store.directory)
    live.refresh()
    assert live.record is None or "the protocol in run.json" in (live.trouble or "")
    if live.record is not None:
        run = kv.Run(store.directory)
        assert "the protocol in run.json" in run._repr_html_() and "Run(" in repr(run)
