"""Read texts, join them into one stream of tokens and cut it into windows, for calibration and for perplexity."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..execution.files import one_line
from ..runtime.errors import CompressionError, listed, path_in_message, printable
from .files import TEXT_COLUMNS, read_file

DATASETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "c4": {
        "path": "allenai/c4",
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    },
}
"""Arguments of `datasets.load_dataset` by dataset, under the names that papers use."""

MOST_TOKENS = 2**24
"""Number of tokens beyond which no more of a text is read to draw windows from it, if it is enough for these."""

Chat = list[dict[str, Any]]
"""A conversation: a list of messages with `role` and `content`, as chat templates read it."""
Document = str | Chat


def read_rows(source: str | os.PathLike[str], split: str = "train", limit: int | None = None) -> Iterable[Any]:
    """Return the documents of a text file or a dataset, or the rows of a file of rows.

    Args:
        source: path of a file, or name of a dataset (`DATASETS`).
        split: "train", "validation" or "test". It is used for datasets only.
        limit: maximum number of documents from a dataset that is streamed.

    Raises:
        CompressionError: if there is no such file or dataset, or it cannot be read. A damaged file raises where the
            damage is met.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CompressionError(f"text: found {described(source)}, expected the name of a file or of a dataset")
    source = os.fspath(source)
    if source in DATASETS:
        return _dataset_documents(source, split, limit)
    if os.path.isfile(source):
        return read_file(Path(source))
    if os.path.isdir(source):
        raise CompressionError(f"{source}: is a folder; name one file")
    raise CompressionError(
        f"{path_in_message(source)}: no such text file, and not one of the datasets {', '.join(DATASETS)}; check the "
        "path (from Python, texts themselves are given as a list)"
    )


def read_documents(
    source: str | os.PathLike[str], split: str = "train", limit: int | None = None
) -> Iterator[Document]:
    """Yield the documents of a text file, of a file of rows with a column of `TEXT_COLUMNS`, or of a dataset.

    The arguments are those of `read_rows`.

    Raises:
        CompressionError: if there is no such file or dataset, it cannot be read, or it holds no text.
    """
    has_any = False
    for document in documents_of(read_rows(source, split, limit), str(source)):
        has_any = True
        yield document
    if not has_any:
        raise CompressionError(f"{source}: holds no text")


def documents_of(rows: Iterable[Any], source: str) -> Iterator[Document]:
    """Yield the texts and the chats of rows, without the empty ones and those that have none.

    Args:
        rows: texts, chats, or mappings with one of them in a column of `TEXT_COLUMNS`. None is empty.
        source: where the rows are from, for messages.

    Raises:
        CompressionError: if a row holds something else, naming it, or if no row has such a column.
    """
    columns: list[str] | None = None  # of the first row, as long as no row has had one of ours
    for number, row in enumerate(rows, 1):
        if isinstance(row, Mapping):
            column = text_column(row)
            if column is None:
                columns = list(map(str, row)) if number == 1 else columns
                continue
            document = _document(row[column], f"{source}: row {number}: the column {column}", column)
        else:
            document = _document(row, f"{source}: row {number}")
        columns = None
        if document is not None:
            yield document
    if columns is not None:
        raise CompressionError(
            f"{source}: has the columns {listed(columns)}, expected one that is called text or messages"
        )


def text_column(row: Mapping[str, Any]) -> str | None:
    """Return the column of a row that holds a text or a chat. None if it has none, or holds a model's own inputs."""
    if "input_ids" in row:
        return None
    for column in TEXT_COLUMNS:
        if column in row:
            return column
    return None


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(part, Mapping) for part in value)


def _document(value: Any, where: str, column: str = "text") -> Document | None:
    """Return a text or a chat, or None if there is nothing in it. Anything else raises CompressionError."""
    if is_empty(value):
        return None
    if is_chat(value):
        return list(value)
    if column == "messages":
        raise CompressionError(f"{where} holds {described(value)}, expected a list of messages")
    if not isinstance(value, str):
        raise CompressionError(f"{where} holds {described(value)}, expected a text or a chat (a list of messages)")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CompressionError(f"{where} holds no valid Unicode ({error}); repair or remove it") from error
    return value


def is_empty(value: Any) -> bool:
    """Return whether there is nothing to read in a value: it is missing, has no elements, or is only white space."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, (list, tuple)) and not value


def described(value: Any) -> str:
    """Return the kind of a value and its beginning, for messages."""
    return f"{type(value).__name__} ({printable(repr(value))[:40]})"


def token_stream(
    tokenizer: Any,
    documents: Iterable[Document],
    enough: int | None = None,
    most_documents: int | None = None,
    most_tokens: int | None = None,
) -> Tensor:
    """Join documents into one stream of token ids, (T,) int64.

    Every text starts with the tokenizer's beginning-of-sequence token, if it has one. A chat is what the chat template
    makes of it.

    Args:
        enough: number of tokens. Documents are read to their end, but none after the first `enough` tokens if that
            is a lot of them already: `most_documents`, or `most_tokens` tokens.
        most_documents: see `enough`. None for any number.
        most_tokens: see `enough`. `MOST_TOKENS` by default.
    """
    most_tokens = MOST_TOKENS if most_tokens is None else most_tokens
    parts = [torch.empty(0, dtype=torch.long)]
    tokens = 0
    for count, document in enumerate(documents, 1):
        if isinstance(document, str):
            parts.append(text_tokens(tokenizer, document))
        else:
            parts.append(chat_tokens(tokenizer, document, f"document {count}"))
        tokens += len(parts[-1])
        has_many = tokens >= most_tokens or (most_documents is not None and count >= most_documents)
        if enough is not None and tokens >= enough and has_many:
            break
    return torch.cat(parts)


def text_tokens(tokenizer: Any, text: str) -> Tensor:
    """Return the token ids of a text after the beginning-of-sequence token, if there is one, (T,) int64."""
    ids = tokenizer(text, verbose=False).input_ids
    start = tokenizer.bos_token_id
    # Some tokenizers add the token by themselves.
    if start is not None and (not ids or ids[0] != start):
        ids = [start, *ids]
    return torch.tensor(ids, dtype=torch.long)


def chat_tokens(tokenizer: Any, chat: Chat, where: str) -> Tensor:
    """Return the token ids that the chat template makes of a chat, (T,) int64.

    Args:
        where: which chat it is, for the message.

    Raises:
        CompressionError: if the tokenizer has no template, or the template cannot read the chat.
    """
    # Many templates make empty messages of what they do not know.
    for message in chat:
        if not isinstance(message.get("role"), str):
            raise CompressionError(
                f"{where}: found a message with the fields {listed(message)}; expected role and content"
            )
    try:
        encoded = tokenizer.apply_chat_template(list(chat), tokenize=True, return_dict=True)
    except (ValueError, TypeError, LookupError, AttributeError, TemplateError) as error:
        raise CompressionError(f"{where}: the tokenizer makes no tokens of a chat ({one_line(error)})") from error
    return torch.tensor(encoded["input_ids"], dtype=torch.long).flatten()


def windows(stream: Tensor, length: int, stride: int | None = None) -> Tensor:
    """Cut the stream into windows, (W, length). The remainder is dropped.

    Args:
        length: tokens per window.
        stride: distance between the starts of two windows, `length` by default.

    Raises:
        CompressionError: if the stream is shorter than one window.
    """
    if stream.numel() < length:
        raise CompressionError(
            f"the text has {stream.numel()} tokens, fewer than one window of {length}; give more text or a shorter "
            "sequence length"
        )
    # `unfold` drops the remainder, and its windows are views that take no memory.
    return stream.unfold(0, length, stride or length)


def _dataset_documents(name: str, split: str, limit: int | None) -> list[str]:
    """Return the documents of a dataset.

    All rows of WikiText make one document. The first `limit` rows of C4 are streamed, each as its own document.
    """
    from datasets import load_dataset

    # C4 is read from one of its many files, and that one is streamed.
    arguments = dict(DATASETS[name])
    streaming = "data_files" in arguments
    if streaming and split == "test":
        split = "validation"  # C4 has no test split
    try:
        rows = load_dataset(**arguments, split=split, streaming=streaming)
        if not streaming:
            return ["\n\n".join(rows["text"])]
        return [row["text"] for row in itertools.islice(rows, limit or 10_000)]
    except Exception as error:  # datasets raises many kinds when offline; all mean the same here
        raise CompressionError(
            f"dataset {name!r} cannot be loaded ({one_line(error)}); without network use a text file"
        ) from error
