"""SparseGPT: pruning with second-order compensation (arXiv 2301.00774)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Budget
from ..runtime.errors import CompressionError
from .base import Decomposition, Statistics
from .registry import register_method
from .sparsity import PATTERN_HELP, SparseMethod, largest_kept, largest_per_row, parse_pattern
from .spectral import inverse_cholesky

BLOCK = 128
"""Columns whose mask is chosen at once, and between which updates are gathered into one matrix product."""


@register_method("sparsegpt")
@dataclass
class SparseGPT(SparseMethod):
    """Prunes column by column; what a removed entry did is taken over by the columns not yet visited."""

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
        """Approximately minimises ‖(W − W_S) X‖_F, by H = X Xᵀ + λ I and the upper Cholesky factor U of H⁻¹ (papers §4).

        In every block of columns the entries with the smallest w_ij² / U_jj² go; each leaves err = w_ij / U_jj, and
        err · U_{j, j:} is subtracted from the columns from j on. A full N:M pattern chooses its mask group by group, from weights
        that are up to date. Published runs keep the same share of every block and compare the entries of all its rows; here every row
        keeps the same number, of which each block gets as many as the row's best entries, by the weights at the start, lie in it.
        """
        kept = self.kept_per_row(budget)
        gram = statistics.require("gram", self.name)
        U = inverse_cholesky(gram, self.damping)
        W = weight * (gram.diagonal() > 0)  # what a dead channel would bring is nothing
        n = W.shape[1]
        group = parse_pattern(self.pattern)[1]
        block = max(BLOCK // group, 1) * group
        step = group if self.pattern != "unstructured" and kept == largest_kept(self.pattern, n) else block
        best = largest_per_row(W.abs() / U.diagonal(), kept, self.pattern)

        mask = torch.zeros_like(best)
        for start in range(0, n, block):
            end = min(start + block, n)
            errors = torch.zeros_like(W[:, start:end])
            for j in range(start, end):
                if (j - start) % step == 0:
                    stop = min(j + step, end)
                    mask[:, j:stop] = largest_per_row(
                        W[:, j:stop].abs() / U.diagonal()[j:stop], best[:, j:stop].sum(dim=1), self.pattern
                    )
                error = torch.where(mask[:, j], 0.0, W[:, j] / U[j, j])
                W[:, j:end] -= torch.outer(error, U[j, j:end])
                errors[:, j - start] = error
            W[:, end:] -= errors @ U[start:end, end:]
        return Decomposition(sparse="bitmask", weight=torch.where(mask, W, 0.0), mask=mask)
