"""Rows are the same in every format, packed by anything, in any case; what cannot be read is one clear line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset
from pyarrow import ipc, parquet

from hf_lowrank import CompressionError
from hf_lowrank.calibration.files import LARGEST_FIELD, OPENERS, ROW_READERS, read_file

ROWS = [
    {"text": 'Two\nlines, "quoted", and a\ttab.', "url": "https://example.org/1"},
    {"text": "", "url": "https://example.org/2"},
    {"text": "NA", "url": "null"},
    {"text": "007", "url": "1e5"},
    {"text": "Füße auf \u2028 dem Eis", "url": "é"},
    {"text": "long " * 30_000, "url": ""},
]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def separated(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*rows[0]], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def as_arrow(rows: list[dict[str, Any]], new: Callable[..., Any] = ipc.new_stream) -> bytes:
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def by_arrow(data: bytes, compression: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, compression) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def zstandard(data: bytes) -> bytes:
    return by_arrow(data, "zstd")


def zipped(*files: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", b"")  # the folder itself
        for number, data in enumerate(files):
            archive.writestr(f"folder/{number}", data)
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": json_lines,
    ".jsonlines": json_lines,
    ".jl": json_lines,
    ".ndjson": json_lines,
    ".json": json_lines,
    ".csv": lambda rows: separated(rows, ","),
    ".tsv": lambda rows: separated(rows, "\t"),
    ".parquet": as_parquet,
    ".pq": as_parquet,
    ".arrow": as_arrow,
    ".feather": partial(as_arrow, new=ipc.new_file),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
    ".zstd": zstandard,
    ".lz4": lambda data: by_arrow(data, "lz4"),
    ".zip": zipped,
}


def texts(path: Path, content: bytes) -> list[Any]:
    path.write_bytes(content)
    return [row["text"] for row in read_file(path)]


def test_every_format_and_packer_is_tried() -> None:
    assert WRITERS.keys() == ROW_READERS.keys()
    assert PACKERS.keys() - {""} == OPENERS.keys()


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_are_the_same_in_every_format(tmp_path: Path, suffix: str, packer: str) -> None:
    content = WRITERS[suffix](ROWS)
    expected = [row["text"] for row in ROWS]
    name = f"rows{suffix}{packer}"
    assert texts(tmp_path / name, PACKERS[packer](content)) == expected
    assert texts(tmp_path / f"a[1] * {name.upper()}", PACKERS[packer](content)) == expected
    if suffix not in (".parquet", ".pq", ".arrow", ".feather"):
        assert texts(tmp_path / name, PACKERS[packer](BYTE_ORDER_MARK + content)) == expected


@pytest.mark.parametrize("packer", PACKERS)
def test_plain_text_keeps_everything_but_its_byte_order_mark(tmp_path: Path, packer: str) -> None:
    for name in ("text.txt", "TEXT.MD", "text"):
        path = tmp_path / f"{name}{packer}"
        path.write_bytes(PACKERS[packer](BYTE_ORDER_MARK + b' {"text": 1}\n\n[] '))
        assert list(read_file(path)) == [' {"text": 1}\n\n[] ']


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n\n" + "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n\r\n",
    ],
    ids=["list", "indented list", "indented rows", "rows of Windows"],
)
def test_json_is_read_however_it_is_laid_out(tmp_path: Path, content: str) -> None:
    assert texts(tmp_path / "rows.json", content.encode()) == [row["text"] for row in ROWS]


def test_both_formats_of_arrow_are_read_and_no_other_column_than_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    path.write_bytes(as_arrow(ROWS * 50, ipc.new_file))
    assert list(read_file(path)) == [{"text": row["text"]} for row in ROWS * 50]
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (saved,) = (tmp_path / "saved").glob("*.arrow")
    assert list(read_file(saved)) == [{"text": row["text"]} for row in ROWS]


def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    rows = read_file(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_bytes(separated(ROWS, ","))
    next(rows)
    assert csv.field_size_limit() == limit < LARGEST_FIELD
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


DAMAGED = {
    "broken.jsonl": (b'{"text": "a"}\nno json\n', r"cannot be read as rows of jsonl, from row 2 on"),
    "broken.json": (b'[{"text": "a"}, no json]', r"cannot be read as rows of json, from row 1 on"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "cannot be read as rows of jsonl"),
    "latin.csv": (b"text\ncaf\xe9\n", "cannot be read as rows of csv"),
    "ragged.csv": (b"text,n\na,1\nb,1,2\n", r"from row 2 on \(3 fields, but the first row names 2\)"),
    "open.csv": (b'text,n\n"a,1\n', "cannot be read as rows of csv"),
    "short.parquet": (as_parquet(ROWS)[:-20], "cannot be read as rows of parquet"),
    "short.arrow": (as_arrow(ROWS)[:-300], "cannot be read as rows of arrow"),
    "short.jsonl.zst": (zstandard(json_lines(ROWS))[:-20], "cannot be read as rows of jsonl"),
    "plain.jsonl.bz2": (b"this is not bzip2", "cannot be read as rows of jsonl"),
    "plain.jsonl.zip": (b"this is no archive", "cannot be read as rows of jsonl"),
    "two.jsonl.zip": (zipped(json_lines(ROWS), json_lines(ROWS)), "2 files in one archive, expected one"),
    "plain.lz4": (b"this is not LZ4", "cannot be read as UTF-8 text"),
    "plain.zst": (b"this is not Zstandard", "cannot be read as UTF-8 text"),
    "wide.txt": ("Text".encode("utf-16"), "cannot be read as UTF-8 text"),
    "rows.txt": (json_lines(ROWS), r"holds rows of JSON, not plain text; give it a name that ends in \.jsonl"),
    "one-row": (b'\n{"text": "a"}\n', "holds rows of JSON, not plain text"),
    "numbers.bin": (bytes(100), r"cannot be read as UTF-8 text \(it is a binary file\)"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompressionError, match=message) as raised:
        list(read_file(tmp_path / name))
    assert str(raised.value).startswith(str(tmp_path / name)) and "\n" not in str(raised.value)
