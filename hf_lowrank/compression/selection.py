"""Which linear layers are compressed, and why the others are not."""

from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from ..budget import Layer
from ..methods import Method
from ..models.architectures import fused_experts, in_module_list, is_linear
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError

TIED = "its weight is tied to another module"
UNREACHED = "no calibration batch comes through its block; give batches with the inputs that it reads"
UNCALLED = "calibration never calls it: its weight is not used, or read in another way"
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
            raise CompressionError(
                f"modules_to_not_convert: {pattern!r} matches no linear layer; a name looks like {layers[0].name!r}"
            )
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
        raise CompressionError(
            f"{method.name} leaves every layer dense ({next(iter(reasons.values()))}); nothing to compress"
        )
    return compressed, reasons


def uncalled_layers(blocks: dict[str, nn.Module], layers: list[Layer], called: set[str]) -> dict[str, str]:
    """The reason of each layer that calibration never calls, by name: the model may read its weight in another way.

    Experts (layers in a list inside a block) are called only for some tokens: those without any are compressed without data.
    """
    used = {layer.block for layer in layers if layer.name in called}
    left = {}
    for layer in layers:
        if layer.block not in used:
            left[layer.name] = UNREACHED
        elif layer.name not in called and not in_module_list(blocks, layer):
            left[layer.name] = UNCALLED
    return left


def left_out(model: PreTrainedModel, blocks: dict[str, nn.Module]) -> list[str]:
    """What the user must know about weights of the blocks that are no linear layers, though they compute nearly that."""
    warnings = []
    if experts := fused_experts(model, blocks):
        share = sum(experts.values()) / max(sum(p.numel() for block in blocks.values() for p in block.parameters()), 1)
        warnings.append(
            f"{len(experts)} fused expert tensors ({share:.0%} of the blocks' weights, such as {next(iter(experts))}) "
            "are no linear layers and stay dense"
        )
    for block_name, block in blocks.items():
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not is_linear(module):
                warnings.append(
                    f"{block_name}.{name} stays dense: {type(module).__name__} may compute something else than nn.Linear"
                )
    return warnings


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
