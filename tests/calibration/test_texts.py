"""Texts become one stream of tokens and windows of one length, the same for calibration and for evaluation."""

import gzip
import lzma
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank import CompressionError
from hf_lowrank.calibration.texts import read_documents, token_stream, windows

from ..support import tiny_models

STORIES = "First story.\nIt has two lines.\n<|endoftext|>\n  Second story.\n\n<|endoftext|>\n<|endoftext|>\nThird.\n"
WRITERS = {
    ".txt": lambda path, data: path.write_bytes(data),
    ".gz": lambda path, data: path.write_bytes(gzip.compress(data)),
}
WRITERS[".xz"] = lambda path, data: path.write_bytes(lzma.compress(data))


@pytest.mark.parametrize("suffix", WRITERS)
def test_separators_cut_documents_in_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"stories{suffix}"
    WRITERS[suffix](path, STORIES.encode())
    assert read_documents(str(path)) == ["First story.\nIt has two lines.", "Second story.", "Third."]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_of_a_file_are_documents(tmp_path: Path, name: str) -> None:
    rows = Dataset.from_dict({"id": [1, 2, 3], "text": ["one\ntwo", "", "three"]})
    rows.to_parquet(tmp_path / name) if name.endswith("parquet") else rows.to_json(tmp_path / name)
    assert read_documents(str(tmp_path / name)) == ["one\ntwo", "three"]


def test_a_file_without_separators_is_one_document_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("  one\n\n two \n", encoding="utf-8")
    assert read_documents(str(path)) == ["  one\n\n two \n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("separators.txt", b"<|endoftext|>\n<|endoftext|>\n", "holds no text"),
        ("latin.txt", b"caf\xe9 au lait", "cannot be read as UTF-8"),
        ("plain.gz", b"this is not gzip", "cannot be read"),
        ("plain.xz", b"this is not xz", "cannot be read"),
        ("short.gz", gzip.compress(bytes(range(97, 120)) * 50, mtime=0)[:40], "cannot be read"),
        ("broken.jsonl", b"no json\n", "cannot be read as rows of json"),
        ("other.jsonl", b'{"content": "words"}\n', "has the columns content, expected one that is called text"),
        ("damaged.gz", gzip.compress(bytes(range(97, 120)) * 50, mtime=0)[:15] + b"\xff" * 30, "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_unreadable_files_are_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompressionError, match=message):
        read_documents(str(tmp_path / name))


def test_a_missing_file_is_an_error_that_names_the_datasets() -> None:
    with pytest.raises(CompressionError, match="no such text file.*wikitext2, c4"):
        read_documents("no/such/file.txt")


def test_a_dataset_without_network_is_an_error_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(**arguments: object) -> None:
        raise ConnectionError("cannot reach the Hub\nmore details")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        CompressionError, match=r"dataset 'wikitext2' cannot be loaded \(cannot reach the Hub\); without network"
    ) as raised:
        read_documents("wikitext2")
    assert "\n" not in str(raised.value)


def test_datasets_are_loaded_with_their_real_names_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    requests: list[dict] = []

    def load(**arguments: object) -> object:
        requests.append(arguments)
        return {"text": ["a", "b"]} if not arguments["streaming"] else iter([{"text": str(i)} for i in range(100)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents("wikitext2", split="test") == ["a\n\nb"]
    assert read_documents("c4", limit=3) == ["0", "1", "2"]
    assert read_documents("c4", split="test", limit=1) == ["0"]
    assert [(request["path"], request["split"]) for request in requests] == [
        ("Salesforce/wikitext", "test"),
        ("allenai/c4", "train"),
        ("allenai/c4", "validation"),
    ]


def test_every_document_starts_with_exactly_one_start_token() -> None:
    documents = ["ab", "c", ""]
    expected = [
        1,
        *tiny_models.tokenizer(bos=False)("ab").input_ids,
        1,
        *tiny_models.tokenizer(bos=False)("c").input_ids,
        1,
    ]
    for adds_bos in (True, False):
        assert token_stream(tiny_models.tokenizer(adds_bos=adds_bos), documents).tolist() == expected


def test_without_a_start_token_documents_are_joined_as_they_are() -> None:
    tokenizer = tiny_models.tokenizer(bos=False)
    assert token_stream(tokenizer, ["ab", "c"]).tolist() == tokenizer("abc").input_ids


@given(tokens=st.integers(1, 200), length=st.integers(1, 50), stride=st.integers(1, 50))
def test_windows_are_slices_and_drop_the_remainder(tokens: int, length: int, stride: int) -> None:
    stream = torch.arange(tokens)
    if tokens < length:
        with pytest.raises(CompressionError, match=f"{tokens} tokens, fewer than one window of {length}"):
            windows(stream, length, stride)
        return
    rows = windows(stream, length, stride)
    assert len(rows) == (tokens - length) // stride + 1
    for index, row in enumerate(rows):
        assert torch.equal(row, stream[index * stride : index * stride + length])
    assert torch.equal(windows(stream, length), windows(stream, length, length))
