"""The choice of the linear layers to compress, and the reasons of those that stay dense."""

import inspect
import re
from collections import Counter
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from ..budget import Layer
from ..methods import Method
from ..models.architectures import fused_experts, in_module_list
from ..runtime.errors import CompressionError, quoted
from ..runtime.validation import is_linear

TIED = "its weight is tied to another module"
UNREACHED = "no calibration batch comes through its block; give batches with the inputs that it reads"
UNCALLED = "calibration never calls it: its weight is not used, or read in another way"
READ = "the model asks for the dtype of its weight, which quantized values do not have"
ROUTER = "it routes tokens to experts or weighs them, and is tiny"


def select_layers(
    model: PreTrainedModel, layers: list[Layer], method: Method, ratio: float, left_dense: list[str]
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers to compress, and the reason of each layer that stays dense, by name.

    Args:
        ratio: some methods leave other layers dense at another ratio.
        left_dense: the patterns of `modules_to_not_convert`.

    Raises:
        CompressionError: if no layer is left to compress, or a pattern of `modules_to_not_convert` matches none.
    """
    # Heads and other layers outside the blocks stay dense anyway. To say so is no mistake.
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    for pattern in left_dense:
        if not any(matches(name, pattern) for name in linears):
            raise CompressionError(
                f"modules_to_not_convert: {quoted(pattern)} matches no linear layer; a name looks like "
                f"{layers[0].name!r}"
            )
    shared_weights = _shared_weights(model)
    compressed, reasons = [], {}
    for layer in layers:
        weight = model.get_submodule(layer.name).weight
        if any(matches(layer.name, pattern) for pattern in left_dense):
            reasons[layer.name] = "left dense by modules_to_not_convert"
        elif id(weight) in shared_weights:
            reasons[layer.name] = TIED
        elif layer.role == "router":
            reasons[layer.name] = ROUTER
        elif method.quantizes and _weight_is_read(model, layer.name):
            reasons[layer.name] = READ
        elif reason := method.leaves_dense(layer, ratio):
            reasons[layer.name] = reason
        else:
            compressed.append(layer)
    if not compressed:
        first_reason = next(iter(reasons.values()))
        raise CompressionError(f"{method.name} leaves every layer dense ({first_reason}); nothing to compress")
    return compressed, reasons


def uncalled_layers(blocks: dict[str, nn.Module], layers: list[Layer], called: set[str]) -> dict[str, str]:
    """Return the reason of each layer that calibration never calls, by name.

    The model may not use such a layer, or read its weight in another way.

    Experts (layers in a list inside a block) are called only for some tokens. Those without any are compressed without
    data.
    """
    reached_blocks = {layer.block for layer in layers if layer.name in called}
    reasons = {}
    for layer in layers:
        if layer.block not in reached_blocks:
            reasons[layer.name] = UNREACHED
        elif layer.name not in called and not in_module_list(blocks, layer):
            reasons[layer.name] = UNCALLED
    return reasons


def left_out(model: PreTrainedModel, blocks: dict[str, nn.Module]) -> list[str]:
    """Return warnings about weights of the blocks that are not linear layers, though they compute nearly the same."""
    warnings = []
    experts = fused_experts(model, blocks)
    if experts:
        block_parameters = 0
        for block in blocks.values():
            block_parameters += sum(parameter.numel() for parameter in block.parameters())
        share = sum(experts.values()) / max(block_parameters, 1)
        warnings.append(
            f"{len(experts)} fused expert tensors ({share:.0%} of the blocks' weights, such as {next(iter(experts))}) "
            "are no linear layers and stay dense"
        )
    for block_name, block in blocks.items():
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not is_linear(module):
                kind = type(module).__name__
                warnings.append(f"{block_name}.{name} stays dense: {kind} may compute something else than nn.Linear")
    return warnings


def matches(name: str, pattern: str) -> bool:
    """Return whether a module name is the pattern, ends with it, lies under it, or fits it as a shell pattern."""
    return (
        name == pattern
        or name.endswith(f".{pattern}")
        or name.startswith(f"{pattern}.")
        or f".{pattern}." in name
        or fnmatchcase(name, pattern)
    )


def _weight_is_read(model: nn.Module, name: str) -> bool:
    """Return whether the code around a layer reads its weight, as T5 does to cast what comes in to its dtype."""
    parent, _, child = name.rpartition(".")
    try:
        source = inspect.getsource(type(model.get_submodule(parent)).forward)
    except (OSError, TypeError):  # it was typed into an interpreter
        return False
    return re.search(rf"\bself\.{re.escape(child)}\.weight\b", source) is not None


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that more than one module holds, or that stand in more than one place.

    A layer is replaced in one place only.
    """
    holders: Counter[int] = Counter(id(parameter) for parameter in model.parameters(recurse=False))
    for parent in model.modules():
        # `children()` would leave out what stands in a module twice.
        for child in parent._modules.values():
            if child is not None:
                holders.update(id(parameter) for parameter in child.parameters(recurse=False))
    return {parameter_id for parameter_id, count in holders.items() if count > 1}
