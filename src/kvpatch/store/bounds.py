"""How much memory a Parquet file would take, found before any of it is unpacked.

A few bytes can stand for a value that is repeated a thousand million times, or for pages of zeros. So a file may take
`LEAST` bytes, and `RATIO` times its own size beyond that: parts of real runs take 4 times their size, and those of what
small models' heads did 60 times. No part of a run may ever be refused here, so the bound is far from both. The sizes
that the end of the file names are not relied on: the pages' own headers are read, which are what a reader unpacks by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

LEAST, RATIO = 16 << 20, 1000
MOST_FILE = 2 << 30
"""Bytes of a part's file, which is read whole to be hashed."""
WIDTH = 12
"""Bytes that a value takes beside what is unpacked for it: a number, and its place in lists."""
DATA, INDEX, DICTIONARY, DATA_2 = 0, 1, 2, 3
"""Kinds of pages, and below the field of a page's header that holds what is said of such a page."""
OF_KIND = {DATA: 5, DICTIONARY: 7, DATA_2: 8}
ENCODING = {DATA: 2, DICTIONARY: 2, DATA_2: 4}
DELTA_BYTE_ARRAY = 7
"""An encoding in which each text repeats the beginning of the one before; kvpatch writes none."""
FIXED, TEXT = "FIXED_LEN_BYTE_ARRAY", "BYTE_ARRAY"


class TooLarge(ValueError):
    """A file would take more memory than a part of its size does; or what tells so can't be read."""


class Pages(NamedTuple):
    """The pages of one column: the bytes that they unpack to, those of a dictionary, and the values."""

    unpacked: int
    dictionary: int
    values: int


def refuse_large(file: pq.ParquetFile, data: bytes, filled: int) -> None:
    """Refuse a file whose rows would take more memory than those of a part do.

    Args:
        file: what `data` are the bytes of. filled: how many columns are made where it lacks them.
    Raises:
        TooLarge: saying how much they would take.
    """
    most, metadata = LEAST + RATIO * len(data), file.metadata
    _refuse_over(most, metadata.num_rows * WIDTH * max(filled, 1), len(data))
    taken, repeated, texts = 0, 0, list[str]()
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    for number in range(metadata.num_columns):
        column = file.schema.column(number)
        for group in groups:
            pages = _pages(data, group.column(number))
            width = max(column.length, 0) if column.physical_type == FIXED else 0
            taken += pages.unpacked + pages.values * (WIDTH + width)
            if column.physical_type == TEXT and pages.dictionary:
                repeated += pages.values * pages.dictionary  # were each value as long as the whole dictionary
                texts.append(column.path)
    _refuse_over(most, taken, len(data))
    if taken + repeated > most:
        _refuse_over(most, taken + _repeated(data, list(dict.fromkeys(texts))), len(data))


def _refuse_over(most: int, taken: int, size: int) -> None:
    if taken > most:
        raise TooLarge(f"it has {size:,} bytes and would take {taken:,} in memory, where at most {most:,} are expected")


def _repeated(data: bytes, paths: Sequence[str]) -> int:
    """Bytes of the texts of these columns, each as often as it stands there."""
    names = [path.split(".")[0] for path in paths]
    if names != list(paths):
        raise TooLarge(f"texts within {names[0]!r} are packed as no part's are")
    table = pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(paths)).read(names, use_threads=False)
    total = 0
    for column in table.columns:
        for chunk in column.chunks:
            if not isinstance(chunk, pa.DictionaryArray):
                total += chunk.nbytes
                continue
            lengths = pc.call_function("binary_length", [chunk.dictionary]).cast(pa.int64())
            total += pc.call_function("sum", [lengths.take(chunk.indices)]).as_py() or 0
    return total


def _pages(data: bytes, chunk: pq.ColumnChunkMetaData) -> Pages:
    """What the headers of a column's pages say of them.

    Raises:
        TooLarge: where they can't be read, or do not agree with the end of the file.
    """
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    at, end = start, start + chunk.total_compressed_size
    unpacked = dictionary = values = 0
    try:
        if not 0 <= start <= end <= len(data):
            raise ValueError
        while values < chunk.num_values:
            header, at = _struct(data, at)
            kind, size, packed = header[1], header[2], header[3]
            if not (isinstance(kind, int) and isinstance(size, int) and isinstance(packed, int)):
                raise ValueError
            at += packed
            if size < 0 or packed < 0 or at > end:
                raise ValueError
            unpacked += size
            if kind not in OF_KIND:
                continue  # of a kind that readers pass over
            about = header[OF_KIND[kind]]
            if not isinstance(about, dict):
                raise ValueError
            count, encoding = about[1], about[ENCODING[kind]]
            if not isinstance(count, int) or count < 0 or encoding == DELTA_BYTE_ARRAY:
                raise ValueError
            if kind == DICTIONARY:
                dictionary += size
                unpacked += count * WIDTH
            else:
                values += count
        if values != chunk.num_values:
            raise ValueError
    except (ValueError, KeyError, IndexError, RecursionError):
        raise TooLarge(f"the pages of its column {chunk.path_in_schema!r} are not as a part's are") from None
    return Pages(unpacked, dictionary, values)


Value = int | dict[int, "Value"] | None
BYTE, DOUBLE, BINARY, STRUCT = 3, 7, 8, 12
INTEGERS = (4, 5, 6)


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Value], int]:
    """A structure in Thrift's compact protocol, and where it ends. Its fields must ascend, so that none counts twice.

    Raises:
        ValueError, IndexError: where it is none, or has what no page's header has.
    """
    found: dict[int, Value] = {}
    field = 0
    while head := data[at]:
        at += 1
        step, kind = head >> 4, head & 15
        if not step or depth > 4:
            raise ValueError
        field += step
        if kind in INTEGERS:
            raw, at = _varint(data, at)
            found[field] = (raw >> 1) ^ -(raw & 1)
        elif kind == BINARY:
            length, at = _varint(data, at)
            at += length
        elif kind == STRUCT:
            found[field], at = _struct(data, at, depth + 1)
        elif kind in (BYTE, DOUBLE):
            at += 1 if kind == BYTE else 8
        elif kind not in (1, 2):  # true and false have no content
            raise ValueError
    return found, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError
