"""hf_lowrank: sparse + low-rank (+ binary) layers for Hugging Face Transformers.

Importing the package registers the plugin: compressed checkpoints then open with `from_pretrained`. It imports neither
torch nor transformers by itself. The plugin waits until a program imports them, and every public name is imported when
it is first used.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import registration
from .runtime.errors import CheckpointError, CompressionError, NumericalError
from .version import __version__

if TYPE_CHECKING:
    from .checkpoints.inspect import inspect
    from .checkpoints.verify import verify
    from .compression.pipeline import compress
    from .evaluation.perplexity import evaluate
    from .exporting.export import export
    from .models.reference import reference_model, reference_text
    from .peft.recompression import recompress
    from .publishing.html_report import write_html_report
    from .runtime.configuration import CompressionConfig, LayerSpec
    from .runtime.layers import CompressedLinear, SparseLowRankBinaryLinear, SparseLowRankLinear
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
    "evaluate",
    "export",
    "inspect",
    "recompress",
    "reference_model",
    "reference_text",
    "verify",
    "write_html_report",
]

_HOME_MODULES = {
    "CompressedLinear": ".runtime.layers",
    "CompressionConfig": ".runtime.configuration",
    "DistillationTrainer": ".training.distillation",
    "LayerSpec": ".runtime.configuration",
    "SparseLowRankBinaryLinear": ".runtime.layers",
    "SparseLowRankLinear": ".runtime.layers",
    "compress": ".compression.pipeline",
    "evaluate": ".evaluation.perplexity",
    "export": ".exporting.export",
    "inspect": ".checkpoints.inspect",
    "recompress": ".peft.recompression",
    "reference_model": ".models.reference",
    "reference_text": ".models.reference",
    "verify": ".checkpoints.verify",
    "write_html_report": ".publishing.html_report",
}
"""The module of each public name that is imported when it is first used."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import(_HOME_MODULES[name]), name)
    globals()[name] = value  # from now on, Python finds it without asking here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _import(module: str) -> Any:
    """Import a module of this package by its name relative to the package."""
    return importlib.import_module(module, __name__)


# The hooks below wait for modules that are imported later, because importing torch and transformers takes seconds.


class _Publisher:
    """Makes loading code, writes model cards and uploads folders. What it needs is imported when a model is saved."""

    def loading_code(self) -> bytes:
        code: bytes = _import(".checkpoints.loading_code").loading_code()
        return code

    def write_card(self, folder: Path, name: str | None) -> None:
        _import(".publishing.model_card").write_model_card(folder, name)

    def upload(self, folder: Path, repo_id: str, **options: Any) -> Any:
        return _import(".publishing.hub").upload(folder, repo_id, **options)

    def push(self, save: Any, repo_id: str, **options: Any) -> Any:
        return _import(".publishing.hub").push_model(save, repo_id, **options)


def _add_publisher() -> None:
    """Let saved models have loading code and a card, and let `push_to_hub` upload all that belongs to them."""
    _import(".runtime.saving").CompleteSave.publisher = _Publisher()


def _offer_kernels() -> None:
    """Let the first product of a compressed layer load the kernels of this machine."""
    _import(".runtime.ops").on_first_use(lambda: _import(".kernels").load_by_default())


def _register_quantizer() -> None:
    """Make transformers know the quantizer, and let it compress dense models that are loaded with a recipe."""
    quantizer = sys.modules[f"{__name__}.runtime.quantizer"]
    quantizer.CompressionQuantizer.compress_on_load = staticmethod(_compress_on_load)
    quantizer.register(override=True)


def _compress_on_load(model: Any, config: "CompressionConfig") -> None:
    _import(".compression.pipeline").compress(model, config)


# The runtime imports nothing outside itself, because it travels in checkpoints. The package adds what it lacks there.
registration.after_import(f"{__name__}.runtime.saving", _add_publisher)
registration.after_import(f"{__name__}.runtime.ops", _offer_kernels)
registration.after_import(f"{__name__}.runtime.quantizer", _register_quantizer)
# Every way of opening a model reads its config, and then asks the quantizers for the format.
_UNOPENED = "compressed checkpoints do not open"
registration.after_foreign_import(
    "transformers.configuration_utils", lambda: _import(".runtime.load_hooks").hook_configs(), _UNOPENED
)
registration.after_foreign_import(
    "transformers.modeling_utils",
    lambda: _import(".runtime.load_hooks").hook_models(),
    "parts of compressed checkpoints do not open, and the subfolder that a model was loaded from is not known",
)
registration.after_foreign_import(
    "transformers.tokenization_utils_base",
    lambda: _import(".runtime.load_hooks").hook_tokenizers(),
    "a compressed checkpoint without a tokenizer is not named",
)
registration.after_foreign_import("transformers.quantizers.auto", lambda: _import(".runtime.quantizer"), _UNOPENED)
registration.after_foreign_import(
    "peft.tuners.tuners_utils",
    lambda: _import(".peft").extend_peft(),
    "adapters do not work on compressed layers",
)
