"""A part that would take far more memory than its size says is refused before it is unpacked, whoever made its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvpatch.errors import StoreError
from kvpatch.store import bounds, parts
from kvpatch.store.directory import Store
from kvpatch.store.repair import repair
from synthetic import write_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_run(tmp_path / "run", n=3, calibration=3, phases=["6"])


def with_content(store: Store, change: Callable[[Path], None]) -> Path:
    """The file of the last part, changed, and recorded as it then is."""
    path = store.trials / store.parts()[-1].part
    change(path)
    lines = [json.loads(line) for line in store.index.read_text().splitlines()]
    lines[-1] |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "rows": pq.read_metadata(path).num_rows}
    store.index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rewritten(change: Callable[[pa.Table], pa.Table], **settings: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pq.write_table(change(pq.read_table(path)), path, **{"compression": "zstd", **settings})

    return write


def with_column(name: str, values: Callable[[int], pa.Array]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, values(len(table)))


def many_rows(table: pa.Table) -> pa.Table:
    few = table.select(["trial_id", "phase", "condition", "pair_id"]).slice(0, 1)
    return few.take(pa.array([0] * 2_000_000))


def long_texts(rows: int) -> pa.Array:
    """One text of twenty megabytes, which every row has: packed, it stands there once."""
    return pa.array(["a" * 20_000_000] * rows)


def one_long_text(rows: int) -> pa.Array:
    return pa.array(["a" * 300_000_000, *[None] * (rows - 1)])


def long_list(rows: int) -> pa.Array:
    return pa.array([[7] * 30_000_000, *[None] * (rows - 1)], pa.list_(pa.int32()))


def texts_that_begin_alike(rows: int) -> pa.Array:
    return pa.array(["a" * 4_000_000 + str(row) for row in range(rows)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rewritten(many_rows), "would take"),
        (rewritten(with_column("text", long_texts)), "would take"),
        (rewritten(with_column("text", one_long_text), use_dictionary=False), "would take"),
        (rewritten(with_column("output_token_ids", long_list)), "would take"),
        (
            rewritten(
                with_column("text", texts_that_begin_alike),
                use_dictionary=False,
                column_encoding={"text": "DELTA_BYTE_ARRAY"},
            ),
            "the pages of its column 'text' are not as a part's are",
        ),
    ],
    ids=["rows", "repeated text", "long text", "long list", "common beginnings"],
)
def test_part_that_unpacks_to_far_more_than_its_size_is_refused_in_one_line(store, change, words):
    path = with_content(store, change)
    assert path.stat().st_size < 200_000
    before = pa.total_allocated_bytes()
    for read in (store.done, store.read, lambda: store.read_part(path.stem)):
        with pytest.raises(StoreError, match=words) as refused:
            read()
        assert path.name in str(refused.value) and "\n" not in str(refused.value)
    assert pa.total_allocated_bytes() - before < 1 << 20
    assert path.name in str(repair(store).set_aside)
    store.done()


def test_page_that_says_another_size_than_the_end_of_the_file_is_refused(store):
    """The end of the file still says the true size."""

    def change(path: Path) -> None:
        rewritten(with_column("text", lambda rows: pa.array(["b" * 1_200_000] * rows)), use_dictionary=False)(path)
        data = bytearray(path.read_bytes())
        number = pq.read_schema(path).get_field_index("text")
        at = pq.read_metadata(path).row_group(0).column(number).data_page_offset
        assert data[at : at + 3] == b"\x15\x00\x15" and data[at + 6] < 128  # a page of data, and its size in four bytes
        data[at + 3 : at + 7] = b"\xfe\xff\xff\x7f"
        path.write_bytes(data)

    path = with_content(store, change)
    with pytest.raises(StoreError, match="would take"):
        store.read()
    assert path.stat().st_size < 200_000


def test_text_that_many_rows_share_is_counted_as_often_as_it_stands_there(store, monkeypatch):
    """And not as if each were as long as all that differ."""
    monkeypatch.setattr(bounds, "LEAST", 1 << 19)
    long = ["c" * 2_000, *(str(i) for i in range(30))]
    texts = lambda rows: pa.array([long[row % 31] for row in range(rows)])  # noqa: E731
    path = with_content(store, rewritten(with_column("text", texts)))
    counted: list[int] = []
    monkeypatch.setattr(bounds, "RATIO", 0)
    monkeypatch.setattr(bounds, "_refuse_over", lambda most, taken, size: counted.append(taken))
    monkeypatch.setattr(bounds, "LEAST", 0)
    with parts.pq.ParquetFile(path) as file:
        bounds.refuse_large(file, path.read_bytes(), 1)
    table = pq.read_table(path)
    exact = sum(len(value or "") for name in table.column_names if table[name].type == pa.string()
                for value in table[name].to_pylist())  # fmt: skip
    assert exact <= counted[-1] - counted[-2] <= exact + 8 * len(table) * len(table.column_names)


def test_file_longer_than_any_part_is_refused_unread(store, monkeypatch):
    monkeypatch.setattr(parts, "MOST_FILE", 100)
    with pytest.raises(StoreError, match=r"and no part has more than 100"):
        store.done()


def test_pages_that_can_not_be_followed_are_refused(store):
    """A field that stands twice would let the first count here and the last where it is unpacked."""
    for header in (b"\x15\x00\x05\x02\x02", b"\x15" + b"\xff" * 12, b"\x1c" * 8 + b"\x00" * 9, b"\x19\x00\x00"):
        with pytest.raises((ValueError, IndexError)):
            bounds._struct(header, 0)
