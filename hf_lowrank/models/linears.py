"""The weight of a dense linear layer as (out_features, in_features), whichever way the layer stores it, and its reordering."""

from collections.abc import Iterator

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

CHUNK = 2**21
"""Entries of a matrix that are worked on at a time where that saves memory."""


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """The rows of a matrix (m, n), some at a time."""
    step = max(CHUNK // max(matrix.shape[1], 1), 1)
    return (slice(first, first + step) for first in range(0, matrix.shape[0], step))


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out_features, in_features)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def is_finite(tensor: Tensor) -> bool:
    """Whether every value of a float tensor is finite, without a tensor of answers."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())  # NaN is propagated


def permute_outputs(module: nn.Module, order: Tensor) -> None:
    """Reorder the output features of a linear layer, in place."""
    dense_weight(module).copy_(dense_weight(module)[order].clone())
    if isinstance(module.bias, Tensor):
        module.bias.data.copy_(module.bias.data[order].clone())


def permute_inputs(module: nn.Module, order: Tensor) -> None:
    """Reorder the input features of a linear layer, in place."""
    dense_weight(module).copy_(dense_weight(module)[:, order].clone())
