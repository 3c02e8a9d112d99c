"""Open models and tokenizers from a folder or the Hub, and write folders that appear only when they are complete."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..execution.locking import is_held, locked
from ..runtime.configuration import QUANT_METHOD, CompressionConfig
from ..runtime.errors import CheckpointError, CompressionError
from ..runtime.validation import resolve_experts
from .offloading import copy_off_mapped_files, device_map

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Names of the dtypes in which a model can be opened. "auto" is the dtype in which it is stored."""

FILE_SUFFIXES = (".safetensors", ".json", ".bin", ".gguf")
"""Suffixes by which a source is understood as the path of a file, not as a name on the Hub."""


def load_config(source: str) -> Any:
    """Return the config of a model.

    Args:
        source: a folder, or a name on the Hub (owner/model).

    Raises:
        CompressionError: if there is no such model, or it cannot be opened.
    """
    path = Path(source)
    if not path.exists():
        _check_hub_name(source)
    elif not (path / "config.json").is_file():
        raise CompressionError(f"{source}: not a model: it has no config.json")
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = None if path.exists() else _not_on_hub(error)
        if reason is not None:
            raise CompressionError(f"{source}: no such folder here, and {reason}") from error
        raise CompressionError(f"{source}: cannot be opened as a model ({_first_line(error)})") from error


def _check_hub_name(source: str) -> None:
    """Raise CompressionError if a source that does not exist here is a path rather than a name on the Hub."""
    path = Path(source)
    if (
        path.is_absolute()
        or source.startswith((".", "~"))
        or source.endswith(("/", *FILE_SUFFIXES))
        or "\\" in source  # a path on Windows, which no name on the Hub can be
        or source.count("/") != 1
    ):
        raise CompressionError(f"{source}: no such folder, and no name on the Hub (owner/model); check the path")
    parent = source.partition("/")[0]
    # a model of that name that was downloaded before is certainly meant
    if Path(parent).is_dir() and not isinstance(try_to_load_from_cache(source, "config.json"), str):
        raise CompressionError(
            f"{source}: no such folder, though {parent} is one; check the path "
            f"(to download a model of that name from the Hub, start from a folder without {parent})"
        )


def _not_on_hub(error: BaseException) -> str | None:
    """Return why a model could not be had from the Hub, as the end of a sentence. None for an error of another kind."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):  # a model that exists: the error says how to get access to it
            return None
        if isinstance(cause, RepositoryNotFoundError):
            return "the Hub has no such model that you may read; check the name"
        if isinstance(cause, LocalEntryNotFoundError):
            if constants.HF_HUB_OFFLINE:
                return "no such model in the Hub's cache (HF_HUB_OFFLINE is set); check the path or the name"
            return "the Hub cannot be reached for a model of that name; check the path or the connection"
        cause = cause.__cause__ or cause.__context__
    return None


def load_model(
    source: str, dtype: str = "auto", device: str = "cpu", offload_folder: Path | None = None
) -> PreTrainedModel:
    """Return a model, dense or compressed, of the class that its config names.

    Args:
        source: a folder, or a name on the Hub (owner/model).
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: the device of the model. A model with an `offload_folder` is on the CPU.
        offload_folder: if given, the blocks stay on disk. The folder gets the weights that the model stores in another
            form than its files.

    Raises:
        CompressionError: if it cannot be opened, saying why.
    """
    torch_dtype = _torch_dtype(dtype) or "auto"
    config = load_config(source)
    model_class = _model_class(config)
    try:
        if offload_folder is None:
            return model_class.from_pretrained(source, dtype=torch_dtype).to(device).eval()
        model = model_class.from_pretrained(
            source, dtype=torch_dtype, device_map=device_map(skeleton(config)), offload_folder=str(offload_folder)
        ).eval()
        if any(offload_folder.iterdir()):  # weights were converted, so that whole files were read
            copy_off_mapped_files(model)
        return model
    except CompressionError:
        raise
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise CompressionError(f"{source}: cannot be loaded ({_first_line(error)})") from error


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer beside a model.

    Raises:
        CompressionError: if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:  # a TypeError: a file that it needs is missing
        raise CompressionError(
            f"{source}: has no tokenizer that can be opened ({_first_line(error)}); add tokenizer.json to the folder"
        ) from error


def skeleton(config: Any, dtype: str = "auto") -> PreTrainedModel:
    """Return the dense model of a config on the meta device, which has shapes and takes no memory.

    Its experts are separate where a compressed checkpoint stores them so.

    Args:
        config: the config of a dense or a compressed model.
        dtype: as for `load_model`.
    """
    with torch.device("meta"):
        model: PreTrainedModel = _model_class(config)._from_config(config, dtype=_torch_dtype(dtype) or config.dtype)
    compression = compression_of(config)
    resolve_experts(model, compression.experts if compression else [])
    return model


def compression_of(config: Any) -> CompressionConfig | None:
    """Return the compression that a model's config records. None for a model that this package did not compress."""
    recorded = getattr(config, "quantization_config", None)
    if isinstance(recorded, dict) and recorded.get("quant_method") == QUANT_METHOD:
        return CompressionConfig.from_dict(recorded)
    return recorded if isinstance(recorded, CompressionConfig) else None


@contextmanager
def new_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes its name only when the block ends well; nothing is left if it does not.

    What a killed process left behind, the next one that writes to the same name removes, or puts back if it was the old content.

    Raises:
        CompressionError: if `folder` exists and is not empty (unless `overwrite`), or cannot be written.
    """
    target = Path(folder).absolute()
    check_free(target, overwrite)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        try:
            with locked(partial):
                yield partial
                for file in partial.rglob("*"):
                    if file.is_file():
                        with open(file, "rb") as stream:
                            os.fsync(stream.fileno())
                old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
                if target.exists():  # aside first: a kill between the two renames loses neither
                    target.replace(old)
                partial.replace(target)
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):  # it holds the result
                    parent.rmdir()
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by an error of its own
        reason = getattr(error, "strerror", None) or error
        raise CompressionError(f"{target}: cannot be written ({reason}); nothing was left behind") from error


def _recover(target: Path) -> None:
    """Undo what a killed process left half-done beside `target`."""
    with suppress(OSError):
        for old in target.parent.glob(f".{target.name}.replaced-*"):
            if not target.exists():
                old.replace(target)
            else:
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
        for partial in target.parent.glob(f".{target.name}.partial-*"):
            if not is_held(partial):
                shutil.rmtree(partial, ignore_errors=True)


def check_free(folder: str | Path, overwrite: bool = False) -> None:
    """Raise CompressionError if an output folder holds what may not be overwritten; what killed processes left does not count."""
    target = Path(folder)
    _recover(target.absolute())
    if target.resolve() == Path.cwd():
        raise CompressionError(f"{folder}: is the current folder, which cannot be replaced; name a new one")
    if target.exists() and not overwrite and (target.is_file() or any(target.iterdir())):
        raise CompressionError(f"{target}: exists and is not empty; choose another folder or add --overwrite")


def files_size(folder: str | Path) -> int:
    """Bytes of a folder's weights on disk."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _model_class(config: Any) -> Any:
    """Return the class that a config names.

    Where it names none of transformers' own, that is the class of a language model of its type, or of the model without
    a head.

    Raises:
        CompressionError: if there is none either.
    """
    names = getattr(config, "architectures", None) or [""]
    named_class = getattr(transformers, names[0], None)
    if isinstance(named_class, type) and issubclass(named_class, PreTrainedModel):
        return named_class
    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        model_class = auto_class._model_mapping.get(type(config), None)
        if model_class:
            return model_class[0] if isinstance(model_class, tuple) else model_class
    raise CompressionError(
        f"config.json: architectures names no model class of transformers, and {config.model_type!r} has none by itself"
    )


def _torch_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of a name in `DTYPES`. None for "auto".

    Raises:
        CompressionError: for any other name.
    """
    if name not in DTYPES:
        raise CompressionError(f"dtype: found {name!r}, expected one of {', '.join(DTYPES)}")
    return None if name == "auto" else getattr(torch, name)


def _first_line(error: BaseException) -> str:
    """Return the first line of an error, at most 300 characters, with control characters escaped."""
    text = str(error).strip()
    return json.dumps(text.splitlines()[0][:300])[1:-1] if text else type(error).__name__
