"""Plain and whitened SVD with the same keep ratio for every layer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Budget, Decomposition, Method, Statistics, too_small
from .registry import register_method
from .spectral import factorize


@register_method("svd")
@dataclass
class SVD(Method):
    """Truncated SVD: the best rank-r matrix, blind to the activations."""

    source: ClassVar[str] = "Eckart and Young, 1936"

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W ≈ B A with r = ⌊bits / (v (m + n))⌋, minimising ‖W − B A‖_F."""
        return _truncated(self.name, weight, None, budget)


@register_method("svd-llm")
@dataclass
class SVDLLM(Method):
    """Truncation-aware whitening: the best rank-r matrix on the calibration tokens."""

    source: ClassVar[str] = "SVD-LLM, arXiv 2403.07378"
    needs_gram: ClassVar[bool] = True

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W ≈ B A, minimising ‖(W − B A) X‖_F."""
        return _truncated(self.name, weight, statistics.gram, budget)


def _truncated(method: str, weight: Tensor, gram: Tensor | None, budget: Budget) -> Decomposition:
    rank = budget.rank()
    if rank < 1:
        raise too_small(method, budget)
    a, b = factorize(weight, gram).truncate(rank)
    return Decomposition(lowrank_a=a, lowrank_b=b)
