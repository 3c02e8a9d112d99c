"""GPTQ: quantization with second-order compensation (arXiv 2210.17323)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Budget
from ..runtime.errors import CompressionError
from ..runtime.quantization import Quantized, group_scales, levels, nearest_codes
from .base import Decomposition, Statistics
from .factorization import inverse_cholesky
from .registry import register_method
from .rtn import RTN

BLOCK = 128
"""Number of columns between which updates are gathered into one matrix product."""


@register_method("gptq")
@dataclass
class GPTQ(RTN):
    """Rounds column by column. Columns not yet rounded make up for what rounding does to a column's output."""

    damping: float = field(default=0.01, metadata={"help": "λ added to the diagonal of X Xᵀ, as a share of its mean"})

    source: ClassVar[str] = "GPTQ, arXiv 2210.17323"
    needs_gram: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    factorizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise CompressionError(f"{self.name}: damping={self.damping}, expected a number above 0")

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """Minimize ‖(W − Ŵ) X‖_F approximately over the codes of Ŵ, by `compensated`."""
        gram = statistics.require("gram", self.name)
        quantized = compensated(weight, gram, self.affordable_bits(budget), self.group_size, self.damping)
        return Decomposition(sparse="full", weight=quantized)


def compensated(weight: Tensor, gram: Tensor, bits: int, group: int, damping: float = 0.01) -> Quantized:
    """Return `weight` (m, n) quantized by Algorithm 1 of GPTQ (arXiv 2210.17323).

    With U the upper Cholesky factor of (X Xᵀ + λ I)⁻¹, column j is rounded, err = (w_j − ŵ_j) / U_jj, and err · U_{j,
    j+1:} is subtracted from the columns after it. The scale of a group is chosen when its first column is reached, on
    weights that are up to date, as the one of least Σ err².

    Args:
        weight: float64.
        gram: Gram matrix X Xᵀ (n, n) of the input, float64.
    """
    m, n = weight.shape
    W = weight * (gram.diagonal() > 0)  # the weights of a dead channel have no effect and become zero
    U = inverse_cholesky(gram, damping)
    importance = U.diagonal() ** -2  # what a column's squared error costs once the columns after it are adapted
    scale = W.new_zeros(m, math.ceil(n / group))
    codes = torch.zeros(m, n, dtype=torch.uint8, device=W.device)
    # A block holds whole groups, so that no group's scale is chosen on weights that still lack an update.
    block = max(BLOCK // group, 1) * group
    for start in range(0, n, block):
        end = min(start + block, n)
        errors = torch.zeros_like(W[:, start:end])
        for j in range(start, end):
            if j % group == 0:  # the first column of a group, which is up to date now
                columns = slice(j, min(j + group, end))
                scale[:, j // group] = group_scales(W[:, columns], bits, importance[columns])
            s = scale[:, j // group]
            codes[:, j] = nearest_codes(W[:, j], s, bits)
            error = (W[:, j] - levels(codes[:, j], bits, W.dtype) * s) / U[j, j]
            W[:, j:end] -= torch.outer(error, U[j, j:end])
            errors[:, j - start] = error
        # All errors of the block reach the columns after it in one product (the lazy batch updates of GPTQ).
        W[:, end:] -= errors @ U[start:end, end:]
    return Quantized(codes, scale, bits, group)
