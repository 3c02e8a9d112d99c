"""Where the blocks, the linear layers and the feed-forward networks of a model are: by structure, names only where it cannot tell."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .methods.base import Layer
from .runtime.errors import CompressionError
from .runtime.validation import dense_shape

ATTENTION_ROLES = {
    "query": ("q_proj", "query", "q", "q_lin"),
    "key": ("k_proj", "key", "k", "k_lin"),
    "value": ("v_proj", "value", "v", "v_lin"),
    "output": ("o_proj", "out_proj", "o", "out_lin"),
}
"""Query, key and value projections see the same input and may have the same shape: only their names tell them apart."""


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network inside a block: `inputs` (gate and up, or one of them) produce the neurons that `output` reads."""

    inputs: tuple[str, ...]
    output: str


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense linear layer that can be compressed; subclasses may compute something else."""
    return type(module) in (nn.Linear, Conv1D)


def find_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The blocks of a model by name, in the order of the model: the elements of its outermost lists of modules with linears.

    Raises:
        CompressionError: if there is no such list.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{block}.") for block in blocks):
            for child, block in module.named_children():
                if any(is_linear(part) for part in block.modules()):
                    blocks[f"{name}.{child}"] = block
    if not blocks:
        raise CompressionError(f"{type(model).__name__}: found no list of blocks with linear layers; nothing to compress")
    return blocks


def find_layers(blocks: dict[str, nn.Module]) -> list[Layer]:
    """Every dense linear layer of the blocks, with its role."""
    layers = []
    for index, (block_name, block) in enumerate(blocks.items()):
        networks = find_feed_forwards(block)
        roles = dict.fromkeys((network.output for network in networks), "ffn_out")
        roles |= {name: "ffn_in" for network in networks for name in network.inputs}
        for name, module in _linears(block):
            role = roles.get(name) or _attention_role(name)
            layers.append(Layer(f"{block_name}.{name}", index, len(blocks), role, *dense_shape(module)))
    return layers


def find_feed_forwards(block: nn.Module) -> list[FeedForward]:
    """The feed-forward networks of a block: siblings of shapes (f, d), maybe twice, and (d, f), none of them part of attention."""
    siblings: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in _linears(block):
        if _attention_role(name) == "other":
            siblings.setdefault(name.rpartition(".")[0], {})[name] = dense_shape(module)
    networks = []
    for shapes in siblings.values():
        for output, (d, f) in shapes.items():
            inputs = tuple(name for name, shape in shapes.items() if shape == (f, d) and name != output)
            if f > d and len(inputs) in (1, 2) and len(shapes) == len(inputs) + 1:
                networks.append(FeedForward(inputs, output))
    return networks


def fused_experts(model: PreTrainedModel, blocks: dict[str, nn.Module]) -> dict[str, int]:
    """Parameters of three dimensions in the blocks (fused mixture-of-experts weights), which are no linear layers: name → entries."""
    return {
        f"{block_name}.{name}": parameter.numel()
        for block_name, block in blocks.items()
        for name, parameter in block.named_parameters()
        if parameter.dim() == 3
    }


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name, module) for name, module in block.named_modules() if is_linear(module))


def _attention_role(name: str) -> str:
    last = name.rpartition(".")[2]
    return next((role for role, names in ATTENTION_ROLES.items() if last in names), "other")
