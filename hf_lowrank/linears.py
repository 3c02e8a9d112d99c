"""The weight of a dense linear layer as (out_features, in_features), whichever way the layer stores it, and its reordering."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out_features, in_features)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def permute_outputs(module: nn.Module, order: Tensor) -> None:
    """Reorder the output features of a linear layer, in place."""
    dense_weight(module).copy_(dense_weight(module)[order].clone())
    if isinstance(module.bias, Tensor):
        module.bias.data.copy_(module.bias.data[order].clone())


def permute_inputs(module: nn.Module, order: Tensor) -> None:
    """Reorder the input features of a linear layer, in place."""
    dense_weight(module).copy_(dense_weight(module)[:, order].clone())
