"""The tensor that a kernel writes its result to."""

import torch
from torch import Tensor


def empty_result(x: Tensor, columns: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return an empty tensor (..., columns) for x (..., n), and the same memory as a matrix (tokens, columns).

    The first one is what an operation returns. It must not be a view: torch forbids to change a view in place that a
    function made while gradients were recorded.
    """
    result = x.new_empty(*x.shape[:-1], columns, dtype=dtype)
    return result, result.view(-1, columns)
