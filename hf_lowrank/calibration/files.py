"""Read files of plain text and files of rows, packed or not."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from ..execution.files import one_line
from ..runtime.errors import CompressionError

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""Separates the documents of a text file."""

TEXT_COLUMNS = ("text", "messages")
"""Columns of rows that hold a text or a chat. The first one that a row has is read."""

ROWS_AT_ONCE = 100
"""Number of rows of a binary table that are in memory at a time."""

LARGEST_FIELD = 2**31 - 1
"""Maximum length of a field of CSV, in characters. The module `csv` allows 131072 by default, less than a book has."""

BINARY_SIGN_RANGE = 8192
"""Number of characters of a file in which a NUL says that it is not text, as it does for `git` and `grep`."""

WHITE_SPACE = re.compile(r"\s*")

UNREADABLE = (OSError, EOFError, ValueError, RecursionError, csv.Error, lzma.LZMAError, zlib.error, zipfile.BadZipFile)
"""What the readers below raise for a damaged file. Errors of Unicode, JSON and Arrow are ValueErrors or OSErrors."""


def read_file(path: Path) -> Iterator[Any]:
    """Yield the documents of a text file, or the rows of a file of rows.

    The last suffix says what a file is (`ROW_READERS`), after one of a packer (`OPENERS`). Case does not matter, and a
    byte order mark is dropped. A file with any other suffix is plain text, cut at its document separators.

    Raises:
        CompressionError: if the file is damaged, or is neither text nor rows.
    """
    reader = ROW_READERS.get(_suffix(path))
    if reader is None:
        yield from _plain_documents(path)
        return
    number = 0
    try:
        with _opened(path) as stream:
            for row in reader(stream):
                number += 1
                yield row
    except UNREADABLE as error:
        form = _suffix(path).removeprefix(".")
        raise CompressionError(
            f"{path}: cannot be read as rows of {form}, from row {number + 1} on ({one_line(error)})"
        ) from error


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file of UTF-8 text, packed or not, without its byte order mark."""
    with _opened(path) as stream:
        yield _as_text(stream, newline)


def _suffix(path: Path) -> str:
    """Return the last suffix in lower case, without that of a packer."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacked."""
    with OPENERS.get(path.suffix.lower(), partial(open, mode="rb"))(path) as stream:
        yield cast(BinaryIO, stream)


def _open_by_arrow(path: Path, compression: str) -> BinaryIO:
    import pyarrow

    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression=compression)))


@contextmanager
def _open_zip(path: Path) -> Iterator[BinaryIO]:
    """Open the only file of an archive."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if len(names) != 1:
            raise ValueError(f"{len(names)} files in one archive, expected one")
        with archive.open(names[0]) as stream:
            yield cast(BinaryIO, io.BufferedReader(stream))


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": partial(_open_by_arrow, compression="zstd"),
    ".zstd": partial(_open_by_arrow, compression="zstd"),
    ".lz4": partial(_open_by_arrow, compression="lz4"),
    ".zip": _open_zip,
}
"""Functions that open a packed file for reading bytes, by suffix."""


def _as_text(stream: BinaryIO, newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)  # "sig": without a byte order mark


def _plain_documents(path: Path) -> list[str]:
    """Return the documents of a text file."""
    try:
        with open_text(path) as stream:
            text = stream.read()
    except UNREADABLE as error:
        raise CompressionError(f"{path}: cannot be read as UTF-8 text ({one_line(error)})") from error
    if "\0" in text[:BINARY_SIGN_RANGE]:
        raise CompressionError(
            f"{path}: cannot be read as UTF-8 text (it is a binary file); give plain text or one of "
            f"{', '.join(ROW_READERS)}"
        )
    if _is_json_rows(text):
        raise CompressionError(f"{path}: holds rows of JSON, not plain text; give it a name that ends in .jsonl")
    if DOCUMENT_SEPARATOR not in text:  # one document, whose white space is part of it
        return [text]
    return [document.strip() for document in text.split(DOCUMENT_SEPARATOR)]


def _is_json_rows(text: str) -> bool:
    """Return whether the first two lines that are not blank (or the only one) are objects of JSON."""
    lines = list(itertools.islice(filter(str.strip, io.StringIO(text)), 2))
    try:
        return bool(lines) and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def _json_rows(stream: BinaryIO) -> Iterator[Any]:
    """Yield the values that stand one on each line, or else one after the other. A list is taken for its elements."""
    lines = _as_text(stream)
    first = next(filter(str.strip, lines), "")
    try:
        one_per_line = not first or not isinstance(json.loads(first), list)
    except ValueError:  # a value that goes over several lines
        one_per_line = False
    if one_per_line:
        yield from map(json.loads, filter(str.strip, itertools.chain([first], lines)))
        return
    text = (first + lines.read()).strip()
    decoder = json.JSONDecoder()
    position = 0
    while position < len(text):
        value, end = decoder.raw_decode(text, position)
        yield from value if isinstance(value, list) else [value]
        position = WHITE_SPACE.match(text, end).end()  # type: ignore[union-attr]  # it matches everywhere


def _csv_rows(stream: BinaryIO, delimiter: str) -> Iterator[dict[str, str]]:
    """Yield the rows by the names in the first one. Every field is a text, whatever it looks like."""
    rows = csv.DictReader(_as_text(stream, newline=""), delimiter=delimiter, strict=True)
    while True:
        # The limit is the whole program's, so it is put back after every row.
        limit = csv.field_size_limit(LARGEST_FIELD)
        try:
            row = next(rows, None)
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        if None in row:  # where `csv` puts the fields that have no name
            raise ValueError(f"{len(row) - 1 + len(row[None])} fields, but the first row names {len(row) - 1}")
        yield row


def _parquet_rows(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(_seekable(stream))
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=_needed_columns(file.schema_arrow.names)):
        yield from batch.to_pylist()


def _arrow_rows(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowInvalid, ipc

    stream = _seekable(stream)
    try:  # the format that can be read in any order
        file = ipc.open_file(stream)
        batches = map(file.get_batch, range(file.num_record_batches))
        names = file.schema.names
    except ArrowInvalid:  # the one that can be read in one order only, which `datasets` writes
        stream.seek(0)
        batches = ipc.open_stream(stream)
        names = batches.schema.names
    columns = _needed_columns(names) or names
    for batch in batches:
        for first in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield from batch.select(columns).slice(first, ROWS_AT_ONCE).to_pylist()


def _seekable(stream: BinaryIO) -> BinaryIO:
    """Return a stream that can be read in any order. What is packed has to be unpacked as a whole for that."""
    return stream if isinstance(stream, io.BufferedReader) and stream.seekable() else io.BytesIO(stream.read())


def _needed_columns(names: list[str]) -> list[str] | None:
    """Return the columns that hold text, or None for all."""
    # Other columns may be pictures, which take time and memory. Token ids come with columns of any names.
    if "input_ids" in names:
        return None
    return [name for name in names if name in TEXT_COLUMNS] or None


ROW_READERS: dict[str, Callable[[BinaryIO], Iterator[Any]]] = {
    ".jsonl": _json_rows,
    ".jsonlines": _json_rows,
    ".jl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
    ".pq": _parquet_rows,
    ".arrow": _arrow_rows,
    ".feather": _arrow_rows,
}
"""Functions that yield the rows of an opened file, by suffix."""
