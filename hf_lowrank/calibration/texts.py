"""Texts → one stream of tokens → windows; the same for calibration and for perplexity."""

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
"""Datasets by the names that papers use, as `datasets.load_dataset` takes them."""

ROWS = {".jsonl": "json", ".parquet": "parquet"}
"""Files of rows with a column `text`, by suffix, and what `datasets` calls their kind."""


def read_documents(source: str, split: str = "train", limit: int | None = None) -> list[str]:
    """The documents of a text file (plain, .gz or .xz), of a file of rows (`ROWS`), or of a dataset named in `DATASETS`.

    A text file is cut at lines that hold only the document separator. `limit` bounds the number of documents of a dataset.

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
    kind = next((kind for suffix, kind in ROWS.items() if suffix in path.suffixes), None)
    documents = _file_documents(path) if kind is None else _row_documents(source, kind)
    if not documents:
        raise CompressionError(f"{source}: holds no text")
    return documents


def _file_documents(path: Path) -> list[str]:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise CompressionError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    documents = [part.strip("\n") for part in text.split(DOCUMENT_SEPARATOR)] if DOCUMENT_SEPARATOR in text else [text]
    return [document.strip() if len(documents) > 1 else document for document in documents if document.strip()]


def _row_documents(source: str, kind: str) -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(kind, data_files=source, split="train")
    except Exception as error:  # datasets raises many kinds; all mean the same here
        raise CompressionError(f"{source}: cannot be read as rows of {kind} ({error.__cause__ or error})") from error
    if "text" not in rows.column_names:
        raise CompressionError(
            f"{source}: has the columns {', '.join(rows.column_names)}, expected one that is called text"
        )
    return [text for text in rows["text"] if text and text.strip()]


def context_length(config: PretrainedConfig) -> int | None:
    """The most tokens that a model of this config was made for; None if the config does not tell."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def token_stream(tokenizer: Any, documents: Iterable[str]) -> Tensor:
    """All documents as one stream of token ids, (T,) int64; each starts with the beginning-of-sequence token, if there is one."""
    stream: list[int] = []
    for document in documents:
        ids = tokenizer(document, verbose=False).input_ids
        start = tokenizer.bos_token_id
        if start is not None and (not ids or ids[0] != start):
            ids = [start, *ids]
        stream += ids
    return torch.tensor(stream, dtype=torch.long)


def windows(stream: Tensor, length: int, stride: int | None = None) -> Tensor:
    """Windows of the stream, (W, length), `stride` apart (default: not overlapping); the remainder is dropped.

    Raises:
        CompressionError: if the stream is shorter than one window.
    """
    if stream.numel() < length:
        raise CompressionError(
            f"the text has {stream.numel()} tokens, fewer than one window of {length}; give more text or a shorter sequence length"
        )
    return stream.unfold(0, length, stride or length)


def _dataset_documents(name: str, split: str, limit: int | None) -> list[str]:
    from datasets import load_dataset

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
