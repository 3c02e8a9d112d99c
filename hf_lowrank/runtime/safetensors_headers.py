"""What a checkpoint's files say that they hold, read without reading any tensor: safetensors headers, and the index of shards."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100_000_000
MAX_SIDES = 16
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REPORT_FILE = "compression_report.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header describes it: its safetensors dtype, its shape, and the name of its file."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def read_json(file: str) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: if it is not JSON in UTF-8, or an object in it has a key twice.
    """
    try:
        if os.path.exists(file) and not os.path.isfile(file):
            raise ValueError("not a plain file")
        with open(file, encoding="utf-8") as stream:
            return json.load(stream, object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); download it again") from error


def read_header(file: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor of a safetensors file, by name and in the order of their bytes, without reading any of them.

    Raises:
        CheckpointError: if the file is truncated, or its header cannot be read, or the tensors do not fill it exactly, one after the other.
    """
    if not os.path.exists(file):
        raise CheckpointError(f"{file}: missing; download the checkpoint again, or save it again")
    try:
        size = os.stat(file).st_size
        if not os.path.isfile(file):
            raise ValueError("not a plain file")
        with open(file, "rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"{size} bytes, of which the header would take {length}")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError(f"the header is a {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata that is not text")
        tensors = {name: _entry(name, values) for name, values in header.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error}); download it again") from error
    end = 0
    ordered = sorted(tensors.items(), key=lambda item: item[1][2:])
    for name, (_, _, first, last) in ordered:
        if first != end:
            raise CheckpointError(
                f"{file}: {name} starts at byte {first}, expected {end}, where the one before it ends; download it again"
            )
        end = last
    if size != 8 + length + end:
        raise CheckpointError(
            f"{file}: {size} bytes, expected {8 + length + end}; the file is truncated or damaged, download it again"
        )
    return {name: (dtype, shape) for name, (dtype, shape, _, _) in ordered}


def read_headers(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint's safetensors files, by name.

    Raises:
        CheckpointError: if a file cannot be read, a tensor lies in two, or both 16-bit float types occur, which no model saves together.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, (dtype, shape) in read_header(file).items():
            if name in found:
                raise CheckpointError(
                    f"{name}: lies in {found[name].file} and in {os.path.basename(file)}, expected in one of them only"
                )
            found[name] = StoredTensor(dtype, shape, os.path.basename(file))
    halves = {tensor.dtype: name for name, tensor in found.items() if tensor.dtype in ("F16", "BF16")}
    if len(halves) == 2:
        raise CheckpointError(
            f"{halves['F16']} is F16 and {halves['BF16']} is BF16, expected one of them only; download the files again"
        )
    return found


def weight_files(folder: str) -> list[str]:
    """The safetensors files of a checkpoint's folder: its one file, or the shards that its index names.

    Raises:
        CheckpointError: if there are none, or a shard is missing or outside of the folder, or the index and the shards disagree.
    """
    if os.path.lexists(os.path.join(folder, WEIGHTS)):  # which transformers prefers, too
        return [os.path.join(folder, WEIGHTS)]
    index_file = os.path.join(folder, INDEX)
    if not os.path.lexists(index_file):
        raise CheckpointError(
            f"{folder}: holds neither {WEIGHTS} nor {INDEX}, and nothing else is opened; download the checkpoint again"
        )
    index = read_json(index_file)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not isinstance(index.get("metadata"), dict):
        raise CheckpointError(f"{index_file}: expected a dictionary with metadata and weight_map; download it again")
    for name, shard in places.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or os.path.basename(shard) != shard:
            raise CheckpointError(
                f"{index_file}: {name} is said to be in {shard!r}, expected a *.safetensors file of the same folder"
            )
    files = [os.path.join(folder, shard) for shard in sorted(set(places.values()))]
    stored = read_headers(files)
    for name in stored.keys() | places.keys():
        found, expected = stored[name].file if name in stored else "no shard", places.get(name, "no shard")
        if found != expected:
            raise CheckpointError(
                f"{name}: found in {found}, expected in {expected} by {INDEX}; download the checkpoint again"
            )
    return files


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} occurs twice")
        values[key] = value
    return values


def _entry(name: str, values: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first and last + 1 byte of a tensor."""
    if not isinstance(values, dict) or values.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!r} has the dtype {dtype!r}")
    for numbers, longest in ((shape, MAX_SIDES), (offsets, 2)):
        if (
            not isinstance(numbers, list)
            or len(numbers) > longest
            or not all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        ):
            raise ValueError(f"{name!r} has the shape {shape!r} and the offsets {offsets!r}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * BITS[dtype] // 8:
        raise ValueError(f"{name!r}, {dtype} {shape}, does not fill the bytes {offsets}")
    return dtype, tuple(shape), offsets[0], offsets[1]
