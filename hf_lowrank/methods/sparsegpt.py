"""SparseGPT: pruning with second-order compensation (arXiv 2301.00774)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Budget
from ..runtime.errors import CompressionError
from .base import Decomposition, Statistics
from .factorization import inverse_cholesky
from .registry import register_method
from .sparsity import PATTERN_HELP, SparseMethod, largest_kept, largest_per_row, parse_pattern

BLOCK = 128
"""Number of columns whose mask is chosen at once, and between which updates are gathered into one matrix product."""


@register_method("sparsegpt")
@dataclass
class SparseGPT(SparseMethod):
    """Prunes column by column. What a removed entry did is taken over by the columns not yet visited."""

    pattern: str = field(default="unstructured", metadata={"help": PATTERN_HELP})
    damping: float = field(default=0.01, metadata={"help": "λ added to the diagonal of X Xᵀ, as a share of its mean"})

    source: ClassVar[str] = "SparseGPT, arXiv 2301.00774"
    needs_gram: ClassVar[bool] = True
    sequential: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise CompressionError(f"sparsegpt: damping={self.damping}, expected a number above 0")

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """Minimize ‖(W − W_S) X‖_F approximately (arXiv 2301.00774).

        U is the upper Cholesky factor of H⁻¹, H = X Xᵀ + λ I. In every block of columns the entries with the smallest
        w_ij² / U_jj² are removed. Each leaves err = w_ij / U_jj, and err · U_{j, j:} is subtracted from the columns
        from j on. A full N:M pattern chooses its mask group by group, on weights that are up to date.

        Published runs keep the same share of every block and compare the entries of all its rows. Here every row keeps
        the same number. Each block gets as many of them as the row's best entries, by the weights at the start, lie in
        it.
        """
        kept = self.kept_per_row(budget)
        gram = statistics.require("gram", self.name)
        U = inverse_cholesky(gram, self.damping)
        W = weight * (gram.diagonal() > 0)  # the weights of a dead channel have no effect and become zero
        n = W.shape[1]
        # A block holds whole groups of an N:M pattern. `step` is the number of columns whose mask is chosen together.
        group = parse_pattern(self.pattern)[1]
        block = max(BLOCK // group, 1) * group
        step = block
        if self.pattern != "unstructured" and kept == largest_kept(self.pattern, n):
            step = group
        # `best` serves to count the values that a row keeps in each block. It does not decide which.
        best = largest_per_row(W.abs() / U.diagonal(), kept, self.pattern)

        mask = torch.zeros_like(best)
        for start in range(0, n, block):
            end = min(start + block, n)
            errors = torch.zeros_like(W[:, start:end])
            for j in range(start, end):
                if (j - start) % step == 0:
                    stop = min(j + step, end)
                    kept_here = best[:, j:stop].sum(dim=1)
                    scores = W[:, j:stop].abs() / U.diagonal()[j:stop]
                    mask[:, j:stop] = largest_per_row(scores, kept_here, self.pattern)
                error = torch.where(mask[:, j], 0.0, W[:, j] / U[j, j])
                W[:, j:end] -= torch.outer(error, U[j, j:end])
                errors[:, j - start] = error
            # All errors of the block reach the columns after it in one product.
            W[:, end:] -= errors @ U[start:end, end:]
        return Decomposition(sparse="bitmask", weight=torch.where(mask, W, 0.0), mask=mask)
