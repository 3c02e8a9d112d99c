"""Where the blocks, the linear layers and the feed-forward networks of a model are: by structure, names only where it cannot tell."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..methods.base import Layer
from ..runtime.errors import CompressionError
from ..runtime.experts import ExpertBank, is_fused_experts
from ..runtime.validation import dense_shape, is_linear

ATTENTION_ROLES = {
    "query": ("q_proj", "query", "q", "q_lin"),
    "key": ("k_proj", "key", "k", "k_lin"),
    "value": ("v_proj", "value", "v", "v_lin"),
    "output": ("o_proj", "out_proj", "o", "out_lin"),
}
"""Query, key and value projections see the same input and may have the same shape: only their names tell them apart."""


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network inside a block: `inputs` (gate and up, or one of them) produce the neurons that `output` reads.

    Attributes:
        fused: whether the one input holds gate and up, (2f, d), one after the other.
    """

    inputs: tuple[str, ...]
    output: str
    fused: bool = False


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
        raise CompressionError(
            f"{type(model).__name__}: found no list of blocks with linear layers; nothing to compress"
        )
    return blocks


def find_layers(blocks: dict[str, nn.Module]) -> list[Layer]:
    """Every dense linear layer of the blocks, with its role."""
    layers = []
    for index, (block_name, block) in enumerate(blocks.items()):
        networks = find_feed_forwards(block)
        roles = dict.fromkeys(_routers(block), "router") | dict.fromkeys(
            (network.output for network in networks), "ffn_out"
        )
        roles |= {name: "other" if network.fused else "ffn_in" for network in networks for name in network.inputs}
        for name, module in _linears(block):
            role = roles.get(name) or _attention_role(name)
            layers.append(Layer(f"{block_name}.{name}", index, len(blocks), role, *dense_shape(module)))
    return layers


def in_module_list(blocks: dict[str, nn.Module], layer: Layer) -> bool:
    """Whether a layer lies in a list inside its block, as the experts of a mixture do that is not fused."""
    block_name, block = list(blocks.items())[layer.block]
    name = layer.name.removeprefix(f"{block_name}.")
    return any(
        isinstance(module, nn.ModuleList) and name.startswith(f"{path}.") for path, module in block.named_modules()
    )


def find_feed_forwards(block: nn.Module) -> list[FeedForward]:
    """The feed-forward networks of a block: layers of shapes (f, d), maybe twice, or (2f, d), and (d, f), none of them part of attention.

    They are siblings, or else (BERT) the only ones of such shapes in the block. A network with another weight over its
    neurons, such as a norm before its output, is none of them: its neurons cannot be permuted by its layers alone.
    """
    routers = set(_routers(block))
    siblings: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in _linears(block):
        if _attention_role(name) == "other" and name not in routers:
            siblings.setdefault(name.rpartition(".")[0], {})[name] = dense_shape(module)
    networks = [
        network for shapes in siblings.values() for network in _networks(shapes) if _has_plain_neurons(block, network)
    ]
    if not networks:
        scattered = {
            name: shape for shapes in siblings.values() for name, shape in shapes.items() if shape[0] != shape[1]
        }
        networks = [network for network in _networks(scattered) if _has_plain_neurons(block, network)]
    return networks


def _networks(shapes: dict[str, tuple[int, int]]) -> Iterator[FeedForward]:
    """The feed-forward network that the shapes of some layers make, if they make one and nothing else."""
    for output, (d, f) in shapes.items():
        others = {name: shape for name, shape in shapes.items() if name != output}
        gated = (
            len(others) == 2
        )  # then it is clear which is the output; of two alone it is the one that makes fewer of more
        if f != d and (gated or (f > d and len(others) == 1)) and all(shape == (f, d) for shape in others.values()):
            yield FeedForward(tuple(others), output)
        elif f != d and list(others.values()) == [(2 * f, d)]:
            yield FeedForward(tuple(others), output, fused=True)


def _has_plain_neurons(block: nn.Module, network: FeedForward) -> bool:
    """Whether no other weight beside the network has one entry for each of its neurons."""
    parent = network.output.rpartition(".")[0]
    neurons = dense_shape(block.get_submodule(network.output))[1]
    beside = [module for name, module in block.named_modules() if name.startswith(parent) and not is_linear(module)]
    return not any(
        parameter.shape == (neurons,) for module in beside for parameter in module.parameters(recurse=False)
    )


def _routers(block: nn.Module) -> list[str]:
    """Layers with one output, or with one for each of the experts that lie in the same part of the block."""
    experts = {(name.partition(".")[0], parameter.shape[0]) for name, parameter in _expert_tensors(block)}
    banks = {name: module for name, module in block.named_modules() if isinstance(module, ExpertBank)}
    experts |= {(name.partition(".")[0], len(bank)) for name, bank in banks.items()}
    shapes = {name: dense_shape(module) for name, module in _linears(block) if name.rsplit(".", 2)[0] not in banks}
    return [
        name for name, (outputs, _) in shapes.items() if outputs == 1 or (name.partition(".")[0], outputs) in experts
    ]


def separate_experts(blocks: dict[str, nn.Module]) -> dict[str, ExpertBank]:
    """Put banks in the place of those fused experts in the blocks that these can stand for; the banks by name."""
    banks = {}
    for block_name, block in blocks.items():
        for name, module in list(block.named_modules()):
            if is_fused_experts(module):
                bank = banks[f"{block_name}.{name}"] = ExpertBank(module)
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, bank)
    return banks


def fused_experts(model: PreTrainedModel, blocks: dict[str, nn.Module]) -> dict[str, int]:
    """Weights of three dimensions in the blocks (fused mixture-of-experts weights), which are no linear layers: name → entries."""
    return {
        f"{block_name}.{name}": parameter.numel()
        for block_name, block in blocks.items()
        for name, parameter in _expert_tensors(block)
    }


def _expert_tensors(block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for module_name, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.shape[0] > 1 and not isinstance(module, nn.Conv1d):
                yield f"{module_name}.{name}".lstrip("."), parameter


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name, module) for name, module in block.named_modules() if is_linear(module))


def _attention_role(name: str) -> str:
    last = name.rpartition(".")[2]
    return next((role for role, names in ATTENTION_ROLES.items() if last in names), "other")
