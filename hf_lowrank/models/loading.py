"""Opening models from a folder or the Hub."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..execution.files import one_line
from ..runtime.configuration import QUANT_METHOD, CompressionConfig
from ..runtime.errors import CheckpointError, CompressionError
from ..runtime.validation import resolve_experts
from .offloading import close_files, device_map

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
        raise CompressionError(f"{source}: cannot be opened as a model ({one_line(error)})") from error


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
                close_files(model)
            return model
        return model_class.from_pretrained(source, dtype=wanted).to(device).eval()
    except CompressionError:
        raise
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise CompressionError(f"{source}: cannot be loaded ({one_line(error)})") from error


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
            f"{source}: has no tokenizer that can be opened ({one_line(error)}); add tokenizer.json to the folder"
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
