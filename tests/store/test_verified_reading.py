"""Whatever reads a run refuses a stored file that is not what was stored, in one line that names it; and heals what is
harmless."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kvpatch as kv
from kvpatch.cli import main as cli
from kvpatch.errors import KvpatchError, StoreError
from kvpatch.store import parts
from kvpatch.store.columns import TRIAL_SCHEMA
from kvpatch.store.directory import Store
from synthetic import dec7, record_of, write_run

READERS = ("verdicts", "report", "effects", "status", "Run")


class Said(NamedTuple):
    """Exit code, standard output, standard error; of `kv.Run`, 2 and its error where it raises one."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of phase 6, whose heads are watched, with two hypotheses. Not to be changed."""
    store = write_run(tmp_path_factory.mktemp("store") / "run", n=3, calibration=3, phases=["6"], heads=(2, 2))
    few = [h for h in dec7().hypotheses if h.phase == "6"][:2]
    protocol = dec7().model_copy(
        update={"hypotheses": few, "corrections": {}, "families": {}, "expected": {}, "plan": []}
    )
    store.write_record(record_of(protocol, store.read_record().planned_by_phase))
    return store.directory


@pytest.fixture
def directory(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Said]:
    """`read(reader, directory)`: what one of READERS says."""

    def call(reader: str, directory: Path) -> Said:
        if reader == "Run":
            try:
                return Said(0, kv.Run(directory).verdicts().to_csv(), "")
            except KvpatchError as error:
                return Said(2, "", f"kvpatch: {error}")
        monkeypatch.setattr(sys, "argv", ["kvpatch", reader, str(directory)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        own = printed.out.replace(str(directory), "DIR")  # the command that prints all names it
        return Said(int(stopped.value.code or 0), own, printed.err)

    monkeypatch.setenv("KVPATCH_DEBUG", "")
    monkeypatch.setenv("COLUMNS", "400")
    return call


def part_of(directory: Path, number: int = -1) -> Path:
    return sorted((directory / "trials").glob("*.parquet"))[number]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_a_value(path: Path) -> None:
    table = pq.read_table(path)
    values = table["mode_llr"].to_pylist()
    place = table.schema.get_field_index("mode_llr")
    changed = table.set_column(place, table.schema.field(place), pa.array([values[0] + 1.0, *values[1:]]))
    pq.write_table(changed, path, compression="zstd")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "byte flipped": flip,
    "replaced by another part": lambda path: shutil.copy(part_of(path.parents[1], 0), path),
    "rewritten with one changed value": change_a_value,
    "rewritten unchanged": lambda path: pq.write_table(pq.read_table(path), path),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_part_is_refused_by_its_name_with_the_way_on(directory, read, damage, reader):
    path = part_of(directory)
    DAMAGES[damage](path)
    assert_refused(read(reader, directory), f"trials/{path.name} is missing or damaged; delete its line")


@pytest.mark.parametrize("reader", ["report", "status", "Run"])
@pytest.mark.parametrize("damage", [d for d in DAMAGES if "changed value" not in d])
def test_damaged_attention_is_refused_wherever_it_is_read(directory, read, damage, reader):
    path = sorted((directory / "attention").glob("*.parquet"))[-1]
    DAMAGES[damage](path)
    assert_refused(read(reader, directory), f"attention/{path.name} is missing or damaged")


INDEX_DAMAGES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "JSON, but no object": (lambda lines: [lines[0], "[1, 2]", *lines[1:]], "line 2 names no stored part"),
    "JSON, but no entry": (lambda lines: [*lines, '{"name": "x"}'], "names no stored part (part: Field required"),
    "null at the end": (lambda lines: [*lines, "null"], "names no stored part"),
    "hash that is none": (lambda lines: [with_(lines[0], sha256="12"), *lines[1:]], "line 1 names no stored part"),
    "rows as text": (lambda lines: [with_(lines[0], rows="3"), *lines[1:]], "line 1 names no stored part (rows"),
    "other rows": (lambda lines: [with_(lines[0], rows=99), *lines[1:]], "rows, and 99 are recorded"),
    "torn in the middle": (lambda lines: [lines[0][:30], *lines[1:]], "line 1 names no stored part"),
    "names swapped": (
        lambda lines: [with_(a, part=json.loads(b)["part"]) for a, b in zip(lines, reversed(lines), strict=True)],
        "is missing or damaged",
    ),
    "named twice, differently": (lambda lines: [*lines, with_(lines[0], rows=1)], "again with another content"),
    "outside the run": (lambda lines: [with_(lines[0], part="../x.parquet"), *lines[1:]], "names no stored part (part"),
}  # fmt: skip


def with_(line: str, **changes: object) -> str:
    return json.dumps({**json.loads(line), **changes})


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_damaged_index_is_refused_with_its_line(directory, read, damage, reader):
    index = directory / "parts.jsonl"
    change, words = INDEX_DAMAGES[damage]
    index.write_text("\n".join(change(index.read_text().splitlines())) + "\n")
    assert_refused(read(reader, directory), words)


@pytest.mark.parametrize("reader", READERS)
def test_part_stored_under_two_names_is_refused(directory, read, reader):
    index, original = directory / "parts.jsonl", part_of(directory).name
    shutil.copy(part_of(directory), directory / "trials" / "copy.parquet")
    entry = next(e for e in map(json.loads, index.read_text().splitlines()) if e["part"] == original)
    copied = {key: entry[key] for key in ("rows", "sha256")} | {"part": "copy.parquet"}
    index.write_text(index.read_text() + json.dumps(copied) + "\n")
    assert_refused(read(reader, directory), f"copy.parquet holds the same trials as {original}")


def assert_refused(said: Said, *words: str) -> None:
    assert (said.code, said.out) == (2, ""), said
    assert said.err.startswith("kvpatch: ") and len(said.err.splitlines()) == 1, said.err
    for word in words:
        assert word in said.err


# What heals


@pytest.mark.parametrize("reader", ["verdicts", "status"])
@pytest.mark.parametrize("harmless", ["a line doubled", "a line torn at the end", "files of a killed process"])
def test_what_is_harmless_changes_no_answer(whole, directory, read, harmless, reader):
    index = directory / "parts.jsonl"
    if harmless == "a line doubled":
        index.write_text(index.read_text() + index.read_text().splitlines()[0] + "\n")
    elif harmless == "a line torn at the end":
        index.write_text(index.read_text() + '{"part": "6-0009.parquet", "rows": 1')
    else:
        (directory / "trials" / "6-0009.parquet").write_bytes(b"PAR1 half")
        (directory / "attention" / "6-0009.parquet").write_bytes(b"PAR1 half")
        (directory / "trials" / ".6-0010.parquet.tmp").touch()
    expected = read(reader, whole)
    assert expected.code == 0
    assert read(reader, directory) == expected


def test_part_whose_line_was_torn_is_not_stored_until_it_is_stored_again(directory):
    store = Store(directory)
    before, rows = store.parts(), store.read_part(store.parts()[-1].batch)
    text = store.index.read_text()
    store.index.write_text(text[:-40])
    assert store.parts() == before[:-1]
    assert store.read().num_rows == sum(part.rows for part in before[:-1])
    store.append(before[-1].batch, rows)
    assert [part.part for part in Store(directory).parts()] == [part.part for part in before]
    assert store.index.read_bytes().endswith(b"}\n")
    assert store.done() == {part.batch for part in before}


def test_what_a_later_version_wrote_into_a_line_stays_there(directory):
    store = Store(directory)
    lines = store.index.read_text().splitlines()
    store.index.write_text("\n".join([with_(lines[0], codec="zstd"), *lines[1:]]) + "\n")
    store.append("more", store.read_part(store.parts()[0].batch))
    assert json.loads(store.index.read_text().splitlines()[0])["codec"] == "zstd"


# Columns


def stored_with(directory: Path, change: Callable[[pa.Table], pa.Table]) -> Store:
    """The store, with its last part written by another version of kvpatch."""
    store = Store(directory)
    path = store.trials / store.parts()[-1].part
    pq.write_table(change(pq.read_table(path)), path)
    lines = store.index.read_text().splitlines()
    lines[-1] = with_(lines[-1], sha256=parts.hashlib.sha256(path.read_bytes()).hexdigest())
    store.index.write_text("\n".join(lines) + "\n")
    return store


def test_column_that_an_older_version_did_not_have_reads_as_null(directory):
    store = stored_with(directory, lambda table: table.drop_columns(["js_pull", "changes_fired"]))
    table = store.read()
    assert table.schema.equals(TRIAL_SCHEMA)
    rows = store.parts()[-1].rows
    assert table["js_pull"].null_count == rows
    assert store.done()


def test_column_of_a_later_version_is_left_unread(directory):
    store = stored_with(directory, lambda table: table.append_column("mood", pa.array(["good"] * len(table))))
    assert store.read().schema.equals(TRIAL_SCHEMA)
    assert store.rows_of(store.parts()[-1], None)["mood"].to_pylist()[0] == "good"


@pytest.mark.parametrize("kind", [pa.float32(), pa.null()])
def test_narrower_numbers_and_none_at_all_are_read_as_they_are_meant(directory, kind):
    def change(table: pa.Table) -> pa.Table:
        values = pa.array([0.5] * len(table), kind) if kind != pa.null() else pa.nulls(len(table))
        return table.set_column(table.schema.get_field_index("mode_llr"), "mode_llr", values)

    table = stored_with(directory, change).read()
    assert table.schema.field("mode_llr").type == pa.float64()
    assert table["mode_llr"].to_pylist()[-1] == (0.5 if kind != pa.null() else None)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("mode_llr", "text", "its column 'mode_llr' is string, and double is expected"),
        ("n_tokens", 2.5, "its column 'n_tokens' is double, and int32 is expected"),
        ("output_token_ids", "7", "its column 'output_token_ids' is string"),
    ],
)
def test_column_of_another_type_is_refused(directory, column, values, words):
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.schema.get_field_index(column), column, pa.array([values] * len(table)))

    with pytest.raises(StoreError, match=words):
        stored_with(directory, change).read(["trial_id"])


def test_part_without_the_columns_that_say_what_a_row_is_is_refused(directory):
    with pytest.raises(StoreError, match="it has no column 'pair_id'"):
        stored_with(directory, lambda table: table.drop_columns(["pair_id"])).read()


# What is remembered


def test_file_is_hashed_once_and_again_as_soon_as_it_changes(directory, monkeypatch):
    store = Store(directory)
    for path in directory.rglob("*.parquet"):
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(parts, "YOUNG", 0)
    hashed = []
    monkeypatch.setattr(parts.hashlib, "sha256", lambda data, real=parts.hashlib.sha256: hashed.append(1) or real(data))
    store.done()
    first = len(hashed)
    assert first == len(list(directory.rglob("*.parquet")))
    store.done()
    store.read()
    assert len(hashed) == first
    path = part_of(directory)
    flip(path)
    os.utime(path, (1e9, 1e9))  # the same time and size as before
    with pytest.raises(StoreError, match=path.name):
        store.read()


def test_file_that_was_just_written_is_not_remembered(directory):
    """Its times might not tell a change that comes right after."""
    path = part_of(directory)
    path.write_bytes(path.read_bytes())
    assert time.time_ns() - path.stat().st_mtime_ns < parts.YOUNG
    Store(directory).done()
    assert str(path) not in parts._checked


# What is no file


@pytest.mark.parametrize("file", ["part", "attention", "parts.jsonl", "run.json"])
@pytest.mark.parametrize("what", ["pipe", "device", "directory"])
def test_what_is_no_regular_file_is_refused_and_not_read_for_ever(directory, read, file, what):
    heads = sorted((directory / "attention").glob("*.parquet"))[0]
    path = {"part": part_of(directory), "attention": heads}.get(file, directory / file)
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    for reader in ("Run",) if file == "attention" else READERS:  # what needs no heads does not look at them
        said = read(reader, directory)
        assert said.code == 2 and said.err.count("\n") <= 1 and path.name in said.err, (reader, said)


def test_lock_that_is_a_pipe_is_not_waited_for(directory, read):
    (directory / ".lock").unlink(missing_ok=True)
    os.mkfifo(directory / ".lock")
    assert read("status", directory).code == 0


def test_index_longer_than_that_of_any_run_is_refused(directory, read, monkeypatch):
    monkeypatch.setattr(parts, "MOST_JSON", 100)
    said = read("status", directory)
    assert said.code == 2 and "parts.jsonl can't be read: it has more than 100 bytes" in said.err
