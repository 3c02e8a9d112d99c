"""Which linear layers are compressed, and why the others are not."""

from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from .budget import Layer
from .methods import Method
from .runtime.configuration import CompressionConfig
from .runtime.errors import CompressionError

TIED = "its weight is tied to another module"
ROUTER = "it routes tokens to experts or weighs them, and is tiny"


def select_layers(
    model: PreTrainedModel, layers: list[Layer], method: Method, config: CompressionConfig
) -> tuple[list[Layer], dict[str, str]]:
    """The layers to compress, and the reason of each layer that stays dense, by name.

    Raises:
        CompressionError: if no layer is left to compress, or a pattern of `modules_to_not_convert` matches none.
    """
    for pattern in config.modules_to_not_convert:
        if not any(matches(layer.name, pattern) for layer in layers):
            raise CompressionError(f"modules_to_not_convert: {pattern!r} matches no linear layer; a name looks like {layers[0].name!r}")
    shared = _shared_weights(model)
    compressed, reasons = [], {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        if any(matches(layer.name, pattern) for pattern in config.modules_to_not_convert):
            reasons[layer.name] = "left dense by modules_to_not_convert"
        elif id(module.weight) in shared:
            reasons[layer.name] = TIED
        elif layer.role == "router":
            reasons[layer.name] = ROUTER
        elif reason := method.leaves_dense(layer, config.ratio):
            reasons[layer.name] = reason
        else:
            compressed.append(layer)
    if not compressed:
        raise CompressionError(f"{method.name} leaves every layer dense ({next(iter(reasons.values()))}); nothing to compress")
    return compressed, reasons


def matches(name: str, pattern: str) -> bool:
    """Whether a module name is the pattern, ends with it after a dot, lies under it, or fits it as a shell pattern."""
    return (
        name == pattern
        or name.endswith(f".{pattern}")
        or name.startswith(f"{pattern}.")
        or f".{pattern}." in name
        or fnmatchcase(name, pattern)
    )


def _shared_weights(model: nn.Module) -> set[int]:
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}
