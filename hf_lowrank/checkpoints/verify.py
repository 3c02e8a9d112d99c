"""Verification of a checkpoint: everything that can be known about it without running it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..execution.files import system_message
from ..runtime.checksums import CONFIG, LOADING_CODE, config_checksum, file_checksum, recorded_code
from ..runtime.config_checks import holds_checkpoint, mentions_checkpoint
from ..runtime.content_checks import check_contents, check_finite_values
from ..runtime.errors import CheckpointError, CompressionError, path_in_message, printable
from ..runtime.safetensors_headers import read_headers, read_json, weight_files
from ..runtime.validation import dense_shape, validate_checkpoint
from ..version import __version__
from .loading_code import loading_code

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Extensions of files that Python may unpickle, which can run code."""


@dataclass
class Verification:
    """Result of checking a checkpoint.

    Attributes:
        layers, tensors: number of compressed layers and of tensors that were checked.
        runtime: release that the loading code beside the weights comes from, such as "hf_lowrank 0.1.0"; "none" if
            there is no such code, and "unknown" if it has been changed.
        problems: what is wrong, one line each. A checkpoint without problems is what its author saved.
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


def verify(folder: str | Path) -> Verification:
    """Check a compressed checkpoint against its config, its model and its checksums.

    Every byte is read, and no code of the checkpoint is run.

    Raises:
        CompressionError: if the folder does not exist, or holds a model that is not compressed. Whatever is wrong
            inside a compressed checkpoint is in the result instead.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CompressionError(f"{path_in_message(folder)}: no such folder; verify reads a checkpoint on this machine")
    # A config that is only damaged still mentions the format. Then its damage is a problem to report, and the model is
    # not foreign.
    if (folder / CONFIG).is_file() and not holds_checkpoint(str(folder)) and not mentions_checkpoint(str(folder)):
        raise CompressionError(f"{folder}: is not compressed by hf_lowrank; verify reads compressed checkpoints")
    result = Verification(str(folder))
    config: dict[str, Any] = {}
    _attempt(partial(_check_structure, folder, config, result), result)
    _attempt(partial(_check_runtime, folder, result), result)
    # Without a valid config it is not known which files should be there.
    if config:
        _attempt(partial(_check_sums, folder, config, result), result)
        _attempt(partial(_check_strays, folder, result), result)
    # Names from a checkpoint may come from a stranger, so they are made printable.
    result.problems = [printable(problem) for problem in result.problems]
    return result


def _attempt(check: Callable[[], None], result: Verification) -> None:
    """Run a check, and record the error that stops it as a problem, so that the other checks still run."""
    try:
        check()
    except CheckpointError as error:
        result.problems.append(str(error))
    except OSError as error:
        result.problems.append(f"{error.filename or result.folder}: cannot be read ({system_message(error)})")


def released_runtimes() -> dict[str, dict[str, str]]:
    """Return the sha256 of the loading code by version and file name, for every release and this installation."""
    released: dict[str, dict[str, str]] = json.loads(
        (files("hf_lowrank") / "data" / "releases.json").read_text(encoding="utf-8")
    )
    return {**released, __version__: {LOADING_CODE: hashlib.sha256(loading_code()).hexdigest()}}


def code_files(folder: Path) -> set[str]:
    """Return the names of the files of code that belong to a checkpoint, whether they are there or not.

    Checkpoints had one file for every module of the runtime before they had one for all of them. Their configs say so.
    """
    return {LOADING_CODE, *recorded_code(folder)}


def _check_structure(folder: Path, config: dict[str, Any], result: Verification) -> None:
    """Check the config, the headers of the weight files and the content of every tensor.

    Args:
        config: receives the content of `config.json`, once that and the tensors fit together.

    Raises:
        CheckpointError: if the checkpoint cannot be opened. Tensors with wrong content are problems of the result
            instead.
    """
    content = read_json(str(folder / CONFIG))
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{folder / CONFIG}: found {type(content).__name__}, expected a dictionary; download it again"
        )
    model, compression = validate_checkpoint(content, str(folder))
    config.update(content)
    shards = weight_files(str(folder))
    headers = read_headers(shards)
    # The checks below read every byte, layer by layer. What they find in one tensor does not keep them from the next.
    result.layers = len(compression.layers)
    result.tensors = len(headers)
    opened = {Path(shard).name: safe_open(shard, framework="pt") for shard in shards}
    for name, header in headers.items():
        layer, _, tensor_name = name.rpartition(".")
        tensor = opened[header.file].get_tensor(name)
        try:
            check_finite_values(name, tensor)
            if layer in compression.layers:
                shape = dense_shape(model.get_submodule(layer))
                check_contents(layer, compression.layers[layer], *shape, {tensor_name: tensor})
        except CheckpointError as error:
            result.problems.append(str(error))


def _check_runtime(folder: Path, result: Verification) -> None:
    """Return the release that the loading code beside the weights comes from.

    Raises:
        CheckpointError: if there is loading code that no release has.
    """
    present: dict[str, str] = {}
    for name in code_files(folder):
        if (folder / name).is_file():
            present[name] = file_checksum(folder / name)
    # Without loading code the checkpoint opens with the package alone, and there is no code to distrust.
    if not present:
        result.runtime = "none"
        return
    released = released_runtimes()
    # All files must come from the same release: a mixture is not a release, even if each file is known.
    for version, checksums in released.items():
        if present == checksums:
            result.runtime = f"hf_lowrank {version}"
            return
    result.runtime = "unknown"
    installed = released[__version__]
    changed = sorted(name for name in installed.keys() | present.keys() if present.get(name) != installed.get(name))
    raise CheckpointError(
        f"{', '.join(changed)}: not that of hf_lowrank {__version__}, nor is the loading code that of any other "
        "release; do not open the checkpoint with trust_remote_code=True, import hf_lowrank instead, which does not "
        "run it"
    )


def _check_sums(folder: Path, config: dict[str, Any], result: Verification) -> None:
    """Compare every file that belongs to the checkpoint with its checksum in the config."""
    recorded = config["quantization_config"].get("checksums") or {}
    weights = {Path(file).name for file in weight_files(str(folder))}
    code = {LOADING_CODE} if (folder / LOADING_CODE).is_file() else set()
    # Recorded files can be missing, and present ones can be unrecorded. Both are wrong.
    for name in sorted({CONFIG} | weights | code | recorded.keys()):
        if name not in recorded:
            result.problems.append(
                f"{name}: has no checksum in {CONFIG}, expected one; save the checkpoint again to record it"
            )
        elif not (folder / name).is_file():
            result.problems.append(f"{name}: missing, but {CONFIG} has its checksum; download it again")
        elif _checksum(folder / name, config) != recorded[name]:
            result.problems.append(
                f"{name}: sha256 is not the recorded {recorded[name]}; it was changed after it was saved"
            )


def _checksum(file: Path, config: dict[str, Any]) -> str:
    """Return the checksum of a file. The config holds the checksums, so its own is of the rest of its content."""
    if file.name == CONFIG:
        return config_checksum(config)
    return file_checksum(file)


def _check_strays(folder: Path, result: Verification) -> None:
    """Find files that no compressed checkpoint needs and that could do harm: pickles, and unused weights."""
    used = {Path(file).name for file in weight_files(str(folder))}
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES:
            result.problems.append(
                f"{file.name}: looks like a pickle, which runs code when opened; no compressed checkpoint needs it, "
                "delete it"
            )
        elif file.suffix == ".safetensors" and file.name not in used:
            result.problems.append(f"{file.name}: belongs to no tensor of the checkpoint; delete it")
