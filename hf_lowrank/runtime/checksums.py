"""sha256 checksums of a checkpoint's files, recorded in its config when it is saved, so that later changes show.

They are stored by file name in `quantization_config.checksums`: those of the weights, their index, the loading code
and config.json itself. The checksum of config.json leaves out the checksums in it and its formatting.
`weights_checksum` is another one: it depends on the tensors alone, not on the files that hold them.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from .errors import CheckpointError
from .safetensors_headers import byte_count, read_header, read_json, weight_files

CONFIG = "config.json"
LOADING_CODE = "modeling_hf_lowrank.py"
"""The file of code in a checkpoint, by which it opens where the package is not installed. `auto_map` names it."""
CHUNK = 1 << 20
"""Number of bytes that are read and hashed at a time."""


def file_checksum(file: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def weights_checksum(folder: str | os.PathLike[str]) -> str:
    """Return the sha256 of all stored tensors with their names, dtypes and shapes.

    The order of the tensors, and the number of shards that hold them, make no difference.

    Raises:
        CheckpointError: if a weight file is missing or damaged.
    """
    lines = []
    for file in weight_files(os.fspath(folder)):
        tensors = read_header(file)
        sizes = [byte_count(dtype, shape) for dtype, shape in tensors.values()]
        with open(file, "rb") as stream:
            # Behind its header a file holds the tensors, one after the other. `read_header` has checked that.
            stream.seek(-sum(sizes), os.SEEK_END)
            for (name, (dtype, shape)), size in zip(tensors.items(), sizes, strict=True):
                lines.append(f"{name} {dtype} {list(shape)} {_checksum_of_next(stream, size)}")
    # Sorted, so that it makes no difference which shard holds a tensor.
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _checksum_of_next(stream: BinaryIO, size: int) -> str:
    """Return the sha256 of the next `size` bytes of a stream, read chunk by chunk."""
    digest = hashlib.sha256()
    for start in range(0, size, CHUNK):
        digest.update(stream.read(min(CHUNK, size - start)))
    return digest.hexdigest()


def check_weights(files: Sequence[str], recorded: Mapping[str, str]) -> None:
    """Compare the files of the weights with the checksums recorded for them. Files without one are passed over.

    Raises:
        CheckpointError: if a file is not the one that was saved.
    """
    recorded_files = [file for file in files if os.path.basename(file) in recorded]
    # hashlib releases the GIL, so the shards of a large model are hashed at the same time.
    with ThreadPoolExecutor() as pool:
        for file, checksum in zip(recorded_files, pool.map(file_checksum, recorded_files), strict=True):
            name = os.path.basename(file)
            if checksum != recorded[name]:
                raise checksum_mismatch(name, checksum, recorded[name])


def checksum_mismatch(name: str, found: str, expected: str) -> CheckpointError:
    """Return the error for a file that is not the one that was saved."""
    return CheckpointError(
        f"{name}: sha256 is {found}, expected {expected} of when it was saved; "
        f"download it again, or, if it was you who changed it, delete its line under checksums in {CONFIG}"
    )


def recorded_code(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the checksums of the files of code in a checkpoint, by name, as its config has them.

    Before there was one file of code, a checkpoint had some twenty. A config that cannot be read has none.
    """
    try:
        values = read_json(os.path.join(folder, CONFIG))
        checksums = dict(values["quantization_config"]["checksums"])
    except (CheckpointError, OSError, LookupError, TypeError, ValueError):
        return {}
    recorded = {}
    for name, checksum in checksums.items():
        if name.endswith(".py") and os.path.basename(name) == name:
            recorded[name] = checksum
    return recorded


def config_checksum(values: Mapping[str, Any]) -> str:
    """Return the sha256 of the content of a config.json, leaving out the checksums in it."""
    quantization_config = dict(values["quantization_config"])
    quantization_config.pop("checksums", None)
    # A checksum cannot cover itself, and so leaves out all of them.
    content = {**values, "quantization_config": quantization_config}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def folder_checksums(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the checksums of a saved checkpoint, by file name in alphabetical order."""
    checksums = {}
    for name in os.listdir(folder):
        file = os.path.join(folder, name)
        # `listdir` gives them in any order, so the result is sorted in the end.
        is_weights = name.endswith((".safetensors", ".safetensors.index.json"))
        is_code = name == LOADING_CODE and os.path.isfile(file)
        if is_weights or is_code:
            checksums[name] = file_checksum(file)
    checksums[CONFIG] = config_checksum(read_json(os.path.join(folder, CONFIG)))
    return dict(sorted(checksums.items()))


def record_checksums(folder: str | os.PathLike[str]) -> None:
    """Write the checksums of a saved checkpoint into its config."""
    file = os.path.join(folder, CONFIG)
    values = read_json(file)
    values["quantization_config"]["checksums"] = folder_checksums(folder)
    with open(file, "w", encoding="utf-8") as stream:
        # The format in which transformers writes it, so that nothing but the checksums changes.
        stream.write(json.dumps(values, indent=2, sort_keys=True) + "\n")
