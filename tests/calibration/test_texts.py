"""Texts become one stream of tokens and windows of one length, the same for calibration and for evaluation."""

import gzip
import json
import lzma
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank import CompressionConfig, CompressionError
from hf_lowrank.calibration import calibration_batches, fingerprint, texts
from hf_lowrank.calibration.texts import read_documents, token_stream, windows

from ..support import tiny_models

STORIES = "First story.\nIt has two lines.\n<|endoftext|>\n  Second story.\n\n<|endoftext|>\n<|endoftext|>\nThird.\n"


@pytest.mark.parametrize("suffix", [".txt", ".gz", ".XZ"])
def test_separators_cut_documents_in_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"stories{suffix}"
    pack = {".txt": bytes, ".gz": gzip.compress, ".XZ": lzma.compress}[suffix]
    path.write_bytes(pack(STORIES.encode()))
    assert list(read_documents(str(path))) == ["First story.\nIt has two lines.", "Second story.", "Third."]


CHAT = [{"role": "user", "content": "hi"}]
ROWS = {
    "texts": (
        [{"id": 1, "text": "one\ntwo"}, {"text": ""}, {"text": " \n"}, {"text": None}, {"x": 1}, {"text": "b"}],
        2,
    ),
    "the first has none": ([{"x": 1}, {"text": "a"}], 1),
    "chats": ([{"messages": CHAT}, {"messages": []}, {"messages": None}], 1),
    "texts before chats": ([{"text": "a", "messages": CHAT}], 1),
    "a number": ([{"text": "a"}, {"text": 3}], "row 2: the column text holds int .3., expected a text or a chat"),
    "a list": ([{"text": ["a", "b"]}], "row 1: the column text holds list"),
    "a struct": ([{"text": None}, {"text": {"a": "b"}}], "row 2: the column text holds dict"),
    "a text for messages": ([{"messages": "hi"}], "row 1: the column messages.* str"),
    "no text": ([{"text": None}, {"text": ""}], "holds no text|all samples are empty"),
    "nothing": ([], "holds no text|found an empty iterable|found no text"),
    "another column": ([{"content": "a", "id": 3}], "content, id.*expected .*text or messages"),
    "no Unicode": ([{"text": "a\ud800"}], "row 1: the column text holds no valid Unicode"),
}
"""Rows, and how many documents they hold, or what the message says that refuses them."""


@pytest.mark.parametrize("case", ROWS)
def test_rows_mean_the_same_in_files_and_in_memory(tmp_path: Path, case: str) -> None:
    rows, expected = ROWS[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer, model = tiny_models.tokenizer(), tiny_models.llama(num_hidden_layers=1)
    config = CompressionConfig(samples=2, sequence_length=1)
    if isinstance(expected, str):
        with pytest.raises(CompressionError, match=expected):
            list(read_documents(str(path)))
        for given in (str(path), rows):
            with pytest.raises(CompressionError, match=expected) as raised:
                calibration_batches(model, config, tokenizer, given)
            assert "\n" not in str(raised.value)
        return
    assert len(list(read_documents(str(path)))) == expected
    sources = (str(path), rows, iter(rows))
    found = {fingerprint(calibration_batches(model, config, tokenizer, source)) for source in sources}
    assert len(found) == 1


def test_a_chat_is_what_the_template_makes_of_it() -> None:
    tokenizer = tiny_models.tokenizer()
    stream = token_stream(tokenizer, ["ab", CHAT])
    assert tokenizer.decode(stream).replace("<s>", "|") == "|abu:hi\n"


@given(
    lengths=st.lists(st.integers(0, 9), max_size=20),
    enough=st.integers(1, 40),
    most=st.integers(0, 20),
)
def test_no_document_is_read_after_enough_tokens(lengths: list[int], enough: int, most: int) -> None:
    tokenizer = tiny_models.tokenizer(bos=False)
    documents = ["a" * length for length in lengths]
    unread = iter(documents)
    part = token_stream(tokenizer, unread, enough, most_documents=most)
    whole = token_stream(tokenizer, documents)
    assert torch.equal(part, whole[: len(part)])
    read = len(documents) - len(list(unread))
    assert len(part) == sum(lengths[:read])
    if read < len(documents):
        assert len(part) >= enough and read >= most
    if read > max(most, 1):
        assert sum(lengths[: read - 1]) < enough


def test_a_huge_text_is_read_only_as_far_as_windows_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MOST_TOKENS", 50)
    documents = ["abcdefghi"] * 30
    unread = iter(documents)
    assert len(token_stream(tiny_models.tokenizer(), unread, enough=20)) == 50
    assert len(list(unread)) == 25
    assert len(token_stream(tiny_models.tokenizer(), documents)) == 300


def test_a_file_without_separators_is_one_document_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("  one\n\n two \n", encoding="utf-8")
    assert list(read_documents(str(path))) == ["  one\n\n two \n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("separators.txt", b"<|endoftext|>\n<|endoftext|>\n", "holds no text"),
        ("latin.txt", b"caf\xe9 au lait", "cannot be read as UTF-8"),
        ("plain.gz", b"this is not gzip", "cannot be read"),
        ("plain.xz", b"this is not xz", "cannot be read"),
        ("short.gz", gzip.compress(bytes(range(97, 120)) * 50, mtime=0)[:40], "cannot be read"),
        (
            "other.jsonl",
            b'{"content": "words"}\n',
            "has the columns content, expected one that is called text or messages",
        ),
        ("damaged.gz", gzip.compress(bytes(range(97, 120)) * 50, mtime=0)[:15] + b"\xff" * 30, "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_unreadable_files_are_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompressionError, match=message):
        list(read_documents(str(tmp_path / name)))


def test_a_missing_file_is_an_error_that_names_the_datasets() -> None:
    with pytest.raises(CompressionError, match="no such text file.*wikitext2, c4"):
        list(read_documents("no/such/file.txt"))


def test_a_dataset_without_network_is_an_error_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(**arguments: object) -> None:
        raise ConnectionError("cannot reach the Hub\nmore details")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        CompressionError, match=r"dataset 'wikitext2' cannot be loaded \(cannot reach the Hub\); without network"
    ) as raised:
        list(read_documents("wikitext2"))
    assert "\n" not in str(raised.value)


def test_datasets_are_loaded_with_their_real_names_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    requests: list[dict] = []

    def load(**arguments: object) -> object:
        requests.append(arguments)
        return {"text": ["a", "b"]} if not arguments["streaming"] else iter([{"text": str(i)} for i in range(100)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_documents("wikitext2", split="test")) == ["a\n\nb"]
    assert list(read_documents("c4", limit=3)) == ["0", "1", "2"]
    assert list(read_documents("c4", split="test", limit=1)) == ["0"]
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
