"""Wanda: pruning by weights and activations (arXiv 2306.11695)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..budget import Budget
from .base import Decomposition, Statistics
from .registry import register_method
from .sparsity import SparseMethod, largest_per_row


@register_method("wanda")
@dataclass
class Wanda(SparseMethod):
    """Keeps the largest |W_ij| ‖X_j‖₂ of every output row, without changing a value."""

    source: ClassVar[str] = "Wanda, arXiv 2306.11695"
    sequential: ClassVar[bool] = True
    factorizes: ClassVar[bool] = False

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W_S = W on the entries of every row with the largest score S_ij = |W_ij| · ‖X_j‖₂ (arXiv 2306.11695).

        Without a pattern this is the exact minimum of ‖(W − W_S) diag(‖X_j‖₂)‖_F.
        """
        mask = largest_per_row(weight.abs().mul_(statistics.column_norms), self.kept_per_row(budget), self.pattern)
        return Decomposition(sparse="bitmask", weight=weight, mask=mask)
