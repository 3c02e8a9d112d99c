"""Read texts, join them into one stream of tokens and cut it into windows, for calibration and for perplexity."""

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..execution.files import one_line
from ..runtime.errors import CompressionError

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""Separates the documents of a text file."""

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

ROWS = {".jsonl": "json", ".parquet": "parquet"}
"""Formats of `datasets` for files of rows with a column `text`, by file suffix."""


def read_documents(source: str, split: str = "train", limit: int | None = None) -> list[str]:
    """Return the documents of a text file (plain, .gz or .xz), a file of rows (`ROWS`) or a dataset (`DATASETS`).

    A text file is cut at its document separators.

    Args:
        source: path of a file, or name of a dataset.
        split: "train", "validation" or "test". It is used for datasets only.
        limit: maximum number of documents from a dataset that is streamed.

    Raises:
        CompressionError: if there is no such file or dataset, it cannot be read, or it holds no text.
    """
    if source in DATASETS:
        return _dataset_documents(source, split, limit)
    path = Path(source)
    if not path.is_file():
        raise CompressionError(
            f"{source}: no such text file, and not one of the datasets {', '.join(DATASETS)}; check the path"
        )
    row_format = _row_format(path)
    if row_format is None:
        documents = _file_documents(path)
    else:
        documents = _row_documents(source, row_format)
    if not documents:
        raise CompressionError(f"{source}: holds no text")
    return documents


def _row_format(path: Path) -> str | None:
    """Return the format of a file of rows. None for a file of plain text."""
    for suffix, row_format in ROWS.items():
        if suffix in path.suffixes:  # not only the last suffix: rows.jsonl.gz
            return row_format
    return None


def _file_documents(path: Path) -> list[str]:
    """Return the documents of a text file."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise CompressionError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if DOCUMENT_SEPARATOR not in text:  # one document, whose white space is part of it
        return [text] if text.strip() else []
    documents = []
    for part in text.split(DOCUMENT_SEPARATOR):
        document = part.strip()
        if document:
            documents.append(document)
    return documents


def _row_documents(source: str, row_format: str) -> list[str]:
    """Return the texts of a file of rows."""
    from datasets import load_dataset

    try:
        rows = load_dataset(row_format, data_files=source, split="train")
    except Exception as error:  # datasets raises many kinds; all mean the same here
        raise CompressionError(
            f"{source}: cannot be read as rows of {row_format} ({error.__cause__ or error})"
        ) from error
    if "text" not in rows.column_names:
        raise CompressionError(
            f"{source}: has the columns {', '.join(rows.column_names)}, expected one that is called text"
        )
    return [text for text in rows["text"] if text and text.strip()]


def context_length(config: PretrainedConfig) -> int | None:
    """Return the maximum number of tokens for which a model was made. None if its config does not tell."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def token_stream(tokenizer: Any, documents: Iterable[str]) -> Tensor:
    """Join all documents into one stream of token ids, (T,) int64.

    Every document starts with the tokenizer's beginning-of-sequence token, if it has one.
    """
    stream: list[int] = []
    for document in documents:
        ids = tokenizer(document, verbose=False).input_ids
        start = tokenizer.bos_token_id
        # Some tokenizers add the token by themselves.
        if start is not None and (not ids or ids[0] != start):
            ids = [start, *ids]
        stream += ids
    return torch.tensor(stream, dtype=torch.long)


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
        return [row["text"] for row, _ in zip(rows, range(limit or 10_000), strict=False)]
    except Exception as error:  # datasets raises many kinds when offline; all mean the same here
        raise CompressionError(
            f"dataset {name!r} cannot be loaded ({one_line(error)}); without network use a text file"
        ) from error
