"""sha256 of the files of a checkpoint, recorded in its config when it is saved, so that a change can be found later.

The sums are in `quantization_config.checksums`, by file name: of the weights, their index, the runtime's files, and of config.json
itself, which counts without its own sums and whatever its formatting. `weights_checksum` is of the tensors, whatever the files.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .errors import CheckpointError
from .safetensors_headers import BITS, read_header, read_json, weight_files

CONFIG = "config.json"
CHUNK = 1 << 20


def file_checksum(file: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def weights_checksum(folder: str | os.PathLike[str]) -> str:
    """sha256 of every stored tensor with its name, dtype and shape; the same however they are spread over shards.

    Raises:
        CheckpointError: if a weight file is missing or damaged.
    """
    sums = []
    for file in weight_files(os.fspath(folder)):
        tensors = read_header(file)
        sizes = [math.prod(shape) * BITS[dtype] // 8 for dtype, shape in tensors.values()]
        with open(file, "rb") as stream:
            stream.seek(-sum(sizes), os.SEEK_END)
            for (name, (dtype, shape)), size in zip(tensors.items(), sizes, strict=True):
                digest = hashlib.sha256()
                for start in range(0, size, CHUNK):
                    digest.update(stream.read(min(CHUNK, size - start)))
                sums.append(f"{name} {dtype} {list(shape)} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(sums)).encode()).hexdigest()


def check_weights(files: Sequence[str], recorded: Mapping[str, str]) -> None:
    """Compare the weights' files with the sums recorded when they were saved; files without one are not judged.

    Raises:
        CheckpointError: if a file is not the one that was saved.
    """
    judged = [file for file in files if os.path.basename(file) in recorded]
    with ThreadPoolExecutor() as pool:
        for file, found in zip(judged, pool.map(file_checksum, judged), strict=True):
            name = os.path.basename(file)
            if found != recorded[name]:
                raise CheckpointError(
                    f"{name}: sha256 is {found}, expected {recorded[name]} of when it was saved; download it again, "
                    f"or, if it was you who changed it, delete its line under checksums in {CONFIG}"
                )


def config_checksum(values: Mapping[str, Any]) -> str:
    """sha256 of the content of a config.json without the checksums in it."""
    recorded = {name: value for name, value in values["quantization_config"].items() if name != "checksums"}
    content = json.dumps({**values, "quantization_config": recorded}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def folder_checksums(folder: str | os.PathLike[str], runtime_files: tuple[str, ...]) -> dict[str, str]:
    """The checksums of a saved checkpoint, by file name."""
    weights = [name for name in os.listdir(folder) if name.endswith((".safetensors", ".safetensors.index.json"))]
    runtime = [name for name in runtime_files if os.path.isfile(os.path.join(folder, name))]
    sums = {name: file_checksum(os.path.join(folder, name)) for name in (*weights, *runtime)}
    return dict(sorted({**sums, CONFIG: config_checksum(read_json(os.path.join(folder, CONFIG)))}.items()))


def record_checksums(folder: str | os.PathLike[str], runtime_files: tuple[str, ...]) -> None:
    """Write the checksums of a saved checkpoint into its config."""
    file = os.path.join(folder, CONFIG)
    values = read_json(file)
    values["quantization_config"]["checksums"] = folder_checksums(folder, runtime_files)
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(values, indent=2, sort_keys=True) + "\n")
