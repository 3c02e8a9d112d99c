"""Reads safetensors headers and the index of shards: they say what a checkpoint's files hold. No tensor is read."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip
"""Number of bits of a value, by the name that safetensors gives to its dtype."""
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100_000_000
"""Maximum number of bytes of a header, the same as in the safetensors library."""
MAX_SIDES = 16
"""Maximum number of dimensions of a tensor."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header describes it: its safetensors dtype, its shape, and the name of its file."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def bytes(self) -> int:
        """Number of bytes that the tensor takes in its file."""
        return byte_count(self.dtype, self.shape)


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    """Return the number of bytes that a tensor of a safetensors dtype and a shape takes in a file."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def read_json(file: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        CheckpointError: if it is not JSON in UTF-8, or an object in it has a key twice.
    """
    try:
        # A pipe or a device in the place of the file would be waited for.
        if os.path.exists(file) and not os.path.isfile(file):
            raise ValueError("not a plain file")
        with open(file, encoding="utf-8") as stream:
            return json.load(stream, object_pairs_hook=_object_of_unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); download it again") from error


def read_header(file: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of a safetensors file, by name and in the order of their bytes.

    Raises:
        CheckpointError: if the file is truncated, if its header cannot be read, or if the tensors do not fill the
            file exactly, one after the other.
    """
    if not os.path.exists(file):
        raise CheckpointError(f"{file}: missing; download the checkpoint again, or save it again")
    try:
        size = os.stat(file).st_size
        if not os.path.isfile(file):
            raise ValueError("not a plain file")
        with open(file, "rb") as stream:
            # Eight bytes, little-endian, give the length of the header; the header is JSON.
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"{size} bytes, of which the header would take {length}")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_object_of_unique_keys)
        if not isinstance(header, dict):
            raise ValueError(f"the header is a {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata that is not text")
        tensors = {name: _entry(name, values) for name, values in header.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error}); download it again") from error
    return _in_order_of_bytes(file, tensors, size - 8 - length, size)


def _in_order_of_bytes(
    file: str, tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]], data_bytes: int, file_bytes: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape by name, sorted by place in the file.

    Raises:
        CheckpointError: if the tensors leave a gap, overlap, or do not end where the file ends.
    """
    ordered = {}
    # Data behind or between tensors could hide something, and data that two tensors share would be read twice.
    end = 0
    for name, (dtype, shape, first, last) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise CheckpointError(
                f"{file}: {name} starts at byte {first}, expected {end}, where the one before it ends; "
                "download it again"
            )
        ordered[name] = (dtype, shape)
        end = last
    if end != data_bytes:
        raise CheckpointError(
            f"{file}: {file_bytes} bytes, expected {file_bytes - data_bytes + end}; the file is truncated or damaged, "
            "download it again"
        )
    return ordered


def read_headers(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint's safetensors files, by name.

    Raises:
        CheckpointError: if a file cannot be read, if a tensor lies in two files, or if both 16-bit float types occur,
            which no model saves together.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        file_name = os.path.basename(file)
        for name, (dtype, shape) in read_header(file).items():
            if name in stored:
                raise CheckpointError(
                    f"{name}: lies in {stored[name].file} and in {file_name}, expected in one of them only"
                )
            stored[name] = StoredTensor(dtype, shape, file_name)
    # One tensor of each 16-bit float type.
    halves = {tensor.dtype: name for name, tensor in stored.items() if tensor.dtype in ("F16", "BF16")}
    if len(halves) == 2:
        raise CheckpointError(
            f"{halves['F16']} is F16 and {halves['BF16']} is BF16, expected one of them only; download the files again"
        )
    return stored


def weight_files(folder: str) -> list[str]:
    """Return the safetensors files of a checkpoint's folder: its single file, or the shards that its index names.

    Raises:
        CheckpointError: if there are none, if a shard is missing or outside of the folder, or if the index and the
            shards disagree.
    """
    # Transformers prefers the single file, too, where both are there.
    if os.path.lexists(os.path.join(folder, WEIGHTS)):
        return [os.path.join(folder, WEIGHTS)]
    index_file = os.path.join(folder, INDEX)
    if not os.path.lexists(index_file):
        raise CheckpointError(
            f"{folder}: holds neither {WEIGHTS} nor {INDEX}, and nothing else is opened; download the checkpoint again"
        )
    index = read_json(index_file)
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not isinstance(index.get("metadata"), dict):
        raise CheckpointError(f"{index_file}: expected a dictionary with metadata and weight_map; download it again")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or os.path.basename(shard) != shard:
            raise CheckpointError(
                f"{index_file}: {name} is said to be in {shard!r}, expected a *.safetensors file of the same folder"
            )
    files = [os.path.join(folder, shard) for shard in sorted(set(shard_of.values()))]
    stored = read_headers(files)
    for name in stored.keys() | shard_of.keys():
        actual = stored[name].file if name in stored else "no shard"
        expected = shard_of.get(name, "no shard")
        if actual != expected:
            raise CheckpointError(
                f"{name}: found in {actual}, expected in {expected} by {INDEX}; download the checkpoint again"
            )
    return files


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary.

    Raises:
        ValueError: if a key occurs twice. By itself `json` would keep the last value and say nothing.
    """
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} occurs twice")
        values[key] = value
    return values


def _entry(name: str, values: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, first byte and last byte + 1 of a tensor from its description in a header.

    Raises:
        ValueError: if the description is not valid.
    """
    if not isinstance(values, dict) or values.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name!r} has the dtype {dtype!r}")
    if not _are_counts(shape, MAX_SIDES) or not _are_counts(offsets, 2):
        raise ValueError(f"{name!r} has the shape {shape!r} and the offsets {offsets!r}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != byte_count(dtype, shape):
        raise ValueError(f"{name!r}, {dtype} {shape}, does not fill the bytes {offsets}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_counts(numbers: Any, longest: int) -> bool:
    """Return whether `numbers` is a list of at most `longest` integers from 0 to 2⁶³ − 1."""
    if not isinstance(numbers, list) or len(numbers) > longest:
        return False
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)
