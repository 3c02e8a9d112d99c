"""FWSVD: SVD weighted by Fisher information (arXiv 2207.00112)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..budget import Budget
from .base import Decomposition, Method, Statistics
from .registry import register_method
from .sparsity import relative_scales
from .svd import affordable_rank, column_weighted_svd


@register_method("fwsvd")
@dataclass
class FWSVD(Method):
    """SVD of the weight with every input scaled by the Fisher information of its weights."""

    source: ClassVar[str] = "FWSVD, arXiv 2207.00112"
    needs_gradients: ClassVar[bool] = True

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W ≈ B A, minimizing ‖(W − B A) diag(f)‖_F with f_j = √(Σ_i F_ij) (arXiv 2207.00112).

        F_ij, the Fisher information of a weight, is the mean of (∂L/∂W_ij)² over the calibration batches.
        """
        f = relative_scales(statistics.require("squared_gradients", self.name).sqrt())
        return column_weighted_svd(weight, f, affordable_rank(self.name, budget))
