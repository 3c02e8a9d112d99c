"""Truncated SVD with the same keep ratio for every layer; `svd-llm`, `asvd` and `fwsvd` differ in what they measure the error by."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..budget import Budget
from .base import Decomposition, Method, Statistics, too_small
from .registry import register_method
from .spectral import factorize


@register_method("svd")
@dataclass
class SVD(Method):
    """Truncated SVD: the best rank-r matrix, blind to the activations."""

    source: ClassVar[str] = "Eckart and Young, 1936"

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W ≈ B A with r = ⌊bits / (v (m + n))⌋, minimising ‖W − B A‖_F."""
        a, b = factorize(weight).truncate(affordable_rank(self.name, budget))
        return Decomposition(lowrank_a=a, lowrank_b=b)


def column_weighted_svd(weight: Tensor, scale: Tensor, rank: int) -> Decomposition:
    """W ≈ B A of rank r, minimising ‖(W − B A) diag(scale)‖_F: the SVD of W diag(scale), and the scale undone in A; scale (n,) > 0."""
    a, b = factorize(weight * scale).truncate(rank)
    return Decomposition(lowrank_a=a / scale, lowrank_b=b)


def affordable_rank(method: str, budget: Budget) -> int:
    """The largest rank within the budget.

    Raises:
        CompressionError: if that is none.
    """
    rank = budget.rank()
    if rank < 1:
        raise too_small(method, budget)
    return rank
