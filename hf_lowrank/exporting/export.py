"""The one entrance to all exports: opens a checkpoint, writes it in another format, publishes it when whole."""

import importlib.util
from pathlib import Path

from ..execution.files import atomic_file, files_size, system_message
from ..execution.output_folder import check_free, new_folder
from ..models.loading import compression_of, load_config, load_model, load_tokenizer
from ..runtime.errors import CompressionError
from ..runtime.privacy import public_name
from . import compressed_tensors
from .report import Export

FORMATS = ("compressed-tensors", "gguf")
DENSE_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
"""GGUF's types for matrices that are not stored as integers. `auto` is the dtype that they have."""


def export(
    source: str | Path,
    output: str | Path,
    format: str,
    *,
    exact: bool = False,
    dense_type: str = "auto",
    overwrite: bool = False,
) -> Export:
    """Write a compressed checkpoint in the format of other engines, value for value as far as that can hold them.

    Args:
        source: a compressed checkpoint: a folder or a name on the Hub.
        output: the folder to write (`compressed-tensors`), or the file (`gguf`).
        format: one of `FORMATS`.
        exact: refuse if a compressed layer would get other values than it has, by rounding or by being made dense.
        dense_type: for `gguf`, one of `DENSE_TYPES`.
        overwrite: replace what is at `output`.

    Raises:
        CompressionError: if the format cannot hold the model, or the output cannot be written. Nothing is left behind.
    """
    _check_choices(format, dense_type)
    target = Path(output)
    if format == "gguf":
        _check_file(target, overwrite)
    else:
        check_free(target, overwrite)
    if compression_of(load_config(str(source))) is None:
        raise CompressionError(f"{source}: is not compressed by hf_lowrank; name a compressed checkpoint")
    if format == "gguf":
        return _to_gguf(str(source), target, exact, dense_type)
    model = load_model(str(source))
    with new_folder(target, overwrite) as folder:
        layers = compressed_tensors.write(model, folder, exact)
        size = files_size(folder)
    return Export(target, size, layers)


def _check_choices(format: str, dense_type: str) -> None:
    if format not in FORMATS:
        raise CompressionError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if dense_type not in DENSE_TYPES:
        raise CompressionError(f"dense type {dense_type!r}: expected one of {', '.join(DENSE_TYPES)}")
    if dense_type != "auto" and format != "gguf":
        raise CompressionError(f"dense type {dense_type}: only gguf has it; leave it out for {format}")
    if format == "gguf" and importlib.util.find_spec("gguf") is None:
        raise CompressionError("gguf needs the package of that name: pip install 'hf_lowrank[gguf]'")


def _check_file(file: Path, overwrite: bool) -> None:
    """Raise CompressionError if a file cannot be written, or is there already."""
    if file.is_dir():
        raise CompressionError(f"{file}: is a folder; name the file to write, such as {file / 'model.gguf'}")
    if file.exists() and not overwrite:
        raise CompressionError(f"{file}: exists; choose another name or add --overwrite")


def _to_gguf(source: str, file: Path, exact: bool, dense_type: str) -> Export:
    from . import gguf, gguf_families

    gguf_families.architecture_of(load_config(source).get_text_config())  # refuses before the weights are read
    tokenizer = load_tokenizer(source)
    model = load_model(source)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial:
            layers = gguf.write(model, tokenizer, partial, public_name(source), exact, dense_type)
            size = partial.stat().st_size
    except OSError as error:
        raise CompressionError(
            f"{file}: cannot be written ({system_message(error)}); nothing was left behind"
        ) from error
    return Export(file, size, layers)
