"""`hf-lowrank verify`: everything that can be known about a checkpoint without running it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..runtime.checksums import CONFIG, config_checksum, file_checksum
from ..runtime.config_checks import holds_checkpoint, mentions_checkpoint
from ..runtime.content_checks import check_contents, check_finite_values
from ..runtime.errors import CheckpointError, CompressionError, one_line
from ..runtime.safetensors_headers import read_headers, read_json, weight_files
from ..runtime.saving import RUNTIME_FILES
from ..runtime.validation import dense_shape, validate_checkpoint
from ..version import __version__

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
RUNTIME = Path(__file__).parents[1] / "runtime"


@dataclass
class Verification:
    """What was found in a checkpoint.

    Attributes:
        layers, tensors: how many compressed layers and tensors were checked.
        runtime: whose the loading code beside the weights is: "hf_lowrank 0.1.0", "none", or "unknown" if it has been changed.
        problems: what is wrong, one line each; a checkpoint without problems is what its author saved.
    """

    folder: str
    layers: int = 0
    tensors: int = 0
    runtime: str = "none"
    problems: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_checkpoint(folder: str | Path) -> Verification:
    """Check a compressed checkpoint against its config, its model and its checksums, reading every byte and running none.

    Raises:
        CompressionError: if the folder is not there, or holds a model that is not compressed; whatever is wrong within it is in the result.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CompressionError(f"{folder}: no such folder; verify reads a checkpoint on this machine")
    if (folder / CONFIG).is_file() and not holds_checkpoint(str(folder)) and not mentions_checkpoint(str(folder)):
        raise CompressionError(f"{folder}: is not compressed by hf_lowrank; verify reads compressed checkpoints")
    result = Verification(str(folder))

    def attempt(check: Callable[[], None]) -> bool:
        try:
            check()
        except CheckpointError as error:
            result.problems.append(str(error))
            return False
        except OSError as error:
            result.problems.append(f"{error.filename or folder}: cannot be read ({error.strerror or error})")
            return False
        return True

    values: dict[str, Any] = {}
    attempt(lambda: _check_structure(folder, values, result))
    attempt(lambda: _check_runtime(folder, result))
    if values:
        attempt(lambda: _check_sums(folder, values, result))
        attempt(lambda: _check_strays(folder, result))
    result.problems = [one_line(problem) for problem in result.problems]
    return result


def released_runtimes() -> dict[str, dict[str, str]]:
    """sha256 of the runtime's files of every release, by version; this installation's too."""
    released: dict[str, dict[str, str]] = json.loads(
        (files("hf_lowrank") / "data" / "releases.json").read_text(encoding="utf-8")
    )
    return {**released, __version__: {name: file_checksum(RUNTIME / name) for name in RUNTIME_FILES}}


def _check_structure(folder: Path, values: dict[str, Any], result: Verification) -> None:
    read = read_json(str(folder / CONFIG))
    if not isinstance(read, dict):
        raise CheckpointError(
            f"{folder / CONFIG}: found {type(read).__name__}, expected a dictionary; download it again"
        )
    model, compression = validate_checkpoint(read, str(folder))
    values.update(read)
    shards = weight_files(str(folder))
    stored = read_headers(shards)
    result.layers, result.tensors = len(compression.layers), len(stored)
    opened = {Path(shard).name: safe_open(shard, framework="pt") for shard in shards}
    for name, tensor in stored.items():
        layer = name.rpartition(".")[0]
        values_of = opened[tensor.file].get_tensor(name)
        try:
            check_finite_values(name, values_of)
            if layer in compression.layers:
                shape = dense_shape(model.get_submodule(layer))
                check_contents(layer, compression.layers[layer], *shape, {name.rpartition(".")[2]: values_of})
        except CheckpointError as error:
            result.problems.append(str(error))


def _check_runtime(folder: Path, result: Verification) -> None:
    found = {name: file_checksum(folder / name) for name in RUNTIME_FILES if (folder / name).is_file()}
    result.runtime = next(
        (f"hf_lowrank {version}" for version, sums in released_runtimes().items() if found == sums), "unknown"
    )
    if not found:
        result.runtime = "none"
    elif result.runtime == "unknown":
        installed = released_runtimes()[__version__]
        changed = sorted(name for name in installed.keys() | found.keys() if found.get(name) != installed.get(name))
        raise CheckpointError(
            f"{', '.join(changed)}: not those of hf_lowrank {__version__}, nor are the runtime files those of any other release; "
            "do not open the checkpoint with trust_remote_code=True, import hf_lowrank instead, which does not run them"
        )


def _check_sums(folder: Path, values: dict[str, Any], result: Verification) -> None:
    recorded = values["quantization_config"].get("checksums") or {}
    present = {
        *(Path(file).name for file in weight_files(str(folder))),
        *(name for name in RUNTIME_FILES if (folder / name).is_file()),
        CONFIG,
    }
    for name in sorted(present | recorded.keys()):
        if name not in recorded:
            result.problems.append(
                f"{name}: has no checksum in {CONFIG}, expected one; save the checkpoint again to record it"
            )
        elif not (folder / name).is_file():
            result.problems.append(f"{name}: missing, but {CONFIG} has its checksum; download it again")
        elif (config_checksum(values) if name == CONFIG else file_checksum(folder / name)) != recorded[name]:
            result.problems.append(
                f"{name}: sha256 is not the recorded {recorded[name]}; it was changed after it was saved"
            )


def _check_strays(folder: Path, result: Verification) -> None:
    used = {Path(file).name for file in weight_files(str(folder))}
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES:
            result.problems.append(
                f"{file.name}: looks like a pickle, which runs code when opened; no compressed checkpoint needs it, delete it"
            )
        elif file.suffix == ".safetensors" and file.name not in used:
            result.problems.append(f"{file.name}: belongs to no tensor of the checkpoint; delete it")
