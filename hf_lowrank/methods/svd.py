"""Truncated SVD at one keep ratio for all layers. `svd-llm`, `asvd` and `fwsvd` measure the error by other norms."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..budget import Budget
from .base import Decomposition, Method, Statistics, too_small
from .factorization import factorize
from .registry import register_method


@register_method("svd")
@dataclass
class SVD(Method):
    """Truncated SVD: the best rank-r matrix, blind to the activations."""

    source: ClassVar[str] = "Eckart and Young, 1936"

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W ≈ B A with r = ⌊bits / (v (m + n))⌋ for v bits per value, minimizing ‖W − B A‖_F."""
        a, b = factorize(weight).truncate(affordable_rank(self.name, budget))
        return Decomposition(lowrank_a=a, lowrank_b=b)


def column_weighted_svd(weight: Tensor, scale: Tensor, rank: int) -> Decomposition:
    """Return W ≈ B A of rank r, minimizing ‖(W − B A) diag(scale)‖_F for a scale (n,) > 0.

    It is the SVD of W diag(scale), with the scale undone in A.
    """
    a, b = factorize(weight * scale).truncate(rank)
    return Decomposition(lowrank_a=a / scale, lowrank_b=b)


def affordable_rank(method: str, budget: Budget) -> int:
    """Return the largest rank within the budget.

    Raises:
        CompressionError: if not even rank 1 is.
    """
    rank = budget.rank()
    if rank < 1:
        raise too_small(method, budget)
    return rank
