"""The run directory: what is written is read back, damage is named, and nothing stored is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kvpatch import files as shared_files
from kvpatch.errors import StoreError
from kvpatch.store import directory as store_room
from kvpatch.store.columns import ATTENTION_COLUMNS, ATTENTION_SCHEMA, TRIAL_COLUMNS, TRIAL_SCHEMA
from kvpatch.store.directory import Store
from kvpatch.store.record import ModelRecord, OtherModel, RunRecord

DESIGN_COLUMNS = """
    trial_id phase condition pair_id source_id target_id sample seed patch source_token_ids target_token_ids
    output_token_ids output_logprobs text stopped n_tokens recursive_score recursive_score_masked rv_prompt rv_output
    nll_own nll_target mode_llr content_llr js_pull repetition coherent cache_checksum_before cache_checksum_after
    equals_text n_slots_patched error
""".split()

MODEL = ModelRecord(
    name="tiny",
    architecture="Llama",
    layers=4,
    kv_heads=2,
    query_heads=4,
    head_dim=16,
    dtype="float32",
    device="cpu",
    weights_sha256="w",
    tokenizer_sha256="t",
    template_sha256=None,
)
RECORD = RunRecord(
    kvpatch_version="0",
    protocol={"protocol": "p", "phases": {"1": {"n": 9}}},
    protocol_sha256="p",
    bank_sha256="b",
    model=MODEL,
    seed=0,
    n=None,
    phases=["1"],
    planned_by_phase={"1": 4},
    versions={},
    git={},
    hardware={},
    command=[],
    created="2025-12-07T00:00:00+00:00",
)


def row(i: int) -> dict[str, Any]:
    """A full row."""
    return {
        **{name: None for name in TRIAL_COLUMNS},
        "trial_id": f"id-{i}",
        "condition": "C",
        "sample": i,
        "seed": 2**62 + i,
        "output_token_ids": [i, 2, 3],
        "output_logprobs": [-0.5, -0.25, -0.125],
        "text": "Zürich, 東京 \n🙂",
        "recursive_score": 0.1 + i,
        "rv_own": float("nan"),
        "coherent": i % 2 == 0,
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with a record and two parts of two rows."""
    out = Store(tmp_path / "run")
    with out.locked():
        out.write_record(RECORD)
        out.append("first", [row(0), row(1)])
        out.append("second", [row(2), row(3)])
    return out


def ids(store: Store) -> list[str]:
    return store.read().column("trial_id").to_pylist()


def files(store: Store) -> set[str]:
    return {str(path.relative_to(store.directory)) for path in store.directory.rglob("*") if path.is_file()}


def test_rows_come_back_as_they_were(store):
    assert repr(store.read().to_pylist()) == repr([row(i) for i in range(4)])
    assert store.read().schema.equals(TRIAL_SCHEMA)
    assert store.done() == {"first", "second"}


def test_record_comes_back_as_it_was(store):
    assert store.read_record() == RECORD


def test_part_stored_again_takes_the_place_of_the_first(store):
    store.append("first", [row(7)])
    assert sorted(ids(store)) == ["id-2", "id-3", "id-7"]


def test_nothing_but_the_run_lies_in_the_directory(store):
    assert files(store) == {".lock", "run.json", "parts.jsonl", "trials/first.parquet", "trials/second.parquet"}


def test_every_column_of_the_design_is_there_and_documented(store):
    assert set(DESIGN_COLUMNS) <= TRIAL_COLUMNS.keys()
    import pyarrow.parquet as pq

    stored = pq.read_schema(store.trials / "first.parquet")
    for name, (kind, about) in TRIAL_COLUMNS.items():
        assert len(about) > 5
        assert stored.field(name).type == kind
        assert stored.field(name).metadata[b"doc"].decode() == about


def test_design_s_column_list_is_the_one_tested_here():
    design = Path(__file__).parents[2] / "shared" / "DESIGN.md"
    if not design.exists():
        pytest.skip("DESIGN.md is not beside this checkout")
    listed = re.search(r"Trial columns, at least: (.*?)\.\n\n", design.read_text(), re.DOTALL)
    assert listed is not None
    assert re.findall(r"`(\w+)`", listed[1]) == DESIGN_COLUMNS


READERS = {
    "duckdb": "import duckdb; rows = duckdb.sql(f\"select * from '{d}/trials/*.parquet'\").df().to_dict('records')",
    "polars": "import polars; rows = polars.read_parquet(f'{d}/trials/*.parquet').to_dicts()",
    "pandas": "import pandas, pathlib; rows = pandas.concat("
    "pandas.read_parquet(p) for p in pathlib.Path(d, 'trials').glob('*.parquet')).to_dict('records')",
}


@pytest.mark.parametrize("reader", READERS)
def test_trials_can_be_read_without_kvpatch(store, reader):
    code = (
        "import sys; sys.modules['kvpatch'] = None; d = sys.argv[1]\n"
        f"{READERS[reader]}\n"
        "rows.sort(key=lambda r: r['trial_id'])\n"
        "import json; print(json.dumps([[r['trial_id'], r['text'], list(map(int, r['output_token_ids'])), "
        "r['recursive_score']] for r in rows]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store.directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [[r["trial_id"], r["text"], r["output_token_ids"], r["recursive_score"]] for r in map(row, range(4))]
    assert json.loads(done.stdout) == expected


# The heads that go with a part


def heads(value: float = 0.5) -> pa.Table:
    """A table of heads of one trial."""
    content = {"trial_id": "id-8", "stage": "own", "layer": 1, "head": 2, "queries": 3}
    content |= {"induction": None, "by_slot": [value, value / 2]}
    content |= {name: value for name in ATTENTION_COLUMNS if name not in content}
    return pa.Table.from_pylist([content], schema=ATTENTION_SCHEMA)


def test_heads_come_back_as_they_were_and_those_of_parts_without_are_none(store):
    assert store.read_attention().num_rows == 0
    store.append("third", [row(8)], heads())
    assert store.read_attention().equals(heads())
    assert store.done() == {"first", "second", "third"}
    assert "attention/third.parquet" in files(store)


def test_heads_can_be_read_and_joined_without_kvpatch(store):
    import duckdb

    store.append("third", [row(8)], heads())
    found = duckdb.sql(
        f"select condition, layer, avg(entropy) from '{store.directory}/attention/*.parquet' "
        f"join '{store.directory}/trials/*.parquet' using (trial_id) group by all"
    ).fetchall()
    assert found == [("C", 1, 0.5)]


def test_every_column_of_the_heads_is_documented():
    for name, (kind, about) in ATTENTION_COLUMNS.items():
        assert len(about) > 5
        assert ATTENTION_SCHEMA.field(name).type == kind


@pytest.mark.parametrize("call", [1, 2, 3])
def test_part_with_heads_killed_at_any_write_counts_for_nothing_and_is_written_again(store, monkeypatch, call):
    calls = []

    def killed(old, new):
        calls.append(new)
        if len(calls) == call:
            raise Killed
        replace(old, new)

    replace = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        store.append("third", [row(8)], heads(0.1))
    monkeypatch.undo()
    assert store.done() == {"first", "second"}
    assert store.read_attention().num_rows == 0
    store.append("third", [row(8)], heads(0.7))
    assert store.done() == {"first", "second", "third"}
    assert store.read_attention().equals(heads(0.7))


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_damaged_heads_are_named(store, damage):
    store.append("third", [row(8)], heads())
    path = store.attention / "third.parquet"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = data[:40] + bytes([data[40] ^ 1]) + data[41:]
        path.write_bytes({"truncated": data[: len(data) // 2], "flipped": flipped}[damage])
    with pytest.raises(StoreError, match=r"attention/third\.parquet is missing or damaged"):
        store.done()


# Broken off


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs that a killed process would not run."""


def test_data_is_written_before_the_index(store, monkeypatch):
    """Killed between the two, the part is not counted; the next run writes it again."""
    write_whole = store_room.write_whole

    def killed_at_the_index(path, data, **settings):
        if path.name == "parts.jsonl":
            raise Killed
        write_whole(path, data, **settings)

    monkeypatch.setattr(store_room, "write_whole", killed_at_the_index)
    with pytest.raises(Killed):
        store.append("third", [row(8)])
    monkeypatch.undo()
    assert (store.trials / "third.parquet").exists()
    assert store.done() == {"first", "second"}
    assert ids(store) == [f"id-{i}" for i in range(4)]
    store.append("third", [row(8)])
    assert store.done() == {"first", "second", "third"}
    assert ids(store)[-1] == "id-8"


@pytest.mark.parametrize("call", [1, 2])
def test_part_killed_while_it_is_moved_into_place_is_not_counted(store, monkeypatch, call):
    calls = []

    def killed(old, new):
        calls.append(new)
        if len(calls) == call:
            raise Killed
        replace(old, new)

    replace = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        store.append("third", [row(8)])
    monkeypatch.undo()
    assert ids(store) == [f"id-{i}" for i in range(4)]
    assert store.done() == {"first", "second"}


def test_leftovers_of_a_killed_write_are_in_nobody_s_way(store):
    for number in ("", "0a1b2c3d."):  # as an older version named it, and as this one does
        (store.trials / f".third.parquet.{number}tmp").write_bytes(b"PAR1 half")
        (store.directory / f".parts.jsonl.{number}tmp").write_text('{"part": "th')
    assert ids(store) == [f"id-{i}" for i in range(4)]
    store.append("third", [row(8)])
    assert store.done() == {"first", "second", "third"}
    assert not [name for name in files(store) if name.endswith("tmp")]


def test_directory_of_a_run_killed_while_it_wrote_its_record_is_taken_up_again(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / ".lock").touch()
    (directory / ".run.json.0a1b2c3d.tmp").write_text('{"kvpatch_ver')
    with Store(directory).locked():
        Store(directory).write_record(RECORD)
    assert Store(directory).read_record() == RECORD


# Damaged


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "missing"])
def test_damaged_part_is_named(store, damage):
    part = store.trials / "second.parquet"
    data = part.read_bytes()
    if damage == "missing":
        part.unlink()
    else:
        flipped = data[:40] + bytes([data[40] ^ 1]) + data[41:]
        part.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "flipped": flipped}[damage])
    with pytest.raises(StoreError, match=r"second\.parquet is missing or damaged; delete its line") as raised:
        store.done()
    assert "\n" not in str(raised.value)
    if damage != "flipped":
        with pytest.raises(StoreError, match=r"second\.parquet can't be read"):
            store.read()


def test_part_whose_line_was_deleted_is_run_again(store):
    lines = store.index.read_text().splitlines()
    (store.trials / "second.parquet").write_bytes(b"rubbish")
    store.index.write_text(lines[0] + "\n")
    assert store.done() == {"first"}
    assert ids(store) == ["id-0", "id-1"]


@pytest.mark.parametrize(
    ("name", "content"), [("parts.jsonl", '{"part": "fir'), ("run.json", "{}"), ("run.json", "not JSON")]
)
def test_damaged_index_or_record_is_named(store, name, content):
    (store.directory / name).write_text(content)
    with pytest.raises(StoreError, match=re.escape(name)) as raised:
        store.done() if name == "parts.jsonl" else store.read_record()
    assert "\n" not in str(raised.value)


# Not ours, not free, not writable


def test_directory_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="holds other files"), Store(tmp_path).locked():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(StoreError, match="is not a run directory"):
        Store(tmp_path / "nowhere").read_record()
    with pytest.raises(StoreError, match="holds no trials yet"):
        Store(tmp_path / "nowhere").read()


def test_second_process_is_refused_and_the_first_goes_on(store):
    code = (
        "import sys\nfrom kvpatch.store.directory import Store\n"
        "with Store(sys.argv[1]).locked():\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(store.directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match="in use by another kvpatch process"), store.locked():
            pass
        assert ids(store) == [f"id-{i}" for i in range(4)]  # reading needs no lock
        holder.kill()
    with store.locked():  # the lock dies with its holder
        store.append("third", [row(8)])


def test_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(StoreError, match="can't be written: Not a directory"),
        Store(tmp_path / "file" / "run").locked(),
    ):
        pass


@contextmanager
def failing_writes(monkeypatch: pytest.MonkeyPatch, code: int) -> Iterator[None]:
    """Every file opened for writing fails as on a full or read-only disk."""

    def refusing(path, mode="r", *args, **kwargs):
        if "w" in mode:
            raise OSError(code, os.strerror(code), str(path))
        return open(path, mode, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(shared_files, "open", refusing, raising=False)
        yield


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")])
def test_disk_that_takes_no_more_loses_nothing(store, monkeypatch, code, words):
    before = {name: (store.directory / name).read_bytes() for name in files(store)}
    with failing_writes(monkeypatch, code):
        for write in (lambda: store.append("third", [row(8)]), lambda: store.write_text("verdicts.json", "[]")):
            with pytest.raises(StoreError, match=f"{words}.*; what was stored is kept"):
                write()
    assert {name: (store.directory / name).read_bytes() for name in files(store)} == before


def test_read_only_directory_can_t_be_made(tmp_path, monkeypatch):
    def refusing(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(StoreError, match="can't be written: Read-only file system"), Store(tmp_path / "run").locked():
        pass


@pytest.fixture
def tiny_disk() -> Iterator[Path]:
    """A file system of 256 kB, mounted for the test."""
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
        if made.returncode:
            pytest.skip(f"mounting is not permitted here: {made.stderr.decode().strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def test_full_disk_is_named_and_what_was_stored_is_kept(tiny_disk):
    store = Store(tiny_disk / "run")
    stored = []

    def fill() -> None:
        for i in range(100):
            noise = hashlib.shake_256(str(i).encode()).hexdigest(10_000)
            store.append(f"part-{i}", [row(i) | {"text": noise}])
            stored.append(i)

    with store.locked():
        store.write_record(RECORD)
        with pytest.raises(StoreError, match="No space left on device; what was stored is kept"):
            fill()
        assert len(stored) > 3
        assert ids(store) == [f"id-{i}" for i in stored]
        assert store.done() == {f"part-{i}" for i in stored}
        assert store.read_record() == RECORD
        assert not [name for name in files(store) if name.endswith(".tmp")]  # the half-written part gave its room back


def test_read_only_disk_is_named(tiny_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StoreError, match="can't be written: Read-only file system"), Store(tiny_disk / "run").locked():
        pass


# Which run a directory belongs to


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol_sha256": "q"}, "another protocol"),
        ({"bank_sha256": "c"}, "another prompt bank"),
        ({"seed": 1}, "seed 0"),
        ({"n": 7}, "n=as planned"),
        ({"model": MODEL.model_copy(update={"weights_sha256": "v"})}, "another model .weights"),
        ({"model": MODEL.model_copy(update={"tokenizer_sha256": "v"})}, "another model .tokenizer"),
        ({"model": MODEL.model_copy(update={"template_sha256": "v"})}, "another model .template"),
        ({"model": MODEL.model_copy(update={"dtype": "bfloat16"})}, "another model .dtype"),
        ({"model": MODEL.model_copy(update={"device": "cuda"})}, "another model .device"),
    ],
)
def test_another_run_is_told_apart_from_the_stored_one(change, words):
    assert re.search(words, str(RECORD.model_copy(update=change).differs_from(RECORD)))


def with_scaffolds(own: str | None, other: str | None) -> RunRecord:
    """The record of a run of two models whose templates wrote these texts around the words."""
    first, second = (MODEL.model_copy(update={"scaffold_sha256": sha256}) for sha256 in (own, other))
    return RECORD.model_copy(update={"model": first, "other_models": {"big": OtherModel(model=second)}})


@pytest.mark.parametrize("now", [("b", "a"), ("a", "b")])
def test_a_run_whose_template_writes_another_text_than_before_is_told_apart(now):
    with pytest.raises(StoreError, match=r"renders other words around the prompt than when the run began") as raised:
        with_scaffolds(*now).continued(with_scaffolds("a", "a"))
    assert "it writes the date?" in str(raised.value) and "\n" not in str(raised.value)


def test_a_record_that_holds_no_scaffold_is_not_compared_by_it():
    assert with_scaffolds("a", "a").differs_from(with_scaffolds("a", "a")) is None
    assert with_scaffolds("a", "a").differs_from(with_scaffolds(None, None)) is None
    content = RECORD.model_dump()
    del content["model"]["scaffold_sha256"]
    assert RunRecord.model_validate(content) == RECORD


def test_what_does_not_make_a_run_is_no_difference():
    later = {
        "created": "later",
        "kvpatch_version": "9",
        "command": ["x"],
        "phases": ["2"],
        "planned_by_phase": {"2": 9},
    }
    named = MODEL.model_copy(update={"name": "/elsewhere/tiny"})
    assert RECORD.differs_from(RECORD.model_copy(update=later | {"model": named})) is None
