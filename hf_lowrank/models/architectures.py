"""Find the blocks, linear layers and feed-forward networks of a model.

They are found by structure, and by name only where structure does not tell.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..budget import Layer
from ..runtime.errors import CompressionError
from ..runtime.experts import ExpertBank, is_fused_experts
from ..runtime.layers import CompressedLinear
from ..runtime.validation import dense_shape, is_linear

ATTENTION_ROLES = {
    "query": ("q_proj", "query", "q", "q_lin"),
    "key": ("k_proj", "key", "k", "k_lin"),
    "value": ("v_proj", "value", "v", "v_lin"),
    "output": ("o_proj", "out_proj", "o", "out_lin"),
}
"""Names of attention projections by role.

Query, key and value see the same input and may have the same shape: only their names tell them apart.
"""


KINDS_OF_DATA = ("inputs", "input_ids", "input_values", "input_features", "pixel_values")
"""Names by which models take texts, sounds and pictures."""


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network inside a block.

    Attributes:
        inputs: the layers that produce the neurons: gate and up, or one layer.
        output: the layer that reads the neurons.
        fused: whether the only input layer holds gate and up, (2f, d), one after the other.
    """

    inputs: tuple[str, ...]
    output: str
    fused: bool = False


def find_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the blocks of a model by name, in the order of the model.

    They are those elements of its outermost module lists that contain linear layers. A linear layer by itself, such as
    one head of several, is no block, and a list in a list is a further list of blocks.

    Raises:
        CompressionError: if there are none.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # A list inside a block, such as one of experts, is not a list of blocks.
        if not isinstance(module, nn.ModuleList) or _is_inside(name, blocks):
            continue
        for child, block in module.named_children():
            if _is_block(block):
                blocks[f"{name}.{child}"] = block
    if not blocks:
        raise CompressionError(
            f"{type(model).__name__}: found no list of blocks with linear layers; nothing to compress"
        )
    return blocks


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return the embeddings of a model's tokens. None if it has no one place of them, as speech and vision models."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def codebooks(model: PreTrainedModel) -> int:
    """Return of how many codebooks a model reads the codes, in rows of `input_ids`. Zero if it reads one of tokens."""
    embeddings = input_embeddings(model)
    return len(embeddings) if isinstance(embeddings, nn.ModuleList) else 0


def forward_names(module: nn.Module) -> list[str]:
    """Return the names of what a module's `forward` takes, in their order. Empty if it names nothing.

    One that hands all arguments on, as those of subclasses do, takes what the class takes that it is derived from.
    """
    inherited = [vars(base)["forward"] for base in type(module).__mro__ if "forward" in vars(base)]
    for forward in [module.forward, *inherited]:
        names = []
        for parameter in inspect.signature(forward).parameters.values():
            if parameter.name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                names.append(parameter.name)
        if names:
            return names
    return []


def main_input(model: PreTrainedModel) -> str:
    """Return the name of the input that a model cannot do without, such as `input_ids` or `pixel_values`."""
    names = forward_names(model)
    # Parts of models by themselves often have the name that another class set for the whole.
    if isinstance(model.main_input_name, str) and (model.main_input_name in names or not names):
        return model.main_input_name
    return names[0]


def main_inputs(model: PreTrainedModel) -> list[str]:
    """Return the names of the inputs of which a model cannot do without one."""
    main = main_input(model)
    if main != "inputs":
        return [main]
    # This name stands for data of any kind. Some models take it by its own name, too.
    return [name for name in forward_names(model) if name in KINDS_OF_DATA]


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    """Return the base model, which computes all blocks, or the model itself where its heads have blocks, too."""
    base = model.base_model
    if not isinstance(base, PreTrainedModel) or main_input(base) != main_input(model):
        return model
    for head in model.children():
        if head is not base and _has_blocks(head):
            return model
    return base


def _has_blocks(module: nn.Module) -> bool:
    """Return whether a part of a model has a list of blocks, dense or compressed."""
    lists = [inner for inner in module.modules() if isinstance(inner, nn.ModuleList)]
    return any(_is_block(element) for inner in lists for element in inner)


def _is_block(module: nn.Module) -> bool:
    """Return whether an element of a module list is a block, not a layer by itself or a further list."""
    if isinstance(module, nn.ModuleList) or _was_linear(module):
        return False
    # Embeddings and norms may stand in lists, too.
    return any(map(_was_linear, module.modules()))


def _was_linear(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, CompressedLinear)


def _is_inside(name: str, blocks: dict[str, nn.Module]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def find_layers(blocks: dict[str, nn.Module]) -> list[Layer]:
    """Return every dense linear layer of the blocks, with its role. One that blocks share belongs to the first."""
    layers = []
    found: set[int] = set()
    for index, (block_name, block) in enumerate(blocks.items()):
        roles = _roles(block)
        for name, module in _linears(block):
            if id(module) in found:
                continue
            found.add(id(module))
            role = roles.get(name) or _attention_role(name)
            layers.append(Layer(f"{block_name}.{name}", index, len(blocks), role, *dense_shape(module)))
    return layers


def _roles(block: nn.Module) -> dict[str, str]:
    """Return the roles of routers and of the layers of feed-forward networks, by name within the block."""
    roles = dict.fromkeys(_routers(block), "router")
    networks = find_feed_forwards(block)
    for network in networks:
        roles[network.output] = "ffn_out"
    # A fused input is gate and up in one: methods that treat the inputs of a network apart leave it alone.
    for network in networks:
        input_role = "other" if network.fused else "ffn_in"
        roles |= dict.fromkeys(network.inputs, input_role)
    return roles


def in_module_list(blocks: dict[str, nn.Module], layer: Layer) -> bool:
    """Return whether a layer lies in a module list inside its block, as experts do that are not fused."""
    block_name, block = list(blocks.items())[layer.block]
    name_in_block = layer.name.removeprefix(f"{block_name}.")
    for path, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and name_in_block.startswith(f"{path}."):
            return True
    return False


def find_feed_forwards(block: nn.Module) -> list[FeedForward]:
    """Return the feed-forward networks of a block.

    A network has one or two layers of shape (f, d), or one of (2f, d), and one of (d, f), none of them part of
    attention. They are siblings, or else the only layers of such shapes in the block (BERT). A network with another
    weight over its neurons, such as a norm before its output, is not returned: its neurons cannot be permuted by its
    layers alone.
    """
    routers = set(_routers(block))
    shapes_by_parent: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in _linears(block):
        # Attention has layers of such shapes, too, where keys and values are narrower than queries.
        if _attention_role(name) == "other" and name not in routers:
            parent = name.rpartition(".")[0]
            shapes_by_parent.setdefault(parent, {})[name] = dense_shape(module)
    networks: list[FeedForward] = []
    for shapes in shapes_by_parent.values():
        networks += _permutable_networks(block, shapes)
    if networks:
        return networks
    # The layers may lie in different modules; square ones are rather part of attention.
    scattered: dict[str, tuple[int, int]] = {}
    for shapes in shapes_by_parent.values():
        for name, shape in shapes.items():
            if shape[0] != shape[1]:
                scattered[name] = shape
    return _permutable_networks(block, scattered)


def _permutable_networks(block: nn.Module, shapes: dict[str, tuple[int, int]]) -> list[FeedForward]:
    """Return the feed-forward network that layers of these shapes make, if its neurons can be permuted."""
    return [network for network in _networks(shapes) if _has_plain_neurons(block, network)]


def _networks(shapes: dict[str, tuple[int, int]]) -> Iterator[FeedForward]:
    """Yield the feed-forward network that layers of these shapes make, if they make one and nothing else."""
    for output, (d, f) in shapes.items():
        inputs = {name: shape for name, shape in shapes.items() if name != output}
        if f == d:  # square matrices cannot be told apart
            continue
        # Of three layers the shapes tell which is the output. Of two it is the layer with fewer outputs than inputs.
        count_is_plausible = len(inputs) == 2 or (len(inputs) == 1 and f > d)
        if count_is_plausible and all(shape == (f, d) for shape in inputs.values()):
            yield FeedForward(tuple(inputs), output)
        elif list(inputs.values()) == [(2 * f, d)]:
            yield FeedForward(tuple(inputs), output, fused=True)


def _has_plain_neurons(block: nn.Module, network: FeedForward) -> bool:
    """Return whether no weight outside the network's layers has one entry for each of its neurons."""
    parent = network.output.rpartition(".")[0]
    neurons = dense_shape(block.get_submodule(network.output))[1]
    for name, module in block.named_modules():
        if is_linear(module) or not name.startswith(parent):
            continue
        for parameter in module.parameters(recurse=False):
            # It is a norm or a scale, which would have to be permuted, too.
            if parameter.shape == (neurons,):
                return False
    return True


def _routers(block: nn.Module) -> list[str]:
    """Return the layers with one output, or with one for each of the experts in the same part of the block.

    Layers with one output are gates of shared experts. Modules with the same first name in a block make a part of it.
    """
    experts = {(_part(name), parameter.shape[0]) for name, parameter in _expert_tensors(block)}
    banks = {name: module for name, module in block.named_modules() if isinstance(module, ExpertBank)}
    experts |= {(_part(name), len(bank)) for name, bank in banks.items()}
    routers = []
    for name, module in _linears(block):
        if name.rsplit(".", 2)[0] in banks:  # the layer of an expert
            continue
        outputs, _ = dense_shape(module)
        if outputs == 1 or (_part(name), outputs) in experts:
            routers.append(name)
    return routers


def _part(name: str) -> str:
    """Return the part of a block in which a module lies."""
    return name.partition(".")[0]


def separate_experts(blocks: dict[str, nn.Module]) -> dict[str, ExpertBank]:
    """Replace the fused experts in the blocks by banks, where banks compute the same, and return the banks by name."""
    banks = {}
    for block_name, block in blocks.items():
        for name, module in list(block.named_modules()):
            # The list of modules is complete by now, so that a bank may take a module's place.
            if is_fused_experts(module):
                bank = ExpertBank(module)
                banks[f"{block_name}.{name}"] = bank
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, bank)
    return banks


def fused_experts(model: PreTrainedModel, blocks: dict[str, nn.Module]) -> dict[str, int]:
    """Return the number of entries of the fused expert weights in the blocks by name.

    They have three dimensions and are not linear layers, so that they are not compressed.
    """
    entries = {}
    for block_name, block in blocks.items():
        for name, parameter in _expert_tensors(block):
            entries[f"{block_name}.{name}"] = parameter.numel()
    return entries


def _expert_tensors(block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights of three dimensions by name within the block, except those of convolutions."""
    for module_name, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # A first dimension of 1 belongs to a learned token or position, not to experts.
            if parameter.dim() == 3 and parameter.shape[0] > 1 and not isinstance(module, nn.Conv1d):
                yield f"{module_name}.{name}".lstrip("."), parameter


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the dense linear layers of a block by name within it."""
    for name, module in block.named_modules():
        if is_linear(module):
            yield name, module


def _attention_role(name: str) -> str:
    """Return the role of an attention projection by its name, "other" for any other layer."""
    last_part = name.rpartition(".")[2]
    for role, names in ATTENTION_ROLES.items():
        if last_part in names:
            return role
    return "other"
