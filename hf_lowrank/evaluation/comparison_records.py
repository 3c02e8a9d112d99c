"""Records of a comparison: one JSON file per finished combination, valid until one of its inputs changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..calibration.texts import DATASETS, read_rows
from ..execution.files import one_line, write_atomically
from ..runtime.checksums import file_checksum
from ..runtime.errors import CompressionError, path_in_message

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Patterns of the files that decide what a model computes: configuration, weights and tokenizer."""

ComparisonRecord = dict[str, Any]
"""Figures of the dense model or of one combination, as they are stored in a JSON file."""
Log = Callable[[str], None]
"""Function that receives one line of progress."""


def name_of(record: ComparisonRecord) -> str:
    """Return the label and the ratio of a combination. One that failed may have had no ratio."""
    label = str(record["label"])
    return label if record["ratio"] is None else f"{label} at {record['ratio']:.0%}"


def finished_record(file: Path, inputs: dict[str, Any], log: Log) -> ComparisonRecord | None:
    """Return the record in a file if it exists and still holds, or None if its combination must be measured.

    Args:
        inputs: everything the figures depend on now (see `Comparison.inputs`).
        log: receives one line if there is a record that does not hold.
    """
    if not file.is_file():
        return None
    try:
        record: ComparisonRecord = json.loads(file.read_text(encoding="utf-8"))
        recorded = record["inputs"]
    except (ValueError, KeyError, TypeError):
        log(f"{file.stem}: the record {file} is damaged; computed again")
        return None
    # Inputs that only one side has count as changed too, such as those that a later release adds.
    changed = sorted(name for name in inputs.keys() | recorded.keys() if inputs.get(name) != recorded.get(name))
    if not changed:
        return record
    log(f"{file.stem}: {', '.join(changed)} changed since the record was written; computed again")
    return None


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON, so that the file is complete or as it was before."""
    write_atomically(file, json.dumps(value, indent=1))


def model_sha256(source: str) -> dict[str, str]:
    """Return the sha256 of each file of a model, by file name. A model on the Hub is downloaded if needed.

    Raises:
        CompressionError: if there is no such model, or it cannot be downloaded.
    """
    folder = _model_folder(source)
    files: set[Path] = set()
    for pattern in MODEL_FILES:
        files.update(folder.glob(pattern))
    return {file.name: file_checksum(file) for file in sorted(files)}


def _model_folder(source: str) -> Path:
    try:
        if Path(source).is_dir():
            return Path(source)
        return Path(snapshot_download(source, allow_patterns=MODEL_FILES))
    except (OSError, ValueError) as error:
        raise CompressionError(
            f"{path_in_message(source)}: no such folder, and it cannot be downloaded from the Hub ({one_line(error)})"
        ) from error


def text_sha256(source: str) -> str | None:
    """Return the sha256 of a text file, or None for "self" and for a dataset, which its name identifies.

    Raises:
        CompressionError: if the source is none of these, or cannot be read as text.
    """
    if source == "self" or source in DATASETS:
        return None
    for _ in read_rows(source):  # raises if the file cannot be read
        pass
    return file_checksum(source)
