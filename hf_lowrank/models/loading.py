"""Open models and tokenizers from a folder or from the Hub."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..execution.files import one_line
from ..runtime.configuration import QUANT_METHOD, CompressionConfig
from ..runtime.errors import CheckpointError, CompressionError, path_in_message, quoted
from ..runtime.safetensors_headers import read_json
from ..runtime.skeletons import class_of_name
from ..runtime.validation import resolve_experts
from .offloading import copy_off_mapped_files, device_map

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Names of the dtypes in which a model can be opened. "auto" is the dtype in which it is stored."""

FILE_SUFFIXES = (".safetensors", ".json", ".bin", ".gguf")
"""Suffixes of a source that is the path of a file, not a name on the Hub."""


def load_config(source: str) -> Any:
    """Return the config of a model.

    Args:
        source: a folder, or a name on the Hub (owner/model).

    Raises:
        CompressionError: if there is no such model, or it cannot be opened.
    """
    path = Path(source)
    if not os.path.exists(source):  # unlike Path.exists, it takes a name of any length
        _check_hub_name(source)
    elif not (path / "config.json").is_file():
        raise CompressionError(f"{source}: not a model: it has no config.json")
    # Transformers raises different errors for files that are missing, damaged or of an unknown type.
    try:
        return (_own_config_class(path) or AutoConfig).from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = None if os.path.exists(source) else _not_on_hub(error)
        if reason is not None:
            raise CompressionError(f"{path_in_message(source)}: no such folder here, and {reason}") from error
        raise CompressionError(f"{source}: cannot be opened as a model ({one_line(error)})") from error


def _own_config_class(folder: Path) -> Any:
    """Return the config class of a model whose class this program has defined, and Auto classes may not know.

    None for models of other classes, and for names on the Hub.
    """
    values = read_json(str(folder / "config.json")) if folder.is_dir() else None
    if not isinstance(values, dict) or values.get("model_type") in transformers.CONFIG_MAPPING:
        return None
    names = values.get("architectures")
    model_class = class_of_name(str(names[0])) if isinstance(names, list) and names else None
    config_class = getattr(model_class, "config_class", None)
    return config_class if getattr(config_class, "model_type", None) == values.get("model_type") else None


def _check_hub_name(source: str) -> None:
    """Raise CompressionError if a source that does not exist here is a path rather than a name on the Hub.

    A path with a typing error should not be looked for on the Hub: without a network that takes half a minute, and the
    error is then about the network.
    """
    if not _is_hub_name(source):
        raise CompressionError(
            f"{path_in_message(source)}: no such folder, and no name on the Hub (owner/model); check the path"
        )
    # `owner/model` may be a path, too. It is one if there is a folder `owner`, unless the model was downloaded before.
    parent = source.partition("/")[0]
    is_cached = isinstance(try_to_load_from_cache(source, "config.json"), str)
    if Path(parent).is_dir() and not is_cached:
        raise CompressionError(
            f"{path_in_message(source)}: no such folder, though {parent} is one; check the path "
            f"(to download a model of that name from the Hub, start from a folder without {parent})"
        )


def _is_hub_name(source: str) -> bool:
    """Return whether a source is written as owner/model. A backslash, as in paths on Windows, is in no such name."""
    if source.count("/") != 1 or source.startswith((".", "~")) or source.endswith(FILE_SUFFIXES):
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _not_on_hub(error: BaseException) -> str | None:
    """Return why the Hub did not give a model, as the end of a sentence. None for an error of another kind."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):  # the model exists, and the error says how to get access to it
            return None
        if isinstance(cause, RepositoryNotFoundError):
            return "the Hub has no such model that you may read; check the name"
        if isinstance(cause, LocalEntryNotFoundError):
            if constants.HF_HUB_OFFLINE:
                return "no such model in the Hub's cache (HF_HUB_OFFLINE is set); check the path or the name"
            return "the Hub cannot be reached for a model of that name; check the path or the connection"
        cause = cause.__cause__  # what transformers raises has the Hub's own error as its cause
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
    except CompressionError:  # a compressed checkpoint is refused: the error says why in one line already
        raise
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise CompressionError(f"{source}: cannot be loaded ({one_line(error)})") from error


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
            f"{path_in_message(source)}: has no tokenizer that can be opened ({one_line(error)}); add tokenizer.json "
            "to the folder"
        ) from error


def skeleton(config: Any, dtype: str = "auto") -> PreTrainedModel:
    """Return the dense model of a config on the meta device, which has shapes and takes no memory.

    Its experts are separate where a compressed checkpoint stores them so.

    Args:
        config: the config of a dense or a compressed model.
        dtype: as for `load_model`.
    """
    # `_from_config` builds the class without looking for weights.
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


def _model_class(config: Any) -> Any:
    """Return the class that a config names.

    Where it names none that this program knows, that is the class of a language model of its type, or of the model
    without a head.

    Raises:
        CompressionError: if there is none either.
    """
    # Only classes of transformers and of this program are used: code that comes with a model is not executed.
    names = getattr(config, "architectures", None) or [""]
    named_class = class_of_name(str(names[0]))
    if named_class is not None:
        return named_class
    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        model_class = auto_class._model_mapping.get(type(config), None)
        if model_class:
            return model_class[0] if isinstance(model_class, tuple) else model_class
    raise CompressionError(
        "config.json: architectures names no model class of transformers, and "
        f"{config.model_type!r} has none by itself"
    )


def _torch_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of a name in `DTYPES`. None for "auto".

    Raises:
        CompressionError: for any other name.
    """
    if name not in DTYPES:
        raise CompressionError(f"dtype: found {quoted(name)}, expected one of {', '.join(DTYPES)}")
    return None if name == "auto" else getattr(torch, name)
