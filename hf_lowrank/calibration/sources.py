"""The samples of whatever a caller gives to calibrate on: lists, streams, loaders, data frames, columns, splits."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..runtime.errors import CompressionError, listed
from .files import TEXT_COLUMNS
from .texts import described

TO_ROWS: dict[str, dict[str, Any]] = {"to_pylist": {}, "to_dicts": {}, "to_dict": {"orient": "records"}}
"""Methods by which tables of pyarrow, polars and pandas give their rows, with their arguments."""


def given_rows(given: Any) -> tuple[Iterable[Any], bool]:
    """Return the samples of an object, and whether it is a stream: one that may not end, or can be read only once.

    Raises:
        CompressionError: if it holds no samples.
    """
    if inspect.isgeneratorfunction(given):
        given = given()
    if isinstance(given, Mapping):
        given = _rows_of_mapping(given)
    if _is_table(given):
        return _rows_of_table(given), False
    if isinstance(given, (bytes, bytearray)) or not (hasattr(given, "__iter__") or hasattr(given, "__getitem__")):
        raise CompressionError(
            f"calibration: found {described(given)}, expected the name of a text, or texts, token ids, chats or "
            "batches as a list or any other iterable"
        )
    if isinstance(given, DataLoader):
        return _rows_of_loader(given), not _has_length(given)
    if isinstance(given, Tensor) and given.dim() < 2:
        raise CompressionError(
            f"calibration: found a tensor of the shape {tuple(given.shape)}, expected (sequences, tokens)"
        )
    if not hasattr(given, "__iter__") and _has_length(given):  # a dataset of torch, whose end is known by its length
        return map(given.__getitem__, range(len(given))), False
    return given, not _has_length(given)


def _has_length(given: Any) -> bool:
    try:
        len(given)
    except (TypeError, NotImplementedError):
        return False
    return True


def _rows_of_mapping(given: Mapping[str, Any]) -> Any:
    """Return the rows of columns, the split to train on of a dataset, or else the mapping as the only sample."""
    if given and all(hasattr(split, "column_names") for split in given.values()):
        if len(given) == 1:
            return next(iter(given.values()))
        if "train" in given:
            return given["train"]
        raise CompressionError(f"calibration: found a dataset with the splits {listed(given)}; give one of them")
    for name in ("input_ids", *TEXT_COLUMNS):
        column: Any = given.get(name)
        if _is_column(column, name):
            return _rows_of_columns(given, len(column))
    return [given]


def _is_column(values: Any, name: str) -> bool:
    """Return whether a value holds one sample per row, and is not a sample itself."""
    if isinstance(values, Tensor):
        return values.dim() == 2
    if not isinstance(values, (list, tuple)) or not values:
        return False
    # A text is one value, while token ids and chats are lists themselves.
    return name == "text" or isinstance(values[0], (list, tuple)) or getattr(values[0], "ndim", 0) == 1


def _rows_of_columns(columns: Mapping[str, Any], count: int) -> list[Any]:
    """Return the rows of columns, or all as one batch if something has another length, such as pictures."""
    if any(not hasattr(column, "__len__") or len(column) != count for column in columns.values()):
        return [columns]
    return [{name: column[row] for name, column in columns.items()} for row in range(count)]


def _is_table(given: Any) -> bool:
    return hasattr(given, "columns") and any(hasattr(given, method) for method in TO_ROWS)


def _rows_of_table(table: Any) -> Iterable[Any]:
    if hasattr(table, "notna"):  # pandas marks missing values by several kinds of objects
        table = table.astype(object).where(table.notna(), None)
    method = next(method for method in TO_ROWS if hasattr(table, method))
    rows: list[Any] = getattr(table, method)(**TO_ROWS[method])
    return rows


def _rows_of_loader(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of a loader, and the rows of those that hold texts."""
    for batch in loader:
        if isinstance(batch, (list, tuple)) and len(batch) == 1 and isinstance(batch[0], Tensor):
            yield batch[0]  # of a TensorDataset
        elif isinstance(batch, (list, tuple)) and all(isinstance(text, str) for text in batch):
            yield from batch
        elif isinstance(batch, Mapping):
            yield from _rows_of_loader_batch(batch)
        else:
            yield batch


def _rows_of_loader_batch(batch: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the texts of a batch one by one. Any other batch is yielded with its columns as torch collates them."""
    texts = batch.get("text")
    if "input_ids" not in batch and isinstance(texts, (list, tuple)):
        yield from texts
        return
    columns = dict(batch)
    for name, values in columns.items():
        # torch's collation of lists gives a list of positions, each with the values of all rows.
        if isinstance(values, (list, tuple)) and values and all(isinstance(value, Tensor) for value in values):
            if values[0].dim() == 1:
                columns[name] = torch.stack(list(values), dim=1)
    yield columns
