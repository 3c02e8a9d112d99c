"""Products of which Gram matrices are summed: half of each, and as quick as the dtype of the inputs allows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..models.linears import CHUNK

TRIANGLE_STEPS = 16
"""Number of parts into which the rows of a Gram matrix are divided while it is summed."""

SMALLEST_STEP = 128
"""Minimum number of rows in such a part."""


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 matrices that hold bfloat16 values be multiplied as such while active, with sums in float32.

    The result is as exact, and processors with products of bfloat16 are up to twice as quick. Nothing changes for
    other dtypes.
    """
    if dtype != torch.bfloat16:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_product(gram: Tensor, x: Tensor) -> None:
    """Add x xᵀ of every token in x (tokens, n) to a Gram matrix (n, n), in its lower triangle only.

    A Gram matrix is symmetric, so that half of the products are enough.
    """
    for rows in row_blocks(gram):
        gram[rows, : rows.stop] += x[:, rows].T @ x[:, : rows.stop]


def fill_upper_triangle(gram: Tensor) -> None:
    """Copy the lower triangle of a Gram matrix (n, n) to its upper one."""
    for rows in row_blocks(gram):
        gram[rows, rows.stop :] = gram[rows.stop :, rows].T


def row_blocks(gram: Tensor) -> Iterator[slice]:
    """Iterate over blocks of rows of a Gram matrix (n, n), so small that little is computed above the diagonal."""
    n = len(gram)
    step = max(min(CHUNK // n, n // TRIANGLE_STEPS), SMALLEST_STEP)
    for first in range(0, n, step):
        yield slice(first, min(first + step, n))
