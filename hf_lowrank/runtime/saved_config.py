"""Writes into the config of a model that is saved what its layers store and which classes open it."""

from typing import TYPE_CHECKING, Any

import transformers

from .checksums import LOADING_CODE
from .errors import CompressionError
from .experts import ExpertBank
from .layers import CompressedLinear
from .skeletons import AUTO_CLASSES
from .validation import is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def record_layers(model: "PreTrainedModel") -> None:
    """Write into the model's config what its layers store now, and which experts are stored one by one.

    Layers grow when adapters are merged into them. Some may have been replaced by dense ones, or have gone with their
    block. The config may have been replaced as well.

    Raises:
        CompressionError: if a layer is not where the config has it, because an adapter wraps it.
    """
    quantizer: Any = model.hf_quantizer
    config = model.config.quantization_config = quantizer.quantization_config
    config.experts = [name for name, module in model.named_modules() if isinstance(module, ExpertBank)]
    layers, found = {}, set()
    for name in config.layers:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(module, CompressedLinear):
            layers[name] = module.spec
            found.add(module)
        elif not is_linear(module):
            raise CompressionError(
                f"{name}: found {type(module).__name__}, expected a compressed layer; if that is an adapter's, "
                "save the adapter by itself (PeftModel.save_pretrained) or merge it first (merge_and_unload)"
            )
    # Where blocks were taken out, the layers of later ones have new names.
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear) and module not in found:
            layers[name] = module.spec
    config.layers = layers


def auto_map(model: "PreTrainedModel") -> dict[str, str]:
    """Return the `auto_map` of a checkpoint: AutoConfig and every Auto class that knows the model's config."""
    module = LOADING_CODE.removesuffix(".py")
    entries = {"AutoConfig": f"{module}.CompressedAutoConfig"}
    for name in AUTO_CLASSES:
        if type(model.config) in getattr(transformers, name)._model_mapping:
            entries[name] = f"{module}.Compressed{name}"
    return entries
