"""ASVD: activation-aware SVD (arXiv 2312.05821)."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..budget import Budget
from ..runtime.errors import CompressionError
from .base import Decomposition, Method, Statistics
from .registry import register_method
from .sparsity import relative_scales
from .svd import affordable_rank, column_weighted_svd


@register_method("asvd")
@dataclass
class ASVD(Method):
    """SVD of the weight scaled by the mean magnitude of its inputs, at the same keep ratio for every layer.

    The paper also searches a keep ratio per matrix, by the perplexity of a model in which that matrix alone is
    truncated. A method sees one matrix and no model, so that search is not part of it.
    """

    alpha: float = field(default=0.5, metadata={"help": "exponent of the scale (mean |X_j|)^α"})

    source: ClassVar[str] = "ASVD, arXiv 2312.05821"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise CompressionError(f"asvd: alpha={self.alpha}, expected a number from 0 to 1")

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W ≈ B A, minimizing ‖(W − B A) D‖_F with D = diag((mean_t |X_jt|)^α)."""
        d = relative_scales(statistics.mean_abs) ** self.alpha
        return column_weighted_svd(weight, d, affordable_rank(self.name, budget))
