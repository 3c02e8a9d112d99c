"""The weight of a linear layer as (out_features, in_features), the order of its features, and its replacement.

`nn.Linear` stores the weight in this order, `Conv1D` of `transformers` (GPT-2) stores it transposed.
"""

from collections.abc import Iterator

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..runtime.layers import CompressedLinear
from ..runtime.quantizer import swap_module

CHUNK = 2**21
"""Number of entries of a matrix that are worked on at a time where that saves memory."""


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Iterate over blocks of rows of a matrix (m, n), of about `CHUNK` entries each."""
    rows, columns = matrix.shape
    step = max(CHUNK // max(columns, 1), 1)
    for first in range(0, rows, step):
        yield slice(first, first + step)


def dense_weight(module: nn.Module) -> Tensor:
    """Return a view of the weight of a linear layer, (out_features, in_features), without gradients."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, Conv1D):
        return weight.detach().T
    return weight.detach()


def is_finite(tensor: Tensor) -> bool:
    """Return whether every value of a float tensor is finite, without a temporary tensor of its size."""
    if not tensor.numel():
        return True
    # NaN anywhere makes both extremes NaN.
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def permute_outputs(module: nn.Module, order: Tensor) -> None:
    """Reorder the output features of a linear layer in place, with its bias."""
    # `dense_weight` is a view, so that the copy changes the layer's own weight.
    dense_weight(module).copy_(dense_weight(module)[order].clone())
    if isinstance(module.bias, Tensor):
        module.bias.data.copy_(module.bias.data[order].clone())


def permute_inputs(module: nn.Module, order: Tensor) -> None:
    """Reorder the input features of a linear layer in place."""
    dense_weight(module).copy_(dense_weight(module)[:, order].clone())


def replace_layer(model: nn.Module, name: str, layer: CompressedLinear) -> None:
    """Replace a dense layer by a compressed one, which takes over its training mode and `requires_grad`."""
    dense = model.get_submodule(name)
    assert isinstance(dense.weight, Tensor)
    layer.replaces_conv1d = isinstance(dense, Conv1D)
    layer.requires_grad_(dense.weight.requires_grad)
    swap_module(model, name, layer.train(dense.training))
