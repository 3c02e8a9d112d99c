"""Opening models from a folder or the Hub, and writing folders that appear only when they are complete."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..execution.locking import is_held, locked
from ..runtime.configuration import QUANT_METHOD, CompressionConfig
from ..runtime.errors import CheckpointError, CompressionError
from ..runtime.validation import resolve_experts
from .offloading import copy_off_mapped_files, device_map

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_config(source: str) -> Any:
    """The config of a model.

    Raises:
        CompressionError: if there is no model.
    """
    path = Path(source)
    if not path.exists() and (path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1):
        raise CompressionError(f"{source}: no such folder, and no name on the Hub (owner/model); check the path")
    if path.exists() and not (path / "config.json").is_file():
        raise CompressionError(f"{source}: not a model: it has no config.json")
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise CompressionError(f"{source}: cannot be opened as a model ({_first_line(error)})") from error


def load_model(
    source: str, dtype: str = "auto", device: str = "cpu", offload_folder: Path | None = None
) -> PreTrainedModel:
    """A model, dense or compressed, of the class that its config names.

    Args:
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        offload_folder: leave the blocks on disk; here go weights that the model stores in another form than its files.

    Raises:
        CompressionError: if it cannot be opened, saying why.
    """
    wanted = _torch_dtype(dtype) or "auto"
    config = load_config(source)
    model_class = _model_class(config)
    try:
        if offload_folder is not None:
            places = device_map(skeleton(config))
            model = model_class.from_pretrained(
                source, dtype=wanted, device_map=places, offload_folder=str(offload_folder)
            ).eval()
            if any(offload_folder.iterdir()):
                copy_off_mapped_files(model)
            return model
        return model_class.from_pretrained(source, dtype=wanted).to(device).eval()
    except CompressionError:
        raise
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise CompressionError(f"{source}: cannot be loaded ({_first_line(error)})") from error


def load_tokenizer(source: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        CompressionError: if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:  # a TypeError: a file that it needs is not there
        raise CompressionError(
            f"{source}: has no tokenizer that can be opened ({_first_line(error)}); add tokenizer.json to the folder"
        ) from error


def skeleton(config: Any, dtype: str = "auto") -> PreTrainedModel:
    """The dense model of a config on the meta device: shapes without memory; its experts one by one where a checkpoint stores them so.

    Args:
        dtype: as for `load_model`.
    """
    with torch.device("meta"):
        model: PreTrainedModel = _model_class(config)._from_config(config, dtype=_torch_dtype(dtype) or config.dtype)
    compression = compression_of(config)
    resolve_experts(model, compression.experts if compression else [])
    return model


def compression_of(config: Any) -> CompressionConfig | None:
    """The compression that a model's config records; None for a model that is not compressed by this plugin."""
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
    """The class that a config names; where it names none of transformers', a language model of its type, or the model without a head."""
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named
    causal, bare = transformers.AutoModelForCausalLM._model_mapping, transformers.AutoModel._model_mapping
    known = causal.get(type(config), None) or bare.get(type(config), None)
    if known is None:
        raise CompressionError(
            f"config.json: architectures names no model class of transformers, and {config.model_type!r} has none by itself"
        )
    return known[0] if isinstance(known, tuple) else known


def _torch_dtype(name: str) -> torch.dtype | None:
    if name not in DTYPES:
        raise CompressionError(f"dtype: found {name!r}, expected one of {', '.join(DTYPES)}")
    return None if name == "auto" else getattr(torch, name)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return json.dumps(text.splitlines()[0][:300])[1:-1] if text else type(error).__name__
