"""Magnitude pruning, the baseline of every pruning paper."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Budget
from .base import Decomposition, Statistics
from .registry import register_method
from .sparsity import SparseMethod, largest_per_row


@register_method("magnitude")
@dataclass
class Magnitude(SparseMethod):
    """Keeps the largest |W_ij|, blind to the activations."""

    source: ClassVar[str] = "Han et al., arXiv 1506.02626"
    factorizes: ClassVar[bool] = False

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W_S = W on the largest entries of every row.

        Published runs compare the entries of a whole layer. The bitmask layout keeps equally many per row, so here a
        row is compared.
        """
        mask = largest_per_row(weight.abs(), self.kept_per_row(budget), self.pattern)
        return Decomposition(sparse="bitmask", weight=torch.where(mask, weight, 0.0), mask=mask)
