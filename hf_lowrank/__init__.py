"""hf_lowrank: sparse + low-rank (+ binary) layers for Hugging Face Transformers.

Importing it registers the plugin: compressed checkpoints then open with `from_pretrained`.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .registration import after_import
from .runtime.configuration import CompressionConfig, LayerSpec
from .runtime.errors import CheckpointError, CompressionError, NumericalError
from .runtime.layers import CompressedLinear, SparseLowRankBinaryLinear, SparseLowRankLinear
from .runtime.load_hooks import hook_configs, hook_tokenizers
from .runtime.ops import on_first_use
from .runtime.saving import CompleteSave
from .version import __version__

if TYPE_CHECKING:
    from .compression.pipeline import compress
    from .training.distillation import DistillationTrainer

__all__ = [
    "CheckpointError",
    "CompressedLinear",
    "CompressionConfig",
    "CompressionError",
    "DistillationTrainer",
    "LayerSpec",
    "NumericalError",
    "SparseLowRankBinaryLinear",
    "SparseLowRankLinear",
    "__version__",
    "compress",
]

_LAZY = {"DistillationTrainer": ".training.distillation", "compress": ".compression.pipeline"}


def __getattr__(name: str) -> Any:
    """What makes compressed models is imported when it is first used; opening them needs only the runtime."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _compress_on_load(model: Any, config: CompressionConfig) -> None:
    importlib.import_module(".compression.pipeline", __name__).compress_on_load(model, config)


def _load_kernels() -> None:
    importlib.import_module(".kernels", __name__).load_by_default()


class _Publisher:
    """Cards and uploads, imported when a model is saved."""

    def write_card(self, folder: Path, name: str | None) -> None:
        importlib.import_module(".publishing.model_card", __name__).write_model_card(folder, name)

    def upload(self, folder: Path, repo_id: str, **options: Any) -> Any:
        return importlib.import_module(".publishing.hub", __name__).upload(folder, repo_id, **options)


CompleteSave.publisher = _Publisher()
on_first_use(_load_kernels)


def _register() -> None:
    quantizer = sys.modules[_QUANTIZER]
    quantizer.CompressionQuantizer.compress_on_load = staticmethod(_compress_on_load)
    quantizer.register(override=True)


# Importing transformers' quantizers takes seconds, which is for the first `from_pretrained` to spend, not for this import.
_QUANTIZER = f"{__name__}.runtime.quantizer"
after_import("transformers.configuration_utils", hook_configs)
after_import("transformers.tokenization_utils_base", hook_tokenizers)
after_import(_QUANTIZER, _register)
after_import("transformers.quantizers.auto", lambda: importlib.import_module(_QUANTIZER))
# LoRA merges into compressed layers; importing PEFT takes seconds too.
after_import("peft.tuners.tuners_utils", lambda: importlib.import_module(".peft", __name__).extend_peft())
